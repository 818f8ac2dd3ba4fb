"""Copies of example inputs: a model may write into the tensors that a caller gives."""

from __future__ import annotations

import copy
import types
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

T = TypeVar("T")

IMMUTABLE = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, types.FunctionType)


def copies(values: T) -> T:
    """Return `values` with every tensor cloned, without history; one tensor in two places stays one tensor.

    Objects that pytree does not know, such as a cache of past keys and values, are copied deeply where that works.
    """
    seen: dict[int, Any] = {}

    def copied(leaf: Any) -> Any:
        if id(leaf) not in seen:
            seen[id(leaf)] = _copy(leaf)
        return seen[id(leaf)]

    result: T = pytree.tree_map(copied, values)
    return result


def _copy(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        clone = leaf.detach().clone()
        return clone.requires_grad_() if leaf.requires_grad else clone
    if isinstance(leaf, (*IMMUTABLE, nn.Module)):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # a class may refuse to be copied in any way: a lock, an open file, a computed tensor
        return leaf
