"""Folders of runs that a version without `Run` wrote, cut short after 8 of 20 steps, are gone on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graphcomp as gc
from tests.training.runs import Mlp

FOLDERS = Path(__file__).parent / "before_methods"


def run(folder: Path | None, **options: Any) -> gc.CompressedModel:
    torch.manual_seed(0)
    model = Mlp(6)
    draws = torch.Generator().manual_seed(1)
    data = [(torch.randn(8, 6, generator=draws), torch.randint(3, (8,), generator=draws)) for _ in range(4)]

    def loss(output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output, batch[1])

    training = gc.Training(steps=20, folder=folder, save_every=4)
    return gc.compress(model, data[0][0], data=data, loss=loss, training=training, progress=False, **options)


@pytest.mark.parametrize(("method", "bits"), [("geta", (4, 8)), ("qat", 4)])
def test_a_run_goes_on_and_ends_as_a_new_one_does(tmp_path, method, bits):
    folder = tmp_path / method
    shutil.copytree(FOLDERS / method, folder)
    resumed = run(folder, method=method, bits=bits)
    # the run began when quantized training still began with weights as they were
    whole = run(None, method=method, bits=bits, **({"repair": None, "rounding": "nearest"} if method == "qat" else {}))
    first, *_ = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert first["seconds"] == json.loads((FOLDERS / method / "metrics.jsonl").read_text().splitlines()[0])["seconds"]
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor)


def test_a_folder_of_another_method_is_refused(tmp_path):
    shutil.copytree(FOLDERS / "geta", tmp_path / "run")
    with pytest.raises(gc.CheckpointError, match="forgetting: descent there, uniform now"):
        run(tmp_path / "run", method="hesso")
