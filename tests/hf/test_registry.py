"""transformers learns of graphcomp's section in either order of imports, once, and without a trace in the import."""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from graphcomp.hf import registry
from graphcomp.system import listeners

MODELS = """
import time
time.sleep(0.05)
assert not broken()
from tf_twin import registry
"""
REGISTRY = """
AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING, calls = {}, {}, []
def register_quantizer(name):
    return lambda kind: (calls.append(name), AUTO_QUANTIZER_MAPPING.update({name: kind}))
def register_quantization_config(name):
    return lambda kind: AUTO_QUANTIZATION_CONFIG_MAPPING.update({name: kind})
"""


@pytest.fixture
def twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package like transformers, not yet imported; `graphcomp.hf.reload` is a module without it."""
    (tmp_path / "tf_twin").mkdir()
    (tmp_path / "tf_twin" / "__init__.py").write_text("def broken(): return False")
    (tmp_path / "tf_twin" / "models.py").write_text("from tf_twin import broken\n" + MODELS)
    (tmp_path / "tf_twin" / "registry.py").write_text(REGISTRY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "MODELS", "tf_twin.models")
    monkeypatch.setattr(registry, "REGISTRY", "tf_twin.registry")
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__name__ != "_AfterImport"])
    monkeypatch.setattr(listeners, "RESULTS", list(listeners.RESULTS))
    classes = type(sys)("graphcomp.hf.reload")
    vars(classes).update(CutModel=int, CutConfig=str)
    monkeypatch.setitem(sys.modules, "graphcomp.hf.reload", classes)
    yield importlib.import_module
    for name in [name for name in sys.modules if name.split(".")[0] == "tf_twin"]:
        del sys.modules[name]


def waiting() -> int:
    return sum(type(finder).__name__ == "_AfterImport" for finder in sys.meta_path)


def test_graphcomp_first(twin):
    registry.install()
    registry.install()
    assert waiting() == 1 and "tf_twin" not in sys.modules
    models = twin("tf_twin.models")
    known = sys.modules["tf_twin.registry"]
    assert waiting() == 0 and known.calls == ["graphcomp"]
    assert known.AUTO_QUANTIZER_MAPPING["graphcomp"] is int
    assert known.AUTO_QUANTIZATION_CONFIG_MAPPING["graphcomp"] is str
    assert "exec_module" not in vars(models.__spec__.loader)  # the loader is as it was
    importlib.reload(models)
    registry.install()
    assert waiting() == 0 and known.calls == ["graphcomp"]


def test_transformers_first(twin):
    twin("tf_twin.models")
    registry.install()
    registry.install()
    assert waiting() == 0 and sys.modules["tf_twin.registry"].calls == ["graphcomp"]
    assert [told for told in listeners.RESULTS if told is registry._told] == [registry._told]


def test_an_import_that_fails_leaves_the_hook_for_the_next_one(twin):
    registry.install()
    package = twin("tf_twin")
    package.broken = lambda: True
    with pytest.raises(AssertionError):
        twin("tf_twin.models")
    assert waiting() == 1
    package.broken = lambda: False
    twin("tf_twin.models")
    assert waiting() == 0 and sys.modules["tf_twin.registry"].calls == ["graphcomp"]


def test_several_threads(twin):
    registry.install()
    steps = [lambda: twin("tf_twin.models"), registry.install] * 4
    threads = [threading.Thread(target=step) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert waiting() == 0 and set(sys.modules["tf_twin.registry"].calls) == {"graphcomp"}


def test_another_version_of_transformers_is_imported_all_the_same(twin, caplog, tmp_path):
    (tmp_path / "tf_twin" / "registry.py").write_text("")
    registry.install()
    twin("tf_twin.models")
    assert "cannot be loaded by this version" in caplog.text and waiting() == 0


def test_without_transformers_nothing_happens(twin, tmp_path):
    (tmp_path / "tf_twin" / "models.py").unlink()
    importlib.invalidate_caches()
    registry.install()
    with pytest.raises(ModuleNotFoundError):
        twin("tf_twin.models")
    assert waiting() == 1
