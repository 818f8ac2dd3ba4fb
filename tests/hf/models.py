"""Small models of transformers, random weights."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vision import import_torchvision


def need_transformers() -> Any:
    """Return transformers; skip where it is not installed."""
    with suppress(ImportError):
        import_torchvision()
    return pytest.importorskip("transformers")


def llama(layers: int = 2, **options: Any) -> Any:
    """A decoder of width 32 with four query heads on two key heads."""
    transformers = need_transformers()
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def bert(kind: str = "BertForSequenceClassification", **options: Any) -> Any:
    """An encoder of width 32 with four heads."""
    transformers = need_transformers()
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, num_labels=3, **options,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def ids() -> Tensor:
    """(2, 12) token ids without padding."""
    return torch.randint(3, 98, (2, 12))
