"""What a model does beside its captured graph: ops of training mode, and results of eval mode that are not returned.

Both read parameters that the captured graph may not read at all (an auxiliary head). The model runs once in each mode;
what one of the runs has beyond the graph is captured, too, so that its axes can be coupled with those of the graph.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graphcomp.capture.capture import Captured, asks_for_the_mode, graph_in_training, recorded_graph, training_modes
from graphcomp.capture.record import op_by_op, record
from graphcomp.errors import first_line
from graphcomp.ir.graph import attributes
from graphcomp.ir.inputs import copies
from graphcomp.ir.module import CapturedModule, set_mode, tensor_names
from graphcomp.ir.module_copy import module_copy, own_memory
from graphcomp.ir.preserve import HoldParameters
from graphcomp.numerics.chance import certain, generators_kept
from graphcomp.system.threads import LOCK
from graphcomp.torch_compat import pytree

log = logging.getLogger("graphcomp.beside")

TRAINING = "in training mode"
NOT_RETURNED = "for a result that is not returned"
DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"})

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Modes = Mapping[str, bool]


@dataclass(frozen=True, eq=False)
class Beside:
    """A graph beside the captured one, with tensors of the model.

    `what` completes a reason: "in training mode", "for a result that is not returned".
    """

    module: CapturedModule
    output_names: tuple[str, ...]
    what: str


@dataclass(frozen=True, eq=False)
class RunsBeside:
    """The model beside its captured graph.

    Attributes:
        graphs: what has to be coupled with the captured graph.
        modes: path of each module -> whether it is in training mode when the model is; None where training mode does
            nothing that the captured graph does not say.
        inputs: example inputs on which the model runs in training mode.
        unchecked: part of the model -> why nothing is known of it.
    """

    graphs: tuple[Beside, ...] = ()
    modes: Modes | None = None
    inputs: Inputs = ((), {})
    unchecked: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def in_modes(model: nn.Module, modes: Modes | None) -> Iterator[nn.Module]:
    """Yield a copy of `model` to run, each module in its mode (None: all in eval mode); random ops are certain."""
    copied = module_copy(model, own_memory(list(tensor_names(model).values())))
    for path, module in copied.named_modules(remove_duplicate=False):
        set_mode(module, False if modes is None else modes.get(path, True))
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with LOCK, torch.random.fork_rng(devices=cuda), torch.no_grad(), op_by_op():
        torch.manual_seed(0)
        with certain(), HoldParameters(copied):  # the copy has the model's own parameters
            yield copied


def runs_beside(captured: Captured) -> RunsBeside:
    """Run the model in eval and in training mode, and capture what the graph does not hold."""
    model = captured.original
    asks = any(map(asks_for_the_mode, model.modules()))
    read = {id(tensor) for _, tensor in attributes(captured.module)}
    unread = {id(p) for p in model.parameters()} - read
    if not asks and not unread:
        return RunsBeside()
    try:
        quiet = _calls(model, captured.inputs.copies(), None)
    except Exception as error:  # of the user's model, whose run is checked elsewhere
        log.debug("%s does not run: %s", type(model).__name__, error)
        return RunsBeside()
    graphs = [_recorded(captured, None, captured.inputs.copies(), NOT_RETURNED)] if quiet.tensors & unread else []
    found = _in_training(captured, quiet, read) if asks else RunsBeside()
    known = [graph for graph in graphs if graph is not None]
    return RunsBeside((*known, *found.graphs), found.modes, found.inputs, found.unchecked)


def _in_training(captured: Captured, quiet: _Calls, read: set[int]) -> RunsBeside:
    model = captured.original
    held = {path: False for path, m in model.named_modules(remove_duplicate=False) if model.training and not m.training}
    modes = {**training_modes(model), **held}
    why = ""
    for inputs in (captured.inputs.copies(), _twice(captured.inputs.copies())):  # batch norms refuse a batch of one
        try:
            loud = _calls(model, inputs, modes)
        except Exception as error:  # of the user's model, which may want targets
            why = (
                why
                or f"the model does not run on the example inputs: {type(error).__name__}: {first_line(error)[:200]}"
            )
            continue
        break
    else:
        return RunsBeside(unchecked={"training mode": why})
    alike = quiet if _is_example(inputs, captured) else _calls(model, inputs, None)
    if not loud.seen - alike.seen and not loud.tensors - alike.tensors:
        return RunsBeside(modes=modes, inputs=inputs)
    try:
        with generators_kept():
            module, names = graph_in_training(model, *copies(inputs), modes)
        graph: Beside | None = Beside(module, names, TRAINING)
    except Exception as error:  # export has no base class for its refusals
        log.debug("%s has no graph of training mode: %s", type(model).__name__, error)
        graph = _recorded(captured, modes, inputs, TRAINING)
    if graph is None:
        return RunsBeside(modes=modes, inputs=inputs, unchecked={"training mode": "it could not be captured"})
    return RunsBeside((graph,), modes, inputs)


def _recorded(captured: Captured, modes: Modes | None, inputs: Inputs, what: str) -> Beside | None:
    model = captured.original
    try:
        with in_modes(model, modes) as copied:
            recording = record(copied, *copies(inputs), certain=True)
    except Exception as error:  # of the user's model, or of values that the recorder cannot follow
        log.debug("%s cannot be recorded %s: %s", type(model).__name__, what, error)
        return None
    names = recording.output_names if modes is not None else ()
    return Beside(recorded_graph(model, recording), names, what)


# ---------------------------------------------------------------------------------------------- what is called
class _Calls(TorchFunctionMode):
    """Notes which torch functions are called on tensors, and which parameters and buffers are read.

    Flags and floats among the arguments (a dropout rate) do not tell calls apart, nor do dropouts and counters.
    """

    def __init__(self, model: nn.Module, originals: nn.Module) -> None:
        super().__init__()
        mine, theirs = tensor_names(model), tensor_names(originals)
        self.held = {id(tensor): id(theirs[name]) for name, tensor in mine.items() if name in theirs}
        self.seen: Counter[Any] = Counter()
        self.tensors: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.tensors |= {self.held[id(t)] for t in tensors if id(t) in self.held}
        counts = bool(tensors) and all(t.dim() == 0 and not t.is_floating_point() for t in tensors)
        made = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))
        if made and not counts and name not in DROPOUTS:
            self.seen[name, tuple(filter(None, map(self._told, _flat((args, kwargs)))))] += 1
        return result

    def _told(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return tuple(leaf.shape), self.held.get(id(leaf))
        if isinstance(leaf, slice):
            return "slice", leaf.start, leaf.stop, leaf.step
        return str(leaf) if isinstance(leaf, int) and not isinstance(leaf, bool) else None


def _flat(value: Any) -> list[Any]:
    return pytree.tree_leaves(value, is_leaf=lambda leaf: isinstance(leaf, slice))


def _calls(model: nn.Module, inputs: Inputs, modes: Modes | None) -> _Calls:
    args, kwargs = copies(inputs)
    with in_modes(model, modes) as copied:
        calls = _Calls(copied, model)
        with calls:
            copied(*args, **kwargs)
    return calls


def _twice(inputs: Inputs) -> Inputs:
    """Return the inputs with dim 0 repeated."""
    doubled: Inputs = pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() else t, inputs)
    return doubled


def _is_example(inputs: Inputs, captured: Captured) -> bool:
    shapes = [
        [t.shape for t in pytree.tree_leaves(found) if isinstance(t, Tensor)]
        for found in (inputs, captured.inputs.copies())
    ]
    return shapes[0] == shapes[1]
