"""A weight of integers in the place of a float parameter: functions of torch, copies, files, refusals."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphcomp as gc
from graphcomp.quantization import quantized_tensor
from graphcomp.quantization.quantized_tensor import Operand, QuantizedTensor, exact_products
from graphcomp.quantization.stored import Affine


def weight(shape=(40, 70), bits=8, size=0, axis=0, dtype=torch.float32, operand=None, seed=0):
    torch.manual_seed(seed)
    high = 2 ** (bits - 1) - 1
    codes = torch.randint(-high, high + 1, shape, dtype=torch.int8)
    groups = torch.arange(shape[-1]) // size if size else None
    scale = (
        torch.rand(shape[0], -(-shape[1] // size)) if size else torch.rand(shape[axis]) if axis is not None else None
    )
    scale = torch.tensor(0.3) if scale is None else scale + 0.1
    stored = Affine(codes, scale, torch.zeros_like(scale, dtype=torch.int32), -high, high, axis, groups)
    return QuantizedTensor(stored, dtype, operand)


FORMS = [(8, 0, 0), (8, 0, None), (4, 0, 0), (4, 32, 0), (3, 0, 0), (2, 0, None), (8, 16, 0)]


@pytest.fixture
def kernels(monkeypatch):
    """No tensor is too small for a kernel."""
    monkeypatch.setattr(quantized_tensor, "KEPT_FLOAT", 0)


def near(got, wanted, bits):
    return float((got - wanted).norm() / wanted.norm()) < (1e-5 if bits > 4 else 2**-7)


@pytest.mark.parametrize(("bits", "size", "axis"), FORMS)
def test_products_are_those_of_the_floats(kernels, bits, size, axis):
    w = weight(bits=bits, size=size, axis=axis)
    floats, codes, x, bias = w.dequantize(), w.codes, torch.randn(2, 3, 70), torch.randn(40)
    assert near(F.linear(x, w, bias), F.linear(x, floats, bias), bits)
    assert near(x @ w.t(), x @ floats.t(), bits)
    assert F.linear(x[:, :0], w).shape == (2, 0, 40)
    with exact_products():
        assert torch.equal(F.linear(x, w, bias), F.linear(x, floats, bias))
    assert torch.equal(w.codes, codes) and torch.equal(w.dequantize(), floats)  # out of the kernel's layout, too


def test_a_matrix_with_outputs_last_is_multiplied_from_the_right(kernels):
    w = weight(axis=1)
    x, bias = torch.randn(3, 40), torch.randn(70)
    assert near(torch.addmm(bias, x, w), bias + x @ w.dequantize(), 8)
    assert near(torch.matmul(x, w), x @ w.dequantize(), 8)
    assert near(x @ w, x @ w.dequantize(), 8)
    assert near(torch.addmm(bias, x, w, beta=2), 2 * bias + x @ w.dequantize(), 8)


def test_rows_of_a_table_are_looked_up_without_floats_of_the_table():
    for axis in (0, None):
        w = weight(axis=axis)
        ids = torch.tensor([[3, 0], [39, 3]])
        assert torch.equal(F.embedding(ids, w), F.embedding(ids, w.dequantize()))
    columns = weight(axis=1)
    assert torch.equal(F.embedding(ids, columns), F.embedding(ids, columns.dequantize()))


@pytest.mark.parametrize("first", ["product", "lookup"])
def test_a_table_that_is_multiplied_too_keeps_its_codes_for_lookups(kernels, first):
    w, ids, x = weight(), torch.tensor([3, 0]), torch.randn(2, 70)
    wanted = F.embedding(ids, w.dequantize())
    if first == "product":
        F.linear(x, w)
    assert torch.equal(F.embedding(ids, w), wanted)
    F.linear(x, w)
    assert w._held.codes is not None and w._held.products and torch.equal(F.embedding(ids, w), wanted)


def test_every_other_op_gets_floats():
    w = weight()
    floats = w.dequantize()
    assert torch.equal(w * 2, floats * 2) and torch.equal(w[3], floats[3]) and torch.equal(w.sum(0), floats.sum(0))
    assert torch.equal(torch.einsum("ni,oi->no", torch.ones(2, 70), w), torch.ones(2, 70) @ floats.t())
    assert w.long().dtype is torch.int64


def test_operands_are_quantized_at_run_time_or_on_known_levels():
    x = torch.randn(5, 70)
    w = weight(operand=Operand(per_token=True))
    step = x.abs().amax(-1, keepdim=True) / 127
    assert near(F.linear(x, w), (x / step).round() * step @ w.dequantize().t(), 8)
    w = weight(operand=Operand(levels=(0.05, 128, 0, 255)))
    quantized = ((x / 0.05).round() + 128).clamp(0, 255).sub(128) * 0.05
    assert near(F.linear(x, w), quantized @ w.dequantize().t(), 8)
    with exact_products():
        assert near(F.linear(x, w), quantized @ w.dequantize().t(), 8)
    assert not near(F.linear(x, w), x @ w.dequantize().t(), 8)


def test_gradients_go_through_to_the_operand(kernels):
    layer = nn.Linear(70, 40)
    layer.weight = nn.Parameter(weight(), requires_grad=False)
    x = torch.randn(3, 70, requires_grad=True)
    layer(x).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    F.linear(other, layer.weight.dequantize(), layer.bias).square().sum().backward()
    assert near(x.grad, other.grad, 8) and layer.bias.grad is not None and layer.weight.grad is None


@pytest.mark.parametrize(("bits", "size", "axis"), FORMS)
def test_copies_pickles_and_state_dicts_hold_the_same_codes(kernels, bits, size, axis):
    layer = nn.Linear(70, 40)
    layer.weight = nn.Parameter(weight(bits=bits, size=size, axis=axis), requires_grad=False)
    layer(torch.randn(1, 70))  # a kernel has taken the codes
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    fresh = nn.Linear(70, 40)
    fresh.weight = nn.Parameter(weight(bits=bits, size=size, axis=axis, seed=1), requires_grad=False)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False), fresh):
        assert isinstance(other.weight, QuantizedTensor) and isinstance(other.weight, nn.Parameter)
        assert torch.equal(other.weight.codes, layer.weight.codes)
        assert torch.equal(other.weight.scale, layer.weight.scale)
        assert other.weight.scale.data_ptr() != layer.weight.scale.data_ptr()
    shared = layer.weight.detach()
    assert shared.scale.data_ptr() == layer.weight.scale.data_ptr() and not isinstance(shared, nn.Parameter)


def test_a_model_moves_to_another_dtype_and_names_stay():
    layer = nn.Linear(70, 40)
    layer.weight = nn.Parameter(weight(), requires_grad=False)
    layer.to(torch.bfloat16)
    assert layer.weight.dtype is torch.bfloat16 and isinstance(layer.weight, QuantizedTensor)
    assert layer(torch.randn(2, 70, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert repr(layer.weight) == "QuantizedTensor(8 bits, (40, 70), bfloat16)"


def test_nothing_writes_into_a_weight_of_integers():
    w = weight()
    for write in (lambda: w.mul_(2), lambda: nn.init.zeros_(w), lambda: w.copy_(torch.zeros(40, 70))):
        with pytest.raises(gc.PlanError, match="weight of integers") as caught:
            write()
        assert caught.value.fix
    with pytest.raises(gc.PlanError, match="cannot take the values"):
        w.copy_(weight((40, 30)))


def test_four_bits_take_half_a_byte_each():
    assert weight((40, 70), bits=4).packed.numel() == 40 * 70 // 2
    assert weight((40, 70), bits=8).packed.dtype is torch.int8


def test_a_compiled_model_computes_the_same():
    layer = nn.Linear(70, 40)
    layer.weight = nn.Parameter(weight(bits=4), requires_grad=False)
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(3, 70)
    with torch.no_grad():
        assert near(compiled(x), layer(x), 8)
