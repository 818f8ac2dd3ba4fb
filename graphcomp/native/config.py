"""The entries of a config that build a model with other lengths: found by trying the constructor out.

A config is any object with `to_dict` that a model holds as `config` and is built from, as those of transformers are.
No table of names is kept: an entry is what changes the shapes that have to change, and no other.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graphcomp.ir.module import tensor_names
from graphcomp.ir.settings import OwnSettings
from graphcomp.native.attributes import put, sites
from graphcomp.torch_compat import buffer_table, non_persistent, parameter_table

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""

MAX_TRIES = 200
"""Most models that a search builds, on the meta device."""

SMALL = 8
"""Entries up to this are tried with every smaller value: a number of key heads may be one summand of a length."""


@dataclass(frozen=True)
class ConfigEdit:
    """A new value of an entry.

    Attributes:
        owner: path of the config within the model's, "" for the model's own, "text_config" for a part's.
        entry: its name there.
        value: the new value.
    """

    owner: str
    entry: str
    value: int

    def __str__(self) -> str:
        return f"{self.owner}.{self.entry}".lstrip(".") + f"={self.value}"


def config_of(model: nn.Module) -> Any:
    """Return the config that the model's class is built from; None where there is none."""
    config = getattr(model, "config", None)
    return config if callable(getattr(config, "to_dict", None)) else None


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensor_names(model).items()}


def config_edits(model: nn.Module, wanted: Shapes) -> tuple[ConfigEdit, ...] | None:
    """Return the entries with which the model's class builds tensors of the wanted shapes; None where none do.

    Entries are found one after the other: each makes some lengths right and no other length wrong. A length that goes
    from 8 to 6 may stand in an entry as it is, or as a multiple or a part (4 to 3).

    Args:
        model: holds a config (`config_of`); not modified.
        wanted: of all tensors that the class builds.
    """
    config = config_of(model)
    if config is None:
        return None
    found = _search(model, config, wanted)
    pins = tuple(_pins(config)) if found is None else ()
    rest = _search(model, edited(config, pins), wanted) if pins else None
    return found if rest is None else (*pins, *rest)


def _search(model: nn.Module, config: Any, wanted: Shapes) -> tuple[ConfigEdit, ...] | None:
    """Return entries to change, in steps that each make some lengths right and none wrong."""
    wrong = _wrong(type(model), config, wanted)
    first = dict(wrong or {})
    found: list[ConfigEdit] = []
    tries = itertools.count()
    while wrong:
        for edit in _candidates(config, {**first, **wrong}):
            if next(tries) >= MAX_TRIES:
                return None
            changed = edited(config, (edit,))
            left = _wrong(type(model), changed, wanted)
            if left is not None and left.keys() < wrong.keys():
                config, wrong = changed, left
                found.append(edit)
                break
        else:
            return None
    return None if wrong is None else tuple(found)


def entry_of(model: nn.Module, wanted: Shapes) -> ConfigEdit | None:
    """Return the one entry that is a length as it was, and builds tensors of the wanted shapes; None where none does.

    Args:
        model: holds a config (`config_of`); not modified.
        wanted: of all tensors that the class builds; one length differs from those that the config builds.
    """
    config = config_of(model)
    wrong = None if config is None else _wrong(type(model), config, wanted)
    if not wrong or len(set(wrong.values())) > 1:
        return None
    exact = _exact(config, wrong)
    return next((edit for edit in exact if _wrong(type(model), edited(config, (edit,)), wanted) == {}), None)


def partial_edits(model: nn.Module, old: int, new: int) -> tuple[ConfigEdit, ...]:
    """Return the entries that hold a length as it was, and with which the class builds more of the model's shapes.

    Args:
        model: holds a config (`config_of`) that builds other shapes; not modified.
        old, new: the length before and after the cut.

    Returns:
        Entries that each make some lengths right and change no other; none where no entry says the length, where
        another length goes with it, or where class and config refuse it.
    """
    config, wanted = config_of(model), shapes_of(model)
    wrong = _wrong(type(model), config, wanted)
    if not wrong:
        return ()
    found: list[ConfigEdit] = []
    for edit in _exact(config, {key: pair for key, pair in wrong.items() if pair == (old, new)}):
        changed = edited(config, (edit,))
        left = _wrong(type(model), changed, wanted)
        if left is not None and left.items() < wrong.items():
            config, wrong = changed, left
            found.append(edit)
    return tuple(found)


def edited(config: Any, edits: tuple[ConfigEdit, ...]) -> Any:
    """Return a copy of a config with other entries."""
    changed = copy.deepcopy(config)
    for edit in edits:
        setattr(_at(changed, edit.owner), edit.entry, edit.value)
    return changed


def changes_of(old: Any, new: Any) -> tuple[ConfigEdit, ...]:
    """Return the ints in which a config and its edited copy differ."""
    before = {(path, name): value for path, name, value in _entries(old)}
    return tuple(ConfigEdit(*key) for key in _entries(new) if before.get(key[:2]) != key[2])


def built_from(kind: Callable[[Any], nn.Module], config: Any) -> nn.Module | None:
    """Return a model on the meta device, of the config as a file would hold it; None where class or config refuses."""
    try:
        read = getattr(type(config), "from_dict", None)  # checks what entries must be to each other, as on loading
        with torch.device("meta"):
            return kind(copy.deepcopy(config) if read is None else read(config.to_dict()))
    except Exception:  # of the user's code: a constructor may refuse a config in any way
        return None


class _EmptyOnMeta(TorchFunctionMode):
    """Puts what `torch.empty` returns on the meta device: parameters before their initialization."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        return func(*args, **(kwargs | {"device": "meta"} if func is torch.empty else kwargs))


def as_read(model: nn.Module) -> nn.Module | None:
    """Return what a reader of the model's config builds, with the tensors and the ints of the model.

    All else is what the constructor makes of the config: floats such as a scale, buffers that no file holds.

    Returns:
        In eval mode, sharing the model's tensors. None where the class builds other names, or a tensor without values.
    """
    try:
        with _EmptyOnMeta(), torch.random.fork_rng():
            built = type(model)(copy.deepcopy(config_of(model)))
    except Exception:  # of the user's code
        return None
    mine, theirs = dict(model.named_modules(remove_duplicate=False)), dict(built.named_modules(remove_duplicate=False))
    if mine.keys() != theirs.keys():
        return None
    for path, module in theirs.items():
        own = mine[path]
        if parameter_table(module).keys() != parameter_table(own).keys():
            return None
        parameter_table(module).update(parameter_table(own))
        held, unsaved = buffer_table(own), non_persistent(module)
        for name, buffer in buffer_table(module).items():
            found = held.get(name)
            if isinstance(found, Tensor) and (
                name not in unsaved or (isinstance(buffer, Tensor) and buffer.shape != found.shape)
            ):
                buffer_table(module)[name] = found
            elif isinstance(buffer, Tensor):
                buffer_table(module)[name] = buffer.to(found.device) if isinstance(found, Tensor) else buffer
    if any(t.is_meta for t in tensor_names(built).values()) and not any(
        t.is_meta for t in tensor_names(model).values()
    ):
        return None
    values = sites(model)
    for site, value in sites(built).items():
        if "." not in site[1] and site in values and values[site] != value:
            put(built, site, values[site])
    for path, module in theirs.items():
        for name, settings in vars(mine[path]).items():
            held_here: dict[str, Any] = module.__dict__
            if type(settings) is OwnSettings and name in held_here:
                held_here[name] = OwnSettings(held_here[name], dict(vars(settings)["own"]))
    return built.eval()


def follow_config(model: nn.Module, config: Any) -> bool:
    """Let a model whose tensors the config builds hold the config, and the ints that the constructor makes of it.

    In place; the config that the model held before, and the models that share it, stay as they are.

    Returns:
        Whether the constructor builds the model's tensors; else nothing has changed.
    """
    built = built_from(type(model), config)
    if built is None or shapes_of(built) != shapes_of(model):
        return False
    mine, theirs = sites(model), sites(built)
    for site, value in theirs.items():
        of_config = "." in site[1]  # set below, for all modules that share the config
        if not of_config and site in mine and mine[site] != value:
            put(model, site, value)
    hold_config(model, config, own=False)
    return True


def hold_config(model: nn.Module, config: Any, *, own: bool) -> None:
    """Let all modules of a model hold another config, or the part of it that they held of the old one, in place.

    The config that the model held before, and the models that share it, stay as they are.

    Args:
        own: modules that have entries of their own beside the shared config keep these.
    """
    parts = {id(held): part for held, part in zip(_configs(config_of(model)), _configs(config), strict=True)}
    for module in model.modules():
        for name, held in list(vars(module).items()):
            shared = vars(held)["shared"] if type(held) is OwnSettings else held
            if id(shared) in parts:
                kept = own and type(held) is OwnSettings
                vars(module)[name] = OwnSettings(parts[id(shared)], vars(held)["own"]) if kept else parts[id(shared)]


# ------------------------------------------------------------------------------------------------ searching
Wrong: TypeAlias = dict[tuple[str, int], tuple[int, int]]
"""(tensor, dim) -> (length as built, length wanted)."""


def _wrong(kind: Callable[[Any], nn.Module], config: Any, wanted: Shapes) -> Wrong | None:
    """Return the lengths that differ; None where the config builds other tensors, or nothing."""
    built = built_from(kind, config)
    if built is None:
        return None
    have = shapes_of(built)
    if have.keys() != wanted.keys() or any(len(have[name]) != len(wanted[name]) for name in have):
        return None
    return {
        (name, dim): pair
        for name, shape in have.items()
        for dim, pair in enumerate(zip(shape, wanted[name], strict=True))
        if pair[0] != pair[1]
    }


def _candidates(config: Any, wrong: Wrong) -> Iterator[ConfigEdit]:
    """Yield entries with new values: those that are a length as it was, those in proportion to one, and small ones."""
    changes = sorted(set(wrong.values()), reverse=True)
    entries = list(_entries(config))
    scaled = [
        ConfigEdit(path, name, value * new // old)
        for old, new in changes
        for path, name, value in entries
        if value != old and value > 1 and value * new % old == 0
    ]
    smaller = [ConfigEdit(p, name, n) for p, name, value in entries if value <= SMALL for n in range(value - 1, 0, -1)]
    yield from dict.fromkeys((*_exact(config, wrong), *scaled, *smaller))


def _exact(config: Any, wrong: Wrong) -> list[ConfigEdit]:
    """Return entries that hold a length as it was, with the length wanted."""
    changes = sorted(set(wrong.values()), reverse=True)
    return [
        ConfigEdit(path, name, new) for old, new in changes for path, name, value in _entries(config) if value == old
    ]


def _entries(config: Any) -> Iterator[tuple[str, str, int]]:
    """Yield (path of a config, entry, value) of all ints."""
    for part, own in _parts(config):
        yield from ((own, name, n) for name, n in vars(part).items() if type(n) is int and not name.startswith("_"))


def _pins(config: Any) -> Iterator[ConfigEdit]:
    """Yield the sizes of heads that follow from the number of heads, as entries: then the number alone can change."""
    for part, path in _parts(config):
        width, heads = getattr(part, "hidden_size", None), getattr(part, "num_attention_heads", None)
        if type(width) is int and type(heads) is int and getattr(part, "head_dim", None) is None and heads:
            yield ConfigEdit(path, "head_dim", width // heads)


def _parts(config: Any, path: str = "") -> Iterator[tuple[Any, str]]:
    """Yield a config and the configs in it, with their paths."""
    yield config, path
    for name, value in vars(config).items():
        if callable(getattr(value, "to_dict", None)):
            yield from _parts(value, f"{path}.{name}".lstrip("."))


def _configs(config: Any) -> Iterator[Any]:
    """Yield a config and the configs in it."""
    return (part for part, _ in _parts(config))


def _at(config: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        config = getattr(config, name)
    return config
