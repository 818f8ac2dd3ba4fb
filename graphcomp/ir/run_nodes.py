"""Run a graph node by node: with a tap on each value, on several batches at once, or constant nodes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from graphcomp.errors import CalibrationError, first_line
from graphcomp.ir.graph import fetch, source_line
from graphcomp.ir.preserve import own_inputs, same_buffers, writes
from graphcomp.numerics.compare import floating_tensors, squared_error

Compute: TypeAlias = Callable[[fx.GraphModule, fx.Node, tuple[Any, ...], dict[str, Any]], Any]
"""From a node and the values of its arguments to the value of the node. An output node has the value it returns."""

See: TypeAlias = Callable[[fx.Node, Any], None]
Instead: TypeAlias = Callable[[fx.Node, Any], Any]

_AT = "at: "
"""Prefix of the note that names the node at which a run failed."""


def compute_node(module: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute `node` as the graph says."""
    if node.op == "get_attr":
        return fetch(module, str(node.target))
    if node.op == "call_module":
        return module.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "output":
        return args[0]
    return node.target(*args, **kwargs)  # type: ignore[operator]


def run_tapped(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    see: See | None = None,
    instead: Instead | None = None,
    compute: Compute = compute_node,
    gradients: bool = False,
) -> Any:
    """Run a graph, and leave its buffers and `inputs` as they are.

    Args:
        module: the graph.
        inputs: flat, in the order of the placeholders.
        see: called with each node and its value, before users of the node read the value.
        instead: called after `see` in the same way; returns the value that users read.
        compute: computes a node.
        gradients: record what a backward pass needs.

    Returns:
        What the output node returns.

    Raises:
        Whatever an op raises, with a note that `failed_at` reads.
    """
    with same_buffers(module), torch.set_grad_enabled(gradients):
        return Run(module, own_inputs(module, inputs), compute).finish(see, instead)


def output_errors(
    reference: fx.GraphModule, graphs: Sequence[fx.GraphModule], batches: Iterable[Sequence[Any]]
) -> tuple[list[float], float]:
    """Return Σ ||y - t||² of each graph's floating outputs, and Σ ||t||²; see `squared_error`.

    Args:
        reference: gives t.
        graphs: each gives as many outputs of these shapes.
        batches: flat inputs.
    """
    errors, norm = [0.0] * len(graphs), 0.0
    for batch in batches:
        wanted, energy = floating_tensors(run_tapped(reference, batch)), 0.0
        for k, graph in enumerate(graphs):
            error, energy = squared_error(wanted, floating_tensors(run_tapped(graph, batch)))
            errors[k] += error
        norm += energy
    return errors, norm


def failed_at(error: BaseException) -> str:
    """Return name and source line of the node at which a run failed; "" where the error is of something else."""
    notes = getattr(error, "__notes__", ())
    return next((note.removeprefix(_AT) for note in notes if note.startswith(_AT)), "")


def refused_batch(k: int, error: BaseException) -> CalibrationError:
    """Return the error that says that a graph does not run on batch `k`, which `error` stopped."""
    return CalibrationError(
        f"the model does not run on batch {k} of the calibration data",
        at=failed_at(error),
        why=first_line(error)[:300] or type(error).__name__,
        fix="give batches in the form of the example inputs",
    )


def run_batch(module: fx.GraphModule, batch: Sequence[Any], k: int, see: See) -> None:
    """Run a graph on batch `k` of the calibration data, and let `see` see the values.

    Raises:
        CalibrationError: the graph does not run on the batch, or `see` refuses a value.
    """
    try:
        run_tapped(module, batch, see=see)
    except CalibrationError:
        raise
    except Exception as error:  # whatever the ops raise on inputs of another shape
        raise refused_batch(k, error) from error


class Run:
    """One run of a graph, node by node in the order of the graph. A value is dropped after the last use.

    Attributes:
        values: node -> value, of the nodes that were computed and are still to be read.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Any], compute: Compute = compute_node) -> None:
        self.module, self.compute = module, compute
        self.values: dict[fx.Node, Any] = {}
        self._inputs = iter(inputs)
        last_user = {operand: node for node in module.graph.nodes for operand in node.all_input_nodes}
        self._unread: dict[fx.Node, list[fx.Node]] = {}  # node -> what nothing reads after the node
        for node in module.graph.nodes:
            self._unread.setdefault(last_user.get(node, node), []).append(node)

    def arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what `node` is called with."""
        found: tuple[tuple[Any, ...], dict[str, Any]] = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        return found

    def step(self, node: fx.Node) -> None:
        """Compute `node`."""
        if node.op == "placeholder":
            self.values[node] = next(self._inputs)
            return
        try:
            self.values[node] = self.compute(self.module, node, *self.arguments(node))
        except Exception as error:
            error.add_note(f"{_AT}{node.name} {source_line(node)}".rstrip())
            raise

    def drop(self, node: fx.Node) -> None:
        """Forget what nothing reads after `node`. The value of a node that was added on the way stays."""
        for unread in self._unread.get(node, ()):
            self.values.pop(unread, None)

    def finish(self, see: See | None = None, instead: Instead | None = None) -> Any:
        """Run to the end, see `run_tapped`; return what the output node returns."""
        for node in self.module.graph.nodes:
            self.step(node)
            if node.op == "output":
                return self.values.pop(node)
            if see is not None:
                see(node, self.values[node])
            if instead is not None:
                self.values[node] = instead(node, self.values[node])
            self.drop(node)
        return None


class Lockstep:
    """One run of a graph for each of several batches, all at the same node.

    Args:
        module: the graph.
        batches: flat inputs of each batch, in the order of the placeholders.
    """

    def __init__(self, module: fx.GraphModule, batches: Sequence[Sequence[Any]]) -> None:
        # what an op may write into is each batch's own
        how = _with_copies if writes(module) else compute_node
        self.runs = [Run(module, own_inputs(module, batch), how) for batch in batches]

    def arguments(self, node: fx.Node) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What `node` is called with, per batch."""
        return (run.arguments(node) for run in self.runs)

    def of(self, node: fx.Node) -> list[Any]:
        """What `node` computed, per batch; there until its last user has run."""
        return [run.values[node] for run in self.runs]

    def has(self, node: fx.Node) -> bool:
        """Return whether `node` was computed and is still to be read."""
        return all(node in run.values for run in self.runs)

    @torch.no_grad()
    def step(self, node: fx.Node) -> None:
        """Compute `node`."""
        for run in self.runs:
            run.step(node)

    def put(self, node: fx.Node, value: Any) -> None:
        """Let users of `node` read `value` in each run."""
        for run in self.runs:
            run.values[node] = value

    def take(self, node: fx.Node, other: Lockstep, twin: fx.Node) -> None:
        """Give `node` the values that `twin` has in another run of the same batches."""
        for run, source in zip(self.runs, other.runs, strict=True):
            run.values[node] = source.values[twin]

    def drop(self, node: fx.Node) -> None:
        """Forget what nothing reads after `node`."""
        for run in self.runs:
            run.drop(node)


def _with_copies(module: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = compute_node(module, node, args, kwargs)
    return found.clone() if node.op == "get_attr" else found


class Constants:
    """What the constant nodes of a graph compute, each once."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.values: dict[fx.Node, Any] = {}

    @torch.no_grad()
    def of(self, node: fx.Node) -> Tensor:
        """The value of a node that depends on parameters, buffers and numbers only."""
        if node not in self.values:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.of)
            self.values[node] = compute_node(self.module, node, args, kwargs)
        found: Tensor = self.values[node]
        return found
