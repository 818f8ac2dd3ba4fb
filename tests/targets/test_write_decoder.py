"""small.export(path, cache=True): onnxruntime generates what the model generates, token for token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime")

import graphcomp as gc
from graphcomp.errors import ExportError
from graphcomp.native.lowered import in_floats
from graphcomp.targets import write_decoder
from graphcomp.targets.decoder import decoder_of, positions_of
from graphcomp.targets.genai import config_of
from tests.marks import in_ci, slow
from tests.targets.decoders import ONE_LAYER, File, decoder, generated, prompt

COUNT = 16
"""Tokens to generate."""

WEIGHTS = {"activation_bits": None}


def compressed(name: str, layers: int = 2, **options: Any) -> Any:
    ids, _ = prompt(length=12)
    said = {"n_layer" if name in ("gpt2", "bloom") else "num_hidden_layers": layers}
    return gc.compress(decoder(name, **said), {"input_ids": ids}, progress=False, **options)


@pytest.mark.parametrize(
    "name",
    [
        *in_ci("llama", "gpt2", "gemma3", "mixtral"),
        *slow("qwen3", "phi3", "mistral", "gptoss", "deepseek_v3", "opt", "gpt_neox", "bloom"),
    ],
)
def test_the_same_tokens_as_the_class(tmp_path: Path, name: str) -> None:
    """In a batch with padding at the left; the prompt at once, and in two pieces; another batch. Lengths are open, and
    named as onnxruntime's tools name them."""
    small = compressed(name, 1 if name in ONE_LAYER else 2, sparsity=0.4, ranking="local")
    path = tmp_path / "model.onnx"
    small.export(path, cache=True)
    report = small.export_report
    assert report.agreement.within_a_step and report.kernels.share == 0
    file = File(path)
    flat = decoder_of(small.module)
    for values, names, lengths in (
        (file.session.get_inputs(), flat.input_names(), flat.input_lengths()),
        (file.session.get_outputs(), flat.output_names(), flat.output_lengths()),
    ):
        assert [value.name for value in values] == names
        for value, dims in zip(values, lengths, strict=True):
            assert {dim: size for dim, size in enumerate(value.shape) if isinstance(size, str)} == dims
    assert set(report.open_lengths) == {"sequence_length", "past_sequence_length", "total_sequence_length"}
    ids, mask = prompt()
    expected = generated(small.module, ids, mask, COUNT)
    assert torch.equal(file.generate(ids, mask, COUNT), expected)
    assert torch.equal(file.generate(ids, mask, COUNT, pieces=(4,)), expected)
    ids, mask = prompt(rows=1, length=1, padding=0)
    assert torch.equal(file.generate(ids, mask, COUNT), generated(small.module, ids, mask, COUNT))
    file.begin(1)
    with torch.no_grad():
        expected = small.module(input_ids=ids).logits
    assert torch.allclose(file.read(ids, mask), expected, atol=1e-5)


QUANTIZED = {
    "int8 weights": {"bits": 8, **WEIGHTS},
    "int4 weights in groups": {"bits": 4, **WEIGHTS, "group_size": 16},
    "int8 at run time": {"bits": 8, "activations": "dynamic"},
    "int8, ranges of calibration": {"bits": 8},
}


@pytest.mark.parametrize(
    "form", [*in_ci("int4 weights in groups", "int8 at run time"), *slow("int8 weights", "int8, ranges of calibration")]
)
def test_integers_of_a_class(tmp_path: Path, form: str) -> None:
    """Products of eight bits are the class's but for the last digits of a float. Four bits are bfloat16 in the class,
    and floats in the file: the reference is the class with the same weights in floats."""
    small = compressed("llama", 1, sparsity=0.4, **QUANTIZED[form])
    assert small.form == "native"
    path = tmp_path / "model.onnx"
    small.export(path, cache=True)
    report = small.export_report
    assert report.agreement.within_a_step and report.kernels.integer
    reference = in_floats(small.module) if "int4" in form else small.module
    file = File(path)
    ids, mask = prompt()
    assert torch.equal(file.generate(ids, mask, COUNT), generated(reference, ids, mask, COUNT))
    file.begin(len(ids))
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)).logits
    found = file.read(ids, mask)
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-4)


@pytest.mark.slow
@pytest.mark.ci
def test_a_folder_for_genai(tmp_path: Path) -> None:
    """onnxruntime-genai generates the same tokens from the folder; the tokenizer goes with the file."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed", exc_type=ImportError)
    source, folder = tmp_path / "source", tmp_path / "genai"
    model = decoder("llama", num_hidden_layers=1)
    model.save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    loaded = type(model).from_pretrained(source)
    ids, _ = prompt(length=12)
    small = gc.compress(loaded, {"input_ids": ids}, progress=False, sparsity=0.4, uniform=True)
    small.export(folder, cache=True)
    assert {file.name for file in folder.iterdir()} == {"model.onnx", "genai_config.json", "tokenizer.json"}
    assert small.export_report.path == str(folder / "model.onnx")
    ids, mask = prompt(rows=1, padding=0)
    genai = og.Model(str(folder))
    parameters = og.GeneratorParams(genai)
    parameters.set_search_options(max_length=ids.shape[1] + COUNT, do_sample=False)
    generator = og.Generator(genai, parameters)
    generator.append_tokens(ids.numpy().astype("int32"))
    while not generator.is_done():
        generator.generate_next_token()
    found = torch.from_numpy(generator.get_sequence(0).copy()).long()[ids.shape[1] :]
    assert torch.equal(found, generated(small.module, ids, mask, COUNT)[0])


@pytest.mark.slow
@pytest.mark.ci
def test_nothing_is_written_where_a_file_would_be_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = compressed("llama", layers=1, sparsity=0.3)
    path = tmp_path / "model.onnx"
    path.write_text("old")
    right = write_decoder.steps_of_file
    monkeypatch.setattr(write_decoder, "steps_of_file", lambda *given: right(*given).flip(1))
    with pytest.raises(ExportError, match="other results than the model on one cache"):
        small.export(path, cache=True)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_folder_that_genai_cannot_run_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="one number of key heads"):
        write_decoder.write_decoder(decoder("deepseek_v3"), tmp_path / "genai" / "model.onnx", genai=True)
    assert not list(tmp_path.iterdir())


def test_the_config_of_genai() -> None:
    config = config_of(decoder_of(decoder("llama")), "model.onnx")
    own = config["model"]["decoder"]
    assert (own["num_key_value_heads"], own["head_size"], own["num_hidden_layers"]) == (2, 8, 2)
    assert config["model"]["vocab_size"] == 99 and config["model"]["context_length"] == 64
    assert config["model"]["bos_token_id"] == 1 and config["model"]["eos_token_id"] == []
    json.dumps(config)
    with pytest.raises(ExportError, match="one number of key heads and one size"):
        config_of(decoder_of(decoder("deepseek_v3")), "model.onnx")
