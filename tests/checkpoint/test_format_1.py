"""Folders that earlier versions wrote load, and compute what they computed then."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import graphcomp as gc

FORMAT_1 = Path(__file__).parent / "format_1"
"""Of version 0.1.0.dev0, without checksums: a pruned model of its own class, and one with integer weights."""
LATER = Path(__file__).parent / "before_folders"
"""The same two models, also pickled, from before the modules of the package root moved into folders."""


@pytest.mark.parametrize("form", ["native", "graph"])
@pytest.mark.parametrize("written", [FORMAT_1, LATER], ids=["format 1", "with checksums"])
def test_a_folder_of_version_0_1_loads_and_is_saved_anew(written: Path, form: str, tmp_path: Path) -> None:
    expected = safetensors.torch.load_file(written / "expected.safetensors")
    folder = shutil.copytree(written / form, tmp_path / form)
    small = gc.load(folder)
    assert small.form == form
    assert torch.allclose(small(expected["x"]), expected[form], atol=1e-6)
    assert small.report.units_removed == 3
    small.save(tmp_path / "again")
    again = gc.load(tmp_path / "again")
    assert torch.equal(again(expected["x"]), small(expected["x"]))
    assert str(again.report) == str(small.report)


@pytest.mark.parametrize("form", ["native", "graph"])
def test_a_pickle_from_before_the_modules_moved_loads(form: str) -> None:
    expected = safetensors.torch.load_file(LATER / "expected.safetensors")
    small = pickle.loads((LATER / f"{form}.pkl").read_bytes())
    assert isinstance(small, gc.CompressedModel)
    assert small.form == form
    assert torch.allclose(small(expected["x"]), expected[form], atol=1e-6)
    assert small.report.units_removed == 3
    assert b"graphcomp.graph_module" not in pickle.dumps(small)
