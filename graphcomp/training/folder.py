"""The folder of a training run: checkpoints to go on from, and what was measured, one JSON object per line."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphcomp.errors import CheckpointError
from graphcomp.system.locks import lock_folder
from graphcomp.torch_compat import pytree

logger = logging.getLogger("graphcomp.folder")

FORMAT = 1
"""Of the checkpoints."""

METRICS = "metrics.jsonl"
INITIAL = "initial weights"
LOSS_CODE = "code of the loss"
MAY_CHANGE = {INITIAL: "other weights", LOSS_CODE: "other code of the loss"}
"""Entries of `about` that may be others where a run goes on, with a warning; a run that has ended refuses them."""
METHOD = "method"
LATER = frozenset({LOSS_CODE, METHOD})
"""Entries of `about` that folders of earlier versions lack; a run that lacks one is not told apart by it."""
FORMER = frozenset({"sparsity", "budget", "saliency", "forgetting", "round_to", "schedule"})
"""Entries of `about` that earlier versions wrote for methods without such an option, too."""
NOTHING = str(None)
"""Text of an entry that asks for nothing, as an entry that is not there does."""
CHECKPOINT = re.compile(r"step-(\d+)\.pt")
"""Copies of other names, such as step-best.pt, are the user's."""


class RunFolder:
    """Where one run is kept.

    Files appear whole or not at all, and a line of metrics is written at once, so that the folder can be gone on from
    whenever the process ends. The folder is locked until `close`, or until the process ends: two runs in one folder
    would write over each other.

    Args:
        path: made where it is not there.
        about: what the run is: name -> text. A run goes on only where all of it is the same; but for `INITIAL` where
            it was cut short: a model that was drawn anew is trained no further by refusing it. Likewise the code of
            the loss, with a warning.
        steps: of the whole run.
        keep: so many checkpoints stay, the newest.

    Raises:
        CheckpointError: the folder cannot be made, or another run is at work in it.
    """

    def __init__(self, path: str | Path, about: Mapping[str, str], steps: int, keep: int) -> None:
        self.path, self.about, self.steps, self.keep = Path(path), dict(about), steps, keep
        self._readable = False  # what is written: known after the first checkpoint
        with _written(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.path, wait=False)
        if self._lock is None:
            raise CheckpointError(
                f"another run is at work in {self.path}",
                why="a process, or a thread of this one, holds the lock of the folder",
                fix="give another folder, or wait for that run to end; a run that was killed holds no lock",
            )
        if not self._lock.held:
            logger.warning("%s cannot be locked on this file system: let one run alone use the folder", self.path)

    def close(self) -> None:
        """Let other runs use the folder."""
        if self._lock is not None:
            self._lock.release()

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock, which the process keeps that took it: the others of a distributed run only read paths."""
        return {**vars(self), "_lock": None}

    def newest(self) -> Path | None:
        """The checkpoint of the latest step."""
        return next(reversed(self._checkpoints()), None)

    def _checkpoints(self) -> list[Path]:
        """In the order of their steps."""
        found = [(CHECKPOINT.fullmatch(path.name), path) for path in self.path.glob("step-*.pt")]
        return [path for _, path in sorted((int(name[1]), path) for name, path in found if name)]

    def load(self) -> dict[str, Any] | None:
        """What the newest checkpoint holds, with tensors on the CPU; None where there is none. Metrics of later steps
        are dropped.

        Raises:
            CheckpointError: it cannot be read, or is of another run.
        """
        path = self.newest()
        state = None if path is None else self._read(path)
        self._drop_metrics(0 if state is None else state["step"])
        return state

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:  # torch itself does not look
                    raise ValueError(f"{damaged} in it is damaged")
            state: Any = _loaded(path)
        except Exception as error:  # there is none that a damaged file may not end in
            raise CheckpointError(
                f"the checkpoint {path} cannot be read",
                why=f"{type(error).__name__}: {str(error)[:200]}",
                fix="remove it: the run goes on from the one before",
            ) from error
        if not _is_checkpoint(state):
            raise CheckpointError(
                f"{path} is no checkpoint that this graphcomp knows", fix="remove it, or give another folder"
            )
        there = state["about"]
        former = FORMER - self.about.keys() if METHOD not in there else frozenset()
        names = [*self.about, *(name for name in there if name not in self.about and name not in former)]
        compared = [name for name in names if name in there or name not in LATER]
        both = {name: (there.get(name, NOTHING), self.about.get(name, NOTHING)) for name in compared}
        differing = [name for name, (before, now) in both.items() if before != now]
        if differing and set(differing) <= MAY_CHANGE.keys() and state["step"] < self.steps:
            other = " and ".join(MAY_CHANGE[name] for name in differing)
            logger.warning("%s goes on from step %d, though it began with %s", path.parent, state["step"], other)
            self.about = {**there, **{name: self.about[name] for name in LATER & self.about.keys()}}
        elif differing:
            raise CheckpointError(
                f"{self.path} holds another run",
                why="; ".join(f"{name}: {both[name][0]} there, {both[name][1]} now" for name in differing),
                fix="give another folder, or the arguments of that run to go on with it",
            )
        found: dict[str, Any] = state
        return found

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint, and remove those that are too many. The first one is read back.

        Raises:
            CheckpointError: it cannot be written, or holds what cannot be read.
        """
        path = self.path / f"step-{step:09d}.pt"
        fresh = path.with_suffix(".new")
        with _written(path):
            with _storable(fresh), fresh.open("wb") as file:
                torch.save({"format": FORMAT, "about": self.about, "step": step, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            if not self._readable:
                with _storable(fresh):
                    _loaded(fresh)
                self._readable = True
            os.replace(fresh, path)
            for old in [*self._checkpoints()[: -self.keep], *self.path.glob("step-*.new")]:
                old.unlink()

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line to the metrics.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = self.path / METRICS
        with _written(path), path.open("ab", buffering=0) as file:
            file.write((json.dumps(line) + "\n").encode())  # one write: whole, or not there

    def _drop_metrics(self, step: int) -> None:
        path = self.path / METRICS
        if not path.exists():
            return
        lines = [line for line in read_metrics(path) if line["step"] <= step]
        fresh = path.with_suffix(".new")
        with _written(path):
            fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            os.replace(fresh, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of metrics; a last one that is not finished (the disk was full) is left out.

    Raises:
        CheckpointError: there is none, or it holds something else.
    """
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        found = [json.loads(line) for line in lines]
        if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in found):
            raise ValueError("a line has no step")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} holds no metrics",
            why=f"{type(error).__name__}: {error}",
            fix="remove it: a run goes on without what was measured before",
        ) from error
    return found


def plain(value: Any) -> Any:
    """`value` with Python's numbers in place of NumPy's, at any depth: checkpoints are read without NumPy's classes."""

    def number(leaf: Any) -> Any:
        return leaf.item() if isinstance(leaf, (np.generic, np.ndarray)) and leaf.ndim == 0 else leaf

    return pytree.tree_map(number, value)


def _loaded(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_checkpoint(state: Any) -> bool:
    return (
        isinstance(state, dict)
        and state.get("format") in range(1, FORMAT + 1)
        and isinstance(state.get("about"), dict)
        and isinstance(state.get("step"), int)
    )


@contextmanager
def _storable(path: Path) -> Iterator[None]:
    """Refuse a state that cannot be written to `path`, or be read from it; the file goes."""
    try:
        yield
    except (pickle.PickleError, AttributeError, TypeError) as error:
        path.unlink(missing_ok=True)
        reason = str(error).rpartition("WeightsUnpickler error: ")[2]  # behind torch's advice to trust the file
        raise CheckpointError(
            "the state of the run cannot be kept in a checkpoint",
            why=f"{type(error).__name__}: {reason[:300]}",
            fix="an optimizer and a scheduler whose state_dict() holds numbers, text and tensors, or no folder",
        ) from error


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}",
            why=f"{type(error).__name__}: {error}",
            fix="give a folder you may write to, on a disk with room",
        ) from error


# ------------------------------------------------------------------------------------------------ random states
def generators_of(data: Any) -> list[torch.Generator]:
    """The generators that a DataLoader draws from besides the global ones: its own, and its samplers'."""
    batch_sampler = getattr(data, "batch_sampler", None)
    owners = (data, getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def random_state(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """The states of torch (CUDA too where it is in use), Python, NumPy and `generators`, as plain data and tensors."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "python": [version, list(internal), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_state(state: Mapping[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Go back to what `random_state` gave; `generators` in the same order, or none to leave them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    for generator, own in zip(generators, state["generators"], strict=False):
        generator.set_state(own)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside; outside, the global states are as they were."""
    before = random_state()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        set_random_state(before)
