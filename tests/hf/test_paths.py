"""What a native result of transformers' classes is compared on, beside a plain forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.hf.paths import runs_of_transformers
from graphcomp.native.runs import ModelRun, other_runs
from tests.hf.models import bert, ids, llama


def _runs(model: Any, **inputs: Any) -> dict[str, ModelRun]:
    return {run.name: run for run in runs_of_transformers(capture(model, (), inputs))}


@pytest.mark.slow
@pytest.mark.ci
def test_paths_of_a_decoder() -> None:
    torch.manual_seed(0)
    model, tokens = llama(), ids()
    runs = _runs(model, input_ids=tokens)
    assert list(runs) == ["a mask padded at the left", "steps on one cache", "eager attention"]
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        steps = runs["steps on one cache"].run(model)
        eager = runs["eager attention"].run(model)
        left = runs["a mask padded at the left"].run(model)
    assert torch.allclose(steps["step 1"], whole[:, -1:], atol=1e-5)
    assert left["logits"].shape == (22, 99)  # two of 24 tokens are padding
    assert torch.allclose(eager["logits"], left["logits"], atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_paths_of_an_encoder_and_of_other_libraries() -> None:
    runs = _runs(bert(), input_ids=ids())
    assert {"a mask padded at the left", "eager attention"} <= runs.keys()
    with pytest.raises(LookupError, match="no cache"), torch.no_grad():  # its config speaks of one
        runs["steps on one cache"].run(bert())
    assert other_runs(capture(torch.nn.Linear(2, 2), torch.ones(1, 2))) == []


@pytest.mark.slow
@pytest.mark.ci
def test_a_cut_decoder_is_compared_on_its_paths() -> None:
    torch.manual_seed(0)
    small = gc.compress(llama(1), (), {"input_ids": ids()}, sparsity=0.5, ranking="local", progress=False)
    paths = ("a mask padded at the left", "steps on one cache", "eager attention")
    assert all(small.report.verified[f"native == masked, on {path}"] < 1e-4 for path in paths)


@pytest.mark.slow
@pytest.mark.ci
def test_an_attribute_that_another_path_reads_is_found_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the path, a result would break on it."""
    torch.manual_seed(0)
    model = llama(1)
    attention = type(model.model.layers[0].self_attn)
    plain = attention.forward

    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, hidden_states, *args, **kwargs)
        if hidden_states.shape[1] == 1:  # a step on a cache
            hidden_states.new_zeros(self.heads * self.head_dim) + self.o_proj.weight[0]
        return found

    monkeypatch.setattr(attention, "forward", forward)
    model.model.layers[0].self_attn.heads = 4
    small = gc.compress(model, (), {"input_ids": ids()}, sparsity=0.5, ranking="local", progress=False)
    assert small.form == "native", small.reason
    assert small.module.model.layers[0].self_attn.heads == 2
