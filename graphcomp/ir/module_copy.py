"""Copies of a model for runs that must leave no trace on it.

The tree of modules, their attributes and the containers in these are copied; so are functions, bound methods and plain
objects that lead to a module of the tree. All other objects are shared.
"""

from __future__ import annotations

import copy
import functools
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.torch_compat import MODULE_TABLES, storage_key

MAPPINGS = (dict, OrderedDict, defaultdict)
OBJECT_DEPTH = 3
"""Levels of plain objects, one inside the other, that modules are looked for in."""


def module_copy(
    model: nn.Module, tensor: Callable[[Tensor], Tensor] | None = None, *, share_graphs: bool = False
) -> nn.Module:
    """Return a copy of the module tree, which works where `copy.deepcopy` refuses locks, files or computed tensors.

    Args:
        model: not modified.
        tensor: returns what the copy holds in place of a tensor; called once for each. None: the copy shares all.
        share_graphs: the copies of captured graphs share these, and follow the mode of one another.
    """
    copied: nn.Module = _Copy(model, tensor or (lambda t: t), share_graphs).value(model)
    return copied


def own_memory(tensors: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that clones tensors, but for parameters and views of these.

    Clones share memory exactly where the tensors do.

    Args:
        tensors: what the model holds.
    """
    parameters = {_memory(t) for t in tensors if isinstance(t, nn.Parameter)} - {None}
    storages: dict[int, torch.UntypedStorage] = {}

    def own(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            return tensor
        key = _memory(tensor)
        if key in parameters:
            return tensor
        wants_grad = tensor.is_leaf and tensor.requires_grad
        if key is None:
            return tensor.detach().clone().requires_grad_(wants_grad)
        if key not in storages:
            storages[key] = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
        fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        fresh.set_(storages[key], tensor.storage_offset(), tensor.shape, tensor.stride())
        return fresh.requires_grad_(wants_grad)

    return own


def _memory(tensor: Tensor) -> int | None:
    """A key of the memory that a plain strided tensor is a window on; None for other tensors."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return None
    if tensor.is_meta or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return None
    return storage_key(tensor.untyped_storage())


class _Copy:
    """Copies values; the same value twice is one copy."""

    def __init__(self, model: nn.Module, tensor: Callable[[Tensor], Tensor], share_graphs: bool) -> None:
        self.tensor, self.share_graphs = tensor, share_graphs
        self.tree = {id(module) for module in model.modules()}
        self.memo: dict[int, Any] = {}
        self.alive: list[Any] = []  # an id belongs to a value as long as the value lives
        self.depth = 0

    def value(self, value: Any) -> Any:
        """Return the copy of any value, or the value itself."""
        if id(value) in self.memo:
            return self.memo[id(value)]
        maker = self._maker(value)
        if maker is None:
            return value
        self.alive.append(value)
        found = maker(value)
        self.memo[id(value)] = found
        return found

    def _maker(self, value: Any) -> Callable[[Any], Any] | None:
        kind = type(value)
        if issubclass(kind, Tensor):
            return self.tensor
        if issubclass(kind, nn.Module):
            # a ScriptModule is an object of C++, whose shallow copy shares the tensors
            return copy.copy if issubclass(kind, torch.jit.ScriptModule) else self._module
        if kind in MAPPINGS:
            return self._mapping
        if kind in (list, deque):
            return self._list
        if issubclass(kind, tuple) or kind in (set, frozenset):
            return self._frozen
        makers: dict[type, Callable[[Any], Any]] = {
            types.MethodType: self._method,
            types.FunctionType: self._function,
            types.CellType: self._cell,
            functools.partial: self._partial,
            weakref.ReferenceType: self._reference,
        }
        if kind in makers:
            return makers[kind]
        return self._object if _is_plain_object(value) and self.depth < OBJECT_DEPTH else None

    def _module(self, module: nn.Module) -> nn.Module:
        follows = not self.share_graphs and _ops_follow_the_mode(module)
        # fx gives each GraphModule a class of its own, which holds the code of the graph
        kind: Any = type(module)
        found: nn.Module = fx.GraphModule.__new__(kind) if follows else object.__new__(kind)
        self.memo[id(module)] = found
        # classes of other libraries may put mappings of their own in place of the three tables
        entries = {k: dict(v) if k in MODULE_TABLES and v is not None else v for k, v in vars(module).items()}
        self.alive.append(entries)
        vars(found).update({key: self.value(entry) for key, entry in entries.items()})
        if follows:
            type(found).__name__ = type(module).__name__
            with warnings.catch_warnings():
                # torch warns about its own deprecated class when a pytree spec is copied
                warnings.simplefilter("ignore", FutureWarning)
                found.graph = copy.deepcopy(module.graph)  # the setter compiles
        return found

    def _mapping(self, mapping: dict[Any, Any]) -> dict[Any, Any]:
        found = copy.copy(mapping)
        found.clear()
        self.memo[id(mapping)] = found
        for key, entry in mapping.items():
            found[self.value(key)] = self.value(entry)
        return found

    def _list(self, items: Any) -> Any:
        found = copy.copy(items)
        self.memo[id(items)] = found
        for k, item in enumerate(items):
            found[k] = self.value(item)
        return found

    def _frozen(self, items: Any) -> Any:
        found = [self.value(item) for item in items]
        if all(new is old for new, old in zip(found, items, strict=True)):
            return items if isinstance(items, (tuple, frozenset)) else set(items)
        if hasattr(items, "_make"):
            return items._make(found)
        return type(items)(found) if type(items) in (tuple, set, frozenset) else items

    def _method(self, method: types.MethodType) -> types.MethodType:
        owner = self.value(method.__self__)
        return method if owner is method.__self__ else types.MethodType(method.__func__, owner)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """A function that reads modules of the tree from its closure or defaults reads their copies."""
        cells = function.__closure__ or ()
        parts = (cells, function.__defaults__ or (), function.__kwdefaults__ or {}, vars(function))
        if not self._leads_to_tree(parts):
            return function
        found = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            self.value(function.__defaults__),
            tuple(self.value(cell) for cell in cells),
        )
        self.memo[id(function)] = found
        found.__kwdefaults__ = self.value(function.__kwdefaults__)
        vars(found).update(self.value(dict(vars(function))))
        return found

    def _cell(self, cell: types.CellType) -> types.CellType:
        found = types.CellType()
        self.memo[id(cell)] = found
        try:
            found.cell_contents = self.value(cell.cell_contents)
        except ValueError:  # the cell of a variable that was not set yet
            return found
        return found

    def _partial(self, call: functools.partial[Any]) -> functools.partial[Any]:
        parts = self.value(call.func), self.value(call.args), self.value(call.keywords)
        return type(call)(parts[0], *parts[1], **parts[2])

    def _reference(self, reference: weakref.ReferenceType[Any]) -> weakref.ReferenceType[Any]:
        target = reference()
        return weakref.ref(self.value(target)) if id(target) in self.tree else reference

    def _object(self, value: Any) -> Any:
        if not self._leads_to_tree(vars(value)):
            return value
        try:
            found = copy.copy(value)
        except Exception:  # of the user's class, whose object is shared then
            return value
        self.memo[id(value)] = found
        self.depth += 1
        vars(found).update({key: self.value(entry) for key, entry in vars(value).items()})
        self.depth -= 1
        return found

    def _leads_to_tree(self, value: Any) -> bool:
        return _Search(self.tree).finds(value)


def _ops_follow_the_mode(module: nn.Module) -> bool:
    """Whether `train()` rewrites the graph of a module: then copies that share the graph would follow one another."""
    return isinstance(module, fx.GraphModule) and type(module).train is not nn.Module.train


class _Search:
    """Whether a value leads to one of some modules."""

    def __init__(self, wanted: set[int]) -> None:
        self.wanted = wanted
        self.seen: set[int] = set()

    def finds(self, value: Any, depth: int = 0) -> bool:
        """Look into containers, functions and plain objects; not into modules of other trees."""
        if id(value) in self.wanted:
            return True
        if id(value) in self.seen or depth > OBJECT_DEPTH:
            return False
        self.seen.add(id(value))
        inner, further = _inside(value)
        return any(self.finds(item, depth + further) for item in inner)


def _inside(value: Any) -> tuple[Any, int]:
    """What a value holds, and how many levels of objects deeper that is."""
    kind = type(value)
    if kind in MAPPINGS:
        return value.values(), 0
    if kind in (list, deque, set, frozenset) or issubclass(kind, tuple):
        return value, 0
    if kind is types.MethodType:
        return (value.__self__,), 0
    if kind is functools.partial:
        return (value.func, value.args, value.keywords), 0
    if kind is types.CellType:
        return _contents(value), 0
    if kind is types.FunctionType:
        return (value.__closure__ or (), value.__defaults__ or (), value.__kwdefaults__ or {}, vars(value)), 0
    if kind is weakref.ReferenceType:
        return (value(),), 0
    return (vars(value).values(), 1) if _is_plain_object(value) else ((), 0)


def _is_plain_object(value: Any) -> bool:
    other = (type, types.ModuleType, Tensor, nn.Module, fx.Graph, *weakref.ProxyTypes)
    return not issubclass(type(value), other) and type(getattr(value, "__dict__", None)) is dict


def _contents(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()
