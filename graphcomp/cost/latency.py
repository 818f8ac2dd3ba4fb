"""Milliseconds of one forward, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphcomp.errors import PlanError
from graphcomp.ir.inputs import copies
from graphcomp.ir.preserve import eval_copy


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward: the median, the 10th and the 90th percentile of `runs` runs."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int


def latency(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    threads: int = 1,
    warmup: int = 3,
    repeats: int = 20,
) -> Latency:
    """Time `module(*args, **kwargs)` in eval mode, without gradients.

    Args:
        module: on the device to be timed, like the arguments. Its mode and its buffers are as before afterwards.
        threads: of torch's CPU kernels while timing; set back afterwards.
        warmup: runs that are not counted.
        repeats: runs that are counted, at least 1.

    Raises:
        PlanError: the module has no values (meta device), or `repeats` or `threads` is below 1.
    """
    if repeats < 1 or threads < 1:
        raise PlanError(f"latency over {repeats} runs on {threads} threads", fix="give at least one of each")
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise PlanError("a module on the meta device cannot be timed", fix="give it weights first")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with eval_copy(module, real=True) as copied, torch.no_grad():
            inputs = tuple(args), dict(kwargs or {})
            times = [_seconds(copied, *copies(inputs)) for _ in range(warmup + repeats)][warmup:]
    finally:
        torch.set_num_threads(before)
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    return Latency(1e3 * statistics.median(times), 1e3 * tenths[0], 1e3 * tenths[-1], len(times))


def _seconds(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    _wait()
    start = time.perf_counter()
    module(*args, **kwargs)
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    """Until the accelerator, if there is one, has done its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
