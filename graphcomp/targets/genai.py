"""What onnxruntime-genai reads beside a decoder's file: its config, and the files of the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphcomp.errors import ExportError
from graphcomp.native.tokenizer import copy_tokenizer
from graphcomp.targets.decoder import KEY, VALUE, Decoder

CONFIG = "genai_config.json"
"""File name of a config of onnxruntime-genai."""

KIND = "decoder"
"""Kind of model under which onnxruntime-genai runs a file with the inputs and outputs that its config names."""

CONTEXT = 2048
"""Most tokens where a model's config does not say."""


def write_genai(decoder: Decoder, file: Path) -> None:
    """Write the config for a decoder's file, and copy the tokenizer of the folder that the model was loaded from.

    Raises:
        ExportError: layers keep caches of several sizes, for which the config has one entry each.
    """
    text = json.dumps(config_of(decoder, file.name), indent=2)
    (file.parent / CONFIG).write_text(f"{text}\n", encoding="utf-8")
    copy_tokenizer(getattr(decoder.model, "config", None), file.parent)


def config_of(decoder: Decoder, file: str) -> dict[str, Any]:
    """Return the config of onnxruntime-genai for a decoder.

    Args:
        file: name of the decoder's file.

    Raises:
        ExportError: see `write_genai`.
    """
    heads, size = _one_size(decoder)
    model: Any = decoder.model
    config = model.config.get_text_config()
    length = int(getattr(config, "max_position_embeddings", 0) or CONTEXT)
    positions = {"position_ids": "position_ids"} if decoder.positions else {}
    return {
        "model": {
            **_special_tokens(model),
            "context_length": length,
            "decoder": {
                "filename": file,
                "head_size": size,
                "hidden_size": int(config.hidden_size),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **positions,
                    "past_key_names": f"past_key_values.%d.{KEY}",
                    "past_value_names": f"past_key_values.%d.{VALUE}",
                },
                "num_attention_heads": int(getattr(config, "num_attention_heads", heads)),
                "num_hidden_layers": len(decoder.layers),
                "num_key_value_heads": heads,
                "outputs": {
                    "logits": decoder.output,
                    "present_key_names": f"present.%d.{KEY}",
                    "present_value_names": f"present.%d.{VALUE}",
                },
                "session_options": {"provider_options": []},
            },
            "type": KIND,
            "vocab_size": _outputs(model, config),
        },
        "search": {
            "do_sample": False, "early_stopping": True, "length_penalty": 1.0, "max_length": length, "min_length": 0,
            "num_beams": 1, "num_return_sequences": 1, "past_present_share_buffer": False, "repetition_penalty": 1.0,
            "temperature": 1.0, "top_k": 1, "top_p": 1.0,
        },
    }  # fmt: skip


def _one_size(decoder: Decoder) -> tuple[int, int]:
    """Return heads and head size of every layer's cache.

    Raises:
        ExportError: they are not the same in all layers, or not of keys and values.
    """
    sizes = {pair for layer in decoder.layers for pair in (layer.key, layer.value)}
    if len(sizes) > 1:
        listed = ", ".join(f"{heads} x {size}" for heads, size in sorted(sizes))
        raise ExportError(
            "onnxruntime-genai cannot run this decoder",
            why=f"its config has one number of key heads and one size for all layers, and caches have {listed}",
            fix="compress(…, uniform=True) for a folder; or small.export('model.onnx', cache=True) for onnxruntime",
        )
    return next(iter(sizes))


def _special_tokens(model: Any) -> Mapping[str, Any]:
    """Return the ids that begin and end a text, none or several, and the one that fills a batch."""
    said = (getattr(model, "generation_config", None), model.config.get_text_config())
    found: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = [getattr(source, name, None) for source in said if source is not None]
        chosen = next((token for token in ids if token is not None), None)
        if chosen is not None:
            found[name] = chosen
    end = found.setdefault("eos_token_id", [])
    ends = end if isinstance(end, list) else [end]
    found.setdefault("pad_token_id", next(iter(ends), 0))
    return found


def _outputs(model: Any, config: Any) -> int:
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return int(config.vocab_size) if weight is None else int(weight.shape[0])
