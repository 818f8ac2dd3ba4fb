"""A decoder of transformers with its cache as inputs and outputs: one graph for the prompt and for each token behind.

Names and layout are those of onnxruntime's own tools and of optimum: `input_ids`, `attention_mask`, `position_ids`,
`past_key_values.0.key` to `logits`, `present.0.key`. A cache of length 0 makes the graph read a prompt.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.errors import ExportError, first_line
from graphcomp.ir.module import copied, tensor_names
from graphcomp.ir.preserve import eval_copy

BATCH, TOKENS, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
"""Names of the open lengths in a file."""

KEY, VALUE = "key", "value"
"""Last parts of the names of a cache's tensors."""

EXAMPLE_TOKENS, EXAMPLE_PAST = 5, 6
"""Lengths that a decoder is captured on: two that are unlike, and no 0 or 1, which export takes for constants."""

ROWS, PADDING = 2, 2
"""Rows of the example, and how many tokens of padding stand at the left of the first one."""

BATCHES = "batched_mm"
"""Name of transformers' way to compute experts that a graph of open lengths can hold."""

SEED = 0
"""Seed of the example's tokens and cache."""


@dataclass(frozen=True)
class Held:
    """What one layer keeps of each token.

    Attributes:
        key, value: heads and their size.
    """

    key: tuple[int, int]
    value: tuple[int, int]


class Decoder(nn.Module):
    """A decoder that takes and returns its cache as tensors.

    Attributes:
        model: a PreTrainedModel.
        held: what each layer of the cache keeps; None for a layer that keeps nothing.
        positions: whether the model takes `position_ids`.
        output: name of the first output, "logits" or "last_hidden_state".
    """

    def __init__(self, model: nn.Module, held: Sequence[Held | None], positions: bool, output: str) -> None:
        super().__init__()
        self.model = model
        self.held = tuple(held)
        self.positions = positions
        self.output = output
        self.training = False

    @property
    def layers(self) -> tuple[Held, ...]:
        """The layers that keep something, in order: layer k of the file is the k-th of these."""
        return tuple(held for held in self.held if held is not None)

    def input_names(self) -> list[str]:
        """Return the names of a file's inputs, in the order of `forward`."""
        tokens = ["input_ids", "attention_mask", *(["position_ids"] if self.positions else [])]
        return [*tokens, *(f"past_key_values.{k}.{part}" for k in range(len(self.layers)) for part in (KEY, VALUE))]

    def output_names(self) -> list[str]:
        """Return the names of a file's outputs, in the order of what `forward` returns."""
        return [self.output, *(f"present.{k}.{part}" for k in range(len(self.layers)) for part in (KEY, VALUE))]

    def input_lengths(self) -> list[Mapping[int, str]]:
        """Return dim -> name of the open lengths of each input."""
        tokens = {0: BATCH, 1: TOKENS}
        own = [tokens, {0: BATCH, 1: TOTAL}, *([tokens] if self.positions else [])]
        return [*own, *({0: BATCH, 2: PAST} for _ in self.layers for _ in (KEY, VALUE))]

    def output_lengths(self) -> list[Mapping[int, str]]:
        """Return dim -> name of the open lengths of each output."""
        return [{0: BATCH, 1: TOKENS}, *({0: BATCH, 2: TOTAL} for _ in self.layers for _ in (KEY, VALUE))]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the tokens behind a cache.

        Args:
            tensors: input_ids (b, s) int64; attention_mask (b, p + s) int64, 0 for padding; position_ids (b, s) int64
                where the model takes them; key (b, h, p, d) and value of each layer that keeps them, p ≥ 0.

        Returns:
            logits (b, s, v), and the key (b, h, p + s, d) and the value of each layer.
        """
        first = 3 if self.positions else 2
        ids, mask, past = tensors[0], tensors[1], tensors[first:]
        lengths, rows = [tensor.shape[2] for tensor in past], [tensor.shape[0] for tensor in (ids, mask)]
        # what is compared is one length to export
        if any(length != lengths[0] for length in lengths) or rows[0] != rows[1]:
            raise ValueError(f"rows of tokens and mask must be equal, got {rows}; lengths of the cache, got {lengths}")
        cache = _cache(self.held, past)
        more = {"position_ids": tensors[2]} if self.positions else {}
        found = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        states = [tensor for layer in cache.layers if layer.is_initialized for tensor in _states(layer)]
        return (found[self.output], *states)

    def example(self, tokens: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return example inputs: two rows, the first one padded at the left, behind a random cache.

        Args:
            tokens: (b, s) ids to take the example's from; None: random ones.
        """
        generator = torch.Generator().manual_seed(SEED)
        ids = self.prompt(tokens)
        mask = mask_of(ids)
        rows, start = ids.shape[0], EXAMPLE_PAST
        given = [ids[:, start:], mask, *([positions_of(mask)[:, start:]] if self.positions else [])]
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        cache = [torch.randn(rows, heads, start, size, generator=generator) for heads, size in self._sizes()]
        return tuple(t.to(self._device()) for t in [*given, *(t.to(dtype) for t in cache)])

    def prompt(self, tokens: Tensor | None = None) -> Tensor:
        """Return (2, 11) ids: those given, repeated as often as need be, or random ones."""
        length = EXAMPLE_PAST + EXAMPLE_TOKENS
        if tokens is None:
            generator = torch.Generator().manual_seed(SEED)
            return torch.randint(0, _vocabulary(self.model), (ROWS, length), generator=generator)
        flat = tokens.detach().cpu().flatten()
        repeated = flat.repeat(-(-ROWS * length // max(flat.numel(), 1)))
        return repeated[: ROWS * length].reshape(ROWS, length)

    def empty(self, rows: int) -> tuple[Tensor, ...]:
        """Return a cache of length 0."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        return tuple(torch.zeros(rows, heads, 0, size, dtype=dtype) for heads, size in self._sizes())

    def _sizes(self) -> Iterator[tuple[int, int]]:
        for held in self.layers:
            yield held.key
            yield held.value

    def _device(self) -> torch.device:
        return next((t.device for t in self.model.parameters()), torch.device("cpu"))


def mask_of(ids: Tensor) -> Tensor:
    """Return a mask for `ids` with padding at the left of the first row."""
    mask = torch.ones(ids.shape, dtype=torch.long)
    mask[0, :PADDING] = 0
    return mask


def positions_of(mask: Tensor) -> Tensor:
    """Return the positions of tokens, padding left out, as `generate` counts them."""
    positions: Tensor = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return positions


def decoder_of(model: nn.Module) -> Decoder:
    """Return a decoder of transformers with its cache as tensors.

    Raises:
        ExportError: the model is no decoder of transformers; or keeps more than keys and values of each token.
    """
    transformers = sys.modules.get("transformers")
    kind = type(model).__name__
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        raise ExportError(
            f"cache=True with a {kind}",
            why="a cache of keys and values is known of decoders of transformers that keep their class",
            fix="small.export(path) without cache=, or options of compress that keep the class (see small.reason)",
        )
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(
            f"{kind} cannot be exported with its cache",
            why="an encoder-decoder has a cache of two attentions and two files, which is not built",
            fix="small.export(path) without cache=, on inputs of encoder and decoder",
        )
    takes = inspect.signature(model.forward).parameters
    if "past_key_values" not in takes or "input_ids" not in takes:
        raise ExportError(
            f"{kind} cannot be exported with its cache",
            why="its forward takes no past_key_values" if "input_ids" in takes else "its forward takes no input_ids",
            fix="small.export(path) without cache=",
        )
    found = _run(model, kind)
    layers = list(getattr(found.get("past_key_values"), "layers", None) or ())
    if not any(getattr(layer, "keys", None) is not None for layer in layers):
        raise ExportError(
            f"{kind} cannot be exported with its cache",
            why=_layers_of_other_kinds(layers) or "it returns no past_key_values with keys and values",
            fix="small.export(path) without cache=",
        )
    if why := _layers_of_other_kinds(layers):
        raise ExportError(f"{kind} cannot be exported with its cache", why=why, fix="small.export(path) without cache=")
    output = "logits" if "logits" in found else "last_hidden_state"
    return Decoder(_experts_in_batches(model), [_held(layer) for layer in layers], "position_ids" in takes, output)


def _experts_in_batches(model: Any) -> Any:
    """Return a model that shares the tensors of `model`, and multiplies each token by its experts' weights, looked up:
    other ways loop over experts by data, for which a file has no op."""
    chosen: Mapping[str, str | None] = getattr(model, "get_experts_implementation", dict)()
    if all(kind in (None, BATCHES) for kind in chosen.values()):
        return model
    other: Any = copied(model, share=True)  # the config of the caller's model stays as it is
    other.set_experts_implementation(BATCHES)
    return other


def _run(model: Any, kind: str) -> Any:
    """Return what a model gives for two tokens and a new cache."""
    if any(tensor.is_meta for tensor in tensor_names(model).values()):
        raise ExportError(f"{kind} has no weights", why="its tensors are on the meta device", fix="load the weights")
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    try:
        with eval_copy(model, real=True) as alone, torch.no_grad():
            return alone(input_ids=ids, use_cache=True, return_dict=True)
    except Exception as error:  # of the user's code
        raise ExportError(
            f"{kind} cannot be exported with its cache",
            why=f"it does not run on tokens alone: {type(error).__name__}: {first_line(error)}",
            fix="small.export(path) without cache=",
        ) from error


def _layers_of_other_kinds(layers: Sequence[Any]) -> str:
    """Return which layers keep something else than a key and a value per token; "" where none does."""
    from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

    known = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    others = {k: type(layer).__name__ for k, layer in enumerate(layers) if type(layer) not in known}
    if not others:
        return ""
    first = next(iter(others))
    more = f" ({len(others)} of {len(layers)} layers)" if len(others) > 1 else ""
    return f"layer {first} keeps a {others[first]}{more}; keys and values of each token alone can be exported"


def _held(layer: Any) -> Held | None:
    if layer.keys is None or layer.values is None:
        return None
    (_, heads, _, size), (_, heads_of_values, _, size_of_values) = layer.keys.shape, layer.values.shape
    return Held((heads, size), (heads_of_values, size_of_values))


def _cache(held: Sequence[Held | None], past: Sequence[Tensor]) -> Any:
    """Return a cache of transformers that holds tensors. Windows that slide keep all tokens: their mask hides the old
    ones."""
    from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer

    cache = DynamicCache()
    given = iter(past)
    for part in held:
        if part is None:
            cache.layers.append(DummyLayer())  # type: ignore[no-untyped-call]
            continue
        layer = DynamicLayer()  # type: ignore[no-untyped-call]
        key, value = next(given), next(given)
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
        cache.layers.append(layer)
    return cache


def _states(layer: Any) -> list[Tensor]:
    return [] if layer.keys is None else [layer.keys, layer.values]


def _vocabulary(model: Any) -> int:
    config = model.config.get_text_config()
    return int(config.vocab_size)
