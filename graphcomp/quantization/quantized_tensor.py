"""A weight of integers in the place of a float parameter, in any module: `QuantizedTensor`.

The forward of the user's class reads the weight as it reads floats. `F.linear`, `torch.addmm` and `torch.matmul` with
rows, and `F.embedding`, are computed from the codes (products.py); every other op gets floats that are made of the
codes and forgotten. Names of parameters, the class of each module, tied weights, and code that looks for `nn.Linear`
stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.errors import PlanError
from graphcomp.quantization import ops
from graphcomp.quantization.dynamic import matmul_dynamic, quantize_dynamic
from graphcomp.quantization.products import Product, product_of
from graphcomp.quantization.stored import Affine, stored_bits
from graphcomp.torch_compat import make_wrapper, pytree, schema_of, without_torch_function

aten = torch.ops.aten

KEPT_FLOAT = 2**18
"""Elements up to which floats are kept beside the codes once a product has read the weight: 1 MiB of float32. A product
in floats of so few elements takes less time than the steps around a product of integers."""


@dataclass(frozen=True)
class Operand:
    """How the other operand of a product is quantized.

    Attributes:
        per_token: with a range at run time for each row; else one range.
        levels: scale, zero point, lowest and highest code, from 0 to 255; None: ranges are known at run time.
    """

    per_token: bool = False
    levels: tuple[float, int, int, int] | None = None

    def codes(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes in the shape of the rows, uint8, scale and zero point."""
        if self.levels is None:
            found: tuple[Tensor, Tensor, Tensor] = quantize_dynamic(rows, self.per_token)
            return found
        scale, zero, low, high = self.levels
        codes: Tensor = ops.quantize_per_tensor(rows, scale, zero, low, high, torch.uint8)
        return codes, rows.new_tensor(scale), torch.tensor(zero, dtype=torch.uint8, device=rows.device)

    def floats(self, rows: Tensor) -> Tensor:
        """Return the floats that the codes stand for, of levels that are known."""
        assert self.levels is not None
        arguments = (*self.levels, torch.uint8)
        found: Tensor = ops.dequantize_per_tensor(ops.quantize_per_tensor(rows, *arguments), *arguments)
        return found


_EXACT: ContextVar[bool] = ContextVar("exact products", default=False)


@contextmanager
def exact_products() -> Iterator[None]:
    """Within, products are computed in floats, as a graph computes them: the codes of weights, and of operands whose
    levels are known, are made floats first. What the kernels are compared with."""
    token = _EXACT.set(True)
    try:
        yield
    finally:
        _EXACT.reset(token)


@dataclass(eq=False)
class _Held:
    """What a tensor, and all that share its memory, hold.

    Attributes:
        codes: as stored; None once a product holds the codes in a layout of its own.
        floats: kept beside the codes of a small tensor.
        looked_up: whether rows are looked up in the tensor (a tied table): the codes then stay beside products.
        products: (weight is (o, i), dtype of the rows) -> kernel; None where no kernel takes the weight.
    """

    codes: Tensor | None
    floats: Tensor | None = None
    looked_up: bool = False
    products: dict[tuple[bool, torch.dtype], Product | None] = field(default_factory=dict)


class QuantizedTensor(Tensor):
    """Codes and scales that stand for a float tensor. Never trained: `requires_grad` is False.

    Attributes:
        scale: (), (c,) along `axis`, or (c, g) per group of the last dim.
        zero_point: int32 as `scale`; the code of 0.
        groups: (i,) int64, the group of each index of the last dim; None without groups.
        axis: dim with one scale per index; None: one scale.
        limits: lowest and highest code.
        operand: how the other operand of a product is quantized; None: it stays float.

    Args:
        stored: codes and scales.
        dtype: that the tensor shows, and floats have.
        operand: see above.
    """

    scale: Tensor
    zero_point: Tensor
    groups: Tensor | None
    axis: int | None
    limits: tuple[int, int]
    operand: Operand | None
    _held: _Held

    def __new__(cls, stored: Affine, dtype: torch.dtype, operand: Operand | None = None) -> QuantizedTensor:
        """Return a tensor in the shape of the codes, without memory of its own."""
        shape, device = stored.values.shape, stored.values.device
        found: QuantizedTensor = make_wrapper(cls, shape, dtype=dtype, device=device, requires_grad=False)
        return found

    def __init__(self, stored: Affine, dtype: torch.dtype, operand: Operand | None = None) -> None:
        self.scale, self.zero_point, self.groups, self.axis = stored.scale, stored.zero_point, stored.groups, stored.dim
        self.limits, self.operand = (stored.quant_min, stored.quant_max), operand
        bits = stored_bits(*self.limits)
        self._held = _Held(ops.pack(stored.values, bits) if bits in ops.PACKED_BITS else stored.values)

    # ------------------------------------------------------------------------------------------ what is inside
    @property
    def bits(self) -> int:
        """Bits of a code, as the codes are stored."""
        return stored_bits(*self.limits)

    @property
    def codes(self) -> Tensor:
        """Return the codes as integers of the tensor's shape."""
        if self._held.codes is None:
            (turned, _), product = next((key, p) for key, p in self._held.products.items() if p is not None)
            return product.codes() if turned else product.codes().t().contiguous()
        if self.bits not in ops.PACKED_BITS:
            return self._held.codes
        found: Tensor = torch.ops.graphcomp.unpack(self._held.codes, list(self.shape), self.bits, self.limits[0] < 0)
        return found

    @property
    def packed(self) -> Tensor:
        """Return the codes as they are stored: four bits and fewer end to end, (bytes,) uint8."""
        if self._held.codes is not None:
            return self._held.codes
        return ops.pack(self.codes, self.bits) if self.bits in ops.PACKED_BITS else self.codes

    @property
    def stored(self) -> Affine:
        """Return codes and scales."""
        return Affine(self.codes, self.scale, self.zero_point, *self.limits, self.axis, self.groups)

    def dequantize(self) -> Tensor:
        """Return the floats, in the dtype that the tensor shows."""
        return self.stored.dequantize().to(self.dtype)

    @classmethod
    def of(
        cls,
        packed: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        groups: Tensor | None,
        *,
        shape: torch.Size,
        dtype: torch.dtype,
        axis: int | None,
        limits: tuple[int, int],
        operand: Operand | None,
    ) -> QuantizedTensor:
        """Return the tensor that `packed` and the parameters beside it describe."""
        found: QuantizedTensor = make_wrapper(cls, shape, dtype=dtype, device=packed.device, requires_grad=False)
        found.scale, found.zero_point, found.groups, found.axis = scale, zero_point, groups, axis
        found.limits, found.operand, found._held = limits, operand, _Held(packed)
        return found

    def _facts(self) -> dict[str, Any]:
        return {"axis": self.axis, "limits": self.limits, "operand": self.operand}

    def _like(self, move: Callable[[Tensor], Tensor], dtype: torch.dtype) -> QuantizedTensor:
        """Return the tensor with `move` applied to codes and parameters."""
        found = replace(self.stored, values=move(self.codes), scale=move(self.scale), zero_point=move(self.zero_point))
        found = found if self.groups is None else replace(found, groups=move(self.groups))
        return QuantizedTensor(found, dtype, self.operand)

    # ------------------------------------------------------------------------------------------ as a tensor of torch
    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch passes its own keywords
        """Return bits, shape and dtype; the values may be many."""
        return f"QuantizedTensor({self.bits} bits, {tuple(self.shape)}, {str(self.dtype).removeprefix('torch.')})"

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        names = ["packed", "scale", "zero_point", *([] if self.groups is None else ["groups"])]
        return names, {"shape": self.shape, "dtype": self.dtype, **self._facts()}

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], facts: Any, size: Any, stride: Any) -> QuantizedTensor:
        parts = (inner["packed"], inner["scale"], inner["zero_point"], inner.get("groups"))
        return QuantizedTensor.of(*parts, **facts)

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        facts = {"shape": self.shape, "dtype": self.dtype, **self._facts()}
        parts = (self.packed, self.scale, self.zero_point, self.groups)
        return _again, (parts, facts, isinstance(self, nn.Parameter))

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        if id(self) not in memo:
            copied = self._like(torch.clone, self.dtype)
            memo[id(self)] = nn.Parameter(copied, False) if isinstance(self, nn.Parameter) else copied
        found: QuantizedTensor = memo[id(self)]
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = FUNCTIONS.get(func)
        if own is not None and not torch.compiler.is_compiling():
            found = own(*args, **kwargs)
            if found is not NotImplemented:
                return found
        with without_torch_function():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares no classmethod, and calls one
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return _shared(args[0])
        if func is aten.clone.default:
            return args[0]._like(torch.clone, args[0].dtype)
        if func is aten._to_copy.default:
            return _moved(args[0], **kwargs)
        if func is aten.copy_.default and isinstance(args[0], QuantizedTensor):
            return _overwritten(*args[:2])
        _refuse_writes(func, args, kwargs)
        floats = pytree.tree_map_only(QuantizedTensor, QuantizedTensor.dequantize, (args, kwargs))
        return func(*floats[0], **floats[1])

    # ------------------------------------------------------------------------------------------ products
    def times(self, rows: Tensor, turned: bool) -> Tensor:
        """Return rows (…, i) times the weight, (…, o), without gradients.

        Args:
            rows: in the dtype of the weight.
            turned: the weight is (o, i); else (i, o).
        """
        flat = rows.reshape(-1, rows.shape[-1])
        if self.operand is not None:
            parts, per_token = self.operand.codes(rows.float()), self.operand.per_token
            found: Tensor = matmul_dynamic(*parts, self.codes, self.scale.float(), None, turned, per_token)
            return found.to(rows.dtype)
        if self.numel() <= KEPT_FLOAT:
            if self._held.floats is None:
                self._held.floats = self.dequantize()
            return rows @ (self._held.floats.t() if turned else self._held.floats)
        product = self._product(turned, rows.dtype)
        if product is None:
            floats = self.dequantize()
            return rows @ (floats.t() if turned else floats)
        sums = product(flat)
        return sums.view(*rows.shape[:-1], sums.shape[-1])

    def _product(self, turned: bool, dtype: torch.dtype) -> Product | None:
        key = (turned, dtype)
        if key not in self._held.products:
            self._held.products[key] = self._make(*key)
            if self._held.products[key] is not None and not self._held.looked_up:
                self._held.codes = None  # the product holds the codes, in a layout of its own
        return self._held.products[key]

    def _make(self, turned: bool, dtype: torch.dtype) -> Product | None:
        symmetric = self.limits[0] < 0 and not bool(self.zero_point.any())
        if self.dim() != 2 or not symmetric or self.axis not in (None, 0 if turned else 1):
            return None
        size = None
        if self.groups is not None:
            size = int((self.groups == 0).sum())
            if not torch.equal(self.groups, torch.arange(self.groups.numel(), device=self.groups.device) // size):
                return None
        codes = self.codes if turned else self.codes.t().contiguous()
        return product_of(codes, self.scale, self.bits, size, dtype)


# ------------------------------------------------------------------------------------------------ functions of torch
class _Times(torch.autograd.Function):
    """Rows times a weight of integers; the gradient goes to the rows, as if the weight and the rows were floats."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: QuantizedTensor, turned: bool) -> Tensor:
        ctx.weight, ctx.turned = weight, turned
        return weight.times(rows, turned)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        floats = ctx.weight.dequantize()
        return gradients[0] @ (floats if ctx.turned else floats.t()), None, None


def _times(rows: Tensor, weight: Any, turned: bool, bias: Tensor | None) -> Any:
    """Return rows times the weight, plus the bias; NotImplemented where the operands are others."""
    ours = isinstance(weight, QuantizedTensor) and weight.dim() == 2
    if not ours or any(isinstance(t, QuantizedTensor) for t in (rows, bias)):
        return NotImplemented
    if rows.dim() == 0 or rows.numel() == 0 or not rows.is_floating_point():
        return NotImplemented
    if weight.operand is None and (rows.dtype is not weight.dtype or torch.is_autocast_enabled("cpu")):
        return NotImplemented
    follows = torch.is_grad_enabled() and rows.requires_grad
    found = _Times.apply(rows, weight, turned) if follows else weight.times(rows, turned)  # type: ignore[no-untyped-call]
    return found if bias is None else found + bias


def _in_floats(rows: Tensor, weight: Any) -> Tensor | None:
    """Return what a product in floats reads in the place of `rows` within `exact_products`; None otherwise, and for
    ranges at run time, whose products are of integers in a graph, too."""
    if not _EXACT.get() or not isinstance(weight, QuantizedTensor) or isinstance(rows, QuantizedTensor):
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
    if not isinstance(weight, QuantizedTensor) or weight.groups is not None or max_norm is not None:
        return NotImplemented
    if weight.axis not in (None, 0) or weight.dim() != 2:
        return NotImplemented
    held = weight._held
    held.looked_up = True
    if held.codes is None:  # a product has taken the codes, and would make all of them anew at each lookup
        held.codes = weight.packed
    codes = F.embedding(input, weight.codes)
    scale, zero = weight.scale, weight.zero_point
    if weight.axis == 0:
        scale, zero = (t[input].unsqueeze(-1) for t in (scale, zero))
    return ((codes.to(scale.dtype) - zero) * scale).to(weight.dtype)


FUNCTIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.embedding: _embedding,
}
"""Function of torch -> its form on codes, which returns NotImplemented where it has none for the operands at hand."""


# ------------------------------------------------------------------------------------------------ ops of torch
def _shared(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return another tensor of the same codes."""
    found: QuantizedTensor = make_wrapper(
        QuantizedTensor, tensor.shape, dtype=tensor.dtype, device=tensor.device, requires_grad=False
    )
    for name in ("scale", "zero_point", "groups", "axis", "limits", "operand", "_held"):
        setattr(found, name, getattr(tensor, name))
    return found


def _moved(tensor: QuantizedTensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Any:
    """Return the tensor on another device, or as if of another dtype."""
    dtype = dtype or tensor.dtype
    if not dtype.is_floating_point:
        return tensor.dequantize().to(dtype)
    return tensor._like(lambda t: t.to(device) if device is not None else t.clone(), dtype)


def _overwritten(tensor: QuantizedTensor, source: Tensor) -> QuantizedTensor:
    """Take the codes of `source`: what `load_state_dict` does."""
    if not isinstance(source, QuantizedTensor) or source.shape != tensor.shape:
        raise PlanError(
            f"a weight of integers, {tuple(tensor.shape)}, cannot take the values of floats, {tuple(source.shape)}",
            why="rounding floats to integers needs scales, which belong to other floats",
            fix="load a state_dict of the quantized model; or load into the float model, and compress that",
        )
    tensor.__dict__.update(source._like(torch.clone, tensor.dtype).__dict__)
    return tensor


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise PlanError where an op would write into a weight of integers: it would write into a copy."""
    schema = schema_of(func)
    for k, argument in enumerate(schema.arguments):
        written = argument.alias_info is not None and argument.alias_info.is_write
        given = args[k] if k < len(args) else kwargs.get(argument.name)
        if written and isinstance(given, QuantizedTensor):
            raise PlanError(
                f"{func} writes into a weight of integers",
                why="codes and scales stand for the floats, and no op changes them",
                fix="weight.dequantize() makes floats; graphcomp.compress(model, …) makes integers of floats again",
            )


def _again(parts: tuple[Tensor, Tensor, Tensor, Tensor | None], facts: dict[str, Any], parameter: bool) -> Tensor:
    """Return a tensor that was pickled."""
    found: QuantizedTensor = QuantizedTensor.of(*parts, **facts)
    return nn.Parameter(found, requires_grad=False) if parameter else found
