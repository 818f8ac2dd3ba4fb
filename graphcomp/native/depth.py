"""The user's own class without whole blocks: children that a list of modules, or a sequence, no longer holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.ir.graph import assign, tensor_values
from graphcomp.ir.module import copied, tensor_names
from graphcomp.native.attributes import module_paths
from graphcomp.native.model import Edit, NativeResult
from graphcomp.pruning.blocks import Block, is_identity

LISTS = (nn.ModuleList, nn.Sequential)
"""Containers whose children are called one after the other."""

MAX_TRIES = 8
"""Attributes that are tried for the number of children."""


def shortened_model(
    model: nn.Module,
    graph: fx.Graph,
    gone: frozenset[fx.Node],
    tensors: Mapping[str, Tensor],
    verified: Callable[[NativeResult], NativeResult],
) -> NativeResult:
    """Return a copy of the model without the children whose ops are gone, or why there is none.

    Children that are left get the places of a shorter list; attributes that hold the place of each child in the list
    follow, and so does the one that holds the length, where the class reads one.

    Args:
        graph: captured from the model.
        gone: its nodes that go.
        tensors: name -> new values, of tensors that stay.
        verified: compares a candidate; gives no module, and why, where the candidate is another function.
    """
    children = _children(model, graph, gone)
    if isinstance(children, str):
        return NativeResult(None, children)
    result = NativeResult(None, "no block is gone")
    for more in _lengths(model, children):
        try:
            built = _built(model, children, tensors, more)
        except Exception as error:  # a class may refuse to be copied in any way
            return NativeResult(None, f"the model cannot be copied: {type(error).__name__}")
        found = verified(built)
        if found.module is not None:
            return found
        result = result if more else found
    return result


def paths_left(model: nn.Module, graph: fx.Graph, gone: frozenset[fx.Node]) -> dict[str, str]:
    """Return path of each module that stays -> path in the shortened model; arguments as of `shortened_model`."""
    children = _children(model, graph, gone)
    if isinstance(children, str):
        return {name: name for name, _ in model.named_modules()}
    moved: dict[str, str] = {}  # items of lists -> their new paths, under the old paths of the lists
    for path, names in children.items():
        left = [name for name, _ in model.get_submodule(path).named_children() if name not in names]
        places = {name: place for place, name in enumerate(left)}
        prefix = f"{path}." if path else ""
        moved |= {f"{prefix}{name}": prefix + str(places.get(name, "")) for name in (*left, *names)}
    found: dict[str, str] = {}
    for name, _ in model.named_modules():
        parts, new = name.split("."), ""
        for k in range(1, len(parts) + 1):
            old = ".".join(parts[:k])
            last = moved[old].rpartition(".")[2] if old in moved else parts[k - 1]
            if not last and old:
                break
            new = f"{new}.{last}".strip(".")
        else:
            found[name] = new
    return found


def whole_layers(model: nn.Module, blocks: Sequence[Block], level: int = 0) -> tuple[tuple[Block, ...], ...]:
    """Return the blocks that one item of a list of modules makes, in a row, for each such item.

    Args:
        level: of lists within lists, 0 the innermost, 1 the list around it, …
    """
    homes = _homes(model)
    found: dict[str, list[Block]] = {}
    for block in blocks:
        nodes = (n for n in (*block.ops, block.total, *block.ends) if not is_identity(n) and n.op == "call_function")
        paths = [set(module_paths(node)) & homes.keys() for node in nodes if tensor_values(node)]
        shared = set.intersection(*paths) if paths else set()
        if shared:
            inner_first = sorted(shared, key=len, reverse=True)
            found.setdefault(inner_first[min(level, len(shared) - 1)], []).append(block)
    rows = (tuple(row) for row in found.values())
    return tuple(row for row in rows if all(a.end is b.start for a, b in pairwise(row)))


def _homes(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Return path of each item of a list of modules -> path of the list, name of the item."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    lists = {path: module for path, module in modules.items() if isinstance(module, LISTS)}
    return {f"{path}.{name}".lstrip("."): (path, name) for path, m in lists.items() for name, _ in m.named_children()}


def _children(model: nn.Module, graph: fx.Graph, gone: frozenset[fx.Node]) -> dict[str, list[str]] | str:
    """Return container -> names of the children that go; or why the blocks are no whole children."""
    homes = _homes(model)
    stays: set[str] = set()
    goes: dict[str, None] = {}
    for node in graph.nodes:
        if node.op != "call_function" or is_identity(node):
            continue
        inside = [path for path in module_paths(node) if path in homes]
        if node not in gone:
            stays.update(inside)
            continue
        goes |= dict.fromkeys(inside)
    whole = {path: None for path in goes if path not in stays}
    harmless: set[fx.Node] = set()  # a mask for what goes alone: the class computes it, and nobody reads it
    for node in reversed(graph.nodes):
        if node not in gone or node.op != "call_function":
            continue
        if set(module_paths(node)) & whole.keys() or (node.users and harmless.issuperset(node.users)):
            harmless.add(node)
        elif not is_identity(node):
            path = next(iter(module_paths(node)), "")
            return f"'{path or 'the model'}' calls what goes itself, beside what stays: {node.name}"
    outer = [path for path in whole if not any(path.startswith(f"{other}.") for other in whole)]
    found: dict[str, list[str]] = {}
    for path in outer:
        found.setdefault(homes[path][0], []).append(homes[path][1])
    return found


def _built(
    model: nn.Module, children: Mapping[str, Sequence[str]], tensors: Mapping[str, Tensor], more: Sequence[Edit]
) -> NativeResult:
    """Return a copy with new tensors and without the children."""
    small = copied(model, share=True)
    new: dict[int, Tensor] = {}
    for name, tensor in tensor_names(model).items():
        if name in tensors or id(tensor) not in new:
            data = tensors.get(name, tensor).detach().clone()
            new[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
    for name, tensor in tensor_names(model).items():
        assign(small, name, new[id(tensor)])
    edits: list[Edit] = []
    for path, names in children.items():
        container = small.get_submodule(path)
        places = _places(container)
        left = [(name, child) for name, child in container.named_children() if name not in names]
        for name, _ in list(container.named_children()):
            delattr(container, name)
        for place, (_, child) in enumerate(left):
            container.add_module(str(place), child)
            for inner, attribute in places:
                vars(child.get_submodule(inner))[attribute] = place
                edits.append((f"{path}.{place}.{inner}".strip("."), attribute, place))
    for owner, attribute, value in more:
        _set(small, owner, attribute, value)
    edits += [edit for edit in more if not edit[0].startswith(CONFIG)]
    return NativeResult(small, edits=tuple(edits))


def _places(container: nn.Module) -> list[tuple[str, str]]:
    """Return the attributes, (path in a child, name), that hold the place of each child in the list."""
    children = list(container.children())
    found = []
    for inner, module in children[0].named_modules() if len(children) > 1 else ():
        for attribute in vars(module):
            values = [vars(_at(child, inner)).get(attribute) for child in children]
            if all(type(value) is int and value == place for place, value in enumerate(values)):
                found.append((inner, attribute))
    return found


def _at(module: nn.Module, path: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(module.named_modules())
    return modules.get(path, module)


# ------------------------------------------------------------------------------------------------ lengths
CONFIG = "config:"
"""First part of the owner of an attribute of a config that a model holds."""


def _lengths(model: nn.Module, children: Mapping[str, Sequence[str]]) -> Iterator[tuple[Edit, ...]]:
    """Yield changes of attributes that may hold the length of a list: of a config, none, then of modules around it."""
    of_config = _config_edits(model, children)
    yield of_config
    tried = 0
    for path, names in children.items():
        length = len(list(model.get_submodule(path).children()))
        parts = path.split(".")
        for k in range(len(parts)):
            owner = ".".join(parts[:k])
            for attribute, value in vars(model.get_submodule(owner)).items():
                if type(value) is int and value == length and tried < MAX_TRIES:
                    tried += 1
                    yield (*of_config, (owner, attribute, length - len(names)))


def _config_edits(model: nn.Module, children: Mapping[str, Sequence[str]]) -> tuple[Edit, ...]:
    """Return the entries of configs that make constructors build the shorter model.

    A config that builds a model (as those of transformers) is tried out: the constructor must make the same names.
    """
    found: tuple[Edit, ...] = ()
    for path, names in children.items():
        parts = path.split(".")
        for owner in (".".join(parts[:k]) for k in range(len(parts))):
            entries = _edits_of(model.get_submodule(owner), path.removeprefix(owner).lstrip("."), names)
            if entries:
                found += tuple((f"{CONFIG}{owner}", attribute, value) for attribute, value in entries)
                break
    return found


def _edits_of(model: nn.Module, path: str, names: Sequence[str]) -> list[tuple[str, Any]]:
    """Return (attribute, new value) of the config of one module."""
    config: Any = getattr(model, "config", None)
    if not callable(getattr(config, "to_dict", None)):
        return []
    container = model.get_submodule(path)
    length, left = len(list(container.children())), [n for n, _ in container.named_children() if n not in names]
    wanted = _renamed(model, path, left)
    for attribute, value in list(vars(config).items()):
        if type(value) is not int or value != length:
            continue
        edits: list[tuple[str, Any]] = [(attribute, len(left))]
        for other, held in vars(config).items():
            if isinstance(held, list) and len(held) == length:
                edits.append((other, [held[int(name)] for name in left]))
        try:
            changed = copy.deepcopy(config)
            for own, new in edits:
                setattr(changed, own, new)
            with torch.device("meta"):
                built = type(model)(changed)
        except Exception:  # of the user's code: a constructor may refuse a config in any way
            continue
        if set(dict(built.named_parameters())) == wanted:
            return edits
    return []


def _renamed(model: nn.Module, path: str, left: Sequence[str]) -> set[str]:
    """Return the names of parameters once a list holds the children `left` alone."""
    place = {name: str(k) for k, name in enumerate(left)}
    found = set()
    for name, _ in model.named_parameters():
        if not name.startswith(f"{path}."):
            found.add(name)
            continue
        child, _, rest = name.removeprefix(f"{path}.").partition(".")
        if child in place:
            found.add(f"{path}.{place[child]}.{rest}")
    return found


def _set(small: nn.Module, owner: str, attribute: str, value: Any) -> None:
    if not owner.startswith(CONFIG):
        vars(small.get_submodule(owner))[attribute] = value
        return
    config = vars(small.get_submodule(owner.removeprefix(CONFIG)))["config"]
    own = copy.deepcopy(config)
    setattr(own, attribute, value)
    for module in small.modules():  # one config for all, which the model that was given keeps
        for name, held in list(vars(module).items()):
            if held is config:
                vars(module)[name] = own
