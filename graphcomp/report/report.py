"""What compression did to a model, as text and plain data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from graphcomp.arguments import check_path
from graphcomp.cost import FLOAT_BITS, CostModel
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.axis import Reason
from graphcomp.coupling.groups import ChannelGroup, FrozenAxis, Kept


@dataclass(frozen=True)
class Change:
    """One cost before and after."""

    before: float
    after: float

    def to_dict(self) -> dict[str, float]:
        """As plain data."""
        return {"before": self.before, "after": self.after}

    @classmethod
    def from_dict(cls, data: Mapping[str, float]) -> Change:
        """What `to_dict` gave."""
        return cls(data["before"], data["after"])

    @property
    def ratio(self) -> float:
        """after / before."""
        return self.after / self.before if self.before else 1.0


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: of the weight, without ".weight".
        units_kept, units_total: width.
        weight_bits, activation_bits: the weight is stored with, and multiplied by (32: not quantized); where channels
            have bits of their own, `weight_bits` is the mean, a float.
        params: scalars of the weight.
        macs: multiply-accumulates of all calls of the layer on the example inputs; None: none are counted.
    """

    name: str
    units_kept: int
    units_total: int
    weight_bits: float = FLOAT_BITS
    activation_bits: int = FLOAT_BITS
    params: Change | None = None
    macs: Change | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "units": {"kept": self.units_kept, "total": self.units_total},
            "params": self.params.to_dict() if self.params else None,
            "macs": self.macs.to_dict() if self.macs else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerReport:
        """What `to_dict` gave."""
        units = data["units"]
        params, macs = (Change.from_dict(data[name]) if data.get(name) else None for name in ("params", "macs"))
        bits = data["weight_bits"], data["activation_bits"]
        return cls(data["name"], units["kept"], units["total"], *bits, params, macs)


@dataclass(frozen=True)
class Report:
    """What compression did to a model.

    Attributes:
        model: name of the class of the model.
        params, macs, bops, bytes, latency_ms: as `graphcomp.cost` defines them.
        bops_attention: bit operations of products of two activations, which `bops` leaves out.
        verified: each law that was checked -> its largest relative error.
        unchecked: each law, or part of one, that could not be checked -> why: nothing in the outputs that proves
            anything, inputs that the model refuses.
        sizes: storage convention (see `graphcomp.cost.conventions`) -> bytes of the integer weights; empty without any.
        quantization_errors: layer -> relative error that quantization makes in its output.
        quantization_repairs: layer -> the same on the rows that the layer was set on, of quantized inputs, with the
            weights rounded as they are and with those that least squares gave, rounded.
        reconstructions: block whose rounding was learned -> relative error of its output on calibration samples that
            were held out, with the rounding it began with and with the learned one.
        repairs: layer -> relative error of its output on the calibration rows, ||y - t|| / ||t||, with the sliced
            weights and with those that least squares gave; t is what the layer has to give so that the layers behind
            it get what they got before the cut.
        kernels: of the last ONNX file that was exported, what onnxruntime runs (`KernelProof.to_dict()`): integer and
            float kernels, and each layer that stays float, with the reason; with "speed", how fast the file is beside
            its float form; None: not exported.
    """

    params: Change
    macs: Change
    bops: Change
    bops_attention: Change
    bytes: Change
    units_removed: int
    units_total: int
    layers: tuple[LayerReport, ...]
    groups: tuple[dict[str, Any], ...]
    frozen: tuple[FrozenAxis, ...]
    unknown_ops: tuple[str, ...]
    verified: Mapping[str, float]
    unchecked: Mapping[str, str] = field(default_factory=dict)
    latency_ms: Change | None = None
    sizes: Mapping[str, float] = field(default_factory=dict)
    quantization_errors: Mapping[str, float] = field(default_factory=dict)
    quantization_repairs: Mapping[str, Change] = field(default_factory=dict)
    reconstructions: Mapping[str, Change] = field(default_factory=dict)
    repairs: Mapping[str, Change] = field(default_factory=dict)
    kernels: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = field(default=())
    model: str = ""

    @property
    def sparsity(self) -> float:
        """Achieved: removed units over all units of the groups that were up for pruning."""
        return self.units_removed / max(self.units_total, 1)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able data."""
        return {
            "model": self.model,
            "params": self.params.to_dict(),
            "macs": self.macs.to_dict(),
            "bops": self.bops.to_dict(),
            "bops_attention": self.bops_attention.to_dict(),
            "bytes": self.bytes.to_dict(),
            "latency_ms": self.latency_ms.to_dict() if self.latency_ms else None,
            "sizes": dict(self.sizes),
            "quantization_errors": dict(self.quantization_errors),
            "quantization_repairs": {name: change.to_dict() for name, change in self.quantization_repairs.items()},
            "reconstructions": {name: change.to_dict() for name, change in self.reconstructions.items()},
            "repairs": {name: change.to_dict() for name, change in self.repairs.items()},
            "kernels": dict(self.kernels) if self.kernels is not None else None,
            "sparsity": self.sparsity,
            "units": {"removed": self.units_removed, "total": self.units_total},
            "layers": [layer.to_dict() for layer in self.layers],
            "groups": list(self.groups),
            "frozen": [frozen_dict(f) for f in self.frozen],
            "unknown_ops": list(self.unknown_ops),
            "verified": dict(self.verified),
            "unchecked": dict(self.unchecked),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """What `to_dict` gave, also where JSON made null of NaN.

        Raises:
            KeyError: an entry is missing.
        """
        costs = ("params", "macs", "bops", "bops_attention", "bytes")
        found: dict[str, Any] = {name: Change.from_dict(data[name]) for name in costs}
        found |= {name: _numbers(data[name]) for name in ("verified", "sizes", "quantization_errors")}
        return cls(
            **found,
            units_removed=data["units"]["removed"],
            units_total=data["units"]["total"],
            layers=tuple(LayerReport.from_dict(layer) for layer in data["layers"]),
            groups=tuple(data["groups"]),
            frozen=tuple(frozen_axis(axis) for axis in data["frozen"]),
            unknown_ops=tuple(data["unknown_ops"]),
            unchecked=dict(data.get("unchecked", {})),
            latency_ms=None if data["latency_ms"] is None else Change.from_dict(data["latency_ms"]),
            quantization_repairs=_changes(data.get("quantization_repairs", {})),
            reconstructions=_changes(data.get("reconstructions", {})),
            repairs=_changes(data.get("repairs", {})),
            kernels=data["kernels"],
            notes=tuple(data["notes"]),
            model=data.get("model", ""),
        )

    def to_html(
        self,
        path: str | Path,
        *,
        metrics: Mapping[str, tuple[float, float]] | None = None,
        run: str | Path | None = None,
    ) -> None:
        """Write the report as one HTML file, which needs no network and no other file.

        Args:
            path: of the file.
            metrics: measures of quality for the headline, before and after: {"accuracy": (92.6, 92.2)}.
            run: folder of a training run (`Training.folder`), whose curves are drawn.

        Raises:
            PlanError: `path` or `run` is no path, or `metrics` is not pairs of numbers by name.
            CheckpointError: the folder of the run holds no metrics.
            ExportError: the file cannot be written.
        """
        from graphcomp.report.html import write_page
        from graphcomp.report.plot import lines_of_run

        if run is not None:
            check_path("run", run)
        write_page(self, path, metrics, () if run is None else lines_of_run(Path(run)))

    def _repr_html_(self) -> str:
        """Return the report in a frame, which notebooks show."""
        from graphcomp.report.html import framed

        return framed(self)

    def __str__(self) -> str:
        costs = {"params": self.params, "macs": self.macs, "bops": self.bops, "bytes": self.bytes}
        if self.bops_attention.before:
            costs["attention bops"] = self.bops_attention
        rows = [_row(name, f"{_change(change, '20,.0f')}") for name, change in costs.items()]
        if self.latency_ms:
            rows.append(_row("latency, ms", _change(self.latency_ms, "20,.3f")))
        rows.append(_row("units", f"{self.units_removed} of {self.units_total} removed ({self.sparsity:.1%})"))
        rows += [_row("bits", text) for text in _bits_text(self.layers)]
        if self.sizes:
            sizes = ", ".join(f"{name} {size:,.0f}" for name, size in self.sizes.items())
            rows.append(_row("weights, bytes", sizes))
        if self.quantization_errors:
            worst, error = max(self.quantization_errors.items(), key=lambda item: item[1])
            rows.append(_row("quantization", f"largest relative error {error:.1e}, of {worst}"))
        repaired = (("rounding repair", self.quantization_repairs, "layers"), ("repair", self.repairs, "layers"),
                    ("reconstruction", self.reconstructions, "blocks"))  # fmt: skip
        for name, changes, of in repaired:
            if changes:
                before, after = (median(getattr(c, end) for c in changes.values()) for end in ("before", "after"))
                rows.append(_row(name, f"median relative error of {len(changes)} {of} {before:.3f} -> {after:.3f}"))
        rows += [_row("kernels", text) for text in _kernels_text(self.kernels)]
        rows += [_row("verified", f"{law}: largest relative error {error:.1e}") for law, error in self.verified.items()]
        rows += [_row("not checked", f"{law}: {why}") for law, why in self.unchecked.items()]
        return "\n".join([*rows, *(_row("note", note) for note in self.notes)])


def _changes(data: Mapping[str, Any]) -> dict[str, Change]:
    return {name: Change.from_dict(change) for name, change in data.items()}


def _row(name: str, text: str) -> str:
    return f"{name:<15} {text}"


def _change(change: Change, number: str) -> str:
    return f"{change.before:>{number}} -> {change.after:>{number}}   ({change.ratio:.1%})"


def _bits_text(layers: Sequence[LayerReport]) -> list[str]:
    """How many layers have which bits; nothing where all are float."""
    own = [layer for layer in layers if isinstance(layer.weight_bits, float)]
    found = Counter((layer.weight_bits, layer.activation_bits) for layer in layers if layer not in own)
    if set(found) <= {(FLOAT_BITS, FLOAT_BITS)} and not own:
        return []
    said = [f"{w} for weights, {a} for activations: {n} of {len(layers)} layers" for (w, a), n in sorted(found.items())]
    if own:
        means, read = ([getattr(layer, name) for layer in own] for name in ("weight_bits", "activation_bits"))
        span = f"{min(means):.1f} to {max(means):.1f} for weights on average"
        layers_of = f"{len(own)} of {len(layers)} layers, whose channels have bits of their own"
        said.append(f"{span}, {min(read)} to {max(read)} for activations: {layers_of}")
    return said


def _kernels_text(kernels: Mapping[str, Any] | None) -> list[str]:
    """What an exported file runs, and each layer that stays float."""
    if kernels is None:
        return []
    counts = ", ".join(f"{count} {name}" for kind in ("integer", "float") for name, count in kernels[kind].items())
    left = [f"{layer} stays float: {why}" for kind in ("stayed_float", "unquantized") for layer, why in kernels[kind]]
    speed = [kernels["speed"]["line"]] if "speed" in kernels else []
    return [f"{kernels['share']:.0%} of convolutions and products on integers ({counts or 'none'})", *speed, *left]


def _numbers(data: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if number is None else number for name, number in data.items()}


def frozen_axis(data: Mapping[str, Any]) -> FrozenAxis:
    """What `frozen_dict` gave; the op is part of the reason's text."""
    name, _, dim = data["axis"].rpartition(", dim ")
    return FrozenAxis(name, int(dim), data["indices"], Reason(data["reason"], source=data["source"]))


def frozen_dict(frozen: FrozenAxis) -> dict[str, Any]:
    """A frozen axis as plain data."""
    return {
        "axis": f"{frozen.name}, dim {frozen.dim}",
        "indices": frozen.indices,
        "reason": str(frozen.reason),
        "source": frozen.reason.source,
    }


def group_dict(group: ChannelGroup, kept: Kept) -> dict[str, Any]:
    """A group as plain data."""
    return {
        "name": group.name,
        "role": group.role,
        "units": {"kept": len(kept[group]) if group in kept else group.size, "total": group.size},
        "members": [f"{m.name}[{m.dim}]" for m in group.members],
        "consumers": [f"{m.name}[{m.dim}]" for m in group.consumers],
    }


def layers(
    analysis: Analysis,
    kept: Mapping[str, Mapping[int, Any]],
    costs: CostModel,
    macs: Mapping[str, int],
    gone: Collection[str] = (),
) -> tuple[LayerReport, ...]:
    """Each weight of two dims or more that a layer multiplies with or looks up, and how many of its units stay.

    Args:
        analysis: of the model before.
        kept: tensor name -> dim -> kept indices.
        costs: of the model before.
        macs: of each layer after (`CostModel.macs_by_layer`).
        gone: layers that are left out as a whole.
    """
    consumed = {(m.name, m.dim) for group in analysis.groups for m in group.members if m.consumes}
    before = costs.macs_by_layer()
    rows = []
    for name, parameter in analysis.model.named_parameters():
        layer = name.removesuffix(".weight")
        if parameter.dim() < 2 or layer not in costs.weights:
            continue
        dim = 1 if (name, 0) in consumed and (name, 1) not in consumed else 0
        lengths = {d: len(indices) for d, indices in kept.get(name, {}).items()}
        left = 0 if layer in gone else math.prod(lengths.get(d, n) for d, n in enumerate(parameter.shape))
        row = LayerReport(
            layer,
            0 if layer in gone else lengths.get(dim, parameter.shape[dim]),
            parameter.shape[dim],
            params=Change(parameter.numel(), left),
            macs=Change(before[layer], macs.get(layer, 0)) if layer in before else None,
        )
        rows.append(row)
    return tuple(rows)
