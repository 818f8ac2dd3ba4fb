"""Weights and activations clipped before they are quantized, beside the same steps without the clips."""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks.claims.cases import Case
from benchmarks.claims.rows import COLUMNS, accuracy, row
from benchmarks.common import section, table
from graphcomp.methods.gdrq import Gdrq
from graphcomp.methods.qat import Qat

BITS = ((2, 4), (4, 4))
"""Bits of weights and of activations."""


def gdrq(case: Case, options: argparse.Namespace) -> None:
    """Compare reshaping with the same two stages without, and with quantization from the first step on."""
    in_floats = accuracy(case, case.model(0).eval())
    calibration = [next(iter(case.data))[0]]
    plain = partial(Gdrq, clip=None, activation_clip=None)
    rows = []
    for bits, activation_bits in BITS:
        run = partial(row, case, options=options, bits=bits, activation_bits=activation_bits, calibration=calibration)
        name = f"W{bits}A{activation_bits}"
        rows.append(run(f"{name}: reshaped, then quantized", Gdrq()))
        rows.append(run(f"{name}: reshaped, clip 3 of weights", Gdrq(clip=3.0)))
        rows.append(run(f"{name}: the same stages, not clipped", plain()))
        rows.append(run(f"{name}: quantized all along, not clipped", plain(reshape=0.0)))
        rows.append(run(f"{name}: reshaped in 90 % of the steps", Gdrq(reshape=0.9)))
        rows.append(run(f"{name}: the same stages, not clipped", plain(reshape=0.9)))
        rows.append(run(f"{name}: qat", Qat()))
        if options.short:
            break
    section(f"GDRQ, {case.name}; in floats {in_floats:.2f} %", table(COLUMNS, rows))
