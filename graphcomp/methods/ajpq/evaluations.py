"""Scores of plans that were evaluated: each once, and in a file that a search which was cut short goes on from.

The search draws from a seed, and what the search draws next follows from the scores. So a search that begins anew with
the scores of the file is, bit for bit, the search that was cut short. Several processes know the same scores, each the
mean over the processes; the first process alone reads and writes the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from graphcomp.errors import CheckpointError
from graphcomp.methods.ajpq.plan import ChannelPlan
from graphcomp.system.locks import lock_folder
from graphcomp.training import distributed

FILE = "search.jsonl"
"""In the folder of a run: what the search is of, then a line for each plan that was evaluated."""


class Evaluations:
    """Scores by plan, in memory and in the folder of the run.

    Attributes:
        known: key of a plan -> score; -inf where the loss was not finite.
        used: keys of the plans that were asked for here.

    Args:
        folder: of the run; None: nothing is written.
        about: what the search is of. A search goes on only where all of it is the same.

    Raises:
        CheckpointError: the folder holds another search, is used by another run, or cannot be written.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, str]) -> None:
        self.known: dict[str, float] = {}
        self.used: set[str] = set()
        self._held = ExitStack()
        self._path = None if folder is None or distributed.rank() else folder / FILE
        if folder is not None:
            self.known = distributed.from_first(lambda: self._open(folder, dict(about)))

    def close(self) -> None:
        """Let other runs use the folder."""
        self._held.close()

    def __call__(self, plan: ChannelPlan, evaluate: Callable[[ChannelPlan], float]) -> float:
        """Return the score of a plan, which is evaluated where the score is not known."""
        self.used.add(plan.key)
        if plan.key not in self.known:
            score = _mean(evaluate(plan))
            self.known[plan.key] = score if math.isfinite(score) else -math.inf
            self._write({"plan": plan.key, "score": score if math.isfinite(score) else None})
        return self.known[plan.key]

    def _open(self, folder: Path, about: dict[str, str]) -> dict[str, float]:
        """Return the scores of the file, which is made where there is none."""
        assert self._path is not None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder, wait=False)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written", why=str(error), fix="another folder") from error
        if lock is None:
            raise CheckpointError(
                f"another run is at work in {folder}",
                why="a process, or a thread of this one, holds the lock of the folder",
                fix="give another folder, or wait for that run to end",
            )
        self._held.enter_context(lock)
        lines = self._lines()
        if lines and lines[0].get("about") != about:
            there = lines[0].get("about") or {}
            other = [name for name in {**there, **about} if there.get(name) != about.get(name)]
            self.close()
            raise CheckpointError(
                f"{folder} holds another search",
                why="; ".join(f"{name}: {there.get(name)} there, {about.get(name)} now" for name in other),
                fix="give another folder, or the arguments of that search to go on with it",
            )
        fresh = self._path.with_suffix(".new")  # without a last line that was cut short
        fresh.write_text("".join(json.dumps(line) + "\n" for line in lines or [{"about": about}]), encoding="utf-8")
        os.replace(fresh, self._path)
        return {line["plan"]: -math.inf if line["score"] is None else line["score"] for line in lines[1:]}

    def _lines(self) -> list[dict[str, Any]]:
        """Return the whole lines of the file."""
        assert self._path is not None
        if not self._path.exists():
            return []
        found = []
        for text in self._path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(text))
            except ValueError:  # the process ended in the middle of the line
                break
        return found

    def _write(self, line: Mapping[str, object]) -> None:
        if self._path is not None:
            with self._path.open("ab", buffering=0) as file:
                file.write((json.dumps(line) + "\n").encode())  # one write: whole, or not there


def _mean(score: float) -> float:
    """Return the mean over processes."""
    scores: list[float] = distributed.gathered(score)
    return sum(scores) / len(scores)
