"""The first range of a quantizer, read off data: streamed activations, or a weight.

An observer is fed batches and then asked for a range. It keeps one row of statistics per step of the quantizer, and
no more memory after a thousand batches than after one. A range always includes 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from graphcomp.errors import CalibrationError, PlanError
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.gradients import multiples
from graphcomp.quantization.quantizers.uniform import step_and_zero
from graphcomp.quantization.spec import Observer, QuantSpec

HALF_BINS = 2048
"""Bins of a histogram on each side of 0; TensorRT's number."""

PERCENTILE = 99.99
"""The share of the values, in percent, that the percentile observer keeps in range."""

CLIPS = 100
"""How many ranges, evenly spaced, the MSE and entropy observers choose from."""

ROWS_AT_ONCE = 1024
"""Steps of a weight that are calibrated together: their histograms take 32 MiB."""

Range = tuple[Tensor, Tensor]
"""low <= 0 and high >= 0, float64, one each per step."""


# ------------------------------------------------------------------------------------------------ entry points
def make_observer(spec: QuantSpec, dim: int | None = None, name: str = "") -> RangeObserver:
    """The observer that `spec.observer` names, for tensors with one step, or one per index of `dim`.

    Args:
        dim: the channel dim; needed where the spec is per channel, no matter where it is per tensor.
        name: of what is observed, for messages.

    Raises:
        PlanError: the spec is per group, as only weights are (see `calibrate_weight`), or needs a dim.
    """
    if spec.granularity == "group":
        raise PlanError("one step per group is for weights, not for batches", fix="calibrate_weight(quantizer, weight)")
    if spec.granularity == "channel" and dim is None:
        raise PlanError("one step per channel needs the channel dim", fix="make_observer(spec, dim=1)")
    return OBSERVERS[spec.observer](spec, dim if spec.granularity == "channel" else None, name)


def calibrate(quantizer: Quantizer, batches: Iterable[Tensor], name: str = "") -> None:
    """Set the range of `quantizer` to what `spec.observer` makes of `batches`.

    Raises:
        CalibrationError: there is no batch, or one is empty, not finite, or of another number of channels.
        PlanError: as `make_observer`.
    """
    observer = make_observer(quantizer.spec, quantizer.dim, name)
    for batch in batches:
        observer.observe(batch)
    quantizer.set_range(*observer.range())


@torch.no_grad()
def calibrate_weight(quantizer: Quantizer, weight: Tensor, name: str = "") -> None:
    """Set the levels of `quantizer` by `weight`, or its range to what `spec.observer` makes of `weight`.

    Args:
        weight: of the shape that the quantizer was made for, or was sliced to.
        name: of the weight, for messages.

    Raises:
        CalibrationError: the weight is empty or not finite.
    """
    _check(weight, name)
    spec, dim = quantizer.spec, quantizer.dim
    if quantizer.fit(weight):
        return
    if dim is None:
        low, high = _ranges(weight.reshape(1, -1), spec)
        quantizer.set_range(low.squeeze(0), high.squeeze(0))
    elif spec.granularity == "channel":
        quantizer.set_range(*_ranges(_rows(weight, dim), spec))
    else:
        groups = quantizer.get_buffer("groups")
        lows, highs = (torch.zeros_like(quantizer.get_parameter("scale"), dtype=torch.float64) for _ in range(2))
        for group in sorted(set(groups.tolist())):  # a group that slicing emptied keeps the range 0
            lows[:, group], highs[:, group] = _ranges(weight[..., groups == group].flatten(1), spec)
        quantizer.set_range(lows, highs)


def _ranges(rows: Tensor, spec: QuantSpec) -> Range:
    """The range (r,) of each row of (r, n) values, which are finite."""
    found = []
    for part in torch.split(rows, ROWS_AT_ONCE):
        if spec.observer in ("mse", "output"):  # from the values themselves: closer than a histogram, and cheaper
            found.append(_least_squares(spec, _extent(part), _Values(part, spec)))
            continue
        observer = OBSERVERS[spec.observer](spec, 0)
        observer.observe(part)
        found.append(observer.range())
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


# ------------------------------------------------------------------------------------------------ input
def _check(x: Tensor, place: str) -> None:
    """Raise CalibrationError unless `x` has elements and all of them are finite."""
    if x.numel() == 0:
        raise CalibrationError(f"a tensor of shape {tuple(x.shape)} has no range", at=place, why="it is empty")
    finite = x.isfinite()
    if not finite.all():
        wrong = (~finite).nonzero()
        first = tuple(wrong[0].tolist())
        raise CalibrationError(
            "the data are not finite",
            at=place,
            why=f"{len(wrong)} of {x.numel()} elements are NaN or infinite; the first is {x[first].item()} at {first}",
            fix="calibrate on data for which the float model gives finite values; in float32, if float16 overflowed",
        )


def _rows(x: Tensor, dim: int | None) -> Tensor:
    """`x` as (r, n), one row per step."""
    return x.reshape(1, -1) if dim is None else x.movedim(dim, 0).reshape(x.shape[dim], -1)


def _extent(rows: Tensor) -> Range:
    """The least and the greatest value of each row, and 0."""
    low, high = rows.aminmax(dim=1)
    return low.double().clamp(max=0), high.double().clamp(min=0)


# ------------------------------------------------------------------------------------------------ observers
class RangeObserver(ABC):
    """Sees batches, then gives a range.

    Args:
        spec: what the range is for.
        dim: which dim has one step per index; None: one step.
        name: of what is observed, for messages.
    """

    def __init__(self, spec: QuantSpec, dim: int | None = None, name: str = "") -> None:
        self.spec = spec
        self.dim = dim
        self.name = name
        self.batches = 0
        self.extent: Range | None = None

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take in one batch.

        Args:
            x: any shape, with as many indices along `dim` as the batches before; stays as it is.

        Raises:
            CalibrationError: the batch is empty, not finite, or of another number of channels.
        """
        place = f"{self.name}, batch {self.batches}" if self.name else f"batch {self.batches}"
        _check(x, place)
        rows = _rows(x, self.dim)
        low, high = _extent(rows)
        if self.extent is not None:
            if len(low) != len(self.extent[0]):
                raise CalibrationError(
                    f"dim {self.dim} has {len(low)} indices, where the batches before had {len(self.extent[0])}",
                    at=place,
                    fix="observe one tensor with one observer",
                )
            low, high = torch.minimum(low, self.extent[0]), torch.maximum(high, self.extent[1])
        self.extent = low, high
        self.batches += 1
        self._add(rows)

    @torch.no_grad()
    def range(self) -> Range:
        """low <= 0 and high >= 0, float64: () each, or (c,) with a dim.

        Raises:
            CalibrationError: no batch was observed.
        """
        if self.extent is None:
            raise CalibrationError(
                "no batch was observed", at=self.name, why="a range is read off data", fix="observer.observe(batch)"
            )
        low, high = self._choose(self.extent)
        return (low.squeeze(0), high.squeeze(0)) if self.dim is None else (low, high)

    @abstractmethod
    def _add(self, rows: Tensor) -> None:
        """Take in one batch as (r, n); the extent includes it."""

    @abstractmethod
    def _choose(self, extent: Range) -> Range:
        """A range inside the extent of all batches, (r,) each."""


class MinMaxObserver(RangeObserver):
    """The whole range."""

    def _add(self, rows: Tensor) -> None:
        pass

    def _choose(self, extent: Range) -> Range:
        return extent


class HistogramObserver(RangeObserver):
    """What reads its range off a histogram of all batches."""

    _histogram: _Histogram | None = None

    def _add(self, rows: Tensor) -> None:
        if self._histogram is None:
            self._histogram = _Histogram(len(rows), rows.device)
        self._histogram.add(rows)

    def _choose(self, extent: Range) -> Range:
        assert self._histogram is not None
        return self._read(self._histogram, extent)

    @abstractmethod
    def _read(self, histogram: _Histogram, extent: Range) -> Range: ...


class PercentileObserver(HistogramObserver):
    """The range that keeps PERCENTILE of the values, up to the width of a bin.

    Symmetric: of the magnitudes. Else as much is cut off at either end, and nothing where an end is 0.
    """

    def _read(self, histogram: _Histogram, extent: Range) -> Range:
        cut = 1 - PERCENTILE / 100
        if self.spec.symmetric:
            return _clip(extent, histogram.width * _bins_below(histogram.magnitudes(), 1 - cut))
        counts = histogram.counts
        high = (_bins_below(counts, 1 - cut / 2) - HALF_BINS) * histogram.width
        low = (_bins_below(counts.flip(1), 1 - cut / 2) - HALF_BINS) * -histogram.width
        return torch.maximum(extent[0], low.clamp(max=0)), torch.minimum(extent[1], high.clamp(min=0))


class MseObserver(HistogramObserver):
    """The range, of CLIPS parts of the whole, whose codes have the least squared error."""

    def _read(self, histogram: _Histogram, extent: Range) -> Range:
        return _least_squares(self.spec, extent, _Bins(histogram, self.spec))


class EntropyObserver(HistogramObserver):
    """The clip after which the distribution of the magnitudes loses least to the codes, by Kullback-Leibler divergence.

    Source: Migacz, "8-bit inference with TensorRT" (GTC 2017); CLIPS candidates from as many bins as there are codes,
    where he tries every bin. As in NVIDIA's pytorch-quantization, the bin at 0 counts as much as its neighbour, lest
    the zeros after a ReLU decide.
    """

    def _read(self, histogram: _Histogram, extent: Range) -> Range:
        magnitudes = histogram.magnitudes()
        magnitudes[:, 0] = magnitudes[:, 1]
        half = 2 ** (self.spec.bits - 1)
        bins = _least_divergence(magnitudes, half)
        if not self.spec.symmetric:  # data on one side of 0 have all codes on that side
            one_sided = (extent[0] == 0) | (extent[1] == 0)
            bins = torch.where(one_sided, _least_divergence(magnitudes, 2 * half), bins)
        return _clip(extent, histogram.width * bins)


class OutputObserver(HistogramObserver):
    """Several ranges, for whoever sees what ops make of the tensor to choose from; alone, that of the MSE observer."""

    def _read(self, histogram: _Histogram, extent: Range) -> Range:
        return _least_squares(self.spec, extent, _Bins(histogram, self.spec))

    def candidates(self) -> list[Range]:
        """Return what each of the other observers makes of the batches, see `range`."""
        found = []
        for kind in (MinMaxObserver, PercentileObserver, MseObserver, EntropyObserver):
            other = kind(self.spec, self.dim, self.name)
            other.extent = self.extent
            if isinstance(other, HistogramObserver):
                other._histogram = self._histogram
            found.append(other.range())
        return found


OBSERVERS: dict[Observer, type[RangeObserver]] = {
    "minmax": MinMaxObserver,
    "percentile": PercentileObserver,
    "mse": MseObserver,
    "entropy": EntropyObserver,
    "output": OutputObserver,
}


def _clip(extent: Range, most: Tensor) -> Range:
    return torch.maximum(extent[0], -most), torch.minimum(extent[1], most)


# ------------------------------------------------------------------------------------------------ histograms
class _Histogram:
    """How many values fell into each of 2 * HALF_BINS bins that divide -reach … reach, per row.

    Where values come to lie outside, the reach doubles until they fit and neighbouring bins merge: exact, as 0 is and
    stays an edge.

    Attributes:
        counts: (r, 2 * HALF_BINS) float64.
        reach: (r,) float64; 0 as long as a row is all zeros, which count in the bin right of 0.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.counts = torch.zeros(rows, 2 * HALF_BINS, dtype=torch.float64, device=device)
        self.reach = torch.zeros(rows, dtype=torch.float64, device=device)

    @property
    def width(self) -> Tensor:
        """(r,) of one bin."""
        return self.reach / HALF_BINS

    def magnitudes(self) -> Tensor:
        """(r, HALF_BINS): the counts of both sides, 0 outwards."""
        return self.counts[:, HALF_BINS:] + self.counts[:, :HALF_BINS].flip(1)

    def centres(self) -> Tensor:
        """(r, 2 * HALF_BINS): the middle of each bin."""
        steps = torch.arange(-HALF_BINS, HALF_BINS, device=self.counts.device, dtype=torch.float64) + 0.5
        return steps * self.width[:, None]

    def add(self, rows: Tensor) -> None:
        """Count (r, n) finite values."""
        low, high = _extent(rows)
        self._widen(torch.maximum(-low, high))
        reach = torch.where(self.reach > 0, self.reach, 1.0)[:, None]
        bins = (rows.double() / reach * HALF_BINS).floor().long().clamp(-HALF_BINS, HALF_BINS - 1) + HALF_BINS
        first = torch.arange(len(rows), device=rows.device)[:, None] * 2 * HALF_BINS
        self.counts += (bins + first).flatten().bincount(minlength=self.counts.numel()).view_as(self.counts)

    def _widen(self, needed: Tensor) -> None:
        """Make the reach at least `needed` (r,)."""
        doublings = torch.where(self.reach > 0, (needed / self.reach).log2().ceil().clamp(min=0), 0.0)
        # So many doublings merge each side to one bin, however wide that is then.
        most = math.log2(HALF_BINS) + 1
        merged = 2 ** doublings.clamp(max=most)
        offsets = torch.arange(-HALF_BINS, HALF_BINS, device=needed.device, dtype=torch.float64)
        target = (offsets / merged[:, None]).floor().long() + HALF_BINS
        self.counts = torch.zeros_like(self.counts).scatter_add_(1, target, self.counts)
        wider = torch.where(doublings < most, self.reach * merged, 0.0)
        self.reach = torch.maximum(wider.clamp(max=torch.finfo(torch.float64).max), needed)


def _bins_below(counts: Tensor, share: float) -> Tensor:
    """(r,): how many leading bins of (r, b) `counts` hold at least `share` of all."""
    so_far = counts.cumsum(1)
    return (so_far < share * so_far[:, -1:]).sum(1) + 1


# ------------------------------------------------------------------------------------------------ searches
def _least_squares(spec: QuantSpec, extent: Range, error: Callable[[Tensor, Tensor], Tensor]) -> Range:
    """The part of `extent`, of CLIPS, with the least `error` of its step and zero point; the widest of equals."""
    low, high = extent
    best, share = torch.full_like(low, torch.inf), torch.ones_like(low)
    for clip in torch.linspace(1, 1 / CLIPS, CLIPS, dtype=torch.float64).tolist():
        found = error(*step_and_zero(low * clip, high * clip, spec))
        better = found < best
        best, share = torch.where(better, found, best), torch.where(better, clip, share)
    return low * share, high * share


class _Values:
    """(r,): the squared error of (r, n) values, given step and zero point (r,)."""

    def __init__(self, rows: Tensor, spec: QuantSpec) -> None:
        self.rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.spec = spec

    def __call__(self, step: Tensor, zero: Tensor) -> Tensor:
        step, zero = (p.to(self.rows.dtype)[:, None] for p in (step, zero))
        levels = multiples(self.rows, step, zero, self.spec.quant_min, self.spec.quant_max) * step
        return (levels - self.rows).double().square().sum(1)


class _Bins:
    """The same of a histogram, as if the values of a bin lay in its middle."""

    def __init__(self, histogram: _Histogram, spec: QuantSpec) -> None:
        self.histogram = histogram
        self.centres = histogram.centres()
        self.spec = spec

    def __call__(self, step: Tensor, zero: Tensor) -> Tensor:
        step, zero = step[:, None], zero[:, None]
        quant_min, quant_max = self.spec.quant_min, self.spec.quant_max
        squares = (multiples(self.centres, step, zero, quant_min, quant_max) * step - self.centres).square()
        # Where several levels lie in one bin its middle says nothing: the values are spread over them.
        inside = (self.centres >= (quant_min - zero) * step) & (self.centres <= (quant_max - zero) * step)
        squares = torch.where(inside & (step <= self.histogram.width[:, None]), step.square() / 12, squares)
        return (squares * self.histogram.counts).sum(1)


def _least_divergence(magnitudes: Tensor, levels: int) -> Tensor:
    """(r,): how many leading bins of (r, b) `magnitudes` to keep for `levels` codes; the most of equals."""
    rows, bins = magnitudes.shape
    best = torch.full((rows,), torch.inf, dtype=torch.float64, device=magnitudes.device)
    kept = torch.full_like(best, bins)
    candidates = torch.linspace(min(levels, bins), bins, CLIPS).round().int().tolist()
    for count in sorted(set(candidates), reverse=True):
        found = _divergence(magnitudes, count, levels)
        better = found < best
        best, kept = torch.where(better, found, best), torch.where(better, float(count), kept)
    return kept


def _divergence(magnitudes: Tensor, count: int, levels: int) -> Tensor:
    """(r,): KL divergence of the first `count` bins, the rest piled on the last, from those bins told in `levels`."""
    inner = magnitudes[:, :count]
    clipped = inner.clone()
    clipped[:, -1] += magnitudes[:, count:].sum(1)
    filled = (clipped > 0).double()
    level = torch.arange(count, device=magnitudes.device) * levels // count
    empty = magnitudes.new_zeros(len(magnitudes), levels)
    mean = empty.index_add(1, level, inner) / empty.index_add(1, level, filled).clamp(min=1)
    told = mean[:, level] * filled
    p, q = (x / x.sum(1, keepdim=True) for x in (clipped, told))
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(1)  # infinite where q misses what p has; NaN without counts
