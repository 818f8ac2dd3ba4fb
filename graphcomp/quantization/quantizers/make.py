"""The quantizer a spec describes."""

from __future__ import annotations

from collections.abc import Sequence

from graphcomp.quantization.quantizers.affine import AffineQuantizer
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.quantization.quantizers.symmetric import SymmetricQuantizer
from graphcomp.quantization.quantizers.ternary import TernaryQuantizer
from graphcomp.quantization.spec import QuantSpec


def make_quantizer(spec: QuantSpec, *, shape: Sequence[int] | None = None, dim: int | None = None) -> Quantizer:
    """A fresh quantizer of the spec's kind, granularity and symmetry; `set_range` comes next.

    Args:
        shape: of the tensor; needed for one step per channel or group, no matter for one step per tensor.
        dim: the channel dim, likewise.

    Raises:
        PlanError: the spec's granularity does not fit `shape` and `dim`.
    """
    if spec.kind == "geta":
        return GetaQuantizer(spec)
    if spec.kind == "ternary":
        return TernaryQuantizer(spec, shape, dim)
    if spec.symmetric:
        return SymmetricQuantizer(spec, shape, dim)
    return AffineQuantizer(spec, shape, dim)
