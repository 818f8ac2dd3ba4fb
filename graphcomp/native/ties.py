"""Why the user's class cannot hold a cut: lengths that must be equal, and lengths that no attribute holds.

A class holds lengths that are equal by one number (`chunk(2)`, one size for two parts) only as long as they stay equal.
Such lengths are found in three places: attributes that would need two values; calls that cut a dim into parts by one
number; and the first op at which the class, cut, makes another length than the sliced graph.
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from graphcomp.coupling.axis import Axes, Axis, Concat, Factor, kept_length, leaves, length, normal
from graphcomp.coupling.propagate import Coupling
from graphcomp.ir.graph import source_line
from graphcomp.ir.preserve import eval_copy
from graphcomp.native.attributes import LINE, TORCH, Place, module_paths
from graphcomp.pruning.ties import merged
from graphcomp.torch_compat import OpOverload, pytree

FactorTie: TypeAlias = frozenset[Factor]
"""Factors of which equally many units must stay."""

Shape: TypeAlias = tuple[int | None, ...]
"""Lengths; None stands for a symbolic length, which fits any."""


# ------------------------------------------------------------------------------------------------ ties of axes
def ties_among(axes: Iterable[Axis]) -> tuple[FactorTie, ...]:
    """Tie the factors that axes of one length are made of, where the axes are made alike."""
    by_length: dict[int, list[Axis]] = defaultdict(list)
    for axis in axes:
        size = length(axis)
        if isinstance(size, int):
            by_length[size].append(normal(axis))
    pairs = (pair for alike in by_length.values() for other in alike[1:] for pair in _pairs(alike[0], other))
    return merged(pairs)


def _pairs(a: Axis, b: Axis) -> Iterator[FactorTie]:
    if isinstance(a, Factor) or isinstance(b, Factor):
        ours, theirs = ([leaf for leaf in leaves(axis) if not leaf.frozen] for axis in (a, b))
        if len(ours) == len(theirs) == 1 and ours[0].size == theirs[0].size:
            yield frozenset([ours[0], theirs[0]])
    elif type(a) is type(b) and list(map(length, a.parts)) == list(map(length, b.parts)):
        for one, other in zip(a.parts, b.parts, strict=True):
            yield from _pairs(normal(one), normal(other))


def _parts(coupling: Coupling, node: fx.Node) -> Iterator[list[Axis]]:
    """For each dim that the op cuts into several results: the axes of the parts."""
    results: Sequence[Axes] = coupling.axes.get(node, [])
    operands = [axes for operand in node.all_input_nodes[:1] for axes in coupling.axes.get(operand, [])]
    if len(results) < 2 or len(operands) != 1 or any(len(axes) != len(operands[0]) for axes in results):
        return
    for dim, whole in enumerate(operands[0]):
        parts = [axes[dim] for axes in results]
        if sum(map(length, parts)) == length(whole):
            yield parts


# ------------------------------------------------------------------------------------------------ the first mismatch
@dataclass(frozen=True)
class Mismatch:
    """The first op at which the class, cut, does not do what the sliced graph does.

    Attributes:
        text: the shapes made and wanted, and the user's source line; "" where the class raises.
        axes: the axes of the dims concerned.
        ties: counts whose equality may mend the mismatch.
    """

    text: str
    axes: tuple[Axis, ...]
    ties: tuple[FactorTie, ...]


class _Made(NamedTuple):
    """One call of a torch function in a run: user's lines and paths of modules, innermost first; shapes it returned."""

    name: str
    places: tuple[Place, ...]
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    has_list: bool  # among the arguments


class _Watch(TorchFunctionMode):
    """Notes the shapes that every torch function returns."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.paths = {id(module): path for path, module in root.named_modules()}
        self.heard: list[_Made] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        shapes = tuple(tuple(t.shape) for t in pytree.tree_leaves(result) if isinstance(t, Tensor))
        if shapes:
            places, paths = self._where()
            has_list = any(isinstance(a, (tuple, list)) for a in (*args, *(kwargs or {}).values()))
            self.heard.append(_Made(getattr(func, "__name__", ""), places, paths, shapes, has_list))
        return result

    def _where(self) -> tuple[tuple[Place, ...], tuple[str, ...]]:
        places: list[Place] = []
        paths: list[str] = []
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code is not _watched.__code__:
            if not frame.f_code.co_filename.startswith(TORCH):
                places.append((Path(frame.f_code.co_filename).name, frame.f_lineno))
            path = self.paths.get(id(frame.f_locals.get("self")))
            if path is not None and path not in paths:
                paths.append(path)
            frame = frame.f_back
        return tuple(places), tuple(paths)


def _watched(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[_Made]:
    """Run `root`; the calls up to the end, or up to where the run raises."""
    with eval_copy(root, real=True) as copied, torch.no_grad():
        watch = _Watch(copied)
        try:
            with watch:
                copied(*args, **kwargs)
        except Exception:  # where a cut class raises is behind what is looked for
            return watch.heard
    return watch.heard


class _Known(NamedTuple):
    """One result of a node: the node, position among its results, axes, and shapes before and after the cut."""

    node: fx.Node
    position: int
    axes: Axes
    before: Shape
    after: Shape


Known: TypeAlias = Mapping[Place, Sequence[_Known]]
"""The user's source line -> results of its nodes."""


def first_mismatch(
    coupling: Coupling,
    counts: Mapping[Factor, int],
    whole: nn.Module,
    small: nn.Module,
    inputs: Callable[[], tuple[tuple[Any, ...], Mapping[str, Any]]],
) -> Mismatch | None:
    """Run the model and its cut copy side by side, and return the first call that does not follow the cut.

    Args:
        counts: units that stay of each cut factor.
        inputs: returns the example inputs, new ones at each time.
    """
    known = _by_place(coupling, counts)
    before, after = _watched(whole, *inputs()), _watched(small, *inputs())
    by_one_number = [call for call in before if len(call.shapes) > 1 and not call.has_list]
    for old, new in itertools.zip_longest(before, after):
        if old is None or (new is not None and old.name != new.name):
            return None
        place = next((place for place in old.places if place in known), None)
        here = _within(known[place], old.paths) if place else ()
        differing = [k for k in here if _differs(here, k, old, new)]
        if differing:
            ties = (tie for call in (old, *by_one_number) for tie in _ties_of(coupling, known, call))
            return _mismatch(coupling, differing[0], new, merged(ties))
    return None


def _by_place(coupling: Coupling, counts: Mapping[Factor, int]) -> Known:
    found: dict[Place, list[_Known]] = defaultdict(list)
    made: set[Factor] = set()
    for node in coupling.calls:
        made |= _made_of_values(coupling, node)
        match = LINE.match(source_line(node))
        for position, axes in enumerate(coupling.axes.get(node, []) if match else []):
            unknown = [not made.isdisjoint(leaves(axis)) for axis in axes]
            before = tuple(None if u else _number(length(a)) for a, u in zip(axes, unknown, strict=True))
            after = tuple(None if u else _number(kept_length(a, counts)) for a, u in zip(axes, unknown, strict=True))
            assert match is not None
            found[match[1], int(match[2])].append(_Known(node, position, axes, before, after))
    return found


def _made_of_values(coupling: Coupling, node: fx.Node) -> set[Factor]:
    """Return the dims that an op makes anew of its operands and freezes, where values may decide their lengths.

    How many scores exceed a threshold, say: another model has other values.
    """
    op = node.target
    if isinstance(op, OpOverload) and op.namespace == "aten" and torch.Tag.dynamic_output_shape not in op.tags:
        return set()
    read = {leaf for n in node.all_input_nodes for axes in coupling.axes.get(n, []) for a in axes for leaf in leaves(a)}
    results = [normal(axis) for axes in coupling.axes.get(node, []) for axis in axes] if read else []
    return {axis for axis in results if isinstance(axis, Factor) and axis.frozen and axis not in read}


def _number(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _within(known: Sequence[_Known], paths: Sequence[str]) -> Sequence[_Known]:
    """Those of the innermost module that has some."""
    for path in paths:
        inside = [k for k in known if path in module_paths(k.node)]
        if inside:
            return inside
    return known


def _differs(here: Sequence[_Known], known: _Known, old: _Made, new: _Made | None) -> bool:
    """Whether the cut call returns at `known`'s position what no result on this line is after the cut."""
    if known.position >= len(old.shapes) or not _fits(old.shapes[known.position], known.before):
        return False
    if new is None or len(new.shapes) != len(old.shapes):
        return True
    alike = [k for k in here if k.position == known.position and _fits(old.shapes[k.position], k.before)]
    return not any(_fits(new.shapes[k.position], k.after) for k in alike)


def _fits(shape: Sequence[int], pattern: Shape) -> bool:
    return len(shape) == len(pattern) and all(p is None or p == n for n, p in zip(shape, pattern, strict=True))


def _mismatch(coupling: Coupling, known: _Known, new: _Made | None, ties: tuple[FactorTie, ...]) -> Mismatch:
    operands = [a for n in known.node.all_input_nodes for axes in coupling.axes.get(n, []) for a in axes]
    if new is None or known.position >= len(new.shapes):
        return Mismatch("", tuple(operands), ties)
    made = new.shapes[known.position]
    wanted = ", ".join("*" if n is None else str(n) for n in known.after)
    text = f"the class makes a tensor of shape ({', '.join(map(str, made))}) where the cut needs ({wanted})"
    pairs = zip(known.axes, made, known.after, strict=False)
    axes = tuple(axis for axis, got, n in pairs if n is not None and got != n)
    at = source_line(known.node)
    return Mismatch(f"{text}, by a number that no attribute holds, at {at}", axes or known.axes, ties)


def _ties_of(coupling: Coupling, known: Known, call: _Made) -> Iterator[FactorTie]:
    """Ties of what the nodes on the call's line cut apart: results along one dim, or the parts of operands."""
    place = next((place for place in call.places if place in known), None)
    for node in dict.fromkeys(k.node for k in known[place]) if place else ():
        for parts in _parts(coupling, node):
            yield from ties_among(parts)
        for operand in node.all_input_nodes:
            for axis in (axis for axes in coupling.axes.get(operand, []) for axis in axes):
                whole = normal(axis)
                if isinstance(whole, Concat):
                    yield from ties_among(whole.parts)
