"""What quantizers at fixed bits share: where their steps lie, and that they stay valid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from graphcomp.coupling.axis import Axes, Reason, couple, freeze
from graphcomp.errors import PlanError
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.gradients import bounded, scale_gradient
from graphcomp.quantization.spec import Kind, QuantSpec
from graphcomp.quantization.stored import SMALLEST_STEP, spread


def largest_step(spec: QuantSpec) -> float:
    """The ceiling of every step: every level is still finite in float32."""
    return torch.finfo(torch.float32).max / (spec.quant_max - spec.quant_min) * (1 - 2.0**-20)


class StepQuantizer(Quantizer):
    """Levels follow from a learnable step, `scale`, in the units of the tensor.

    Attributes:
        scale: parameter () per tensor, (c,) per channel, (c, g) per group. Units of the tensor per code; 1 until
            `set_range`. What an optimizer drove out of range counts as the floor (or ceiling), until `project`.
        groups: int64 buffer (i,), per group only: the column of `scale` for each index of the last dim. Slicing the
            last dim slices `groups`, and the indices that stay keep the steps they had.
        gradient_scale: whether gradients of the quantizer's parameters are multiplied by 1 / sqrt(n * quant_max), n
            the elements that share a step. For activations n counts the whole batch, where LSQ counts one sample.

    Args:
        spec: how to quantize.
        shape: of the tensor; needed per channel (its size along `dim` counts) and per group (its first and last dim).
        dim: the channel dim, may be negative; ignored per tensor, must be 0 per group.

    Raises:
        PlanError: the spec is not for this class, or its granularity does not fit `shape` and `dim`.
    """

    kind: ClassVar[Kind]
    """Which specs the class is for."""

    scale: nn.Parameter
    groups: Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        shape: Sequence[int] | None = None,
        dim: int | None = None,
        *,
        gradient_scale: bool = True,
    ) -> None:
        if spec.kind != self.kind:
            raise PlanError(
                f"{type(self).__name__} was given a spec of kind {spec.kind!r}", fix="make_quantizer(spec, …)"
            )
        dim = channel_dim(spec, shape, dim)
        super().__init__(spec, dim)
        self.gradient_scale = gradient_scale
        groups = None
        if spec.granularity == "group" and shape is not None:
            groups = torch.arange(shape[-1]) // spec.group_size
        self.register_buffer("groups", groups)
        self.scale = nn.Parameter(torch.ones(parameter_shape(spec, shape, dim)))

    @property
    def bits(self) -> Tensor:
        """() float32: as many as the spec says."""
        return torch.full((), float(self.spec.bits), device=self.scale.device)

    @property
    def multiples(self) -> bool:
        """Whether every level is a whole multiple of `scale`, less a zero point."""
        return True

    def steps(self) -> Sequence[nn.Parameter]:
        """`scale`, and what else is learned in the units of the tensor."""
        return (self.scale,)

    @torch.no_grad()
    def project(self) -> None:
        """Clamp steps to those that are valid."""
        for step in self.steps():
            step.clamp_(*self._step_limits())

    def couple_axes(self, x: Axes, own: Mapping[str, Axes], why: Reason) -> Axes:
        """Steps go with their channel, and `groups` with the last dim; which groups there are is not up for pruning."""
        for name, axes in own.items():
            if name == "groups":
                couple(x[-1], axes[0], why)
            elif self.dim is not None:
                couple(x[self.dim], axes[0], why)
                for groups in axes[1:]:
                    freeze(groups, Reason("columns are looked up by number", why.op, why.source))
        return x

    def _step_limits(self) -> tuple[float, float]:
        """What `scale` can hold of the valid steps. float16 holds less than float32, down to its smallest subnormal."""
        info = torch.finfo(self.scale.dtype)
        return max(SMALLEST_STEP, info.tiny * info.eps), min(largest_step(self.spec), info.max)

    def _wide(self, x: Tensor) -> torch.dtype:
        """The dtype to compute in: float32, or float64 where `x` or `scale` has it. Half floats hold too few codes."""
        return torch.promote_types(torch.promote_types(x.dtype, self.scale.dtype), torch.float32)

    def _learned(self, parameter: Tensor, low: float, high: float, x: Tensor) -> Tensor:
        """A parameter as the forward uses it: in range, its gradient scaled, spread to broadcast with `x`."""
        value = bounded(parameter.to(self._wide(x)), low, high)
        if self.gradient_scale:
            shared = max(1, x.numel() // max(1, parameter.numel()))
            value = scale_gradient(value, (shared * self.spec.quant_max) ** -0.5)
        return spread(value, x.dim(), self.dim, self.groups)

    def _step_and_zero(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Those that span `low` … `high`, as far as `scale` can hold them."""
        device = self.scale.device
        step, zero = step_and_zero(low.to(device, torch.float64), high.to(device, torch.float64), self.spec)
        return step.clamp(*self._step_limits()), zero

    def _valid(self, step: Tensor, dtype: torch.dtype) -> Tensor:
        """A step as the forward uses it, in its own shape."""
        return step.to(dtype).clamp(SMALLEST_STEP, largest_step(self.spec))

    def _step(self, x: Tensor, step: Tensor | None = None) -> Tensor:
        """A step, `scale` by default, as the forward uses it, spread to broadcast with `x`."""
        return self._learned(self.scale if step is None else step, SMALLEST_STEP, largest_step(self.spec), x)


class UniformQuantizer(StepQuantizer):
    """Levels are multiples of a learnable step, `scale`. Arguments and attributes as StepQuantizer.

    Raises:
        PlanError: the spec is not for this class, or its granularity does not fit `shape` and `dim`.
    """

    kind: ClassVar[Kind] = "uniform"
    symmetric: ClassVar[bool]
    """Which specs the class is for."""

    def __init__(
        self,
        spec: QuantSpec,
        shape: Sequence[int] | None = None,
        dim: int | None = None,
        *,
        gradient_scale: bool = True,
    ) -> None:
        super().__init__(spec, shape, dim, gradient_scale=gradient_scale)
        if spec.symmetric is not self.symmetric:
            raise PlanError(
                f"{type(self).__name__} was given {'a symmetric' if spec.symmetric else 'an asymmetric'} spec",
                fix=f"make_quantizer(spec, …), or QuantSpec(symmetric={self.symmetric})",
            )


def channel_dim(spec: QuantSpec, shape: Sequence[int] | None, dim: int | None) -> int | None:
    """The dim with one step per index, counted from the front; None per tensor.

    Raises:
        PlanError: the spec needs a shape or a dim that is not given, or that does not exist.
    """
    if spec.granularity == "tensor":
        return None
    if shape is None or dim is None:
        raise PlanError(
            f"one step per {spec.granularity} needs the tensor's shape and its channel dim",
            why=f"got shape={shape}, dim={dim}",
            fix="make_quantizer(spec, shape=weight.shape, dim=0)",
        )
    if not -len(shape) <= dim < len(shape):
        raise PlanError(f"there is no dim {dim} in a tensor of shape {tuple(shape)}", fix="dim=0")
    dim %= len(shape)
    if spec.granularity == "group" and (dim != 0 or len(shape) < 2):
        raise PlanError(
            f"a tensor of shape {tuple(shape)} with channel dim {dim} cannot have one step per group",
            why="groups divide the last dim of a tensor whose channels are dim 0",
            fix='QuantSpec(granularity="channel")',
        )
    return dim


def parameter_shape(spec: QuantSpec, shape: Sequence[int] | None, dim: int | None) -> tuple[int, ...]:
    """The shape of `scale`: (), (c,) or (c, g). The last group may be smaller than the others."""
    if shape is None or dim is None:
        return ()
    if spec.granularity == "channel":
        return (shape[dim],)
    return (shape[0], -(-shape[-1] // spec.group_size))


def step_and_zero(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The step and zero point whose codes span `low` … `high` and 0.

    Args:
        low, high: the same shape, float64, finite.

    Returns:
        Step (> 0; 1 where the range is only 0) and zero point (whole, from quant_min to quant_max), in that shape.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if spec.symmetric:
        span = torch.maximum(-low, high) / spec.quant_max
    else:  # divided before they are added: the sum of the two ends need not be finite
        levels = spec.quant_max - spec.quant_min
        span = high / levels - low / levels
    step = torch.where(span > 0, span.clamp(SMALLEST_STEP, largest_step(spec)), 1.0)
    if spec.symmetric:
        return step, torch.zeros_like(step)
    zero = (spec.quant_min - low / step).round().clamp(spec.quant_min, spec.quant_max)
    return step, zero
