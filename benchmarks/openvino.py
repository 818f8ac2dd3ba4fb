"""The same ONNX files in onnxruntime and in OpenVINO: what they compute, on which kernels, and how fast.

    python -m benchmarks.openvino                                   # the two digit classifiers and a ResNet-18
    python -m benchmarks.openvino --models resnet18 --no-latency

Needs the extras onnx and openvino. The files take turns, one input on one thread, so that ratios hold whatever else
the machine does; they run as users run them by default. Both runtimes' integer kernels saturate on x86 without VNNI,
but for weights of reduced range.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import common
from benchmarks.common import section, table
from benchmarks.quantized import CASES, Case
from graphcomp.targets import openvino
from graphcomp.targets.onnxruntime.export import export_onnx
from graphcomp.targets.onnxruntime.kernels import INTEGER_LAYERS, prove
from graphcomp.targets.runtime import agreement, feeds_of, open_session
from graphcomp.targets.runtime import run as run_onnx

ROUNDS = 200
WARMUP = 10


@dataclass(frozen=True)
class File:
    """A model, and the file it was exported to."""

    label: str
    module: nn.Module
    path: Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="digits-cnn,digits-transformer,resnet18", metavar="A,B")
    parser.add_argument("--no-latency", action="store_true", help="do not time")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    for name in options.models.split(","):
        case = CASES[name]()
        with tempfile.TemporaryDirectory() as folder:
            found = files(case, Path(folder))
            times = {} if options.no_latency else latencies(case, found)
            report(case, found, times)


def files(case: Case, folder: Path) -> list[File]:
    """The float model, and the one of 8 bits with weights of 8 and of 7."""
    found = [File("float", case.model, folder / "float.onnx")]
    export_onnx(case.model, case.example, {}, found[0].path)
    for label, reduced in (("int8", False), ("int8, reduced range", True)):
        small = gc.compress(
            case.model, case.example, sparsity=0.0, bits=8, reduce_range=reduced, calibration=case.calibration,
            progress=False, **case.options,
        )  # fmt: skip
        path = folder / f"{label}.onnx"
        small.export(path)
        found.append(File(label, small.module, path))
    return found


def report(case: Case, found: Sequence[File], times: dict[str, tuple[float, float]]) -> None:
    """Print the table of one model."""
    rows = []
    for file in found:
        exact, default = (
            agreement(file.module, openvino.run(file.path, case.test, exact=mode), case.test).steps
            for mode in (True, False)
        )
        in_onnxruntime = agreement(file.module, run_onnx(file.path, case.test, exact=False), case.test).steps
        kernels, theirs = openvino.prove(file.path), prove(file.path)
        integer = sum(n for name, n in theirs.integer.items() if name in INTEGER_LAYERS)
        rows.append([
            file.label,
            *(f"{ms:.3f} ms" for ms in times.get(file.label, ())),
            f"{integer} of {integer + sum(theirs.float_.values())}",
            f"{sum(kernels.integer.values())} of {sum(kernels.integer.values()) + sum(kernels.float_.values())}",
            *(f"{steps:.2g}" for steps in (in_onnxruntime, default, exact)),
            *(f"{score}" for score in _scores(case, file.path)),
        ])  # fmt: skip
    columns = [
        "file",
        *(("onnxruntime", "OpenVINO") if times else ()),
        "integer layers, onnxruntime",
        "OpenVINO",
        "steps off, onnxruntime",
        "OpenVINO",
        "OpenVINO, exact sums",
        *(("OpenVINO, accuracy %",) if case.evaluate is not None else ()),
    ]
    section(f"{case.name}", table(columns, rows))


def _scores(case: Case, path: Path) -> Sequence[object]:
    return () if case.evaluate is None else case.evaluate(InOpenVINO(path))


class InOpenVINO(nn.Module):
    """An ONNX file in OpenVINO as users run it, called like the model it came from."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def forward(self, *inputs: Tensor) -> Tensor:
        return openvino.run(self.path, inputs, exact=False)[0]


def latencies(case: Case, found: Sequence[File]) -> dict[str, tuple[float, float]]:
    """Milliseconds of each file in onnxruntime and in OpenVINO, the least of ROUNDS; all take turns."""
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    arrays = [tensor.numpy() for tensor in case.example]
    for file in found:
        session = open_session(file.path)
        feeds = feeds_of(session, case.example, {})
        request = openvino.open_model(file.path).create_infer_request()
        calls[file.label, "onnxruntime"] = lambda session=session, feeds=feeds: session.run(None, feeds)  # type: ignore[misc]
        calls[file.label, "OpenVINO"] = lambda request=request: request.infer(  # type: ignore[misc]
            arrays, share_inputs=True, share_outputs=True
        )
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS + WARMUP):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            times[key].append(1e3 * (time.perf_counter() - start))
    least = {key: min(values[WARMUP:]) for key, values in times.items()}
    return {file.label: (least[file.label, "onnxruntime"], least[file.label, "OpenVINO"]) for file in found}


if __name__ == "__main__":
    main()
