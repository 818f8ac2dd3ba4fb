"""Scores per cost beside scores at equal MACs: ResNets on CIFAR-10, and a small U-Net on drawn shapes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from benchmarks.claims.cases import Batch, Case
from benchmarks.claims.rows import accuracy, chosen, folder_bytes, loss_of, milliseconds
from benchmarks.common import append_json, section, table
from graphcomp.methods.taylor2.method import Taylor2

COLUMNS = [
    "what", "% of test", "MACs", "params", "bit operations", "units removed", "C0, kB", "C4, kB", "folder, kB",
    "ms of the file", "s",
]  # fmt: skip
MACS = (0.4, 0.25)
"""Share of the MACs that is left."""
ROWS: dict[str, dict[str, Any]] = {
    "score": {"cost": None},
    "score per cost": {},
    "masked, score": {"cost": None, "tune": "masked"},
    "masked, score per cost": {"tune": "masked"},
    "score per cost, a teacher": {"tune": "distill"},
}
"""What is compared -> options of the method."""


# ------------------------------------------------------------------------------------------------ drawn shapes
SHAPES, SIZE, NOISE = 3, 32, 0.6
"""Kinds of shapes (disks, squares, crosses) beside the background, pixels of a side, and how far noise goes."""


def drawn(count: int, seed: int) -> Batch:
    """Noisy images (n, 1, 32, 32) of one to three shapes, and the shape at each pixel (n, 32, 32), 0 the background."""
    draws = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    images, labels = torch.zeros(count, SIZE, SIZE), torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    for k in range(count):
        for _ in range(int(torch.randint(1, 4, (), generator=draws))):
            kind = int(torch.randint(SHAPES, (), generator=draws))
            y, x, r = (int(torch.randint(low, high, (), generator=draws)) for low, high in ((4, 28), (4, 28), (3, 7)))
            down, right = (rows - y).abs(), (columns - x).abs()
            where = [
                down.square() + right.square() <= r * r,
                torch.maximum(down, right) <= r - 1,
                (torch.minimum(down, right) <= r // 3) & (torch.maximum(down, right) <= r),
            ][kind]
            images[k][where], labels[k][where] = 0.5 + float(torch.rand((), generator=draws)), kind + 1
    return (images + NOISE * torch.randn(images.shape, generator=draws))[:, None], labels


class UNet(nn.Module):
    """(n, 1, 32, 32) -> (n, 4, 32, 32): three scales with skips between them, twice as wide at each."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()

        def block(read: int, made: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for k in range(2):
                layers += [nn.Conv2d(made if k else read, made, 3, padding=1, bias=False), nn.BatchNorm2d(made)]
                layers.append(nn.ReLU())
            return nn.Sequential(*layers)

        a, b, c = width, 2 * width, 4 * width
        self.down1, self.down2, self.bottom = block(1, a), block(a, b), block(b, c)
        self.raise2, self.raise1 = nn.ConvTranspose2d(c, b, 2, 2), nn.ConvTranspose2d(b, a, 2, 2)
        self.up2, self.up1, self.head = block(2 * b, b), block(2 * a, a), nn.Conv2d(a, SHAPES + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        low = self.bottom(F.max_pool2d(two, 2))
        two = self.up2(torch.cat([two, self.raise2(low)], 1))
        return self.head(self.up1(torch.cat([one, self.raise1(two)], 1)))


class Batches:
    """Batches of 32 in a new order in every pass."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels) // 32

    def __iter__(self) -> Iterator[Batch]:
        for rows in torch.randperm(len(self.labels)).split(32)[: len(self)]:
            yield self.images[rows], self.labels[rows]


def unet(images: int) -> Case:
    """A U-Net that was trained on drawn shapes for twelve passes, and other shapes to test it on."""
    data = Batches(*drawn(min(images, 1600), 0))
    torch.manual_seed(0)
    model = UNet()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(12):
        for batch in data:
            optimizer.zero_grad()
            loss_of(model(batch[0]), batch).backward()
            optimizer.step()
    return Case("U-Net, drawn shapes", lambda seed: model, data, drawn(400, 1), lr=0.01, epochs=3)


@torch.no_grad()
def overlap(case: Case, module: Callable[[Tensor], Tensor]) -> float:
    """Mean over the kinds of shapes of the intersection over the union on the test images, in %."""
    images, labels = case.test
    found = torch.cat([module(x).argmax(1) for x in images.split(100)])
    kinds = range(1, SHAPES + 1)
    both = [float(((found == k) & (labels == k)).sum()) for k in kinds]
    either = [float(((found == k) | (labels == k)).sum()) for k in kinds]
    return 100 * sum(b / max(e, 1) for b, e in zip(both, either, strict=True)) / len(both)


# ------------------------------------------------------------------------------------------------ the claim
@dataclass(frozen=True)
class Setting:
    """What all rows of a table share.

    Attributes:
        measure: % of the test data.
        epochs: passes over the data.
    """

    case: Case
    measure: Callable[[Case, Callable[[Tensor], Tensor]], float]
    epochs: int
    options: argparse.Namespace

    def row(self, what: str, method: Taylor2, **asked: Any) -> list[str]:
        """Compress with each seed and return a row of the table: the test by seed, means of the rest.

        C0 and C4 are of the codes, as all claims have them; without codes, of the parameters in float32.
        """
        runs, case = [], self.case
        for seed in range(self.options.seeds):
            start = time.perf_counter()
            small = gc.compress(
                case.model(seed), case.test[0][:2], method=method, data=case.data, loss=loss_of, seed=seed,
                training=gc.Training(epochs=self.epochs, lr=case.lr, **taught(method, case.model(seed))),
                progress=False, **asked,
            )  # fmt: skip
            report: Any = small.report
            seconds = time.perf_counter() - start
            costs = report.macs.ratio, report.params.ratio, report.bops.ratio, report.units_removed
            floats = 4.0 * report.params.after
            sizes = report.sizes.get("C0", floats), report.sizes.get("C4", floats), folder_bytes(small)
            runs.append((self.measure(case, small), *costs, *sizes, milliseconds(case, small), seconds))
        append_json(self.options.json, {"case": case.name, "what": what, "runs": runs})
        mean = [sum(own) / len(runs) for own in zip(*runs, strict=True)]
        by_seed = " ".join(f"{own[0]:.2f}" for own in runs)
        sizes_kb = [f"{own / 1000:.2f}" for own in mean[5:8]]
        ratios = [f"{own:.2%}" for own in mean[1:4]]
        return [what, by_seed, *ratios, f"{mean[4]:.0f}", *sizes_kb, f"{mean[8]:.2f}", f"{mean[9]:.0f}"]


def taught(method: Taylor2, model: nn.Module) -> dict[str, Any]:
    """A teacher whose classes are in dim 1, of images and of pixels, where the method learns from one."""
    return {"teacher": model, "distill": gc.Distill(dim=1)} if method.tune == "distill" else {}


def taylor2(case: Case, options: argparse.Namespace) -> None:
    """Compare scores with scores per cost at equal MACs; then units and bits at equal bit operations."""
    setting = Setting(case, overlap if case.test[1].dim() > 1 else accuracy, options.epochs or case.epochs, options)
    wanted: list[tuple[str, Taylor2, dict[str, Any]]] = [
        (f"{name}, MACs at {share:.0%}", Taylor2(**own), {"budget": gc.Budget(macs=share)})
        for share in (MACS[:1] if options.short else MACS)
        for name, own in ROWS.items()
    ]
    if not options.short:
        asked = {"bits": 4, "budget": gc.Budget(bops=0.0065)}
        wanted.append(("4 bits, bit operations at 0.65%", Taylor2(), asked))
        wanted.append(("pruned at the quantized weights", Taylor2(quantize_from=0.2, until=0.6), asked))
    rows = [setting.row(what, method, **asked) for what, method, asked in wanted if chosen(options, what)]
    start = setting.measure(case, case.model(0).eval())
    section(f"Taylor in two stages, {case.name}; whole, in floats {start:.2f} %", table(COLUMNS, rows))
