"""A cut model written by save_pretrained comes back by from_pretrained, bit for bit."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphcomp as gc
from tests.hf.models import bert, ids, llama, need_transformers

transformers = need_transformers()
pytestmark = [pytest.mark.slow, pytest.mark.ci]  # torch.export takes seconds of each model

EVEN: dict[str, Any] = {"sparsity": 0.4, "ranking": "local"}
"""Cuts something of every group."""


def cut(model: Any, x: torch.Tensor, **options: Any) -> gc.CompressedModel:
    small = gc.compress(model, {"input_ids": x}, progress=False, **{**EVEN, **options})
    assert small.form == "native", small.reason
    return small


@functools.cache
def _once(make: Callable[[], Any]) -> gc.CompressedModel:
    torch.manual_seed(0)
    return cut(make(), ids())


def small_of(make: Callable[[], Any]) -> Any:
    """A cut model, as after a call of compress."""
    return copy.deepcopy(_once(make).module)


def section(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    assert isinstance(found, dict)
    return found


def uneven(small: Any) -> set[int]:
    return {layer.mlp.up_proj.out_features for layer in small.model.layers}


def test_a_decoder_comes_back_with_its_class_and_its_figures(tmp_path):
    model, x = llama(), ids()
    whole = copy.deepcopy(model.config.to_dict())
    small = gc.compress(model, {"input_ids": x}, sparsity=0.3, progress=False).module
    assert len(uneven(small)) == 2
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and torch.equal(again(x).logits, small(x).logits)
    asked = {"max_new_tokens": 4, "do_sample": False}
    expected = small.generate(x, **asked)
    assert torch.equal(again.generate(x, **asked), expected)
    assert torch.equal(again.generate(x, **asked, cache_implementation="static"), expected)
    figures = section(tmp_path)["figures"]["parameters"]
    assert figures == [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    assert again.model.layers[0].mlp.up_proj.out_features == again.model.layers[0].mlp.up_proj.weight.shape[0]
    assert model.config.to_dict() == whole and getattr(model, "hf_quantizer", None) is None


def test_a_second_round_trip_and_a_second_cut(tmp_path):
    x = ids()
    small_of(bert).save_pretrained(tmp_path / "a")
    read = transformers.AutoModelForSequenceClassification.from_pretrained
    first = read(tmp_path / "a")
    first.save_pretrained(tmp_path / "b")
    assert section(tmp_path / "a") == section(tmp_path / "b")
    assert torch.equal(read(tmp_path / "b")(x).logits, first(x).logits)
    smaller = cut(first, x, sparsity=0.3).module
    smaller.save_pretrained(tmp_path / "c")
    assert torch.equal(read(tmp_path / "c")(x).logits, smaller(x).logits)
    before, after = section(tmp_path / "c")["figures"]["parameters"]
    assert before == section(tmp_path / "a")["figures"]["parameters"][0]
    assert after < section(tmp_path / "a")["figures"]["parameters"][1]


def test_the_section_follows_what_became_of_the_model_since(tmp_path):
    x, small = ids(), small_of(llama)
    small.resize_token_embeddings(120)
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.vocab_size == 120 and torch.equal(again(x).logits, small(x).logits)


def test_other_classes_read_the_folder(tmp_path):
    x, small = ids(), small_of(bert)
    small.save_pretrained(tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    assert type(base).__name__ == "BertModel"
    assert torch.equal(base(x).last_hidden_state, small.bert(x).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again = transformers.AutoModel.from_pretrained(tmp_path / "base")
    assert torch.equal(again(x).last_hidden_state, base(x).last_hidden_state)
    other = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "head")
    assert torch.equal(other.bert(x).last_hidden_state, base(x).last_hidden_state)
    decoder = small_of(llama)
    decoder.save_pretrained(tmp_path / "decoder")
    other = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "decoder", num_labels=5)
    assert torch.equal(other.model(x).last_hidden_state, decoder.model(x).last_hidden_state)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # a head of the same name that reads other units
        transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "head")


def test_an_inner_model_without_a_part_that_its_class_has(tmp_path):
    x, small = ids(), cut(bert("BertForMaskedLM"), ids()).module
    assert small.bert.pooler is None
    small.bert.save_pretrained(tmp_path / "inner")
    again = transformers.AutoModel.from_pretrained(tmp_path / "inner")
    assert again.pooler is None and section(tmp_path / "inner")["without"] == ["pooler"]
    assert torch.equal(again(x).last_hidden_state, small.bert(x).last_hidden_state)
    small.save_pretrained(tmp_path / "outer")
    assert section(tmp_path / "outer")["architecture"] == "BertForMaskedLM"
    read = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "outer")
    assert torch.equal(read(x).logits, small(x).logits)  # the decoder is tied to the embedding


@pytest.mark.parametrize(
    "options",
    [
        ({"max_shard_size": "20KB"}, {}),
        ({"variant": "x"}, {"variant": "x"}),
        ({}, {"dtype": torch.bfloat16}),
        ({}, {"device_map": "cpu"}),
    ],
)
def test_options_of_writing_and_reading(tmp_path, options):
    writes, reads = options
    if "device_map" in reads:
        pytest.importorskip("accelerate")
    x, small = ids(), small_of(llama)
    small.save_pretrained(tmp_path / "sub", **writes)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="sub", **reads)
    assert torch.equal(again(x).logits, small.to(again.dtype)(x).logits)


def test_a_mixture_of_experts_is_split_and_merged(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=44, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    x, model = ids(), transformers.MixtralForCausalLM(config).eval()
    small = gc.compress(model, {"input_ids": x}, sparsity=0.3, progress=False).module
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(x).logits, small(x).logits)
    assert any("experts" in name for name in section(tmp_path)["shapes"])


@pytest.mark.parametrize("logits", ["wide", "narrow"])
def test_a_trimmed_vocabulary(tmp_path, logits):
    x = torch.randint(3, 40, (2, 12))
    small = gc.trim_vocabulary(llama(tie_word_embeddings=True), x, {"input_ids": x}, logits=logits).module
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(x).logits, small(x).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_model_with_fewer_layers_needs_no_section(tmp_path):
    x = ids()
    small = gc.compress(
        llama(3), {"input_ids": x}, sparsity=0.34, prune=("layer",), calibration=[{"input_ids": x}], progress=False
    ).module
    small.save_pretrained(tmp_path)
    assert not section(tmp_path) and len(small.model.layers) == 2
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(x).logits, small(x).logits)


class Holder(nn.Module):
    """A user's module around a model, as of sentence-transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.auto_model, self.out = model, nn.Linear(32, 4)

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.out(self.auto_model(input_ids).last_hidden_state)


def test_a_model_inside_of_a_users_module_and_a_submodule(tmp_path):
    x = ids()
    inner = cut(Holder(bert("BertModel")).eval(), x).module.auto_model
    inner.save_pretrained(tmp_path / "inner")
    again = transformers.AutoModel.from_pretrained(tmp_path / "inner")
    assert torch.equal(again(x).last_hidden_state, inner(x).last_hidden_state)
    part = cut(bert(), x, scope="bert.encoder").module
    part.save_pretrained(tmp_path / "part")
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "part")
    assert torch.equal(read(x).logits, part(x).logits)


def test_what_a_section_cannot_hold_is_not_written(tmp_path):
    x = ids()
    graph = {"bits": 8, "keep_class": False, "scope": "bert.encoder"}
    small = gc.compress(bert(), {"input_ids": x}, sparsity=0, progress=False, **graph).module
    with pytest.raises(gc.CheckpointError, match=r"is a graph(.|\n)*small.save"):
        small.save_pretrained(tmp_path / "graph")
    assert not list((tmp_path / "graph").iterdir())
    odd = small_of(bert)
    odd.bert.encoder.layer[0].extra = nn.Linear(2, 2)
    with pytest.raises(gc.CheckpointError, match=r"builds no module 'bert.encoder.layer.0.extra'"):
        odd.save_pretrained(tmp_path / "odd")
    wide = small_of(bert)
    wide.classifier = nn.Linear(wide.classifier.in_features, 7)
    with pytest.raises(gc.CheckpointError, match="larger than"):
        wide.save_pretrained(tmp_path / "wide")
    assert not list((tmp_path / "wide").iterdir())


def test_weights_are_floats_that_may_be_trained_and_moved(tmp_path):
    x, small = ids(), small_of(bert)
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not again.is_quantized and not hasattr(again, "quantization_method")
    again(x).logits.sum().backward()
    assert all(p.grad is not None for n, p in again.named_parameters() if "embeddings" not in n)
    assert again.half().dtype is torch.float16 and again.hf_quantizer.is_trainable and again.hf_quantizer.is_compileable


def test_the_other_ways_to_keep_a_model(tmp_path):
    x, small = ids(), _once(llama)
    small.save(tmp_path / "own")
    back = gc.load(tmp_path / "own")
    assert not any("hf_quantizer" in note for note in back.report.notes)
    back.module.save_pretrained(tmp_path / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.save(again, tmp_path / "pickled.pt")
    pickled = torch.load(tmp_path / "pickled.pt", weights_only=False)
    assert torch.equal(pickled(x).logits, small(input_ids=x).logits)


def test_checkpoints_of_the_trainer(tmp_path):
    pytest.importorskip("accelerate")
    x, small = ids(), small_of(bert)
    small.save_pretrained(tmp_path / "small")
    read = transformers.AutoModelForSequenceClassification.from_pretrained
    data = [{"input_ids": row, "labels": k % 3} for k, row in enumerate(torch.randint(3, 98, (16, 12)))]

    def train(model: Any, steps: int, **options: Any) -> Any:
        args = transformers.TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, save_steps=2, per_device_train_batch_size=4, report_to=[],
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(model, args, train_dataset=data).train(**options)
        return model.eval()

    for start in (small, read(tmp_path / "small")):
        trained = train(start, 4)
        checkpoint = tmp_path / "run" / "checkpoint-4"
        assert torch.equal(read(checkpoint)(x).logits, trained(x).logits)
    straight = train(read(tmp_path / "small"), 6)
    resumed = train(read(tmp_path / "small"), 6, resume_from_checkpoint=str(checkpoint))
    assert torch.equal(resumed(x).logits, straight(x).logits)


def test_a_new_process_reads_after_import_graphcomp_alone(tmp_path):
    x, small = ids(), small_of(llama)
    small.save_pretrained(tmp_path / "small")
    torch.save((x, small(x).logits), tmp_path / "expected.pt")
    code = """
import sys, torch
if "without" not in sys.argv:
    import graphcomp
from tests.vision import import_torchvision
try:
    import_torchvision()
except ImportError:
    pass
from transformers import AutoModelForCausalLM
x, logits = torch.load("expected.pt")
assert torch.equal(AutoModelForCausalLM.from_pretrained("small")(x).logits, logits)
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "TRANSFORMERS_VERBOSITY": "warning"}
    for more, right in (((), True), (("without",), False)):
        done = subprocess.run(
            [sys.executable, "-c", code, *more], cwd=tmp_path, capture_output=True, text=True, env=environment,
            check=False,
        )  # fmt: skip
        assert (done.returncode == 0) is right, done.stderr
    assert "Unknown quantization type, got graphcomp" in done.stderr and "size mismatch" in done.stderr


def test_a_damaged_folder_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    x, small = ids(), small_of(llama)
    small.save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text, tensors = config.read_text(), load_file(weights)

    def with_section(**change: Any) -> None:
        data = json.loads(text)
        data["quantization_config"] |= change
        config.write_text(json.dumps(data))

    name = "model.layers.0.mlp.up_proj.weight"
    shapes = section(tmp_path)["shapes"]
    for change, why in (
        ({"format": 9}, "newer graphcomp"),
        ({"shapes": {**shapes, name: "5x32"}}, r"is \(\d+, 32\) in the folder and \(5, 32\) in the section"),
        ({"shapes": {**shapes, name: "900x32"}}, "no dim longer"),
        ({"shapes": {**shapes, "gone": "5"}}, "no tensor 'gone'"),
        ({"attributes": {"model:forward": 3}}, "no attribute of ints"),
        (
            {"architecture": "T5Model", "shapes": {"decoder.block.0.x": "3"}},
            "no cut part has a name in LlamaForCausalLM",
        ),
    ):
        with_section(**change)
        with pytest.raises(gc.CheckpointError, match=why):
            read(tmp_path)
    config.write_text(text)
    for lost in (name, "model.norm.weight"):
        save_file({n: t for n, t in tensors.items() if n != lost}, weights, {"format": "pt"})
        with pytest.raises(gc.CheckpointError, match=f"lacks the tensor '{lost}'"):
            read(tmp_path)
    save_file(tensors, weights, {"format": "pt"})
    assert torch.equal(read(tmp_path)(x).logits, small(x).logits)
    with pytest.raises(gc.CheckpointError, match=r"belongs into the folder's config.json"):
        llama().save_pretrained(tmp_path / "whole")
        read(tmp_path / "whole", quantization_config=small.config.quantization_config)


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film"]
    model = tokenizers.models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


def test_the_folder_has_a_card_and_the_tokenizer_and_a_pipeline_reads_it(tmp_path):
    bert().save_pretrained(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "source")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "source")
    x = dict(words(["a good film", "a bad film"], return_tensors="pt"))
    small = gc.compress(model, x, progress=False, **EVEN).module
    small.save_pretrained(tmp_path / "small")
    read = transformers.pipeline("text-classification", model=str(tmp_path / "small"))
    expected = small(**words(["a good film"], return_tensors="pt")).logits.softmax(-1).max().item()
    assert read("a good film")[0]["score"] == pytest.approx(expected, abs=1e-6)
    card = (tmp_path / "small" / "README.md").read_text()
    before, after = section(tmp_path / "small")["figures"]["parameters"]
    assert f"| {before:,} | {after:,} |" in card and "import graphcomp" in card and "## Notes" in card
    (tmp_path / "small" / "README.md").write_text("mine")
    (tmp_path / "small" / "tokenizer.json").write_text("mine")
    small.save_pretrained(tmp_path / "small")
    assert {(tmp_path / "small" / name).read_text() for name in ("README.md", "tokenizer.json")} == {"mine"}


def test_a_state_dict_that_is_given_is_written(tmp_path):
    small = small_of(llama)
    given = {name: 2 * tensor for name, tensor in small.state_dict().items()}
    small.save_pretrained(tmp_path, state_dict=given)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.norm.weight, 2 * small.model.norm.weight)


def test_numbers_that_forward_reads_off_the_config_come_back(tmp_path: Path) -> None:
    """The attention of Phi-3 reads the number of heads off the config, which all layers share."""
    config = transformers.Phi3Config(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokens = transformers.Phi3ForCausalLM(config).eval(), ids()
    small = gc.compress(model, (), {"input_ids": tokens}, sparsity=0.5, ranking="local", progress=False)
    assert small.form == "native", small.reason
    assert [layer.self_attn.config.num_attention_heads for layer in small.module.model.layers] == [2, 2]
    small.module.save_pretrained(tmp_path)
    again = transformers.Phi3ForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens).logits, small(input_ids=tokens).logits)
