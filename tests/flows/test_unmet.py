"""What was asked of a training method is compared with the result, and what is not met is noted."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch

import graphcomp as gc
from tests.methods.learning import compress


class Half(gc.Run):
    """Lets half of the units of each group go, whatever is asked for."""

    name = "half"

    def after_step(self, step: int) -> None:
        super().after_step(step)
        if step == 3:
            self.kept = {group: torch.arange(group.size // 2, group.size) for group in self.kept}


class Halves(gc.Method):
    """Takes options that it does nothing with."""

    name = "half"
    prunes = True
    quantizes = True

    def __init__(self, config: gc.QuantConfig | None = None, convention: Any = None) -> None:
        self.config, self.convention = config, convention

    def takes(self, goal: gc.Goal) -> Collection[str]:
        return {"budget", "sparsity by module"}

    def prepare(self, source: Any, goal: gc.Goal) -> gc.Prepared:
        return source(config=self.config)

    def begin(self, ready: gc.Prepared, goal: gc.Goal, training: gc.Training, steps: int) -> gc.Run:
        return Half(ready)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"sparsity": 0.9}, "sparsity=0.9 is not what the result has: 8 of 16 units are gone (0.5)"),
        ({"sparsity": 0.1}, "sparsity=0.1 is not what the result has: 8 of 16 units are gone (0.5)"),
        (
            {"sparsity": {"second": 0.25}},
            "sparsity=0.25 is not what the result has: 4 of 8 units of second are gone (0.5)",
        ),
        ({"budget": gc.Budget(macs=0.05)}, "Budget(macs=0.05) is not what the result has: "),
        ({"budget": gc.Budget(params=3)}, "Budget(params=3) is not what the result has: "),
        ({"bits": 4}, "bits=4 are not what the result has: no layer is quantized"),
        ({"bits": (4, 8)}, "bits=(4, 8) are not what the result has: no layer is quantized"),
    ],
)
@pytest.mark.slow
@pytest.mark.ci
def test_each_part_that_is_not_met_is_noted(options, note):
    notes = compress(Halves(), **options).report.notes
    assert len(notes) == 1 and notes[0].startswith(note)


def test_bytes_are_counted_by_the_convention_of_the_method():
    config = gc.QuantConfig(gc.QuantSpec(6), activations=None)
    small = compress(Halves(config, "C0"), budget=gc.Budget(bytes=0.01), bits=6, activation_bits=None)
    codes = small.report.sizes["C0"]
    wanted = f"Budget(bytes=0.01) is not what the result has: {codes:,.0f} bytes by C0 of 2,688 ({codes / 2688:.1%})"
    assert wanted in small.report.notes
    enough = gc.Budget(bytes=int(codes) + 1)
    assert not any("Budget" in note for note in compress(Halves(config, "C0"), budget=enough, bits=6).report.notes)


def test_other_bits_than_asked_for_are_noted():
    config = gc.QuantConfig(gc.QuantSpec(6), activations=None)
    notes = compress(Halves(config), bits=4, activation_bits=None).report.notes
    assert "bits=4 are not what the result has: second (6)" in notes
    assert not any("not what" in note for note in compress(Halves(config), bits=6).report.notes)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Halves(), {"sparsity": 0.5}),
        ("geta", {"sparsity": 0.4, "bits": (4, 8)}),
        ("hesso", {"budget": gc.Budget(macs=0.5)}),
        ("geta", {"bits": (4, 8), "budget": gc.Budget(bytes=0.15)}),
        ("hesso", {"sparsity": {"second": 0.25}}),
        ("geta", {"sparsity": 0.5, "round_to": 4, "bits": 6}),
        ("pqk", {"sparsity": 0.6, "bits": 4}),
        ("psgd", {"sparsity": 0.33}),
        ("psgd", {"bits": 3}),
        ("ternary", {"bits": 2}),
        ("qat", {"bits": 4, "activation_bits": 6}),
    ],
)
@pytest.mark.slow
@pytest.mark.ci
def test_a_goal_that_is_met_is_not_noted(method, options):
    assert not any("not what the result has" in note for note in compress(method, **options).report.notes)
