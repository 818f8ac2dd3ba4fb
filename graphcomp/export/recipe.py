"""How to build a model again, without its weights: its class and constructor arguments, as JSON.

    transformers   class and config of a PreTrainedModel
    class          an importable class, whose constructor arguments are attributes of the same name or have defaults;
                   containers of torch.nn (Sequential, ModuleList, ModuleDict) with a recipe for each child
    torchvision    a builder of torchvision's registry

A recipe is written only after it was tried: what it builds must have the same tree of classes and the same tensor
names. Shapes need not agree, since every tensor is stored; nor need attributes that are numbers, strings or tuples of
these: those that differ are stored, too.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils import parametrize

from graphcomp.errors import CheckpointError
from graphcomp.graph_json import decode, encode
from graphcomp.graph_module import tensor_names

Recipe = dict[str, Any]
Attributes = list[tuple[str, str, Any]]
"""Module path, attribute, its value (as `encode` writes it)."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
MISSING = object()


# ------------------------------------------------------------------------------------------------ finding
def find_recipe(model: nn.Module, graph_at: str | None = None) -> Recipe | None:
    """A recipe that was seen to build `model` again, but for tensors and simple attributes; None: there is none.

    Args:
        graph_at: path of a submodule that stands for another one (a graph in place of the user's); not compared.
    """
    for make in (_of_transformers, _of_class, _of_torchvision):
        for recipe in make(model):
            device = _device_that_fits(recipe, model, graph_at)
            if device:
                return {**recipe, "device": device}
    return None


def _device_that_fits(recipe: Recipe, model: nn.Module, graph_at: str | None) -> str:
    """Where the recipe builds a model like `model`: without memory if that works, else on the CPU; "" if nowhere."""
    for device in ("meta", "cpu"):
        try:
            built = build({**recipe, "device": device})
        except Exception:  # a constructor may object to its arguments, or to the device, in any way
            continue
        if not same_structure(built, model, graph_at):
            return ""
        if device == "cpu" or not _stray_meta(built):
            return device
    return ""


def same_structure(built: nn.Module, model: nn.Module, graph_at: str | None = None) -> bool:
    """Whether both have the same tree of classes, the same tensor names, and the same functions as attributes."""
    ours, theirs = _tree(built, graph_at), _tree(model, graph_at)
    if {path: _classes(m) for path, m in ours.items()} != {path: _classes(m) for path, m in theirs.items()}:
        return False
    names = [{n for n in tensor_names(m) if not _within(n, graph_at)} for m in (built, model)]
    return names[0] == names[1] and all(_same_functions(ours[path], theirs[path]) for path in ours)


def _classes(module: nn.Module) -> tuple[type, ...]:
    """Its class; where it has parametrizations, of a class that was made for it alone, the bases of that."""
    return type(module).__bases__ if parametrize.is_parametrized(module) else (type(module),)


def _tree(model: nn.Module, graph_at: str | None) -> dict[str, nn.Module]:
    return {path: m for path, m in model.named_modules() if not _within(path, graph_at)}


def _within(name: str, path: str | None) -> bool:
    return path is not None and (name == path or name.startswith(f"{path}.") or path == "")


def _same_functions(a: nn.Module, b: nn.Module) -> bool:
    functions = {name: f for name, f in vars(b).items() if isinstance(f, types.FunctionType)}
    return all(getattr(vars(a).get(name), "__code__", None) is f.__code__ for name, f in functions.items())


def _stray_meta(model: nn.Module) -> bool:
    """Whether tensors outside parameters, buffers and plain attributes would stay without data."""
    named = {id(t) for t in tensor_names(model).values()}
    inside = (leaf for m in model.modules() for value in vars(m).values() for leaf in pytree.tree_leaves(value))
    return any(isinstance(leaf, Tensor) and leaf.is_meta and id(leaf) not in named for leaf in inside)


def _of_transformers(model: nn.Module) -> Iterator[Recipe]:
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel) or not importable(type(model)):
        return
    config = model.config
    recipe = {
        "kind": "transformers",
        "class": class_path(type(model)),
        "config_class": class_path(type(config)),
        "config": config.to_json_string(use_diff=False),
        "attention": getattr(config, "_attn_implementation", None),
    }
    if getattr(model, "generation_config", None) is not None:
        recipe["generation"] = model.generation_config.to_json_string(use_diff=False)
    yield recipe


def _of_class(model: nn.Module) -> Iterator[Recipe]:
    recipe = class_recipe(model)
    if recipe is not None:
        yield recipe


def class_recipe(model: nn.Module) -> Recipe | None:
    """Class, arguments and, for containers, children; None where an argument is not known."""
    if not importable(type(model)):
        return None
    if type(model) in CONTAINERS:
        children = {name: class_recipe(child) for name, child in model.named_children()}
        if any(child is None for child in children.values()) or len(children) != len(model._modules):
            return None
        return {"kind": "class", "class": class_path(type(model)), "children": children}
    arguments = constructor_arguments(model)
    return None if arguments is None else {"kind": "class", "class": class_path(type(model)), "arguments": arguments}


def constructor_arguments(model: nn.Module) -> dict[str, Any] | None:
    """Keyword arguments of the constructor, read off the attributes of the same name; None where one is missing."""
    constructor = nn.RNNBase if isinstance(model, nn.RNNBase) else type(model)
    found: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(constructor.__init__).parameters.items())[1:]:
        value = _argument(model, name)
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or name in ("device", "dtype"):
            continue
        if isinstance(model, nn.RNNBase) and name == "mode" and type(model) is not nn.RNNBase:
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            return None
        if value is not MISSING:
            found[name] = value
        elif parameter.default is parameter.empty:
            return None
    return found


def _argument(model: nn.Module, name: str) -> Any:
    """The value of the attribute `name` as JSON; whether a bias is there, for `bias`."""
    if name == "bias" and not isinstance(getattr(model, name, None), bool):
        names = ("bias", "in_proj_bias")
        present = [getattr(model, n) is not None for n in names if hasattr(model, n)]
        return any(present) if present else MISSING
    if name == "add_bias_kv":
        return getattr(model, "bias_k", None) is not None
    value = vars(model).get(name, MISSING)
    return MISSING if value is MISSING or not is_plain(value) else encode(value)


def _of_torchvision(model: nn.Module) -> Iterator[Recipe]:
    torchvision = sys.modules.get("torchvision")
    if torchvision is None or not type(model).__module__.startswith("torchvision.models"):
        return
    models = importlib.import_module("torchvision.models")
    own = constructor_arguments(model) or {}
    for name in models.list_models():
        builder = models.get_model_builder(name)
        if inspect.signature(builder).return_annotation not in (type(model), type(model).__name__):
            continue
        for options in ({}, {k: v for k, v in own.items() if v is not None}, {"aux_logits": False}):
            yield {"kind": "torchvision", "builder": name, "arguments": options}


# ------------------------------------------------------------------------------------------------ building
def build(recipe: Recipe) -> nn.Module:
    """What the recipe says, on its device ("meta" or "cpu"); any weights.

    Raises:
        CheckpointError: a class that cannot be imported, or is no nn.Module.
        Whatever the constructor raises.
    """
    with torch.random.fork_rng(devices=[]), torch.device(recipe["device"]):
        return BUILDERS[recipe["kind"]](recipe)


def _build_class(recipe: Recipe) -> nn.Module:
    kind = import_class(recipe["class"])
    if "children" in recipe:
        children = {name: _build_class(child) for name, child in recipe["children"].items()}
        return _container(kind, children)
    arguments = {name: decode(value, {}, {}) for name, value in recipe["arguments"].items()}
    built: nn.Module = kind(**arguments)
    return built


def _container(kind: type[nn.Module], children: Mapping[str, nn.Module]) -> nn.Module:
    built = kind()
    for name, child in children.items():
        built.add_module(name, child)
    return built


def _build_transformers(recipe: Recipe) -> nn.Module:
    import json

    config_class: Any = import_object(recipe["config_class"])
    kind: Any = import_class(recipe["class"])
    config = config_class.from_dict(json.loads(recipe["config"]))
    if recipe.get("attention") is not None:
        config._attn_implementation = recipe["attention"]
    built: Any = kind(config)
    if "generation" in recipe:
        built.generation_config = type(built.generation_config).from_dict(json.loads(recipe["generation"]))
    return built  # type: ignore[no-any-return]


def _build_torchvision(recipe: Recipe) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    accepted = inspect.signature(models.get_model_builder(recipe["builder"])).parameters
    none = {name: None for name in ("weights", "weights_backbone") if name in accepted}
    quick = {"init_weights": False} if recipe["builder"] in ("googlenet", "inception_v3") else {}
    options = {name: decode(value, {}, {}) for name, value in recipe["arguments"].items()}
    built: nn.Module = models.get_model(recipe["builder"], **none, **{**quick, **options})
    return built


BUILDERS: dict[str, Callable[[Recipe], nn.Module]] = {
    "class": _build_class,
    "transformers": _build_transformers,
    "torchvision": _build_torchvision,
}


# ------------------------------------------------------------------------------------------------ classes by name
def class_path(kind: type) -> str:
    """'package.module:Outer.Inner'"""
    return f"{kind.__module__}:{kind.__qualname__}"


def importable(kind: type) -> bool:
    """Whether another process finds `kind` under its name."""
    if kind.__module__ == "__main__":
        return False
    try:
        return import_object(class_path(kind)) is kind
    except CheckpointError:
        return False


def import_object(path: str) -> Any:
    """What 'package.module:Outer.Inner' names.

    Raises:
        CheckpointError: there is no such thing in this process.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"the model's class {path} cannot be imported",
            why=str(error),
            fix="graphcomp.load(folder, model_factory=lambda: YourModel(…)), with the original architecture",
        ) from error
    return found


def import_class(path: str) -> type[nn.Module]:
    """The nn.Module class of that path.

    Raises:
        CheckpointError: there is none.
    """
    found = import_object(path)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CheckpointError(f"{path} is not an nn.Module class")
    return found


# ------------------------------------------------------------------------------------------------ simple attributes
def is_plain(value: Any) -> bool:
    """None, a number, a string, or a tuple, list or dict of these."""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value)) and type(value) in (tuple, list, torch.Size)
    if type(value) is dict:
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def differing_attributes(built: nn.Module, model: nn.Module, graph_at: str | None = None) -> Attributes:
    """The simple attributes that `model` has otherwise than a fresh `built`."""
    found: Attributes = []
    fresh = dict(built.named_modules())
    for path, module in _tree(model, graph_at).items():
        base = vars(fresh[path])
        for name, value in vars(module).items():
            if name == "training" or name.startswith("_forward") or name.startswith("_backward"):
                continue
            if type(value) is not dict and is_plain(value) and not _equal(base.get(name, MISSING), value):
                found.append((path, name, encode(tuple(value) if isinstance(value, torch.Size) else value)))
    return found


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b or (a != a and b != b))


def apply_attributes(model: nn.Module, attributes: Attributes) -> None:
    """Give `model` the attributes that were stored."""
    for path, name, value in attributes:
        vars(model.get_submodule(path))[name] = decode(value, {}, {})
