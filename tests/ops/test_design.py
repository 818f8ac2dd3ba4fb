"""Each compute op is the product of rows with matrices that its design says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.capture.capture import capture
from graphcomp.ir.graph import bind
from graphcomp.ops.answers import compute_of
from graphcomp.ops.design import design_of

aten = torch.ops.aten

OPS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (F.linear, (4, 3, 6), (5, 6)),
    "linear of a vector": (F.linear, (6,), (5, 6)),
    "mm": (torch.mm, (4, 6), (6, 5)),
    "mm, weight first": (lambda x, w: torch.mm(w, x), (6, 4), (5, 6)),
    "bmm": (torch.bmm, (3, 4, 6), (3, 6, 5)),
    "matmul": (torch.matmul, (2, 3, 4, 6), (6, 5)),
    "matmul, weight first": (lambda x, w: torch.matmul(w, x), (2, 6, 4), (5, 6)),
    "matmul of batches": (torch.matmul, (2, 3, 4, 6), (3, 6, 5)),
    "matmul over batches of the weight": (torch.matmul, (2, 1, 4, 6), (3, 6, 5)),
    "matmul over batches of the data": (torch.matmul, (2, 3, 4, 6), (1, 6, 5)),
    "einsum": (lambda x, w: torch.einsum("bti,iho->bhto", x, w), (2, 3, 6), (6, 4, 5)),
    "einsum, its result left out": (lambda x, w: torch.einsum("...i,io", x, w), (2, 3, 6), (6, 5)),
    "einsum over two dims": (lambda x, w: torch.einsum("bhti,hio->bto", x, w), (2, 4, 3, 6), (4, 6, 5)),
    "einsum with batches": (lambda x, w: torch.einsum("...gi,gio->...go", x, w), (2, 3, 4, 6), (4, 6, 5)),
    "einsum, weight first": (lambda x, w: torch.einsum("oi,bi->bo", w, x), (3, 6), (5, 6)),
    "conv1d": (lambda x, w: F.conv1d(x, w, stride=2, padding=1), (2, 4, 9), (6, 4, 3)),
    "conv2d": (lambda x, w: F.conv2d(x, w, dilation=(2, 1), padding=(0, 2)), (2, 4, 9, 8), (6, 4, 3, 2)),
    "conv2d without a batch": (lambda x, w: F.conv2d(x, w), (4, 9, 8), (6, 4, 3, 2)),
    "padding same": (lambda x, w: F.conv2d(x, w, padding="same"), (2, 4, 9, 8), (6, 4, 2, 4)),
    "conv3d": (lambda x, w: F.conv3d(x, w), (2, 4, 4, 5, 6), (6, 4, 3, 2, 1)),
    "grouped": (lambda x, w: F.conv2d(x, w, groups=2), (2, 4, 7, 7), (6, 2, 3, 3)),
    "depthwise": (lambda x, w: F.conv2d(x, w, groups=4), (2, 4, 7, 7), (8, 1, 3, 3)),
    "transposed": (
        lambda x, w: F.conv_transpose2d(x, w, stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(1, 2)),
        (2, 4, 5, 4), (4, 6, 3, 2),
    ),
    "transposed, grouped": (lambda x, w: F.conv_transpose1d(x, w, stride=2, groups=2), (2, 4, 5), (4, 3, 3)),
    "transposed, much padding": (lambda x, w: F.conv_transpose1d(x, w, padding=3), (2, 4, 9), (4, 3, 3)),
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, op: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.op, self.weight = op, nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight)


@pytest.mark.parametrize("name", OPS)
def test_an_op_is_the_product_of_its_rows_and_matrices(name: str) -> None:
    torch.manual_seed(0)
    op, x_shape, w_shape = OPS[name]
    model, x = Net(op, w_shape).eval(), torch.randn(*x_shape)
    graph = capture(model, (x,), {}).module.graph
    (node,) = [n for n in graph.nodes if n.op == "call_function" and (compute_of(n) or n.target is aten.einsum.default)]
    arguments = bind(node)
    if node.target is aten.einsum.default:
        arguments = {str(k): tensor for k, tensor in enumerate(arguments["tensors"])}
    (weight,) = [key for key, value in arguments.items() if getattr(value, "op", "") == "get_attr"]
    (data,) = [key for key, value in arguments.items() if getattr(value, "op", "") == "placeholder"]
    design = design_of(node, data, weight, {data: x.shape, weight: model.weight.shape})
    assert design is not None
    y = model(x).detach()
    chosen = torch.randperm(design.count(x))[: max(1, design.count(x) // 2)]
    matrices = design.matrices(model.weight.detach())
    assert torch.allclose(design.rows(x, chosen) @ matrices, design.results(y, chosen), atol=1e-5)
    assert torch.equal(design.weight(matrices), model.weight)
    assert design.rows(x, torch.arange(design.count(x))).shape[0] * design.count(x) * matrices.shape[2] == y.numel()


def test_rows_know_their_sample() -> None:
    x = torch.arange(3.0)[:, None, None, None].expand(3, 2, 4, 4).contiguous()
    node = next(n for n in capture(Net(F.conv2d, (2, 2, 2, 2)), (x,), {}).module.graph.nodes if n.op == "call_function")
    design = design_of(node, "input", "weight", {"input": x.shape, "weight": (2, 2, 2, 2)})
    assert design is not None
    every = torch.arange(design.count(x))
    assert torch.equal(design.samples(x, every).float(), design.rows(x, every)[0, :, 0])
