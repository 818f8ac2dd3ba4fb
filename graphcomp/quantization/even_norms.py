"""Even channels behind norms: factors and shifts of channels are folded into a norm and into the layers that read it.

A norm with outliers in few channels leaves the other channels few levels of one step per tensor. The norm's weight and
bias may make u (y + a) of y, u and a one number per channel each, where every layer that reads the value divides the
columns of its weight by u, and takes W a off its bias: the float function is the same, whatever u and a are.

    a      minus the middle of the channel's range, where norm and layers have a bias; else 0
    u      (widest range / range of the channel) ^ e, e of `EXPONENTS`

The exponent has the least error of what the layers return, value and weights rounded, on rows of calibration data that
the ranges of the trial do not know; without a gain there the norm stays.
Where others than such layers read the value (a residual sum behind a norm), the layers read a norm of their own.

Source: Li et al. 2023 (RepQ-ViT, arXiv 2212.08254), equations 9 to 13. How we differ: there u makes all ranges alike,
and the weights of the layers take what that costs; the choice between exponents is that of `even`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from graphcomp.ir.graph import attribute_readers, bind, clone, fetch, set_argument, value
from graphcomp.ir.program import P
from graphcomp.ir.rewrite import after
from graphcomp.ir.run_nodes import Constants, run_batch, run_tapped
from graphcomp.ops.answers import operands_of
from graphcomp.quantization.calibrate import MseObserver
from graphcomp.quantization.even import EXPONENTS, MOST, SAMPLES
from graphcomp.quantization.in_force import Placed, Rounding
from graphcomp.quantization.norms import Moved, Norm, Reader, find_norms
from graphcomp.quantization.placement import channels_of
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.spec import QuantConfig, QuantSpec
from graphcomp.quantization.tensors import put, replace_argument

aten = torch.ops.aten

LESS = 0.8
"""Most of the squared error that may be left where channels are evened out: a smaller gain is noise."""

FAR = 0.5
"""Most of the squared error that may be left where layers are given a norm of their own: another norm takes time."""

ROWS = 512
"""Rows, evenly spaced, of what a layer reads in a trial."""


# ------------------------------------------------------------------------------------------------ what is found
@dataclass(frozen=True)
class Even:
    """What one norm is multiplied by and shifted by, (c,) float64 each: y becomes (y + shift) * factor."""

    factor: Tensor
    shift: Tensor


@dataclass(frozen=True)
class EvenNorms:
    """Even out the channels of values that norms make; see `even_norms`."""

    config: QuantConfig
    ignore: tuple[str, ...]
    batches: Sequence[Sequence[Any]]
    name: ClassVar[str] = "even out channels of norms"

    def __call__(self, program: P, /) -> P:
        """Return the program, with a note of what was evened out, and what was not, by reason."""
        found = even_norms(program.module, self.config, self.ignore, self.batches)
        return program.rewritten(found.module, found.notes()) if found.evened or found.left else program


@dataclass(frozen=True)
class EvenedNorms:
    """A graph with even channels.

    Attributes:
        evened: norm, by the node of its value -> what it is multiplied by and shifted by.
        own: norms that layers were given a copy of.
        left: norm -> why it stays as it is.
    """

    module: fx.GraphModule
    evened: Mapping[str, Even] = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    left: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(module: fx.GraphModule, chosen: Mapping[Norm, Even], left: Mapping[str, str]) -> EvenedNorms:
        """Return the result of what was chosen."""
        evened = {norm.maker.at.name: even for norm, even in chosen.items()}
        return EvenedNorms(module, evened, frozenset(n.maker.at.name for n in chosen if n.others), left)

    def notes(self) -> list[str]:
        """Say what was evened out, and what was not, by reason."""
        said = []
        if self.evened:
            shifted = sum(bool(even.shift.any()) for even in self.evened.values())
            own = f", {len(self.own)} of them by a norm of their own for the layers" if self.own else ""
            said.append(
                f"channels of {_values(len(self.evened))} that norms make were scaled to one range, {shifted} of them "
                f"shifted, too{own}; the layers behind take it back"
            )
        by_reason: dict[str, list[str]] = {}
        for name, why in self.left.items():
            by_reason.setdefault(why, []).append(name)
        return [*said, *(
            f"channels of {_values(len(names))} that norms make stay as they are ({', '.join(names[:NAMED])}): {why}"
            for why, names in by_reason.items()
        )]  # fmt: skip


NAMED = 3
"""Norms that a note names."""


def _values(count: int) -> str:
    return f"{count} value{'s'[: count != 1]}"


def asks_for_even_norms(config: QuantConfig) -> bool:
    """Whether channels behind norms are evened out by default: activations with ranges read off data."""
    return config.activations is not None and not config.activations.dynamic


# ------------------------------------------------------------------------------------------------ the pass
@torch.no_grad()
def even_norms(
    module: fx.GraphModule, config: QuantConfig, ignore: Sequence[str], batches: Sequence[Sequence[Any]]
) -> EvenedNorms:
    """Scale the channels of values that norms make to one range, where that lessens the error of the layers behind.

    Args:
        module: a captured graph without quantizers. Not changed.
        config, ignore: what will be quantized, and how.
        batches: flat inputs, in the order of the placeholders.

    Returns:
        A new module that computes the same.

    Raises:
        CalibrationError: a batch that the model does not run on.
    """
    equal, _ = clone(module)
    chosen, left = factors_behind_norms(equal, config, ignore, batches)
    readers = attribute_readers(equal)
    for norm, even in chosen.items():
        write(equal, norm, even, readers)
    equal.graph.eliminate_dead_code()
    equal.recompile()
    return EvenedNorms.of(equal, chosen, left)


@torch.no_grad()
def factors_behind_norms(
    module: fx.GraphModule, config: QuantConfig, ignore: Sequence[str], batches: Sequence[Sequence[Any]]
) -> tuple[dict[Norm, Even], dict[str, str]]:
    """Return the norms whose channels are to be evened out, with their factors and shifts; and norm -> why not.

    The arguments are those of `even_norms`.

    Raises:
        CalibrationError: a batch that the model does not run on.
    """
    norms, left = find_norms(module, config, ignore)
    if not norms or not batches:
        return {}, left
    shared = _in_force(module, norms, config, ignore)
    own = _of_own_norms(module, config, ignore) if any(norm.others for norm in norms) else shared
    moved, at = Moved(norms), {norm.maker.at: norm for norm in norms}
    seen: dict[Norm, _Seen] = {}
    for k, batch in enumerate(batches):
        half = len(batches) == 1

        def measure(node: fx.Node, found: Any, fits: bool = k % 2 == 0, half: bool = half) -> None:
            if node in at and found.numel():
                rows = found.movedim(at[node].maker.dim, -1).flatten(0, -2)
                seen.setdefault(at[node], _Seen()).add(rows, (len(rows) + 1) // 2 if half else len(rows) * fits)

        run_batch(module, batch, k, measure)
    run_tapped(module, batches[0], compute=moved.compute)
    waiting: dict[fx.Node, list[Norm]] = {}
    for norm in norms:
        if norm in moved.lost:
            left[norm.maker.at.name] = f"what {moved.lost[norm]} reads are not its channels in their order"
        elif norm in seen and seen[norm].finite:
            waiting.setdefault(norm.readers[-1].node, []).append(norm)
    read = {reader.read for norm in norms for reader in norm.readers}
    values: dict[fx.Node, Tensor] = {}
    chosen: dict[Norm, Even] = {}

    def choose(node: fx.Node, found: Any) -> None:
        if node in read:
            values[node] = found[len(found) // 2 :] if len(batches) == 1 and len(found) > 1 else found
        for norm in waiting.get(node, ()):
            even = _choose(norm, seen[norm], values, shared, own)
            if even is not None:
                chosen[norm] = even
            for reader in norm.readers:
                values.pop(reader.read, None)

    run_batch(module, batches[min(1, len(batches) - 1)], 0, choose)
    return chosen, left


# ------------------------------------------------------------------------------------------------ bits in force
def _in_force(
    module: fx.GraphModule, norms: Sequence[Norm], config: QuantConfig, ignore: Sequence[str]
) -> dict[str, Rounding]:
    """Return layer -> how the layer reads its operands."""
    placed = Placed(module, config, ignore)
    readers = [reader for norm in norms for reader in norm.readers]
    return {reader.node.name: placed.rounding(reader.node, reader.data) for reader in readers}


def _of_own_norms(module: fx.GraphModule, config: QuantConfig, ignore: Sequence[str]) -> dict[str, Rounding]:
    """Return layer -> how the layer reads its operands once layers have norms of their own where others read a value.

    A value that sums read may have more bits than the layers ask for, and a copy for the layers has not.
    """
    apart, _ = clone(module)
    norms, _ = find_norms(apart, config, ignore)
    for norm in norms:
        if norm.others:
            _copied(norm)
    return _in_force(apart, norms, config, ignore)


# ------------------------------------------------------------------------------------------------ how far
class _Seen:
    """Ranges of the channels of a value: of all rows, and of those that factors are fitted to in a trial.

    Attributes:
        every, fit: (lowest, highest), (c,) float64 each.
        rows: some of the latter rows, (r, c).
    """

    def __init__(self) -> None:
        self.every: tuple[Tensor, Tensor] | None = None
        self.fit: tuple[Tensor, Tensor] | None = None
        self.rows = torch.empty(0)

    def add(self, rows: Tensor, fit: int) -> None:
        """Add the rows of a batch, of which the first `fit` are fitted to."""
        self.every = _wider(self.every, rows)
        if fit:
            self.fit = _wider(self.fit, rows[:fit])
            more = rows[:fit][:: max(1, fit // ROWS)]
            self.rows = more if not len(self.rows) else torch.cat([self.rows, more])[: 4 * ROWS]

    def quantizer(self, spec: QuantSpec, even: Even) -> Quantizer:
        """Return a quantizer of the value, shifted and multiplied, with the range of the rows that are fitted to."""
        assert self.fit is not None
        found = make_quantizer(spec)
        if spec.observer == "minmax":
            low, high = ((end + even.shift) * even.factor for end in self.fit)
            found.set_range(low.min().float(), high.max().float())
        else:
            observer = MseObserver(spec)
            observer.observe(((self.rows + even.shift) * even.factor).to(self.rows.dtype).flatten())
            found.set_range(*observer.range())
        return found

    @property
    def finite(self) -> bool:
        """Whether all values were finite."""
        return self.every is not None and all(bool(end.isfinite().all()) for end in self.every)


def _wider(ends: tuple[Tensor, Tensor] | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    low, high = rows.amin(0).double(), rows.amax(0).double()
    return (low, high) if ends is None else (torch.minimum(ends[0], low), torch.maximum(ends[1], high))


def _evens(norm: Norm, ends: tuple[Tensor, Tensor]) -> list[Even]:
    """Return factors and shifts by ranges of channels, one for each exponent."""
    low, high = ends
    shift = -(low + high) / 2 if norm.shifts else torch.zeros_like(low)
    reach = torch.maximum(high + shift, -low - shift)
    ratio = torch.where(reach > 0, reach.max() / reach.clamp(min=torch.finfo(torch.float32).tiny), 1.0).clamp(1, MOST)
    return [Even(ratio**exponent, shift) for exponent in EXPONENTS]


def _choose(
    norm: Norm,
    seen: _Seen,
    values: Mapping[fx.Node, Tensor],
    shared: Mapping[str, Rounding],
    own: Mapping[str, Rounding],
) -> Even | None:
    """Return factors and shifts with the least error of the layers behind; None where that is with none.

    The error is that on rows that neither factors nor ranges of the trial were fitted to: a channel that spans the
    whole range is clipped where other data go further. Where the layers are given a norm of their own, they read the
    value as `own` says, else as `shared` says.
    """
    assert seen.fit is not None and seen.every is not None
    trials = [_Trial(reader, values[reader.read]) for reader in norm.readers]
    tried = _evens(norm, seen.fit)
    still = Even(torch.ones_like(tried[0].factor), torch.zeros_like(tried[0].shift))

    def error(even: Even, roundings: Mapping[str, Rounding]) -> float:
        quantizers: dict[QuantSpec, Quantizer] = {}
        total = 0.0
        for trial in trials:
            rounding = roundings[trial.reader.node.name]
            for spec in rounding.value:
                if spec not in quantizers:
                    quantizers[spec] = seen.quantizer(spec, even)
            total += trial.error(even, [quantizers[spec] for spec in rounding.value], rounding)
        return total

    errors = [error(even, own if norm.others else shared) for even in tried]
    best = min(range(len(errors)), key=errors.__getitem__)
    if errors[best] >= error(still, shared) * (FAR if norm.others else LESS):
        return None
    return _evens(norm, seen.every)[best]


class _Trial:
    """What rounding a value and a weight does to the result of a layer.

    Args:
        reader: the layer.
        x: what the layer reads.
    """

    def __init__(self, reader: Reader, x: Tensor) -> None:
        node, operands = reader.node, operands_of(reader.node)
        if operands.convolution:
            x = x[:SAMPLES]
        elif reader.held.weight.dim() == 2:
            x = x.flatten(0, -2)[:: max(1, x.shape[:-1].numel() // ROWS)]
        else:
            x = x[..., :: max(1, x.shape[-2] // ROWS), :]
        self.reader, self.x, self.weight = reader, x, reader.held.weight
        self.dim = reader.dim if operands.convolution else x.dim() - 1
        self.fixed = {**bind(node), **({operands.bias: None} if operands.bias else {})}
        if node.target is aten.addmm.default:
            self.fixed[operands.bias] = x.new_zeros(())
        self.wanted = self._result(x, self.weight)
        self.norm = float(self.wanted.double().square().sum()) or 1.0
        channels = channels_of(node) + self.wanted.dim() - value(node).dim()
        self.others = [d for d in range(self.wanted.dim()) if d != channels]

    def scaled(self, even: Even) -> Tensor:
        """Return what the layer reads, shifted and multiplied."""
        shape = [-1 if d == self.dim else 1 for d in range(self.x.dim())]
        return (self.x + even.shift.to(self.x.dtype).view(shape)) * even.factor.to(self.x.dtype).view(shape)

    def error(self, even: Even, of_value: Sequence[Quantizer], rounding: Rounding) -> float:
        """Return the relative squared error; the mean of a layer with a bias is none, as the bias takes it back."""
        kernel = columns(self.reader, self.weight, 1 / even.factor)
        kernel = rounding.of_weight(kernel)
        x = self.scaled(even)
        for quantizer in of_value:
            x = quantizer.to(x)(x)
        off = (self._result(x, kernel) - self.wanted).double()
        if self.reader.bias:
            off = off - off.mean(self.others, keepdim=True)
        return float(off.square().sum()) / self.norm

    def _result(self, x: Tensor, kernel: Tensor) -> Tensor:
        target: Any = self.reader.node.target
        found: Tensor = target(**{**self.fixed, self.reader.data: x, self.reader.weight[0]: kernel})
        return found


def columns(reader: Reader, weight: Tensor, factor: Tensor) -> Tensor:
    """Return the weight of a layer with each input multiplied by a factor, (c,) float64."""
    dim, groups = reader.weight[1], bind(reader.node).get("groups", 1)
    if groups > 1 and dim == 1:  # each group of outputs reads inputs of its own
        by = factor.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[0], -1)
        by = by.view(*by.shape, *[1] * (weight.dim() - 2))
    else:
        by = factor.view([-1 if d == dim else 1 for d in range(weight.dim())])
    return (weight.double() * by).to(weight.dtype)


# ------------------------------------------------------------------------------------------------ written
def write(module: fx.GraphModule, norm: Norm, even: Even, readers: dict[str, list[fx.Node]]) -> None:
    """Fold factors and shifts into a norm, or into a copy of the norm, and into the layers."""
    for reader in norm.readers:
        held, weight = reader.held, reader.held.weight
        if reader.bias and bool(even.shift.any()):
            name = str(bind(reader.node)[reader.bias].target)
            out, bias = operands_of(reader.node).out % weight.dim(), fetch(module, name)
            taken = columns(reader, weight.double(), even.shift).sum([d for d in range(weight.dim()) if d != out])
            put(module, name, _like(bias, bias.double() - taken))
        scaled = held.with_elements(columns(reader, weight, 1 / even.factor))
        name = str(held.source.target)
        put(module, name, _like(fetch(module, name), scaled))
    maker, values = norm.maker, Constants(module)
    copies = _copied(norm) if norm.others else {}
    for node, argument, more in ((maker.scaled, maker.scale, 0.0), (maker.at, maker.shift, even.shift)):
        if argument:
            node = copies.get(node, node)
            old = values.of(operand := bind(node)[argument])
            new = ((old.double().flatten() + more) * even.factor).view(old.shape)
            name = str(operand.target) if operand.op == "get_attr" else f"{maker.at.name}.{argument}"
            replace_argument(module, node, argument, _like(old, new), name, readers)


def _copied(norm: Norm) -> dict[fx.Node, fx.Node]:
    """Give the layers a norm of their own, and ops that move channels; return node -> copy."""
    copies: dict[fx.Node, fx.Node] = {}
    for node in dict.fromkeys((norm.maker.scaled, norm.maker.at, *norm.moves)):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: copies.get(n, n))
        copies[node] = after(node)(node.target, *args, **kwargs)
    for reader in norm.readers:
        set_argument(reader.node, reader.data, copies[reader.read])
    return copies


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.to(old.dtype), old.requires_grad)
