"""A model without some of its residual blocks: chosen, dropped, repaired, verified, and put into a result."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import fx

from graphcomp.capture.capture import Captured
from graphcomp.capture.resized import OPEN, open_lengths
from graphcomp.cost import Bops, CostModel
from graphcomp.coupling.analysis import Analysis, analyze_rewritten
from graphcomp.errors import BudgetError, NothingToPrune, PlanError
from graphcomp.flows.checked import Checked, check_class, check_graph, given_to
from graphcomp.flows.repaired import judge
from graphcomp.flows.results import choose_module, listed, native_notes, shapes, with_latency
from graphcomp.flows.said_by_config import without_unread_buffers
from graphcomp.ir.graph import fetch
from graphcomp.native.depth import shortened_model, whole_layers
from graphcomp.pruning.allocation import Budget, limits_of, originals
from graphcomp.pruning.blocks import Block, DropBlocks, MaskBlocks, find_blocks, order_of
from graphcomp.pruning.choose_blocks import choose_blocks
from graphcomp.pruning.depth import Depth, Dropped
from graphcomp.pruning.repair import within_memory
from graphcomp.quantization.spec import matches
from graphcomp.report.report import Change, Report, group_dict, layers
from graphcomp.result import CompressedModel
from graphcomp.system.threads import one_at_a_time

LAW = "masked == without blocks"
NATIVE = "native == graph"

MOST_LEVELS = 3
"""Lists within lists of modules."""


@one_at_a_time
def blocks_of(plan: Analysis) -> tuple[Block, ...]:
    """Return the residual blocks of a plan's graph.

    Raises:
        PlanError: the model could only be recorded: there is no graph to leave a block out of.
    """
    captured = plan.captured
    if captured.producer == "record":
        raise PlanError(
            f"{type(plan.model).__name__} has no blocks to leave out: the model could only be recorded",
            why=f"torch.export refused: {captured.reason}",
            fix='scope="path.to.submodule" compresses a part that can be exported',
        )
    return find_blocks(captured.module)


@one_at_a_time
def chosen_blocks(
    plan: Analysis,
    rows: Sequence[Sequence[Any]],
    sparsity: float,
    budget: Budget | None,
    ignore: Sequence[str],
    *,
    whole: bool = False,
    repair: bool,
) -> tuple[tuple[Block, ...], tuple[str, ...]]:
    """Choose blocks by the error that the outputs are left with; return these, and notes.

    Args:
        rows: flat batches.
        sparsity: share of the blocks.
        budget: on parameters, macs, bops or bytes, in place of the sparsity.
        ignore: names of modules of which no block goes.
        whole: blocks that one item of a list of modules makes go together.

    Raises:
        NothingToPrune: the model has no residual block.
        BudgetError: no choice meets the budget.
    """
    every = blocks_of(plan)
    blocks = [block for block in every if not any(_inside(entry, block) for entry in ignore)]
    if not blocks:
        raise NothingToPrune(
            f"{type(plan.model).__name__} has no residual block to leave out",
            why=f"{len(every)} blocks are left out by ignore=" if every else "nothing is added to what it is made of",
            fix="prune=None cuts channels, heads and features",
        )
    units = _layers(plan, blocks) if whole else tuple((block,) for block in blocks)
    if not units:
        raise NothingToPrune(
            f"no item of a list of modules of {type(plan.model).__name__} is made of residual blocks",
            why="layers are children of torch.nn.ModuleList and torch.nn.Sequential",
            fix='prune=("block",) leaves out blocks, whatever module makes them',
        )
    costs = _Costs(plan, budget)
    count = round(sparsity * len(units))

    def enough(gone: Collection[Block]) -> bool:
        return costs.holds(gone) if budget is not None else sum(unit[0] in gone for unit in units) >= count

    saved = costs.saved if budget is not None else lambda _: 1.0
    errors = choose_blocks(plan, every, rows, enough=enough, saved=saved, repair=repair, together=units)
    costs.check(errors)
    said = [f"left out: {listed([repr(block.name) for block in errors])}"] if errors else ["no block was left out"]
    if errors:
        last = list(errors.values())[-1]
        said.append(f"on samples that the repair has not seen, the outputs move by {last**0.5:.1%} (relative)")
    said += [f"blocks that ignore= keeps: {len(every) - len(blocks)}"] if len(every) > len(blocks) else []
    return order_of(every, errors), tuple(said)


def _layers(plan: Analysis, blocks: Sequence[Block]) -> tuple[tuple[Block, ...], ...]:
    """Return the blocks that one item of a list of modules makes, of the innermost lists that the class holds shorter.

    A layer may itself be a list of sublayers, whose number the class counts on: the last item of each kind of list is
    left out on trial.
    """
    innermost = units = whole_layers(plan.model, blocks)
    for level in range(1, MOST_LEVELS + 1):
        if not units or _can_go(plan, units[-1]):
            return units
        outer = whole_layers(plan.model, blocks, level)
        if outer == units:
            break
        units = outer
    return innermost


def _can_go(plan: Analysis, unit: Sequence[Block]) -> bool:
    """Whether the class computes the model without the blocks."""
    captured = plan.captured
    small = DropBlocks(tuple(unit)).rewrite(captured.module)
    held = partial(check_class, small=small, given=given_to(captured), captured=captured)
    return shortened_model(plan.model, captured.graph, _gone(captured, small), {}, held).module is not None


def _gone(captured: Captured, small: fx.GraphModule) -> frozenset[fx.Node]:
    stays = {node.name for node in small.graph.nodes}
    return frozenset(node for node in captured.graph.nodes if node.name not in stays)


def _inside(entry: str, block: Block) -> bool:
    return any(matches(entry, name.rpartition(".")[0]) for name in block.parameters)


class _Costs:
    """What blocks cost, by the limits of a budget: sets of ops and parameters, as blocks may lie within blocks."""

    def __init__(self, plan: Analysis, budget: Budget | None) -> None:
        costs = CostModel(plan)
        module = plan.captured.module
        self.macs = {op.node: op.macs({}) for op in costs.operations}
        counted = Bops(costs).layers() / max(sum(self.macs.values()), 1)
        self.original = originals(costs)
        self.per_mac = counted
        attributes = module.graph.find_nodes(op="get_attr")
        self.sizes = {str(node.target): fetch(module, str(node.target)) for node in attributes}
        if budget is not None and budget.timed:
            raise PlanError(
                "a budget on latency is not met by leaving blocks out",
                why="blocks are weighed by what they cost in parameters, macs, bops or bytes",
                fix="Budget(macs=0.7); measure_latency=True times the result",
            )
        self.limits = limits_of(costs, budget) if budget is not None else {}

    def less(self, gone: Collection[Block]) -> dict[str, float]:
        """Return what goes with the blocks, by the name of the cost."""
        names = {name for block in gone for name in block.parameters}
        nodes = {node for block in gone for node in block.ops}
        macs = sum(self.macs.get(node, 0) for node in nodes)
        tensors = [self.sizes[name] for name in names]
        return {
            "params": sum(t.numel() for t in tensors),
            "bytes": sum(t.numel() * t.element_size() for t in tensors),
            "macs": macs,
            "bops": macs * self.per_mac,
        }

    def holds(self, gone: Collection[Block]) -> bool:
        """Return whether the model without the blocks is within the budget."""
        less = self.less(gone)
        return all(self.original[name] - less[name] <= limit for name, limit in self.limits.items())

    def saved(self, gone: Collection[Block]) -> float:
        """Return which share of the limited costs goes with blocks."""
        less = self.less(gone)
        return sum(less[name] / max(self.original[name], 1) for name in self.limits)

    def check(self, gone: Collection[Block]) -> None:
        """Raise BudgetError where the budget is missed without all blocks."""
        if self.holds(gone):
            return
        less = self.less(gone)
        name, limit = next((n, v) for n, v in self.limits.items() if self.original[n] - less[n] > v)
        left = self.original[name] - less[name]
        raise BudgetError(
            f"no choice of blocks meets the budget of {limit:,.0f} {name}",
            why=f"without any block there are {left:,.0f} ({left / self.original[name]:.1%} of the original)",
            fix="a larger budget, or prune=None, which cuts channels, heads and features",
        )


@one_at_a_time
def without_blocks(
    plan: Analysis,
    chosen: Sequence[Block],
    rows: Sequence[Sequence[Any]],
    *,
    notes: Sequence[str] = (),
    repair: bool = True,
    verify: bool,
    measure_latency: bool,
) -> CompressedModel:
    """Return the model without blocks.

    Args:
        chosen: in order of execution.
        rows: flat batches to repair on; none: the weights that stay are as they were.
        repair: repair on these.

    Raises:
        CalibrationError: the data do not fit, or are not finite.
        VerificationError: the graph without blocks does not compute what the masked one does.
    """
    captured = plan.captured
    every = blocks_of(plan)
    given = given_to(captured)
    dropped = DropBlocks(tuple(chosen)).rewrite(captured.module)
    checked = Checked()
    if verify:
        masked = MaskBlocks(tuple(chosen)).rewrite(captured.module)
        checked = check_graph(LAW, masked, dropped, given, "the model without blocks")
    used = within_memory(captured.module, rows) if rows and repair else []
    depth = Depth(plan, every, used, gone=order_of(every, chosen))
    mended = depth.walked(chosen)
    assert len(order_of(every, chosen)) == len(chosen), "blocks must be of the plan"
    judged = judge(plan, (dropped, mended.graph), depth.batches) if used else None
    helped = []
    if judged is not None and judged.errors[1] > judged.errors[0]:
        mended, helped = Dropped(dropped), [f"not repaired, as it would not help: {judged}"]
    elif judged is not None:
        helped = [f"by the repair {judged}"]
    small = mended.graph
    gone = _gone(captured, small)
    tensors = {own: fetch(small, name) for name in mended.changed for own in captured.aliases.get(name, (name,))}
    found = shortened_model(
        plan.model, captured.graph, gone, tensors, lambda built: check_class(built, small, given, captured)
    )
    without_unread_buffers(plan, found)
    checked = checked.with_class(NATIVE, found)
    module, form = choose_module(found, small, plan)
    repairs = _repair_notes(mended, len(depth.batches), len(rows) if repair else 0)
    said = (*notes, *repairs, *helped, *native_notes(plan, found))
    report = _report(plan, small, chosen, len(every), checked, mended, said)
    module.train(plan.model.training)
    if isinstance(module, fx.GraphModule):
        module.meta[OPEN] = open_lengths(captured)
    return CompressedModel(
        module,
        form=form,
        kept={},
        report=with_latency(report, plan, module) if measure_latency else report,
        reason="" if form == "native" else found.reason,
        edits=found.edits if form == "native" else (),
        original_shapes=shapes(plan.model),
        example_args=captured.inputs.args,
        example_kwargs=captured.inputs.kwargs,
    )


def _repair_notes(mended: Dropped, used: int, given: int) -> list[str]:
    """Say which layers make up for blocks, and for which blocks none does, by reason."""
    if not given:
        return ["not repaired: the weights that stay are as they were"]
    said = []
    if mended.layers:
        said.append(
            f"layers that make up for blocks by a least-squares map: {listed([repr(n) for n in mended.layers])}"
        )
    if mended.behind:
        said.append(f"layers behind blocks that were repaired by least squares: {len(mended.behind)}")
        said += [f"rows of calibration data count alike, as {mended.alike}"] if mended.alike else []
    if mended.reestimated:
        names = listed([repr(n) for n in mended.reestimated])
        said.append(f"batch norms behind these have the statistics of the calibration data: {names}")
    if used < given:
        said.append(f"the repair used the first {used} of {given} batches, which memory is for")
    by_reason: dict[str, list[str]] = {}
    for name, why in mended.left.items():
        by_reason.setdefault(why, []).append(repr(name))
    return said + [f"not repaired, as {why}: {listed(found)}" for why, found in by_reason.items()]


def _report(
    plan: Analysis,
    small: fx.GraphModule,
    chosen: Sequence[Block],
    total: int,
    checked: Checked,
    mended: Dropped,
    notes: Sequence[str],
) -> Report:
    captured = plan.captured
    costs = CostModel(plan)
    after = CostModel(analyze_rewritten(plan, replace(captured, module=small, original=small, coupling=None)))
    less = _Costs(plan, None).less(chosen)
    names = {name.removesuffix(".weight") for block in chosen for name in block.parameters}
    return Report(
        params=Change(costs.params(), costs.params() - less["params"]),
        macs=Change(costs.macs(), after.macs()),
        bops=Change(Bops(costs).layers(), Bops(after).layers()),
        bops_attention=Change(Bops(costs).attention(), Bops(after).attention()),
        bytes=Change(costs.bytes(), costs.bytes() - less["bytes"]),
        units_removed=len(chosen),
        units_total=total,
        layers=layers(plan, {}, costs, after.macs_by_layer(), names),
        groups=tuple(group_dict(group, {}) for group in plan.groups),
        frozen=plan.frozen,
        unknown_ops=tuple(u.op for u in plan.unknown_ops),
        repairs={name: Change(layer.before, layer.after) for name, layer in {**mended.layers, **mended.behind}.items()},
        verified=checked.verified,
        unchecked=checked.unchecked,
        notes=(*captured.notes, *notes, *captured.path.notes()),
        model=type(plan.model).__name__,
    )
