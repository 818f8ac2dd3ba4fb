"""Adapters of peft: merged before, left beside the layers that are cut, and on top of a result."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphcomp as gc
from tests.hf.models import bert, need_transformers

transformers = need_transformers()
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ci,
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning"),
]


def tokens() -> Tensor:
    return torch.randint(3, 98, (2, 12), generator=torch.Generator().manual_seed(0))


def adapted(model: Any) -> Any:
    """The model with adapters that change its outputs, in eval mode."""
    torch.manual_seed(1)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    ).eval()


@cache
def _whole() -> Any:
    torch.manual_seed(0)
    return bert()


@cache
def _cut(bits: int | None) -> gc.CompressedModel:
    options: dict[str, Any] = {} if bits is None else {"bits": bits, "activation_bits": None}
    return gc.compress(_whole(), {"input_ids": tokens()}, sparsity=0.4, progress=False, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens()).logits
    return found


def read(folder: Path) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def test_an_adapter_that_was_merged_before_is_a_part_of_the_weights(tmp_path):
    model = adapted(copy.deepcopy(_whole())).merge_and_unload()
    small = gc.compress(model, {"input_ids": tokens()}, sparsity=0.4, progress=False)
    assert small.form == "native" and not any("adapter" in note for note in small.report.notes)
    small.module.save_pretrained(tmp_path)
    assert torch.equal(logits(read(tmp_path)), logits(small))


def test_ranks_of_an_adapter_that_was_not_merged_stay_whole_with_a_note():
    model = adapted(copy.deepcopy(_whole()))
    small = gc.compress(model, {"input_ids": tokens()}, sparsity=0.4, progress=False)
    (note,) = [note for note in small.report.notes if "ranks of adapters" in note]
    assert note.count("lora_A") == 4 and small.form == "native" and type(small.module) is type(model)
    ranks = {p.shape[0] for name, p in small.module.named_parameters() if "lora_A" in name}
    assert ranks == {4} and small.report.units_removed
    expected = logits(small)
    merged = copy.deepcopy(small.module).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    with pytest.raises(gc.NothingToPrune, match=r"requires_grad=False"):  # the network under the adapter is frozen
        gc.compress(
            model, {"input_ids": tokens()}, method="hesso", data=[{"input_ids": tokens()}], steps=12, progress=False,
            loss=lambda output, batch: output.logits.square().mean(),
        )  # fmt: skip


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_an_adapter_on_top_of_a_result(bits, tmp_path):
    small = _cut(bits)
    assert small.form == "native", small.reason
    base = copy.deepcopy(small.module)
    model = adapted(base)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    before = logits(model)
    model(input_ids=tokens(), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert all(p.grad is not None for p in trained) and not torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(small.module), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(small))
    with pytest.raises(gc.CheckpointError, match=r"base_layer(.|\n)*merge_and_unload\(\) first"):
        base.save_pretrained(tmp_path / "base")  # peft changed the model in place
    if bits is None:
        expected = logits(model)
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(read(tmp_path / "merged")), expected)
    else:
        with pytest.raises(gc.PlanError, match="writes into a weight of integers"):
            model.merge_and_unload()


@pytest.mark.parametrize("bits", [None, 8])
def test_folders_of_a_result_with_an_adapter(bits, tmp_path):
    small = copy.deepcopy(_cut(bits))
    model = adapted(small.module)
    small.save(tmp_path / "small")
    assert torch.equal(logits(gc.load(tmp_path / "small")), logits(model))
    base = copy.deepcopy(_cut(bits).module)
    base.save_pretrained(tmp_path / "base")
    base.add_adapter(peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))  # transformers' own way
    base.save_pretrained(tmp_path / "own")
    assert {path.name for path in (tmp_path / "own").iterdir()} >= {"adapter_model.safetensors"}
    again = read(tmp_path / "base")
    again.load_adapter(str(tmp_path / "own"))
    assert torch.equal(logits(again), logits(base))
