"""Bits of each layer in one shot, within a budget on bytes or bit operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from graphcomp.cost import CostModel, counts_of
from graphcomp.cost.bops import Bits, Bops
from graphcomp.errors import BudgetError, PlanError
from graphcomp.flows.results import Cut, bits_by_node, planned_by_name, stored_bytes
from graphcomp.pruning.allocation import Budget, limits_of
from graphcomp.quantization.mixed import Costs, Unit, bit_errors, choose_bits, options_of
from graphcomp.quantization.ptq import PostTraining
from graphcomp.system.threads import one_at_a_time

BIT_LIMITS = ("bops", "bytes")
"""Limits that bits can meet."""
TRIES = 4
"""How often the limits are tightened where layers ended with more bits than were chosen."""


def check_bit_budget(bits: tuple[int, int], budget: Budget | None) -> None:
    """Refuse a range of bits in one shot without a budget that bits can meet.

    Raises:
        PlanError: there is none, or the budget has other limits.
    """
    if budget is None:
        raise PlanError(
            f"bits={bits!r} in one shot needs a budget on bytes or bit operations",
            why="more bits are never worse, and nothing says what they may cost",
            fix=f"budget=Budget(bytes=0.15), bits={bits[1]}; or data=loader, loss=…, epochs=10, which learns them",
        )
    asked = [*budget.limits(), *(["speedup"] if budget.speedup is not None else [])]
    if others := [name for name in asked if name not in BIT_LIMITS]:
        raise PlanError(
            f"a budget on {others[0]} beside bits={bits!r} in one shot",
            why="bits are chosen within the budget, and they do not change this cost",
            fix="Budget(bytes=…) or Budget(bops=…), and sparsity=… for the units",
        )


@one_at_a_time
def choose_layer_bits(
    cut: Cut,
    options: PostTraining,
    limits: tuple[int, int],
    budget: Budget,
    batches: Sequence[Sequence[Any]],
    *,
    activations: bool,
) -> tuple[PostTraining, str]:
    """Return the options with bits for each layer, and a note that says how they were chosen.

    Args:
        cut: of the units that go, repaired or not.
        options: of quantization, at the most bits.
        limits: the fewest and the most bits.
        budget: on bytes or bit operations.
        batches: flat inputs.
        activations: whether activations have as many bits as weights.

    Raises:
        BudgetError: the fewest bits cost more.
        PlanError: the model returns no floats.
        CalibrationError: the data do not fit, or are not finite.
    """
    errors = bit_errors(cut.program, options, limits, batches, activations)
    meter = _Meter(cut, options, budget, activations)
    allowed = dict(meter.limits)
    for _ in range(TRIES):
        chosen = choose_bits(errors, meter.cost, allowed)
        found = options_of(options, chosen, activations)
        costs = meter.planned(found)
        over = {name: cost / meter.limits[name] for name, cost in costs.items() if cost > meter.limits[name]}
        if not over:
            counts = sorted(Counter(chosen.values()).items())
            said = ", ".join(f"{n} with {bits}" for bits, n in counts)
            return found, f"bits were chosen by the error that each layer makes in the outputs: layers {said}"
        allowed |= {name: allowed[name] / share for name, share in over.items()}
    name = next(iter(over))
    raise BudgetError(
        f"no choice of bits was found that meets the budget of {meter.limits[name]:,.0f} {name}",
        why=f"layers that share what they read have the bits of the other, and {costs[name]:,.0f} {name} are left",
        fix=f"a larger Budget({name}=…), or activation_bits=8",
    )


class _Meter:
    """What bits cost, of the cut model."""

    def __init__(self, cut: Cut, options: PostTraining, budget: Budget, activations: bool) -> None:
        self.plan, self.activations = cut.plan, activations
        self.counts = counts_of(cut.kept)
        self.costs = CostModel(cut.plan)
        self.limits = limits_of(self.costs, budget)
        self.bits = planned_by_name(cut.plan, options)
        self.stored = stored_bytes(cut.plan, options)

    def cost(self, chosen: Mapping[Unit, int]) -> Costs:
        """Return what a choice costs, of each limit."""
        asked = {name: bits for unit, bits in chosen.items() for name in unit.nodes}
        both = {
            name: Bits(asked[name], asked[name] if self.activations and own.activation < 32 else own.activation)
            for name, own in self.bits.items()
            if name in asked
        }
        return tuple(self._of({**self.bits, **both}).values())

    def planned(self, options: PostTraining) -> dict[str, float]:
        """Return what the options come to, by limit."""
        return self._of(planned_by_name(self.plan, options))

    def _of(self, bits: Mapping[str, Bits]) -> dict[str, float]:
        measures = {
            "bops": lambda: Bops(self.costs, bits_by_node(self.costs, bits)).layers(self.counts),
            "bytes": lambda: self.stored(self.counts, bits),
        }
        return {name: float(measures[name]()) for name in self.limits}
