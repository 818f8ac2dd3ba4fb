"""Weights rounded one input after the other, each error made up for by the inputs still to come: GPTQ.

Source: Frantar et al. 2022 (arXiv 2210.17323), algorithm 1, after optimal brain surgeon. Differences: a row for which
rounding to nearest gives the smaller error stays nearest, so the result is never worse; and inputs that the data never
move are rounded to nearest, where the authors set them to 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graphcomp.errors import CalibrationError, PlanError
from graphcomp.ir.graph import bind, value
from graphcomp.ops.answers import operands_of
from graphcomp.ops.design import Patches, convolution
from graphcomp.quantization.calibrate import calibrate_weight
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.gradients import multiples
from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.stored import Affine

aten = torch.ops.aten

ELEMENTS_AT_ONCE = 1 << 24
"""Of unfolded patches: 64 MiB in float32."""

DAMPING_TRIES = 5
"""A matrix that cannot be factored is damped ten times as much, so often."""


# ------------------------------------------------------------------------------------------------ moments
@torch.no_grad()
def second_moments(node: fx.Node, batches: Sequence[Tensor]) -> Tensor | None:
    """The mean of x xᵀ over everything that the layer `node` multiplies its weight with.

    Args:
        node: a linear layer, a product with a weight (inputs, outputs), or a convolution.
        batches: what it reads, (…, i) or (n, c, *space) each.

    Returns:
        (i, i) float64, i the elements of the weight that make one output, row-major; None where the layer is not one
        product with a matrix: grouped and transposed convolutions, products of batches of matrices.

    Raises:
        CalibrationError: there is no data, or not all are finite.
    """
    compute = operands_of(node)
    shape = value(bind(node)[compute.weight]).shape
    if not compute.convolution and len(shape) == 2:
        rows: Iterator[Tensor] = (x.flatten(0, -2) if x.dim() > 1 else x[None] for x in batches)
    elif compute.convolution and not compute.transposed and bind(node)["groups"] == 1:
        design = convolution(node, compute, shape)
        rows = (patches for x in batches for patches in _patches(design, x))
    else:
        return None
    total, count = None, 0
    for x in rows:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        product = (wide.T @ wide).double()
        total = product if total is None else total + product
        count += len(x)
    if total is None or count == 0:
        raise CalibrationError("no data to take second moments of", at=node.name, fix="give at least one batch")
    if not bool(total.isfinite().all()):
        raise CalibrationError("the data are not finite, or too large to be squared", at=node.name)
    return total / count


def _patches(design: Patches, x: Tensor) -> Iterator[Tensor]:
    """(positions, c * kernel) of a convolution's input, some samples at a time."""
    space = len(design.kernel)
    x = x if x.dim() == space + 2 else x[None]
    at_once = max(1, ELEMENTS_AT_ONCE // max(1, x[0].numel() * torch.Size(design.kernel).numel()))
    for part in torch.split(x, at_once):
        # (n, c, *positions, *kernel) -> (n, *positions, c, *kernel)
        yield design.patches(part).movedim(1, 1 + space).flatten(space + 1).flatten(0, -2)


# ------------------------------------------------------------------------------------------------ rounding
@torch.no_grad()
def round_second_order(
    weight: Tensor,
    hessian: Tensor,
    quantizer: Quantizer,
    *,
    dim: int = 0,
    damping: float = 0.01,
    order: bool = False,
    refit: bool = False,
    block: int = 128,
) -> Tensor:
    """The levels of `quantizer` for which Σ (w - ŵ) H (w - ŵ)ᵀ is small: the error of the layer's output.

    Args:
        weight: (o, i), or (o, …) with i elements each, or with the outputs at `dim`; finite. Not changed.
        hessian: (i, i) symmetric, positive semidefinite: the mean of x xᵀ (`second_moments`).
        quantizer: of the weight, its range set. With steps per channel they belong to `dim`.
        dim: which one of the weight's counts the outputs.
        damping: this share of the mean of H's diagonal is added to it.
        order: start with the inputs of the largest second moments; else from the first to the last.
        refit: with steps per group, read each group's range off the weights as they have become by its turn, and set it
            in `quantizer`; else the ranges stay as they are.
        block: so many columns are updated at a time; only speed depends on it.

    Returns:
        Shape and dtype of `weight`, every element a level: quantizer(result) equals it bit for bit. Never a larger
        error than rounding to nearest, unless ranges are refit.

    Raises:
        PlanError: the quantizer's levels are not evenly spaced, its steps do not belong to `dim`, `hessian` does not
            fit, or `order` and `refit` are both asked for.
        CalibrationError: `hessian` or `weight` is not finite, or `hessian` is not positive semidefinite.
    """
    rows = weight.detach().movedim(dim, 0)
    matrix = rows.flatten(1)
    _check(matrix, hessian, quantizer, dim, order and refit)
    grid = _Grid(quantizer, matrix)
    h = hessian.to(matrix.device, torch.float64)
    dead = h.diagonal() <= 0
    h = h + torch.diag(dead.double())  # these are rounded to nearest, and no other makes up for them
    columns = torch.argsort(h.diagonal(), descending=True, stable=True) if order else torch.arange(len(h))
    columns = columns.to(matrix.device)
    upper = _factor(h[columns][:, columns], damping)
    rounded = _rounded(matrix.double(), columns, upper, grid, refit, block)
    if not refit:
        nearest = grid.nearest(matrix)
        better = _error(matrix, nearest, hessian) < _error(matrix, rounded, hessian)
        rounded = torch.where(better[:, None], nearest, rounded)
    return rounded.to(weight.dtype).view(rows.shape).movedim(0, dim).contiguous()


def _rounded(work: Tensor, columns: Tensor, upper: Tensor, grid: _Grid, refit: bool, block: int) -> Tensor:
    """The loop of algorithm 1: `work` (o, i) float64 in its own order, `upper` in that of `columns`."""
    work = work[:, columns].clone()
    result = torch.empty_like(work, dtype=grid.dtype)
    place = columns.tolist()
    seen: set[int] = set()
    for start in range(0, len(place), block):
        end = min(start + block, len(place))
        errors = torch.empty_like(work[:, start:end])
        for k in range(start, end):
            group = grid.group_of(place[k])
            if refit and group is not None and group not in seen:
                seen.add(group)
                # what the columns before this block did to the group is in `work`, those of the block as well
                pending = work.clone()
                pending[:, end:] -= errors[:, : k - start] @ upper[start:k, end:]
                grid.refit(group, pending)
            result[:, k] = grid.level(work[:, k], place[k])
            errors[:, k - start] = (work[:, k] - result[:, k]) / upper[k, k]
            work[:, k:end] -= errors[:, k - start, None] * upper[k, k:end]
        work[:, end:] -= errors @ upper[start:end, end:]
    return result[:, torch.argsort(columns)]


def _factor(h: Tensor, damping: float) -> Tensor:
    """(i, i): the upper Cholesky factor of the inverse of `h`, damped."""
    mean = h.diagonal().mean()
    for k in range(DAMPING_TRIES):
        damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (mean * damping * 10**k)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed):
            continue
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not bool(failed):
            return upper
    raise CalibrationError(
        "the second moments are not positive semidefinite",
        why=f"no Cholesky factor with {damping * 10 ** (DAMPING_TRIES - 1):g} times the mean of the diagonal added",
        fix="second_moments(node, batches) of more data, or a larger damping",
    )


def _error(exact: Tensor, rough: Tensor, hessian: Tensor) -> Tensor:
    """(o,): (w - ŵ) H (w - ŵ)ᵀ of each row."""
    difference = exact.double() - rough.double()
    return ((difference @ hessian.to(difference)) * difference).sum(1)


def _check(matrix: Tensor, hessian: Tensor, quantizer: Quantizer, dim: int, both: bool) -> None:
    if hessian.shape != (matrix.shape[1], matrix.shape[1]):
        raise PlanError(
            f"second moments of shape {tuple(hessian.shape)} for a weight with {matrix.shape[1]} inputs",
            fix="second_moments(node, batches), of the layer that reads the weight",
        )
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
    if quantizer.dim not in (None, dim):
        raise PlanError(f"the quantizer's steps belong to dim {quantizer.dim}", why=f"outputs are dim {dim} here")
    if both:
        raise PlanError(
            "order=True with refit=True",
            why="a group's range is read when its turn comes, and with an order of their own its inputs come apart",
            fix="order=False, or refit=False",
        )
    for name, tensor in (("weight", matrix), ("second moments", hessian)):
        if not bool(tensor.isfinite().all()):
            raise CalibrationError(f"the {name} are not finite", fix="calibrate on data for which the model is sound")


# ------------------------------------------------------------------------------------------------ levels
@dataclass
class _Grid:
    """The levels of a quantizer, column by column of a matrix (o, i)."""

    quantizer: Quantizer
    matrix: Tensor

    def __post_init__(self) -> None:
        self.read()
        self.dtype = self.integers.scale.dtype
        groups = self.integers.groups
        # a weight with more dims than two has its groups along the last one, so they repeat in the matrix
        self.groups = None if groups is None else groups.repeat(self.matrix.shape[1] // len(groups))

    def read(self) -> None:
        """Take the steps from the quantizer; an element shows them as well as the whole weight."""
        rows = self.matrix.new_zeros(len(self.matrix), 1 if self.grouped is None else len(self.grouped))
        stored = self.quantizer.to_integers(rows.T if self.quantizer.dim else rows)
        assert isinstance(stored, Affine), "levels are evenly spaced"
        self.integers = stored

    @property
    def grouped(self) -> Tensor | None:
        """The quantizer's buffer of groups, if it has one."""
        found = getattr(self.quantizer, "groups", None)
        return found if isinstance(found, Tensor) else None

    def group_of(self, column: int) -> int | None:
        return None if self.groups is None else int(self.groups[column])

    def level(self, values: Tensor, column: int) -> Tensor:
        """(o,): the nearest level of each of one column's values."""
        group = self.group_of(column)
        scale, zero = self.integers.scale, self.integers.zero_point
        return self._levels(values, *((scale, zero) if group is None else (scale[:, group], zero[:, group])))

    def nearest(self, matrix: Tensor) -> Tensor:
        """(o, i): the nearest levels."""
        scale, zero = self.integers.scale, self.integers.zero_point
        if self.groups is not None:
            return self._levels(matrix, scale[:, self.groups], zero[:, self.groups])
        return self._levels(matrix, *((scale, zero) if scale.dim() == 0 else (scale[:, None], zero[:, None])))

    def _levels(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        low, high = self.integers.quant_min, self.integers.quant_max
        return multiples(values.to(self.dtype), scale, zero.to(self.dtype), low, high) * scale

    def refit(self, group: int, matrix: Tensor) -> None:
        """Set the steps of one group by its weights as they are now."""
        assert self.groups is not None
        own = matrix[:, self.groups == group].to(self.matrix.dtype)
        spec = replace(self.quantizer.spec, granularity="channel", group_size=0)
        fitted = make_quantizer(spec, shape=own.shape, dim=0).to(own.device, own.dtype)
        calibrate_weight(fitted, own)
        for name, parameter in self.quantizer.named_parameters():
            parameter[:, group] = fitted.get_parameter(name).to(parameter)
        self.read()
