"""torchvision on a CPU-only torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_DETECTION_OPS = ("nms", "qnms")
_libraries: list[torch.library.Library] = []  # a schema lives as long as its Library


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators do not match the installed torch.

    The wheel on PyPI is compiled for a CUDA torch. Beside a CPU-only torch its operators stay unloaded, and the import
    fails where torchvision describes two of them to the compiler, because they were never declared. Declaring both is
    enough for every model but the detection ones, which run `nms` and need an implementation besides.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    _forget("torchvision")
    library = torch.library.Library("torchvision", "DEF")
    for op in _DETECTION_OPS:
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return importlib.import_module("torchvision")


def _forget(package: str) -> None:
    """Drop what a failed import left behind, so that the next one starts afresh."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]
