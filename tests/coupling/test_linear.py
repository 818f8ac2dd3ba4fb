"""The analysis is linear in depth: what it keeps per op does not grow along the graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphcomp.capture.capture import capture
from graphcomp.coupling.groups import find_groups
from graphcomp.coupling.propagate import MAX_ORIGINS, Coupling, propagate


class Gates(nn.Module):
    """A chain of x = x * sigmoid(f(x)), and a sum of two functions of all of it."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)
        self.gates = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        for gate in self.gates:
            x = x * torch.sigmoid(gate(x))
        return self.down(x + torch.tanh(x))


def coupled(depth: int) -> Coupling:
    captured = capture(Gates(depth), torch.randn(2, 4))
    return propagate(captured.module, captured.output_names)


def remembered(coupling: Coupling) -> int:
    """Values that are remembered as origins, over all ops and their arguments."""
    of_calls = (origins for call in coupling.calls.values() for origins in call.origins.values())
    return sum(map(len, (*coupling.origins.values(), *coupling.many, *of_calls)))


@pytest.mark.slow
@pytest.mark.ci
def test_what_a_value_was_made_of_does_not_grow_with_depth() -> None:
    assert remembered(coupled(80)) < 2.2 * remembered(coupled(40))  # without a bound: 3.7 times
    assert max(map(len, coupled(40).origins.values())) <= MAX_ORIGINS


def test_two_functions_of_one_value_are_no_residual_sum_however_it_was_made() -> None:
    (group,) = find_groups(coupled(2 * MAX_ORIGINS))
    assert group.role == "hidden"
