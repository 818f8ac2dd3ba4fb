"""What `analyze` returns: the groups of a model, what is frozen and why, which ops nobody knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import networkx
from torch import Tensor, fx, nn

from graphcomp.arguments import check_word
from graphcomp.capture.beside import RunsBeside, runs_beside
from graphcomp.capture.capture import Captured
from graphcomp.coupling.groups import ChannelGroup, FrozenAxis, find_frozen, find_groups
from graphcomp.coupling.propagate import Coupling, UnknownOp, couple_beside, propagate
from graphcomp.coupling.text import analysis_graph, analysis_text
from graphcomp.ir.graph import all_tensors, attributes
from graphcomp.ir.module import bound_graph, tensor_names
from graphcomp.system.threads import one_at_a_time


@dataclass(frozen=True, eq=False)
class Analysis:
    """The quantization-aware dependency graph (QADG) of one captured model.

    `groups` are all groups that may be cut; which of them a method prunes by default is decided in `api`. `beside` is
    what the model does beside the captured graph: in training mode, and for results that it does not return.
    """

    captured: Captured
    groups: tuple[ChannelGroup, ...]
    beside: RunsBeside = field(default_factory=RunsBeside)

    def __repr__(self) -> str:
        return f"Analysis({type(self.captured.original).__name__}, {len(self.groups)} groups)"

    @property
    def coupling(self) -> Coupling:
        """The axes of the captured graph."""
        assert self.captured.coupling is not None
        return self.captured.coupling

    @property
    def coupled(self) -> Iterator[tuple[Coupling, fx.GraphModule]]:
        """The axes of each graph with the graph: those of the graphs beside, then those of the captured graph."""
        graphs = (other.module for other in self.beside.graphs)
        yield from zip(self.coupling.beside, graphs, strict=True)
        yield self.coupling, self.captured.module

    @property
    def model(self) -> nn.Module:
        """The user's module (or its scoped submodule), as it was given."""
        return self.captured.original

    def bind(self, tensors: Mapping[str, Tensor]) -> Analysis:
        """Return the same analysis of the same graph with `tensors` in place of the tensors of their names."""
        return replace(self, captured=self.captured.bind(tensors), beside=_bound(self.beside, tensors))

    @cached_property
    def frozen(self) -> tuple[FrozenAxis, ...]:
        """Indices of parameters that must stay, with the reason and the user's source line."""
        return find_frozen(self.coupling)

    @property
    def unknown_ops(self) -> tuple[UnknownOp, ...]:
        """Ops without a rule; every axis they touch is frozen."""
        return tuple(self.coupling.unknown.values())

    @cached_property
    def prunable_share(self) -> float:
        """Fraction of parameter elements that lie in at least one group."""
        parameters: Mapping[str, nn.Parameter] = dict(self.model.named_parameters())
        inside = {m.name for group in self.groups for m in group.members}
        total = sum(p.numel() for p in parameters.values())
        return sum(p.numel() for name, p in parameters.items() if name in inside) / max(total, 1)

    def group(self, name: str) -> ChannelGroup:
        """The group of that name.

        Raises:
            PlanError: there is none; the message lists the names.
        """
        names = [group.name for group in self.groups]
        check_word("name", name, names)
        return self.groups[names.index(name)]

    def report(self) -> str:
        """Groups, what is frozen and why, unknown ops with the fix, as text."""
        return analysis_text(self)

    def to_networkx(self) -> networkx.DiGraph:
        """Nodes: ops, parameters and groups (attribute `kind`); edges: data flow, and membership in a group."""
        return analysis_graph(self)


@one_at_a_time
def analyze_captured(captured: Captured) -> Analysis:
    """Couple the axes of a captured graph and collect its groups."""
    captured = _coupled(captured)
    return _with_beside(captured, runs_beside(captured))


@one_at_a_time
def analyze_rewritten(plan: Analysis, captured: Captured) -> Analysis:
    """Couple the axes of what passes made of the graph of `plan`, and collect its groups.

    What the model does beside its graph is known by `plan`. To look it up again would take each tensor that a pass put
    in the place of one of the model's for one that the graph does not read.
    """
    return _with_beside(_coupled(captured), _bound(plan.beside, dict(all_tensors(captured.module))))


def _coupled(captured: Captured) -> Captured:
    coupling = propagate(captured.module, captured.output_names, held=captured.outside.reads)
    return replace(captured, coupling=coupling)


def _bound(beside: RunsBeside, tensors: Mapping[str, Tensor]) -> RunsBeside:
    """Return the same graphs with `tensors` in place of the tensors of their names."""
    return replace(
        beside, graphs=tuple(replace(other, module=bound_graph(other.module, tensors)) for other in beside.graphs)
    )


def _with_beside(captured: Captured, beside: RunsBeside) -> Analysis:
    for other in beside.graphs:
        names = {str(node.target) for node, _ in attributes(other.module)} - set(tensor_names(captured.original))
        constants = dict.fromkeys(names, f"a constant of the code {other.what}")
        held = {**captured.outside.reads, **constants}
        couple_beside(captured, other.module, other.output_names, other.what, held)
    assert captured.coupling is not None
    return Analysis(captured, find_groups(captured.coupling), beside)
