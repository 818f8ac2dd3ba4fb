"""graphcomp.json as text: what may stand there, and a checksum over all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from graphcomp.checkpoint.integers import are_facts
from graphcomp.errors import CheckpointError
from graphcomp.ir.json_values import damaged

FORMAT = 2
"""The newest format that is read. Format 2 has weights of integers in a class; all else is written as format 1."""
CHECKSUM = "document_sha256"
"""Key of the checksum. Documents of versions up to 0.1 have none."""

DEPTH = 200
"""Largest nesting of lists and objects."""

Document = dict[str, Any]


# ------------------------------------------------------------------------------------------------ text
def written(document: Mapping[str, Any]) -> str:
    """The text of a document, with its checksum."""
    plain = {key: value for key, value in document.items() if key != CHECKSUM}
    return json.dumps({**plain, CHECKSUM: _checksum(plain)}, allow_nan=False, indent=1)


def parsed(path: Path) -> Document:
    """The document in a file, as far as it is one of this format: see `check_fields` for the rest.

    Raises:
        CheckpointError: no JSON, another format, nested too deeply, changed since it was written.
    """
    try:
        document = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats, parse_constant=_no_constant
        )
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or truncated", why=f"{type(error).__name__}: {error}") from error
    if not isinstance(document, dict) or type(version := document.get("format")) is not int or version < 1:
        raise CheckpointError(f"{path} is damaged", why="it holds no format")
    if version > FORMAT:
        raise CheckpointError(
            f"{path.parent} was made by a newer graphcomp ({document.get('graphcomp', 'unknown')!s:.50})",
            why=f"its format is {version}, and this version reads up to {FORMAT}",
            fix="pip install --upgrade graphcomp",
        )
    if _depth(document) > DEPTH:
        raise CheckpointError(f"{path} is damaged", why=f"it is nested more than {DEPTH} times")
    stored = document.pop(CHECKSUM, None)
    if stored != (None if stored is None and _has_no_checksum(document) else _checksum(document)):
        raise CheckpointError(
            f"{path} was changed or is damaged", why="its SHA-256 is not the one it holds",
            fix="copy the folder again, or save again",
        )  # fmt: skip
    return document


def _has_no_checksum(document: Document) -> bool:
    """Whether a version wrote the document that wrote no checksums, nor dtypes and shapes of tensors."""
    return "tensors" not in document


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, separators=(",", ":")).encode()).hexdigest()


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _depth(value: Any) -> int:
    """How deeply lists and objects are nested, without recursion."""
    found, level = 0, [value]
    while level:
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        found += 1
    return found


# ------------------------------------------------------------------------------------------------ fields
def check_fields(document: Document) -> Document:
    """The document, where all of its fields are of their kind, and what versions up to 0.1 left out is filled in.

    Raises:
        CheckpointError: a field is missing or of another kind.
    """
    document = {"tensors": None, "modules": None, "plain": [], "inside_attributes": [], "integers": {}, **document}
    for name, fits in FIELDS.items():
        if name not in document:
            raise damaged(f"{name!r} is missing")
        if not fits(document[name]):
            raise damaged(f"{name!r} is {document[name]!r:.100}")
    if (document["graph"] is None) != (document["graph_at"] is None):
        raise damaged("there must be a graph and its place, or neither")
    return document


def is_count(value: Any) -> bool:
    """Whether a value of JSON can be a length or an index."""
    return type(value) is int and 0 <= value < 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_data(value: Any) -> bool:
    return isinstance(value, dict)


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _each(values: Any, kind: type, fits: Callable[[Any], bool]) -> bool:
    return isinstance(values, kind) and all(map(fits, _items(values)))


def _items(values: Any) -> Iterable[Any]:
    return values.values() if isinstance(values, dict) else values


def _is_names(value: Any) -> bool:
    return _each(value, list, _is_text)


def _is_shape(value: Any) -> bool:
    return _each(value, list, is_count)


def _is_kept(value: Any) -> bool:
    """Indices by dim."""
    return _each(value, dict, _is_shape) and all(dim.isascii() and dim.isdigit() and len(dim) < 4 for dim in value)


def _is_edit(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and _is_text(value[0]) and _is_text(value[1])


def _is_kind(value: Any) -> bool:
    """dtype and shape of a tensor."""
    return isinstance(value, list) and len(value) == 2 and _is_text(value[0]) and _is_shape(value[1])


FIELDS: dict[str, Callable[[Any], bool]] = {
    "form": lambda value: value in ("native", "graph"),
    "reason": _is_text,
    "kept": lambda value: _each(value, dict, _is_kept),
    "report": _is_data,
    "edits": lambda value: _each(value, list, _is_edit),
    "original_shapes": lambda value: _each(value, dict, _is_shape),
    "class": _is_text,
    "modules": _or_none(lambda value: _each(value, dict, _is_text)),
    "device": _is_text,
    "graph_at": _or_none(_is_text),
    "graph": _or_none(_is_data),
    "recipe": _or_none(_is_data),
    "attributes": lambda value: _each(value, list, _is_edit),
    "aliases": lambda value: _each(value, dict, _is_names),
    "parameters": _is_names,
    "not_trained": _is_names,
    "eval": _is_names,
    "plain": _is_names,
    "inside_attributes": _is_names,
    "tensors_sha256": _is_text,
    "tensors": _or_none(lambda value: _each(value, dict, _is_kind)),
    "integers": lambda value: _each(value, dict, are_facts),
}
"""Field -> whether it can have that value."""
