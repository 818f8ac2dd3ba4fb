"""What the papers on pruning with quantization claim, on real data of this size, beside what each is to beat.

    python -m benchmarks.claims --methods opq,qst           # hours; a method alone: --methods opq
    python -m benchmarks.claims --methods opq --models resnet20 --images 6400 --epochs 1
    python -m benchmarks.claims --methods qst --models lenet --epochs 6 --seeds 3

Each table is one run: the same start, data, steps and seed in all rows. Bytes are those of the codes by convention
(C0: nonzeros times bits, no index; C4: entropy; C5: zlib), and of the folder that `small.save` writes, with all else in
it. The file's time is that of `small.export("model.onnx")` in onnxruntime, on 16 images. Test data are never trained
on, and choose nothing.

    opq   a plan from the weights alone, at the C0 bytes of a uniform one (the same share and the same bits in each
          layer), then fine-tuned with the plan fixed. Seconds of the plan are those without capturing the model.
    qst   thresholds and steps trained from scratch, beside magnitude pruning on the same cubic schedule and LSQ, at the
          same C0 bytes, and per unit.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import common, models, oneshot, qat
from benchmarks.common import append_json, section, table
from graphcomp.cost import file_bytes
from graphcomp.methods.base import Method
from graphcomp.methods.opq import Opq
from graphcomp.methods.qst.method import Qst, QstRun
from graphcomp.pruning.analytic import analytic_masks
from graphcomp.quantization.analytic import step_errors, whole_bits

Batch = tuple[Tensor, Tensor]
BITS = range(2, 9)


@dataclass(frozen=True)
class Case:
    """A model, and data to train and to test the model on.

    Attributes:
        model: seed -> the model that all rows begin with.
        data: batches of inputs and labels, in a new order in every pass.
        lr: of the weights.
        epochs: passes over the data by default.
    """

    name: str
    model: Callable[[int], nn.Module]
    data: Iterable[Batch]
    test: Batch
    lr: float
    epochs: int


# ------------------------------------------------------------------------------------------------ models and data
class LeNet(nn.Module):
    """LeNet-5 (Caffe's widths): (n, 1, 28, 28) -> (n, 10); 430,500 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.hidden, self.head = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


class Shuffled:
    """Batches of images and labels, in a new order in every pass; what is left over is left out."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int = 64) -> None:
        self.images, self.labels, self.batch = images, labels, batch

    def __len__(self) -> int:
        return len(self.labels) // self.batch

    def __iter__(self) -> Iterator[Batch]:
        for chosen in torch.randperm(len(self.labels)).split(self.batch)[: len(self)]:
            yield self.images[chosen], self.labels[chosen]


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def _lenet(images: int) -> Case:
    held = np.load(common.shared("data", "mnist_10k_10k.npz"))

    def part(split: str) -> Batch:
        pixels = torch.from_numpy(held[f"x_{split}"]).float()[:, None] / 255
        return (pixels - 0.1307) / 0.3081, torch.from_numpy(held[f"y_{split}"]).long()

    train = tuple(own[:images] for own in part("train"))
    return Case("LeNet-5 on MNIST", partial(_seeded, LeNet), Shuffled(*train), part("test"), lr=0.05, epochs=6)


def _vgg7(images: int) -> Case:
    data = qat.Augmented(*oneshot.cifar("train_a", images))
    make = partial(_seeded, partial(models.vgg7, width=32))
    return Case("VGG7 at a quarter of its width, CIFAR-10", make, data, oneshot.cifar("test", None), lr=0.05, epochs=20)


def _resnet(depth: int, images: int) -> Case:
    data = qat.Augmented(*oneshot.cifar("train_a", images))
    trained = oneshot.realdata().load(f"cifar10_resnet{depth}")
    return Case(f"ResNet-{depth}, CIFAR-10", lambda seed: trained, data, oneshot.cifar("test", None), lr=0.01, epochs=3)


CASES: dict[str, Callable[[int], Case]] = {
    "lenet": _lenet,
    "vgg7": _vgg7,
    "resnet20": partial(_resnet, 20),
    "resnet56": partial(_resnet, 56),
}
USUAL = {"opq": "resnet20,resnet56", "qst": "lenet,vgg7"}


# ------------------------------------------------------------------------------------------------ rows
COLUMNS = ["what", "% of test", "C0, kB", "C4, kB", "C5, kB", "folder, kB", "weights left", "ms of the file", "s"]
ROUNDS = 30
"""Runs of an exported file on 16 images, of which the fastest counts."""


def row(case: Case, what: str, method: Method, options: argparse.Namespace, **asked: Any) -> list[str]:
    """Train by a method, with each seed, and return a row of the table: means over seeds."""
    runs = []
    for seed in range(options.seeds):
        start = time.perf_counter()
        small = gc.compress(
            case.model(seed), case.test[0][:2], method=method, data=case.data, loss=_loss, seed=seed, progress=False,
            training=gc.Training(epochs=options.epochs or case.epochs, lr=case.lr), activation_bits=None, **asked,
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
    with tempfile.TemporaryDirectory() as folder:
        small.save(Path(folder) / "model")
        real = file_bytes(Path(folder) / "model")
    sizes, weights = small.report.sizes, small.quantized.lowered.weights.values()
    left = sum(own.counted().kept for own in weights) / sum(own.counted().total for own in weights)
    return sizes["C0"], sizes["C4"], sizes["C5"], float(real), left


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


def _loss(output: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(output, batch[1])


@torch.no_grad()
def accuracy(case: Case, module: Callable[[Tensor], Tensor]) -> float:
    """% of the test images that are classified rightly."""
    images, labels = case.test
    hits = sum(int((module(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True))
    return 100 * hits / len(labels)


# ------------------------------------------------------------------------------------------------ claims
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


class Magnitude(Qst):
    """Magnitude pruning on QST's schedule, and LSQ: one threshold for all weights, which no gradient moves."""

    def begin(self, *args: Any) -> QstRun:
        """Begin a run."""
        run = super().begin(*args)
        for threshold in run.parameters():
            threshold.requires_grad_(False)
        return run


def qst(case: Case, options: argparse.Namespace) -> None:
    """Compare thresholds that are trained with magnitude pruning and LSQ, at equal C0 bytes."""
    rows = []
    bits = 3
    for share in (0.004, 0.01, 0.002):
        for name, method in (("QST", Qst()), ("magnitude and LSQ", Magnitude())):
            what = f"{name}, {bits} bits, C0 at {share:.1%}"
            rows.append(row(case, what, method, options, bits=bits, budget=gc.Budget(bytes=share)))
        if options.short:
            break
    rows.append(row(case, "QST, 4 bits, half of the units", Qst(per="unit"), options, bits=4, sparsity=0.5))
    rows.append(row(case, "QST, 8 bits, nothing pruned", Qst(), options, bits=8, sparsity=0.0))
    section(f"QST, {case.name}, from scratch", table(COLUMNS, rows))


CLAIMS: dict[str, Callable[[Case, argparse.Namespace], None]] = {"opq": opq, "qst": qst}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(CLAIMS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--models", metavar="A,B", help=f"of {', '.join(CASES)}; default: as each claim has them")
    parser.add_argument("--images", type=int, default=25_000, metavar="N", help="to train on, at most")
    parser.add_argument("--test", type=int, metavar="N", help="images to test on; default: all")
    parser.add_argument("--epochs", type=int, metavar="N", help="default: as each model has them")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--short", action="store_true", help="the first setting of each claim alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one line of JSON per row")
    return parser.parse_args()


def main() -> None:
    """Print one table per method and model."""
    options = _options()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    for name in options.methods.split(","):
        for model in (options.models or USUAL[name]).split(","):
            case = CASES[model](options.images)
            images, labels = case.test
            CLAIMS[name](replace(case, test=(images[: options.test], labels[: options.test])), options)


if __name__ == "__main__":
    main()
