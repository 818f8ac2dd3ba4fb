"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf.models import bert, ids

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
@pytest.mark.ci
def test_the_python_blocks_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    (
        quick_start,
        repaired,
        reloaded,
        integers,
        guarded,
        seven_bits,
        weights_only,
        at_run_time,
        mixed,
        joint,
        fixed_bits,
        own_loop,
        shrunk,
    ) = re.finditer(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}

    def run(block: re.Match[str]) -> None:
        lines_before = "\n" * text.count("\n", 0, block.start(1))  # so that a traceback shows the README's own line
        exec(compile(lines_before + block[1], str(README), "exec"), names)

    run(quick_start)
    before, after = ([p.numel() for p in names[model].parameters()] for model in ("model", "small"))
    assert sum(after) < sum(before)
    assert names["logits"].shape == (2, 10)

    run(repaired)
    errors = names["kept"].report.repairs.values()
    assert errors and all(error.after <= error.before for error in errors)

    with suppress(pytest.skip.Exception):
        tokens = {"input_ids": ids()}
        names |= {"bert": bert(), "tokens": tokens}
        run(reloaded)
        assert torch.equal(names["again"](**tokens).logits, names["small_bert"](**tokens).logits)

    for block in joint, own_loop, shrunk:
        run(block)
        report = names.pop("joint").report
        assert report.sparsity == 0.5 and all(4 <= layer.weight_bits <= 8 for layer in report.layers)
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    run(fixed_bits)
    assert {layer.weight_bits for layer in names["trained"].report.layers} == {4, 8}  # first and last layers get 8

    pytest.importorskip("onnxruntime", reason="the other blocks export ONNX")
    run(integers)
    run(mixed)
    report = names["mixed"].report
    assert report.bytes.ratio <= 0.15
    assert len({layer.weight_bits for layer in report.layers}) > 1
    found = names["integers"].export_report
    assert found.kernels.share == 1 and found.agreement.within_a_step
    run(guarded)
    found = names["integers"].export_report
    assert found.speed.layers == 3 and (tmp_path / "guarded.onnx").exists()
    run(seven_bits)
    layers = [layer.weight_bits for layer in names["integers"].report.layers]
    assert layers == [7, 7, 7]
    # with VNNI or without it
    assert names["integers"].export_report.as_run.within_a_step
    run(weights_only)
    found = names["words"].export_report
    assert found.kernels.integer == {"MatMulNBits": 3} and found.agreement.within_a_step
    run(at_run_time)
    assert names["quick"].export_report.agreement.within_a_step
