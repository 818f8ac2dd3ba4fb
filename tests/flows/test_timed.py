"""Budgets on latency: what is timed, predicted, chosen, measured and said, without a clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.cost.latency_table import LatencyTable
from graphcomp.errors import BudgetError, NotBuiltError, PlanError
from graphcomp.flows import timed
from graphcomp.flows.timed import DESIGNS, Networks, designs, time_plan
from graphcomp.pruning.multiples import with_fast_widths
from graphcomp.targets.timing import Call
from tests.flows.fake_timer import MACHINE, PER_PIECE, PER_WEIGHT, WHOLE, FakeTimer
from tests.marks import in_ci

X = torch.linspace(-1, 1, 4 * 8).reshape(4, 8)


class Net(nn.Module):
    """8 -> 32 -> 32 -> 32 -> 4: the second and the third layer are equal but for their weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.first, self.second, self.down = (
            nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(n, 8) -> (n, 4)."""
        for layer in (self.up, self.first, self.second):
            x = torch.relu(layer(x))
        result: Tensor = self.down(x)
        return result


DENSE_MS = WHOLE * (4 * PER_PIECE + PER_WEIGHT * (8 * 32 + 2 * 32 * 32 + 4 * 32))


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[FakeTimer]:
    """Let nothing be timed; return the timers that were made."""
    made: list[FakeTimer] = []

    def make(runtime: str, threads: int) -> FakeTimer:
        made.append(FakeTimer(threads))
        return made[-1]

    monkeypatch.setattr("graphcomp.flows.timed.timer_of", make)
    monkeypatch.setattr("graphcomp.flows.timed.this_machine", lambda runtime: MACHINE)
    return made


def compressed(budget: gc.Budget, **options: Any) -> gc.CompressedModel:
    return gc.compress(Net().eval(), X, budget=budget, progress=False, **options)


def widths(small: gc.CompressedModel) -> list[int]:
    assert isinstance(small.report, gc.Report)
    return [layer.units_kept for layer in small.report.layers]


def test_a_prediction_is_that_of_the_layers_scaled_to_whole_networks(timers: list[FakeTimer]) -> None:
    plan = gc.analyze(Net().eval(), X)
    table, predicted = time_plan(plan, plan.groups, LatencyTable(threads=2))
    assert predicted.dense_ms == pytest.approx(DENSE_MS) == predicted.original_ms
    assert predicted.spread < 1e-6 and predicted.worst[1] < 1e-6
    counts = {group.factor: 12 for group in plan.groups}
    expected = WHOLE * (4 * PER_PIECE + PER_WEIGHT * (8 * 12 + 2 * 12 * 12 + 4 * 12))
    assert predicted(counts) == pytest.approx(expected, rel=1e-6)
    # equal layers are timed once, at each width; and three networks
    assert timers[0].timed.count("linear_1") == DESIGNS and "linear_2" not in timers[0].timed
    assert (timers[0].timed.count("whole"), timers[0].threads, len(timers)) == (len(timed.WHOLE), 2, 1)
    assert (table.machine, table.runtime, table.threads) == (MACHINE, "onnxruntime", 2)


def test_networks_that_are_timed_have_widths_that_can_be_chosen() -> None:
    plan = gc.analyze(Net().eval(), X)
    groups = with_fast_widths(plan.groups)
    found = designs(groups)
    assert found[0] == {} and len(found) == DESIGNS
    for kept in found[1:]:
        assert all(len(units) % 4 == 0 and 4 <= len(units) <= 32 for units in kept.values())
    assert len({tuple(len(u) for u in kept.values()) for kept in found}) > DESIGNS // 2
    sizes = [sum(len(units) for units in kept.values()) for kept in found[1:]]
    assert sizes[-1] < sizes[0] / 2


def test_a_table_is_reused(timers: list[FakeTimer], tmp_path: Path) -> None:
    table = gc.time_layers(Net().eval(), X, progress=False)
    table.save(tmp_path / "table.json")
    loaded = gc.LatencyTable.load(tmp_path / "table.json")
    assert loaded == table
    before = len(timers)
    small = compressed(gc.Budget(speedup=2, table=loaded))
    # the original, which stays; the choice; the result
    assert [timer.timed for timer in timers[before:]] == [["whole"], ["whole"], ["whole"]]
    assert widths(small) == widths(compressed(gc.Budget(speedup=2)))


def test_a_table_of_another_machine_must_hold_all(timers: list[FakeTimer], tmp_path: Path) -> None:
    table = gc.time_layers(Net().eval(), X, progress=False).with_times("elsewhere", {})
    small = compressed(gc.Budget(speedup=2, table=table))
    assert isinstance(small.report, gc.Report)
    assert any("predicted on elsewhere, and this is another machine: not measured" in n for n in small.report.notes)
    assert small.report.latency_ms is None
    with pytest.raises(PlanError, match="measured on another machine: elsewhere"):
        gc.compress(Net().eval(), X[:2], budget=gc.Budget(speedup=2, table=table), progress=False)


@pytest.mark.parametrize("ranking", ["global", "local", "sensitivity"])
def test_the_budget_is_met_and_named(timers: list[FakeTimer], ranking: Any) -> None:
    data = {"calibration": [torch.randn(16, 8) for _ in range(3)]} if ranking == "sensitivity" else {}
    small = compressed(gc.Budget(latency_ms=DENSE_MS / 2), ranking=ranking, **data)
    report = small.report
    assert isinstance(report, gc.Report) and report.latency_ms is not None
    assert report.latency_ms.before == pytest.approx(DENSE_MS)
    assert 0.3 * DENSE_MS < report.latency_ms.after <= DENSE_MS / 2 * (1 + 1e-6)
    (said,) = [note for note in report.notes if note.startswith("latency in onnxruntime, 1 thread")]
    assert f"{report.latency_ms.after:.3f} ms predicted, {report.latency_ms.after:.3f} ms measured" in said
    assert not any("off by" in note or "not by what was measured" in note for note in report.notes)
    assert all(width % 4 == 0 for width in widths(small)[:3])


def test_a_submodule_is_timed_alone(timers: list[FakeTimer]) -> None:
    whole = nn.Sequential(nn.Linear(8, 8), Net()).eval()
    small = gc.compress(whole, X, scope="1", budget=gc.Budget(speedup=2), progress=False)
    assert isinstance(small.report, gc.Report) and small.report.latency_ms is not None
    assert small.report.latency_ms.before == pytest.approx(DENSE_MS) and small.report.latency_ms.ratio <= 0.5
    assert small(X).shape == (4, 4)


def test_all_limits_hold_together(timers: list[FakeTimer]) -> None:
    loose = compressed(gc.Budget(speedup=1.2)).report
    both = compressed(gc.Budget(speedup=1.2, params=0.3)).report
    assert isinstance(loose, gc.Report) and isinstance(both, gc.Report)
    assert both.params.ratio <= 0.3 < loose.params.ratio
    assert both.latency_ms is not None and both.latency_ms.ratio <= 1 / 1.2


def only_what_is_cut(monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    """Let networks take so many times what the table says, but for the original."""
    real = Networks.cut
    monkeypatch.setattr(
        Networks, "cut", lambda self, kept, timer, held=None: slower(real(self, kept, timer, held), times)
    )


def slower(call: Call, times: float) -> Call:
    return Call(lambda: times * float(call.run()))  # type: ignore[arg-type]


def test_a_result_that_is_slower_than_predicted_is_named(
    timers: list[FakeTimer], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = gc.time_layers(Net().eval(), X, progress=False)
    real = FakeTimer.whole
    made: list[int] = []

    def whole(self: FakeTimer, module: nn.Module, inputs: Any) -> Call:
        made.append(1)
        return slower(real(self, module, inputs), 1.0 if len(made) < 3 else 2.0)  # original, choice, result

    monkeypatch.setattr(FakeTimer, "whole", whole)
    report = compressed(gc.Budget(speedup=2, latency_ms=DENSE_MS / 2, table=table)).report
    assert isinstance(report, gc.Report)
    assert "the prediction of the latency is off by -50%" in report.notes
    assert any("(-50.0% off, " in note for note in report.notes)
    assert any("2 times as fast by the prediction, and not by what was measured: 1." in note for note in report.notes)
    assert any("is met by the prediction, and not by what was measured" in note for note in report.notes)


@pytest.mark.parametrize("drift", [0.5, 1.0, 3.0])
def test_the_speed_of_the_machine_changes_no_choice(
    timers: list[FakeTimer], monkeypatch: pytest.MonkeyPatch, drift: float
) -> None:
    table = gc.time_layers(Net().eval(), X, progress=False)
    first = compressed(gc.Budget(speedup=2, table=table))
    monkeypatch.setattr("tests.flows.fake_timer.WHOLE", drift * WHOLE)
    again = compressed(gc.Budget(speedup=2, table=table))
    assert widths(again) == widths(first)
    report = again.report
    assert isinstance(report, gc.Report) and report.latency_ms is not None
    assert report.latency_ms.before == pytest.approx(drift * DENSE_MS)
    assert any(" measured (+0.0% off, " in note or " measured (-0.0% off, " in note for note in report.notes)
    said = [note for note in report.notes if "times what the table says" in note]
    assert bool(said) == (drift != 1)


def test_milliseconds_are_of_now(timers: list[FakeTimer], monkeypatch: pytest.MonkeyPatch) -> None:
    table = gc.time_layers(Net().eval(), X, progress=False)
    monkeypatch.setattr("tests.flows.fake_timer.WHOLE", 2 * WHOLE)
    report = compressed(gc.Budget(latency_ms=DENSE_MS, table=table)).report
    assert isinstance(report, gc.Report) and report.latency_ms is not None
    assert 0.6 * DENSE_MS < report.latency_ms.after <= DENSE_MS
    assert not any("not by what was measured" in note for note in report.notes)


def test_a_choice_is_timed_and_made_again_where_the_prediction_was_off(
    timers: list[FakeTimer], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = gc.time_layers(Net().eval(), X, progress=False)
    first = compressed(gc.Budget(latency_ms=DENSE_MS / 2, table=table))
    with monkeypatch.context() as patch:
        only_what_is_cut(patch, 1.5)
        again = compressed(gc.Budget(latency_ms=DENSE_MS / 2, table=table))
    assert sum(widths(again)[:3]) < sum(widths(first)[:3])
    report = again.report
    assert isinstance(report, gc.Report) and any("the best of 2 timed choices" in note for note in report.notes)
    # no choice is fast enough by what was measured: the fastest one stays
    only_what_is_cut(monkeypatch, 20.0)
    late = compressed(gc.Budget(latency_ms=DENSE_MS / 2, table=table))
    assert widths(late) == widths(first)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("baseline", ["original", "quantized"])
def test_speedups_count_from_the_original_or_from_the_quantized_network(
    timers: list[FakeTimer], monkeypatch: pytest.MonkeyPatch, baseline: Any
) -> None:
    """Quantized networks take three quarters of the time of the same floats."""
    real = FakeTimer.whole

    def whole(self: FakeTimer, module: nn.Module, inputs: Any) -> Call:
        of_integers = any(t.dtype == torch.int8 for t in module.buffers())
        return slower(real(self, module, inputs), 0.75 if of_integers else 1.0)

    monkeypatch.setattr(FakeTimer, "whole", whole)
    report = compressed(gc.Budget(speedup=1.5, baseline=baseline), bits=8).report
    assert isinstance(report, gc.Report) and report.latency_ms is not None
    before, after = report.latency_ms.before, report.latency_ms.after
    assert before == pytest.approx(DENSE_MS, rel=0.02)
    counted = before if baseline == "original" else 0.75 * before
    assert 1.5 <= counted / after < 2
    said = [note for note in report.notes if note.startswith("quantized and uncut")]
    assert len(said) == (baseline == "quantized")
    with pytest.raises(BudgetError) as caught:
        compressed(gc.Budget(speedup=40, baseline=baseline), bits=8)
    assert (
        f"the quantized network that is not cut {0.75 * before:.3f} ms" in str(caught.value.why)
        or baseline == "original"
    )
    assert ('baseline="quantized"' in str(caught.value.fix)) == (baseline == "quantized")


def test_a_baseline_of_integers_needs_bits_and_a_speedup(timers: list[FakeTimer]) -> None:
    with pytest.raises(PlanError, match="without bits"):
        compressed(gc.Budget(speedup=2, baseline="quantized"))
    with pytest.raises(PlanError, match="without a speedup"):
        gc.Budget(latency_ms=2, baseline="quantized")
    with pytest.raises(PlanError, match="baseline"):
        gc.Budget(speedup=2, baseline="int8")  # type: ignore[arg-type]


def test_the_error_says_how_fast_the_network_can_become(timers: list[FakeTimer]) -> None:
    with pytest.raises(BudgetError, match=r"ms are predicted of the fastest") as caught:
        compressed(gc.Budget(speedup=50))
    assert caught.value.fix
    fastest = float(caught.value.fix.split("speedup=")[1].split(")")[0])
    assert 3 < fastest < 50
    compressed(gc.Budget(speedup=fastest))


def test_a_family_is_captured_scored_and_timed_once(timers: list[FakeTimer], monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"capture": 0, "score": 0, "by_sensitivity": 0}

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            made[name] += 1
            return real(*args, **kwargs)

        return counted

    for name in made:
        monkeypatch.setattr(f"graphcomp.api.{name}", counting(name, getattr(gc.api, name)))
    data = [torch.randn(16, 8) for _ in range(3)]
    options: dict[str, Any] = {"calibration": data, "ranking": "sensitivity", "saliency": "l2"}
    found = gc.family(Net().eval(), X, speedups=[1.5, 2, 3], progress=False, **options)
    assert made == {"capture": 1, "score": 1, "by_sensitivity": 1}
    assert [timer.timed.count("linear_1") for timer in timers] == [DESIGNS, *[0] * 9]
    times = []
    for small, speedup in zip(found, (1.5, 2, 3), strict=True):
        assert isinstance(small.report, gc.Report) and small.report.latency_ms is not None
        assert small.report.latency_ms.ratio <= 1 / speedup + 1e-6
        assert small.report.repairs
        times.append(small.report.latency_ms.after)
    assert times == sorted(times, reverse=True)
    alone = compressed(gc.Budget(speedup=2), **options)
    assert widths(alone) == widths(found[1])
    assert not {p.data_ptr() for p in found[0].parameters()} & {p.data_ptr() for p in found[1].parameters()}


def test_what_cannot_be_timed_is_refused(timers: list[FakeTimer]) -> None:
    with pytest.raises(PlanError, match='runtime="eager" with bits'):
        compressed(gc.Budget(speedup=2, table=LatencyTable(runtime="eager")), bits=8)
    with pytest.raises(PlanError, match="meta device"):
        gc.time_layers(Net().eval().to("meta"), X.to("meta"), progress=False)
    with pytest.raises(NotBuiltError, match="one shot alone"):
        gc.compress(
            Net(), X, budget=gc.Budget(speedup=2), method="hesso", data=[(X,)] * 4, steps=4, progress=False,
            loss=lambda output, batch: output.square().mean(),
        )  # fmt: skip
    for name, value in {"sparsity": 0.5, "budget": gc.Budget(macs=0.5), "method": "geta", "steps": 3}.items():
        with pytest.raises(PlanError, match=f"{name} beside speedups"):
            gc.family(Net(), X, speedups=[2], **{name: value})


@pytest.mark.slow
@pytest.mark.ci
def test_bits_are_part_of_what_is_timed(timers: list[FakeTimer]) -> None:
    floats = gc.time_layers(Net().eval(), X, progress=False)
    integers = gc.time_layers(Net().eval(), X, progress=False, bits=8, table=floats)
    assert floats.layers.keys() < integers.layers.keys()
    names = [layer.name for key, layer in integers.layers.items() if key not in floats.layers]
    assert sorted(names) == ["down", "first", "head", "the network before", "the whole network", "up"]


@pytest.mark.parametrize("case", in_ci("eager", "onnxruntime", "onnxruntime, 8 bits"))
def test_a_real_run(case: str) -> None:
    runtime: Any = case.partition(",")[0]
    bits = 8 if "bits" in case else None
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 4 * 4, 5),
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    table = gc.time_layers(net.eval(), x, table=gc.LatencyTable(runtime), bits=bits, progress=False)
    assert all(sample.ms > 0 for layer in table.layers.values() for sample in layer.samples)
    small = gc.compress(net, x, budget=gc.Budget(latency_ms=1e4, table=table), bits=bits, progress=False)
    assert isinstance(small.report, gc.Report) and small.report.latency_ms is not None
    assert small(x).shape == (2, 5)


def test_a_budget_that_the_original_meets_cuts_nothing(
    timers: list[FakeTimer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a timing of what is cut says."""
    only_what_is_cut(monkeypatch, 2.0)
    assert widths(compressed(gc.Budget(speedup=1))) == [32, 32, 32, 4]


def test_in_pytorch_networks_are_timed_as_users_run_them(
    timers: list[FakeTimer], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[type] = []
    whole = FakeTimer.whole
    monkeypatch.setattr(
        FakeTimer, "whole", lambda self, module, inputs: seen.append(type(module)) or whole(self, module, inputs)
    )  # type: ignore[func-returns-value]
    compressed(gc.Budget(speedup=2, table=LatencyTable(runtime="eager")))
    assert set(seen) == {Net}  # calls of modules take time, too
    seen.clear()
    compressed(gc.Budget(speedup=2, table=LatencyTable(runtime="onnxruntime")))
    assert set(seen) != {Net}  # files are written of graphs, and of the result


class Halves(nn.Module):
    """8 -> 64 -> 4, by two halves of one length, which the class needs equal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.left, self.right = nn.Linear(8, 64), nn.Linear(32, 4), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 8) -> (n, 4)."""
        left, right = self.up(x).chunk(2, dim=-1)
        result: Tensor = self.left(left.relu()) + self.right(right.relu())
        return result


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_what_is_timed_is_what_the_class_can_hold(
    timers: list[FakeTimer], monkeypatch: pytest.MonkeyPatch, runtime: Any
) -> None:
    seen: list[nn.Module] = []
    whole = FakeTimer.whole
    monkeypatch.setattr(
        FakeTimer, "whole", lambda self, module, inputs: seen.append(module) or whole(self, module, inputs)
    )  # type: ignore[func-returns-value]
    small = gc.compress(Halves().eval(), X, budget=gc.Budget(speedup=2, table=LatencyTable(runtime)), progress=False)
    assert small.form == "native" and small.module.left.in_features == small.module.right.in_features
    sizes = [sorted(tuple(t.shape) for t in module.parameters() if t.dim() > 1) for module in seen]
    assert sizes[-1] in sizes[:-1]  # the result was timed as a choice
    assert runtime == "onnxruntime" or {type(module) for module in seen} == {Halves}


def test_a_model_in_training_mode_is_timed_in_eval_mode() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    table = LatencyTable(runtime="eager")
    small = gc.compress(net, X, budget=gc.Budget(latency_ms=1e4, table=table), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training and small.training
    assert small.module.state_dict()["1.num_batches_tracked"] == before["1.num_batches_tracked"]


def test_a_speedup_out_of_reach_is_refused_before_others_are_made(
    timers: list[FakeTimer], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []
    monkeypatch.setattr("graphcomp.api.as_model", lambda *args, **kwargs: made.append(1.0))
    with pytest.raises(BudgetError):
        gc.family(Net().eval(), X, speedups=[1.5, 1e6, 2], progress=False)
    assert not made
    monkeypatch.undo()
