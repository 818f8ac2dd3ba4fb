"""Example inputs of a model of transformers, made from its config."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphcomp.errors import InputError

BATCH, TOKENS = 2, 16
"""Samples, and tokens of each, in example inputs."""

SEED = 0
"""Of the numbers in example inputs."""


def example_of(model: Any) -> dict[str, Tensor]:
    """Return keyword inputs for a model of texts or of images: random tokens, or random pixels, without padding.

    Args:
        model: of transformers; the config says sizes, and the class the name of the input.

    Raises:
        InputError: the class reads something else.
    """
    drawn = torch.Generator().manual_seed(SEED)
    name, config = model.main_input_name, model.config
    if name == "input_ids":
        text = config.get_text_config()
        length = min(TOKENS, int(getattr(text, "max_position_embeddings", None) or TOKENS))
        special = {getattr(text, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "cls", "sep")}
        usable = torch.tensor([k for k in range(min(int(text.vocab_size), 2**16)) if k not in special] or [0])
        ids = usable[torch.randint(len(usable), (BATCH, length), generator=drawn)]
        return {name: ids, "decoder_input_ids": ids.clone()} if config.is_encoder_decoder else {name: ids}
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if name == "pixel_values" and size is not None and channels is not None:
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        dtype = model.dtype
        return {name: torch.randn(BATCH, channels, height, width, generator=drawn).to(dtype)}
    raise InputError(
        f"{type(model).__name__} reads {name!r}, and its config does not say of which shape",
        fix=f'example_inputs={{"{name}": …}}',
    )
