"""Bits per channel with 0 among them, beside pruning at one number of bits and bits alone, at an equal budget."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from typing import Any

import graphcomp as gc
from benchmarks.claims.cases import Case
from benchmarks.claims.rows import accuracy, chosen, loss_of, stored
from benchmarks.common import append_json, section, table
from graphcomp.methods.ajpq.method import Ajpq

IMAGES, REPAIRED = 500, 64
"""Images of the search, and how many of these plans are repaired on; plans are scored on the others."""
BUDGETS = {"bit operations": gc.Budget(bops=0.02), "bytes": gc.Budget(bytes=0.08)}
"""Shares of the model in floats; 2 bits and activations of 8 bits are 1.56 % of the bit operations, 3 bits 2.34 %."""


@dataclass(frozen=True)
class Kind:
    """One row: what is asked, of how many plans, and whether a seed says anything.

    Attributes:
        asked: options of `compress`.
        plans: of the search; None: as many as the command says; 1: the uniform plan that a search begins at.
        limits: which budgets the row stands under.
    """

    name: str
    asked: dict[str, Any] = field(default_factory=dict)
    plans: int | None = None
    limits: tuple[str, ...] = tuple(BUDGETS)

    @property
    def drawn(self) -> bool:
        """Whether a seed says anything."""
        return self.plans is None


KINDS = (
    Kind("AJPQ: 0, or 2 to 8 bits", {"bits": (2, 8)}),
    Kind("bits alone: 2 to 8 bits", {"bits": (2, 8), "sparsity": 0}),
    Kind("0 or 3 bits", {"bits": 3}),
    Kind("0 or 4 bits", {"bits": 4}),
    Kind("uniform bits, not searched", {"bits": (2, 8), "sparsity": 0}, plans=1),
    Kind("magnitude cut, then 3 bits", {"bits": 3}, plans=1),
    Kind("magnitude cut, then 4 bits", {"bits": 4}, plans=1),
    Kind("allocation: bits per layer, one shot", {"bits": (2, 8), "method": "oneshot"}, 0, ("bit operations",)),
)
COLUMNS = [
    "what", "% of test", "bit operations", "MACs", "units gone", "C0, kB", "C4, kB", "folder, kB", "loss of the search",
    "CPU s",
]  # fmt: skip


def ajpq(case: Case, options: argparse.Namespace) -> None:
    """Compare searches of equally many plans, and what needs no search, without training."""
    in_floats = accuracy(case, case.model(0).eval())
    for limit, budget in list(BUDGETS.items())[: 1 if options.short else None]:
        kinds = [kind for kind in KINDS if limit in kind.limits and chosen(options, kind.name)]
        rows = [_row(case, kind, budget, options) for kind in kinds]
        section(f"AJPQ, {case.name}, {budget}, not trained; in floats {in_floats:.2f} %", table(COLUMNS, rows))


def _row(case: Case, kind: Kind, budget: gc.Budget, options: argparse.Namespace) -> list[str]:
    """Return a row: accuracies and losses by seed, means of all else."""
    runs = [_run(case, kind, budget, options, seed) for seed in range(options.seeds if kind.drawn else 1)]
    mean = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
    by_seed = {name: " ".join(f"{run[name]:.{places}f}" for run in runs) for name, places in _BY_SEED.items()}
    sizes = [f"{mean[name] / 1000:.1f}" for name in ("C0", "C4", "folder")]
    gone = " ".join(f"{run['gone']:.0f}" for run in runs)
    return [
        kind.name, by_seed["accuracy"], f"{mean['bops']:.2%}", f"{mean['macs']:.1%}", gone, *sizes, by_seed["loss"],
        f"{mean['seconds']:.0f}",
    ]  # fmt: skip


_BY_SEED = {"accuracy": 2, "loss": 3}


def _run(case: Case, kind: Kind, budget: gc.Budget, options: argparse.Namespace, seed: int) -> dict[str, float]:
    images, labels = case.data.images[:IMAGES], case.data.labels[:IMAGES]  # type: ignore[attr-defined]
    asked: dict[str, Any] = {"method": Ajpq(evaluations=kind.plans or options.plans), **kind.asked}
    if asked["method"] == "oneshot":
        asked["calibration"] = [images]
    else:
        asked |= {
            "calibration": [images[:REPAIRED]], "data": [(images[REPAIRED:], labels[REPAIRED:])], "loss": loss_of
        }  # fmt: skip
    start = time.process_time()
    small = gc.compress(
        case.model(seed), images[:2], budget=budget, activation_bits=8, seed=seed, progress=False, **asked
    )
    seconds, report = time.process_time() - start, small.report
    scores = [float(note.rsplit(" ", 1)[1]) for note in report.notes if "best score" in note]
    c0, c4, _, folder, _ = stored(small)
    assert report.bops is not None and report.units_removed is not None
    found = {
        "accuracy": accuracy(case, small), "bops": report.bops.ratio, "macs": report.macs.ratio, "C0": c0, "C4": c4,
        "folder": folder, "gone": float(report.units_removed), "loss": -scores[0] if scores else float("nan"),
        "seconds": seconds,
    }  # fmt: skip
    append_json(options.json, {"case": case.name, "budget": str(budget), "what": kind.name, "seed": seed, **found})
    return found
