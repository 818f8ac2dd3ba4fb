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
from graphcomp.ir.run_nodes import compute_node, run_tapped

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
        theirs = counted_by_op(captured)
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


def counted_by_op(captured: Captured) -> Counter[str]:
    """Run a captured graph, each op under a counter of its own; return half of the floating-point operations, by op."""
    found: Counter[str] = Counter()

    def count(module: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = compute_node(module, node, args, kwargs)
        if node.op == "call_function":
            found[str(node.target)] += counter.get_total_flops() // 2
        return result

    with sdpa_kernel(SDPBackend.MATH):
        run_tapped(captured.module, captured.inputs.flat(), compute=count)
    return +found


def line(row: Row) -> str:
    """Format the counts of one model."""
    ratio = row["ours"] / row["theirs"] if row["theirs"] else float("nan")
    text = f"{row['ours']:>16,} {row['theirs']:>16,} {ratio:8.4f}"
    for op, (ours, theirs) in row["differences"].items():
        text += f"  {op} {ours:,} / {theirs:,}"
    return text + (f"  uncounted: {', '.join(row['uncounted'])}" if row["uncounted"] else "")


if __name__ == "__main__":
    main()
