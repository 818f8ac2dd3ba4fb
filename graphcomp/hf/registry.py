"""Tell transformers of graphcomp's section in config.json, in either order of imports.

The import of graphcomp has this one side effect. transformers is not imported: where it is there already, the classes
of `reload` are registered at once, otherwise right after transformers has loaded the module of `from_pretrained`.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from graphcomp.system.listeners import RESULTS

log = logging.getLogger("graphcomp.hf")

MODELS = "transformers.modeling_utils"
"""transformers' module that saves and loads models; it imports the registry of quantizers."""

REGISTRY = "transformers.quantizers.auto"
"""transformers' module that holds the registry of quantizers."""

METHOD = "graphcomp"
"""`quant_method` of the section in config.json."""


def install() -> None:
    """Register with transformers, now or when transformers is imported. A second call changes nothing."""
    if _told not in RESULTS:
        RESULTS.append(_told)
    if MODELS in sys.modules:
        importlib.import_module(MODELS)  # waits where another thread is in the middle of the import
        register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def register() -> None:
    """Enter the classes of `reload` into transformers' registry, once."""
    try:
        registry = importlib.import_module(REGISTRY)
        known = registry.AUTO_QUANTIZER_MAPPING, registry.AUTO_QUANTIZATION_CONFIG_MAPPING
        reload = importlib.import_module("graphcomp.hf.reload")
        if METHOD not in known[0]:
            registry.register_quantizer(METHOD)(reload.CutModel)
        if METHOD not in known[1]:
            registry.register_quantization_config(METHOD)(reload.CutConfig)
        models = sys.modules[MODELS]
        if not hasattr(models.get_hf_quantizer, "__wrapped__"):
            models.get_hf_quantizer = reload.with_section(models.get_hf_quantizer)  # type: ignore[attr-defined]
    except (ImportError, AttributeError) as error:  # the import of another version of transformers must not fail
        log.warning("models that graphcomp cut cannot be loaded by this version of transformers: %s", error)


def _told(result: Any) -> None:
    """Let the transformers models in a new result be saved so that `from_pretrained` loads them."""
    if MODELS in sys.modules:
        importlib.import_module("graphcomp.hf.reload").attach(result)


class _AfterImport(MetaPathFinder):
    """Registers right after transformers' module of models has run, and leaves `sys.meta_path` then."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec that the other finders have, whose loader registers at its end; None for other modules."""
        if name != MODELS:
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, _AfterImport)]
        spec = next((found for f in others if (found := f.find_spec(name, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # the loader's own again
            run(module)
            sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterImport)]
            register()

        loader.exec_module = exec_module
        return spec
