"""Folders of small models in several shards, and what two folders hold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.hf.models import bert, llama, need_transformers

SHARD = "40KB"
"""Size of a shard with which each of the models below has several."""


def t5() -> Any:
    transformers = need_transformers()
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def mixtral() -> Any:
    """Experts that a folder holds one by one, and the class holds together."""
    transformers = need_transformers()
    config = transformers.MixtralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


def gpt2() -> Any:
    """Weights of (in, out), which `Conv1D` multiplies."""
    transformers = need_transformers()
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def vit() -> Any:
    transformers = need_transformers()
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    return transformers.ViTForImageClassification(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, bfloat16": lambda: llama().bfloat16(),
    "bert": bert,
    "t5": t5,
    "mixtral": mixtral,
    "gpt2": gpt2,
    "vit": vit,
}
"""Name -> a model in eval mode."""


def written(folder: Path, model: Any) -> Path:
    """Save a model in several shards; return the folder."""
    model.save_pretrained(folder, max_shard_size=SHARD)
    return folder


def llama_folder(folder: Path, **options: Any) -> Path:
    """Save a decoder of one layer."""
    torch.manual_seed(0)
    return written(folder, llama(layers=1, **options))


def sums(folder: Path) -> dict[str, str]:
    """Return file -> SHA-256."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
