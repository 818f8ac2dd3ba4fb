"""The training loop around a prepared module: batches, optimizer, schedule, checkpoints, metrics."""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from graphcomp.capture.capture import user_line
from graphcomp.errors import CheckpointError, GraphcompError, PlanError, TrainingError, first_line
from graphcomp.ir.inputs import copies
from graphcomp.ir.preserve import eval_copy
from graphcomp.pruning.evidence import Loss, arguments_like, check_loss
from graphcomp.system.progress import Progress
from graphcomp.system.progress import progress as show_progress
from graphcomp.torch_compat import pytree
from graphcomp.training import distributed
from graphcomp.training.batches import check_iterable, check_shares, no_batches, set_epoch, to_device
from graphcomp.training.distill import Distill
from graphcomp.training.folder import (
    LOSS_CODE,
    METHOD,
    RunFolder,
    generators_of,
    plain,
    random_state,
    seeded,
    set_random_state,
)
from graphcomp.training.identity import about_model, about_training, code_digest, name_of
from graphcomp.training.no_gradient import without_gradient
from graphcomp.training.optimizer import MethodOptimizer
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Begin, check_run, check_tensors
from graphcomp.training.teaching import Teaching
from graphcomp.training.whole import Whole, in_eval_mode

SHRINK_FROM = 100
"""Steps that are left at least where the module is shrunk: that captures it anew, which takes as long as some steps."""


def train(
    ready: Prepared,
    data: Iterable[Any],
    loss: Loss | None,
    training: Training,
    begin: Begin,
    *,
    whole: Whole | None = None,
    measured: Sequence[Any] = (),
    title: str = "",
    progress: bool = True,
    seed: int = 0,
) -> None:
    """Train a prepared module by a method to the end of its run, in place. Units that its masks leave out stay out.

    Where `torch.distributed` was set up with several processes, each calls this with its own share of the data, as a
    DataLoader with a DistributedSampler gives it. Gradients are averaged, all end with the same module, and the first
    process alone writes to the folder.

    Args:
        ready: what `graphcomp.prepare` returned.
        data: batches, gone over as often as it takes: a DataLoader, a list, … Each is a tensor, a tuple that begins
            with the model's positional inputs, or a dict that holds its keyword inputs; labels may follow. They are
            moved to where the module is.
        loss: loss(model output, batch) -> scalar; None: the teacher's outputs alone are learned.
        training: how.
        begin: begins the run of a method on `ready`.
        whole: the model that `ready` stands in, trained with it; None: `ready` is the model.
        measured: batches that the loss is measured on before and after, in eval mode. Where training has not lowered
            the loss, all is as before, and a note of the module's session says so. Without batches, nothing is.
        title: what that note begins with, where the training is one of several.
        progress: show a progress line on a terminal.
        seed: of everything that is drawn: torch, Python and NumPy are seeded inside, and left as they were.

    Raises:
        PlanError, BudgetError: what is asked cannot be planned.
        TrainingError: the loss is not finite, or the data hold too few batches.
        CheckpointError: the folder is of another run, or cannot be written or read.
    """
    with torch.enable_grad(), seeded(seed + distributed.rank()):  # dropout is to differ from process to process
        loop = _Loop(ready, whole or Whole.of(ready), data, loss, training, begin, seed)
        try:
            start = loop.measure(measured) if measured else None
            loop.resume()
            with show_progress(loop.total, progress) as bar:
                bar.done = loop.step
                loop.whole.train()
                try:
                    loop.go(bar)
                    # statistics of batch norms are each process's own
                    distributed.copy_from_first(loop.whole.module.buffers())
                    loop.run.choice().apply(loop.run.ready)
                finally:
                    loop.whole.hold(ready)
        finally:
            loop.close()
        loop.give_back()
        if start is not None:
            loop.keep_better(start, measured, title)


@dataclass(frozen=True)
class _Start:
    """What training begins with: the state of the whole model, and the loss."""

    state: Mapping[str, Tensor]
    loss: float


class _Loop:
    """A training run, and where it stands.

    Attributes:
        run: what the method decides.
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
        loss: Loss | None,
        training: Training,
        begin: Begin,
        seed: int,
    ) -> None:
        check_iterable(data)
        if loss is not None:
            _check_loss_function(loss, whole.module)
        self.ready, self.whole, self.data, self.loss, self.training = ready, whole, data, loss, training
        self.prefix, outside = whole.outside()
        self.step = self.epoch = self.position = 0
        self.total = training.steps_over(data)
        if not self.total:
            raise no_batches(self.data, self.step, self.total)
        self.device = next(ready.parameters()).device
        if distributed.count() > 1:
            check_shares(data, self.total)
            distributed.copy_from_first((*whole.module.parameters(), *whole.module.buffers()))
        self.teaching = self._taught_by(seed)
        chosen = training.for_model(ready)
        assert chosen.optimizer is not None and chosen.lr is not None
        self.run = begin(chosen, self.total)
        check_run(self.run, ready)
        if self.teaching is not None:  # a run may set the remarks
            learned = self.teaching.note(loss is not None)
            ready.remarks = (*(note for note in ready.remarks if note != learned), learned)
        self.optimizer = MethodOptimizer(self.run, chosen.optimizer, chosen.lr, chosen.options)
        if outside:
            self.optimizer.add_param_group({"params": outside})
        if maps := self._maps():
            self.optimizer.add_param_group({"params": maps})
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.autocast is torch.float16)
        self.scheduler = _scheduler(training.scheduler or _cosine(self.total), self.optimizer)
        self.weights = self._weights()
        begin_freezing = training.freeze_norms
        self.freeze_from = round(begin_freezing * self.total) if isinstance(begin_freezing, float) else begin_freezing
        self.generators = generators_of(data)
        self.folder: RunFolder | None = None
        if training.folder is not None:
            self.folder = self._open(training.folder, chosen, seed)
        self.epoch_state: dict[str, Any] | None = None
        self.resumed: dict[str, Any] | None = None
        self.last_loss = math.nan
        self.losses: list[float] = []  # since the last line of metrics
        self.seconds, self.start = 0.0, time.monotonic()

    def _taught_by(self, seed: int) -> Teaching | None:
        """Return the teacher, fitted to the model; None without one.

        Raises:
            PlanError: there is neither a loss nor a teacher, or the teacher does not fit.
        """
        training, whole = self.training, self.whole
        if training.teacher is None:
            if self.loss is None:
                raise PlanError("nothing to learn: there is no loss", fix="loss=lambda output, batch: …, or a teacher")
            return None
        keeps = isinstance(self.data, (list, tuple))  # whose batches are the same objects in each pass
        distill = training.distill or Distill()
        found = Teaching(training.teacher, distill, whole.module, whole.args, whole.kwargs, seed=seed, keeps=keeps)
        if found.pairs and training.shrink:  # hidden states would change their widths
            self.training = replace(training, shrink=False)
        return found

    def _maps(self) -> list[nn.Parameter]:
        """Return the parameters of maps between hidden states, which are trained beside the model."""
        return [] if self.teaching is None else list(self.teaching.parameters())

    def _open(self, where: str | Path, chosen: Training, seed: int) -> RunFolder:
        """Return the folder of the run.

        Raises:
            PlanError: the data cannot be gone on with.
            CheckpointError: the folder cannot be made, or another run is at work in it.
        """
        if getattr(self.data, "persistent_workers", False):
            raise PlanError(
                "a run with a folder, of a DataLoader whose workers persist",
                why="what they would draw next cannot be saved, and the run could not go on as it was",
                fix="persistent_workers=False, or no folder",
            )
        about = {
            **about_model(self.ready, self.whole.module, self.prefix),
            **about_training(self.training, self.data, chosen),
            METHOD: self.run.name,
            **self.run.about,
            **({} if self.teaching is None else self.teaching.about()),
            "loss": name_of(self.loss),
            LOSS_CODE: code_digest(self.loss),
            "seed": str(seed),
        }
        keep = self.training.keep
        return distributed.from_first(lambda: RunFolder(where, about, self.total, keep))

    # ------------------------------------------------------------------------------------------ before and after
    def measure(self, batches: Sequence[Any]) -> _Start:
        """Return the state that there is now, and the mean loss in eval mode."""
        module, total = self.whole.module, torch.zeros((), device=self.device)
        with in_eval_mode(module):
            for given in batches:
                total += self._loss(given).detach().reshape(()) / len(batches)
        state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        return _Start(state, float(distributed.mean(total)))

    def keep_better(self, start: _Start, batches: Sequence[Any], title: str) -> None:
        """Go back to `start` where the loss is not lower now, and note both losses.

        Maps between hidden states are no part of the model: both losses are taken with the maps that were learned.
        """
        end, before = self.measure(batches), start.loss
        if self._maps():
            self.whole.module.load_state_dict(start.state)
            before = self.measure(batches).loss
            self.whole.module.load_state_dict(end.state)
        worse = not end.loss < before and math.isfinite(before)
        if worse:
            self.whole.module.load_state_dict(start.state)
        of = "held-out data" if self.training.held_out is not None else "the training data"
        losses = f"{before:.4g} before, {end.loss:.4g} after, in eval mode on {len(batches)} batches of {of}"
        what = (
            "that of post-training quantization"
            if any(True for _ in self.ready.quantizers())
            else "the model as it was before"
        )
        outcome = f"training has not lowered the loss: the result is {what}; " * worse
        self.ready.remarks = (*self.ready.remarks, f"{title}{outcome}loss {losses}")

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
                raise no_batches(self.data, self.step, self.total)
            if self.step < self.total:
                self.epoch, self.position = self.epoch + 1, 0
        if not self.optimizer.settled:
            raise TrainingError(
                f"the data ended at step {self.step} of {self.total}, before the {self.run.stage(self.run.settles)}",
                why=f"{self.training.epochs} passes held fewer batches than len() of the data says",
                fix=f"steps={self.total} instead of epochs: as many passes as that takes",
            )

    def _batches(self) -> Iterator[Any]:
        """A pass over the data; after a resumption, what is left of the pass that was cut short, in its order."""
        set_epoch(self.data, self.epoch)
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
        stage = self.run.stage(self.step)
        total = torch.zeros((), device=self.device)
        for given in chunk:
            value = self._loss(given)
            self._backward(value / len(chunk))
            total += value.detach().reshape(()) / len(chunk)
        loss = float(distributed.mean(total))
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss is {loss} at step {self.step + 1}", stage, chunk)
        distributed.average_gradients((*self.whole.module.parameters(), *self.run.parameters(), *self._maps()))
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

    def _backward(self, value: Tensor) -> None:
        """Compute gradients.

        Raises:
            TrainingError: an op of the model has none.
        """
        try:
            self.scaler.scale(value).backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not (op := without_gradient(self.run.ready)):
                raise
            raise TrainingError(
                f"the backward pass fails at step {self.step + 1}: an op has no gradient",
                at=op,
                why=first_line(error)[:300],
                fix="torch.library.register_autograd(op, backward, setup_context=…) gives the op a gradient",
            ) from error

    def _loss(self, given: Any) -> Tensor:
        """The loss of a batch.

        Raises:
            PlanError: the batch has not what the example inputs have, or the loss does not fit.
        """
        batch = to_device(given, self.device)
        arguments = self._arguments(batch)
        if self.loss is not None:
            _check_loss_takes(self.loss, batch)
        with self._precision():
            value = self.run.loss(self._forward, batch, self._task(given, arguments))
        check_loss(value)
        return value

    def _task(self, given: Any, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Loss:
        """Return the loss of an output: that of the task, and with a teacher of what the teacher says of the batch."""
        if self.teaching is None:
            assert self.loss is not None
            return self.loss
        self.teaching.begin(given, *arguments)
        return functools.partial(self.teaching.loss, self.loss)

    def _arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments_like(self.whole.original, self.whole.args, self.whole.kwargs, batch)

    def _forward(self, batch: Any, tensors: Mapping[str, Tensor] | None = None) -> Any:
        """Run the module that is trained on a batch; `tensors` stand in for some of the prepared module's.

        Raises:
            PlanError: `tensors` holds a name or a shape that the prepared module has not.
            TrainingError: the module does not run on the batch, and the model does not either.
        """
        module = self.whole.module
        check_tensors(self.run.ready, tensors or {})
        args, kwargs = copies(self._arguments(batch))
        own = {f"{self.prefix}{n}": t for n, t in (tensors or {}).items()}
        teaching = self.teaching
        try:
            with nullcontext(_ignore) if teaching is None else teaching.listening(module) as hear:
                output = module(*args, **kwargs) if tensors is None else functional_call(module, own, args, kwargs)
                hear(output)
                return output
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
        """What is trained, but for the parameters of quantizers; beside the model, what the run trains."""
        quantizers = {id(p) for _, quantizer in self.run.ready.quantizers() for p in quantizer.parameters()}
        found = (*self.whole.module.parameters(), *self.run.parameters(), *self._maps())
        return [p for p in found if p.requires_grad and id(p) not in quantizers]

    def _shrink_if_due(self) -> None:
        """Go on without the units that are gone, where that is settled and pays."""
        optimizer = self.optimizer
        if (
            not self.training.shrink
            or not self.run.shrinks
            or not optimizer.settled
            or optimizer.ready is not self.ready
        ):
            return
        if optimizer.removed and self.total - self.step >= SHRINK_FROM:
            try:
                optimizer.shrink()
            except PlanError as error:
                logging.getLogger("graphcomp").info("the cool-down goes on with masks: %s", error)
                self.training = replace(self.training, shrink=False)
                return
            self._hold_shrunk()

    def _hold_shrunk(self) -> None:
        """Go on with the module that the optimizer has shrunk."""
        self.whole.hold(self.optimizer.ready)
        self.weights = self._weights()

    def give_back(self) -> None:
        """Let the prepared module hold what the module that it was shrunk to has learned."""
        small = self.optimizer.ready
        if small is not self.ready:
            assert small.session.cut_from is not None
            self.ready.load_state_dict(small.session.cut_from.grown(small).state_dict())
            self.ready.set_progress(*small.progress)

    def close(self) -> None:
        """Let other runs use the folder."""
        if self.folder is not None:
            self.folder.close()

    def _precision(self) -> AbstractContextManager[object]:
        dtype = self.training.autocast
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _not_finite(self, what: str, stage: str, chunk: Sequence[Any]) -> TrainingError:
        saved = None if self.folder is None else self.folder.newest()
        sound = all(_finite(leaf) for leaf in pytree.tree_leaves(list(chunk)))
        place = self._place_not_finite() if sound else "the batch"
        return TrainingError(
            f"{what} of {self.total}, in the {stage} stage",
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
        stage_ends = self.run.stage(self.step) != self.run.stage(self.step - 1)
        if ends or stage_ends or self.step == 1 or self.step % self.training.log_every == 0:
            folder = self.folder
            distributed.from_first(lambda: folder.log(self._metrics()))
            self.losses = []
        if ends or self.step % self.training.save_every == 0:
            self._save()

    def _metrics(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "stage": self.run.stage(self.step - 1),
            "loss": sum(self.losses) / len(self.losses),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            **self.run.metrics(),
            "seconds": round(self.seconds + time.monotonic() - self.start, 3),
        }

    def _line(self) -> str:
        run, found = self.run, self.run.metrics()
        means = (found.get("weight_bits"), found.get("activation_bits"))
        bits = "/".join("-" if mean is None else f"{mean:.1f}" for mean in means)
        return (
            f"{run.stage(self.step)}, step {self.step} of {self.total}, {run.removed} of {run.total} "
            f"units removed, bits {bits}, loss {self.last_loss:.3g}"
        )

    # ------------------------------------------------------------------------------------------ checkpoints
    def _save(self) -> None:
        assert self.folder is not None
        # the loss of the next step would tell, too late for this checkpoint
        if not distributed.every(not self._place_not_finite(), self.device):
            stage = self.run.stage(self.step - 1)
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
            **({"maps": self.teaching.state_dict()} if self.teaching is not None and self._maps() else {}),
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
                self._hold_shrunk()
            self.whole.module.load_state_dict(state["module"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.teaching is not None and self._maps():
                self.teaching.load_state_dict(state["maps"])
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


def _ignore(output: Any) -> None:
    """Hear nothing."""


# ------------------------------------------------------------------------------------------------ setting up
def _scheduler(make: Callable[[Optimizer], LRScheduler], optimizer: Optimizer) -> LRScheduler:
    """What `make` makes of the optimizer.

    Raises:
        PlanError: it makes none, or one that a step alone does not move on.
    """
    fix = "scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1000)"
    try:
        found = make(optimizer)
    except (TypeError, ValueError) as error:
        raise PlanError(f"Training.scheduler, {name_of(make)}, fails", why=str(error), fix=fix) from error
    if not all(callable(getattr(found, name, None)) for name in ("step", "state_dict", "load_state_dict")):
        raise PlanError(f"Training.scheduler, {name_of(make)}, returns a {type(found).__name__}", fix=fix)
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


# ------------------------------------------------------------------------------------------------ the loss
def _check_loss_function(loss: Any, trained: nn.Module) -> None:
    """Raise PlanError where it cannot be called with an output and a batch, or has parameters that nothing trains."""
    if not callable(loss) or not _takes(loss, None, None):
        raise PlanError(
            f"the loss is {name_of(loss)}",
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
            f"the loss is torch's {name_of(function)}, and a batch is a {type(batch).__name__}",
            why="it is called as loss(output, batch), with the whole batch, and takes a tensor of targets",
            fix="loss=lambda output, batch: criterion(output, batch[1])",
        )


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())
