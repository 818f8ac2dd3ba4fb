"""Memory: what each kind of result keeps alive, and whether many compressions in a row make the process grow.

    python -m benchmarks.memory                        # both parts: a few minutes on one core
    python -m benchmarks.memory --parts held
    python -m benchmarks.memory --parts rows --runs 200

Held bytes are those of all tensors that can be reached from a result (`graphcomp.testing.memory`), each storage once.
Resident memory is that of a process of its own after a garbage collection, as it is and once the allocator of C has
given back what it holds free (`malloc_trim`): the first says what a user sees, the second what is in use. The exit code
is 1 where a result holds more than 1.1 times the bytes of its own module, or the memory in use grows by more than
ALLOWED from the first mark to the last.
"""

from __future__ import annotations

import argparse
import ctypes
import gc as collector
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphcomp as gc
from benchmarks import common
from benchmarks.common import bounded, section, table
from graphcomp.testing.memory import held_bytes

PARTS = ("held", "rows")
MIB = 2**20
RATIO = 1.1
"""Bytes that a result may keep alive, in those of its own module."""
MARKS = (20, 50, 100, 200)
"""Numbers of compressions after which resident memory is read."""
ALLOWED = 0.05
"""Growth of the memory in use from the first mark to the last, in that of the first."""
SECONDS = 3600
X = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    """About 8 MiB of floats."""
    torch.manual_seed(0)
    layers = [nn.Linear(512, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 512)).eval()


class Folded(nn.Module):
    """`net` with a reshape to fixed lengths, which the class cannot be cut in."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.net[2](self.net[1](self.net[0](x)))
        return self.net[5](self.net[4](self.net[3](hidden.view(len(x), 32, 32).flatten(1))))


def trained(**options: Any) -> gc.CompressedModel:
    ready = gc.prepare(net(), X, **options)
    ready.keep({group: torch.arange(group.size // 2) for group in ready.session.groups})
    return gc.finalize(ready)


RESULTS: Mapping[str, Callable[[], gc.CompressedModel]] = {
    "float, own class": lambda: gc.compress(net(), X, progress=False),
    "float, graph": lambda: gc.compress(Folded(), X, progress=False),
    "int8": lambda: gc.compress(net(), X, bits=8, progress=False),
    "int8, whole": lambda: gc.compress(net(), X, sparsity=0, bits=8, progress=False),
    "int4 in groups": lambda: gc.compress(net(), X, bits=4, activation_bits=None, group_size=32, progress=False),
    "trained, (4, 8) bits": lambda: trained(bits=(4, 8)),
    "trained, float": lambda: trained(bits=None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--runs", type=int, default=MARKS[-1], help="compressions in a row (default: %(default)s)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    parts = options.parts.split(",")
    failed = False
    if "held" in parts:
        failed |= held()
    if "rows" in parts:
        failed |= rows(options.runs)
    sys.exit(failed)


def held() -> bool:
    """Print what each kind of result keeps alive; return whether one of them holds too much."""
    model = sum(t.numel() * t.element_size() for t in (*net().parameters(), *net().buffers()))
    found = []
    for name, build in RESULTS.items():
        small = build()
        own = held_bytes([*small.module.parameters(), *small.module.buffers()])
        found.append((name, small.form, own, held_bytes(small)))
    body = [
        [name, form, f"{model / MIB:.2f}", f"{own / MIB:.2f}", f"{alive / MIB:.2f}", f"{alive / own:.3f}"]
        for name, form, own, alive in found
    ]
    columns = ["result", "form", "model, MiB", "own module, MiB", "kept alive, MiB", "kept / own"]
    section("What a result keeps alive", table(columns, body))
    return any(alive > RATIO * own for *_, own, alive in found)


def rows(runs: int) -> bool:
    """Print resident memory after some numbers of compressions; return whether a process grows."""
    body, grows = [], False
    for name in ("float, own class", "int8", "trained, (4, 8) bits"):
        outcome = bounded(resident_after, name, runs, seconds=SECONDS, fresh=True)
        if outcome.value is None:
            raise SystemExit(f"{name}: {outcome.error}")
        for what, marks in zip(("resident", "in use"), outcome.value, strict=True):
            growth = marks[max(marks)] / marks[min(marks)] - 1
            grows |= what == "in use" and growth > ALLOWED
            body.append(
                [name, what, *(f"{count}: {size / MIB:.1f}" for count, size in marks.items()), f"{growth:+.1%}"]
            )
    columns = ["in a row", "memory", *(f"mark {k + 1}" for k in range(len(body[0]) - 3)), "growth"]
    section("Memory after so many compressions, MiB", table(columns, body))
    return grows


def resident_after(name: str, runs: int) -> tuple[dict[int, int], dict[int, int]]:
    """Number of compressions -> bytes resident after them, and bytes in use."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[int, int] = {}
    in_use: dict[int, int] = {}
    for count in range(1, runs + 1):
        RESULTS[name]()
        if count in MARKS or count == runs:
            collector.collect()
            found[count] = resident()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            in_use[count] = resident()
    return found, in_use


def resident() -> int:
    """Bytes of this process that are in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    main()
