"""How to build a model again, without its weights: its class and constructor arguments, as JSON.

    transformers   class and config of a PreTrainedModel
    class          an importable class, whose constructor arguments are attributes of the same name or have defaults;
                   containers of torch.nn (Sequential, ModuleList, ModuleDict) with a recipe for each child
    torchvision    a builder of torchvision's registry
    timm           a name of timm's registry
    tree           the importable classes of all modules, put together without their constructors, as pickle does

Embeddings and heads of a trimmed vocabulary (native/vocabulary.py) take the places of torch's in what a recipe builds.

A recipe is written only after it was tried: what it builds must have the same tree of classes and the same names of
parameters and buffers. Shapes need not agree, since every tensor is stored; nor need the attributes of modules: those
that differ are stored, too (state.py). A tree holds where every attribute can be stored.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from graphcomp.checkpoint.names import class_path, import_class, import_object, importable
from graphcomp.checkpoint.state import INTERNAL, MISSING, Decoder, Encoder, Twins, attributes_of, submodule
from graphcomp.errors import CheckpointError
from graphcomp.ir.json_values import damaged, decode, encode
from graphcomp.ir.module import tensor_names
from graphcomp.ir.settings import OwnSettings, ints_of, is_settings, with_own
from graphcomp.ir.trust import EVERYTHING, Trust
from graphcomp.native.vocabulary import Trimmed, trim_as
from graphcomp.torch_compat import MODULE_HOOKS, buffer_table, module_table, non_persistent, parameter_table, pytree

Recipe = dict[str, Any]
Attributes = list[tuple[str, str, Any]]
"""Module path, attribute, its value (as `Encoder` writes it)."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
LOADERS = ("pretrained", "weights", "checkpoint", "cache", "progress")
"""First words of arguments of builders that load something."""


@dataclass(frozen=True)
class Found:
    """How a model is built again.

    Attributes:
        recipe: None where there is none.
        attributes: those that what the recipe builds has otherwise.
        extra: tensors that values of these hold, by the names they are given in the file.
        lost: attributes that differ and have no form in a file; without a recipe, why there is none.
    """

    recipe: Recipe | None = None
    attributes: Attributes = field(default_factory=list)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    lost: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------ finding
def find_recipe(model: nn.Module, graph_at: str | None = None) -> Found:
    """A recipe that was seen to build `model` again, but for tensors and the attributes beside it.

    Args:
        graph_at: path of a submodule that stands for another one (a graph in place of the user's); not compared.
    """
    found = Found()
    for make in (_of_transformers, _of_class, _of_torchvision, _of_timm, _of_tree):
        for recipe in make(model, graph_at):
            found = _tried(recipe, model, graph_at)
            if found.recipe is not None:
                return found
    return found


def _tried(recipe: Recipe, model: nn.Module, graph_at: str | None) -> Found:
    """The recipe with the device that fits and what differs from `model`: without memory if that works, else on the
    CPU. No recipe where it builds another model."""
    tree = _tree(model, graph_at).items()
    trimmed = {path: type(m).__name__ for path, m in tree if isinstance(m, Trimmed)}
    for device in ("meta", "cpu"):
        placed = {**recipe, "device": device, **({"trimmed": trimmed} if trimmed else {})}
        try:
            built = build(placed)
        except Exception:  # a constructor may object to its arguments, or to the device, in any way
            continue
        if not same_structure(built, model, graph_at):
            break
        if device == "cpu" or not _stray_meta(built, model):
            encoder = Encoder(model)
            attributes, lost = differing_attributes(built, model, encoder, graph_at)
            names = tuple(f"{path}.{name}" if path else name for path, name, _ in lost)
            whole = recipe["kind"] != "tree" and not any(isinstance(v, types.FunctionType) for _, _, v in lost)
            return Found(placed, attributes, encoder.extra, names) if whole or not lost else Found(lost=names)
    return Found()


def same_structure(built: nn.Module, model: nn.Module, graph_at: str | None = None) -> bool:
    """Whether both have the same tree of classes, and the same names of parameters and buffers."""
    ours, theirs = _tree(built, graph_at), _tree(model, graph_at)
    if {path: _classes(m) for path, m in ours.items()} != {path: _classes(m) for path, m in theirs.items()}:
        return False
    return all(_registered(ours[path]) == _registered(theirs[path]) for path in ours)


def _classes(module: nn.Module) -> tuple[type, ...]:
    """Its class; where it has parametrizations, of a class that was made for it alone, the bases of that."""
    return type(module).__bases__ if parametrize.is_parametrized(module) else (type(module),)


def _registered(module: nn.Module) -> tuple[dict[str, bool], dict[str, bool]]:
    """Names of parameters and of buffers, each with whether there is one."""
    parameters, buffers = parameter_table(module), buffer_table(module)
    return {n: t is not None for n, t in parameters.items()}, {n: t is not None for n, t in buffers.items()}


def _tree(model: nn.Module, graph_at: str | None) -> dict[str, nn.Module]:
    return {path: m for path, m in model.named_modules() if not _within(path, graph_at)}


def _within(name: str, path: str | None) -> bool:
    return path is not None and (name == path or name.startswith(f"{path}.") or path == "")


def _stray_meta(built: nn.Module, model: nn.Module) -> bool:
    """Whether tensors would stay without data, as the checkpoint of `model` has none for them."""
    stored = tensor_names(model)
    filled = {id(t) for name, t in tensor_names(built).items() if name in stored}
    inside = (leaf for m in built.modules() for value in vars(m).values() for leaf in pytree.tree_leaves(value))
    return any(isinstance(leaf, Tensor) and leaf.is_meta and id(leaf) not in filled for leaf in inside)


def _of_transformers(model: nn.Module, graph_at: str | None) -> Iterator[Recipe]:
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


def _of_class(model: nn.Module, graph_at: str | None) -> Iterator[Recipe]:
    recipe = class_recipe(model)
    if recipe is not None:
        yield recipe


def class_recipe(model: nn.Module) -> Recipe | None:
    """Class, arguments and, for containers, children; None where an argument is not known."""
    if not importable(type(model)):
        return None
    if type(model) in CONTAINERS:
        children = {name: class_recipe(child) for name, child in model.named_children()}
        if any(child is None for child in children.values()) or len(children) != len(module_table(model)):
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


def is_plain(value: Any) -> bool:
    """None, a number, a string, or a tuple, list or dict of these."""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value)) and type(value) in (tuple, list, torch.Size)
    if type(value) is dict:
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _of_torchvision(model: nn.Module, graph_at: str | None) -> Iterator[Recipe]:
    if "torchvision" not in sys.modules or not type(model).__module__.startswith("torchvision.models"):
        return
    models = importlib.import_module("torchvision.models")
    own = constructor_arguments(model) or {}
    for name in models.list_models():
        builder = models.get_model_builder(name)
        if inspect.signature(builder).return_annotation not in (type(model), type(model).__name__):
            continue
        for options in ({}, {k: v for k, v in own.items() if v is not None}, {"aux_logits": False}):
            yield {"kind": "torchvision", "builder": name, "arguments": options}


def _of_timm(model: nn.Module, graph_at: str | None) -> Iterator[Recipe]:
    card = getattr(model, "pretrained_cfg", None)
    name = card.get("architecture") if isinstance(card, dict) else None
    if "timm" not in sys.modules or not type(model).__module__.startswith("timm.") or not name:
        return
    known = {key: getattr(model, key) for key in ("num_classes", "in_chans") if hasattr(model, key)}
    for options in ({}, {key: value for key, value in known.items() if is_plain(value)}):
        yield {"kind": "timm", "name": name, "arguments": {key: encode(value) for key, value in options.items()}}


def _of_tree(model: nn.Module, graph_at: str | None) -> Iterator[Recipe]:
    node = _tree_node(model, "", graph_at, {})
    if node is not None:
        yield {"kind": "tree", **node}


def _tree_node(module: nn.Module, path: str, graph_at: str | None, seen: dict[int, str]) -> Recipe | None:
    """Classes and names of the modules from `module` on; None where one of them cannot be built without more."""
    if id(module) in seen:
        return {"same": seen[id(module)]}
    seen[id(module)] = path
    if _within(path, graph_at):
        return {"kind": "class", "class": class_path(nn.Identity), "arguments": {}}
    if isinstance(module, nn.RNNBase):  # such layers hold references to their weights that only they can make
        return class_recipe(module)
    hooked = any(vars(module)[name] for name in MODULE_HOOKS)
    if hooked or not importable(type(module)):
        return None
    children: dict[str, Recipe | None] = {}
    for name, child in module_table(module).items():
        children[name] = None
        if child is not None:
            children[name] = _tree_node(child, f"{path}.{name}" if path else name, graph_at, seen)
            if children[name] is None:
                return None
    return {
        "class": class_path(type(module)),
        "parameters": {name: tensor is not None for name, tensor in parameter_table(module).items()},
        "buffers": {
            name: None if tensor is None else name not in non_persistent(module)
            for name, tensor in buffer_table(module).items()
        },
        "modules": children,
    }


# ------------------------------------------------------------------------------------------------ building
def build(recipe: Any, trust: Trust = EVERYTHING) -> nn.Module:
    """What the recipe says, on its device ("meta" or "cpu"); any weights.

    Raises:
        CheckpointError: a class that may not be imported, or is no nn.Module; what is no recipe.
        Whatever the constructor raises.
    """
    kind = recipe.get("kind") if isinstance(recipe, dict) else None
    if kind not in BUILDERS or recipe.get("device") not in ("meta", "cpu"):
        raise damaged(f"the recipe is {recipe!r:.100}")
    with torch.random.fork_rng(devices=[]), torch.device(recipe["device"]):
        built = BUILDERS[kind](recipe, trust)
        trimmed = recipe.get("trimmed", {})
        if not isinstance(trimmed, dict):
            raise damaged(f"the trimmed modules of the recipe are {trimmed!r:.100}")
        trim_as(built, trimmed)
        return built


def _build_class(recipe: Recipe, trust: Trust) -> nn.Module:
    if not isinstance(recipe, dict):
        raise damaged(f"the recipe of a module is {recipe!r:.100}")
    kind = import_class(recipe.get("class"), trust)
    if "children" in recipe:
        if kind not in CONTAINERS:
            raise damaged(f"{recipe['class']} has children in its recipe", "it is no container")
        children = _entries(recipe, "children")
        return _with_children(kind(), {name: _build_class(child, trust) for name, child in children.items()})
    built: nn.Module = kind(**_arguments(recipe))
    return built


def _entries(recipe: Recipe, key: str) -> dict[str, Any]:
    found = recipe.get(key)
    if not isinstance(found, dict):
        raise damaged(f"the {key} of a recipe are {found!r:.100}")
    return found


def _arguments(recipe: Recipe) -> dict[str, Any]:
    return {name: decode(value, {}, {}) for name, value in _entries(recipe, "arguments").items()}


def _builder_arguments(recipe: Recipe) -> dict[str, Any]:
    """Arguments of a builder of a library, which loads weights or files where it is asked to."""
    found = _arguments(recipe)
    loads = next((name for name in found if name.startswith(LOADERS)), None)
    if loads is not None:
        raise damaged(f"the recipe has the argument {loads!r:.100}", "the builder would load something")
    return found


def _with_children(module: nn.Module, children: Mapping[str, nn.Module | None]) -> nn.Module:
    for name, child in children.items():
        if not name or "." in name or (hasattr(module, name) and name not in module_table(module)):
            raise damaged(f"a submodule of {type(module).__name__} is called {name!r:.100}")
        module_table(module)[name] = child
    return module


def _build_transformers(recipe: Recipe, trust: Trust) -> nn.Module:
    transformers = trust.module("transformers")
    config_class: Any = import_object(recipe.get("config_class"), trust)
    kind: Any = import_class(recipe.get("class"), trust)
    attention = recipe.get("attention")
    if not issubclass(kind, transformers.PreTrainedModel) or not _is_config(config_class, transformers):
        raise damaged(
            f"{recipe.get('class')!r:.100} with {recipe.get('config_class')!r:.100} is no model with a config"
        )
    config = config_class.from_dict(_json_of(recipe, "config"))
    if attention is not None:
        config._attn_implementation = _attention(attention)
    built: Any = kind(config)
    if "generation" in recipe:
        built.generation_config = type(built.generation_config).from_dict(_json_of(recipe, "generation"))
    return built  # type: ignore[no-any-return]


def _is_config(kind: Any, transformers: types.ModuleType) -> bool:
    return isinstance(kind, type) and issubclass(kind, transformers.PretrainedConfig)


def _json_of(recipe: Recipe, key: str) -> dict[str, Any]:
    """A config, which is JSON in JSON, where it names no code of another place."""
    try:
        found = json.loads(recipe[key])
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(f"the {key} of the recipe is {recipe[key]!r:.100}", str(error)) from error
    if not isinstance(found, dict):
        raise damaged(f"the {key} of the recipe is {found!r:.100}")
    waiting: list[Any] = [found]
    while waiting:
        value = waiting.pop()
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if isinstance(value, dict):
            for name, item in value.items():
                if "attn_implementation" in name and item is not None:
                    _attention(item)
    return found


def _attention(name: Any) -> Any:
    """The name of an implementation of attention, or names by part; 'owner/name' would be a kernel from the network."""
    if isinstance(name, dict):
        return {part: _attention(item) for part, item in name.items()}
    if name is not None and (not isinstance(name, str) or not re.fullmatch(r"\w*", name)):
        raise damaged(f"the implementation of attention is {name!r:.100}", "it must be one of the library")
    return name


def _build_torchvision(recipe: Recipe, trust: Trust) -> nn.Module:
    models: Any = trust.module("torchvision.models")
    name, given = recipe.get("builder"), _builder_arguments(recipe)
    if name not in models.list_models():
        raise CheckpointError(f"torchvision has no builder {name!r:.100}", fix="install the version of the checkpoint")
    accepted = inspect.signature(models.get_model_builder(name)).parameters
    none = {name: None for name in ("weights", "weights_backbone") if name in accepted}
    quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    built: nn.Module = models.get_model(name, **none, **{**quick, **given})
    return built


def _build_timm(recipe: Recipe, trust: Trust) -> nn.Module:
    timm: Any = trust.module("timm")
    name, given = recipe.get("name"), _builder_arguments(recipe)
    if not isinstance(name, str) or not timm.is_model(name):
        raise CheckpointError(f"timm has no model {name!r:.100}", fix="install the version of the checkpoint")
    built: nn.Module = timm.create_model(name, pretrained=False, **given)
    return built


def _build_tree(recipe: Recipe, trust: Trust) -> nn.Module:
    made: dict[str, nn.Module] = {}
    return _build_node(recipe, "", made, trust)


def _build_node(node: Any, path: str, made: dict[str, nn.Module], trust: Trust) -> nn.Module:
    if not isinstance(node, dict):
        raise damaged(f"the recipe of the submodule {path!r:.100} is {node!r:.100}")
    if "same" in node:
        if node["same"] not in made:
            raise damaged(f"the submodule {path!r:.100} is the one at {node['same']!r:.100}")
        return made[node["same"]]
    if "arguments" in node:
        made[path] = _build_class(node, trust)
        return made[path]
    kind = import_class(node.get("class"), trust)
    module = made[path] = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, there in _entries(node, "parameters").items():
        module.register_parameter(name, nn.Parameter(_placeholder()) if there else None)
    for name, persistent in _entries(node, "buffers").items():
        module.register_buffer(name, None if persistent is None else _placeholder(), persistent=persistent is not False)
    children = {
        name: None if child is None else _build_node(child, f"{path}.{name}" if path else name, made, trust)
        for name, child in _entries(node, "modules").items()
    }
    return _with_children(module, children)


def _placeholder() -> Tensor:
    return torch.empty(0, device="meta")


BUILDERS: dict[str, Callable[[Recipe, Trust], nn.Module]] = {
    "class": _build_class,
    "transformers": _build_transformers,
    "torchvision": _build_torchvision,
    "timm": _build_timm,
    "tree": _build_tree,
}


# ------------------------------------------------------------------------------------------------ attributes
def differing_attributes(
    built: nn.Module, model: nn.Module, encoder: Encoder, graph_at: str | None = None
) -> tuple[Attributes, list[tuple[str, str, Any]]]:
    """The attributes that `model` has otherwise than a fresh `built`, and those of them that have no form in a file."""
    found: Attributes = []
    lost: list[tuple[str, str, Any]] = []
    numbers: Attributes = []  # of a module in settings that it shares; set once the settings are there
    twins, fresh = Twins(built, model), dict(built.named_modules())
    for path, module in _tree(model, graph_at).items():
        for name, value in attributes_of(module).items():
            if type(value) is OwnSettings:
                numbers += [(path, f"{name}.{inner}", n) for inner, n in vars(value)["own"].items()]
                value = vars(value)["shared"]
            if twins.alike(vars(fresh[path]).get(name, MISSING), value):
                continue
            try:
                _check_settable(module, name)
                found.append((path, name, encoder.encode(value, type(module))))
            except CheckpointError:
                lost.append((path, name, value))
    return found + numbers, lost


def apply_attributes(model: nn.Module, attributes: Attributes, decoder: Decoder) -> None:
    """Give `model` the attributes that were stored.

    Raises:
        CheckpointError: a place or a value that nobody writes.
    """
    for path, name, value in attributes:
        module = submodule(model, path)
        holder, _, inner = name.rpartition(".")
        _check_settable(module, holder or name)
        found = decoder.decode(value, type(module))
        if not holder:
            vars(module)[name] = found
            continue
        settings = vars(module).get(holder)
        if type(found) is not int or not is_settings(settings) or inner not in ints_of(settings):
            raise damaged(f"{name!r:.100} of {type(module).__name__} is stored as a number of its settings")
        vars(module)[holder] = with_own(settings, inner, found)


def _check_settable(module: nn.Module, name: str) -> None:
    """Refuse what is no plain attribute: methods, properties, registered tensors and torch's own."""
    own = inspect.getattr_static(type(module), name, None)
    taken = name in INTERNAL or any(
        name in held for held in (parameter_table(module), buffer_table(module), module_table(module))
    )
    if taken or not name.isidentifier() or callable(own) or hasattr(type(own), "__get__"):
        raise damaged(f"{name!r:.100} of {type(module).__name__} is stored as an attribute", "it is something else")
