"""GDRQ: weights and activations are clipped at multiples of their means until low bits fit, then quantized in groups.

Two stages. Reshaping, in floats: after each step of the optimizer weights are clipped at k mean |W| (Scale-Clip), and
activations at k_a times a moving average of the mean of their nonzero magnitudes. Densities become nearly uniform,
which evenly spaced levels fit best. Quantization: the filters of a layer are parted into groups, each with one step,
which is trained (LSQ) or follows from the mean, alpha = k mean |W_g|; weights are clipped by groups from there on, and
the steps of activations begin at the clip.

The file holds a step per filter, the same for all filters of a group. A batch norm behind the layer is folded into
these steps, so that groups cost nothing in inference; without a batch norm the groups are exact in the same way.

Source: Scale-Clip and GDRQ (Yu et al. 2019, arXiv 1908.01477; CVPRW 2020), reconstructed from the abstract: no code is
public. Ours: k = 2, at which uniform densities are a fixed point; k_a; the number and the kind of groups; training
begins at steps of least squared error (alpha = T is 1.5 times that at 2 bits); layers and values that have more bits
than the others (the first and the last layer, sums) are not clipped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from graphcomp.arguments import check_word
from graphcomp.errors import PlanError
from graphcomp.methods.base import Goal, Method, Source, of_activations, refuse
from graphcomp.pruning.evidence import Loss
from graphcomp.quantization.calibrate import calibrate_weight
from graphcomp.quantization.quantizers.symmetric import SymmetricQuantizer
from graphcomp.quantization.quantizers.uniform import UniformQuantizer
from graphcomp.quantization.scale_clip import (
    Grouping,
    clip_levels,
    filter_groups,
    filter_rows,
    group_steps,
    scale_clip,
)
from graphcomp.quantization.sites import Site
from graphcomp.quantization.spec import ACTIVATIONS, WEIGHTS, QuantConfig, check_bits
from graphcomp.training.moving_ranges import MovingRanges
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Forward, Run
from graphcomp.training.schedule import Schedule, is_number, is_whole

STAGES = ("reshaping", "quantization")
"""Names of the two stages."""

EIGHT = 8
"""Bits that the first and the last layer have at least; with as many, first ranges of activations reach all values."""

Steps = Literal["learned", "mean"]


@dataclass(eq=False)
class GroupedWeight:
    """A weight whose filters share steps in groups.

    Attributes:
        parameter: the weight.
        quantizer: with a step per filter.
        group_of: (c,) the group of each filter; None before quantization begins.
    """

    parameter: nn.Parameter
    quantizer: SymmetricQuantizer
    group_of: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """(c, n): one row per filter."""
        return filter_rows(self.parameter.detach(), self.quantizer.dim)

    def clip(self, k: float) -> None:
        """Clip the weight at k times the mean magnitude, of each group once there are groups."""
        self.parameter.copy_(scale_clip(self.parameter, k, self.group_of, self.quantizer.dim))

    def part(self, groups: int, grouping: Grouping) -> None:
        """Part the filters into groups."""
        self.group_of = filter_groups(self.rows, groups, grouping)

    def set_steps(self, k: float | None) -> None:
        """Set the step of each group: of least squared error, or with `k` that of levels up to k mean |W_g|."""
        assert self.group_of is not None
        rows, most = self.rows, self.quantizer.spec.quant_max
        if k is None:
            steps = group_steps(rows, self.group_of, most)
        else:
            levels = clip_levels(rows, k, self.group_of)
            steps = torch.where(levels > 0, levels / most, 1.0)
        self.quantizer.scale.copy_(steps.view(self.quantizer.scale.shape))
        self.quantizer.project()

    def sum_gradients(self) -> None:
        """Give the steps of a group one gradient: the sum over filters, by LSQ's scale for as many weights."""
        gradient = self.quantizer.scale.grad
        if gradient is None or self.group_of is None or not gradient.dim():
            return
        ones = torch.ones_like(gradient)
        total, filters = (torch.zeros_like(own).index_add_(0, self.group_of, own) for own in (gradient, ones))
        gradient.copy_((total / filters.clamp(min=1).sqrt())[self.group_of])

    def tie_steps(self) -> None:
        """Give the filters of a group the step of the first one: an optimizer may round their updates differently."""
        scale = self.quantizer.scale
        if self.group_of is None or not scale.dim():
            return
        place = torch.arange(len(self.group_of), device=scale.device)
        first = torch.full_like(place, len(place)).scatter_reduce_(0, self.group_of, place, "amin")
        scale.copy_(scale[first[self.group_of]])


class GdrqRun(Run):
    """Trains in floats with weights and activations clipped, then with quantizers on.

    Attributes:
        weights: parameter -> weight with groups of filters; those that have more bits than was asked are in `others`.
        others: (quantizer, parameter): a step per filter.
        ranges: moving averages of activations.
        quantized: whether the second stage has begun.
    """

    name: ClassVar[str] = "gdrq"

    def __init__(
        self,
        ready: Prepared,
        steps: int,
        method: Gdrq,
        bits: tuple[int, int | None],
        lr_quant: float | None = None,
    ) -> None:
        super().__init__(ready, lr_quant=lr_quant)
        self.method, self.quantized = method, False
        self.settles = min(round(method.reshape * steps), steps - 1)
        of_weights = [(site, q) for site, q in ready.quantizers() if site.is_weight and site.parameter]
        coarse = [(site, q) for site, q in of_weights if site.spec.bits == bits[0]]
        self.weights = {
            site.parameter: GroupedWeight(ready.get_parameter(site.parameter), q)
            for site, q in coarse
            if isinstance(q, SymmetricQuantizer)
        }
        self.others = [(q, ready.get_parameter(s.parameter)) for s, q in of_weights if s.parameter not in self.weights]
        read = [(s, q) for s, q in ready.quantizers() if not s.is_weight and isinstance(q, UniformQuantizer)]
        self.few = {site.name for site, _ in read if site.spec.bits == bits[1]}
        clip = method.activation_clip
        clips = {} if clip is None else dict.fromkeys((s.name for s, _ in read if s.name in self.few), clip)
        self.ranges = MovingRanges({site.name: q for site, q in read}, clips)
        if method.steps == "mean":
            fixed = [w.quantizer for w in self.weights.values()]
            for quantizer in [*fixed, *(q for site, q in read if site.name in clips)]:
                quantizer.requires_grad_(False)
        options = {name: str(value) for name, value in asdict(method).items()}
        self.about = {**options, "bits": str(bits)}
        ready.remarks = (*ready.remarks, *self._remarks([s for s, _ in of_weights], [s for s, _ in read]))
        self._enter(0)

    def stage(self, step: int) -> str:
        """Reshaping or quantization."""
        return STAGES[step >= self.settles]

    @property
    def follows(self) -> bool:
        """Whether ranges of activations follow from their means to the end."""
        return self.method.steps == "mean" and bool(self.ranges.clips)

    # ------------------------------------------------------------------------------------------ a step
    def loss(self, forward: Forward, batch: Any, task: Loss) -> Tensor:
        """The loss in floats with activations clipped; then that of the quantized model."""
        if not self.quantized:
            with self.ready.in_floats(), self.ranges.watching(clipped=True):
                return task(forward(batch), batch)
        if self.follows:
            with self.ranges.watching(clipped=False):
                return task(forward(batch), batch)
        return task(forward(batch), batch)

    def before_step(self, step: int) -> None:
        """Move the averages of activations, and give the steps of each group one gradient."""
        super().before_step(step)
        self.ranges.update()
        if self.quantized:
            for weight in self.weights.values():
                weight.sum_gradients()

    def after_step(self, step: int) -> None:
        """Clip weights, and begin to quantize when due."""
        super().after_step(step)
        clip, follows = self.method.clip, self.method.steps == "mean"
        for weight in self.weights.values():
            if clip is not None and weight.parameter.requires_grad:
                weight.clip(clip)
            if self.quantized and follows:
                weight.set_steps(clip)
            elif self.quantized:
                weight.tie_steps()
        if self.quantized and self.follows:
            self.ranges.set_ranges(self.ranges.clips)
        self._enter(step + 1)

    @torch.no_grad()
    def _enter(self, step: int) -> None:
        """Begin the second stage, where a step asks: part filters, set steps of weights and activations."""
        if self.quantized or step != self.settles:
            return
        self.quantized = True
        for weight in self.weights.values():
            weight.part(self.method.groups, self.method.grouping)
            if self.method.clip is not None and weight.parameter.requires_grad:
                weight.clip(self.method.clip)
            weight.set_steps(self.method.clip if self.method.steps == "mean" else None)
        for quantizer, parameter in self.others:
            calibrate_weight(quantizer, parameter.detach())
        if self.settles:
            self.ranges.set_ranges()

    # ------------------------------------------------------------------------------------------ where the run stands
    def state_dict(self) -> dict[str, Any]:
        """The groups of filters and the averages of activations."""
        groups = {name: weight.group_of for name, weight in self.weights.items()}
        return {"quantized": self.quantized, "groups": groups, "averages": self.ranges.averages}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on where `state_dict` was taken."""
        self.quantized = bool(state["quantized"])
        self.ranges.load(state["averages"].to(self.ranges.averages.device))
        for name, weight in self.weights.items():
            found = state["groups"][name]
            weight.group_of = None if found is None else found.to(weight.parameter.device)

    # ------------------------------------------------------------------------------------------ what is said
    def _remarks(self, weights: list[Site], read: list[Site]) -> list[str]:
        found = []
        if self.weights and self.method.groups > 1:
            found.append(
                f"filters of {len(self.weights)} layers share steps in {self.method.groups} groups a layer; "
                "the file holds a step per filter"
            )
        finer = [s.layer for s in weights if s.parameter not in self.weights]
        if finer and (self.method.clip is not None or self.method.groups > 1):
            found.append(f"not clipped, and a step per filter, as they have more bits: {', '.join(finer)}")
        fine = [s.layer for s in read if s.name not in self.few]
        if fine and self.method.activation_clip is not None:
            found.append(f"activations not clipped, as they have more bits: {', '.join(fine)}")
        frozen = [name for name, weight in self.weights.items() if not weight.parameter.requires_grad]
        if frozen and self.method.clip is not None:
            found.append(f"not clipped, as they are not trained: {', '.join(frozen)}")
        if computed := [s.layer for s in self.ready.session.sites if s.is_weight and not s.parameter]:
            found.append(f"weights that are computed are not clipped: {', '.join(computed)}")
        return found


@dataclass(frozen=True)
class Gdrq(Method):
    """Reshapes weights and activations by clipping, in floats, then quantizes both at few bits; nothing is pruned.

    `bits=2, activation_bits=4`: numbers of bits. The first and the last layer, and sums, have 8 bits at least.

    Attributes:
        clip: k, weights are clipped at k times their mean magnitude after each step; None: weights are not clipped.
        activation_clip: k_a, the same for activations in floats; None: activations are not clipped in floats.
        reshape: share of the run in floats.
        groups: of filters of each layer, which share a step.
        grouping: "sorted": filters of nearly the same largest magnitude; "contiguous": neighbours.
        steps: "learned": trained, from steps of least squared error on; "mean": levels up to k times the means.
    """

    name: ClassVar[str] = "gdrq"
    quantizes = True
    clip: float | None = 2.0
    activation_clip: float | None = 4.0
    reshape: float = 0.5
    groups: int = 4
    grouping: Grouping = "sorted"
    steps: Steps = "learned"

    def __post_init__(self) -> None:
        check_word("grouping", self.grouping, get_args(Grouping))
        check_word("steps", self.steps, get_args(Steps))
        for name, value in (("clip", self.clip), ("activation_clip", self.activation_clip)):
            if value is not None and not (is_number(value) and value > 1):
                raise PlanError(
                    f"Gdrq({name}={value!r}): must be a number above 1, or None",
                    why="clipped at its mean magnitude or below, a tensor shrinks with every step",
                    fix=f"{name}=2.0",
                )
        if not (is_number(self.reshape) and 0 <= self.reshape < 1):
            raise PlanError(f"Gdrq(reshape={self.reshape!r}): must be a share, 0 to below 1", fix="reshape=0.5")
        if not is_whole(self.groups) or self.groups < 1:
            raise PlanError(f"Gdrq(groups={self.groups!r}): must be a whole number, 1 at least", fix="groups=4")
        if self.steps == "mean" and self.clip is None:
            raise PlanError('Gdrq(clip=None, steps="mean")', why="the steps follow from the clip", fix="clip=2.0")

    def takes(self, goal: Goal) -> Collection[str]:
        """Bits and ranges of activations."""
        return of_activations(goal)

    def check(self, goal: Goal) -> None:
        """One number of bits, for weights and for activations."""
        if goal.bits is not None and goal.bits[0] != goal.bits[1]:
            raise PlanError(f"bits must be one number for GDRQ, got {goal.bits}", fix=f"bits={goal.bits[0]}")
        if isinstance(goal.activation_bits, tuple):
            raise PlanError(
                f"activation_bits must be one number for GDRQ, got {goal.activation_bits}",
                fix=f"activation_bits={goal.activation_bits[0]}",
            )

    def prepare(self, source: Source, goal: Goal) -> Prepared:
        """Stand a quantizer with a step per filter on each weight, and one with one step on each activation."""
        bits, of_activations = _bits(goal)
        activations = None
        if of_activations is not None:
            clipped: Literal["mse", "minmax"] = "mse" if of_activations < EIGHT and not self.reshape else "minmax"
            activations = replace(ACTIVATIONS, bits=of_activations, observer=clipped)
        return source(config=QuantConfig(replace(WEIGHTS, bits=bits), activations, first_and_last_bits=EIGHT))

    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> GdrqRun:
        """Begin a run."""
        refuse(self, {"a Schedule": isinstance(training.schedule, Schedule)}, "its stages are GETA's; give steps")
        return GdrqRun(ready, steps, self, _bits(goal), training.lr_quant)


def _bits(goal: Goal) -> tuple[int, int | None]:
    """Return the bits of weights and of activations; None: activations stay float."""
    assert goal.bits is not None
    bits = goal.bits[0]
    if goal.activation_bits is None:
        return bits, None
    return bits, bits if goal.activation_bits == "same" else check_bits(goal.activation_bits, "activation_bits")
