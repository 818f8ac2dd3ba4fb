"""What compression did to a model, as text and plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graphcomp.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup, FrozenAxis, Kept


@dataclass(frozen=True)
class Change:
    """One cost before and after."""

    before: float
    after: float

    def to_dict(self) -> dict[str, float]:
        """As plain data."""
        return {"before": self.before, "after": self.after}

    @property
    def ratio(self) -> float:
        """after / before."""
        return self.after / self.before if self.before else 1.0


@dataclass(frozen=True)
class LayerReport:
    """One layer: its width and the bits it is stored and fed with (32: not quantized)."""

    name: str
    units_kept: int
    units_total: int
    weight_bits: int = 32
    activation_bits: int = 32

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "units": {"kept": self.units_kept, "total": self.units_total},
        }


@dataclass(frozen=True)
class Report:
    """What compression did to a model.

    `bops` counts 32 x 32 bits per multiply-accumulate where nothing is quantized; `bytes` are those of the stored
    tensors; `verified` maps each law that was checked to its largest relative error.
    """

    params: Change
    macs: Change
    bops: Change
    bytes: Change
    units_removed: int
    units_total: int
    layers: tuple[LayerReport, ...]
    groups: tuple[dict[str, Any], ...]
    frozen: tuple[FrozenAxis, ...]
    unknown_ops: tuple[str, ...]
    verified: Mapping[str, float]
    latency_ms: Change | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def sparsity(self) -> float:
        """Achieved: removed units over all units of the groups that were up for pruning."""
        return self.units_removed / max(self.units_total, 1)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able data."""
        return {
            "params": self.params.to_dict(),
            "macs": self.macs.to_dict(),
            "bops": self.bops.to_dict(),
            "bytes": self.bytes.to_dict(),
            "latency_ms": self.latency_ms.to_dict() if self.latency_ms else None,
            "sparsity": self.sparsity,
            "units": {"removed": self.units_removed, "total": self.units_total},
            "layers": [layer.to_dict() for layer in self.layers],
            "groups": list(self.groups),
            "frozen": [frozen_dict(f) for f in self.frozen],
            "unknown_ops": list(self.unknown_ops),
            "verified": dict(self.verified),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [
            f"{name:<10} {change.before:>16,.0f} -> {change.after:>16,.0f}   ({change.ratio:.1%})"
            for name, change in (("params", self.params), ("macs", self.macs), ("bytes", self.bytes))
        ]
        if self.latency_ms:
            before, after = self.latency_ms.before, self.latency_ms.after
            rows.append(f"{'latency':<10} {before:>13.3f} ms -> {after:>13.3f} ms   ({self.latency_ms.ratio:.1%})")
        rows.append(f"{'units':<10} {self.units_removed} of {self.units_total} removed ({self.sparsity:.1%})")
        rows += [f"verified   {law}: largest relative error {error:.1e}" for law, error in self.verified.items()]
        return "\n".join([*rows, *(f"note       {note}" for note in self.notes)])


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
    }


def layers(analysis: Analysis, kept: Mapping[str, Mapping[int, Any]]) -> tuple[LayerReport, ...]:
    """Each weight with two dims or more, and how many of its output units stay.

    Args:
        analysis: of the model before.
        kept: tensor name -> dim -> kept indices.
    """
    consumed = {(m.name, m.dim) for group in analysis.groups for m in group.members if m.consumes}
    rows = []
    for name, parameter in analysis.model.named_parameters():
        if parameter.dim() < 2:
            continue
        dim = 1 if (name, 0) in consumed and (name, 1) not in consumed else 0
        total = parameter.shape[dim]
        cut = kept.get(name, {})
        rows.append(LayerReport(name.removesuffix(".weight"), len(cut[dim]) if dim in cut else total, total))
    return tuple(rows)
