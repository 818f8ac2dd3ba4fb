"""Losses are told apart by what they compute, not by where they stand."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import pytest
import torch.nn.functional as F
from torch import nn

from graphcomp.training.identity import code_digest


def around(inner: Any, calls: int = 0) -> Any:
    return lambda output, batch: inner(output) * (1 + 0 * calls)


def weighted(output: Any, batch: Any, weight: float = 1.0) -> Any:
    return weight * output.sum()


class Loss:
    def __init__(self, margin: float) -> None:
        self.margin = margin

    def __call__(self, output: Any, batch: Any) -> Any:
        return output.sum() - self.margin


def test_code_constants_defaults_and_functions_inside_count() -> None:
    losses = [
        lambda output, batch: F.cross_entropy(output, batch[1]),
        lambda output, batch: F.mse_loss(output, batch[1]),
        lambda output, batch: output.sum() * 2,
        lambda output, batch: output.sum() * 3,
        around(lambda output: output.sum()), around(lambda output: output.mean()),
        functools.partial(weighted, weight=1.0), functools.partial(weighted, weight=2.0), weighted,
        Loss(1.0), Loss(1.0).__call__, nn.CrossEntropyLoss(), nn.MSELoss(),
    ]  # fmt: skip
    assert len({code_digest(loss) for loss in losses}) == len(losses)


def test_what_a_loss_counts_or_holds_does_not_count() -> None:
    assert code_digest(Loss(1.0)) == code_digest(Loss(2.0))
    assert code_digest(around(weighted, 0)) == code_digest(around(weighted, 7))


@pytest.mark.slow
@pytest.mark.ci
def test_the_place_in_the_file_and_the_process_do_not_count() -> None:
    loss = "loss = lambda o, b: o.sum() * 2"
    code = "from graphcomp.training.identity import code_digest\n{}" + loss + "\nprint(code_digest(loss))"
    found = {
        subprocess.run([sys.executable, "-c", code.format(lines)], capture_output=True, text=True, check=True).stdout
        for lines in ("", "\n\n\n")
    }
    assert len(found) == 1
