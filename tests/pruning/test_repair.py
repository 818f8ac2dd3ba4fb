"""A cut that other units can stand in for is repaired to the last digit, whatever kind of layer reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.coupling.analysis import Analysis
from graphcomp.errors import CalibrationError
from graphcomp.flows.results import cut_groups
from graphcomp.pruning import repair
from graphcomp.pruning.repair import Repaired, repair_cut

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
    "einsum": (lambda: [nn.Linear(6, WIDTH), Weight((WIDTH, 2, 5), lambda x, w: torch.einsum("bti,iho->btho", x, w))], (7, 6)),
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


def repaired(model: nn.Module, batches: Sequence[Tensor]) -> tuple[Repaired, nn.Module, nn.Module]:
    plan, kept, small = cut(model, batches)
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
