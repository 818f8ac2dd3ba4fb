"""Law 3 on the shared zoo: cut, quantize, lower, and compare the integers with the fake-quant graph.

    python -m benchmarks.integers                               # every model that can be exported: an hour on two cores
    python -m benchmarks.integers --families hf --bits 4
    python -m benchmarks.integers --json law3.jsonl --resume    # go on where it was stopped

Each model is cut at unequal random sparsities, calibrated on its example inputs and lowered. Weights must be equal bit
for bit and each quantized activation within one step of the fake-quant graph's, on the operands that that graph has
there. Each model runs in a process of its own, on one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import brief, section, table, timed
from benchmarks.over_zoo import Row, by_family, parser_of, rows_of
from graphcomp.capture.capture import capture
from graphcomp.coupling.analysis import analyze_captured
from graphcomp.pruning.slice import SliceGroups
from graphcomp.quantization.ptq import PostTraining, quantize
from graphcomp.quantization.spec import ACTIVATIONS, WEIGHTS, QuantConfig
from graphcomp.quantization.verify import check_lowering
from graphcomp.testing import random_kept

SECONDS = 600


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--bits", type=int, default=8, help="of weights and activations (default: 8)")
    options = parser.parse_args()
    report(rows_of(options, law_3, _line, options.bits, seconds=SECONDS))


def law_3(case: Any, bits: int) -> Row:
    """Cut and quantize one model; the largest differences."""
    model, args, kwargs = case.build()
    analysis = analyze_captured(capture(model, args, kwargs))
    captured = analysis.captured
    kept = random_kept(analysis.groups, torch.Generator().manual_seed(0), (0.3, 0.9))
    small = SliceGroups(analysis.coupling, kept)(captured.module)
    config = QuantConfig(replace(WEIGHTS, bits=bits), replace(ACTIVATIONS, bits=bits))
    flat = captured.inputs.flat()
    try:
        with timed() as clock:
            quantized = quantize(replace(captured, module=small), [flat], PostTraining(config))
        error = check_lowering(quantized.fake, quantized.lowered, flat)
    except Exception as error_:
        return {"failure": brief(error_)}
    layers = quantized.lowered.layers
    return {
        "weights": error.weights,
        "steps": error.steps,
        "layers": len(layers),
        "quantized": sum(layer.weight_bits < 32 for layer in layers),
        "fed": sum(layer.activation_bits < 32 for layer in layers),
        "activations": len(quantized.lowered.activations),
        "seconds": clock.seconds,
    }


def _line(row: Row) -> str:
    found = f"weights {row['weights']:.0e} off, activations {row['steps']:.3f} steps ({row['activations']} quantizers)"
    layers = f"weights quantized in {row['quantized']} of {row['layers']} layers"
    return f"{found}, {layers}, {row['seconds']:.1f} s"


def report(rows: Sequence[Row]) -> None:
    """One line per family."""
    lines = []
    for family, models, good, worst in by_family(rows, "weights", "steps"):
        share = sum(r["quantized"] for r in good) / max(sum(r["layers"] for r in good), 1)
        lines.append([family, models, len(good), *(f"{w:.4g}" for w in worst), f"{share:.0%}"])
    section(
        "Integers are the fake-quant graph",
        table(["family", "models", "law 3 holds", "weights off", "steps off", "layers with integer weights"], lines),
    )


if __name__ == "__main__":
    main()
