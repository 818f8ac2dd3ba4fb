"""A report as one HTML file that needs nothing else: no network, no other file, no runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphcomp.arguments import check_path, wrong
from graphcomp.cost import FLOAT_BITS
from graphcomp.report.curves import drawn_curves
from graphcomp.report.lanes import drawn, lines_of
from graphcomp.system.files import replacing
from graphcomp.system.version import package_version

if TYPE_CHECKING:
    from graphcomp.coupling.groups import FrozenAxis
    from graphcomp.report.report import Change, LayerReport, Report

Metrics = Mapping[str, tuple[float, float]]
"""Name of a measure of quality -> before and after."""

SAFE = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""Content security policy: the page loads nothing."""

MACS, NUMBER = "multiply-accumulates", " class='num'"
"""Head of a column, and attribute of a cell that holds a number."""

ESCAPED = "\\u003c"
"""The JSON of "<", which would end a script."""


def page(report: Report, metrics: Metrics | None = None, curve: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the page.

    Args:
        metrics: measures of quality for the headline.
        curve: lines of `metrics.jsonl` of the training run.

    Raises:
        PlanError: `metrics` is not pairs of numbers by name.
    """
    metrics = checked_metrics(metrics)
    rows = _Rows(report)
    title = f"{report.model or 'Model'}, compressed"
    training = drawn_curves(curve) if curve else ""
    parts = [
        f"<header><h1>{escape(title)}</h1><p class='headline'>{' · '.join(headline(report, metrics))}</p></header>",
        f"<div class='cards'>{''.join(_cards(report, metrics))}</div>",
        f"<section><h2>Layers, and which channels live or die together</h2>{rows.map()}</section>",
        f"<section><h2>Training</h2><div class='curves'>{training}</div></section>" if training else "",
        f"<section><h2>What was checked</h2><ul class='facts'>{''.join(_checks(report))}</ul></section>",
        _section("Notes", [f"<li class='note'>{escape(note)}</li>" for note in report.notes]),
        f"<section><h2>What stays whole, and why</h2>{''.join(_frozen(report))}</section>" if report.frozen else "",
    ]
    data = json.dumps({"groups": rows.group_data(), "rows": rows.row_data()}, ensure_ascii=False, sort_keys=True)
    folder = resources.files("graphcomp.report") / "page"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    head = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{SAFE}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>"
    )
    body = [
        "<body><main>", *filter(None, parts), f"<footer>{_footer()}</footer></main>",
        f"<script type='application/json' id='data'>{data.replace('<', ESCAPED)}</script>",
        f"<script>\n{script}</script></body></html>",
    ]  # fmt: skip
    return "\n".join([head, *body, ""])


def write_page(
    report: Report, path: str | Path, metrics: Metrics | None = None, curve: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write the page; the file appears whole or not at all.

    Raises:
        PlanError: `path` is no path, or `metrics` is not pairs of numbers by name.
        ExportError: the place cannot be written.
    """
    check_path("path", path)
    text = page(report, metrics, curve)
    with replacing(Path(path)) as fresh:
        fresh.write_text(text, encoding="utf-8")


def framed(report: Report) -> str:
    """Return the page in a frame, as notebooks show it."""
    return (
        f'<iframe srcdoc="{escape(page(report))}" style="width:100%;height:720px;border:0" '
        f'title="{escape(report.model)}, compressed"></iframe>'
    )


def checked_metrics(metrics: Any) -> Metrics:
    """Return the measures of quality.

    Raises:
        PlanError: no mapping of names to pairs of numbers.
    """
    fix = 'metrics={"accuracy": (92.6, 92.2)}'
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise wrong("metrics", "a mapping of names to (before, after)", metrics, fix)
    for name, pair in metrics.items():
        numbers = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(x, (int, float)) for x in pair)
        if not isinstance(name, str) or not numbers:
            raise wrong("metrics", "names with a pair of numbers (before, after) each", {name: pair}, fix)
    return {name: (float(before), float(after)) for name, (before, after) in metrics.items()}


# ------------------------------------------------------------------------------------------------ the head
def headline(report: Report, metrics: Metrics) -> list[str]:
    """Return what a reader should know first, as HTML."""
    found = []
    if report.latency_ms is not None:
        found.append(_times(report.latency_ms, "faster in PyTorch", "slower in PyTorch"))
    found.append(_times(report.bytes, "smaller", "larger"))
    found.append(_times(report.macs, "fewer multiply-accumulates", "more multiply-accumulates"))
    found += [f"<b>{_signed(after - before)}</b> {escape(name)}" for name, (before, after) in metrics.items()]
    kernels = report.kernels
    if kernels is not None and "speed" in kernels:
        found.append(escape(kernels["speed"]["line"]))
    elif kernels is not None:
        found.append(f"{kernels['share']:.0%} of convolutions and products on integers")
    return [part for part in found if part]


def _times(change: Change, better: str, worse: str) -> str:
    """Return how many times a cost went down or up; "" where it stays."""
    if not change.before or not change.after or abs(change.ratio - 1) < 0.005:
        return ""
    word, times = (better, 1 / change.ratio) if change.ratio < 1 else (worse, change.ratio)
    return f"<b>{times:.{1 if times < 100 else 0}f} ×</b> {word}"


def _signed(number: float) -> str:
    return f"{number:+.4g}".replace("-", "−")


def _cards(report: Report, metrics: Metrics) -> list[str]:
    costs = [
        ("parameters", report.params, ""),
        ("multiply-accumulates", report.macs, ""),
        ("bit operations", report.bops, ""),
        ("bytes", report.bytes, "B"),
    ]
    cards = [_card(name, change, short(change.before, unit), short(change.after, unit)) for name, change, unit in costs]
    if report.latency_ms is not None:
        own = report.latency_ms
        cards.append(_card("latency in PyTorch", own, f"{own.before:.3g} ms", f"{own.after:.3g} ms"))
    if report.kernels is not None and "speed" in report.kernels:
        speed = report.kernels["speed"]
        pair = f"float file {speed['float_ms']:.3g} ms → {speed['ms']:.3g} ms"
        cards.append(_framed("onnxruntime", f"{speed['ratio']:.2f} ×", pair, 1 / speed["ratio"]))
    cards += [
        _framed(name, f"{after:g}", f"before: {before:g}", after / before if before else 0.0)
        for name, (before, after) in metrics.items()
    ]
    units = f"{report.units_total - report.units_removed} of {report.units_total} stay"
    cards.append(_framed("units", f"−{report.sparsity:.0%}", units, 1 - report.sparsity))
    return cards


def _card(name: str, change: Change, before: str, after: str) -> str:
    return _framed(name, f"{change.ratio:.1%}", f"{before} → {after}", change.ratio)


def _framed(name: str, large: str, pair: str, share: float) -> str:
    return (
        f"<div class='card'><div class='name'>{escape(name)}</div><div class='ratio'>{escape(large)}</div>"
        f"{_track(share)}<div class='pair'>{escape(pair)}</div></div>"
    )


def _track(share: float) -> str:
    return f"<div class='track'><i style='width:{100 * min(max(share, 0.0), 1.0):.1f}%'></i></div>"


def short(number: float, unit: str = "") -> str:
    """Return a number of at most four digits, with k, M, G or T (powers of 1000)."""
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= power:
            return f"{number / power:.3g} {letter}{unit}"
    return f"{number:.4g} {unit}".rstrip()


# ------------------------------------------------------------------------------------------------ layers and groups
class _Rows:
    """Layers as rows of a table, groups as lines beside the table.

    Attributes:
        report: whose layers.
        names: row -> name of the parameter.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        groups = report.groups
        held = {_tensor(m) for group in groups for m in group["members"]} | {axis.name for axis in report.frozen}
        self.names = [f"{r.name}.weight" if f"{r.name}.weight" in held else r.name for r in report.layers]
        at = {name: row for row, name in enumerate(self.names)}
        consumed = [set(group.get("consumers", ())) for group in groups]
        self._makes = [
            [at[_tensor(m)] for m in group["members"] if m not in own and _tensor(m) in at]
            for group, own in zip(groups, consumed, strict=True)
        ]
        self._reads = [[at[_tensor(m)] for m in own if _tensor(m) in at] for own in consumed]
        self.lines = lines_of(self._makes, self._reads)
        self._of_row: dict[int, list[int]] = {}
        for line in self.lines:
            for row in line.rows:
                self._of_row.setdefault(row, []).append(line.group)
        self._frozen: dict[int, list[str]] = {}
        for axis in report.frozen:
            if axis.name in at and not _is_kernel(axis):
                where = f" ({axis.reason.source})" if axis.reason.source else ""
                text = f"dim {axis.dim}, {axis.indices} indices: {axis.reason}{where}"
                self._frozen.setdefault(at[axis.name], []).append(text)
        kernels = report.kernels or {}
        self._kernels = {_layer(name): kernel for name, kernel in kernels.get("layers", {}).items()}
        left = [pair for kind in ("stayed_float", "unquantized") for pair in kernels.get(kind, ())]
        self._left = {_layer(name): why for name, why in left}

    def map(self) -> str:
        """Return the map, the table and the panel of details."""
        if not self.names:
            return "<p class='soft'>No layer has a weight.</p>"
        titles = [_title(group) for group in self.report.groups]
        frozen = {row: len(reasons) for row, reasons in self._frozen.items()}
        svg = drawn(self.lines, titles, frozen, len(self.names))
        hint = (
            "<p class='soft'>A line is a group: its channels live or die together. A full dot makes them, a ring reads "
            "them, a diamond marks dims that stay whole. Click a line or a row.</p>"
        )
        panel = "<aside id='panel' aria-live='polite'><p class='soft'>Nothing is chosen.</p></aside>"
        table = f"<table><thead>{self._head()}</thead><tbody>{''.join(self._body())}</tbody></table>"
        return f"{hint}<div class='split'><div class='scroll'><div class='map'>{svg}{table}</div></div>{panel}</div>"

    @property
    def _columns(self) -> list[str]:
        report = self.report
        quantized = any(r.weight_bits != FLOAT_BITS or r.activation_bits != FLOAT_BITS for r in report.layers)
        also = {
            "bits W / A": quantized,
            "error": bool(report.quantization_errors),
            "kernel": bool(self._kernels or self._left),
        }
        return ["layer", "units", MACS, "parameters", *(name for name, has in also.items() if has)]

    def _head(self) -> str:
        kinds = {"layer": "", "kernel": "", "units": " class='num' colspan='2'", MACS: " class='num' colspan='2'"}
        cells = (f"<th{kinds.get(name, NUMBER)}>{name}</th>" for name in self._columns)
        return f"<tr>{''.join(cells)}</tr>"

    def _body(self) -> list[str]:
        layers = self.report.layers
        most = max((r.macs.before for r in layers if r.macs), default=0.0)
        columns = self._columns
        return [
            f"<tr data-row='{row}'>{''.join(self._cell(name, layer, most) for name in columns)}</tr>"
            for row, layer in enumerate(layers)
        ]

    def _cell(self, column: str, layer: LayerReport, most: float) -> str:
        if column == "layer":
            return f"<td><button type='button' class='name'>{escape(layer.name)}</button></td>"
        if column == "units":
            share = layer.units_kept / max(layer.units_total, 1)
            return f"<td>{_track(share)}</td><td{NUMBER}>{layer.units_kept} of {layer.units_total}</td>"
        if column == MACS:
            bar = _track(layer.macs.after / most) if layer.macs and most else ""
            return f"<td>{bar}</td><td{NUMBER}>{_arrow(layer.macs)}</td>"
        if column == "parameters":
            return f"<td{NUMBER}>{_arrow(layer.params)}</td>"
        if column == "bits W / A":
            return f"<td{NUMBER}>{_bits(layer.weight_bits)} / {_bits(layer.activation_bits)}</td>"
        if column == "error":
            error = self.report.quantization_errors.get(layer.name)
            return f"<td{NUMBER}>{'' if error is None else f'{error:.1e}'}</td>"
        if layer.name in self._left:
            return "<td class='warn'>float</td>"
        return f"<td>{escape(self._kernels.get(layer.name, ''))}</td>"

    def group_data(self) -> list[dict[str, Any]]:
        """Return what the panel shows of each group."""
        hues = {line.group: line.hue for line in self.lines}
        found = []
        for index, group in enumerate(self.report.groups):
            reads = set(group.get("consumers", ()))
            makes = [m for m in group["members"] if m not in reads]
            modules = [_module(self.names[row]) for row in self._makes[index]] or [_module(_tensor(m)) for m in makes]
            names = list(dict.fromkeys(modules))
            found.append({
                "name": group["name"], "role": group["role"], "hue": hues.get(index, 0),
                "kept": group["units"]["kept"], "total": group["units"]["total"],
                "makes": makes, "reads": [m for m in group["members"] if m in reads],
                "rows": [self.report.layers[row].name for row in {*self._makes[index], *self._reads[index]}],
                "ignore": _call(f"ignore={json.dumps(names[:1])}") if names else "",
                "share": _call(f"sparsity={{{json.dumps(names[0])}: 0.25}}") if names else "",
            })  # fmt: skip
        return found

    def row_data(self) -> list[dict[str, Any]]:
        """Return what the panel shows of each layer."""
        return [
            {
                "name": layer.name,
                "facts": self._facts(layer),
                "groups": self._of_row.get(row, []),
                "frozen": self._frozen.get(row, []),
                "ignore": _call(f"ignore={json.dumps([_module(self.names[row])])}"),
                "bits": self._own_bits(layer, _module(self.names[row])),
            }
            for row, layer in enumerate(self.report.layers)
        ]

    def _facts(self, layer: LayerReport) -> list[str]:
        report, name = self.report, layer.name
        facts = [f"{layer.units_kept} of {layer.units_total} units stay"]
        facts += [f"{_arrow(layer.macs)} multiply-accumulates"] if layer.macs else []
        facts += [f"{_arrow(layer.params)} parameters"] if layer.params else []
        if layer.weight_bits != FLOAT_BITS or layer.activation_bits != FLOAT_BITS:
            facts.append(f"weights: {_bits(layer.weight_bits)} bits; activations: {_bits(layer.activation_bits)} bits")
        if name in report.quantization_errors:
            facts.append(
                f"relative error that quantization makes in its output: {report.quantization_errors[name]:.1e}"
            )
        for what, changes in (("repair", report.repairs), ("repair of the rounding", report.quantization_repairs)):
            if name in changes:
                pair = f"{changes[name].before:.2e} → {changes[name].after:.2e}"
                facts.append(f"relative error of its output, {what}: {pair}")
        facts += [f"kernel: {self._kernels[name]}"] if name in self._kernels else []
        facts += [f"stays float: {self._left[name]}"] if name in self._left else []
        return facts

    def _own_bits(self, layer: LayerReport, module: str) -> str:
        """Return the call that gives a layer bits of its own; "" where nothing was quantized."""
        if "bits W / A" not in self._columns:
            return ""
        return (
            "config = gc.QuantConfig(overrides={\n"
            f'    {json.dumps(module)}: (gc.QuantSpec(8), gc.QuantSpec(8, granularity="tensor")),\n}})\n'
            + _call("quantization=gc.PostTraining(config)")
        )


def _title(group: Mapping[str, Any]) -> str:
    units = group["units"]
    return f"{group['name']}: {units['kept']} of {units['total']} {group['role']} units"


def _call(options: str) -> str:
    return f"gc.compress(model, inputs, {options})"


def _tensor(member: str) -> str:
    return member.rpartition("[")[0]


def _layer(name: str) -> str:
    """Return the layer of a weight, or of the integers of a weight in an exported file."""
    return name.removesuffix("_codes").removesuffix(".weight")


def _is_kernel(axis: FrozenAxis) -> bool:
    """Whether the axis is one along which a kernel lies: no unit could go there."""
    return axis.dim >= 2 and "addressed by position" in str(axis.reason)


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def _bits(bits: float) -> str:
    return "float" if bits == FLOAT_BITS else f"{bits:.3g}"


def _arrow(change: Change | None) -> str:
    if change is None:
        return ""
    before, after = short(change.before), short(change.after)
    return before if before == after else f"{before} → {after}"


# ------------------------------------------------------------------------------------------------ the rest
def _section(title: str, items: Sequence[str]) -> str:
    return f"<section><h2>{title}</h2><ul class='facts'>{''.join(items)}</ul></section>" if items else ""


def _checks(report: Report) -> list[str]:
    held = [
        f"<li class='held'>{escape(law)}: largest relative error {error:.1e}</li>"
        for law, error in report.verified.items()
    ]
    left = [f"<li class='open'>not checked: {escape(law)}: {escape(why)}</li>" for law, why in report.unchecked.items()]
    return held + left or ["<li class='open'>nothing was checked</li>"]


def _frozen(report: Report) -> list[str]:
    """Return one part that opens per reason, with what the reason holds."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for axis in report.frozen:
        text = f"{axis.name}, dim {axis.dim} ({axis.indices})"
        reasons.setdefault((str(axis.reason), axis.reason.source), []).append(text)
    parts = []
    for (reason, source), axes in reasons.items():
        at = f"<p class='soft mono'>{escape(source)}</p>" if source else ""
        items = "".join(f"<li>{escape(axis)}</li>" for axis in axes)
        summary = f"{escape(reason)} <span class='soft'>({len(axes)})</span>"
        parts.append(f"<details><summary>{summary}</summary>{at}<ul class='mono'>{items}</ul></details>")
    return parts


def _footer() -> str:
    return f"graphcomp {escape(package_version())}, torch {escape(torch.__version__)}"
