"""A cut that other units can stand in for is repaired to the last digit, whatever kind of layer reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.coupling.analysis import Analysis
from graphcomp.errors import CalibrationError, PlanError
from graphcomp.flows.one_shot import cut_groups
from graphcomp.flows.repaired import Judged
from graphcomp.pruning.repair import Repaired, repair_cut, within_memory

WIDTH = 8


def doubled(layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> None:
    """Make the second half of the outputs equal to the first."""
    with torch.no_grad():
        half = len(layer.weight) // 2
        layer.weight[half:] = layer.weight[:half]
        if layer.bias is not None:
            layer.bias[half:] = layer.bias[:half]


class Chain(nn.Module):
    """A first layer, whose units are there twice, and what reads them."""

    def __init__(self, first: nn.Module, *rest: nn.Module) -> None:
        super().__init__()
        self.first, self.rest = first, nn.Sequential(*rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(torch.tanh(self.first(x)))


class Weight(nn.Module):
    """A product with a parameter, written as a function."""

    def __init__(self, shape: Sequence[int], product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


class Twice(nn.Module):
    """One weight behind two layers, whose units are there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.shared = nn.Linear(6, WIDTH), nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.a(x))) + torch.tanh(self.shared(torch.sin(self.b(x))))


class Turns(nn.Module):
    """Two layers with hidden units of their own that run in turns, as in ALBERT: each weight is shared by its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.ModuleList([nn.Linear(6, WIDTH), nn.Linear(WIDTH, 6)]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in (self.first, self.second) * 3:
            x = x + down(torch.tanh(up(x)))
        return x


def images(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, *shape, generator=generator) for _ in range(3)]


def twin_filters() -> nn.Module:
    layer = nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH)
    doubled(layer)
    return layer


def conv(**options: Any) -> list[nn.Module]:
    return [nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 8, 3, **options)]


KINDS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "linear": (lambda: [nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5)], (6,)),
    "linear of tokens": (lambda: [nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5, bias=False)], (7, 6)),
    "conv1d": (lambda: [nn.Conv1d(3, WIDTH, 3), nn.Conv1d(WIDTH, 5, 3, dilation=2)], (3, 16)),
    "conv2d": (lambda: conv(padding=1, stride=2), (3, 9, 9)),
    "padding same": (lambda: conv(padding="same", dilation=2), (3, 9, 9)),
    "batch norm": (lambda: [*conv(bias=False), nn.BatchNorm2d(8)], (3, 9, 9)),
    "depthwise": (lambda: [*conv()[:1], twin_filters(), nn.Conv2d(WIDTH, 4, 1)], (3, 9, 9)),
    "transposed": (
        lambda: [nn.Conv2d(3, WIDTH, 3), nn.ConvTranspose2d(WIDTH, 4, 3, stride=2, padding=1, output_padding=1)],
        (3, 7, 7),
    ),
    "transposed, dilated": (lambda: [nn.Conv1d(3, WIDTH, 3), nn.ConvTranspose1d(WIDTH, 4, 3, dilation=2)], (3, 9)),
    "matmul": (lambda: [nn.Linear(6, WIDTH), Weight((WIDTH, 5), lambda x, w: x @ w)], (7, 6)),
    "weight first": (lambda: [nn.Linear(6, WIDTH), Weight((5, WIDTH), lambda x, w: w @ x.mT)], (7, 6)),
    "transposed weight": (lambda: [nn.Linear(6, WIDTH), Weight((5, WIDTH), lambda x, w: x @ w.t())], (7, 6)),
    "addmm": (lambda: [nn.Linear(6, WIDTH), Weight((WIDTH, 5), lambda x, w: torch.addmm(torch.ones(5), x, w))], (6,)),
    "einsum": (
        lambda: [nn.Linear(6, WIDTH), Weight((WIDTH, 2, 5), lambda x, w: torch.einsum("bti,iho->btho", x, w))], (7, 6)
    ),
    "experts": (
        lambda: [nn.Linear(6, WIDTH), Weight((3, WIDTH, 5), lambda x, w: torch.bmm(x[:3], w))], (40, 6)
    ),
    "one matrix for all batches": (
        lambda: [nn.Linear(6, WIDTH), Weight((1, WIDTH, 5), lambda x, w: torch.matmul(x, w))], (7, 6)
    ),
    "experts over batches": (
        lambda: [nn.Linear(6, WIDTH), Weight((3, WIDTH, 5), lambda x, w: x.unsqueeze(1) @ w)], (7, 6)
    ),
}  # fmt: skip


def cut(model: nn.Module, batches: Sequence[Tensor], name: str = "first") -> tuple[Analysis, Any, Any]:
    """Analyse a model, and cut the second half of the units that a layer makes."""
    plan = gc.analyze(model, batches[0][:8])
    groups = [group for group in plan.groups if any(m.name.startswith(f"{name}.") for m in group.members)]
    kept = {group: torch.arange(group.size // 2) for group in groups}
    assert kept, [group.name for group in plan.groups]
    return plan, kept, cut_groups(plan, kept, groups, verify=True).graph


def repaired(model: nn.Module, batches: Sequence[Tensor], name: str = "first") -> tuple[Repaired, nn.Module, nn.Module]:
    plan, kept, small = cut(model, batches, name)
    found = repair_cut(plan, kept, small, [[batch] for batch in batches])
    return found, small, cut_groups(found.plan, kept, list(kept), verify=True).graph


def error(model: nn.Module, small: nn.Module, batches: Sequence[Tensor]) -> float:
    with torch.no_grad():
        wanted, found = (torch.cat([m(b).flatten() for b in batches]) for m in (model, small))
    return float((wanted - found).norm() / wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_are_there_twice_are_made_up_for(kind: str) -> None:
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    model = Chain(*make()).eval()
    doubled(model.first)
    batches = images(*shape)
    found, sliced, small = repaired(model, batches)
    assert not found.left
    assert error(model, sliced, batches) > 0.1
    assert error(model, small, batches) < 1e-3
    assert error(model, small, images(*shape)[:1]) < 1e-3


def routed(x: Tensor, w: Tensor) -> Tensor:
    """The first half of the rows goes to the first matrix, none to the second."""
    ends = (torch.tensor([1, 1, 2]) * x.shape[0] // 2).to(torch.int32)
    return F.grouped_mm(x, w.mT, offs=ends)


def test_matrices_that_rows_are_sent_to_are_solved_each_on_its_rows() -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(8, 16), Weight((3, 8, 16), routed)).eval().bfloat16()  # which the kernel takes
    doubled(model.first)
    batches = [batch.bfloat16().repeat(3, 1) + torch.randn(48, 8).bfloat16() for batch in images(8)]
    found, sliced, small = repaired(model, batches)
    assert not found.left
    assert found.layers["rest.0"].after < 0.02 < 0.3 < found.layers["rest.0"].before
    assert error(model, small, batches) < 0.05 < error(model, sliced, batches)
    weights = [module.get_parameter("rest.0.weight")[1] for module in (small, sliced)]
    assert torch.equal(*weights)  # no row was sent there


class Chosen(nn.Module):
    """Tokens sorted by a score that a layer behind the cut gives, and a layer for each place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.score, self.last = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 3)
        self.place = nn.Parameter(torch.randn(3, WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        _, index = self.score(y).topk(3, 1)
        picked = y.gather(1, index.expand(-1, -1, y.shape[2]))
        return torch.bmm(picked.transpose(0, 1), self.place)


def test_choices_are_those_of_the_model_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small error of a score turns the order of two tokens; the rows of both models stay side by side."""
    torch.manual_seed(0)
    model, batches = Chosen().eval(), images(7, 6)
    found, _, _ = repaired(model, batches)
    monkeypatch.setattr("graphcomp.pruning.repair.CHOICES", frozenset())
    other, _, _ = repaired(model, batches)
    assert found.layers["place"].after < 0.9 * other.layers["place"].after


def test_each_use_of_a_shared_weight_needs_rows() -> None:
    """The rows of two uses are of the same samples: twenty of these are too few for either."""
    torch.manual_seed(0)
    few, enough = [torch.randn(20, 6)], [torch.randn(40, 6)]
    repairs = [
        gc.compress(Twice().eval(), b[0][:2], calibration=b, progress=False).report.repairs for b in (few, enough)
    ]
    assert repairs[0]["shared"].after == repairs[0]["shared"].before
    assert repairs[1]["shared"].after < repairs[1]["shared"].before


def test_weights_that_are_shared_in_turns_are_solved_once_each() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(64, 6) for _ in range(3)]
    small = gc.compress(
        Turns().eval(), batches[0][:2], prune=("hidden", "channel"), calibration=batches, progress=False
    )
    assert {"first.1", "second.1"} <= small.report.repairs.keys()


def test_a_weight_of_two_layers_is_solved_over_both() -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    doubled(model.a)
    doubled(model.b)
    batches = images(6)
    plan = gc.analyze(model, batches[0])
    (group,) = plan.groups
    kept = {group: torch.arange(WIDTH // 2)}
    small = cut_groups(plan, kept, [group], verify=True).graph
    found = repair_cut(plan, kept, small, [[batch] for batch in batches])
    assert list(found.layers) == ["shared"]
    assert error(model, cut_groups(found.plan, kept, [group], verify=True).graph, batches) < 1e-3


class Packed(nn.Module):
    """Two layers whose weights are parts of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(6, WIDTH), nn.Parameter(torch.randn(9, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return torch.cat([F.linear(x, self.weight[:4]), F.linear(x, self.weight[4:])], -1)


def test_parts_of_a_parameter_are_layers_of_their_own() -> None:
    torch.manual_seed(0)
    model, batches = Packed().eval(), images(6)
    doubled(model.first)
    found, _, small = repaired(model, batches)
    assert found.layers.keys() == {"weight (linear_1)", "weight (linear_2)"}
    assert error(model, small, batches) < 1e-3


# ------------------------------------------------------------------------------------------------ laws
def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)).eval()


def test_the_error_of_no_layer_grows() -> None:
    model, batches = net(), images(3, 9, 9)
    small = gc.compress(model, batches[0][:2], sparsity=0.5, calibration=batches, progress=False)
    plain = gc.compress(model, batches[0][:2], sparsity=0.5, progress=False)
    assert small.report.repairs.keys() == {"3", "7"}
    assert all(change.after <= change.before for change in small.report.repairs.values())
    assert error(model, small, batches) < 0.8 * error(model, plain, batches)
    assert not plain.report.repairs
    assert small.form == plain.form == "native"


def test_an_infinite_ridge_gives_the_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphcomp.pruning.repair.choose_ridge", lambda *_, **__: math.inf)
    model, batches = net(), images(3, 9, 9)
    found, sliced, small = repaired(model, batches, "0")
    assert found.layers
    assert all(layer.before == layer.after for layer in found.layers.values())
    for name, tensor in sliced.state_dict().items():
        assert torch.equal(tensor, small.state_dict()[name])


def test_nothing_moves_where_nothing_is_cut() -> None:
    model, batches = net(), images(3, 9, 9)
    small = gc.compress(model, batches[0][:2], sparsity=0.0, calibration=batches, progress=False)
    assert not small.report.repairs
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, small.module.state_dict()[name])


def test_one_batch_and_several_give_the_same() -> None:
    model, batches = net(), images(3, 9, 9)
    several, _, small = repaired(model, batches, "0")
    one, _, other = repaired(model, [torch.cat(batches)], "0")
    assert several.layers.keys() == one.layers.keys()
    for name, tensor in small.state_dict().items():
        assert torch.allclose(tensor, other.state_dict()[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_model_is_left_alone(dtype: torch.dtype) -> None:
    model, batches = net().to(dtype), [batch.to(dtype) for batch in images(3, 9, 9)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = [batch.clone() for batch in batches]
    gc.compress(model, batches[0][:2], calibration=batches, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(given, batches, strict=True))


def test_a_model_in_training_mode_is_repaired_as_it_will_be_run() -> None:
    batches = images(3, 9, 9)
    small = [
        gc.compress(net().train(mode), batches[0][:2], calibration=batches, progress=False) for mode in (False, True)
    ]
    assert small[1].training
    for a, b in zip(small[0].state_dict().values(), small[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_repaired(dtype: torch.dtype) -> None:
    model, batches = net().to(dtype), [batch.to(dtype) for batch in images(3, 9, 9)]
    found, small, mended = repaired(model, batches, "0")
    assert found.layers
    assert all(layer.after <= layer.before for layer in found.layers.values())
    assert all(tensor.dtype == dtype for tensor in mended.parameters())
    assert error(model, mended, batches) < error(model, small, batches)


def test_batches_of_one_sample_do() -> None:
    """No row of a batch may be held out, or all rows."""
    model, batches = net(), images(3, 9, 9)
    alone = [sample for batch in batches for sample in batch.split(1)]
    found, small, mended = repaired(model, alone, "0")
    assert all(layer.rows for layer in found.layers.values())
    assert error(model, mended, batches) < error(model, small, batches)


def test_what_a_stream_has_lost_is_made_up_for() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.up, self.down = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
            self.head = nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(1):
                x = x + self.down(torch.relu(self.up(x)))
            return self.head(x)

    torch.manual_seed(0)
    model, batches = Residual().eval(), images(6)
    small = gc.compress(model, batches[0], sparsity=0.3, calibration=batches, progress=False)
    assert "down" in small.report.repairs
    plain = gc.compress(model, batches[0], sparsity=0.3, repair=None, progress=False)
    assert error(model, small, batches) < error(model, plain, batches)


# ------------------------------------------------------------------------------------------------ what is not repaired
class Gated(nn.Module):
    """A recurrent layer behind what is cut, and a batch norm behind a layer whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gru, self.last = nn.Linear(6, WIDTH), nn.GRU(WIDTH, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gru(torch.tanh(self.first(x)))[0])


@pytest.mark.slow
@pytest.mark.ci
def test_layers_without_a_closed_form_are_named() -> None:
    torch.manual_seed(0)
    model, batches = Gated().eval(), images(7, 6)
    found, _, _ = repaired(model, batches)
    (why,) = found.left.values()
    assert "no closed form" in why
    small = gc.compress(model, batches[0][:2], sparsity=0.3, calibration=batches, progress=False)
    assert any(note.startswith("not repaired") and "gru" in note for note in small.report.notes)


def test_a_mask_is_no_weight() -> None:
    """Attention multiplies values; what is added to the scores is a constant."""

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
            self.register_buffer("mask", torch.ones(7, 7, dtype=torch.bool).tril())
            self.positions = nn.Parameter(torch.randn(7, 7))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y = F.scaled_dot_product_attention(y, y, y, attn_mask=self.mask)
            return self.last(F.scaled_dot_product_attention(y, y, y, attn_mask=self.positions))

    found, _, _ = repaired(Causal().eval(), images(7, 6))
    assert not found.left
    assert found.layers.keys() == {"last"}


def test_a_batch_norm_behind_a_layer_that_is_left_gets_new_statistics() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(6, WIDTH), nn.BatchNorm1d(5)
            self.weight = nn.Parameter(torch.randn(5, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(F.linear(torch.tanh(self.first(x)), torch.tanh(self.weight)))

    torch.manual_seed(0)
    model, batches = Computed().eval(), images(6)
    found, _, small = repaired(model, batches)
    assert found.left == {"weight": "its weight is computed of a parameter"}
    assert found.reestimated == ("norm",)
    with torch.no_grad():
        output = small(torch.cat(batches))
    assert torch.allclose(output.mean(0), torch.zeros(5), atol=1e-4)


def test_a_weight_that_an_embedding_reads_is_left() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 16), nn.Linear(16, 6)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(self.down(torch.relu(self.up(self.table(tokens)))), self.table.weight)

    torch.manual_seed(0)
    model = Tied().eval()
    tokens = [torch.randint(11, (16, 5), generator=torch.Generator().manual_seed(k)) for k in range(3)]
    small = gc.compress(model, tokens[0], sparsity=0.3, calibration=tokens, progress=False)
    assert "down" in small.report.repairs
    assert any("read by embedding, too: 'table'" in note for note in small.report.notes)


def test_channels_are_mapped_where_there_are_too_many_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphcomp.pruning.repair.MOST_TAPS", 8)
    torch.manual_seed(0)
    for make in (conv(padding=1), [nn.Conv2d(3, WIDTH, 3), nn.ConvTranspose2d(WIDTH, 4, 3, stride=2)]):
        model = Chain(*make).eval()
        doubled(model.first)
        batches = images(3, 9, 9)
        _, sliced, small = repaired(model, batches)
        assert error(model, small, batches) < 0.05 < error(model, sliced, batches)


def test_data_that_are_not_finite_are_refused_where_channels_are_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphcomp.pruning.repair.MOST_TAPS", 8)
    batches = [torch.full((16, 3, 9, 9), 3e38)]  # finite, and what the model computes of them is not
    with pytest.raises(CalibrationError, match="not finite"):
        repaired(Chain(*conv(padding=1)).eval().requires_grad_(False), [b * 10 - b * 10 for b in batches])


def test_wide_layers_are_solved_on_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments of many features take too much memory; as many rows as memory is for do."""
    torch.manual_seed(0)
    model, batches = Chain(nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5)).eval(), images(6)
    doubled(model.first)
    by_moments, _, small = repaired(model, batches)
    monkeypatch.setattr("graphcomp.pruning.least_squares.MOST_FEATURES", 4)
    monkeypatch.setattr("graphcomp.pruning.least_squares.FEWEST_ROWS", 40)
    by_rows, _, other = repaired(model, batches)
    assert by_rows.layers["rest.0"].rows == 42  # 40 in all, and of each batch a whole number
    assert by_moments.layers["rest.0"].rows == 48
    assert error(model, other, batches) < 1e-3
    assert error(small, other, batches) < 1e-3


# ------------------------------------------------------------------------------------------------ bad input
def test_few_rows_change_nothing() -> None:
    found, _, _ = repaired(Chain(nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5)).eval(), [images(6)[0][:8]])
    assert math.isinf(found.layers["rest.0"].ridge)


def test_constant_activations_do_no_harm() -> None:
    batches = [torch.ones(16, 6) for _ in range(4)]
    found, _, small = repaired(Chain(nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5)).eval(), batches)
    assert all(layer.after <= layer.before for layer in found.layers.values())
    assert all(bool(tensor.isfinite().all()) for tensor in small.state_dict().values())


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "no batch"),
        ([torch.full((16, 3, 9, 9), torch.nan)], "not finite"),
        ([torch.randn(16, 4, 9, 9)], "does not run on batch 0"),
        ([torch.randn(8, 3, 9, 9), torch.zeros(0, 3, 9, 9)], "batch 1 of the calibration data holds no sample"),
    ],
)
@pytest.mark.parametrize("ranking", ["global", "sensitivity"])
def test_bad_calibration_is_refused(calibration: list[Tensor], message: str, ranking: Any) -> None:
    with pytest.raises(CalibrationError, match=message):
        gc.compress(net(), torch.randn(2, 3, 9, 9), calibration=calibration, ranking=ranking, progress=False)


def test_a_cut_of_nothing_says_that_nothing_was_repaired() -> None:
    small = gc.compress(net(), images(3, 9, 9)[0], sparsity=0, calibration=images(3, 9, 9), progress=False)
    assert "not repaired: nothing was cut" in small.report.notes
    without = gc.compress(net(), images(3, 9, 9)[0], sparsity=0.3, progress=False)
    assert "not repaired: no calibration= was given" in without.report.notes
    asked = gc.compress(net(), images(3, 9, 9)[0], sparsity=0.3, repair=None, progress=False)
    assert not any("repaired" in note for note in asked.report.notes)


@pytest.mark.parametrize("saliency", ["activation", "repairable"])
@pytest.mark.parametrize("ranking", ["global", "sensitivity"])
@pytest.mark.slow
@pytest.mark.ci
def test_a_saliency_reads_the_calibration_data(saliency: str, ranking: Any) -> None:
    options: dict[str, Any] = {"saliency": saliency, "ranking": ranking, "calibration": images(3, 9, 9)}
    options["progress"] = False
    small = gc.compress(net(), images(3, 9, 9)[0], **options)
    given = gc.compress(net(), images(3, 9, 9)[0], data=[(batch,) for batch in images(3, 9, 9)], **options)
    assert all(torch.equal(a, b) for a, b in zip(small.module.parameters(), given.module.parameters(), strict=True))
    alone = gc.compress(net(), images(3, 9, 9)[0], **{**options, "repair": None})
    assert alone.report.units_removed


def test_calibration_that_nothing_reads_is_refused() -> None:
    """Units that are zero are cut exactly: there is nothing to repair."""
    with pytest.raises(PlanError, match="nothing reads"):
        gc.compress(net(), images(3, 9, 9)[0], saliency="zeros", calibration=images(3, 9, 9), progress=False)


def test_batches_beyond_memory_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = net(), images(3, 9, 9)
    module = gc.analyze(model, batches[0]).captured.module
    assert len(within_memory(module, batches)) == 3
    assert len(within_memory(module, batches, most=1)) == 1
    monkeypatch.setattr("graphcomp.pruning.repair.LIVE", 1)
    monkeypatch.setattr("graphcomp.pruning.repair.within_memory", lambda module, batches: batches[:1])
    small = gc.compress(model, batches[0][:2], calibration=batches, progress=False)
    assert any("first 1 of 3 batches" in note for note in small.report.notes)


# ------------------------------------------------------------------------------------------------ through compress
def test_bits_are_of_the_repaired_weights() -> None:
    model, batches = net(), images(3, 9, 9)
    small = gc.compress(model, batches[0][:2], sparsity=0.5, bits=8, calibration=batches, progress=False)
    plain = gc.compress(model, batches[0][:2], sparsity=0.5, bits=8, calibration=batches, repair=None, progress=False)
    assert small.report.repairs
    assert error(model, small, batches) < 0.8 * error(model, plain, batches)


def test_a_submodule_is_repaired_on_what_it_gets() -> None:
    model, batches = nn.Sequential(nn.Conv2d(3, 3, 1), net()).eval(), images(3, 9, 9)
    small = gc.compress(model, batches[0][:2], scope="1", calibration=batches, progress=False)
    plain = gc.compress(model, batches[0][:2], scope="1", repair=None, progress=False)
    assert small.report.repairs.keys() == {"3", "7"}
    assert error(model, small, batches) < error(model, plain, batches)


def test_a_cut_is_repaired_afterwards() -> None:
    model, batches = net(), images(3, 9, 9)
    plan = gc.analyze(model, batches[0][:2])
    kept = {group: torch.arange(group.size // 2) for group in plan.groups}
    plain = gc.slice_groups(plan, kept)
    later, at_once = gc.repair(plain, plan, batches), gc.slice_groups(plan, kept, calibration=batches)
    assert later.report.repairs == at_once.report.repairs
    for name, tensor in later.module.state_dict().items():
        assert torch.equal(tensor, at_once.module.state_dict()[name])
    assert error(model, later, batches) < 0.8 * error(model, plain, batches)


def test_the_outputs_are_judged() -> None:
    model, batches = net(), images(3, 9, 9)
    small = gc.compress(model, batches[0][:2], calibration=batches, progress=False)
    plain = gc.compress(model, batches[0][:2], repair=None, progress=False)
    (note,) = (note for note in small.report.notes if note.startswith("by the repair"))
    assert note == (
        f"by the repair the error of the outputs goes from {error(model, plain, batches):.3g} to "
        f"{error(model, small, batches):.3g} (relative, 48 calibration samples)"
    )


def test_a_repair_that_does_not_help_the_outputs_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphcomp.flows.repaired.judge", lambda *_: Judged((0.1, 0.2), 48))
    model, batches = net(), images(3, 9, 9)
    small = gc.compress(model, batches[0][:2], calibration=batches, progress=False)
    plain = gc.compress(model, batches[0][:2], repair=None, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), plain.parameters(), strict=True))
    assert not small.report.repairs
    assert any(note.startswith("not repaired, as it would not help") for note in small.report.notes)


def test_a_model_that_is_no_cut_of_the_plan_is_refused() -> None:
    model, batches = net(), images(3, 9, 9)
    plan = gc.analyze(model, batches[0][:2])
    small = gc.compress(model, batches[0][:2], progress=False)
    with torch.no_grad():
        small.module[7].weight.mul_(2)
    with pytest.raises(gc.PlanError, match=r"'7\.weight' is another tensor"):
        gc.repair(small, plan, batches)
    with pytest.raises(gc.PlanError, match="not cut by this plan"):
        gc.repair(gc.compress(Chain(*conv()).eval(), batches[0][:2], progress=False), plan, batches)
    with pytest.raises(gc.PlanError, match="small"):
        gc.repair(model, plan, batches)  # type: ignore[arg-type]
    integers = gc.compress(model, batches[0][:2], bits=8, progress=False)
    with pytest.raises(gc.PlanError, match="before it is trained or quantized"):
        gc.repair(integers, plan, batches)


def test_a_report_keeps_repairs_on_disk(tmp_path: Path) -> None:
    model, batches = net(), images(3, 9, 9)
    small = gc.compress(model, batches[0][:2], calibration=batches, progress=False)
    small.save(tmp_path / "small")
    loaded = gc.load(tmp_path / "small")
    assert loaded.report.repairs == small.report.repairs
    assert "median relative error of 2 layers" in str(loaded.report)
