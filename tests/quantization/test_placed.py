"""Quantized activations keep every write; the check of placement raises where one is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.errors import VerificationError
from graphcomp.quantization.insert import InsertQuantizers
from graphcomp.quantization.placed import check_placed
from graphcomp.quantization.placement import place
from graphcomp.quantization.ptq import PostTraining, quantize
from graphcomp.quantization.spec import QuantConfig
from tests.capture.test_functional import FUNCTIONAL, IN_PLACE, Net, one_of_several_results


@torch.library.custom_op("written_in_tests::scale_", mutates_args={"x"})
def scale_(x: Tensor, by: Tensor) -> None:
    x.mul_(by)


scale_.register_fake(lambda x, by: None)


def by_a_custom_op(self: Any, x: Tensor) -> Tensor:
    y = self.i(x)
    scale_(y[:, :8], torch.full((8,), 3.0))
    return self.o(y)


class Border(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.i(x).relu()
        y[:, :, 0] = 0
        return self.o(y)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).norm() / b.detach().norm())


@pytest.mark.parametrize(
    "body", [body for body in (*FUNCTIONAL, *IN_PLACE, by_a_custom_op) if body is not one_of_several_results],
    ids=lambda body: body.__name__,
)  # fmt: skip
def test_integers_keep_every_write(body: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Net(body).eval().requires_grad_(False), torch.randn(16, 8)
    quantized = quantize(capture(model, x), [[x]], PostTraining())
    assert quantized.lowered.weights
    assert relative(quantized.lowered.module(x.clone()), model(x.clone())) < 0.05


@pytest.mark.parametrize("body", [*IN_PLACE, by_a_custom_op], ids=lambda body: body.__name__)
def test_a_value_that_is_written_in_place_stays_float_and_is_named(body: Callable[[Any, Tensor], Tensor]) -> None:
    model, x = Net(body).eval(), torch.randn(16, 8)
    (note,) = quantize(capture(model, x), [[x]], PostTraining()).notes
    assert "stays float" in note
    assert "writes into it in place, at test_" in note
    assert note.startswith("what i reads" if body.__name__ == "written_input" else "what o reads")


def test_convolutions_keep_a_write() -> None:
    torch.manual_seed(0)
    model, x = Border().eval(), torch.randn(4, 3, 6, 6)
    small = gc.compress(model, x, sparsity=0, bits=8, calibration=[x], progress=False)
    assert relative(small(x), model(x)) < 0.05


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 8, "quantizer": "lsq"}])
def test_training_starts_with_every_write(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Net(FUNCTIONAL[0]).eval(), torch.randn(16, 8)
    ready = gc.prepare(model, x, **options)
    assert relative(ready(x), model(x)) < 0.05
    ready.train()(x).sum().backward()
    assert all(p.grad is not None for name, p in ready.named_parameters() if name in ("i.weight", "o.weight"))


def test_a_lost_write_is_found() -> None:
    """A quantizer in front of a write, as a pass that does not know of writes would place it."""
    model, x = Net(by_a_custom_op).eval(), torch.randn(16, 8)
    floats = capture(model, x).module
    fake = InsertQuantizers(place(floats, QuantConfig(activations=None)).sites)(floats)
    check_placed(floats, fake, [x])
    linear = next(iter(fake.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)))
    with fake.graph.inserting_after(linear):
        copied = fake.graph.call_function(torch.ops.aten.clone.default, (linear,))
    reader = [node for node in fake.graph.nodes if node.target is torch.ops.aten.linear.default][-1]
    reader.replace_input_with(linear, copied)
    fake.recompile()
    with pytest.raises(VerificationError, match="all quantizers off"):
        check_placed(floats, fake, [x])
