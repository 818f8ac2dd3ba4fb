"""Methods on two processes: both end with the same model, and a run that was cut short goes on."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.methods.learning import Stop, batches, compress
from tests.training.test_distributed import free_port

CASES = {"psgd": {"bits": 4}, "pqk": {"bits": 4, "sparsity": 0.75, "training": {"autocast": torch.bfloat16}}}


def _rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)  # torch's
    dist.init_process_group("gloo", rank=rank, world_size=2)
    data = [(x[rank::2], y[rank::2]) for x, y in batches()]
    try:
        found = []
        for method, options in CASES.items():
            whole = compress(method, data=data, **options).state_dict()
            with pytest.raises(Stop):
                compress(method, data=data, calls=20, folder=Path(folder, method), **options)
            resumed = compress(method, data=data, folder=Path(folder, method), **options).state_dict()
            found.append((whole, resumed))
        torch.save(found, os.path.join(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_methods_in_two_processes(tmp_path):
    torch.multiprocessing.spawn(_rank, (free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (whole, resumed), (other, _) in zip(first, second, strict=True):
        assert whole.keys() == other.keys()
        assert all(torch.equal(whole[name], other[name]) for name in whole)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole if "running" not in name)
