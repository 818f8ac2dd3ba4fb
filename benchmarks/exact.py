"""Exact cuts: parts of a vocabulary that a task does not use.

    python -m benchmarks.exact --vocabulary    # MiniLM on the words of SST-2, STS-B and the calibration sentences

Data and weights come from the shared folder beside the checkout.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from benchmarks import common, oneshot
from benchmarks.common import percent, section, table, timed
from graphcomp.api import trim_vocabulary
from graphcomp.report.report import Report


def main() -> None:
    options = _options()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    print(common.header(), flush=True)
    if options.vocabulary:
        vocabulary()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", action="store_true", help="MiniLM on part of its vocabulary")
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


if __name__ == "__main__":
    main()
