"""Lists of methods: what goes from one stage to the next, what each is asked for, and fixes that work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphcomp as gc
from graphcomp.methods.geta.method import Geta
from graphcomp.methods.pqk import Pqk
from graphcomp.methods.psgd import Psgd
from graphcomp.methods.qat import Qat
from graphcomp.methods.registry import stages_of
from graphcomp.methods.ternary import Ternary
from tests.methods.learning import compress
from tests.methods.test_own_method import of_the_page


def own() -> Any:
    return of_the_page()["Shrinkage"](strength=0.01)


def bits_of(small: gc.CompressedModel) -> set[tuple[int, int]]:
    return {(layer.weight_bits, layer.activation_bits) for layer in small.report.layers}


def notes_of(small: gc.CompressedModel) -> str:
    return "; ".join(small.report.notes)


# ------------------------------------------------------------------------------------------------ from stage to stage
@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("methods", "options", "bits"),
    [
        ([Geta(), "own"], {"bits": 4, "sparsity": 0.5}, {(4, 4)}),
        ([Pqk(), "own"], {"bits": 4, "sparsity": 0.5}, {(4, 8), (8, 8)}),
        (["qat", "hesso"], {"bits": 4, "sparsity": 0.5}, {(4, 8), (8, 8)}),
        (["qat", "own"], {"quantization": gc.PostTraining(gc.QuantConfig(gc.QuantSpec(5)))}, {(5, 32), (8, 32)}),
    ],
)
def test_quantizers_stay_where_the_next_stage_has_none(methods, options, bits):
    stages = [own() if method == "own" else method for method in methods]
    small = compress(stages, training={"steps": 8}, **options)
    assert small.form == "graph" and {weight for weight, _ in bits_of(small)} == {weight for weight, _ in bits}
    assert "integers == fake-quant, in steps" in small.report.verified
    assert "not what the result has" not in notes_of(small)
    if methods == ["qat", "hesso"]:
        assert small.report.units_removed == 8


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("lr", [0.05, 1e-7])
def test_a_stage_that_compares_leaves_the_others_alone(lr):
    """With a learning rate of almost 0 the first stage lowers no loss, and goes back to its start."""
    small = compress([Qat(), Geta()], bits=4, sparsity=0.5, training={"lr": lr, "steps": 8})
    assert small.report.units_removed == 8 and bits_of(small) == {(4, 4)}
    assert notes_of(small).count("loss ") == notes_of(small).count("qat: ")
    assert "geta begins with quantizers of its own, in place of those of the stages before" in small.report.notes


def test_single_weights_that_a_later_stage_prunes_are_zero():
    small = compress([Qat(), Pqk()], bits=4, sparsity=0.5)
    assert any("324 of 648 weights in 2 tensors" in note for note in small.report.notes)


def test_norms_that_a_stage_froze_move_in_the_next():
    seen = []

    class Run(gc.Run):
        name = "seen"

        def before_step(self, step: int) -> None:
            super().before_step(step)
            seen.append(self.ready.norms_frozen)

    class Seen(gc.Method):
        name = "seen"

        def begin(self, ready: gc.Prepared, goal: gc.Goal, training: gc.Training, steps: int) -> gc.Run:
            return Run(ready)

    compress(["qat", Seen()], bits=8, training={"steps": 8, "freeze_norms": 0.5})
    assert seen == [False, False, True, True]


def test_each_stage_is_asked_for_bits_in_its_own_way():
    small = compress([Qat(), Ternary()], bits=2)
    assert {weight for weight, _ in bits_of(small)} == {2, 8}


def test_names_stand_in_a_list():
    assert [stage.name for stage in stages_of(["hesso", Psgd(), "sequential"])[1]] == ["hesso", "psgd", "hesso", "geta"]
    small = compress(["hesso", "qat"], sparsity=0.5, bits=(4, 8))
    assert small.report.units_removed == 8 and max(bits_of(small)) <= (8, 8)
    with pytest.raises(gc.PlanError, match=r"one of 'geta', .* got 'oneshot'"):
        compress(["oneshot", "qat"], bits=8)


def test_options_of_quantization_are_those_of_the_last_stage_that_quantizes():
    with pytest.raises(gc.PlanError, match="group_size with method='qat, geta'"):
        compress([Qat(), Geta()], bits=4, group_size=4)
    with pytest.raises(gc.PlanError, match="activation_bits with method='qat, psgd'"):
        compress([Qat(), Psgd()], bits=4, activation_bits=8)


# ------------------------------------------------------------------------------------------------ fixes that work
FIXES: list[tuple[Any, dict[str, Any], str, dict[str, Any]]] = [
    ("ternary", {}, "bits=2", {"bits": 2}),
    ("qat", {}, "bits=(4, 8)", {"bits": (4, 8)}),
    ([Qat(), Ternary()], {}, "bits=2", {"bits": 2}),
    ([Qat(), Psgd()], {"bits": 4, "sparsity": 0.5}, "sparsity=None", {"bits": 4}),
    ([Qat(), Psgd()], {"bits": 4, "sparsity": 0.5}, "Pqk", {"method": [Qat(), Pqk()], "bits": 4, "sparsity": 0.5}),
    ("hesso", {"sparsity": 0.4, "training": {"steps": 2}}, "steps=3", {"sparsity": 0.4, "training": {"steps": 3}}),
    (
        "hesso",
        {"sparsity": 0.4, "training": {"steps": None, "schedule": gc.Schedule(2, joint=0.2)}},
        "Schedule(3, …)",
        {"sparsity": 0.4, "training": {"steps": None, "schedule": gc.Schedule(3, joint=0.2)}},
    ),
    (
        "hesso",
        {"sparsity": 0.4, "training": {"steps": None, "schedule": gc.Schedule(2, joint=0)}},
        "Schedule(3, joint=0.2)",
        {"sparsity": 0.4, "training": {"steps": None, "schedule": gc.Schedule(3, joint=0.2)}},
    ),
    *(
        (
            "sequential",
            {"sparsity": 0.4, "bits": (4, 8), "training": {"steps": few}},
            "steps=6",
            {"sparsity": 0.4, "bits": (4, 8), "training": {"steps": 6}},
        )
        for few in (1, 5)
    ),
    ("pqk", {"training": {"steps": 2}}, "steps=3", {"training": {"steps": 3}}),
    (
        "qat",
        {"bits": (4, 8), "budget": gc.Budget(macs=0.5)},
        'method="geta"',
        {"method": "geta", "bits": (4, 8), "budget": gc.Budget(macs=0.5)},
    ),
    (
        ["own", "own"],
        {"budget": gc.Budget(macs=0.5)},
        'method="geta"',
        {"method": "geta", "budget": gc.Budget(macs=0.5)},
    ),
    ("sequential", {"bits": (4, 8), "budget": gc.Budget(macs=0.5)}, "sparsity=0.5", {"bits": (4, 8), "sparsity": 0.5}),
]
"""Method and options, what the message proposes, and the options that follow it."""


@pytest.mark.parametrize(("method", "options", "fix", "fixed"), FIXES)
@pytest.mark.slow
@pytest.mark.ci
def test_a_proposed_fix_works(method, options, fix, fixed):
    method = [own(), own()] if method == ["own", "own"] else method
    with pytest.raises(gc.PlanError) as caught:
        compress(method, **options)
    assert fix in caught.value.fix
    small = compress(fixed.pop("method", method), **fixed)
    assert isinstance(small, gc.CompressedModel)


def test_a_list_that_prunes_no_units_is_not_told_to_prune():
    with pytest.raises(gc.PlanError, match="a budget with") as caught:
        compress(["qat", own()], bits=(4, 8), budget=gc.Budget(bops=0.1))
    assert "sparsity" not in caught.value.fix


def test_steps_are_told_of_the_whole_run():
    with pytest.raises(gc.PlanError, match="1 step of training are too few for method='sequential'") as caught:
        compress("sequential", sparsity=0.4, bits=(4, 8), training={"steps": 1})
    assert caught.value.why == "it needs 3 and 1 at least, in stages of 1 / 2 steps"


def test_bits_of_a_run_are_those_of_the_quantizers():
    ready = gc.prepare(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), torch.randn(2, 4), bits=(4, 8)
    )
    for _, quantizer in ready.quantizers():
        quantizer.project_bits(5, 5)
    assert gc.Run(ready).bits().round().unique().tolist() == [5]
