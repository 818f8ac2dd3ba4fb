"""Paths of transformers' models beside a plain forward: padding at the left, a cache, another attention.

Each path reads attributes that the forward of the example inputs may not read, such as how often key heads are
repeated. A native result is compared with the masked original on each, in two rows and few steps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.capture.capture import Captured
from graphcomp.capture.second_inputs import SEED
from graphcomp.ir.module import copied
from graphcomp.native.runs import FINDERS, ModelRun
from graphcomp.numerics.compare import in_float64
from graphcomp.torch_compat import pytree

ATTENTIONS = ("eager", "sdpa")
"""Implementations of attention that need no package beside torch."""

STEPS = 2
"""Tokens that are decoded one by one on a cache."""

Inputs = dict[str, Any]


def runs_of_transformers(captured: Captured) -> Iterator[ModelRun]:
    """Yield the paths that a PreTrainedModel may have."""
    transformers = sys.modules.get("transformers")
    model = captured.original
    if transformers is None or not isinstance(model, transformers.PreTrainedModel) or captured.inputs.args:
        return
    inputs = _few_rows(captured.inputs.copies()[1])
    if any(isinstance(t, Tensor) and t.is_meta for t in (*model.parameters(), *inputs.values())):
        return
    tokens = inputs.get("input_ids")
    padded = _padded_at_the_left(model, inputs)
    if padded is not None:
        yield ModelRun("a mask padded at the left", partial(_forward, inputs=padded))
    if isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.shape[1] > STEPS + 1 and _has_cache(model):
        yield ModelRun("steps on one cache", partial(_steps, inputs=inputs))
    for kind in ATTENTIONS:
        if kind != getattr(model.config, "_attn_implementation", None):
            yield ModelRun(f"{kind} attention", partial(_with_attention, inputs=padded or inputs, kind=kind))


def _few_rows(inputs: Inputs) -> Inputs:
    """Return the first two rows of each input that has one row per row of the first."""
    first = next((t for t in inputs.values() if isinstance(t, Tensor) and t.dim()), None)
    rows = 0 if first is None else first.shape[0]
    return {
        name: t[:2] if isinstance(t, Tensor) and t.dim() and t.shape[0] == rows else t for name, t in inputs.items()
    }


def _padded_at_the_left(model: Any, inputs: Inputs) -> Inputs | None:
    """Return the inputs with two tokens of padding in front of the first row; None where the model has no tokens."""
    tokens = inputs.get("input_ids")
    mask = inputs.get("attention_mask")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[1] < 4:
        return None
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != tokens.shape or bool((mask != 1).any())):
        return None
    mask = torch.ones(tokens.shape, dtype=torch.long, device=tokens.device)
    mask[0, :2] = 0
    return {**inputs, "attention_mask": mask}


def _has_cache(model: Any) -> bool:
    return bool(getattr(model.config, "use_cache", False)) and not getattr(model.config, "is_encoder_decoder", False)


# ------------------------------------------------------------------------------------------------ running
def _forward(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    return _outside_padding(_tensors(_call(model, inputs)), inputs.get("attention_mask"))


def _steps(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Run all tokens but the last on a new cache, and then one after the other."""
    tokens = inputs["input_ids"]
    others = {n: t for n, t in inputs.items() if not (isinstance(t, Tensor) and t.shape[:2] == tokens.shape)}
    others["use_cache"] = True
    start = tokens.shape[1] - STEPS
    found = _call(model, {**others, "input_ids": tokens[:, :start]})
    name = next((n for n in ("past_key_values", "cache_params") if getattr(found, n, None) is not None), "")
    if not name:
        raise LookupError(f"{type(model).__name__} returns no cache")
    result = {"start": _last(found)}
    for k in range(start, tokens.shape[1]):
        found = _call(model, {"use_cache": True, "input_ids": tokens[:, k : k + 1], name: getattr(found, name)})
        result[f"step {k - start}"] = _last(found)
    return result


def _with_attention(model: Any, inputs: Inputs, kind: str) -> dict[str, Tensor]:
    other: Any = copied(model, share=True)  # the config of the caller's model stays as it is
    other.set_attn_implementation(kind)
    return _forward(other, inputs)


def _call(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model; floats are given to a model of float64 as float64."""
    exact = any(p.dtype == torch.float64 for p in model.parameters())
    given = pytree.tree_map(in_float64, inputs) if exact else inputs
    torch.manual_seed(SEED)
    return model(**given)


def _tensors(output: Any) -> dict[str, Tensor]:
    """Return the floating tensors of a ModelOutput, without those of caches."""
    return {n: t for n, t in output.items() if isinstance(t, Tensor) and t.is_floating_point()}


def _last(output: Any) -> Tensor:
    """Return the tensor that a decoder is run for: logits, or the last hidden state."""
    return next(iter(_tensors(output).values()))


def _outside_padding(found: dict[str, Tensor], mask: Any) -> dict[str, Tensor]:
    """Return the tensors at tokens alone, where a tensor has one row per token."""
    if not isinstance(mask, Tensor):
        return found
    return {n: t[mask.bool()] if t.dim() > 2 and t.shape[:2] == mask.shape else t for n, t in found.items()}


FINDERS.append(runs_of_transformers)
