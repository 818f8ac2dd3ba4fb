"""Every scorer against values worked out by hand, through plain, residual, convolution and attention groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcomp.capture.capture import capture
from graphcomp.coupling.analysis import Analysis, analyze_captured
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.errors import PlanError
from graphcomp.pruning.evidence import arguments_like, arguments_of, gradients
from graphcomp.pruning.saliency import (
    SALIENCIES,
    Activation,
    Cosine,
    GeometricMedian,
    Geta,
    Magnitude,
    NormScale,
    Taylor,
    score,
)

UP = [[1.0, -2.0], [0.0, 3.0], [0.5, 0.5]]
UP_BIAS = [0.5, -1.0, 0.0]
DOWN = [[1.0, 2.0, -1.0], [0.0, -2.0, 1.0]]


class Mlp(nn.Module):
    """2 -> 3 -> 2 with weights that are easy to add up, no nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 3)
        self.down = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(torch.tensor(UP))
            self.up.bias.copy_(torch.tensor(UP_BIAS))
            self.down.weight.copy_(torch.tensor(DOWN))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Residual(nn.Module):
    """Two convolutions that write to one residual stream, batch norms, a buffer that must not count."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.block = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.head((x + self.norm2(self.block(torch.relu(x)))).mean((2, 3)))


class Attention(nn.Module):
    """One attention layer with a fused projection: 3 heads of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 18)
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).view(b, s, 3, 3, 2).unbind(2))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, s, 6))


def analysed(model: nn.Module, *inputs: Tensor) -> Analysis:
    return analyze_captured(capture(model.eval(), inputs))


@pytest.fixture
def mlp() -> Analysis:
    return analysed(Mlp(), torch.randn(2, 2))


def only(analysis: Analysis, saliency: Any, **options: Any) -> Tensor:
    """The scores of the only group."""
    (group,) = analysis.groups
    return score(saliency, analysis, analysis.groups, **options)[group]


def squared(output: Tensor, _batch: Any) -> Tensor:
    return output.square().sum()


def unit_elements(group: ChannelGroup, tensors: dict[str, Tensor], unit: int) -> Tensor:
    """All elements of one unit, gathered member by member the slow way."""
    found = [
        tensors[m.name].index_select(m.dim, m.indices(torch.tensor([unit]))).flatten()
        for m in group.members
        if m.is_parameter
    ]
    return torch.cat(found)


# ------------------------------------------------------------------------------------------------ magnitude
def test_magnitudes_by_hand(mlp: Analysis) -> None:
    torch.testing.assert_close(only(mlp, "l1"), torch.tensor([3.5 + 1, 4.0 + 4, 1.0 + 2]))
    squares = torch.tensor([1 + 4 + 0.25 + 1, 9 + 1 + 4 + 4, 0.25 + 0.25 + 1 + 1])
    torch.testing.assert_close(only(mlp, "l2"), squares.sqrt())


@pytest.mark.parametrize(
    ("build", "inputs"), [(Residual, (2, 3, 4, 4)), (Attention, (2, 3, 5))], ids=["residual", "attention"]
)
def test_a_unit_is_all_its_elements(build: Callable[[], nn.Module], inputs: tuple[int, ...]) -> None:
    analysis = analysed(build(), torch.randn(inputs))
    tensors = {name: p.detach() for name, p in analysis.model.named_parameters()}
    l1, l2 = (score(name, analysis, analysis.groups) for name in ("l1", "l2"))
    assert analysis.groups
    for group in analysis.groups:
        for unit in range(group.size):
            elements = unit_elements(group, tensors, unit)
            torch.testing.assert_close(l1[group][unit], elements.abs().sum())
            torch.testing.assert_close(l2[group][unit], elements.norm())


def test_the_groups_of_the_models_above() -> None:
    residual = analysed(Residual(), torch.randn(2, 3, 4, 4))
    assert [(g.size, g.role) for g in residual.groups] == [(4, "width")]
    attention = analysed(Attention(), torch.randn(2, 3, 5))
    assert sorted((g.size, g.role) for g in attention.groups) == [(2, "head_dim"), (3, "head")]


def test_half_precision_is_scored_in_float32() -> None:
    model = Mlp().half()
    analysis = analysed(model, torch.randn(2, 2).half())
    found = only(analysis, "l1")
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, torch.tensor([4.5, 8.0, 3.0]))


# ------------------------------------------------------------------------------------------------ gradients
X = torch.tensor([[1.0, 1.0], [2.0, 0.0]])


def hand_gradients() -> dict[str, Tensor]:
    """Of |down(up(x))|² for the rows of X, mean over two batches of one row each."""
    up, bias, down = (torch.tensor(v) for v in (UP, UP_BIAS, DOWN))
    found = {"up.weight": torch.zeros(3, 2), "up.bias": torch.zeros(3), "down.weight": torch.zeros(2, 3)}
    for x in X:
        hidden = up @ x + bias
        out = 2 * (down @ hidden)
        back = down.T @ out
        found["up.weight"] += back[:, None] * x / 2
        found["up.bias"] += back / 2
        found["down.weight"] += out[:, None] * hidden / 2
    return found


BATCHES = [X[:1], X[1:]]


def test_gradients_are_the_mean_and_leave_the_model_alone(mlp: Analysis) -> None:
    model = mlp.model
    model.up.weight.grad = torch.full((3, 2), 7.0)
    model.down.weight.requires_grad_(False)
    model.train()
    found = gradients(mlp.captured, squared, BATCHES)
    torch.testing.assert_close(found, hand_gradients())
    assert model.up.weight.grad.eq(7).all()
    assert model.down.weight.grad is None
    assert not model.down.weight.requires_grad
    assert model.training


def test_gradient_scores_by_hand(mlp: Analysis) -> None:
    weights = {name: p.detach() for name, p in mlp.model.named_parameters()}
    (group,) = mlp.groups
    x = [unit_elements(group, weights, u) for u in range(3)]
    v = [unit_elements(group, hand_gradients(), u) for u in range(3)]
    inner = torch.stack([a @ b for a, b in zip(x, v, strict=True)])
    cosines = torch.stack([a @ b / (a.norm() * b.norm()) for a, b in zip(x, v, strict=True)])
    given = {"data": BATCHES, "loss": squared}
    torch.testing.assert_close(only(mlp, "taylor", **given), inner.abs())
    torch.testing.assert_close(only(mlp, "taylor2", **given), 0.5 * inner.square())
    torch.testing.assert_close(only(mlp, "cosine", **given), 1 + cosines)
    torch.testing.assert_close(only(mlp, Cosine(sign=-1), **given), 1 - cosines)


def test_geta_is_the_normalised_mix(mlp: Analysis) -> None:
    given = {"data": BATCHES, "loss": squared}
    magnitude = only(mlp, "l2")
    proxies = [magnitude, magnitude / (2 + 1 + 2), *(only(mlp, n, **given) for n in ("cosine", "taylor", "taylor2"))]
    shares = [p / p.norm() for p in proxies]
    torch.testing.assert_close(only(mlp, "geta", **given), 0.2 * sum(shares))
    torch.testing.assert_close(only(mlp, "geta"), 0.2 * (shares[0] + shares[1]))
    chosen = Geta(magnitude=1, mean_magnitude=0, cosine=0, taylor=2, taylor2=0)
    torch.testing.assert_close(only(mlp, chosen, **given), shares[0] + 2 * shares[3])
    flipped = only(mlp, Geta(0, 0, 1, 0, 0, cosine_sign=-1), **given)
    other = only(mlp, Cosine(-1), **given)
    torch.testing.assert_close(flipped, other / other.norm())


def test_geta_normalises_over_all_groups() -> None:
    analysis = analysed(Attention(), torch.randn(2, 3, 5))
    norms = score("l2", analysis, analysis.groups)
    total = torch.cat(list(norms.values())).norm()
    found = score(Geta(1, 0, 0, 0, 0), analysis, analysis.groups)
    for group in analysis.groups:
        torch.testing.assert_close(found[group], norms[group] / total)


def test_recurrent_layers_have_gradients() -> None:
    class Lstm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    x = torch.randn(2, 5, 3)
    analysis = analysed(Lstm(), x)
    found = gradients(analysis.captured, squared, [x])
    analysis.model(x).square().sum().backward()
    torch.testing.assert_close(found, {name: p.grad for name, p in analysis.model.named_parameters()})


def test_gradients_of_computed_weights_leave_those_of_the_model_alone() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 4)), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 2)
    analysis = analysed(model, x)
    found = score("taylor", analysis, analysis.groups, data=[x, 2 * x], loss=squared)
    assert all(bool(scores.any()) for scores in found.values())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["taylor", "taylor2", "cosine"])
def test_without_data_or_loss_it_says_so(mlp: Analysis, name: str) -> None:
    with pytest.raises(PlanError, match="no data and loss"):
        score(name, mlp, mlp.groups)
    with pytest.raises(PlanError, match="no loss"):
        score(name, mlp, mlp.groups, data=BATCHES)


def test_bad_losses_and_batches(mlp: Analysis) -> None:
    for loss in (lambda o, b: o, lambda o, b: o.sum().detach(), lambda o, b: 0.0):
        with pytest.raises(PlanError, match="scalar"):
            gradients(mlp.captured, loss, BATCHES)
    with pytest.raises(PlanError, match="no batches"):
        gradients(mlp.captured, squared, iter([]))


def test_what_a_batch_gives_the_model() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(2, 3)

        def forward(self, x: Tensor, y: Tensor | None = None, flag: bool = False) -> Tensor:
            return self.up(x) if y is None else self.up(x + y)

    x, label = torch.ones(2, 2), torch.zeros(2)
    positional = capture(Keywords(), x)
    assert arguments_of(positional, x)[0] == (x,)
    assert arguments_of(positional, (x, label))[0] == (x,)
    assert arguments_of(positional, {"x": x, "label": label}) == ((x,), {})
    keywords = capture(Keywords(), {"x": x, "y": x, "flag": False})
    assert arguments_of(keywords, {"y": x, "x": x, "label": label}) == ((), {"x": x, "y": x, "flag": False})
    with pytest.raises(PlanError, match="no 'y'"):
        arguments_of(keywords, {"x": x})
    with pytest.raises(PlanError, match="let a batch be a dict with 'x', 'y'"):
        arguments_of(keywords, (x, x))
    with pytest.raises(PlanError, match="1 items"):
        arguments_of(capture(Keywords(), (x, x)), x)


class OfDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 3)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.up(inputs["x"]) * inputs["y"]


def test_an_input_that_is_a_dict_is_found_in_the_batch() -> None:
    x, y = torch.ones(2, 2), torch.ones(2, 1)
    captured = capture(OfDict(), ({"x": x, "y": y},))
    own = {"x": 2 * x, "y": 3 * y}
    for batch in ({**own, "label": y}, {"inputs": own}, (own, y)):
        ((found,), kwargs) = arguments_of(captured, batch)
        assert list(found) == ["x", "y"] and found["x"] is own["x"] and found["y"] is own["y"] and not kwargs
    with pytest.raises(PlanError, match="no 'y'"):
        arguments_of(captured, {"x": x})


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_names_are_those_of_the_model_inside_a_wrapper(wrap: Any) -> None:
    x = torch.ones(2, 2)
    assert arguments_like(wrap(nn.Linear(2, 3)), (x,), {}, {"input": 2 * x, "label": x})[0][0] is not x


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        (((torch.ones(2, 2),), 1), "1 values where the example inputs hold a tensor"),
        (([1.0, 2.0], 1), "2 values where the example inputs hold a tensor"),
        ((None, 1), "None where the example inputs hold a tensor"),
        (("text", 1), "a str where"),
        ((torch.ones(2, 2).numpy(), 1), "a ndarray where"),
        (({"x": torch.ones(2, 2)}, 1), "1 values where"),
    ],
)
def test_a_batch_of_another_form_is_refused(batch: Any, why: str) -> None:
    with pytest.raises(PlanError, match=why) as caught:
        arguments_of(capture(nn.Linear(2, 3), torch.ones(2, 2)), batch)
    assert caught.value.fix


# ------------------------------------------------------------------------------------------------ norms
def test_norm_scales_by_hand() -> None:
    analysis = analysed(Residual(), torch.randn(2, 3, 4, 4))
    with torch.no_grad():
        analysis.model.norm.weight.copy_(torch.tensor([1.0, -2.0, 3.0, 0.0]))
        analysis.model.norm2.weight.copy_(torch.tensor([1.0, 4.0, 1.0, 1.0]))
    torch.testing.assert_close(only(analysis, "bn_scale"), torch.tensor([1.0, 3.0, 2.0, 0.5]))


def test_groups_without_a_norm_are_an_error_or_fall_back(mlp: Analysis) -> None:
    with pytest.raises(PlanError, match="no normalisation scales up/hidden"):
        score("bn_scale", mlp, mlp.groups)
    torch.testing.assert_close(only(mlp, NormScale(fallback=Magnitude(1))), only(mlp, "l1"))


# ------------------------------------------------------------------------------------------------ geometric median
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_geometric_median_by_hand(mlp: Analysis, chunk: int) -> None:
    points = torch.cat([torch.tensor(UP), torch.tensor(UP_BIAS)[:, None]], 1)  # what makes the units, not what reads
    expected = [sum(float((a - b).norm()) for b in points) for a in points]
    torch.testing.assert_close(only(mlp, GeometricMedian(chunk)), torch.tensor(expected))


def test_geometric_median_of_heads() -> None:
    analysis = analysed(Attention(), torch.randn(2, 3, 5))
    group = next(g for g in analysis.groups if g.role == "head")
    weight, bias = (t.detach().view(3, 3, -1) for t in (analysis.model.qkv.weight, analysis.model.qkv.bias))
    points = torch.cat([weight, bias], 2).transpose(0, 1).reshape(3, -1)
    found = score("geometric_median", analysis, [group])[group]
    torch.testing.assert_close(found, torch.cdist(points, points).sum(1))


def test_duplicates_are_the_first_to_go() -> None:
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 2))
    with torch.no_grad():
        model[0].weight[7], model[0].bias[7] = model[0].weight[:7].mean(0), model[0].bias[:7].mean()
    found = only(analysed(model, torch.randn(2, 6)), "geometric_median")
    assert found[7] < found.median()


# ------------------------------------------------------------------------------------------------ activations
def test_activation_weighted_magnitude_by_hand(mlp: Analysis) -> None:
    hidden = X @ torch.tensor(UP).T + torch.tensor(UP_BIAS)
    expected = torch.tensor(DOWN).abs().sum(0) * hidden.square().mean(0).sqrt()
    torch.testing.assert_close(only(mlp, "activation", data=[X]), expected)
    torch.testing.assert_close(only(mlp, "activation", data=BATCHES), expected)


def test_activation_through_convolutions() -> None:
    analysis = analysed(Residual(), torch.randn(2, 3, 4, 4))
    model, x = analysis.model, torch.randn(6, 3, 4, 4)
    with torch.no_grad():
        stream = model.norm(model.stem(x))
        inside, last = torch.relu(stream), (stream + model.norm2(model.block(torch.relu(stream)))).mean((2, 3))
        expected = model.block.weight.abs().sum((0, 2, 3)) * inside.square().mean((0, 2, 3)).sqrt()
        expected += model.head.weight.abs().sum(0) * last.square().mean(0).sqrt()
    torch.testing.assert_close(only(analysis, "activation", data=[x]), expected)


def test_activation_through_attention() -> None:
    analysis = analysed(Attention(), torch.randn(2, 3, 5))
    model, x = analysis.model, torch.randn(2, 3, 5)
    seen: list[Tensor] = []
    hook = model.out.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    q, k, _ = model.qkv(x).detach().view(2, 3, 3, 3, 2).unbind(2)
    model(x)
    hook.remove()
    rms = seen[0].square().mean((0, 1)).sqrt()
    read = (model.out.weight.detach().abs().sum(0) * rms).view(3, 2)
    met = q.square().mean((0, 1, 2)).sqrt() * k.square().mean((0, 1, 2)).sqrt()
    found = score("activation", analysis, analysis.groups, data=[x])
    for group, scores in found.items():
        expected = read.sum(1) if group.role == "head" else read.sum(0) + met
        torch.testing.assert_close(scores, expected, msg=str(group))


def test_activation_needs_data_that_fits(mlp: Analysis) -> None:
    with pytest.raises(PlanError, match="there is no data"):
        score("activation", mlp, mlp.groups)
    with pytest.raises(PlanError, match=r"does not run on a batch(.|\n)*at: .*return self.down"):
        score("activation", mlp, mlp.groups, data=[torch.randn(2, 5)])
    with pytest.raises(PlanError, match="no batches"):
        score("activation", mlp, mlp.groups, data=[])


def test_units_that_nothing_reads_are_an_error_or_fall_back() -> None:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.up(x)).sum(-1)

    analysis = analysed(Spread(), torch.randn(3, 2))
    with pytest.raises(PlanError, match="no product sums over"):
        score("activation", analysis, analysis.groups, data=[torch.randn(3, 2)])
    found = only(analysis, Activation(fallback=Magnitude()), data=[torch.randn(3, 2)])
    torch.testing.assert_close(found, only(analysis, "l2"))


# ------------------------------------------------------------------------------------------------ the rest
def test_random_is_seeded_and_needs_no_weights() -> None:
    with torch.device("meta"):
        analysis = analysed(Residual(), torch.randn(2, 3, 4, 4))
    first, again, other = (only(analysis, "random", seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(PlanError, match="meta device"):
        score("l2", analysis, analysis.groups)


@pytest.mark.parametrize("name", SALIENCIES)
def test_every_name_scores_every_unit_and_no_more(name: str) -> None:
    x = torch.randn(2, 3, 4, 4)
    analysis = analysed(Residual(), x)
    before = {k: v.clone() for k, v in analysis.model.state_dict().items()}
    found = score(name, analysis, analysis.groups, data=[x], loss=squared)
    assert {g: tuple(s.shape) for g, s in found.items()} == {g: (g.size,) for g in analysis.groups}
    assert all(s.dtype is torch.float32 and bool(s.isfinite().all()) for s in found.values())
    torch.testing.assert_close(dict(analysis.model.state_dict()), before, rtol=0, atol=0)
    assert all(p.grad is None for p in analysis.model.parameters())


def test_names_and_options_that_do_not_exist(mlp: Analysis) -> None:
    with pytest.raises(PlanError, match="saliency='taylor'"):
        score("tailor", mlp, mlp.groups)
    for wrong in (lambda: Magnitude(3), lambda: Taylor(0), lambda: Cosine(2)):
        with pytest.raises(PlanError):
            wrong()


def test_a_saliency_of_your_own(mlp: Analysis) -> None:
    found = only(mlp, lambda evidence: {g: torch.arange(g.size).flip(0) for g in evidence.groups})
    assert found.tolist() == [2.0, 1.0, 0.0]
    with pytest.raises(PlanError, match="it has 3 units"):
        score(lambda evidence: {g: torch.ones(2) for g in evidence.groups}, mlp, mlp.groups)
