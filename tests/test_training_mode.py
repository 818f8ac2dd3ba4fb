"""A prepared module in training mode does what the model does in training mode."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.capture.capture import capture
from tests.marks import in_ci


class Around(nn.Module):
    """Something between a convolution and a linear layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv2d(3, 8, 3), inner, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.inner(self.conv(x))).mean((2, 3)))


class StaysInEval(nn.BatchNorm2d):
    """A frozen batch norm, as a subclass."""

    def train(self, mode: bool = True) -> StaysInEval:
        return super().train(False)


class Holds(nn.Module):
    """A batch norm that its parent keeps in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def train(self, mode: bool = True) -> Holds:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def calls(function, base: type[nn.Module] = nn.Module) -> nn.Module:
    """A module with that forward."""
    inner = type("Calls", (base,), {"forward": function})
    return inner(8) if base is nn.BatchNorm2d else inner()


def norm(module: nn.Module, x: Tensor, training: bool) -> Tensor:
    return F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias, training)


class Attends(nn.Module):
    """Over the pixels, with weights that are returned, and so written out."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)
        return self.attention(pixels, pixels, pixels)[0].transpose(1, 2).unflatten(2, x.shape[2:])


INNER = {
    "batch norm": lambda: nn.BatchNorm2d(8),
    "without running statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "of all processes": lambda: nn.SyncBatchNorm(8),
    "instance norm with running statistics": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "dropout": lambda: nn.Dropout(0.3),
    "dropout of channels": lambda: nn.Dropout2d(0.3),
    "alpha dropout": lambda: nn.AlphaDropout(0.3),
    "randomized ReLU": nn.RReLU,
    "frozen by its class": lambda: StaysInEval(8),
    "frozen by its parent": Holds,
    "a function, in eval mode": lambda: calls(lambda m, x: norm(m, x, False), nn.BatchNorm2d),
    "a function, in the mode": lambda: calls(lambda m, x: norm(m, x, m.training), nn.BatchNorm2d),
    "dropout that is never on": lambda: calls(lambda m, x: F.dropout(x, 0.3, training=False)),
    "dropout that is always on": lambda: calls(lambda m, x: F.dropout(x, 0.3, training=True)),
    "dropout of the mode": lambda: calls(lambda m, x: F.dropout(x, 0.3, training=m.training)),
    "dropout behind a condition": lambda: calls(lambda m, x: F.dropout(x, 0.3) if m.training else x),
    "two dropouts behind a condition": lambda: calls(
        lambda m, x: F.dropout(F.dropout(x, 0.3), 0.2) if m.training else x
    ),
    "dropout of attention weights": Attends,
}


def batch(k: int) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(k)) * 3 + 1


def trained(module: nn.Module) -> list[Tensor]:
    """Outputs of three steps in training mode, the running statistics, and an output in eval mode."""
    module.train()
    found = []
    for k in range(3):
        torch.manual_seed(k)
        found.append(module(batch(k)))
    found += [b for _, b in sorted(module.named_buffers()) if b.shape == (8,)]
    module.eval()
    torch.manual_seed(0)
    return [*found, module(batch(9))]


IN_CI = ("of all processes", "dropout of channels", "alpha dropout", "randomized ReLU", "dropout that is always on")


@pytest.mark.parametrize("name", [*(name for name in INNER if name not in IN_CI), *in_ci(*IN_CI)])
def test_it_trains_as_the_model_does(name: str) -> None:
    mode = name.startswith("frozen") or "dropout" in name
    model = Around(INNER[name]()).train(mode)
    flags = [module.training for module in model.modules()]
    ready = gc.prepare(model, batch(9), bits=None, prune=())
    assert [module.training for module in model.modules()] == flags
    torch.testing.assert_close(trained(ready), trained(copy.deepcopy(model)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["frozen by its class", "a function, in eval mode", "dropout behind a condition"])
def test_a_graph_that_was_pickled_trains_as_the_model_does(name: str) -> None:
    model = Around(INNER[name]()).eval()
    graph = pickle.loads(pickle.dumps(capture(model, batch(9), training=True).module))
    torch.testing.assert_close(trained(graph), trained(model), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_a_hook_computes_hides_no_frozen_norm() -> None:
    model = Around(Holds()).train()
    torch.nn.utils.weight_norm(model.head)
    model(batch(0))  # the weight is no leaf now
    module = capture(model, batch(9)).module
    trained(module)
    assert not module.get_buffer("inner.norm.running_mean").any()


@pytest.mark.parametrize("name", ["frozen by its parent", "dropout behind a condition", "dropout of attention weights"])
@pytest.mark.slow
@pytest.mark.ci
def test_what_follows_the_mode_is_cut(name: str) -> None:
    """Law 2 with dropouts that were put into the graph and norms that stay in eval mode."""
    torch.manual_seed(0)
    ready = gc.prepare(Around(INNER[name]()), batch(9), bits=(4, 8)).train()
    optimizer = gc.QASSO(ready, torch.optim.SGD, lr=0.01, sparsity=0.4, schedule=6)
    for k in range(6):
        optimizer.zero_grad()
        ready(batch(k)).square().mean().backward()
        optimizer.step()
    report = gc.finalize(ready).report.to_dict()
    assert report["units"]["removed"] == optimizer.removed > 0
    assert report["verified"]["trained == sliced"] < 1e-9
    assert report["verified"]["integers == fake-quant, in steps"] <= 1


def test_a_mean_over_all_batches_becomes_a_running_one(caplog) -> None:
    model = Around(nn.BatchNorm2d(8, momentum=None))
    with caplog.at_level(logging.WARNING, "graphcomp"):
        ready = gc.prepare(model, batch(9), bits=None, prune=())
    assert "momentum=0.1 in training: inner" in caplog.text
    model.inner.momentum = 0.1
    torch.testing.assert_close(trained(ready), trained(model), rtol=1e-5, atol=1e-5)


def test_what_is_random_in_training_alone_is_named(caplog) -> None:
    model = Around(calls(lambda m, x: x + torch.randn_like(x) + torch.randn_like(x) if m.training else x))
    with caplog.at_level(logging.WARNING, "graphcomp"):
        gc.prepare(model, batch(9), bits=None)
    assert "training mode alone: aten.randn_like.default in 'inner' and 1 more" in caplog.text


# ------------------------------------------------------------------------------------------------ frozen norms
def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in module.named_buffers() if name.rpartition(".")[2].startswith("running_")}


def moved(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, b in statistics(module).items() if not torch.equal(b, before[name])}


class Norms(nn.Module):
    """Two batch norms, a dropout, and a batch norm that is called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.second = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.third = calls(lambda m, x: norm(m, x, m.training), nn.BatchNorm2d)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.drop(self.first(self.conv(x)))))


HELD = {
    "one norm": (["first"], ["first"]),
    "a part with a norm": (["second"], ["second.1"]),
    "a norm that reads the mode": (["third"], ["third"]),
}


@pytest.mark.parametrize("which", HELD)
@pytest.mark.parametrize("bits", [None, (4, 8)])
def test_norms_in_eval_mode_inside_of_a_model_in_training_mode_stay_frozen(which: str, bits) -> None:
    model = Norms().train()
    for name in HELD[which][0]:
        model.get_submodule(name).eval()
    ready = gc.prepare(model, batch(9), bits=bits, prune=()).train()
    before = statistics(ready)
    ready(batch(0))
    held = {f"{name}.running_{kind}" for name in HELD[which][1] for kind in ("mean", "var")}
    assert moved(before, ready) == before.keys() - held
    if bits is None:
        torch.manual_seed(0)
        expected = model(batch(1))
        torch.manual_seed(0)
        ready.load_state_dict({**ready.state_dict(), **before})
        torch.testing.assert_close(ready(batch(1)), expected, rtol=1e-5, atol=1e-5)


def test_a_model_in_eval_mode_says_nothing_about_its_norms() -> None:
    ready = gc.prepare(Norms().eval(), batch(9), bits=None, prune=()).train()
    before = statistics(ready)
    ready(batch(0))
    assert moved(before, ready) == before.keys()


def test_a_scope_in_eval_mode_inside_of_a_model_in_training_mode_is_frozen() -> None:
    model = nn.Sequential(Norms(), nn.Conv2d(8, 2, 1)).train()
    model[0].eval()
    ready = gc.prepare(model, batch(9), bits=None, prune=(), scope="0").train()
    before = statistics(ready)
    ready(batch(0))
    assert not moved(before, ready)


def test_freeze_norms_holds_statistics_and_lets_them_go_again() -> None:
    ready = gc.prepare(Norms(), batch(9), bits=(4, 8)).train()
    assert ready.freeze_norms() is ready
    before = statistics(ready)
    ready.eval().train()
    copied = copy.deepcopy(ready)
    for module in (ready, copied):
        module(batch(0)).square().mean().backward()
        assert not moved(before, module) and module.get_parameter("first.weight").grad is not None
    ready.freeze_norms(False)(batch(0))
    copied(batch(0))
    assert moved(before, ready) == before.keys() and not moved(before, copied)
    assert not torch.equal(ready(batch(0)), ready(batch(0)))  # the dropout stays on


def test_frozen_norms_take_a_batch_of_one_value() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    ready = gc.prepare(model, torch.randn(4, 4), bits=None).train().freeze_norms()
    ready(torch.randn(1, 4))
    with pytest.raises(gc.InputError, match="more than one value"):
        ready.freeze_norms(False)(torch.randn(1, 4))


def test_a_shrunk_module_keeps_its_norms_frozen() -> None:
    ready = gc.prepare(Norms(), batch(9), bits=(4, 8)).train().freeze_norms()
    ready.keep({group: torch.arange(1, group.size) for group in ready.session.groups})
    small = gc.shrink(ready)
    before = statistics(small)
    small(batch(0))
    assert not moved(before, small)


class _Auxiliary(nn.Module):
    """Returns the output of a second head in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.a(x).relu()
        return {"out": self.b(y), **({"aux": self.c(y)} if self.training else {})}


def test_outputs_of_training_alone_are_named(caplog) -> None:
    with caplog.at_level(logging.WARNING, "graphcomp"):
        gc.prepare(_Auxiliary(), torch.randn(2, 8))
    assert "its outputs are out, aux there" in caplog.text
