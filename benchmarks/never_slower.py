"""Static ranges and ranges at run time beside floats: in onnxruntime, as `export` measures and guards, and in PyTorch.

    python -m benchmarks.never_slower                    # ResNet-20, MobileNetV2, MiniLM: ten minutes
    python -m benchmarks.never_slower --models resnet20

One thread. In onnxruntime the float file is the float form of each file (same layers, same weights); in PyTorch the
float model; what is compared takes turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphcomp as gc
from benchmarks import common, oneshot, quantized
from benchmarks.common import section, table

WAYS: dict[str, dict[str, Any]] = {
    "static": {},
    "dynamic": {"activations": "dynamic"},
    "dynamic per token": {"activations": "dynamic_per_token"},
}
ROUNDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CASES), metavar="A,B", help="default: %(default)s")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    for name in options.models.split(","):
        report(CASES[name]())


def report(case: quantized.Case) -> None:
    """Print the table of one model."""
    models: dict[str, nn.Module] = {"float": case.model.eval()}
    rows = []
    for way, options in WAYS.items():
        calibration = None if options else case.calibration
        small = gc.compress(
            case.model, case.example, sparsity=0.0, bits=8, calibration=calibration, progress=False, **options
        )
        models[way] = small.eval()
        with tempfile.TemporaryDirectory() as folder:
            seconds, lines = [], []
            for given in ({"measure": False}, {}, {"guard": True}):
                start = time.process_time()
                small.export(Path(folder) / "model.onnx", **given)
                seconds.append(time.process_time() - start)
                lines.append(small.export_report)
        left = "all" if not lines[2].speed.integer else ", ".join(lines[2].left_in_float) or "nothing"
        rows.append([way, str(lines[1].speed), left, f"{lines[2].speed.ratio:.2f} ×", *(f"{s:.1f}" for s in seconds)])
    times = in_turns(models, case.example)
    for row in rows:
        row.append(f"{times['float'] / times[row[0]]:.2f} ×")
    columns = [
        "ranges", "export says", "guard leaves in float", "guarded", "export s", "measured s", "guarded s",
        "in PyTorch",
    ]  # fmt: skip
    section(case.name, table(columns, rows))


@torch.no_grad()
def in_turns(models: dict[str, nn.Module], inputs: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Median seconds of each model."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for k in range(ROUNDS + 2):
        for name, model in models.items():
            start = time.perf_counter()
            model(*inputs)
            if k >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


CASES: dict[str, Callable[[], quantized.Case]] = {
    "resnet20": lambda: quantized.vision(oneshot.TASKS["resnet20"]()),
    "mobilenet": lambda: quantized.vision(oneshot.TASKS["mobilenet"]()),
    "minilm": quantized.minilm,
}

if __name__ == "__main__":
    main()
