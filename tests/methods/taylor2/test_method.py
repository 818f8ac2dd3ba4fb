"""Taylor2 by name: what is asked is met, saved, exported and resumed; what the method does not do is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.methods.taylor2.method import Taylor2
from graphcomp.methods.taylor2.run import Taylor2Run
from graphcomp.testing import tiny_models
from graphcomp.training.folder import read_metrics
from tests.marks import in_ci
from tests.methods.learning import Outer, Stop, batches, compress, net


class Watched(Taylor2):
    """Keeps its runs."""

    runs: ClassVar[list[Taylor2Run]] = []

    def begin(self, *args: Any) -> Taylor2Run:
        run = super().begin(*args)
        Watched.runs.append(run)
        return run


# ------------------------------------------------------------------------------------------------ what is asked
@pytest.mark.parametrize("tune", ["dense", *in_ci("masked", "distill")])
def test_a_share_of_the_units_goes_and_bits_are_as_asked(tune):
    small = compress(Taylor2(tune=tune), sparsity=0.5, bits=4)
    assert small.report.units_removed == 8
    assert [layer.weight_bits for layer in small.report.layers] == [4, 4, 4]
    assert [layer.activation_bits for layer in small.report.layers] == [4, 4, 4]
    assert small.report.verified["trained == sliced"] < 1e-9 and small.report.verified["sliced == folded"] < 1e-6
    assert not any("not what the result has" in note for note in small.report.notes)
    assert any("learned from a Net" in note for note in small.report.notes) is (tune == "distill")


def test_without_bits_the_model_keeps_its_class():
    small = compress("taylor2", sparsity=0.25)
    assert small.report.units_removed == 4 and small.form == "native"
    assert compress("taylor2").report.units_removed == 8  # half by default
    assert compress("taylor2", sparsity={"second": 0.5}).report.units_removed == 4
    kept = [group["units"]["kept"] for group in compress("taylor2", sparsity=0.4, round_to=4).report.groups]
    assert {own % 4 for own in kept} == {0} and sum(kept) < 16


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("tune", ["dense", "masked"])
@pytest.mark.parametrize(
    ("budget", "bits"), [({"macs": 0.5}, None), ({"params": 0.4}, None), ({"bops": 0.01}, 4), ({"bytes": 0.12}, 4)]
)
def test_a_budget_is_met(tune, budget, bits):
    (name, limit), *_ = budget.items()
    small = compress(Taylor2(tune=tune), budget=gc.Budget(**budget), bits=bits)
    assert 0.6 * limit < getattr(small.report, name).ratio <= limit
    assert not any("not what the result has" in note for note in small.report.notes)


def test_a_share_and_a_budget_hold_together():
    small = compress("taylor2", sparsity=0.5, budget=gc.Budget(macs=0.3))
    assert small.report.units_removed == 8 and small.report.macs.ratio <= 0.3
    with pytest.raises(gc.BudgetError):
        compress("taylor2", sparsity=0.1, budget=gc.Budget(macs=0.2))


def test_bits_alone_and_activations_in_floats():
    small = compress("taylor2", sparsity=0.0, bits=2, activation_bits=None)
    assert small.report.units_removed == 0
    assert [layer.weight_bits for layer in small.report.layers] == [8, 2, 8]
    assert {layer.activation_bits for layer in small.report.layers} == {32}
    assert {layer.activation_bits for layer in compress("taylor2", bits=4, activation_bits=8).report.layers} == {8}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", ["vision_transformer", "encoder"])
def test_heads_and_features_go(name):
    model, inputs = tiny_models()[name]

    def loss(output: Any, batch: Any) -> Tensor:
        found = output if isinstance(output, Tensor) else next(iter(output.values()))
        return (found - 0.3).square().mean()

    small = gc.compress(
        model, inputs, method="taylor2", sparsity=0.5, bits=8, data=[inputs] * 4, loss=loss, steps=12, progress=False
    )
    kept = {group["role"]: group["units"] for group in small.report.groups}
    assert "head" in kept and small.report.units_removed > 0
    assert small.report.verified["trained == sliced"] < 1e-9


# ------------------------------------------------------------------------------------------------ during the run
@pytest.mark.slow
@pytest.mark.ci
def test_the_stages_and_what_metrics_say_of_them(tmp_path):
    compress(Taylor2(every=3), sparsity=0.5, bits=2, folder=tmp_path, training={"steps": 36, "log_every": 1})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    stages = [line["stage"] for line in lines]
    assert list(dict.fromkeys(stages)) == ["pruning", "8 bits", "4 bits", "2 bits"]
    assert [stages.count(own) for own in dict.fromkeys(stages)] == [18, 4, 5, 9]
    removed = [line["units_removed"] for line in lines]
    assert removed == sorted(removed) and removed[17] == removed[-1] == 8 and len(set(removed)) >= 5
    assert [line["weight_bits"] for line in lines][::9] == [32.0, 32.0, 8.0, pytest.approx(16 / 3 + 4 / 3, abs=1)]
    assert lines[-1]["weight_bits"] == 6.0  # of 8, 2 and 8


@pytest.mark.slow
@pytest.mark.ci
def test_pruning_goes_on_at_the_quantized_weights():
    Watched.runs.clear()
    small = compress(Watched(quantize_from=0.25, until=0.75, every=2), sparsity=0.5, bits=4)
    (run,) = Watched.runs
    assert list(dict.fromkeys(map(run.stage, range(24)))) == [
        "pruning", "pruning at 8 bits", "pruning at 4 bits", "4 bits",
    ]  # fmt: skip
    assert small.report.units_removed == 8 and {layer.weight_bits for layer in small.report.layers} == {4}


@pytest.mark.parametrize(("tune", "learns"), [("dense", True), ("masked", False)])
def test_7_5_behind_a_closed_gate_dense_weights_learn_and_masked_ones_are_zero(tune, learns):
    images, labels = batches()[0]
    ready = gc.prepare(net(), images, bits=None).train()
    run = Taylor2(tune=tune, every=6).begin(ready, gc.Goal(sparsity=0.5), gc.Training(steps=24), 24)
    optimizer = gc.training.optimizer.MethodOptimizer(run, torch.optim.SGD, 0.05, {})
    seen = []

    def forward(_batch: Any, tensors: Any = None) -> Tensor:
        found = torch.func.functional_call(ready, tensors, (images,))
        seen.append(found.detach().clone())
        return found

    for _ in range(8):  # a round after 6
        optimizer.zero_grad()
        run.loss(forward, None, lambda output, _: F.cross_entropy(output, labels)).backward()
        optimizer.step()
    first = run.groups[0]
    closed = torch.tensor(sorted({*range(8)} - {*run.chosen[first].tolist()}))
    assert run.removed == sum(8 - len(own) for own in run.chosen.values()) > 0 and len(closed)
    reads = ready.get_parameter("second.weight")[:, closed].detach()
    assert bool((reads != 0).all()) is learns and bool((reads == 0).all()) is not learns
    assert run.kept[first].tolist() == ([*range(8)] if learns else run.chosen[first].tolist())
    with torch.no_grad():  # forward, what reads a closed unit is zero in both
        shown = run.gates.views(False)["second.weight"]
    assert not bool(shown[:, closed].any())
    before = reads.clone()
    optimizer.zero_grad()
    run.loss(forward, None, lambda output, _: F.cross_entropy(output, labels)).backward()
    optimizer.step()
    assert torch.equal(ready.get_parameter("second.weight")[:, closed].detach(), before) is not learns


def test_a_unit_returns_in_a_run_where_its_score_says_so():
    Watched.runs.clear()
    options: dict[str, Any] = {"every": 1, "momentum": 0.0, "score": "mean"}
    for tune in ("dense", "masked"):
        compress(Watched(tune=tune, **options), sparsity=0.25, training={"steps": 40})
    dense, masked = Watched.runs
    assert dense.returned > 0 and masked.returned == 0


def test_gates_stay_where_they_are_whatever_the_schedule_of_learning_rates():
    Watched.runs.clear()

    def one_cycle(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=24)

    compress(Watched(until=1.0), sparsity=0.5, training={"scheduler": one_cycle})
    (run,) = Watched.runs
    assert {own for value in run.gates.values.values() for own in value.tolist()} == {0.0, 1.0}


def test_a_quota_is_kept_but_in_the_last_round_which_says_so():
    slow = compress(Taylor2(quota=0.05, every=4), sparsity=0.5)
    assert slow.report.units_removed == 8
    assert any(note.startswith("the last round took") and "quota=0.05" in note for note in slow.report.notes)
    assert not any("last round" in note for note in compress(Taylor2(quota=0.2, every=1), sparsity=0.5).report.notes)


def test_a_teacher_that_was_given_stays_the_teacher():
    torch.manual_seed(3)
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    small = compress(Taylor2(tune="distill"), sparsity=0.5, training={"teacher": other})
    assert any("learned from a Sequential" in note for note in small.report.notes)


def test_the_teacher_of_a_submodule_is_the_whole_model_as_it_was_given():
    model = Outer()
    small = compress(Taylor2(tune="distill"), model=model, scope="inner", sparsity=0.5)
    assert small.report.units_removed == 8 and any("learned from a Outer" in note for note in small.report.notes)
    assert model.inner.second.weight.shape == (8, 8, 3, 3)


@pytest.mark.slow
@pytest.mark.ci
def test_the_model_that_was_given_is_not_modified():
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compress(Taylor2(tune="distill"), model=model, sparsity=0.5, bits=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_frozen_layers_stay_whole_and_as_they_are():
    model = net()
    model.second.requires_grad_(False)
    with pytest.raises(gc.NothingToPrune, match="each group has a parameter with requires_grad=False"):
        compress("taylor2", model=model, sparsity=0.25)
    model = net()
    model.head.requires_grad_(False)
    small = compress("taylor2", model=model, sparsity=0.25)
    assert torch.equal(small.module.head.weight, model.head.weight)
    assert small.report.units_removed == 2 and any("left whole" in note for note in small.report.notes)


@pytest.mark.slow
@pytest.mark.ci
def test_the_same_seed_gives_the_same_model():
    first, second = (compress("taylor2", sparsity=0.5, bits=4) for _ in range(2))
    assert all(torch.equal(second.state_dict()[name], own) for name, own in first.state_dict().items())


def test_a_list_of_methods_begins_with_what_was_left():
    small = compress(["regularized", Taylor2()], sparsity=0.5, bits=4, training={"steps": 48})
    assert small.report.units_removed == 8 and {layer.weight_bits for layer in small.report.layers} == {4}


# ------------------------------------------------------------------------------------------------ files
@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("bits", [8, 4, None])
def test_what_is_saved_and_exported_computes_what_was_trained(tmp_path, bits):
    Watched.runs.clear()
    small = compress(Watched(), sparsity=0.5, bits=bits).eval()
    inputs = batches()[0][0]
    expected = small(inputs).detach()
    if bits is None:
        trained = Watched.runs[0].ready.eval()(inputs).detach()
        torch.testing.assert_close(expected, trained, rtol=1e-4, atol=1e-4)
    else:  # in codes: an activation near the middle of two levels may go to either
        assert small.report.verified["integers == fake-quant, in steps"] <= 1
    small.save(tmp_path / "folder")
    assert torch.equal(gc.load(tmp_path / "folder").eval()(inputs), expected)
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    small.export(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


STOPPED = {"dense": 10, "masked, adam": 17, "distill, at quantized weights": 13}
"""Case -> calls of the loss after which the run is cut short in CI, too."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "calls"),
    [
        pytest.param(case, calls, marks=[pytest.mark.ci] if calls == own else [])
        for case, own in STOPPED.items()
        for calls in (2, 10, 13, 17, 20)
    ],
)
def test_a_run_that_was_cut_short_ends_as_it_would_have(tmp_path, case, calls):
    """Between rounds, at the last round, and at each number of bits."""
    method = Taylor2(every=3, tune=case.split(",")[0], quantize_from=0.25 if "quantized" in case else None)
    training = {"optimizer": torch.optim.AdamW, "lr": 0.003} if "adam" in case else {"autocast": torch.bfloat16}
    options: dict[str, Any] = {"bits": 2, "sparsity": 0.5, "training": training}
    whole = compress(method, **options)
    with pytest.raises(Stop):
        compress(method, folder=tmp_path, calls=calls, **options)
    resumed = compress(method, folder=tmp_path, **options)
    assert all(torch.equal(resumed.state_dict()[name], own) for name, own in whole.state_dict().items())
    with pytest.raises(gc.CheckpointError, match="momentum"):
        compress(Taylor2(every=3, tune=method.tune, momentum=0.5), folder=tmp_path, **options)


@pytest.mark.slow
@pytest.mark.ci
def test_a_long_run_is_shrunk_and_goes_on_bit_for_bit(tmp_path: Path):
    options: dict[str, Any] = {"bits": 4, "sparsity": 0.5, "training": {"steps": 160, "lr": 0.02}}
    method = Taylor2(until=0.1, quantize_from=0.1, path=())
    Watched.runs.clear()
    whole = compress(Watched(until=0.1, quantize_from=0.1, path=()), **options)
    assert Watched.runs[0].ready.session.cut_from is not None
    with pytest.raises(Stop):
        compress(method, folder=tmp_path, calls=100, **options)
    resumed = compress(method, folder=tmp_path, **options)
    assert all(torch.equal(resumed.state_dict()[name], own) for name, own in whole.state_dict().items())


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Taylor2(), {"bits": (2, 8)}, r"bits must be one number for method='taylor2', got \(2, 8\)"),
        (Taylor2(), {"bits": 4, "activation_bits": (4, 8)}, "activation_bits must be one number"),
        (Taylor2(), {"sparsity": 0.0}, "nothing to do"),
        (Taylor2(), {"sparsity": 1.5}, "sparsity"),
        (Taylor2(), {"saliency": "l2"}, "saliency with"),
        (Taylor2(), {"bits": 4, "rounding": "second_order"}, "rounding with"),
        (Taylor2(), {"activation_bits": 8}, "activation_bits with"),
        (Taylor2(), {"budget": gc.Budget(macs=1e-6)}, "macs"),
        (Taylor2(), {"budget": gc.Budget(latency_ms=1.0)}, "latency"),
        (Taylor2(), {"sparsity": {"second": 0.5}, "budget": gc.Budget(macs=0.5)}, "beside a budget"),
        (Taylor2(), {"sparsity": 0.5, "bits": 2, "training": {"steps": 3}}, "steps"),
        (Taylor2(), {"sparsity": 0.5, "training": {"steps": None, "schedule": gc.Schedule(24)}}, "a Schedule"),
        (Taylor2(), {"sparsity": 0.5, "model": Outer().requires_grad_(False), "scope": "inner"}, "requires_grad"),
    ],
)  # fmt: skip
def test_what_the_method_does_not_do(method, options, message):
    with pytest.raises(gc.GraphcompError, match=message):
        compress(method, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"score": "cubes"}, {"cost": "joules"}, {"tune": "hard"}, {"momentum": 1.0}, {"momentum": None},
        {"rounds": 0}, {"rounds": None}, {"every": 0}, {"every": 2.5}, {"quota": 0.0}, {"quota": 2}, {"until": 0},
        {"until": None}, {"quantize_from": 1.0}, {"path": 8}, {"path": (8, 1)},
    ],
)  # fmt: skip
def test_options_out_of_range(options):
    with pytest.raises(gc.PlanError, match=next(iter(options))):
        Taylor2(**options)
