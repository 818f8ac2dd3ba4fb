"""Einsum written as matrix products computes the same, and is quantized like these."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.quantization.einsum import WriteOutEinsum

EINSUM = torch.ops.aten.einsum.default


class Einsum(nn.Module):
    """One einsum; operands at the places `weights` are parameters."""

    def __init__(self, equation: str, shapes: list[tuple[int, ...]], weights: set[int]) -> None:
        super().__init__()
        self.equation, self.places = equation, weights
        self.w = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, *given: Tensor) -> Tensor:
        rest = iter(given)
        return torch.einsum(self.equation, *(w if k in self.places else next(rest) for k, w in enumerate(self.w)))


def case(equation: str, sizes: dict[str, int], weights: set[int]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    terms = equation.partition("->")[0].replace("...", "xy").split(",")
    shapes = [tuple(sizes.get(label, 3) for label in term) for term in terms]
    inputs = tuple(torch.randn(shape) for k, shape in enumerate(shapes) if k not in weights)
    return Einsum(equation, shapes, weights).eval(), inputs


SIZES = {"b": 2, "t": 5, "i": 6, "h": 4, "d": 7, "o": 8}


@pytest.mark.parametrize(
    ("equation", "weights"),
    [
        ("bti,hid->bthd", {1}),
        ("hid,bti->bthd", {0}),
        ("...i,oi->...o", {1}),
        ("bi,oi", {1}),
        ("bi,i->b", {1}),
        ("bthi,hio->btho", {1}),
        ("bith,io->both", {1}),
        ("bhtd,bhid->bhti", set()),
        ("bti,btio->bo", set()),
        ("bi,id,do->bo", {1, 2}),
        ("bi,io,bo->b", {1}),
        ("btih,hid->bo".replace("o", "d"), {1}),
    ],
)
def test_products_compute_what_the_einsum_does(equation: str, weights: set[int]) -> None:
    model, inputs = case(equation, SIZES, weights)
    module = capture(model, inputs).module
    written = WriteOutEinsum()(module)
    targets = [node.target for node in written.graph.nodes]
    assert EINSUM not in targets and {"einsum"} <= {node.name for node in written.graph.nodes}
    assert torch.allclose(written(*inputs), model(*inputs), atol=1e-5)
    assert EINSUM in [node.target for node in module.graph.nodes]


@pytest.mark.parametrize("equation", ["ii,bi->b", "bi,bo->bio", "bti->bit"], ids=["diagonal", "outer", "one"])
def test_what_no_product_says_stays(equation: str) -> None:
    model, inputs = case(equation, SIZES, set())
    written = WriteOutEinsum()(capture(model, inputs).module)
    assert EINSUM in [node.target for node in written.graph.nodes]


class Heads(nn.Module):
    """A projection to heads by einsum between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.w, self.o = nn.Linear(16, 16), nn.Parameter(torch.randn(4, 16, 8) / 4), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.einsum("bti,hid->bthd", self.i(x), self.w).flatten(2))


def test_an_einsum_is_quantized_like_a_layer() -> None:
    model, x = Heads().eval(), torch.randn(3, 5, 16)
    small = gc.compress(model, x, sparsity=0.5, bits=8, calibration=[x], repair=None)
    rows = {row.name: (row.weight_bits, row.activation_bits) for row in small.report.layers}
    assert rows == {"i": (8, 8), "w": (8, 8), "o": (8, 8)} and not small.report.notes
    assert small.report.macs.after < small.report.macs.before


def test_an_einsum_is_trained_with_quantizers() -> None:
    model, x = Heads(), torch.randn(3, 5, 16)
    ready = gc.prepare(model, x, bits=4, activation_bits=8)
    assert ready.bits() == dict.fromkeys(("i", "w", "o"), (4.0, 8.0))
    ready(x).sum().backward()
    assert ready.get_parameter("w").grad.abs().sum() > 0
    ready.keep({group: torch.arange(group.size // 2) for group in ready.session.groups})
    small = gc.finalize(ready)
    assert {row.weight_bits for row in small.report.layers} == {4}
    assert small.report.verified["trained == sliced"] < 1e-9
