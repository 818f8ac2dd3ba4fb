"""Take times: of pieces of a graph, each alone, and of whole networks, in onnxruntime or in PyTorch.

The least of many runs is what code takes on a machine that does nothing else: work of others only adds. Calls take
turns, so that all of them see the same load.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from graphcomp.cost.latency_table import Runtime, this_machine
from graphcomp.cost.pieces import Piece, SideBySide, Values, side_by_side
from graphcomp.ir.inputs import Inputs
from graphcomp.ir.module import tensor_leaves
from graphcomp.targets.lengths import Lengths
from graphcomp.targets.onnxruntime.export import export_onnx, need
from graphcomp.targets.pt2 import in_eval_mode
from graphcomp.targets.runtime import open_session

ROUNDS = 30
"""Turns of each call."""
SECONDS, SECONDS_WHOLE = 0.1, 1.5
"""Seconds that a piece, and a whole network, is run in all, about: the longer a run, the likelier it is disturbed."""
LEAST_RUNS, MOST_RUNS = 5, 100
"""Runs of a call in one turn: the first finds the caches cold."""

Call = Callable[[], object]
Clock = Callable[[], float]


class Timer(Protocol):
    """Makes calls of networks and of their pieces, and takes their times on this machine.

    Attributes:
        machine: see `graphcomp.cost.latency_table.this_machine`.
    """

    machine: str

    def pieces(self, module: fx.GraphModule, values: Values, pieces: Sequence[Piece]) -> list[Call]:
        """Return a call of each piece.

        Args:
            module: the graph.
            values: what its nodes computed in one run.
            pieces: of the graph.
        """

    def whole(self, module: nn.Module, inputs: Inputs) -> Call:
        """Return a call of a module in eval mode."""

    def times(self, calls: Sequence[Call], whole: Collection[int] = ()) -> list[float]:
        """Return milliseconds of each call, the least of many runs; the calls take turns.

        Args:
            whole: positions of whole networks.
        """


def timer_of(runtime: Runtime, threads: int) -> Timer:
    """Return the timer of a runtime."""
    return OnnxTimer(threads) if runtime == "onnxruntime" else EagerTimer(threads)


def best_times(
    calls: Sequence[Call], seconds: Sequence[float], rounds: int = ROUNDS, clock: Clock = time.perf_counter
) -> list[float]:
    """Return milliseconds of each call, the least of many runs; the calls take turns.

    Args:
        seconds: that each call runs in all, about.
        rounds: turns, at least 1.
        clock: in seconds.
    """
    best, runs = [], []
    for call, own in zip(calls, seconds, strict=True):
        call()
        best.append(_seconds(call, clock))
        runs.append(max(LEAST_RUNS, min(MOST_RUNS, int(own / rounds / max(best[-1], 1e-9)))))
    for _ in range(rounds):
        for k, call in enumerate(calls):
            best[k] = min(best[k], *(_seconds(call, clock) for _ in range(runs[k])))
    return [1e3 * least for least in best]


def _long(calls: Sequence[Call], whole: Collection[int]) -> list[float]:
    return [SECONDS_WHOLE if k in whole else SECONDS for k in range(len(calls))]


def _seconds(call: Call, clock: Clock) -> float:
    start = clock()
    call()
    return clock() - start


class OnnxTimer:
    """Times ONNX files in onnxruntime on the CPU.

    Args:
        threads: of each op.

    Raises:
        ExportError: the `onnx` extra is not installed.
    """

    def __init__(self, threads: int) -> None:
        need(
            "timing in onnxruntime",
            ("onnx", "onnxscript", "onnx_ir", "onnxruntime"),
            "pip install 'graphcomp[onnx]', or table=graphcomp.LatencyTable(runtime=\"eager\")",
        )
        self.threads, self.machine = threads, this_machine("onnxruntime")

    def pieces(self, module: fx.GraphModule, values: Values, pieces: Sequence[Piece]) -> list[Call]:
        """See `Timer`."""
        with tempfile.TemporaryDirectory() as folder:
            return self._pieces(side_by_side(module, values, pieces), Path(folder)) if pieces else []

    def whole(self, module: nn.Module, inputs: Inputs) -> Call:
        """See `Timer`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "whole.onnx"
            export_onnx(module, inputs.args, inputs.kwargs, path)
            return self._bound(path, tensor_leaves((inputs.args, dict(inputs.kwargs))))

    def times(self, calls: Sequence[Call], whole: Collection[int] = ()) -> list[float]:
        """See `Timer`."""
        return best_times(calls, _long(calls, whole))

    def _pieces(self, found: SideBySide, folder: Path) -> list[Call]:
        """Write all pieces in one file, and take the file apart: to write a file takes seconds."""
        import onnx
        from onnx.utils import Extractor

        inputs = [f"in_{k}" for k in range(len(found.inputs))]
        outputs = [f"out_{k}" for own in found.returns for k in own]
        path = folder / "pieces.onnx"
        fixed = Lengths(captured=False)
        export_onnx(found.module, found.inputs, {}, path, input_names=inputs, output_names=outputs, lengths=fixed)
        model = onnx.load(path)
        taken = {given.name for given in model.graph.input}
        extractor = Extractor(model)
        calls = []
        for k, (reads, returns) in enumerate(zip(found.reads, found.returns, strict=True)):
            own = [place for place in reads if inputs[place] in taken]
            part = extractor.extract_model([inputs[place] for place in own], [outputs[place] for place in returns])
            onnx.save(part, folder / f"{k}.onnx")
            calls.append(self._bound(folder / f"{k}.onnx", [found.inputs[place] for place in own]))
        return calls

    def _bound(self, path: Path, tensors: Sequence[Tensor]) -> Call:
        """Return a call of a file whose inputs and outputs stay where they are: to hand them over takes time, too."""
        session = open_session(path, threads=self.threads)
        binding = session.io_binding()
        for given, tensor in zip(session.get_inputs(), tensors, strict=True):
            binding.bind_cpu_input(given.name, tensor.detach().contiguous().numpy())
        for given in session.get_outputs():
            binding.bind_output(given.name)

        def call() -> None:
            session.run_with_iobinding(binding)

        return call


class EagerTimer:
    """Times modules in PyTorch on the CPU, in eval mode and without gradients.

    Args:
        threads: of torch's kernels while timing; set back afterwards.
    """

    def __init__(self, threads: int) -> None:
        self.threads, self.machine = threads, this_machine("eager")

    def pieces(self, module: fx.GraphModule, values: Values, pieces: Sequence[Piece]) -> list[Call]:
        """See `Timer`."""
        alone = [side_by_side(module, values, [piece]) for piece in pieces]
        return [_call(own.module, own.inputs) for own in alone]

    def whole(self, module: nn.Module, inputs: Inputs) -> Call:
        """See `Timer`. The module must be in eval mode, which the caller sees to: a copy would be another module."""
        return _call(in_eval_mode(module), inputs.args, inputs.kwargs)

    def times(self, calls: Sequence[Call], whole: Collection[int] = ()) -> list[float]:
        """See `Timer`."""
        with _pinned(self.threads):
            return best_times(calls, _long(calls, whole))


def _call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Call:
    given, named = tuple(args), dict(kwargs or {})
    return lambda: module(*given, **named)


@contextmanager
def _pinned(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)

