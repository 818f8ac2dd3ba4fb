"""Tiny models of transformers' families, with random weights, configured as users have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common

Made = tuple[nn.Module, dict[str, Any]]

WIDTH, LAYERS, HEADS, HIDDEN, WORDS = 128, 2, 8, 256, 500
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Absent(Exception):
    """The installed transformers has no such class, or lacks a package that the class needs."""


# ------------------------------------------------------------------------------------------------ inputs
def text(*names: str, batch: int = 2, length: int = 20) -> dict[str, Tensor]:
    """Return token numbers under each name, and a mask of ones over the first."""
    found = {name: torch.randint(5, WORDS - 5, (batch, length)) for name in names or ("input_ids",)}
    return {**found, "attention_mask": torch.ones(batch, length, dtype=torch.long)}


def two_texts() -> dict[str, Tensor]:
    """Return what an encoder and a decoder read."""
    return text("input_ids", "decoder_input_ids")


def pixels(size: int = 32) -> dict[str, Tensor]:
    """Return a batch of two images."""
    return {"pixel_values": torch.randn(2, 3, size, size)}


def waves(length: int = 1600) -> dict[str, Tensor]:
    """Return a batch of two waves."""
    return {"input_values": torch.randn(2, length)}


# ------------------------------------------------------------------------------------------------ configs
BASE: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN, "max_position_embeddings": 128,
}  # fmt: skip
ENCODER = {**BASE, "pad_token_id": 0, "num_labels": 5}
DECODER = {**BASE, **TOKENS}
GROUPED = {**DECODER, "num_key_value_heads": 2}
OF_VISION = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": HIDDEN,
    "image_size": 32, "patch_size": 8, "num_labels": 5,
}  # fmt: skip
BOTH = {
    "vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN, "max_position_embeddings": 128, "decoder_start_token_id": 2,
    "forced_eos_token_id": None, **TOKENS,
}  # fmt: skip
GPT = {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128, **TOKENS}
SPEECH = {
    "vocab_size": 40, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN, "conv_dim": (32, 32, 32), "conv_stride": (5, 4, 2), "conv_kernel": (10, 8, 4),
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "pad_token_id": 0,
}  # fmt: skip
DINO3 = {**OF_VISION, "num_register_tokens": 2}
SIGLIP2_TEXT = {**BASE, "max_position_embeddings": 20, "projection_size": WIDTH, **TOKENS}
SIGLIP2_VISION = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": HIDDEN,
    "patch_size": 8, "num_patches": 16,
}  # fmt: skip
LFM2 = {**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
RNN = {**GROUPED, "num_key_value_heads": 2, "head_dim": 16}


def siglip2_pixels() -> dict[str, Tensor]:
    """Return patches of two images with their mask and grid, beside text."""
    return {
        **text(), "pixel_values": torch.randn(2, 16, 192), "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }  # fmt: skip


Family = tuple[str, Mapping[str, Any], str, Callable[[], dict[str, Tensor]]]
"""Config class, its arguments, class of the model, what makes the inputs."""

OWN: dict[str, Family] = {
    "eurobert": ("EuroBertConfig", {**GROUPED, "num_labels": 5}, "EuroBertForSequenceClassification", text),
    "roformer": ("RoFormerConfig", {**ENCODER, "embedding_size": WIDTH}, "RoFormerForSequenceClassification", text),
    "longformer": ("LongformerConfig", {**ENCODER, "attention_window": 8}, "LongformerForSequenceClassification", text),
    "big_bird": (
        "BigBirdConfig", {**ENCODER, "attention_type": "original_full"}, "BigBirdForSequenceClassification", text,
    ),
    "funnel": (
        "FunnelConfig",
        {
            "vocab_size": WORDS, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": WIDTH, "n_head": HEADS,
            "d_head": 16, "d_inner": HIDDEN, "num_labels": 5,
        },
        "FunnelForSequenceClassification",
        text,
    ),
    "xlnet": (
        "XLNetConfig",
        {"vocab_size": WORDS, "d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "d_inner": HIDDEN, **TOKENS},
        "XLNetForSequenceClassification",
        text,
    ),
    "nomic_bert": ("NomicBertConfig", ENCODER, "NomicBertModel", text),
    "convbert": ("ConvBertConfig", {**ENCODER, "embedding_size": WIDTH}, "ConvBertForSequenceClassification", text),
    "squeezebert": (
        "SqueezeBertConfig", {**ENCODER, "embedding_size": WIDTH}, "SqueezeBertForSequenceClassification", text,
    ),
    "mobilebert": (
        "MobileBertConfig", {**ENCODER, "embedding_size": 64, "intra_bottleneck_size": 64},
        "MobileBertForSequenceClassification", text,
    ),
    "camembert": ("CamembertConfig", {**ENCODER, "pad_token_id": 1}, "CamembertForTokenClassification", text),
    "dinov3": ("DINOv3ViTConfig", DINO3, "DINOv3ViTModel", pixels),
    "siglip2": (
        "Siglip2Config", {"text_config": SIGLIP2_TEXT, "vision_config": SIGLIP2_VISION}, "Siglip2Model", siglip2_pixels,
    ),
    "deit": ("DeiTConfig", OF_VISION, "DeiTForImageClassification", pixels),
    "beit": ("BeitConfig", {**OF_VISION, "use_relative_position_bias": True}, "BeitForImageClassification", pixels),
    "convnext": (
        "ConvNextConfig", {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2, "num_labels": 5},
        "ConvNextForImageClassification", pixels,
    ),
    "vit_mae": (
        "ViTMAEConfig",
        {**OF_VISION, "decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4,
         "decoder_intermediate_size": 128, "mask_ratio": 0.0},
        "ViTMAEModel", pixels,
    ),
    "swinv2": (
        "Swinv2Config",
        {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
         "num_labels": 5},
        "Swinv2ForImageClassification", pixels,
    ),
    "hubert": ("HubertConfig", SPEECH, "HubertForCTC", waves),
    "wavlm": ("WavLMConfig", SPEECH, "WavLMForCTC", waves),
    "pegasus": ("PegasusConfig", BOTH, "PegasusForConditionalGeneration", two_texts),
    "mbart": ("MBartConfig", BOTH, "MBartForConditionalGeneration", two_texts),
    "led": (
        "LEDConfig",
        {**{k: v for k, v in BOTH.items() if k != "max_position_embeddings"}, "max_encoder_position_embeddings": 128,
         "max_decoder_position_embeddings": 128, "attention_window": 8},
        "LEDForConditionalGeneration", two_texts,
    ),
    "mt5": (
        "MT5Config",
        {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 16, "d_ff": HIDDEN, "num_layers": LAYERS,
         "num_decoder_layers": LAYERS, "num_heads": HEADS, "decoder_start_token_id": 0, "pad_token_id": 0,
         "eos_token_id": 2},
        "MT5ForConditionalGeneration", two_texts,
    ),
    "lfm2": ("Lfm2Config", LFM2, "Lfm2ForCausalLM", text),
    "ministral": ("MinistralConfig", {**GROUPED, "head_dim": 16, "sliding_window": 8}, "MinistralForCausalLM", text),
    "granite": ("GraniteConfig", GROUPED, "GraniteForCausalLM", text),
    "granite_moe": (
        "GraniteMoeConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        "GraniteMoeForCausalLM", text,
    ),
    "glm4": ("Glm4Config", {**GROUPED, "head_dim": 16}, "Glm4ForCausalLM", text),
    "starcoder2": ("Starcoder2Config", GROUPED, "Starcoder2ForCausalLM", text),
    "stablelm": ("StableLmConfig", GROUPED, "StableLmForCausalLM", text),
    "nemotron": ("NemotronConfig", GROUPED, "NemotronForCausalLM", text),
    "cohere": ("CohereConfig", GROUPED, "CohereForCausalLM", text),
    "cohere2": ("Cohere2Config", {**GROUPED, "sliding_window": 8}, "Cohere2ForCausalLM", text),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 8}, "GPTJForCausalLM", text),
    "gpt_bigcode": ("GPTBigCodeConfig", {**GPT, "multi_query": True}, "GPTBigCodeForCausalLM", text),
    "gpt_neo": (
        "GPTNeoConfig",
        {"vocab_size": WORDS, "hidden_size": WIDTH, "num_layers": 2, "num_heads": HEADS, "intermediate_size": HIDDEN,
         "attention_types": [[["global", "local"], 1]], "window_size": 8, "max_position_embeddings": 128, **TOKENS},
        "GPTNeoForCausalLM", text,
    ),
    "codegen": ("CodeGenConfig", {**GPT, "rotary_dim": 8}, "CodeGenForCausalLM", text),
    "olmo": ("OlmoConfig", GROUPED, "OlmoForCausalLM", text),
    "olmoe": ("OlmoeConfig", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}, "OlmoeForCausalLM", text),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 16}, "GemmaForCausalLM", text),
    "helium": ("HeliumConfig", {**GROUPED, "head_dim": 16}, "HeliumForCausalLM", text),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**GROUPED, "num_hidden_layers": 3, "lru_width": WIDTH, "attention_window_size": 16},
        "RecurrentGemmaForCausalLM", text,
    ),
    "zamba2": (
        "Zamba2Config",
        {**GROUPED, "num_key_value_heads": HEADS, "num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"],
         "mamba_d_state": 16, "n_mamba_heads": 8, "mamba_headdim": 32, "chunk_size": 8, "num_mem_blocks": 1},
        "Zamba2ForCausalLM", text,
    ),
    "rwkv": (
        "RwkvConfig",
        {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "attention_hidden_size": WIDTH,
         "intermediate_size": HIDDEN, "context_length": 64, **TOKENS},
        "RwkvForCausalLM", text,
    ),
    "minicpm3": ("MiniCPM3Config", {**DECODER, **LATENT}, "MiniCPM3ForCausalLM", text),
    "xglm": (
        "XGLMConfig",
        {"vocab_size": WORDS, "d_model": WIDTH, "num_layers": LAYERS, "attention_heads": HEADS, "ffn_dim": HIDDEN,
         "max_position_embeddings": 128, **TOKENS},
        "XGLMForCausalLM", text,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ making
def families() -> dict[str, Callable[[], Made]]:
    """Return name -> what makes (model in eval mode, keyword inputs): those of the shared folder, then those here."""
    found: dict[str, Callable[[], Made]] = dict(common.shared_module("hf_families.py").FAMILIES)
    return found | {name: lambda family=family: make(*family) for name, family in OWN.items()}


def make(config: str, options: Mapping[str, Any], kind: str, inputs: Callable[[], dict[str, Tensor]]) -> Made:
    """Return a model of one of the families here, and its inputs.

    Raises:
        Absent: transformers has no such class, or the class cannot be built here.
    """
    import transformers

    try:
        classes = getattr(transformers, config), getattr(transformers, kind)
    except AttributeError as error:
        raise Absent(f"transformers {transformers.__version__} has no {kind}") from error
    try:
        return classes[1](classes[0](**options)).eval(), inputs()
    except ImportError as error:
        raise Absent(common.brief(error)) from error


def build(name: str, seed: int = 0) -> Made:
    """Return a family's model, with norms and biases that are not at their start, and its inputs.

    Raises:
        Absent: transformers has no such class.
    """
    torch.manual_seed(seed)
    model, inputs = families()[name]()
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.std() < 0.03:
                parameter.mul_(2.0)
    return model, inputs
