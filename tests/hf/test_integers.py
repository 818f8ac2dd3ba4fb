"""Quantized models of their own class: written by save_pretrained, read by from_pretrained, bit for bit."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import graphcomp as gc
from graphcomp.hf.section import Section
from graphcomp.native.integers import quantized_tensors
from tests.hf.models import bert, ids, llama, need_transformers

transformers = need_transformers()
pytestmark = [pytest.mark.slow, pytest.mark.ci]  # torch.export takes seconds of each model

WEIGHTS_ALONE: dict[str, Any] = {"bits": 4, "activation_bits": None}
FORMS: dict[str, dict[str, Any]] = {
    "four bits": WEIGHTS_ALONE,
    "groups": {**WEIGHTS_ALONE, "group_size": 16},
    "at run time": {"bits": 8, "activations": "dynamic"},
    "static": {"bits": 8},
}


def small_of(model: Any, options: dict[str, Any]) -> Any:
    small = gc.compress(model, {"input_ids": ids()}, sparsity=0.3, progress=False, **options)
    assert small.form == "native", small.reason
    return small.module


def logits(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=x).logits
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied head"])
def test_a_quantized_decoder_comes_back(tmp_path, form, tied):
    small, x = small_of(llama(tie_word_embeddings=tied), FORMS[form]), ids()
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(small) and quantized_tensors(again).keys() == quantized_tensors(small).keys()
    assert torch.equal(logits(again, x), logits(small, x))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    tokens = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    assert torch.equal(again.generate(x, **tokens), small.generate(x, **tokens))
    assert not list(again.buffers()) or not any("packed" in name for name, _ in again.named_buffers())
    again.save_pretrained(tmp_path / "again")
    third = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(third, x), logits(small, x))


def test_a_quantized_encoder_comes_back_with_and_without_its_head(tmp_path):
    small, x = small_of(bert(), WEIGHTS_ALONE), ids()
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, x), logits(small, x))
    inner = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = small.bert(input_ids=x).last_hidden_state
        assert torch.equal(inner(input_ids=x).last_hidden_state, wanted)


def test_another_process_reads_the_folder_after_one_import(tmp_path):
    small = small_of(llama(), WEIGHTS_ALONE)
    small.save_pretrained(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\nfrom tests.hf.models import need_transformers, ids\n"
        "transformers = need_transformers()\nimport graphcomp, torch\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(input_ids=torch.ones(1, 5, dtype=torch.int64)).logits.detach(), sys.argv[1] + '/out.pt')"
    )
    root = str(Path(gc.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code, str(tmp_path), root], check=True, env={**os.environ})
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits(small, torch.ones(1, 5, dtype=torch.int64)))


def test_without_graphcomp_the_folder_is_not_read(tmp_path):
    small = gc.compress(llama(), {"input_ids": ids()}, sparsity=0, progress=False, **WEIGHTS_ALONE).module
    small.save_pretrained(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\nfrom tests.hf.models import need_transformers\n"
        "need_transformers().AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    root = str(Path(gc.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), root], capture_output=True, text=True)
    assert done.returncode != 0 and "ignore_mismatched_sizes" in done.stderr
    inner = transformers.AutoModel.from_pretrained(tmp_path)  # with graphcomp, where no length was cut, too
    x = ids()
    with torch.no_grad():
        assert torch.equal(inner(x)[0], small.model(x)[0])


@pytest.mark.parametrize("form", ["at run time", "static"])
def test_quantized_operands_are_quantized_in_other_dtypes_too(form):
    small, x = small_of(llama(), FORMS[form]), ids()
    wanted = logits(small, x)
    with torch.autocast("cpu", torch.bfloat16):
        close = logits(small, x).float()
    small.to(torch.bfloat16)
    for found in (close, logits(small, x).float()):
        assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_codes_stay_integers_in_another_dtype(tmp_path):
    small = small_of(llama(), WEIGHTS_ALONE)
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in quantized_tensors(again).items():
        assert torch.equal(tensor.codes, quantized_tensors(small)[name].codes)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert logits(again, ids()).dtype is torch.bfloat16


def test_an_adapter_s_gradient_reaches_what_stands_in_front(tmp_path):
    small = small_of(llama(), WEIGHTS_ALONE)
    embedded = small.get_input_embeddings()(ids()).requires_grad_()
    small(inputs_embeds=embedded).logits.square().sum().backward()
    assert embedded.grad is not None and bool(embedded.grad.abs().sum() > 0)


def test_a_folder_without_a_part_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    small = small_of(llama(), WEIGHTS_ALONE)
    small.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight_packed"))
    save_file({other: t for other, t in tensors.items() if other != name}, file, metadata={"format": "pt"})
    with pytest.raises(gc.CheckpointError, match=r"lacks the tensor .*q_proj.weight_packed"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"parts": None}, {"parts": {"packed": ["uint8", [3]]}}, {"dtype": "int8"}, {"limits": [7, "x"]}, {"more": 1}],
)
def test_a_damaged_entry_is_refused(tmp_path, change):
    small = small_of(llama(layers=1), WEIGHTS_ALONE)
    small.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert Section.of(copy.deepcopy(data)).integers
    name = next(iter(data["integers"]))
    data["integers"][name] = {**data["integers"][name], **change}
    with pytest.raises(gc.CheckpointError, match="damaged"):
        Section.of(data)


@pytest.fixture
def quantized(tmp_path) -> Any:
    """A tied model of four bits, and its folder."""
    small = small_of(llama(tie_word_embeddings=True), WEIGHTS_ALONE)
    small.save_pretrained(tmp_path / "small")
    return small, tmp_path / "small"


def test_a_config_without_a_section_finds_that_of_the_folder(quantized):
    small, folder = quantized
    config = llama(tie_word_embeddings=True).config
    for kind in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        again = kind.from_pretrained(folder, config=config)
        x = ids()
        assert torch.equal(logits(again, x), logits(small, x))
    assert not hasattr(config, "quantization_config")


@pytest.mark.parametrize("tokens", [50, 110])
def test_another_number_of_tokens_reaches_a_tied_head_and_the_folder(quantized, tmp_path, tokens):
    small, _ = quantized
    x = ids().clamp(max=tokens - 1)
    both = min(tokens, 99)
    wanted = logits(small, x)[..., :both]
    small.resize_token_embeddings(tokens)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    found = logits(small, x)
    assert found.shape[-1] == tokens and torch.equal(found[..., :both], wanted)
    small.save_pretrained(tmp_path / "resized")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
    assert torch.equal(logits(again, x), found)


def test_a_cut_model_of_fewer_tokens_comes_back(tmp_path):
    small = gc.compress(llama(), {"input_ids": ids()}, sparsity=0.3, progress=False).module
    small.resize_token_embeddings(50)
    small.save_pretrained(tmp_path)
    again, x = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), ids().clamp(max=49)
    assert torch.equal(logits(again, x), logits(small, x))


def test_what_cannot_be_loaded_says_so(quantized, tmp_path):
    small, folder = quantized
    kind = transformers.AutoModelForCausalLM
    with pytest.raises(gc.CheckpointError, match="builds 1 modules in"):
        kind.from_pretrained(folder, num_hidden_layers=1)
    with pytest.raises(gc.CheckpointError, match="state_dict with weights of integers"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=small.config, state_dict=small.state_dict())
    places = dict.fromkeys(("model.embed_tokens", "lm_head", "model.layers.0", "model.norm"), "cpu")
    with pytest.raises(gc.CheckpointError, match="on the disk"):
        kind.from_pretrained(folder, device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path / "off")


def test_floats_can_take_the_place_of_integers(quantized, tmp_path):
    small, folder = quantized
    x = ids()
    wanted = logits(small, x)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert not quantized_tensors(again) and again.lm_head.weight is again.model.embed_tokens.weight
    assert float((logits(again, x) - wanted).norm() / wanted.norm()) < 1e-5
    again.save_pretrained(tmp_path / "floats")
    third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "floats")
    assert torch.equal(logits(third, x), logits(again, x))


def test_memory_is_that_of_the_integers(quantized):
    _, folder = quantized
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert again.get_memory_footprint() < 0.4 * llama().get_memory_footprint()


@pytest.mark.parametrize("form", ["at run time", "static"])
def test_double_precision_is_kept(form):
    small = small_of(llama(), FORMS[form])
    x = ids()
    wanted = logits(small, x)
    found = logits(small.double(), x)
    assert found.dtype is torch.float64 and float((found - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_decoder_gives_the_numbers_of_eager_code(form):
    small, x = small_of(llama(), FORMS[form]), ids()
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = small.model(input_ids=x).last_hidden_state
        found = torch.compile(small.model, backend="aot_eager")(input_ids=x).last_hidden_state
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
