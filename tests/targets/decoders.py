"""Small decoders of transformers, and onnxruntime's run of their files, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphcomp.targets.runtime import open_session
from tests.hf.models import need_transformers

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
ONE_LAYER = ("gpt2", "qwen3", "mistral", "phi3", "mixtral", "opt", "gpt_neox", "bloom")
"""Families of which one layer shows all; export takes seconds per layer."""

GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": None}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**GPT, "n_positions": 64}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma3": (
        "Gemma3TextConfig", "Gemma3ForCausalLM", {**GROUPED, **WINDOWS, "head_dim": 8, "query_pre_attn_scalar": 8},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 4}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GROUPED),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**GROUPED, **EXPERTS}),
    "gptoss": ("GptOssConfig", "GptOssForCausalLM", {
        **GROUPED, **EXPERTS, **WINDOWS, "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {
        **SIZES, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    }),
    "opt": ("OPTConfig", "OPTForCausalLM", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES),
    "bloom": ("BloomConfig", "BloomForCausalLM", {
        "vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": None,
        "pad_token_id": 0,
    }),
}  # fmt: skip
"""Name -> config, class, and options: a decoder of width 32 with two layers."""


def decoder(name: str, **options: Any) -> Any:
    """Return a decoder with random weights."""
    transformers = need_transformers()
    config, kind, own = FAMILIES[name]
    if not hasattr(transformers, kind):
        import pytest

        pytest.skip(f"the installed transformers has no {kind}")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**own, **options})).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(rows: int = 2, length: int = 7, padding: int = 3) -> tuple[Tensor, Tensor]:
    """Return ids and a mask; the first row is padded at the left."""
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def generated(model: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """Return the tokens that a model of transformers adds, the likeliest each time."""
    found = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    assert isinstance(found, Tensor)
    return found[:, ids.shape[1] :]


class File:
    """A file in onnxruntime with a cache of its own."""

    def __init__(self, path: Path, *, exact: bool = True) -> None:
        self.session: Any = open_session(path, exact=exact)
        self.inputs = {given.name: given.shape for given in self.session.get_inputs()}
        self.cache: dict[str, npt.NDArray[Any]] = {}

    def begin(self, rows: int) -> None:
        """Forget what was read."""
        self.cache = {
            name: np.zeros((rows, shape[1], 0, shape[3]), np.float32)
            for name, shape in self.inputs.items()
            if name.startswith("past")
        }

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of tokens behind what was read; the mask is of all tokens."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        feeds = {**{name: array for name, array in given.items() if name in self.inputs}, **self.cache}
        logits, *present = self.session.run(None, feeds)
        self.cache = dict(zip(self.cache, present, strict=True))
        return torch.from_numpy(logits)

    def generate(self, ids: Tensor, mask: Tensor, count: int, pieces: Sequence[int] = ()) -> Tensor:
        """Return the likeliest tokens, one after the other, behind a prompt that is read in pieces."""
        self.begin(len(ids))
        bounds = [0, *pieces, ids.shape[1]]
        for start, end in pairwise(bounds):
            logits = self.read(ids[:, start:end], mask[:, :end])
        found = []
        for k in range(count):
            found.append(logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            if k + 1 < count:
                logits = self.read(found[-1], mask)
        return torch.cat(found, 1)
