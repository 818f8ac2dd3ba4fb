"""Seconds that importing graphcomp takes over torch alone.

    python -m benchmarks.startup                     # of this checkout
    python -m benchmarks.startup --root ../before    # of another checkout, too, in turns with this one

Each round is a fresh interpreter that imports torch, then graphcomp, then loads the entry points (`gc.compress`): the
clocks of one round stand beside each other, so that a busy machine slows all of them. A first round of each checkout
is left out: it writes byte code and fills the caches of the file system. The exit code is 1 where graphcomp takes more
than the goal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.common import CHECKOUT, section, table

GOAL = 0.5
"""Seconds that `import graphcomp` may take once torch is there."""

STEPS = ("import torch", "import graphcomp", "graphcomp.compress")
CODE = f"""
import json, time
seconds = []
for step in {STEPS!r}:
    start = time.perf_counter()
    exec(step)
    seconds.append(time.perf_counter() - start)
print(json.dumps(seconds))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, action="append", default=[], metavar="DIR", help="another checkout")
    parser.add_argument("--rounds", type=int, default=9, help="fresh interpreters for each checkout")
    options = parser.parse_args()
    print(common.header(), flush=True)
    roots = [*options.root, CHECKOUT]
    rounds = [[seconds(root) for root in roots] for _ in range(options.rounds + 1)][1:]
    columns = ["checkout", "step", "s (median)", "min", "max", "over torch (median)"]
    by_root = [[column[k] for column in rounds] for k in range(len(roots))]
    body = table(columns, [row for root, found in zip(roots, by_root, strict=True) for row in rows(root, found)])
    section("Startup", body)
    taken = statistics.median(found[1] for found in by_root[-1])
    print(f"import graphcomp over torch alone: {taken:.3f} s; the goal is at most {GOAL} s")
    return int(taken > GOAL)


def seconds(root: Path) -> list[float]:
    """Seconds of each step in a fresh interpreter, which imports the graphcomp of `root`."""
    command = [sys.executable, "-c", CODE]
    found: list[float] = json.loads(subprocess.check_output(command, text=True, cwd=root))
    return found


def rows(root: Path, found: Sequence[Sequence[float]]) -> list[list[str]]:
    """Rows of the table, of one checkout: a step, its seconds, and its seconds as a part of those of torch."""
    made = []
    for k, step in enumerate(STEPS):
        own = [one[k] for one in found]
        ratio = statistics.median(one[k] / one[0] for one in found)
        made.append(
            [root.resolve().name, step, *(f"{f(own):.3f}" for f in (statistics.median, min, max)), f"{ratio:.3f}"]
        )
    return made


if __name__ == "__main__":
    sys.exit(main())
