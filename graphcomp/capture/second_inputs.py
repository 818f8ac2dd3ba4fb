"""Inputs beside the example inputs, on which a result is compared, too."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor

from graphcomp.capture.capture import Captured
from graphcomp.ir.graph import tensor_values
from graphcomp.ir.inputs import copies
from graphcomp.ir.module import GUARDS
from graphcomp.ir.preserve import eval_copy
from graphcomp.numerics.compare import floating_tensors
from graphcomp.torch_compat import pytree

SEED = 0x5EC0


class Variant(NamedTuple):
    """One set of inputs. `name` says what differs from the example inputs: "other values", "another batch size"."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def variants(captured: Captured) -> list[Variant]:
    """Return other inputs for the model that was captured, the same at each call; tensors are new.

    - "other values": the shapes of the example, values redrawn within the range of each tensor.
    - "another batch size": where dim 0 of the first tensor is symbolic. "another length": where other dims are.
    - "a padded mask": where a tensor of flags or of the integers 0 and 1 holds only ones, zeros at the end of rows.

    A model may refuse such inputs (lengths that have to be sorted): what raises on a variant is no fault of a result.
    No variants of tensors without values (the meta device).
    """
    leaves, spec = pytree.tree_flatten((captured.inputs.args, captured.inputs.kwargs))
    if not leaves or any(isinstance(leaf, Tensor) and not _has_values(leaf) for leaf in leaves):
        return []
    found: dict[str, list[Any]] = {"other values": _each(leaves, _redrawn())}
    found |= {name: _each(resized, _redrawn()) for name, resized in _resized(captured, leaves).items()}
    if any(_is_full_mask(leaf) for leaf in leaves):
        found["a padded mask"] = _each(leaves, _padded)
    result = []
    for name, values in found.items():
        if _differ(values, leaves):
            args, kwargs = pytree.tree_unflatten(values, spec)
            result.append(Variant(name, tuple(args), dict(kwargs)))
    return result


MASKS: tuple[tuple[str, torch.dtype], ...] = (("b s", torch.long), ("b 1 s s", torch.bool), ("b s", torch.bool))
"""Shapes and dtypes that a mask over a batch of sequences may have."""


def padded_masks(captured: Captured) -> list[Variant]:
    """Return the example inputs with a mask with padding, for masks that the forward takes and the example leaves out.

    A parameter of the forward is a mask if the word stands in its name, a tensor of ones changes nothing, and zeros in
    the tensor change the output. The user's model runs on each try.
    """
    size = _batch_and_length(captured)
    if size is None:
        return []
    found = []
    for name in _masks_left_out(captured):
        mask = _accepted_mask(captured, name, *size)
        if mask is not None:
            found.append(Variant(f"a padded mask as {name}", *_with(captured, name, mask)))
    return found


def _masks_left_out(captured: Captured) -> list[str]:
    try:
        known = inspect.signature(captured.original.forward).parameters.values()
    except (TypeError, ValueError):  # a forward that is no function of Python
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [p.name for p in known if p.kind in kinds]
    given = {*names[: len(captured.inputs.args)], *captured.inputs.kwargs}
    return [p.name for p in known if p.kind in kinds and "mask" in p.name and p.default is None and p.name not in given]


def _batch_and_length(captured: Captured) -> tuple[int, int] | None:
    """Return batch size and length of the first input that is a batch of token numbers or of vectors."""
    for leaf in pytree.tree_leaves((captured.inputs.args, captured.inputs.kwargs)):
        if isinstance(leaf, Tensor):
            tokens = leaf.dim() == 2 and not leaf.is_floating_point()
            return (leaf.shape[0], leaf.shape[1]) if (tokens or leaf.dim() == 3) and _has_values(leaf) else None
    return None


def _with(captured: Captured, name: str, mask: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = captured.inputs.copies()
    return args, {**kwargs, name: mask}


def _accepted_mask(captured: Captured, name: str, batch: int, length: int) -> Tensor | None:
    """Return the first mask with padding that the model takes for one."""
    plain = _run(captured, *captured.inputs.copies())
    for form, dtype in MASKS if plain else ():
        shape = [{"b": batch, "s": length, "1": 1}[part] for part in form.split()]
        full = torch.ones(shape, dtype=dtype, device=plain[0].device)
        whole, padded = (
            _run(captured, *_with(captured, name, full)),
            _run(captured, *_with(captured, name, _padded(full))),
        )
        if whole and padded:
            return _padded(full) if _alike(plain, whole) and not _alike(plain, padded) else None
    return None


def _run(captured: Captured, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the floating tensors that the model returns; none where the model raises."""
    with eval_copy(captured.original, real=True) as model, torch.no_grad():
        torch.manual_seed(SEED)
        try:
            return floating_tensors(model(*args, **kwargs))
        except Exception:  # a model may refuse a mask of another form in any way
            return []


def _alike(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)
        for one, other in zip(a, b, strict=True)
    )


def _has_values(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized


def _each(leaves: list[Any], change: Callable[[Tensor], Tensor]) -> list[Any]:
    """Change the tensors among `leaves`; one tensor in two places stays one tensor."""
    changed = {id(leaf): change(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
    return [changed[id(leaf)] if isinstance(leaf, Tensor) else copies(leaf) for leaf in leaves]


def _differ(values: list[Any], leaves: list[Any]) -> bool:
    pairs = [(a, b) for a, b in zip(values, leaves, strict=True) if isinstance(a, Tensor)]
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------------------------------------ values
def _redrawn() -> Callable[[Tensor], Tensor]:
    """Return a function that redraws the values of a tensor within their range; seeded."""
    generator = torch.Generator().manual_seed(SEED)

    def redraw(tensor: Tensor) -> Tensor:
        known = tensor.detach().cpu()
        if tensor.is_complex():
            parts = [_redrawn_floats(part, generator) for part in (known.real, known.imag)]
            other = torch.complex(parts[0], parts[1])
        elif tensor.is_floating_point():
            other = _redrawn_floats(known, generator)
        else:
            other = _permuted(known, generator)
        other = other.to(tensor.device, tensor.dtype)
        return other.requires_grad_() if tensor.requires_grad else other

    return redraw


def _redrawn_floats(known: Tensor, generator: torch.Generator) -> Tensor:
    """Mix the finite values with those of other places: between the least and the largest value.

    Values that all are one number c lie between 0 and c instead, and are normal where c is 0. A tensor of two numbers
    (a mask of 0 and -inf) is permuted along the last dim.
    """
    wide = known if known.dtype == torch.float64 else known.float()
    distinct = len(torch.unique(wide))
    if distinct == 2 and wide.numel() > 2:
        return _permuted(wide, generator)
    if distinct <= 1:
        constant = wide.flatten()[0] if wide.numel() else wide.new_zeros(())
        noise = torch.randn(wide.shape, generator=generator, dtype=wide.dtype)
        return noise if not constant else constant * noise.sigmoid()
    finite = wide.isfinite()
    values = wide[finite]
    share = torch.rand(values.shape, generator=generator, dtype=wide.dtype)
    other = values[torch.randperm(len(values), generator=generator)]
    mixed = wide.clone()
    mixed[finite] = share * values + (1 - share) * other
    return mixed


def _permuted(known: Tensor, generator: torch.Generator) -> Tensor:
    """Permute the values along the last dim, so that each row holds the same values."""
    if known.dim() == 0:
        return known.clone()
    order = torch.rand(known.shape, generator=generator).argsort(-1)
    return known.gather(-1, order)


def _is_full_mask(leaf: Any) -> bool:
    return (
        isinstance(leaf, Tensor)
        and not leaf.is_floating_point()
        and not leaf.is_complex()
        and leaf.dim() > 1
        and leaf.shape[-1] > 1
        and bool((leaf == 1).all())
    )


def _padded(tensor: Tensor) -> Tensor:
    """Set the last third of every second row of a mask of ones to 0, beginning with the last row."""
    other = copies(tensor)
    if _is_full_mask(tensor):
        rows = other.flatten(0, -2)
        rows[torch.arange(len(rows) - 1, -1, -2), -max(tensor.shape[-1] // 3, 1) :] = 0
        other = rows.view(tensor.shape)
    return other


# ------------------------------------------------------------------------------------------------ sizes
def _resized(captured: Captured, leaves: list[Any]) -> dict[str, list[Any]]:
    """Return the example inputs with another batch size, and with other lengths, where the graph has symbols."""
    places = captured.module.graph.find_nodes(op="placeholder")
    if len(places) != len(leaves):
        return {}
    shapes = [_expressions(place) for place in places]
    now: dict[sympy.Symbol, int] = {}
    first: set[sympy.Symbol] = set()
    for shape, leaf in zip(shapes, leaves, strict=True):
        for dim, size in enumerate(shape):
            if isinstance(size, sympy.Symbol):
                now.setdefault(size, leaf.shape[dim])
                first |= {size} if dim == 0 else set()
    length = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
    batch = {symbol for symbol in first if now[symbol] == length}
    result = {}
    for name, symbols in (("another batch size", batch), ("another length", set(now) - batch)):
        for step in (-1, 1, -2, 2) if symbols else ():
            values = {symbol: n + step if symbol in symbols else n for symbol, n in now.items()}
            resized = [_fit(leaf, shape, values) for leaf, shape in zip(leaves, shapes, strict=True)]
            if min(values.values()) > 1 and None not in resized and _allowed(captured, places, values, resized):
                result[name] = [found[0] for found in resized if found is not None]
                break
    return result


def _allowed(
    captured: Captured, places: list[Any], values: Mapping[sympy.Symbol, int], resized: list[tuple[Any] | None]
) -> bool:
    """Return whether the graph holds for these sizes: within its ranges, and on the path of the example inputs."""
    shapes = {
        place.name: tuple(found[0].shape)
        for place, found in zip(places, resized, strict=True)
        if found is not None and isinstance(found[0], Tensor)
    }
    within = all(found.lower <= values[symbol] <= found.upper for symbol, found in _ranges(places) if symbol in values)
    return within and not any(guard.broken_by(shapes) for guard in captured.module.meta.get(GUARDS, ()))


def _ranges(places: list[Any]) -> list[tuple[sympy.Symbol, Any]]:
    """Return the lengths that the graph was captured for: (symbol, range with `lower` and `upper`)."""
    for place in places:
        for tensor in tensor_values(place):
            environment = getattr(getattr(tensor, "fake_mode", None), "shape_env", None)
            if environment is not None:
                return list(environment.var_to_range.items())
    return []


def _expressions(place: Any) -> list[Any]:
    """Return the shape of an input, symbolic lengths as sympy expressions."""
    tensors = tensor_values(place)
    shape: Any = tensors[0].shape if tensors else ()
    return [size.node.expr if isinstance(size, torch.SymInt) else int(size) for size in shape]


def _fit(leaf: Any, shape: list[Any], values: Mapping[sympy.Symbol, int]) -> tuple[Any] | None:
    """Return (the leaf with the lengths that `values` give,), rows repeated where it grows; None where one is open."""
    if not isinstance(leaf, Tensor):
        return (leaf,)
    if len(shape) != leaf.dim():
        return None
    for dim, size in enumerate(shape):
        length: Any = size.subs(values) if isinstance(size, sympy.Expr) else sympy.Integer(leaf.shape[dim])
        if not length.is_Integer:
            return None
        if int(length) != leaf.shape[dim]:
            leaf = leaf.index_select(dim, torch.arange(int(length), device=leaf.device) % leaf.shape[dim])
    return (leaf,)
