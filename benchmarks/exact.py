"""Cuts without training: parts of a vocabulary that a task does not use, and whole residual blocks.

    python -m benchmarks.exact --vocabulary               # MiniLM on the words of SST-2, STS-B and the calibration
    python -m benchmarks.exact --depth minilm --blocks 1,2 --whole    # layers of two blocks each
    python -m benchmarks.exact --depth minilm --blocks 2,4
    python -m benchmarks.exact --depth resnet56 --blocks 4,8
    python -m benchmarks.exact --depth stories --blocks 1,2

Data and weights come from the shared folder beside the checkout. Blocks are chosen and repaired on calibration data,
which are never test data (see benchmarks.oneshot).
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch

from benchmarks import common, oneshot
from benchmarks.common import percent, section, table, timed
from graphcomp.api import analyze, drop_blocks, find_blocks, trim_vocabulary
from graphcomp.flows.repaired import flat_batches
from graphcomp.native.depth import whole_layers
from graphcomp.pruning.blocks import Block
from graphcomp.pruning.choose_blocks import choose_blocks
from graphcomp.report.report import Report


def main() -> None:
    options = _options()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    print(common.header(), flush=True)
    if options.vocabulary:
        vocabulary()
    if options.depth:
        depth(options.depth, [int(count) for count in options.blocks.split(",")], options.whole)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", action="store_true", help="MiniLM on part of its vocabulary")
    parser.add_argument("--depth", choices=list(oneshot.TASKS), help="leave residual blocks out")
    parser.add_argument("--blocks", default="2,4", metavar="A,B", help="how many, default: %(default)s")
    parser.add_argument("--whole", action="store_true", help="layers of a list of modules, of all their blocks")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    return parser.parse_args()


@torch.no_grad()
def vocabulary() -> None:
    """Trim MiniLM to the ids of its tasks' texts; compare outputs bit by bit."""
    task = oneshot.minilm()
    arrays = np.load(common.shared("data", "text_minilm.npz"))
    ids = [arrays[key.removesuffix("_off")] for key in arrays.files if key.endswith("_off")]
    with timed() as clock:
        small = trim_vocabulary(task.model, ids, task.example).eval()
    assert isinstance(small.report, Report)
    equal = sum(torch.equal(task.model(*batch), small(*batch)) for batch in task.calibration)
    print(f"trimmed in {clock.seconds:.0f} s; form: {small.form}; batches with bit-equal outputs: {equal} of "
          f"{len(task.calibration)}", flush=True)  # fmt: skip
    report = small.report
    with tempfile.TemporaryDirectory() as folder:
        small.save(folder)
        stored = sum(file.stat().st_size for file in Path(folder).iterdir())
    rows = [
        ["rows", f"{report.units_total:,}", f"{report.units_total - report.units_removed:,}"],
        ["parameters", f"{report.params.before:,.0f}", f"{report.params.after:,.0f} ({percent(report.params.ratio)})"],
        ["MB stored", f"{report.bytes.before / 1e6:.1f}", f"{stored / 1e6:.1f}"],
    ]
    pairs = zip(task.evaluate(task.model), task.evaluate(small), strict=True)
    rows += [[before.metric, str(before), str(after)] for before, after in pairs]
    section("MiniLM on the words of its tasks", table(["", "whole", "trimmed"], rows))


def depth(name: str, counts: list[int], whole: bool) -> None:
    """Choose blocks one by one, with the repair; compare prefixes of the choice as cut and repaired."""
    task = oneshot.TASKS[name]()
    plan = analyze(task.model, task.example)
    blocks = find_blocks(plan)
    batches = flat_batches(plan, task.calibration)
    units = whole_layers(task.model, blocks) if whole else tuple((block,) for block in blocks)
    each = len(units[0])

    def enough(gone: Collection[Block]) -> bool:
        return len(gone) >= each * max(counts)

    with timed() as clock:
        chosen = choose_blocks(plan, blocks, batches, enough=enough, together=units)
    print(f"{task.name}: {len(units)} units; {max(counts)} chosen in {clock.seconds:.0f} s: "
          + ", ".join(f"{block.name} ({error:.4f})" for block, error in chosen.items()), flush=True)  # fmt: skip
    rows = [["whole", "", "100 %", "100 %", *map(str, task.evaluate(task.model))]]
    for count in counts:
        gone = list(chosen)[: each * count]
        for data in (None, task.calibration):
            small = drop_blocks(plan, gone, calibration=data).eval()
            assert isinstance(small.report, Report)
            ratios = [percent(small.report.params.ratio), percent(small.report.macs.ratio)]
            how = "as cut" if data is None else "repaired"
            rows.append([f"{count} of {len(units)} gone", how, *ratios, *map(str, task.evaluate(small))])
            print(f"{count} gone, {how}: {small.form} {small.reason}", flush=True)
    metrics = [score.metric for score in task.evaluate(task.model)]
    section(f"{task.name} without blocks", table(["blocks", "", "parameters", "MACs", *metrics], rows))


if __name__ == "__main__":
    main()
