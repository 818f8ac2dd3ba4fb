"""What an integer graph will take, known before it is made: to the byte, so that a budget on bytes holds."""

from __future__ import annotations

import pytest
import torch

import graphcomp as gc
from graphcomp.flows.results import planned_bits, planned_bytes, post_training
from graphcomp.quantization.integer_bytes import stored_bits
from tests.marks import slow
from tests.training.runs import MODELS, batch, model_of


@pytest.mark.parametrize("name", ["residual", *slow(*(name for name in MODELS if name != "residual"))])
@pytest.mark.parametrize(
    "options",
    [{"bits": 8}, {"bits": 3, "activation_bits": None}, {"bits": 4, "activation_bits": None, "group_size": 5}],
)
@pytest.mark.slow
@pytest.mark.ci
def test_bytes_are_those_of_the_report(name: str, options: dict[str, int | None]) -> None:
    model, inputs = model_of(name).eval(), batch(name)
    plan = gc.analyze(model, inputs)
    given = options["bits"], options.get("activation_bits", 8), options.get("group_size") or 0
    quantization = post_training(*given, "nearest", ())
    assert quantization is not None
    stored = planned_bytes(plan, quantization, planned_bits(plan, quantization))
    generator = torch.Generator().manual_seed(0)
    roles = {"channel", "hidden", "head", "width"}
    groups = [group for group in plan.groups if group.role in roles and not group.normalized]
    for share in (1.0, 0.6):
        kept = {group: torch.randperm(group.size, generator=generator)[: -int(-group.size * share)] for group in groups}
        cut = gc.slice_groups(plan, kept).module
        small = gc.compress(cut, inputs, sparsity=0, progress=False, **options)
        counts = {group.factor: len(units) for group, units in kept.items()}
        assert stored(counts) == small.report.bytes.after


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4, "activation_bits": None}])
@pytest.mark.slow
@pytest.mark.ci
def test_the_budget_holds_for_the_report(options: dict[str, int | None]) -> None:
    model, inputs = model_of("residual").eval(), batch("residual")
    report = gc.compress(model, inputs, budget=gc.Budget(bytes=0.15), progress=False, **options).report
    assert 0.12 < report.bytes.ratio <= 0.15 and 0 < report.units_removed < report.units_total


def test_bits_as_they_are_stored() -> None:
    assert [stored_bits(bits) for bits in (2, 3, 4, 5, 8, 9, 16)] == [2, 3, 4, 8, 8, 16, 16]


@pytest.mark.parametrize("tied", [False, True])
def test_tables_count_with_the_bits_they_get(tied: bool) -> None:
    plan_of, ids = Tables(tied).eval(), torch.randint(0, 50, (4, 6))
    report = gc.compress(
        plan_of, ids, bits=(4, 8), budget=gc.Budget(bytes=0.22 if tied else 0.19), progress=False
    ).report
    assert report.bytes.ratio <= 0.22  # with a table of 8 bits there would be more
    assert next(layer.weight_bits for layer in report.layers if layer.name == "table") < 8
    quantization = post_training(8, 8, 0, "nearest", ())
    assert quantization is not None
    plan = gc.analyze(plan_of, ids)
    stored = planned_bytes(plan, quantization, planned_bits(plan, quantization))
    assert stored({}) == gc.compress(plan_of, ids, bits=8, sparsity=0, progress=False).report.bytes.after


class Tables(torch.nn.Module):
    """(n, t) ids -> (n, t, 50): almost all parameters are in the table."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix, self.head = torch.nn.Embedding(50, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 50)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(torch.relu(self.mix(self.table(ids))))
        return found
