"""Decoders that return their cache of past keys and values, which no graph can hold: the cache is switched off where
that changes no other output."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.capture.record import named_tensors
from graphcomp.ir.inputs import copies
from graphcomp.ir.module import leaf_names
from graphcomp.ir.preserve import eval_copy
from graphcomp.numerics.compare import relative_error, tolerance_of
from graphcomp.torch_compat import pytree

SWITCH = "use_cache"
"""The argument of forward by which callers of decoders switch the cache on and off."""

NOTE = f"captured with {SWITCH}=False, which changes no other output: the cache of keys and values is no part of it"


def switched_off(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return `kwargs` without the cache; None where the forward has no switch, or the caller has set the switch."""
    signature = inspect.signature(model.forward)
    if SWITCH not in signature.parameters or SWITCH in signature.bind_partial(*args, **kwargs).arguments:
        return None
    return {**kwargs, SWITCH: False}


def loses_the_cache_alone(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], without: Mapping[str, Any]
) -> bool:
    """Return whether `model` gives the same with the keywords `without`, but for objects that are no tensors.

    On the meta device, where there are no values, shapes are compared.
    """
    first, second = _run(model, args, kwargs), _run(model, args, without)
    before, after = dict(named_tensors(first, "")), dict(named_tensors(second, ""))
    objects = _objects(first)
    lost = before.keys() - after.keys()
    return (
        after.keys() <= before.keys()
        and all(any(f"{name}.".startswith(f"{path}.") for path in objects) for name in lost)
        and all(_same(before[name], tensor) for name, tensor in after.items())
    )


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    args, given = copies((args, dict(kwargs)))
    with eval_copy(model, real=True) as copied, torch.no_grad():
        return copied(*args, **given)


def _objects(outputs: Any) -> list[str]:
    """Names of the outputs that are neither tensors nor constants."""
    leaves, spec = pytree.tree_flatten(outputs)
    plain = (Tensor, bool, int, float, str, type(None))
    return [name for name, leaf in zip(leaf_names(spec), leaves, strict=True) if not isinstance(leaf, plain)]


def _same(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape or before.dtype != after.dtype:
        return False
    if before.is_meta:
        return True
    if not before.is_floating_point():
        return torch.equal(before, after)
    return relative_error(before, after) <= tolerance_of(before)
