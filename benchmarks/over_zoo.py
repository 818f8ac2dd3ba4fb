"""One measurement of each model of the shared zoo that can be exported, in a process of its own."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import append_json, bounded

FAMILIES = ("hf", "tv_classification", "tv_segmentation", "tv_video", "tv_flow")

Row = dict[str, Any]


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Which models, and where the rows go."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--names", metavar="A,B", help="only these models, such as tv/resnet18,hf/bert")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one line of JSON per model")
    parser.add_argument("--resume", action="store_true", help="skip the models that --json FILE holds")
    return parser


def rows_of(
    options: argparse.Namespace,
    function: Callable[..., Row],
    line: Callable[[Row], str],
    *arguments: Any,
    seconds: int,
) -> list[Row]:
    """What `function(case, *arguments)` says of each model asked for, or under "failure" why it says nothing, after at
    most so many CPU seconds. Each row is printed as `line` has it, on one thread."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    zoo = common.shared_module("zoo.py")
    rows = common.read_json(options.json) if options.json and options.resume else []
    done = {row["name"] for row in rows}
    names = options.names.split(",") if options.names else None
    for case in zoo.cases(names=names, families=None if names else options.families.split(",")):
        if case.name in done:
            continue
        found = bounded(function, case, *arguments, seconds=seconds)
        row = {"name": case.name, "family": case.family, **(found.value or {"failure": found.error})}
        print(f"{case.name:36} {row['failure'] if 'failure' in row else line(row)}", flush=True)
        append_json(options.json, row)
        rows.append(row)
    return rows


def by_family(rows: Sequence[Row], *errors: str) -> Iterator[tuple[str, int, list[Row], list[float]]]:
    """Each family that has rows: how many, those without a failure, and of these the largest of each error."""
    for family in dict.fromkeys((*FAMILIES, *(row["family"] for row in rows))):
        mine = [row for row in rows if row["family"] == family]
        good = [row for row in mine if "failure" not in row]
        if mine:
            yield family, len(mine), good, [max((row[key] for row in good), default=float("nan")) for key in errors]
