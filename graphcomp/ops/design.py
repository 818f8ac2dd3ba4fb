"""A compute op as a product with matrices: which rows its weight is multiplied with, and where each result stands.

A linear layer multiplies every position with one matrix; a convolution every patch, with one matrix per group; a
product of batches one matrix per batch, such as that of each expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphcomp.coupling.notation import einsum_letters
from graphcomp.ir.graph import bind
from graphcomp.ops.answers import compute_of
from graphcomp.ops.facts import Compute, Routed
from graphcomp.ops.registry import facts_of

aten = torch.ops.aten


class Design(Protocol):
    """A compute op as `g` products of matrices: rows (g, r, n) with a weight (g, n, o)."""

    @property
    def products(self) -> int:
        """How many matrices there are, g."""

    def batched(self, x: Tensor) -> Tensor:
        """Return `x` with a batch in dim 0: one image is a batch of one."""

    def count(self, x: Tensor) -> int:
        """Return the number of rows r that `x` makes."""

    def rows(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Return the `chosen` rows (k,) int64 of `x`, (g, k, n)."""

    def results(self, y: Tensor, chosen: Tensor) -> Tensor:
        """Return the same rows of the result, (g, k, o)."""

    def samples(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Return the index in dim 0 of `x` that each row is of, (k,); the row itself where dim 0 counts matrices."""

    def matrices(self, weight: Tensor) -> Tensor:
        """Return a weight as (g, n, o)."""

    def weight(self, matrices: Tensor) -> Tensor:
        """Return (g, n, o) in the form of the weight."""


def design_of(node: fx.Node, data: str, weight: str, shapes: Mapping[str, Sequence[int]]) -> Design | None:
    """Return the products that an op is; None for an op that is none with this operand as its weight.

    Args:
        node: a compute op, or an einsum of two operands.
        data, weight: arguments that hold the two operands; of an einsum "0" and "1".
        shapes: of the two operands, by argument.
    """
    compute = compute_of(node)
    if node.target is aten.einsum.default:
        return _einsum(bind(node)["equation"], data, shapes)
    if isinstance(facts_of(node.target).integer, Routed):  # the rows of each matrix side by side, see `packed`
        batches, inputs, outputs = shapes[weight] if len(shapes[weight]) == 3 else (0, 0, 0)
        rows, matrices = (batches, 2, inputs), (batches, inputs, outputs)
        return _contraction([*"bri"], [*"bio"], [*"bro"], rows, matrices) if batches else None
    if compute is None:
        return None
    if compute.convolution:
        return convolution(node, compute, shapes[weight]) if weight == compute.weight else None
    return _product(node, compute, data, weight, shapes)


def packed(rows: Tensor, ends: Tensor) -> Tensor:
    """Return rows that are sorted by matrix as those of each matrix, zeros behind the last: (r, n) -> (g, most, n).

    Args:
        rows: those behind the last end belong to no matrix, and are left out.
        ends: (g,), where the rows of each matrix end.
    """
    ends = ends.to(torch.int64)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    found = rows.new_zeros(len(ends), max(1, int((ends - starts).max())), rows.shape[1])
    place = torch.arange(int(ends[-1]), device=rows.device)
    matrix = torch.searchsorted(ends, place, right=True)
    found[matrix, place - starts[matrix]] = rows[: len(place)]
    return found


# ------------------------------------------------------------------------------------------------ products
@dataclass(frozen=True)
class Contraction:
    """A product of two tensors, each dim under a label: y = Σ x w over the labels that y does not have.

    Attributes:
        x, w, y: labels of the dims of data, weight and result.
        sizes: length of each label of the weight; a dim of the data that is 1 there is broadcast.
        shape: of the weight, with dims of 1 that are broadcast and have no label.
    """

    x: tuple[str, ...]
    w: tuple[str, ...]
    y: tuple[str, ...]
    sizes: Mapping[str, int]
    shape: tuple[int, ...]

    @property
    def batch(self) -> tuple[str, ...]:
        """Labels of the matrices."""
        return tuple(label for label in self.w if label in self.x and label in self.y)

    @property
    def row(self) -> tuple[str, ...]:
        return tuple(label for label in self.x if label in self.y and label not in self.w)

    @property
    def summed(self) -> tuple[str, ...]:
        return tuple(label for label in self.w if label not in self.y)

    @property
    def out(self) -> tuple[str, ...]:
        return tuple(label for label in self.w if label not in self.x)

    @property
    def products(self) -> int:
        """See `Design`."""
        return torch.Size(self.sizes[label] for label in self.batch).numel()

    def batched(self, x: Tensor) -> Tensor:
        """See `Design`."""
        return x

    def count(self, x: Tensor) -> int:
        """See `Design`."""
        return self._lengths(x).numel()

    def rows(self, x: Tensor, chosen: Tensor) -> Tensor:
        """See `Design`."""
        x = x.expand([self.sizes.get(label, n) for label, n in zip(self.x, x.shape, strict=True)])
        return self._flat(x, self.x, (self.row, self.batch, self.summed))[chosen].transpose(0, 1)

    def results(self, y: Tensor, chosen: Tensor) -> Tensor:
        """See `Design`."""
        return self._flat(y, self.y, (self.row, self.batch, self.out))[chosen].transpose(0, 1)

    def samples(self, x: Tensor, chosen: Tensor) -> Tensor:
        """See `Design`."""
        if self.x[0] not in self.row:
            return chosen
        lengths = self._lengths(x)
        return torch.unravel_index(chosen, lengths)[self.row.index(self.x[0])]

    def matrices(self, weight: Tensor) -> Tensor:
        """See `Design`."""
        weight = weight.reshape([self.sizes[label] for label in self.w])
        return self._flat(weight, self.w, (self.batch, self.summed, self.out))

    def weight(self, matrices: Tensor) -> Tensor:
        """See `Design`."""
        order = (*self.batch, *self.summed, *self.out)
        found = matrices.reshape([self.sizes[label] for label in order])
        return found.permute([order.index(label) for label in self.w]).reshape(self.shape)

    def _lengths(self, x: Tensor) -> torch.Size:
        return torch.Size(x.shape[self.x.index(label)] for label in self.row)

    def _flat(self, tensor: Tensor, labels: Sequence[str], parts: Sequence[tuple[str, ...]]) -> Tensor:
        """Return `tensor` with the dims of each part in one dim."""
        moved = tensor.permute([labels.index(label) for part in parts for label in part])
        lengths = [torch.Size(tensor.shape[labels.index(label)] for label in part).numel() for part in parts]
        return moved.reshape(lengths)


def _product(
    node: fx.Node, compute: Compute, data: str, weight: str, shapes: Mapping[str, Sequence[int]]
) -> Design | None:
    """Return a linear layer or a product of (batches of) matrices."""
    x, w = shapes[data], shapes[weight]
    if node.target is aten.linear.default:
        return _contraction([*_dims("r", len(x) - 1), "i"], ["o", "i"], [*_dims("r", len(x) - 1), "o"], x, w)
    left = data == compute.data[0]
    first, second = (x, w) if left else (w, x)
    if len(first) == 1 or len(second) == 1:
        return None
    batches = _dims("b", max(len(first), len(second)) - 2)
    one = [*_of_last(batches, len(first) - 2), "i", "k"]
    other = [*_of_last(batches, len(second) - 2), "k", "j"]
    result = [*batches, "i", "j"]
    return _contraction(*((one, other) if left else (other, one)), result, x, w)


def _einsum(equation: str, data: str, shapes: Mapping[str, Sequence[int]]) -> Design | None:
    (x, w), y = einsum_letters(equation, [len(shapes[str(k)]) for k in range(2)])
    if data == "1":
        x, w = w, x
    return _contraction([*x], [*w], [*y], shapes[data], shapes["1" if data == "0" else "0"])


def _contraction(
    x: list[str], w: list[str], y: list[str], x_shape: Sequence[int], w_shape: Sequence[int]
) -> Design | None:
    """Return the product, unless a label stands twice in a tensor, or is of one operand alone."""
    lengths = dict(zip(x, x_shape, strict=True))
    sizes = {label: n for label, n in zip(w, w_shape, strict=True) if n > 1 or lengths.get(label, 1) == 1}
    labels = tuple(label for label in w if label in sizes)
    alone = ({*x} - {*w, *y}) | ({*w} - {*x, *y}) | ({*y} - {*x, *w})
    twice = any(len(set(found)) < len(found) for found in (x, w, y))
    if alone or twice or not set(labels) - set(y):
        return None
    return Contraction(tuple(x), labels, tuple(y), sizes, tuple(w_shape))


def _dims(name: str, count: int) -> list[str]:
    return [f"{name}{k}" for k in range(count)]


def _of_last(labels: list[str], count: int) -> list[str]:
    return labels[len(labels) - count :]


# ------------------------------------------------------------------------------------------------ convolutions
@dataclass(frozen=True)
class Patches:
    """A convolution: each patch of the input times the filters of its group.

    Attributes:
        shape: of the weight.
        groups: number of groups.
        stride, dilation: per dim of space.
        padding: (before, after) per dim of space.
        stuffing: zeros between the elements of the input, plus 1, per dim of space; a transposed convolution is a
            convolution with stride 1 over such an input.
        transposed: whether the weight is (i, o / groups, *kernel), and taps run from the last.
    """

    shape: tuple[int, ...]
    groups: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    stuffing: tuple[int, ...]
    transposed: bool

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    @property
    def products(self) -> int:
        """See `Design`."""
        return self.groups

    def count(self, x: Tensor) -> int:
        """See `Design`."""
        return self._lengths(x).numel()

    def rows(self, x: Tensor, chosen: Tensor) -> Tensor:
        """See `Design`."""
        patches = self.patches(x)
        at = torch.unravel_index(chosen, self._lengths(x))
        found = patches.movedim(1, 1 + len(self.kernel))[at]  # (k, c, *kernel)
        if self.transposed:
            found = found.flip(list(range(2, found.dim())))
        width = found.shape[1:].numel() // self.groups  # none may be chosen
        return found.reshape(len(chosen), self.groups, width).transpose(0, 1)

    def results(self, y: Tensor, chosen: Tensor) -> Tensor:
        """See `Design`."""
        y = self.batched(y).movedim(1, -1)
        at = torch.unravel_index(chosen, y.shape[:-1])
        return y[at].reshape(len(chosen), self.groups, y.shape[-1] // self.groups).transpose(0, 1)

    def samples(self, x: Tensor, chosen: Tensor) -> Tensor:
        """See `Design`."""
        return torch.unravel_index(chosen, self._lengths(x))[0]

    def matrices(self, weight: Tensor) -> Tensor:
        """See `Design`."""
        if self.transposed:  # (i, o / g, *kernel)
            per_group = weight.reshape(self.groups, -1, *weight.shape[1:]).transpose(1, 2)
            return per_group.flatten(2).mT  # (g, o / g, i / g * taps) turned
        return weight.reshape(self.groups, -1, weight[0].numel()).mT

    def weight(self, matrices: Tensor) -> Tensor:
        """See `Design`."""
        if self.transposed:
            inputs, outputs, *kernel = self.shape
            per_group = matrices.mT.reshape(self.groups, outputs, inputs // self.groups, *kernel)
            return per_group.transpose(1, 2).reshape(self.shape)
        return matrices.mT.reshape(self.shape)

    def batched(self, x: Tensor) -> Tensor:
        """See `Design`."""
        return x if x.dim() == len(self.kernel) + 2 else x[None]

    def _lengths(self, x: Tensor) -> torch.Size:
        x = self.batched(x)
        per_dim = zip(x.shape[2:], self.stuffing, self.padding, self.kernel, self.dilation, self.stride, strict=True)
        reach = [((n - 1) * f + 1 + sum(ends) - (k - 1) * d - 1) // s + 1 for n, f, ends, k, d, s in per_dim]
        return torch.Size([len(x), *reach])

    def patches(self, x: Tensor) -> Tensor:
        """Return a view (n, c, *positions, *kernel) of the padded input."""
        x = self.batched(x)
        if any(step > 1 for step in self.stuffing):
            space = [(length - 1) * step + 1 for length, step in zip(x.shape[2:], self.stuffing, strict=True)]
            wide = x.new_zeros(*x.shape[:2], *space)
            wide[(slice(None), slice(None), *(slice(None, None, step) for step in self.stuffing))] = x
            x = wide
        x = F.pad(x, [n for ends in reversed(self.padding) for n in ends])
        for dim, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(dim, (k - 1) * d + 1, s)[..., ::d]
        return x


def convolution(node: fx.Node, compute: Compute, shape: Sequence[int]) -> Patches:
    """Return the patches of a convolution, transposed or not, with a weight of `shape`."""
    arguments = bind(node)
    kernel = tuple(shape[2:])
    space = len(kernel)
    stride, dilation = (_per_dim(arguments[name], space) for name in ("stride", "dilation"))
    ones = (1,) * space
    if not compute.transposed:
        padding = _padding(arguments["padding"], kernel, dilation)
        return Patches(tuple(shape), arguments["groups"], stride, dilation, padding, ones, False)
    before, extra = (_per_dim(arguments[name], space) for name in ("padding", "output_padding"))
    ends = [(d * (k - 1) - p, d * (k - 1) - p + e) for d, k, p, e in zip(dilation, kernel, before, extra, strict=True)]
    return Patches(tuple(shape), arguments["groups"], ones, dilation, tuple(ends), stride, True)


def _per_dim(found: Any, space: int) -> tuple[int, ...]:
    numbers = [found] if isinstance(found, int) else list(found)
    return tuple(numbers * space if len(numbers) == 1 else numbers)


def _padding(found: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return (before, after) per dim of space."""
    if not isinstance(found, str):
        return tuple((p, p) for p in _per_dim(found, len(kernel)))
    totals = [d * (k - 1) if found == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)
