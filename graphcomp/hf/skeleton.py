"""How a model differs from the one that its config builds, and how that one is given the shapes of the other.

Both models are compared by name: tensors, modules and their int attributes. Nothing is remembered of how a model was
cut, so that what was trained, resized or cut again is described as it is now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.errors import CheckpointError
from graphcomp.hf.integers import no_module
from graphcomp.hf.section import Section, Value, damaged
from graphcomp.ir.settings import OwnSettings, ints_of, is_settings, with_own
from graphcomp.native.model import description, redescribed
from graphcomp.native.vocabulary import Trimmed, become_trimmed, can_become
from graphcomp.torch_compat import buffer_table, module_table, non_persistent, parameter_table, refresh_flat_weights

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Modules whose children can go without a trace; in others None takes the place of a child."""


def _has_adapters(model: nn.Module) -> bool:
    """Return whether layers of adapters (peft) stand around layers of the model."""
    return any(hasattr(module, "base_layer") and hasattr(module, "merge") for module in model.modules())


def cannot_be_written(model: nn.Module, why: str) -> CheckpointError:
    """Return the error of a model that a section cannot describe."""
    return CheckpointError(
        f"{type(model).__name__} cannot be saved so that from_pretrained loads it",
        why=why,
        fix="small.save(folder) and graphcomp.load(folder), where `small` is the result of compress"
        + "; of an adapter (peft): peft_model.save_pretrained(folder), or merge_and_unload() first"
        * _has_adapters(model),
    )


# ------------------------------------------------------------------------------------------------ comparing
def difference(model: nn.Module, built: nn.Module) -> Section:
    """Return the section that makes `built` have the shapes of `model`; `built` has them afterwards.

    Args:
        model: as it is to be saved.
        built: what its class builds from its config, on the meta device.

    Raises:
        CheckpointError: the two differ in something that a section does not hold.
    """
    section = Section(without=_without(model, built), trimmed=_trimmed(model))
    resize(built, section)
    _check_classes(model, built)
    shapes, stored = _shapes(model, built)
    section = replace(section, shapes=shapes, stored=stored)
    resize(built, replace(section, without=(), trimmed={}))
    section = replace(section, attributes=dict(_attributes(model, built)))
    resize(built, Section(attributes=section.attributes))
    return section


def first_difference(model: nn.Module, built: nn.Module) -> str:
    """Return the first name, shape or int attribute in which two models differ; "" where they are alike."""
    mine, theirs = _tensors(model), _tensors(built)
    if odd := sorted(set(mine) ^ set(theirs)):
        return f"{odd[0]!r} is in one of the two alone"
    for name, tensor in mine.items():
        if tensor.shape != theirs[name].shape:
            return f"{name!r} is {tuple(tensor.shape)} and would be {tuple(theirs[name].shape)}"
    for (path, name), value in _attributes(model, built):
        return f"{f'{path}.{name}'.lstrip('.')} is {value} and would be {attrgetter(name)(built.get_submodule(path))}"
    return ""


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _longest(model: nn.Module) -> int:
    """Return the most indices that a dim of a tensor has."""
    return max((n for tensor in _tensors(model).values() for n in tensor.shape), default=0)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _without(model: nn.Module, built: nn.Module) -> tuple[str, ...]:
    """Return the outermost modules that `built` has and `model` has not."""
    mine, theirs = _modules(model), _modules(built)
    if odd := next((path for path in mine if path not in theirs), None):
        raise cannot_be_written(model, f"its config builds no module {odd!r} ({type(mine[odd]).__name__})")
    found: list[str] = []
    for path in theirs:
        if path in mine or any(path.startswith(f"{outer}.") for outer in found):
            continue
        parent, _, name = path.rpartition(".")
        if not isinstance(mine[parent], CONTAINERS) and getattr(mine[parent], name, model) is not None:
            raise cannot_be_written(model, f"its config builds a module {path!r}, which the model has not")
        found.append(path)
    return tuple(found)


def _trimmed(model: nn.Module) -> dict[str, str]:
    return {path: type(module).__name__ for path, module in _modules(model).items() if isinstance(module, Trimmed)}


def _check_classes(model: nn.Module, built: nn.Module) -> None:
    mine = _modules(model)
    for path, module in _modules(built).items():
        own = type(mine[path])
        if not issubclass(own, type(module)) and own.__name__ != type(module).__name__:
            raise cannot_be_written(
                model, f"its config builds a {type(module).__name__} at {path!r}, and the model has a {own.__name__}"
            )


def _shapes(model: nn.Module, built: nn.Module) -> tuple[dict[str, tuple[int, ...] | None], tuple[str, ...]]:
    """Return the shapes that differ, and the names of recomputed buffers among them."""
    mine, theirs = _tensors(model), _tensors(built)
    shapes: dict[str, tuple[int, ...] | None] = {}
    stored = []
    for name, tensor in theirs.items():
        own = mine.get(name)
        if own is None:
            owner, _, last = name.rpartition(".")
            if parameter_table(model.get_submodule(owner)).get(last, tensor) is not None:
                raise cannot_be_written(model, f"its config builds a tensor {name!r}, which the model has not")
            shapes[name] = None
        elif own.shape != tensor.shape:
            if own.dim() != tensor.dim():
                raise cannot_be_written(model, f"{name!r} has {own.dim()} dims, and {tensor.dim()} by the config")
            if any(n > most for n, most in zip(own.shape, tensor.shape, strict=True)):
                raise cannot_be_written(
                    model, f"{name!r} is {tuple(own.shape)}, larger than {tuple(tensor.shape)} of the config"
                )
            shapes[name] = tuple(own.shape)
            stored += [name] if _is_recomputed(built, name) else []
    for name in mine.keys() - theirs.keys():
        raise cannot_be_written(model, f"its config builds no tensor {name!r}")
    return shapes, tuple(stored)


def _is_recomputed(model: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return last in non_persistent(model.get_submodule(owner))


def _attributes(model: nn.Module, built: nn.Module) -> Iterator[tuple[tuple[str, str], Value]]:
    """Yield the attributes of ints that differ, with the value in `model`."""
    mine, longest = _modules(model), _longest(model)
    for path, module in _modules(built).items():
        own = vars(mine[path])
        for name, old in vars(module).items():
            new = own.get(name, old)
            mirrors = type(new) is int and new > longest and getattr(own.get("config"), name, None) == old
            if mirrors:  # longer than any tensor: what was left behind when the config's entry and the tensors changed
                continue
            if type(new) is OwnSettings:
                held = ints_of(old) if is_settings(old) else {}
                pairs = vars(new)["own"].items()
                yield from (((path, f"{name}.{inner}"), n) for inner, n in pairs if held.get(inner) != n)
            if name.startswith("__") or not (_is_plain(old) and _is_plain(new)):
                continue
            if new != old and (type(new) is not list or tuple(new) != old):
                yield (path, name), tuple(new) if isinstance(new, (list, tuple)) else new


def _is_plain(value: Any) -> bool:
    """Whether an attribute can be what a section holds: an int, a sequence of ints, None."""
    if isinstance(value, (list, tuple)):
        return all(type(item) is int for item in value)
    return value is None or type(value) is int


# ------------------------------------------------------------------------------------------------ resizing
def resize(built: nn.Module, section: Section, locate: Callable[[str], str | None] = lambda name: name) -> int:
    """Give the model that a config builds the shapes of the section, in place; return how many entries were used.

    Args:
        built: on the meta device; new tensors stand where the old ones stood.
        locate: from a name in the section to the name in `built`, None for what `built` does not have.

    Raises:
        CheckpointError: a name that `built` has not; a size that grows; an attribute that is none or no int.
    """
    used = 0
    for path, kind in section.trimmed.items():
        used += _trim(built, locate(path), kind)
    for path in section.without:
        used += _remove(built, locate(path))
    before = {path: description(module) for path, module in _modules(built).items()} if section.shapes else {}
    limit = _longest(built)
    new: dict[int, Tensor] = {}
    for name, shape in section.shapes.items():
        used += _resize(built, locate(name), shape, new)
    for name in section.stored:
        if (own := locate(name)) is not None:
            owner, _, last = own.rpartition(".")
            non_persistent(_module(built, owner)).discard(last)
    for path, module in _modules(built).items() if section.shapes else ():
        refresh_flat_weights(module)
        vars(module).update(redescribed(module, before[path], description(module)))
    for (path, name), value in section.attributes.items():
        used += _set(built, locate(path), name, value, limit)
    return used


def _module(built: nn.Module, path: str) -> nn.Module:
    try:
        return built.get_submodule(path)
    except AttributeError as error:
        raise no_module(built, path) from error


def _trim(built: nn.Module, path: str | None, kind: str) -> int:
    if path is None:
        return 0
    module = _module(built, path)
    if not can_become(module, kind):
        raise damaged(f"no {kind!r:.50} can take the place of the {type(module).__name__} at {path!r}")
    assert isinstance(module.weight, Tensor)
    vocabulary = module.weight.shape[0]
    become_trimmed(module, vocabulary, torch.empty(vocabulary, dtype=torch.int32, device=module.weight.device))
    return 1


def _remove(built: nn.Module, path: str | None) -> int:
    if path is None:
        return 0
    _module(built, path)
    owner, _, name = path.rpartition(".")
    parent = _module(built, owner)
    if not path:
        raise damaged("the whole model is among what is gone")
    if isinstance(parent, CONTAINERS):
        del module_table(parent)[name]
    else:
        setattr(parent, name, None)
    return 1


def _resize(built: nn.Module, name: str | None, shape: tuple[int, ...] | None, new: dict[int, Tensor]) -> int:
    """Put an empty tensor of another shape in the place of one; tensors of several names stay one (`new`)."""
    if name is None:
        return 0
    owner, _, last = name.rpartition(".")
    module = _module(built, owner)
    parameters = parameter_table(module)
    home: dict[str, Any] = parameters if last in parameters else buffer_table(module)
    old = home.get(last)
    if not isinstance(old, Tensor):
        raise damaged(f"{type(built).__name__} has no tensor {name!r:.80}")
    if shape is None:
        home[last] = None
        return 1
    if len(shape) != old.dim() or any(n > most for n, most in zip(shape, old.shape, strict=True)):
        raise damaged(f"{name!r} of {tuple(old.shape)} cannot become {shape}: a cut makes no dim longer")
    if id(old) not in new:
        data = torch.empty(shape, dtype=old.dtype, device=old.device)
        new[id(old)] = nn.Parameter(data, old.requires_grad) if isinstance(old, nn.Parameter) else data
        vars(new[id(old)]).update(vars(old))
    home[last] = new[id(old)]
    return 1


def _set(built: nn.Module, path: str | None, name: str, value: Value, limit: int) -> int:
    if path is None:
        return 0
    attributes = vars(_module(built, path))
    holder, _, inner = name.rpartition(".")
    settings = ints_of(attributes[holder]) if holder and is_settings(attributes.get(holder)) else {}
    old = settings.get(inner, "") if holder else attributes.get(name, "")
    if not _is_plain(old):
        raise damaged(f"{f'{path}.{name}'.lstrip('.')!r:.80} is no attribute of ints of {type(built).__name__}")
    numbers = (*_numbers(value), *_numbers(old))
    most = max(limit, *map(abs, _numbers(old)), 1)
    if any(abs(n) > most for n in numbers):
        raise damaged(f"{f'{path}.{name}'.lstrip('.')!r:.80} must be at most {most}, got {value}")
    if holder and type(value) is not int:
        raise damaged(f"{f'{path}.{name}'.lstrip('.')!r:.80} must be an int, got {value}")
    if holder:
        attributes[holder] = with_own(attributes[holder], inner, int(value))  # type: ignore[arg-type]
    elif isinstance(value, tuple):
        attributes[name] = list(value) if isinstance(old, list) else value
    else:
        attributes[name] = value
    return 1


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else () if value is None else (value,)
