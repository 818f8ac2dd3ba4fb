"""Rows of tables: accuracy, bytes by each convention, the folder, the time of the exported file."""

from __future__ import annotations

import argparse
import importlib
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import graphcomp as gc
from benchmarks.claims.cases import Batch, Case
from benchmarks.common import append_json
from graphcomp.cost import file_bytes
from graphcomp.methods.base import Method

COLUMNS = ["what", "% of test", "C0, kB", "C4, kB", "C5, kB", "folder, kB", "weights left", "ms of the file", "s"]
ROUNDS = 30
"""Runs of an exported file on 16 images, of which the fastest counts."""


def chosen(options: argparse.Namespace, what: str) -> bool:
    """Return whether the row of this name is asked for (`--rows`)."""
    return re.search(options.rows, what) is not None


def row(case: Case, what: str, method: Method, options: argparse.Namespace, **asked: Any) -> list[str]:
    """Train by a method, with each seed, and return a row of the table: means over seeds."""
    runs = []
    for seed in range(options.seeds):
        start = time.perf_counter()
        small = gc.compress(
            case.model(seed), case.test[0][:2], method=method, data=case.data, loss=loss_of, seed=seed, progress=False,
            training=gc.Training(epochs=options.epochs or case.epochs, lr=case.lr),
            **{"activation_bits": None, **asked},
        )  # fmt: skip
        seconds = time.perf_counter() - start
        runs.append((accuracy(case, small), *stored(small), milliseconds(case, small), seconds))
    means = [sum(own) / len(runs) for own in zip(*runs, strict=True)]
    by_seed = " ".join(f"{own[0]:.2f}" for own in runs)
    append_json(options.json, {"case": case.name, "what": what, "runs": runs})
    sizes = [f"{size / 1000:.2f}" for size in means[1:5]]
    return [what, by_seed, *sizes, f"{means[5]:.2%}", f"{means[6]:.2f}", f"{means[7]:.0f}"]


def stored(small: gc.CompressedModel) -> tuple[float, float, float, float, float]:
    """Bytes of the codes by C0, C4 and C5, of the saved folder, and the share of weights that are not zero."""
    real = folder_bytes(small)
    sizes, weights = small.report.sizes, small.quantized.lowered.weights.values()
    left = sum(own.counted().kept for own in weights) / sum(own.counted().total for own in weights)
    return sizes["C0"], sizes["C4"], sizes["C5"], real, left


def folder_bytes(small: gc.CompressedModel) -> float:
    """Bytes of the saved folder."""
    with tempfile.TemporaryDirectory() as folder:
        small.save(Path(folder) / "model")
        return float(file_bytes(Path(folder) / "model"))


def milliseconds(case: Case, small: gc.CompressedModel) -> float:
    """Time of the exported file on 16 images, one thread of onnxruntime."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        small.export(path, measure=False)
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: case.test[0][:16].numpy()}
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        session.run(None, feeds)
        best = min(best, time.perf_counter() - start)
    return 1000 * best


def loss_of(output: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy with the labels."""
    return F.cross_entropy(output, batch[1])


@torch.no_grad()
def accuracy(case: Case, module: Callable[[Tensor], Tensor]) -> float:
    """% of the test images that are classified rightly."""
    images, labels = case.test
    hits = sum(int((module(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True))
    return 100 * hits / len(labels)
