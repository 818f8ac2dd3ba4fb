"""Backward passes that a user wrote: torch.autograd.Functions, whose gradient is not that of their forward.

torch.export traces the forward of a Function and loses the backward. In a graph that is to be trained the results of
the forward therefore pass through `graphcomp::backward_of`, an identity whose gradient is the Function's. Importing
this module registers the op.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.autograd import Function

from graphcomp.capture.record import user_frame
from graphcomp.ir.graph import bind, clone, frame_text
from graphcomp.ir.passes import GraphPass
from graphcomp.ir.rewrite import replace_node
from graphcomp.system.threads import LOCK, in_this_thread

SCHEMA = "(Tensor[] results, Tensor[] operands, str name) -> Tensor[]"


@dataclass(frozen=True)
class WrittenBackward:
    """A Function that a forward called: its class, and the line of the call."""

    function: str
    line: str

    def __str__(self) -> str:
        return f"{self.function} at {self.line}" if self.line else self.function


# ------------------------------------------------------------------------------------------------ the op
_CALLS: dict[str, Callable[..., Any]] = {}
"""Name in the graph -> the call of the Function with new operands. A process that did not capture the model has none:
there the gradient is that of the forward."""

_NUMBERS = itertools.count()


@torch.library.custom_op("graphcomp::backward_of", mutates_args=(), schema=SCHEMA)
def backward_of(results: Sequence[Tensor], operands: Sequence[Tensor], name: str) -> list[Tensor]:
    """Return `results`; the gradient is that of the Function `name`, called with `operands`."""
    return [result.clone() for result in results]


@backward_of.register_fake
def _fake(results: Sequence[Tensor], operands: Sequence[Tensor], name: str) -> list[Tensor]:
    return [torch.empty_like(result) for result in results]


def _remember(ctx: Any, inputs: tuple[Sequence[Tensor], Sequence[Tensor], str], output: list[Tensor]) -> None:
    results, operands, name = inputs
    ctx.count, ctx.name = len(results), name
    ctx.save_for_backward(*operands)


def _differentiate(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, Any, None]:
    call, operands = _CALLS.get(ctx.name), ctx.saved_tensors
    if call is None:
        return list(gradients), [None] * len(operands), None
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in operands]
        made = call(*leaves)
    results = [made] if isinstance(made, Tensor) else list(made)
    used = [k for k, (r, g) in enumerate(zip(results, gradients, strict=True)) if r.requires_grad and g is not None]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if used and wanted:
        found = torch.autograd.grad([results[k] for k in used], wanted, [gradients[k] for k in used], allow_unused=True)
    each = iter(found)
    return [None] * ctx.count, [next(each) if leaf.requires_grad else None for leaf in leaves], None


backward_of.register_autograd(_differentiate, setup_context=_remember)


# ------------------------------------------------------------------------------------------------ while a model runs
@contextmanager
def functions_followed(keep: bool) -> Iterator[list[WrittenBackward]]:
    """Note the Functions that run inside; torch's own are left out.

    Args:
        keep: pass their results through `backward_of`, for a run that is traced.
    """
    with LOCK:
        before = vars(Function)["apply"]
        original = before.__func__
        found: list[WrittenBackward] = []
        inner = False

        def apply(function: type[Function], *args: Any, **kwargs: Any) -> Any:
            nonlocal inner
            if inner or function.__module__.startswith("torch."):
                return original(function, *args, **kwargs)
            found.append(WrittenBackward(function.__qualname__, frame_text(user_frame())))
            inner = True
            try:
                results = original(function, *args, **kwargs)
            finally:
                inner = False
            return _kept(function, args, results) if keep and not kwargs else results

        Function.apply = classmethod(in_this_thread(apply, original))  # type: ignore[method-assign, assignment]
        try:
            yield found
        finally:
            Function.apply = before  # type: ignore[method-assign]


SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _kept(function: type[Function], args: Sequence[Any], results: Any) -> Any:
    """`results` through `backward_of`; as they are where they, or other arguments, hold what no graph can keep."""
    listed = [results] if isinstance(results, Tensor) else list(results) if isinstance(results, tuple) else [None]
    if not all(isinstance(r, Tensor) for r in listed) or any(isinstance(a, SYMBOLS) for a in args):
        return results
    name = f"{function.__qualname__}#{next(_NUMBERS)}"
    _CALLS[name] = _with_operands(function, args)
    kept = torch.ops.graphcomp.backward_of(listed, [a for a in args if isinstance(a, Tensor)], name)
    return kept[0] if isinstance(results, Tensor) else tuple(kept)


def _with_operands(function: type[Function], args: Sequence[Any]) -> Callable[..., Any]:
    """The call of `function` with other tensors in place of those among `args`, which are not held."""
    is_tensor = [isinstance(a, Tensor) for a in args]
    constants = [None if isinstance(a, Tensor) else a for a in args]

    def call(*operands: Tensor) -> Any:
        each = iter(operands)
        return function.apply(*(next(each) if t else c for t, c in zip(is_tensor, constants, strict=True)))  # type: ignore[no-untyped-call]

    return call


# ------------------------------------------------------------------------------------------------ in a graph
def calls_in(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of `graph` whose gradient a Function gives."""
    return graph.find_nodes(op="call_function", target=torch.ops.graphcomp.backward_of.default)


def between(node: fx.Node) -> list[fx.Node]:
    """The nodes that the forward of the Function was traced as."""
    arguments = bind(node)
    seen, stack = set(arguments["operands"]), list(arguments["results"])
    found = []
    while stack:
        inner = stack.pop()
        if inner not in seen:
            seen.add(inner)
            found.append(inner)
            stack += inner.all_input_nodes
    return found


def drop(graph: fx.Graph, nodes: Collection[fx.Node] | None = None) -> None:
    """Let the gradient be that of the forward again, for all nodes or some."""
    for node in calls_in(graph) if nodes is None else list(nodes):
        results = bind(node)["results"]
        for user in list(node.users):
            assert user.target is operator.getitem, user.format_node()
            replace_node(user, results[int(user.args[1])])  # type: ignore[arg-type]
        graph.erase_node(node)


@dataclass(frozen=True)
class LeaveOutBackward(GraphPass):
    """Leave out the backward passes that a user wrote: the graph is for inference."""

    name: ClassVar[str] = "leave out written backward passes"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """Return `module`, or a copy where the gradient of some node is a Function's."""
        if not calls_in(module.graph):
            return module
        copied, _ = clone(module)
        drop(copied.graph)
        copied.recompile()
        return copied
