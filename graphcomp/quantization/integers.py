"""Run a lowered graph as an integer kernel would: no float between one quantized activation and the next.

A lowered graph says dequantize -> op -> quantize and, run as it stands, computes in float. `IntegerInterpreter` keeps a
dequantized value as integers and their scale, and computes where every operand is one:

    convolution, product    int32 sums of (x - z_x) (w - z_w), plus the int32 bias
    quantize                sums times the real multiplier s_x s_w / s_y, rounded half to even, clamped to the codes
    addition, concat        of integers, each with its own multiplier
    move, max pool, relu    of the integers
    other clips             of the codes behind them
    products whose operand is quantized at run time: whole sums, exact, and the scales of operand and weight

All else gets floats, as the graph says. The scheme is that of Jacob et al. 2018 (arXiv 1712.05877), section 2.2, with
the multiplier in float64 where a device has 32 bits and a shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.errors import VerificationError
from graphcomp.ir.graph import bound, is_op
from graphcomp.ir.run_nodes import Instead, compute_node, run_tapped
from graphcomp.numerics.compare import relative_error
from graphcomp.ops.answers import clip_of, compute_of, move_of, operands_of
from graphcomp.quantization import dynamic, ops
from graphcomp.quantization.lower import INT32_MAX
from graphcomp.quantization.placement import (
    padded_with,
)
from graphcomp.torch_compat import pytree

aten = torch.ops.aten

STEPS_ALLOWED = 1


@dataclass(frozen=True)
class Scaled:
    """A value as integers: clamp(Σ integers * scale, low, high) over its terms.

    Attributes:
        terms: (integers, scale) each: int32 of the value's shape, and float64 that broadcasts with it.
        low, high: a clip that is still to be applied.
    """

    terms: tuple[tuple[Tensor, Tensor], ...]
    low: float = -math.inf
    high: float = math.inf

    @property
    def clipped(self) -> bool:
        return (self.low, self.high) != (-math.inf, math.inf)

    @property
    def one_scale(self) -> bool:
        """Whether every term has a single scale."""
        return all(scale.dim() == 0 for _, scale in self.terms)

    @property
    def shape(self) -> torch.Size:
        return self.terms[0][0].shape

    def to_float(self) -> Tensor:
        """float32, as the graph computes it."""
        total = sum((integers.double() * scale for integers, scale in self.terms[1:]), start=_first(self.terms))
        return total.clamp(self.low, self.high).float()

    def to_codes(self, step: float, zero: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
        """On another scale: the requantization step of an integer kernel."""
        total = _first(self.terms, step)
        for integers, scale in self.terms[1:]:
            total = total + integers.double() * (scale / step)
        ends = torch.tensor([self.low / step, self.high / step], dtype=torch.float64).round()
        return (total.round().clamp(ends[0], ends[1]) + zero).clamp(low, high).to(dtype)


def _first(terms: Sequence[tuple[Tensor, Tensor]], step: float = 1.0) -> Tensor:
    integers, scale = terms[0]
    return integers.double() * (scale / step)


class _NotIntegers(Exception):
    """Why an op on integers computes in float."""


class IntegerInterpreter:
    """Runs a lowered graph, in integers wherever the graph allows.

    Attributes:
        in_integers: names of the nodes that computed on integers, in the order of the graph, as of the last run.
        in_floats: name of a node that was handed integers and computed in float -> why.

    Args:
        module: `lower(…).module`.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.in_integers: list[str] = []
        self.in_floats: dict[str, str] = {}

    def run(self, *args: Any) -> Any:
        """Return what the graph returns, floats, for the positional arguments of the model.

        Raises:
            VerificationError: a sum of products does not fit into 32 bits.
        """
        graph = self.module.graph
        return graph.process_outputs(self.run_flat(graph.process_inputs(*args)))

    def run_flat(self, inputs: Sequence[Any], instead: Instead | None = None) -> Any:
        """As `run`, for flat inputs and outputs; `instead` as in `run_tapped`."""
        self.in_integers, self.in_floats = [], {}
        return run_tapped(self.module, inputs, instead=instead, compute=self._compute)

    def _compute(self, module: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.target in DEQUANTIZE:
            return DEQUANTIZE[node.target](bound(node.target, args, kwargs))
        if node.target is dynamic.matmul_dynamic:
            self.in_integers.append(node.name)
            return _products_at_run_time(node, bound(node.target, args, kwargs))
        picks = node.op == "call_function" and not is_op(node)  # an item of several values
        if picks or not any(map(_is_scaled, _leaves((args, kwargs)))):
            return compute_node(module, node, args, kwargs)
        if is_op(node):
            try:
                found = _compute_in_integers(node, bound(node.target, args, kwargs))
            except _NotIntegers as reason:
                self.in_floats[node.name] = str(reason)
            else:
                self.in_integers.append(node.name)
                return found
        args, kwargs = pytree.tree_map(_float, (args, kwargs), is_leaf=_is_scaled)
        return compute_node(module, node, args, kwargs)


def _is_scaled(found: Any) -> bool:
    return isinstance(found, Scaled)


def _leaves(found: Any) -> list[Any]:
    return pytree.tree_leaves(found, is_leaf=_is_scaled)


def _float(found: Any) -> Any:
    return found.to_float() if isinstance(found, Scaled) else found


# ------------------------------------------------------------------------------------------------ from codes
def _dequantize_per_tensor(a: dict[str, Any]) -> Scaled:
    return Scaled(((a["input"].to(torch.int32) - a["zero_point"], _double(a["scale"])),))


def _dequantize_per_channel(a: dict[str, Any]) -> Scaled:
    codes, axis = a["input"].to(torch.int32), a["axis"]
    shape = [-1 if d == axis else 1 for d in range(codes.dim())]
    zero = 0 if a["zero_points"] is None else a["zero_points"].view(shape).to(torch.int32)
    return Scaled(((codes - zero, a["scales"].double().view(shape)),))


def _double(number: Any) -> Tensor:
    return torch.as_tensor(number, dtype=torch.float64)


DEQUANTIZE: dict[object, Callable[[dict[str, Any]], Scaled]] = {
    ops.dequantize_per_tensor: _dequantize_per_tensor,
    ops.dequantize_per_channel: _dequantize_per_channel,
}


# ------------------------------------------------------------------------------------------------ on integers
def _compute_in_integers(node: fx.Node, a: dict[str, Any]) -> Any:
    """The op on integers, from its arguments by name.

    Raises:
        _NotIntegers: there is no such thing.
    """
    if compute_of(node):
        return _products(node, a)
    if move_of(node):
        return _move(node, a)
    if clip_of(node):
        return _clip(node, a)
    if node.target == ops.quantize_per_tensor:
        return a["input"].to_codes(a["scale"], a["zero_point"], a["quant_min"], a["quant_max"], a["dtype"])
    if node.target is aten.add.Tensor:
        return _add(a["self"], a["other"], a["alpha"])
    if node.target is aten.cat.default:
        return _cat(a["tensors"], a["dim"])
    raise _NotIntegers(f"{node.target} has no integer form here")


def _products(node: fx.Node, a: dict[str, Any]) -> Scaled:
    """Sums of products, int32, and what they count in, per output channel."""
    operands = operands_of(node)
    x, weight = (_single(a[name], name) for name in (operands.data[0], operands.weight))
    if x[1].dim() != 0:
        raise _NotIntegers("its operand has several scales")
    sums = _sums(node, a, x[0], weight[0])
    channels = sums.dim() + 1 - weight[0].dim() if operands.convolution else sums.dim() - 1
    scale = x[1] * weight[1]
    if scale.dim() != 0:
        if weight[0].shape[operands.out] != scale.numel():
            raise _NotIntegers("the scales of its weight are not one per output")
        repeats = a["groups"] if operands.transposed else 1
        scale = scale.reshape(-1).repeat(repeats)
        scale = scale.view([-1 if d == channels else 1 for d in range(sums.dim())])
    bias = a[operands.bias] if operands.bias else None
    if bias is not None:
        sums = sums + _bias(bias, scale).view([-1 if d == channels else 1 for d in range(sums.dim())])
    _check_int32(node, sums)
    return Scaled(((sums.to(torch.int32), scale),))


def _products_at_run_time(node: fx.Node, a: dict[str, Any]) -> Tensor:
    """Return floats, as what is quantized at run time is not quantized behind the layer."""
    weight = a["weight"].double()
    rows = a["codes"].double() - a["zero_point"].double()
    sums = rows @ (weight.mT if a["turned"] else weight)
    _check_int32(node, sums)
    found: Tensor = sums * a["scale"].double() * a["weight_scale"].double()
    found = found if a["bias"] is None else found + a["bias"].double()
    return found.to(a["weight_scale"].dtype)


def _sums(node: fx.Node, a: dict[str, Any], x: Tensor, weight: Tensor) -> Tensor:
    """In float64, which is exact for whole numbers up to 2^53: torch has no fast integer convolution."""
    operands = operands_of(node)
    if node.target is aten.addmm.default and (a["beta"], a["alpha"]) == (1, 1):
        return x.double() @ weight.double()
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        raise _NotIntegers("it adds another operand by a factor")
    whole = {**a, operands.data[0]: x.double(), operands.weight: weight.double()}
    if operands.bias:
        whole[operands.bias] = None
    found: Tensor = node.target(**whole)  # type: ignore[operator]
    return found


def _bias(bias: Any, scale: Tensor) -> Tensor:
    """(c,) int32, on the scale of the products."""
    integers, own = _single(bias, "bias")
    if integers.dim() != 1 or not torch.allclose(own.reshape(-1), scale.reshape(-1), rtol=1e-5, atol=0):
        raise _NotIntegers("its bias has another scale than its products")
    return integers


def _single(found: Any, name: str) -> tuple[Tensor, Tensor]:
    if not isinstance(found, Scaled):
        raise _NotIntegers(f"its {name} is float")
    if len(found.terms) > 1 or found.clipped:
        raise _NotIntegers(f"its {name} is not on one scale")
    return found.terms[0]


def _check_int32(node: fx.Node, sums: Tensor) -> None:
    if sums.numel() and float(sums.abs().max()) > INT32_MAX:
        raise VerificationError(
            f"a sum of products of '{node.name}' does not fit into 32 bits",
            why=f"it is {float(sums.abs().max()):.3g}, more than {INT32_MAX}",
            fix="fewer bits for its weight or its operand",
        )


def _move(node: fx.Node, a: dict[str, Any]) -> Any:
    """The op itself, on the integers of each term."""
    move = move_of(node)
    assert move is not None
    found = a[move.operand]
    if not isinstance(found, Scaled) or not found.one_scale:
        raise _NotIntegers("its operand has several scales")
    if (move.pads and (found.clipped or padded_with(node) != 0)) or (move.pools and len(found.terms) > 1):
        raise _NotIntegers("its operand is a sum or clipped")
    moved = []
    for integers, scale in found.terms:
        # pooling knows no int32, and float64 holds each
        operand = integers.double() if move.pools else integers
        moved.append((node.target(**{**a, move.operand: operand}), scale))  # type: ignore[operator]
    if isinstance(moved[0][0], Tensor):
        return replace(found, terms=tuple((t.to(torch.int32), scale) for t, scale in moved))
    return tuple(
        replace(found, terms=tuple((parts[k], scale) for parts, scale in moved)) for k in range(len(moved[0][0]))
    )


def _clip(node: fx.Node, a: dict[str, Any]) -> Scaled:
    found = next(iter(a.values()))
    low, high = _bounds(node, a)
    if len(found.terms) == 1 and not found.clipped and (low, high) == (0.0, math.inf):
        ((integers, scale),) = found.terms
        return Scaled(((integers.clamp(min=0), scale),))
    ends = (min(max(end, low), high) for end in (found.low, found.high))
    return Scaled(found.terms, *ends)


def _bounds(node: fx.Node, a: dict[str, Any]) -> tuple[float, float]:
    clip = clip_of(node)
    assert clip is not None
    low, high = clip.bounds(a)
    return (-math.inf if low is None else low), (math.inf if high is None else high)


def _add(one: Any, other: Any, alpha: Any) -> Scaled:
    if not isinstance(one, Scaled) or not isinstance(other, Scaled) or alpha != 1:
        raise _NotIntegers("it adds a float")
    if one.shape != other.shape or one.clipped or other.clipped:
        raise _NotIntegers("one of its operands is stretched or clipped")
    return Scaled((*one.terms, *other.terms))


def _cat(tensors: Sequence[Any], dim: int) -> Scaled:
    if not all(isinstance(t, Scaled) and t.one_scale and len(t.terms) == 1 and not t.clipped for t in tensors):
        raise _NotIntegers("one of its operands is not on one scale")
    integers = torch.cat([t.terms[0][0] for t in tensors], dim)
    scales = [t.terms[0][1] for t in tensors]
    if all(bool(scale == scales[0]) for scale in scales):
        return Scaled(((integers, scales[0]),))
    shape = [-1 if d == dim % integers.dim() else 1 for d in range(integers.dim())]
    scale = torch.cat([s.expand(t.shape[dim]) for s, t in zip(scales, tensors, strict=True)])
    return Scaled(((integers, scale.view(shape)),))


# ------------------------------------------------------------------------------------------------ checking
@dataclass(frozen=True)
class IntegerError:
    """How far integer arithmetic is from the lowered graph run in float.

    Attributes:
        steps: largest difference of a quantized activation, in codes.
        where: the quantize node it was found at.
        output: largest relative difference of the outputs.
        in_integers, in_floats: as of `IntegerInterpreter`.
    """

    steps: int
    where: str
    output: float
    in_integers: tuple[str, ...]
    in_floats: Mapping[str, str]


def check_integers(module: fx.GraphModule, flat_inputs: Sequence[Any]) -> IntegerError:
    """Run a lowered graph in integers and in float, each quantized activation on the operands of the latter.

    Raises:
        VerificationError: an activation differs by more than a step, or a sum does not fit into 32 bits.
    """
    codes: dict[str, Any] = {}

    def keep(node: fx.Node, found: Any) -> None:
        if node.target in (ops.quantize_per_tensor, dynamic.quantize_dynamic):
            codes[node.name] = found

    follow, interpreter = _Follow(codes), IntegerInterpreter(module)
    expected = run_tapped(module, flat_inputs, see=keep)
    actual = interpreter.run_flat(flat_inputs, instead=follow)
    if follow.steps > STEPS_ALLOWED:
        raise VerificationError(
            "integer arithmetic does not give what the lowered graph gives",
            at=follow.where,
            why=f"an activation is {follow.steps} codes off, allowed is {STEPS_ALLOWED}",
        )
    error = relative_error(expected, actual)
    return IntegerError(follow.steps, follow.where, error, tuple(interpreter.in_integers), dict(interpreter.in_floats))


class _Follow:
    """Compares each code, and goes on with the code of the graph that ran in float."""

    def __init__(self, codes: Mapping[str, Any]) -> None:
        self.codes = codes
        self.steps, self.where = 0, ""

    def __call__(self, node: fx.Node, result: Any) -> Any:
        if node.name not in self.codes:
            return result
        expected = self.codes[node.name]
        ours, theirs = (found[0] if isinstance(found, tuple) else found for found in (result, expected))
        steps = int((ours.int() - theirs.int()).abs().max()) if theirs.numel() else 0
        if steps > self.steps:
            self.steps, self.where = steps, node.name
        return expected
