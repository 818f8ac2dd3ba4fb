"""The exporter reads some five hundred function bodies of torchlib anew for every file; the tests read them once."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def torchlib_once() -> Iterator[None]:
    """What it returns is the same on every call and is only read; without it half of the time of a test goes there."""
    try:
        importlib.import_module("onnxscript")
        from torch.onnx._internal._lazy_import import onnxscript_apis
    except ImportError:  # not installed, or torch keeps it elsewhere: then the tests only take longer
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxscript_apis, "get_torchlib_ops", functools.cache(onnxscript_apis.get_torchlib_ops))
        yield
