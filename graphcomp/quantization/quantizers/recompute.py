"""Quantized tensors that are computed again in the backward pass instead of being kept for it.

A convolution keeps what it read, its quantized input and weight. What these were computed of is kept anyway, by
whatever made it or as a parameter, and a quantizer takes little time beside the convolution.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from graphcomp.errors import TrainingError
from graphcomp.torch_compat import saved_tensors_hooks_disabled, top_saved_tensors_hooks, transforms_active, version_of

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


class _Made:
    """A quantized tensor, and how to have it again.

    It is known by the address of its first element, as long as it lives: what shares its elements then is a view.
    """

    def __init__(
        self, result: Tensor, make: Callable[[Tensor], Tensor], source: Tensor, parameters: Sequence[Tensor]
    ) -> None:
        self.result, self.version = weakref.ref(result), version_of(result)
        self.make, self.source = make, source
        self.read = [(tensor, version_of(tensor)) for tensor in parameters]
        self.unpack: Unpack | None = None
        self.views = 0
        self.fresh: Tensor | None = None
        self.unread = 0

    def stands_for(self, tensor: Tensor) -> bool:
        """Whether `tensor` shares the elements of the result, as they were made."""
        return self.result() is not None and version_of(tensor) == self.version

    def again(self) -> Tensor:
        """The result. It is made once for all that read it."""
        if self.fresh is None:
            if any(version_of(tensor) != version for tensor, version in self.read):
                raise TrainingError(
                    "a tensor was modified between the forward pass and the backward pass that needs it",
                    why="quantized tensors are computed again in the backward pass",
                    fix="optimizer.step() after loss.backward(), or prepare(…, recompute=False)",
                )
            with torch.no_grad():
                self.fresh = self.make(self.source if self.unpack is None else self.unpack(self.source))
            self.unread = self.views
        fresh = self.fresh
        self.unread -= 1
        if not self.unread:
            self.fresh = None
        return fresh


class _View:
    """In place of a saved tensor: a quantized one, and which of its elements."""

    def __init__(self, made: _Made, tensor: Tensor) -> None:
        self.made, self.place = made, (tensor.size(), tensor.stride(), tensor.storage_offset())
        made.views += 1

    def tensor(self) -> Tensor:
        return self.made.again().as_strided(*self.place)


class _Forward:
    """The quantized tensors of one forward pass, by their address; `pack` and `unpack` are hooks for what autograd
    saves. Those that are in force already are called for everything else."""

    def __init__(self, outer: tuple[Pack, Unpack] | None) -> None:
        self.outer = outer
        self.made: dict[int, _Made] = {}

    def add(self, made: _Made) -> None:
        result = made.result()
        assert result is not None
        if self.outer is not None:
            made.read = [pair for pair in made.read if pair[0] is not made.source]
            made.source, made.unpack = self.outer[0](made.source), self.outer[1]
        self.made[result.data_ptr()] = made

    def pack(self, tensor: Tensor) -> Any:
        made = self.made.get(tensor.data_ptr())
        if made is not None and made.stands_for(tensor):
            return _View(made, tensor)
        return tensor if self.outer is None else self.outer[0](tensor)

    def hooks(self) -> tuple[Pack, Unpack]:
        """They do not keep this alive in the backward pass."""
        if self.outer is None:
            return self.pack, lambda packed: packed.tensor() if isinstance(packed, _View) else packed
        other = self.outer[1]
        return self.pack, lambda packed: packed.tensor() if isinstance(packed, _View) else other(packed)


_forward: ContextVar[_Forward | None] = ContextVar("graphcomp_forward", default=None)


@contextmanager
def made_again() -> Iterator[None]:
    """Within, what quantizers return is not kept for the backward pass.

    It has no effect where autograd takes no such hooks, under torch.func and torch.compile (which computes elementwise
    ops again by itself).
    """
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or transforms_active()
        or saved_tensors_hooks_disabled() is not None
    ):
        yield
        return
    forward = _Forward(top_saved_tensors_hooks(True))
    token = _forward.set(forward)
    try:
        with torch.autograd.graph.saved_tensors_hooks(*forward.hooks()):
            yield
    finally:
        _forward.reset(token)


def note(result: Tensor, make: Callable[[Tensor], Tensor], source: Tensor, parameters: Sequence[Tensor]) -> None:
    """Say that `make(source)` gives `result` again, as long as `source` and `parameters` are not modified."""
    forward = None if torch.compiler.is_compiling() else _forward.get()
    if forward is not None and result.requires_grad and result.numel():
        source = source.detach()
        forward.add(_Made(result, make, source, (source, *parameters)))
