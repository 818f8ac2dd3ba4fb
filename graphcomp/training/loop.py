"""The training loop around a prepared module: batches, optimizer, schedule, checkpoints, metrics."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from graphcomp.arguments import check_batches, check_flag, check_path, wrong
from graphcomp.capture.capture import user_line
from graphcomp.errors import CheckpointError, GraphcompError, PlanError, TrainingError, first_line
from graphcomp.ir.graph import all_tensors, replace_module
from graphcomp.ir.inputs import copies
from graphcomp.ir.preserve import eval_copy
from graphcomp.methods.geta.qasso import QASSO
from graphcomp.methods.qat import decaying
from graphcomp.pruning.allocation import Budget
from graphcomp.pruning.evidence import Loss, arguments_like, check_loss
from graphcomp.pruning.saliency import Saliency
from graphcomp.quantization.placement import CONVOLUTIONS
from graphcomp.system.progress import Progress
from graphcomp.system.progress import progress as show_progress
from graphcomp.torch_compat import BatchNormBase, pytree
from graphcomp.training import distributed
from graphcomp.training.folder import (
    INITIAL,
    LOSS_CODE,
    RunFolder,
    generators_of,
    plain,
    random_state,
    seeded,
    set_random_state,
)
from graphcomp.training.identity import code_digest
from graphcomp.training.prepared import Prepared
from graphcomp.training.schedule import Schedule, Stage, is_number, is_whole
from graphcomp.training.shrink import give_back

SHRINK_FROM = 100
"""Steps that are left at least where the module is shrunk: that captures it anew, which takes as long as some steps."""

MEASURED = 16
"""Training batches, the first ones, that LSQ is calibrated on, and that the loss is measured on before and after."""

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
        held_out: batches that the loss is measured on before and after training by LSQ: where training has not lowered
            the loss, the result is what post-training quantization gives, and the report says so. None: the first
            batches of the training data, see `MEASURED`.
        options: more of the optimizer's: momentum, betas, …; in place of the defaults above.
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
        batches = _length(data)
        if batches is None:
            raise PlanError(
                f"epochs={self.epochs} of data whose length is not known",
                why=f"len() of a {type(data).__name__} fails, and the schedule is in steps",
                fix="steps=1000 instead of epochs",
            )
        return self.epochs * math.ceil(batches / self.accumulate)


@dataclass(frozen=True)
class Phase:
    """One run of a method.

    Attributes:
        name: of its folder, where the method has several.
        prunes, quantizes: what it does.
        forgetting: see `QASSO`.
    """

    name: str
    prunes: bool
    quantizes: bool
    forgetting: Literal["descent", "uniform"]


METHODS: dict[str, tuple[Phase, ...]] = {
    "geta": (Phase("", True, True, "descent"),),
    "hesso": (Phase("", True, False, "uniform"),),
    "qat": (Phase("", False, True, "descent"),),
    "sequential": (Phase("1-prune", True, False, "uniform"), Phase("2-quantize", False, True, "descent")),
}
"""Each method of training as the runs it is made of, which share its steps equally."""


def first_batches(data: Iterable[Any], seed: int) -> tuple[list[Any], Iterable[Any]]:
    """Return the first batches of the data, and data to train on that hold them still; random states stay.

    Raises:
        PlanError: `data` cannot be iterated over.
        TrainingError: there is no batch.
    """
    _check_iterable(data)
    generators = generators_of(data)
    before = [generator.get_state() for generator in generators]
    with seeded(seed + distributed.rank()):
        batches = iter(data)
        found = list(itertools.islice(batches, MEASURED))
    for generator, state in zip(generators, before, strict=True):
        generator.set_state(state)
    if not found:
        raise _no_batches(data, 0, 0)
    return found, _joined(found, batches) if batches is data else data


def _joined(first: Sequence[Any], rest: Iterator[Any]) -> Iterator[Any]:
    yield from first
    yield from rest


def phases_of(method: str, sparsity: object, bits: object, budget: object) -> tuple[Phase, ...]:
    """The runs of a method.

    Raises:
        PlanError: there is no such method, or it does not do what is asked.
    """
    if method not in METHODS:
        raise PlanError(f"method={method!r}", fix=f"method= one of {', '.join(['oneshot', *METHODS])}")
    phases = METHODS[method]
    if bits is None and not phases[-1].prunes:
        raise PlanError(f"method={method!r} quantizes, and no bits are given", fix="bits=(4, 8)")
    if bits is not None and not phases[-1].quantizes:
        raise PlanError(f"method={method!r} does not quantize", fix='method="geta", or bits=None')
    if sparsity and not phases[0].prunes:
        raise PlanError(f"method={method!r} does not prune", fix='method="geta", or sparsity=0')
    if budget is not None and len(phases) > 1:
        raise PlanError(
            f"a budget with method={method!r}",
            why="the run that prunes does not know the bits that the other one gives",
            fix='method="geta", or sparsity=0.5',
        )
    return phases


def parts(training: Training, data: Iterable[Any], phases: Sequence[Phase]) -> list[Training]:
    """The training of each of a method's runs.

    Raises:
        PlanError: fewer steps than runs, or no length was given.
    """
    if len(phases) == 1:
        return [training]
    total = training.steps_over(data)
    ends = [total * (k + 1) // len(phases) for k in range(len(phases))]
    shares = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    found = []
    for phase, steps in zip(phases, shares, strict=True):
        folder = None if training.folder is None else Path(training.folder) / phase.name
        if isinstance(training.schedule, Schedule):
            found.append(replace(training, schedule=replace(training.schedule, steps=steps), folder=folder))
        else:
            found.append(replace(training, epochs=None, steps=steps, folder=folder))
    return found


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; outside, each submodule is in the mode that it was in."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode
        for each, mode in modes:
            if isinstance(each, Prepared):
                each.train(mode)


@dataclass(frozen=True, eq=False)
class Whole:
    """The model whose output the loss is of: the prepared one, or one in which the prepared one stands.

    All its parameters are trained, those outside of the prepared module by the same optimizer.

    Attributes:
        module: what is called, and trained.
        original: whose forward tells the names of positional inputs.
        args, kwargs: example inputs, whose form batches have.
    """

    module: nn.Module
    original: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @staticmethod
    def of(ready: Prepared) -> Whole:
        """The prepared module, which is all there is."""
        captured = ready.session.plan.captured
        return Whole(ready, captured.original, captured.args, captured.kwargs)

    def train(self) -> None:
        """Switch to training mode; what the user put in eval mode inside of a model in training mode stays in it."""
        prepared = [m for m in self.module.modules() if isinstance(m, Prepared)]
        inside = {id(m) for ready in prepared for m in ready.modules()}  # its graph knows which ops follow the mode
        held = [m for m in self.module.modules() if not m.training and id(m) not in inside]
        held = held if self.module.training else []
        self.module.train()
        for module in held:
            module.training = False

    def freeze_norms(self) -> None:
        """Keep the running statistics of all batch norms as they are."""
        for module in self.module.modules():
            if isinstance(module, Prepared):
                module.freeze_norms()
            elif isinstance(module, BatchNormBase) and module.track_running_stats:
                module.training = False

    def around(self, ready: Prepared) -> tuple[str, list[nn.Parameter]]:
        """Where `ready` stands, as a prefix of names, and the parameters outside of it that can be trained."""
        prefix = next(f"{name}." if name else "" for name, m in self.module.named_modules() if m is ready)
        inside = {id(p) for p in ready.parameters()}
        return prefix, [p for p in self.module.parameters() if p.requires_grad and id(p) not in inside]


def train(
    ready: Prepared,
    data: Iterable[Any],
    loss: Loss,
    training: Training,
    *,
    whole: Whole | None = None,
    sparsity: float | Mapping[str, float] | None = None,
    budget: Budget | None = None,
    saliency: str | Saliency = "geta",
    forgetting: Literal["descent", "uniform"] = "descent",
    round_to: int = 1,
    measured: Sequence[Any] = (),
    progress: bool = True,
    seed: int = 0,
) -> None:
    """Train a prepared module with QASSO to the end of its schedule, in place. Units that its masks leave out stay out.

    Where `torch.distributed` was set up with several processes, each calls this with its own share of the data, as a
    DataLoader with a DistributedSampler gives it. Gradients are averaged, all end with the same module, and the first
    process alone writes to the folder.

    Args:
        ready: what `graphcomp.prepare` returned.
        data: batches, gone over as often as it takes: a DataLoader, a list, … Each is a tensor, a tuple that begins
            with the model's positional inputs, or a dict that holds its keyword inputs; labels may follow. They are
            moved to where the module is.
        loss: loss(model output, batch) -> scalar.
        training: how.
        whole: the model that `ready` stands in, trained with it; None: `ready` is the model.
        sparsity, budget, saliency, forgetting, round_to: see `QASSO`.
        measured: batches that the loss is measured on before and after, in eval mode. Where training has not lowered
            the loss, all is as before, and a note of the module's session says so. Without batches, nothing is.
        progress: show a progress line on a terminal.
        seed: of everything that is drawn: torch, Python and NumPy are seeded inside, and left as they were.

    Raises:
        PlanError, BudgetError: what is asked cannot be planned.
        TrainingError: the loss is not finite, or the data hold too few batches.
        CheckpointError: the folder is of another run, or cannot be written or read.
    """
    asked: dict[str, Any] = {
        "sparsity": sparsity,
        "budget": budget,
        "saliency": saliency,
        "forgetting": forgetting,
        "round_to": round_to,
    }
    with torch.enable_grad(), seeded(seed + distributed.rank()):  # dropout is to differ from process to process
        run = _Run(ready, whole or Whole.of(ready), data, loss, training, asked, seed)
        try:
            start = run.measure(measured) if measured else None
            run.resume()
            with show_progress(run.total, progress) as bar:
                bar.done = run.step
                run.whole.train()
                try:
                    run.go(bar)
                    # statistics of batch norms are each process's own
                    distributed.copy_from_first(run.whole.module.buffers())
                finally:
                    small = run.put_back()
        finally:
            run.close()
        if small is not None:
            give_back(small, ready)
        if start is not None:
            run.keep_better(start, measured)


@dataclass(frozen=True)
class _Start:
    """What training begins with: the state of the whole model, and the loss."""

    state: Mapping[str, Tensor]
    loss: float


class _Run:
    """A training run, and where it stands.

    Attributes:
        total: steps of the run.
        freeze_from: the step before which batch norms are to be frozen; None: frozen already, or not at all.
        step: steps that are done.
        epoch, position: the pass over the data, and how many of its batches were used.
        epoch_state: the random states when the pass began, which its order follows from.
        resumed: the random states to go on with, until the batches that were used before are skipped.
        seconds: that the run took before it was cut short.
    """

    def __init__(
        self,
        ready: Prepared,
        whole: Whole,
        data: Iterable[Any],
        loss: Loss,
        training: Training,
        asked: Mapping[str, Any],
        seed: int,
    ) -> None:
        _check_iterable(data)
        _check_loss_function(loss, whole.module)
        self.ready, self.whole, self.data, self.loss, self.training = ready, whole, data, loss, training
        self.prefix, outside = whole.around(ready)
        self.step = self.epoch = self.position = 0
        self.total = training.steps_over(data)
        if not self.total:
            raise _no_batches(self.data, self.step, self.total)
        self.device = next(ready.parameters()).device
        if distributed.count() > 1:
            _check_shares(data, self.total)
            distributed.copy_from_first((*whole.module.parameters(), *whole.module.buffers()))
        transformer = ready.session.has_attention
        base, lr, options = _defaults(ready, training, transformer)
        schedule = training.schedule
        if not isinstance(schedule, Schedule):
            prune, learns_bits = asked["sparsity"] != 0, ready.session.learns_bits
            schedule = Schedule.of(self.total, transformer=transformer, prune=prune, quantize=learns_bits)
        if not ready.session.learns_bits and ready.session.bits is not None:
            options["params"] = decaying(list(ready.parameters()))
        self.optimizer = QASSO(ready, base, lr=lr, lr_quant=training.lr_quant, schedule=schedule, **asked, **options)
        if outside:
            self.optimizer.add_param_group({"params": outside})
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.autocast is torch.float16)
        self.scheduler = _scheduler(training.scheduler or _cosine(self.total), self.optimizer)
        self.weights = self._weights()
        self.is_weight = torch.tensor([site.is_weight for site, _ in ready.quantizers()], dtype=torch.bool)
        begin = training.freeze_norms
        self.freeze_from = round(begin * self.total) if isinstance(begin, float) else begin
        self.generators = generators_of(data)
        self.folder: RunFolder | None = None
        if training.folder is not None:
            if getattr(data, "persistent_workers", False):
                raise PlanError(
                    "a run with a folder, of a DataLoader whose workers persist",
                    why="what they would draw next cannot be saved, and the run could not go on as it was",
                    fix="persistent_workers=False, or no folder",
                )
            about = {
                **_about_model(ready, whole.module, self.prefix),
                **_about_training(training, data, lr, base),
                **{name: _name(value) if callable(value) else str(value) for name, value in asked.items()},
                "sparsity": str(self.optimizer.sparsity),
                "schedule": str(schedule),
                "loss": _name(loss),
                LOSS_CODE: code_digest(loss),
                "seed": str(seed),
            }
            where = training.folder
            self.folder = distributed.from_first(lambda: RunFolder(where, about, self.total, training.keep))
        self.epoch_state: dict[str, Any] | None = None
        self.resumed: dict[str, Any] | None = None
        self.last_loss = math.nan
        self.losses: list[float] = []  # since the last line of metrics
        self.seconds, self.start = 0.0, time.monotonic()

    # ------------------------------------------------------------------------------------------ before and after
    def measure(self, batches: Sequence[Any]) -> _Start:
        """Return the state that there is now, and the mean loss in eval mode."""
        module, total = self.whole.module, torch.zeros((), device=self.device)
        with in_eval_mode(module):
            for given in batches:
                total += self._loss(to_device(given, self.device)).detach().reshape(()) / len(batches)
        state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        return _Start(state, float(distributed.mean(total)))

    def keep_better(self, start: _Start, batches: Sequence[Any]) -> None:
        """Go back to `start` where the loss is not lower now, and note both losses."""
        end = self.measure(batches).loss
        worse = not end < start.loss and math.isfinite(start.loss)
        if worse:
            self.whole.module.load_state_dict(start.state)
        of = "held-out data" if self.training.held_out is not None else "the training data"
        losses = f"{start.loss:.4g} before, {end:.4g} after, in eval mode on {len(batches)} batches of {of}"
        outcome = "training has not lowered the loss: the result is that of post-training quantization; " * worse
        self.ready.remarks = (*self.ready.remarks, f"{outcome}loss {losses}")

    # ------------------------------------------------------------------------------------------ the loop
    def go(self, bar: Progress) -> None:
        """To the end."""
        passes = self.training.epochs
        if passes is not None and self.scaler.is_enabled():
            passes += 1  # to make up for steps that the scaler skips
        while self.step < self.total and self.epoch != passes:
            batches = self._batches()
            while self.step < self.total:
                chunk = list(itertools.islice(batches, self.training.accumulate))
                if not distributed.every(bool(chunk), self.device):
                    break
                if self._step(chunk):
                    self._shrink_if_due()
                    self._report(bar)
            if not self.position:
                raise _no_batches(self.data, self.step, self.total)
            if self.step < self.total:
                self.epoch, self.position = self.epoch + 1, 0
        if self.optimizer.stage != Stage.COOLDOWN:
            raise TrainingError(
                f"the data ended at step {self.step} of {self.total}, before the cool-down",
                why=f"{self.training.epochs} passes held fewer batches than len() of the data says",
                fix=f"steps={self.total} instead of epochs: as many passes as that takes",
            )

    def _batches(self) -> Iterator[Any]:
        """A pass over the data; after a resumption, what is left of the pass that was cut short, in its order."""
        _set_epoch(self.data, self.epoch)
        if self.resumed is None:
            self.epoch_state = random_state(self.generators)
            return iter(self.data)
        assert self.epoch_state is not None
        set_random_state(self.epoch_state, self.generators)
        batches = iter(self.data)
        skipped = sum(1 for _ in itertools.islice(batches, self.position))
        if skipped < self.position:
            raise TrainingError(
                f"the data hold {skipped} batches, and the run had used {self.position} of this pass",
                why="an iterator that is used up, or other data than when the checkpoint was saved",
                fix="give the data of that run, from their beginning",
            )
        set_random_state(self.resumed)
        self.resumed = None
        return batches

    def _step(self, chunk: Sequence[Any]) -> bool:
        """One step; False where the scaler skipped it, as gradients were not finite at its scale."""
        if self.freeze_from is not None and self.step >= self.freeze_from:
            self.whole.freeze_norms()
            self.freeze_from = None
        stage = self.optimizer.stage
        total = torch.zeros((), device=self.device)
        for given in chunk:
            batch = to_device(given, self.device)
            args, kwargs = copies(arguments_like(self.whole.original, self.whole.args, self.whole.kwargs, batch))
            _check_loss_takes(self.loss, batch)
            with self._precision():
                value = self.loss(self._output(args, kwargs), batch)
            check_loss(value)
            self.scaler.scale(value / len(chunk)).backward()  # type: ignore[no-untyped-call]
            total += value.detach().reshape(()) / len(chunk)
        loss = float(distributed.mean(total))
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss is {loss} at step {self.step + 1}", stage, chunk)
        distributed.average_gradients(self.whole.module.parameters())
        self.scaler.unscale_(self.optimizer)
        if self.training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.weights, self.training.clip_norm)
        try:
            self.scaler.step(self.optimizer)
        except PlanError as error:  # scores of weights that a step made infinite
            if not self._place_not_finite():
                raise
            raise self._not_finite(f"the module is not finite at step {self.step + 1}", stage, ()) from error
        self.scaler.update()
        self.optimizer.zero_grad()
        self.position, self.last_loss = self.position + len(chunk), loss
        self.losses.append(loss)
        if self.optimizer.steps == self.step:
            if self.scaler.get_scale() < 1:
                raise self._not_finite(f"the gradients are not finite at step {self.step + 1}", stage, chunk)
            return False
        self.step += 1
        self.scheduler.step()
        return True

    def _loss(self, batch: Any) -> Tensor:
        """The loss of a batch.

        Raises:
            PlanError: the batch has not what the example inputs have, or the loss does not fit.
        """
        args, kwargs = arguments_like(self.whole.original, self.whole.args, self.whole.kwargs, batch)
        _check_loss_takes(self.loss, batch)
        with self._precision():
            value = self.loss(self._output(args, kwargs), batch)
        check_loss(value)
        return value

    def _output(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module that is trained on a batch.

        Raises:
            TrainingError: the module does not run on the batch, and the model does not either.
        """
        try:
            return self.whole.module(*args, **kwargs)
        except Exception as error:
            if isinstance(error, GraphcompError) or self._model_runs(args, kwargs):
                raise
            raise TrainingError(
                f"the model does not run on batch {self.position} of the data, at step {self.step + 1}",
                at=user_line(error),
                why=f"{type(error).__name__}: {first_line(error)[:300]}",
                fix="give batches whose inputs have the form, the dtype and the widths of the example inputs",
            ) from error

    def _model_runs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the model before training runs on these inputs, so that the fault is not the batch's."""
        if self.whole.module is not self.ready:
            return False
        with eval_copy(self.ready.session.plan.model, real=True) as copied, torch.no_grad():
            try:
                copied(*copies(args), **copies(kwargs))
            except Exception:  # whatever the model raises on the batch
                return False
        return True

    def _weights(self) -> list[nn.Parameter]:
        """What is trained, but for the parameters of quantizers."""
        quantizers = {id(p) for _, quantizer in self.optimizer.ready.quantizers() for p in quantizer.parameters()}
        return [p for p in self.whole.module.parameters() if p.requires_grad and id(p) not in quantizers]

    def _shrink_if_due(self) -> None:
        """Go on without the units that are gone, where that is settled and pays."""
        optimizer = self.optimizer
        settled = optimizer.schedule.moment(self.step - 1).stage == Stage.COOLDOWN
        if not self.training.shrink or not settled or optimizer.ready is not self.ready:
            return
        if optimizer.removed and self.total - self.step >= SHRINK_FROM:
            try:
                optimizer.shrink()
            except PlanError as error:
                logging.getLogger("graphcomp").info("the cool-down goes on with masks: %s", error)
                self.training = replace(self.training, shrink=False)
                return
            self._follow()

    def _follow(self) -> None:
        """Let the module that the optimizer has shrunk stand in the place of the one that was prepared."""
        if self.whole.module is self.ready:
            self.whole = replace(self.whole, module=self.optimizer.ready)
        else:
            replace_module(self.whole.module, self.ready, self.optimizer.ready)
        self.weights = self._weights()

    def close(self) -> None:
        """Let other runs use the folder."""
        if self.folder is not None:
            self.folder.close()

    def put_back(self) -> Prepared | None:
        """Let the prepared module stand in its place again; what it was shrunk to, if it was."""
        small = self.optimizer.ready
        if small is self.ready:
            return None
        replace_module(self.whole.module, small, self.ready)
        return small

    def _precision(self) -> AbstractContextManager[object]:
        dtype = self.training.autocast
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _not_finite(self, what: str, stage: Stage, chunk: Sequence[Any]) -> TrainingError:
        saved = None if self.folder is None else self.folder.newest()
        sound = all(_finite(leaf) for leaf in pytree.tree_leaves(list(chunk)))
        place = self._place_not_finite() if sound else "the batch"
        return TrainingError(
            f"{what} of {self.total}, in the {_words(stage)} stage",
            at=f"{place} holds values that are not finite" if place else "",
            why="" if place else "parameters and batch are finite: the outputs are too large, or the loss has no value",
            fix="a lower lr, or clip_norm=1.0"
            + (", or autocast=torch.bfloat16" if self.training.autocast is torch.float16 else "")
            + (f", in another folder; the last good checkpoint stays: {saved}" if saved else ""),
        )

    def _place_not_finite(self) -> str:
        """The first tensor of the module that is not finite; "" where all are."""
        for name, tensor in self.whole.module.state_dict().items():
            if not _finite(tensor):
                sites = self.ready.session.sites
                site = next((s for s in sites if name.startswith(f"{self.prefix}{s.name}.")), None)
                return f"'{name}'" if site is None else f"quantizer '{name}' of '{site.layer}'"
        return ""

    # ------------------------------------------------------------------------------------------ what is reported
    def _report(self, bar: Progress) -> None:
        bar.advance(self._line)
        ends = self.step == self.total
        if self.folder is None:
            return
        stage_ends = self.optimizer.stage != self.optimizer.schedule.moment(self.step - 1).stage
        if ends or stage_ends or self.step == 1 or self.step % self.training.log_every == 0:
            folder = self.folder
            distributed.from_first(lambda: folder.log(self._metrics()))
            self.losses = []
        if ends or self.step % self.training.save_every == 0:
            self._save()

    def _metrics(self) -> dict[str, Any]:
        optimizer = self.optimizer
        weight_bits, activation_bits = self._bits()
        return {
            "step": self.step,
            "stage": _words(optimizer.schedule.moment(self.step - 1).stage),
            "loss": sum(self.losses) / len(self.losses),
            "lr": float(optimizer.param_groups[0]["lr"]),
            "units_removed": optimizer.removed,
            "units": optimizer.total,
            "sparsity": optimizer.removed / max(optimizer.total, 1),
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "seconds": round(self.seconds + time.monotonic() - self.start, 3),
        }

    def _bits(self) -> tuple[float | None, float | None]:
        """Mean bits of the quantizers of weights, and of those of activations; None where there are none."""
        bank = self.optimizer.bank
        bits = bank.bits().cpu() if len(bank) else torch.tensor([float(site.high) for site in self.ready.session.sites])
        found = (bits[self.is_weight], bits[~self.is_weight])
        weights, activations = (round(float(own.mean()), 4) if len(own) else None for own in found)
        return weights, activations

    def _line(self) -> str:
        optimizer = self.optimizer
        bits = "/".join("-" if b is None else f"{b:.1f}" for b in self._bits())
        return (
            f"{_words(optimizer.stage)}, step {self.step} of {self.total}, {optimizer.removed} of {optimizer.total} "
            f"units removed, bits {bits}, loss {self.last_loss:.3g}"
        )

    # ------------------------------------------------------------------------------------------ checkpoints
    def _save(self) -> None:
        assert self.folder is not None
        # the loss of the next step would tell, too late for this checkpoint
        if not distributed.every(not self._place_not_finite(), self.device):
            stage = self.optimizer.schedule.moment(self.step - 1).stage
            raise self._not_finite(f"the module is not finite after step {self.step}", stage, ())
        state = {
            "epoch": self.epoch,
            "position": self.position,
            "loss": self.last_loss,
            "losses": self.losses,
            "seconds": self.seconds + time.monotonic() - self.start,
            "module": self.whole.module.state_dict(),
            "optimizer": plain(self.optimizer.state_dict()),
            "scheduler": plain(self.scheduler.state_dict()),
            "scaler": self.scaler.state_dict(),
            "random": random_state(),
            "epoch_random": self.epoch_state,
        }
        folder, (_, *others) = self.folder, distributed.gathered((state["random"], state["epoch_random"]))
        if others:
            state["random_of_others"] = others
        distributed.from_first(lambda: folder.save(self.step, state))

    def resume(self) -> None:
        """Go on from the folder's newest checkpoint, where there is one.

        Raises:
            CheckpointError: it is of another run, or cannot be read.
        """
        state = None if self.folder is None else distributed.from_first(self.folder.load)
        if state is None:
            return
        try:
            if distributed.rank() > 0:
                state["random"], state["epoch_random"] = state["random_of_others"][distributed.rank() - 1]
            self.optimizer.load_state_dict(state["optimizer"])
            if self.optimizer.ready is not self.ready:
                self._follow()
            self.whole.module.load_state_dict(state["module"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
            self.step, self.epoch, self.position = state["step"], state["epoch"], state["position"]
            self.last_loss, self.losses, self.seconds = state["loss"], state["losses"], state["seconds"]
            self.resumed, self.epoch_state = state["random"], state["epoch_random"]
        except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the newest checkpoint in {self.training.folder} does not fit the run",
                why=f"{type(error).__name__}: {str(error)[:300]}",
                fix="remove it: the run goes on from the one before; or give another folder",
            ) from error


# ------------------------------------------------------------------------------------------------ setting up
def _defaults(ready: Prepared, training: Training, transformer: bool) -> tuple[type[Optimizer], float, dict[str, Any]]:
    """The class of the optimizer, its learning rate and its options."""
    graph = ready.session.plan.captured.module.graph
    convnet = not transformer and any(node.target in CONVOLUTIONS for node in graph.nodes)
    options: dict[str, Any] = {}
    base = training.optimizer or (SGD if convnet else AdamW)
    if training.optimizer is None and convnet:
        options = {"momentum": 0.9, "weight_decay": 1e-4}
    if training.weight_decay is not None:
        options["weight_decay"] = training.weight_decay
    lr = training.lr or (1e-2 if base is SGD else 1e-4 if transformer else 1e-3)
    return base, lr, {**options, **training.options}


def _scheduler(make: Callable[[Optimizer], LRScheduler], optimizer: Optimizer) -> LRScheduler:
    """What `make` makes of the optimizer.

    Raises:
        PlanError: it makes none, or one that a step alone does not move on.
    """
    fix = "scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1000)"
    try:
        found = make(optimizer)
    except (TypeError, ValueError) as error:
        raise PlanError(f"Training.scheduler, {_name(make)}, fails", why=str(error), fix=fix) from error
    if not all(callable(getattr(found, name, None)) for name in ("step", "state_dict", "load_state_dict")):
        raise PlanError(f"Training.scheduler, {_name(make)}, returns a {type(found).__name__}", fix=fix)
    if not _takes(found.step):
        raise PlanError(
            f"a {type(found).__name__} as Training.scheduler",
            why="it is stepped with a metric, and nothing is measured during the run but the loss of single batches",
            fix=f"{fix}; or QASSO in your own loop, where you step it",
        )
    return found


def _takes(function: Callable[..., Any], *args: Any) -> bool:
    """Whether it can be called so, as far as its signature tells."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built in
        return True
    try:
        signature.bind(*args)
    except TypeError:
        return False
    return True


def _cosine(steps: int) -> Callable[[Optimizer], LRScheduler]:
    """Up in a straight line over the first twentieth of the run, 100 steps at most, then a cosine down to 0."""
    rising = min(100, max(1, steps // 20))

    def factor(step: int) -> float:
        falling = max(step - rising, 0) / max(steps - rising, 1)
        return min((step + 1) / rising, 1.0) * 0.5 * (1 + math.cos(math.pi * falling))

    return lambda optimizer: LambdaLR(optimizer, factor)


def _about_model(ready: Prepared, whole: nn.Module, prefix: str) -> dict[str, str]:
    """What tells one prepared module from another: shapes, and the weights that the run begins with. Those of
    quantizers, and what a calibration corrects, follow from inputs, which may be drawn anew when a run goes on."""
    session = ready.session
    found = whole.state_dict()
    originals = {f"{prefix}{name}": t for name, t in all_tensors(session.plan.captured.module)}
    tensors = "\n".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in found.items())
    digest = hashlib.sha256(tensors.encode()).hexdigest()[:16]
    limits = sorted({(site.low, site.high) for site in session.sites})
    return {
        "model": type(session.plan.model).__name__,
        "tensors": digest,
        INITIAL: _digest(originals.get(name, t) for name, t in found.items() if "graphcomp_" not in name),
        "bits": str(session.bits),
        "layer bits": ", ".join(f"{low} to {high}" for low, high in limits),
    }


def _digest(tensors: Iterable[Tensor]) -> str:
    """Of their bytes. This takes less time than to write a checkpoint of them."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _about_training(training: Training, data: Iterable[Any], lr: float, base: type[Optimizer]) -> dict[str, str]:
    options = {name: training.options[name] for name in sorted(training.options)}
    return {
        "batches": str(_length(data)),
        "optimizer": base.__name__,
        "lr": str(lr),
        "lr_quant": str(training.lr_quant),
        "weight_decay": str(training.weight_decay),
        "options": str(options),
        "scheduler": "cosine" if training.scheduler is None else _name(training.scheduler),
        "accumulate": str(training.accumulate),
        "clip_norm": str(training.clip_norm),
        "shrink": str(training.shrink),
        "epochs": str(training.epochs),
        **({"freeze_norms": str(training.freeze_norms)} if training.freeze_norms is not None else {}),
        **({"autocast": str(training.autocast)} if training.autocast is not None else {}),
        **({"processes": str(distributed.count())} if distributed.count() > 1 else {}),
    }


def _name(found: Any) -> str:
    """The same in each process, unlike repr."""
    found = found.func if isinstance(found, functools.partial) else found
    return str(getattr(found, "__qualname__", type(found).__qualname__))


def _counts(value: Any) -> bool:
    return is_whole(value) and bool(value >= 1)


def _length(data: Any) -> int | None:
    """Of a pass, in batches; None where it is not known."""
    try:
        return len(data)
    except TypeError:
        return None


# ------------------------------------------------------------------------------------------------ the loss
def _check_loss_function(loss: Any, trained: nn.Module) -> None:
    """Raise PlanError where it cannot be called with an output and a batch, or has parameters that nothing trains."""
    if not callable(loss) or not _takes(loss, None, None):
        raise PlanError(
            f"the loss is {_name(loss)}",
            why="it is called as loss(output, batch)",
            fix="loss=lambda output, batch: torch.nn.functional.cross_entropy(output, batch[1])",
        )
    inside = {id(p) for p in trained.parameters()}
    own = loss.named_parameters() if isinstance(loss, nn.Module) else ()
    outside = [name for name, p in own if p.requires_grad and id(p) not in inside]
    if outside:
        raise PlanError(
            f"the loss, a {type(loss).__name__}, has parameters of its own: {', '.join(outside[:5])}",
            why="only those of the model are trained",
            fix="a model that holds them, with scope= for what to compress of it; or loss.requires_grad_(False)",
        )


def _check_loss_takes(loss: Any, batch: Any) -> None:
    """Raise PlanError where it is one of torch's own, which take a target, and the batch holds more than that."""
    function = loss.func if isinstance(loss, functools.partial) else loss
    if str(getattr(function, "__module__", "")).startswith("torch.nn.") and not isinstance(batch, Tensor):
        raise PlanError(
            f"the loss is torch's {_name(function)}, and a batch is a {type(batch).__name__}",
            why="it is called as loss(output, batch), with the whole batch, and takes a tensor of targets",
            fix="loss=lambda output, batch: criterion(output, batch[1])",
        )


# ------------------------------------------------------------------------------------------------ batches
def _check_iterable(data: Any) -> None:
    """Raise PlanError where it cannot be iterated over."""
    if not isinstance(data, Iterable):
        raise PlanError(f"data is a {type(data).__name__}", why="it holds no batches", fix="data=[batch, …]")


def _no_batches(data: Any, step: int, total: int) -> TrainingError:
    if isinstance(data, Iterator) and total:
        return TrainingError(
            f"the data ended at step {step} of {total}",
            why=f"a {type(data).__name__} can be gone over only once",
            fix="data=list(…), or a DataLoader",
        )
    return TrainingError(
        "the data hold no batches",
        why="a DataLoader with drop_last=True has none where there are fewer examples than a batch takes",
        fix="data=[batch, …]",
    )


def _check_shares(data: Iterable[Any], steps: int) -> None:
    """Raise PlanError where the processes would not make the same number of steps."""
    found = distributed.gathered((_length(data), steps))
    if len(set(found)) > 1:
        raise PlanError(
            "the processes have different numbers of batches",
            at=", ".join(f"{length} in process {k}" for k, (length, _) in enumerate(found)),
            why="all make each step together",
            fix="DataLoader(…, sampler=torch.utils.data.DistributedSampler(dataset))",
        )


def _set_epoch(data: Any, epoch: int) -> None:
    """Tell a DistributedSampler and its kin which pass begins: their order follows from it."""
    for owner in (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)):
        announce = getattr(owner, "set_epoch", None)
        if callable(announce):
            announce(epoch)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`, in the same kind of container."""
    if hasattr(batch, "to"):  # a tensor, or what Hugging Face's tokenizers return
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())


def _words(stage: Stage) -> str:
    return {Stage.WARMUP: "warm-up", Stage.COOLDOWN: "cool-down"}.get(stage, stage.name.lower())
