"""Preparing: passes that fail are named, and sites hold by name; whole and shrunk tensors are mapped both ways."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

import graphcomp as gc
from graphcomp.errors import PassError
from graphcomp.ir.graph import module_path
from graphcomp.ir.passes import Pass, ValuePass
from graphcomp.ir.program import Program
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.training.preparation import AsTheyAre, prepare_graph, training_config
from graphcomp.training.ranges import ChooseBits, LayerBits

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4)
    ).eval()


@dataclass(frozen=True)
class Divide(ValuePass):
    """Fail as no error of the package is for."""

    name: ClassVar[str] = "divide by zero"

    def fill(self, module: fx.GraphModule, /) -> None:
        raise ZeroDivisionError("of nothing")


class Failing(AsTheyAre):
    def passes(self, program: Program, ignore: Sequence[str], batches: Any) -> tuple[Pass, ...]:
        *first, last = super().passes(program, ignore, batches)
        return (*first, Divide(), last)


def test_a_failure_names_the_pass_and_the_one_before() -> None:
    plan = gc.analyze(network(), X)
    quantizing = Failing(training_config(8, 8, False), (4, 8), (4, 8))
    with pytest.raises(PassError, match="'divide by zero' of 'quantizers to train', after 'check placed quant"):
        prepare_graph(plan, plan.groups, quantizing, ignore=(), batches=[[X]])


def test_a_wish_for_no_layer_is_refused_by_the_pass_that_chooses_bits() -> None:
    plan = gc.analyze(network(), X)
    wish = {"nowhere": LayerBits((4, 4), (8, 8))}
    with pytest.raises(gc.PlanError, match="nowhere") as refused:
        prepare_graph(plan, (), AsTheyAre(training_config(8, 8, False), (4, 8), (4, 8), wish), ignore=(), batches=[[X]])
    assert f"'{ChooseBits.name}'" in refused.value.__notes__[0]


@pytest.mark.parametrize("quantizer", ["geta", "lsq"])
def test_sites_hold_by_name_for_each_copy_of_the_graph(quantizer: str) -> None:
    ready = gc.prepare(network(), X, bits=4 if quantizer == "lsq" else (4, 8), quantizer=quantizer)
    program = ready.session.quantized.captured
    for module in (program.module, copy.deepcopy(program.module)):
        nodes = {node.name: node for node in module.graph.nodes}
        stands = {(str(node.target), node.all_input_nodes[0].name) for node, _ in quantizer_nodes(module)}
        assert stands == {(site.name, value) for site in program.sites for value in site.at}
        for site in program.sites:
            assert isinstance(module.get_submodule(site.name), Quantizer)
            for value, users in site.at.items():
                (wrapped,) = (n for n in nodes[value].users if n.op == "call_module" and n.target == site.name)
                assert {user.name for user in wrapped.users} == set(users)
    weights = {site.parameter: site.layer for site in program.sites if site.is_weight}
    assert weights == {"0.weight": "0", "5.weight": "5"}
    assert {module_path(nodes[u]) for s in program.sites for users in s.at.values() for u in users} >= {"0", "5"}
    assert ready.session.sites is program.sites and not program.stages


def test_kept_indices_map_tensors_both_ways() -> None:
    ready = gc.prepare(network(), X, bits=None)
    (group,) = [g for g in ready.session.groups if g.size == 8]
    ready.keep({group: torch.tensor([1, 4, 6])})
    cut_from = gc.shrink(ready).session.cut_from
    assert cut_from is not None and cut_from.whole is not ready
    whole = torch.randn(8, 3, 3, 3)
    part = cut_from.select("0.weight", whole)
    assert torch.equal(part, whole[[1, 4, 6]])
    back = cut_from.scatter("0.weight", torch.zeros_like(whole), part)
    assert torch.equal(back[[1, 4, 6]], part) and int(back.ne(0).any((1, 2, 3)).sum()) == 3
    rows = torch.randn(8, 1, 1, 1)  # what Adafactor holds of rows
    assert torch.equal(cut_from.select("0.weight", rows), rows[[1, 4, 6]])
    assert cut_from.state("5.bias", {"step": 3}) == {"step": 3}
    with pytest.raises(gc.PlanError, match=r"state 'strange' of 0\.weight"):
        cut_from.state("0.weight", {"strange": torch.randn(5)})
