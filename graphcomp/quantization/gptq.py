"""Weights rounded one input after the other, each error made up for by the inputs still to come: GPTQ.

All products of a layer (groups of a convolution, channels of a depthwise one, experts) and all steps that are tried are
rounded at once: the one loop is over inputs.

Sources: Frantar et al. 2022 (arXiv 2210.17323), algorithm 1, after optimal brain surgeon; the descent by single weights
that follows is that of COMQ (Zhang et al. 2024, arXiv 2403.07134). Differences: a row for which rounding to nearest
gives the smaller error stays nearest, so the result is never worse; inputs that the data never move are rounded to
nearest, where the authors set them to 0; steps are searched on the same matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphcomp.errors import CalibrationError, PlanError
from graphcomp.ops.design import Design
from graphcomp.quantization.calibrate import calibrate_weight
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.gradients import multiples
from graphcomp.quantization.quantizers.uniform import StepQuantizer
from graphcomp.quantization.stored import Affine, spread

DAMPING = 0.01
"""This share of the mean of a matrix' diagonal is added to the diagonal; the authors' number."""

DAMPING_TRIES = 5
"""A matrix that cannot be factored is damped ten times as much, so often."""

BLOCK = 128
"""So many columns are updated at a time; only speed depends on it."""

SWEEPS = 4
"""Most rounds of the descent over all inputs."""

STEPS = 32
"""Most steps that a search tries."""

SMALL = 64
"""Inputs up to which the descent follows the rounding with each step that is tried; else with the best one."""

SEARCH_WORK = 2 * 10**9
"""Multiply-accumulates of the matrices with all steps that a search tries: some seconds of one core."""


# ------------------------------------------------------------------------------------------------ levels
@dataclass(frozen=True, eq=False)
class Levels:
    """Evenly spaced levels of the elements of a layer's matrices.

    Attributes:
        scale, zero: (g, o, n), or (g, o, 1) where a row has one step.
        low, high: of the codes.
    """

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    @classmethod
    def of(cls, quantizer: Quantizer, weight: Tensor, design: Design) -> Levels:
        """Return the levels of a quantizer of `weight`.

        Raises:
            PlanError: the levels are not evenly spaced.
        """
        if quantizer.exponent != 1.0:
            raise PlanError(
                f"the quantizer rounds |w|^{quantizer.exponent:g}",
                why="its levels are not values of the weight",
                fix='QuantSpec(kind="uniform"), or t = 1',
            )
        if quantizer.spec.tabled:
            raise PlanError(
                "second-order rounding needs evenly spaced levels, got ternary weights with two scales",
                fix='QuantSpec(kind="ternary"), with one scale; or rounding="nearest"',
            )
        stored = quantizer.to_integers(weight)
        assert isinstance(stored, Affine), "levels are evenly spaced"

        def matrices(parameter: Tensor) -> Tensor:
            whole = spread(parameter.to(stored.scale.dtype), weight.dim(), stored.dim, stored.groups)
            found = design.matrices(whole.expand(weight.shape)).mT
            return found[..., :1] if bool((found == found[..., :1]).all()) else found

        return cls(matrices(stored.scale), matrices(stored.zero_point), stored.quant_min, stored.quant_max)

    def nearest(self, rows: Tensor) -> Tensor:
        """Return the nearest level of each element of (g, o, n), in the dtype of `scale`."""
        codes = multiples(rows.to(self.scale.dtype), self.scale, self.zero, self.low, self.high)
        return codes * self.scale

    def column(self, k: int) -> Levels:
        """Return the levels of one input, (g, o) each."""
        scale, zero = (p[..., k if p.shape[2] > 1 else 0] for p in (self.scale, self.zero))
        return Levels(scale, zero, self.low, self.high)

    def in_shares(self, shares: Tensor) -> Levels:
        """Return levels of c rows in place of one, their steps multiplied by each of `shares` (c,): (g, c o, …)."""
        scales = self.scale[:, None] * shares.to(self.scale)[:, None, None]
        return Levels(scales.flatten(1, 2), self.zero.repeat(1, len(shares), 1), self.low, self.high)


# ------------------------------------------------------------------------------------------------ rounding
@torch.no_grad()
def round_second_order(target: Tensor, hessian: Tensor, levels: Levels, *, sweeps: int = SWEEPS) -> Tensor:
    """Return the levels for which Σ (w - ŵ) H (w - ŵ)ᵀ is small: the error of the layer's output.

    Args:
        target: (g, o, n): w. Not changed.
        hessian: (g, n, n) float64, symmetric, positive semidefinite: the mean of x xᵀ, damped (`damped`).
        levels: of the elements.
        sweeps: most rounds of the descent.

    Returns:
        (g, o, n) in the dtype of the levels. No row has a larger error than rounded to nearest.

    Raises:
        CalibrationError: `hessian` or `target` is not finite, or `hessian` is not positive semidefinite.
    """
    for name, tensor in (("the weight is", target), ("the second moments are", hessian)):
        if not bool(tensor.isfinite().all()):
            raise CalibrationError(f"{name} not finite", fix="calibrate on data for which the model is sound")
    target, nearest = target.double(), levels.nearest(target)
    rounded = _one_after_the_other(target, _factor(hessian), levels)
    better = output_error(nearest - target, hessian) < output_error(rounded - target, hessian)
    rounded = torch.where(better[..., None], nearest, rounded)
    return _descended(rounded, target, hessian, levels, sweeps)


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """Return d H dᵀ of each row of (g, o, n): (g, o)."""
    return ((difference.double() @ hessian) * difference).sum(2)


def damped(moments: Tensor, share: float = DAMPING) -> Tensor:
    """Return (g, n, n) with `share` of the mean of the diagonal added to the diagonal; 1 added where all is 0."""
    mean = moments.diagonal(dim1=1, dim2=2).mean(1)
    added = torch.where(mean > 0, share * mean, 1.0)
    return moments + torch.diag_embed(added[:, None].expand(moments.shape[:2]))


def _one_after_the_other(target: Tensor, upper: Tensor, levels: Levels) -> Tensor:
    """Return what the loop of algorithm 1 rounds (g, o, n) float64 to."""
    work, result = target.clone(), torch.empty_like(target, dtype=levels.scale.dtype)
    count = work.shape[2]
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        errors = torch.empty_like(work[..., start:end])
        for k in range(start, end):
            result[..., k] = levels.column(k).nearest(work[..., k])
            errors[..., k - start] = (work[..., k] - result[..., k]) / upper[:, k, k, None]
            work[..., k:end] -= errors[..., k - start, None] * upper[:, None, k, k:end]
        work[..., end:] -= errors @ upper[:, start:end, end:]
    return result


def _descended(rounded: Tensor, target: Tensor, hessian: Tensor, levels: Levels, sweeps: int) -> Tensor:
    """Return what is left when no single weight lowers the error of its row, or after so many sweeps."""
    slope = (rounded - target) @ hessian
    count, steep = target.shape[2], hessian.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        moved = False
        for start in range(0, count, BLOCK):
            end = min(start + BLOCK, count)
            changes = torch.zeros_like(target[..., start:end])
            for k in range(start, end):
                best = levels.column(k).nearest(rounded[..., k] - slope[..., k] / steep[:, k, None])
                change = changes[..., k - start].copy_(best - rounded[..., k])
                slope[..., k:end] += change[..., None] * hessian[:, None, k, k:end]
                rounded[..., k] = best
            if bool(changes.any()):
                moved = True
                # within the block a change has reached the columns behind it; now it reaches the others
                slope[..., end:] += changes @ hessian[:, start:end, end:]
                slope[..., :start] += changes @ hessian[:, start:end, :start]
                own = hessian[:, start:end, start:end].tril(-1)  # of columns in front, which moved before
                slope[..., start:end] += changes @ own
        if not moved:
            break
    return rounded


def _factor(hessian: Tensor) -> Tensor:
    """Return (g, n, n): the upper Cholesky factors of the inverses of matrices, damped more where they need it."""
    for k in range(DAMPING_TRIES):
        more = hessian if k == 0 else damped(hessian, DAMPING * 10 ** (k - 1))
        lower, failed = torch.linalg.cholesky_ex(more)
        if bool(failed.any()):
            continue
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not bool(failed.any()):
            return upper
    raise CalibrationError(
        "the second moments are not positive semidefinite",
        why=f"no Cholesky factor with {DAMPING * 10 ** (DAMPING_TRIES - 2):g} times the mean of the diagonal added",
        fix="calibrate on more data",
    )


# ------------------------------------------------------------------------------------------------ steps
@torch.no_grad()
def search_steps(
    quantizer: Quantizer,
    weight: Tensor,
    design: Design,
    hessian: Tensor,
    *,
    second_order: bool,
    fixed: bool = False,
) -> Tensor:
    """Set the steps of a weight's quantizer to those with the least error of the layer's output; return the levels.

    Args:
        quantizer: of the weight; its range may be any.
        weight: to be rounded, in the form that the layer reads.
        design: of the layer.
        hessian: (g, n, n) float64, see `round_second_order`.
        second_order: round so; else to nearest.
        fixed: leave the steps as they are, as other weights have them, too.

    Returns:
        Shape and dtype of `weight`, every element a level: quantizer(result) equals it bit for bit. Where steps are of
        groups, of ternary levels, or have an exponent, they are those that the quantizer's own observer reads off.
    """
    place = None if fixed else _place_of_steps(quantizer, weight, design)
    target = design.matrices(weight.double()).mT
    if place is None:
        if not fixed:
            calibrate_weight(quantizer, weight)
        if not second_order:
            return quantizer(weight)  # type: ignore[no-any-return]
        found = round_second_order(target, hessian, Levels.of(quantizer, weight, design))
        return design.weight(found.mT.contiguous()).to(weight.dtype)
    _widest(quantizer, weight)
    shares = _shares(quantizer.spec.bits, target)
    wide = Levels.of(quantizer, weight, design)
    many = wide.in_shares(shares)
    repeated = target.repeat(1, len(shares), 1)
    groups, outputs, inputs = target.shape
    sweeps = SWEEPS if inputs <= SMALL else 0
    found = round_second_order(repeated, hessian, many, sweeps=sweeps) if second_order else many.nearest(repeated)
    errors = output_error(found - repeated, hessian).view(groups, len(shares), outputs)
    sums = errors.new_zeros(len(shares), quantizer.get_parameter("scale").numel())
    sums.index_add_(1, place.flatten(), errors.transpose(0, 1).flatten(1))
    best = sums.argmin(0)
    scale = quantizer.get_parameter("scale")
    scale.copy_((scale.flatten() * shares.to(scale)[best]).view(scale.shape))
    chosen = best[place][:, None, :, None].expand(groups, 1, outputs, inputs)
    own = found.view(groups, len(shares), outputs, inputs).gather(1, chosen)[:, 0]
    if second_order and not sweeps:
        own = _descended(own, target, hessian, Levels.of(quantizer, weight, design), SWEEPS)
    # once more by the quantizer itself, whose steps may differ in the last bit
    return quantizer(design.weight(own.mT.contiguous()).to(weight.dtype))  # type: ignore[no-any-return]


def _place_of_steps(quantizer: Quantizer, weight: Tensor, design: Design) -> Tensor | None:
    """Return which of the steps, flat, each row of the matrices has, (g, o); None where steps are not searched."""
    if not isinstance(quantizer, StepQuantizer) or not quantizer.multiples or quantizer.spec.granularity == "group":
        return None
    if quantizer.exponent != 1.0 or quantizer.spec.kind == "ternary":
        return None
    numbers = torch.arange(quantizer.scale.numel(), device=weight.device).view(quantizer.scale.shape)
    found = design.matrices(spread(numbers, weight.dim(), quantizer.dim).expand(weight.shape)).mT
    return found[..., 0] if bool((found == found[..., :1]).all()) else None


def _widest(quantizer: Quantizer, weight: Tensor) -> None:
    """Let the levels reach the farthest weights."""
    if quantizer.dim is None:
        quantizer.set_range(weight.min(), weight.max())
    else:
        rows = weight.movedim(quantizer.dim, 0).flatten(1)
        quantizer.set_range(rows.amin(1), rows.amax(1))


def _shares(bits: int, target: Tensor) -> Tensor:
    """Return the shares of the widest step to try, 1 first: fewer for large matrices and for many bits."""
    groups, outputs, inputs = target.shape
    count = max(1, min(STEPS, SEARCH_WORK // max(1, groups * outputs * inputs**2)))
    return torch.linspace(1, max(0.3, 1 - 10 / 2**bits), count, dtype=torch.float64)
