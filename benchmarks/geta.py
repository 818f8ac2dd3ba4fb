"""Accuracy of joint pruning and quantization-aware training, beside its parts one after the other.

    python -m benchmarks.geta                                     # digits: CNN and transformer, three seeds
    python -m benchmarks.geta --tasks resnet20 --epochs 10        # CIFAR-10, a shortened run: hours on two cores
    python -m benchmarks.geta --tasks cnn --sparsity 0.7 --bits 2,4

Every method starts from the same trained float model and gets the same number of steps: joint (QASSO), sequential (half
of them to prune in floats, half to quantize what is left), quantize only, prune only (HESSO). Bit operations count a
float operand as 32 bits. CIFAR-10 and the weights of ResNet-20 come from the shared folder beside the checkout.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import common, digits, oneshot
from benchmarks.common import append_json, section, table

CALIBRATION = 128


@dataclass(frozen=True)
class Task:
    """A trained model, and how it is trained on.

    Attributes:
        train, test: images and labels.
        base, options: the optimizer; `lr` is its peak.
        weights_only: activations stay float, as in the paper's experiment.
    """

    name: str
    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    base: type[torch.optim.Optimizer]
    options: dict[str, Any]
    batch: int
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    weights_only: bool = False
    qasso: dict[str, Any] = field(default_factory=dict)

    def accuracy(self, model: nn.Module) -> float:
        """Percent of the test images."""
        model.eval()
        with torch.no_grad():
            hits = sum(
                int((model(x).argmax(1) == y).sum())
                for x, y in zip(self.test[0].split(500), self.test[1].split(500), strict=True)
            )
        return 100 * hits / len(self.test[1])


@dataclass(frozen=True)
class Options:
    """What is asked of every method."""

    steps: int
    sparsity: float
    bits: tuple[int, int]
    bops: float | None
    seed: int

    @property
    def budget(self) -> gc.Budget | None:
        """On bit operations, where one is set."""
        return None if self.bops is None else gc.Budget(bops=self.bops)


def main() -> None:
    options = _parsed()
    torch.set_num_threads(options.threads)
    print(common.header(), flush=True)
    for name in options.tasks.split(","):
        task = TASKS[name](options.float_steps)
        steps = options.steps or options.epochs * (len(task.train[1]) // task.batch)
        rows = [["float", f"{task.accuracy(task.model):.2f}", "100", "100", "32 / 32", "–", "–"]]
        for method in options.methods.split(","):
            found = []
            for seed in range(options.seeds):
                asked = Options(steps, options.sparsity, options.bits, options.bops, seed)
                found.append(_run(task, method, asked))
                append_json(options.json, {"task": name, "method": method, "steps": steps, "seed": seed, **found[-1]})
                print(f"{task.name}, {method}, seed {seed}: {found[-1]}", flush=True)
            rows.append([method, *_summary(found)])
        title = f"{task.name}: {options.sparsity:.0%} of the units, {options.bits[0]} to {options.bits[1]} bits, "
        columns = ["method", "accuracy %", "BOPs %", "MACs %", "bits W / A", "units", "seconds"]
        section(title + f"{steps} steps, {options.seeds} seeds", table(columns, rows))


def _summary(found: Sequence[dict[str, Any]]) -> list[str]:
    accuracies = [f["accuracy"] for f in found]
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(found) > 1 else ""
    mean = {key: statistics.fmean(f[key] for f in found) for key in ("bops", "macs", "weight_bits", "activation_bits")}
    return [
        f"{statistics.fmean(accuracies):.2f}{spread}",
        f"{mean['bops']:.2f}",
        f"{mean['macs']:.1f}",
        f"{mean['weight_bits']:.1f} / {mean['activation_bits']:.1f}",
        found[0]["units"],
        f"{statistics.fmean(f['seconds'] for f in found):.0f}",
    ]


def _run(task: Task, method: str, asked: Options) -> dict[str, Any]:
    """Train with one method; what came of it."""
    start = time.monotonic()
    small = METHODS[method](task, asked)
    report = small.report
    assert isinstance(report, gc.Report)
    weights = [layer.weight_bits for layer in report.layers]
    reads = [layer.activation_bits for layer in report.layers]
    return {
        "accuracy": task.accuracy(small),
        "bops": 100 * report.bops.ratio,
        "macs": 100 * report.macs.ratio,
        "weight_bits": statistics.fmean(weights),
        "activation_bits": statistics.fmean(reads),
        "units": f"{report.units_removed} of {report.units_total}",
        "bytes": report.bytes.ratio,
        "seconds": time.monotonic() - start,
    }


# ------------------------------------------------------------------------------------------------ methods
def joint(task: Task, asked: Options) -> gc.CompressedModel:
    return _qasso(task, task.model, asked.steps, asked, bits=asked.bits, sparsity=asked.sparsity, budget=asked.budget)


def sequential(task: Task, asked: Options) -> gc.CompressedModel:
    """Prune in floats, then quantize what is left; BOPs are of the original model."""
    pruned = _qasso(task, task.model, asked.steps // 2, asked, bits=None, sparsity=asked.sparsity, forgetting="uniform")
    rest = asked.steps - asked.steps // 2
    budget = None
    assert isinstance(pruned.report, gc.Report)
    if asked.bops is not None:
        budget = gc.Budget(bops=float(asked.bops * pruned.report.bops.before / pruned.report.bops.after))
    found = _qasso(task, pruned.module, rest, asked, bits=asked.bits, sparsity=0.0, budget=budget)
    assert isinstance(found.report, gc.Report)
    whole, cut = pruned.report, found.report
    found.report = dataclasses.replace(
        cut,
        bops=type(cut.bops)(whole.bops.before, cut.bops.after),
        macs=type(cut.macs)(whole.macs.before, cut.macs.after),
        bytes=type(cut.bytes)(whole.bytes.before, cut.bytes.after),
        units_removed=whole.units_removed,
        units_total=whole.units_total,
    )
    return found


def quantize_only(task: Task, asked: Options) -> gc.CompressedModel:
    return _qasso(task, task.model, asked.steps, asked, bits=asked.bits, sparsity=0.0, budget=asked.budget)


def prune_only(task: Task, asked: Options) -> gc.CompressedModel:
    return _qasso(task, task.model, asked.steps, asked, bits=None, sparsity=asked.sparsity, forgetting="uniform")


METHODS: dict[str, Callable[[Task, Options], gc.CompressedModel]] = {
    "joint": joint,
    "sequential": sequential,
    "quantize only": quantize_only,
    "prune only": prune_only,
}


def _qasso(
    task: Task, model: nn.Module, steps: int, asked: Options, *, bits: tuple[int, int] | None, **options: Any
) -> gc.CompressedModel:
    images = task.train[0][:CALIBRATION]
    model.train()
    ready = gc.prepare(model, images, bits=bits, activation_bits=None if task.weights_only else "same")
    options = {**task.qasso, **options}
    parts = {
        "transformer": ready.session.has_attention,
        "prune": options["sparsity"] != 0,
        "quantize": bits is not None,
    }
    schedule = gc.Schedule.of(steps, **parts)  # as `compress` has it: no steps for what is not done
    optimizer = gc.QASSO(ready, task.base, schedule=schedule, **task.options, **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    train(task, ready, optimizer, scheduler, steps, asked.seed)
    return gc.finalize(ready)


def train(task: Task, model: nn.Module, optimizer: Any, scheduler: Any, steps: int, seed: int) -> None:
    """Steps on random batches, the epochs reshuffled."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = task.train
    order = torch.randperm(len(labels), generator=generator)
    model.train()
    start, seen, total = time.monotonic(), 0, 0.0
    for step in range(steps):
        at = step * task.batch % (len(labels) - task.batch + 1)
        if at < task.batch and step:
            order = torch.randperm(len(labels), generator=generator)
        index = order[at : at + task.batch]
        x = images[index] if task.augment is None else task.augment(images[index], generator)
        loss = F.cross_entropy(model(x), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        seen, total = seen + 1, total + float(loss.detach())
        if (step + 1) % 400 == 0:
            stage = getattr(optimizer, "stage", None)
            seconds = time.monotonic() - start
            print(f"  step {step + 1} of {steps}, {stage!r}, loss {total / seen:.3f}, {seconds:.0f} s", flush=True)
            seen, total = 0, 0.0


# ------------------------------------------------------------------------------------------------ tasks
def cnn(float_steps: int) -> Task:
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}
    return _digits("digits CNN", digits.ResidualCNN, torch.optim.SGD, options, 0.05, float_steps)


def transformer(float_steps: int) -> Task:
    options = {"lr": 1e-3, "weight_decay": 1e-2}
    return _digits("digits transformer", digits.DigitTransformer, torch.optim.AdamW, options, 2e-3, float_steps)


def _digits(
    name: str, make: Callable[[], nn.Module], base: type[torch.optim.Optimizer], options: Any, lr: float, steps: int
) -> Task:
    torch.manual_seed(0)
    data = digits.load()
    model = make()
    task = Task(name, model, (data.train_x, data.train_y), (data.test_x, data.test_y), base, options, 64)
    optimizer = base(model.parameters(), **{**options, "lr": lr})
    train(task, model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), steps, 0)
    return task


def resnet20(float_steps: int) -> Task:
    """From trained weights; the paper's experiment: weights alone are quantized."""
    parts = [oneshot.cifar(part, None) for part in ("train_a", "train_b")]
    train_set = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
    return Task(
        "ResNet-20",
        oneshot.realdata().load("cifar10_resnet20"),
        train_set,
        oneshot.cifar("test", None),
        torch.optim.SGD,
        options,
        128,
        augment=shifted,
        weights_only=True,
        qasso={"normalize": "mean"},
    )


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored at random, and shifted by up to four pixels."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    dx, dy = torch.randint(-4, 5, (2, len(images)), generator=generator)
    rows = torch.arange(32)
    y, x = (rows[None] + dy[:, None] + 4), (rows[None] + dx[:, None] + 4)
    padded = F.pad(images, (4, 4, 4, 4))
    return padded[torch.arange(len(images))[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


TASKS: dict[str, Callable[[int], Task]] = {"cnn": cnn, "transformer": transformer, "resnet20": resnet20}


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="cnn,transformer", metavar="A,B", help="default: %(default)s")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--sparsity", type=float, default=0.5, metavar="S", help="default: %(default)s")
    parser.add_argument("--bits", type=_pair, default=(4, 8), metavar="LOW,HIGH", help="default: 4,8")
    parser.add_argument("--bops", type=float, metavar="F", help="budget, as a fraction of the float model's")
    parser.add_argument("--steps", type=int, metavar="N", help="of each method; default: --epochs")
    parser.add_argument("--epochs", type=int, default=30, metavar="N", help="default: %(default)s")
    parser.add_argument("--float-steps", type=int, default=300, metavar="N", help="of the digits models before")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one line of JSON per run")
    return parser.parse_args()


def _pair(text: str) -> tuple[int, int]:
    low, high = text.split(",")
    return int(low), int(high)


if __name__ == "__main__":
    main()
