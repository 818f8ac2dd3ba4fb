"""Classes and functions by name: 'package.module:Outer.Inner'."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from graphcomp.errors import CheckpointError
from graphcomp.ir.json_values import damaged
from graphcomp.ir.trust import Trust, computes

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
MAIN = "__main__"


def class_path(kind: type) -> str:
    """'package.module:Outer.Inner'"""
    return f"{kind.__module__}:{kind.__qualname__}"


def importable(kind: type) -> bool:
    """Whether a process finds `kind` under its name, once its module is imported."""
    found: Any = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        found = _member(found, part)
    return found is kind


def import_object(path: Any, trust: Trust) -> Any:
    """What 'package.module:Outer.Inner' names. No code runs but that of modules that are imported.

    Raises:
        CheckpointError: there is no such thing in this process, or `trust` does not reach it.
    """
    module, _, name = path.partition(":") if isinstance(path, str) else ("", "", "")
    if not name:
        raise damaged(f"a class is called {path!r:.100}")
    try:
        found: Any = trust.module(module)
    except CheckpointError as error:
        fix = f"{error.fix}; or model_factory=lambda: YourModel(…), with the original architecture"
        raise CheckpointError(f"the model's class {path} cannot be imported", why=error.what, fix=fix) from error
    for part in name.split("."):
        found = _member(found, part)
    if found is None:
        raise CheckpointError(
            f"the model's class {path} cannot be imported",
            why=f"the module {module} has no {name}",
            fix="graphcomp.load(folder, model_factory=lambda: YourModel(…)), with the original architecture",
        )
    return found


def _member(owner: Any, name: str) -> Any:
    """What stands in a module or class under `name`; nothing is computed for it."""
    return vars(owner).get(name) if isinstance(owner, (types.ModuleType, type)) else None


def import_class(path: Any, trust: Trust) -> type[nn.Module]:
    """The nn.Module class of that path.

    Raises:
        CheckpointError: there is none.
    """
    found = import_object(path, trust)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CheckpointError(f"{path} is not an nn.Module class", why="a checkpoint is built of modules alone")
    return found


def function_path(function: Any, owner: type) -> str | None:
    """'module:name' of a function that a model of class `owner` may hold; None: it cannot be stored."""
    name = getattr(function, "__name__", "")
    for module in (F.__name__, torch.__name__, owner.__module__):
        path = f"{module}:{name}"
        if isinstance(function, _FUNCTIONS) and _function(path, owner) is function:
            return path
    return None


def find_function(path: Any, owner: type) -> Callable[..., Any]:
    """The function of that path: of torch, if it computes and does nothing else, or of the module of `owner`.

    Raises:
        CheckpointError: there is none that a file may name.
    """
    found = _function(path, owner) if isinstance(path, str) else None
    if found is None:
        raise damaged(f"the function {path!r:.100}", "it must be one of torch, or of the module of the model's class")
    return found


def _function(path: str, owner: type) -> Callable[..., Any] | None:
    module, _, name = path.partition(":")
    if module not in (F.__name__, torch.__name__, owner.__module__) or name.startswith("_"):
        return None
    found = _member(sys.modules.get(module), name)
    if not isinstance(found, _FUNCTIONS) or (module == torch.__name__ and not _computes(name)):
        return None
    return found


def _computes(name: str) -> bool:
    """Whether torch's function of that name is an op that computes and does nothing else."""
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and all(computes(getattr(packet, overload)) for overload in packet.overloads())
