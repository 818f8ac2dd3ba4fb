"""A decoder with its cache as inputs and outputs, in torch: what it computes is what its class computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphcomp as gc
from graphcomp.errors import ExportError
from graphcomp.targets.decoder import Decoder, decoder_of, positions_of
from tests.hf.models import bert, need_transformers
from tests.targets.decoders import FAMILIES, decoder, prompt


def in_pieces(flat: Decoder, ids: torch.Tensor, mask: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Return the logits of tokens that are read in pieces."""
    cache, results, start = flat.empty(len(ids)), [], 0
    for end in ends:
        more = [positions_of(mask)[:, start:end]] if flat.positions else []
        with torch.no_grad():
            logits, *cache = flat(ids[:, start:end], mask[:, :end], *more, *cache)
        results.append(logits)
        start = end
    return torch.cat(results, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_on_a_flat_cache_are_one_run_of_the_class(name: str) -> None:
    """Also with windows of four tokens that slide: the flat cache keeps all, and the mask hides the old ones."""
    model = decoder(name)
    flat = decoder_of(model)
    ids, mask = prompt(length=12)
    more = {"position_ids": positions_of(mask)} if flat.positions else {}
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, **more).logits
    found = in_pieces(flat, ids, mask, [5, 10, 11, 12])
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=2e-5)


def test_names_and_lengths_are_those_of_onnxruntimes_tools() -> None:
    flat = decoder_of(decoder("llama"))
    assert flat.input_names() == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key", "past_key_values.0.value",
        "past_key_values.1.key", "past_key_values.1.value",
    ]  # fmt: skip
    assert flat.output_names()[:3] == ["logits", "present.0.key", "present.0.value"]
    for tensors, names in ((flat.example(), flat.input_lengths()), (flat(*flat.example()), flat.output_lengths())):
        sizes: dict[str, int] = {}
        for tensor, dims in zip(tensors, names, strict=True):
            for dim, length in dims.items():
                assert sizes.setdefault(length, tensor.shape[dim]) == tensor.shape[dim]
        assert len(set(sizes.values())) == len(sizes)  # no two lengths are alike, so that none is taken for another
    assert "position_ids" not in decoder_of(decoder("bloom")).input_names()


def test_layers_may_keep_unlike_heads() -> None:
    flat = decoder_of(decoder("deepseek_v3"))
    assert flat.layers[0].key != flat.layers[0].value  # keys of 12 numbers, values of 8


def test_the_model_stays_as_it_is() -> None:
    model = decoder("mixtral")
    before = model.get_experts_implementation()
    decoder_of(model)
    assert model.get_experts_implementation() == before


def test_layers_that_keep_something_else_are_named() -> None:
    transformers = need_transformers()
    config = transformers.Lfm2Config(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    with pytest.raises(ExportError, match="layer 0 keeps a LinearAttentionLayer"):
        decoder_of(transformers.Lfm2ForCausalLM(config).eval())


def test_what_is_no_decoder_is_refused() -> None:
    transformers = need_transformers()
    t5 = transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(ExportError, match="encoder-decoder"):
        decoder_of(transformers.T5ForConditionalGeneration(t5).eval())
    with pytest.raises(ExportError, match="no past_key_values"):
        decoder_of(bert())
    mamba = transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(ExportError, match="takes no past_key_values"):
        decoder_of(transformers.MambaForCausalLM(mamba).eval())
    with pytest.raises(ExportError, match="decoders of transformers"):
        decoder_of(torch.nn.Linear(3, 3))


def small_llama(**options: Any) -> Any:
    ids, _ = prompt()
    return gc.compress(decoder("llama"), {"input_ids": ids}, progress=False, **options)


@pytest.mark.slow
@pytest.mark.ci
def test_options_that_do_not_go_together(tmp_path: Any) -> None:
    small = small_llama(sparsity=0.3)
    for path, options, said in (
        ("m.onnx", {"guard": True}, "cache=True with guard=True"),
        ("m.onnx", {"dynamic": {"input_ids": {1: "length"}}}, "cache=True with dynamic="),
        ("m.pt2", {}, "cache=True with .pt2"),
    ):
        with pytest.raises(ExportError, match=said):
            small.export(tmp_path / path, cache=True, **options)
    with pytest.raises(ValueError, match="cache must be"):
        small.export(tmp_path / "m.onnx", cache="yes")
    assert not list(tmp_path.iterdir())
