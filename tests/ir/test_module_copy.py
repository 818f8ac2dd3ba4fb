"""A copied module tree runs on its own and leaves the model alone."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphcomp.ir.module_copy import module_copy, own_memory
from graphcomp.ir.preserve import eval_copy


class _Pair(NamedTuple):
    left: nn.Module
    right: int


@dataclass
class _Helper:
    net: nn.Module
    name: str = "helper"


class _Holder(nn.Module):
    """Leads to its submodule in every way that Python has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        inner = self.inner
        self.in_list = [inner]
        self.in_nested = {"a": ({"b": deque([inner])}, 1)}
        self.in_tuple = _Pair(inner, 1)
        self.in_set = {inner}
        self.by_key = OrderedDict([(inner, "inner")])
        self.method = inner.forward
        self.call = functools.partial(torch.add, alpha=1)
        self.bound = functools.partial(inner.forward)
        self.closure = lambda x: inner(x)
        self.default = functools.partial(lambda x, module=inner: module(x))
        self.helper = _Helper(inner)
        self.reference = weakref.ref(inner)
        self.lock = threading.Lock()  # copy.deepcopy refuses it
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.inner(x)


def _leads(model: Any) -> list[nn.Module]:
    """The submodule, as each attribute holds it."""
    return [
        model.in_list[0],
        model.in_nested["a"][0]["b"][0],
        model.in_tuple.left,
        next(iter(model.in_set)),
        next(iter(model.by_key)),
        model.method.__self__,
        model.bound.func.__self__,
        model.closure.__closure__[0].cell_contents,
        model.default.func.__defaults__[0],
        model.helper.net,
        model.reference(),
    ]


def test_every_way_to_a_module_leads_to_its_copy() -> None:
    model = _Holder()
    copied: Any = module_copy(model)
    assert type(copied) is _Holder
    assert copied.inner is not model.inner
    assert all(module is copied.inner for module in _leads(copied))
    assert all(module is model.inner for module in _leads(model))
    assert copied.call is not None
    assert copied.lock is model.lock
    assert copied.inner.weight is model.inner.weight


def test_what_a_run_of_the_copy_appends_stays_there() -> None:
    model = _Holder()
    with eval_copy(model, real=True) as copied:
        copied(torch.randn(2, 4))
        assert len(copied.seen) == 1  # type: ignore[arg-type]
        assert not copied.training
        assert not copied.inner.training  # type: ignore[union-attr]
    assert model.seen == []
    assert model.training
    assert model.inner.training


def test_hooks_run_on_the_copy() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    called: list[nn.Module] = []

    def note(module: nn.Module, _inputs: Any, _output: Any) -> None:
        called.append(module)

    model[0].register_forward_hook(note)
    copied: Any = module_copy(model)
    copied(torch.randn(1, 4))
    assert called == [copied[0]]


class _Views(nn.Module):
    """A buffer, a window on the buffer, a plain tensor, and a view of the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2))
        self.register_buffer("state", torch.zeros(6))
        self.window = self.state[2:4]
        self.plain = torch.ones(3)
        self.turned = self.weight.detach().t()

    def forward(self, x: Tensor) -> Tensor:
        self.state += 1
        self.plain.add_(1)
        return x @ self.turned + self.window.sum()


def test_memory_of_its_own_is_shared_as_in_the_model() -> None:
    model = _Views()
    copied: Any = module_copy(model, own_memory([*model.parameters(), *model.buffers(), model.window, model.plain]))
    copied(torch.randn(1, 2))
    assert torch.equal(copied.window, torch.ones(2))
    assert torch.equal(model.state, torch.zeros(6))
    assert torch.equal(model.plain, torch.ones(3))
    assert copied.weight is model.weight
    assert copied.turned is model.turned


def test_tied_and_cyclic_structures_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.parents = [model]  # type: ignore[assignment]
    copied: Any = module_copy(model, lambda t: nn.Parameter(t.detach().clone()))
    assert copied[1].weight is copied[0].weight
    assert copied[0].weight is not model[0].weight
    assert copied.parents[0] is copied
