"""Folders and arguments that no model can be made of: typed errors that say why, and nothing is written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphcomp as gc
from tests.hf.folders import SHARD, llama_folder, sums, t5
from tests.hf.models import ids, llama, need_transformers

transformers = need_transformers()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("good") / "llama")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to spoil; nothing may be written beside it."""
    yield Path(shutil.copytree(good, tmp_path / "source"))
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".graphcomp")] in (["source"], [])


def edited(folder: Path, name: str, **entries: Any) -> None:
    data = json.loads((folder / name).read_text())
    data.update(entries)
    (folder / name).write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def index(folder: Path) -> dict[str, str]:
    found = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert isinstance(found, dict)
    return found


def remap(folder: Path, **entries: Any) -> None:
    edited(folder, "model.safetensors.index.json", weight_map={**index(folder), **entries})


def without_weights(folder: Path) -> None:
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()


def pickled(folder: Path) -> None:
    without_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "it is no folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "there is no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json must hold an object"),
    "unknown model": (lambda f: edited(f, "config.json", model_type="llama9"), "was written by transformers"),
    "future version": (
        lambda f: edited(f, "config.json", transformers_version="99.0", model_type="llama9"),
        "was written by transformers 99.0",
    ),
    "unknown class": (lambda f: edited(f, "config.json", architectures=["Llama9"]), "has no class 'Llama9'"),
    "no class": (lambda f: edited(f, "config.json", architectures=None), "must name one class"),
    "no model class": (lambda f: edited(f, "config.json", architectures=["LlamaConfig"]), "has no class"),
    "remote code": (
        lambda f: edited(f, "config.json", auto_map={"AutoModelForCausalLM": "own.Own"}),
        "code that the folder brings along",
    ),
    "quantized by another": (
        lambda f: edited(f, "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "its weights are quantized",
    ),
    "no weights": (without_weights, "there is no model.safetensors"),
    "a pickle": (pickled, "its weights are a pickle (pytorch_model.bin)"),
    "a missing shard": (lambda f: first_shard(f).unlink(), "is missing"),
    "a damaged shard": (lambda f: first_shard(f).write_bytes(b"\0" * 64), "is damaged"),
    "a cut shard": (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-8]), "is damaged"),
    "absent in the shard": (
        lambda f: remap(f, **{"model.norm.weight": first_shard(f).name}), "has no such tensor"
    ),
    "a shard elsewhere": (
        lambda f: remap(f, **{"model.norm.weight": "../source/a.safetensors"}), "must name files of safetensors"
    ),
    "absent in the index": (lambda f: remap(f, **{"model.norm.weight": None}), "must name files"),
    "no map": (lambda f: edited(f, "model.safetensors.index.json", weight_map=None), "has no weight_map"),
    "a tensor less": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {k: v for k, v in index(f).items() if k != "model.norm.weight"}})
        ),
        "it lacks 1 tensors of LlamaForCausalLM, 'model.norm.weight'",
    ),
    "another width": (lambda f: edited(f, "config.json", intermediate_size=40), "48"),
    "config refuses": (lambda f: edited(f, "config.json", hidden_size="wide"), "cannot"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "it holds an adapter"),
    "an integer section": (
        lambda f: edited(f, "config.json", quantization_config={"quant_method": "graphcomp", "integers": {"a": {}}}),
        "its weights are quantized",
    ),
    "a damaged section": (
        lambda f: edited(f, "config.json", quantization_config={"quant_method": "graphcomp", "format": 1}), "no entry"
    ),
    "a newer section": (
        lambda f: edited(f, "config.json", quantization_config={"quant_method": "graphcomp", "format": 99}), "newer"
    ),
}  # fmt: skip
"""Name -> what spoils a folder, and a part of the error."""


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_folder_is_refused(folder: Path, name: str, tmp_path: Path) -> None:
    spoil, said = SPOILED[name]
    spoil(folder)
    before = sums(folder) if folder.is_dir() else {}
    with pytest.raises(gc.CheckpointError) as refused:
        gc.compress_checkpoint(folder, tmp_path / "small", progress=False)
    assert said in str(refused.value)
    assert (sums(folder) if folder.is_dir() else {}) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"saliency": "taylor"}, "reads gradients"),
        ({"saliency": "cosine"}, "reads gradients"),
        ({"budget": gc.Budget(speedup=1.5)}, "needs a model in memory"),
        ({"max_shard_size": "2 gallons"}, "max_shard_size must be"),
        ({"max_shard_size": 0}, "max_shard_size must be"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"sparsity": 1.5}, "outside"),
        ({"sparsty": 0.5}, "sparsity="),
        ({"method": "qat"}, "for a model in memory"),
        ({"data": [1], "loss": len}, "for a model in memory"),
        ({"zzz": 1}, "one of example_inputs"),
        ({"bits": 1}, "bits"),
        ({"prune": ("layer",)}, "needs calibration"),
    ],
)
def test_wrong_options(good: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(gc.PlanError) as refused:
        gc.compress_checkpoint(good, tmp_path / "small", progress=False, **options)
    assert said in str(refused.value) and not (tmp_path / "small").exists()


def test_a_target_that_is_there_is_not_overwritten(good: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "full", tmp_path / "file", good, good / "inside"):
        with pytest.raises(gc.CheckpointError):
            gc.compress_checkpoint(good, target, progress=False)
    assert (tmp_path / "full" / "a").read_text() == (tmp_path / "file").read_text() == "mine"


class Words:
    """What a tokenizer looks like: it can be called, and has a vocabulary."""

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": [1, 2]}


def test_a_tokenizer_is_no_model_and_no_input(good: Path, tmp_path: Path) -> None:
    with pytest.raises(gc.GraphcompError):
        gc.compress(Words(), {"input_ids": ids()}, progress=False)  # type: ignore[arg-type]
    with pytest.raises(gc.GraphcompError):
        gc.compress(llama(), Words(), progress=False)
    with pytest.raises(gc.GraphcompError):
        gc.compress(llama(), Words()("a"), progress=False)
    with pytest.raises(gc.GraphcompError):
        gc.compress_checkpoint(Words(), tmp_path / "small")  # type: ignore[arg-type]
    with pytest.raises(gc.GraphcompError):
        gc.compress_checkpoint(good, tmp_path / "small", Words(), progress=False)
    assert not (tmp_path / "small").exists()


@pytest.mark.slow
@pytest.mark.ci
def test_parameters_on_two_devices_are_refused() -> None:
    model = llama(layers=1)
    model.lm_head.to("meta")
    with pytest.raises(gc.GraphcompError):
        gc.compress(model, {"input_ids": ids()}, progress=False)


@pytest.mark.slow
@pytest.mark.ci
def test_hooks_of_a_device_map_on_one_device(good: Path) -> None:
    pytest.importorskip("accelerate")
    plain = transformers.LlamaForCausalLM.from_pretrained(good)
    mapped = transformers.LlamaForCausalLM.from_pretrained(good, device_map={"": "cpu"})
    x = ids()
    small, other = (gc.compress(model, {"input_ids": x}, sparsity=0.3, progress=False) for model in (plain, mapped))
    assert torch.equal(small.module(x).logits, other.module(x).logits)


@pytest.mark.slow
@pytest.mark.ci
def test_parts_in_float32_in_a_model_of_bfloat16() -> None:
    model = t5().bfloat16()
    for name, part in model.named_modules():
        if name.endswith(".wo"):
            part.float()
    x = {"input_ids": ids(), "decoder_input_ids": ids()}
    small = gc.compress(model, x, sparsity=0.3, progress=False)
    assert small.form == "native"
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}
    assert {name: p.dtype for name, p in small.module.named_parameters()} == kinds


@pytest.mark.slow
@pytest.mark.ci
def test_dtypes_that_the_class_does_not_take() -> None:
    model = llama(layers=1).bfloat16()
    model.model.norm.float()
    with pytest.raises(gc.InputError):  # the model itself does not run
        gc.compress(model, {"input_ids": ids()}, progress=False)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_that_is_attached() -> None:
    """It stays attached, and the numbers are those of the model with the adapter."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(layers=1), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2)).eval()
    x = ids()
    small = gc.compress(model, {"input_ids": x}, sparsity=0.3, progress=False)
    assert isinstance(small.report, gc.Report) and small.report.verified
    assert small.module(input_ids=x).logits.shape == (*x.shape, 99)


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
"""A file that a folder brings along."""


@pytest.mark.slow
@pytest.mark.ci
def test_code_that_the_folder_brings_along(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "source"))
    (folder / "own.py").write_text(OWN)
    places = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edited(folder, "config.json", auto_map=places, architectures=["OwnForCausalLM"], model_type="own")
    code = (
        "from contextlib import suppress\n"
        "from tests.vision import import_torchvision\n"
        "with suppress(ImportError): import_torchvision()\n"
        "import graphcomp as gc, transformers, sys\n"
        "gc.compress_checkpoint(sys.argv[1], sys.argv[2], sparsity=0.3, trust_remote_code=True, progress=False,"
        f" max_shard_size={SHARD!r})\n"
        "again = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)\n"
        "print(type(again).__name__, again.model.layers[0].mlp.up_proj.weight.shape[0])\n"
    )
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "small")],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    name, width = done.stdout.split()
    assert name == "OwnForCausalLM" and int(width) < 48
    assert (tmp_path / "small" / "own.py").is_file()


def test_a_module_that_is_no_model_of_transformers_is_no_folder(tmp_path: Path) -> None:
    gc.compress(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).eval(), torch.ones(2, 4), progress=False).save(
        tmp_path / "own"
    )
    with pytest.raises(gc.CheckpointError) as refused:
        gc.compress_checkpoint(tmp_path / "own", tmp_path / "small", progress=False)
    assert "there is no config.json" in str(refused.value)
