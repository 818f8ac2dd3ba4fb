"""Take times: of pieces of a graph, each alone, and of whole networks, in onnxruntime or in PyTorch.

With one thread the time is that of the processor, in which no other work counts; with more, that of the clock. The
least of many runs is taken, and calls take turns, so that all see the same load. In front of each run of a piece as
many bytes are read as the rest of the network would read and write: weights are then as far away as in a network.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from graphcomp.cost.latency_table import Runtime, this_machine
from graphcomp.cost.pieces import Piece, SideBySide, Values, side_by_side
from graphcomp.ir.inputs import Inputs
from graphcomp.ir.module import tensor_leaves
from graphcomp.ir.preserve import eval_copy
from graphcomp.targets.lengths import Lengths
from graphcomp.targets.onnxruntime.export import export_onnx, need
from graphcomp.targets.pt2 import in_eval_mode
from graphcomp.targets.runtime import open_session

ROUNDS = 8
"""Turns of each call."""
SECONDS, SECONDS_WHOLE = 0.2, 1.0
"""Seconds that a piece, and a whole network, is run in all, about."""
LEAST_RUNS, MOST_RUNS = 8, 100
"""Runs of a call in one turn."""
FAR = 2**24
"""Bytes that are read between two runs, at most: more than the caches of one core hold."""

Clock = Callable[[], float]


@dataclass(frozen=True, eq=False)
class Call:
    """What is timed.

    Attributes:
        run: runs a piece or a network once.
        between: bytes to read between two runs.
        near: what the code in front has just made: is read again after these bytes.
        whole: of a network: is run for longer, as a longer run is likelier to be disturbed.
    """

    run: Callable[[], object]
    between: int = 0
    near: tuple[Tensor, ...] = ()
    whole: bool = False


class Timer(Protocol):
    """Makes calls of networks and of their pieces, and takes their times on this machine.

    Attributes:
        machine: see `graphcomp.cost.latency_table.this_machine`.
    """

    machine: str

    def pieces(self, module: fx.GraphModule, values: Values, pieces: Sequence[Piece], between: int) -> list[Call]:
        """Return a call of each piece.

        Args:
            module: the graph.
            values: what its nodes computed in one run.
            pieces: of the graph.
            between: bytes that a run of the graph reads and writes.
        """

    def whole(self, module: nn.Module, inputs: Inputs) -> Call:
        """Return a call of a module in eval mode."""

    def times(self, calls: Sequence[Call]) -> list[float]:
        """Return milliseconds of each call, the least of many runs; the calls take turns."""


def timer_of(runtime: Runtime, threads: int) -> Timer:
    """Return the timer of a runtime."""
    return OnnxTimer(threads) if runtime == "onnxruntime" else EagerTimer(threads)


def best_times(calls: Sequence[Call], clock: Clock, rounds: int = ROUNDS) -> list[float]:
    """Return milliseconds of each call, the least of many runs; the calls take turns.

    Args:
        clock: in seconds.
        rounds: turns, at least 1.
    """
    buffer = torch.zeros(max((min(call.between, FAR) // 4 for call in calls), default=0))
    best, runs = [], []
    for call in calls:
        call.run()  # the first run sets things up
        start = clock()
        best.append(_seconds(call, buffer, clock))
        seconds = (SECONDS_WHOLE if call.whole else SECONDS) / rounds
        runs.append(max(LEAST_RUNS, min(MOST_RUNS, int(seconds / max(clock() - start, 1e-9)))))
    for _ in range(rounds):
        for k, call in enumerate(calls):
            best[k] = min(best[k], *(_seconds(call, buffer, clock) for _ in range(runs[k])))
    return [1e3 * least for least in best]


def _seconds(call: Call, buffer: Tensor, clock: Clock) -> float:
    if call.between:
        buffer[: min(call.between, FAR) // 4].sum()
        for tensor in call.near:
            tensor.sum()
    start = clock()
    call.run()
    return clock() - start


def clock_of(threads: int) -> Clock:
    """Return the clock of the processor for one thread, else that of the wall: several threads run at once."""
    return time.thread_time if threads == 1 else time.perf_counter


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

    def pieces(self, module: fx.GraphModule, values: Values, pieces: Sequence[Piece], between: int) -> list[Call]:
        """See `Timer`."""
        if not pieces:
            return []
        with tempfile.TemporaryDirectory() as folder:
            return self._pieces(side_by_side(module, values, pieces), Path(folder), between)

    def whole(self, module: nn.Module, inputs: Inputs) -> Call:
        """See `Timer`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "whole.onnx"
            export_onnx(module, inputs.args, inputs.kwargs, path)
            return Call(self._bound(path, tensor_leaves((inputs.args, dict(inputs.kwargs)))), whole=True)

    def times(self, calls: Sequence[Call]) -> list[float]:
        """See `Timer`."""
        return best_times(calls, clock_of(self.threads))

    def _pieces(self, found: SideBySide, folder: Path, between: int) -> list[Call]:
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
            near = tuple(found.inputs[place] for place in own)
            calls.append(Call(self._bound(folder / f"{k}.onnx", near), between, near))
        return calls

    def _bound(self, path: Path, tensors: Sequence[Tensor]) -> Callable[[], object]:
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

    def pieces(self, module: fx.GraphModule, values: Values, pieces: Sequence[Piece], between: int) -> list[Call]:
        """See `Timer`."""
        alone = [side_by_side(module, values, [piece]) for piece in pieces]
        return [Call(_run(own.module, own.inputs), between, own.inputs) for own in alone]

    def whole(self, module: nn.Module, inputs: Inputs) -> Call:
        """See `Timer`. A copy is timed: a run in training mode would change the statistics of batch norms."""
        args, kwargs = inputs.copies()
        with eval_copy(in_eval_mode(module), real=True) as running:
            return Call(_run(running, args, kwargs), whole=True)

    def times(self, calls: Sequence[Call]) -> list[float]:
        """See `Timer`."""
        with _pinned(self.threads):
            return best_times(calls, clock_of(self.threads))


def _run(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Callable[[], object]:
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
