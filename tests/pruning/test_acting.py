"""Scores are of the weight that acts: masks, weight norm, spectral norm, parametrizations of a user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import graphcomp as gc
from graphcomp.pruning.acting import acting_weights
from graphcomp.pruning.saliency import SALIENCIES, score

X = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
DATA = [X, X.flip(0) * 2]
READ = sorted(set(SALIENCIES) - {"random", "bn_scale"})
"""Saliencies that read weights."""


def loss(output: Tensor, _: Any) -> Tensor:
    return output.square().mean()


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 4, 3, bias=False)).eval()


def weight_norm(model: nn.Sequential) -> None:
    """The same weight, as a length and a direction of arbitrary length."""
    parametrizations.weight_norm(model[0])
    with torch.no_grad():
        model[0].parametrizations.weight.original1.mul_(torch.linspace(5, 0.2, 16).view(-1, 1, 1, 1))


def old_weight_norm(model: nn.Sequential) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model[0])
    with torch.no_grad():
        model[0].weight_v.mul_(torch.linspace(5, 0.2, 16).view(-1, 1, 1, 1))


class Scale(nn.Module):
    """w -> a w, a per row."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.linspace(0.1, 4, 16).view(-1, 1, 1, 1))

    def forward(self, w: Tensor) -> Tensor:
        """(o, i, h, w) -> itself, scaled."""
        return w * self.a


def scaled(model: nn.Sequential) -> None:
    """A factor per row that the stored weight is divided by beforehand."""
    scale = Scale()
    with torch.no_grad():
        model[0].weight.div_(scale.a)
    parametrize.register_parametrization(model[0], "weight", scale, unsafe=True)


def masked(model: nn.Sequential) -> None:
    """Rows that a mask holds at zero, with large values behind."""
    mask = torch.ones_like(model[0].weight)
    mask[::2] = 0
    prune.custom_from_mask(model[0], "weight", mask)
    with torch.no_grad():
        model[0].weight_orig[::2] *= 9


@pytest.mark.parametrize(
    "saliency", ["l1", "l2", "taylor", "taylor2", "cosine", "geta", "geometric_median", "activation"]
)
@pytest.mark.parametrize("rewrite", [weight_norm, scaled])
def test_scores_are_those_of_the_same_weight_stored_plainly(
    rewrite: Callable[[nn.Sequential], None], saliency: str
) -> None:
    scores = []
    for change in (None, rewrite):
        model = net()
        if change is not None:
            change(model)
        plan = gc.analyze(model, X)
        scores.append(score(saliency, plan, plan.groups, data=DATA, loss=loss)[plan.groups[0]])
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)


def test_a_plain_weight_acts_itself() -> None:
    assert acting_weights(gc.analyze(net(), X).coupling) == {}


@pytest.mark.parametrize("rewrite", [masked, old_weight_norm])
def test_what_the_mask_holds_at_zero_goes_first(rewrite: Callable[[nn.Sequential], None]) -> None:
    model = net()
    rewrite(model)
    wanted = set(model[0](X).abs().amax((0, 2, 3)).nonzero().flatten().tolist())
    kept = gc.compress(model, X, sparsity=0.5, progress=False).kept
    name = next(name for name, dims in kept.items() if name.startswith("0.") and 0 in dims)
    if rewrite is masked:
        assert set(kept[name][0].tolist()) == wanted
    else:
        plain = gc.compress(net(), X, sparsity=0.5, progress=False).kept["0.weight"][0]
        assert kept[name][0].tolist() == plain.tolist()


class Unit(nn.Module):
    """w -> w over its norm, which sums over all dims of w."""

    def forward(self, w: Tensor) -> Tensor:
        """(o, i, h, w) -> itself, of norm 1."""
        flat = w.flatten(1)
        return w / torch.vdot(flat[:, 0], flat @ torch.ones(flat.shape[1]))


def test_what_a_weight_is_summed_over_while_it_is_computed_does_not_read_its_units() -> None:
    model = net()
    parametrize.register_parametrization(model[0], "weight", Unit(), unsafe=True)
    (group,) = gc.analyze(model, X).groups
    assert {member.name for member in group.producers if member.is_parameter} == {"0.parametrizations.weight.original"}
    with pytest.raises(gc.NothingToPrune):
        gc.compress(model, X, ignore="0", progress=False)


def test_units_that_are_zero_go_first() -> None:
    model = net()
    zero = torch.randperm(16, generator=torch.Generator().manual_seed(5))[:8]
    with torch.no_grad():
        model[0].weight[zero] = 0
        model[2].weight[:, zero] *= 30
    alive = [unit for unit in range(16) if unit not in zero.tolist()]
    plan = gc.analyze(model, X)
    for saliency in READ:
        scores = score(saliency, plan, plan.groups, data=DATA, loss=loss)[plan.groups[0]]
        assert scores[zero].max() <= scores[alive].min(), saliency


@pytest.mark.parametrize("rewrite", [weight_norm, masked])
def test_training_scores_the_weight_that_acts(rewrite: Callable[[nn.Sequential], None]) -> None:
    kept = []
    for change in (None, rewrite):
        model = net()
        if change is not None:
            change(model)
        with torch.no_grad():
            if change is None and rewrite is masked:
                model[0].weight[::2] = 0
        ready = gc.prepare(model, X, bits=None)
        optimizer = gc.QASSO(ready, torch.optim.SGD, lr=0.0, sparsity=0.5, schedule=20, saliency="l2")
        for _ in range(20):
            optimizer.zero_grad()
            loss(ready(X), None).backward()
            optimizer.step()
        (units,) = ready.kept().values()
        kept.append(units.tolist())
    assert kept[0] == kept[1]


# ------------------------------------------------------------------------------------------------ saliency="zeros"
def test_zeros_removes_exactly_what_is_zero() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[[1, 4, 9]] = 0
        model[2].weight[:, 12] = 0
    small = gc.compress(model, X, saliency="zeros", progress=False)
    assert sorted({*range(16)} - set(small.kept["0.weight"][0].tolist())) == [1, 4, 9, 12]
    torch.testing.assert_close(small(X), model(X))


def test_zeros_behind_a_mask_and_a_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    zero = (model[0].weight.flatten(1).abs().sum(1) == 0).nonzero().flatten()
    small = gc.compress(model, X, saliency="zeros", progress=False)
    assert len(small.kept["1.weight"][0]) == 4  # shift and mean are zero: nothing comes of a row of zeros
    torch.testing.assert_close(small(X), model(X))
    with torch.no_grad():
        model[1].bias.fill_(0.5)
    whole = gc.compress(model, X, saliency="zeros", progress=False)
    assert whole.report.units_removed == 0 and any(
        "4 units have weights of zero" in note for note in whole.report.notes
    )
    with torch.no_grad():
        model[1].weight[zero[:2]] = model[1].bias[zero[:2]] = 0
        model[1].bias.fill_(0.0)
    assert gc.compress(model, X, saliency="zeros", round_to=3, progress=False).report.units_removed == 2


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.5}, {"budget": gc.Budget(params=0.5)}, {"method": "hesso", "data": DATA, "loss": loss}]
)
def test_zeros_goes_alone(options: dict[str, Any]) -> None:
    with pytest.raises(gc.PlanError, match="zeros"):
        gc.compress(net(), X, saliency="zeros", progress=False, **options)


def test_nothing_is_zero() -> None:
    small = gc.compress(net(), X, saliency="zeros", progress=False)
    assert small.report.units_removed == 0
    assert 'saliency="zeros": no unit is zero' in small.report.notes


class Expanded(nn.Module):
    """A table that is scaled, and expanded to the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Parameter(torch.randn(1, 5, 16)), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.up(x) + (self.table * 2).expand(x.shape[0], -1, -1).mul(0.5)).relu())


def test_a_table_that_is_expanded_to_the_batch_is_no_weight() -> None:
    small = gc.compress(Expanded().eval(), torch.randn(2, 5, 8), sparsity=0.5, progress=False)
    assert small.module.down.in_features == 8
