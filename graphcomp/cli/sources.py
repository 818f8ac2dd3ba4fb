"""Models by name: a factory of a package, timm, torchvision, transformers, a checkpoint folder, a .pt2 file."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.errors import PlanError, first_line

FORMS = (
    "package.module:factory",
    "torchvision:resnet50",
    "timm:resnet50",
    "hf:folder-or-name",
    "a checkpoint folder",
    "a .pt2 file",
)
"""Forms of a model's name."""

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the channels that image models of ImageNet are trained with."""


@dataclass(frozen=True)
class Source:
    """A model that was found by its name.

    Attributes:
        name: as it was given.
        model: in eval mode.
        example: inputs that the source itself suggests; None: they must be given.
        normalization: mean and standard deviation of the channels of images.
        tokenizer: makes one of the tokenizer; None: the model reads no text.
    """

    name: str
    model: nn.Module
    example: Any = None
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    tokenizer: Callable[[], Any] | None = field(default=None, repr=False)


def open_source(name: str, *, pretrained: bool = True) -> Source:
    """Return the model of a name.

    Args:
        name: see `FORMS`.
        pretrained: with trained weights, where the name alone does not say (torchvision, timm).

    Raises:
        PlanError: no model has that name, or the package that would make the model is not installed.
        CheckpointError: the folder or the file cannot be read.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind in NAMED and rest:
        found = NAMED[kind](rest, pretrained)
    elif Path(name).exists() or name.endswith(".pt2"):
        found = _from_path(Path(name))
    elif colon and rest:
        found = _from_factory(kind, rest)
    else:
        raise PlanError(f"no model is called {name!r}", why="it is no file, no folder and no name", fix=_forms())
    return Source(name, found.model.eval(), found.example, found.normalization, found.tokenizer)


def is_factory(name: str) -> bool:
    """Return whether the name is one of a factory, whose module is imported when the model is opened."""
    kind, colon, rest = name.partition(":")
    return bool(colon and rest) and kind not in NAMED and not Path(name).exists() and not name.endswith(".pt2")


def find_beside() -> None:
    """Let imports find modules in the working folder, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _forms() -> str:
    return f"one of: {', '.join(FORMS)}"


def _from_factory(module: str, attribute: str) -> Source:
    """Return what a factory without arguments makes; modules beside the caller are found, too."""
    find_beside()
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise
        raise PlanError(f"there is no module {module!r}", why=str(error), fix=_forms()) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n, own in vars(found).items() if callable(own) and getattr(own, "__module__", "") == module]
            raise PlanError(f"{module!r} has no {attribute!r}", fix=f"one of: {', '.join(names[:20])}")
        found = getattr(found, part)
    if not isinstance(found, nn.Module) and callable(found):
        found = found()
    if not isinstance(found, nn.Module):
        raise PlanError(
            f"{module}:{attribute} must be a module or make one without arguments, got {type(found).__name__}",
            fix="def factory() -> torch.nn.Module: …",
        )
    return Source("", found)


def _from_path(path: Path) -> Source:
    if not path.exists():
        raise PlanError(f"there is no file {path}", fix=_forms())
    if path.suffix == ".pt2":
        import graphcomp  # registers the ops of lowered graphs

        assert graphcomp
        try:
            return Source("", _eval_again(torch.export.load(path).module()))
        except Exception as error:  # torch.export raises whatever its readers raise
            raise PlanError(
                f"{path} holds no exported program", why=f"{type(error).__name__}: {first_line(error)}"
            ) from error
    if (path / "graphcomp.json").exists():
        from graphcomp.api import load

        return Source("", load(path).module)
    if (path / "model" / "graphcomp.json").exists():
        return _from_path(path / "model")
    if (path / "config.json").exists():
        return _from_hf(str(path), True)
    raise PlanError(f"{path} holds no model", why="there is no graphcomp.json and no config.json", fix=_forms())


def _eval_again(module: nn.Module) -> nn.Module:
    """Return an exported module that takes `.eval()`: torch's own raises, as the graph has one mode alone."""
    module.training = False
    module.eval = lambda: module  # type: ignore[method-assign]
    return module


def _from_torchvision(name: str, pretrained: bool) -> Source:
    _need("torchvision", "vision")
    from torchvision import models

    name, _, weights = name.partition("@")
    if name not in models.list_models():
        raise PlanError(
            f"torchvision has no model {name!r}", fix=f"one of: {', '.join(_near(name, models.list_models()))}"
        )
    chosen = weights or ("DEFAULT" if pretrained else None)
    model = models.get_model(name, weights=chosen)
    size, normalization = 224, IMAGENET
    if chosen is not None:
        transforms = models.get_model_weights(name)[chosen].transforms()
        size = next(iter(getattr(transforms, "crop_size", [])), size)
        normalization = tuple(getattr(transforms, "mean", IMAGENET[0])), tuple(getattr(transforms, "std", IMAGENET[1]))
    elif name.startswith("inception"):
        size = 299
    return Source("", model, _images(size, size), normalization)


def _from_timm(name: str, pretrained: bool) -> Source:
    _need("timm", "")
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise PlanError(f"timm has no model {name!r}", fix=f"one of: {', '.join(_near(name, timm.list_models()))}")
    model = timm.create_model(name, pretrained=pretrained)
    config = model.pretrained_cfg
    channels, height, width = config.get("input_size", (3, 224, 224))
    normal = tuple(config.get("mean", IMAGENET[0])), tuple(config.get("std", IMAGENET[1]))
    return Source("", model, _images(height, width, channels), normal)


def _from_hf(name: str, pretrained: bool) -> Source:
    """Return a model of transformers, of the class that the config names."""
    _need("transformers", "hf")
    import transformers

    from graphcomp.hf.example import example_of

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PlanError(f"transformers finds no model {name!r}", why=first_line(error), fix=_forms()) from error
    names = getattr(config, "architectures", None) or []
    kind = next((getattr(transformers, own) for own in names if hasattr(transformers, own)), transformers.AutoModel)
    if not pretrained:
        model = kind(config) if isinstance(kind, type) and issubclass(kind, nn.Module) else kind.from_config(config)
    else:
        model = kind.from_pretrained(name)
    return Source("", model, example_of(model), tokenizer=lambda: transformers.AutoTokenizer.from_pretrained(name))


NAMED: dict[str, Callable[[str, bool], Source]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "hf": _from_hf,
}
"""First word of a name -> what opens the rest."""


def _need(package: str, extra: str) -> None:
    try:
        importlib.import_module(package)
    except Exception as error:  # a torchvision of another torch raises RuntimeError
        fix = f"pip install 'graphcomp[{extra}]'" if extra else f"pip install {package}"
        raise PlanError(f"{package} cannot be imported", why=first_line(error), fix=fix) from error


def _near(name: str, names: list[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, names, n=8) or names[:20]


def _images(height: int, width: int, channels: int = 3) -> Tensor:
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
