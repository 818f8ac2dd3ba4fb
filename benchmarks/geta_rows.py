"""GETA's row of ResNet-20 at length: a cut that is chosen and repaired without training, then trained in stretches.

    python -m benchmarks.geta_rows --folder runs/resnet20 --epochs 200                   # ResNet-56 teaches
    python -m benchmarks.geta_rows --folder runs/alone --epochs 100 --teacher none
    python -m benchmarks.geta_rows --folder runs/resnet20 --epochs 200 --show            # how far the run is

The mark (Qu et al. 2024, "Automatic Joint Structured Pruning and Quantization"): ResNet-20 on CIFAR-10, weights of 4 to
16 bits, activations in floats, at most 0.28 points below its own baseline at 4.5 % of the bit operations. Units are
chosen by sensitivity under a budget on multiply-accumulates, with 512 unlabelled images; what is left starts from its
repair, with weights of 4 bits (first and last layer 8; LSQ, a step per output channel). The run goes on from the folder
when the command is called again. The last step's model is tested, once, on all 10 000 test images.

The teacher's logits are computed once for each image and its mirror image, not for each shift.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import common, geta, oneshot
from benchmarks.common import section, table, timed

TEACHERS = {"resnet20": "cifar10_resnet20", "resnet56": "cifar10_resnet56"}
BATCH, CALIBRATION = 128, 512
OPTIONS = {"momentum": 0.9, "nesterov": True}
Batch = tuple[Tensor, Tensor, Tensor]


class Epochs:
    """CIFAR-10's training images in batches: shuffled, mirrored and shifted anew in each pass by torch's own generator.

    Args:
        logits: of the teacher for the images (n, classes) and their mirror images.
    """

    def __init__(self, images: Tensor, labels: Tensor, logits: tuple[Tensor, Tensor]) -> None:
        self.images, self.labels, self.logits = images, labels, logits

    def __len__(self) -> int:
        return len(self.labels) // BATCH

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.labels))
        for index in order.split(BATCH)[: len(self)]:
            images, mirrored = geta.shifted(self.images[index], torch.default_generator)
            plain, turned = (logits[index] for logits in self.logits)
            logits = torch.where(mirrored[:, None], turned, plain)
            yield images.contiguous(memory_format=torch.channels_last), self.labels[index], logits


def main() -> None:
    asked = _parsed()
    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)
    asked.folder.mkdir(parents=True, exist_ok=True)
    if asked.show:
        print(progress(asked.folder))
        return
    print(common.header(), flush=True)
    model = oneshot.realdata().load(TEACHERS["resnet20"])
    small = cut(model, asked)
    train_set = _cifar_train()
    with timed() as clock:
        result = trained(small, train_set, asked)
    test_set = oneshot.cifar("test", None)
    rows = [
        ["float", f"{accuracy(model, test_set):.2f}", "100", "100"],
        ["cut and repaired", f"{accuracy(small, test_set):.2f}", *_left(small)],
        ["trained", f"{accuracy(result, test_set):.2f}", *_left(result, small)],
    ]
    title = f"ResNet-20, {asked.epochs} epochs, teacher {asked.teacher}, seed {asked.seed}, {clock.seconds:.0f} CPU s"
    section(f"{title} in this stretch", table(["", "top-1 % of 10 000", "MACs %", "BOPs %"], rows))


def cut(model: nn.Module, asked: argparse.Namespace) -> gc.CompressedModel:
    """The cut and repaired model, which the folder keeps."""
    path = asked.folder / "cut.pt"
    if path.exists():
        found: gc.CompressedModel = gc.load(path)
        return found
    images = oneshot.cifar("train_a", CALIBRATION)[0]
    small = gc.compress(
        model, images[:BATCH], budget=gc.Budget(macs=asked.macs), round_to=asked.round_to,
        ranking="sensitivity", calibration=images.split(BATCH),
    )  # fmt: skip
    small.save(path)
    return small


def trained(
    small: gc.CompressedModel, train_set: tuple[Tensor, Tensor], asked: argparse.Namespace
) -> gc.CompressedModel:
    """Train with weights of 4 bits; goes on where the folder says."""
    images, labels = train_set
    logits = (torch.zeros(len(labels), 10),) * 2
    if asked.teacher != "none":
        logits = taught(images, asked)
    share = 0.0 if asked.teacher == "none" else geta.TEACHER_SHARE
    distill = gc.Distill(temperature=asked.temperature)

    def loss(output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy, and what the teacher says."""
        task = F.cross_entropy(output, batch[1])
        return task if not share else (1 - share) * task + share * distill.divergence(output, batch[2])

    training = gc.Training(
        epochs=asked.epochs, optimizer=torch.optim.SGD, lr=asked.lr, weight_decay=asked.decay, options=OPTIONS,
        folder=asked.folder / "run", save_every=195, log_every=65,
    )  # fmt: skip
    like = torch.channels_last  # the faster layout
    return gc.compress(
        small.module.to(memory_format=like), images[:BATCH].contiguous(memory_format=like),
        method="qat", bits=4, activation_bits=None, data=Epochs(images, labels, logits), loss=loss, training=training,
        calibration=images[:CALIBRATION].split(BATCH), seed=asked.seed,
    )  # fmt: skip


def taught(images: Tensor, asked: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The teacher's logits for the images and their mirror images, which the folder keeps."""
    path = asked.folder / f"{asked.teacher}.pt"
    if not path.exists():
        teacher = oneshot.realdata().load(TEACHERS[asked.teacher])
        fresh = path.with_suffix(".new")
        torch.save([geta.outputs(teacher, x, torch.channels_last) for x in (images, images.flip(3))], fresh)
        fresh.replace(path)
    plain, mirrored = torch.load(path)
    return plain, mirrored


def progress(folder: Path) -> str:
    """The last line of metrics of each twentieth of the run."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return "\n".join(str(line) for line in [*lines[:: max(1, len(lines) // 20)], lines[-1]])


def accuracy(model: nn.Module | gc.CompressedModel, test_set: tuple[Tensor, Tensor]) -> float:
    """Percent of the test images."""
    module = model.module if isinstance(model, gc.CompressedModel) else model
    logits = geta.outputs(module, test_set[0], torch.contiguous_format)
    return 100 * float((logits.argmax(1) == test_set[1]).double().mean())


def _left(model: gc.CompressedModel, before: gc.CompressedModel | None = None) -> list[str]:
    """MACs and bit operations that are left of the original's, in percent."""
    ratios = [100 * getattr(model.report, name).ratio for name in ("macs", "bops")]
    whole = [getattr(before.report, name).ratio for name in ("macs", "bops")] if before else [1.0, 1.0]
    return [f"{ratio * share:.2f}" for ratio, share in zip(ratios, whole, strict=True)]


def _cifar_train() -> tuple[Tensor, Tensor]:
    parts = [oneshot.cifar(part, None) for part in ("train_a", "train_b")]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the cut, checkpoints and metrics")
    parser.add_argument("--epochs", type=int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument("--teacher", choices=[*TEACHERS, "none"], default="resnet56", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=4.0, metavar="T", help="default: %(default)s")
    parser.add_argument("--macs", type=float, default=0.35, metavar="F", help="of the original's; default: %(default)s")
    multiple = "kept lengths are multiples; kernels take less time; default: %(default)s"
    parser.add_argument("--round-to", type=int, default=4, metavar="N", help=multiple)
    parser.add_argument("--lr", type=float, default=0.1, metavar="F", help="default: %(default)s")
    parser.add_argument("--decay", type=float, default=1e-4, metavar="F", help="weight decay; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--show", action="store_true", help="print how far the run is, and end")
    return parser.parse_args()


if __name__ == "__main__":
    main()
