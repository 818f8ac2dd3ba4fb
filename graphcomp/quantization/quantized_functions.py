"""Functions and ops of torch on weights of integers: products and lookups from codes, sizes, memory, refusals.

Importing this module fills `FUNCTIONS` and `OPS` of quantized_tensor.py, which imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphcomp.errors import PlanError
from graphcomp.quantization.handles import held_back
from graphcomp.quantization.operand import are_exact
from graphcomp.quantization.quantized_tensor import FUNCTIONS, OPS, QuantizedTensor
from graphcomp.quantization.read_only import cannot_be_written
from graphcomp.quantization.stored import spread
from graphcomp.torch_compat import schema_of, transforms_active, without_torch_function

aten = torch.ops.aten


# ------------------------------------------------------------------------------------------------ functions of torch
class _Weight:
    """A weight, in what transforms of `torch.func` do not look into."""

    def __init__(self, tensor: QuantizedTensor) -> None:
        self.tensor = tensor


class _Times(torch.autograd.Function):
    """Rows times a weight of integers; the gradient goes to the rows, as if the weight and the rows were floats."""

    @staticmethod
    def forward(rows: Tensor, weight: _Weight, turned: bool) -> Tensor:
        return weight.tensor.times(rows, turned)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Weight, bool], output: Tensor) -> None:
        rows, ctx.weight, ctx.turned = inputs
        ctx.width = rows.shape[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return held_back(gradients[0], ctx.weight.tensor.handle, ctx.width, ctx.turned), None, None

    @staticmethod
    def vmap(info: Any, dims: Any, rows: Tensor, weight: _Weight, turned: bool) -> tuple[Tensor, int]:
        """Run each sample: one range for all elements of a tensor is of one sample."""
        parts = rows.unbind(dims[0])
        return torch.stack([_Times.apply(part, weight, turned) for part in parts]), 0  # type: ignore[no-untyped-call]


def _times(rows: Tensor, weight: Any, turned: bool, bias: Tensor | None) -> Any:
    """Return rows times the weight, plus the bias; NotImplemented where the operands are others."""
    ours = isinstance(weight, QuantizedTensor) and weight.dim() == 2
    if not ours or any(isinstance(t, QuantizedTensor) for t in (rows, bias)):
        return NotImplemented
    if rows.dim() == 0 or rows.numel() == 0 or not rows.is_floating_point():
        return NotImplemented
    if weight.operand is None and (rows.dtype is not weight.dtype or torch.is_autocast_enabled("cpu")):
        return NotImplemented
    follows = transforms_active() or (torch.is_grad_enabled() and rows.requires_grad)
    if follows and not weight.is_traced():
        found: Tensor = _Times.apply(rows, _Weight(weight), turned)  # type: ignore[no-untyped-call]
    else:
        found = weight.times(rows, turned)
    return found if bias is None else found + bias


def _in_floats(rows: Tensor, weight: Any) -> Tensor | None:
    """Return what a product in floats reads in the place of `rows` within `exact_products`; None otherwise, and for
    ranges at run time, whose products are of integers in a graph, too."""
    if (
        torch.compiler.is_compiling()
        or not are_exact()
        or not isinstance(weight, QuantizedTensor)
        or isinstance(rows, QuantizedTensor)
    ):
        return None
    if weight.operand is None:
        return rows
    return None if weight.operand.levels is None else weight.operand.floats(rows)


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    rows = _in_floats(input, weight)
    return _times(input, weight, True, bias) if rows is None else F.linear(rows, weight.dequantize(), bias)


def _addmm(input: Any, mat1: Tensor, mat2: Any, *, beta: float = 1, alpha: float = 1, out: Any = None) -> Any:
    if (beta, alpha) != (1, 1) or out is not None:
        return NotImplemented
    rows = _in_floats(mat1, mat2)
    return _times(mat1, mat2, False, input) if rows is None else torch.addmm(input, rows, mat2.dequantize())


def _matmul(input: Any, other: Any, *, out: Any = None) -> Any:
    if out is not None:
        return NotImplemented
    rows = _in_floats(input, other)
    return _times(input, other, False, None) if rows is None else torch.matmul(rows, other.dequantize())


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Look up the codes of rows, and make floats of these alone."""
    if not isinstance(weight, QuantizedTensor) or max_norm is not None or weight.dim() != 2 or weight._turned:
        return NotImplemented
    return weight.looked_up(input)


def _share_memory(tensor: QuantizedTensor) -> QuantizedTensor:
    """Move codes and parameters into memory that processes share. Layouts of kernels are made anew in each process."""
    held = tensor.held
    held.keep_codes()
    held.products, held.floats, held.sums = {}, None, None
    for part in held.tensors():
        part.share_memory_()  # type: ignore[no-untyped-call]
    return tensor


def _bytes(tensor: QuantizedTensor) -> int:
    """Return the bytes that are held: of codes, scales, and what products were laid out for."""
    return sum(part.numel() * part.element_size() for part in tensor.held.tensors())


def _element_size(tensor: QuantizedTensor) -> float:
    """Return the bytes that are held for each element; a whole number is an int."""
    share = _bytes(tensor) / max(tensor.numel(), 1)
    return int(share) if share.is_integer() else share


def _requires_grad(tensor: QuantizedTensor, requires_grad: bool = True) -> Any:
    if requires_grad:
        raise PlanError(
            "a weight of integers takes no gradient",
            why="codes move by whole steps",
            fix="train an adapter on top (peft), or the float model, and compress the model then",
        )
    return tensor


def _set_data(tensor: Any, value: Any) -> Any:
    """Take rows more or fewer than there are (`resize_token_embeddings`): rows that stay keep their codes, and new ones
    get codes and a scale of their own."""
    if not isinstance(tensor, QuantizedTensor):
        return NotImplemented
    new = value if isinstance(value, QuantizedTensor) else _with_rows(tensor, value)
    with without_torch_function():
        Tensor.data.__set__(tensor, new)  # type: ignore[attr-defined]
    tensor.become(new)
    return None


def _with_rows(tensor: QuantizedTensor, floats: Tensor) -> QuantizedTensor:
    """Return a table whose first rows are those of `tensor`, and whose others are the floats' rounded."""
    own, n = tensor.stored, min(len(floats), len(tensor)) if floats.dim() and tensor.dim() else 0
    alike = floats.dim() == 2 and floats.shape[1:] == tensor.shape[1:] and n and len(floats) != len(tensor)
    stays = alike and own.dim in (None, 0) and torch.equal(floats[:n].to(tensor.dtype), tensor.dequantize()[:n])
    if not stays or tensor.held.shifted():
        raise _cannot_take(tensor, floats)
    rest, scale = floats[n:].to(own.scale.dtype), own.scale
    if own.dim == 0:
        spans = rest.abs().amax(1)[:, None].expand(len(rest), own.scale[0].numel()).reshape(-1, *own.scale.shape[1:])
        scale = torch.cat([own.scale[:n], torch.where(spans == 0, 1.0, spans / own.quant_max)])
    grid = replace(own, scale=scale, zero_point=torch.zeros_like(scale, dtype=torch.int32))
    steps = spread(scale[n:] if own.dim == 0 else scale, 2, own.dim, own.groups)
    added = (rest / steps).round().clamp(own.quant_min, own.quant_max).to(own.values.dtype)
    return QuantizedTensor(replace(grid, values=torch.cat([own.values[:n], added])), tensor.dtype, tensor.operand)


def _set_items(tensor: Any, index: Any, value: Any) -> Any:
    """Refuse `weight[index] = value`: what `index` picks are floats made of the codes, and would be forgotten."""
    if not isinstance(tensor, QuantizedTensor):
        return NotImplemented
    raise cannot_be_written("an assignment to an index")


def _cannot_take(tensor: QuantizedTensor, source: Any) -> PlanError:
    return PlanError(
        f"a weight of integers, {tuple(tensor.shape)}, cannot take the values of floats, {tuple(source.shape)}",
        why="rounding floats to integers needs scales, which belong to other floats",
        fix="load a state_dict of the quantized model; or load into the float model, and compress that",
    )


FUNCTIONS |= {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.mm: _matmul,
    torch.matmul: _matmul,
    Tensor.addmm: _addmm,
    Tensor.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.embedding: _embedding,
    Tensor.share_memory_: _share_memory,
    Tensor.is_shared: lambda tensor: tensor.scale.is_shared(),
    Tensor.element_size: _element_size,
    Tensor.nbytes.__get__: _bytes,  # type: ignore[attr-defined]  # a getter of C
    Tensor.__setitem__: _set_items,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.requires_grad_: _requires_grad,
    Tensor.requires_grad.__set__: _requires_grad,  # type: ignore[attr-defined]
}


# ------------------------------------------------------------------------------------------------ ops of torch
def _moved(tensor: QuantizedTensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Any:
    """Return the tensor on another device, or as if of another dtype."""
    dtype = dtype or tensor.dtype
    if tensor.is_traced():
        if device is not None or not dtype.is_floating_point:
            return tensor.dequantize().to(device=device, dtype=dtype)
        return QuantizedTensor._traced(tensor.handle, tensor.shape, dtype, tensor.operand, tensor._turned)
    if not dtype.is_floating_point:
        return tensor.dequantize().to(dtype)
    return tensor.moved(lambda t: t.to(device) if device is not None else t.clone(), dtype)


def _cloned(tensor: QuantizedTensor, **_: Any) -> QuantizedTensor:
    return tensor.shared() if tensor.is_traced() else tensor.moved(torch.clone, tensor.dtype)


def _overwritten(tensor: Any, source: Any, non_blocking: bool = False) -> Any:
    """Take the codes of `source`: what `load_state_dict` does."""
    if not isinstance(tensor, QuantizedTensor):
        return NotImplemented
    if not isinstance(source, QuantizedTensor) or source.shape != tensor.shape:
        raise _cannot_take(tensor, source)
    tensor.become(source.moved(torch.clone, tensor.dtype))
    return tensor


def _turn(tensor: QuantizedTensor, one: int = 0, other: int = 1) -> Any:
    """Return a matrix with rows and columns exchanged: the other operand of its products is quantized as before."""
    if tensor.operand is None or tensor.dim() != 2 or {one % 2, other % 2} != {0, 1}:
        return NotImplemented
    if tensor.is_traced():
        return QuantizedTensor._traced(
            tensor.handle, tensor.shape[::-1], tensor.dtype, tensor.operand, not tensor._turned
        )
    own = tensor.stored
    if own.groups is not None:
        return NotImplemented
    axis = None if own.dim is None else 1 - own.dim
    return QuantizedTensor(replace(own, values=own.values.t().contiguous(), dim=axis), tensor.dtype, tensor.operand)


def _taken(tensor: Any, pick: Callable[[Tensor], Tensor]) -> Any:
    """Return the floats of some indices of the first dim, and make floats of these alone."""
    if not isinstance(tensor, QuantizedTensor) or tensor.is_traced():
        return NotImplemented
    found = tensor.held.taken(pick, tensor.dtype)
    return NotImplemented if found is None else found


def _select(tensor: Any, dim: int, index: int) -> Any:
    return _taken(tensor, lambda rows: rows[index]) if dim in (0, -tensor.dim()) else NotImplemented


def _index(tensor: Any, indices: Any) -> Any:
    first, *others = indices
    alone = isinstance(first, Tensor) and not first.is_floating_point() and all(other is None for other in others)
    return _taken(tensor, lambda rows: rows[first]) if alone and first.dtype is not torch.bool else NotImplemented


def _index_select(tensor: Any, dim: int, index: Tensor) -> Any:
    return _taken(tensor, lambda rows: rows.index_select(0, index)) if dim in (0, -tensor.dim()) else NotImplemented


def _quantizes(weight: Any) -> bool:
    """Return whether products with a tensor are of quantized operands, which floats of the weight would not be."""
    return isinstance(weight, QuantizedTensor) and weight.operand is not None


def _linear_op(input: Any, weight: Any, bias: Any = None) -> Any:
    return _linear(input, weight, bias) if _quantizes(weight) else NotImplemented


def _addmm_op(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if not _quantizes(mat2):
        return NotImplemented
    found = _matmul(mat1, mat2)
    return found if found is NotImplemented else found * alpha + input * beta


def _matmul_op(input: Any, other: Any) -> Any:
    return _matmul(input, other) if _quantizes(other) else NotImplemented


OPS |= {
    aten.detach.default: QuantizedTensor.shared,
    aten.alias.default: QuantizedTensor.shared,
    aten.clone.default: _cloned,
    aten._to_copy.default: _moved,
    aten.copy_.default: _overwritten,
    aten.t.default: _turn,
    aten.transpose.int: _turn,
    aten.select.int: _select,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.embedding.default: lambda weight, ids, *_: _embedding(ids, weight),
    aten.linear.default: _linear_op,
    aten.addmm.default: _addmm_op,
    aten.mm.default: _matmul_op,
    aten.matmul.default: _matmul_op,
}

PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default,
            aten.baddbmm.default, aten.convolution.default)  # fmt: skip
"""Ops that multiply and sum."""


def _refuse_products(func: Any, args: tuple[Any, ...]) -> None:
    """Raise PlanError where an op would multiply floats of a weight whose products are of quantized operands."""
    weights = [argument for argument in args if isinstance(argument, QuantizedTensor)]
    others = [t for t in args if isinstance(t, Tensor) and not isinstance(t, QuantizedTensor) and t.numel()]
    if func in PRODUCTS and others and any(map(_quantizes, weights)):
        raise PlanError(
            f"{func} multiplies floats by a weight whose other operand is quantized",
            why="F.linear, torch.addmm, mm and matmul with rows and this weight on the right quantize their operand",
            fix="weight.dequantize() makes floats, for a product in floats",
        )


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise PlanError where an op would write into a weight of integers: it would write into a copy."""
    schema = schema_of(func)
    for k, argument in enumerate(schema.arguments):
        written = argument.alias_info is not None and argument.alias_info.is_write
        given = args[k] if k < len(args) else kwargs.get(argument.name)
        if written and isinstance(given, QuantizedTensor):
            raise cannot_be_written(func)


def _check(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _refuse_writes(func, args, kwargs)
    _refuse_products(func, args)


QuantizedTensor.check = staticmethod(_check)
