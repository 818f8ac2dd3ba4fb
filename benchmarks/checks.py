"""What it costs to check the passes of a flow: of one-shot compression, in floats and with bits.

    python -m benchmarks.checks

After each pass the form of the graph is checked; at the end, shapes and dtypes by a run on fake tensors. Seconds are
processor time of one thread, medians over the rounds; the first round is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import common
from benchmarks.common import percent, section, table
from benchmarks.models import resnet20
from graphcomp.ir import passes

CHECKS = ("check_form", "wrong_value")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    rows = []
    for name, (model, x) in models().items():
        for bits in (None, 8):
            whole, spent = medians(model, x, bits, options.rounds)
            shares = [f"{1e3 * own:.0f} ({percent(own / whole)})" for own in spent]
            rows.append([name, bits or "float", f"{whole:.2f}", *shares, percent(sum(spent) / whole)])
    columns = ["model", "bits", "compress, s", "form, ms", "values, ms", "checks"]
    section("Checks of passes", table(columns, rows))


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    """A residual network and a transformer."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    transformer = nn.Sequential(nn.Linear(64, 128), encoder, nn.Linear(128, 10))
    return {
        "ResNet-20": (resnet20().eval(), torch.randn(2, 3, 32, 32)),
        "transformer of 4 layers": (transformer.eval(), torch.randn(2, 32, 64)),
    }


def medians(model: nn.Module, x: Tensor, bits: int | None, rounds: int) -> tuple[float, list[float]]:
    """Return seconds of a compression, and those of each check in it."""
    found = []
    for _ in range(rounds + 1):
        spent = dict.fromkeys(CHECKS, 0.0)
        with mock.patch.multiple(passes, **{name: timed(getattr(passes, name), name, spent) for name in CHECKS}):
            start = time.process_time()
            gc.compress(model, x, bits=bits, progress=False)
            found.append((time.process_time() - start, *spent.values()))
    whole, *checks = (statistics.median(column) for column in zip(*found[1:], strict=True))
    return whole, checks


def timed(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    """Return the function, which adds up what it takes."""

    def run(*args: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args)
        finally:
            spent[name] += time.process_time() - start

    return run


if __name__ == "__main__":
    main()
