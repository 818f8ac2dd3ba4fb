"""The native model on paths that the example inputs do not take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from tests.targets.models import import_transformers


class Grouped(nn.Module):
    """Grouped queries; with a mask, key heads are repeated by an attribute that no other path reads."""

    def __init__(self, heads: int = 8, shared: int = 2, size: int = 8) -> None:
        super().__init__()
        self.size, self.repeats = size, heads // shared
        self.q, self.k = nn.Linear(32, heads * size), nn.Linear(32, shared * size)
        self.v, self.o = nn.Linear(32, shared * size), nn.Linear(heads * size, 32)

    def repeated(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.repeats, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, -1, self.size).transpose(1, 2) for p in (self.q, self.k, self.v))
        if mask is None:
            y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = self.repeated(k), self.repeated(v)
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(y.transpose(1, 2).reshape(b, n, -1))


class ByValue(Grouped):
    """Takes the path of the mask where the mask, which the example holds, has zeros."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        if torch.compiler.is_exporting() or bool(mask.all()):
            return super().forward(x)
        return super().forward(x, mask[:, None, None, :].bool())


class Literal(ByValue):
    """Repeats key heads by a number in the code."""

    def repeated(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(4, 1)


def test_an_attribute_that_a_mask_alone_reads_follows_a_mask_that_the_example_leaves_out() -> None:
    model = Grouped().eval()
    small = gc.compress(model, torch.randn(2, 6, 32), sparsity=0.5, prune=("head", "group"), progress=False)
    assert type(small.module) is Grouped, small.reason
    assert small.module.repeats == small.module.q.out_features // small.module.k.out_features
    x = torch.randn(2, 6, 32)
    ones = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    torch.testing.assert_close(small.module(x, ones), small.module(x))
    assert "native == masked, on a padded mask as mask" in small.report.verified


def test_an_attribute_that_a_padded_mask_alone_reads_follows() -> None:
    model, mask = ByValue().eval(), torch.ones(2, 6, dtype=torch.long)
    small = gc.compress(model, (torch.randn(2, 6, 32), mask), sparsity=0.5, prune=("head", "group"), progress=False)
    assert type(small.module) is ByValue, small.reason
    assert small.module.repeats == small.module.q.out_features // small.module.k.out_features
    assert small.report.verified["native == masked, on a padded mask"] < 1e-5
    mask[0, 4:] = 0
    assert small.module(torch.randn(2, 6, 32), mask).shape == (2, 6, 32)


def test_a_class_that_another_path_does_not_let_hold_the_cut_is_refused() -> None:
    model, mask = Literal().eval(), torch.ones(2, 6, dtype=torch.long)
    small = gc.compress(model, (torch.randn(2, 6, 32), mask), sparsity=0.5, prune=("head", "group"), progress=False)
    assert small.form == "graph"
    assert "on a padded mask" in small.reason
    assert "ignore='q'" in small.reason


class Statistics(nn.Module):
    """Statistics are taken over what is cut, so that zeros are no mask; a mask with zeros takes a path of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm(self.up(x)) * mask[..., None]
        return self.down(h if torch.compiler.is_exporting() or bool(mask.all()) else h.relu())


def test_what_could_not_be_compared_on_other_inputs_is_said() -> None:
    example = torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.long)
    small = gc.compress(Statistics().eval(), example, sparsity=0.5, progress=False)
    assert type(small.module) is Statistics
    assert "another path than the captured graph" in small.report.unchecked["native == masked, on a padded mask"]
    assert small.report.verified["native == masked, on another batch size"] < 1e-5


def test_dropped_outputs_are_not_compared_on_other_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.up(x).relu()
            return {"features": h, "scores": self.down(h)}

    small = gc.compress(Two().eval(), torch.randn(3, 8), sparsity=0.5, outputs="scores", progress=False)
    assert type(small.module) is Two, small.reason
    assert small.report.verified["native == masked, on another batch size"] < 1e-5


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma"])
def test_decoders_with_grouped_queries_take_padded_batches(family: str) -> None:
    transformers: Any = import_transformers()
    config = getattr(transformers, f"{family}Config")(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = getattr(transformers, f"{family}ForCausalLM")(config).eval(), torch.randint(3, 98, (2, 12))
    small = gc.compress(model, {"input_ids": ids}, sparsity=0.5, prune=("head", "group"), progress=False)
    assert small.form == "native", small.reason
    for layer in small.module.model.layers:
        heads = layer.self_attn.q_proj.out_features // layer.self_attn.k_proj.out_features
        assert layer.self_attn.num_key_value_groups == heads
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    assert small(input_ids=ids, attention_mask=mask).logits.isfinite().all()
