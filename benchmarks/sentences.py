"""MiniLM without a share of its multiply-accumulates: quality and time in onnxruntime, in floats and in int8.

    python -m benchmarks.sentences                          # 30 % and 50 % fewer, ten CPU minutes of training each
    python -m benchmarks.sentences --macs 0.7 --seconds 120 --json sentences.jsonl

Heads and feed-forward units go by sensitivity, within a budget of multiply-accumulates; then the cut is repaired, and
the model before the cut teaches, as in `benchmarks.distilled`. Every row but the first of a cut is a file that runs in
onnxruntime: ours in floats, in int8 with ranges at run time (W8A8) and with ranges known beforehand, and onnxruntime's
dynamic quantization of our float file. Quality is that of a session with exact integer sums. Cosine: the mean over the
SST-2 sentences of the cosine to the embeddings of the dense model. All files are timed in one run, taking turns: one
sentence of 128 tokens, 1 thread. Test data decide nothing. Lines of a JSON file, with the files of a share, are not
computed again; the folder beside the JSON file keeps the files.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import common, distilled, oneshot, quantized
from benchmarks.common import append_json, cell, read_json, section, table

FORMS: Mapping[str, Mapping[str, Any]] = {
    "our int8, ranges at run time": {"bits": 8, "activations": "dynamic"},
    "our int8, ranges known": {"bits": 8},
}
"""Row -> options of `compress`."""
FLOAT, PEER = "floats", "onnxruntime's dynamic int8"
COLUMNS = ("SST-2 %", "STS-B x 100", "cosine")


class Bench:
    """The dense model, what it is judged by, and what is known already."""

    def __init__(self, folder: Path, known: list[dict[str, Any]], file: Path | None) -> None:
        self.course, self.case = distilled.minilm(), quantized.minilm()
        self.folder, self.known, self.file = folder, known, file
        self.files: list[quantized.File] = []
        data = oneshot.realdata()
        arrays = np.load(common.shared("data", "text_minilm.npz"))
        self.sentences, self.embed = data.ragged(arrays, "sst2_dev"), data.embed
        self.wanted = self.embed(self.course.task.model, self.sentences)

    def row(self, model: str, form: str, made: Callable[[], nn.Module]) -> None:
        """Measure a row that is not known yet."""
        if self.has(model, form):
            return
        begun = time.process_time()
        module = made()
        scores = [str(score) for score in self.course.task.evaluate(module)]
        cosine = float(F.cosine_similarity(self.wanted, self.embed(module, self.sentences)).mean())
        row = {"model": model, "form": form, "scores": [*scores, f"{cosine:.4f}"]}
        row["seconds"] = time.process_time() - begun
        self.known.append(row)
        append_json(self.file, row)
        print(row, flush=True)

    def has(self, model: str, form: str) -> bool:
        """Return whether a row is known."""
        return any((row["model"], row["form"]) == (model, form) for row in self.known)

    def path(self, model: str, form: str) -> Path:
        """Return the place of a file, which is timed in the end."""
        index = [FLOAT, *FORMS, PEER].index(form)
        found = self.folder / f"{model.replace(' ', '-').replace('%', '')}-{index}.onnx"
        self.files.append(quantized.File(f"{model}, {form}", found))
        return found

    def runtime_rows(self, name: str, model: nn.Module | None, example: tuple[Tensor, ...]) -> None:
        """Write and measure a model in each form."""
        plain, task = self.path(name, FLOAT), self.course.task

        def ours(path: Path, **options: Any) -> nn.Module:
            if not path.exists():
                assert model is not None
                calibration = task.calibration if options.get("bits") and "activations" not in options else None
                gc.compress(model, example, sparsity=0.0, calibration=calibration, progress=False, **options).export(
                    path, measure=False
                )
            return quantized.Runtime(path, exact=True)

        def theirs(path: Path) -> nn.Module:
            if not path.exists():
                quantized.dynamic(plain, path)
            return quantized.Runtime(path, exact=True)

        self.row(name, FLOAT, lambda: ours(plain))
        for form, options in FORMS.items():
            path = self.path(name, form)
            self.row(name, form, lambda path=path, options=options: ours(path, **options))
        path = self.path(name, PEER)
        self.row(name, PEER, lambda: theirs(path))


def cut(bench: Bench, share: float, seconds: float, example: tuple[Tensor, ...]) -> None:
    """Cut, repair and distil; measure each, and the last one in each form."""
    course, task = bench.course, bench.course.task
    asked: dict[str, Any] = {
        "budget": gc.Budget(macs=share), "prune": distilled.ROLES, "ranking": "sensitivity",
        "calibration": task.calibration, "progress": False,
    }  # fmt: skip
    name = f"{1 - share:.0%} fewer"
    last = f"{name}, distilled"
    if not bench.has(name + ", cut", "PyTorch"):
        bench.row(name + ", cut", "PyTorch", lambda: gc.compress(task.model, example, repair=None, **asked))
    tuned: nn.Module | None = None
    if not all(bench.has(last, form) for form in (FLOAT, *FORMS, PEER)):
        small = gc.compress(task.model, example, **asked)
        bench.row(name + ", repaired", "PyTorch", lambda: small)
        steps = distilled.steps_in(seconds, small, course)
        begun = time.process_time()
        found = distilled.distilled(small, course, steps)
        spent = time.process_time() - begun
        print(f"{last}: {steps} steps in {spent:.0f} CPU seconds;", *[
            note for note in found.report.notes if "held-out data" in note
        ], flush=True)  # fmt: skip
        tuned = found.module
    bench.runtime_rows(last, tuned, example)


def main() -> None:
    options = _parsed()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    folder: Path = options.json.with_suffix("") if options.json else options.folder
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, read_json(options.json) if options.json else [], options.json)
    example = bench.course.task.example[:2]
    bench.runtime_rows("dense", bench.course.task.model, example)
    for share in options.macs.split(","):
        cut(bench, float(share), options.seconds, example)
    times = {} if options.no_latency else quantized.latencies(bench.case, bench.files, 1)
    first = times.get(f"dense, {FLOAT}", 0.0)
    rows = []
    for row in bench.known:
        ms = times.get(f"{row['model']}, {row['form']}")
        rows.append(
            [row["model"], row["form"], *row["scores"], cell(ms, 2), "-" if ms is None else f"{first / ms:.2f} x"]
        )
    section("MiniLM, heads and feed-forward units", table(["model", "form", *COLUMNS, "ms", "speed"], rows))


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", default="0.7,0.5", metavar="A,B", help="shares that are left; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=600, metavar="S", help="of the CPU, of training each")
    parser.add_argument("--no-latency", action="store_true", help="do not time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="one line of JSON per row, read again")
    parser.add_argument("--folder", type=Path, default=Path("sentences"), help="of the files, without --json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
