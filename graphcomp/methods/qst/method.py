"""QST as a method: what is pruned and how the rest is rounded is trained together, from scratch, in one run.

Weights are in floats for the first part of the run, then rounded with steps that are trained (LSQ). Thresholds are
trained all along; a target lifts or lowers all of them by one number, so that what stays follows a cubic schedule. From
`freeze` on the mask is that of the end, exactly of the size that was asked for, and weights and steps go on learning.

Source: QST (Park, Kim, Lee 2022, 10.1145/3524066), reconstructed: only the abstract could be read, and no code is
public. Thresholds, their surrogate gradient and the pressure are those of Dynamic Sparse Training (Liu et al. 2020,
arXiv 2005.06870), which also decays the thresholds (here they are not), and opens a layer wholly where 1 % are left
(`guard="reset"`). Ours are: the target in place of a penalty on the size, whose weight would need tuning; the fixed
mask, as two straight-through estimators at once make training unsteady (QADS, 2025); the floor; the scale of the
thresholds' gradients, as LSQ scales those of steps; and units.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from graphcomp.arguments import check_flag, check_word
from graphcomp.cost.conventions import Convention
from graphcomp.errors import PlanError
from graphcomp.methods.base import Goal, Method, Source, refuse
from graphcomp.methods.pqk import sparsity_at
from graphcomp.methods.qst.gates import Route
from graphcomp.methods.qst.units import UnitGates
from graphcomp.methods.qst.weights import Guard, WeightGates
from graphcomp.methods.sizes import bytes_within, check_convention, check_sized
from graphcomp.pruning.evidence import Loss
from graphcomp.quantization.analytic import step_errors
from graphcomp.quantization.placed import switched_off
from graphcomp.quantization.spec import QuantConfig, QuantSpec
from graphcomp.training.elements import drop_gradients
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Choice, Forward, Run
from graphcomp.training.schedule import Schedule, is_number, is_whole

SPARSITY = 0.5
"""Share that goes where neither a share, nor a budget, nor a pressure is given."""

COARSE = 4
"""Bits below which the first and the last layer get 8."""

STAGES = ("floats", "thresholds", "fixed mask")


@dataclass(frozen=True)
class Target:
    """What is to stay in the end.

    Attributes:
        share: of weights or units; None: as many as `limit` bytes of codes hold by `convention`, or, with neither, as
            the thresholds leave.
    """

    share: float | None = None
    limit: float | None = None
    convention: Convention = "C0"


class QstRun(Run):
    """Trains weights, steps and thresholds; then weights and steps with the mask fixed.

    Attributes:
        gates: the thresholds, and what they let through.
        fixed: whether the mask is that of the end.
        masks: parameter -> bool mask, once that is so; empty where units go.
    """

    name: ClassVar[str] = "qst"

    def __init__(
        self,
        ready: Prepared,
        steps: int,
        gates: WeightGates | UnitGates,
        target: Target,
        *,
        pressure: float = 0.0,
        warmup: float = 0.1,
        freeze: float | None = 0.5,
        every: int = 16,
        about: Mapping[str, str] | None = None,
        lr_quant: float | None = None,
    ) -> None:
        super().__init__(ready, lr_quant=lr_quant)
        self.gates, self.target, self.pressure, self.every = gates, target, pressure, every
        self.about = about or {}
        self.settles = steps if freeze is None else max(1, round(freeze * steps))
        self.quantizes = bool(ready.session.sites)
        self.rounds_from = min(round(warmup * steps), self.settles) if self.quantizes else 0
        self.fixed, self.masks, self.step = False, dict[str, Tensor](), 0
        self.left = 1.0 if target.share is None else target.share  # share that stays in the end, as far as known
        if target.limit is not None:
            assert isinstance(gates, WeightGates)
            gates.count_within(target.limit, target.convention)  # refuses what cannot be met
        self._enter(0)

    def parameters(self) -> Iterable[nn.Parameter]:
        """The thresholds; vectors, so that no weight decay pulls at them."""
        return self.gates.parameters().values()

    def stage(self, step: int) -> str:
        """Floats, thresholds on quantized weights, or the fixed mask."""
        if step >= self.settles:
            return STAGES[2]
        return STAGES[0] if step < self.rounds_from else STAGES[1]

    # ------------------------------------------------------------------------------------------ the loss
    def loss(self, forward: Forward, batch: Any, task: Loss) -> Tensor:
        """The loss of the masked and quantized weights, and the pressure on thresholds."""
        if self.fixed:
            return task(forward(batch), batch)
        quantized = self.quantizes and self.step >= self.rounds_from
        views = self.gates.views(quantized)  # by quantizers that are on
        with self._quantizers(quantized):
            found = task(forward(batch, views), batch)
        if self.pressure:
            found = found + self.pressure * sum((-t).exp().sum() for t in self.parameters())
        return found

    def _quantizers(self, quantized: bool) -> AbstractContextManager[object]:
        """Switch quantizers off: all of them in floats, else those whose weights are quantized in front of the mask."""
        if not quantized:
            return self.ready.in_floats()
        return nullcontext() if isinstance(self.gates, UnitGates) else switched_off(self.gates.quantizers.values())

    # ------------------------------------------------------------------------------------------ a step
    def before_step(self, step: int) -> None:
        """Take the gradients of pruned weights away, once the mask is fixed."""
        super().before_step(step)
        drop_gradients(self.ready, self.masks)

    def after_step(self, step: int) -> None:
        """Hold thresholds, follow the schedule, and fix the mask when due."""
        super().after_step(step)
        if not self.fixed:
            self.gates.hold(self.left)
        self._enter(step + 1)

    @torch.no_grad()
    def _enter(self, step: int) -> None:
        """Get ready for a step: calibrate, move thresholds to the schedule, or fix the mask, where the step asks."""
        self.step = step
        if self.fixed:
            return
        if self.quantizes and step == self.rounds_from:
            self._calibrate()
        due = step % self.every == 0 or step == self.settles
        count = self._count() if due else None
        self.left = self.left if count is None else count / self.gates.total
        if step == self.settles:
            self._fix(count)
        elif count is not None and step:
            total = self.gates.total
            self.gates.shift(total - round(sparsity_at(step, self.settles, 1 - count / total) * total))

    def _calibrate(self) -> None:
        """Set steps to those of least error on the weights that stay."""
        for quantizer, weight in self.gates.quantized_weights():
            ((step, _),) = step_errors(weight, (quantizer.spec.bits,))
            quantizer.scale.fill_(step)

    def _count(self) -> int | None:
        """Return how many weights or units stay in the end; None: as the thresholds leave."""
        target = self.target
        if target.share is not None:
            return self.gates.total - round((1 - target.share) * self.gates.total)
        if target.limit is None:
            return None
        assert isinstance(self.gates, WeightGates)
        return self.gates.count_within(target.limit, target.convention)

    def _fix(self, count: int | None) -> None:
        chosen = self.gates.choice(count)
        self.fixed, self.masks = True, dict(chosen.elements)
        if chosen.kept:
            self.kept = chosen.kept
        self.ready.keep_elements(self.masks)

    # ------------------------------------------------------------------------------------------ where the run stands
    def metrics(self) -> dict[str, Any]:
        """How many weights are pruned, too."""
        if isinstance(self.gates, UnitGates):
            return super().metrics()
        stays = sum(int(mask.sum()) for mask in self.masks.values()) if self.fixed else self.gates.stays()
        return {**super().metrics(), "weights_pruned": self.gates.total - stays, "weights": self.gates.total}

    def choice(self) -> Choice:
        """The fixed mask; less, where weights have moved to codes that take more bytes than the budget allows."""
        limit, gates = self.target.limit, self.gates
        if limit is None or not isinstance(gates, WeightGates):
            return Choice(self.kept, self.masks)
        if gates.bytes_of(self.masks, self.target.convention) > limit:
            for threshold in gates.thresholds.values():  # pruned weights are 0: magnitudes say what goes next
                threshold.data.zero_()
            self.masks = gates.masks(gates.count_within(limit, self.target.convention, moves=False))
        return Choice(self.kept, self.masks)

    def state_dict(self) -> dict[str, Any]:
        """Thresholds, and the mask once it is fixed."""
        thresholds = {name: own.detach() for name, own in self.gates.parameters().items()}
        return {"thresholds": thresholds, "fixed": self.fixed, "masks": self.masks, "left": self.left}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on where `state_dict` was taken."""
        self.step, self.fixed, self.left = step, bool(state["fixed"]), float(state["left"])
        for name, own in self.gates.parameters().items():
            own.copy_(state["thresholds"][name])
        device = next(self.ready.parameters()).device
        self.masks = {name: mask.to(device) for name, mask in state["masks"].items()}
        self.ready.keep_elements(self.masks)


@dataclass(frozen=True)
class Qst(Method):
    """Trains thresholds of pruning and steps of quantization together, from scratch, at fixed bits or in floats.

    What stays is a share (`sparsity=`), as much as `budget=Budget(bytes=…)` holds by `convention`, or what `pressure`
    alone leaves. Activations stay float; with less than 4 bits the first and the last layer have 8.

    Attributes:
        per: "element": single weights go; "unit": channels, heads and features, which are cut.
        shared: what shares a threshold of single weights: an output "channel", or a "layer".
        gradient: route of gradients, see `graphcomp.methods.qst.gates`.
        pressure: weight of the sum of exp(-threshold) in the loss; DST takes 5e-6 for VGG-16.
        convention: of storage that a budget on bytes counts by, "C0" to "C5" (`graphcomp.cost.conventions`).
        warmup: share of the run in floats.
        freeze: share of the run after which the mask is fixed; None: at the end.
        every: steps from one move of thresholds to the schedule to the next.
        guard: "floor": a layer keeps `least` of its weights; "reset": its thresholds are 0 again below that.
        least: see `guard`.
        scaled: gradients of thresholds are divided by the root of the number of weights that share one; False: the sum
            over the weights, as DST has it, which moves thresholds of large layers far in one step.
    """

    name: ClassVar[str] = "qst"
    prunes = True
    quantizes = True
    per: Literal["element", "unit"] = "element"
    shared: Literal["channel", "layer"] = "channel"
    gradient: Route = "dense"
    pressure: float = 0.0
    convention: Convention | None = "C0"
    warmup: float = 0.1
    freeze: float | None = 0.5
    every: int = 16
    guard: Guard = "floor"
    least: float = 0.01
    scaled: bool = True

    def __post_init__(self) -> None:
        check_word("per", self.per, ("element", "unit"))
        check_word("shared", self.shared, ("channel", "layer"))
        check_word("gradient", self.gradient, get_args(Route))
        check_word("guard", self.guard, get_args(Guard))
        check_convention(self.convention or "C0")
        check_flag("scaled", self.scaled)
        if self.per == "unit" and self.gradient == "literal":
            raise PlanError(
                'Qst(per="unit", gradient="literal")',
                why="a unit is gated in front of its quantizer: there is no other derivative than that of latent",
                fix='gradient="dense" or "latent"',
            )
        for name, value, most in (
            ("warmup", self.warmup, 1.0),
            ("freeze", self.freeze, 1.0),
            ("least", self.least, 1.0),
        ):
            if (value is not None or name != "freeze") and not (is_number(value) and 0 <= value <= most):  # type: ignore[operator]
                raise PlanError(f"Qst({name}={value!r}): must be a share, 0 to 1", fix=f"{name}=0.1")
        if self.freeze is not None and self.warmup > self.freeze:
            raise PlanError(
                f"Qst(warmup={self.warmup!r}, freeze={self.freeze!r})",
                why="the mask would be fixed before the first step on quantized weights",
                fix=f"warmup={self.freeze!r} at most, or a later freeze",
            )
        if not is_number(self.pressure) or self.pressure < 0:
            raise PlanError(f"Qst(pressure={self.pressure!r}): must be a number, 0 at least", fix="pressure=5e-6")
        if not is_whole(self.every) or self.every < 1:
            raise PlanError(f"Qst(every={self.every!r}): must be a whole number, 1 at least", fix="every=16")

    def takes(self, goal: Goal) -> Collection[str]:
        """A budget on bytes of single weights; what units go by."""
        return ("round_to", "prune", "keep_inputs") if self.per == "unit" else ("budget",)

    def check(self, goal: Goal) -> None:
        """One number of bits, or none; a share or a budget."""
        check_sized(goal.budget, self.name, goal.bits is not None)
        if goal.bits is not None and goal.bits[0] != goal.bits[1]:
            raise PlanError(f"bits must be one number for QST, got {goal.bits}", fix=f"bits={goal.bits[0]}")
        if goal.budget is not None and goal.sparsity is not None:
            raise PlanError(
                f"sparsity={goal.sparsity} beside a budget with method='qst'",
                why="at fixed bits, the budget says how many weights stay",
                fix="one of the two",
            )

    def least_steps(self, goal: Goal, training: Training) -> int:
        """One on thresholds, and one with the fixed mask where there are steps with one."""
        return 1 if self.freeze in (None, 1.0) else 2

    def prepare(self, source: Source, goal: Goal) -> Prepared:
        """Stand one symmetric quantizer per tensor on each weight."""
        if goal.bits is None:
            return source()
        bits = goal.bits[0]
        config = QuantConfig(QuantSpec(bits), activations=None, first_and_last_bits=8 if bits < COARSE else bits)
        ready = source(config=config)
        if goal.activation_bits is not None:
            ready.remarks = (*ready.remarks, "activations stay float: QST rounds weights alone")
        return ready

    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> QstRun:
        """Begin a run."""
        refuse(self, {"a Schedule": isinstance(training.schedule, Schedule)}, "its stages are GETA's; give steps")
        gates: WeightGates | UnitGates
        if self.per == "unit":
            dense = self.gradient == "dense"
            gates = UnitGates(ready, dense=dense, round_to=goal.round_to, scaled=self.scaled)
        else:
            gates = WeightGates(
                ready,
                shared=self.shared,
                route=self.gradient,
                guard=self.guard,
                least=self.least,
                scaled=self.scaled,
            )
        options = {name: getattr(self, name) for name in self.__dataclass_fields__}
        asked = {"sparsity": goal.sparsity, "budget": goal.budget, "bits": goal.bits, "round_to": goal.round_to}
        return QstRun(
            ready,
            steps,
            gates,
            self._target(gates, goal),
            pressure=self.pressure,
            warmup=self.warmup,
            freeze=self.freeze,
            every=self.every,
            about={name: str(value) for name, value in {**options, **asked}.items()},
            lr_quant=training.lr_quant,
        )

    def _target(self, gates: WeightGates | UnitGates, goal: Goal) -> Target:
        assert not isinstance(goal.sparsity, Mapping)
        if goal.budget is not None and isinstance(gates, WeightGates):
            quantized = sum(gates.weights[name].numel() for name in gates.quantizers)
            return Target(limit=bytes_within(goal.budget, quantized), convention=self.convention or "C0")
        if goal.sparsity is None and self.pressure:
            return Target()
        return Target(1 - (SPARSITY if goal.sparsity is None else goal.sparsity))
