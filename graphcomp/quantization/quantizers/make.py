"""The quantizer a spec describes, and the quantizer that gives the codes of a stored tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from graphcomp.quantization.quantizers.affine import AffineQuantizer
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.codebook import CodebookQuantizer
from graphcomp.quantization.quantizers.dynamic import DynamicQuantizer
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.quantization.quantizers.mixed import MixedQuantizer
from graphcomp.quantization.quantizers.symmetric import SymmetricQuantizer
from graphcomp.quantization.quantizers.ternary import TernaryQuantizer
from graphcomp.quantization.quantizers.uniform import UniformQuantizer
from graphcomp.quantization.spec import QuantSpec
from graphcomp.quantization.stored import Affine, Codebook, Stored


def make_quantizer(spec: QuantSpec, *, shape: Sequence[int] | None = None, dim: int | None = None) -> Quantizer:
    """A fresh quantizer of the spec's kind, granularity and symmetry; `set_range` comes next.

    Args:
        shape: of the tensor; needed for one step per channel or group, no matter for one step per tensor.
        dim: the channel dim, likewise.

    Raises:
        PlanError: the spec's granularity does not fit `shape` and `dim`.
    """
    if spec.dynamic:
        return DynamicQuantizer(spec)
    if spec.kind == "geta":
        return GetaQuantizer(spec)
    if spec.kind == "ternary":
        return TernaryQuantizer(spec, shape, dim)
    if spec.kind == "mixed":
        return MixedQuantizer(spec, shape, dim)
    if spec.symmetric:
        return SymmetricQuantizer(spec, shape, dim)
    return AffineQuantizer(spec, shape, dim)


def quantizer_of(stored: Stored, spec: QuantSpec) -> Quantizer:
    """Return a quantizer to the nearest level, which gives the floats of `stored` their codes.

    Args:
        spec: what the quantizer says of itself; the granularity is that of `stored`, and evenly spaced levels make the
            kind uniform, or mixed where channels have bits of their own.
    """
    if isinstance(stored, Codebook):
        return CodebookQuantizer(replace(spec, granularity=stored.spec.granularity), stored.table, stored.dim)
    assert isinstance(stored, Affine)
    spec = replace(spec, kind="uniform" if stored.widths is None else "mixed")
    if stored.dim is not None and stored.groups is None:
        spec = replace(spec, granularity="channel")
    found = make_quantizer(spec, shape=stored.values.shape, dim=stored.dim).to(stored.scale)
    assert isinstance(found, UniformQuantizer)
    found.scale = nn.Parameter(stored.scale.clone())
    if isinstance(found, AffineQuantizer):
        found.zero_point = nn.Parameter(stored.zero_point.to(stored.scale))
    found.groups = stored.groups
    if isinstance(found, MixedQuantizer) and stored.widths is not None:
        found.set_widths(stored.widths)
    return found
