"""Files of encoders, cut and with integers, take batches and lengths other than the example's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("onnxruntime")

import graphcomp as gc
from graphcomp.targets.runtime import compare, open_session
from tests.hf.models import need_transformers
from tests.marks import in_ci, slow

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 1,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", SIZES),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", SIZES),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification", {
        "vocab_size": 99, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 64,
    }),
    "modernbert": ("ModernBertConfig", "ModernBertForSequenceClassification", {
        **SIZES, "num_hidden_layers": 2, "global_attn_every_n_layers": 2, "local_attention": 4, "cls_token_id": 2,
        "sep_token_id": 2, "bos_token_id": 2, "eos_token_id": 2,
    }),
    "vit": ("ViTConfig", "ViTForImageClassification", {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
        "patch_size": 4, "num_labels": 3,
    }),
}  # fmt: skip


def inputs(name: str, batch: int, length: int) -> dict[str, Tensor]:
    """Return images, or tokens whose first row has padding at the right."""
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16)}
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 2 :] = 0
    return {"input_ids": torch.randint(3, 98, (batch, length)), "attention_mask": mask}


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("name", [*in_ci("bert", "modernbert"), *slow("roberta", "distilbert", "vit")])
def test_other_batches_and_lengths(tmp_path: Path, name: str, bits: int | None) -> None:
    transformers = need_transformers()
    config, kind, own = FAMILIES[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**own)).eval()
    options = {} if bits is None else {"bits": bits, "calibration": [inputs(name, 4, 24)]}
    small: Any = gc.compress(model, inputs(name, 2, 12), progress=False, sparsity=0.4, **options)
    path = tmp_path / "encoder.onnx"
    small.export(path, measure=False)
    assert (bits is None) == (not small.export_report.kernels.integer)
    for given in open_session(path).get_inputs():
        open_ = [dim for dim, size in enumerate(given.shape) if isinstance(size, str)]
        assert open_ == ([0] if name == "vit" else [0, 1])
    for batch, length in ((1, 5), (3, 12), (4, 23)):
        found = compare(path, small.module, (), inputs(name, batch, length), resized=True)
        assert found.within_a_step, (batch, length, found)
