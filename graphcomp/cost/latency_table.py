"""A table of measured times of layers by their widths: saved, loaded, and read as the time of a whole network."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from graphcomp.arguments import check_mapping, check_path, check_whole, check_word
from graphcomp.cost.fit_times import fit_times
from graphcomp.cost.model import WHOLE, Counts
from graphcomp.cost.work import Work
from graphcomp.coupling.axis import Factor
from graphcomp.errors import CheckpointError, PlanError
from graphcomp.system.files import replacing

Runtime: TypeAlias = Literal["onnxruntime", "eager"]
"""What a network runs in: an ONNX file in onnxruntime on the CPU, or a module in PyTorch."""

RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "eager")
FORMAT = 1
"""Of the file."""


@dataclass(frozen=True)
class Sample:
    """One measurement of a piece.

    Attributes:
        widths: how many units stay of each group that the piece depends on.
        ms: milliseconds, the least of many runs.
    """

    widths: tuple[int, ...]
    ms: float


@dataclass(frozen=True)
class LayerTimes:
    """What was measured of pieces that are equal but for their weights.

    Attributes:
        name: of the layer that was timed.
        samples: in the order of their measurement.
    """

    name: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class LatencyTable:
    """Measured milliseconds of each layer at several widths, on one machine, in one runtime.

    The table of a model is made by `graphcomp.time_layers`, and is read by `Budget(latency_ms=…, table=…)` and
    `Budget(speedup=…, table=…)`. A table without layers says how to measure: budgets measure what is missing.

    Attributes:
        runtime: "onnxruntime": the ONNX file that `export` writes, on the CPU. "eager": the module in PyTorch.
        threads: of each op.
        machine: the processor, its cores, and the versions of the runtime; "" in a table without layers.
        layers: of each kind of layer, and of each whole network, what was measured; the keys are hashes of the layer
            with its shapes and precision.

    Raises:
        PlanError: another runtime, or no thread.
    """

    runtime: Runtime = "onnxruntime"
    threads: int = 1
    machine: str = ""
    layers: Mapping[str, LayerTimes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_word("runtime", self.runtime, RUNTIMES)
        check_whole("threads", self.threads)
        check_mapping("layers", self.layers, "layers={}")

    def __repr__(self) -> str:
        samples = sum(len(layer.samples) for layer in self.layers.values())
        return f"LatencyTable({self.runtime!r}, threads={self.threads}, {len(self.layers)} layers, {samples} times)"

    def with_times(self, machine: str, found: Mapping[str, LayerTimes]) -> LatencyTable:
        """Return the table with more layers, measured on `machine`."""
        return replace(self, machine=machine, layers={**self.layers, **found})

    def save(self, path: str | Path) -> None:
        """Write the table as a JSON file, whole or not at all.

        Raises:
            ExportError: the path cannot be written.
        """
        check_path("path", path)
        with replacing(Path(path)) as fresh:
            fresh.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Return the table that `save` wrote.

        Raises:
            CheckpointError: there is no such file, or the file holds no table of this version.
        """
        check_path("path", path)
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"no table of latencies in {path}", why=f"{type(error).__name__}: {error}") from error
        try:
            return _from_data(data)
        except (KeyError, TypeError, ValueError, PlanError) as error:
            raise CheckpointError(
                f"no table of latencies in {path}",
                why=f"{type(error).__name__}: {error}",
                fix="graphcomp.time_layers(model, inputs).save(path)",
            ) from error


def _from_data(data: Any) -> LatencyTable:
    if data["format"] != FORMAT:
        raise ValueError(f"its format is {data['format']!r}, and this version reads {FORMAT}")
    layers = {
        str(key): LayerTimes(str(own["name"]), tuple(_sample(one) for one in own["samples"]))
        for key, own in data["layers"].items()
    }
    return LatencyTable(data["runtime"], data["threads"], str(data["machine"]), layers)


def _sample(data: Mapping[str, Any]) -> Sample:
    ms = float(data["ms"])
    if not 0 < ms < float("inf"):
        raise ValueError(f"{ms} is no time")
    return Sample(tuple(int(n) for n in data["widths"]), ms)


def this_machine(runtime: Runtime) -> str:
    """Return the processor, its cores and the versions that times on this machine depend on."""
    versions = [f"torch {torch.__version__}"]
    if runtime == "onnxruntime":
        try:
            versions = [f"onnxruntime {importlib.metadata.version('onnxruntime')}"]
        except importlib.metadata.PackageNotFoundError:
            versions = ["no onnxruntime"]
    capability = torch.backends.cpu.get_cpu_capability()
    return ", ".join([_processor(), capability, f"{os.cpu_count()} cores", *versions])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ------------------------------------------------------------------------------------------------ reading
@dataclass(frozen=True, eq=False)
class Timed:
    """One piece of a network, and the key that its kind has in a table.

    Attributes:
        name: of the node that multiplies.
        key: hash of ops, shapes and precision.
        work: what the piece computes, by the units that stay.
    """

    name: str
    key: str
    work: Work


def key_of(*texts: str) -> str:
    """Return a hash of texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]


class Predicted:
    """Milliseconds of one forward of a network, by the units that stay.

    A whole network is not the sum of its layers: fewer layouts are changed between layers than around each one, and
    caches hold other things. So the sum is read off a line through the whole networks that were timed.

    Args:
        pieces: of the network.
        table: holds their times, and those of whole networks under `whole`.
        whole: key of the whole network. The widths of the samples are of `factors`.
        factors: the factors of the groups that may be cut.
        original: key of the network before it was cut and quantized.

    Attributes:
        original_ms: of the network before it was cut and quantized, measured.
        dense_ms: of the network before a cut, quantized where the others are.
        baseline_ms: of the network that a speedup counts from: the original, or the dense one.
        spread: the largest relative error on a network that was timed, where the line leaves the network out.
        worst: name of the piece whose fit is farthest off, and by which share.
    """

    def __init__(
        self, pieces: Sequence[Timed], table: LatencyTable, whole: str, factors: Sequence[Factor], original: str
    ) -> None:
        self.pieces, self.table = tuple(pieces), table
        self._known: dict[tuple[str, tuple[int, ...]], float] = {}
        self._fits: dict[str, tuple[float, ...]] = {}
        off: dict[str, float] = {}
        for piece in pieces:
            if piece.key not in self._fits:
                samples = table.layers[piece.key].samples
                features = [piece.work.features(sample.widths) for sample in samples]
                times = [sample.ms for sample in samples]
                self._fits[piece.key] = fit_times(features, times)
                pairs = zip(features, times, strict=True)
                off[piece.name] = max(abs(float(np.dot(f, self._fits[piece.key])) / t - 1) for f, t in pairs)
        self.worst = max(off.items(), key=lambda item: item[1], default=("", 0.0))
        self._touching: dict[Factor, list[Timed]] = {}
        for piece in pieces:
            for factor in piece.work.factors:
                self._touching.setdefault(factor, []).append(piece)
        samples = table.layers[whole].samples
        sums = [self.of_layers(dict(zip(factors, sample.widths, strict=True))) for sample in samples]
        times = [sample.ms for sample in samples]
        self._line, self._share = line(sums, times), 1.0
        self.spread = _left_out(sums, times)
        self.dense_ms = self(WHOLE)
        self.original_ms = self.baseline_ms = table.layers[original].samples[0].ms

    def __call__(self, counts: Counts) -> float:
        """Return milliseconds when `counts` units stay."""
        return self._share * along(self._line, self.of_layers(counts))

    @property
    def share(self) -> float:
        """Factor from the line through whole networks to milliseconds; 1 as the table says."""
        return self._share

    def with_share(self, share: float) -> Predicted:
        """Return a prediction with another factor. What was measured of the original stays."""
        other = copy.copy(self)
        other._share = share
        return other

    def anchored(self, original_ms: float, baseline_ms: float) -> Predicted:
        """Return a prediction for a machine whose speed has changed, as networks say that were timed again.

        Args:
            original_ms: of the network before it was cut and quantized.
            baseline_ms: of the network that a speedup counts from.
        """
        other, drift = copy.copy(self), original_ms / self.original_ms
        other._share, other.dense_ms = self._share * drift, self.dense_ms * drift
        other.original_ms, other.baseline_ms = original_ms, baseline_ms
        return other

    def of_layers(self, counts: Counts) -> float:
        """Return the sum over the layers, each timed alone."""
        return sum(self._piece(piece, counts) for piece in self.pieces)

    def touching(self, factor: Factor, counts: Counts) -> float:
        """Return the sum over the layers whose time depends on a factor, each timed alone."""
        return sum(self._piece(piece, counts) for piece in self._touching.get(factor, ()))

    def by_layer(self, counts: Counts) -> dict[str, float]:
        """Return milliseconds of each layer, timed alone."""
        return {piece.name: self._piece(piece, counts) for piece in self.pieces}

    def _piece(self, piece: Timed, counts: Counts) -> float:
        at = piece.key, piece.work.local(counts)
        if at not in self._known:
            features = piece.work.features(at[1])
            self._known[at] = sum(a * b for a, b in zip(self._fits[piece.key], features, strict=True))
        return self._known[at]


Line: TypeAlias = tuple[tuple[float, float], ...]
"""Points (sum over layers, milliseconds of the network), ascending in both."""


def line(sums: Sequence[float], times: Sequence[float]) -> Line:
    """Return the points of a line that rises: a network that was slower than a larger one was disturbed.

    Args:
        sums: of the layers of whole networks.
        times: milliseconds of the networks.
    """
    points: list[tuple[float, float]] = []
    for s, t in sorted(zip(sums, times, strict=True), reverse=True):
        if points and s == points[-1][0]:
            points[-1] = s, min(t, points[-1][1])
        else:
            points.append((s, min(t, points[-1][1]) if points else t))
    return tuple(reversed(points))


def along(points: Line, at: float) -> float:
    """Return the line's milliseconds: between two points straight, beyond the ends in proportion to the nearest."""
    first, last = points[0], points[-1]
    if at <= first[0] or at >= last[0]:
        s, t = first if at <= first[0] else last
        return t * at / s
    return float(np.interp(at, [s for s, _ in points], [t for _, t in points]))


def _left_out(sums: Sequence[float], times: Sequence[float]) -> float:
    """Return the largest relative error at a network that is left out; of two networks or fewer nothing is known: 0."""
    found = [0.0]
    for k in range(1, len(sums) - 1):
        others = line([*sums[:k], *sums[k + 1 :]], [*times[:k], *times[k + 1 :]])
        found.append(abs(along(others, sums[k]) / times[k] - 1))
    return max(found)
