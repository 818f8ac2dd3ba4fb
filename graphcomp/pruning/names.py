"""Modules that a user names: by their names, by "re:" patterns, or by themselves."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from graphcomp.arguments import as_names, check_mapping
from graphcomp.errors import PlanError
from graphcomp.quantization.spec import matches

V = TypeVar("V")


def module_names(model: nn.Module, given: Any, option: str) -> tuple[str, ...]:
    """Return names and patterns for what `given` names, each of some module of `model`.

    Args:
        model: whose modules they are.
        given: a name, a "re:" pattern, a module of the model, or several of these.
        option: the argument that holds them, for messages.

    Raises:
        PlanError: one is of no module.
    """
    entries = as_names(option, given, f'{option}=["layer1", "re:norm"]')
    return tuple(_name(model, entry, option) for entry in entries)


def by_module_name(model: nn.Module, given: Mapping[Any, V], option: str) -> dict[str, V]:
    """Return `given` with names and patterns for its keys, each of some module of `model`.

    Raises:
        PlanError: it is no mapping, or a key is of no module.
    """
    check_mapping(option, given, f'{option}={{"layer1": …, "re:norm": …}}')
    return dict(zip(module_names(model, list(given), option), given.values(), strict=True))


def scope_name(model: nn.Module, scope: Any) -> str:
    """Return the name of the submodule that `scope` is, or names; "" for the model itself.

    Raises:
        PlanError: it is neither a name nor a module of `model`.
    """
    if isinstance(scope, str):
        return scope
    (entry,) = as_names("scope", [scope], 'scope="encoder"')
    return _name(model, entry, "scope")


def _name(model: nn.Module, entry: str | nn.Module, option: str) -> str:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if isinstance(entry, nn.Module):
        for name, module in modules.items():
            if module is entry:
                return name
        raise PlanError(
            f"{option} holds a {type(entry).__name__}, which is no module of the model",
            why="a module of a copy, or of another model, is another module",
            fix=f"{option}: one of {list(modules)[:20]}",
        )
    if entry.startswith("re:"):
        if not any(matches(entry, name) for name in modules):
            raise PlanError(f"{option} pattern {entry[3:]!r} matches no module", fix=f"modules: {list(modules)[:20]}")
    elif entry not in modules:
        near = difflib.get_close_matches(entry, modules, n=1)
        raise PlanError(
            f"{option} names {entry!r}, which is no module of the model", fix=f"{option}: {near or list(modules)[:20]}"
        )
    return entry
