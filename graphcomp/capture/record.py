"""Record a model op by op while it runs.

What torch.export refuses, because a branch or a shape depends on data, still runs. A dispatch mode writes down every
ATen op of one real forward pass as an fx node. The graph holds for the path that this run took and for its shapes:
good for analysis and for cutting the model's own tensors, not for training.
"""

from __future__ import annotations

import inspect
import linecache
import operator
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

import graphcomp
from graphcomp.errors import CaptureError
from graphcomp.ir.calling import calling_convention
from graphcomp.ir.graph import frame_text
from graphcomp.ir.module import canonical_names, leaf_names, tensor_names
from graphcomp.numerics.chance import drawing_nothing
from graphcomp.system.files import folder_of
from graphcomp.torch_compat import FakeTensorMode, TorchDispatchMode, pytree, schema_of, storage_key

aten = torch.ops.aten

READS = frozenset({aten._local_scalar_dense.default, aten.equal.default})
"""Ops that hand numbers to Python: their nodes stay, without users, as the path hangs on them."""

WINDOWS = frozenset({aten.set_.source_Storage, aten.set_.source_Storage_storage_offset})
"""Ops that point a tensor at other memory; they compute nothing."""

WRITABLE = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.SymInt)
"""Types of arguments that the code of a graph can hold."""

ModuleStack = dict[str, tuple[str, str]]
OP_SITE = "op_site"  # node.meta: the OpSite of a recorded op, before canonical.py rewrites it
TORCH_LAYERS = folder_of(nn)
STDLIB, INSTALLED = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
SKIPPED_FRAMES = (folder_of(torch), folder_of(graphcomp), "<")


@dataclass(frozen=True)
class Recording:
    """A graph, the tensors and other objects its get_attr nodes stand for, and a name per tensor output."""

    graph: fx.Graph
    tensors: dict[str, Any]
    output_names: tuple[str, ...]


def record(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, certain: bool = False) -> Recording:
    """Run `model` once, without gradients, and write down every op.

    Args:
        model: in the mode it is to be recorded in.
        args, kwargs: example inputs. An in-place op of the model on an input happens to the caller's tensor.
        certain: write down what stands for a random op where random ops are made certain, as masks of dropout of ones.

    Returns:
        placeholder nodes for the leaves of the inputs, get_attr nodes under the model's own names (constants made
        on the way are `_lifted_tensor_constant0`, …), call_function nodes on OpOverloads with `val`, `stack_trace`
        and `nn_module_stack`, one output. Numbers that the model read from tensors are constants in it.

    Raises:
        CaptureError: a tensor of the model comes from memory that no op wrote.
        Whatever the model raises on these inputs.
    """
    recorder = Recorder(model)
    in_leaves, in_spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    names = argument_names(model, args, kwargs)
    for name, leaf in zip(leaf_names(in_spec), in_leaves, strict=True):
        recorder.add_input(_input_name(name, names), leaf)
    with op_by_op(), recorder.sites.following(), recorder, drawing_nothing() if certain else nullcontext():
        outputs = model(*args, **kwargs)
    output_names, out_spec = recorder.add_outputs(outputs)
    # a model without inputs in its graph would need no calling convention, but it keeps one, as export does
    recorder.graph.set_codegen(calling_convention(names, in_spec, out_spec))
    recorder.graph.lint()
    return Recording(recorder.graph, recorder.tensors, output_names)


class OpSite(NamedTuple):
    """An op of a run by where it stands in the model: the `number`-th call of `op` by the module at `path` itself.

    It names the same op in another run of the model, even if that takes another path in some other module.
    """

    path: str
    op: Any
    number: int


class OpSites:
    """Knows at each op of a run which modules are running, and the op's site."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: ModuleStack = {}
        self._paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
        self._stack: list[tuple[str, tuple[str, str]]] = []
        self._seen: Counter[tuple[str, Any]] = Counter()

    def next(self, op: Any) -> OpSite:
        """The site of `op`, which is called now."""
        path = self._stack[-1][1][0] if self._stack else ""
        self._seen[path, op] += 1
        return OpSite(path, op, self._seen[path, op] - 1)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the modules of the run inside. Hooks are global, so the model's own stay as they are."""
        hooks = (
            register_module_forward_pre_hook(lambda module, _inputs: self._enter(module)),
            register_module_forward_hook(lambda module, _inputs, _outputs: self._leave(module)),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module) -> None:
        path = self._paths.get(id(module))
        if path is not None:
            kind = type(module)
            self._stack.append((f"L__self__{path}", (path, f"{kind.__module__}.{kind.__qualname__}")))
            self.modules = dict(self._stack)

    def _leave(self, module: nn.Module) -> None:
        if id(module) in self._paths and self._stack:
            self._stack.pop()
            self.modules = dict(self._stack)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Turns dispatched ops into fx nodes.

    A tensor is known by its identity, or else by the memory it is a window on: `x.data` and tensors that C++ made
    behind the dispatcher's back read the value whose storage they share.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.tensors: dict[str, Any] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._nodes: Any = WeakIdKeyDictionary()
        self._memory: dict[int, _Memory] = {}
        self._objects: dict[int, str] = {}
        self._names = canonical_names(model)
        self._held = tensor_names(model)
        self.sites = OpSites(model)
        for tensor in self._held.values():
            self._remember_memory(tensor, node=None)

    # ------------------------------------------------------------------------------------------ the dispatch mode
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WINDOWS:
            return self._move(func, args, kwargs)
        site = self.sites.next(func)
        operands = pytree.tree_map_only(torch.Tensor, self.node_of, (args, kwargs))
        result = func(*args, **kwargs)
        if func in READS or any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(result)):
            node_args, node_kwargs = pytree.tree_map(self._argument, operands)
            # torch.tensor(...): the value is fresh memory, so it must not share that of the constant
            target = aten.clone.default if func is aten.lift_fresh.default else func
            name = schema_of(target).name.rpartition("::")[2]
            node = self.graph.create_node("call_function", target, tuple(node_args), dict(node_kwargs), name)
            self._describe(node, result)
            self._bind(node, result)
            node.meta[OP_SITE] = site
        return result

    def _argument(self, leaf: Any) -> Any:
        """An argument as a graph can hold it: what no code can write down becomes a get_attr."""
        if isinstance(leaf, torch.Generator):
            return None
        if leaf is None or isinstance(leaf, (*WRITABLE, fx.Node)):
            return leaf
        name = self._objects.setdefault(id(leaf), f"_object{len(self._objects)}")
        self.tensors[name] = leaf
        node = self.graph.get_attr(name)
        node.meta["val"] = leaf
        return node

    def _move(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make a tensor a window on the memory of another one, as `copy.copy(tensor)` does."""
        result = func(*args, **kwargs)
        if self._memory_of(result) is None:
            raise CaptureError(
                "a tensor is made of memory that no op wrote",
                at=frame_text(user_frame()),
                why="a copy of the bytes alone does not say of what values they are",
                fix="tensor.clone() in place of copy.deepcopy(tensor)",
            )
        self._nodes.pop(result, None)
        return result

    def _bind(self, node: fx.Node, result: Any) -> None:
        """Let the tensors of `result` be known as `node`, or as its items."""
        if isinstance(result, torch.Tensor):
            self._nodes[result] = node
            self._remember_memory(result, node)
            return
        for index, item in enumerate(result if isinstance(result, (list, tuple)) else ()):
            if item is None or not pytree.tree_leaves(item):
                continue
            part = self.graph.call_function(operator.getitem, (node, index))
            part.meta = dict(node.meta)
            part.meta["val"] = node.meta["val"][index]
            self._bind(part, item)

    def _describe(self, node: fx.Node, result: Any) -> None:
        node.meta["val"] = pytree.tree_map_only(torch.Tensor, self._value, result)
        node.meta["stack_trace"] = user_frame()
        node.meta["nn_module_stack"] = self.sites.modules

    # ------------------------------------------------------------------------------------------ tensors and nodes
    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The node whose value `tensor` is; what is seen for the first time becomes a get_attr."""
        known = self._nodes.get(tensor)
        if known is not None:
            return known  # type: ignore[no-any-return]
        name = self._names.get(id(tensor))
        if name is not None:
            return self._attribute(name, tensor)
        memory = self._memory_of(tensor)
        if memory is not None:
            return self._window(tensor, memory)
        # a copy, as the model may go on to write into the original
        node = self._attribute(f"_lifted_tensor_constant{len(self.tensors)}", tensor.detach().clone())
        self._nodes[tensor] = node
        return node

    def _attribute(self, name: str, tensor: torch.Tensor) -> fx.Node:
        self.tensors[name] = tensor
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = self._value(tensor)
        self._nodes[tensor] = node
        self._remember_memory(tensor, node)
        return node

    def _window(self, tensor: torch.Tensor, memory: _Memory) -> fx.Node:
        """A tensor nobody dispatched, on memory that is known: the same value, or a strided window on it."""
        source = memory.node or self._attribute(memory.name, memory.tensor())
        if memory.geometry == _geometry(tensor):
            return source
        node = self.graph.call_function(
            aten.as_strided.default,
            (source, list(tensor.shape), list(tensor.stride()), tensor.storage_offset()),
        )
        self._describe(node, tensor)
        self._nodes[tensor] = node
        return node

    def _memory_of(self, tensor: torch.Tensor) -> _Memory | None:
        if tensor.layout is not torch.strided:
            return None
        memory = self._memory.get(storage_key(tensor.untyped_storage()))
        return memory if memory is not None and memory.alive() else None

    def _remember_memory(self, tensor: torch.Tensor, node: fx.Node | None) -> None:
        """Note which node stands for a piece of memory: the first to fill it, then whoever rewrites all of it."""
        if tensor.layout is not torch.strided:
            return
        memory = self._memory_of(tensor)
        if memory is None:
            storage = tensor.untyped_storage()
            name = self._names.get(id(tensor), "")
            held = self._held.get(name)
            weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._memory[storage_key(storage)] = _Memory(weak, _geometry(tensor), node, name, held, None)
        elif node is not None and memory.geometry == _geometry(tensor):
            memory.node = node

    def _value(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor like `tensor`; two that share memory have fakes that share memory."""
        if tensor.layout is not torch.strided:
            with self._fake:
                return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        memory = self._memory_of(tensor)
        with self._fake:
            if memory is None or memory.fake is None:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            else:
                fake = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                fake.set_(memory.fake.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if memory is None:
            self._remember_memory(tensor, node=None)
            memory = self._memory_of(tensor)
        if memory is not None and memory.fake is None:
            memory.fake = fake
        return fake

    # ------------------------------------------------------------------------------------------ inputs and outputs
    def add_input(self, name: str, leaf: Any) -> None:
        """A placeholder; those of leaves that are not tensors have no users and keep the value in `val`."""
        node = self.graph.placeholder(name)
        node.meta["val"] = self._value(leaf) if isinstance(leaf, torch.Tensor) else leaf
        if isinstance(leaf, torch.Tensor):
            self._nodes[leaf] = node
            self._remember_memory(leaf, node)

    def add_outputs(self, outputs: Any) -> tuple[tuple[str, ...], pytree.TreeSpec]:
        """The output node; values in containers unknown to pytree are returned as a flat tuple of their tensors."""
        leaves, spec = pytree.tree_flatten(outputs)
        names = leaf_names(spec)
        if not all(leaf is None or isinstance(leaf, (torch.Tensor, bool, int, float, str)) for leaf in leaves):
            found = dict(named_tensors(outputs, ""))
            names, leaves = list(found), list(found.values())
            spec = pytree.tree_structure(tuple(leaves))
        results = tuple(self.node_of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        self.graph.output(results)
        return tuple(n for n, leaf in zip(names, leaves, strict=True) if isinstance(leaf, torch.Tensor)), spec


@dataclass
class _Memory:
    """A live storage: who stands for it, and in which window."""

    storage: StorageWeakRef
    geometry: tuple[Any, ...]
    node: fx.Node | None
    name: str
    held: torch.Tensor | None
    fake: torch.Tensor | None

    def alive(self) -> bool:
        """False once the memory was freed (and its address may stand for other memory)."""
        return not self.storage.expired()  # type: ignore[no-untyped-call]

    def tensor(self) -> torch.Tensor:
        """The model's tensor on this storage; only asked for where no node has read it yet."""
        assert self.held is not None, "memory that no node filled and the model does not hold"
        return self.held


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset()


@contextmanager
def op_by_op() -> Iterator[None]:
    """No gradients, and torch's encoder layers do not run as one opaque op, which they else do in eval mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def argument_names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Names of the arguments of the recorded forward: the model's own for positional ones, where it has them."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    positional = own[: len(args)] + [f"arg_{i}" for i in range(len(own), len(args))]
    return positional + list(kwargs)


def _input_name(leaf: str, names: list[str]) -> str:
    """ "0.2.1" (leaf 1 of argument 2) -> "image_1" ; "1.mask" -> "mask"."""
    where, _, rest = leaf.partition(".")
    if where == "0" and rest:
        position, _, inner = rest.partition(".")
        rest = f"{names[int(position)]}.{inner}" if inner else names[int(position)]
    return rest.replace(".", "_") or "input"


def named_tensors(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a nested value of any kind: containers, dataclasses, plain objects; eight levels deep."""
    if isinstance(value, torch.Tensor):
        yield name or "0", value
    elif depth < 8:
        for key, child in _children(value):
            yield from named_tensors(child, f"{name}.{key}" if name else str(key), depth + 1)


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return list(vars(value).items()) if hasattr(value, "__dict__") and not isinstance(value, type) else []


# ---------------------------------------------------------------------------------------------- source lines
def user_frame() -> str:
    """The innermost frame outside torch, written as in a traceback (and as torch.fx writes `stack_trace`).

    A model made of nothing but torch's modules has no such frame; the layer's own forward stands in.
    """
    frame = sys._getframe(2)
    layer = ""
    while frame.f_code is not record.__code__ and frame.f_back is not None:
        if not _skipped(frame.f_code):
            return _line(frame.f_code, frame.f_lineno)
        if not layer and frame.f_code.co_filename.startswith(TORCH_LAYERS) and frame.f_code.co_name == "forward":
            layer = _line(frame.f_code, frame.f_lineno)
        frame = frame.f_back
    return layer


@lru_cache(maxsize=4096)
def _skipped(code: CodeType) -> bool:
    file = code.co_filename
    # the standard library's folder holds site-packages, where models may well live
    return file.startswith(SKIPPED_FRAMES) or (file.startswith(STDLIB) and not file.startswith(INSTALLED))


@lru_cache(maxsize=4096)
def _line(code: CodeType, number: int) -> str:
    text = linecache.getline(code.co_filename, number).strip()
    return f'File "{code.co_filename}", line {number}, in {code.co_name}\n    {text}'
