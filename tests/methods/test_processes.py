"""Methods on two processes: both end with the same model, and a run that was cut short goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graphcomp as gc
from graphcomp.methods.ajpq.method import Ajpq
from tests.methods.learning import Stop, batches, compress, loss, net
from tests.processes import NEEDS_GLOO, in_two

CASES = {
    "psgd": {"bits": 4},
    "pqk": {"bits": 4, "sparsity": 0.75, "training": {"autocast": torch.bfloat16}},
    "opq": {"bits": 4, "sparsity": 0.75},
    "qst": {"bits": 4, "budget": gc.Budget(bytes=150)},
    "gdrq": {"bits": 2, "activation_bits": 4},
    "prune_ternary": {"bits": 2, "sparsity": 0.5},
    "ajpq": {"bits": (2, 8), "budget": gc.Budget(bops=0.03)},
    "taylor2": {"bits": 4, "sparsity": 0.5},
}
SHORT = {"ajpq": Ajpq(evaluations=8)}


def _rank(rank: int, folder: Path) -> list[Any]:
    data = [(x[rank::2], y[rank::2]) for x, y in batches()]
    found = []
    for name, options in CASES.items():
        method = SHORT.get(name, name)
        whole = compress(method, data=data, **options).state_dict()
        with pytest.raises(Stop):
            compress(method, data=data, calls=20, folder=folder / name, **options)
        resumed = compress(method, data=data, folder=folder / name, **options).state_dict()
        found.append((whole, resumed))
    found.append(_searched(data, folder / "searched"))
    return found


def _searched(data: list[Any], folder: Path) -> tuple[Any, Any]:
    """A search alone, whose processes score on data of their own; and the same, from the scores in the folder."""

    def search(seed: int = 0) -> gc.CompressedModel:
        return gc.compress(
            net(), data[0][0], method=SHORT["ajpq"], data=data, loss=loss, folder=folder, seed=seed, progress=False,
            **CASES["ajpq"],
        )  # fmt: skip

    first, again = search(), search()
    assert first.report.notes == again.report.notes
    with pytest.raises(gc.CheckpointError, match="holds another search"):  # in both: else one would wait for ever
        search(seed=3)
    return first.state_dict(), again.state_dict()


@pytest.mark.slow
@pytest.mark.ci
@NEEDS_GLOO
def test_methods_in_two_processes(tmp_path):
    first, second = in_two(_rank, tmp_path)
    for (whole, resumed), (other, _) in zip(first, second, strict=True):
        assert whole.keys() == other.keys()
        assert all(torch.equal(whole[name], other[name]) for name in whole)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole if "running" not in name)
