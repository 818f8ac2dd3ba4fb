"""Example inputs and calibration data from shapes and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import graphcomp
from graphcomp.cli.inputs import calibration_of, described, from_file, from_shapes
from graphcomp.cli.sources import Source, open_source

SOURCE = Source("", nn.Identity())


def test_shapes() -> None:
    one = from_shapes(["2,3"])
    assert isinstance(one, Tensor) and one.shape == (2, 3) and one.dtype is torch.float32
    assert torch.equal(one, from_shapes(["2,3"])) and not torch.equal(one, from_shapes(["2,3"], seed=1))
    ids, mask = from_shapes(["4,50:int64:3..9", "4,50:bool"])
    assert int(ids.min()) == 3 and int(ids.max()) == 9 and mask.dtype is torch.bool
    named = from_shapes(["x=1,2:float16", "t=scalar:int64:7..7"])
    assert named["x"].dtype is torch.float16 and named["t"].shape == () and int(named["t"]) == 7
    assert from_shapes(described(named))["x"].shape == (1, 2)


@pytest.mark.parametrize("specs", [["a="], ["a=1", "2"], ["a=1", "a=2"], ["1,"], ["1,2:int64:9..3"], ["1:nn"], [""]])
def test_shapes_that_are_none(specs: list[str]) -> None:
    with pytest.raises(graphcomp.InputError):
        from_shapes(specs)


def test_files(tmp_path: Path) -> None:
    a, b = torch.randn(6, 2), torch.arange(6)
    np.savez(tmp_path / "plain.npz", a.numpy(), b.numpy())
    first, second = from_file(tmp_path / "plain.npz")
    assert torch.equal(first, a) and torch.equal(second, b)
    np.savez(tmp_path / "named.npz", x=a.numpy())
    safetensors.torch.save_file({"x": a}, tmp_path / "named.safetensors")
    for name in ("named.npz", "named.safetensors"):
        assert torch.equal(from_file(tmp_path / name)["x"], a)
    np.save(tmp_path / "one.npy", a.numpy())
    assert torch.equal(from_file(tmp_path / "one.npy"), a)
    (tmp_path / "bad.npz").write_bytes(b"none")
    np.savez(tmp_path / "objects.npz", np.array([{}], dtype=object))
    for name in ("bad.npz", "missing.npz", "x.csv", "objects.npz"):
        with pytest.raises(graphcomp.InputError):
            from_file(tmp_path / name)


def test_samples_are_cut_into_batches_like_the_example(tmp_path: Path) -> None:
    a = torch.randn(7, 3)
    np.savez(tmp_path / "a.npz", x=a.numpy())
    batches = calibration_of(tmp_path / "a.npz", SOURCE, torch.zeros(2, 3), samples=100)
    assert len(batches) == 3 and torch.equal(torch.cat(batches), a[:6])
    assert len(calibration_of(tmp_path / "a.npz", SOURCE, torch.zeros(2, 3), samples=4)) == 2
    (named,) = calibration_of(tmp_path / "a.npz", SOURCE, {"x": torch.zeros(7, 3)}, samples=100)
    assert torch.equal(named["x"], a)
    for example in (torch.zeros(8, 3), {"y": torch.zeros(2, 3)}, (torch.zeros(2, 3), torch.zeros(2))):
        with pytest.raises(graphcomp.CalibrationError):
            calibration_of(tmp_path / "a.npz", SOURCE, example, samples=100)


def test_images_are_resized_cut_and_normalized(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "b.png")
    image.new("L", (9, 30), 255).save(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("none")
    source = Source("", nn.Identity(), normalization=((0.5, 0.5, 0.5), (0.5, 0.25, 0.5)))
    white, red = calibration_of(tmp_path, source, torch.zeros(1, 3, 8, 8), samples=9)
    assert white.shape == red.shape == (1, 3, 8, 8)
    assert torch.allclose(white[0, :, 4, 4], torch.tensor([1.0, 2.0, 1.0]), atol=1e-4)
    assert torch.allclose(red[0, :, 4, 4], torch.tensor([1.0, -2.0, -1.0]), atol=1e-4)
    (named,) = calibration_of(tmp_path, source, {"pixels": torch.zeros(2, 1, 8, 8)}, samples=9)
    assert named["pixels"].shape == (2, 1, 8, 8)
    bad: list[Any] = [torch.zeros(1, 4), {"a": torch.zeros(1, 3, 8, 8), "b": torch.zeros(1)}, torch.zeros(3, 3, 8, 8)]
    for example in bad:
        with pytest.raises(graphcomp.CalibrationError):
            calibration_of(tmp_path, source, example, samples=9)


def test_text_needs_a_tokenizer_and_is_cut_like_the_example(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three four five six seven")
    example = {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "attention_mask": torch.zeros(1, 3)}
    with pytest.raises(graphcomp.CalibrationError, match="transformers"):
        calibration_of(tmp_path / "a.txt", SOURCE, example, samples=9)

    def words(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    source = Source("", nn.Identity(), tokenizer=lambda: words)
    batches = calibration_of(tmp_path / "a.txt", source, example, samples=9)
    assert [own["input_ids"].tolist() for own in batches] == [[[3, 3, 5]], [[4, 4, 3]]]
    assert all(bool(own["attention_mask"].all()) for own in batches)
    with pytest.raises(graphcomp.CalibrationError, match="7 tokens"):
        calibration_of(tmp_path / "a.txt", source, {"input_ids": torch.zeros(3, 3)}, samples=9)


def test_models_by_path(tmp_path: Path) -> None:
    model, x = open_source("tests.cli.models:net").model, torch.randn(2, 3, 8, 8)
    small = graphcomp.compress(model, x)
    small.save(tmp_path / "small")
    small.export(tmp_path / "small.pt2")
    for name in ("small", "small.pt2"):
        again = open_source(str(tmp_path / name)).model
        assert torch.allclose(again(x), small(x), atol=1e-6)
        smaller = graphcomp.compress(again, x)
        assert isinstance(smaller.report, graphcomp.Report) and smaller.report.units_removed == 5
    for name in ("missing.pt2", "."):
        with pytest.raises(graphcomp.PlanError):
            open_source(str(tmp_path / name))
    (tmp_path / "bad.pt2").write_bytes(b"none")
    with pytest.raises(graphcomp.PlanError, match="no exported program"):
        open_source(str(tmp_path / "bad.pt2"))


@pytest.mark.slow
@pytest.mark.ci
def test_models_of_torchvision_and_transformers(tmp_path: Path) -> None:
    from tests.hf.models import need_transformers
    from tests.vision import import_torchvision

    import_torchvision()
    need_transformers()
    found = open_source("torchvision:resnet18", pretrained=False)
    assert found.example.shape == (1, 3, 224, 224)
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    text = open_source(f"hf:{tmp_path / 'bert'}")
    assert type(text.model).__name__ == "BertForSequenceClassification" and "input_ids" in text.example
    from graphcomp.cli.app import run
    from graphcomp.cli.output import Output

    assert run(["compress", f"hf:{tmp_path / 'bert'}", "--out", str(tmp_path / "out"), "--export", "onnx"]) == 0
    assert run(["verify", str(tmp_path / "out")]) == 0
    assert Output(tmp_path / "out").manifest["folder of"] == "transformers"
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in text.model.parameters())
