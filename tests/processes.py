"""Work in two processes of torch.distributed."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

NEEDS_GLOO = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)


def in_two(work: Callable[[int, Path], Any], folder: Path) -> tuple[Any, Any]:
    """Return what `work(rank, folder)` returns in each of two processes, warnings as errors.

    Args:
        work: a function of a module.
        folder: where the results are written, as rank.pt.
    """
    torch.multiprocessing.spawn(_in_rank, (_free_port(), work, folder), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    return first, second


def _in_rank(rank: int, port: int, work: Callable[[int, Path], Any], folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)  # torch's
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        torch.save(work(rank, folder), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
