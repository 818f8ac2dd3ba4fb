"""Layers that stay float are named in the report, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.r, self.o = kind(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.r(x)[0])


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.o = nn.EmbeddingBag(10, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.o(self.e(ids))


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.a(x)
        return self.o(hidden.float())


class Indexed(nn.Module):
    """A table that is indexed, a class token and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.token, self.positions = (
            nn.Parameter(torch.randn(*s)) for s in ((10, 8), (1, 1, 8), (1, 6, 8))
        )
        self.o = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table[ids]
        return self.o(torch.cat([self.token.expand(rows.shape[0], -1, -1), rows], 1) + self.positions)


class Kernels(nn.Module):
    """A convolution whose kernels depend on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(4, 3, 3)), nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(nn.functional.conv1d(x, self.w * x.mean()))


class EinsumAndGru(Recurrent):
    """A product by einsum in front of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__(nn.GRU)
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.einsum("bti,io->bto", x, self.w))


IDS = torch.randint(10, (3, 5))
CASES: dict[str, tuple[nn.Module, Any, str]] = {
    "lstm": (
        Recurrent(nn.LSTM),
        torch.randn(3, 5, 8),
        "'r' stays float: lstm has no integer form: states and gates are floats",
    ),
    "gru": (
        Recurrent(nn.GRU),
        torch.randn(3, 5, 8),
        "'r' stays float: gru has no integer form: states and gates are floats",
    ),
    "einsum and gru": (
        EinsumAndGru(),
        torch.randn(3, 5, 8),
        "'r' stays float: gru has no integer form: states and gates are floats",
    ),
    "embedding_bag": (Bags(), IDS, "'e' stays float: embedding_bag has no integer form: sums rows"),
    "autocast": (Autocast(), torch.randn(3, 8), "'a' stays float: computed under torch.autocast"),
    "index": (Indexed(), IDS, "'table' stays float: index has no integer form: picked by number"),
    "kernels": (Kernels(), torch.randn(1, 3, 8), "'conv1d' stays float: its weight is computed from the inputs"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
@pytest.mark.ci
def test_a_layer_that_stays_float_is_named(name: str) -> None:
    model, x, note = CASES[name]
    small = gc.compress(model.eval(), x, sparsity=0, bits=8, calibration=[x])
    assert [found for found in small.report.notes if "stays float" in found] == [note]
    uncounted = [found for found in small.report.notes if found.startswith("not counted in macs and bops")]
    whole = [note for note in small.report.notes if note.startswith("left whole around wrap_with_autocast")]
    assert len(whole) == len(uncounted) == (name == "autocast")
    rounded = [note for note in small.report.notes if note.startswith("rounded to nearest")]
    assert len(small.report.notes) == 1 + len(uncounted) + len(whole) + len(rounded)


@pytest.mark.slow
@pytest.mark.ci
def test_a_trained_model_names_them_too() -> None:
    model, x, note = CASES["lstm"]
    assert note in gc.finalize(gc.prepare(model, x, bits=8)).report.notes


def test_ignored_layers_are_named_together() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20))).eval()
    x = torch.randn(4, 8)
    small = gc.compress(model, x, sparsity=0, bits=8, ignore=["re:^[0-9]$", "re:^1[0-8]$"], calibration=[x])
    shown = ", ".join(f"'{k}'" for k in range(12))
    assert small.report.notes == (f"{shown} and 7 more stay float: ignored",)


def test_products_of_activations_are_no_news_where_weights_alone_are_quantized() -> None:
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 4, 8)
    small = gc.compress(model, x, sparsity=0, bits=8, activation_bits=None)
    assert small.report.notes == ()


class Attends(nn.Module):
    """Fused attention between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(8, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, 8) -> (b, t, 3)."""
        q, k, v = self.a(x).chunk(3, -1)
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v))


def test_fused_attention_that_was_trained_in_floats_is_named() -> None:
    ready = gc.prepare(Attends(), torch.randn(2, 5, 8), bits=(4, 8))
    ready(torch.randn(2, 5, 8))
    notes = gc.finalize(ready).report.notes
    assert [note for note in notes if "attention in one op" in note] != []
