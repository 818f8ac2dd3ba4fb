"""Bits that single layers are given by name: what is met, for whom, and what is named where it cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.ir.graph import module_path
from graphcomp.quantization.placement import place
from graphcomp.quantization.spec import ACTIVATIONS, WEIGHTS, QuantConfig, QuantSpec, with_bits
from tests.quantization.test_placement import readers_of

X = torch.randn(8, 3, 12, 12)

Pair = tuple[int | None, int | None]


def specs(weights: int | None, activations: int | None) -> tuple[QuantSpec | None, QuantSpec | None]:
    return weights and with_bits(WEIGHTS, weights), activations and with_bits(ACTIVATIONS, activations)  # type: ignore[return-value]


def chain() -> nn.Sequential:
    """Five convolutions, called 0, 2, 4, 6 and 8."""
    more = [m for _ in range(4) for m in (nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *more).eval()


def quantized(model: nn.Module, x: Any, default: Pair = (8, 8), **overrides: Pair) -> gc.CompressedModel:
    wishes = {name.replace("_", "."): specs(*pair) for name, pair in overrides.items()}
    config = QuantConfig(*specs(*default), overrides=wishes)
    return gc.compress(model, x, sparsity=0, quantization=gc.PostTraining(config), calibration=[x], progress=False)


def bits(small: gc.CompressedModel) -> dict[str, tuple[int, int]]:
    return {layer.name: (layer.weight_bits, layer.activation_bits) for layer in small.report.layers}


@pytest.mark.parametrize(
    ("name", "pair"), [("4", (4, 4)), ("0", (4, 8)), ("8", (3, 5))], ids=["middle", "first", "last"]
)
def test_a_convolution_in_a_chain_has_the_bits_it_was_given(name: str, pair: Pair) -> None:
    small = quantized(chain(), X, **{name: pair})
    assert bits(small) == {**dict.fromkeys("02468", (8, 8)), name: pair}
    said = "1 value that sums and other ops than products read: 8 bits in place of 5: QuantConfig(residual_bits=…)"
    assert small.report.notes == ((said,) if name == "8" else ())  # what the model returns


def test_a_layer_left_float_by_name_reads_floats() -> None:
    small = quantized(chain(), X, default=(4, 4), **{"4": (None, None)})
    assert bits(small) == {"0": (8, 8), "2": (4, 8), "4": (32, 32), "6": (4, 4), "8": (8, 8)}
    assert small.report.notes == (
        "2 returns floats, as what reads them was given float inputs by name",
        "0, 8: 8 bits, as the first and the last quantized layer get at least that many: "
        "QuantConfig(first_and_last_bits=…)",
        "'4' stays float: no spec",
    )


class Branches(nn.Module):
    """One value read by a convolution, by another behind a pooling, and by a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = (nn.Conv2d(k, 8, 3, padding=1) for k in (3, 8, 8, 8))
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.stem(x).relu()
        return self.last((self.a(hidden) + hidden).relu()), self.b(functional.max_pool2d(hidden, 2)) + self.c(
            functional.max_pool2d(hidden, 2)
        )


def test_a_named_reader_beside_others_has_a_quantizer_of_its_own() -> None:
    small = quantized(Branches().eval(), X, a=(8, 4))
    assert bits(small) == {"stem": (8, 8), "a": (8, 4), "b": (8, 8), "c": (8, 8), "last": (8, 8)}


def test_two_named_readers_of_one_value_both_have_their_bits() -> None:
    small = quantized(Branches().eval(), X, default=(4, 4), a=(4, 6), b=(4, 3))
    assert {name: pair[1] for name, pair in bits(small).items()} == {"stem": 8, "a": 6, "b": 3, "c": 8, "last": 4}


def test_a_float_reader_behind_a_pooling_that_others_read() -> None:
    module = capture(Branches().eval(), X).module
    paths = {node.name: module_path(node) or node.name for node in module.graph.nodes}
    sites = place(module, QuantConfig(*specs(4, 4), overrides={"b": (None, None)})).sites
    read = {paths[user] for site in sites if not site.is_weight for user in readers_of(site)}
    assert "b" not in read and {"a", "c", "last"} <= read
    assert "max_pool2d" not in read


def test_an_override_that_changes_nothing_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    small = quantized(model, torch.randn(4, 8), **{"1": (4, 4)})
    assert "1: the override changes nothing, as no op in it can be quantized" in small.report.notes


def test_groups_that_do_not_fit_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()
    small = gc.compress(model, torch.randn(2, 3, 4, 4), sparsity=0, bits=4, activation_bits=None, group_size=16)
    assert [note for note in small.report.notes if "group of 16" in note and note.startswith("0:")]


def test_group_wise_embeddings_have_a_step_per_row() -> None:
    """One step per group is for weights that are multiplied: a table that is looked up has one per row."""
    model = nn.Sequential(nn.Embedding(10, 32), nn.Linear(32, 4)).eval()
    config = QuantConfig(overrides={"0": (QuantSpec(4, granularity="group", group_size=16), None)})
    ids = torch.randint(10, (3, 5))
    small = gc.compress(model, ids, sparsity=0, quantization=gc.PostTraining(config), calibration=[ids])
    assert bits(small)["0"][0] == 4 and any(
        note.startswith("0: one step per output channel") for note in small.report.notes
    )
