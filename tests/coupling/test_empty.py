"""Ops that the example inputs do not reach show nothing of what they would do: what they read is frozen."""

import torch
from torch import nn

import graphcomp as gc


class Detector(nn.Module):
    """A head over the boxes that are found: with nothing found it runs on an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 12)
        self.score = nn.Linear(12, 1)
        self.head = nn.Linear(12, 8)
        self.box = nn.Linear(8, 6)

    def forward(self, x):
        h = torch.relu(self.stem(x))
        found = h[self.score(h).squeeze(-1) > 1e9]
        if found.shape[0] > 100:
            raise ValueError("too many")
        return self.box(torch.relu(self.head(found))).reshape(-1, 3, 2)


def test_a_head_that_saw_nothing_stays_whole():
    plan = gc.analyze(Detector().eval(), torch.randn(5, 4))
    assert plan.captured.producer == "record"
    assert plan.groups == ()
    reasons = {f.name: str(f.reason) for f in plan.frozen}
    assert "the example inputs send nothing here" in reasons["head.weight"]
