"""What `finalize` hands back: as many units and bits as were trained, computing what the trained module computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphcomp as gc
from tests.marks import slow
from tests.training.runs import SCHEDULE, batch, bits_of, ready_of, same, state_of, train


def trained(name: str, sparsity: float = 0.4, **options: object) -> gc.Prepared:
    ready = ready_of(name, **options)
    optimizer = gc.QASSO(ready, torch.optim.AdamW, lr=0.01, sparsity=sparsity, schedule=SCHEDULE)
    train(optimizer, ready, name, SCHEDULE.steps)
    return ready


@pytest.mark.parametrize("name", ["residual", "decoder", *slow("vit", "encoder", "upsample", "dense")])
@pytest.mark.slow
@pytest.mark.ci
def test_trained_sliced_and_folded_compute_the_same(name):
    ready = trained(name, bits=(4, 8))
    small = gc.finalize(ready)
    report = small.report.to_dict()
    assert report["verified"]["trained == sliced"] < 1e-9 and report["verified"]["sliced == folded"] < 1e-6
    expected = {group.name: len(units) for group, units in ready.kept().items()}
    removed = sum(group.size for group in ready.session.groups) - sum(expected.values())
    assert report["units"]["removed"] == removed > 0
    assert report["verified"]["integers == fake-quant, in steps"] <= 1
    # of the output: what a few codes of four bits that fell the other side make of it
    x = batch(name, 1)
    with torch.no_grad():
        apart = (small(*x) - ready.eval()(*x)).norm() / ready(*x).norm()
    assert apart < 0.25


def test_layers_have_the_bits_that_were_trained():
    ready = trained("residual", bits=(4, 8), layer_bits=(("head", (8, 8)),))
    rows = {row["name"]: row for row in gc.finalize(ready).report.to_dict()["layers"]}
    for name, (weight, read) in ready.bits().items():
        assert (rows[name]["weight_bits"], rows[name]["activation_bits"]) == (round(weight), round(read)), name
    assert rows["head"]["weight_bits"] == 8 > rows["first.0"]["weight_bits"]


def test_without_quantizers_it_is_the_users_class():
    ready = trained("residual", bits=None)
    small = gc.finalize(ready)
    assert type(small.module).__name__ == "ResidualCNN" and not isinstance(small.module, gc.Prepared)
    x = batch("residual", 1)
    torch.testing.assert_close(small(*x), ready.eval()(*x), rtol=1e-4, atol=1e-5)


def test_the_module_is_not_modified_and_trains_on():
    ready = trained("mlp", bits=(4, 8))
    before = state_of(ready)
    small = gc.finalize(ready)
    assert same(state_of(ready), before) and ready.training
    frozen = {key: tensor.clone() for key, tensor in small.state_dict().items() if isinstance(tensor, torch.Tensor)}
    with torch.no_grad():
        for parameter in ready.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, small.state_dict()[key]) for key, tensor in frozen.items())


def test_a_copy_gives_the_same_and_either_gives_its_own():
    ready = trained("mlp", bits=(4, 8))
    twin = copy.deepcopy(ready)
    x = batch("mlp", 1)
    expected = gc.finalize(ready)(*x)
    assert torch.equal(gc.finalize(twin)(*x), expected)
    with torch.no_grad():
        twin.get_parameter("down.bias").add_(5.0)
    changed = gc.finalize(twin)(*x)
    assert bool(((changed - expected) > 4).all()) and torch.equal(gc.finalize(ready)(*x), expected)


def test_wrapped_it_gives_the_same():
    ready = trained("mlp", bits=(4, 8))
    x = batch("mlp", 1)
    expected = gc.finalize(ready)(*x)
    for wrapper in (nn.DataParallel(ready), torch.compile(ready, backend="aot_eager")):
        assert torch.equal(gc.finalize(wrapper)(*x), expected)


def test_nothing_trained_is_the_model_at_the_most_bits():
    ready = ready_of("mlp", bits=(4, 8))
    small = gc.finalize(ready)
    assert small.report.to_dict()["units"]["removed"] == 0
    assert all(b == pytest.approx(8, abs=1e-5) for b in bits_of(ready).values())
    assert all(row["weight_bits"] == 8 for row in small.report.to_dict()["layers"])


def test_what_does_not_compute_the_same_is_never_handed_on():
    """A unit whose mask says that it is gone, and whose weights are there."""
    ready = trained("mlp", bits=(4, 8))
    (group, *_), kept = ready.session.groups, ready.kept()
    gone = next(unit for unit in range(group.size) if unit not in kept[group].tolist())
    with torch.no_grad():
        ready.get_parameter("middle.weight")[:, gone] = 3.0
    with pytest.raises(gc.VerificationError, match="does not compute what the trained model computes"):
        gc.finalize(ready)
    gc.finalize(ready, verify=False)


class Normed(torch.nn.Module):
    """Its weights are divided by the norms of their rows, which must not become zero."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.scale = torch.nn.Parameter(torch.randn(12, 6)), torch.nn.Parameter(torch.rand(12) + 0.5)
        self.out = torch.nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.scale[:, None] * self.w / self.w.norm(dim=1, keepdim=True)
        return self.out(torch.relu(x @ weight.T))


@pytest.mark.parametrize("bits", [(4, 8), None])
def test_weights_that_are_computed_are_masked_and_not_held_at_zero(bits):
    torch.manual_seed(0)
    x = torch.randn(16, 6)
    ready = gc.prepare(Normed(), x, bits=bits)
    optimizer = gc.QASSO(ready, torch.optim.AdamW, lr=0.01, sparsity=0.5, schedule=SCHEDULE)
    for _ in range(SCHEDULE.steps):
        optimizer.zero_grad()
        loss = ready(x).square().mean()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    assert optimizer.removed == 6
    report = gc.finalize(ready).report
    assert report.units_removed == 6
    assert report.verified["trained == sliced"] < 1e-9


# ------------------------------------------------------------------------------------------------ what graphs make
class MakesTensors(nn.Module):
    """A recurrent layer whose first state the forward makes, in the default dtype."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 8, batch_first=True, dtype=dtype)
        self.up, self.down = nn.Linear(8, 12, dtype=dtype), nn.Linear(12, 3, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(1, x.shape[0], 8, dtype=None if x.dtype == torch.float32 else x.dtype)
        return self.down(torch.relu(self.up(self.rnn(x, (state, state))[0][:, -1])))


class Averages(nn.Module):
    """A buffer that follows the data in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 3)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(x.flatten(0, -2).mean(0), alpha=0.1)
        return self.down(torch.relu(self.up(x - self.mean)))


def run_of(model: nn.Module, x: torch.Tensor, **options: object) -> gc.Prepared:
    ready = gc.prepare(model, x, **options).train()
    optimizer = gc.QASSO(ready, torch.optim.SGD, lr=0.01, sparsity=0.4, schedule=6)
    for _ in range(6):
        optimizer.zero_grad()
        ready(x).float().square().mean().backward()
        optimizer.step()
    return ready


@pytest.mark.parametrize("bits", [None, (4, 8)])
def test_tensors_that_the_graph_makes_do_not_stand_in_the_way(bits):
    report = gc.finalize(run_of(MakesTensors(), torch.randn(4, 5, 6), bits=bits)).report.to_dict()
    assert report["units"]["removed"] > 0 and report["verified"]["trained == sliced"] < 1e-9


def test_half_floats_do_not_stand_in_the_way():
    x = torch.randn(4, 5, 6, dtype=torch.bfloat16)
    small = gc.finalize(run_of(MakesTensors(torch.bfloat16), x, bits=(4, 8), activation_bits=None))
    assert small.report.to_dict()["verified"]["trained == sliced"] < 1e-9


@pytest.mark.parametrize("bits", [None, (4, 8)])
def test_buffers_that_a_run_moves_are_as_training_left_them(bits):
    torch.manual_seed(0)
    model, x = Averages(), torch.randn(4, 6) + 1
    ready = gc.prepare(model, x, bits=bits)
    assert not ready.get_buffer("mean").any()
    ready = run_of(model, x, bits=bits)
    assert not model.mean.any()
    moved = ready.get_buffer("mean").clone()
    small = gc.finalize(ready)
    (result,) = (buffer for name, buffer in small.named_buffers() if name.endswith("mean"))
    assert moved.any() and torch.equal(result, moved) and torch.equal(ready.get_buffer("mean"), moved)


def test_what_does_not_run_in_float64_says_so(monkeypatch):
    def refuse():
        raise RuntimeError("no float64 here")

    ready = trained("mlp", bits=None)
    monkeypatch.setattr("graphcomp.flows.finalize.Float64ByDefault", refuse)
    with pytest.raises(gc.VerificationError, match="does not run in float64") as caught:
        gc.finalize(ready)
    assert "verify=False" in caught.value.fix
