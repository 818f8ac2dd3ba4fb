"""PQK: prune, quantize, then learn from a teacher in the same weights: the pruned ones are switched on again for it.

Three stages of a third of the steps each. Pruning: the mask of the largest weights grows sparser, in floats, and
pruned weights go on learning, so that they can return. Quantization: the mask stays, LSQ. Distillation: two forward
passes per batch. The student has the masked and quantized weights. The teacher has all weights in floats, and norms,
biases and unpruned layers of its own. Gradients of the student reach unmasked weights alone, gradients of the teacher
the others alone.

Source: PQK (Kim, Chang, Kwak 2021, arXiv 2106.14681); routing of gradients, two sets of norms and heads, and the cubic
schedule after DCIL (arXiv 2109.04660). Reconstructed: no code of PQK is public. Steps have the gradient scale of LSQ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from graphcomp.arguments import check_word
from graphcomp.errors import NothingToPrune, PlanError
from graphcomp.methods.base import Goal, Method, refuse
from graphcomp.pruning.evidence import Loss
from graphcomp.quantization.calibrate import calibrate_weight
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.training.distill import distillation, logits_of
from graphcomp.training.elements import Allocation, masks_of, multiplied, others, pruned_counts
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Choice, Forward, Run
from graphcomp.training.schedule import Schedule, is_number, is_whole

STAGES = ("pruning", "quantization", "distillation")


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, shows: Tensor | None, learns: Tensor | None) -> Tensor:
        ctx.save_for_backward(learns)
        return weight.view_as(weight) if shows is None else weight.masked_fill(~shows, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (learns,) = ctx.saved_tensors
        return (grad if learns is None else grad.masked_fill(~learns, 0)), None, None


def routed(weight: Tensor, shows: Tensor | None, learns: Tensor | None) -> Tensor:
    """Return a view on a weight: zero outside of the mask `shows`, with gradients inside of the mask `learns` alone.

    Args:
        weight: any shape.
        shows, learns: bool, of the shape of `weight`; None: everywhere.
    """
    return _Routed.apply(weight, shows, learns)  # type: ignore[no-any-return, no-untyped-call]


def sparsity_at(step: int, steps: int, end: float, start: float = 0.0) -> float:
    """Return the sparsity after `step` of `steps` steps: end - (end - start) (1 - step / steps)^3; then `end`."""
    return start + (end - start) * (1 - (1 - min(step / max(steps, 1), 1.0)) ** 3)


class PqkRun(Run):
    """Two forward passes over one set of weights, gradients parted by a mask.

    Attributes:
        weights: the parameters that single weights are pruned of: all that the model multiplies with but the last.
        masks: parameter -> bool mask, True where a weight is the student's.
        teacher: tensors of the teacher's own, by name: all that is trained and not in `weights`, statistics of norms.
    """

    name: ClassVar[str] = "pqk"

    def __init__(
        self,
        ready: Prepared,
        steps: int,
        *,
        sparsity: float,
        every: int = 16,
        temperature: float = 2.0,
        distills: bool = True,
        logits: Callable[[Any], Tensor] | None = None,
        allocation: Allocation = "global",
        lr_quant: float | None = None,
    ) -> None:
        super().__init__(ready, lr_quant=lr_quant)
        self.allocation: Allocation = allocation
        self.sparsity, self.every, self.temperature, self.distills = sparsity, every, temperature, distills
        self.logits = logits or _logits
        self.ends = steps // 3, 2 * steps // 3
        self.settles = self.ends[0]
        *names, last = multiplied(ready) or [""]
        if not names:
            raise NothingToPrune(
                "PQK finds no weight to prune",
                why="the last layer that is multiplied with stays whole",
                fix="method='qat'",
            )
        self.weights = {name: ready.get_parameter(name) for name in names}
        if sparsity:
            whole = f"'{last}' is not pruned: PQK leaves the last weights that are multiplied with whole"
            ready.remarks = (*ready.remarks, whole)
        self.masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in self.weights.items()}
        self.teacher = _own_tensors(ready, self.weights)
        self.step = 0
        self._enter(0)
        options = {"sparsity": sparsity, "every": every, "temperature": temperature, "distills": distills}
        self.about = {name: str(value) for name, value in {**options, **others(allocation)}.items()}

    def parameters(self) -> Iterable[nn.Parameter]:
        """What the teacher has of its own."""
        return [tensor for tensor in self.teacher.values() if isinstance(tensor, nn.Parameter)]

    def stage(self, step: int) -> str:
        """Pruning, quantization or distillation."""
        return STAGES[sum(step >= end for end in self.ends)]

    # ------------------------------------------------------------------------------------------ two forward passes
    def loss(self, forward: Forward, batch: Any, task: Loss) -> Tensor:
        """The student's loss; then the teacher's, too, and what is between their outputs."""
        stage = self.stage(self.step)
        if stage == "pruning":
            with self.ready.in_floats():
                return task(forward(batch, self.student_view()), batch)
        student = forward(batch, self.student_view())
        found = task(student, batch)
        if stage == "quantization":
            return found
        with self.ready.in_floats():
            teacher = forward(batch, self.teacher_view())
        found = found + task(teacher, batch)
        if self.distills:
            found = found + distillation(self.logits(student), self.logits(teacher), self.temperature)
        return found

    def student_view(self) -> dict[str, Tensor]:
        """The masked weights. While the mask moves all weights learn, so that they can return."""
        moves = self.stage(self.step) == "pruning"
        return {
            name: routed(p, self.masks[name], None if moves else self.masks[name]) for name, p in self.weights.items()
        }

    def teacher_view(self) -> dict[str, Tensor]:
        """All weights, of which those learn that are not the student's, and the teacher's own tensors."""
        return {**{name: routed(p, None, ~self.masks[name]) for name, p in self.weights.items()}, **self.teacher}

    # ------------------------------------------------------------------------------------------ a step
    def after_step(self, step: int) -> None:
        """Get ready for the next step."""
        super().after_step(step)
        self._enter(step + 1)

    @torch.no_grad()
    def _enter(self, step: int) -> None:
        """Move the mask, calibrate quantizers, or let the teacher begin as the student, where a step asks for it."""
        self.step = step
        pruned, quantized = self.ends
        if (step < pruned and step % self.every == 0) or step == pruned:
            self.masks = masks_of(self.weights, sparsity_at(step, pruned, self.sparsity), self.allocation)
        if step == pruned:
            self._calibrate()
        if step == quantized:
            tensors = {**dict(self.ready.named_parameters()), **dict(self.ready.named_buffers())}
            for name, tensor in self.teacher.items():
                tensor.copy_(tensors[name])

    def _calibrate(self) -> None:
        """Set the steps of weights to those of the masked weights."""
        for node, quantizer in quantizer_nodes(self.ready):
            (source,) = node.all_input_nodes
            name = str(source.target)
            if source.op == "get_attr" and name in self.weights:
                calibrate_weight(quantizer, self.weights[name].masked_fill(~self.masks[name], 0), name)

    # ------------------------------------------------------------------------------------------ where the run stands
    def metrics(self) -> dict[str, Any]:
        """How many weights are pruned, too."""
        return {**super().metrics(), **pruned_counts(self.masks)}

    def choice(self) -> Choice:
        """The student's weights."""
        return Choice(self.kept, self.masks)

    def state_dict(self) -> dict[str, Any]:
        """The masks, and what the teacher has of its own."""
        return {"masks": self.masks, "teacher": {name: tensor.detach() for name, tensor in self.teacher.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on where `state_dict` was taken."""
        self.step = step
        self.masks = {name: state["masks"][name].to(mask.device) for name, mask in self.masks.items()}
        for name, tensor in self.teacher.items():
            tensor.copy_(state["teacher"][name])

    def shared(self) -> Iterable[Any]:
        """What tells the logits of an output, too."""
        return (self.logits, *super().shared())


def _own_tensors(ready: Prepared, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of what is trained and in no `weights`, and of all statistics of norms."""
    of_quantizers = {id(p) for _, quantizer in ready.quantizers() for p in quantizer.parameters()}
    found: dict[str, Tensor] = {
        name: nn.Parameter(parameter.detach().clone())
        for name, parameter in ready.named_parameters()
        if parameter.requires_grad and name not in weights and id(parameter) not in of_quantizers
    }
    norms = {name.rpartition(".")[0] for name, _ in ready.named_buffers() if name.endswith("running_mean")}
    own = {name: buffer.clone() for name, buffer in ready.named_buffers() if name.rpartition(".")[0] in norms}
    return {**found, **own}


def _logits(output: Any) -> Tensor:
    """Return the logits of an output, see `logits_of`."""
    return logits_of(output, "method=Pqk(logits=lambda output: output[0])")


@dataclass(frozen=True)
class Pqk(Method):
    """Prunes single weights to `sparsity`, quantizes at fixed bits, and distils from a teacher in the same weights.

    Attributes:
        every: steps from one mask to the next while weights are pruned.
        temperature: of the distillation.
        distills: False leaves the distillation loss out.
        logits: what the student learns from, of an output; None: the output, or its `logits`.
        allocation: how many weights of each layer are pruned: "global" ranks all together, "opq" as OPQ plans.
    """

    name: ClassVar[str] = "pqk"
    prunes = True
    quantizes = True
    calibrated: ClassVar[bool] = True
    every: int = 16
    temperature: float = 2.0
    distills: bool = True
    logits: Callable[[Any], Tensor] | None = None
    allocation: Allocation = "global"

    def __post_init__(self) -> None:
        check_word("allocation", self.allocation, get_args(Allocation))
        if not is_whole(self.every) or self.every < 1:
            raise PlanError(f"Pqk(every={self.every!r}): must be a whole number, 1 at least", fix="every=16")
        if not is_number(self.temperature) or not self.temperature > 0:
            raise PlanError(f"Pqk(temperature={self.temperature!r}): must be positive", fix="temperature=2.0")

    def check(self, goal: Goal) -> None:
        """A share of the weights, and fixed bits or none."""
        if goal.bits is not None:
            raise PlanError(f"bits must be one number for PQK, got {goal.bits}", fix=f"bits={goal.bits[0]}")

    def least_steps(self, goal: Goal, training: Training) -> int:
        """One for each stage."""
        return len(STAGES)

    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> PqkRun:
        """Begin a run."""
        refuse(self, {"a Schedule": isinstance(training.schedule, Schedule)}, "its stages are GETA's; give steps")
        assert not isinstance(goal.sparsity, Mapping)
        return PqkRun(
            ready,
            steps,
            sparsity=0.5 if goal.sparsity is None else goal.sparsity,
            every=self.every,
            temperature=self.temperature,
            distills=self.distills,
            logits=self.logits,
            allocation=self.allocation,
            lr_quant=training.lr_quant,
        )
