"""OPQ: a plan from the weights, which stays as it is while weights are trained; per weight and per unit."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import graphcomp as gc
from graphcomp.api import _prepared
from graphcomp.methods.geta.method import Geta
from graphcomp.methods.opq import Opq, OpqRun
from graphcomp.methods.pqk import Pqk
from graphcomp.methods.psgd import Psgd
from graphcomp.methods.qst.method import Qst
from graphcomp.pruning.analytic import analytic_masks
from graphcomp.training.elements import multiplied
from graphcomp.training.optimizer import MethodOptimizer
from tests.methods.learning import Outer, Stop, batches, check_saved_and_exported, compress, loss, net

RANGE: dict[str, Any] = {"bits": (2, 8), "sparsity": 0.5}


def begun(method: Opq | None = None, **asked: Any) -> tuple[MethodOptimizer, OpqRun]:
    method = method or Opq()
    source = partial(
        _prepared, net(), batches()[0][0], None, ignore=(), keep_inputs=(), prune=None, scope="", outputs=None
    )
    goal = gc.Goal(**{"sparsity": 0.6, "bits": (3, 3), "activation_bits": None, **asked})
    run = method.begin(method.prepare(source, goal).train(), goal, gc.Training(steps=9), 9)
    return MethodOptimizer(run, torch.optim.SGD, 0.1, {"momentum": 0.9, "weight_decay": 1e-2}), run


def train(optimizer: MethodOptimizer, run: OpqRun, steps: int = 6) -> None:
    for k in range(steps):
        optimizer.zero_grad()
        batch = batches()[k % 4]
        run.loss(lambda own, tensors=None: run.ready(own[0]), batch, loss).backward()
        optimizer.step()


def codes(run: OpqRun) -> dict[str, Tensor]:
    """The codes of each weight, as they would be stored."""
    parameters = dict(run.ready.named_parameters())
    return {s.parameter: q.to_integers(parameters[s.parameter]).values for s, q in run.ready.quantizers()}


# ------------------------------------------------------------------------------------------------ a fixed plan
def test_masks_and_steps_stay_as_planned():
    optimizer, run = begun()
    before = {name: mask.clone() for name, mask in run.masks.items()}
    steps = {site.name: q.scale.clone() for site, q in run.ready.quantizers()}
    start = {name: run.ready.get_parameter(name).detach().clone() for name in before}
    expected = analytic_masks(multiplied(begun(sparsity=0.0)[1].ready), 0.6)
    assert all(torch.equal(mask, expected[name]) for name, mask in before.items()) and before.keys() == expected.keys()
    train(optimizer, run)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for site, quantizer in run.ready.quantizers():
        assert torch.equal(quantizer.scale, steps[site.name]) and id(quantizer.scale) not in trained
    for name, mask in before.items():
        weight = run.ready.get_parameter(name)
        assert torch.equal(run.masks[name], mask) and not bool(weight[~mask].any())
        assert not bool(weight.grad[~mask].any())  # so that momentum gathers nothing
        assert not bool(optimizer.state[weight]["momentum_buffer"][~mask].any())
        assert not torch.equal(weight[mask], start[name][mask])


def test_all_channels_of_a_layer_share_one_grid_and_narrow_channels_need_fewer_bits():
    optimizer, run = begun(bits=(4, 4), sparsity=0.3)
    train(optimizer, run)
    for site, quantizer in run.ready.quantizers():
        assert quantizer.scale.dim() == 0
        weight = run.ready.get_parameter(site.parameter).detach()
        on_grid = quantizer(weight) / quantizer.scale
        torch.testing.assert_close(on_grid, on_grid.round(), rtol=0, atol=1e-5)
        assert float(on_grid.abs().max()) <= 7
        per_channel = list(on_grid.round().flatten(1))
        needed = [math.ceil(math.log2(2 * float(row.abs().max()) + 1)) for row in per_channel]
        counts = [int((row != 0).sum()) for row in per_channel]
        fixed = sum(counts) * max(needed)
        assert sum(n * b for n, b in zip(counts, needed, strict=True)) <= fixed and max(needed) <= 4


def test_the_step_is_that_of_the_weights_that_stay():
    _, run = begun(bits=(2, 2), sparsity=0.6)
    for site, quantizer in run.ready.quantizers():
        weight = run.ready.get_parameter(site.parameter).detach()
        stays = weight[weight != 0]
        error = float((quantizer(weight) - weight).square().sum())
        for factor in (0.6, 0.8, 1.25, 1.6):
            other = (stays / (quantizer.scale * factor)).round().clamp(-1, 1) * quantizer.scale * factor
            assert error <= 1.02 * float((other - stays).square().sum())


# ------------------------------------------------------------------------------------------------ what is asked is met
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_the_share_of_weights_is_met(sparsity):
    small = compress("opq", sparsity=sparsity, bits=4)
    gone = [note for note in small.report.notes if "pruned one by one" in note]
    assert not any("not what the result has" in note for note in small.report.notes)
    assert not sparsity or gone[0].startswith(f"{round(sparsity * 672)} of 672 weights in 3 tensors")
    assert [layer.weight_bits for layer in small.report.layers] == [4, 4, 4]
    assert small.report.sizes["C0"] <= math.ceil((672 - round(sparsity * 672)) * 4 / 8)


@pytest.mark.parametrize(("convention", "limit"), [("C0", 160), ("C0", 0.06), ("C3", 220)])
def test_a_budget_on_bytes_is_met_by_the_convention(convention, limit):
    small = compress(Opq(convention=convention), budget=gc.Budget(bytes=limit), **RANGE)
    allowed = limit * 4 * 672 if isinstance(limit, float) else limit
    assert 0.85 * allowed < small.report.sizes[convention] <= allowed
    assert not any("not what the result has" in note for note in small.report.notes)
    assert len({layer.weight_bits for layer in small.report.layers}) > 1


def test_bits_per_weight_are_met_on_average_and_named():
    small = compress(Opq(mean_bits=4.5), **RANGE)
    bits = {layer.name: layer.weight_bits for layer in small.report.layers}
    assert f"bits of each layer, planned: {', '.join(f'{n} {b}' for n, b in bits.items())}" in small.report.notes
    assert set(bits.values()) <= set(range(2, 9)) and small.report.sizes["C0"] <= 336 * 4.5 / 8


@pytest.mark.slow
@pytest.mark.ci
def test_units_go_and_the_file_gets_smaller(tmp_path):
    small = compress(Opq(per="unit"), sparsity=0.5, bits=4)
    assert small.report.units_removed == 8 and small.report.params.ratio < 0.5
    assert small.report.verified["trained == sliced"] < 1e-9
    whole = compress("opq", sparsity=0.5, bits=4)
    assert small.report.bytes.after < 0.5 * whole.report.bytes.after


def test_the_report_says_which_errors_the_plan_is_of():
    for method, note in (
        ("opq", "planned by the errors of omega='mean'"),
        (Opq(omega="total", density="empirical"), "planned by the errors of omega='total', weights ranked as they are"),
        (Opq(per="unit", omega="energy"), "planned by the errors of omega='energy'"),
    ):
        assert note in compress(method, sparsity=0.5).report.notes


def test_units_in_multiples_and_by_role():
    small = compress(Opq(per="unit"), sparsity=0.4, round_to=4)
    assert {n["units"]["kept"] % 4 for n in small.report.groups} == {0}
    assert any("round_to=4" in note for note in small.report.notes)
    with pytest.raises(gc.NothingToPrune):
        compress(Opq(per="unit"), sparsity=0.4, prune=["head"])


@pytest.mark.slow
@pytest.mark.ci
def test_activations_are_quantized_where_bits_are_given():
    small = compress("opq", sparsity=0.5, bits=4, activation_bits=8)
    assert [layer.activation_bits for layer in small.report.layers] == [8, 8, 8]
    assert not any("activations stay float" in note for note in small.report.notes)
    floats = compress("opq", sparsity=0.5, bits=4)
    assert any("activations stay float" in note for note in floats.report.notes)


def test_a_submodule_and_a_layer_that_is_left_out():
    small = compress("opq", model=Outer(), scope="inner", sparsity=0.75)
    inner = small.module.inner
    assert sum(int((p == 0).sum()) for p in inner.parameters() if p.dim() > 1) == 504
    small = compress("opq", sparsity=0.5, bits=4, ignore=["second"])
    assert [layer.weight_bits for layer in small.report.layers] == [4, 32, 4]


# ------------------------------------------------------------------------------------------------ to the file
@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("per", ["element", "unit"])
def test_what_is_saved_and_exported_computes_what_was_trained(tmp_path, per):
    small = compress(Opq(per=per, mean_bits=4), activation_bits=None, **RANGE).eval()
    assert small.report.verified["trained == sliced"] < 1e-9 and small.report.verified["sliced == folded"] < 1e-6
    check_saved_and_exported(small, tmp_path)


def test_the_codes_that_are_stored_are_those_of_training():
    seen: dict[str, Any] = {}

    class Watched(Opq):
        def begin(self, *args: Any) -> OpqRun:
            seen["run"] = super().begin(*args)
            return seen["run"]

    small = compress(Watched(), sparsity=0.5, bits=3)
    trained = codes(seen["run"])
    for name, stored in small.quantized.lowered.weights.items():
        own = next(value for key, value in trained.items() if key.removesuffix(".weight") in name)
        assert torch.equal(stored.values, own)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("per", ["element", "unit"])
def test_a_run_that_was_cut_short_ends_as_it_would_have(tmp_path, per):
    method = Opq(per=per, mean_bits=4)
    whole = compress(method, **RANGE)
    with pytest.raises(Stop):
        compress(method, folder=tmp_path, calls=13, **RANGE)
    resumed = compress(method, folder=tmp_path, **RANGE)
    assert all(torch.equal(resumed.state_dict()[name], own) for name, own in whole.state_dict().items())
    with pytest.raises(gc.CheckpointError, match="omega: mean there, total"):
        compress(Opq(per=per, mean_bits=4, omega="total"), folder=tmp_path, **RANGE)


# ------------------------------------------------------------------------------------------------ other methods
def _counts(small: gc.CompressedModel) -> list[int]:
    return [int((p == 0).sum()) for p in small.module.parameters() if p.dim() > 1]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("method", [Psgd, Pqk])
def test_methods_of_single_weights_take_the_allocation(method):
    found = [_counts(compress(method(allocation=how), sparsity=0.8)) for how in ("global", "opq")]
    total = 648 if method is Pqk else 672
    own = [sum(counts[:2]) if method is Pqk else sum(counts) for counts in found]
    assert own == [round(0.8 * total)] * 2 and found[0] != found[1]
    with pytest.raises(gc.PlanError, match="allocation must be"):
        method(allocation="best")


@pytest.mark.slow
@pytest.mark.ci
def test_units_of_geta_take_the_allocation():
    options = {"sparsity": 0.5, "bits": (4, 8), "training": {"steps": 60}}
    small = compress(Geta(allocation="opq"), **options)
    assert small.report.units_removed == 8
    left = [[group["units"]["kept"] for group in own.report.groups] for own in (small, compress("geta", **options))]
    assert sum(left[0]) == sum(left[1]) == 8
    with pytest.raises(gc.PlanError, match="allocation must be"):
        Geta(allocation="best")


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("second", [Opq(per="unit"), Qst(per="unit"), Opq(), Qst()])
def test_after_another_method_the_units_that_are_gone_count(second):
    options = {"sparsity": 0.5, "bits": 4, "activation_bits": None, "training": {"steps": 80}}
    report = compress(["hesso", second], **options).report
    assert report.units_removed == 8 and not any("not what the result has" in note for note in report.notes)
    assert [layer.weight_bits for layer in report.layers] == [4, 4, 4]


@pytest.mark.slow
@pytest.mark.ci
def test_masks_stay_while_another_method_trains_on():
    small = compress(["opq", "qat"], sparsity=0.5, bits=4, activation_bits=None)
    assert any(note.startswith("336 of 672 weights in 3 tensors") for note in small.report.notes)
    codes = [stored.counted() for stored in small.quantized.lowered.weights.values()]
    assert sum(own.total - own.kept for own in codes) >= 336


# ------------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Opq(), {"bits": (2, 8)}, "neither a budget nor mean_bits"),
        (Opq(mean_bits=4), {"bits": 4}, "bits=4 and mean_bits"),
        (Opq(mean_bits=4), {"sparsity": 0.5}, "bits=None and mean_bits"),
        (Opq(mean_bits=4), {"bits": (2, 8), "budget": gc.Budget(bytes=0.1)}, "a budget and mean_bits"),
        (Opq(mean_bits=9), {"bits": (2, 8)}, "mean_bits must be within"),
        (Opq(), {"sparsity": 0.5, "budget": gc.Budget(bytes=0.1)}, "no bits are given"),
        (Opq(), {"bits": (2, 8), "budget": gc.Budget(macs=0.1)}, r"Budget\(macs=…\)"),
        (Opq(), {"bits": (2, 8), "sparsity": 0.1, "budget": gc.Budget(bytes=0.01)}, "2 bits for each of 605"),
        (Opq(convention="C3"), {"bits": (2, 8), "budget": gc.Budget(bytes=80)}, "2 bits for each"),
        (Opq(), {"sparsity": {"second": 0.5}}, "sparsity by module"),
        (Opq(), {"bits": 4, "round_to": 4}, "round_to with"),
        (Opq(), {"bits": 4, "saliency": "l2"}, "saliency with"),
        (Opq(), {"sparsity": 0.5, "training": {"steps": None, "schedule": gc.Schedule(24)}}, "a Schedule"),
        (Opq(), {"sparsity": 0.5, "activation_bits": 8}, "activation_bits"),
    ],
)
def test_what_the_method_does_not_do(method, options, message):
    with pytest.raises(gc.GraphcompError, match=message):
        compress(method, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"per": "row"},
        {"omega": "l2"},
        {"density": "normal"},
        {"convention": "C4"},
        {"mean_bits": 1},
        {"mean_bits": True},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(gc.PlanError, match=next(iter(options))):
        Opq(**options)
