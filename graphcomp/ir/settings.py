"""Objects of settings that modules hold and share, such as configs, and the numbers that one module has of its own."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    list,
    tuple,
    dict,
    set,
    frozenset,
    torch.dtype,
    torch.device,
)
"""Types of the values that an object of settings holds, beside other objects of settings."""

DEPTH = 3
"""Levels of settings in settings that are looked at."""


def is_settings(value: Any, depth: int = DEPTH) -> bool:
    """Return whether an object holds plain data alone, under names: a config, an instance of a dataclass."""
    if isinstance(value, OwnSettings):
        return True
    not_data = (nn.Module, Tensor, type, types.ModuleType, torch.Generator, BaseException, *PLAIN)
    held = getattr(value, "__dict__", None)
    if isinstance(value, not_data) or callable(value) or not isinstance(held, dict) or not held:
        return False
    return depth > 0 and all(isinstance(v, PLAIN) or is_settings(v, depth - 1) for v in held.values())


def ints_of(settings: Any) -> dict[str, int]:
    """Return the integers that an object of settings holds itself, by name."""
    if isinstance(settings, OwnSettings):
        return {**ints_of(settings.shared), **settings.own}
    return {name: value for name, value in vars(settings).items() if type(value) is int}


class OwnSettings:
    """Settings that one module shares with others, but for numbers of its own.

    All else is read from and written to the shared object, so that a change there (another attention) reaches the
    module. The class is that of the shared object for `isinstance`.
    """

    shared: Any
    own: dict[str, int]

    def __init__(self, shared: Any, own: dict[str, int]) -> None:
        vars(self)["shared"], vars(self)["own"] = shared, own

    @property
    def __class__(self) -> Any:
        return type(vars(self)["shared"])

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise TypeError("settings that are shared keep their class")

    def __getattr__(self, name: str) -> Any:
        own = vars(self)["own"]
        return own[name] if name in own else getattr(vars(self)["shared"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = vars(self)["own"]
        if name in own:
            own[name] = value
        else:
            setattr(vars(self)["shared"], name, value)

    def __reduce__(self) -> Any:
        return OwnSettings, (vars(self)["shared"], dict(vars(self)["own"]))

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnSettings:
        import copy

        found = OwnSettings(copy.deepcopy(vars(self)["shared"], memo), dict(vars(self)["own"]))
        memo[id(self)] = found
        return found


def with_own(settings: Any, name: str, value: int) -> OwnSettings:
    """Return the settings with another number under `name`; those that are shared do not change."""
    if type(settings) is OwnSettings:
        return OwnSettings(vars(settings)["shared"], {**vars(settings)["own"], name: value})
    return OwnSettings(settings, {name: value})
