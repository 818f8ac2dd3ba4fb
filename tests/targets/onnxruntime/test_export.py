"""ONNX files of float and lowered graphs: what onnxruntime computes from them, and what they hold."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_ir as ir  # noqa: E402

import graphcomp as gc  # noqa: E402
import graphcomp.targets.onnxruntime.export as onnx_module  # noqa: E402
from graphcomp.capture.capture import capture  # noqa: E402
from graphcomp.errors import ExportError  # noqa: E402
from graphcomp.ir.graph import fetch  # noqa: E402
from graphcomp.ir.module import CapturedModule  # noqa: E402
from graphcomp.quantization.ops import pack  # noqa: E402
from graphcomp.quantization.ptq import PostTraining, quantize  # noqa: E402
from graphcomp.quantization.spec import QuantConfig, QuantSpec  # noqa: E402
from graphcomp.targets.onnxruntime.export import export_onnx  # noqa: E402
from graphcomp.targets.onnxruntime.kernels import prove  # noqa: E402
from graphcomp.targets.runtime import compare, run  # noqa: E402
from tests.marks import in_ci, slow  # noqa: E402
from tests.targets.lowered import Quantization, lower  # noqa: E402
from tests.targets.models import Attention, Residual  # noqa: E402

aten = torch.ops.aten


class Layers(nn.Module):
    """(n, 3, 8, 8) -> (n, 5): pooled, grouped, depthwise, residual, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped, self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=4), nn.Conv2d(16, 16, 3, groups=16)
        self.back, self.head = nn.Conv2d(16, 8, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        y = F.pad(F.relu(self.depthwise(F.relu(self.grouped(x)))), [1, 1, 1, 1])
        return self.head(torch.cat([x, x + self.back(y)], 1).mean((2, 3)))


def mlp(width: int = 24) -> nn.Module:
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 5)).eval()


def initializers(path: Path) -> dict[str, ir.Value]:
    return dict(ir.load(path).graph.initializers)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in ir.load(path).graph.all_nodes()]


# ------------------------------------------------------------------------------------------------ round trips
@pytest.mark.parametrize(
    "codes",
    [
        (2, False),
        (4, True),
        (8, False),
        *in_ci((3, False), (5, False), (6, True), (7, False)),
        *slow((2, True), (4, False), (8, True)),
    ],
)
@pytest.mark.slow
@pytest.mark.ci
def test_a_convnet_at_every_width(tmp_path: Path, codes: tuple[int, bool]) -> None:
    bits, signed = codes
    x, path = torch.randn(2, 3, 8, 8), tmp_path / "m.onnx"
    module = lower(Layers().eval(), x, Quantization(bits, bits, signed=signed))
    export_onnx(module, (x,), None, path)
    found = compare(path, module, (torch.randn(5, 3, 8, 8) * 3,))
    assert found.within_a_step, found


@pytest.mark.parametrize(
    ("shape", "bits"),
    [
        *itertools.product([(12,), (3, 12)], [(8, 8), (4, None)]),
        *itertools.product([(12,)], [(3, 5), (8, 12), (12, 8)]),
        *(pytest.param((3, 12), bits, marks=pytest.mark.slow) for bits in [(3, 5), (8, 12), (12, 8)]),
    ],
)
@pytest.mark.slow
@pytest.mark.ci
def test_linear_layers_on_two_and_three_dims(tmp_path: Path, shape: tuple[int, ...], bits: tuple[int, int]) -> None:
    x, path = torch.randn(2, *shape), tmp_path / "m.onnx"
    module = lower(mlp(), x, Quantization(*bits))
    export_onnx(module, (x,), None, path)
    # far outside the range that was seen: the codes must be clipped where the graph clips them
    found = compare(path, module, (torch.randn(7, *shape) * 5,))
    assert found.within_a_step, found


@pytest.mark.slow
@pytest.mark.ci
def test_one_scale_per_tensor(tmp_path: Path) -> None:
    x, path = torch.randn(2, 3, 8, 8), tmp_path / "m.onnx"
    module = lower(Layers().eval(), x, Quantization(4, 6, per_channel=False))
    export_onnx(module, (x,), None, path)
    assert compare(path, module, (torch.randn(3, 3, 8, 8),)).within_a_step


@pytest.mark.slow
@pytest.mark.ci
def test_a_float_model_without_capture(tmp_path: Path) -> None:
    model, path = Residual(), tmp_path / "m.onnx"
    model(torch.randn(4, 3, 8, 8))  # statistics of its own
    export_onnx(model, (torch.randn(1, 3, 8, 8),), None, path, input_names=["image"], output_names=["classes"])
    assert model.training
    assert compare(path, model, (torch.randn(6, 3, 8, 8),)).within_a_step
    graph = ir.load(path).graph
    assert ([v.name for v in graph.inputs], [v.name for v in graph.outputs]) == (["image"], ["classes"])


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("result", "names"),
    [
        (lambda a, b: a, ["output"]),
        (lambda a, b: (a, b), ["output_0", "output_1"]),
        (lambda a, b: {"logits": a, "hidden": (b, a + b)}, ["logits", "hidden.0", "hidden.1"]),
        (lambda a, b: {"x": a}, ["output_x"]),
    ],
)
def test_outputs_are_named_by_what_the_model_returns(tmp_path: Path, result: Any, names: list[str]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return result(self.a(x), self.b(x))

    path, x = tmp_path / "m.onnx", torch.randn(2, 4)
    gc.compress(Two().eval(), x, sparsity=0, bits=8, progress=False).export(path)
    graph = ir.load(path).graph
    assert ([v.name for v in graph.inputs], [v.name for v in graph.outputs]) == (["x"], names)


@pytest.mark.slow
@pytest.mark.ci
def test_an_input_that_is_returned_keeps_its_name(tmp_path: Path) -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"double": 2 * x, "x": x}

    path, x = tmp_path / "m.onnx", torch.randn(2, 4)
    export_onnx(Both(), (x,), None, path)
    double, same = run(path, (x,))
    assert torch.equal(double, 2 * x) and torch.equal(same, x)


@pytest.mark.slow
@pytest.mark.ci
def test_attention(tmp_path: Path) -> None:
    x, path = torch.randn(2, 5, 16), tmp_path / "m.onnx"
    module = lower(Attention().eval(), x, Quantization(8, 8))
    export_onnx(module, (x,), None, path)
    assert compare(path, module, (torch.randn(4, 5, 16),)).within_a_step


# ------------------------------------------------------------------------------------------------ what the file holds
def test_weights_and_biases_are_integers_and_not_behind_a_transpose(tmp_path: Path) -> None:
    x, path = torch.randn(2, 3, 12), tmp_path / "m.onnx"
    export_onnx(lower(mlp(), x, Quantization(8, 8)), (x,), None, path)
    kinds = {name: v.dtype for name, v in initializers(path).items() if "weight" in name or "bias" in name}
    assert sorted(kinds.values()) == [ir.DataType.INT8] * 2 + [ir.DataType.INT32] * 2
    assert "Transpose" not in operators(path)


@pytest.mark.slow
@pytest.mark.ci
def test_four_bits_are_stored_in_four_bits(tmp_path: Path) -> None:
    x = torch.randn(2, 12)
    sizes = []
    for bits in (8, 4):
        path = tmp_path / f"{bits}.onnx"
        export_onnx(lower(mlp(2048), x, Quantization(bits, 8)), (x,), None, path)
        sizes.append(path.stat().st_size)
    weights = 2048 * (12 + 5)
    assert {v.dtype for n, v in initializers(path).items() if "int4" in n and "zero" not in n} == {ir.DataType.INT4}
    assert sizes[0] - sizes[1] == pytest.approx(weights / 2, rel=0.05)


@pytest.mark.slow
@pytest.mark.ci
def test_two_bits_are_stored_in_two_bits(tmp_path: Path) -> None:
    x = torch.randn(2, 12)
    module = lower(mlp(2048), x, Quantization(2, 8))
    paths = {opset: tmp_path / f"{opset}.onnx" for opset in (21, None)}
    for opset, path in paths.items():
        export_onnx(module, (x,), None, path, opset=opset)
        assert compare(path, module, (torch.randn(5, 12) * 3,)).within_a_step
    kinds = {opset: {v.dtype for v in initializers(path).values()} for opset, path in paths.items()}
    assert ir.DataType.INT2 in kinds[None] and ir.DataType.INT4 not in kinds[None]
    assert ir.DataType.INT2 not in kinds[21] and ir.DataType.INT4 in kinds[21]
    assert [ir.load(path).opset_imports[""] for path in paths.values()] == [21, 25]
    sizes = [path.stat().st_size for path in paths.values()]
    assert sizes[0] - sizes[1] == pytest.approx(2048 * (12 + 5) / 4, rel=0.05)
    assert prove(paths[21]).integer == prove(paths[None]).integer


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.slow
@pytest.mark.ci
def test_two_bits_in_blocks(tmp_path: Path, symmetric: bool) -> None:
    """Zero points of two bits, too; a table that is looked up stays bytes."""
    spec = QuantSpec(2, symmetric, "group", 16)
    ids, path = torch.arange(9)[None], tmp_path / "m.onnx"
    model = nn.Sequential(nn.Embedding(9, 32), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    config = QuantConfig(spec, None, embeddings=QuantSpec(2, granularity="channel"), first_and_last_bits=2)
    captured = capture(model, ids)
    module = quantize(captured, [(ids,)], PostTraining(config)).lowered.module
    export_onnx(module, (ids,), None, path)
    two = {ir.DataType.INT2 if symmetric else ir.DataType.UINT2}
    held = {v.dtype for n, v in initializers(path).items() if "weight" in n and len(v.shape) == 2}
    assert held - {ir.DataType.UINT8, ir.DataType.FLOAT} == two
    assert compare(path, module, (torch.arange(9)[None].flip(1),)).error < 1e-5


def test_two_bits_where_the_runtime_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, path = torch.randn(2, 12), tmp_path / "m.onnx"
    onnx_module._runs_two_bits.cache_clear()
    monkeypatch.setattr(onnx_module, "OPSET_OF_TWO_BITS", 99)
    export_onnx(lower(mlp(), x, Quantization(2, 8)), (x,), None, path)
    onnx_module._runs_two_bits.cache_clear()
    assert ir.load(path).opset_imports[""] == 21


@pytest.mark.slow
@pytest.mark.ci
def test_no_trace_of_the_machine(tmp_path: Path) -> None:
    x, path = torch.randn(2, 12), tmp_path / "m.onnx"
    export_onnx(lower(mlp(), x), (x,), None, path)
    assert b".py" not in path.read_bytes()


# ------------------------------------------------------------------------------------------------ groups
@pytest.mark.parametrize("shape", [(12,), (3, 12)])
@pytest.mark.parametrize("bits", [(4, None), (8, None), (4, 8)])
@pytest.mark.slow
@pytest.mark.ci
def test_equal_groups_are_blocks(tmp_path: Path, shape: tuple[int, ...], bits: tuple[int, int | None]) -> None:
    x, path = torch.randn(2, *shape), tmp_path / "m.onnx"
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)).eval()
    module = lower(model, x, Quantization(*bits, groups=torch.arange(12) // 4))
    export_onnx(module, (x,), None, path)
    blocks = [n.attributes["block_size"].as_int() for n in ir.load(path).graph if n.op_type == "DequantizeLinear"]
    assert blocks.count(4) == (2 if bits[1] is None else 0)  # onnxruntime fails on blocks behind quantized activations
    assert compare(path, module, (torch.randn(5, *shape),)).within_a_step


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.slow
@pytest.mark.ci
def test_unequal_groups(tmp_path: Path, activation_bits: int | None) -> None:
    x, path = torch.randn(2, 12), tmp_path / "m.onnx"
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)).eval()
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 0])
    module = lower(model, x, Quantization(4, activation_bits, groups=groups))
    export_onnx(module, (x,), None, path)
    # not by a hair: onnxruntime must not quantize the weight a second time
    found = compare(path, module, (torch.randn(5, 12),), exact=False)
    assert found.error < 1e-5
    assert ir.DataType.INT4 in {v.dtype for v in initializers(path).values()}


class Product(nn.Module):
    """A linear layer, and a product of its result with a parameter."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.p, self.product = nn.Linear(8, 8), nn.Parameter(torch.randn(shape)), product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.first(x), self.p)


PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "bmm": (lambda x, p: torch.bmm(x.expand(4, -1, -1), p), (4, 8, 6), (3, 8)),
    "matmul": (lambda x, p: x @ p, (4, 8, 6), (3, 8)),
    "baddbmm": (lambda x, p: torch.baddbmm(p[:, :1], x.expand(4, -1, -1), p), (4, 8, 8), (3, 8)),
    "vector": (lambda x, p: x @ p, (8,), (3, 8)),
    "vector on the left": (lambda x, p: p @ x, (3,), (3, 8)),
    "constant on the left": (lambda x, p: p @ x, (5, 3), (3, 8)),
    "stack on the left": (lambda x, p: torch.bmm(p, x), (2, 5, 3), (2, 3, 8)),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(
    "options", [{"bits": 8}, {"bits": 4, "activation_bits": 8, "group_size": 4}], ids=["8", "groups"]
)
@pytest.mark.slow
@pytest.mark.ci
def test_products_with_parameters_of_any_rank(tmp_path: Path, name: str, options: dict[str, int]) -> None:
    """onnxruntime would make integer products of all of them, and fail to run those."""
    product, shape, size = PRODUCTS[name]
    model, x = Product(product, shape).eval(), torch.randn(size)
    small = gc.compress(model, x, sparsity=0, calibration=[torch.randn(size) for _ in range(4)], **options)
    small.export(tmp_path / "m.onnx")
    found = small.export_report
    assert found is not None and found.agreement.error < 1e-4 and found.kernels is not None
    assert {layer for layer, _ in found.kernels.stayed_float} <= {
        "p_codes", "p_codes_int4", "p_rounded_codes", "p_rounded_codes_int4", "first.weight_codes",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ embeddings
class Tied(nn.Module):
    """(n, s) ids -> (n, s, 9): a table that is also the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.table(ids)), self.table.weight)


def lower_embedding(model: nn.Module, ids: Tensor, bits: int) -> CapturedModule:
    """The table as codes that are looked up, then scaled; the last layer dequantizes the same codes."""
    module = capture(model, ids).module
    assert isinstance(module, CapturedModule)
    graph = module.graph
    (table,) = graph.find_nodes(op="get_attr")
    value = fetch(module, str(table.target)).detach()
    top = 2 ** (bits - 1) - 1
    scales = value.abs().amax(1) / top
    codes = (value / scales[:, None]).round().to(torch.int8)
    module.register_buffer("codes", pack(codes, 4) if bits == 4 else codes)
    module.register_buffer("scales", scales)
    module.register_buffer("column", scales[:, None].clone())
    module.register_buffer("zeros", torch.zeros(9, dtype=torch.int32))
    with graph.inserting_before(table):
        held: fx.Node = graph.get_attr("codes")
        if bits == 4:
            held = graph.call_function(torch.ops.graphcomp.unpack.default, (held, [9, 6], 4, True))
        rest = graph.get_attr("scales"), graph.get_attr("zeros")
        weight = graph.call_function(
            torch.ops.quantized_decomposed.dequantize_per_channel.default, (held, *rest, 0, -top, top, torch.int8)
        )
        column = graph.get_attr("column")
    for node in graph.find_nodes(op="call_function", target=aten.embedding.default):
        with graph.inserting_after(node):
            row = graph.call_function(aten.embedding.default, (held, node.args[1]))
        with graph.inserting_after(row):
            wide = graph.call_function(aten.to.dtype, (row, torch.float32))
        with graph.inserting_after(wide):
            scale = graph.call_function(aten.embedding.default, (column, node.args[1]))
        with graph.inserting_after(scale):
            product = graph.call_function(aten.mul.Tensor, (wide, scale))
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    table.replace_all_uses_with(weight)
    graph.eliminate_dead_code()
    module.recompile()
    return module


@pytest.mark.parametrize("bits", [8, 4])
def test_a_tied_table_is_stored_once_and_looked_up_as_integers(tmp_path: Path, bits: int) -> None:
    ids, path = torch.randint(9, (2, 3)), tmp_path / "m.onnx"
    module = lower_embedding(Tied(), ids, bits)
    export_onnx(module, (ids,), None, path)
    assert compare(path, module, (torch.randint(9, (4, 5)),)).within_a_step
    tables = [
        v for v in initializers(path).values() if v.dtype in (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4)
    ]
    assert sum(v.const_value.nbytes for v in tables if len(v.shape) == 2) == 9 * 6 * bits // 8
    gathers = [n for n in ir.load(path).graph if n.op_type == "Gather"]
    assert any(n.inputs[0] in tables or n.inputs[0].dtype in (ir.DataType.INT8, ir.DataType.UINT8) for n in gathers)
    assert all(n.inputs[0].is_initializer() for n in gathers)


# ------------------------------------------------------------------------------------------------ refusals
def test_an_old_opset(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="opset 18 is too old"):
        export_onnx(mlp(), (torch.randn(2, 12),), None, tmp_path / "m.onnx", opset=18)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnx_ir"])
def test_the_extra_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ExportError, match=r"pip install 'graphcomp\[onnx\]'"):
        export_onnx(mlp(), (torch.randn(2, 12),), None, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"):
        export_onnx(mlp(), (torch.randn(2, 12),), None, tmp_path / "file" / "m.onnx")


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def refuse(_path: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match="disk full"):
        export_onnx(mlp(), (torch.randn(2, 12),), None, path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"] and path.read_bytes() == b"old"


def test_an_op_without_an_onnx_form(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x).real

    with pytest.raises(ExportError, match="Odd cannot be written as ONNX"):
        export_onnx(Odd(), (torch.randn(2, 3, 3),), None, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.ci
def test_large_weights_go_to_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_module, "EXTERNAL_ABOVE", 100)
    x, path = torch.randn(2, 12), tmp_path / "m.onnx"
    module = lower(mlp(512), x, Quantization(4, 8))
    export_onnx(module, (x,), None, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert torch.allclose(run(path, (x,))[0], module(x), atol=1e-6)


class Padded(nn.Module):
    """Padding of one side in front of convolutions; one of them is read by others too, one pads with ones."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        x = F.relu6(self.a(F.pad(x, (0, 1, 0, 1))))
        x = F.relu6(self.b(F.pad(x, (1, 0, 2, 0))))
        shared = F.pad(x, (0, 2, 0, 2))
        y = F.relu6(self.c(shared)) + shared[..., 1:-1, 1:-1]
        return self.d(F.pad(y, (1, 1, 1, 1), value=1.0))


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.slow
@pytest.mark.ci
def test_zero_padding_becomes_the_convolutions_own(tmp_path, bits):
    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(2, 3, 16, 16)
    small = gc.compress(model, x, sparsity=0.0, bits=bits).module if bits else model
    path = tmp_path / "padded.onnx"
    export_onnx(small, (x,), {}, path)
    found = onnx.load(path)
    assert sum(node.op_type == "Pad" for node in found.graph.node) == 2  # those that are read twice, or hold ones
    convolutions = [node for node in found.graph.node if node.op_type == "Conv"]
    pads = {tuple(a.ints) for node in convolutions for a in node.attribute if a.name == "pads"}
    assert {(0, 0, 1, 1), (3, 2, 1, 1)} <= pads
    expected, actual = small(x).detach(), run(path, (x,))[0]
    assert float((actual - expected).abs().max() / expected.abs().max()) < (0.02 if bits else 1e-5)
