"""Pieces hold each node once, read nothing of later pieces, and compute what the graph computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.api import analyze
from graphcomp.cost import CostModel
from graphcomp.cost.model import Lengths
from graphcomp.cost.pieces import HEAD, Piece, computed_values, pieces_of, side_by_side, text_of, touched
from graphcomp.cost.work import work_of
from graphcomp.coupling.analysis import Analysis
from graphcomp.flows.one_shot import cut_to_integers
from graphcomp.flows.results import post_training
from graphcomp.quantization.ops import DEQUANTIZE
from graphcomp.testing import tiny_models
from tests.marks import in_ci


class Net(nn.Module):
    """A head without products, two equal residual blocks, a concatenation, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.ups = nn.ModuleList(nn.Conv2d(8, 16, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
        self.downs = nn.ModuleList(nn.Conv2d(16, 8, 1) for _ in range(2))
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, 5)."""
        x = x * 2 - 1
        first = x = torch.relu(self.stem(x))
        for up, norm, down in zip(self.ups, self.norms, self.downs, strict=True):
            x = torch.relu(x + down(torch.relu(norm(up(x)))))
        x = torch.cat([x, first], 1)
        b, c, h, w = x.shape
        result: Tensor = self.last(F.adaptive_avg_pool2d(x.view(b, c, h * w, 1), 1).flatten(1))
        return result


X = torch.linspace(-1, 1, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)


@pytest.fixture(scope="module")
def plan() -> Analysis:
    return analyze(Net().eval(), X)


def pieces(plan: Analysis) -> tuple[dict[str, Piece], dict[torch.fx.Node, object]]:
    anchors = [op.node.name for op in CostModel(plan).operations]
    values = computed_values(plan.captured.module, [X])
    return {piece.name: piece for piece in pieces_of(plan.captured.module, values, anchors)}, values


def test_pieces_partition_the_graph(plan: Analysis) -> None:
    found, values = pieces(plan)
    assert list(found) == [HEAD, "conv2d", "conv2d_1", "conv2d_2", "conv2d_3", "conv2d_4", "linear"]
    nodes = [node for piece in found.values() for node in piece.nodes]
    tensors = {n for n, v in values.items() if isinstance(v, Tensor) and n.op == "call_function"}
    assert len(nodes) == len(set(nodes)) and set(nodes) == tensors
    of = {node: k for k, piece in enumerate(found.values()) for node in piece.nodes}
    for k, piece in enumerate(found.values()):
        assert all(of.get(node, -1) < k for node in piece.inputs)
    # what a runtime fuses stands together; the concatenation waits for the last block
    assert [n.name for n in found["conv2d_2"].nodes] == ["conv2d_2", "add", "relu_2"]
    assert "cat" in [n.name for n in found["conv2d_4"].nodes]


def test_pieces_side_by_side_compute_what_the_graph_does(plan: Analysis) -> None:
    found, values = pieces(plan)
    both = side_by_side(plan.captured.module, values, list(found.values()))
    results = both.module(*both.inputs)
    for piece, reads, returns in zip(found.values(), both.reads, both.returns, strict=True):
        assert all(both.inputs[k] is not None for k in reads) and len(reads) == len(piece.inputs)
        for node, k in zip(piece.outputs, returns, strict=True):
            expected = values[node]
            assert isinstance(expected, Tensor) and torch.equal(results[k], expected)


def test_equal_pieces_have_equal_texts(plan: Analysis) -> None:
    found, values = pieces(plan)
    lengths = Lengths(plan.captured, {group.factor: group.factor for group in plan.groups})
    works = {name: work_of(piece, plan.coupling, lengths) for name, piece in found.items()}
    texts = {name: text_of(piece, values) + works[name].text for name, piece in found.items()}
    assert texts["conv2d_1"] == texts["conv2d_3"]
    assert len(set(texts.values())) == len(texts) - 1


def test_what_is_touched_is_read_and_written(plan: Analysis) -> None:
    found, values = pieces(plan)
    piece = found["conv2d_1"]
    weights = 8 * 16 * 9 + 16 + 4 * 16
    assert touched([piece], values) == 4 * (weights + 2 * 16 * 6 * 6)
    assert touched(list(found.values()), values) > touched([piece], values)


def test_work_is_counted_by_the_units_that_stay(plan: Analysis) -> None:
    found, _ = pieces(plan)
    lengths = Lengths(plan.captured, {group.factor: group.factor for group in plan.groups})
    work = work_of(found["conv2d_1"], plan.coupling, lengths)
    sizes = [factor.size for factor in work.factors]
    assert sizes == [8, 16] or sizes == [16, 8]

    def features(stem: int, up: int) -> dict[str, float]:
        local = [stem if factor.size == 8 else up for factor in work.factors]
        names = ("one", "exact", "blocks", "partial", "read", "read partial", "written", "computed")
        return dict(zip(names, work.features(local), strict=True))

    here = features(6, 16)
    macs = 2 * 36 * 9
    assert (here["exact"], here["blocks"], here["partial"]) == (macs * 6 * 16, macs * 16 * 16, macs * 6 * 16)
    assert here["read"] == here["read partial"] == 2 * 36 * 6 + 9 * 6 * 16 + 16 + 4 * 16
    assert here["written"] == 2 * 36 * 16 and here["computed"] == 3 * 2 * 36 * 16
    assert all(a <= b for a, b in zip(features(6, 12).values(), here.values(), strict=True))


@pytest.mark.parametrize("name", tiny_models())
@pytest.mark.parametrize("lower", [False, *in_ci(True)])
def test_pieces_of_all_kinds_of_models(name: str, lower: bool) -> None:
    model, inputs = tiny_models()[name]
    plan = analyze(model, inputs)
    flat, module = plan.captured.inputs.flat(), plan.captured.module
    if lower:
        options = post_training(8, "same", 0, "nearest", ())
        assert options is not None
        module = cut_to_integers(plan, {}, plan.groups, options, [flat], verify=False)[1].module
    anchors = [op.node.name for op in CostModel(plan).operations]
    values = computed_values(module, flat)
    found = pieces_of(module, values, anchors, DEQUANTIZE)
    both = side_by_side(module, values, found)
    results = both.module(*both.inputs)
    assert {piece.name for piece in found} >= set(anchors)
    for piece, returns in zip(found, both.returns, strict=True):
        for node, k in zip(piece.outputs, returns, strict=True):
            assert torch.equal(results[k], values[node])
        if lower:  # codes go from piece to piece, as they go from kernel to kernel
            assert not any(node.target in DEQUANTIZE for node in piece.outputs)


def test_a_recurrent_model_and_lists_of_tensors() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.lstm, self.down = nn.Linear(4, 12), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.up(x).chunk(2, -1)
            result: Tensor = self.down(self.lstm(torch.relu(a) * b)[0])
            return result

    torch.manual_seed(0)
    x = torch.randn(2, 7, 4)
    plan = analyze(Mixed().eval(), x)
    module = plan.captured.module
    values = computed_values(module, [x])
    found = pieces_of(module, values, [op.node.name for op in CostModel(plan).operations])
    both = side_by_side(module, values, found)
    results = both.module(*both.inputs)
    pairs = [
        (n, k) for p, returns in zip(found, both.returns, strict=True) for n, k in zip(p.outputs, returns, strict=True)
    ]
    assert len(found) == 3 and all(torch.equal(results[k], values[node]) for node, k in pairs)
