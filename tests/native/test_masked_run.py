"""The masked model has memory of its own for what it zeroes alone, and the user's model stays as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.flows.held import held_by_class
from graphcomp.flows.one_shot import cut_groups
from graphcomp.native.masked_run import zeroed_model

X = torch.linspace(-1, 1, 48).reshape(2, 3, 8)


class Recurrent(nn.Module):
    """8 -> 6 -> an LSTM, whose weights torch keeps in a list of its own, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.lstm = nn.Linear(8, 6), nn.LSTM(6, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, 8) -> (n, t, 4)."""
        found: Tensor = self.lstm(torch.relu(self.up(x)))[0]
        return found


def test_tensors_are_shared_but_for_those_that_get_zeros() -> None:
    model = Recurrent().eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    plan = gc.analyze(model, X)
    (group,) = [group for group in plan.groups if group.size == 6]
    zeroed = zeroed_model(plan, {group: torch.tensor([0, 2])})
    assert isinstance(zeroed, Recurrent)
    assert zeroed.up.weight is model.up.weight and zeroed.lstm.weight_hh_l0 is model.lstm.weight_hh_l0
    assert zeroed.lstm.weight_ih_l0[:, [1, 3, 4, 5]].count_nonzero() == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    small = gc.slice_groups(plan, {group: [0, 2]})
    assert torch.allclose(zeroed(X), small.module(X), atol=1e-6) and not torch.equal(zeroed(X), model(X))


def test_the_class_has_the_memory_of_the_graph_and_none_of_the_user() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    plan = gc.analyze(model, X)
    kept = {plan.groups[0]: torch.tensor([0, 2])}
    cut, held = held_by_class(cut_groups(plan, kept, plan.groups, verify=True))
    assert held.module is not None and cut.graph is not None
    own = {p.data_ptr() for p in held.module.parameters()}
    assert own == {p.data_ptr() for p in cut.graph.parameters()}
    assert not own & {p.data_ptr() for p in model.parameters()}
