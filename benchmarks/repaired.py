"""Repair on the shared zoo: layers solved, layers left and why, and how far outputs are from those before the cut.

    python -m benchmarks.repaired                                # every model: about an hour on a quiet core
    python -m benchmarks.repaired --families hf --json repaired.jsonl --resume

Of each model a fifth of the units goes, the smallest first, and the layers behind are repaired on eight batches of
random inputs. The repaired model is then a cut like any other: sliced must equal masked. The error of the outputs is
that of one more batch, relative. Weights are random, so that the errors tell of the regression, not of accuracy. Each
model runs in a process of its own, on one thread.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import graphcomp as gc
from benchmarks.common import brief, section, table, timed
from benchmarks.over_zoo import Row, by_family, parser_of, rows_of
from graphcomp.flows.one_shot import cut_groups
from graphcomp.flows.repaired import repaired
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.numerics.compare import relative_error
from graphcomp.pruning.allocation import allocate
from graphcomp.pruning.saliency import score
from graphcomp.torch_compat import pytree

SECONDS = 900
SPARSITY = 0.2
BATCHES = 8
WIDER = 1.0 + 1e-9
"""A residual may grow by so much: the rounding of a sum in float64."""


def main() -> None:
    report(rows_of(parser_of(__doc__).parse_args(), laws, _line, seconds=SECONDS))


@torch.no_grad()
def laws(case: Any) -> Row:
    """Cut and repair one model."""
    stage = "analyze"
    try:
        model, args, kwargs = case.build()
        plan = gc.analyze(model, args, kwargs)
        groups = gc.prunable_groups(plan)
        kept = allocate(groups, score("l2", plan, groups), sparsity=SPARSITY)
        stage = "cut"
        with timed() as cutting:
            cut = cut_groups(plan, kept, groups, verify=True)
        generator = torch.Generator().manual_seed(0)
        other = [pytree.tree_map(lambda t: another(t, generator), (args, kwargs)) for _ in range(BATCHES + 1)]
        flat = [plan.captured.inputs.of(*inputs).flat() for inputs in other]
        stage = "repair"
        with timed() as clock:
            mended = repaired(cut, flat[:-1], verify=True)
        stage = "compare"
        errors = outputs_off(plan, cut, mended, flat[-1]) if cut.graph is not None else []
    except Exception as error:
        return {"failure": f"{stage}: {brief(error)}"}
    layers = mended.repaired
    grown = [name for name, layer in layers.items() if not layer.after <= layer.before * WIDER]
    return {
        **({"failure": f"the error of {grown[0]} grew"} if grown else {}),
        "solved": sum(not math.isinf(layer.ridge) for layer in layers.values()),
        "as they were": sum(math.isinf(layer.ridge) for layer in layers.values()),
        "notes": [note for note in mended.notes if "not repaired" in note],
        "outputs": errors,
        "seconds": clock.seconds,
        "cutting": cutting.seconds,
    }


def another(value: Any, generator: torch.Generator) -> Any:
    """Return a tensor like `value`: floats of the same mean and spread, the elements of others in another order."""
    if not isinstance(value, Tensor) or value.numel() < 2:
        return value
    if value.is_floating_point() and value.is_contiguous():
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        return value.mean() + noise * value.std()
    return value.flatten()[torch.randperm(value.numel(), generator=generator)].view(value.shape)


def outputs_off(plan: gc.Analysis, cut: Any, mended: Any, inputs: Sequence[Any]) -> list[float]:
    """Relative error of the outputs as they are cut, and repaired."""
    wanted, sliced, found = (run_tapped(module, inputs) for module in (plan.captured.module, cut.graph, mended.graph))
    return [relative_error(wanted, sliced), relative_error(wanted, found)]


def _line(row: Row) -> str:
    off = "outputs {:.2f} -> {:.2f} off".format(*row["outputs"]) if row["outputs"] else "no graph"
    left = "; ".join(note.removeprefix("not repaired, as ")[:90] for note in row["notes"])
    return f"{row['solved']} repaired, {off}, {row['seconds']:.1f} s {left}"


def report(rows: Sequence[Row]) -> None:
    """One line per family, and the reasons."""
    lines = []
    for family, models, good, _ in by_family(rows):
        with_outputs = [row["outputs"] for row in good if row["outputs"]]
        nearer = sum(after <= before for before, after in with_outputs)
        solved = sum(row["solved"] > 0 for row in good)
        layers = sum(row["solved"] for row in good)
        times = sorted(row["seconds"] for row in good) or [float("nan")]
        lines.append([
            family, models, len(good), solved, layers, f"{nearer} of {len(with_outputs)}",
            f"{times[len(times) // 2]:.0f}", f"{times[-1]:.0f}",
        ])  # fmt: skip
    columns = [
        "family", "models", "no residual grew", "some repaired", "layers", "outputs nearer", "s, median", "s, most"
    ]  # fmt: skip
    section("Repaired on random inputs", table(columns, lines))
    reasons = Counter(
        note.removeprefix("not repaired, as ").split(":")[0] for row in rows for note in row.get("notes", [])
    )
    section("Not repaired, by reason", table(["reason", "models"], [[why, n] for why, n in reasons.most_common()]))


if __name__ == "__main__":
    main()
