"""An analysis as text and as a networkx graph."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import networkx

from graphcomp.coupling.groups import ChannelGroup, FrozenAxis
from graphcomp.ir.graph import is_op, source_line, tensor_values

if TYPE_CHECKING:
    from graphcomp.coupling.analysis import Analysis

SHOWN = 25  # rows of a kind that the text shows before it counts the rest


def analysis_text(analysis: Analysis) -> str:
    """Groups, what is frozen and why, unknown ops with the fix, the share of parameters that can be pruned."""
    model = type(analysis.model).__name__
    units = sum(group.size for group in analysis.groups)
    head = (
        f"{model}: {len(analysis.groups)} groups, {units} units; "
        f"{analysis.prunable_share:.1%} of the parameters lie in a group"
    )
    captured = analysis.captured
    if captured.producer == "record":
        head += f"\ncaptured by recording one run, since torch.export refused: {captured.reason}"
    sections = [head, _groups_text(analysis.groups), _frozen_text(analysis.frozen), _unknown_text(analysis)]
    return "\n\n".join(section for section in sections if section)


def _groups_text(groups: Sequence[ChannelGroup]) -> str:
    rows = [f"{'group':<60} {'role':<9} {'units':>6} {'members':>8}"]
    rows += [f"{g.name:<60} {g.role:<9} {g.size:>6} {len(g.members):>8}" for g in groups]
    return "\n".join(rows)


def _frozen_text(frozen: Sequence[FrozenAxis]) -> str:
    """One row per reason, with how many parameters it holds and the first of them."""
    by_reason: defaultdict[tuple[str, str], list[FrozenAxis]] = defaultdict(list)
    for axis in frozen:
        by_reason[str(axis.reason), axis.reason.source].append(axis)
    rows = []
    for (reason, source), axes in by_reason.items():
        more = f" and {len(axes) - 1} more" if len(axes) > 1 else ""
        at = f"\n    at {source}" if source else ""
        rows.append(f"  {axes[0].name} dim {axes[0].dim}{more}: {reason}{at}")
    hidden = [f"  … and {len(rows) - SHOWN} other reasons"] if len(rows) > SHOWN else []
    return "\n".join(["frozen (every index stays):", *rows[:SHOWN], *hidden]) if rows else ""


def _unknown_text(analysis: Analysis) -> str:
    rows = [f"  {u}" + (f"\n    fix: {u.fix}" if u.fix else "") for u in analysis.unknown_ops]
    return "\n".join(["ops without a usable rule (every axis they touch is frozen):", *rows]) if rows else ""


def why_nothing(analysis: Analysis) -> str:
    """The frozen axes of an analysis without a usable group, most frequent reason first."""
    reasons = Counter(str(f.reason) for f in analysis.frozen)
    rows = [f"{count} x {reason}" for reason, count in reasons.most_common(SHOWN)]
    return "; ".join(rows) or "the model has no parameter with more than one index"


# ------------------------------------------------------------------------------------------------ the QADG
def analysis_graph(analysis: Analysis) -> networkx.DiGraph:
    """Ops, parameters and groups as nodes; data flow and membership as edges.

    Node attributes: `kind` ("op", "input", "output", "parameter", "group"); an op has `target`, `shape`, `source`;
    a group `size`, `role`. An edge to a group has `dim` and `consumes`.
    """
    graph = networkx.DiGraph()
    for node in analysis.captured.module.graph.nodes:
        name = str(node.target) if node.op == "get_attr" else node.name
        kind = {"placeholder": "input", "get_attr": "parameter", "output": "output"}.get(node.op, "op")
        shapes = [tuple(t.shape) for t in tensor_values(node)]
        target = str(node.target) if is_op(node) else node.op
        graph.add_node(name, kind=kind, target=target, shape=shapes[0] if shapes else (), source=source_line(node))
        for operand in node.all_input_nodes:
            graph.add_edge(str(operand.target) if operand.op == "get_attr" else operand.name, name)
    for group in analysis.groups:
        graph.add_node(group.name, kind="group", size=group.size, role=group.role)
        for member in group.members:
            graph.add_edge(member.name, group.name, dim=member.dim, consumes=member.consumes)
    return graph
