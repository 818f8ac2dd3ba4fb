"""The weight of one layer, rounded: regression towards what the float layer gives, and rounding on the same matrix.

    T = T0 + (Σ x̃ x̃ᵀ + λ · mean diag · I)⁻¹ (Σ x̃ tᵀ − Σ x̃ x̃ᵀ T0),   then   min over levels of (T̂ − T)ᵀ H (T̂ − T)

x̃ is what the quantized layer reads, t what the float layer gives. Where the layer has an intercept, both are taken
about their means, as the intercept makes up for the rest after rounding.

Sources: the regression is the first half of ERQ (Zhong et al. 2024, arXiv 2407.06794), there for transformers; the
rounding on the same ridge matrix as in its second half, by GPTQ (`round_second_order`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphcomp.errors import CalibrationError
from graphcomp.numerics.regression import Moments, choose_ridge, solve
from graphcomp.pruning.least_squares import FEWEST_ROWS, Problem, Sums
from graphcomp.pruning.repair import LayerRepair
from graphcomp.quantization.gptq import DAMPING, damped, search_steps
from graphcomp.quantization.quantizers.base import Quantizer


@dataclass(frozen=True, eq=False)
class RoundedLayer:
    """A layer's weight on the levels of its quantizer.

    Attributes:
        weight: the levels, in the form that the layer reads.
        floats: what was rounded.
        shift: (o,) float64, to be added to the intercept; None where nothing is to be added by the regression.
        repair: what the regression did; None where there was none.
    """

    weight: Tensor
    floats: Tensor
    shift: Tensor | None = None
    repair: LayerRepair | None = None


@dataclass(frozen=True, eq=False)
class _Centred:
    """Moments about the mean, for a layer with an intercept; else as they are.

    Attributes:
        xx, xt, tt: as in `Moments`, without the intercept.
        x, t: the means, (g, n) and (g, o); 0 without an intercept.
    """

    xx: Tensor
    xt: Tensor
    tt: float
    x: Tensor
    t: Tensor

    @classmethod
    def of(cls, moments: Moments, intercept: bool) -> _Centred:
        """Return the moments about the mean where there is an intercept."""
        if not intercept:
            return cls(moments.xx, moments.xt, moments.tt, moments.xx.new_zeros(()), moments.xx.new_zeros(()))
        count = moments.xx[:, -1, -1].clamp(min=1e-300)[:, None, None]  # of rows, each as often as its weight says
        x, t = moments.xx[:, :-1, -1:] / count, moments.xt[:, -1:] / count
        xx = moments.xx[:, :-1, :-1] - count * x * x.mT
        xt = moments.xt[:, :-1] - count * x * t
        tt = moments.tt - float((count * t.square()).sum())
        return cls(xx, xt, tt, x[..., 0], t[:, 0])

    def error(self, change: Tensor) -> float:
        """Return Σ (t - xᵀ d)² for a change d, (g, n, o), with the best intercept."""
        return max(self.tt - float((change * (2 * self.xt - self.xx @ change)).sum()), 0.0)


@torch.no_grad()
def round_layer(
    problem: Problem,
    sums: Sums,
    weight: Tensor,
    quantizer: Quantizer,
    *,
    regress: bool,
    second_order: bool,
    fixed: bool = False,
) -> RoundedLayer:
    """Round the weight of a layer, and set the steps of its quantizer.

    Args:
        problem: the layer's regression.
        sums: of what the layer reads when it is quantized, and of what its result lacks with `weight` as it is.
        weight: of the layer, float, in the form that it reads.
        quantizer: of the weight; its steps are set.
        regress: move the weights towards the float output before they are rounded, where that helps on rows that are
            held out.
        second_order: round by GPTQ; else to nearest.
        fixed: leave the steps of the quantizer as they are.

    Raises:
        CalibrationError: the data are not finite, or second-order rounding has none.
        PlanError: second-order rounding of levels that are not evenly spaced.
    """
    total = sums.all
    assert isinstance(total, Moments), "more features have no matrix to round on"
    if not total.finite:
        raise CalibrationError("the data, or what the model computes of them, are not finite, or too large to square")
    if total.rows == 0:
        raise CalibrationError("there are no data to round a layer on", fix="give at least one batch")
    moments = _Centred.of(total, problem.intercept)
    design = problem.design
    old = design.matrices(weight.double())

    def rounded(start: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return `start`, (g, n, o) float64, as a weight, levels near it, their difference to the old weight, and
        their error."""
        hessian = damped(moments.xx / total.rows, damping)
        wanted = design.weight(start).to(weight.dtype)
        found = search_steps(quantizer, wanted, design, hessian, second_order=second_order, fixed=fixed)
        change = design.matrices(found.double()) - old
        return wanted, found, change, moments.error(change)

    floats, plain, change, before = rounded(old, DAMPING)
    if not regress or total.rows < FEWEST_ROWS:
        return RoundedLayer(plain, floats)
    ridge, best, after = choose_ridge(sums.fit, sums.held, problem.intercept), plain, before
    steps = {name: parameter.detach().clone() for name, parameter in quantizer.named_parameters()}
    solution = None if math.isinf(ridge) else solve(total, ridge, problem.intercept)
    if solution is not None:
        moved = solution[:, :-1] if problem.intercept else solution
        wanted, other, other_change, error = rounded(old + moved, ridge)
        if error < before:
            floats, best, change, after = wanted, other, other_change, error
        else:  # what rounding does is larger than what the regression gains
            ridge = math.inf
            for name, parameter in quantizer.named_parameters():
                parameter.copy_(steps[name])
    shift = None
    if problem.intercept:
        shift = (moments.t - torch.einsum("gno,gn->go", change, moments.x)).flatten()
    before, after = (math.sqrt(error / sums.norm) if sums.norm else 0.0 for error in (before, after))
    return RoundedLayer(best, floats, shift, LayerRepair(before, after, ridge, total.rows))
