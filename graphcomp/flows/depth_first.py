"""Blocks first, then units, bits or training on the model that is left: how the goal is split, and the one result.

The blocks are chosen and left out in one shot; everything else runs on the smaller model. So the result computes what
the model computes in which the blocks add nothing and the units are masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from graphcomp.cost import CostModel
from graphcomp.coupling.analysis import Analysis
from graphcomp.errors import PlanError
from graphcomp.flows.repaired import NOTHING_CUT
from graphcomp.methods.takes import START
from graphcomp.native.depth import paths_left
from graphcomp.pruning.allocation import Budget, is_share, limits_of, originals
from graphcomp.pruning.blocks import DEPTH, Block, DropBlocks
from graphcomp.pruning.shares import RoleShares
from graphcomp.quantization.spec import matches
from graphcomp.report.report import Change, Report
from graphcomp.result import CompressedModel

DEFAULT = 0.5
"""Share of the blocks that go where nothing says how many."""
OF_BITS = START | {"activations", "keep_class", "prefer_native", "calibration", "prune", "budget", "sparsity by module"}
"""Options with a use where no units go."""


@dataclass(frozen=True)
class Split:
    """What is asked of the blocks, and of the model that is left.

    Attributes:
        role: "block" or "layer".
        share: of the blocks; unused beside `budget`.
        budget: that is met by leaving blocks out.
        rest: options of `compress` for the model that is left: prune, sparsity, budget.
    """

    role: str
    share: float
    budget: Budget | None
    rest: Mapping[str, Any]


def split_goal(
    plan: Analysis,
    prune: Sequence[str],
    sparsity: float | Mapping[Any, float] | None,
    budget: Budget | None,
    *,
    bits: bool,
    learned_bits: bool,
    trains: bool,
    prunes: bool,
    single: bool = False,
) -> Split:
    """Split shares and a budget between blocks and units.

    A number is the share of each: of the blocks, and of the units that are left. A mapping holds a share by role; a
    role that the mapping does not name is left alone. A budget is met half by blocks: as few go as bring each cost to
    the geometric mean of the original and the limit, and units bring the cost to the limit. Beside a share of the
    blocks, units alone meet the budget. Where the budget chooses bits, shares are shares of both.

    Args:
        plan: of the whole model, or of the scope.
        bits: whether what is left is quantized.
        learned_bits: whether a budget chooses bits in one shot.
        trains: whether what is left is trained.
        prunes: whether the training removes units, or single weights.
        single: whether the training removes single weights.

    Raises:
        PlanError: what is asked cannot be split.
    """
    (role, *others), units = [r for r in dict.fromkeys(prune) if r in DEPTH], [r for r in prune if r not in DEPTH]
    if others:
        raise PlanError(
            f"prune={tuple(prune)!r}: blocks go one by one or by whole layers",
            fix=f"one of {', '.join(map(repr, DEPTH))}",
        )
    if single:
        raise PlanError(
            f"prune={tuple(prune)!r} with a method that removes single weights",
            why="the share of the weights and that of the blocks are two, and sparsity is one",
            fix=f"one after the other: first = compress(…, prune=({role!r},)), then compress(first, …, method=…)",
        )
    if prunes and not units:
        raise PlanError(
            f"prune={tuple(prune)!r} with a method that removes units",
            why="prune names no role of units",
            fix=f'prune=("{role}", "channel"), or method="qat", which quantizes alone',
        )
    share, of_units = _shares(role, units, sparsity)
    if budget is None:
        unnamed = 0.0 if isinstance(sparsity, Mapping) else DEFAULT
        own = unnamed if share is None else share
        return Split(role, own, None, {**_units(units, of_units, trains), "budget": None})
    _check_budget(budget, role, units, share, None if learned_bits else sparsity, bits, learned_bits)
    if learned_bits and share is not None:  # shares are shares then, and the bits meet the budget
        own_budget = _absolute(limits_of(CostModel(plan), budget))
        return Split(role, share, None, {**_units(units, of_units, trains), "budget": own_budget})
    limits, whole = limits_of(CostModel(plan), budget), originals(CostModel(plan))
    left = _absolute(limits)
    if share is not None:
        return Split(role, share, None, {**_units(units, None, trains), "budget": left})
    if not units:
        return Split(role, 0.0, left, {**_units(units, None, trains), "budget": None})
    mean = {name: (min(limit, whole[name]) * whole[name]) ** 0.5 for name, limit in limits.items()}
    return Split(role, 0.0, _absolute(mean), {**_units(units, None, trains), "budget": left})


def _absolute(limits: Mapping[str, float]) -> Budget:
    """Return a budget of whole numbers, which are costs and no shares."""
    named: dict[str, Any] = {name: max(2, int(limit)) for name, limit in limits.items()}
    return Budget(**named)


def check_units_asked(split: Split, given: Sequence[str]) -> None:
    """Refuse options on units where no units go.

    Args:
        given: options that ask for something.

    Raises:
        PlanError: one of these has no use.
    """
    idle = [name for name in given if name not in OF_BITS]
    if split.rest["prune"] is None and idle:
        raise PlanError(
            f"{', '.join(idle)} with prune={(split.role,)!r}",
            why="whole blocks go, chosen by the error that the outputs are left with, and no units",
            fix=f'without; or prune=("{split.role}", "channel")',
        )


def _shares(role: str, units: Sequence[str], sparsity: Any) -> tuple[float | None, Any]:
    """Return the share of the blocks, and that of the units."""
    if not isinstance(sparsity, Mapping):
        return sparsity, sparsity
    unknown = [key for key in sparsity if key not in (role, *units)]
    if unknown or not all(is_share(share) for share in sparsity.values()):
        raise PlanError(
            f"sparsity={dict(sparsity)!r} where blocks go, too: sparsity by module",
            why="paths of modules change with the blocks: shares are by the roles of prune=",
            fix=f"sparsity={{{', '.join(f'{name!r}: 0.25' for name in (role, *units))}}}",
        )
    own = {name: sparsity.get(name, 0.0) for name in units}
    return sparsity.get(role), own


def _units(units: Sequence[str], share: Any, trains: bool) -> dict[str, Any]:
    """Return the options that say which units go from the model that is left."""
    if not units:
        return {"prune": None, "sparsity": None if trains else 0.0}
    if not isinstance(share, Mapping):
        return {"prune": tuple(units), "sparsity": share}
    some = {name: value for name, value in share.items() if value}
    if len(set(some.values())) <= 1:
        return {"prune": tuple(some) or tuple(units), "sparsity": next(iter(some.values()), 0.0)}
    return {"prune": tuple(units), "sparsity": RoleShares(share)}


def _check_budget(
    budget: Budget,
    role: str,
    units: Sequence[str],
    share: float | None,
    sparsity: Any,
    bits: bool,
    learned_bits: bool,
) -> None:
    blocks = f'sparsity={{"{role}": 0.25}}'
    if budget.timed:
        raise PlanError(
            "a budget on latency is not met by leaving blocks out",
            why="blocks are weighed by what they cost in parameters, macs, bops or bytes",
            fix=f"Budget(macs=0.7); or without {role!r} in prune=",
        )
    by_role = isinstance(sparsity, Mapping) and sparsity.keys() <= {role}
    if sparsity is not None and not by_role:
        raise PlanError(
            f"sparsity={sparsity!r} beside a budget",
            why="a budget says how many units go; a share of the blocks may stand beside the budget",
            fix=f"{blocks}, or no sparsity",
        )
    weighed = [name for name in ("bytes", "bops") if getattr(budget, name) is not None]
    if share is None and weighed and bits:
        raise PlanError(
            f"a budget on {' and '.join(weighed)} with bits, and no share of the blocks",
            why="bits lower the cost, too: nothing says how much is left to the blocks",
            fix=f"{blocks} beside the budget",
        )
    if share is not None and not units and not learned_bits:
        raise PlanError(
            f"{blocks} beside a budget, and nothing else may go",
            why=f"prune names no role but {role!r}",
            fix=f'prune=("{role}", "channel"), or one of the two',
        )


# ------------------------------------------------------------------------------------------------ names
def renamed(entries: Sequence[str], part: nn.Module, paths: Mapping[str, str]) -> tuple[str, ...]:
    """Return names and patterns of modules as names in the model without blocks.

    Args:
        entries: names and "re:" patterns, of modules of `part`.
        part: the model before, or the submodule of a scope.
        paths: of `paths_without`.
    """
    found: dict[str, None] = {}
    for entry in entries:
        known = {name for name, _ in part.named_modules() if matches(entry, name)} if entry[:3] == "re:" else {entry}
        found |= dict.fromkeys(paths[name] for name in paths if name in known)
    return tuple(found)


def paths_without(plan: Analysis, blocks: Sequence[Block], small: nn.Module) -> dict[str, str]:
    """Return path of each module before -> path in the model without blocks.

    Args:
        blocks: that are gone.
        small: without the blocks, or the submodule of a scope. A graph keeps paths, lists of a class close up.
    """
    if isinstance(small, fx.GraphModule):
        left = {name for name, _ in small.named_modules()}
        return {name: name for name, _ in plan.model.named_modules() if name in left}
    dropped = DropBlocks(tuple(blocks)).rewrite(plan.captured.module)
    stays = {node.name for node in dropped.graph.nodes}
    gone = frozenset(node for node in plan.captured.graph.nodes if node.name not in stays)
    return paths_left(plan.model, plan.captured.graph, gone)


# ------------------------------------------------------------------------------------------------ one result
def joined(first: CompressedModel, second: CompressedModel) -> CompressedModel:
    """Return the result of the second step, with the report of both.

    Args:
        first: without blocks.
        second: what became of `first`.
    """
    before, after = first.report, second.report
    assert isinstance(before, Report) and isinstance(after, Report)
    both: dict[str, Any] = {name: Change(getattr(before, name).before, getattr(after, name).after) for name in COSTS}
    blocks = f"blocks left out before all else: {before.units_removed} of {before.units_total}"
    repairs = {name if name not in after.repairs else f"{name} (blocks)": own for name, own in before.repairs.items()}
    laws = {
        law: max(own.get(law, 0.0) for own in (before.verified, after.verified))
        for law in {**before.verified, **after.verified}
    }
    names = "modules are named as in the model without the blocks"
    said = [note for note in after.notes if note != f"not repaired: {NOTHING_CUT}"]  # what blocks left was
    notes = dict.fromkeys([blocks, names, *before.notes, *said])
    second.report = replace(
        after,
        **both,
        verified=laws,
        unchecked={**before.unchecked, **after.unchecked},
        repairs={**repairs, **after.repairs},
        notes=tuple(notes),
        model=before.model,
    )
    graph = next((own for own in (first, second) if own.form != "native"), None)
    if graph is not None:  # the second step holds the class of its own model, which is then the graph of the first
        second.form, second.reason = graph.form, graph.reason
        second.edits = ()
    else:
        edits = {(path, name): value for path, name, value in (*first.edits, *second.edits)}
        second.edits = tuple((path, name, value) for (path, name), value in edits.items())
    return second


COSTS = ("params", "macs", "bops", "bops_attention", "bytes")
"""Costs of a report."""
