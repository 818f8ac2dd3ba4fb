"""Folders that earlier versions wrote load, and compute what they computed then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import graphcomp as gc

FORMAT_1 = Path(__file__).parent / "format_1"
"""Of version 0.1.0.dev0, without checksums: a pruned model of its own class, and one with integer weights."""


@pytest.mark.parametrize("form", ["native", "graph"])
def test_a_folder_of_version_0_1_loads_and_is_saved_anew(form: str, tmp_path: Path) -> None:
    expected = safetensors.torch.load_file(FORMAT_1 / "expected.safetensors")
    folder = shutil.copytree(FORMAT_1 / form, tmp_path / form)
    small = gc.load(folder)
    assert small.form == form
    assert torch.allclose(small(expected["x"]), expected[form], atol=1e-6)
    assert small.report.units_removed == 3
    small.save(tmp_path / "again")
    again = gc.load(tmp_path / "again")
    assert torch.equal(again(expected["x"]), small(expected["x"]))
    assert str(again.report) == str(small.report)
