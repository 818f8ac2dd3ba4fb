"""Observers, streamed and on weights: ranges by hand, bad data, and that batches add up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcomp.errors import CalibrationError, PlanError
from graphcomp.quantization.calibrate import (
    HALF_BINS,
    OBSERVERS,
    HistogramObserver,
    calibrate,
    calibrate_weight,
    make_observer,
)
from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.spec import QuantSpec

from .cases import check_integers

every_observer = pytest.mark.parametrize("observer", OBSERVERS)
either_symmetry = pytest.mark.parametrize("symmetric", [True, False])


def spec(
    observer: str, bits: int = 8, symmetric: bool = True, granularity: str = "tensor", **more: object
) -> QuantSpec:
    return QuantSpec(bits, symmetric, granularity, observer=observer, **more)


def observed(spec: QuantSpec, *batches: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor]:
    observer = make_observer(spec, dim)
    for batch in batches:
        observer.observe(batch)
    return observer.range()


def mean_square(spec: QuantSpec, x: Tensor, low: Tensor, high: Tensor) -> float:
    quantizer = make_quantizer(spec)
    quantizer.set_range(low, high)
    return (quantizer(x) - x).square().mean().item()


# ------------------------------------------------------------------------------------------------ each observer
def test_minmax() -> None:
    batches = [torch.tensor([[1.0, -2.0], [0.5, 4.0]]), torch.tensor([[-0.5, 3.0], [0.75, 9.0]])]
    low, high = observed(spec("minmax"), *batches)
    assert (low, high) == (-2, 9) and low.shape == ()
    low, high = observed(spec("minmax", granularity="channel"), *batches, dim=0)
    assert (low.tolist(), high.tolist()) == ([-2, 0], [3, 9])
    low, high = observed(spec("minmax", granularity="channel"), *batches, dim=1)
    assert (low.tolist(), high.tolist()) == ([-0.5, -2], [1, 9])


@every_observer
@either_symmetry
@pytest.mark.parametrize(("shift", "side"), [(3.0, 0), (-3.0, 1)])
def test_the_range_includes_zero(observer: str, symmetric: bool, shift: float, side: int) -> None:
    """Data on one side of 0 leave nothing on the other."""
    x = shift + torch.rand(1000)
    ends = observed(spec(observer, symmetric=symmetric), x)
    assert ends[side] == 0
    assert ends[0] <= 0 <= ends[1]
    assert ends[0] >= min(x.min(), 0) and ends[1] <= max(x.max(), 0)


def test_percentile() -> None:
    """The magnitudes' for symmetric codes, else half of the cut at each end; an outlier goes, a bin is the error."""
    x = torch.linspace(-1, 2, 100_001)
    x[:3] = torch.tensor([-50.0, 50.0, 40.0])
    bin_width = 50 / HALF_BINS
    low, high = observed(spec("percentile"), x)
    expected = x.abs().double().quantile(0.9999)
    assert -low == high and expected - 1e-6 <= high <= expected + bin_width
    low, high = observed(spec("percentile", symmetric=False), x)
    assert x.double().quantile(0.99995) - 1e-6 <= high <= x.double().quantile(0.99995) + bin_width
    assert x.double().quantile(0.00005) - bin_width <= low <= x.double().quantile(0.00005) + 1e-6
    assert high - low < 4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@either_symmetry
@pytest.mark.parametrize("relu", [False, True])
def test_mse_is_the_best_of_the_clips(bits: int, symmetric: bool, relu: bool) -> None:
    """No other hundredth of the range does better; by histogram almost none."""
    chosen = spec("mse", bits, symmetric)
    x = torch.distributions.Laplace(0.0, 1.0).sample((5000,))
    x = x.relu() if relu else x
    errors = [
        mean_square(chosen, x, share * x.min(), share * x.max()) for share in torch.linspace(0.01, 1, 100).tolist()
    ]
    quantizer = make_quantizer(chosen)
    calibrate_weight(quantizer, x)
    assert (quantizer(x) - x).square().mean().item() <= min(errors) * (1 + 1e-4)
    assert mean_square(chosen, x, *observed(chosen, x)) <= min(errors) * 1.02
    if bits <= 4:
        assert min(errors) < 0.8 * errors[-1], "the whole range is as good: the test is idle"


def test_mse_with_steps_finer_than_bins_keeps_what_matters() -> None:
    """16 levels lie in a bin, whose middle tells no rounding error; clipping would cost more than it gains."""
    x = torch.randn(10_000)
    assert observed(spec("mse", 16), x) == observed(spec("minmax"), x)


def test_entropy() -> None:
    """Clips a long thin tail and keeps a uniform distribution whole."""
    tail = torch.cat([torch.randn(100_000), 495 * torch.rand(20) + 5])
    low, high = observed(spec("entropy"), tail)
    assert 2.5 < high < tail.max() / 2 and low == tail.min()
    _, high = observed(spec("entropy"), 2 * torch.rand(200_000) - 1)
    assert high > 0.95


def test_entropy_of_data_on_one_side_counts_all_codes() -> None:
    """Asymmetric codes all lie on the side of the data, so fewer bins share one: as symmetric ones of a bit more."""
    x = torch.randn(50_000).exp()
    one_sided = observed(spec("entropy", 5, symmetric=False), x)
    assert torch.equal(one_sided[1], observed(spec("entropy", 6), x)[1])
    assert one_sided[1] != observed(spec("entropy", 5), x)[1]
    both_sides = x * (2 * (torch.arange(50_000) % 2) - 1)
    assert torch.equal(observed(spec("entropy", 5, symmetric=False), both_sides)[1], observed(spec("entropy", 5), x)[1])


def test_entropy_with_more_codes_than_bins_keeps_everything() -> None:
    x = torch.randn(1000)
    low, high = observed(spec("entropy", 16), x)
    assert (low, high) == (x.min(), x.max())


def test_entropy_by_hand() -> None:
    """Four filled bins told in as many levels lose nothing; a far outlier is not worth two levels."""
    from graphcomp.quantization.calibrate import _divergence

    counts = torch.tensor([[4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    p = torch.tensor([4, 2, 1, 2], dtype=torch.float64) / 9  # the outlier piled on bin 3
    q = torch.tensor([3, 3, 1, 1], dtype=torch.float64) / 8  # two levels of two bins
    torch.testing.assert_close(_divergence(counts, 4, 2)[0], (p * (p / q).log()).sum())
    assert _divergence(counts[:, :4], 4, 4)[0].abs() < 1e-12


@every_observer
@either_symmetry
def test_channels_are_calibrated_apart(observer: str, symmetric: bool) -> None:
    """Each channel's range is the one it would get alone, streamed and as a weight."""
    x = torch.randn(64, 3, 50) * torch.tensor([0.01, 1.0, 300.0])[:, None]
    together = observed(spec(observer, 4, symmetric, "channel"), x[:20], x[20:], dim=1)
    weights = make_quantizer(spec(observer, 4, symmetric, "channel"), shape=x.shape, dim=1)
    calibrate_weight(weights, x)
    for channel in range(3):
        one = x[:, channel]
        alone = observed(spec(observer, 4, symmetric), one[:20], one[20:])
        torch.testing.assert_close(torch.stack([end[channel] for end in together]), torch.stack(alone))
        single = make_quantizer(spec(observer, 4, symmetric))
        calibrate_weight(single, one)
        torch.testing.assert_close(weights.scale[channel], single.scale)


# ------------------------------------------------------------------------------------------------ streaming
@every_observer
def test_batches_add_up(observer: str) -> None:
    """The range of many batches is about that of all at once, in any order, however the range grows."""
    batches = [torch.randn(500) * 1.7**i for i in range(8)]
    whole = observed(spec(observer), torch.cat(batches))
    for order in (batches, batches[::-1]):
        low, high = observed(spec(observer), *order)
        assert high.item() == pytest.approx(whole[1].item(), rel=0.1)
        assert low.item() == pytest.approx(whole[0].item(), rel=0.1)


@given(st.lists(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=6), min_size=1))
def test_histograms_lose_no_value(batches: list[list[float]]) -> None:
    """Any float64, tiny, huge or 0, in any order: all are counted, none lies outside."""
    observer = make_observer(spec("percentile"))
    for batch in batches:
        observer.observe(torch.tensor(batch, dtype=torch.float64))
    assert isinstance(observer, HistogramObserver)
    histogram = observer._histogram
    values = torch.tensor([value for batch in batches for value in batch], dtype=torch.float64)
    assert histogram.counts.sum() == len(values)
    assert histogram.reach.isfinite().all() and histogram.reach >= values.abs().max()
    assert histogram.counts[:, :HALF_BINS].sum() <= (values < 0).sum()
    low, high = observer.range()
    assert -low == high == values.abs().max() or (
        low >= values.clamp(max=0).min() and high <= values.clamp(min=0).max()
    )
    quantizer = make_quantizer(spec("percentile"))
    quantizer.set_range(low, high)
    assert quantizer.scale > 0 and quantizer.scale.isfinite()


def test_a_histogram_that_widens_merges_bins_exactly() -> None:
    small, large = torch.randn(1000, dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    small = small / small.abs().max()
    widened, direct = (make_observer(spec("mse")) for _ in range(2))
    for batch in (small, 4 * large):
        widened.observe(batch)
    direct.observe(torch.cat([small, 4 * large]))
    assert torch.equal(widened._histogram.counts, direct._histogram.counts)
    assert widened._histogram.reach == direct._histogram.reach == 4


@every_observer
def test_memory_is_constant(observer: str) -> None:
    watcher = make_observer(spec(observer))
    sizes = []
    for _ in range(3):
        watcher.observe(torch.randn(10_000))
        histogram = getattr(watcher, "_histogram", None)
        tensors = [*watcher.extent, *(() if histogram is None else (histogram.counts, histogram.reach))]
        sizes.append(sum(t.numel() for t in tensors))
    assert sizes[0] == sizes[-1] <= 2 * HALF_BINS + 3


@every_observer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats(observer: str, dtype: torch.dtype) -> None:
    x = torch.randn(2000, requires_grad=True).to(dtype)
    low, high = observed(spec(observer), x)
    assert low.dtype == high.dtype == torch.float64
    assert not high.requires_grad
    assert 1 < high <= x.max() and min(x) <= low < -1


# ------------------------------------------------------------------------------------------------ bad data
@every_observer
def test_no_batch(observer: str) -> None:
    with pytest.raises(CalibrationError, match="no batch was observed"):
        make_observer(spec(observer), name="relu_3").range()
    with pytest.raises(CalibrationError, match="relu_3"):
        calibrate(make_quantizer(spec(observer)), [], "relu_3")


@every_observer
def test_empty_tensors(observer: str) -> None:
    with pytest.raises(CalibrationError, match=r"\(0, 3\)"):
        observed(spec(observer), torch.empty(0, 3))
    quantizer = make_quantizer(spec(observer, granularity="channel"), shape=(3, 0), dim=0)
    with pytest.raises(CalibrationError, match="it is empty"):
        calibrate_weight(quantizer, torch.empty(3, 0), "head.weight")


@every_observer
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(observer: str, value: float) -> None:
    """The message says which tensor, which batch, which element, and how many."""
    bad = torch.randn(4, 5)
    bad[2, 3] = bad[3, 0] = value
    with pytest.raises(CalibrationError) as caught:
        calibrate(make_quantizer(spec(observer)), [torch.randn(4, 5), bad], "relu_3")
    for part in ("relu_3, batch 1", "2 of 20", "(2, 3)", str(value)):
        assert part in str(caught.value)
    quantizer = make_quantizer(spec(observer, granularity="channel"), shape=(4, 5), dim=0)
    before = quantizer.scale.clone()
    with pytest.raises(CalibrationError) as caught:
        calibrate_weight(quantizer, bad, "head.weight")
    assert "head.weight" in str(caught.value) and "(2, 3)" in str(caught.value)
    assert torch.equal(quantizer.scale, before)
    assert isinstance(caught.value, PlanError)


def test_another_number_of_channels() -> None:
    with pytest.raises(CalibrationError, match="dim 1 has 4 indices, where the batches before had 3"):
        observed(spec("minmax", granularity="channel"), torch.randn(2, 3), torch.randn(2, 4), dim=1)


def test_specs_that_cannot_be_observed() -> None:
    with pytest.raises(PlanError, match="calibrate_weight"):
        make_observer(spec("minmax", 4, granularity="group", group_size=2), 0)
    with pytest.raises(PlanError, match="channel dim"):
        make_observer(spec("minmax", granularity="channel"))


# ------------------------------------------------------------------------------------------------ degenerate data
@every_observer
@either_symmetry
@pytest.mark.parametrize("value", [0.0, 1.0, -3.25, 1e-30, -1e30])
def test_constant_data(observer: str, symmetric: bool, value: float) -> None:
    """A positive step, and the constant comes back to within half of it."""
    for quantizer in (make_quantizer(spec(observer, 8, symmetric)) for _ in range(2)):
        x = torch.full((3, 7), value)
        calibrate(quantizer, [x, x])
        assert quantizer.scale > 0 and quantizer.scale.isfinite()
        assert ((quantizer(x) - x).abs() <= quantizer.scale * 0.51).all()
        calibrate_weight(quantizer, x)
        assert ((quantizer(x) - x).abs() <= quantizer.scale * 0.51).all()


@every_observer
@either_symmetry
@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_a_channel_of_zeros(observer: str, symmetric: bool, granularity: str) -> None:
    weight = torch.randn(5, 2, 8)
    weight[3] = 0
    weight[0, :, 4:] = 0
    size = 4 if granularity == "group" else 0
    quantizer = make_quantizer(spec(observer, 4, symmetric, granularity, group_size=size), shape=weight.shape, dim=0)
    calibrate_weight(quantizer, weight)
    assert (quantizer.scale > 0).all() and quantizer.scale.isfinite().all()
    result = quantizer(weight)
    assert (result[3] == 0).all() and (result[0, :, 4:] == 0).all()
    check_integers(quantizer, weight)
    assert (result - weight).abs().max() < weight.abs().max()


@every_observer
def test_zeros_first(observer: str) -> None:
    """A batch of zeros, then data: as after a dead first batch."""
    low, high = observed(spec(observer), torch.zeros(100), torch.randn(5000))
    assert low < -1 and high > 1


# ------------------------------------------------------------------------------------------------ weights, groups
@every_observer
@either_symmetry
def test_groups_are_calibrated_apart(observer: str, symmetric: bool) -> None:
    """Uneven groups, in the order that slicing left them, one gone: each as if it were alone."""
    weight = torch.randn(3, 2, 7) * torch.tensor([1.0, 1, 1, 20, 20, 300, 300])
    quantizer = make_quantizer(spec(observer, 4, symmetric, "group", group_size=2), shape=weight.shape, dim=0)
    quantizer.groups = torch.tensor([3, 3, 3, 0, 0, 1, 1])
    calibrate_weight(quantizer, weight)
    assert quantizer.scale.shape == (3, 4) and (quantizer.scale[:, 2] == 1).all()
    for group, columns in ((3, slice(0, 3)), (0, slice(3, 5)), (1, slice(5, 7))):
        alone = make_quantizer(spec(observer, 4, symmetric, "channel"), shape=(3, 2, 1), dim=0)
        calibrate_weight(alone, weight[..., columns].contiguous())
        torch.testing.assert_close(quantizer.scale[:, group], alone.scale)
    check_integers(quantizer, weight)


def test_more_rows_than_are_calibrated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(11, 30)
    for observer in OBSERVERS:
        quantizer = make_quantizer(spec(observer, 4, granularity="channel"), shape=weight.shape, dim=0)
        calibrate_weight(quantizer, weight)
        whole = quantizer.scale.clone()
        monkeypatch.setattr("graphcomp.quantization.calibrate.ROWS_AT_ONCE", 4)
        calibrate_weight(quantizer, weight)
        monkeypatch.undo()
        assert torch.equal(quantizer.scale, whole)


@either_symmetry
def test_relu_activations_start_at_the_lowest_code(symmetric: bool) -> None:
    for observer in OBSERVERS:
        quantizer = make_quantizer(spec(observer, 8, symmetric))
        calibrate(quantizer, [torch.randn(1000).relu() for _ in range(3)])
        integers = check_integers(quantizer, torch.zeros(1))
        assert integers.values == 0
        assert symmetric or quantizer.zero_point == quantizer.spec.quant_min


@every_observer
def test_geta_activations_saturate_little(observer: str) -> None:
    """Activations as after a layer norm of large gain: less than 1 % lie beyond q_m, at 8 bits."""
    x = 10 * torch.randn(64, 300)
    quantizer = make_quantizer(QuantSpec(8, kind="geta", observer=observer))
    calibrate(quantizer, [x[:32], x[32:]])
    assert (x.abs() > quantizer.q_m).float().mean() < 0.01
    assert quantizer.bits.item() == pytest.approx(8, abs=1e-5)
    calibrate_weight(quantizer, x)
    assert (x.abs() > quantizer.q_m).float().mean() < 0.01
