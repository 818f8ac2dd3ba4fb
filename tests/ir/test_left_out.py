"""A graph called without labels."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from graphcomp.capture.capture import capture


class Output(NamedTuple):
    """As models return their losses."""

    loss: Tensor | None
    logits: Tensor


class Classifier(nn.Module):
    """Computes a loss where labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Output:
        """(n, 4), (n, 4), (n,) -> loss, (n, 3)."""
        logits = self.layer(x if mask is None else x * mask)
        return Output(None if labels is None else nn.functional.cross_entropy(logits, labels), logits)


@pytest.fixture
def graph() -> Any:
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 0, 1])
    return capture(Classifier().eval(), (torch.randn(5, 4), torch.ones(5, 4)), {"labels": labels}).module


def test_labels_may_be_left_out(graph: Any) -> None:
    x, mask = torch.randn(7, 4, requires_grad=True), torch.ones(7, 4)
    whole, found = graph(x, mask, labels=torch.zeros(7, dtype=torch.int64)), graph(x, mask)
    assert found.loss is None
    assert torch.equal(found.logits, whole.logits)
    assert torch.equal(graph(x, mask=mask, labels=None).logits, whole.logits)
    found.logits.sum().backward()
    assert x.grad is not None


def test_what_outputs_depend_on_may_not(graph: Any) -> None:
    with pytest.raises(TypeError, match="mask"):
        graph(torch.randn(5, 4))
    with pytest.raises(TypeError, match="x"):
        graph(mask=torch.ones(5, 4))
