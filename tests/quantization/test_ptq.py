from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.numerics.compare import relative_error
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.ptq import PostTraining, Quantized, quantize
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.setting import significant_mean
from graphcomp.quantization.spec import ACTIVATIONS, WEIGHTS, QuantConfig, QuantSpec, with_bits
from graphcomp.quantization.verify import check_lowering
from tests.marks import in_ci
from tests.quantization.models import encoder, residual


def run(model: nn.Module, x: Tensor, **options: Any) -> tuple[Quantized, list[list[Any]]]:
    captured = capture(model, x)
    batches = [captured.inputs.of((part,), {}).flat() for part in x.split(max(2, len(x) // 4))]
    return quantize(captured, batches, PostTraining(**options)), batches


def correlated(n: int, i: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(n, 4) @ torch.randn(4, i) + 0.1 * torch.randn(n, i)


def low(bits: int, **more: Any) -> QuantConfig:
    return QuantConfig(replace(WEIGHTS, bits=bits), None, first_and_last_bits=2, **more)


def test_eight_bits_are_close():
    for make in (residual, encoder):
        model, x = make()
        found, _ = run(model, x)
        assert relative_error(model(x), found.fake(x)) < 0.05
        assert set(found.errors.values()) and max(found.errors.values()) < 0.05


def test_ranges_are_those_of_all_batches():
    model, x = residual()
    x[5:] *= 10
    found, _ = run(model, x)
    quantizer = next(q for n, q in quantizer_nodes(found.fake) if str(n.target).endswith(".x"))
    scale = quantizer.get_parameter("scale")
    assert float(scale.detach()) == pytest.approx(float(x.max() - x.min()) / 255, rel=1e-5)


def test_bias_correction_removes_the_mean_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = correlated(1024, 32) + 1
    errors = {}
    for correct in (False, True):
        found, _ = run(model, x, config=low(2), correct_bias=correct)
        errors[correct] = float((model(x) - found.fake(x)).detach().mean(0).abs().max())
    assert errors[True] < 0.2 * errors[False]


class PerSample(nn.Module):
    """A convolution without bias, then one whose filters are those of every sample side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.filters = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 2 * 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        filters = self.filters(x.mean((2, 3))).reshape(-1, c, 1, 1)
        return torch.conv2d(x.reshape(1, -1, h, w), filters, groups=n).reshape(n, -1, h, w)


def test_a_dynamic_number_of_filters_has_no_bias_to_correct():
    torch.manual_seed(0)
    model, x = PerSample().eval(), torch.randn(4, 3, 6, 6)
    found, _ = run(model, x)
    assert relative_error(model(x), found.fake(x)) < 0.05
    assert relative_error(model(x[:3]), found.fake(x[:3])) < 0.05


@pytest.mark.slow
@pytest.mark.ci
def test_rounding_and_correction_see_so_many_batches():
    model, x = residual()
    errors = {n: run(model, x[:4], walk_batches=n)[0].errors for n in (1, 2, 8)}
    assert errors[1] != errors[2] == errors[8]  # there are two


def test_chance_is_not_corrected():
    torch.manual_seed(0)
    exact = torch.zeros(400, 5)
    rough = torch.randn(400, 5)
    rough[:, 2] += 1
    mean = significant_mean([exact], [rough], 1)
    assert float(mean[2]) == pytest.approx(-1, abs=0.2)
    assert not significant_mean([exact[:8]], [rough[:8]], 1).any()


@pytest.mark.parametrize("group_size", [0, 8])
def test_second_order_rounding_beats_nearest(group_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    x = correlated(128, 32)
    spec = QuantSpec(3, granularity="group", group_size=group_size) if group_size else replace(WEIGHTS, bits=3)
    config = QuantConfig(spec, None, first_and_last_bits=2)
    error = {}
    for rounding in ("nearest", "second_order"):
        found, batches = run(model, x, config=config, rounding=rounding, correct_bias=False)
        assert check_lowering(found.fake, found.lowered, batches[0]).weights == 0
        error[rounding] = float((model(x) - found.fake(x)).detach().norm())
    assert error["second_order"] < 0.6 * error["nearest"]


def test_second_order_rounding_of_a_weight_whose_outputs_are_dim_1() -> None:
    class Conv1D(nn.Module):  # as GPT-2 has it
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    torch.manual_seed(0)
    model, x = nn.Sequential(Conv1D(32, 24), nn.ReLU(), Conv1D(24, 4)).eval(), correlated(128, 32)
    error = {}
    for rounding in ("nearest", "second_order"):
        found, batches = run(model, x, config=low(3), rounding=rounding, correct_bias=False)
        assert check_lowering(found.fake, found.lowered, batches[0]).weights == 0
        error[rounding] = float((model(x) - found.fake(x)).detach().norm())
    assert error["second_order"] < 0.6 * error["nearest"]


def test_equalization_is_for_weights_with_one_step():
    model, x = residual()
    with torch.no_grad():  # channels of very different size, which the next layer makes up for
        scale = torch.logspace(-2, 1, 8)
        model.depthwise.weight.mul_(scale.view(-1, 1, 1, 1))
        model.depthwise.bias.mul_(scale)
        model.pointwise.weight.div_(scale.view(1, -1, 1, 1))
    per_tensor = QuantConfig(QuantSpec(8), ACTIVATIONS)
    error = {
        flag: relative_error(model(x), run(model, x, config=per_tensor, equalize=flag)[0].fake(x))
        for flag in (False, None)
    }
    assert error[None] < 0.5 * error[False]


def test_weights_only_leaves_activations_alone():
    model, x = encoder()
    found, _ = run(model, x, config=QuantConfig(QuantSpec(4, granularity="group", group_size=8), None))
    assert not found.lowered.activations
    assert relative_error(found.fake(x), found.lowered.module(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [0, 8])
def test_weights_of_a_model_in_half_floats(dtype: torch.dtype, group_size: int, tmp_path: Path) -> None:
    """As language models come; results stay in the model's dtype."""
    torch.manual_seed(0)
    layers = [nn.Embedding(20, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 5)]
    model = nn.Sequential(*layers).to(dtype).eval()
    ids = torch.arange(20).view(2, 10)
    small = gc.compress(model, ids, sparsity=0, bits=4, activation_bits=None, group_size=group_size)
    assert small(ids).dtype is dtype
    assert relative_error(model(ids), small(ids)) < 0.2
    assert small.report.verified["integers == fake-quant, in steps"] == 0
    assert small.quantized is not None
    assert torch.equal(small.quantized.fake(ids), small(ids))
    assert any(buffer.dtype is torch.uint8 for buffer in small.buffers())
    small.save(tmp_path / "small")
    assert torch.equal(gc.load(tmp_path / "small")(ids), small(ids))


def test_a_layer_called_twice_is_rounded_for_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(x)))

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(32, 8) + 1
    for rounding in ("nearest", "second_order"):
        found, batches = run(model, x, rounding=rounding)
        assert relative_error(model(x), found.fake(x)) < 0.05
        assert check_lowering(found.fake, found.lowered, batches[0]).weights == 0


def test_float_model_is_untouched():
    model, x = residual()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    run(model, x, rounding="second_order", config=QuantConfig(with_bits(WEIGHTS, 3), ACTIVATIONS), equalize=True)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_quantizers_are_on_after_calibration():
    found, _ = run(*residual())
    assert all(q.enabled for q in found.fake.modules() if isinstance(q, Quantizer))


# ------------------------------------------------------------------------------------------------ through compress
def test_compress_cuts_and_quantizes():
    model, x = residual()
    small = gc.compress(model, x, sparsity=0.5, bits=8, calibration=[x, x], repair=None)
    assert small.report.bytes.ratio < 0.3
    assert small.report.bops.ratio < 0.05
    assert {layer.weight_bits for layer in small.report.layers} == {8}
    assert small.report.verified["integers == fake-quant, in steps"] <= 1.001
    assert small.report.quantization_errors and small.report.sizes["C0"] > 0
    assert not small.report.notes
    assert small(x[:3]).shape == (3, 5)


@pytest.mark.parametrize("kind", ["uniform", "geta"])
@pytest.mark.parametrize("make", [residual, *in_ci(encoder)])
@pytest.mark.slow
@pytest.mark.ci
def test_a_budget_of_bit_operations_counts_the_bits(make: Any, kind: Any) -> None:
    model, x = make()
    weights = QuantSpec(6, kind=kind)
    config = QuantConfig(weights, replace(weights, bits=8) if kind == "geta" else ACTIVATIONS)
    budget = gc.Budget(bops=0.03)
    small = gc.compress(model, x, budget=budget, quantization=PostTraining(config))
    assert 0.025 < small.report.bops.ratio <= 0.03
    alone = gc.compress(model, x, sparsity=0, quantization=PostTraining(config))
    assert alone.report.bops.ratio > 0.03
    assert small.report.units_removed > 0


def test_a_budget_that_the_bits_alone_meet_removes_nothing() -> None:
    model, x = residual()
    small = gc.compress(model, x, bits=8, budget=gc.Budget(bops=0.1))
    assert small.report.units_removed == 0 and small.report.bops.ratio <= 0.1


def test_the_ends_and_tables_get_eight_bits_at_least():
    layers = [nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)]
    model, ids = nn.Sequential(*layers).eval(), torch.arange(9)
    for bits, expected in ((4, [8, 8, 4, 8]), (12, [12] * 4)):
        found = gc.compress(model, ids, sparsity=0, bits=bits).report.layers
        assert [layer.weight_bits for layer in found] == expected


def test_report_says_that_it_was_calibrated_on_the_examples():
    model, x = residual()
    assert "example inputs alone" in str(gc.compress(model, x, bits=8).report)
    assert "example inputs alone" not in str(gc.compress(model, x, bits=8, activation_bits=None).report)


def test_sparsity_zero_only_quantizes():
    model, x = residual()
    small = gc.compress(model, x, sparsity=0, bits=8)
    assert small.report.units_removed == 0 and small.kept == {}
    assert relative_error(model(x), small(x)) < 0.05


def test_ignored_modules_stay_float():
    model, x = residual()
    small = gc.compress(model, x, bits=8, ignore=["fc"])
    assert next(layer for layer in small.report.layers if layer.name == "fc").weight_bits == 32
    assert "fc.weight" in dict(small.module.named_parameters())


def test_reduced_range_has_seven_bits_everywhere():
    model, x = residual()
    small = gc.compress(model, x, sparsity=0, bits=8, reduce_range=True)
    codes = [b for name, b in small.module.named_buffers() if name.endswith("weight_codes")]
    assert len(codes) == 6 and max(int(c.abs().max()) for c in codes) == 63


def test_scope():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, _ = residual()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if float(x.sum()) > -1e9 else x

    model, x = Whole().eval(), residual()[1]
    small = gc.compress(model, x, bits=8, scope="body")
    assert relative_error(model(x), small(x)) < 2
    assert [name for name, b in small.named_buffers() if name.endswith("codes")]


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.slow
@pytest.mark.ci
def test_saved_and_loaded(tmp_path: Any, bits: int) -> None:
    model, x = encoder()
    small = gc.compress(model, x, bits=bits)
    small.save(tmp_path / "small")
    loaded = gc.load(tmp_path / "small")
    assert torch.equal(small(x), loaded(x))
    stored = {name: b.dtype for name, b in loaded.module.named_buffers()}
    assert stored == {name: b.dtype for name, b in small.module.named_buffers()}
