"""Weights and activations clipped before they are quantized, beside the same steps without the clips."""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks.claims.cases import Case
from benchmarks.claims.rows import COLUMNS, accuracy, chosen, row
from benchmarks.common import section, table
from graphcomp.methods.base import Method
from graphcomp.methods.gdrq import Gdrq
from graphcomp.methods.qat import Qat

BITS = ((2, 4), (4, 4))
"""Bits of weights and of activations."""


def gdrq(case: Case, options: argparse.Namespace) -> None:
    """Compare reshaping with the same two stages without, and with quantization from the first step on."""
    in_floats = accuracy(case, case.model(0).eval())
    calibration = [next(iter(case.data))[0]]
    plain = partial(Gdrq, clip=None, activation_clip=None)
    rows: list[list[str]] = []
    for bits, activation_bits in BITS:
        run = partial(row, case, options=options, bits=bits, activation_bits=activation_bits, calibration=calibration)
        name = f"W{bits}A{activation_bits}"
        methods: dict[str, Method] = {
            "reshaped, then quantized": Gdrq(),
            "reshaped, clip 3 of weights": Gdrq(clip=3.0),
            "the same stages, not clipped": plain(),
            "quantized all along, not clipped": plain(reshape=0.0),
            "reshaped in 90 % of the steps": Gdrq(reshape=0.9),
            "90 % in floats, not clipped": plain(reshape=0.9),
            "qat": Qat(),
        }
        rows += [run(f"{name}: {what}", method) for what, method in methods.items() if chosen(options, what)]
        if options.short:
            break
    section(f"GDRQ, {case.name}; in floats {in_floats:.2f} %", table(COLUMNS, rows))
