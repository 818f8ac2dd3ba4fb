"""The main job from end to end on real data: `make demo`, or `python -m benchmarks.demo [--folder FOLDER]`.

A residual CNN and a transformer learn scikit-learn's handwritten digits. Each is compressed at sparsity 0.5, fine-tuned
briefly, quantized to 8 bits and exported. Then each is trained on to the same sparsity and 4 to 8 bits, twice: pruned
first and quantized then ("sequential"), and both at once ("geta"), in the same number of steps. onnxruntime classifies
the test images with every file. The small models are saved, and loaded in a new process, which must compute the same
logits, bit for bit.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import digits
from graphcomp.cost import Latency
from graphcomp.targets.onnxruntime.export import export_onnx
from graphcomp.targets.runtime import compare, feeds_of, latency, open_session
from graphcomp.targets.runtime import run as run_onnx

SPARSITY = 0.5
BITS = 8
TRAINED_BITS = (4, 8)
METHODS = {"sequential": "pruned, then quantized", "geta": "jointly (GETA)"}
CALIBRATION = 512  # training images that the ranges of activations are read off
FOLDER = Path("build/demo")
ALLOWED_LOSS = 0.005  # of accuracy, from the fine-tuned model to its integers, and from a trained model to its file
THREADS = 1
EXAMPLES = 2  # images that the models are captured with; the report counts the MACs of all
BATCH_SIZE = 64
Batch = tuple[Tensor, Tensor]  # images (b, 1, 8, 8), labels (b,)


@dataclass(frozen=True)
class Job:
    """A model, and how long it learns: in epochs, before and after the cut, and while it is compressed."""

    name: str
    model: nn.Module
    epochs: int
    finetune_epochs: int
    compress_epochs: int
    learning_rate: float


@dataclass(frozen=True)
class Row:
    """One row of the table: a model, and its ONNX file in onnxruntime."""

    stage: str
    accuracy: float  # share of the test images classified correctly
    units: int  # that are left
    bits: str  # of weights and activations, mean over the layers
    params: float
    macs: float  # for one image
    bytes: int  # of the file
    latency: Latency  # for one image


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the models go (default: %(default)s)")
    parser.add_argument("--reload", type=Path, nargs="+", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    # the demo prints how far onnxruntime is off, on many more images than the export looked at
    logging.getLogger("graphcomp.export").setLevel(logging.ERROR)
    if options.reload:
        return max(compare_reloaded(folder) for folder in options.reload)
    return demo(options.folder)


def demo(folder: Path) -> int:
    """Run both jobs. Returns the exit status: 0 when the integers are as accurate as the floats they were made of, and
    all models came back from disk unchanged."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    data = digits.load()
    jobs = [
        Job("residual CNN", digits.ResidualCNN(), epochs=10, finetune_epochs=5, compress_epochs=14, learning_rate=3e-3),
        Job(
            "transformer",
            digits.DigitTransformer(),
            epochs=40,
            finetune_epochs=15,
            compress_epochs=20,
            learning_rate=4e-3,
        ),
    ]
    print(
        f"{len(data.train_y)} digits to train, {len(data.test_y)} to test; {THREADS} thread; torch {torch.__version__}"
    )
    failed = [job.name for job in jobs if run(job, data, folder / job.name.replace(" ", "_"))]
    return int(bool(failed))


def run(job: Job, data: digits.Digits, place: Path) -> int:
    """Train, compress in three ways, export and save; then let a new process load what was saved.

    Args:
        place: files and folders are called like it, with a suffix.

    Returns:
        1 if a file is less accurate than it should be, else the exit status of the other process.
    """
    train(job.model, data, job.epochs, job.learning_rate, f"{job.name}: training")
    example = data.train_x[:EXAMPLES]
    before = write_float(job.model, example, place.with_name(f"{place.name}_float.onnx"))
    small = gc.compress(job.model, example, sparsity=SPARSITY)
    cut = write_float(small, example, place.with_name(f"{place.name}_cut.onnx"))
    costs = small.report.to_dict()
    rows = [measure("float", before, costs, "before", data), measure("after cutting", cut, costs, "after", data)]

    train(small, data, job.finetune_epochs, job.learning_rate / 3, f"{job.name}: fine-tuning")
    cut = write_float(small, example, cut)
    rows.append(measure("after fine-tuning", cut, costs, "after", data))

    # reduced range: right in onnxruntime's default kernels on every CPU
    calibration = data.train_x[:CALIBRATION].split(64)
    integers = gc.compress(small, example, sparsity=0, bits=BITS, reduce_range=True, calibration=calibration)
    file = place.with_name(f"{place.name}_int{BITS}.onnx")
    integers.export(file)
    quantized = {**integers.report.to_dict(), "units": costs["units"]}  # it was cut before
    rows.append(measure(f"after quantizing to {BITS} bits", file, quantized, "after", data))
    lost = {f"of {BITS} bits": rows[-2].accuracy - rows[-1].accuracy}
    saved = {place: small, file.with_suffix(""): integers}

    for method, words in METHODS.items():
        trained = compress_by_training(job, data, method)
        own = place.with_name(f"{place.name}_{method}.onnx")
        trained.export(own)
        rows.append(measure(words, own, trained.report.to_dict(), "after", data))
        lost[words] = accuracy(logits(trained, data.test_x), data) - rows[-1].accuracy
        saved[own.with_suffix("")] = trained
    low, high = TRAINED_BITS
    print(f"\n{job.name}, sparsity {SPARSITY}, {BITS} bits after training, {low} to {high} in training\n{table(rows)}")
    print(about_the_file(integers, file, data), flush=True)

    failed = {name: loss for name, loss in lost.items() if loss > ALLOWED_LOSS}
    for name, loss in failed.items():
        print(f"the integers ({name}) are {loss:.1%} less accurate than the floats, more than {ALLOWED_LOSS:.1%}")
    return int(bool(failed)) or reload(saved, data)


def compress_by_training(job: Job, data: digits.Digits, method: str) -> gc.CompressedModel:
    """Prune and quantize in training, by one of METHODS."""
    start = time.perf_counter()
    trained = gc.compress(
        job.model,
        data.train_x[:EXAMPLES],
        sparsity=SPARSITY,
        bits=TRAINED_BITS,
        method=method,
        data=Batches(data),
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        training=gc.Training(epochs=job.compress_epochs, optimizer=torch.optim.AdamW, lr=job.learning_rate),
        calibration=data.train_x[:CALIBRATION].split(64),
    )
    print(f"{job.name}: {METHODS[method]}: {time.perf_counter() - start:.1f} s", flush=True)
    return trained


def reload(models: dict[Path, gc.CompressedModel], data: digits.Digits) -> int:
    """Save each model, and let a new process load the folders. Returns its exit status."""
    for folder, model in models.items():
        model.save(folder)
        save_file({"logits": logits(model, data.test_x)}, expected_logits(folder))
    folders = [str(folder.resolve()) for folder in models]
    command = [sys.executable, "-m", "benchmarks.demo", "--reload", *folders]
    return subprocess.run(command, cwd=Path(__file__).parents[1], check=False).returncode


def compare_reloaded(folder: Path) -> int:
    """Load the folder as someone else would, and compare the logits with those of the model that was saved."""
    reloaded = logits(gc.load(folder), digits.load().test_x)
    saved = load_file(expected_logits(folder))["logits"]
    difference = (reloaded - saved).abs().max().item()
    equal = torch.equal(reloaded, saved)
    print(
        f"{folder.name}: saved, loaded in a new process: logits {'equal' if equal else 'DIFFER'}, "
        f"max |difference| = {difference:g}"
    )
    return 0 if equal else 1


def expected_logits(folder: Path) -> Path:
    """Where the logits of the saved model lie: beside its folder."""
    return folder.with_name(f"{folder.name}_logits.safetensors")


# ---------------------------------------------------------------------------------------------------- training


def train(model: nn.Module, data: digits.Digits, epochs: int, learning_rate: float, title: str) -> None:
    """AdamW with a one-cycle schedule on images shifted by up to one pixel; leaves the model in eval mode."""
    torch.manual_seed(0)
    batches = Batches(data)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for images, labels in progress((batch for _ in range(epochs) for batch in batches), steps, title):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


class Batches:
    """Full batches of the training images, in a new order and newly shifted in every pass."""

    def __init__(self, data: digits.Digits) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.train_y) // BATCH_SIZE

    def __iter__(self) -> Iterator[Batch]:
        for chosen in torch.randperm(len(self.data.train_y)).split(BATCH_SIZE)[: len(self)]:
            yield shift(self.data.train_x[chosen]), self.data.train_y[chosen]


def shift(images: Tensor) -> Tensor:
    """Move each image (n, 1, 8, 8) by -1, 0 or 1 pixel in both directions, on an empty background (-1)."""
    down, right = torch.randint(0, 3, (2, len(images), 1))
    pixels = torch.arange(8)
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)[:, 0]
    moved = padded[torch.arange(len(images))[:, None, None], (down + pixels)[:, :, None], (right + pixels)[:, None, :]]
    return moved[:, None]


def progress(items: Iterator[Batch], total: int, title: str) -> Iterator[Batch]:
    """Yield `items`. On a terminal a bar follows; elsewhere there is one line at the end."""
    start = time.perf_counter()
    for done, item in enumerate(items, start=1):
        yield item
        if sys.stderr.isatty():
            bar = "#" * (30 * done // total)
            print(f"\r{title:26} [{bar:30}] {done}/{total}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(f"{title}: {total} steps in {time.perf_counter() - start:.1f} s", flush=True)


# --------------------------------------------------------------------------------------------------- measuring


def write_float(model: nn.Module, example: Tensor, file: Path) -> Path:
    """Write a model of floats as ONNX; returns `file`."""
    export_onnx(model, (example,), None, file)
    return file


def measure(stage: str, file: Path, costs: dict[str, Any], when: str, data: digits.Digits) -> Row:
    """A row of the table: what the report says about `when`, "before" or "after", and how `file` runs."""
    feeds = feeds_of(open_session(file), (data.test_x[:1],), None)
    time_taken = latency(file, feeds, threads=THREADS, warmup=50, repeats=4000)
    macs = costs["macs"][when] / EXAMPLES
    removed = costs["units"]["removed"] if when == "after" else 0
    return Row(
        stage,
        accuracy_of(file, data, exact=True),
        costs["units"]["total"] - removed,
        "32/32" if when == "before" else mean_bits(costs["layers"]),
        costs["params"][when],
        macs,
        file.stat().st_size,
        time_taken,
    )


def mean_bits(layers: list[dict[str, Any]]) -> str:
    """Of weights and of activations."""
    return "/".join(f"{mean(layer[f'{what}_bits'] for layer in layers):.3g}" for what in ("weight", "activation"))


def accuracy_of(file: Path, data: digits.Digits, *, exact: bool) -> float:
    """The share of the test images that onnxruntime classifies correctly, with exact integer sums or by default."""
    (found,) = run_onnx(file, (data.test_x,), exact=exact)
    return accuracy(found, data)


def accuracy(found: Tensor, data: digits.Digits) -> float:
    """The share of the test images whose largest logit, of (n, classes), is the label's."""
    return (found.argmax(1) == data.test_y).float().mean().item()


def about_the_file(integers: gc.CompressedModel, file: Path, data: digits.Digits) -> str:
    """Which kernels run the file, and how far its logits of the test images are from those of the module."""
    assert integers.export_report is not None and integers.export_report.kernels is not None
    kernels = integers.export_report.kernels
    exact, default = (compare(file, integers.module, (data.test_x,), exact=exact) for exact in (True, False))
    floats = ", ".join(f"{count} {name}" for name, count in kernels.float_.items()) or "none"
    return (
        f"{file}: {kernels.share:.0%} of the layers run integer kernels (float: {floats});\n"
        f"  logits of the test images at most {exact.steps:.2f} quantization steps from the module's;\n"
        f"  accuracies above are of exact integer sums; onnxruntime's default kernels"
        f"\n  give {default.steps:.2f} steps and an accuracy of {accuracy_of(file, data, exact=False):.1%} here"
    )


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """(n, classes), in eval mode."""
    return model.eval()(images)


def table(rows: list[Row]) -> str:
    """`rows` as text; costs also as a share of the first row's."""
    titles = ("params", "MACs", "file, bytes")
    heads = " ".join(f"{title:>16}" for title in titles)
    lines = [f"{'':25} {'accuracy':>8} {'units':>5} {'bits':>9} {heads} {'onnxruntime, ms (10 to 90 %)':>29}"]
    for row in rows:
        pairs = zip((row.params, row.macs, row.bytes), (rows[0].params, rows[0].macs, rows[0].bytes), strict=True)
        cells = " ".join(f"{f'{cost:,.0f} {cost / first:4.0%}':>16}" for cost, first in pairs)
        found = row.latency
        times = f"{found.median_ms:.3f} ({found.p10_ms:.3f} to {found.p90_ms:.3f})"
        lines.append(f"{row.stage:25} {row.accuracy:8.1%} {row.units:5} {row.bits:>9} {cells} {times:>29}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
