"""Run a model without leaving a trace on it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from graphcomp.ir.graph import assign, bind, fetch
from graphcomp.ir.inputs import copies
from graphcomp.ir.module import set_mode, tensor_leaves, tensor_names
from graphcomp.ir.module_copy import module_copy, own_memory
from graphcomp.system.threads import LOCK
from graphcomp.torch_compat import OpOverload, TorchDispatchMode, pytree, schema_of, storage_key


@contextmanager
def eval_copy(model: nn.Module, *, real: bool) -> Iterator[nn.Module]:
    """Yield a copy of `model` in eval mode to run; put the random state back afterwards.

    The model itself is never touched, so that other threads may use it meanwhile. The flags of the copy are set
    directly, as a model's own `eval()` may do more than that. Parameters are shared.

    Args:
        model: any module.
        real: whether the copy runs on real data (rather than on fake tensors): then it has buffers, and other tensors
            that are no parameters, of its own, as the forward may write into them.
    """
    copied = module_copy(model, own_memory(list(tensor_names(model).values())) if real else None)
    for module in copied.modules():
        set_mode(module, False)
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with LOCK, torch.random.fork_rng(devices=cuda):
        yield copied


@contextmanager
def same_buffers(graph: fx.GraphModule) -> Iterator[None]:
    """Give `graph` copies of its buffers inside, if some op writes into a tensor that it is given."""
    before = dict(graph.named_buffers(remove_duplicate=False)) if writes(graph) else {}
    copies = {id(buffer): buffer.detach().clone() for buffer in before.values()}
    for name, buffer in before.items():
        assign(graph, name, copies[id(buffer)])
    try:
        yield
    finally:
        for name, buffer in before.items():
            assign(graph, name, buffer)


def own_inputs(graph: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Return flat inputs for one run of `graph`: copies where some op writes into a tensor, else `inputs`."""
    return copies(list(inputs)) if writes(graph) else list(inputs)


class ParameterWritten(Exception):
    """A forward writes into a parameter of its model. `name`: of the parameter."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the forward writes into the parameter '{name}'")
        self.name = name


class HoldParameters(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises ParameterWritten before an op writes into a parameter of `model`, or at the end where the forward gave one
    other data, which are put back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        strided = [(n, p) for n, p in model.named_parameters() if p.layout is torch.strided and not p.is_meta]
        self._names = {storage_key(p.untyped_storage()): name for name, p in strided}
        # storages, as `p.data` would be an op that other modes hear of
        self._held = [(n, p, p.untyped_storage(), (p.storage_offset(), p.shape, p.stride())) for n, p in strided]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        given = [held for held in self._held if storage_key(held[1].untyped_storage()) != storage_key(held[2])]
        for _, parameter, storage, window in given:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=storage.device).set_(storage, *window)
        if given and error[0] is None:
            raise ParameterWritten(given[0][0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if schema_of(func).is_mutable:
            arguments = dict(zip((a.name for a in schema_of(func).arguments), args, strict=False)) | (kwargs or {})
            for tensor in tensor_leaves([arguments.get(name) for name in written_arguments(func)]):
                if tensor.layout is torch.strided and not tensor.is_meta:
                    name = self._names.get(storage_key(tensor.untyped_storage()))
                    if name is not None:
                        raise ParameterWritten(name)
        return func(*args, **(kwargs or {}))


def written_arguments(op: OpOverload) -> list[str]:
    """Return the names of the arguments that an op writes into."""
    return [a.name for a in schema_of(op).arguments if a.alias_info is not None and a.alias_info.is_write]


def written_parameters(graph: fx.GraphModule) -> Iterator[tuple[str, fx.Node]]:
    """Yield each parameter that an op writes into, itself or a view, with the op."""
    for node in graph.graph.nodes:
        if not isinstance(node.target, OpOverload) or not schema_of(node.target).is_mutable:
            continue
        bound = bind(node)
        for operand in pytree.tree_leaves([bound.get(name) for name in written_arguments(node.target)]):
            source = _memory_of(operand)
            if source is not None and isinstance(fetch(graph, str(source.target)), nn.Parameter):
                yield str(source.target), node


def _memory_of(node: Any) -> fx.Node | None:
    """Return the get_attr node whose memory the value of `node` is, or a view of; None for other memory."""
    while isinstance(node, fx.Node) and node.op != "get_attr":
        is_view = isinstance(node.target, OpOverload) and any(r.alias_info for r in schema_of(node.target).returns)
        if node.target is not operator.getitem and not is_view:
            return None
        node = node.args[0] if node.args else None
    return node if isinstance(node, fx.Node) else None


def writes(graph: fx.GraphModule) -> bool:
    """Whether some op writes into a tensor that it is given."""
    nodes = (node for part in graph.modules() if isinstance(part, fx.GraphModule) for node in part.graph.nodes)
    return any(isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable for node in nodes)
