"""Curves of a training run as SVG: loss, share of units removed, mean bits over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 320, 150, 44, 18, 8
"""Pixels: of a drawing, and of the margins with numbers."""

MOST = 200
"""Points of a curve; of longer runs every second, third, … line is drawn."""

CURVES = (
    ("loss", ("loss",)),
    ("share of units removed", ("sparsity",)),
    ("mean bits of weights (blue) and activations", ("weight_bits", "activation_bits")),
)
"""Caption -> entries of the metrics."""


def drawn_curves(lines: Sequence[Mapping[str, Any]]) -> str:
    """Draw what the metrics of a run hold; "" where they hold none of it.

    Args:
        lines: of `metrics.jsonl` in the folder of a run.
    """
    every = max(1, -(-len(lines) // MOST))
    thin = [*lines[:-1:every], *lines[-1:]]
    figures = []
    for caption, names in CURVES:
        series = [[(line["step"], line[name]) for line in thin if _is_number(line.get(name))] for name in names]
        if any(len(points) > 1 for points in series):
            figures.append(f"<figure><figcaption>{escape(caption)}</figcaption>{_figure(series, thin)}</figure>")
    return "".join(figures)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _figure(series: Sequence[Sequence[tuple[float, float]]], lines: Sequence[Mapping[str, Any]]) -> str:
    values = [y for points in series for _, y in points]
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1
    first, last = lines[0]["step"], lines[-1]["step"]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / max(last - first, 1)
        return LEFT + across * (WIDTH - LEFT - 4), TOP + (1 - (y - low) / (high - low)) * (HEIGHT - TOP - BOTTOM)

    drawings = []
    for number, points in enumerate(series):
        if not points:
            continue
        at = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        drawings.append(f'<polyline class="{"second" if number else "first"}" points="{at}"/>')
    floor = HEIGHT - BOTTOM
    ticks = (
        f'<text x="{LEFT - 6}" y="{TOP + 8}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{LEFT - 6}" y="{floor}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 4}">{first}</text>'
        f'<text x="{WIDTH - 4}" y="{HEIGHT - 4}" text-anchor="end">step {last}</text>'
    )
    shades = "".join(_stages(lines, lambda step: place(step, low)[0], floor))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}">{shades}{"".join(drawings)}{ticks}</svg>'


def _stages(lines: Sequence[Mapping[str, Any]], across: Any, floor: float) -> list[str]:
    """Return a shade behind every second stage, with the name of each under the pointer."""
    found, begin, odd = [], lines[0]["step"], False
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        if following is None or following.get("stage") != line.get("stage"):
            x, end = across(begin), across(line["step"])
            style = "" if odd else ' style="opacity:0.12"'
            title = escape(str(line.get("stage", "")))
            found.append(
                f'<rect x="{x:.1f}" y="{TOP}" width="{max(end - x, 0):.1f}" height="{floor - TOP}"{style}>'
                f"<title>{title}</title></rect>"
            )
            begin, odd = line["step"], not odd
    return found
