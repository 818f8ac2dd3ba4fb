"""What every quantizer is: a module from floats to the nearest floats that integers stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from graphcomp.coupling.axis import Axes, Reason, couple
from graphcomp.quantization.spec import QuantSpec
from graphcomp.quantization.stored import Stored


class Quantizer(nn.Module, ABC):
    """Fake quantization with exact straight-through gradients.

    A quantizer is elementwise: it couples nothing but its per-channel tensors with the channel (see `couple_axes`).

    Attributes:
        spec: bits, symmetry, granularity.
        dim: the dim with one step per index; None: one step for the whole tensor.
        enabled: False passes the tensor through unchanged (while ranges are being calibrated).
        nearest: whether every element goes to the nearest level, so that levels are their own.
    """

    nearest: ClassVar[bool] = True

    def __init__(self, spec: QuantSpec, dim: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.dim = dim
        self.enabled = True

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The floats nearest to `x` that the codes stand for; shape and dtype of `x`."""

    @abstractmethod
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Choose step (and zero point, range) so that the codes span `low` … `high`.

        Args:
            low, high: () or (c,) or (c, groups), in the units of the tensor. Degenerate ranges (all zero, empty of
                width) give a positive step all the same.
        """

    def fit(self, x: Tensor) -> bool:
        """Set the levels by a closed form of the elements of `x`, which are finite.

        Returns:
            False, and nothing is set, where the levels follow from a range (`set_range`).
        """
        return False

    def steps(self) -> Sequence[nn.Parameter]:
        """Positive parameters in the units of the tensor that training at fixed bits (LSQ) learns; () without."""
        return ()

    @abstractmethod
    def to_integers(self, x: Tensor) -> Stored:
        """The codes of `x`: `to_integers(x).dequantize()` equals `forward(x)` bit for bit."""

    @property
    @abstractmethod
    def bits(self) -> Tensor:
        """() float: how many bits the codes take. Constant but for quantizers that learn it."""

    @property
    def exponent(self) -> float:
        """What is rounded is sign(x) |x|^exponent: 1 but for quantizers that learn it."""
        return 1.0

    def extra_repr(self) -> str:
        """What a printed model shows."""
        spec = self.spec
        size = f" of {spec.group_size}" if spec.granularity == "group" else ""
        where = "" if self.dim is None else f", dim={self.dim}"
        symmetry = "symmetric" if spec.symmetric else "affine"
        return f"{spec.bits} bits, {symmetry}, per {spec.granularity}{size}{where}"

    def project(self) -> None:
        """Bring parameters that an optimizer moved back to where they are valid; in place, without gradients."""

    def couple_axes(self, x: Axes, own: Mapping[str, Axes], why: Reason) -> Axes:
        """How the axes of the result follow from those of `x`.

        Args:
            x: axes of the operand.
            own: axes of the quantizer's parameters and buffers, by name.
            why: what to freeze with.
        """
        if self.dim is not None:
            for axes in own.values():
                if axes and self.spec.granularity != "tensor":
                    couple(x[self.dim], axes[0], why)
        return x
