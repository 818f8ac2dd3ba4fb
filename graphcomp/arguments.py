"""Checks of arguments: each raises PlanError, "NAME must be …, got …", with a fix to paste."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graphcomp.errors import PlanError

LISTED = 20
"""Words that a message lists."""

SHOWN = 80
"""Characters of a wrong value that a message shows."""


def shown(value: object) -> str:
    """Return a value as text for a message: short, and without the contents of tensors and modules."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__} (a module)"
    try:
        text = repr(value)
    except Exception:  # of a class of the user's
        return f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def wrong(name: str, must: str, value: object, fix: str = "", why: str = "") -> PlanError:
    """Return the error that says what `name` must be, and what was given."""
    return PlanError(f"{name} must be {must}, got {shown(value)}", why=why, fix=fix)


def check_flag(name: str, value: object, fix: str = "") -> None:
    """Refuse anything but True and False.

    Raises:
        PlanError: `value` is something else.
    """
    if not isinstance(value, bool):
        raise wrong(name, "True or False", value, fix or f"{name}=True")


def check_whole(name: str, value: object, least: int = 1, most: int | None = None, fix: str = "") -> None:
    """Refuse anything but a whole number from `least` to `most`.

    Raises:
        PlanError: `value` is something else.
    """
    whole = int(value) if is_whole(value) else None  # type: ignore[call-overload]
    if whole is None or whole < least or (most is not None and whole > most):
        bounds = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise wrong(name, f"a whole number {bounds}", value, fix or f"{name}={least}")


def is_whole(value: object) -> bool:
    """Whether `value` is a whole number, and no flag."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether `value` is a finite real number, and no flag."""
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def check_number(name: str, value: object, least: float = 0.0, most: float = math.inf, fix: str = "") -> None:
    """Refuse anything but a finite number from `least` to `most`.

    Raises:
        PlanError: `value` is something else.
    """
    if not (is_number(value) and least <= value <= most):  # type: ignore[operator]
        bounds = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"
        raise wrong(name, f"a number {bounds}", value, fix or f"{name}={least:g}")


def check_word(name: str, value: object, words: Sequence[str]) -> None:
    """Refuse anything but one of `words`.

    Raises:
        PlanError: `value` is something else; the fix is the nearest word.
    """
    if not isinstance(value, str) or value not in words:
        near = difflib.get_close_matches(str(value).lower(), words, 1, 0.0) if isinstance(value, str) else words
        listed = ", ".join(map(repr, words[:LISTED])) + (", …" if len(words) > LISTED else "")
        raise wrong(name, f"one of {listed}", value, f"{name}={near[0]!r}" if near else "")


def check_instance(name: str, value: object, kinds: type | tuple[type, ...], fix: str) -> None:
    """Refuse what is no instance of `kinds`.

    Raises:
        PlanError: `value` is something else.
    """
    if not isinstance(value, kinds):
        names = [kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,))]
        raise wrong(name, f"a {' or a '.join(names)}", value, fix)


def check_callable(name: str, value: object, fix: str, *, modules: bool = False, classes: bool = False) -> None:
    """Refuse what is no function. Classes can be called, too, and mean something else, and so do modules.

    Args:
        modules: take modules.
        classes: take classes, where what they make is asked for.

    Raises:
        PlanError: `value` is something else.
    """
    refused = (isinstance(value, type) and not classes) or (isinstance(value, nn.Module) and not modules)
    if not callable(value) or refused:
        raise wrong(name, "a function", value, fix)


def check_choice(name: str, value: object, choices: Sequence[int]) -> None:
    """Refuse anything but one of a few whole numbers.

    Raises:
        PlanError: `value` is something else.
    """
    if not is_whole(value) or value not in choices:
        raise wrong(name, " or ".join(map(str, choices)), value, f"{name}={choices[0]}")


def check_mapping(name: str, value: object, fix: str) -> None:
    """Refuse what is no mapping.

    Raises:
        PlanError: `value` is something else.
    """
    if not isinstance(value, Mapping):
        raise wrong(name, "a mapping (a dict)", value, fix)


def check_dynamic(name: str, value: object) -> None:
    """Refuse what does not name lengths of inputs: input -> dim -> name.

    Raises:
        PlanError: `value` is something else.
    """
    fix = f'{name}={{"x": {{2: "height", 3: "width"}}}}'
    if not isinstance(value, Mapping):
        raise wrong(name, "a mapping, input -> dim -> name", value, fix)
    for key, dims in value.items():
        if not isinstance(key, str) or not isinstance(dims, Mapping):
            raise wrong(f"{name}[{shown(key)}]", "a mapping, dim -> name", dims, fix)
        for dim, length in dims.items():
            if not is_whole(dim) or not isinstance(length, str) or not length:
                raise wrong(f"{name}[{shown(key)}]", "dims (whole numbers) with names", dims, fix)


def check_batches(name: str, value: object) -> None:
    """Refuse what is no series of batches.

    Raises:
        PlanError: `value` cannot be gone over, or is one batch.
    """
    goes_over = isinstance(value, Iterable) or hasattr(type(value), "__getitem__")
    if not goes_over or isinstance(value, (str, bytes, Mapping, nn.Module, type)):
        raise wrong(name, "a series of batches", value, f"{name}=[batch, …], or a DataLoader")


def check_path(name: str, value: object) -> None:
    """Refuse what is no path.

    Raises:
        PlanError: `value` is something else, or empty.
    """
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise wrong(name, "a path (a str or a pathlib.Path)", value, f'{name}="run"')


def as_names(name: str, value: object, fix: str) -> tuple[Any, ...]:
    """Return one name, or several, as a tuple; modules are taken in place of names.

    Raises:
        PlanError: `value` is neither, or a pattern ("re:…") is malformed.
    """
    found = (value,) if isinstance(value, (str, nn.Module)) and not isinstance(value, nn.ModuleList) else value
    if not isinstance(found, Iterable) or isinstance(found, (Mapping, Tensor, bytes)):
        raise wrong(name, "a name, a module, or several of them", value, fix)
    entries = tuple(found)
    for entry in entries:
        if not isinstance(entry, (str, nn.Module)):
            raise wrong(f"each entry of {name}", "a name or a module", entry, fix)
        if isinstance(entry, str) and entry.startswith("re:"):
            check_pattern(name, entry)
    return entries


def check_pattern(name: str, entry: str) -> None:
    """Refuse a malformed pattern.

    Raises:
        PlanError: what stands behind "re:" is no regular expression.
    """
    try:
        re.compile(entry.removeprefix("re:"))
    except re.error as error:
        raise PlanError(
            f"{name} holds {entry!r}, which is no regular expression",
            why=str(error),
            fix=f"{name}={'re:' + re.escape(entry.removeprefix('re:'))!r} takes the text as it is",
        ) from error
