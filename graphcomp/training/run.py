"""What a training method decides while a model is trained; loop, folder and processes know nothing else of a method."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphcomp.arguments import shown, wrong
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import CheckpointError, PlanError
from graphcomp.pruning.evidence import Loss
from graphcomp.training.lsq import decaying, hold_steps, lsq_groups, steps_of, with_steps
from graphcomp.training.optimizer import grouped
from graphcomp.training.prepared import Prepared


class Forward(Protocol):
    """Runs the model on a batch."""

    def __call__(self, batch: Any, tensors: Mapping[str, Tensor] | None = None) -> Any:
        """Return the output.

        Args:
            batch: as the data give it, on the device of the model.
            tensors: parameters and buffers of the prepared module that other tensors stand in for, by name: a view
                on a weight, or another set of norms.
        """


@dataclass(frozen=True, eq=False)
class Choice:
    """What training decided beside the values of weights and quantizers, which the module holds.

    Attributes:
        kept: units of each group that stay; groups left out stay whole.
        elements: parameter -> mask of its shape, 0 (False) where an element is pruned.
    """

    kept: Kept = field(default_factory=dict)
    elements: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Choice(units of {len(self.kept)} groups, masks of {len(self.elements)} parameters)"

    def apply(self, ready: Prepared) -> None:
        """Let a prepared module be as chosen: pruned units and pruned elements exactly zero."""
        ready.keep(self.kept)
        ready.keep_elements(self.elements)


class Run:
    """One run of a method on a prepared module: plain training, of which a method overrides what it does otherwise.

    Steps and zero points of LSQ's quantizers have learning rates of their own, and stay valid. Units that the masks of
    the module leave out stay out.

    Attributes:
        name: of the method, under which the optimizer's state holds this run's.
        former: names under which earlier versions saved such a state.
        shrinks: whether the run goes on with a module without the units that are gone.
        ready: the module that is trained.
        groups: whose units may go.
        kept: the units of each group that are not gone. Where a step replaces this, the optimizer sets all that is not
            kept to zero, and forgets what the optimizer remembers of that.
        total: units of all groups when the run began.
        settles: number of steps after which units and bits are those of the end.
        about: what tells this run from another one: name -> text. A folder goes on only with the same.
    """

    name: ClassVar[str]
    former: ClassVar[tuple[str, ...]] = ()
    shrinks: ClassVar[bool] = False
    settles: int = 0

    def __init__(
        self, ready: Prepared, groups: Sequence[ChannelGroup] | None = None, *, lr_quant: float | None = None
    ) -> None:
        self.ready, self.lr_quant = ready, lr_quant
        self.groups = ready.session.groups if groups is None else tuple(groups)
        self.total = sum(group.size for group in self.groups)
        masks = ready.kept()  # after an earlier run some units may be gone: they stay gone, and count
        self.kept: Kept = {group: masks[group] for group in self.groups}
        self._ungrouped = 0  # units that stay, of groups that shrinking dissolved
        self._with_steps = with_steps(ready)
        self._steps_before: list[Tensor] = []
        self.about: Mapping[str, str] = {}

    # ------------------------------------------------------------------------------------------ what is trained
    def param_groups(self, base: type[Optimizer], lr: Any) -> list[dict[str, Any]]:
        """Return groups of all that is trained.

        Args:
            base: class of the optimizer.
            lr: learning rate of the weights.
        """
        weights = list(self.ready.parameters())
        steps = lsq_groups(self._with_steps, base, lr, self.lr_quant)
        return grouped(self.ready, decaying(weights) if self._with_steps else weights, [*steps, *self._own_groups()])

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return what is trained beside the parameters of the model."""
        return ()

    def _own_groups(self) -> list[dict[str, Any]]:
        own = list(self.parameters())
        return decaying(own) if own else []

    # ------------------------------------------------------------------------------------------ a step
    def loss(self, forward: Forward, batch: Any, task: Loss) -> Tensor:
        """Return the loss of a batch, (): that of the task on the output of one forward pass."""
        return task(forward(batch), batch)

    def before_step(self, step: int) -> None:
        """Act on gradients, before the optimizer does; without gradients of its own.

        Args:
            step: number of steps that are done.
        """
        self._steps_before = [step.clone() for step in steps_of(self._with_steps)]

    def after_step(self, step: int) -> None:
        """Act on weights and quantizers, after the optimizer did; without gradients."""
        hold_steps(self._with_steps, self._steps_before)

    # ------------------------------------------------------------------------------------------ where the run stands
    @property
    def removed(self) -> int:
        """Units that are gone."""
        return self.total - sum(len(units) for units in self.kept.values()) - self._ungrouped

    def stage(self, step: int) -> str:
        """Name the stage that step `step` (from 0) belongs to."""
        return "training"

    def bits(self) -> Tensor:
        """(l,) bits of each quantizer, in the order of the sites."""
        own = ((s.high if s.low == s.high else q.bits.detach()) for s, q in self.ready.quantizers())
        return torch.tensor([float(bits) for bits in own])

    def metrics(self) -> dict[str, Any]:
        """Return what a line of metrics shows beside step, loss and learning rate, as plain numbers."""
        bits = self.bits().cpu()
        is_weight = torch.tensor([site.is_weight for site in self.ready.session.sites], dtype=torch.bool)
        means = {"weight_bits": bits[is_weight], "activation_bits": bits[~is_weight]}
        return {
            "units_removed": self.removed,
            "units": self.total,
            "sparsity": self.removed / max(self.total, 1),
            **{name: round(float(own.mean()), 4) if len(own) else None for name, own in means.items()},
        }

    def choice(self) -> Choice:
        """Return all that finalizing needs: what is decided after the last step."""
        return Choice(kept=self.kept)

    # ------------------------------------------------------------------------------------------ states and copies
    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on bit for bit, beside the states of module and optimizer."""
        return {}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state of another run; nothing is changed.

        Raises:
            CheckpointError: the groups are others, or have other sizes.
        """
        sizes = {group.name: group.size for group in self.groups}
        if set(state["kept"]) != set(sizes):
            raise CheckpointError(
                "the state is of another model",
                why=f"its groups are {', '.join(state['kept'])[:300]}; here they are {', '.join(sizes)[:300]}",
            )
        other = [name for name, size in state.get("sizes", sizes).items() if size != sizes[name]]
        if other:
            raise CheckpointError(
                "the state is of another model",
                why=f"'{other[0]}' had {state['sizes'][other[0]]} units, and has {sizes[other[0]]} here",
            )

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on where `state_dict` was taken, after `step` steps; `check_state` has passed."""

    def follow(self, small: Prepared) -> None:
        """Go on with `small`, which `ready` was shrunk to."""
        left, names = self.total - self.removed, {group.name for group in self.groups}
        self.ready = small
        self.groups = tuple(group for group in small.session.groups if group.name in names)
        self.kept = {group: torch.arange(group.size) for group in self.groups}
        self._ungrouped = left - sum(group.size for group in self.groups)
        self._with_steps = with_steps(small)

    def shared(self) -> Iterable[Any]:
        """Return what copies of this run share: descriptions, which are told apart by identity."""
        return self.groups


def check_run(run: Any, ready: Prepared) -> None:
    """Refuse what is no run of a prepared module.

    Raises:
        PlanError: not a Run, a Run without a name, or one of another module.
    """
    if not isinstance(run, Run):
        raise wrong("what begin returns", "a graphcomp.Run", run, "return MyRun(ready)")
    kind = type(run).__name__
    name = getattr(run, "name", None)
    if not isinstance(name, str) or not name:
        raise PlanError(
            f"a {kind} must have a name, got {shown(name)}",
            why="the state of the optimizer and the folder of the run name the method",
            fix=f'class {kind}(graphcomp.Run): name = "{kind.lower()}"',
        )
    if getattr(run, "ready", None) is not ready:
        raise PlanError(
            f"a {kind} must train the module that begin is called with",
            why="the optimizer, the folder and the result are of that module",
            fix="super().__init__(ready) in __init__",
        )


def check_tensors(ready: Prepared, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what cannot stand in for tensors of a prepared module.

    Raises:
        PlanError: a name is none of its parameters and buffers, or a tensor has another shape.
    """
    for name, tensor in tensors.items():
        own = _tensor_of(ready, name)
        if own is None:
            names = dict((*ready.named_parameters(), *ready.named_buffers()))
            raise PlanError(
                f"forward(batch, tensors): {shown(name)} is no parameter or buffer of the model",
                fix=f"{difflib.get_close_matches(str(name), names, 1, 0.0)[0]!r}",
            )
        if not isinstance(tensor, Tensor) or tensor.shape != own.shape:
            raise wrong(
                f"forward(batch, tensors): what stands in for {name!r}",
                f"a tensor of shape {tuple(own.shape)}",
                tuple(tensor.shape) if isinstance(tensor, Tensor) else tensor,
                f"{{{name!r}: view}} with a view on ready.get_parameter({name!r})",
            )


def _tensor_of(ready: Prepared, name: str) -> Tensor | None:
    """Return the parameter or buffer of a name; None where there is none."""
    for find in (ready.get_parameter, ready.get_buffer):
        with suppress(AttributeError):
            return find(name)
    return None


Begin = Callable[[Any, int], Run]
"""Begins a run, from the options of a training, with those that were chosen for the model, and the number of steps."""
