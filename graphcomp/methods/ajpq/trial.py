"""A plan on a prepared module: cut, repaired, rounded, norms re-estimated. The module is as before in between.

units       masked, and the layers behind them repaired by least squares (`graphcomp.pruning.repair`)
steps       d_c = argmin_d ||W_c - Q_d(W_c)||^2 of 40 values up to max|W_c| / L, with L = 2^(b_c - 1) - 1
norms       running statistics are those of the calibration data, with quantizers on
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.ir.graph import all_tensors, bind, clone, fetch, set_argument
from graphcomp.ir.module import keeps_statistics, trains
from graphcomp.ir.passes import applied
from graphcomp.ir.preserve import own_inputs
from graphcomp.ir.run_nodes import Run
from graphcomp.methods.ajpq.plan import ChannelPlan, Layout
from graphcomp.pruning.repair import layer_influences, repair_cut, within_memory
from graphcomp.pruning.slice import SliceGroups, by_factor
from graphcomp.quantization.quantizers.mixed import MixedQuantizer
from graphcomp.training.prepared import Prepared

STEPS = 40
"""Steps of which each channel takes the best."""


ROWS = 4096
"""A layer is repaired on at most so many rows, or ten for each feature where that is more; of hundreds of plans."""


@torch.no_grad()
def channel_steps(weight: Tensor, widths: Tensor, dim: int) -> Tensor:
    """Return the step of each channel with the least squared error, (c,) float64; 1 for a channel of zeros.

    Args:
        weight: any shape.
        widths: (c,) bits of each index of `dim`, 2 at least.
    """
    rows = weight.detach().double().movedim(dim, 0).flatten(1)
    most = (2.0 ** (widths.double() - 1) - 1)[:, None].to(rows.device)
    widest = rows.abs().amax(1, keepdim=True) / most
    best, least = torch.ones_like(widest), torch.full_like(widest, float("inf"))
    for k in range(STEPS, 0, -1):
        step = torch.where(widest > 0, widest * k / STEPS, 1.0)
        error = (rows - (rows / step).round().clamp(-most, most) * step).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best.flatten()


class Trial:
    """Puts plans on a prepared module, each on the module as it was at first.

    Args:
        ready: in eval mode.
        layout: of `ready`.
        rows: flat inputs of the graph, that plans are repaired on.
        repair: whether layers behind units that go are repaired; norms are re-estimated in either case.
    """

    def __init__(self, ready: Prepared, layout: Layout, rows: Sequence[Sequence[Any]], *, repair: bool) -> None:
        self.ready, self.layout, self.repair = ready, layout, repair
        self.rows = within_memory(ready.session.plan.captured.module, rows)
        self._before = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        plan = ready.session.plan
        by_name = {group.name: group for group in plan.groups}
        self._groups = [by_name[group.name] for group in layout.groups]
        self._influence = layer_influences(plan, self.rows) if repair and layout.groups else None
        self._norms = _Norms(ready)

    def _tensors(self) -> dict[str, Tensor]:
        return dict((*self.ready.named_parameters(), *self.ready.named_buffers()))

    @torch.no_grad()
    def restore(self) -> None:
        """Let the module be as it was at first."""
        for name, tensor in self._tensors().items():
            tensor.copy_(self._before[name])

    @torch.no_grad()
    def put(self, plan: ChannelPlan) -> None:
        """Let the module be as a plan says."""
        self.restore()
        ready = self.ready
        if self._influence is not None:
            self._repair(plan)
        ready.keep(plan.kept(self.layout.groups))
        for site, bits in zip(self.layout.sites, plan.bits, strict=True):
            quantizer = ready.get_submodule(site.name)
            assert isinstance(quantizer, MixedQuantizer) and site.dim is not None
            widths = torch.where(bits > 0, bits, quantizer.spec.bits).to(quantizer.widths.device)
            quantizer.set_widths(widths)
            steps = channel_steps(ready.get_parameter(site.parameter), widths.cpu(), site.dim)
            quantizer.scale.copy_(steps)
            quantizer.project()
        self._norms.estimate(self.rows)

    def _repair(self, plan: ChannelPlan) -> None:
        """Move weights of the layers behind units that go, so that the layers give what they gave."""
        whole = self.ready.session.plan
        kept = plan.kept(self._groups)
        kept = {group: units for group, units in kept.items() if len(units) < group.size}
        if not by_factor(kept):
            return
        small = applied(whole.captured, SliceGroups(whole.coupling, kept)).module
        found = repair_cut(whole, kept, small, self.rows, influence=self._influence, rows=ROWS)
        values = dict(all_tensors(found.plan.captured.module))
        for name in found.changed:
            fetch(self.ready, name).copy_(values[name])


class _Norms:
    """Running statistics of batch norms, from a run over data; norms that the user froze stay as they are."""

    def __init__(self, ready: Prepared) -> None:
        self.graph, new = clone(ready)  # shares parameters and statistics
        self.statistics: dict[str, Tensor] = {}
        for node in new.values():
            if not keeps_statistics(node) or not trains(node) or ready.norms_frozen:
                continue
            own = bind(node)
            set_argument(node, "training", True)
            set_argument(node, "momentum", 1.0)
            for which in ("running_mean", "running_var"):
                source = own[which]
                assert isinstance(source, fx.Node)
                self.statistics[str(source.target)] = fetch(self.graph, str(source.target))
        self.graph.recompile()

    @torch.no_grad()
    def estimate(self, rows: Sequence[Sequence[Any]]) -> None:
        """Set the statistics to those of the rows: the variance within batches and of the means of batches."""
        if not self.statistics:
            return
        before = {name: own.clone() for name, own in self.statistics.items()}
        seen: dict[str, list[Tensor]] = {name: [] for name in self.statistics}
        for flat in rows:
            Run(self.graph, own_inputs(self.graph, flat)).finish()  # the buffers move
            for name, own in self.statistics.items():
                seen[name].append(own.double().clone())
        for name, own in self.statistics.items():
            values = torch.stack(seen[name])
            found = values.mean(0)
            means = seen.get(name.removesuffix("running_var") + "running_mean")
            if name.endswith("running_var") and means is not None:
                found = found + torch.stack(means).var(0, unbiased=False)
            own.copy_(torch.where(found.isfinite(), found.to(own.dtype), before[name]))
