"""Multiply-accumulates as graphcomp derives them from coupling rules, beside torch.utils.flop_counter.

    ZOO_IMG=96 python -m benchmarks.flops --json flops.jsonl      # the zoo, images of 96 pixels
    ZOO_IMG=96 python -m benchmarks.flops --families tv_detection
    python -m benchmarks.flops --names tv/resnet18,hf/llama

torch counts what the ops of the captured graph run inside: products of matrices, convolutions, and attention by its two
products. Half of torch's floating-point operations are multiply-accumulates. Each op is counted by itself by both, so
that a difference names the op.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.over_zoo import Row, by_family, parser_of, rows_of
from graphcomp.capture.capture import Captured, capture
from graphcomp.cost import CostModel
from graphcomp.coupling.analysis import analyze_captured

SECONDS = 900
ALL = "all ops"


def main() -> None:
    """Print one line per model, and a summary of each family."""
    rows = rows_of(parser_of(__doc__).parse_args(), counts, line, seconds=SECONDS)
    for family, total, good, _ in by_family(rows):
        same = [row for row in good if row["ours"] == row["theirs"]]
        print(f"{family}: {len(good)} of {total} counted by both, {len(same)} alike")
    explained = Counter(op for row in rows for op in row.get("differences", ()))
    print("models with a difference, by op:", dict(explained.most_common()))


def counts(case: Any) -> Row:
    """Count one model by both."""
    model, args, kwargs = case.build()
    captured = capture(model, args, kwargs)
    costs = CostModel(analyze_captured(captured))
    ours: Counter[str] = Counter()
    for node, macs in costs.macs_by_op().items():
        ours[str(node.target)] += macs
    if captured.producer == "record":  # such a graph holds one path, and does not run
        theirs = Counter({ALL: counted(model, args, kwargs)})
        ours = Counter({ALL: costs.macs()})
    else:
        theirs = Counts(captured).by_op()
    differences = {op: (ours[op], theirs[op]) for op in (*ours, *theirs) if ours[op] != theirs[op]}
    return {
        "ours": sum(ours.values()),
        "theirs": sum(theirs.values()),
        "differences": differences,
        "uncounted": [str(op) for op in costs.uncounted],
    }


def counted(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return half of the floating-point operations of a forward."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops() // 2


class Counts(fx.Interpreter):
    """Run a captured graph and let torch count each op."""

    def __init__(self, captured: Captured) -> None:
        super().__init__(captured.module)
        self.captured = captured
        self.found: Counter[str] = Counter()

    def by_op(self) -> Counter[str]:
        """Return half of the floating-point operations, by op."""
        flat = self.captured.inputs.flat()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            self.run(*flat, enable_io_processing=False)
        return +self.found

    def run_node(self, n: fx.Node) -> Any:
        """Run one node under a counter of its own."""
        if n.op != "call_function":
            return super().run_node(n)
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        self.found[str(n.target)] += counter.get_total_flops() // 2
        return result


def line(row: Row) -> str:
    """Format the counts of one model."""
    ratio = row["ours"] / row["theirs"] if row["theirs"] else float("nan")
    text = f"{row['ours']:>16,} {row['theirs']:>16,} {ratio:8.4f}"
    for op, (ours, theirs) in row["differences"].items():
        text += f"  {op} {ours:,} / {theirs:,}"
    return text + (f"  uncounted: {', '.join(row['uncounted'])}" if row["uncounted"] else "")


if __name__ == "__main__":
    main()
