"""Accuracy of joint pruning and quantization-aware training, beside its parts one after the other.

    python -m benchmarks.geta                                     # digits: CNN and transformer, three seeds
    python -m benchmarks.geta --tasks cnn --sparsity 0.7 --bits 2,4
    python -m benchmarks.geta --tasks resnet20 --methods shrunk …  # CIFAR-10, shortened: see docs/measured.md
    python -m benchmarks.geta --tasks vgg7 --methods shrunk …

Every method starts from the same float model and gets the same number of steps: joint (QASSO), shrunk (the same, but
its cool-down trains what `graphcomp.shrink` leaves, with a learning rate of its own), sequential (half of the steps to
prune in floats, half to quantize what is left), quantize only, prune only (HESSO). The float model is trained, but for
VGG7, which starts from random weights. Bit operations count a float operand as 32 bits. CIFAR-10 and the weights of
ResNet-20 come from the shared folder beside the checkout.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import common, digits, models, oneshot
from benchmarks.common import append_json, section, table
from graphcomp.cost import Bops, CostModel

CALIBRATION = 128


@dataclass(frozen=True)
class Task:
    """A trained model, and how it is trained on.

    Attributes:
        train, test: images and labels.
        base, options: the optimizer; `lr` is its peak.
        augment: images and a generator -> other images, and which of them are mirrored.
        weights_only: activations stay float.
        layer_bits: ranges of bits of layers that have another than is asked for.
        qasso: options of it.
        channels_last: the layout of images and weights in training.
        scratch: the weights are random.
    """

    name: str
    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    base: type[torch.optim.Optimizer]
    options: dict[str, Any]
    batch: int
    augment: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]] | None = None
    weights_only: bool = False
    layer_bits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    qasso: dict[str, Any] = field(default_factory=dict)
    channels_last: bool = False
    scratch: bool = False

    @property
    def layout(self) -> torch.memory_format:
        """Of images and weights in training."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def accuracy(self, model: nn.Module, first: int | None = None) -> float:
        """Percent of the test images, or of the first so many."""
        images, labels = self.test[0][:first], self.test[1][:first]
        logits = outputs(model, images, self.layout)
        return 100 * float((logits.argmax(1) == labels).double().mean())


@dataclass(frozen=True)
class Options:
    """What is asked of every method."""

    steps: int
    sparsity: float
    bits: tuple[int, int]
    bops: float | None
    seed: int
    before: int = 0
    distill: float = 0.0
    save: Path | None = None

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
        accuracy = "–" if task.scratch else f"{task.accuracy(task.model):.2f}"
        rows = [["float", accuracy, "100", "100", "32 / 32", "–", "–"]]
        for method in options.methods.split(","):
            found = []
            for seed in range(options.seeds):
                asked = Options(
                    steps,
                    options.sparsity,
                    options.bits,
                    options.bops,
                    seed,
                    options.before,
                    options.distill,
                    options.save,
                )
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


def shrunk(task: Task, asked: Options) -> gc.CompressedModel:
    """Jointly, in `before` steps; then what is left, with a learning rate that begins anew: its cool-down, or of a
    model that was not trained before, warm-up, projection and cool-down."""
    before = asked.before or asked.steps // 4
    rest = asked.steps - before
    marks = teacher_of(task, asked.distill) if asked.distill else None
    ready = _prepared(task, task.model, asked.bits)
    first, second = round(0.05 * before), round(0.15 * before)
    schedule = gc.Schedule(before, warmup=first, projection=second, joint=before - 1 - first - second)
    gentle = {**task.qasso, **task.options, "lr": GENTLE * task.options["lr"]}
    optimizer = gc.QASSO(ready, task.base, schedule=schedule, sparsity=asked.sparsity, budget=asked.budget, **gentle)
    train(task, ready, optimizer, None, before, asked, marks, tell=not task.scratch)
    small = gc.shrink(ready).to(memory_format=task.layout)
    print(f"  left of each group: { {g.name: (len(u), g.size) for g, u in ready.kept().items()} }", flush=True)
    budget = None
    if asked.bops is not None:  # of the whole model
        budget = gc.Budget(bops=asked.bops * float(Bops(CostModel(ready.session.plan)).layers()))
    after = gc.Schedule(rest, joint=0, **(SCRATCH if task.scratch else {"warmup": 0, "projection": 0}))
    optimizer = gc.QASSO(small, task.base, schedule=after, sparsity=0.0, budget=budget, **task.options)
    train(task, small, optimizer, ramp_and_cosine(optimizer, rest), rest, asked, marks)
    print(f"  bits of weights and what they meet: {small.bits()}", flush=True)
    return gc.finalize(small)


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
    "shrunk": shrunk,
    "sequential": sequential,
    "quantize only": quantize_only,
    "prune only": prune_only,
}
DEFAULT = ["joint", "sequential", "quantize only", "prune only"]


def _qasso(
    task: Task, model: nn.Module, steps: int, asked: Options, *, bits: tuple[int, int] | None, **options: Any
) -> gc.CompressedModel:
    ready = _prepared(task, model, bits)
    options = {**task.qasso, **options}
    parts = {
        "transformer": ready.session.has_attention,
        "prune": options["sparsity"] != 0,
        "quantize": bits is not None,
    }
    schedule = gc.Schedule.of(steps, **parts)  # as `compress` has it: no steps for what is not done
    optimizer = gc.QASSO(ready, task.base, schedule=schedule, **task.options, **options)
    train(task, ready, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), steps, asked)
    return gc.finalize(ready)


def _prepared(task: Task, model: nn.Module, bits: tuple[int, int] | None) -> gc.Prepared:
    model.train()
    images = task.train[0][:CALIBRATION]
    ready = gc.prepare(
        model,
        images,
        bits=bits,
        activation_bits=None if task.weights_only else "same",
        layer_bits=task.layer_bits if bits else None,
    )
    return ready.to(memory_format=task.layout)


# ------------------------------------------------------------------------------------------------ training
SCRATCH = {"warmup": 0.4, "projection": 0.2}
"""Of the steps of a model that begins with random weights, when its units are gone."""

GENTLE = 0.3
"""Of the learning rate, while units go."""

RAMP = 100
"""Steps in which the learning rate rises, where it begins anew."""

TEACHER_SHARE = 0.7
"""Of the loss, where a teacher has one."""

EVERY, SOME = 400, 2000
"""Steps from one line to the next, and the first test images that it tells the accuracy on."""


@dataclass(frozen=True)
class Teacher:
    """Logits of the float model for each training image: (n, classes) as it is and mirrored; and the temperature."""

    plain: Tensor
    mirrored: Tensor
    temperature: float

    def loss(self, logits: Tensor, index: Tensor, mirrored: Tensor) -> Tensor:
        """`Distill.divergence` of the logits. The teacher sees no shifts, so that it runs but twice for an image."""
        wanted = torch.where(mirrored[:, None], self.mirrored[index], self.plain[index])
        return gc.Distill(temperature=self.temperature).divergence(logits, wanted)


def teacher_of(task: Task, temperature: float) -> Teacher:
    """The float model of the task as a teacher."""
    images = task.train[0]
    return Teacher(
        outputs(task.model, images, task.layout), outputs(task.model, images.flip(3), task.layout), temperature
    )


def outputs(model: nn.Module, images: Tensor, layout: torch.memory_format) -> Tensor:
    """In eval mode, which it leaves the model in."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(x.contiguous(memory_format=layout)) for x in images.split(500)])


def ramp_and_cosine(optimizer: Any, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Up in a straight line, then down to 0."""
    rising = min(RAMP, max(1, steps // 10))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: min((k + 1) / rising, 1) * 0.5 * (1 + math.cos(math.pi * max(k - rising, 0) / (steps - rising))),
    )


def train(
    task: Task,
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
    steps: int,
    asked: Options | None = None,
    teacher: Teacher | None = None,
    tell: bool = True,
) -> None:
    """Steps on random batches, the epochs reshuffled; with lines on how it goes, if asked."""
    generator = torch.Generator().manual_seed(asked.seed if asked else 0)
    images, labels = task.train
    order = torch.randperm(len(labels), generator=generator)
    model.train()
    start, seen, total = time.monotonic(), 0, 0.0
    for step in range(steps):
        at = step * task.batch % (len(labels) - task.batch + 1)
        if at < task.batch and step:
            order = torch.randperm(len(labels), generator=generator)
        index = order[at : at + task.batch]
        x, mirrored = images[index], torch.zeros(len(index), dtype=torch.bool)
        if task.augment is not None:
            x, mirrored = task.augment(x, generator)
        logits = model(x.contiguous(memory_format=task.layout))
        loss = F.cross_entropy(logits, labels[index])
        if teacher is not None:
            loss = (1 - TEACHER_SHARE) * loss + TEACHER_SHARE * teacher.loss(logits, index, mirrored)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        seen, total = seen + 1, total + float(loss.detach())
        if asked is not None and tell and ((step + 1) % EVERY == 0 or step + 1 == steps):
            _tell(task, model, optimizer, f"step {step + 1} of {steps}", total / seen, time.monotonic() - start, asked)
            seen, total = 0, 0.0


def _tell(task: Task, model: nn.Module, optimizer: Any, at: str, loss: float, seconds: float, asked: Options) -> None:
    """A line on how the run goes; the trained module as it is, where it is to be saved."""
    accuracy = task.accuracy(model, SOME)
    model.train()
    stage = getattr(optimizer, "stage", None)
    print(f"  {at}, {stage!r}, loss {loss:.3f}, {accuracy:.2f} % of {SOME}, {seconds:.0f} s", flush=True)
    if asked.save is not None:
        torch.save(model.state_dict(), asked.save)


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
    train(task, model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), steps)
    return task


def resnet20(float_steps: int) -> Task:
    """From trained weights; the paper's experiment: weights alone are quantized."""
    model = oneshot.realdata().load("cifar10_resnet20")
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
    ends = {"conv1": (8, 16), "linear": (8, 16)}
    return _cifar("ResNet-20", model, torch.optim.SGD, options, 128, weights_only=True, layer_bits=ends)


def vgg7(float_steps: int) -> Task:
    """From random weights; weights and activations are quantized."""
    torch.manual_seed(0)
    options = {"lr": 2e-3, "lr_quant": 1e-4, "weight_decay": 1e-4}
    return _cifar("VGG7", models.vgg7(), torch.optim.Adam, options, 64, scratch=True)


def _cifar(
    name: str, model: nn.Module, base: type[torch.optim.Optimizer], options: dict[str, Any], batch: int, **about: Any
) -> Task:
    parts = [oneshot.cifar(part, None) for part in ("train_a", "train_b")]
    train_set = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    qasso = {"saliency": "taylor", "normalize": "mean"}
    test_set = oneshot.cifar("test", None)
    return Task(
        name, model, train_set, test_set, base, options, batch, shifted, qasso=qasso, channels_last=True, **about
    )


def shifted(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirrored at random, and shifted by up to four pixels; which are mirrored."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    dx, dy = torch.randint(-4, 5, (2, len(images)), generator=generator)
    rows = torch.arange(32)
    y, x = (rows[None] + dy[:, None] + 4), (rows[None] + dx[:, None] + 4)
    padded = F.pad(images, (4, 4, 4, 4))
    return padded[torch.arange(len(images))[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2), flip


TASKS: dict[str, Callable[[int], Task]] = {"cnn": cnn, "transformer": transformer, "resnet20": resnet20, "vgg7": vgg7}


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="cnn,transformer", metavar="A,B", help="default: %(default)s")
    parser.add_argument("--methods", default=",".join(DEFAULT), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--sparsity", type=float, default=0.5, metavar="S", help="default: %(default)s")
    parser.add_argument("--bits", type=_pair, default=(4, 8), metavar="LOW,HIGH", help="default: 4,8")
    parser.add_argument("--bops", type=float, metavar="F", help="budget, as a fraction of the float model's")
    parser.add_argument("--steps", type=int, metavar="N", help="of each method; default: --epochs")
    parser.add_argument("--epochs", type=int, default=30, metavar="N", help="default: %(default)s")
    parser.add_argument("--float-steps", type=int, default=300, metavar="N", help="of the digits models before")
    parser.add_argument("--before", type=int, default=0, metavar="N", help="steps before shrinking; default: a quarter")
    parser.add_argument("--distill", type=float, default=0.0, metavar="T", help="temperature; the float model teaches")
    parser.add_argument("--save", type=Path, metavar="FILE", help="what is trained, as it goes on")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one line of JSON per run")
    return parser.parse_args()


def _pair(text: str) -> tuple[int, int]:
    low, high = text.split(",")
    return int(low), int(high)


if __name__ == "__main__":
    main()
