"""A weight of integers in the place of a float parameter, in any module: `QuantizedTensor`.

The forward of the user's class reads the weight as it reads floats. What `FUNCTIONS` and `OPS` hold
(quantized_functions.py) is computed from codes; every other op gets floats that are made of the codes and forgotten.
Names of parameters, the class of each module, tied weights, and code that looks for `nn.Linear` stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.errors import PlanError
from graphcomp.quantization.handles import handle_of, held_floats, held_product, held_rows
from graphcomp.quantization.held import Held
from graphcomp.quantization.operand import Operand
from graphcomp.quantization.pickled import weight_again
from graphcomp.quantization.read_only import gives_views, read_only
from graphcomp.quantization.stored import Affine
from graphcomp.torch_compat import (
    make_wrapper,
    pytree,
    transforms_active,
    without_torch_function,
)

FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""Function of torch -> its form on codes, which returns NotImplemented where it has none for the operands at hand."""

OPS: dict[Any, Callable[..., Any]] = {}
"""Op -> its form on codes, as `FUNCTIONS`: for exported graphs, and functions of torch that call ops themselves."""


class QuantizedTensor(Tensor):
    """Codes and scales that stand for a float tensor. Never trained: `requires_grad` is False.

    Attributes:
        operand: how the other operand of a product is quantized; None: it stays float.

    `scale`, `zero_point`, `groups`, `axis`, `limits`, `bits`, `codes` and `packed` are those of `Held`. Where torch
    traces, the tensor has a handle alone (`handles`).

    Args:
        stored: codes and scales.
        dtype: that the tensor shows, and floats have.
        operand: see above.
    """

    operand: Operand | None
    _held: Held | None
    _handle: Tensor | None
    _turned: bool
    """Of a handle: whether rows and columns are those of the weight, exchanged."""

    def __new__(cls, stored: Affine, dtype: torch.dtype, operand: Operand | None = None) -> QuantizedTensor:
        """Return a tensor in the shape of the codes, without memory of its own."""
        shape, device = stored.values.shape, stored.values.device
        found: QuantizedTensor = make_wrapper(cls, shape, dtype=dtype, device=device, requires_grad=False)
        return found

    def __init__(self, stored: Affine, dtype: torch.dtype, operand: Operand | None = None) -> None:
        self._hold(Held.of(stored), operand)

    def _hold(self, held: Held | None, operand: Operand | None, handle: Tensor | None = None) -> None:
        self._held, self.operand, self._handle, self._turned = held, operand, handle, False

    @staticmethod
    def around(held: Held, dtype: torch.dtype, operand: Operand | None) -> QuantizedTensor:
        """Return a tensor of what another one holds, or a file."""
        found: QuantizedTensor = make_wrapper(
            QuantizedTensor, held.shape, dtype=dtype, device=held.scale.device, requires_grad=False
        )
        found._hold(held, operand)
        return found

    # ------------------------------------------------------------------------------------------ what is inside
    def is_traced(self) -> bool:
        """Return whether torch traces, and the handle alone stands for the weight."""
        return self._held is None or torch.compiler.is_dynamo_compiling()

    @property
    def held(self) -> Held:
        """Return codes and scales.

        Raises:
            PlanError: torch traces, and has the handle alone.
        """
        if self._held is None:
            raise PlanError(
                "a graph that torch traces reads the codes of a weight",
                why="the graph has a handle of the weight, through which ops compute",
                fix="read the codes outside of torch.compile",
            )
        return self._held

    @property
    def handle(self) -> Tensor:
        """Return a number that stands for the weight in this process, () int64."""
        if self._handle is None:
            self._handle = handle_of(self)
        return self._handle

    scale = property(lambda self: self.held.scale)
    zero_point = property(lambda self: self.held.zero_point)
    groups = property(lambda self: self.held.groups)
    axis = property(lambda self: self.held.axis)
    limits = property(lambda self: self.held.limits)
    bits = property(lambda self: self.held.bits)
    codes = property(lambda self: self.held.codes)
    packed = property(lambda self: self.held.packed)
    stored = property(lambda self: self.held.stored)

    def dequantize(self) -> Tensor:
        """Return the floats, in the dtype that the tensor shows."""
        if not self.is_traced():
            return self.held.dequantize(self.dtype)
        shape = list(self.shape)
        found: Tensor = held_floats(self.handle, shape[::-1] if self._turned else shape, self.dtype)
        return found.t() if self._turned else found

    def looked_up(self, ids: Tensor) -> Tensor:
        """Return the floats of rows, (…, c), at ids (…)."""
        if self.is_traced() or transforms_active():
            found: Tensor = held_rows(ids, self.handle, self.shape[1], self.dtype)
            return found
        self.held.keep_codes()
        taken = self.held.taken(lambda rows: F.embedding(ids, rows), self.dtype)
        return F.embedding(ids, self.dequantize()) if taken is None else taken

    def times(self, rows: Tensor, turned: bool) -> Tensor:
        """Return rows (…, i) times the weight, (…, o), in the dtype of the rows; with gradients where torch traces.

        Args:
            turned: the weight is (o, i); else (i, o).
        """
        if self.is_traced():
            width = self.shape[0 if turned else 1]
            found: Tensor = held_product(rows, self.handle, width, turned is not self._turned)
            return found
        return self.held.times(rows, turned, self.operand)

    def moved(self, move: Callable[[Tensor], Tensor], dtype: torch.dtype) -> QuantizedTensor:
        """Return the tensor with `move` applied to codes and parameters."""
        own = self.stored
        found = replace(own, values=move(own.values), scale=move(own.scale), zero_point=move(own.zero_point))
        found = found if own.groups is None else replace(found, groups=move(own.groups))
        return QuantizedTensor(found, dtype, self.operand)

    def become(self, other: QuantizedTensor) -> None:
        """Hold what another tensor holds."""
        self._held, self.operand = other.held, other.operand

    def shared(self) -> QuantizedTensor:
        """Return another tensor of the same codes."""
        if self._held is not None:
            return QuantizedTensor.around(self._held, self.dtype, self.operand)
        return self._traced(self.handle, self.shape, self.dtype, self.operand, self._turned)

    # ------------------------------------------------------------------------------------------ as a tensor of torch
    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch passes its own keywords
        """Return bits, shape and dtype; the values may be many."""
        bits = "traced" if self._held is None else f"{self.bits} bits"
        return f"QuantizedTensor({bits}, {tuple(self.shape)}, {str(self.dtype).removeprefix('torch.')})"

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        # the levels of an operand are no part of a trace: all weights of a shape share one
        kind = self.operand and Operand()
        return ["handle"], {"shape": self.shape, "dtype": self.dtype, "operand": kind, "turned": self._turned}

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], facts: Any, size: Any, stride: Any) -> QuantizedTensor:
        return QuantizedTensor._traced(
            inner["handle"], facts["shape"], facts["dtype"], facts["operand"], facts["turned"]
        )

    @staticmethod
    def _traced(
        handle: Tensor, shape: torch.Size, dtype: torch.dtype, operand: Operand | None, turned: bool
    ) -> QuantizedTensor:
        found: QuantizedTensor = make_wrapper(
            QuantizedTensor, shape, dtype=dtype, device=handle.device, requires_grad=False
        )
        found._hold(None, operand, handle)
        found._turned = turned
        return found

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        own, levels = self.held, self.operand and (self.operand.per_token, self.operand.levels)
        facts = {
            "shape": tuple(own.shape),
            "dtype": self.dtype,
            "axis": own.axis,
            "limits": own.limits,
            "operand": levels,
        }
        return weight_again, (
            (own.packed, own.scale, own.zero_point, own.groups),
            facts,
            isinstance(self, nn.Parameter),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        if id(self) not in memo:
            copied = self.moved(torch.clone, self.dtype)
            memo[id(self)] = nn.Parameter(copied, False) if isinstance(self, nn.Parameter) else copied
        found: QuantizedTensor = memo[id(self)]
        return found

    check: ClassVar[Callable[..., None]]
    """Raises where an op must not get floats of a weight; see `quantized_functions`."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = FUNCTIONS.get(func)
        if own is not None and not torch.compiler.is_exporting():  # an exported graph keeps the op, and the weight
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
        own = OPS.get(func)
        found = NotImplemented if own is None else own(*args, **kwargs)
        if found is NotImplemented:
            cls.check(func, args, kwargs)
            floats = pytree.tree_map_only(QuantizedTensor, QuantizedTensor.dequantize, (args, kwargs))
            found = func(*floats[0], **floats[1])
        if not gives_views(func) or not args or not isinstance(args[0], QuantizedTensor) or args[0].is_traced():
            return found
        return pytree.tree_map_only(Tensor, lambda t: t if isinstance(t, QuantizedTensor) else read_only(t), found)


def made_again(parts: tuple[Tensor, Tensor, Tensor, Tensor | None], facts: dict[str, Any], parameter: bool) -> Tensor:
    """Return a tensor that was pickled.

    Raises:
        ValueError: the parts do not fit one another.
    """
    levels = facts["operand"]
    operand = None if levels is None else Operand(*levels)
    held = Held(parts[0], torch.Size(facts["shape"]), *parts[1:], facts["axis"], tuple(facts["limits"]))
    held.check()
    found = QuantizedTensor.around(held, facts["dtype"], operand)
    return nn.Parameter(found, requires_grad=False) if parameter else found


import graphcomp.quantization.quantized_functions  # noqa: E402, F401  (fills FUNCTIONS and OPS with the class)
