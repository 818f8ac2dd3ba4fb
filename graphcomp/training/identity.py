"""What a training run is, as text: its model, its options and its functions. The same in each process."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.ir.graph import all_tensors
from graphcomp.training import distributed
from graphcomp.training.batches import length_of
from graphcomp.training.folder import INITIAL
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared

PLAIN = (type(None), bool, int, float, complex, str, bytes)
DEPTH = 4
"""Levels of functions, one inside the other, that are looked into."""


def code_digest(function: Any) -> str:
    """Return a digest of a callable: bytecode, constants, defaults, arguments of partials, functions in closures.

    Line numbers and file names do not count. Nor do values in closures and attributes of objects: a loss may count its
    calls there, and a run has to go on all the same.
    """
    digest = hashlib.sha256()
    for text in _parts(function, DEPTH):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def _parts(value: Any, depth: int) -> Iterator[str]:
    kind = type(value)
    yield f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, PLAIN):
        yield repr(value)
    elif isinstance(value, CodeType):
        yield from (value.co_code.hex(), *value.co_names)
        for constant in value.co_consts:
            yield from _parts(constant, depth)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _parts(part, depth)
    elif depth > 0:
        for part in _inside(value):
            yield from _parts(part, depth - 1)


def _inside(value: Any) -> list[Any]:
    """What a callable calls."""
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_set(cell)]
        called = [cell for cell in cells if isinstance(cell, (FunctionType, MethodType, functools.partial))]
        keywords = sorted((value.__kwdefaults__ or {}).items())
        return [value.__code__, value.__defaults__, keywords, *called]
    if isinstance(value, MethodType):
        return [value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, sorted(value.keywords.items())]
    return [getattr(type(value), name, None) for name in ("__call__", "forward")]


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a variable that was not assigned yet
        return False
    return True


def about_model(ready: Prepared, whole: nn.Module, prefix: str) -> dict[str, str]:
    """What tells one prepared module from another: shapes, and the weights that the run begins with. Those of
    quantizers, and what a calibration corrects, follow from inputs, which may be drawn anew when a run goes on."""
    session = ready.session
    found = whole.state_dict()
    originals = {f"{prefix}{name}": t for name, t in all_tensors(session.plan.captured.module)}
    tensors = "\n".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in found.items())
    digest = hashlib.sha256(tensors.encode()).hexdigest()[:16]
    limits = sorted({(site.low, site.high) for site in session.sites})
    return {
        "model": type(session.plan.model).__name__,
        "tensors": digest,
        INITIAL: tensors_digest(originals.get(name, t) for name, t in found.items() if "graphcomp_" not in name),
        "bits": str(session.bits),
        "layer bits": ", ".join(f"{low} to {high}" for low, high in limits),
    }


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Of their bytes. This takes less time than to write a checkpoint of them."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def about_training(given: Training, data: Iterable[Any], chosen: Training) -> dict[str, str]:
    """Return what tells one training from another.

    Args:
        given: the options as they were given.
        chosen: the options with what was chosen for the model.
    """
    assert chosen.optimizer is not None
    return {
        "batches": str(length_of(data)),
        "optimizer": chosen.optimizer.__name__,
        "lr": str(chosen.lr),
        "lr_quant": str(given.lr_quant),
        "weight_decay": str(given.weight_decay),
        "options": str({name: given.options[name] for name in sorted(given.options)}),
        "scheduler": "cosine" if given.scheduler is None else name_of(given.scheduler),
        "accumulate": str(given.accumulate),
        "clip_norm": str(given.clip_norm),
        "shrink": str(given.shrink),
        "epochs": str(given.epochs),
        **({"freeze_norms": str(given.freeze_norms)} if given.freeze_norms is not None else {}),
        **({"autocast": str(given.autocast)} if given.autocast is not None else {}),
        **({"processes": str(distributed.count())} if distributed.count() > 1 else {}),
    }


def name_of(found: Any) -> str:
    """The same in each process, unlike repr."""
    found = found.func if isinstance(found, functools.partial) else found
    return str(getattr(found, "__qualname__", type(found).__qualname__))
