"""Models and data that claims are shown on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import common, models, oneshot, qat

Batch = tuple[Tensor, Tensor]


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
