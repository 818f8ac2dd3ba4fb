"""What the benchmarks share: the header with machine and commit, tables, the shared folder, bounded processes."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

CHECKOUT = Path(__file__).resolve().parents[1]
WALL_PER_CPU_SECOND = 10  # a bounded process may wait this much longer than it computes, on a busy machine
GIB = 2**30


# ------------------------------------------------------------------------------------------------ the machine
def header() -> str:
    """Machine, versions, threads and commit, in one line."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    return f"{_processor()}, {os.cpu_count()} cores; {versions}; {threads}; commit {commit()}"


def commit() -> str:
    """The checkout's commit, with '+' where the working tree differs from it."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--", "graphcomp", "benchmarks") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(CHECKOUT), *arguments]
    return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ------------------------------------------------------------------------------------------------ the shared folder
def shared(*parts: str) -> Path:
    """A file of the folder `shared` beside the checkout, or in it. Ends the program with a message if it is absent."""
    for root in (CHECKOUT.parent / "shared", CHECKOUT / "shared"):
        path = root.joinpath(*parts)
        if path.exists():
            return path
    print(f"skipped: needs shared/{'/'.join(parts)} beside the checkout, which is not there")
    raise SystemExit(0)


def shared_module(*parts: str) -> ModuleType:
    """Import a Python file of the shared folder, such as ("zoo.py",)."""
    path = shared(*parts)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)


def import_torchvision() -> None:
    """Before transformers, which imports torchvision where there is one: it does not always fit a CPU-only torch."""
    from tests.vision import import_torchvision

    with suppress(ImportError):
        import_torchvision()


# ------------------------------------------------------------------------------------------------ tables
def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, aligned: columns of numbers to the right."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *(len(line[k]) for line in [list(columns), *cells])) for k in range(len(columns))]
    right = [
        all(row[k][:1].isdigit() or row[k].startswith(("–", "-", "nan")) for row in cells) for k in range(len(columns))
    ]
    rule = ["-" * (width - r) + ":" * r for width, r in zip(widths, right, strict=True)]
    return "\n".join(_line(line, widths, right) for line in [list(columns), rule, *cells])


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    aligned = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
    return f"| {' | '.join(aligned)} |"


def section(title: str, body: str) -> None:
    """Print a table under a title."""
    print(f"\n### {title}\n\n{body}", flush=True)


def cell(value: Any, digits: int = 3) -> str:
    """Return a value as a cell of a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def percent(ratio: float, digits: int = 1) -> str:
    """0.5 as '50.0 %'."""
    return f"{100 * ratio:.{digits}f} %"


def append_json(path: Path | None, row: Mapping[str, Any]) -> None:
    """Add one line of JSON to a file, so that an interrupted run keeps what it has."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_json(path: Path) -> list[dict[str, Any]]:
    """The lines that `append_json` wrote; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


# ------------------------------------------------------------------------------------------------ time and memory
@dataclass
class Clock:
    """CPU seconds of this process between entering and leaving `timed`."""

    seconds: float = 0.0


@contextmanager
def timed() -> Iterator[Clock]:
    """CPU time rather than wall time, so that other work on the machine does not count."""
    clock, start = Clock(), time.process_time()
    yield clock
    clock.seconds = time.process_time() - start


def best_of(times: int, function: Callable[[], Any]) -> float:
    """Fewest CPU seconds of several calls."""
    found = []
    for _ in range(times):
        with timed() as clock:
            function()
        found.append(clock.seconds)
    return min(found)


def peak_memory() -> float:
    """Largest resident size of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


# ------------------------------------------------------------------------------------------------ bounded processes
@dataclass(frozen=True)
class Outcome:
    """What a bounded call came to: its value, or why there is none."""

    value: Any = None
    error: str = ""


def bounded(function: Callable[..., Any], *arguments: Any, seconds: int, fresh: bool = False) -> Outcome:
    """Call `function` in a process of its own and stop it after that many CPU seconds.

    Args:
        function: returns plain data. Needs to be importable where `fresh`.
        fresh: start a new interpreter (for peak memory) instead of forking this one (quick).
    """
    context = multiprocessing.get_context("spawn" if fresh else "fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, seconds, function, arguments))
    process.start()
    sender.close()
    value: Any = None
    if receiver.poll(seconds * WALL_PER_CPU_SECOND):
        with suppress(EOFError):  # the process ended without a word
            value = receiver.recv()
        process.join(10)
    if process.is_alive():
        process.kill()
        process.join()
    return value if isinstance(value, Outcome) else Outcome(error=_ended(process.exitcode, seconds))


def _ended(code: int | None, seconds: int) -> str:
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"stopped after {seconds} s"
    return f"the process ended with status {code}"


def _call(sender: Any, seconds: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, used + seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        outcome = Outcome(function(*arguments))
    except BaseException as error:
        outcome = Outcome(error=brief(error))
        if os.environ.get("BENCHMARK_TRACEBACK"):
            traceback.print_exc()
    sender.send(outcome)
    sender.close()


def brief(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' / '.join(lines[:3])[:300]}"
