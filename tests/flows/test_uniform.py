"""uniform=True: alike layers keep equally many units, and the config alone builds the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphcomp as gc
from tests.hf.models import bert, ids, llama, need_transformers


class Residual(nn.Module):
    """Three alike blocks, and a wider one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(3))
        self.wide = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x + self.wide(x)


def widths(small: gc.CompressedModel) -> list[int]:
    return [block[0].out_features for block in (*small.module.blocks, small.module.wide)]


def test_alike_layers_keep_equally_many_units():
    model, x = Residual().eval(), torch.randn(5, 4)
    free = gc.compress(model, x, sparsity=0.4, progress=False)
    small = gc.compress(model, x, sparsity=0.4, uniform=True, progress=False)
    assert len(set(widths(free)[:3])) > 1
    assert len(set(widths(small)[:3])) == 1
    assert sum(widths(free)) - 2 <= sum(widths(small)) <= sum(widths(free))
    assert any("holds no config" in note for note in small.report.notes)
    budget = gc.compress(model, x, budget=gc.Budget(params=0.6), uniform=True, progress=False)
    assert len(set(widths(budget)[:3])) == 1 and budget.report.params.ratio <= 0.6


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"scope": "wide"}, "whole model's"),
        ({"bits": 8}, "integers stand in a section"),
        ({"saliency": "zeros"}, "zero already"),
    ],
)
def test_what_a_config_cannot_say_is_refused(options, why):
    with pytest.raises(gc.PlanError, match=why):
        gc.compress(Residual().eval(), torch.randn(5, 4), uniform=True, progress=False, **options)
    with pytest.raises(gc.PlanError, match="uniform"):
        gc.compress(Residual().eval(), torch.randn(5, 4), uniform=3, progress=False)


def notes(small: gc.CompressedModel) -> str:
    return "\n".join(note for note in small.report.notes if note.startswith("uniform"))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("ranking", ["global", "local"])
def test_a_decoder_is_read_without_graphcomp(tmp_path, ranking):
    model, x = llama(), ids()
    before: Any = model.config.to_dict()
    small = gc.compress(model, {"input_ids": x}, sparsity=0.5, uniform=True, ranking=ranking, progress=False).module
    small.save_pretrained(tmp_path / "small")
    assert "quantization_config" not in json.loads((tmp_path / "small" / "config.json").read_text())
    assert small.config.intermediate_size == small.model.layers[1].mlp.up_proj.weight.shape[0] < 48
    if ranking == "local":
        assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 1)
    assert model.config.to_dict() == before
    tokens = small.generate(x, max_new_tokens=4, do_sample=False)
    torch.save((x, small(x).logits, tokens), tmp_path / "expected.pt")
    code = """
import sys, torch
from tests.vision import import_torchvision
try:
    import_torchvision()
except ImportError:
    pass
from transformers import AutoModelForCausalLM
x, logits, tokens = torch.load("expected.pt")
model = AutoModelForCausalLM.from_pretrained("small")
assert torch.equal(model(x).logits, logits)
assert torch.equal(model.generate(x, max_new_tokens=4, do_sample=False), tokens)
assert "graphcomp" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=environment)


@pytest.mark.slow
@pytest.mark.ci
def test_what_no_entry_says_is_left_whole_and_named(tmp_path):
    x, model = ids(), bert()
    small = gc.compress(model, {"input_ids": x}, sparsity=0.5, uniform=True, progress=False)
    assert "no entry of the config says the length of" in notes(small) and "query/head" in notes(small)
    assert f"intermediate_size={small.module.config.intermediate_size}" in notes(small)
    small.module.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = need_transformers().BertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again(x).logits, small(input_ids=x).logits)
    assert {layer.intermediate.dense.out_features for layer in again.bert.encoder.layer} != {48}
    with pytest.raises(gc.PlanError, match="leaves nothing of BertForSequenceClassification"):
        gc.compress(model, {"input_ids": x}, sparsity=0.5, uniform=True, prune=("head",), progress=False)


@pytest.mark.slow
@pytest.mark.ci
def test_one_entry_for_two_kinds_of_layers(tmp_path):
    transformers = need_transformers()
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    x = {"input_ids": ids(), "decoder_input_ids": ids()}
    model = transformers.T5ForConditionalGeneration(config).eval()
    small = gc.compress(model, x, sparsity=0.4, uniform=True, ranking="local", progress=False)
    small.module.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**x).logits, small(**x).logits) and again.config.d_ff < 48


def with_width(model: nn.Module, **options: Any) -> gc.CompressedModel:
    return gc.compress(model, {"input_ids": ids()}, sparsity=0.3, prune=("width",), progress=False, **options)


@pytest.mark.slow
@pytest.mark.ci
def test_lengths_that_the_config_checks(tmp_path):
    small = with_width(llama(), uniform=True)  # the width must divide by the heads
    assert any("multiple of 4 (the config takes no other width)" in note for note in small.report.notes)
    small.module.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = need_transformers().AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.hidden_size == 24
    x = ids()
    assert torch.equal(again(x).logits, small.module(x).logits)


@pytest.mark.slow
@pytest.mark.ci
def test_the_config_says_a_width_that_other_code_reads(tmp_path):
    small = with_width(llama(), round_to=4).module
    assert small.config.hidden_size == 24 and small.model.layers[0].self_attn.config.hidden_size == 24
    small.save_pretrained(tmp_path)
    again = need_transformers().AutoModelForCausalLM.from_pretrained(tmp_path)
    x = ids()
    assert torch.equal(again(x).logits, small(x).logits)
    odd = with_width(llama())
    assert odd.module.config.hidden_size == 32
    assert any(note.startswith("a width is 22, and the config says 32") for note in odd.report.notes)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("uniform", [False, True])
def test_a_config_whose_width_is_a_scale_too_keeps_it(tmp_path, uniform):
    """Embeddings are multiplied by the root of the width as it was: a buffer that no file holds."""
    transformers = need_transformers()
    config = transformers.Gemma3TextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    small = with_width(transformers.Gemma3ForCausalLM(config).eval(), round_to=4, uniform=uniform)
    assert any("the model would compute something else" in n or "computes something else" in n for n in notes_of(small))
    small.module.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.hidden_size == 32 and again.model.embed_tokens.weight.shape[1] == 24
    x = ids()
    assert torch.equal(again(x).logits, small.module(x).logits)


def notes_of(small: gc.CompressedModel) -> tuple[str, ...]:
    return small.report.notes
