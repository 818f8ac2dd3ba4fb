"""Quantized tensors that are computed again in the backward pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphcomp.errors import TrainingError
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.quantization.quantizers.recompute import made_again
from graphcomp.quantization.spec import QuantSpec


class Block(nn.Module):
    """Quantized products of two kinds; the input of the second and third is the same tensor."""

    def __init__(self, exponent: bool = False) -> None:
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Linear(288, 8), nn.Linear(288, 8)
        self.quantizers = nn.ModuleList(
            GetaQuantizer(QuantSpec(4, kind="geta", learn_exponent=exponent)) for _ in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        weight, image, left, right, hidden = self.quantizers
        y = nn.functional.conv2d(image(x), weight(self.conv.weight), self.conv.bias).relu()
        y = hidden(y).flatten(1)
        return nn.functional.linear(y, left(self.left.weight)) * nn.functional.linear(y, right(self.right.weight))


def gradients(block: Block, x: Tensor, again: bool, call=None) -> list[Tensor]:
    block.zero_grad()
    context = made_again() if again else torch.enable_grad()
    with context:
        result = (call or block)(x)
    result.square().sum().backward()
    return [result.detach(), *(p.grad for p in block.parameters() if p.grad is not None)]


def saved(block: Block, x: Tensor, again: bool) -> list[tuple[int, ...]]:
    """Shapes of the tensors that are kept for the backward pass."""
    shapes: dict[int, tuple[int, ...]] = {}

    def keep(tensor: Tensor) -> Tensor:
        shapes[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        context = made_again() if again else torch.enable_grad()
        with context:
            result = block(x)
    del result
    return sorted(shapes.values())


@pytest.mark.parametrize("exponent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_same_gradients(exponent, dtype):
    block, x = Block(exponent).to(dtype), torch.rand(4, 3, 8, 8, dtype=dtype)
    for mine, wanted in zip(gradients(block, x, True), gradients(block, x, False), strict=True):
        assert torch.equal(mine, wanted)


def test_under_autocast():
    block, x = Block(), torch.rand(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for mine, wanted in zip(gradients(block, x, True), gradients(block, x, False), strict=True):
            assert torch.equal(mine, wanted)


def test_quantized_tensors_are_not_kept():
    block, x = Block(), torch.rand(4, 3, 8, 8)
    before, after = saved(block, x, False), saved(block, x, True)
    for shape in after:
        before.remove(shape)
    assert sorted(map(math.prod, before)) == [8 * 3 * 9, 4 * 3 * 64, 4 * 288, 8 * 288, 8 * 288]


def test_a_step_before_the_backward_pass_is_an_error():
    block, x = Block(), torch.rand(4, 3, 8, 8)
    with made_again():
        loss = block(x).sum()
    with torch.no_grad():
        block.left.weight.mul_(2.0)
    with pytest.raises((TrainingError, RuntimeError), match="modified"):
        loss.backward()


def test_twice_through_the_same_graph():
    block, x = Block(), torch.rand(4, 3, 8, 8)
    with made_again():
        loss = block(x).square().sum()
    weights = [block.conv.weight, block.left.weight]
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    second = torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives():
    block, x = Block().double(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    found = []
    for context in (made_again(), torch.enable_grad()):
        with context:
            loss = block(x).square().sum()
        (grad,) = torch.autograd.grad(loss, block.conv.weight, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), block.left.weight)[0])
    torch.testing.assert_close(*found)


def test_within_other_hooks():
    """Checkpoints, and hooks that keep saved tensors elsewhere, go on working."""
    block, x = Block(), torch.rand(4, 3, 8, 8)
    wanted = gradients(block, x, False)

    def inner(x: Tensor) -> Tensor:
        with made_again():
            return block(x)

    checked = gradients(block, x, False, lambda x: checkpoint(inner, x, use_reentrant=False))
    with torch.autograd.graph.save_on_cpu():
        kept = gradients(block, x, True)
    for mine in (checked, kept):
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


def test_where_it_has_no_effect():
    block, x = Block(), torch.rand(4, 3, 8, 8)
    state = {name: p.detach() for name, p in block.named_parameters()}

    def loss(state: dict[str, Tensor]) -> Tensor:
        with made_again():
            return torch.func.functional_call(block, state, (x,)).square().sum()

    torch.func.grad(loss)(state)
    with torch.no_grad(), made_again():
        assert not block(x).requires_grad
