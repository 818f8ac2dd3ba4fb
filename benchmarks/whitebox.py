"""The white box: any sparsity and any range of bits that is asked for is met, and kept in every step on the way.

    python -m benchmarks.whitebox                       # four models, three ranges, nine sparsities: a few minutes
    python -m benchmarks.whitebox --models bert --bits 2-4

Each cell is one run of QASSO on a tiny model, on the digits or on random tokens. In every step from projection on, the
bits of every quantizer, read off its step, range and exponent, are between the fewest and what is allowed by then. At
the end as many units are gone as were asked for, all bits are whole, and `finalize` finds that trained, sliced and
folded model compute the same. A cell that lacks any of this says so.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import digits
from benchmarks.common import brief, header, import_torchvision, section, table
from graphcomp import QASSO, Prepared, Schedule, Stage, finalize, prepare
from graphcomp.errors import GraphcompError
from graphcomp.quantization.quantizers.geta import GetaQuantizer

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
BITS = ((2, 4), (4, 8), (4, 16))
SCHEDULE = Schedule(30, warmup=3, projection=10, joint=9, projection_periods=5, pruning_periods=3)
BATCH = 16
TOLERANCE = 1e-4
"""Of bits: steps are float32."""


# ------------------------------------------------------------------------------------------------ models
class DepthwiseNet(nn.Module):
    """Two inverted residuals, the second strided: images (n, 1, 8, 8) to logits (n, 10)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.first, self.second = self._block(width, 1), self._block(width, 2)
        self.head = nn.Linear(width, 10)

    @staticmethod
    def _block(c: int, stride: int) -> nn.Sequential:
        depthwise = nn.Conv2d(2 * c, 2 * c, 3, stride, padding=1, groups=2 * c, bias=False)
        expand, project = nn.Conv2d(c, 2 * c, 1, bias=False), nn.Conv2d(2 * c, c, 1, bias=False)
        norms = nn.BatchNorm2d(2 * c), nn.BatchNorm2d(2 * c), nn.BatchNorm2d(c)
        return nn.Sequential(expand, norms[0], nn.ReLU6(), depthwise, norms[1], nn.ReLU6(), project, norms[2])

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = self.second(x + self.first(x))
        return self.head(x.mean((2, 3)))


class Bert(nn.Module):
    """A BERT of transformers with one layer: tokens (n, s) to logits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        import_torchvision()
        import transformers

        sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 1}
        config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=10, **sizes)
        config.use_cache = False
        self.bert = transformers.BertForSequenceClassification(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(input_ids=tokens).logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "residual CNN": lambda: digits.ResidualCNN(width=6),
    "depthwise net": DepthwiseNet,
    "ViT": lambda: digits.DigitTransformer(width=24, depth=1, heads=4),
    "BERT": Bert,
}


def batch(name: str, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a step: the next digits, or random tokens."""
    generator = torch.Generator().manual_seed(step)
    if name == "BERT":
        return torch.randint(50, (BATCH, 8), generator=generator), torch.randint(10, (BATCH,), generator=generator)
    chosen = torch.randint(len(_data().train_y), (BATCH,), generator=generator)
    return _data().train_x[chosen], _data().train_y[chosen]


@cache
def _data() -> digits.Digits:
    return digits.load()


@cache
def _prepared(name: str, bits: tuple[int, int]) -> Prepared:
    torch.manual_seed(0)
    return prepare(MODELS[name](), batch(name, 0)[0], bits=bits)


# ------------------------------------------------------------------------------------------------ a run
@dataclass(frozen=True)
class Cell:
    """What one run came to.

    Attributes:
        removed, asked, total: units.
        bits: the fewest and the most in the end.
        outside: in how many steps some bits were outside their range.
        whole: whether all bits are whole numbers in the end.
        error: what `finalize` found to be wrong; "" for nothing.
    """

    removed: int
    asked: int
    total: int
    bits: tuple[float, float]
    outside: int
    whole: bool
    error: str

    @property
    def holds(self) -> bool:
        """Whether everything that was asked for is there."""
        return self.removed == self.asked and not self.outside and self.whole and not self.error

    def __str__(self) -> str:
        units = f"{self.removed}/{self.total} exact" if self.removed == self.asked else f"NOT {self.asked}/{self.total}"
        bits = "–".join(dict.fromkeys(f"{b:.0f}" for b in self.bits)) if self.whole else "NOT whole"
        wrong = [f"OUTSIDE in {self.outside} steps"] * (self.outside > 0) + [self.error] * bool(self.error)
        return ", ".join([units, f"bits {bits}", *wrong])


def run(name: str, sparsity: float, bits: tuple[int, int]) -> Cell:
    """Train, and look at every step."""
    ready = copy.deepcopy(_prepared(name, bits)).train()
    optimizer = QASSO(ready, torch.optim.AdamW, lr=3e-3, lr_quant=1e-3, sparsity=sparsity, schedule=SCHEDULE)
    outside = 0
    for step in range(SCHEDULE.steps):
        inputs, labels = batch(name, step)
        optimizer.zero_grad()
        F.cross_entropy(ready(inputs), labels).backward()
        optimizer.step()
        least, most = _allowed(step, bits)
        outside += not all(least - TOLERANCE <= b <= most + TOLERANCE for b in _bits(ready))
    found = _bits(ready)
    total = sum(group.size for group in optimizer.groups)
    gone = sum(group.size - len(units) for group, units in ready.kept().items())
    whole = all(abs(b - round(b)) < TOLERANCE for b in found)
    asked = math.ceil(round(sparsity * total, 9) - 0.5)  # the nearest whole number
    return Cell(gone, asked, total, (min(found), max(found)), outside, whole, _finalize_error(ready))


def _bits(ready: nn.Module) -> list[float]:
    """log2(q_m^t / d + 1) + 1 of every quantizer of weights and activations."""
    found = []
    for module in ready.modules():
        if isinstance(module, GetaQuantizer):
            d, q_m, t = (p.item() for p in (module.d, module.q_m, module.t))
            found.append(math.log2(q_m**t / d + 1) + 1)
    return found


def _allowed(step: int, bits: tuple[int, int]) -> tuple[float, float]:
    """From projection on: two thirds of the range, to the nearest bit, go in equal parts, one at the start of each
    period but the first."""
    low, high = bits
    if SCHEDULE.moment(step).stage == Stage.WARMUP:
        return 0, math.inf
    warmup, projection = SCHEDULE.lengths[:2]
    periods = SCHEDULE.periods[0]
    done = min((step - warmup) * periods // projection, periods - 1)
    return low, high - round((high - low) * 2 / 3) * done / (periods - 1)


def _finalize_error(ready: Prepared) -> str:
    try:
        finalize(ready)
    except GraphcompError as error:
        return brief(error)
    return ""


# ------------------------------------------------------------------------------------------------ the table
def _parsed() -> argparse.Namespace:
    def span(text: str) -> tuple[int, int]:
        low, high = text.split("-")
        return int(low), int(high)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=span, default=BITS, metavar="LOW-HIGH")
    return parser.parse_args()


def _row(name: str, bits: tuple[int, int], cells: Sequence[Cell]) -> list[Any]:
    return [f"{name}, {bits[0]} to {bits[1]} bits", *cells]


def main() -> None:
    """Print the table, and how many cells hold."""
    options = _parsed()
    torch.set_num_threads(1)
    print(header())
    rows, cells = [], []
    for name in options.models:
        for bits in options.bits:
            found = [run(name, sparsity, bits) for sparsity in SPARSITIES]
            rows.append(_row(name, bits, found))
            cells += found
    section("White box", table(["units to remove", *(f"{s:.0%}" for s in SPARSITIES)], rows))
    print(f"\n{sum(cell.holds for cell in cells)} of {len(cells)} runs end with what was asked, in range in every step")


if __name__ == "__main__":
    main()
