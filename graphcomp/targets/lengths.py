"""Which dims of a file's inputs may have other lengths than the example inputs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim

from graphcomp.capture.resized import input_name
from graphcomp.errors import ExportError
from graphcomp.torch_compat import pytree

Names = Mapping[str, Mapping[int, str]]
"""Input -> dim -> what the length is called."""


@dataclass(frozen=True)
class Lengths:
    """Which lengths a program leaves open.

    Attributes:
        named: dims that must be open, with the names of their lengths in the file.
        captured: dims that capture left symbolic: the batch, and the sequence of token inputs.
        others: more dims by input, open as far as torch.export finds nothing that depends on their lengths.
        outputs: names of the open lengths of each output, in order.
    """

    named: Names = field(default_factory=dict)
    captured: bool = True
    others: Mapping[str, Sequence[int]] = field(default_factory=dict)
    outputs: Sequence[Mapping[int, str]] = ()

    def check(self, graph: fx.GraphModule) -> None:
        """Raise ExportError where a name or a dim is none of the graph's inputs."""
        tensors = {name: value.dim() for name, value in _tensor_inputs(graph)}
        for name, dims in self.named.items():
            if name not in tensors:
                near = difflib.get_close_matches(str(name), tensors, 1) or list(tensors)
                raise ExportError(
                    f"dynamic names {name!r}, which is no input of the model",
                    why=f"inputs: {', '.join(tensors)}",
                    fix=f'dynamic={{{near[0]!r}: {{{tensors[near[0]] - 1}: "width"}}}}',
                )
            for dim in dims:
                if not isinstance(dim, int) or not 0 <= dim < tensors[name]:
                    raise ExportError(
                        f"dynamic[{name!r}] must hold dims from 0 to {tensors[name] - 1}, got {dim!r}",
                        fix=f'dynamic={{{name!r}: {{{tensors[name] - 1}: "width"}}}}',
                    )

    def names_by_place(self, graph: fx.GraphModule) -> list[Mapping[int, str]]:
        """Return the named dims of each tensor input, in order."""
        return [self.named.get(name, {}) for name, _ in _tensor_inputs(graph)]

    def of(self, place: fx.Node, leaf: Any) -> dict[int, Any]:
        """Return the open dims of one input, as torch.export takes them."""
        held = place.meta.get("val")
        if not isinstance(leaf, Tensor) or not isinstance(held, Tensor):
            return {}
        symbolic = [dim for dim, size in enumerate(held.shape) if self.captured and type(size) is not int]
        found: dict[int, Any] = dict.fromkeys((*symbolic, *self.others.get(input_name(place), ())), Dim.AUTO)
        return found | dict.fromkeys(self.named.get(input_name(place), ()), Dim.DYNAMIC)


CAPTURED = Lengths()


def _tensor_inputs(graph: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    for place in graph.graph.find_nodes(op="placeholder"):
        if isinstance(held := place.meta.get("val"), Tensor):
            yield input_name(place), held


def doubled(shapes: Sequence[Sequence[Any]], args: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the example inputs with open lengths other than the batch twice as long, and what is open.

    Args:
        shapes: of each tensor input as the file says: words stand for open lengths.
        args: nested inputs, as many tensors as shapes.
    """
    leaves, spec = pytree.tree_flatten(args)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    batch = {shape[0] for shape in shapes if shape and isinstance(shape[0], str)}
    open_ = {
        size
        for shape, tensor in zip(shapes, tensors, strict=True)
        for size in shape[1:]
        if isinstance(size, str) and tensor.is_floating_point() and tensor.dim() > 2
    } - batch
    given = iter(shapes)
    longer = [_longer(leaf, next(given), open_) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(longer, spec), tuple(sorted(open_))


def _longer(tensor: Tensor, shape: Sequence[Any], open_: set[str]) -> Tensor:
    for dim, size in enumerate(shape):
        if size in open_:
            tensor = torch.cat([tensor, tensor], dim)
    return tensor
