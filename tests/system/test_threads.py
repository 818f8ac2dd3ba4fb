"""Several threads at once, and what other threads see meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.numerics.float64 import Float64ByDefault
from graphcomp.system.threads import in_this_thread, stderr_held

COUNT = 3


def _net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16 + seed), nn.ReLU(), nn.Linear(16 + seed, 5)).eval()


def _at_once(job: Callable[[int], Any]) -> list[Any]:
    results: list[Any] = [None] * COUNT

    def work(i: int) -> None:
        try:
            results[i] = job(i)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(COUNT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_get_what_one_gets() -> None:
    x, nets = torch.randn(4, 8), [_net(i) for i in range(COUNT)]

    def job(i: int) -> tuple[Tensor, tuple[str, ...], str]:
        small = gc.compress(nets[i], x, sparsity=0.5, bits=8 if i % 2 else None, calibration=[x] if i % 2 else None)
        return small(x).detach(), small.report.notes, small.form  # type: ignore[union-attr]

    wanted = [job(i) for i in range(COUNT)]
    results = _at_once(job)
    assert [r for r in results if isinstance(r, BaseException)] == []
    assert [r[1:] for r in results] == [w[1:] for w in wanted]
    assert all(torch.equal(r[0], w[0]) for r, w in zip(results, wanted, strict=True))


class _Counting(nn.Module):
    """Every forward writes a buffer and a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.cache: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache["x"] = x
        return self.b(self.a(x).relu()) + 0 * self.calls

    def state_now(self) -> tuple[Any, ...]:
        """All that a run could change."""
        weight = self.a.weight
        return self.training, self.a.training, float(self.calls), len(self.cache), type(weight), weight.grad is None


def _seen_meanwhile(look: Callable[[], Any], job: Callable[[], Any]) -> set[Any]:
    seen, stop = set(), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.add(look())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        job()
    finally:
        stop.set()
        thread.join()
    return seen


@pytest.mark.parametrize("bits", [None, 8])
def test_a_model_in_use_is_never_changed(bits: int | None) -> None:
    model, x = _Counting().train(), torch.randn(2, 8)
    options: dict[str, Any] = {"measure_latency": True} if bits is None else {"bits": 8, "calibration": [x]}
    before = model.state_now()
    seen = _seen_meanwhile(model.state_now, lambda: gc.compress(model, x, sparsity=0.5, **options))
    assert seen == {before}


def test_prepare_and_gradients_leave_a_model_in_use_alone() -> None:
    model, x = _Counting().train(), torch.randn(2, 8)
    before = model.state_now()

    def job() -> None:
        gc.prepare(model, x, bits=(4, 8))
        gc.compress(model, x, sparsity=0.5, saliency="taylor", data=[x], loss=lambda y, _: y.square().mean())

    assert _seen_meanwhile(model.state_now, job) == {before}


def test_another_thread_trains_its_model_as_if_alone() -> None:
    """torch.export replaces methods of nn.Module for the whole process while it runs."""

    def trained(seed: int, stop: threading.Event | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        for p in net.parameters():
            p.data = torch.randn(p.shape, generator=generator)
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        for _ in range(200):
            optimizer.zero_grad()
            net(torch.randn(8, 4, generator=generator)).square().mean().backward()
            optimizer.step()
        return net[0].weight.detach()

    wanted, found = trained(0), []
    thread = threading.Thread(target=lambda: found.extend(trained(0) for _ in range(5)))
    thread.start()
    shared = nn.Linear(16, 16)
    model = nn.Sequential(nn.Linear(8, 16), shared, nn.ReLU(), shared, nn.Linear(16, 4)).eval()
    small = gc.compress(model, torch.randn(2, 8), sparsity=0.5)
    thread.join()
    assert small.form == "native"
    assert len(found) == 5
    assert all(torch.equal(f, wanted) for f in found)


def test_stderr_of_other_threads_is_not_held(capsys: pytest.CaptureFixture[str]) -> None:
    with stderr_held() as said:
        thread = threading.Thread(target=lambda: sys.stderr.write("theirs"))
        thread.start()
        thread.join()
        sys.stderr.write("ours")
        assert said.getvalue() == "ours"
        assert capsys.readouterr().err == "theirs"


def test_a_replacement_is_of_one_thread() -> None:
    chosen, found = in_this_thread(lambda: "here", lambda: "there"), []
    thread = threading.Thread(target=lambda: found.append(chosen()))
    thread.start()
    thread.join()
    assert (chosen(), found) == ("here", ["there"])


def test_float64_by_default_is_of_one_thread_and_says_what_the_switch_of_torch_would() -> None:
    ints, made = torch.arange(1, 5), []
    makers: list[Callable[[], Tensor]] = [
        lambda: torch.tensor([0.1, 0.2]),
        lambda: torch.full((2,), 0.1),
        lambda: torch.full((2,), 1),
        lambda: torch.zeros(2),
        lambda: torch.linspace(0, 1, 7),
        lambda: torch.arange(0, 1, 0.1),
        lambda: torch.arange(3),
        lambda: torch.tensor([True]),
        lambda: torch.zeros(2, dtype=torch.float32),
        lambda: ints / 3,
        lambda: ints * 0.5,
        lambda: ints.sqrt(),
        lambda: ints.float(),
        lambda: torch.ones(2, dtype=torch.float16) * 2,
        lambda: torch.ops.aten.full.default([2], 0.1),
        lambda: torch.nn.functional.one_hot(ints) / 2,
    ]
    torch.set_default_dtype(torch.float64)
    try:
        wanted = [maker() for maker in makers]
    finally:
        torch.set_default_dtype(torch.float32)
    with Float64ByDefault():
        thread = threading.Thread(target=lambda: made.append(torch.randn(2)))
        thread.start()
        thread.join()
        got = [maker() for maker in makers]
    assert [t.dtype for t in got] == [t.dtype for t in wanted]
    assert all(torch.allclose(g, w, rtol=1e-7) for g, w in zip(got, wanted, strict=True))
    assert all(torch.equal(g, w) for g, w in list(zip(got, wanted, strict=True))[:9])
    assert made[0].dtype is torch.float32


def test_weights_that_another_thread_changes_meanwhile_are_named() -> None:
    model, stop = _net(0), threading.Event()

    def train() -> None:
        while not stop.is_set():
            with torch.no_grad():
                model[2].weight.add_(1e-6)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        with pytest.raises(gc.InputError, match=r"weights of Sequential changed(.|\n)*copy\.deepcopy"):
            gc.compress(model, torch.randn(4, 8), sparsity=0.5)
    finally:
        stop.set()
        thread.join()
