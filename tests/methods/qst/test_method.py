"""QST by name: what is asked is met, saved, exported and resumed; what it does not do is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import graphcomp as gc
from graphcomp.methods.qst.method import Qst, QstRun
from graphcomp.training.folder import read_metrics
from tests.methods.learning import Outer, Stop, check_saved_and_exported, compress


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_the_share_of_weights_is_met(sparsity):
    small = compress("qst", sparsity=sparsity, bits=4)
    gone = round(sparsity * 672)
    assert any(note.startswith(f"{gone} of 672 weights in 3 tensors") for note in small.report.notes)
    assert not any("not what the result has" in note for note in small.report.notes)
    assert [layer.weight_bits for layer in small.report.layers] == [4, 4, 4]
    assert small.report.sizes["C0"] <= math.ceil((672 - gone) / 2)


def test_the_first_and_the_last_layer_have_8_bits_where_the_others_have_few():
    small = compress("qst", sparsity=0.5, bits=2, activation_bits=None)
    assert [layer.weight_bits for layer in small.report.layers] == [8, 2, 8]
    assert not any("activations" in note for note in small.report.notes)
    assert any("activations stay float" in note for note in compress("qst", sparsity=0.5, bits=4).report.notes)


@pytest.mark.parametrize(("convention", "limit"), [("C0", 0.05), ("C3", 190), ("C4", 120), ("C5", 200)])
def test_a_budget_on_bytes_is_met_in_the_report(convention, limit):
    small = compress(Qst(convention=convention), bits=4, budget=gc.Budget(bytes=limit))
    allowed = limit * 4 * 672 if isinstance(limit, float) else limit
    assert 0.7 * allowed < small.report.sizes[convention] <= allowed
    assert not any("not what the result has" in note for note in small.report.notes)


def test_without_bits_weights_are_pruned_in_floats():
    small = compress("qst", sparsity=0.75)
    assert sum(int((p == 0).sum()) for p in small.module.parameters() if p.dim() > 1) == 504
    assert not small.report.sizes


def test_pressure_alone_decides_how_many_weights_go():
    found = [compress(Qst(pressure=pressure, warmup=0.0), bits=4).report for pressure in (1e-4, 0.05)]
    gone = [int(next(note for note in own.notes if "one by one" in note).split()[0]) for own in found]
    assert gone[0] < gone[1]


def test_units_go_and_the_file_gets_smaller():
    small = compress(Qst(per="unit"), sparsity=0.5, bits=4)
    assert small.report.units_removed == 8 and small.report.params.ratio < 0.5
    whole = compress("qst", sparsity=0.5, bits=4)
    assert small.report.bytes.after < 0.5 * whole.report.bytes.after
    assert {n["units"]["kept"] % 4 for n in compress(Qst(per="unit"), sparsity=0.4, round_to=4).report.groups} == {0}


def test_a_submodule_and_a_layer_that_is_left_out():
    small = compress("qst", model=Outer(), scope="inner", sparsity=0.75)
    assert sum(int((p == 0).sum()) for p in small.module.inner.parameters() if p.dim() > 1) == 504
    small = compress("qst", sparsity=0.5, bits=4, ignore=["second"])
    assert [layer.weight_bits for layer in small.report.layers] == [4, 32, 4]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("per", ["element", "unit"])
def test_what_is_saved_and_exported_computes_what_was_trained(tmp_path, per):
    seen: dict[str, Any] = {}

    class Watched(Qst):
        def begin(self, *args: Any) -> QstRun:
            seen["run"] = super().begin(*args)
            return seen["run"]

    small = compress(Watched(per=per), sparsity=0.5, bits=3, activation_bits=None).eval()
    assert small.report.verified["trained == sliced"] < 1e-9 and small.report.verified["sliced == folded"] < 1e-6
    if per == "element":
        parameters = dict(seen["run"].ready.named_parameters())
        codes = {s.layer: q.to_integers(parameters[s.parameter]).values for s, q in seen["run"].ready.quantizers()}
        for name, stored in small.quantized.lowered.weights.items():
            assert torch.equal(stored.values, next(own for layer, own in codes.items() if layer in name))
    check_saved_and_exported(small, tmp_path)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("calls", [2, 9, 20])
@pytest.mark.parametrize("per", ["element", "unit"])
def test_a_run_that_was_cut_short_ends_as_it_would_have(tmp_path, per, calls):
    """In floats, while thresholds move, and with the mask fixed."""
    method = Qst(per=per, every=3, pressure=1e-3, warmup=0.2)
    options: dict[str, Any] = {"bits": 4, "sparsity": 0.6, "training": {"autocast": torch.bfloat16}}
    if per == "element":
        options["budget"] = gc.Budget(bytes=150)
        del options["sparsity"]
    whole = compress(method, **options)
    with pytest.raises(Stop):
        compress(method, folder=tmp_path, calls=calls, **options)
    resumed = compress(method, folder=tmp_path, **options)
    assert all(torch.equal(resumed.state_dict()[name], own) for name, own in whole.state_dict().items())
    stages = [line["stage"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert list(dict.fromkeys(stages)) == ["floats", "thresholds", "fixed mask"]
    with pytest.raises(gc.CheckpointError, match=r"pressure: 0\.001 there, 0\.0"):
        compress(Qst(per=per, every=3, warmup=0.2), folder=tmp_path, **options)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Qst(), {"bits": (2, 8)}, "one number for QST"),
        (Qst(), {"sparsity": 0.5, "bits": 4, "budget": gc.Budget(bytes=0.1)}, "beside a budget"),
        (Qst(), {"budget": gc.Budget(bytes=0.1)}, "no bits are given"),
        (Qst(), {"bits": 4, "budget": gc.Budget(macs=0.1)}, r"Budget\(macs=…\)"),
        (Qst(convention="C3"), {"bits": 4, "budget": gc.Budget(bytes=80)}, "80 bytes by C3 hold no network"),
        (Qst(per="unit"), {"bits": 4, "budget": gc.Budget(bytes=0.1)}, "budget with"),
        (Qst(), {"sparsity": {"second": 0.5}}, "sparsity by module"),
        (Qst(), {"bits": 4, "round_to": 4}, "round_to with"),
        (Qst(), {"bits": 4, "activation_bits": 8}, "activation_bits with"),
        (Qst(), {"sparsity": 0.5, "training": {"steps": None, "schedule": gc.Schedule(24)}}, "a Schedule"),
    ],
)
def test_what_the_method_does_not_do(method, options, message):
    with pytest.raises(gc.GraphcompError, match=message):
        compress(method, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"per": "row"}, {"shared": "row"}, {"gradient": "none"}, {"convention": "C9"}, {"warmup": 2}, {"freeze": -0.1},
        {"least": None}, {"pressure": -1}, {"every": 0}, {"guard": "none"},
        {"scaled": 1}, {"gradient": "literal", "per": "unit"}, {"warmup": 0.8, "freeze": 0.5},
    ],
)  # fmt: skip
def test_options_out_of_range(options):
    with pytest.raises(gc.PlanError, match=next(iter(options))):
        Qst(**options)
