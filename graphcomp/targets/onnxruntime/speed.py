"""Never slower: time an integer file beside its float form, and leave in float what does not pay on integers.

Files take turns, so that ratios hold whatever else the machine does; medians over a small budget of time.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from graphcomp.errors import ExportError
from graphcomp.numerics.compare import floating_tensors, squared_error
from graphcomp.targets.onnxruntime.floats import Clips, Layer, described_layers, integer_layers, write_floats
from graphcomp.targets.onnxruntime.kernels import INTEGER_LAYERS, KernelProof
from graphcomp.targets.runtime import Args, feeds_of, open_session, run

SECONDS = 1.0
"""Time to spend on all files together, but for runs that no measurement goes without."""

FEWEST, MOST = 3, 30
"""Counted runs of each file."""

PAYS = 1.02
"""Layers are left in float where the file is faster by this factor: less is noise."""


LARGEST = 2**30
"""Bytes of the largest file that is timed, weights beside it included: float forms take several times as much."""

MOST_SHAPES = 16
"""Shapes of layers that are judged apart from their kind."""

NAMED = 8
"""Layers that a note names."""

FURTHER, NEAR, LOST = 4.0, 0.01, 1.0
"""How far the outputs of a form may be off those of the file: so many times as far as those of the float file, or this
relative error; and in no case as far as zeros are. A form rounds activations at other places than the file does; the
float file rounds none."""

Form: TypeAlias = frozenset[str] | None
"""Parts of the layers that are left in float; None: all, and nothing is quantized."""

EVERY: Form = frozenset()
"""All layers are on integers."""


@dataclass(frozen=True)
class Speed:
    """An integer file beside its float form, on the example inputs.

    Attributes:
        integer: layers on integer kernels.
        layers: all convolutions and matrix products.
        ms: median milliseconds of one run of the file.
        float_ms: the same of the float form: the same layers, with the same weights in float.
        threads: of one operator.
    """

    integer: int
    layers: int
    ms: float
    float_ms: float
    threads: int = 1

    @property
    def ratio(self) -> float:
        """How many times as fast as the float file."""
        return self.float_ms / self.ms

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.integer} of {self.layers} layers on integers, {self.ratio:.2f} x the float file ({threads})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "ratio": self.ratio, "line": str(self)}


@dataclass(frozen=True)
class Guarded:
    """What a guard found to be the fastest form of an integer file.

    Attributes:
        left: what is left in float: kinds of layers, and layers of other kinds; all kinds where the whole file is.
        note: what was left in float, and why, in words; "" where integers pay.
        ms, float_ms: medians of the form and of the float form.
        error: relative error of its outputs, beside those of the file on integers; NaN where no output is of floats.
    """

    left: tuple[str, ...]
    note: str
    ms: float
    float_ms: float
    error: float = 0.0


def side_by_side(
    files: Sequence[Path], args: Args, kwargs: Mapping[str, Any] | None = None, *, threads: int = 1
) -> list[float]:
    """Median milliseconds of each ONNX file in onnxruntime as users run the file by default; the files take turns.

    Args:
        args, kwargs: as of the module that the files come from.
        threads: of one operator.

    Raises:
        ExportError: onnxruntime is not installed, or cannot load a file.
    """
    sessions = [open_session(path, threads=threads) for path in files]
    feeds = [feeds_of(session, args, kwargs) for session in sessions]
    times: list[list[float]] = [[] for _ in files]
    end = time.perf_counter() + SECONDS
    for k in range(-1, MOST):  # the first run of each is not counted
        for session, feed, own in zip(sessions, feeds, times, strict=True):
            start = time.perf_counter()
            session.run(None, feed)
            if k >= 0:
                own.append(1e3 * (time.perf_counter() - start))
        if k + 1 >= FEWEST and time.perf_counter() > end:
            break
    return [statistics.median(own) for own in times]


def counted(proof: KernelProof) -> tuple[int, int]:
    """Return how many layers run on integer kernels, and how many convolutions and products there are."""
    integer = sum(count for name, count in proof.integer.items() if name in INTEGER_LAYERS)
    return integer, integer + sum(proof.float_.values())


def measured(
    path: Path, proof: KernelProof, args: Args, kwargs: Mapping[str, Any], clips: Clips | None = None
) -> Speed | None:
    """Time an ONNX file beside its float form; None where no layer of the file reads integers.

    Args:
        clips: see `write_floats`. None: those that are not known count as none, as they hardly take time.

    Raises:
        ExportError: the float form cannot be written, or does not run.
    """
    if not integer_layers(path):
        return None
    _check_size(path)
    with tempfile.TemporaryDirectory() as folder:
        floats = Path(folder) / path.name
        write_floats(path, floats, clips=clips or {})
        ms, float_ms = side_by_side([path, floats], args, kwargs)
    return Speed(*counted(proof), ms, float_ms)


def guard(path: Path, args: Args, kwargs: Mapping[str, Any], clips: Clips | None = None) -> Guarded | None:
    """Replace an ONNX file by its fastest form; None where no layer of the file reads integers.

    Forms are the file as it is, the float file, and the file with some layers in float: each kind of layers and, within
    a kind, layers of one shape (weight and attributes), which take equally long. Of shapes there are MOST_SHAPES at
    most, those with the largest weights; other layers go with their kind. What is faster by PAYS in the first
    measurement, what is faster at all, and the same of kinds alone are measured again, in turns with the file and the
    float file, and the fastest is taken. To write and load a form takes about as long as to load the file; two
    measurements take SECONDS each, or FEWEST runs of each form.

    The outputs of what is taken are compared with those of the file, with exact sums. A form that is FURTHER off than
    the float file is not taken: the file stays.

    Args:
        clips: see `write_floats`.

    Raises:
        ExportError: a form cannot be written, or does not run, or is further off.
    """
    layers = described_layers(path)
    if not layers:
        return None
    _check_size(path)
    with tempfile.TemporaryDirectory() as temporary:
        forms = _Forms(path, Path(temporary), layers, clips)
        tried = {None: forms.write(None), EVERY: path}
        tried |= {parts: forms.write(parts) for parts in forms.singles()}
        first = dict(zip(tried, side_by_side(list(tried.values()), args, kwargs), strict=True))
        again = {None: tried[None], EVERY: path}
        again |= {parts: tried.get(parts) or forms.write(parts) for parts in forms.better(first)}
        times = dict(zip(again, side_by_side(list(again.values()), args, kwargs), strict=True))
        best = min(times, key=lambda form: times[form])
        if best and times[best] * PAYS > times[EVERY]:
            best = EVERY
        if best == EVERY:
            return Guarded((), "", times[EVERY], times[None])
        error, of_floats = (_apart(path, again[form], args, kwargs) for form in (best, None))
        if error > max(FURTHER * of_floats, NEAR) or error > LOST:
            raise ExportError(
                f"the form of {path.name} that is fastest is not what the file is",
                why=f"its outputs are {error:.2g} off those of the file (relative), the float file's {of_floats:.2g}",
                fix="export without guard=True",
            )
        slower = times[EVERY] / times[best]
        _take(again[best], path)
    off = "" if math.isnan(error) else f"; the outputs move by {error:.1g} (relative)"
    if best is None:
        note = f"is left in float: on integers it took {slower:.2f} x as long (1 thread){off}"
        return Guarded(forms.kinds, note, times[None], times[None], error)
    left = forms.named(best)
    shown = [*left[:NAMED], *([f"{len(left) - NAMED} more layers"] if len(left) > NAMED else [])]
    listed = " and ".join([", ".join(shown[:-1]), shown[-1]] if shown[1:] else shown)
    note = f"has {listed} left in float: with all on integers it took {slower:.2f} x as long (1 thread){off}"
    return Guarded(left, note + forms.said(), times[best], times[None], error)


class _Forms:
    """Writes forms of an ONNX file in which some layers are in float, named by what these have in common.

    Attributes:
        kinds: of the layers.
        parts: kind, or layers of one shape within a kind -> their nodes.
        fine: parts by shape, and kinds without such.
        coarse: how many layers are judged with their kind alone.
    """

    def __init__(self, path: Path, folder: Path, layers: Mapping[str, Layer], clips: Clips | None) -> None:
        self.path, self.folder, self.layers, self.clips = path, folder, layers, clips
        self.kinds = tuple(dict.fromkeys(layer.kind for layer in layers.values()))
        self.parts = {kind: [n for n, layer in layers.items() if layer.kind == kind] for kind in self.kinds}
        shapes: dict[str, list[str]] = {}
        for node, layer in layers.items():
            shapes.setdefault(f"{layer.kind}: {layer.like}", []).append(node)
        fine = {like: nodes for like, nodes in shapes.items() if nodes not in self.parts.values()}
        size = max(sum(own.stat().st_size for own in path.parent.glob(f"{path.name}*")), 1)
        most = max(0, min(MOST_SHAPES, LARGEST // size))
        largest = sorted(fine, key=lambda like: -sum(layers[n].elements for n in fine[like]))[:most]
        self.parts |= {like: fine[like] for like in largest}
        divided = {layers[fine[like][0]].kind for like in largest}
        self.fine = (*largest, *(kind for kind in self.kinds if kind not in divided))
        self.coarse = sum(len(nodes) for like, nodes in fine.items() if like not in largest)

    def singles(self) -> list[Form]:
        """Return the forms with one part in float; of a file with one part that is the float file."""
        return [frozenset([part]) for part in self.parts] if len(self.parts) > 1 else []

    def better(self, times: Mapping[Form, float]) -> list[Form]:
        """Return what to measure again, given times of the file and of single parts: unions of parts that were faster,
        without those that are all there is."""
        now = times[EVERY]
        found, known = list[Form](), list[list[str]]()
        for parts, pays in ((self.fine, PAYS), (self.fine, 1.0), (self.kinds, PAYS)):
            form = frozenset(p for p in parts if times.get(frozenset([p]), now) * pays < now)
            nodes = self.nodes(form)
            if form and len(nodes) < len(self.layers) and nodes not in known:
                known.append(nodes)
                found.append(form)
        return found

    def nodes(self, form: frozenset[str]) -> list[str]:
        """Return the layers of a form that are in float."""
        chosen = {node for part in form for node in self.parts[part]}
        return [node for node in self.layers if node in chosen]

    def named(self, form: frozenset[str]) -> tuple[str, ...]:
        """Return what is in float: kinds of which all layers are, and the other layers."""
        left = self.nodes(form)
        whole = [kind for kind in self.kinds if set(self.parts[kind]) <= set(left)]
        return (*whole, *(self.layers[node].name for node in left if self.layers[node].kind not in whole))

    def said(self) -> str:
        """Say how many layers were judged with their kind alone."""
        return f"; {self.coarse} layers of other shapes were judged with their kind" if self.coarse else ""

    def write(self, form: Form) -> Path:
        """Write a form, and return the file."""
        made = self.folder / str(len(list(self.folder.iterdir())))
        made.mkdir()
        chosen = None if form is None else self.nodes(form)
        write_floats(self.path, made / self.path.name, chosen, self.clips)
        return made / self.path.name


def _apart(path: Path, form: Path, args: Args, kwargs: Mapping[str, Any]) -> float:
    """Return ||y - t|| / ||t||, t the floats that a file returns, y those of a form of the file; NaN where there are
    none."""
    wanted, found = (floating_tensors(run(file, args, kwargs)) for file in (path, form))
    error, norm = squared_error(wanted, found)
    return math.sqrt(error / norm) if norm else math.nan


def _check_size(path: Path) -> None:
    """Raise ExportError where the float form of a file would take more memory than may be there."""
    size = sum(own.stat().st_size for own in (path, path.with_name(f"{path.name}.data")) if own.exists())
    if size > LARGEST:
        raise ExportError(
            f"{path.name} is too large to be timed beside its float form",
            why=f"the file has {size / 2**30:.1f} GiB, and its float form takes several times as much memory",
            fix="graphcomp.targets.runtime.latency(path, feeds)",
        )


def _take(form: Path, path: Path) -> None:
    """Put a form, and the weights beside it, in the place of a file."""
    for own in form.parent.iterdir():
        (path.parent / own.name).write_bytes(own.read_bytes())
