"""Arguments of nodes and attributes of modules as JSON: numbers, text, lists and None as they are, the rest as
{"kind": …}."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from graphcomp.errors import CheckpointError

JSON = Any
INT64 = 2**63

_KINDS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def damaged(what: str, why: str = "") -> CheckpointError:
    """The error for a document that `save` did not write."""
    return CheckpointError(f"the checkpoint is damaged: {what}", why=why, fix="copy the folder again, or save again")


def encode(value: Any, other: Callable[[Any], JSON] | None = None) -> JSON:
    """A value as JSON.

    Args:
        other: the form of a value of a type that has none here; it raises where it knows none either.

    Raises:
        CheckpointError: there is no form for it.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [encode(item, other) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item, other) for item in value]}
    if isinstance(value, slice):
        return {"slice": [encode(part, other) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, Mapping):
        return {"dict": [[encode(key, other), encode(item, other)] for key, item in value.items()]}
    if isinstance(value, complex):
        return {"complex": [str(value.real), str(value.imag)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, type_ in _KINDS.items():
        if isinstance(value, type_):
            return {kind: str(value).removeprefix("torch.")}
    if other is not None:
        return other(value)
    raise CheckpointError(f"a value of type {type(value).__name__} cannot be stored", why=repr(value)[:200])


def decode(
    value: JSON,
    nodes: Mapping[str, fx.Node],
    devices: Mapping[str, torch.device],
    other: Callable[[str, JSON], Any] | None = None,
) -> Any:
    """What `encode` wrote.

    Args:
        other: the value of a kind that is not known here; it raises where it does not know the kind either.

    Raises:
        CheckpointError: what nobody writes.
    """
    if isinstance(value, list):
        return [decode(item, nodes, devices, other) for item in value]
    if not isinstance(value, dict):
        return _plain(value)
    if len(value) != 1:
        raise damaged(f"a value with the kinds {sorted(value)}", "a value has one kind")
    ((kind, inner),) = value.items()
    if kind in _LEAVES:
        return _LEAVES[kind](inner, nodes, devices)
    if kind not in _CONTAINERS:
        if other is not None:
            return other(kind, inner)
        raise damaged(f"a value of the unknown kind {kind!r}")
    if not isinstance(inner, list):
        raise damaged(f"a {kind} of {inner!r:.100}")
    items = [decode(item, nodes, devices, other) for item in inner]
    try:
        return _CONTAINERS[kind](items)
    except (TypeError, ValueError) as error:
        raise damaged(f"a {kind} of {inner!r:.100}", str(error)) from error


def _plain(value: Any) -> Any:
    if type(value) is int and not -INT64 <= value < INT64:
        raise damaged(f"the number {value:.3e}", "numbers must fit in 64 bits")
    return value


def _node(inner: JSON, nodes: Mapping[str, fx.Node], devices: Mapping[str, torch.device]) -> fx.Node:
    if not isinstance(inner, str) or inner not in nodes:
        raise damaged(f"a node reads {inner!r:.100}", "no node of that name stands in front of it")
    return nodes[inner]


def _device(inner: JSON, nodes: Mapping[str, fx.Node], devices: Mapping[str, torch.device]) -> torch.device:
    try:
        return devices.get(inner) or torch.device(_text(inner, "device"))
    except (RuntimeError, TypeError) as error:
        raise damaged(f"the device {inner!r:.100}", str(error).splitlines()[0]) from error


def _float(inner: JSON, *_: Any) -> float:
    try:
        return float(_text(inner, "float"))
    except ValueError as error:
        raise damaged(f"the float {inner!r:.100}", str(error)) from error


def _complex(items: list[Any]) -> complex:
    real, imaginary = map(float, items)
    return complex(real, imaginary)


def _slice(items: list[Any]) -> slice:
    start, stop, step = items
    return slice(start, stop, step)


def _named(kind: str) -> Callable[..., Any]:
    def find(inner: JSON, *_: Any) -> Any:
        found = getattr(torch, _text(inner, kind), None)
        if not isinstance(found, _KINDS[kind]):
            raise damaged(f"the {kind} {inner!r:.100}", "torch has none of that name")
        return found

    return find


def _text(value: JSON, kind: str) -> str:
    if not isinstance(value, str):
        raise damaged(f"a {kind} of {value!r:.100}", "a name must be text")
    return value


_LEAVES: dict[str, Callable[..., Any]] = {
    "node": _node, "device": _device, "float": _float, **{kind: _named(kind) for kind in _KINDS},
}  # fmt: skip
_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple, "slice": _slice, "complex": _complex, "dict": dict,
}  # fmt: skip


def finite(value: Any) -> Any:
    """Return plain data with None in place of NaN and infinities, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
