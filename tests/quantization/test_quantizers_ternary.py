"""Ternary weights: levels by hand, exact gradients of scales, what is stored, and every form of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.coupling.axis import Reason, fresh, is_frozen, normal
from graphcomp.errors import PlanError
from graphcomp.ops import registry
from graphcomp.quantization.calibrate import calibrate_weight
from graphcomp.quantization.integers import IntegerInterpreter
from graphcomp.quantization.ptq import PostTraining, quantize
from graphcomp.quantization.quantizers.codebook import CodebookQuantizer
from graphcomp.quantization.quantizers.make import make_quantizer, quantizer_of
from graphcomp.quantization.quantizers.symmetric import SymmetricQuantizer
from graphcomp.quantization.quantizers.ternary import TernaryQuantizer
from graphcomp.quantization.spec import ACTIVATIONS, QuantConfig, QuantSpec, with_bits
from graphcomp.quantization.stored import Affine, Codebook
from graphcomp.targets.onnxruntime.export import _runs_two_bits
from tests.marks import in_ci
from tests.quantization.models import encoder, residual

from .cases import check_integers, gradients, pattern

ONE, TWO = QuantSpec(kind="ternary"), QuantSpec(kind="ternary", symmetric=False)
CHANNEL = QuantSpec(kind="ternary", granularity="channel")
TWO_CHANNEL = QuantSpec(kind="ternary", symmetric=False, granularity="channel")
ALL = {"one scale": ONE, "per channel": CHANNEL, "two scales": TWO, "two scales, per channel": TWO_CHANNEL}


def fitted(spec: QuantSpec, weight: Tensor, **options: Any) -> TernaryQuantizer:
    quantizer = TernaryQuantizer(spec, weight.shape, 0, **options).to(weight.dtype)
    calibrate_weight(quantizer, weight)
    return quantizer


# ------------------------------------------------------------------------------------------------ levels
def test_one_scale_by_hand() -> None:
    """Mean magnitude 1: the threshold is 0.7, and the scale the mean of 2, 1.5 and 1."""
    weight = torch.tensor([-2.0, 0.5, 1.5, -0.2, 0.0, -1.0, 1.8, 1.0])
    quantizer = fitted(ONE, weight)
    torch.testing.assert_close(quantizer.threshold, torch.tensor(0.7))
    torch.testing.assert_close(quantizer.scale.detach(), torch.tensor((2 + 1.5 + 1 + 1.8 + 1) / 5))
    s = quantizer.scale.item()
    assert quantizer(weight).tolist() == [-s, 0, s, 0, 0, -s, s, s]
    stored = check_integers(quantizer, weight)
    assert isinstance(stored, Affine) and stored.values.tolist() == [-1, 0, 1, 0, 0, -1, 1, 1]
    assert quantizer.bits == 2


def test_two_scales_by_hand() -> None:
    """Mean magnitude 1: above the threshold 0.7 lie 1.5, 1.8 and 1, below -0.7 lie -2 and -1."""
    weight = torch.tensor([-2.0, 0.5, 1.5, -0.2, 0.0, -1.0, 1.8, 1.0])
    quantizer = fitted(TWO, weight)
    stored = check_integers(quantizer, weight)
    assert isinstance(stored, Codebook) and stored.values.tolist() == [0, 1, 2, 1, 1, 0, 2, 2]
    torch.testing.assert_close(stored.table, torch.tensor([-1.5, 0.0, 4.3 / 3]))
    assert stored.values.dtype is torch.uint8 and (stored.quant_min, stored.quant_max) == (0, 2)


def test_channels_of_zeros_and_of_one_sign() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, 3.0], [-4.0, -4.0]])
    quantizer = fitted(TWO_CHANNEL, weight)
    assert quantizer.scale_below is not None
    torch.testing.assert_close(quantizer.scale.detach(), torch.tensor([1.0, 3.0, 4.0]))  # 1 is below 0.7 of 2
    assert torch.equal(quantizer.scale.detach(), quantizer.scale_below.detach())
    assert quantizer(weight).tolist() == [[0, 0], [0, 3], [-4, -4]]


@pytest.mark.parametrize("name", ALL)
def test_levels_are_their_own(name: str) -> None:
    """Rounding what was rounded changes no bit, just after fitting."""
    weight = torch.randn(5, 40)
    quantizer = fitted(ALL[name], weight)
    once = quantizer(weight)
    assert torch.equal(pattern(quantizer(once)), pattern(once))


# ------------------------------------------------------------------------------------------------ gradients
@pytest.mark.parametrize("name", ALL)
def test_gradients_of_scales_are_exact(name: str) -> None:
    """Finite differences in float64: away from thresholds the function is linear in the scales."""
    torch.manual_seed(0)
    weight = torch.randn(3, 20, dtype=torch.float64)
    quantizer = fitted(ALL[name], weight, gradient_scale=False)
    upstream = torch.randn_like(weight)
    steps = list(quantizer.steps())
    assert len(steps) == (1 if ALL[name].symmetric else 2)
    found = gradients(quantizer(weight), upstream, *steps)
    h = 1e-6
    for step, gradient in zip(steps, found, strict=True):
        for k in range(step.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    step.view(-1)[k] += sign * h
                    ends.append((quantizer(weight) * upstream).sum())
                    step.view(-1)[k] -= sign * h
            torch.testing.assert_close(gradient.view(-1)[k], (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_of_a_weight_passes_straight_through(name: str) -> None:
    weight = torch.randn(3, 20, requires_grad=True)
    upstream = torch.randn(3, 20)
    (found,) = gradients(fitted(ALL[name], weight.detach())(weight), upstream, weight)
    assert torch.equal(found, upstream)


def test_gradients_of_scales_are_scaled_as_those_of_steps() -> None:
    weight = torch.randn(4, 25)
    own, plain = (fitted(ONE, weight, gradient_scale=scaled) for scaled in (True, False))
    (a,), (b,) = (gradients(q(weight), torch.ones(4, 25), q.scale) for q in (own, plain))
    torch.testing.assert_close(a, b / 10)  # 100 weights share the scale, and the highest code is 1


# ------------------------------------------------------------------------------------------------ specs
def test_bits_are_two() -> None:
    assert ONE.bits == 2 and QuantSpec().bits == 8 and type(QuantSpec().bits) is int
    assert (ONE.quant_min, ONE.quant_max) == (-1, 1)
    for wrong in ({"bits": 8}, {"bits": 4}, {"granularity": "group", "group_size": 4}, {"observer": "mse"}):
        with pytest.raises(PlanError, match="ternary weights must"):
            QuantSpec(kind="ternary", **wrong)
    assert with_bits(TWO_CHANNEL, 8) == QuantSpec(8, symmetric=False, granularity="channel")
    assert with_bits(ONE, 2) == ONE


def test_activations_and_tables_of_two_scales_are_refused() -> None:
    for config in (
        lambda: QuantConfig(activations=ONE),
        lambda: QuantConfig(overrides={"fc": (None, ONE)}),
        lambda: QuantConfig(embeddings=TWO),
    ):
        with pytest.raises(PlanError, match="fix"):
            config()


def test_an_embedding_named_with_two_scales_stays_float_and_is_named() -> None:
    model, ids = encoder()
    config = QuantConfig(overrides={"embed": (TWO, None)})
    small = gc.compress(model, ids, sparsity=0, quantization=PostTraining(config), progress=False)
    assert "embed stays float: ternary embeddings must be symmetric" in small.report.notes


def test_the_first_and_the_last_layer_are_uniform_by_default() -> None:
    model, x = residual()
    small = gc.compress(model, x, sparsity=0, quantization=PostTraining(QuantConfig(CHANNEL)), progress=False)
    bits = [layer.weight_bits for layer in small.report.layers]
    assert bits[0] == bits[-1] == 8 and set(bits[1:-1]) == {2}


def test_second_order_rounding_takes_one_scale() -> None:
    model, x = residual()
    small = gc.compress(
        model, x, sparsity=0, quantization=PostTraining(QuantConfig(CHANNEL), rounding="second_order"), progress=False
    )
    assert small.quantized is not None
    with pytest.raises(PlanError, match="evenly spaced"):
        gc.compress(
            model, x, sparsity=0, quantization=PostTraining(QuantConfig(TWO), rounding="second_order"), progress=False
        )


# ------------------------------------------------------------------------------------------------ tables of values
def codebook(dim: int | None) -> Codebook:
    torch.manual_seed(0)
    values = torch.randint(0, 4, (3, 2, 5), dtype=torch.uint8)
    shape = () if dim is None else (values.shape[dim],)
    return Codebook(values, torch.randn(*shape, 4).sort(-1).values, dim)


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_values_of_codes(dim: int | None) -> None:
    stored = codebook(dim)
    floats = stored.dequantize()
    for place in ((0, 0, 0), (2, 1, 4), (1, 0, 3)):
        table = stored.table if dim is None else stored.table[place[dim]]
        assert floats[place] == table[int(stored.values[place])]
    fake = torch.ops.graphcomp.look_up(stored.values, stored.table, dim)
    assert torch.equal(fake, floats)


@pytest.mark.parametrize("dim", [None, 0])
def test_a_table_times_a_factor_per_channel(dim: int | None) -> None:
    stored, factor = codebook(dim), torch.tensor([2.0, -0.5, 0.0])
    scaled = stored.times(factor, 0)
    torch.testing.assert_close(scaled.dequantize(), stored.dequantize() * factor.view(3, 1, 1))
    own = quantizer_of(scaled, scaled.spec)
    assert torch.equal(own.to_integers(scaled.dequantize()).values, scaled.values)


def test_codes_of_zero_are_counted() -> None:
    weight = torch.randn(4, 30)
    stored = fitted(TWO_CHANNEL, weight).to_integers(weight)
    codes = stored.counted()
    assert codes.kept == int((stored.dequantize() != 0).sum()) and codes.bits == 2 and codes.steps == 8


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_the_nearest_value_of_a_table(dim: int | None) -> None:
    stored = codebook(dim)
    quantizer = quantizer_of(stored, TWO)
    assert isinstance(quantizer, CodebookQuantizer) and quantizer.bits == 2
    assert torch.equal(check_integers(quantizer, stored.dequantize()).values, stored.values)
    x = torch.randn(3, 2, 5, requires_grad=True)
    found = check_integers(quantizer, x.detach())
    shape = [-1 if d == dim else 1 for d in range(3)]
    tables = stored.table if dim is None else stored.table.view(*shape, 4)
    nearest = (x.detach()[..., None] - tables).abs().argmin(-1)
    assert torch.equal(found.values.long(), nearest)
    upstream = torch.randn(3, 2, 5)
    to_x, to_table = gradients(quantizer(x), upstream, x, quantizer.table)
    assert torch.equal(to_x, upstream)
    torch.testing.assert_close(to_table.sum(), upstream.sum())
    torch.testing.assert_close(to_table.reshape(-1, 4).sum(0)[1], upstream[nearest == 1].sum())
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(2.0))
    torch.testing.assert_close(quantizer.table.detach(), torch.tensor([-1.0, 0, 1, 2]).expand_as(quantizer.table))
    quantizer.enabled = False
    assert quantizer(x) is x


def test_tables_go_with_their_channel_and_values_with_nothing() -> None:
    quantizer = quantizer_of(codebook(0), TWO)
    x, table = tuple(fresh(n) for n in (3, 2, 5)), (fresh(3), fresh(4))
    quantizer.couple_axes(x, {"table": table}, Reason("test"))
    assert normal(table[0]) is normal(x[0]) and is_frozen(table[1]) and not is_frozen(x[0])


def test_the_rule_of_a_lookup() -> None:
    facts = registry.facts_of(torch.ops.graphcomp.look_up.default)
    assert facts.sums == "nothing" and not facts.unanswered()


# ------------------------------------------------------------------------------------------------ models
def compressed(build: Any, spec: QuantSpec, activations: QuantSpec | None = ACTIVATIONS) -> tuple[Any, Tensor, Tensor]:
    model, x = build()
    config = QuantConfig(spec, activations, first_and_last_bits=2)
    small = gc.compress(model, x, sparsity=0, quantization=PostTraining(config), progress=False)
    return small, x, small(x)


MODELS = {"residual": residual, "encoder": encoder}
CASES = [(model, name, acts) for model in MODELS for name in ALL for acts in (True, False)]
SOME = [
    ("residual", "per channel", True),
    ("residual", "two scales", True),
    ("encoder", "two scales, per channel", True),
]


@pytest.mark.parametrize("case", [*SOME, *in_ci(*(case for case in CASES if case not in SOME))])
@pytest.mark.slow
@pytest.mark.ci
def test_every_form_of_a_model_computes_the_same(case: tuple[str, str, bool], tmp_path: Path) -> None:
    """Integers, the fake-quant graph that is raised from the integers, the folder, and the file for onnxruntime."""
    pytest.importorskip("onnxruntime")
    model, name, acts = case
    small, x, out = compressed(MODELS[model], ALL[name], ACTIVATIONS if acts else None)
    assert {layer.weight_bits for layer in small.report.layers} == {2}
    kinds = {type(stored) for stored in small.quantized.lowered.weights.values()}
    assert (Codebook in kinds) is ALL[name].tabled
    torch.testing.assert_close(small.quantized.fake(x), out)
    small.save(tmp_path / "folder")
    again = gc.load(tmp_path / "folder")
    assert torch.equal(again(x), out) and torch.equal(again.quantized.fake(x), small.quantized.fake(x))
    small.export(tmp_path / "model.onnx")
    report = small.export_report
    assert report.agreement.error < 1e-4 and report.agreement.steps < 0.1
    if ALL[name].tabled:
        reasons = {reason for _, reason in report.kernels.stayed_float}
        assert reasons == {"weights from a table of values have no integer kernel"}
        assert not {"QLinearConv", "QGemm"} & set(report.kernels.integer)
    elif acts:
        assert report.kernels.share == 1.0


def test_codes_are_stored_in_two_bits() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)), torch.randn(4, 64)
    floats = sum(p.numel() for p in model.parameters()) * 4
    for spec, tables in ((ONE, 0), (TWO, 2 * 3 * 4)):
        config = QuantConfig(spec, None, first_and_last_bits=2)
        small = gc.compress(model, x, sparsity=0, quantization=PostTraining(config, correct_bias=False), progress=False)
        codes, biases = (64 * 128 + 128 * 32) // 4, (128 + 32) * 4
        assert small.report.bytes.before == floats
        assert small.report.bytes.after == codes + biases + tables
        buffers = dict(small.module.named_buffers())
        assert buffers["0.weight_codes"].dtype is torch.uint8 and buffers["0.weight_codes"].numel() == 64 * 128 // 4


@pytest.mark.slow
@pytest.mark.ci
def test_onnx_holds_codes_of_two_bits(tmp_path: Path) -> None:
    ir = pytest.importorskip("onnx_ir")
    small, _, _ = compressed(residual, TWO_CHANNEL)
    small.export(tmp_path / "model.onnx")
    kinds = [value.dtype for value in ir.load(tmp_path / "model.onnx").graph.initializers.values()]
    assert kinds.count(ir.DataType.UINT2) + kinds.count(ir.DataType.UINT4) == 6
    assert (ir.DataType.UINT2 in kinds) is _runs_two_bits()


def test_one_scale_runs_on_integers_and_two_scales_say_why_not() -> None:
    captured = capture(*residual())
    flat = list(captured.inputs.flat())
    ran = {}
    for name in ("per channel", "two scales, per channel"):
        config = QuantConfig(ALL[name], first_and_last_bits=2)
        lowered = quantize(captured, [flat], PostTraining(config)).lowered.module
        interpreter = IntegerInterpreter(lowered)
        with torch.no_grad():
            result = interpreter.run_flat(flat)
            torch.testing.assert_close(result[0], lowered(*captured.inputs.args), rtol=0.1, atol=0.1)
        ran[name] = interpreter
    assert len([n for n in ran["per channel"].in_integers if "conv" in n]) == 5
    assert not [n for n in ran["two scales, per channel"].in_integers if "conv" in n]
    assert set(ran["two scales, per channel"].in_floats.values()) >= {"its weight is float"}


def test_what_training_leaves_rounds_to_the_nearest() -> None:
    weight = torch.randn(3, 8)
    for spec, kind in ((CHANNEL, SymmetricQuantizer), (TWO_CHANNEL, CodebookQuantizer)):
        quantizer = fitted(spec, weight)
        with torch.no_grad():
            quantizer.scale.fill_(0.01)  # far below the threshold: the level is not its own
        assert not torch.equal(quantizer(quantizer(weight)), quantizer(weight))
        stored = quantizer.to_integers(weight)
        left = quantizer_of(stored, spec)
        assert type(left) is kind
        assert torch.equal(left.to_integers(stored.dequantize()).values.int(), stored.values.int())


def test_printed() -> None:
    assert make_quantizer(ONE).extra_repr() == "ternary, one scale, per tensor"
    assert make_quantizer(TWO_CHANNEL, shape=(3, 4), dim=0).extra_repr() == "ternary, two scales, per channel, dim=0"
    assert quantizer_of(codebook(0), TWO).extra_repr() == "4 levels, per channel, dim=0"
