"""How long the analysis takes: against export, against depth, and for a Llama of 70 billion parameters.

    python -m benchmarks.analysis                                  # depth, the Llama and one family of the zoo (hf)
    python -m benchmarks.analysis --parts depth
    python -m benchmarks.analysis --parts zoo --families tv_classification,hf

The analysis is one walk over the captured graph (propagate) and the collection of its groups. Seconds are CPU seconds
of one thread; an analysis is the best of three. The Llama lives on the meta device: nothing of it is ever allocated.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import best_of, bounded, peak_memory, percent, section, table, timed
from graphcomp.capture.capture import capture
from graphcomp.coupling.analysis import analyze_captured
from graphcomp.coupling.groups import Kept
from graphcomp.pruning.allocation import allocate
from graphcomp.pruning.saliency import score
from graphcomp.pruning.slice import SliceGroups

PARTS = ("depth", "llama", "zoo")
DEPTHS = (10, 100, 1000)
SECONDS = 1800
LLAMA = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
"""As Llama 3 70B."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--families", default="hf", metavar="A,B", help="of the zoo (default: hf)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    runs: dict[str, Callable[[], None]] = {
        "depth": depth,
        "llama": llama,
        "zoo": lambda: zoo(options.families.split(",")),
    }
    for part in options.parts.split(","):
        if part not in runs:
            parser.error(f"no part {part!r}; there are {', '.join(PARTS)}")
        runs[part]()


def export_and_analysis(model: nn.Module, args: Any, kwargs: Any) -> tuple[float, float, int]:
    """Seconds of both, and the number of nodes of the graph."""
    with timed() as clock:
        captured = capture(model, args, kwargs)
    seconds = best_of(3, lambda: analyze_captured(captured))
    return clock.seconds, seconds, len(captured.module.graph.nodes)


# ------------------------------------------------------------------------------------------------ depth
class ConvBlock(nn.Module):
    """(n, c, h, w) -> the same: two convolutions with batch norm, and the shortcut around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class LinearBlock(nn.Module):
    """(n, c) -> the same: layer norm, two linear layers, and the shortcut around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def conv_chain(blocks: int, width: int = 8) -> tuple[nn.Module, Tensor]:
    """A residual network of that many blocks, and its input."""
    stem, head = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 5, 1)
    return nn.Sequential(stem, *(ConvBlock(width) for _ in range(blocks)), head).eval(), torch.randn(2, 3, 8, 8)


def linear_chain(blocks: int, width: int = 16) -> tuple[nn.Module, Tensor]:
    """A residual feed-forward network of that many blocks, and its input."""
    layers = (LinearBlock(width) for _ in range(blocks))
    return nn.Sequential(nn.Linear(3, width), *layers, nn.Linear(width, 5)).eval(), torch.randn(2, 3)


def depth() -> None:
    rows = []
    for name, make in (("residual convolutions", conv_chain), ("residual feed-forward", linear_chain)):
        for blocks in DEPTHS:
            outcome = bounded(_chain, make, blocks, seconds=SECONDS)
            rows.append([name, blocks, *(outcome.value or [outcome.error, *["–"] * 4])])
    columns = ["chain", "blocks", "nodes", "export s", "analysis s", "ms per block", "of export"]
    section("Analysis against depth", table(columns, rows))


def _chain(make: Callable[[int], tuple[nn.Module, Tensor]], blocks: int) -> list[str]:
    model, x = make(blocks)
    export, analysis, nodes = export_and_analysis(model, x, None)
    return [
        str(nodes),
        f"{export:.1f}",
        f"{analysis:.3f}",
        f"{1000 * analysis / blocks:.2f}",
        percent(analysis / export),
    ]


# ------------------------------------------------------------------------------------------------ a large model
def llama() -> None:
    outcome = bounded(_llama, seconds=SECONDS, fresh=True)
    rows = outcome.value or [[outcome.error, "–", "–"]]
    layers, width = LLAMA["num_hidden_layers"], LLAMA["hidden_size"]
    section(f"A Llama of {layers} layers and width {width} on the meta device", table(["step", "s", "peak GiB"], rows))


def _llama() -> list[list[str]]:
    """Rows of the table: step, seconds, peak memory of this process after it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return [[name, f"{seconds:.1f}", f"{peak_memory():.2f}"] for name, seconds in _llama_steps()]


def _llama_steps() -> Iterator[tuple[str, float]]:
    with timed() as clock:
        model, ids = meta_llama()
    before = sum(p.numel() for p in model.parameters())
    yield f"imports and a model of {before / 1e9:.1f} billion parameters", clock.seconds
    with timed() as clock:
        captured = capture(model, (), {"input_ids": ids, "use_cache": False})
    yield f"{captured.producer} ({len(captured.module.graph.nodes)} nodes)", clock.seconds
    with timed() as clock:
        analysis = analyze_captured(captured)
    yield f"analysis ({len(analysis.groups)} groups, reach {percent(analysis.prunable_share)})", clock.seconds
    with timed() as clock:
        kept: Kept = allocate(analysis.groups, score("random", analysis, analysis.groups), sparsity=0.5, scope="local")
    units = sum(group.size for group in analysis.groups)
    yield f"plan (half of {units} units)", clock.seconds
    with timed() as clock:
        small = SliceGroups(analysis.coupling, kept)(captured.module)
    after = sum(p.numel() for p in small.parameters())
    assert all(p.is_meta for p in small.parameters())
    yield f"slice ({after / 1e9:.1f} billion parameters left)", clock.seconds


def meta_llama() -> tuple[nn.Module, Tensor]:
    """The model without memory, and token ids."""
    common.import_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA, use_cache=False)).eval()
        return model, torch.zeros(2, 32, dtype=torch.long)


# ------------------------------------------------------------------------------------------------ the zoo
def zoo(families: list[str]) -> None:
    models = common.shared_module("zoo.py")
    rows = []
    for family in families:
        found = []
        for case in models.cases(families=[family]):
            outcome = bounded(_case, case, seconds=SECONDS)
            if outcome.value is None:
                print(f"{case.name}: {outcome.error}", flush=True)
            else:
                found.append((case.name, *outcome.value))
        rows.append([family, *_summary(found)] if found else [family, 0, *["–"] * 5])
    columns = ["family", "models", "export s", "analysis s", "of export", "largest share", "slowest analysis s"]
    section("Analysis against export (medians over the models)", table(columns, rows))


def _case(case: Any) -> tuple[float, float, int]:
    return export_and_analysis(*case.build())


def _summary(found: list[tuple[str, float, float, int]]) -> list[str]:
    export, analysis = ([row[k] for row in found] for k in (1, 2))
    ratios = [a / e for e, a in zip(export, analysis, strict=True)]
    most, slowest = max(range(len(found)), key=ratios.__getitem__), max(range(len(found)), key=analysis.__getitem__)
    return [
        str(len(found)),
        f"{statistics.median(export):.1f}",
        f"{statistics.median(analysis):.3f}",
        percent(statistics.median(ratios)),
        f"{percent(ratios[most])} ({found[most][0]})",
        f"{analysis[slowest]:.2f} ({found[slowest][0]})",
    ]


if __name__ == "__main__":
    main()
