"""What a plan costs, and the plan within the budget that a plan is repaired to.

    bops     multiply-accumulates x mean bits of the channels that stay x bits of what the layer reads
    bytes    of each channel that stays: its elements x its bits, 4 bits that say how many, and a step of 32 bits
    macs, params   those of the units that stay

Repair lowers, while bits cost too much, the channel of least importance per bit by one bit; then, with all channels at
the fewest bits or where bits are not what costs, the unit of least worth goes. A plan within the budget stays as is.

Source: AJPQ (Tang, Wei and Li 2020, arXiv 2011.06231), reconstructed; the order of lowering is a sort, as importance
per bit grows with every bit that a channel loses.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from graphcomp.cost import CostModel
from graphcomp.cost.bops import FLOAT_BITS
from graphcomp.cost.conventions import BITS_FIELD, STEP_BITS
from graphcomp.errors import BudgetError
from graphcomp.methods.ajpq.plan import ChannelPlan, Layout
from graphcomp.methods.sizes import bytes_within
from graphcomp.pruning.allocation import Budget, limits_of
from graphcomp.training.prepared import Prepared
from graphcomp.training.session import operands

OF_BITS = ("bops", "bytes")
"""Limits that fewer bits meet."""


class Meter:
    """Costs of plans, by the limits of a budget.

    Attributes:
        limits: name -> limit, in the units of the cost; bytes are those of the codes with what each channel says.
    """

    def __init__(self, ready: Prepared, layout: Layout, budget: Budget, low: int) -> None:
        session = ready.session
        self.layout, self.low = layout, low
        self.costs = CostModel(session.plan)
        by_name = {group.name: group.factor for group in session.plan.groups}
        self._factors = [by_name[group.name] for group in layout.groups]
        total = sum(torch.Size(shape).numel() for shape in layout.shapes)
        self.limits = dict(limits_of(self.costs, budget))
        if budget.bytes is not None:
            self.limits["bytes"] = bytes_within(budget, total)
        bits = {site.name: float(own.bits) for site, own in ready.quantizers()}
        at = {site.name: k for k, site in enumerate(layout.sites)}
        nodes = {op.node.name: op.node for op in self.costs.operations if op.kind != "attention"}
        self._planned: list[list[tuple[fx.Node, float]]] = [[] for _ in layout.sites]  # op, bits of what the op reads
        self._others: list[tuple[fx.Node, float]] = []  # op, bit operations of a multiply-accumulate
        known = operands(session)
        for name, node in nodes.items():
            weight, read = known.get(name, ("", []))
            of_data = round(max((bits[own] for own in read), default=FLOAT_BITS))
            if weight in at:
                self._planned[at[weight]].append((node, of_data))
            else:
                self._others.append((node, of_data * round(bits.get(weight, FLOAT_BITS))))

    def cost(self, plan: ChannelPlan) -> dict[str, float]:
        """Return what a plan costs, by limit."""
        counts = {factor: int(own.sum()) for factor, own in zip(self._factors, plan.left, strict=True)}
        found: dict[str, float] = {}
        if "macs" in self.limits:
            found["macs"] = self.costs.macs(counts)
        if "params" in self.limits:
            found["params"] = self.costs.params(counts)
        sums = [int(own.sum()) for own in plan.bits]
        per_bit, fixed = self._per_bit(plan.left)
        for name in found.keys() ^ self.limits.keys():
            found[name] = fixed[name] + sum(a * b for a, b in zip(per_bit[name], sums, strict=True))
        return {name: found[name] for name in self.limits}

    def _per_bit(self, left: Sequence[Tensor]) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Return, by limit that bits meet, what one bit of a channel of each weight costs, and what all else costs."""
        per_bit, fixed = {}, {}
        channels = self.layout.channels(left)
        if "bops" in self.limits:
            counts = {factor: int(own.sum()) for factor, own in zip(self._factors, left, strict=True)}
            macs = self.costs.macs_by_op(counts)
            per_bit["bops"] = [
                sum(macs[node] * read for node, read in own) / max(int(stays.sum()), 1)
                for own, (stays, _) in zip(self._planned, channels, strict=True)
            ]
            fixed["bops"] = float(sum(macs[node] * per_mac for node, per_mac in self._others))
        if "bytes" in self.limits:
            per_bit["bytes"] = [elements / 8 for _, elements in channels]
            fixed["bytes"] = sum(int(stays.sum()) for stays, _ in channels) * (BITS_FIELD + STEP_BITS) / 8
        return per_bit, fixed

    def holds(self, plan: ChannelPlan) -> bool:
        """Whether all limits hold."""
        return not self._over(self.cost(plan))

    def excess(self, plan: ChannelPlan) -> float:
        """By which fraction of its limit the cost is above it, for the limit that is missed most."""
        return max(cost / self.limits[name] - 1 for name, cost in self.cost(plan).items())

    def _over(self, costs: Mapping[str, float]) -> dict[str, float]:
        # sums of floats: a millionth of a unit is rounding, and far below what a channel costs
        return {name: cost - self.limits[name] for name, cost in costs.items() if cost > self.limits[name] + 1e-6}

    # ------------------------------------------------------------------------------------------ repair
    def repaired(self, plan: ChannelPlan) -> ChannelPlan:
        """Return the plan within the budget; the same plan where it is.

        Raises:
            BudgetError: the fewest bits of the fewest units cost more.
        """
        over = self._over(self.cost(plan))
        if over.keys() & set(OF_BITS):
            plan = self._lowered(plan, over)
        if self.holds(plan):
            return plan
        return self._without_units(plan)

    def _lowered(self, plan: ChannelPlan, over: Mapping[str, float]) -> ChannelPlan:
        """Lower bits, least importance per bit first, until the limits hold or all channels have the fewest."""
        per_bit, _ = self._per_bit(plan.left)
        bits = torch.cat(plan.bits)
        importance = torch.cat(self.layout.importance)
        of_weight = torch.arange(len(plan.bits)).repeat_interleave(torch.tensor([len(own) for own in plan.bits]))
        above = (bits - self.low).clamp(min=0)
        channel = torch.arange(len(bits)).repeat_interleave(above)
        first = above.cumsum(0) - above
        level = bits[channel] - (torch.arange(len(channel)) - first[channel])  # bits that the channel has before
        order = (importance[channel] / level).argsort(stable=True)  # levels of a channel are in falling order
        needed = 0
        for name in over.keys() & set(OF_BITS):
            saved = torch.tensor(per_bit[name], dtype=torch.float64)[of_weight[channel[order]]].cumsum(0)
            needed = max(needed, int((saved < over[name]).sum()) + 1)
        lowered = channel[order[:needed]]
        found = bits - torch.zeros_like(bits).index_add_(0, lowered, torch.ones_like(lowered))
        return ChannelPlan(plan.left, torch.split(found, [len(own) for own in plan.bits]))

    def _without_units(self, plan: ChannelPlan) -> ChannelPlan:
        """Take units out, least worth first, until the limits hold."""
        blocks = self._blocks(plan)

        def after(count: int) -> ChannelPlan:
            left = [own.clone() for own in plan.left]
            for _, k, units in blocks[:count]:
                left[k][units] = False
            stays = self.layout.channels(left)
            bits = [own.where(alive, 0) for own, (alive, _) in zip(plan.bits, stays, strict=True)]
            return ChannelPlan(tuple(left), tuple(bits))

        count = bisect_left(range(len(blocks) + 1), True, key=lambda n: self.holds(after(n)))
        if count > len(blocks):
            raise self._out_of_reach(self.cost(after(len(blocks))))
        return after(count)

    def _blocks(self, plan: ChannelPlan) -> list[tuple[float, int, Tensor]]:
        """Return what can go of each group, (mean worth, group, units), in the order in which units go."""
        found = []
        for k, (left, step) in enumerate(zip(plan.left, self.layout.steps, strict=True)):
            units = left.nonzero().flatten()
            units = units[self.layout.worth[k][units].argsort(stable=True)]
            while len(units) > step or len(units) % step:
                count = len(units) % step or step
                if len(units) - count < 1:
                    break
                found.append((float(self.layout.worth[k][units[:count]].mean()), k, units[:count]))
                units = units[count:]
        return sorted(found, key=lambda block: block[:2])

    def _out_of_reach(self, costs: Mapping[str, float]) -> BudgetError:
        name = next(iter(self._over(costs)))
        more = f"Budget({name}={costs[name] * 1.05:.0f}), or fewer bits" + ", or without sparsity=0" * (
            not self.layout.groups
        )
        return BudgetError(
            f"no plan meets the budget of {self.limits[name]:,.0f} {name}",
            why=f"with the fewest bits and units there are {costs[name]:,.0f}",
            fix=more,
        )
