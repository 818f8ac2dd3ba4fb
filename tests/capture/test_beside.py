"""What a model does beside its captured graph: in training mode, and for results that are not returned."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.capture.beside import NOT_RETURNED, TRAINING

LAW = "native == masked, in training mode"


class Auxiliary(nn.Module):
    """A head of training alone, flattened by channel; dropouts and a batch norm on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.head = nn.Conv2d(16, 24, 3, padding=1), nn.Linear(24, 4)
        self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 12), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.norm(self.a(x)).relu()
        features = nn.functional.dropout(self.b(h).relu().mean((2, 3)), 0.3, self.training)
        result = {"out": self.head(features)}
        return result | {"aux": self.aux(h)} if self.training else result


class Noisy(nn.Module):
    """Draws noise of the cut width, and drops whole branches, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if self.training:
            h = h + torch.randn_like(h) * 0.1
            h = h * torch.empty(h.shape[0], 1).bernoulli_(0.8).div(0.8)
        return self.b(h)


class Normalized(nn.Module):
    """Statistics over the cut width, which a head of training reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x)).relu()
        return self.b(h) + self.c(h) if self.training else self.b(h)


class OfOne(nn.Module):
    """A batch norm refuses a batch of one in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x)).relu()
        return self.b(h) + self.c(h) if self.training else self.b(h)


@pytest.mark.parametrize(
    ("kind", "x"),
    [
        (Auxiliary, torch.rand(2, 3, 8, 8)),
        (Noisy, torch.rand(3, 8)),
        (Normalized, torch.rand(3, 8)),
        (OfOne, torch.rand(1, 8)),
    ],
)
def test_training_mode_of_the_native_model_is_that_of_the_masked_model(kind: type[nn.Module], x: Tensor) -> None:
    torch.manual_seed(0)
    small = gc.compress(kind().eval(), x, sparsity=0.5, progress=False)
    assert type(small.module) is kind, small.reason
    assert small.report.verified[LAW] < 1e-5
    assert small.report.params.after == sum(p.numel() for p in small.module.parameters())
    assert not small.module.training
    small.train()(torch.cat([x, x]))


def test_an_auxiliary_head_is_cut_with_what_it_reads() -> None:
    small = gc.compress(Auxiliary().eval(), torch.rand(2, 3, 8, 8), sparsity=0.5, progress=False)
    channels = small.module.a.out_channels
    assert channels < 16
    assert small.module.aux[2].in_features == 4 * channels
    assert len(small.kept["aux.2.weight"][1]) == 4 * channels
    assert [graph.what for graph in gc.analyze(Auxiliary().eval(), torch.rand(2, 3, 8, 8)).beside.graphs] == [TRAINING]


class ByPosition(nn.Module):
    """Reads features by their number in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.c, self.d = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        out = self.b(y) + self.d(self.c(x).relu())
        return out + y[:, 4:8] if self.training else out


def test_what_training_mode_reads_by_position_stays_whole() -> None:
    small = gc.compress(ByPosition().eval(), torch.rand(3, 8), sparsity=0.5, progress=False)
    assert small.module.a.out_features == 16
    assert small.module.c.out_features == 8
    reasons = [str(axis.reason) for axis in small.report.frozen if axis.name == "a.weight" and axis.dim == 0]
    assert reasons
    assert all("in training mode" in reason for reason in reasons)


class Literal(nn.Module):
    """Holds a length as a number in the code of training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(h.view(-1, 4, 4).mul(2).view(-1, 16) if self.training else h)


def test_a_class_that_cannot_be_trained_after_the_cut_is_refused() -> None:
    small = gc.compress(Literal().eval(), torch.rand(3, 8), sparsity=0.5, progress=False)
    assert small.form == "graph"
    assert "in training mode" in small.reason
    assert "ignore='a'" in small.reason


class Targets(nn.Module):
    """Wants targets in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        out = self.b(self.a(x).relu())
        if not self.training:
            return out
        assert targets is not None, "training needs targets"
        return (out - targets).square().mean()


def test_a_training_mode_that_does_not_run_on_the_example_is_said() -> None:
    small = gc.compress(Targets().eval(), torch.rand(3, 8), sparsity=0.5, progress=False)
    assert type(small.module) is Targets
    assert "training needs targets" in small.report.unchecked["training mode"]


class Drawing(nn.Module):
    """Scales a result by a random number of Python in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def drawn(self) -> float:
        return random.random()

    def forward(self, x: Tensor) -> Tensor:
        out = self.b(self.a(x).relu())
        return out * self.drawn() if self.training else out


class DrawingAnew(Drawing):
    def drawn(self) -> float:
        return random.SystemRandom().random()


def test_random_numbers_of_python_are_the_same_for_both_models() -> None:
    before = random.getstate()
    small = gc.compress(Drawing().eval(), torch.rand(3, 8), sparsity=0.5, progress=False)
    assert type(small.module) is Drawing, small.reason
    assert small.report.verified[LAW] < 1e-5
    assert random.getstate() == before


def test_a_training_mode_of_which_no_two_runs_are_alike_is_said() -> None:
    small = gc.compress(DrawingAnew().eval(), torch.rand(3, 8), sparsity=0.5, progress=False)
    assert type(small.module) is DrawingAnew, small.reason
    assert "no two runs are alike" in small.report.unchecked[LAW]


class Dropped(nn.Module):
    """Computes a result that it does not return."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        self.c(h)
        return self.b(h)


def test_a_layer_whose_result_is_not_returned_is_cut_with_the_rest() -> None:
    plan = gc.analyze(Dropped().eval(), torch.rand(3, 8))
    assert [graph.what for graph in plan.beside.graphs] == [NOT_RETURNED]
    assert [group.size for group in plan.groups] == [16]
    small = gc.compress(Dropped().eval(), torch.rand(3, 8), sparsity=0.5, progress=False)
    assert type(small.module) is Dropped, small.reason
    assert small.module.c.weight.shape == (6, 8)


def test_nothing_is_captured_beside_the_graph_of_a_model_that_does_not_ask_for_its_mode() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 4))
    plan = gc.analyze(model.eval(), torch.rand(3, 8))
    assert plan.beside.graphs == ()
    assert plan.beside.modes is None


def test_the_model_is_left_as_it_was() -> None:
    model = Auxiliary().train()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.rand(2, 3, 8, 8)
    drawn = torch.get_rng_state()
    gc.compress(model, x, sparsity=0.5, progress=False)
    assert [m.training for m in model.modules()] == [m is not model.norm for m in model.modules()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_power_iteration_of_training_mode_follows_the_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    nn.utils.parametrizations.spectral_norm(model[0])
    small = gc.compress(model.eval(), torch.randn(5, 8), sparsity=0.5, progress=False)
    assert small.form == "native", small.reason
    assert small.report.verified[LAW] < 1e-5
    small.train()(torch.randn(5, 8))
