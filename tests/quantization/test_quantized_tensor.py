"""A weight of integers in the place of a float parameter: functions of torch, copies, files, refusals."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphcomp as gc
from graphcomp.quantization import held
from graphcomp.quantization.operand import Operand, exact_products
from graphcomp.quantization.quantized_tensor import QuantizedTensor
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
    monkeypatch.setattr(held, "KEPT_FLOAT", 0)


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
    assert w.held.given is not None and w.held.products and torch.equal(F.embedding(ids, w), wanted)


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

    def assign() -> None:
        w[0] = 0.0

    for write in (assign, lambda: w.mul_(2), lambda: nn.init.zeros_(w), lambda: w.copy_(torch.zeros(40, 70))):
        with pytest.raises(gc.PlanError, match="weight of integers") as caught:
            write()
        assert caught.value.fix
    with pytest.raises(gc.PlanError, match="cannot take the values"):
        w.copy_(weight((40, 30)))


VIEWS = {
    "data": lambda w: w.data[0],
    "an index": lambda w: w[0],
    "a row": lambda w: w.select(0, 1),
    "a slice": lambda w: w.data[2:4],
    "a view of a view": lambda w: w[1][3:5].unsqueeze(0),
    "flat": lambda w: w.detach().flatten(),
    "turned": lambda w: w.t(),
    "parts": lambda w: w.chunk(2)[1],
    "data of a view": lambda w: w[0].data,
}


@pytest.mark.parametrize("name", VIEWS)
def test_nothing_writes_through_a_view_of_a_weight_of_integers(kernels, name):
    w, rows = weight(), torch.randn(3, 70)
    before, product = w.dequantize(), F.linear(rows, w)
    part = VIEWS[name](w)
    wanted = VIEWS[name](before)
    writes = [
        lambda: part.zero_(),
        lambda: part.__setitem__(0, 1.0),
        lambda: torch.add(part, 1, out=part),
        lambda: nn.init.normal_(part),
        lambda: part.data.copy_(torch.zeros_like(wanted)),
    ]
    for write in writes:
        with pytest.raises(gc.PlanError, match="writes into a weight of integers"):
            write()
    part = VIEWS[name](w)
    assert torch.equal(part, wanted) and torch.equal(F.linear(rows, w), product)
    for found in (part + 0, part.clone(), copy.deepcopy(part), part @ part.mT if part.dim() > 1 else part.exp()):
        assert type(found) is torch.Tensor
        found.zero_()
    file = io.BytesIO()
    torch.save(part, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert type(again) is torch.Tensor and torch.equal(again, wanted)
    assert torch.equal(VIEWS[name](w), wanted)


def test_copies_of_rows_can_be_written_into():
    w = weight()
    for rows in (w[[0, 2]], w.index_select(0, torch.tensor([1])), w.dequantize(), F.embedding(torch.tensor([3]), w)):
        rows.zero_()
        assert not rows.any()


def test_four_bits_take_half_a_byte_each():
    assert weight((40, 70), bits=4).packed.numel() == 40 * 70 // 2
    assert weight((40, 70), bits=8).packed.dtype is torch.int8


def test_a_compiled_model_computes_the_same():
    layer = nn.Linear(70, 40)
    layer.weight = nn.Parameter(weight(bits=4), requires_grad=False)
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(3, 70)
    with torch.no_grad():
        assert near(compiled(x), layer(x), 8)


OPERANDS = [None, Operand(), Operand(per_token=True), Operand(levels=(0.05, 100, 0, 255))]
BACKENDS = ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.ci])]


class Stack(nn.Module):
    """A table, layers and a head that is the table."""

    def __init__(self, operand, bits=8):
        super().__init__()
        self.table = nn.Embedding(40, 70)
        self.layers = nn.ModuleList(nn.Linear(70, 70) for _ in range(2))
        for k, layer in enumerate(self.layers):
            layer.weight = nn.Parameter(weight((70, 70), bits=bits, operand=operand, seed=k), requires_grad=False)
        self.table.weight = nn.Parameter(weight((40, 70), seed=3), requires_grad=False)

    def forward(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x).relu() / 100
        return F.linear(x, self.table.weight) + x @ self.layers[0].weight.t()[:, :40]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, within inductor
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operand", OPERANDS)
def test_a_compiled_model_quantizes_what_eager_code_quantizes(kernels, backend, operand):
    model, ids = Stack(operand, bits=4 if operand is None else 8), torch.randint(0, 40, (2, 5))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert near(compiled(ids), model(ids), 8)
        model.layers[0].weight.copy_(weight((70, 70), bits=model.layers[0].weight.bits, operand=operand, seed=9))
        assert near(compiled(ids), model(ids), 8)
    x, y = (torch.randn(3, 70, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    torch.compile(model.layers[0], backend=backend, fullgraph=True)(x).square().sum().backward()
    model.layers[0](y).square().sum().backward()
    assert near(x.grad, y.grad, 8)


def test_one_trace_serves_all_weights_of_a_shape(kernels):
    model, x = Stack(Operand(levels=(0.05, 100, 0, 255))), torch.randn(3, 70)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
        with torch.no_grad():
            layer(x)
    assert len(graphs) == 1


@pytest.mark.parametrize("operand", OPERANDS)
def test_transforms_quantize_each_sample_as_eager_code_does(kernels, operand):
    w, x = weight(operand=operand), torch.randn(4, 3, 70)
    assert near(torch.vmap(lambda rows: F.linear(rows, w))(x), torch.stack([F.linear(rows, w) for rows in x]), 8)
    got = torch.vmap(torch.func.grad(lambda rows: F.linear(rows, w).square().sum()))(x)
    rows = x.clone().requires_grad_()
    sum(F.linear(each, w).square().sum() for each in rows).backward()
    assert near(got, rows.grad, 8)


@pytest.mark.parametrize("operand", OPERANDS[1:])
def test_an_exported_program_quantizes_operands_too(operand, tmp_path):
    layer, x = nn.Linear(70, 40), torch.randn(3, 70)
    layer.weight = nn.Parameter(weight(operand=operand), requires_grad=False)
    program = torch.export.export(layer, (x,))
    torch.export.save(program, tmp_path / "layer.pt2")
    with torch.no_grad():
        assert near(program.module()(x), layer(x), 8)
        assert near(torch.export.load(tmp_path / "layer.pt2").module()(x), layer(x), 8)


def test_products_without_a_form_for_quantized_operands_are_refused():
    w = weight((40, 40), operand=Operand())
    with pytest.raises(gc.PlanError, match="whose other operand is quantized"):
        F.conv1d(torch.randn(1, 5, 7), weight((8, 5, 3), operand=Operand()))
    assert (w.t() @ w).shape == (40, 40)


def test_integers_take_no_gradient():
    w = weight()
    for ask in (lambda: w.requires_grad_(), lambda: setattr(w, "requires_grad", True), lambda: nn.Parameter(weight())):
        with pytest.raises(gc.PlanError, match="takes no gradient"):
            ask()
    assert not w.requires_grad_(False).requires_grad


def test_sizes_are_those_of_what_is_held(kernels):
    w = weight((64, 64), bits=4)
    assert w.nbytes == 64 * 64 // 2 + 64 * 8 and w.numel() * w.element_size() == w.nbytes
    F.linear(torch.randn(1, 64), w)
    assert w.nbytes < 64 * 64


def test_a_state_dict_is_read_as_weights_alone(tmp_path):
    layer = nn.Linear(70, 40)
    layer.weight = nn.Parameter(weight(bits=4, size=32, operand=Operand(levels=(0.05, 1, 0, 255))), requires_grad=False)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)["weight"]
    assert torch.equal(again.dequantize(), layer.weight.dequantize()) and again.operand == layer.weight.operand


def test_processes_share_codes(kernels):
    layer = nn.Linear(70, 40)
    layer.weight = nn.Parameter(weight(), requires_grad=False)
    x = torch.randn(2, 70)
    wanted = layer(x)
    layer.share_memory()
    assert layer.weight.is_shared() and layer.weight.packed.is_shared() and torch.equal(layer(x), wanted)


def test_rows_that_are_picked_become_floats_alone(monkeypatch):
    for form in ({"bits": 4, "axis": 1}, {"bits": 4, "axis": 0}, {"bits": 8, "axis": None}, {"bits": 2, "size": 16}):
        shape = (5, 16, 32) if not form.get("size") and form["axis"] != 0 else (5, 64)
        w, ids = weight(shape, **form), torch.tensor([[3, 1], [0, 3]])
        floats = w.dequantize()
        with monkeypatch.context() as patch:
            patch.setattr(QuantizedTensor, "dequantize", None)
            found = w[3], w[ids], w[ids[0], ...], w.index_select(0, ids[0]), w.select(0, -1)
        wanted = floats[3], floats[ids], floats[ids[0]], floats.index_select(0, ids[0]), floats[-1]
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_sample_with_nan_spoils_itself_alone_and_large_values_stay_finite(kernels, operand, bits):
    w, x = weight(bits=bits, operand=operand), torch.randn(4, 70)
    clean = F.linear(x, w)
    x[1, 3] = torch.nan
    got = F.linear(x, w)
    assert got[1].isnan().all() and got[[0, 2, 3]].isfinite().all()
    if operand is None or operand.per_token or operand.levels is not None:
        assert near(got[[0, 2, 3]], clean[[0, 2, 3]], 8)
    x[1], x[0, 0], x[0, 1] = 1e30, 3e38, -3e38
    if operand is not None:
        assert F.linear(x, w / 1).isfinite().logical_not().any() or F.linear(x * 1e-3, w).isfinite().all()
    if operand is not None and operand.levels is not None:
        assert F.linear(x, w).isfinite().all()
