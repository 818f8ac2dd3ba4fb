"""One table of all families of transformers: paths, reloading and few bits, out of the files of two benchmarks.

    python -m benchmarks.hf --out hf.jsonl
    python -m benchmarks.hf_reload --sparsity 0.5 --ranking local --out reload.jsonl
    python -m benchmarks.hf_reload --sparsity 0.5 --ranking local --bits 8 --out int8.jsonl
    python -m benchmarks.hf_table hf.jsonl reload.jsonl int8.jsonl

Prints Markdown. Cells: "yes"; "-" where the family has no such path; a number, which stands for a reason below
the table. "int8" is a model with weights of 8 bits: its outputs, and its tokens where it generates, are those of the
same weights in floats, and what another process reads from its folder is equal bit for bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import read_json
from benchmarks.hf import CELLS

Row = Mapping[str, Any]
Cell = tuple[str, str]
"""What stands in the cell, and why ("" where that needs no reason)."""

TITLES = (*CELLS, "reload", "reload, generate", "twice", "int8", "int8, generate")
NO: Cell = ("-", "")
YES: Cell = ("yes", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("paths", "reload", "int8"):
        parser.add_argument(name, type=Path)
    asked = parser.parse_args()
    paths, reload, int8 = (
        {row["name"]: row for row in read_json(getattr(asked, n))} for n in ("paths", "reload", "int8")
    )
    reasons: dict[str, int] = {}
    print(f"| family | roles cut | left | {' | '.join(TITLES)} | s |")
    print(f"|---|---|---:|{'---|' * len(TITLES)}---:|")
    counts = dict.fromkeys(TITLES, 0)
    there = {name: row for name, row in paths.items() if "skipped" not in row}
    for name, row in there.items():
        cells = cells_of(row, reload.get(name, {}), int8.get(name, {}))
        texts = []
        for title in TITLES:
            text, why = cells[title]
            counts[title] += text == "yes"
            texts.append(str(reasons.setdefault(why, len(reasons) + 1)) if why else text)
        roles, left = row.get("roles", ""), f"{100 * row['params']:.0f} %" if "params" in row else ""
        print(f"| {name} | {roles} | {left} | {' | '.join(texts)} | {row.get('seconds', '')} |")
    print(f"| **{len(there)}** | | | {' | '.join(str(counts[title]) for title in TITLES)} | |\n")
    for why, number in reasons.items():
        print(f"{number}. {why}")
    for name, row in paths.items():
        if "skipped" in row:
            print(f"\n{name} was left out: {row['skipped']}.")


def cells_of(row: Row, reload: Row, int8: Row) -> dict[str, Cell]:
    """Return the cells of one family."""
    found = {title: path_cell(row.get(title, "-")) for title in CELLS}
    found["reload"] = folder_cell(reload, "equal")
    found["reload, generate"] = folder_cell(reload, "generate")
    found["twice"] = folder_cell(reload, "twice")
    same, read = folder_cell(int8, "floats"), folder_cell(int8, "equal")
    found["int8"] = read if same == YES else same
    generates = int8.get("generates", True)
    found["int8, generate"] = (
        folder_cell(int8, "generate") if generates and same == YES else NO if same == YES else same
    )
    return found


def path_cell(said: str) -> Cell:
    """Return a cell of `benchmarks.hf`."""
    return YES if said == "ok" else NO if said == "-" else ("no", said)


def folder_cell(row: Row, column: str) -> Cell:
    """Return a cell of `benchmarks.hf_reload`."""
    if not row:
        return NO
    if row.get("cut", "class") != "class":
        return "no", row["cut"]
    said = row.get(column)
    if said is True:
        return YES
    if column not in row:
        return "no", row.get("error", "not read")
    return NO if said is None else ("no", said if isinstance(said, str) else f"{column}: not equal")


if __name__ == "__main__":
    main()
