"""Run a graph on fake tensors: what each node computes, without the work."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphcomp.ir.graph import example_size, value
from graphcomp.ir.run_nodes import Run, compute_node
from graphcomp.torch_compat import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode


def run_shapes(module: fx.GraphModule) -> dict[fx.Node, Any]:
    """What every node computes, as fake tensors, for inputs of the example's size.

    Dynamic lengths take the example's value: over symbols every op is many times slower. Lengths that depend on data
    become symbols of a shape environment made for this run alone: the graph's own would specialise its symbols to
    what this run meets, and everything read off them later with it.

    Raises:
        Whatever the op raises whose operands do not fit, with a note that `failed_at` reads.
    """
    inputs = [_example_sized(value(n)) for n in module.graph.find_nodes(op="placeholder")]
    try:
        return run_fake(module, FakeTensorMode(), inputs)
    except (DynamicOutputShapeException, DataDependentOutputException):
        return run_fake(module, FakeTensorMode(shape_env=ShapeEnv()), inputs)


def run_fake(module: fx.GraphModule, mode: FakeTensorMode, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """What every node computes from `inputs`, fake tensors of `mode` or numbers.

    Raises:
        Whatever the op raises whose operands do not fit, with a note that `failed_at` reads.
    """
    found: dict[fx.Node, Any] = {}
    with mode, torch.no_grad():
        fakes = [t() if callable(t) and not isinstance(t, Tensor) else t for t in inputs]
        Run(module, fakes, _OnFakes(mode)).finish(see=found.__setitem__)
    return found


class _OnFakes:
    """Computes nodes on fake tensors in place of the tensors of the module, one for each."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.fakes: dict[int, Tensor] = {}

    def __call__(self, module: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "call_module":
            called = module.get_submodule(str(node.target))
            tensors = {name: self._fake(t) for name, t in (*called.named_parameters(), *called.named_buffers())}
            return torch.func.functional_call(called, tensors, args, kwargs)
        found = compute_node(module, node, args, kwargs)
        return self._fake(found) if node.op == "get_attr" and isinstance(found, Tensor) else found

    def _fake(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.fakes:
            plain = tensor.layout is torch.strided and not tensor.is_quantized
            self.fakes[id(tensor)] = _alike(tensor) if plain else self.mode.from_tensor(tensor, static_shapes=True)
        return self.fakes[id(tensor)]


def _alike(tensor: Tensor) -> Tensor:
    """A fake tensor of the same form, inside a fake mode; much quicker to make than by `from_tensor`."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _example_sized(found: Any) -> Any:
    """An input to be made inside a fake mode, or a number."""
    if not isinstance(found, Tensor):
        return example_size(found) if isinstance(found, torch.SymInt) else found
    shape = [example_size(n) for n in found.shape]
    return functools.partial(torch.empty, shape, dtype=found.dtype, device=found.device)
