"""Run a graph on fake tensors: what each node computes, without the work."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
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
        Run(module, fakes, _StandIns(functools.partial(_faked, mode=mode))).finish(see=found.__setitem__)
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


class _StandIns:
    """Computes nodes on stand-ins for the tensors of the module, one for each.

    Args:
        make: from a tensor to the stand-in.
    """

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self.make = make
        self.made: dict[int, Tensor] = {}

    def __call__(self, module: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "call_module":
            called = module.get_submodule(str(node.target))
            tensors = {name: self._of(t) for name, t in (*called.named_parameters(), *called.named_buffers())}
            return torch.func.functional_call(called, tensors, args, kwargs)
        found = compute_node(module, node, args, kwargs)
        return self._of(found) if node.op == "get_attr" and isinstance(found, Tensor) else found

    def _of(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.made:
            self.made[id(tensor)] = self.make(tensor)
        return self.made[id(tensor)]


class _OnMeta(_StandIns):
    """Stand-ins on the meta device, where ops that make tensors make theirs, too."""

    def __init__(self) -> None:
        super().__init__(lambda tensor: _alike(tensor, META))

    def __call__(self, module: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op != "call_module":
            kwargs = {name: META if isinstance(given, torch.device) else given for name, given in kwargs.items()}
        return super().__call__(module, node, args, kwargs)


def _faked(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor in place of `tensor`, made inside `mode`."""
    plain = tensor.layout is torch.strided and not tensor.is_quantized
    return _alike(tensor) if plain else mode.from_tensor(tensor, static_shapes=True)


def _alike(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A tensor of the same form; inside a fake mode a fake one, much quicker to make than by `from_tensor`."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or tensor.device)


def _example_sized(found: Any) -> Any:
    """An input to be made inside a fake mode, or a number."""
    if not isinstance(found, Tensor):
        return example_size(found) if isinstance(found, torch.SymInt) else found
    shape = [example_size(n) for n in found.shape]
    return functools.partial(torch.empty, shape, dtype=found.dtype, device=found.device)
