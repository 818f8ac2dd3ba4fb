"""Probes of a model: its outputs where some layers have other weights, each from the first of these layers on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.ir.graph import all_tensors, fetch, names_by_tensor
from graphcomp.ir.run_nodes import Run, compute_node
from graphcomp.ir.streamed import as_before, in_memory
from graphcomp.pruning.consumers import Consumers
from graphcomp.pruning.grams import Gram


@dataclass(frozen=True, eq=False)
class Trial:
    """Other values of some tensors of a graph.

    Attributes:
        start: the first node that reads one of them as an operand of a layer.
        tensors: name -> value, under each name of the tensor.
        again: nodes that hold or move these tensors, in the order of the graph.
    """

    start: fx.Node
    tensors: Mapping[str, Tensor]
    again: tuple[fx.Node, ...]


class Trials:
    """Makes trials on one graph."""

    def __init__(self, module: fx.GraphModule, consumers: Consumers) -> None:
        self.module, self.consumers = module, consumers
        self.place = {node: k for k, node in enumerate(module.graph.nodes)}
        self.names = names_by_tensor(all_tensors(module))

    def of(self, grams: Sequence[Gram], gone: Tensor) -> Trial | None:
        """Return the trial in which the readers of a group are repaired after the loss of units; None where no closed
        form is."""
        tensors: dict[str, Tensor] = {}
        nodes: set[fx.Node] = set()
        starts = []
        for gram in grams:
            weight = gram.without(gone)
            if weight is None:
                return None
            consumer, problem = gram.reader.consumer, gram.problem
            self._add(
                tensors,
                consumer.tensor,
                problem.design.weight(weight[:, :-1] if problem.intercept else weight),
                consumer.index,
            )
            if problem.intercept:
                self._add(tensors, consumer.bias, weight[:, -1] * consumer.sign, None)
                nodes.update(self.consumers.readers[consumer.bias])
            for other in self.consumers.together[consumer]:
                nodes.update((other.attribute, *other.moves))
                starts.append(other.node)
        return Trial(min(starts, key=self.place.__getitem__), tensors, tuple(sorted(nodes, key=self.place.__getitem__)))

    def _add(self, tensors: dict[str, Tensor], name: str, values: Tensor, index: Tensor | None) -> None:
        """Put values at some elements of a tensor; without `index`, add them."""
        own = fetch(self.module, name)
        old = in_memory(tensors.get(name, own)).detach()
        new = old.double().flatten().clone()
        if index is None:
            new += values.flatten()
        else:
            new[index.flatten()] = values.flatten()
        result = as_before(new.view(old.shape).to(old.dtype), own)
        tensors.update(dict.fromkeys(self.names[id(own)], result))

    @torch.no_grad()
    def outputs(self, batch: Sequence[Any], trials: Sequence[Trial]) -> Iterator[tuple[Trial | None, Any]]:
        """Yield each trial with what the graph returns then, and None with what the graph itself returns, last."""
        by_start: dict[fx.Node, list[Trial]] = {}
        for trial in trials:
            by_start.setdefault(trial.start, []).append(trial)
        nodes = list(self.module.graph.nodes)
        base = Run(self.module, batch)
        for k, node in enumerate(nodes):
            for trial in by_start.get(node, ()):
                yield trial, self._from(base, nodes[k:], trial)
            base.step(node)
            if node.op == "output":
                yield None, base.values[node]
            base.drop(node)

    def _from(self, base: Run, nodes: Sequence[fx.Node], trial: Trial) -> Any:
        run = Run(self.module, (), _with(trial.tensors))
        run.values = dict(base.values)
        for node in trial.again:
            if self.place[node] < self.place[nodes[0]]:
                run.step(node)
        for node in nodes:
            run.step(node)
            if node.op == "output":
                return run.values[node]
            run.drop(node)
        return None


def _with(tensors: Mapping[str, Tensor]) -> Callable[..., Any]:
    def compute(module: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "get_attr" and str(node.target) in tensors:
            return tensors[str(node.target)]
        return compute_node(module, node, args, kwargs)

    return compute
