"""Measure which memory a value keeps alive."""

from __future__ import annotations

import gc
import types
from typing import Any

from torch import Tensor, nn

from graphcomp.torch_compat import storage_key

SHARED = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.FrameType)
"""Kinds of objects that belong to the process, not to a value that refers to them."""


def held_bytes(value: Any) -> int:
    """Return the bytes of all tensors that `value` keeps alive: each storage once, fake tensors left out.

    The walk follows the references that the garbage collector knows, but for those of classes, functions and modules
    of Python.
    """
    seen: set[int] = set()
    storages: dict[int, int] = {}
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, SHARED):
            continue
        seen.add(id(found))
        if type(found) in (Tensor, nn.Parameter) and not found.is_meta:
            storages[storage_key(found.untyped_storage())] = found.untyped_storage().nbytes()
        waiting += gc.get_referents(found)
    return sum(storages.values())
