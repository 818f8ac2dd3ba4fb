"""AJPQ: the search and its folder, training with the plan fixed, what is asked is met, what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.methods.ajpq.evaluations import FILE, Evaluations
from graphcomp.methods.ajpq.method import Ajpq, AjpqRun
from graphcomp.methods.ajpq.search import CrossEntropy
from graphcomp.methods.ajpq.trial import Trial
from graphcomp.training.optimizer import MethodOptimizer
from tests.methods.learning import Outer, Stop, batches, compress, loss, net

from .planning import random_plan, searching, settled

X = batches()[0][0]
SHORT = Ajpq(evaluations=12)
ASKED: dict[str, Any] = {"bits": (2, 8), "budget": gc.Budget(bops=0.03)}


def alone(method: Any = SHORT, **options: Any) -> gc.CompressedModel:
    """The search alone, on data with a loss."""
    given = {"data": batches(), "loss": loss, **ASKED, **options}
    return gc.compress(net(), X, method=method, progress=False, **given)


def same(a: gc.CompressedModel, b: gc.CompressedModel) -> bool:
    return a.state_dict().keys() == b.state_dict().keys() and all(
        torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items()
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ the search
@pytest.mark.slow
@pytest.mark.ci
def test_a_seed_says_all_and_the_model_stays_as_it_is(tmp_path):
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    options: dict[str, Any] = {"method": SHORT, "data": batches(), "loss": loss, "progress": False, **ASKED}
    first, second = gc.compress(model, X, **options, folder=tmp_path / "0"), gc.compress(model, X, **options)
    assert same(first, second) and torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    gc.compress(model, X, **options, seed=5, folder=tmp_path / "5")
    plans = [[line["plan"] for line in lines(tmp_path / seed)[1:]] for seed in ("0", "5")]
    assert len(plans[0]) == len(plans[1]) == 12 and plans[0] != plans[1]


@pytest.mark.slow
@pytest.mark.ci
def test_each_plan_is_evaluated_once_and_a_search_goes_on_from_its_folder(tmp_path):
    whole = alone(folder=tmp_path / "whole")
    keys = [line["plan"] for line in lines(tmp_path / "whole")[1:]]
    assert len(keys) == len(set(keys)) == 12
    calls = 0

    def counted(output: Tensor, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise Stop
        return loss(output, batch)

    with pytest.raises(Stop):
        alone(folder=tmp_path / "cut", loss=counted)
    done = len(lines(tmp_path / "cut")) - 1
    assert 0 < done < 12
    path = tmp_path / "cut" / FILE
    path.write_text(path.read_text() + '{"plan": "ab')  # the process ended in the middle of a line
    calls = -10_000
    resumed = alone(folder=tmp_path / "cut", loss=counted)
    assert same(whole, resumed) and calls == -10_000 + 2 * (12 - done)
    assert [line["plan"] for line in lines(tmp_path / "cut")[1:]] == keys
    again = alone(folder=tmp_path / "cut", loss=counted)
    assert same(whole, again) and calls == -10_000 + 2 * (12 - done)  # nothing is evaluated again


@pytest.mark.slow
@pytest.mark.ci
def test_a_folder_of_another_search_is_refused(tmp_path):
    alone(folder=tmp_path)
    for options in ({"seed": 3}, {"bits": (3, 8)}, {"budget": gc.Budget(bops=0.02)}, {"data": batches(3)}):
        with pytest.raises(gc.CheckpointError, match="holds another search") as caught:
            alone(folder=tmp_path, **options)
        assert "there" in caught.value.why
    held = Evaluations(tmp_path / "busy", {})
    with pytest.raises(gc.CheckpointError, match="another run is at work"):
        Evaluations(tmp_path / "busy", {})
    held.close()
    Evaluations(tmp_path / "busy", {}).close()


def test_scores_that_are_not_finite_are_the_worst(tmp_path):
    seen = 0

    def score(module: nn.Module) -> float:
        nonlocal seen
        seen += 1
        return float("nan") if seen > 1 else -7.0

    small = alone(Ajpq(evaluations=5, evaluate=score), folder=tmp_path)
    assert any("best score -7" in note for note in small.report.notes)
    assert [line["score"] for line in lines(tmp_path)[1:]] == [-7.0, None, None, None, None]


@pytest.mark.slow
@pytest.mark.ci
def test_a_score_of_the_users_own_decides():
    """A score that counts the codes of the head alone: the head keeps few bits."""

    def few(module: nn.Module) -> float:
        assert not module.training
        return -float(module.get_submodule("graphcomp_quantizers.head_weight").bits)

    given = alone(Ajpq(evaluations=40, evaluate=few), budget=gc.Budget(bops=0.05))
    bits = {layer.name: layer.weight_bits for layer in given.report.layers}
    assert bits["head"] < min(bits["first"], bits["second"])


@pytest.mark.slow
@pytest.mark.ci
def test_without_labels_the_outputs_are_what_is_kept():
    rows = [x for x, _ in batches(8)]
    errors = []
    for share in (0.03, 0.008):
        small = gc.compress(
            settled(), X, method=SHORT, calibration=rows, progress=False, bits=(2, 8), budget=gc.Budget(bops=share)
        )
        assert small.report.bops.ratio <= share and any("12 plans" in note for note in small.report.notes)
        with torch.no_grad():
            errors.append(float((small(X) - settled()(X)).norm() / settled()(X).norm()))
    assert errors[0] < 0.15 and errors[0] < 0.6 * errors[1]


@pytest.mark.slow
@pytest.mark.ci
def test_more_plans_are_never_worse():
    scores = []
    for plans in (8, 30, 60):
        note = next(n for n in alone(Ajpq(evaluations=plans)).report.notes if "best score" in n)
        scores.append(float(note.rsplit(" ", 1)[1]))
    assert scores == sorted(scores) and scores[-1] > scores[0]


def test_the_first_draws_move_units_alone_or_bits_alone():
    _, search = searching()
    units, starts = search.actions.units, search._starts()
    drawn = search._first_draws(CrossEntropy(starts[3], 0.15, 0.02, 0), starts[0], starts[3])
    of_units, of_bits = drawn[:10], drawn[10:]
    assert len(drawn) == 20 and 0 < units < search.actions.size
    assert torch.equal(of_units[:, units:], starts[3][units:].expand(10, -1))
    assert torch.equal(of_bits[:, :units], starts[0][:units].expand(10, -1))
    assert bool((of_units[:, :units].std(0) > 0).all()) and bool((of_bits[:, units:].std(0) > 0).all())
    for options in ({"sparsity": 0}, {"bits": (4, 4)}):  # one of the two alone: there is nothing to hold
        _, search = searching(**options)
        drawn = search._first_draws(CrossEntropy(search._starts()[0], 0.15, 0.02, 0), *[search._starts()[0]] * 2)
        assert len(drawn) == 20 and bool((drawn.std(0) > 0).all())


def test_a_plan_leaves_nothing_behind():
    """Each plan is put on the module as it was at first."""
    ready, search = searching()
    before = {name: tensor.clone() for name, tensor in ready.state_dict().items()}
    trial = Trial(ready, search.layout, [[X]], repair=True)
    trial.put(random_plan(search, 0))
    first = ready(X)
    trial.put(random_plan(search, 1))
    assert not torch.equal(ready(X), first)
    trial.put(random_plan(search, 0))
    assert torch.equal(ready(X), first)
    trial.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ready.state_dict().items())


def test_the_repair_brings_the_outputs_back():
    ready, search = searching(model=settled(), bits=(8, 8), budget=gc.Budget(bops=0.1))
    rows = [[x] for x, _ in batches(8)]
    wanted, plan = ready(X).detach(), random_plan(search, 0)
    errors = []
    for repair in (False, True):
        trial = Trial(ready, search.layout, rows, repair=repair)
        trial.put(plan)
        errors.append(float((ready(X).detach() - wanted).norm()))
        trial.restore()
    assert all(int((~own).sum()) > 1 for own in plan.left) and errors[1] < 0.8 * errors[0]


# ------------------------------------------------------------------------------------------------ training
def test_units_and_bits_stay_as_planned_while_weights_are_trained():
    ready, search = searching()
    plan = random_plan(search, 2)
    Trial(ready, search.layout, [[X]], repair=True).put(plan)
    widths = {site.name: q.widths.clone() for site, q in ready.quantizers()}
    steps = {site.name: q.scale.detach().clone() for site, q in ready.quantizers()}
    run = AjpqRun(ready.train(), about={})
    optimizer = MethodOptimizer(run, torch.optim.SGD, 0.1, {"momentum": 0.9})
    start = {name: p.detach().clone() for name, p in ready.named_parameters()}
    for k in range(5):
        optimizer.zero_grad()
        batch = batches()[k % 4]
        run.loss(lambda own, tensors=None: ready(own[0]), batch, loss).backward()
        optimizer.step()
    for site, quantizer in ready.quantizers():
        assert torch.equal(quantizer.widths, widths[site.name])
        assert not torch.equal(quantizer.scale, steps[site.name])
    assert not torch.equal(ready.get_parameter("second.weight"), start["second.weight"])
    kept = {group.name: units.tolist() for group, units in ready.kept().items()}
    assert kept == {
        g.name: u.nonzero().flatten().tolist() for g, u in zip(search.layout.groups, plan.left, strict=True)
    }
    assert not bool(ready.get_parameter("first.weight")[~plan.left[0]].any())
    own = [float(b[b > 0].float().mean()) for b in plan.bits]
    assert len(run.bits()) == 3 and max(own) <= 8


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("budget", [gc.Budget(bops=0.03), gc.Budget(bytes=0.1), gc.Budget(macs=0.6, bops=0.05)])
def test_the_budget_is_met_after_training(budget):
    small = compress(SHORT, bits=(2, 8), budget=budget)
    assert not any("not what the result has" in note for note in small.report.notes)
    assert all(2 <= layer.weight_bits <= 8 for layer in small.report.layers)
    if budget.macs is None and budget.bops is not None:  # else units, not bits, are what the budget takes
        assert 0.5 * budget.bops < small.report.bops.ratio <= budget.bops


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(("calls", "dtype"), [(5, None), (23, None), (40, None), (40, torch.bfloat16)])
def test_a_run_goes_on_bit_for_bit_from_the_search_and_from_training(tmp_path, calls, dtype):
    options = {**ASKED, "training": {"autocast": dtype}}
    whole = compress(SHORT, **options)
    with pytest.raises(Stop):
        compress(SHORT, calls=calls, folder=tmp_path, **{**options, "training": {"autocast": dtype}})
    assert bool(list(tmp_path.glob("step-*.pt"))) == (calls == 40)  # the others end in the search
    assert same(whole, compress(SHORT, folder=tmp_path, **{**options, "training": {"autocast": dtype}}))


@pytest.mark.slow
@pytest.mark.ci
def test_the_exported_file_holds_codes_within_the_bits_of_each_channel(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    small = compress(SHORT, **ASKED)
    small.export(tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), small(X), rtol=1e-4, atol=1e-4)
    said = next(note for note in small.report.notes if note.startswith("bits of output channels"))
    widths = [
        int(b) for part in said.split(": ")[1].split(", ") for n, b in [part.split(" with ")] for _ in range(int(n))
    ]
    held = onnx.load(str(tmp_path / "model.onnx")).graph.initializer
    codes = [torch.from_numpy(onnx.numpy_helper.to_array(t).astype("int32")) for t in held if "weight_codes" in t.name]
    needed = [int(row.abs().max()).bit_length() + 1 for own in codes for row in own.flatten(1)]
    assert len(needed) == len(widths) and all(a <= b for a, b in zip(sorted(needed), sorted(widths), strict=True))


@pytest.mark.slow
@pytest.mark.ci
def test_in_a_submodule_and_in_a_list():
    torch.manual_seed(0)
    model = Outer()
    small = gc.compress(
        model, X, method=SHORT, scope="inner", data=batches(), loss=loss, progress=False, steps=6, **ASKED
    )
    assert small(X).shape == (16, 3) and isinstance(small.module, Outer)
    both = compress([SHORT, "qat"], bits=4, sparsity=0)
    assert "ajpq" in str(both.report.notes) or both.report.units_removed == 0


# ------------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": None}, "needs a budget"),
        ({"bits": 4, "budget": None}, "needs a budget"),
        ({"sparsity": 0.5}, "sparsity=0.5 with method='ajpq'"),
        ({"bits": None, "sparsity": 0}, "sparsity=0, and no bits are given"),
        ({"budget": gc.Budget(speedup=2.0)}, "a budget of time"),
        ({"bits": None, "budget": gc.Budget(bytes=0.1)}, "no bits are given"),
        ({"activation_bits": (4, 8)}, "activation_bits of method='ajpq' must be one number"),
        ({"saliency": "l2"}, "saliency with method='ajpq'"),
        ({"data": None, "loss": None}, "a search without data"),
        ({"lr": 0.1}, "lr with method='ajpq', and no length of training"),
        ({"training": gc.Training(options={"nesterov": True}, keep=3)}, "options, keep with method='ajpq'"),
        ({"budget": gc.Budget(bops=0.0001)}, "no plan meets the budget"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options, match):
    with pytest.raises(gc.GraphcompError, match=match) as caught:
        alone(**options)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"evaluations": 0}, "evaluations must be"),
        ({"controller": "rl"}, "controller must be"),
        ({"most": 1.0}, "most must be"),
        ({"evaluate": 3}, "evaluate must be"),
    ],
)
def test_options_of_the_method(options, match):
    with pytest.raises(gc.PlanError, match=match):
        Ajpq(**options)


def test_a_model_without_groups_gets_bits_alone_and_no_norms_are_needed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3))
    rows = [torch.randn(9, 6) for _ in range(2)]
    options: dict[str, Any] = {"method": SHORT, "calibration": rows, "progress": False}
    small = gc.compress(model, rows[0], bits=(2, 8), budget=gc.Budget(bops=0.04), sparsity=0, **options)
    assert small.report.bops.ratio <= 0.04 and small.report.units_removed == 0
    for asked in ({"budget": gc.Budget(macs=0.5)}, {"budget": gc.Budget(bops=0.04), "bits": (2, 8)}):
        with pytest.raises(gc.NothingToPrune) as caught:
            gc.compress(model, rows[0], **asked, **options)
        assert "sparsity=0" in caught.value.fix


@pytest.mark.slow
@pytest.mark.ci
def test_round_to_and_frozen_groups():
    small = alone(round_to=4, budget=gc.Budget(bops=0.012))
    assert small.report.units_removed > 0
    assert all(layer.units_kept % 4 == 0 for layer in small.report.layers if layer.name != "head")
    model = net()
    model.first.weight.requires_grad_(False)
    held = gc.compress(model, X, method=SHORT, data=batches(), loss=loss, progress=False, **ASKED)
    assert {layer.name: layer.units_kept for layer in held.report.layers}["first"] == 8
