"""transformers' Trainer around a prepared model or a cut one: checks, logs and a teacher, by a callback.

ready = graphcomp.prepare(model, dict(tokens), bits=(4, 8))
optimizer = graphcomp.QASSO(ready, torch.optim.AdamW, lr=1e-4, sparsity=0.5, schedule=1000)
trainer = Trainer(ready, TrainingArguments(max_steps=1000, …), train_dataset=…, optimizers=(optimizer, None),
                  callbacks=[graphcomp.GraphcompCallback(teacher=model)])
trainer.train()
small = graphcomp.finalize(ready)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.errors import PlanError, TrainingError
from graphcomp.methods.geta.qasso import QASSO
from graphcomp.torch_compat import inside_wrapper
from graphcomp.training.distill import Distill, check_distill
from graphcomp.training.hidden import hearing
from graphcomp.training.optimizer import MethodOptimizer
from graphcomp.training.prepared import Prepared
from graphcomp.training.teaching import Teaching

COLUMNS = ("stage", "sparsity", "units_removed", "weight_bits", "activation_bits")
"""What of a run's metrics each line of logs holds."""


class GraphcompCallback:
    """Lets transformers' Trainer train a prepared model by `QASSO`, and any model beside a teacher.

    Before the first step the callback refuses what would fail or pass in silence: a learned number of bits or a
    sparsity without QASSO, a QASSO of another model, a schedule of another length than the run. Each line of logs gets
    the stage, the sparsity and the mean bits. Checkpoints, `resume_from_checkpoint`, accumulation, clipping and mixed
    precision are the Trainer's own; steps of the schedule are steps of the optimizer. The class has the events of a
    `transformers.TrainerCallback`, and imports nothing of transformers.

    Args:
        teacher: as of `Training`: in training, the loss that the model returns gets what the teacher says; a model
            without labels learns of the teacher alone. Evaluation has the model's own loss. The teacher runs on each
            batch, as the Trainer makes new ones.
        distill: what is learned of the teacher; None: `Distill()`. Hidden states have the widths of the teacher's:
            learned maps are trained by `finetune` and `compress` alone.

    Raises:
        PlanError: the teacher is no module, or `distill` has no teacher.
    """

    def __init__(self, teacher: nn.Module | None = None, distill: Distill | None = None) -> None:
        check_distill(teacher, distill)
        self.teacher, self.distill = teacher, distill or Distill()
        self._stack = ExitStack()
        self._teaching: Teaching | None = None
        self._found: Mapping[str, Tensor] = {}
        self._share = 1.0
        self._optimizer: MethodOptimizer | None = None
        self._loss_used: bool | None = None

    # ------------------------------------------------------------------------------------------ events
    def __getattr__(self, name: str) -> Any:
        """Return what does nothing, for the other events of a Trainer."""
        if not name.startswith("on_"):
            raise AttributeError(f"a GraphcompCallback has no {name!r}")
        return _nothing

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Check the run, and let the teacher in.

        Raises:
            PlanError: model, optimizer and length of the run do not go together, or the teacher does not fit.
        """
        model, optimizer = _inside(given["model"]), _own(given.get("optimizer"))
        self._optimizer = _checked(model, optimizer, state)
        self._share = 1 / args.gradient_accumulation_steps
        self._stack.close()
        self._teaching, self._loss_used = None, None
        if self.teacher is None:
            return
        if isinstance(model, Prepared):
            inputs = model.session.plan.captured.inputs.to(next(model.parameters()).device)
            self._let_in(model, inputs.args, inputs.kwargs)
        else:
            before = model.register_forward_pre_hook(self._first, with_kwargs=True)
            self._stack.callback(before.remove)
        after = model.register_forward_hook(self._taught, with_kwargs=True)
        self._stack.callback(after.remove)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Refuse a loss that is not the model's: the teacher's part would be left out.

        Raises:
            TrainingError: nothing was trained on the loss that the model returned.
        """
        if self._loss_used is False:
            self._stack.close()
            raise TrainingError(
                "the Trainer computes the loss itself, and leaves out what the teacher says",
                why="compute_loss_func= and label_smoothing_factor= take the place of the loss that the model returns",
                fix="a loss of the model, of batches with labels; or graphcomp.finetune(small, data, loss, …)",
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        """Add stage, sparsity and bits to a line of logs, and to the Trainer's history."""
        if self._optimizer is None or logs is None:
            return
        run = self._optimizer.run
        found = {"stage": str(run.stage(max(self._optimizer.steps - 1, 0))), **run.metrics()}
        own = {name: found[name] for name in COLUMNS if found.get(name) is not None}
        logs.update(own)
        if state.log_history:
            state.log_history[-1].update(own)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Let the teacher go; the result says what was learned."""
        model = _inside(given["model"])
        if self._teaching is not None and isinstance(model, Prepared):
            note = self._teaching.note(task=True)
            model.remarks = (*(own for own in model.remarks if own != note), note)
        self._stack.close()

    # ------------------------------------------------------------------------------------------ the teacher
    def _let_in(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Fit the teacher to the model, and hear its hidden states from now on.

        Raises:
            PlanError: the teacher does not fit, or a hidden state has another width.
        """
        assert self.teacher is not None
        found = Teaching(self.teacher, self.distill, model, args, kwargs)
        if found.mapped:
            raise PlanError(
                f"hidden state {found.mapped[0]!r} has another width than the teacher's",
                why="the Trainer's optimizer would not train a map between the two",
                fix="graphcomp.finetune(small, data, training=…), which trains such maps; or other names",
            )
        self._teaching = found
        self._found = self._stack.enter_context(hearing(model, found.pairs, "the student")) if found.pairs else {}

    def _first(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Fit the teacher on the first batch of training."""
        if self._teaching is None and model.training and torch.is_grad_enabled():
            self._let_in(model, args, {k: v for k, v in kwargs.items() if k != "num_items_in_batch"})

    def _taught(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output of a training step with the loss of the task and of the teacher.

        Raises:
            PlanError: the output holds no loss by name.
        """
        teaching = self._teaching
        if teaching is None or not model.training or not torch.is_grad_enabled():
            return None
        if not isinstance(output, Mapping):
            raise PlanError(
                f"the model returns a {type(output).__name__}, and the teacher's part of the loss has no place in it",
                fix="a model that returns a ModelOutput (return_dict=True)",
            )
        named = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        teaching.begin(None, args, named)
        teaching.heard(output, self._found)
        own = output.get("loss")
        # a loss over all tokens of the accumulated batches is no mean that the Trainer would divide
        share = 1.0 if kwargs.get("num_items_in_batch") is None else self._share
        value = share * teaching.loss(None, output, None)
        if own is not None and self.distill.task:
            value = self.distill.task * own + value
        self._loss_used = bool(self._loss_used)
        value.register_hook(self._used)  # type: ignore[no-untyped-call]
        changed: Any = copy.copy(output)
        changed["loss"] = value
        return changed

    def _used(self, gradient: Tensor) -> None:
        self._loss_used = True


def _nothing(*args: Any, **given: Any) -> None:
    """Do nothing at an event."""


# ------------------------------------------------------------------------------------------------ checks
def _inside(model: nn.Module) -> nn.Module:
    """Return the module inside of wrappers (DistributedDataParallel, torch.compile)."""
    while not isinstance(model, Prepared) and (inner := inside_wrapper(model)) is not None:
        model = inner
    return model


def _own(optimizer: Any) -> Any:
    """Return the optimizer inside of accelerate's."""
    while not isinstance(optimizer, MethodOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _checked(model: nn.Module, optimizer: Any, state: Any) -> MethodOptimizer | None:
    """Return QASSO, if there is one.

    Raises:
        PlanError: model, optimizer and length of the run do not go together.
    """
    if not isinstance(optimizer, MethodOptimizer):
        if isinstance(model, Prepared) and (model.session.learns_bits or not model.session.sites):
            raise PlanError(
                f"a prepared model and {type(optimizer).__name__}",
                why="bits are learned and units go by QASSO alone; another optimizer would leave both as they are",
                fix="Trainer(ready, args, optimizers=(graphcomp.QASSO(ready, torch.optim.AdamW, lr=…, schedule="
                f"{state.max_steps}), None))",
            )
        return None
    if optimizer.ready is not model:
        raise PlanError(
            f"{optimizer.title} is of another module than the Trainer's model, a {type(model).__name__}",
            fix="Trainer(ready, args, optimizers=(graphcomp.QASSO(ready, …), None)) with the same `ready`",
        )
    if isinstance(optimizer, QASSO) and optimizer.schedule.steps != state.max_steps:
        steps, most = optimizer.schedule.steps, state.max_steps
        raise PlanError(
            f"the schedule of QASSO has {steps} steps, and the run of the Trainer {most}",
            why="a step of the schedule is a step of the optimizer: batches divided by gradient_accumulation_steps",
            fix=f"TrainingArguments(max_steps={steps}), or schedule={most}",
        )
    if optimizer.steps != state.global_step:
        raise PlanError(
            f"{optimizer.title} has done {optimizer.steps} steps, and the Trainer {state.global_step}",
            why="the state of an optimizer goes on with that of its run, and with no other",
            fix="a new QASSO of a new `prepare` for a new run; a checkpoint with optimizer.pt to resume from",
        )
    return optimizer
