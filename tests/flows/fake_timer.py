"""A timer without a clock: a layer takes a time that its weights say."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from graphcomp.cost.pieces import Piece, Values, constants
from graphcomp.ir.inputs import Inputs
from graphcomp.targets.timing import Call

PER_WEIGHT, PER_PIECE = 1e-3, 0.02
"""Milliseconds."""
WHOLE = 1.25
"""A whole network takes so many times what its layers take."""
MACHINE = "a fake machine"


class FakeTimer:
    """Counts what is timed, in `timed`: names of pieces, and "whole"."""

    machine = MACHINE

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self.timed: list[str] = []

    def pieces(self, module: fx.GraphModule, values: Values, pieces: Sequence[Piece], between: int) -> list[Call]:
        """See `Timer`."""
        self.timed += [piece.name for piece in pieces]
        return [self._call(PER_PIECE + PER_WEIGHT * _weights(piece, values)) for piece in pieces]

    def whole(self, module: nn.Module, inputs: Inputs) -> Call:
        """See `Timer`."""
        self.timed.append("whole")
        weights = [t for t in (*module.parameters(), *module.buffers()) if t.dim() > 1]
        return self._call(WHOLE * sum(PER_PIECE + PER_WEIGHT * t.numel() for t in weights))

    def times(self, calls: Sequence[Call]) -> list[float]:
        """See `Timer`."""
        return [float(call.run()) for call in calls]  # type: ignore[arg-type]

    def _call(self, ms: float) -> Call:
        return Call(lambda: ms)


def _weights(piece: Piece, values: Values) -> int:
    return sum(values[r].numel() for node in piece.nodes for r in constants(node) if values[r].dim() > 1)
