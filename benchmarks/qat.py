"""Quantization-aware training by LSQ beside the post-training quantization that it starts from.

    python -m benchmarks.qat                                    # three models, four pairs of bits; about 20 minutes
    python -m benchmarks.qat --models digits-cnn --seeds 5
    python -m benchmarks.qat --models resnet20 --bits 4/8,2/2

Both digits models are trained in floats first. ResNet-20 has real weights, from the shared folder beside the checkout.
"After training" is `compress(bits=…, repair=None)` on calibration data, with ranges from the least to the largest
value; "least squares" is the same with ranges of least squared error; "repaired" is that with second-order rounding
and the repair, which `method="qat"` starts from here. Of each bit width one run per seed is shown, of the same
length; "least gain" is that of the worst run over the best of the three before training.
Test data are never trained on, and do not choose what is returned.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import common, demo, digits, oneshot
from benchmarks.common import append_json, section, table, timed

BITS = ("4/4", "3/3", "2/2", "4/8")
CIFAR_TRAINING, CIFAR_TEST, CIFAR_BATCH = 12_800, 2000, 64
CALIBRATION_BATCHES = 8

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A trained model, and data to train it further.

    Attributes:
        data: batches of inputs and labels, in a new order and form in every pass.
        epochs: passes over the data.
        seeds: runs at most.
        lr: of the weights; None: the default of the model's kind.
    """

    name: str
    model: nn.Module
    data: Iterable[Batch]
    test: Batch
    epochs: int
    seeds: int = 3
    lr: float | None = None


def main() -> None:
    options = _options()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    columns = [
        "weights/activations", "after training", "least squares", "repaired", "qat, by seed", "least gain", "s per run"
    ]  # fmt: skip
    for name in options.models.split(","):
        case = CASES[name]()
        rows = [_row(case, bits, min(options.seeds, case.seeds), options.json) for bits in options.bits.split(",")]
        title = f"{case.name}: % of {len(case.test[1])} test images; in floats {_accuracy(case, case.model):.1f}"
        section(f"{title}, {case.epochs} epochs of {len(list(case.data))} batches", table(columns, rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CASES), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--bits", default=",".join(BITS), metavar="W/A,W/A", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one line of JSON per row")
    return parser.parse_args()


def _row(case: Case, pair: str, seeds: int, file: Path | None) -> list[str]:
    """Accuracies of three kinds of post-training quantization, and of training with each seed."""
    weights, activations = (int(bits) for bits in pair.split("/"))
    torch.manual_seed(0)
    calibration = [images for _, (images, _) in zip(range(CALIBRATION_BATCHES), case.data, strict=False)]
    quantized = partial(gc.compress, case.model, case.test[0][:2], progress=False)
    once = partial(quantized, sparsity=0, calibration=calibration)
    least = _least_squares(weights, activations)
    after = once(bits=weights, activation_bits=activations, repair=None)
    squares = once(quantization=least, repair=None)
    start = once(quantization=replace(least, rounding="second_order"))
    found = [_accuracy(case, small) for small in (after, squares, start)]
    with timed() as clock:
        trained = [
            quantized(
                method="qat", bits=weights, activation_bits=activations, data=case.data, loss=_loss,
                epochs=case.epochs, lr=case.lr, seed=seed, rounding="second_order", calibration=calibration,
            )
            for seed in range(seeds)
        ]  # fmt: skip
    runs, seconds = [_accuracy(case, small) for small in trained], clock.seconds / seeds
    append_json(file, {"model": case.name, "bits": pair, "before": found, "qat": runs})
    by_seed = ", ".join(f"{accuracy:.1f}" for accuracy in runs)
    return [
        pair, *(f"{accuracy:.1f}" for accuracy in found), by_seed, f"{min(runs) - max(found):+.1f}", f"{seconds:.0f}"
    ]  # fmt: skip


def _least_squares(weights: int, activations: int) -> gc.PostTraining:
    return gc.PostTraining(
        gc.QuantConfig(
            weights=gc.QuantSpec(weights, granularity="channel", observer="mse"),
            activations=gc.QuantSpec(activations, symmetric=False, observer="mse"),
        )
    )


def _loss(output: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(output, batch[1])


@torch.no_grad()
def _accuracy(case: Case, module: Callable[[Tensor], Tensor]) -> float:
    """% of the test images that are classified rightly."""
    images, labels = case.test
    hits = sum(int((module(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True))
    return 100 * hits / len(labels)


# ------------------------------------------------------------------------------------------------ models and data
def _digits(name: str, make: Callable[[], nn.Module], epochs: int, learning_rate: float, qat: dict[str, Any]) -> Case:
    torch.manual_seed(0)
    model, data = make(), digits.load()
    demo.train(model, data, epochs, learning_rate, f"{name}: training")
    return Case(name, model.eval(), demo.Batches(data), (data.test_x, data.test_y), **qat)


class Augmented:
    """CIFAR-10 images in a new order, flipped and shifted by up to four pixels, in batches."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels) // CIFAR_BATCH

    def __iter__(self) -> Iterator[Batch]:
        for chosen in torch.randperm(len(self.labels)).split(CIFAR_BATCH)[: len(self)]:
            images = F.pad(self.images[chosen], (4, 4, 4, 4))
            places: Sequence[list[int]] = torch.randint(0, 9, (len(chosen), 2)).tolist()
            cut = torch.stack([x[:, i : i + 32, j : j + 32] for x, (i, j) in zip(images, places, strict=True)])
            mirrored = torch.rand(len(chosen), 1, 1, 1) < 0.5
            yield torch.where(mirrored, cut.flip(3), cut), self.labels[chosen]


def _resnet20() -> Case:
    model = oneshot.realdata().load("cifar10_resnet20")
    data = Augmented(*oneshot.cifar("train_a", CIFAR_TRAINING))
    return Case("ResNet-20", model, data, oneshot.cifar("test", CIFAR_TEST), epochs=1, seeds=1)


CASES: dict[str, Callable[[], Case]] = {
    "digits-cnn": lambda: _digits(
        "digits, residual CNN", lambda: digits.ResidualCNN(8), 10, 3e-3, {"epochs": 10}
    ),
    "digits-transformer": lambda: _digits(
        "digits, transformer", lambda: digits.DigitTransformer(32), 45, 4e-3, {"epochs": 15, "lr": 1e-3}
    ),
    "resnet20": _resnet20,
}  # fmt: skip

if __name__ == "__main__":
    main()
