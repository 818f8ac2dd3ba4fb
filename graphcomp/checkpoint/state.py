"""What stands in the modules of a model besides parameters, buffers and children, as JSON and back."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.checkpoint.names import class_path, find_function, function_path, import_class, import_object, importable
from graphcomp.errors import CheckpointError
from graphcomp.ir.json_values import JSON, damaged, decode, encode
from graphcomp.ir.module import tensor_names
from graphcomp.ir.trust import Trust
from graphcomp.system.listeners import Remade
from graphcomp.torch_compat import HOOK_PREFIXES, module_table, pytree

MISSING = object()
INTERNAL = frozenset(vars(nn.Module())) | {"training"}
"""Attributes that every module has."""

_NUMBERS = (bool, int, float, str, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


_RECORDS: dict[str, type] = {class_path(kind): kind for kind in (types.SimpleNamespace, argparse.Namespace)}


def _is_record(kind: Any) -> bool:
    """Whether instances of a class are named values and nothing else: a dataclass that is no module."""
    plain = isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__dictoffset__ != 0
    return plain and not issubclass(kind, (nn.Module, tuple, dict, list))


class Encoder:
    """Writes attributes of one model.

    Attributes:
        extra: tensors that no module holds under a name of its own, by the names given to them here.
    """

    def __init__(self, model: nn.Module) -> None:
        named = tensor_names(model)
        self.names: dict[int, str] = {}
        for name, tensor in named.items():
            self.names.setdefault(id(tensor), name)
        self.modules = {id(module): path for path, module in model.named_modules()}
        self.extra: dict[str, Tensor] = {}
        self._taken = set(named)

    def encode(self, value: Any, owner: type) -> JSON:
        """An attribute of a module of class `owner`.

        Raises:
            CheckpointError: there is no form for it.
        """
        if isinstance(value, torch.Size):
            value = tuple(value)
        if isinstance(value, (list, tuple, dict)):
            return self._container(value, owner)
        if type(value) in _NUMBERS or isinstance(value, slice):
            return encode(value)
        return self._other(value, owner)

    def _container(self, value: Any, owner: type) -> JSON:
        if type(value) is list:
            return [self.encode(item, owner) for item in value]
        if type(value) is tuple:
            return {"tuple": [self.encode(item, owner) for item in value]}
        kind = {dict: "dict", OrderedDict: "ordered"}.get(type(value))
        if kind is None:
            raise _not_stored(value)
        return {kind: [[self.encode(key, owner), self.encode(item, owner)] for key, item in value.items()]}

    def _other(self, value: Any, owner: type) -> JSON:
        if isinstance(value, Tensor) and not value.is_meta:
            return {"tensor": self._name(value)}
        if isinstance(value, nn.Module) and id(value) in self.modules:
            return {"module": self.modules[id(value)]}
        if isinstance(value, type) and issubclass(value, nn.Module) and importable(value):
            return {"class": class_path(value)}
        if type(value) in (set, frozenset):
            items = [self.encode(item, owner) for item in value]
            return {type(value).__name__: sorted(items, key=repr)}
        if type(value) is range:
            return {"range": [value.start, value.stop, value.step]}
        if isinstance(value, Enum) and importable(type(value)):
            return {"enum": [class_path(type(value)), value.name]}
        if type(value) in _RECORDS.values() or (_is_record(type(value)) and importable(type(value))):
            fields = {str(name): self.encode(item, owner) for name, item in vars(value).items()}
            return {"record": [class_path(type(value)), fields]}
        if type(value) is functools.partial:
            return {"partial": [self.encode(part, owner) for part in (value.func, value.args, value.keywords)]}
        path = function_path(value, owner)
        if path is None:
            raise _not_stored(value)
        return {"function": path}

    def _name(self, tensor: Tensor) -> str:
        if id(tensor) not in self.names:
            number = len(self.extra)
            while (name := f"attribute-{number}") in self._taken:
                number += 1
            self.names[id(tensor)] = name
            self._taken.add(name)
            self.extra[name] = tensor
        return self.names[id(tensor)]


def _not_stored(value: Any) -> CheckpointError:
    return CheckpointError(f"a value of type {type(value).__name__} cannot be stored", why=repr(value)[:200])


class Decoder:
    """Reads attributes of one model that is being built.

    Args:
        root: the model, for values that name a submodule.
        tensors: what values name tensors by.
    """

    def __init__(self, root: nn.Module, tensors: Mapping[str, Tensor], trust: Trust) -> None:
        self.root, self.tensors, self.trust = root, tensors, trust

    def decode(self, value: JSON, owner: type) -> Any:
        """What `Encoder.encode` wrote.

        Raises:
            CheckpointError: what nobody writes.
        """
        return decode(value, {}, {}, functools.partial(self._other, owner))

    def _other(self, owner: type, kind: str, inner: JSON) -> Any:
        read = self._READ.get(kind)
        if read is None:
            raise damaged(f"an attribute of the unknown kind {kind!r:.100}")
        return read(self, inner, owner)

    def _tensor(self, inner: JSON, owner: type) -> Tensor:
        if not isinstance(inner, str) or inner not in self.tensors:
            raise damaged(f"an attribute is the tensor {inner!r:.100}", "the file of tensors has none of that name")
        return self.tensors[inner]

    def _module(self, inner: JSON, owner: type) -> nn.Module:
        return submodule(self.root, inner)

    def _class(self, inner: JSON, owner: type) -> type:
        return import_class(inner, self.trust)

    def _function(self, inner: JSON, owner: type) -> Callable[..., Any]:
        return find_function(inner, owner)

    def _enum(self, inner: JSON, owner: type) -> Enum:
        path, name = _pair(inner)
        kind = import_object(path, self.trust)
        if not isinstance(kind, type) or not issubclass(kind, Enum) or name not in kind.__members__:
            raise damaged(f"an attribute is the member {name!r:.100} of {path!r:.100}", "there is no such enum")
        return kind.__members__[name]

    def _record(self, inner: JSON, owner: type) -> Any:
        path, fields = _pair(inner)
        kind = _RECORDS.get(path) or import_object(path, self.trust)
        if not isinstance(fields, dict) or not (_is_record(kind) or kind in _RECORDS.values()):
            raise damaged(f"an attribute is a {path!r:.100} with {fields!r:.100}", "it must be a dataclass")
        made = object.__new__(kind)
        vars(made).update({name: self.decode(item, owner) for name, item in fields.items()})
        return made

    def _built(self, make: Callable[..., Any], inner: JSON, owner: type) -> Any:
        items = [self.decode(item, owner) for item in inner] if isinstance(inner, list) else None
        try:
            return make(items)
        except (TypeError, ValueError) as error:
            raise damaged(f"an attribute of the parts {inner!r:.100}", str(error)) from error

    _READ: Mapping[str, Callable[[Decoder, JSON, type], Any]] = {
        "tensor": _tensor,
        "module": _module,
        "class": _class,
        "enum": _enum,
        "record": _record,
        "function": _function,
        "ordered": lambda self, inner, owner: self._built(OrderedDict, inner, owner),
        "set": lambda self, inner, owner: self._built(set, inner, owner),
        "frozenset": lambda self, inner, owner: self._built(frozenset, inner, owner),
        "range": lambda self, inner, owner: self._built(lambda parts: range(*parts), inner, owner),
        "partial": lambda self, inner, owner: self._built(
            lambda parts: functools.partial(parts[0], *parts[1], **parts[2]), inner, owner
        ),
    }


def _pair(inner: JSON) -> tuple[str, Any]:
    if not isinstance(inner, list) or len(inner) != 2 or not isinstance(inner[0], str):
        raise damaged(f"an attribute is {inner!r:.100}", "it must be a class and what the class makes")
    return inner[0], inner[1]


def submodule(root: nn.Module, path: Any) -> nn.Module:
    """The submodule at `path`.

    Raises:
        CheckpointError: there is none.
    """
    found: Any = root
    for part in path.split(".") if isinstance(path, str) and path else ():
        found = module_table(found).get(part) if isinstance(found, nn.Module) else None
    if not isinstance(path, str) or not isinstance(found, nn.Module):
        raise damaged(f"the submodule {path!r:.100}", "the model has none of that name")
    return found


# ------------------------------------------------------------------------------------------------ comparing
def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The attributes that are not torch's own; of a compiled or wrapped forward, nothing."""
    return {
        name: value
        for name, value in vars(module).items()
        if name not in INTERNAL and not _is_hook(name) and not isinstance(value, Remade)
    }


def _is_hook(name: str) -> bool:
    return name.startswith(HOOK_PREFIXES)


class Twins:
    """A model and what its recipe builds, compared attribute by attribute."""

    def __init__(self, built: nn.Module, model: nn.Module) -> None:
        self.names = [{id(tensor): name for name, tensor in reversed(tensor_names(m).items())} for m in (built, model)]

    def alike(self, a: Any, b: Any) -> bool:
        """Whether an attribute of the built model is as that of the model, once all tensors with names are in place."""
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            names = self.names[0].get(id(a)), self.names[1].get(id(b))
            return names[0] == names[1] if any(names) else _same_values(a, b)
        if type(a) is not type(b):
            return False
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(self.alike, a, b))
        if isinstance(a, dict):
            return list(a) == list(b) and all(self.alike(a[key], b[key]) for key in a)
        if isinstance(a, types.FunctionType):
            return a.__code__ is b.__code__ and _same_cells(a, b)
        if _is_record(type(a)) or type(a) in _RECORDS.values():
            return self.alike(vars(a), vars(b))
        if type(a) in _NUMBERS or isinstance(a, (slice, set, frozenset, range, Enum)):
            return bool(a == b) or (a != a and b != b)
        return True  # objects of one class that a constructor made: no more can be seen


def _same_values(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or b.is_meta or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(a, b)


def _same_cells(a: types.FunctionType, b: types.FunctionType) -> bool:
    cells = [[cell.cell_contents for cell in f.__closure__ or ()] + [f.__defaults__, f.__kwdefaults__] for f in (a, b)]
    plain = [[value for value in values if type(value) in (*_NUMBERS, tuple, dict)] for values in cells]
    return plain[0] == plain[1]


def replace_tensors(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Let lists, tuples and dicts among the attributes hold the new tensors: id of the old one -> new one."""
    for module in model.modules():
        for name, value in attributes_of(module).items():
            if isinstance(value, (list, tuple, dict)) and any(_within(value, new)):
                vars(module)[name] = pytree.tree_map_only(Tensor, lambda t: new.get(id(t), t), value)


def _within(value: Any, new: Mapping[int, Tensor]) -> Iterator[bool]:
    return (isinstance(leaf, Tensor) and id(leaf) in new for leaf in pytree.tree_leaves(value))
