"""The optimizer that a run of a method is in: any optimizer of torch, and around its steps what the method adds."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from graphcomp.arguments import wrong
from graphcomp.coupling.groups import Kept
from graphcomp.errors import CheckpointError, PlanError
from graphcomp.pruning.mask import gone
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.training.prepared import Prepared
from graphcomp.training.shrink import CutFrom, shrunk

if TYPE_CHECKING:
    from graphcomp.training.run import Run

FORMAT = 1
"""Of what `MethodOptimizer.state_dict` returns."""


class MethodOptimizer(Optimizer):
    """Steps of a base optimizer with what a run does before and after each.

    Learning-rate schedulers, gradient clipping, accumulation and scalers work as with the base optimizer, whose
    `param_groups` and `state` these are. Steps that a scaler skips do not count.

    Attributes:
        run: what the method decides.
        base: the optimizer that makes the steps.
        steps: number of steps that are done.

    Args:
        run: of a method, on a prepared module.
        base: class of the optimizer that makes the steps: SGD, Adam, AdamW, … Not one that needs a closure.
        lr: learning rate of the weights.
        options: options of the base optimizer.
        more: options that have a name in common with something else; none of `options`.

    Raises:
        PlanError: the module is sharded, or no such optimizer can be made.
    """

    title: ClassVar[str] = "the optimizer"
    """What messages call it."""

    def __init__(
        self,
        run: Run,
        base: type[Optimizer],
        lr: float,
        options: Mapping[str, Any],
        more: Mapping[str, Any] | None = None,
    ) -> None:
        self.run = run
        check_whole(run.ready, self.title)
        rate = lr if isinstance(lr, (int, float, Tensor)) else 0.0  # the base optimizer refuses all else
        self.base = _base_optimizer(base, run.param_groups(base, rate), lr, options, more or {}, self.title)
        super().__init__(self.base.param_groups, self.base.defaults)
        self._share_with_base()
        self.steps = 0
        self._shrunk: dict[str, Tensor] | None = None  # what was left of each group when the module was shrunk
        self._held: Kept = {}
        self._zeros: list[tuple[Tensor, int, Tensor]] = []  # parameter, dim, indices of all that is gone
        self._index_zeros()

    # ------------------------------------------------------------------------------------------ where it stands
    @property
    def ready(self) -> Prepared:
        """The module that is trained."""
        return self.run.ready

    @property
    def removed(self) -> int:
        """Units that are gone."""
        return self.run.removed

    @property
    def total(self) -> int:
        """Units that may go, those that are gone among them."""
        return self.run.total

    @property
    def settled(self) -> bool:
        """Whether units and bits are those of the end: from the first step of the cool-down on."""
        return self.steps >= self.run.settles

    # ------------------------------------------------------------------------------------------ a step
    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step: the base optimizer's, and what the run adds to it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.run.before_step(self.steps)
        self.base.step()
        self.run.after_step(self.steps)
        if self.run.kept is not self._held:
            self._index_zeros()
            self._forget_zeros()
        self._hold_zeros()
        self.steps += 1
        self.ready.set_progress(self.steps, self.run.settles)
        return loss

    def _index_zeros(self) -> None:
        """Index the elements of units that are gone, and set them to zero."""
        self._held = self.run.kept
        self.ready.keep(self._held)
        parameters = dict(self.ready.named_parameters())
        found = gone(self._held, self.ready.session.computed)
        self._zeros = [(parameters[name], dim, at.to(parameters[name].device)) for name, dim, at in found]

    def _forget_zeros(self) -> None:
        """Clear the state of elements that are gone: momentum would bring them back."""
        for parameter, dim, indices in self._zeros:
            for state in self.state.get(parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == parameter.shape:
                    state.index_fill_(dim, indices, 0)

    def _hold_zeros(self) -> None:
        for parameter, dim, indices in self._zeros:
            parameter.index_fill_(dim, indices, 0)
        self.ready.hold_elements()

    # ------------------------------------------------------------------------------------------ shrinking
    @torch.no_grad()
    def shrink(self) -> Prepared:
        """The module without the units that are gone (`graphcomp.shrink`), which this optimizer goes on with.

        What the base optimizer remembers of the rest stays, and learning-rate schedulers and scalers of this optimizer
        go on. Wrappers around the module, such as DistributedDataParallel or a compiled one, are to be made anew.

        Raises:
            PlanError: units or bits are not settled yet, which they are after the first step of the cool-down; or the
                base optimizer's state cannot be cut. Nothing is changed then.
        """
        if not self.run.shrinks:
            raise PlanError(f"a run of {self.run.name} cannot be shrunk", fix="train on with masks")
        if not self.settled:
            raise PlanError(
                f"after step {self.steps} nothing can be shrunk",
                why=f"which units go, and bits that are whole, is settled at step {self.run.settles}",
                fix="optimizer.shrink() after the first step of the cool-down",
            )
        return self._shrink()

    def _shrink(self) -> Prepared:
        small = shrunk(self.ready)
        assert small.session.cut_from is not None
        self._bind(small, small.session.cut_from)
        earlier = self._shrunk or {}
        kept = {group.name: units for group, units in self.run.kept.items()}
        self._shrunk = {**earlier, **{n: earlier[n][units] if n in earlier else units for n, units in kept.items()}}
        self.run.follow(small)
        self._index_zeros()
        return small

    def _bind(self, small: Prepared, cut_from: CutFrom) -> None:
        """Let groups and state be of the parameters of `small`; parameters outside of the module stay.

        Raises:
            PlanError: the state cannot be cut; nothing is changed then.
        """
        new, names = dict(small.named_parameters()), {id(p): name for name, p in self.ready.named_parameters()}
        state = {}
        for p, values in self.state.items():
            name = names.get(id(p), "")
            state[new.get(name, p)] = cut_from.state(name, values)
        for group in self.param_groups:
            group["params"] = [new[names[id(p)]] if id(p) in names else p for p in group["params"]]
        self.state.clear()
        self.state.update(state)

    # ------------------------------------------------------------------------------------------ saving
    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's, and under the name of the run where it stands: with the module's own, all that a run
        needs to go on bit for bit."""
        for prepare in self._optimizer_state_dict_pre_hooks.values():
            prepare(self)
        own = {
            "format": FORMAT,
            "base": type(self.base).__name__,
            "steps": self.steps,
            "sizes": {group.name: group.size for group in self.run.groups},
            "kept": {group.name: units for group, units in self.run.kept.items()},
            "shrunk": self._shrunk,
            **self.run.state_dict(),
        }
        state = {**self.base.state_dict(), self.run.name: own}
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, state)
            state = state if changed is None else changed
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. A module that had been shrunk is shrunk so again, and is then `ready`.

        The module's own state is to be loaded, too: then, into `ready`.

        Raises:
            CheckpointError: it is of another optimizer, of another model, or of a newer graphcomp. Nothing is changed
                then.
        """
        state_dict = dict(state_dict)
        for prepare in self._optimizer_load_state_dict_pre_hooks.values():
            changed = prepare(self, state_dict)
            state_dict = state_dict if changed is None else changed
        key = next((name for name in (self.run.name, *self.run.former) if name in state_dict), "")
        if not key:
            raise CheckpointError(
                f"the state is not of {self.title} ({self.run.name})", why=f"it holds {', '.join(state_dict)}"
            )
        own = state_dict[key]
        if own["format"] > FORMAT:
            raise CheckpointError(f"the state has format {own['format']}", why=f"this graphcomp knows up to {FORMAT}")
        self._check_base(own.get("base"), state_dict["param_groups"])
        steps = int(own["steps"])
        self._shrink_as(own.get("shrunk"), steps)
        self.run.check_state(own)
        self.base.load_state_dict({name: value for name, value in state_dict.items() if name != key})
        self._share_with_base()
        self.steps = steps
        self.run.kept = {group: own["kept"][group.name].cpu() for group in self.run.groups}
        self.run.load_state_dict(own, steps)
        self._index_zeros()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _check_base(self, name: str | None, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise CheckpointError where the groups of a state are not those of the base optimizer.

        Args:
            name: of the class that the state is of; None: unknown, as in states of earlier versions.
            groups: as in the state.
        """
        own = type(self.base).__name__
        if name is not None and name != own:
            raise CheckpointError(
                f"the state is of {name}, and the base optimizer is {own}", fix=f"QASSO(ready, {name}, …)"
            )
        lengths, here = ([len(group["params"]) for group in found] for found in (groups, self.base.param_groups))
        if lengths != here:
            raise CheckpointError(
                "the state is of another model, or of other groups of parameters",
                why=f"they hold {lengths} parameters, and those of this optimizer {here}",
                fix="give params= and add_param_group as they were given when the state was saved",
            )

    def _shrink_as(self, left: Mapping[str, Tensor] | None, steps: int) -> None:
        """Let the module be without the units that are not `left`, as it was when a state was taken."""
        if left is None and self._shrunk is None:
            return
        if left is None or (self._shrunk is not None and not _equal(left, self._shrunk)):
            raise CheckpointError(
                "the state is of a module of another size",
                why="this optimizer's module has been shrunk since it was prepared",
                fix="load it into a new QASSO of what graphcomp.prepare returns",
            )
        if self._shrunk is None and set(left) == {group.name for group in self.run.groups}:
            kept = {group: left[group.name].cpu() for group in self.run.groups}
            try:
                self.ready.keep(kept)
            except PlanError as error:
                raise CheckpointError("the state is of another model", why=str(error)) from error
            self.run.kept = kept
            self.ready.set_progress(steps, self.run.settles)
            self._shrink()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of the base optimizer."""
        if "base" in vars(self) and not any(group is param_group for group in self.base.param_groups):
            self.base.add_param_group(param_group)
            return
        super().add_param_group(param_group)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodOptimizer:
        """With its module: `copy.deepcopy((ready, optimizer))`. Hooks, and what a scheduler wraps `step` in, stay
        behind, as with any optimizer of torch's."""
        for shared in self.run.shared():
            memo[id(shared)] = shared
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        held = {k: value for k, value in vars(self).items() if k != "step" and not k.startswith("_optimizer_")}
        copied.__setstate__(copy.deepcopy(held, memo))
        return copied

    def __getstate__(self) -> NoReturn:
        raise CheckpointError(
            f"a {type(self).__name__} cannot be pickled",
            why="it holds the prepared module and its graph",
            fix="save optimizer.state_dict() and optimizer.ready.state_dict(), and load them into new ones",
        )

    def _share_with_base(self) -> None:
        """Schedulers and scalers act on this optimizer, and mean the base."""
        self.param_groups, self.state = self.base.param_groups, self.base.state


# ------------------------------------------------------------------------------------------------ setting up
def check_whole(ready: Prepared, title: str) -> None:
    """Raise PlanError where parameters are sharded over processes: units are scored, forgotten and cut whole."""
    for name, parameter in ready.named_parameters():
        if hasattr(parameter, "device_mesh"):  # a DTensor, whose module is not there in every build of torch
            raise PlanError(
                f"the module is sharded (FSDP2, fully_shard), which {title} cannot train",
                at=f"parameter '{name}'",
                why="each process holds a part of the rows, and units are scored and forgotten whole",
                fix="torch.nn.parallel.DistributedDataParallel(ready)",
            )


def grouped(ready: Prepared, params: Iterable[Any] | None, more: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return groups of weights without the parameters of quantizers, and then `more` groups.

    Args:
        params: parameters, or groups of parameters, in any form that torch takes; None: all of the module.
        more: groups of the parameters of quantizers, and of a run's own.

    Raises:
        PlanError: a parameter that is not the module's, or none that can be trained.
    """
    learned = {id(p) for m in ready.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    names = {id(p): name for name, p in ready.named_parameters()}
    entries = list(ready.parameters()) if params is None else _listed(params)
    found: list[dict[str, Any]] = [{"params": entries}]
    if any(isinstance(entry, dict) for entry in entries):
        if not all(isinstance(entry, dict) and "params" in entry for entry in entries):
            raise PlanError(
                "params holds groups and something else, or a group without parameters",
                fix='params=[{"params": […]}, {"params": […], "weight_decay": 0.0}]',
            )
        found = [dict(group) for group in entries]
    for group in found:
        given = _listed(group["params"])
        strange = next((p for p in map(_parameter, given) if id(p) not in names), None)
        if strange is not None:
            what = f"parameter of shape {tuple(strange.shape)}" if isinstance(strange, Tensor) else repr(strange)
            raise PlanError(
                f"a {what} is none of the prepared module",
                why="the module that `prepare` returned holds copies of the model's parameters",
                fix="params=ready.parameters()",
            )
        group["params"] = [p for p in given if _parameter(p).requires_grad and id(_parameter(p)) not in learned]
    found = [group for group in found if group["params"]]
    if not found:
        raise PlanError("no parameter can be trained", why="requires_grad is False for all", fix="requires_grad_(True)")
    named = isinstance(found[0]["params"][0], tuple)  # torch asks for names in all groups or in none
    for group in more:
        own = group["params"]
        found.append({**group, "params": [(names[id(p)], p) for p in own] if named else own})
    return found


def _listed(params: Any) -> list[Any]:
    """Parameters in any form that torch takes.

    Raises:
        PlanError: in another.
    """
    if isinstance(params, Tensor):
        return [params]
    if not isinstance(params, Iterable):
        raise PlanError(f"params is a {type(params).__name__}", fix="params=ready.parameters()")
    return list(params)


def _parameter(entry: Any) -> Any:
    """The parameter of an entry of `parameters()` or of `named_parameters()`."""
    return entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry


def _base_optimizer(
    base: type[Optimizer],
    groups: list[dict[str, Any]],
    lr: float,
    options: Mapping[str, Any],
    more: Mapping[str, Any],
    title: str,
) -> Optimizer:
    """The base optimizer.

    Raises:
        PlanError: its class refuses the options, or groups of parameters; its steps need a closure; a learning rate is
            not finite.
    """
    rates = (lr, *(group["lr"] for group in groups if "lr" in group))
    for rate in rates:
        if isinstance(rate, float) and not math.isfinite(rate):
            raise wrong("lr", "a finite number", rate, "lr=1e-3")
    try:
        made = base(groups, lr=lr, **options, **more)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        given = {**options, "base_options": more} if more else dict(options)
        raise PlanError(f"no {base.__name__} can be made of lr={lr!r} and {given}", why=str(error)) from error
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PlanError(
            f"the steps of {base.__name__} need a closure",
            why=f"they compute the loss several times, and what {title} adds to a step would come in between",
            fix="base=torch.optim.AdamW",
        )
    return made


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)
