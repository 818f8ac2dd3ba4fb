"""The options of a training run, and their defaults for a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from graphcomp.arguments import check_batches, check_flag, check_path, wrong
from graphcomp.errors import PlanError
from graphcomp.ops.answers import is_convolution
from graphcomp.training.batches import length_of
from graphcomp.training.distill import Distill, check_distill
from graphcomp.training.folder import plain
from graphcomp.training.prepared import Prepared
from graphcomp.training.schedule import Schedule, is_number, is_whole

ELSEWHERE = {
    **{name: f"Training({name}=…)" for name in ("lr", "lr_quant", "schedule")},
    **{name: f"graphcomp.compress(…, {name}=…)" for name in ("sparsity", "budget", "saliency", "round_to")},
    "forgetting": "graphcomp.compress(…, method=…)",
}
"""Arguments of `QASSO` that are not given among the optimizer's options: where they are."""


@dataclass(frozen=True)
class Training:
    """How a model is trained while it is compressed. What is None is chosen for the model.

    Attributes:
        epochs: passes over the data, whose length must be known; or
        steps: of the optimizer, over as many passes as that takes; or
        schedule: the stages of the run, which count its steps too; an int: so many steps of the default ones.
        optimizer: class that makes the steps. Default: SGD with momentum 0.9 and weight decay 1e-4 for convnets, AdamW
            for all others.
        lr: of the weights, at its highest. Default: 1e-2 for SGD, 1e-4 for models with attention, 1e-3 for all others.
        lr_quant: of steps, ranges and exponents of quantizers; see `QASSO`.
        weight_decay: of the weights; with LSQ (method "qat"), not of biases and norms.
        held_out: batches that the loss is measured on before and after training by LSQ or by `finetune`: where training
            has not lowered the loss, the result is what post-training quantization gives, or the model as it was, and
            the report says so. None: with LSQ, the first batches of the training data, see `MEASURED`; `finetune` then
            measures nothing.
        options: more of the optimizer's: momentum, betas, …; in place of the defaults above. {"fused": True} lets AdamW
            step in one kernel, which takes a sixth of the time where tables of words are large.
        scheduler: makes a learning-rate scheduler of the optimizer; it is stepped after each step. Default: a linear
            warm-up over the first twentieth of the run, 100 steps at most, then a cosine down to 0.
        accumulate: so many batches make a step. What is left over at the end of a pass makes one, too.
        clip_norm: the largest norm of the gradients of all weights together.
        freeze_norms: number of steps (int), or share of the run (float below 1), after which batch norms keep their
            running statistics and normalise by them. None: the statistics move to the end.
        shrink: a long cool-down trains the module without the units that are gone, in less time (`QASSO.shrink`).
        autocast: torch.bfloat16 or torch.float16: the model and the loss run under `torch.autocast`, quantizers and the
            optimizer in the dtype of the weights. With float16 the loss is scaled (`torch.amp.GradScaler`); steps that
            the scaler skips do not count. Also what a model keeps out of autocast itself then runs in it.
        folder: where checkpoints and metrics go. A run that was cut short goes on from there when it is called again
            with the same arguments, and ends as it would have, bit for bit: also the weights are to be the same again
            (`torch.manual_seed`), and random data are to be drawn from torch's, Python's or NumPy's global generators,
            or from a DataLoader's, as the state of others is not kept. Another loss is refused, and other weights
            where the run has ended; of the data the number of batches alone is compared. None: nothing is written.
        save_every: steps from checkpoint to checkpoint; there is one more at the end.
        keep: so many checkpoints stay, the newest.
        log_every: steps from one line of metrics to the next; there is one more where a stage ends.
        teacher: a module that takes the model's inputs, such as the model itself before it is compressed: its outputs
            are learned, beside the loss of the task or, with loss=None, alone. It is not modified.
        distill: what is learned of the teacher; None: the softened logits, `Distill()`.

    Raises:
        PlanError: a number out of range, an option that has another place, or the length of the run given twice.
    """

    epochs: int | None = None
    steps: int | None = None
    schedule: Schedule | int | None = None
    optimizer: type[Optimizer] | None = None
    lr: float | None = None
    lr_quant: float | None = None
    weight_decay: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    held_out: Iterable[Any] | None = None
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    freeze_norms: float | None = None
    shrink: bool = True
    autocast: torch.dtype | None = None
    folder: str | Path | None = None
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    teacher: nn.Module | None = None
    distill: Distill | None = None

    def __post_init__(self) -> None:
        self._make_plain()
        for name in ("epochs", "steps", "accumulate", "save_every", "keep", "log_every"):
            number = getattr(self, name)
            if number is not None and not _counts(number):
                raise PlanError(f"Training({name}={number!r})", why="it is a whole number, 1 at least", fix=f"{name}=1")
        if self.schedule is not None and not isinstance(self.schedule, Schedule) and not _counts(self.schedule):
            raise PlanError(f"Training(schedule={self.schedule!r})", fix="schedule=graphcomp.Schedule(steps=1000)")
        for name in ("lr", "clip_norm"):
            number = getattr(self, name)
            if number is not None and not (is_number(number) and number > 0):
                raise PlanError(f"Training({name}={number!r})", why="it is a positive number", fix=f"{name}=0.01")
        for name in ("lr_quant", "weight_decay"):
            number = getattr(self, name)
            if number is not None and not (is_number(number) and number >= 0):
                raise PlanError(f"Training({name}={number!r})", why="it is a number, 0 at least", fix=f"{name}=1e-3")
        begin = self.freeze_norms
        if begin is not None and not (is_number(begin) and begin >= 0 and (is_whole(begin) or begin < 1)):
            raise PlanError(
                f"Training(freeze_norms={begin!r})",
                why="must be a number of steps (int), or a share of the run (float from 0 to below 1)",
                fix="freeze_norms=0.8",
            )
        if self.held_out is not None:
            check_batches("held_out", self.held_out)
        for name in self.options:
            if name in ELSEWHERE:
                raise PlanError(
                    f"Training(options={{{name!r}: …}})",
                    why="these are options of the optimizer that have no other place",
                    fix=ELSEWHERE[name],
                )
        check_distill(self.teacher, self.distill)
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise PlanError(f"Training(autocast={self.autocast!r})", fix="autocast=torch.bfloat16, or torch.float16")
        check_flag("shrink", self.shrink)
        if self.folder is not None:
            check_path("folder", self.folder)
        if self.optimizer is not None and not (
            isinstance(self.optimizer, type) and issubclass(self.optimizer, Optimizer)
        ):
            raise wrong("optimizer", "a class of torch.optim", self.optimizer, "optimizer=torch.optim.AdamW")
        if self.scheduler is not None and not callable(self.scheduler):
            raise PlanError(
                f"Training(scheduler={self.scheduler!r})",
                why="it is called with the optimizer",
                fix="scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1000)",
            )
        lengths = [name for name in ("epochs", "steps", "schedule") if getattr(self, name) is not None]
        if len(lengths) > 1:
            raise PlanError(f"the length of the run is given by {' and by '.join(lengths)}", fix=f"only {lengths[0]}=")
        if isinstance(self.schedule, int):
            object.__setattr__(self, "steps", self.schedule)
            object.__setattr__(self, "schedule", None)

    def _make_plain(self) -> None:
        """Let numbers be Python's, not NumPy's or tensors: these would end up in checkpoints and metrics."""
        if not isinstance(self.options, Mapping):
            raise PlanError(f"Training(options={self.options!r})", fix='options={"momentum": 0.9}')
        object.__setattr__(self, "options", {name: plain(value) for name, value in self.options.items()})
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0:
                object.__setattr__(self, each.name, value.item())

    def steps_over(self, data: Iterable[Any]) -> int:
        """Steps of the whole run.

        Raises:
            PlanError: no length was given, or it is in epochs of data whose length is not known.
        """
        if isinstance(self.schedule, Schedule):
            return self.schedule.steps
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            raise PlanError("the training has no length", fix="epochs=10, or steps=1000")
        batches = length_of(data)
        if batches is None:
            raise PlanError(
                f"epochs={self.epochs} of data whose length is not known",
                why=f"len() of a {type(data).__name__} fails, and the schedule is in steps",
                fix="steps=1000 instead of epochs",
            )
        return self.epochs * math.ceil(batches / self.accumulate)

    def for_model(self, ready: Prepared) -> Training:
        """Return the options with the optimizer, the learning rate and the optimizer's options that suit the model."""
        transformer = ready.session.has_attention
        graph = ready.session.plan.captured.module.graph
        convnet = not transformer and any(map(is_convolution, graph.nodes))
        options: dict[str, Any] = {}
        base = self.optimizer or (SGD if convnet else AdamW)
        if self.optimizer is None and convnet:
            options = {"momentum": 0.9, "weight_decay": 1e-4}
        if self.weight_decay is not None:
            options["weight_decay"] = self.weight_decay
        lr = self.lr or (1e-2 if base is SGD else 1e-4 if transformer else 1e-3)
        return replace(self, optimizer=base, lr=lr, options={**options, **self.options})


def parts(
    training: Training, data: Iterable[Any], names: Sequence[str], least: Sequence[int] = (), title: str = ""
) -> list[Training]:
    """Split a training equally among the stages of a method.

    Args:
        names: folder of each stage inside the folder of the run.
        least: the fewest steps of each stage; by default one.
        title: of the method.

    Raises:
        PlanError: fewer steps than the stages need, or no length was given.
    """
    least = least or [1] * len(names)
    if len(names) == 1 and least[0] <= 1:
        return [training]
    total = training.steps_over(data)
    if total:  # of no steps the data are at fault, as training says
        length = (
            "Schedule({}, …)" if isinstance(training.schedule, Schedule) else "steps={}, in place of another length"
        )
        _check_steps(total, least, title, length)
    if len(names) == 1:
        return [training]
    found = []
    for name, steps in zip(names, _shares(total, len(names)), strict=True):
        folder = None if training.folder is None else Path(training.folder) / name
        if isinstance(training.schedule, Schedule):
            found.append(replace(training, schedule=replace(training.schedule, steps=steps), folder=folder))
        else:
            found.append(replace(training, epochs=None, steps=steps, folder=folder))
    return found


def _shares(total: int, count: int) -> list[int]:
    """Return the steps of each stage."""
    ends = [total * k // count for k in range(count + 1)]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def _check_steps(total: int, least: Sequence[int], title: str, length: str) -> None:
    """Refuse fewer steps than the stages need.

    Args:
        length: what is proposed, with a place for the number of steps.

    Raises:
        PlanError: a stage gets too few.
    """

    def enough(steps: int) -> bool:
        return all(own >= few for own, few in zip(_shares(steps, len(least)), least, strict=True))

    if not enough(total):
        needed = next(steps for steps in itertools.count(total) if enough(steps))
        each = " and ".join(map(str, least))
        raise PlanError(
            f"{total} step{'s' * (total > 1)} of training are too few for method={title!r}",
            why=f"it needs {each} at least" + f", in stages of {total} / {len(least)} steps" * (len(least) > 1),
            fix=length.format(needed),
        )


def _counts(value: Any) -> bool:
    return is_whole(value) and bool(value >= 1)
