"""A plan from the weights alone, at the C0 bytes of a uniform one, then fine-tuned with the plan fixed."""

from __future__ import annotations

import argparse
from functools import partial

from torch import nn

from benchmarks import common
from benchmarks.claims.cases import Case
from benchmarks.claims.rows import COLUMNS, accuracy, row
from benchmarks.common import section, table
from graphcomp.methods.opq import Opq
from graphcomp.pruning.analytic import analytic_masks
from graphcomp.quantization.analytic import step_errors, whole_bits

BITS = range(2, 9)


def opq(case: Case, options: argparse.Namespace) -> None:
    """Compare plans at equal C0 bytes."""
    model = case.model(0).eval()
    seconds, weights = plan_seconds(model)
    rows = []
    for sparsity, bits in ((0.7, 3), (0.85, 3), (0.7, 4)):
        run = partial(row, case, options=options, sparsity=sparsity)
        name = f"{sparsity:.0%} pruned, {bits} bits"
        rows.append(run(f"{name}: uniform", Opq(omega="size_energy"), bits=bits))
        rows.append(run(f"{name}: OPQ", Opq(mean_bits=bits), bits=(BITS[0], BITS[-1])))
        total = Opq(mean_bits=bits, omega="total", density="empirical")
        rows.append(run(f"{name}: OPQ, errors of all weights", total, bits=(BITS[0], BITS[-1])))
        if options.short:
            break
    for share in (0.3,):
        rows.append(row(case, f"{share:.0%} of the units, 4 bits", Opq(per="unit"), options, sparsity=share, bits=4))
    title = f"OPQ, {case.name}; in floats {accuracy(case, model):.2f} %; plan of {weights:,} weights in {seconds:.2f} s"
    section(title, table(COLUMNS, rows))


def plan_seconds(model: nn.Module) -> tuple[float, int]:
    """CPU seconds that a plan takes, and of how many weights."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}
    with common.timed() as clock:
        masks = analytic_masks(weights, 0.7)
        left = [weight.masked_fill(~masks[name], 0) for name, weight in weights.items()]
        counts = [int(mask.sum()) for mask in masks.values()]
        errors = [[error / max(n, 1) for _, error in step_errors(w, BITS)] for w, n in zip(left, counts, strict=True)]
        whole_bits(counts, errors, BITS, 3 * sum(counts))
    return clock.seconds, sum(weight.numel() for weight in weights.values())
