"""Scores at gates (spec of methods, 7): exact on linear losses, equal to those at norms, and on any graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import graphcomp as gc
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.ir.module import tensor_leaves
from graphcomp.methods.taylor2.gates import Gates, gated
from graphcomp.testing import random_model, tiny_models
from graphcomp.training.prepared import Prepared
from tests.marks import in_ci
from tests.methods.learning import batches, net

A = torch.tensor([[1.0, 0.2, 0.0], [0.3, 1.0, 0.1], [0.0, 0.4, 1.0]], dtype=torch.float64)
Y = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


class Columns(nn.Module):
    """(n, 1) -> (n, 3): three units that are 1 whatever the input, read by the matrix A."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Linear(1, 3), nn.Linear(3, 3, bias=False)
        self.double()
        with torch.no_grad():
            self.make.weight.zero_()
            self.make.bias.fill_(1)
            self.read.weight.copy_(A)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.make(x))


def gates_of(model: nn.Module, *inputs: Tensor, train: bool = False) -> tuple[Prepared, Gates]:
    ready = gc.prepare(model, inputs, bits=None).train(train)
    return ready, Gates(ready, ready.session.groups)


def run(ready: Prepared, gates: Gates, *inputs: Tensor) -> Any:
    return functional_call(ready, gates.views(False), inputs)


def derivatives(gates: Gates, loss: Tensor) -> dict[ChannelGroup, Tensor]:
    for value in gates.values.values():
        value.grad = None
    loss.backward()
    return {group: own.clone() for group, own in gates.derivatives().items()}


@torch.no_grad()
def changes(gates: Gates, group: ChannelGroup, loss: Any) -> Tensor:
    """How much the loss is greater where the gate of a unit alone is closed."""
    value, whole, found = gates.values[group.name], loss(), []
    for unit in range(group.size):
        value[unit] = 0
        found.append(loss() - whole)
        value[unit] = 1
    return torch.stack(found)


def test_7_1_of_a_loss_that_is_linear_in_the_gates_the_score_is_the_exact_change():
    x = torch.ones(1, 1, dtype=torch.float64)
    ready, gates = gates_of(Columns(), x)
    (group,) = gates.groups
    score = -derivatives(gates, (run(ready, gates, x) * Y).sum())[group]
    exact = changes(gates, group, lambda: (run(ready, gates, x) * Y).sum())
    assert torch.allclose(score, exact, rtol=0, atol=1e-12)


def test_7_1_of_a_quadratic_loss_half_of_the_hessians_diagonal_is_missing():
    x = torch.ones(1, 1, dtype=torch.float64)
    ready, gates = gates_of(Columns(), x)
    (group,) = gates.groups
    score = -derivatives(gates, (run(ready, gates, x) - Y).square().sum())[group]
    exact = changes(gates, group, lambda: (run(ready, gates, x) - Y).square().sum())
    assert torch.allclose(exact, torch.tensor([-1.35, -6.40, -1.47], dtype=torch.float64), rtol=0, atol=1e-12)
    hessian = 2 * A.square().sum(0)
    assert torch.allclose(score + hessian / 2, exact, rtol=0, atol=1e-12)


def test_7_2_at_the_gate_the_score_is_that_of_the_norm_and_at_the_filter_there_is_none():
    images, labels = batches()[0]
    model = net().double()
    model.one.eps = 0.0  # else the norm takes out the scale of the filter all but eps / variance
    ready, gates = gates_of(model, images.double(), train=True)
    found = derivatives(gates, F.cross_entropy(run(ready, gates, images.double()), labels))
    first = gates.groups[0]
    gamma, beta, filters = (ready.get_parameter(name) for name in ("one.weight", "one.bias", "first.weight"))
    assert torch.allclose(found[first], gamma * gamma.grad + beta * beta.grad, rtol=1e-9, atol=1e-12)
    at_filter = (filters * filters.grad).sum((1, 2, 3)).detach()
    assert float(at_filter.abs().max()) < 1e-10 < 1e-3 < float(found[first].abs().max())


def test_7_2_the_score_is_the_sum_of_values_times_gradients():
    images, labels = batches()[0]
    model = net().double()
    ready, gates = gates_of(model, images.double())
    found = derivatives(gates, F.cross_entropy(run(ready, gates, images.double()), labels))
    values: list[Tensor] = []

    def keep(_module: Any, _given: Any, value: Tensor) -> None:
        value.retain_grad()
        values.append(value)

    plain = model.eval()
    for norm in (plain.one, plain.two):
        norm.register_forward_hook(keep)
    F.cross_entropy(plain(images.double()), labels).backward()
    for group, value in zip(gates.groups, values, strict=True):
        assert value.grad is not None
        assert torch.allclose(found[group], (value * value.grad).sum((0, 2, 3)), rtol=0, atol=1e-12)


def test_7_3_scores_of_parts_of_a_batch_add_up():
    images, labels = batches()[0]
    ready, gates = gates_of(net().double(), images.double())

    def of(rows: slice) -> dict[ChannelGroup, Tensor]:
        loss = F.cross_entropy(run(ready, gates, images[rows].double()), labels[rows], reduction="sum")
        return derivatives(gates, loss)

    whole, parts = of(slice(None)), (of(slice(5)), of(slice(5, None)))
    for group in gates.groups:
        assert torch.allclose(whole[group], parts[0][group] + parts[1][group], rtol=0, atol=1e-12)


def test_7_3_scores_move_with_their_channels():
    images, labels = batches()[0]
    model, order = net().double(), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    moved = copy.deepcopy(model)
    state = moved.state_dict()
    for name in ("first.weight", "first.bias", "one.weight", "one.bias", "one.running_mean", "one.running_var"):
        state[name] = state[name][order]
    state["second.weight"] = state["second.weight"][:, order]
    moved.load_state_dict(state)
    found = []
    for own in (model, moved):
        ready, gates = gates_of(own, images.double())
        found.append(derivatives(gates, F.cross_entropy(run(ready, gates, images.double()), labels))[gates.groups[0]])
    assert torch.allclose(found[0][order], found[1], rtol=0, atol=1e-12)


def test_7_4_a_dead_channel_scores_0_and_leaves_no_trace():
    images, labels = batches()[0]
    model = net()
    with torch.no_grad():
        model.one.weight[3] = model.one.bias[3] = 0
    ready, gates = gates_of(model, images)
    first, second = gates.groups
    found = derivatives(gates, F.cross_entropy(run(ready, gates, images), labels))[first]
    assert found[3] == 0 and int((found != 0).sum()) >= 6
    before = run(ready, gates, images)
    gates.set({first: torch.tensor([0, 1, 2, 4, 5, 6, 7]), second: torch.arange(8)})
    assert torch.equal(run(ready, gates, images), before)


def test_the_weight_gets_the_gradient_of_the_product_and_each_gate_what_the_others_let_through():
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=draws, requires_grad=True)
    levels, grad = torch.randn(4, 3, generator=draws), torch.randn(4, 3, generator=draws)
    rows = torch.tensor([[1.0], [0.0], [1.0], [1.0]], requires_grad=True)
    columns = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    found = gated(weight, levels, [rows, columns])
    assert torch.equal(found, (weight * rows * columns).detach())
    found.backward(grad)
    assert weight.grad is not None and rows.grad is not None and columns.grad is not None
    assert torch.equal(weight.grad, grad)
    assert torch.allclose(rows.grad, (grad * levels * columns).sum(1, keepdim=True))
    assert torch.allclose(columns.grad, (grad * levels * rows).sum(0, keepdim=True))


# ------------------------------------------------------------------------------------------------ on any graph
def outputs(found: Any) -> list[Tensor]:
    return [tensor for tensor in tensor_leaves(found) if tensor.is_floating_point()]


def check_any(model: nn.Module, inputs: tuple[Tensor, ...]) -> set[str]:
    """Compare derivatives with finite differences at open and at closed gates, and closed gates with units that are
    gone (Law 2: gone is as sliced); return the roles of the groups."""
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    ready, gates = gates_of(model.double().eval(), *inputs)
    draws = torch.Generator().manual_seed(0)
    weights = [torch.randn(own.shape, generator=draws, dtype=own.dtype) for own in outputs(ready(*inputs))]

    def loss() -> Tensor:
        pairs = zip(outputs(run(ready, gates, *inputs)), weights, strict=True)
        return torch.stack([(own * weight).sum() + 0.1 * own.square().sum() for own, weight in pairs]).sum()

    for group in gates.groups:
        value = gates.values[group.name].data
        for closed in (False, True):
            value[0] = float(not closed)
            found = derivatives(gates, loss())[group]
            for unit in {0, group.size - 1}:
                here, ends = value[unit].item(), []
                for off in (1e-6, -1e-6):
                    value[unit] = here + off
                    ends.append(loss().detach())
                value[unit] = here
                slope = (ends[0] - ends[1]) / 2e-6
                assert torch.allclose(found[unit], slope, rtol=1e-4, atol=1e-5), (group, closed, unit)
        value[0] = 1.0
    kept = {group: torch.arange(group.size if group.multiple > 1 else -(-group.size // 2)) for group in gates.groups}
    gates.set(kept)
    with torch.no_grad():
        behind_gates = outputs(run(ready, gates, *inputs))
        ready.keep(kept)
        for own, wanted in zip(behind_gates, outputs(ready(*inputs)), strict=True):
            assert torch.allclose(own, wanted, rtol=1e-9, atol=1e-9)
    return {group.role for group in gates.groups}


@pytest.mark.parametrize("name", [*in_ci("decoder", "encoder", "vision_transformer"), "residual_cnn"])
def test_gates_on_heads_features_and_channels(name):
    roles = check_any(*tiny_models()[name])
    assert roles & ({"channel", "width"} if name == "residual_cnn" else {"head"})


@pytest.mark.parametrize("seed", [0, *in_ci(*range(1, 12))])
def test_gates_on_random_networks(seed):
    check_any(*random_model(seed, 4))


def test_gates_where_the_weight_that_reads_a_unit_is_computed():
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), normed, nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3))
    assert check_any(model, (torch.randn(3, 4),)) == {"hidden"}
