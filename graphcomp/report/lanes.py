"""The dependency map: layers are rows, and each group is a vertical line that touches the rows of its members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

ROW, HEAD, LANE, RADIUS = 26, 34, 18, 5
"""Pixels: height of a row and of the head of the table, width of a lane, radius of a dot."""

GOLDEN = 137.508
"""Degrees between the hues of neighbours: the golden angle, after which no hue comes back soon."""


@dataclass(frozen=True)
class Line:
    """One group on the map.

    Attributes:
        group: index.
        lane: column, from the left.
        makes, reads: rows in which units are made, and in which they are read.
    """

    group: int
    lane: int
    makes: frozenset[int]
    reads: frozenset[int]

    @property
    def rows(self) -> tuple[int, ...]:
        """Return the rows that the line touches, from the top."""
        return tuple(sorted(self.makes | self.reads))

    @property
    def hue(self) -> int:
        """Return the hue of the line, in degrees."""
        return round(self.group * GOLDEN) % 360


def lines_of(makes: Sequence[Sequence[int]], reads: Sequence[Sequence[int]]) -> list[Line]:
    """Place groups in lanes: the longest first, each in the leftmost lane whose rows are free.

    Args:
        makes: group -> rows in which its units are made.
        reads: group -> rows in which its units are read.

    Returns:
        One line per group that touches a row, in the order of the groups.
    """
    spans = {}
    for group, (own, other) in enumerate(zip(makes, reads, strict=True)):
        touched = {*own, *other}
        if touched:
            spans[group] = (min(touched), max(touched))
    lanes: list[list[tuple[int, int]]] = []
    found: dict[int, Line] = {}
    for group, (first, last) in sorted(spans.items(), key=lambda item: (item[1][0] - item[1][1], item[0])):
        free = (k for k, taken in enumerate(lanes) if all(last < start or end < first for start, end in taken))
        lane = next(free, len(lanes))
        if lane == len(lanes):
            lanes.append([])
        lanes[lane].append((first, last))
        found[group] = Line(group, lane, frozenset(makes[group]), frozenset(reads[group]))
    return [found[group] for group in sorted(found)]


def drawn(lines: Sequence[Line], titles: Sequence[str], frozen: Mapping[int, int], rows: int) -> str:
    """Draw the map as SVG.

    Args:
        lines: of `lines_of`.
        titles: group -> text that is shown under the pointer.
        frozen: row -> number of its dims in which indices must stay.
        rows: number of rows.
    """
    lanes = 1 + max((line.lane for line in lines), default=-1)
    width, height = LANE * (lanes + 2), HEAD + ROW * rows
    shapes = [_line(line, titles[line.group]) for line in lines]
    at = LANE * (lanes + 0.5) + LANE / 2
    for row, dims in frozen.items():
        x, y = at + 2, _middle(row)
        plural = "s" if dims > 1 else ""
        shapes.append(
            f'<g><title>{dims} dim{plural} with indices that must stay</title><path class="held" '
            f'd="M{x:g} {y - 5:g}l5 5-5 5-5-5z"/></g>'
        )
    return (
        f'<svg id="lines" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="groups of coupled channels over the layers">{"".join(shapes)}</svg>'
    )


def _line(line: Line, title: str) -> str:
    x = LANE * (line.lane + 0.75)
    rows = line.rows
    path = f"M{x:g} {_middle(rows[0]):g}V{_middle(rows[-1]):g}"
    dots = []
    for row in rows:
        both = row in line.makes and row in line.reads
        dots.append(_dot(x, row, "makes" if row in line.makes and not both else "reads", RADIUS))
        if both:
            dots.append(_dot(x, row, "makes", RADIUS - 3))
    return (
        f'<g class="group" data-group="{line.group}" style="--hue:{line.hue}"><title>{escape(title)}</title>'
        f'<path d="{path}"/><path class="hit" d="{path}"/>{"".join(dots)}</g>'
    )


def _dot(x: float, row: int, kind: str, radius: int) -> str:
    return f'<circle class="{kind}" cx="{x:g}" cy="{_middle(row):g}" r="{radius}"/>'


def _middle(row: int) -> float:
    return HEAD + ROW * (row + 0.5)
