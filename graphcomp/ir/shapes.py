"""Run a graph on fake tensors: what each node computes, without the work."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphcomp.ir.graph import all_tensors, example_size, value
from graphcomp.ir.run_nodes import Run, compute_node
from graphcomp.torch_compat import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

log = logging.getLogger("graphcomp.passes")

CPU, META = torch.device("cpu"), torch.device("meta")


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


def run_meta(module: fx.GraphModule) -> dict[fx.Node, Any] | None:
    """As `run_shapes`, in half of the time: on the meta device. None where the graph does not run there.

    Ops that read values do not, and devices are not compared: the graph must be on the CPU alone.
    """
    if any(tensor.device != CPU for _, tensor in all_tensors(module)):
        return None
    found: dict[fx.Node, Any] = {}
    try:
        with torch.no_grad():
            inputs = [_example_sized(value(n)) for n in module.graph.find_nodes(op="placeholder")]
            metas = [t(device=META) if callable(t) and not isinstance(t, Tensor) else t for t in inputs]
            Run(module, metas, _OnMeta()).finish(see=found.__setitem__)
    except Exception as error:  # whatever an op raises that has no kernel there; fake tensors then say what is wrong
        log.debug("%s on the meta device: %s", type(error).__name__, error)
        return None
    return found


class _OnMeta:
    """Computes nodes on tensors of the meta device in place of the tensors of the module, one for each."""

    def __init__(self) -> None:
        self.metas: dict[int, Tensor] = {}

    def __call__(self, module: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "call_module":
            called = module.get_submodule(str(node.target))
            tensors = {name: self._meta(t) for name, t in (*called.named_parameters(), *called.named_buffers())}
            return torch.func.functional_call(called, tensors, args, kwargs)
        here = {name: META if isinstance(given, torch.device) else given for name, given in kwargs.items()}
        found = compute_node(module, node, args, here)
        return self._meta(found) if node.op == "get_attr" and isinstance(found, Tensor) else found

    def _meta(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.metas:
            self.metas[id(tensor)] = _alike(tensor, META)
        return self.metas[id(tensor)]


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


def _alike(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A tensor of the same form; inside a fake mode a fake one, much quicker to make than by `from_tensor`."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or tensor.device)


def _example_sized(found: Any) -> Any:
    """An input to be made inside a fake mode, or a number."""
    if not isinstance(found, Tensor):
        return example_size(found) if isinstance(found, torch.SymInt) else found
    shape = [example_size(n) for n in found.shape]
    return functools.partial(torch.empty, shape, dtype=found.dtype, device=found.device)
