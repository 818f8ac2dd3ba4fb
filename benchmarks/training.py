"""What a training step costs with fake-quantized weights and activations, beside the float model's.

    python -m benchmarks.training                                # ResNet-20, VGG7 and a small BERT, 1 and 2 threads
    python -m benchmarks.training --models resnet20 --threads 1 --rounds 40
    python -m benchmarks.training --models vgg7 --batch 16 --variants "weights,weights and activations"
    python -m benchmarks.training --compiled                     # the same through torch.compile (needs a C++ compiler)

A step is forward, backward and SGD with momentum. The fake-quantized variants are what `graphcomp.prepare` returns,
first with SGD as it is, then with QASSO in each of its stages (weights and activations, 4 to 8 bits, half of the units
to go); "shrunk" goes on without them. "Recomputed" is with `prepare(…, recompute=True)`. The variants take turns, one
step each, so that whatever else the machine does meets all of them: ratios are those of neighbouring steps, their
median and their quartiles. With one thread CPU time counts, with more the time on the clock. Memory is what a step
holds when the backward pass starts, and gradients: tensors saved for it (each storage once), parameters, buffers, and
the optimizer's state.

Freed memory stays with the process (glibc is told so), as under jemalloc and tcmalloc. Else large tensors are given
back to the system and faulted in again, which costs a step up to 15 %, by chance the one variant or the other.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp
from benchmarks import common, models
from benchmarks.common import section, table
from graphcomp.training.schedule import Schedule, Stage

LEARNING_RATE, MOMENTUM = 1e-3, 0.9
QUANTIZER_LEARNING_RATE = 1e-6  # how well they learn does not matter here; that ranges stay sensible does
WARM_UP = 2  # rounds that do not count
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A model and the batch it is trained on."""

    title: str
    model: Callable[[], nn.Module]
    size: int
    batch: Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Variant:
    """One way to train: a module that gives logits, and its optimizer."""

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, inputs: Tensor, labels: Tensor) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        self.loss(inputs, labels).backward()
        self.optimizer.step()

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Forward."""
        found = self.module(inputs)
        return F.cross_entropy(found if isinstance(found, Tensor) else found["logits"], labels)


LONG = 100_000  # steps: longer than any run here, which so stays in one stage
STAGES = {
    Stage.WARMUP: Schedule(LONG, warmup=0.5),
    Stage.PROJECTION: Schedule(LONG, warmup=0, projection=0.5),
    Stage.JOINT: Schedule(LONG, warmup=0, projection=0, joint=0.5),
    Stage.COOLDOWN: Schedule(LONG, warmup=0, projection=0, joint=1, pruning_periods=1),
}

CASES = {
    "resnet20": Case("ResNet-20, 32 x 32", models.resnet20, 128, lambda n: images(n)),
    "vgg7": Case("VGG7, 32 x 32", models.vgg7, 64, lambda n: images(n)),
    "bert": Case("small BERT, 64 tokens", models.small_bert, 8, lambda n: tokens(n, 64)),
}


def main() -> None:
    options = _options()
    warnings.simplefilter("ignore")
    keep_freed_memory()
    print(common.header(), flush=True)
    for name in options.models.split(","):
        rows = []
        for threads in map(int, options.threads.split(",")):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            rows += measure(CASES[name], threads, options)
        columns = ["threads", "variant", "ms a step", "to float", "quartiles", "MiB", "to float"]
        title = f"{CASES[name].title}, batch {options.batch or CASES[name].size}"
        section(title + (", compiled" if options.compiled else ""), table(columns, rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CASES), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--threads", default="1,2", metavar="N,M", help="default: %(default)s")
    parser.add_argument(
        "--rounds", type=int, default=30, metavar="N", help="steps of each variant; default: %(default)s"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="examples in a batch; default: 128, 64 and 8")
    parser.add_argument("--variants", default="", metavar="A,B", help="those and the float model; default: all")
    parser.add_argument("--compiled", action="store_true", help="every variant through torch.compile")
    return parser.parse_args()


def keep_freed_memory() -> None:
    """Tell glibc not to give memory back; other C libraries are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


# ------------------------------------------------------------------------------------------------ batches
def images(n: int) -> tuple[Tensor, Tensor]:
    """(n, 3, 32, 32) and labels (n,)."""
    return torch.randn(n, 3, 32, 32), torch.randint(0, 10, (n,))


def tokens(n: int, length: int) -> tuple[Tensor, Tensor]:
    """(n, length) of token ids and labels (n,)."""
    return torch.randint(0, 30_000, (n, length)), torch.randint(0, 2, (n,))


# ------------------------------------------------------------------------------------------------ variants
def variants(case: Case, inputs: Tensor, names: Collection[str] = ()) -> list[Variant]:
    """The same model and weights in each, with tensors of its own; of those in `names`, if any are given."""
    model = case.model()
    plain = copy.deepcopy(model).train()
    found = [Variant("float", plain, torch.optim.SGD(plain.parameters(), LEARNING_RATE, MOMENTUM))]
    makers: dict[str, Callable[[], Variant]] = {}
    for what, activation_bits in (("weights", None), ("weights and activations", "same")):
        for name, again in ((what, False), (f"{what} recomputed", True)):
            makers[name] = partial(_with_sgd, name, model, inputs, activation_bits, again)
    for stage in STAGES:
        makers[f"QASSO {stage.name.lower()}"] = partial(_with_qasso, stage, model, inputs)
    makers["QASSO cooldown shrunk"] = partial(_shrunk, model, case)
    return found + [make() for name, make in makers.items() if not names or name in names]


def _with_sgd(name: str, model: nn.Module, inputs: Tensor, activation_bits: Any, again: bool) -> Variant:
    ready = graphcomp.prepare(
        model, (inputs,), bits=8, activation_bits=activation_bits, prune=(), recompute=again
    ).train()
    own = [p for _, quantizer in ready.quantizers() for p in quantizer.parameters() if p.requires_grad]
    rest = [p for p in ready.parameters() if p.requires_grad and not any(p is other for other in own)]
    learned = {"params": own, "lr": QUANTIZER_LEARNING_RATE, "foreach": True}  # scalars, as QASSO has them
    return Variant(name, ready, torch.optim.SGD([{"params": rest}, learned], LEARNING_RATE, MOMENTUM))


def _with_qasso(stage: Stage, model: nn.Module, inputs: Tensor) -> Variant:
    ready = graphcomp.prepare(model, (inputs,), bits=(4, 8)).train()
    optimizer = graphcomp.QASSO(
        ready, torch.optim.SGD, lr=LEARNING_RATE, momentum=MOMENTUM, lr_quant=QUANTIZER_LEARNING_RATE, sparsity=0.5,
        schedule=STAGES[stage],
    )  # fmt: skip
    return Variant(f"QASSO {stage.name.lower()}", ready, optimizer)


def _shrunk(model: nn.Module, case: Case) -> Variant:
    """After the one step of its joint stage, and the first of its cool-down."""
    inputs, labels = case.batch(2)
    whole = _with_qasso(Stage.COOLDOWN, model, inputs)
    for _ in range(2):
        whole.step(inputs, labels)
    assert isinstance(whole.optimizer, graphcomp.QASSO)
    return Variant("QASSO cooldown shrunk", whole.optimizer.shrink(), whole.optimizer)


# ------------------------------------------------------------------------------------------------ measuring
def measure(case: Case, threads: int, options: argparse.Namespace) -> list[list[str]]:
    """Rows of the table."""
    inputs, labels = case.batch(options.batch or case.size)
    found = variants(case, inputs, [name for name in options.variants.split(",") if name])
    memory = [held(variant, inputs, labels) for variant in found]
    if options.compiled:
        found = [Variant(v.name, torch.compile(v.module), v.optimizer) for v in found]
    times = turns(found, inputs, labels, options.rounds, time.process_time if threads == 1 else time.perf_counter)
    rows = []
    for k, variant in enumerate(found):
        ratios = [mine / plain for mine, plain in zip(times[k], times[0], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        took, quartiles = f"{1e3 * statistics.median(times[k]):.1f}", f"{low:.3f} – {high:.3f}"
        size, larger = f"{memory[k] / MIB:.1f}", f"{memory[k] / memory[0]:.3f}"
        rows.append([str(threads), variant.name, took, f"{median:.3f}", quartiles, size, larger])
    return rows


def turns(
    found: list[Variant], inputs: Tensor, labels: Tensor, rounds: int, clock: Callable[[], float]
) -> list[list[float]]:
    """Seconds of each step of each variant; the garbage collector runs between the rounds only."""
    times: list[list[float]] = [[] for _ in found]
    for number in range(WARM_UP + rounds):
        gc.collect()
        gc.disable()
        for variant, its in zip(found, times, strict=True):
            start = clock()
            variant.step(inputs, labels)
            if number >= WARM_UP:
                its.append(clock() - start)
        gc.enable()
    return times


def held(variant: Variant, inputs: Tensor, labels: Tensor) -> int:
    """Bytes that a step holds when the backward pass starts, and gradients."""
    variant.step(inputs, labels)  # so that the optimizer has its state
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # lest its place is given to another
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = variant.loss(inputs, labels)
    state = [value for its in variant.optimizer.state.values() for value in its.values() if isinstance(value, Tensor)]
    parameters = list(variant.module.parameters())
    for tensor in (*parameters, *variant.module.buffers(), *state, *(p.grad for p in parameters if p.grad is not None)):
        keep(tensor)
    del loss
    return sum(storages.values())


if __name__ == "__main__":
    main()
