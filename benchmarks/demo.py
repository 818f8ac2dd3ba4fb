"""The main job from end to end on real data: `make demo`, or `python -m benchmarks.demo [--keep FOLDER]`.

A residual CNN and a transformer learn scikit-learn's handwritten digits. Each is compressed at sparsity 0.5, fine-tuned
briefly and saved; a new process loads the folder and must compute the same logits, bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import digits

SPARSITY = 0.5
THREADS = 1
BATCH_SIZE = 64
Batch = tuple[Tensor, Tensor]  # images (b, 1, 8, 8), labels (b,)


@dataclass(frozen=True)
class Job:
    """A model, and how long it learns: in epochs, before and after the cut."""

    name: str
    model: nn.Module
    epochs: int
    finetune_epochs: int
    learning_rate: float


class Costs(NamedTuple):
    """Parameters, multiply-accumulates for one image, bytes of the stored weights."""

    params: float
    macs: float
    bytes: float


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    stage: str
    accuracy: float  # share of the test images classified correctly
    costs: Costs
    latency_ms: tuple[float, float, float]  # for one image: lower quartile, median, upper quartile


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the compressed models in this folder")
    parser.add_argument("--reload", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.reload:
        return compare_reloaded(options.reload)
    if options.keep:
        return demo(options.keep.resolve())
    with tempfile.TemporaryDirectory() as folder:
        return demo(Path(folder))


def demo(folder: Path) -> int:
    """Run both jobs. Returns the exit status: 0 when both models came back from disk unchanged."""
    torch.manual_seed(0)
    data = digits.load()
    jobs = [
        Job("residual CNN", digits.ResidualCNN(), epochs=10, finetune_epochs=5, learning_rate=3e-3),
        Job("transformer", digits.DigitTransformer(), epochs=60, finetune_epochs=15, learning_rate=4e-3),
    ]
    print(
        f"{len(data.train_y)} digits to train, {len(data.test_y)} to test; {THREADS} threads; torch {torch.__version__}"
    )
    failed = [job.name for job in jobs if run(job, data, folder / job.name.replace(" ", "_"))]
    return int(bool(failed))


def run(job: Job, data: digits.Digits, folder: Path) -> int:
    """Train, compress, fine-tune and save; then let a new process load the folder. Returns its exit status."""
    train(job.model, data, job.epochs, job.learning_rate, f"{job.name}: training")
    example = data.train_x[:2]
    small = gc.compress(job.model, example, sparsity=SPARSITY)
    before, after = (costs(small, when, images=len(example)) for when in ("before", "after"))
    rows = [measure("before", job.model, data, before), measure("after cutting", small, data, after)]
    train(small, data, job.finetune_epochs, job.learning_rate / 3, f"{job.name}: fine-tuning")
    rows.append(measure("after fine-tuning", small, data, after))
    print(f"\n{job.name}, sparsity {SPARSITY}\n{table(rows)}", flush=True)

    small.save(folder)
    save_file({"logits": logits(small, data.test_x)}, expected_logits(folder))
    command = [sys.executable, "-m", "benchmarks.demo", "--reload", str(folder)]
    return subprocess.run(command, cwd=Path(__file__).parents[1], check=False).returncode


def compare_reloaded(folder: Path) -> int:
    """Load the folder as someone else would, and compare the logits with those of the model that was saved."""
    reloaded = logits(gc.load(folder), digits.load().test_x)
    saved = load_file(expected_logits(folder))["logits"]
    difference = (reloaded - saved).abs().max().item()
    equal = torch.equal(reloaded, saved)
    print(f"saved, loaded in a new process: logits {'equal' if equal else 'DIFFER'}, max |difference| = {difference:g}")
    return 0 if equal else 1


def expected_logits(folder: Path) -> Path:
    """Where the logits of the saved model lie: beside its folder."""
    return folder.with_name(f"{folder.name}_logits.safetensors")


# ---------------------------------------------------------------------------------------------------- training


def train(model: nn.Module, data: digits.Digits, epochs: int, learning_rate: float, title: str) -> None:
    """AdamW with a one-cycle schedule on images shifted by up to one pixel; leaves the model in eval mode."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * (len(data.train_y) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for images, labels in progress(batches(data, epochs, generator), steps, title):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def batches(data: digits.Digits, epochs: int, generator: torch.Generator) -> Iterator[Batch]:
    """Full batches of the training images, in a new order and newly shifted in every epoch."""
    for _ in range(epochs):
        order = torch.randperm(len(data.train_y), generator=generator)
        for chosen in order.split(BATCH_SIZE)[: len(order) // BATCH_SIZE]:
            yield shift(data.train_x[chosen], generator), data.train_y[chosen]


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image (n, 1, 8, 8) by -1, 0 or 1 pixel in both directions, on an empty background (-1)."""
    down, right = torch.randint(0, 3, (2, len(images), 1), generator=generator)
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


def costs(small: gc.CompressedModel, when: str, images: int) -> Costs:
    """What the report says about `when`, "before" or "after"; it counts the MACs of `images` example images."""
    report = small.report.to_dict()
    return Costs(report["params"][when], report["macs"][when] / images, report["bytes"][when])


def measure(stage: str, model: nn.Module, data: digits.Digits, costs: Costs) -> Row:
    """A row of the table: what `model` costs, and what it is measured to do on the test images."""
    accuracy = (logits(model, data.test_x).argmax(1) == data.test_y).float().mean().item()
    return Row(stage, accuracy, costs, latency_ms(model, data.test_x[:1]))


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """(n, classes), in eval mode."""
    return model.eval()(images)


@torch.no_grad()
def latency_ms(model: nn.Module, image: Tensor, warmup: int = 30, runs: int = 300) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of one forward pass, in milliseconds."""
    model.eval()
    times = []
    for _ in range(warmup + runs):
        start = time.perf_counter()
        model(image)
        times.append(1e3 * (time.perf_counter() - start))
    lower, median, upper = statistics.quantiles(times[warmup:], n=4)
    return lower, median, upper


def table(rows: list[Row]) -> str:
    """`rows` as text; costs also as a share of the first row's."""
    lines = [f"{'':17} {'accuracy':>8} {'params':>16} {'MACs':>16} {'bytes':>16} {'latency, ms (quartiles)':>25}"]
    for row in rows:
        pairs = zip(row.costs, rows[0].costs, strict=True)
        cells = " ".join(f"{f'{cost:,.0f} {cost / first:4.0%}':>16}" for cost, first in pairs)
        lower, median, upper = row.latency_ms
        latency = f"{median:.2f} ({lower:.2f} to {upper:.2f})"
        lines.append(f"{row.stage:17} {row.accuracy:8.1%} {cells} {latency:>25}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
