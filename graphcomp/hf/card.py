"""What a folder for the Hub has beside weights and config: a model card with figures, and the tokenizer's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphcomp.hf.section import Section
from graphcomp.native.tokenizer import copy_tokenizer

CARD = "README.md"
"""File name of a model card."""

SHOWN = 30
"""Most notes that a card holds."""


def complete(folder: Path, config: Any, section: Section, notes: Sequence[str]) -> None:
    """Write a card, and copy the tokenizer of the folder that the model was loaded from; no file is overwritten.

    Args:
        folder: exists.
        config: of the model; says where it was loaded from.
        notes: of the report.
    """
    name = str(getattr(config, "_name_or_path", "") or "")
    source = Path(name)
    copy_tokenizer(config, folder)
    if not (folder / CARD).exists():
        base = name if name.count("/") == 1 and not source.exists() and not source.is_absolute() else ""
        (folder / CARD).write_text(card(section, notes, base), encoding="utf-8")


def card(section: Section, notes: Sequence[str], base: str = "") -> str:
    """Return a model card.

    Args:
        base: name on the Hub of the model that was cut; "" where it is not known.
    """
    head = ["---", "library_name: transformers", "tags:", "- graphcomp", "- pruned"]
    head += [f"base_model: {base}"] if base else []
    kind = section.architecture
    rows = [
        f"| {name.replace('_', '-')} | {before:,} | {after:,} | {after / max(before, 1):.1%} |"
        for name, (before, after) in section.figures.items()
    ]
    table = ["| | before | after | left |", "| --- | ---: | ---: | ---: |", *rows, ""] if rows else []
    needs = [] if section.plain else ["import graphcomp  # pip install graphcomp: config.json has sizes of its section"]
    use = [
        "```python",
        *needs,
        f"from transformers import {kind}",
        "",
        f"model = {kind}.from_pretrained(folder)",
        "```",
    ]
    more = [f"- and {len(notes) - SHOWN} more"] if len(notes) > SHOWN else []
    said = ["", "## Notes", "", *(f"- {note}" for note in notes[:SHOWN]), *more] if notes else []
    title = f"# {base or kind}, pruned"
    how = f"A {kind} with channels, heads or features cut out by graphcomp {section.version}. Weights are floats."
    return "\n".join([*head, "---", "", title, "", how, "", *table, *use, *said, ""])
