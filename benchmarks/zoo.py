"""Every model of the shared zoo, cut at unequal random sparsities; with --peers, Torch-Pruning beside it.

    python -m benchmarks.zoo --peers --json zoo.jsonl             # all of it: hours on two cores
    python -m benchmarks.zoo --families hf --peers                # one family
    python -m benchmarks.zoo --names tv/resnet18,hf/llama --float64 --ops
    python -m benchmarks.zoo --peers --json zoo.jsonl --resume    # go on where it was stopped
    python -m benchmarks.zoo --peers --json zoo.jsonl --tables    # only print the tables again

Each model runs in a process of its own, on one thread; seconds are CPU seconds. Per model it is measured whether it is
captured, how many parameters lie in a prunable group, whether slicing is masking (relative error of the outputs), and
whether the native class could be cut.
"""

from __future__ import annotations

import argparse
import os
import statistics
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import common
from benchmarks.common import append_json, best_of, bounded, brief, percent, section, table, timed
from benchmarks.peers import torch_pruning
from graphcomp.capture.capture import capture
from graphcomp.coupling.analysis import Analysis, analyze_captured
from graphcomp.coupling.groups import Kept
from graphcomp.ir.graph import is_op, tensor_values
from graphcomp.native.model import native
from graphcomp.ops.registry import find
from graphcomp.pruning.mask import InsertMasks, set_masks
from graphcomp.pruning.slice import SliceGroups
from graphcomp.testing import random_kept, relative_error

FAMILIES = ("tv_classification", "tv_segmentation", "tv_video", "tv_flow", "tv_detection", "hf")
TOLERANCE = {"law": 1e-4, "law_float64": 1e-9}
KEEP = (0.3, 0.9)  # each group keeps a share drawn from this range
REACH = 0.99
MAIN_OUTPUTS = ("logits", "pred_boxes", "logits_per_image", "logits_per_text", "out")
NATIVE = ("same class", "head dims whole")
OURS_SECONDS = 900

Row = dict[str, Any]
Case = Any


def main() -> None:
    options = _options()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    zoo = common.shared_module("zoo.py")
    rows = common.read_json(options.json) if options.json and (options.resume or options.tables) else []
    if not options.tables:
        rows = measure(zoo, options, rows)
    report(rows, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", metavar="A,B", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--names", metavar="A,B", help="only these models, such as tv/resnet18,hf/bert")
    parser.add_argument("--peers", action="store_true", help="run Torch-Pruning on the same models")
    parser.add_argument("--timeout", type=int, default=60, metavar="SECONDS", help="for Torch-Pruning (default: 60)")
    parser.add_argument("--float64", action="store_true", help="check the law in float64, too")
    parser.add_argument("--ops", action="store_true", help="print the census of ops")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one line of JSON per model")
    parser.add_argument("--resume", action="store_true", help="skip the models that --json FILE holds")
    parser.add_argument("--tables", action="store_true", help="measure nothing, print the tables of --json FILE")
    options = parser.parse_args()
    if (options.resume or options.tables) and not options.json:
        parser.error("--resume and --tables need --json FILE")
    return options


# ------------------------------------------------------------------------------------------------ measuring
def measure(zoo: Any, options: argparse.Namespace, rows: list[Row]) -> list[Row]:
    """One row per model, those in `rows` left out."""
    names = options.names.split(",") if options.names else None
    families = options.families.split(",") if options.families else None
    done = {row["name"] for row in rows}
    if options.json and not options.resume:
        options.json.unlink(missing_ok=True)
    for case in zoo.cases(names=names, families=families):
        if case.name in done:
            continue
        row = _row(zoo, case, options)
        print(_line(row), flush=True)
        append_json(options.json, row)
        rows.append(row)
    return rows


def _row(zoo: Any, case: Case, options: argparse.Namespace) -> Row:
    mine = bounded(ours, case, options.float64, seconds=OURS_SECONDS)
    row = {"name": case.name, "family": case.family, "ours": mine.value or {"failure": mine.error}}
    if options.peers:
        theirs = bounded(_peer, zoo, case, seconds=options.timeout)
        row["peer"] = theirs.value or {"failure": theirs.error}
    return row


def _peer(zoo: Any, case: Case) -> Row:
    with open(os.devnull, "w") as nowhere:  # it prints as it goes
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        return torch_pruning(zoo, *case.build())


def ours(case: Case, float64: bool) -> Row:
    """Capture, analyse, cut and check one model."""
    model, args, kwargs = case.build()
    with timed() as clock:
        captured = capture(model, args, kwargs)
    row: Row = {"captured": captured.producer, "refusal": captured.reason, "export_s": clock.seconds}
    analysis = analyze_captured(captured)
    row["analysis_s"] = best_of(3, lambda: analyze_captured(captured))
    row |= {"groups": len(analysis.groups), "units": sum(group.size for group in analysis.groups)}
    row |= {"reach": analysis.prunable_share, "unreached": unreached(analysis), "ops": census(analysis)}
    row |= reach_of_main_outputs(model, args, kwargs, analysis)
    row["unknown"] = {op.op: op.why for op in analysis.unknown_ops}
    for name, step in (("law", lambda: cut(analysis)), ("float64", lambda: in_float64(case))):
        if name == "law" or float64:
            try:
                row |= step()
            except Exception as error:
                row["failure"] = f"{name}: {brief(error)}"
    return row


def cut(analysis: Analysis) -> Row:
    """Slice and mask at unequal random sparsities and compare; then the same cut of the native class."""
    kept = random_kept(analysis.groups, torch.Generator().manual_seed(0), KEEP)
    row: Row = {}
    sliced = None
    if analysis.captured.producer == "export":
        with timed() as clock:
            sliced = SliceGroups(analysis.coupling, kept)(analysis.captured.module)
        row |= {"slice_s": clock.seconds, **law(analysis, kept, sliced)}
    row |= natively(analysis, kept, sliced)
    if "native_error" in row:  # for a recorded model: against the user's model with zeros where units go
        row.setdefault("law", row["native_error"])
    return row


def natively(analysis: Analysis, kept: Kept, sliced: torch.fx.GraphModule | None) -> Row:
    """Cut the model's own class; where that fails, once more with the head dims whole.

    The class may hold the head dim of queries, keys and values in one attribute, and no value of it fits two lengths.
    """
    reasons: list[str] = []
    for how, part in (("all", kept), ("head dims whole", {g: u for g, u in kept.items() if g.role != "head_dim"})):
        if how != "all" and len(part) == len(kept):
            break
        with timed() as clock:
            found = native(analysis, part, sliced if how == "all" else None)
        if found.module is None:
            reasons.append(found.reason)
        else:
            params = _count(found.module) / _count(analysis.model)
            seen = {"native_error": found.error, "native_s": clock.seconds, "params": params}
            return {"native": how, "native_reason": "; ".join(reasons), **seen}
    return {"native": "", "native_reason": "; with head dims whole: ".join(reasons)}


def law(analysis: Analysis, kept: Kept, sliced: nn.Module) -> Row:
    """Relative error of the sliced against the masked model, and how far the cut moved the output."""
    captured = analysis.captured
    groups = list(kept)
    masked = InsertMasks(analysis.coupling, groups)(captured.module)
    with torch.no_grad():
        dense = captured.module(*captured.inputs.args, **captured.inputs.kwargs)
        whole = relative_error(dense, masked(*captured.inputs.args, **captured.inputs.kwargs))
        set_masks(masked, groups, kept)
        expected = masked(*captured.inputs.args, **captured.inputs.kwargs)
        error = relative_error(expected, sliced(*captured.inputs.args, **captured.inputs.kwargs))
    return {"law": error, "identity": whole, "moved": relative_error(dense, expected)}


def in_float64(case: Case) -> Row:
    """The error of the law with weights and inputs in double precision, and whether the model rounds to float32."""
    model, args, kwargs = case.build()
    analysis = analyze_captured(capture(model.double(), _doubled(args), _doubled(kwargs)))
    kept = random_kept(analysis.groups, torch.Generator().manual_seed(0), KEEP)
    error = law(analysis, kept, SliceGroups(analysis.coupling, kept)(analysis.captured.module))["law"]
    return {"law_float64": error, "float32_inside": _rounds(analysis)}


def _rounds(analysis: Analysis) -> bool:
    """Whether values that depend on the inputs are float32 in a model of doubles (some norms compute in float32)."""
    nodes = [n for n in analysis.captured.module.graph.nodes if is_op(n) and n not in analysis.coupling.sources]
    return any(t.dtype == torch.float32 for n in nodes for t in tensor_values(n))


def _doubled(inputs: Any) -> Any:
    doubled = torch.utils._pytree.tree_map_only(torch.Tensor, _double, inputs)
    return doubled


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def unreached(analysis: Analysis) -> list[tuple[str, float, str]]:
    """(reason, share of the parameters, the first of them) for parameters in no group; nothing above 99 % reach."""
    if analysis.prunable_share >= REACH:
        return []
    inside = {member.name for group in analysis.groups for member in group.members}
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for frozen in analysis.frozen:
        reasons[frozen.name].append(str(frozen.reason))
    parameters = dict(analysis.model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    for name, parameter in parameters.items():
        if name not in inside:
            why = "; ".join(dict.fromkeys(reasons[name])) or "read by no op that reaches an output"
            found[why] += parameter.numel()
            first.setdefault(why, name)
    return [(why, count / total, first[why]) for why, count in found.most_common()]


def reach_of_main_outputs(model: nn.Module, args: Any, kwargs: Any, analysis: Analysis) -> Row:
    """Reach when only the outputs that users mean have to stay, where hidden states are returned beside them."""
    wanted = [name for name in analysis.captured.output_names if name in MAIN_OUTPUTS]
    if analysis.prunable_share >= REACH or not wanted:
        return {}
    return {"reach_main": analyze_captured(capture(model, args, kwargs, outputs=wanted)).prunable_share}


def census(analysis: Analysis) -> dict[str, int]:
    """How often each op occurs in the captured graph; ops without a rule are marked by a leading '!'."""
    nodes = [node for node in analysis.captured.module.graph.nodes if is_op(node)]
    counts = Counter(node.target for node in nodes)
    return {("" if find(op) else "!") + str(op): n for op, n in counts.items()}


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------------ reporting
def _line(row: Row) -> str:
    mine = row["ours"]
    if "law" not in mine:
        text = mine.get("failure") or mine.get("native_reason", "")
    else:
        form = f"native ({mine['native']})" if mine["native"] else f"graph ({mine['native_reason'][:80]})"
        text = (
            f"law {mine['law']:.0e}, moved {mine.get('moved', float('nan')):.2f}, {mine['groups']} groups, reach "
            f"{percent(mine['reach'])}, export {mine['export_s']:.1f} s, analysis {mine['analysis_s']:.3f} s, {form}"
        )
        text += f"; law in float64 {mine['law_float64']:.0e}" if "law_float64" in mine else ""
        text += f"; FAILED {mine['failure']}" if "failure" in mine else ""
    if "peer" in row:
        text += f" | Torch-Pruning: {_peer_text(row['peer'])}"
    return f"{row['name']:<36} {text}"


def _peer_text(peer: Row) -> str:
    if peer.get("error") is None:
        return peer["failure"][:100] or "nothing cut"
    return f"error {peer['error']:.0e}, reach {percent(peer['reached'], 0)}" + ("" if peer["cuts"] else ", nothing cut")


def report(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """All tables."""
    families = [f for f in FAMILIES if any(row["family"] == f for row in rows)]
    by_family = {f: [row for row in rows if row["family"] == f] for f in families}
    by_family["all"] = list(rows)
    section("Slicing is masking", _law_table(by_family))
    section("Reach and time", _time_table(by_family))
    if options.peers:
        section("Beside Torch-Pruning (default settings, ratio 0.5, output layers ignored)", _peer_table(by_family))
    _lists(rows)
    if options.ops:
        section("Ops of the captured graphs", _op_table(rows))


def _law_table(by_family: Mapping[str, Sequence[Row]]) -> str:
    columns = ["family", "models", "exported", "recorded", "law holds", "worst error", "float64", *NATIVE]
    rows = []
    for family, members in by_family.items():
        mine = [row["ours"] for row in members]
        errors = [m["law"] for m in mine if "law" in m]
        doubles = [m["law_float64"] for m in mine if "law_float64" in m and not m.get("float32_inside")]
        rows.append(
            [
                family,
                len(mine),
                sum(m.get("captured") == "export" for m in mine),
                sum(m.get("captured") == "record" for m in mine),
                sum(e <= TOLERANCE["law"] for e in errors),
                f"{max(errors, default=float('nan')):.0e}",
                f"{sum(e <= TOLERANCE['law_float64'] for e in doubles)} of {len(doubles)}" if doubles else "–",
                sum(m.get("native") == "all" for m in mine),
                sum(bool(m.get("native")) for m in mine),
            ]
        )
    notes = (
        f"The law: relative error of the outputs below {TOLERANCE['law']:.0e} in float32 and below "
        f"{TOLERANCE['law_float64']:.0e} in float64, the latter of the models that do not compute in float32 inside "
        "all the same. Same class: with every group cut, and with head dims left whole."
    )
    return f"{table(columns, rows)}\n\n{notes}"


def _time_table(by_family: Mapping[str, Sequence[Row]]) -> str:
    columns = [
        "family",
        "reach ≥ 99 %",
        "of main outputs",
        "least reach",
        "export s",
        "analysis s",
        "of export",
        "slice s",
        "native s",
    ]
    rows = []
    for family, members in by_family.items():
        mine = [row["ours"] for row in members if "analysis_s" in row["ours"]]
        ratios = [m["analysis_s"] / m["export_s"] for m in mine]
        rows.append(
            [
                family,
                f"{sum(m['reach'] >= REACH for m in mine)} of {len(members)}",
                f"{sum(m.get('reach_main', m['reach']) >= REACH for m in mine)} of {len(members)}",
                percent(min((m["reach"] for m in mine), default=0)),
                _median(mine, "export_s"),
                _median(mine, "analysis_s", 3),
                f"{percent(statistics.median(ratios))}, at most {percent(max(ratios))}" if ratios else "–",
                _median(mine, "slice_s"),
                _median(mine, "native_s"),
            ]
        )
    notes = (
        f"Reach: share of the parameters in a prunable group; of main outputs: with outputs={MAIN_OUTPUTS} where these "
        "are returned beside hidden states. Seconds are medians over the models, CPU time of one thread."
    )
    return f"{table(columns, rows)}\n\n{notes}"


def _median(rows: Sequence[Row], key: str, digits: int = 1) -> str:
    values = [row[key] for row in rows if key in row]
    return f"{statistics.median(values):.{digits}f}" if values else "–"


def _peer_table(by_family: Mapping[str, Sequence[Row]]) -> str:
    columns = ["family", "by", "captured", "cut and runs", "exact", "same class", "parameters reached", "seconds"]
    rows: list[list[Any]] = []
    for family, members in by_family.items():
        n = len(members)
        mine = [_compared(row["ours"]) for row in members]
        theirs = [_compared_peer(row.get("peer", {})) for row in members]
        for name, results in (("graphcomp", mine), ("Torch-Pruning", theirs)):
            counts = [f"{sum(r[key] for r in results)} of {n}" for key in ("captured", "ran", "exact", "same class")]
            reach = statistics.mean(r["reached"] for r in results)
            seconds = [r["seconds"] for r in results if r["ran"]]
            rows.append(
                [family, name, *counts, percent(reach, 0), f"{statistics.median(seconds or [float('nan')]):.1f}"]
            )
    notes = (
        "Parameters reached: mean over the models, 0 where nothing was cut. Seconds: median over the models that were "
        "cut, from the model to the smaller one. Ours count as the same class where head dims may have to stay whole."
    )
    return f"{table(columns, rows)}\n\n{notes}"


def _compared(mine: Row) -> Row:
    """Our row in the terms of the comparison."""
    return {
        "captured": "captured" in mine,
        "ran": "law" in mine,
        "exact": mine.get("law", 1.0) <= TOLERANCE["law"],
        "same class": bool(mine.get("native")),
        "reached": mine.get("reach", 0.0),
        "seconds": sum(mine.get(key, 0.0) for key in ("export_s", "analysis_s", "slice_s", "native_s")),
    }


def _compared_peer(peer: Row) -> Row:
    """Torch-Pruning's row in the terms of the comparison. It cuts the model in place: its class stays."""
    ran = bool(peer.get("cuts") and peer.get("runs"))
    return {
        "captured": bool(peer.get("captured")),
        "ran": ran,
        "exact": ran and bool(peer.get("exact")),
        "same class": ran,
        "reached": peer.get("reached", 0.0) if ran else 0.0,
        "seconds": peer.get("seconds", 0.0),
    }


def _lists(rows: Sequence[Row]) -> None:
    """What did not go well, model by model."""
    failed = [(r["name"], _why_failed(r["ours"])) for r in rows if _why_failed(r["ours"])]
    graphs = [(r["name"], r["ours"]["native_reason"]) for r in rows if r["ours"].get("native") == ""]
    whole = [(r["name"], r["ours"]["native_reason"]) for r in rows if r["ours"].get("native") == "head dims whole"]
    recorded = [(r["name"], r["ours"]["refusal"]) for r in rows if r["ours"].get("captured") == "record"]
    frozen = [
        (r["name"], percent(part), first, why)
        for r in rows
        for why, part, first in r["ours"].get("unreached", [])
        if part >= 0.001
    ]
    unknown = [(r["name"], op, why) for r in rows for op, why in r["ours"].get("unknown", {}).items()]
    _list("Where the law does not hold", ["model", "why"], failed)
    _list("Where the result is a graph and not the model's class", ["model", "why"], graphs)
    _list("Where it is, but only with head dims left whole", ["model", "why not with all groups cut"], whole)
    _list("Recorded, because export refused", ["model", "why"], recorded)
    _list("Parameters in no group (models below 99 %)", ["model", "share", "first", "reasons"], frozen)
    _list("Ops without a usable rule", ["model", "op", "why"], unknown)
    peers = [(r["name"], r["peer"]["failure"]) for r in rows if r.get("peer", {}).get("failure")]
    _list("Torch-Pruning's failures", ["model", "why"], peers)


def _list(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    if rows:
        section(title, table(columns, rows))


def _why_failed(mine: Row) -> str:
    if "failure" in mine:
        return str(mine["failure"])
    if mine.get("law", 1.0) > TOLERANCE["law"]:
        return f"error {mine['law']:.1e}" if "law" in mine else mine.get("native_reason", "")
    if mine.get("law_float64", 0.0) > TOLERANCE["law" if mine.get("float32_inside") else "law_float64"]:
        return f"error in float64 {mine['law_float64']:.1e}"
    return ""


def _op_table(rows: Iterable[Row]) -> str:
    nodes: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for row in rows:
        for op, count in row["ours"].get("ops", {}).items():
            nodes[op] += count
            models[op] += 1
    ruled = [op for op in nodes if not op.startswith("!")]
    total = sum(nodes.values())
    head = (
        f"{len(nodes)} distinct ops, {len(ruled)} with a rule ({percent(len(ruled) / len(nodes))}); "
        f"{total} op nodes, {percent(sum(nodes[op] for op in ruled) / total, 2)} with a rule."
    )
    body = [(op.lstrip("!"), models[op], n, "no" if op.startswith("!") else "yes") for op, n in nodes.most_common()]
    return f"{head}\n\n{table(['op', 'models', 'nodes', 'rule'], body)}"


if __name__ == "__main__":
    main()
