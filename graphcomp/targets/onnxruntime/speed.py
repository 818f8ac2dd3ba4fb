"""Never slower: time an integer file beside its float form, and leave in float what does not pay on integers.

Files take turns, so that ratios hold whatever else the machine does; medians over a small budget of time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from graphcomp.errors import ExportError
from graphcomp.targets.onnxruntime.floats import Clips, integer_layers, write_floats
from graphcomp.targets.onnxruntime.kernels import INTEGER_LAYERS, KernelProof
from graphcomp.targets.runtime import Args, feeds_of, open_session

SECONDS = 1.0
"""Time to spend on all files together, but for runs that no measurement goes without."""

FEWEST, MOST = 3, 30
"""Counted runs of each file."""

PAYS = 1.02
"""A kind of layers is left in float where the file is faster by this factor: less is noise."""


LARGEST = 2**30
"""Bytes of the largest file that is timed, weights beside it included: float forms take several times as much."""

Form: TypeAlias = tuple[str, ...] | None
"""Kinds of layers that are left in float; None: all, and nothing is quantized."""


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
        left: kinds of layers that are left in float; all kinds where the whole file is.
        note: what was left in float, and why, in words; "" where integers pay.
        ms, float_ms: medians of the form and of the float form.
    """

    left: tuple[str, ...]
    note: str
    ms: float
    float_ms: float


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

    Forms are the file as it is, each kind of layers left in float, all kinds left in float that pay so, and the float
    file. What is chosen by one measurement is measured again with what it replaces.

    Args:
        clips: see `write_floats`.

    Raises:
        ExportError: a form cannot be written, or does not run.
    """
    kinds = integer_layers(path)
    if not kinds:
        return None
    _check_size(path)
    every = tuple(dict.fromkeys(kinds.values()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        floats = _form(path, folder, kinds, None, clips)
        single: dict[Form, Path] = {}
        if len(every) > 1:
            single = {(kind,): _form(path, folder, kinds, (kind,), clips) for kind in every}
        tried: dict[Form, Path] = {None: floats, (): path, **single}
        first = dict(zip(tried, side_by_side(list(tried.values()), args, kwargs), strict=True))
        pays = tuple(kind for kind in every if first.get((kind,), first[()]) * PAYS < first[()])
        forms: dict[Form, Path] = {None: floats, (): path}
        if pays and pays != every:
            forms[pays] = single.get(pays) or _form(path, folder, kinds, pays, clips)
        again = dict(zip(forms, side_by_side(list(forms.values()), args, kwargs), strict=True))
        best = min(again, key=lambda form: again[form])
        if best is not None and best and again[best] * PAYS > again[()]:
            best = ()
        if best == ():
            return Guarded((), "", again[()], again[None])
        slower = again[()] / again[best]
        _take(forms[best], path)
    if best is None:
        note = f"is left in float: on integers it took {slower:.2f} x as long (1 thread)"
        return Guarded(every, note, again[None], again[None])
    note = f"has {' and '.join(best)} left in float: with all on integers it took {slower:.2f} x as long (1 thread)"
    return Guarded(best, note, again[best], again[None])


def _check_size(path: Path) -> None:
    """Raise ExportError where the float form of a file would take more memory than may be there."""
    size = sum(own.stat().st_size for own in (path, path.with_name(f"{path.name}.data")) if own.exists())
    if size > LARGEST:
        raise ExportError(
            f"{path.name} is too large to be timed beside its float form",
            why=f"the file has {size / 2**30:.1f} GiB, and its float form takes several times as much memory",
            fix="graphcomp.targets.runtime.latency(path, feeds)",
        )


def _form(path: Path, folder: Path, kinds: Mapping[str, str], left: Iterable[str] | None, clips: Clips | None) -> Path:
    """Write the form of a file with kinds of layers left in float; None: all, and nothing is quantized."""
    made = folder / str(len(list(folder.iterdir())))
    made.mkdir()
    chosen = None if left is None else [name for name, kind in kinds.items() if kind in tuple(left)]
    write_floats(path, made / path.name, chosen, clips)
    return made / path.name


def _take(form: Path, path: Path) -> None:
    """Put a form, and the weights beside it, in the place of a file."""
    for own in form.parent.iterdir():
        (path.parent / own.name).write_bytes(own.read_bytes())
