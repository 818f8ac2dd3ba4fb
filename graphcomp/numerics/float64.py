"""Run a model in float64, in one thread.

torch keeps its default dtype once per process: another thread that makes a tensor meanwhile would get float64, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from graphcomp.torch_compat import OpOverload, pytree, schema_of

MAKERS = frozenset(
    {
        torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, torch.zeros, torch.ones, torch.empty,
        torch.full, torch.rand, torch.randn, torch.arange, torch.range, torch.linspace, torch.logspace, torch.eye,
        torch.empty_strided, torch.bartlett_window, torch.blackman_window, torch.hamming_window, torch.hann_window,
        torch.kaiser_window,
    }
)  # fmt: skip
"""Functions that take a dtype, and whose default is the default dtype."""


NAMED = frozenset({Tensor.float, Tensor.type})
"""Functions whose name or argument is the dtype."""


class Float64ByDefault(TorchFunctionMode):
    """Let tensors of floats that are made without a dtype, or of integers alone, be of float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in NAMED or not isinstance(result, Tensor) or not _is_by_default(result, args, kwargs):
            return result
        return func(*args, **{**kwargs, "dtype": torch.float64}) if _takes_dtype(func) else result.double()


def _is_by_default(result: Tensor, args: Any, kwargs: Any) -> bool:
    """Whether the dtype of `result` comes from no operand, and from no argument."""
    if result.dtype is not torch.get_default_dtype():
        return False
    leaves = pytree.tree_leaves((args, kwargs))
    return not any(isinstance(a, torch.dtype) or (isinstance(a, Tensor) and a.is_floating_point()) for a in leaves)


def _takes_dtype(func: Any) -> bool:
    if isinstance(func, OpOverload):
        return any(argument.name == "dtype" for argument in schema_of(func).arguments)
    return func in MAKERS
