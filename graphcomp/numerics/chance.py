"""Random ops made certain, so that two models of different sizes can be compared in training mode."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from graphcomp.torch_compat import TorchDispatchMode

aten = torch.ops.aten


def _dropped(x: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
    return x.clone(), torch.ones_like(x, dtype=torch.bool)


CERTAIN: dict[Any, Callable[..., Any]] = {
    aten.bernoulli_: lambda x, *_args, **_kwargs: x.fill_(1),
    aten.bernoulli: lambda x, *_args, **_kwargs: torch.ones_like(x),
    aten.native_dropout: _dropped,
    aten.uniform_: lambda x, low=0.0, high=1.0, **_kwargs: x.fill_((low + high) / 2),
    aten.normal_: lambda x, mean=0.0, _std=1.0, **_kwargs: x.fill_(mean),
    aten.rand: lambda size, **options: torch.full(size, 0.5, **_shape_options(options)),
    aten.rand_like: lambda x, **_kwargs: torch.full_like(x, 0.5),
    aten.randn: lambda size, **options: torch.zeros(size, **_shape_options(options)),
    aten.randn_like: lambda x, **_kwargs: torch.zeros_like(x),
}
"""Random op -> a function that returns a fixed value in place of a random one: units stay, noise is its mean."""


def _shape_options(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in ("dtype", "device", "layout") if key in options}


class _Certain(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, the ops in CERTAIN draw nothing; other random ops draw as ever."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        certain = CERTAIN.get(func.overloadpacket)
        return func(*args, **(kwargs or {})) if certain is None else certain(*args, **(kwargs or {}))


def drawing_nothing() -> AbstractContextManager[Any]:
    """Return a context in which the ops in CERTAIN draw nothing: what modes around the context hear draws nothing."""
    return _Certain()  # type: ignore[no-untyped-call]


@contextmanager
def certain() -> Iterator[None]:
    """Inside, torch's ops in CERTAIN draw nothing, and Python's and NumPy's generators begin at one seed."""
    with generators_kept():
        random.seed(0)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(0)
        with _Certain():  # type: ignore[no-untyped-call]
            yield


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put Python's and NumPy's generators back afterwards; torch's generators are left to the caller."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
