"""A folder cut without loading the model is the folder that the model in memory leads to, file by file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graphcomp as gc
from graphcomp.hf.example import example_of
from graphcomp.hf.source import open_folder
from graphcomp.ir.streamed import StreamedTensor
from graphcomp.quantization.quantized_tensor import QuantizedTensor
from tests.hf.folders import MODELS, SHARD, llama_folder, sums, written
from tests.hf.models import bert, ids, llama, need_transformers

transformers = need_transformers()
pytestmark = [pytest.mark.slow, pytest.mark.ci]  # torch.export takes seconds of each model


def in_memory(source: Path, target: Path, kind: Any, **options: Any) -> gc.CompressedModel:
    """Load, compress and save."""
    model = kind.from_pretrained(source)
    small = gc.compress(model, example_of(model), progress=False, **options)
    small.module.save_pretrained(target, max_shard_size=SHARD)
    return small


def both(tmp_path: Path, model: Any, **options: Any) -> gc.CompressedCheckpoint:
    """Cut on both ways and compare."""
    source = written(tmp_path / "source", model)
    before = sums(source)
    small = in_memory(source, tmp_path / "expected", type(model), **options)
    found = gc.compress_checkpoint(source, tmp_path / "found", max_shard_size=SHARD, progress=False, **options)
    assert sums(tmp_path / "found") == sums(tmp_path / "expected")
    assert sums(source) == before
    assert isinstance(small.report, gc.Report)
    assert found.report.verified == small.report.verified and found.report.notes == small.report.notes
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".found.new")]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_files_are_those_of_the_model_in_memory(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    found = both(tmp_path, MODELS[name](), sparsity=0.3)
    assert found.folder == tmp_path / "found" and set(found.files) == set(found.folder.iterdir())
    assert len(list(found.folder.glob("model-*.safetensors"))) > 1 or name == "llama, bfloat16"
    assert found.report.params.after < found.report.params.before


@pytest.mark.parametrize(
    "options",
    [
        {"budget": gc.Budget(params=0.7)},
        {"sparsity": 0.3, "uniform": True},
        {"sparsity": 0.4, "ranking": "local", "round_to": 4, "saliency": "l1", "ignore": "re:q_proj"},
        {"sparsity": 0.3, "prune": ("hidden",), "saliency": "random", "seed": 3, "verify": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_mean_what_they_mean_to_compress(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    both(tmp_path, llama(layers=1), **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"saliency": "activation", "dtype": torch.bfloat16}, {"saliency": "repairable"}, {"ranking": "sensitivity"}],
    ids=["repair", "activation", "repairable", "sensitivity"],
)
def test_calibration(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    dtype = options.pop("dtype", torch.float32)
    batches = [{"input_ids": ids()} for _ in range(3)]
    found = both(tmp_path, llama(layers=1).to(dtype), sparsity=0.3, calibration=batches, **options)
    assert found.report.repairs
    assert not list(Path(tempfile.gettempdir()).glob("graphcomp-*.safetensors"))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8, "activation_bits": None},
        {"bits": 4, "activation_bits": None, "group_size": 16, "sparsity": 0.0},
        {"bits": 8, "activations": "dynamic"},
        {"bits": 4, "activation_bits": None, "rounding": "second_order", "calibration": True},
        {"bits": 8, "calibration": True},
    ],
    ids=["weights", "groups", "dynamic", "second order", "ranges"],
)
def test_weights_of_integers(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    if options.get("calibration"):
        options = {**options, "calibration": [{"input_ids": ids()} for _ in range(3)]}
    found = both(tmp_path, llama(layers=1), **{"sparsity": 0.3, **options})
    again = transformers.AutoModelForCausalLM.from_pretrained(found.folder)
    assert isinstance(again.model.layers[0].mlp.up_proj.weight, QuantizedTensor)


def test_tied_weights_and_weights_of_bfloat16_become_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"sparsity": 0.3, "bits": 8, "activation_bits": None}
    both(tmp_path, llama(layers=1, tie_word_embeddings=True).bfloat16(), **options)


@pytest.mark.parametrize("repair", ["least_squares", None])
def test_layers(tmp_path: Path, repair: Any) -> None:
    torch.manual_seed(0)
    batches = [{"input_ids": ids()} for _ in range(8)]
    found = both(tmp_path, llama(layers=3), sparsity=0.4, prune=("layer",), calibration=batches, repair=repair)
    assert json.loads((found.folder / "config.json").read_text())["num_hidden_layers"] == 2


def test_integers_that_the_class_cannot_hold_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "source", bert())
    with pytest.raises(gc.PlanError, match="cannot hold the integers") as refused:
        gc.compress_checkpoint(source, tmp_path / "small", bits=8, sparsity=0.0, progress=False)
    assert "activation_bits=None" in str(refused.value) and not (tmp_path / "small").exists()


KILLED = """
import sys
from tests.hf.models import need_transformers
need_transformers()
import os, signal, graphcomp as gc
import transformers.modeling_utils as module
module.safe_save_file = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
gc.compress_checkpoint(sys.argv[1], sys.argv[2], sparsity=0.3, progress=False)
"""
"""A run that the system ends while it writes."""


def test_what_a_killed_run_left_is_removed_and_named(tmp_path: Path) -> None:
    source = llama_folder(tmp_path / "source")
    done = subprocess.run([sys.executable, "-c", KILLED, str(source), str(tmp_path / "small")], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (left,) = tmp_path.glob(".small.new-*")
    assert not (tmp_path / "small").exists()
    other = gc.compress_checkpoint(source, tmp_path / "other", sparsity=0.3, progress=False)
    assert left.exists() and not any("cut short" in note for note in other.report.notes)
    found = gc.compress_checkpoint(source, tmp_path / "small", sparsity=0.3, progress=False)
    assert any(left.name in note and "cut short" in note for note in found.report.notes)
    assert not left.exists() and sums(found.folder) == sums(other.folder)


def test_a_folder_that_was_cut_is_cut_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    in_memory(llama_folder(tmp_path / "whole"), tmp_path / "once", transformers.LlamaForCausalLM, sparsity=0.2)
    expected = in_memory(tmp_path / "once", tmp_path / "twice", transformers.LlamaForCausalLM, sparsity=0.2)
    found = gc.compress_checkpoint(
        tmp_path / "once", tmp_path / "found", sparsity=0.2, max_shard_size=SHARD, progress=False
    )
    assert sums(tmp_path / "found") == sums(tmp_path / "twice")
    assert isinstance(expected.report, gc.Report) and found.report.params == expected.report.params
    figures = json.loads((tmp_path / "found" / "config.json").read_text())["quantization_config"]["figures"]
    assert figures["parameters"][0] == sum(p.numel() for p in llama(layers=1).parameters())


def test_what_was_written_loads_and_runs(tmp_path: Path) -> None:
    source = llama_folder(tmp_path / "source")
    (source / "tokenizer_config.json").write_text("{}")
    gc.compress_checkpoint(source, tmp_path / "small", sparsity=0.4, max_shard_size=SHARD, progress=False)
    assert (tmp_path / "small" / "tokenizer_config.json").read_text() == "{}"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    x = example_of(again)["input_ids"]
    assert again(x).logits.shape == (*x.shape, 99) and bool(again(x).logits.isfinite().all())


def test_no_weight_of_an_open_folder_has_memory(tmp_path: Path) -> None:
    model: Any = open_folder(llama_folder(tmp_path))
    assert all(isinstance(parameter, StreamedTensor) for parameter in model.parameters())
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    x = example_of(plain)["input_ids"]
    assert torch.equal(model(x).logits, plain(x).logits)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: tuple(p.shape) for n, p in plain.named_parameters()
    }


def test_another_dtype(tmp_path: Path) -> None:
    source = llama_folder(tmp_path / "source")
    gc.compress_checkpoint(source, tmp_path / "small", sparsity=0.3, dtype=torch.bfloat16, progress=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = llama_folder(tmp_path / "source")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gc.compress_checkpoint(source, tmp_path / "small", sparsity=0.3, progress=False)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".graphcomp")] == ["source"]


def test_a_wrong_cut_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = llama_folder(tmp_path / "source")
    real = StreamedTensor.read

    def one_row_off(self: StreamedTensor) -> torch.Tensor:
        found = real(self)
        return found.roll(1, 0) if found.dim() == 2 and found.shape[0] in range(20, 48) else found

    monkeypatch.setattr(StreamedTensor, "read", one_row_off)
    with pytest.raises(gc.GraphcompError):
        gc.compress_checkpoint(source, tmp_path / "small", sparsity=0.3, prune=("hidden",), progress=False)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_example_inputs_run(make: Callable[[], Any]) -> None:
    model = make()
    assert next(iter(model(**example_of(model)).values())).shape[0] == 2
