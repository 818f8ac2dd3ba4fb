"""A budget that training ends within: how many units go, and which bits are lowered, so that it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, fx

from graphcomp.cost import Bits, BitsOf, CostModel, Counts
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.ir.passes import applied
from graphcomp.pruning.allocation import Budget, Meter, allocate_budget
from graphcomp.pruning.evidence import Scores
from graphcomp.quantization.fold_scales import planning
from graphcomp.quantization.integer_bytes import StoredBytes
from graphcomp.quantization.sites import Site
from graphcomp.training.session import Session, operands

BY_COST = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Powers of a unit's cost that its score is divided by, until a fixed number of units is cheap enough."""

BISECTIONS = 5
"""From there towards the lowest power that is enough."""


class Target:
    """A budget of a prepared module.

    Args:
        session: how the module was prepared.
        budget: the limits, those on bit operations and bytes with the bits that layers will have.
        groups: of `session.quantized`, whose units may go.
        sites: the quantizers whose bits may be lowered; vectors of bits are in their order.
        low: (l,) the fewest bits of each.
    """

    def __init__(
        self, session: Session, budget: Budget, groups: Sequence[ChannelGroup], sites: Sequence[Site], low: Tensor
    ) -> None:
        self.plan, self.budget, self.groups = session.plan, budget, tuple(groups)
        in_floats = {group.name: group for group in self.plan.groups}
        self.in_floats = {group: in_floats[group.name] for group in groups}
        self.costs = CostModel(self.plan)
        self.stored = None
        if budget.bytes is not None and session.bits is not None:
            program = applied(session.quantized.captured, *planning())
            assert program.lowered is not None
            self.stored = StoredBytes(self.plan, program.module, program.lowered.layers)
        self.low = [round(bits) for bits in low.tolist()]
        at = {site.name: k for k, site in enumerate(sites)}
        in_graph = {op.node.name: op.node for op in self.costs.operations}
        self._operands = {  # op -> positions of the quantizer of its weight, and of those of what it reads
            in_graph[name]: (at.get(weight), [at[own] for own in read if own in at])
            for name, (weight, read) in operands(session).items()
            if name in in_graph
        }

    @property
    def of_bits(self) -> bool:
        """Whether fewer bits cost less."""
        return self.budget.bops is not None or self.budget.bytes is not None

    def units(self, scores: Scores, kept: Kept, bits: Sequence[int], round_to: int, most: float) -> Kept:
        """What is left when as many more units are gone as the budget takes at `bits`; arguments as of `allocate`.
        Scores count as they are.

        Raises:
            BudgetError: the smallest network costs more.
        """
        found = allocate_budget(
            self.plan,
            [self.in_floats[group] for group in self.groups],
            {self.in_floats[group]: scores[group] for group in self.groups},
            self.budget,
            normalize="none",
            round_to=round_to,
            max_group_sparsity=most,
            already={self.in_floats[group]: units for group, units in kept.items()},
            bits=self._bits_of(bits),
            stored=self.stored_at(bits),
        )
        return {group: found[own] for group, own in self.in_floats.items()}

    def excess(self, kept: Kept, bits: Sequence[int]) -> float:
        """By which fraction of its limit the cost is above it, for the limit that is missed most."""
        own = self._bits_of(bits), self.stored_at(bits)
        meter = Meter(self.costs, self.budget, list(self.in_floats.values()), *own)
        return meter.excess([len(kept[group]) for group in self.groups])

    def cheaper(self, scores: Scores, kept: Kept, power: float) -> Scores:
        """The scores of units divided by a power of what a unit of their group costs, at the fewest bits."""
        whole = self.excess(kept, self.low)
        found = {}
        for group in self.groups:
            one_less = {**kept, group: kept[group][:-1]}
            saved = whole - self.excess(one_less, self.low)
            found[group] = scores[group] / max(saved, 1e-9) ** power
        return found

    def lowered(self, kept: Kept, bits: Sequence[int]) -> list[int]:
        """`bits`, lowered one at a time until the budget holds or all have the fewest: first where a bit saves most for
        what it costs. Without it the error of rounding grows by 3 · 4^-bits of the range, squared; so a layer with a
        quarter of the multiply-accumulates keeps a bit more."""
        found, saves = list(bits), self.saves(kept)
        while self.excess(kept, found) > 0:
            above = [k for k, own in enumerate(found) if own > self.low[k]]
            if not above:
                break
            found[max(above, key=lambda k: (saves[k] * 4 ** found[k], found[k]))] -= 1
        return found

    def saves(self, kept: Kept) -> list[int]:
        """For each quantizer the multiply-accumulates that read what it quantizes."""
        counts = {self.in_floats[group].factor: len(units) for group, units in kept.items()}
        macs, found = self.costs.macs_by_op(counts), [0] * len(self.low)
        for node, (weight, read) in self._operands.items():
            for k in (*read, *([] if weight is None else [weight])):
                found[k] += macs.get(node, 0)
        return found

    def stored_at(self, bits: Sequence[int]) -> Callable[[Counts], int] | None:
        """Bytes of the integer graph at `bits`, by the number of units that stay."""
        stored = self.stored
        if stored is None:
            return None
        by_op = {
            node.name: Bits(32 if weight is None else bits[weight]) for node, (weight, _) in self._operands.items()
        }
        return lambda counts: stored(counts, by_op)

    def _bits_of(self, bits: Sequence[int]) -> BitsOf:
        found: dict[str | fx.Node, Bits] = {}
        for node, (weight, read) in self._operands.items():
            of_weight = 32 if weight is None else bits[weight]
            found[node] = Bits(of_weight, max((bits[k] for k in read), default=32))
        return found
