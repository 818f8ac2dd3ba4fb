"""Ranges at run time: quantizer, ops, placement, lowering, raising, and `compress(activations=…)`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.quantization import dynamic
from graphcomp.quantization.dynamic import HIGHEST, levels, matmul_dynamic, quantize_dynamic
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.integers import check_integers
from graphcomp.quantization.lower import lower
from graphcomp.quantization.quantizers.dynamic import DynamicQuantizer
from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.spec import DYNAMIC, PER_TOKEN, QuantConfig, QuantSpec
from graphcomp.quantization.verify import check_lowering
from tests.quantization.cases import check_integers as check_codes
from tests.quantization.cases import pattern

WORDS = ["dynamic", "dynamic_per_token"]
SPECS = {"dynamic": DYNAMIC, "dynamic_per_token": PER_TOKEN}


class Block(nn.Module):
    """(n, t, 8) -> (n, t, 5): layers that share an input, a matrix on the right, an addmm, and attention in one op."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.matrix, self.offset = nn.Parameter(torch.randn(8, 12) / 3), nn.Parameter(torch.randn(12))
        self.last = nn.Parameter(torch.randn(12, 5) / 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        y = torch.addmm(self.offset, y.reshape(-1, 8), self.matrix).view(*x.shape[:-1], 12)
        return F.gelu(y) @ self.last


class Convnet(nn.Module):
    """(n, 3, 6, 6) -> (n, 4)"""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


X = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1))


def block() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


def compress(word: str = "dynamic", model: nn.Module | None = None, x: Any = X, **options: Any) -> gc.CompressedModel:
    options = {"sparsity": 0.0, "bits": 8, **options}
    return gc.compress(model or block(), x, activations=word, progress=False, **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ levels
@pytest.mark.parametrize("spec", SPECS.values(), ids=WORDS)
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_integers_stand_for_what_the_quantizer_returns(spec: QuantSpec, shift: float) -> None:
    quantizer = make_quantizer(spec)
    assert isinstance(quantizer, DynamicQuantizer)
    x = X + shift
    integers = check_codes(quantizer, x)
    half = integers.scale / 2 * (1 + 1e-5)
    assert bool(((quantizer(x) - x).abs() <= half).all())
    assert int(integers.values.max()) == HIGHEST or int(integers.values.min()) == integers.quant_min


def test_the_range_includes_zero_and_reaches_both_ends() -> None:
    scale, zero = levels(torch.tensor([[1.0, 3.0], [-0.5, 2.0]]), per_token=False)
    assert (float(scale), float(zero)) == (pytest.approx(3.5 / 255), 36.0)  # 0.5 / 3.5 * 255 = 36.4
    scale, zero = levels(torch.tensor([[1.0, 3.0], [-0.5, 0.25]]), per_token=True)
    assert torch.allclose(scale, torch.tensor([[3.0], [0.5]]) / 127) and float(zero) == 128


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("x", [torch.zeros(2, 3), torch.zeros(0, 3), torch.full((2, 3), 1e-42)])
def test_degenerate_values_have_finite_levels(x: Tensor, per_token: bool) -> None:
    codes, scale, zero = quantize_dynamic(x, per_token)
    back = (codes.float() - zero) * scale
    assert back.shape == x.shape and bool(back.isfinite().all()) and bool((scale > 0).all())
    assert torch.equal(back, torch.zeros_like(x)) or torch.allclose(back, x, atol=1e-38)


@pytest.mark.parametrize("per_token", [False, True])
def test_codes_of_the_op_are_those_of_the_quantizer(per_token: bool) -> None:
    codes, scale, zero = quantize_dynamic(X, per_token)
    quantizer = make_quantizer(PER_TOKEN if per_token else DYNAMIC)
    assert torch.equal(codes, quantizer.to_integers(X).values)
    assert torch.equal(pattern((codes.float() - zero) * scale), pattern(quantizer(X)))


def test_gradients_go_straight_through_and_the_quantizer_can_be_switched_off() -> None:
    quantizer = make_quantizer(DYNAMIC)
    x = X.clone().requires_grad_()
    quantizer(x).sum().backward()
    ends = (X.min() == X) | (X.max() == X)  # the zero point is rounded, so that one end may saturate
    assert bool((x.grad[~ends] == 1).all()) and float(x.grad.sum()) >= x.numel() - 1
    before = quantizer(X)
    quantizer.set_range(torch.tensor(-1e-3), torch.tensor(1e-3))
    assert torch.equal(quantizer(X), before)
    quantizer.enabled = False
    assert quantizer(X) is X


# ------------------------------------------------------------------------------------------------ products
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_of_integers_is_the_product_of_what_the_integers_stand_for(
    per_token: bool, turned: bool, bias: bool
) -> None:
    weight = torch.randint(-127, 128, (8, 5), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    scale, added = torch.rand(5) + 0.1, torch.randn(5) if bias else None
    codes, own, zero = quantize_dynamic(X + 2, per_token)
    floats = (codes.double() - zero) * own.double() @ (weight.double() * scale.double())
    matrix = weight.t().contiguous() if turned else weight
    found = matmul_dynamic(codes, own, zero, matrix, scale, added, turned, per_token)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), floats + (0 if added is None else added), rtol=1e-6, atol=1e-4)


def test_sums_are_exact_on_every_device_s_way() -> None:
    rows = torch.randint(0, 256, (4, 300), dtype=torch.uint8)
    matrix = torch.randint(-127, 128, (300, 6), dtype=torch.int8)
    zero = torch.tensor(201, dtype=torch.uint8)
    wanted = (rows.to(torch.int64) - 201) @ matrix.to(torch.int64)
    assert torch.equal(dynamic.integer_products(rows, zero, matrix).to(torch.int64), wanted)


@pytest.mark.parametrize("per_token", [False, True])
def test_ops_know_the_shapes_of_their_results(per_token: bool) -> None:
    torch.library.opcheck(quantize_dynamic, (X, per_token), test_utils=("test_schema", "test_faketensor"))
    parts = quantize_dynamic(X, per_token)
    arguments = (*parts, torch.ones(8, 5, dtype=torch.int8), torch.ones(5), torch.ones(5), False, per_token)
    torch.library.opcheck(matmul_dynamic, arguments, test_utils=("test_schema", "test_faketensor"))


# ------------------------------------------------------------------------------------------------ the law
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.slow
@pytest.mark.ci
def test_integers_compute_what_the_fake_quant_graph_computes(word: str, sparsity: float) -> None:
    small = compress(word, sparsity=sparsity)
    assert small.report.verified["integers == fake-quant, in steps"] == 0.0
    made = small.quantized
    assert made is not None
    for x in (X, X[:1], 4 * X[:2] + 1):
        found = check_lowering(made.fake, made.lowered, (x,))
        assert (found.weights, found.steps) == (0.0, 0.0) and found.output < 1e-6
        exact = check_integers(made.lowered.module, (x,))
        assert exact.steps == 0 and exact.output < 1e-6
        assert len(exact.in_integers) == 5 and not exact.in_floats
    assert sorted(layer.activation_bits for layer in made.lowered.layers) == [8] * 5


@pytest.mark.parametrize("word", WORDS)
def test_lowering_what_was_raised_gives_the_same_integers(word: str) -> None:
    small = compress(word)
    again = lower(small.quantized.fake).module
    assert torch.equal(again(X), small(X))


def test_a_step_off_is_found() -> None:
    made = compress().quantized
    module = copy.deepcopy(made.lowered.module)
    for node in module.graph.nodes:
        if node.target is quantize_dynamic:
            with module.graph.inserting_before(node):
                moved = module.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[0], 0.9))
            node.args = (moved, node.args[1])
            break
    module.recompile()
    wrong = type(made.lowered)(module, made.lowered.activations, made.lowered.weights, made.lowered.layers)
    with pytest.raises(gc.VerificationError, match="steps off"):
        check_lowering(made.fake, wrong, (X,))


# ------------------------------------------------------------------------------------------------ placement
def quantizers(config: QuantConfig, model: nn.Module, x: Tensor) -> dict[str, QuantSpec]:
    small = gc.compress(model, x, sparsity=0.0, quantization=gc.PostTraining(config), progress=False)
    made = small.quantized
    return {} if made is None else {str(node.target): q.spec for node, q in quantizer_nodes(made.fake)}


def test_layers_that_read_one_value_share_its_codes() -> None:
    graph = compress().module.graph
    assert len(graph.find_nodes(op="call_function", target=quantize_dynamic)) == 3
    assert len(graph.find_nodes(op="call_function", target=matmul_dynamic)) == 5


def test_convolutions_read_floats_and_are_named() -> None:
    small = compress(model=Convnet().eval(), x=torch.randn(2, 3, 6, 6))
    layers = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in small.report.layers}
    assert layers == {"conv": (8, 32), "head": (8, 8)}
    assert any(note.startswith("conv: weights alone are quantized, as an integer conv") for note in small.report.notes)


def test_a_layer_of_its_own_spec_is_static_among_layers_with_ranges_at_run_time() -> None:
    static = QuantSpec(8, symmetric=False)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    config = QuantConfig(activations=DYNAMIC, overrides={"2": (QuantSpec(8, granularity="channel"), static)})
    found = quantizers(config, model, X[0])
    assert sorted(spec.dynamic for spec in found.values()) == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        (QuantSpec(8, granularity="group", group_size=4), "one step per group"),
        (QuantSpec(8, symmetric=False), "need symmetric weights"),
        (QuantSpec(kind="ternary", symmetric=False), "need symmetric weights"),
        (None, "its weight is float"),
    ],
)
def test_weights_that_no_kernel_multiplies_leave_the_layer_on_floats(weights: QuantSpec | None, why: str) -> None:
    config = QuantConfig(weights, DYNAMIC, first_and_last_bits=2)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    small = gc.compress(model, X, sparsity=0.0, quantization=gc.PostTraining(config), progress=False)
    assert any(why in note for note in small.report.notes), small.report.notes
    assert all(layer.activation_bits == 32 for layer in small.report.layers)


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.slow
@pytest.mark.ci
def test_weights_of_few_bits_are_multiplied_as_bytes(bits: int) -> None:
    config = QuantConfig(QuantSpec(bits, granularity="channel"), DYNAMIC, first_and_last_bits=2)
    small = gc.compress(block(), X, sparsity=0.0, quantization=gc.PostTraining(config), progress=False)
    made = small.quantized
    assert check_lowering(made.fake, made.lowered, (X,)).output < 1e-6
    assert check_integers(made.lowered.module, (X,)).output < 1e-6


def test_half_floats_are_refused() -> None:
    with pytest.raises(gc.PlanError, match="bfloat16 cannot be stored"):
        compress(model=nn.Sequential(nn.Linear(8, 4)).to(torch.bfloat16).eval(), x=X.to(torch.bfloat16))


# ------------------------------------------------------------------------------------------------ compress
@pytest.mark.parametrize("word", WORDS)
def test_no_data_are_needed_and_no_note_says_that_ranges_were_read_off_data(word: str) -> None:
    small = compress(word)
    assert not any("calibrated" in note for note in small.report.notes)
    other = compress(word, x=100 * X)
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), other.state_dict().values(), strict=True))
    assert torch.allclose(small(X), block()(X), atol=0.1)


def test_only_ranges_per_token_leave_a_sample_as_it_is_whatever_is_beside_it() -> None:
    beside = torch.cat([X[:1], 50 * X[1:]])
    for word, same in (("dynamic", False), ("dynamic_per_token", True)):
        small = compress(word)
        assert torch.allclose(small(beside)[0], small(X[:1])[0], atol=1e-6) is same


@pytest.mark.parametrize("word", WORDS)
def test_a_folder_brings_the_same_model_back(word: str, tmp_path: Path) -> None:
    small = compress(word, sparsity=0.5)
    small.save(tmp_path / "small")
    back = gc.load(tmp_path / "small")
    assert torch.equal(back(X), small(X)) and torch.equal(back(X[:1]), small(X[:1]))
    assert torch.equal(back.quantized.fake(X), small.quantized.fake(X))


def test_calibration_data_correct_biases() -> None:
    plain, corrected = compress(), compress(calibration=[X, X + 1])
    assert not torch.equal(plain(X), corrected(X))


def test_a_budget_of_bytes_is_kept() -> None:
    small = compress(sparsity=None, budget=gc.Budget(bytes=0.5))
    assert small.report.bytes.after <= 0.5 * small.report.bytes.before
    assert sum(t.numel() * t.element_size() for t in small.state_dict().values()) <= small.report.bytes.after


def test_torch_export_takes_the_result_and_other_batches(tmp_path: Path) -> None:
    small = compress()
    small.export(tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    for x in (X, X[:1]):
        assert torch.allclose(program(x), small(x), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": None}, "activations, group_size, rounding and reduce_range need bits"),
        ({"activation_bits": 4}, "activation_bits=4"),
        ({"activation_bits": None}, "activation_bits=None"),
        ({"bits": 16}, "bits=16"),
        ({"bits": None, "quantization": gc.PostTraining()}, "activations beside quantization="),
        ({"word": "sometimes"}, "activations must be"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gc.PlanError, match=message) as caught:
        compress(**options)
    assert caught.value.fix


@pytest.mark.parametrize(
    "given",
    [
        {"bits": 4, "dynamic": True},
        {"dynamic": True},
        {"symmetric": False, "dynamic": True, "granularity": "channel"},
        {"granularity": "token"},
        {"granularity": "token", "symmetric": False, "dynamic": True},
        {"symmetric": False, "dynamic": True, "observer": "mse"},
        {"dynamic": 1, "symmetric": False},
    ],
)
def test_specs_that_no_kernel_has_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(gc.PlanError) as caught:
        QuantSpec(**given)
    assert caught.value.fix


def test_constants_have_no_ranges_at_run_time() -> None:
    for given in ({"weights": DYNAMIC}, {"embeddings": DYNAMIC}, {"overrides": {"a": (DYNAMIC, None)}}):
        with pytest.raises(gc.PlanError, match="cannot have ranges at run time"):
            QuantConfig(**given)  # type: ignore[arg-type]


def test_training_from_ranges_at_run_time_is_refused() -> None:
    with pytest.raises(gc.PlanError, match="cannot be trained"):
        gc.prepare(block(), X, quantization=gc.PostTraining(QuantConfig(activations=DYNAMIC)))


# ------------------------------------------------------------------------------------------------ not finite, and large
@pytest.mark.parametrize("per_token", [False, True])
def test_a_row_that_is_not_finite_spoils_itself_alone(per_token: bool) -> None:
    weight, scale = torch.randint(-127, 128, (5, 8), dtype=torch.int8), torch.rand(5) + 0.1
    x = torch.randn(3, 4, 8)
    clean = x.clone()
    x[1, 2, 3], x[2, 0, 0] = torch.nan, torch.inf
    clean[1, 2], clean[2, 0] = 0, 0
    found, wanted = (
        matmul_dynamic(*quantize_dynamic(t, per_token), weight, scale, None, True, per_token) for t in (x, clean)
    )
    spoilt = torch.zeros(3, 4, dtype=torch.bool)
    spoilt[1, 2] = spoilt[2, 0] = True
    assert not found[spoilt].isfinite().any() and torch.allclose(found[~spoilt], wanted[~spoilt], rtol=1e-5)


@pytest.mark.parametrize("per_token", [False, True])
def test_a_range_as_wide_as_float32_is_finite(per_token: bool) -> None:
    scale, zero = levels(torch.tensor([[3e38, -3e38, 1.0]]), per_token)
    assert bool(scale.isfinite().all()) and float(zero) in (127, 128)


@pytest.mark.parametrize("saturates", [False, True])
def test_sums_are_exact_where_the_kernel_saturates_too(saturates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if saturates:
        monkeypatch.setattr(dynamic, "kernel_saturates", lambda: True)
    rows, matrix = torch.full((3, 3000), -128, dtype=torch.int8), torch.full((3000, 5), 127, dtype=torch.int8)
    rows[1], matrix[:, 2] = 127, -127
    rows[2] = torch.randint(-128, 128, (3000,), dtype=torch.int8)
    assert torch.equal(dynamic.integer_sums(rows, matrix).long(), rows.long() @ matrix.long())
