"""Einsum written as matrix products, so that its operands are quantized like those of others.

einsum("bti,hid->bthd", x, w)  ->  unflatten(linear(x, flatten(permute(w))))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphcomp.coupling.notation import einsum_letters
from graphcomp.coupling.size import Size, size_of
from graphcomp.ir.graph import bind, clone, value
from graphcomp.ir.passes import GraphPass
from graphcomp.ir.rewrite import after, become, before, redirect
from graphcomp.quantization.placement import constants

aten = torch.ops.aten

RESULT_OF = "result_of"
"""Key of `meta`: name of the op that a node has the value of, where a node of another name has that value now."""


@dataclass(frozen=True)
class WriteOutEinsum(GraphPass):
    """Replace every einsum that multiplies and sums by matrix products of two operands each, from left to right.

    An einsum with a label twice in one operand, with dims of 1 that are broadcast, or without a sum stays.
    """

    name: ClassVar[str] = "write out einsum"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """A new module, which shares the tensors of `module`."""
        written, _ = clone(module)
        constant = constants(written.graph)
        for node in written.graph.find_nodes(op="call_function", target=aten.einsum.default):
            arguments = bind(node)
            terms = None if node in constant else _terms(arguments["equation"], arguments["tensors"])
            if terms is not None and all(len(step.summed) > 0 for step in _steps(terms)):
                _WriteOut(node, constant).run(terms)
        written.graph.eliminate_dead_code()
        written.recompile()
        return written


# ------------------------------------------------------------------------------------------------ equations
@dataclass(frozen=True)
class _Terms:
    """Labels of each operand and of the result, one per dim."""

    operands: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]


@dataclass(frozen=True)
class _Step:
    """A product of what there is with one more operand: labels by what becomes of their dims."""

    batch: tuple[str, ...]
    left: tuple[str, ...]
    right: tuple[str, ...]
    summed: tuple[str, ...]

    @property
    def result(self) -> tuple[str, ...]:
        return (*self.batch, *self.left, *self.right)


def _terms(equation: str, tensors: Sequence[fx.Node]) -> _Terms | None:
    """Return the labels of an einsum of two operands or more; None where matrix products cannot say the same."""
    shapes = [value(tensor).shape for tensor in tensors]
    if len(tensors) < 2 or equation.count(",") != len(tensors) - 1:
        return None
    found, letters = einsum_letters(equation, [len(shape) for shape in shapes])
    operands, result = tuple(tuple(own) for own in found), tuple(letters)
    sizes: dict[str, Size] = {}
    for labels, shape in zip(operands, shapes, strict=True):
        if len(set(labels)) < len(labels):
            return None
        known = [size_of(size) for size in shape]
        if any(sizes.setdefault(label, size) != size for label, size in zip(labels, known, strict=True)):
            return None
    return _Terms(operands, result) if sizes.keys() >= set(result) and len(set(result)) == len(result) else None


def _steps(terms: _Terms) -> list[_Step]:
    """Return the products from left to right."""
    steps, so_far = [], terms.operands[0]
    for k, labels in enumerate(terms.operands[1:], 1):
        later = {*terms.result, *(label for other in terms.operands[k + 1 :] for label in other)}
        shared = [label for label in so_far if label in labels]
        step = _Step(
            batch=tuple(label for label in shared if label in later),
            left=tuple(label for label in so_far if label not in labels and label in later),
            right=tuple(label for label in labels if label not in so_far and label in later),
            summed=tuple(label for label in shared if label not in later),
        )
        steps.append(step)
        so_far = step.result
    return steps


# ------------------------------------------------------------------------------------------------ nodes
class _WriteOut:
    """Writes one einsum out. The last product takes the place of the node, whose name costs find it by."""

    def __init__(self, node: fx.Node, constant: set[fx.Node]) -> None:
        self.node, self.make = node, before(node)
        self.constant = constant

    def run(self, terms: _Terms) -> None:
        """Replace the node."""
        node = self.node
        tensors, steps = list(bind(node)["tensors"]), _steps(terms)
        so_far, labels = tensors[0], terms.operands[0]
        for tensor, own, step in zip(tensors[1:-1], terms.operands[1:-1], steps[:-1], strict=True):
            so_far, labels = self._product(so_far, labels, tensor, own, step)
        last, swapped = self._operands(so_far, labels, tensors[-1], terms.operands[-1], steps[-1])
        target, operands, sizes = last
        users = list(node.users)
        become(node, target, *operands)
        self.make = after(node)
        found = self._permuted(self._parted(node, sizes), swapped.result, terms.result)
        if found is not node:
            node.meta[RESULT_OF], found.meta[RESULT_OF] = "", node.name
            redirect(users, node, found)

    def _product(
        self, a: fx.Node, of_a: tuple[str, ...], b: fx.Node, of_b: tuple[str, ...], step: _Step
    ) -> tuple[fx.Node, tuple[str, ...]]:
        (target, operands, sizes), swapped = self._operands(a, of_a, b, of_b, step)
        return self._parted(self._call(target, *operands), sizes), swapped.result

    def _operands(
        self, a: fx.Node, of_a: tuple[str, ...], b: fx.Node, of_b: tuple[str, ...], step: _Step
    ) -> tuple[tuple[Any, tuple[fx.Node, fx.Node], list[tuple[int, list[Any]]]], _Step]:
        """Return the op, its two operands and the dims of its result that several labels share; a constant stands on
        the right, where weights do."""
        if a in self.constant and b not in self.constant:
            a, of_a, b, of_b = b, of_b, a, of_a
            step = _Step(step.batch, step.right, step.left, step.summed)
        kept = (*step.batch, *step.left, *step.right, *step.summed)
        a, of_a = self._without(a, of_a, kept)
        b, of_b = self._without(b, of_b, kept)
        parts: list[tuple[int, list[Any]]] = []
        n = len(step.batch)
        if not step.batch and b in self.constant:
            x = self._merged(self._permuted(a, of_a, (*step.left, *step.summed)), len(step.left), len(step.summed))
            weight = self._merged(
                self._permuted(b, of_b, (*step.right, *step.summed)), len(step.right), len(step.summed)
            )
            weight = self._merged(weight, 0, len(step.right))
            if len(step.right) != 1:
                parts.append((len(step.left), [self._size(b, of_b, label) for label in step.right]))
            return (aten.linear.default, (x, weight), parts), step
        x = self._permuted(a, of_a, (*step.batch, *step.left, *step.summed))
        x = self._merged(self._merged(x, n + len(step.left), len(step.summed)), n, len(step.left))
        y = self._permuted(b, of_b, (*step.batch, *step.summed, *step.right))
        y = self._merged(self._merged(y, n + len(step.summed), len(step.right)), n, len(step.summed))
        if len(step.right) != 1:
            parts.append((n + 1, [self._size(b, of_b, label) for label in step.right]))
        if len(step.left) != 1:
            parts.append((n, [self._size(a, of_a, label) for label in step.left]))
        return (aten.matmul.default, (x, y), parts), step

    def _without(
        self, operand: fx.Node, labels: tuple[str, ...], kept: Sequence[str]
    ) -> tuple[fx.Node, tuple[str, ...]]:
        """Sum over the dims that nothing else has."""
        dims = [k for k, label in enumerate(labels) if label not in kept]
        if not dims:
            return operand, labels
        return self._call(aten.sum.dim_IntList, operand, dims), tuple(label for label in labels if label in kept)

    def _permuted(self, operand: fx.Node, labels: tuple[str, ...], wanted: tuple[str, ...]) -> fx.Node:
        order = [labels.index(label) for label in wanted]
        return operand if order == sorted(order) else self._call(aten.permute.default, operand, order)

    def _merged(self, operand: fx.Node, first: int, count: int) -> fx.Node:
        """Make one dim of `count` dims from `first` on; of none, a dim of 1."""
        if count == 0:
            return self._call(aten.unsqueeze.default, operand, first)
        return operand if count == 1 else self._call(aten.flatten.using_ints, operand, first, first + count - 1)

    def _parted(self, operand: fx.Node, sizes: Sequence[tuple[int, list[Any]]]) -> fx.Node:
        """Undo `_merged`, the last dim first."""
        for dim, parts in sizes:
            target, rest = (aten.unflatten.int, [parts]) if parts else (aten.squeeze.dim, [])
            operand = self._call(target, operand, dim, *rest)
        return operand

    def _size(self, operand: fx.Node, labels: tuple[str, ...], label: str) -> Any:
        """The length of a dim: a number, or a node for one that is dynamic."""
        dim = labels.index(label)
        size = value(operand).shape[dim]
        return size if isinstance(size, int) else self._call(aten.sym_size.int, operand, dim)

    def _call(self, target: Any, *arguments: Any) -> fx.Node:
        found = self.make(target, *arguments)
        if self.constant.issuperset(found.all_input_nodes):
            self.constant.add(found)
        return found
