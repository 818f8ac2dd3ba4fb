"""Which Python attributes of a model's modules hold a length that a cut changes, and what they must become.

A model is run once with every int attribute replaced by a TracedInt, an int that remembers which attributes it was
computed from. Where one arrives as an argument of a torch function, the captured graph says which axis that argument
is the length of: the node is known by the user's source line and the module whose forward issued it.
"""

from __future__ import annotations

import itertools
import operator
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from graphcomp.coupling.axis import Axis, Concat, Factor, Product, kept_length, length, normal
from graphcomp.coupling.propagate import Coupling
from graphcomp.ir.graph import source_line
from graphcomp.ir.preserve import eval_copy
from graphcomp.ir.settings import ints_of, is_settings, with_own
from graphcomp.system.files import folder_of

Site: TypeAlias = tuple[str, str, int | None]
"""Path of a module, name of its attribute, position in it where it is a tuple or list of ints. A number in an object of
settings has a name with a dot: "config.num_heads"."""

Values: TypeAlias = Mapping[Site, int]
Place: TypeAlias = tuple[str, int]
"""A user's source line: file name and number."""

TORCH = folder_of(torch)
LINE = re.compile(r"^(.+):(\d+), in ")
MAX_SOLUTIONS = 64


# ------------------------------------------------------------------------------------------------ sites
def sites(root: nn.Module) -> dict[Site, int]:
    """Every int that a module of `root` holds as an attribute, in an attribute that is a tuple or list of ints, or in
    an object of settings."""
    found: dict[Site, int] = {}
    known: dict[int, dict[str, int]] = {}  # modules share their settings
    for path, module in root.named_modules():
        for name, value in vars(module).items():
            if type(value) is int:
                found[path, name, None] = value
            elif type(value) in (tuple, list, torch.Size) and all(type(item) is int for item in value):
                found.update({(path, name, k): item for k, item in enumerate(value)})
            elif hasattr(value, "__dict__"):
                if id(value) not in known:
                    known[id(value)] = ints_of(value) if is_settings(value) else {}
                found.update({(path, f"{name}.{inner}", None): item for inner, item in known[id(value)].items()})
    return found


def put(root: nn.Module, site: Site, value: int) -> Any:
    """Give the attribute its new value, past any __setattr__; what the whole attribute then is."""
    path, name, position = site
    module = root.get_submodule(path)
    holder, _, inner = name.rpartition(".")
    if holder:
        vars(module)[holder] = with_own(vars(module)[holder], inner, value)
        return value
    if position is None:
        vars(module)[name] = value
        return value
    old = vars(module)[name]
    items = [value if k == position else item for k, item in enumerate(old)]
    vars(module)[name] = items if isinstance(old, list) else tuple(items)
    return vars(module)[name]


def describe(site: Site) -> str:
    """'layer.0.attention.num_heads', 'norm.normalized_shape[0]'."""
    path, name, position = site
    text = f"{path}.{name}" if path else name
    return text if position is None else f"{text}[{position}]"


# ------------------------------------------------------------------------------------------------ tracing
class TracedInt(int):
    """An int that knows which attributes it comes from, and how to compute it from other values of these."""

    attributes: frozenset[Site]
    compute: Callable[[Values], int]
    direct: bool  # an attribute as it is
    mixed: bool  # plain ints took part, which may be lengths that change, too

    @staticmethod
    def of(site: Site, value: int) -> TracedInt:
        """The attribute at `site`."""
        made = TracedInt.make(value, frozenset([site]), operator.itemgetter(site), mixed=False)
        made.direct = True
        return made

    @staticmethod
    def make(value: int, attributes: frozenset[Site], compute: Callable[[Values], int], mixed: bool) -> TracedInt:
        """An int of this `value`, computed from attributes."""
        made = TracedInt(value)
        made.attributes, made.compute, made.direct, made.mixed = attributes, compute, False, mixed
        return made

    def __deepcopy__(self, memo: Any) -> TracedInt:
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)


def _arithmetic(name: str, apply: Callable[[int, int], int], swapped: bool) -> None:
    plain = getattr(int, name)

    def method(self: TracedInt, other: Any) -> Any:
        value = plain(self, other)
        if value is NotImplemented or not isinstance(other, int):
            return value
        known = other.attributes if isinstance(other, TracedInt) else frozenset()

        def compute(values: Values) -> int:
            mine = self.compute(values)
            theirs = other.compute(values) if isinstance(other, TracedInt) else other
            return apply(theirs, mine) if swapped else apply(mine, theirs)

        mixed = self.mixed or not isinstance(other, TracedInt) or other.mixed
        return TracedInt.make(int(value), self.attributes | known, compute, mixed)

    setattr(TracedInt, name, method)


for _name, _apply in (
    ("add", operator.add),
    ("sub", operator.sub),
    ("mul", operator.mul),
    ("floordiv", operator.floordiv),
):
    _arithmetic(f"__{_name}__", _apply, swapped=False)
    _arithmetic(f"__r{_name}__", _apply, swapped=True)


@dataclass(frozen=True)
class Arrival:
    """One call of a torch function that got lengths made from attributes.

    `numbers` are all ints among its arguments, in order, traced or not. `places` are the user's lines on the stack,
    innermost first: export knows the ops of a helper function by the line of the `forward` that called it.
    """

    places: tuple[Place, ...]
    numbers: tuple[int, ...]
    sequences: tuple[range | None, ...]  # for each number the positions of the tuple or list it came in, if it did

    @property
    def traced(self) -> list[tuple[int, TracedInt]]:
        """(position among the numbers, number)"""
        return [(k, n) for k, n in enumerate(self.numbers) if isinstance(n, TracedInt)]


class _Listen(TorchFunctionMode):
    """Notes every torch function that is handed a TracedInt, then calls it with plain ints."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Arrival] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        numbers, sequences = _numbers((*args, *(kwargs or {}).values()))
        if any(isinstance(n, TracedInt) for n in numbers):
            self.heard.append(Arrival(tuple(_user_places()), numbers, sequences))
        return func(*args, **(kwargs or {}))


def _numbers(arguments: tuple[Any, ...]) -> tuple[tuple[int, ...], tuple[range | None, ...]]:
    """All ints among the arguments of a call, and for each the positions of the sequence it is part of.

    What indexes a tensor (`x[..., :n]`) is no sequence of lengths.
    """
    numbers: list[int] = []
    sequences: list[range | None] = []
    for argument in arguments:
        found = list(_ints(argument))
        listed = isinstance(argument, (tuple, list)) and not any(isinstance(a, slice) or a is ... for a in argument)
        together = range(len(numbers), len(numbers) + len(found)) if listed else None
        numbers += found
        sequences += [together] * len(found)
    return tuple(numbers), tuple(sequences)


def _ints(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, slice):
        yield from _ints((value.start, value.stop))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _ints(item)
    elif isinstance(value, dict):
        yield from _ints(tuple(value.values()))


def _user_places() -> Iterator[Place]:
    """File name and line of the frames outside torch, innermost first, up to the run of the model."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code is not trace.__code__:
        if not frame.f_code.co_filename.startswith(TORCH):
            yield Path(frame.f_code.co_filename).name, frame.f_lineno
        frame = frame.f_back


def trace(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Arrival]:
    """Run `root` once on its example inputs with traced attributes; it is left as it was.

    A model that does not run with them (it checks `type(n) is int`, say) yields what was heard until then.
    """
    listen = _Listen()
    with eval_copy(root, real=True) as copied, torch.no_grad():
        for site, value in sites(copied).items():
            put(copied, site, TracedInt.of(site, value))
        try:
            with listen:
                copied(*args, **kwargs)
        except Exception:  # the trace is a source of hints; the verification that follows decides
            return listen.heard
    return listen.heard


# ------------------------------------------------------------------------------------------------ lengths
Change: TypeAlias = tuple[int, int]
"""A length before and after the cut."""


class AxisLength(NamedTuple):
    """Length of one axis before and after the cut."""

    before: int
    after: int
    axis: Axis


@dataclass(frozen=True)
class OpLengths:
    """The arguments of one node that hold lengths: for each the lengths in order, None for what is not one."""

    arguments: tuple[tuple[AxisLength | None, ...], ...]
    lists: tuple[bool, ...]  # for each argument whether it is a list of lengths, or one length
    modules: frozenset[str]  # paths of the modules whose forward was running

    def known(self) -> set[int]:
        """All lengths before the cut."""
        return {length.before for argument in self.arguments for length in argument if length is not None}

    def like(self, numbers: Sequence[int]) -> bool:
        """Whether one argument is these numbers."""
        return any(
            len(argument) == len(numbers)
            and any(argument)
            and all(
                known is None or known.before in (n, -1) or n == -1 for known, n in zip(argument, numbers, strict=True)
            )
            for argument in self.arguments
        )


@dataclass
class Lengths:
    """Lengths before and after the cut, by where in the user's code they are used."""

    arguments: dict[Place, list[OpLengths]] = field(default_factory=lambda: defaultdict(list))
    """source line -> its nodes, in the order of the graph."""
    of_module: dict[str, set[Change]] = field(default_factory=lambda: defaultdict(set))
    """module path -> lengths of the axes of what its forward computes, and of its own tensors, and their parts."""


def find_lengths(coupling: Coupling, counts: Mapping[Factor, int]) -> Lengths:
    """What the graph says of lengths; `counts` are the units that stay of each cut factor."""
    found = Lengths()
    for own in (coupling, *coupling.beside):
        _find_lengths(own, counts, found)
    return found


def _find_lengths(coupling: Coupling, counts: Mapping[Factor, int], found: Lengths) -> None:
    for node in coupling.graph.nodes:
        axes = [axis for value in coupling.axes.get(node, []) for axis in value]
        changes = {change for axis in axes for change in _parts(axis, counts)}
        for path in module_paths(node):
            found.of_module[path] |= changes
        if node in coupling.calls:
            match = LINE.match(source_line(node))
            said = coupling.calls[node].lengths.values()
            constants = tuple(_changes(axes, counts) for axes in said)
            lists = tuple(isinstance(axes, (list, tuple)) for axes in said)
            if match and constants:
                op = OpLengths(constants, lists, frozenset(module_paths(node)))
                found.arguments[match[1], int(match[2])].append(op)
    for name, held in coupling.attributes.items():
        owner = name.rpartition(".")[0]
        for path in (owner, owner.rpartition(".")[0]):
            found.of_module[path] |= {change for axis in held for change in _parts(axis, counts)}


def module_paths(node: fx.Node) -> list[str]:
    """Paths of the modules whose forward was running, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [re.sub(r"@\d+$", "", entry[0]) for entry in stack.values()]
    return [path.removeprefix("L['self'].").removeprefix("L['self']") for path in paths]


def _changes(axes: Any, counts: Mapping[Factor, int]) -> tuple[AxisLength | None, ...]:
    """Of what a Call says of one argument: an Axis, None, or a list of these."""
    listed: Sequence[Axis | None] = axes if isinstance(axes, (list, tuple)) else [axes]
    changes = [(axis, None if axis is None else _change(axis, counts)) for axis in listed]
    return tuple(None if axis is None or change is None else AxisLength(*change, axis) for axis, change in changes)


def _change(axis: Axis, counts: Mapping[Factor, int]) -> Change | None:
    before, after = length(axis), kept_length(axis, counts)
    return (before, after) if isinstance(before, int) and isinstance(after, int) else None


def _parts(axis: Axis, counts: Mapping[Factor, int]) -> Iterator[Change]:
    """The lengths of `axis`, of its pieces, and of neighbouring pieces taken together."""
    axis = normal(axis)
    change = _change(axis, counts)
    if change is not None:
        yield change
    if isinstance(axis, Factor):
        return
    for part in axis.parts:
        yield from _parts(part, counts)
    kind = type(axis)
    for start, stop in itertools.combinations(range(len(axis.parts) + 1), 2):
        if 1 < stop - start < len(axis.parts) and isinstance(axis, (Product, Concat)):
            change = _change(kind(axis.parts[start:stop]), counts)
            if change is not None:
                yield change


# ------------------------------------------------------------------------------------------------ solving
@dataclass(frozen=True)
class Constraint:
    """A number made from attributes must be one of `allowed` after the cut."""

    number: TracedInt
    allowed: frozenset[int]
    place: Place
    axes: tuple[Axis, ...] = ()  # whose length the number is

    def holds(self, values: Values) -> bool:
        """Whether it does with these values of the attributes."""
        try:
            return self.number.compute(values) in self.allowed
        except ZeroDivisionError:
            return False


@dataclass(frozen=True)
class Solutions:
    """Assignments of new values, those that change least first; or why there is none.

    `axes`: for each set of attributes without a value, the axes whose lengths it holds.
    """

    candidates: tuple[dict[Site, int], ...]
    conflict: str = ""
    axes: tuple[tuple[Axis, ...], ...] = ()


def constraints(arrivals: Iterable[Arrival], lengths: Lengths) -> list[Constraint]:
    """What each arrival says, where a node is known by its line."""
    by_place: dict[Place, list[Arrival]] = defaultdict(list)
    for arrival in arrivals:
        place = next((place for place in arrival.places if place in lengths.arguments), None)
        if place is not None:
            by_place[place].append(arrival)
    found: list[Constraint] = []
    for place, calls in by_place.items():
        for arrival, nodes in _matched(calls, lengths.arguments[place]):
            for position, number in arrival.traced:
                fitting = [length for node in nodes for length in _allowed(node, arrival, position)]
                allowed = frozenset(length.after for length in fitting) or frozenset([int(number)])
                found.append(Constraint(number, allowed, place, tuple(length.axis for length in fitting)))
    return found


def _matched(calls: Sequence[Arrival], nodes: Sequence[OpLengths]) -> Iterator[tuple[Arrival, Sequence[OpLengths]]]:
    """Calls of one line with the nodes each may stand for, the fewest that can be told: the k-th of those calls that
    look alike is the k-th of as many nodes."""
    kinds: dict[tuple[Any, ...], list[Arrival]] = defaultdict(list)
    for call in calls:
        owners = frozenset(site[0] for _, number in call.traced for site in number.attributes)
        kinds[owners, tuple(map(int, call.numbers))].append(call)
    for (owners, numbers), alike in kinds.items():
        fitting = _fitting(nodes, owners, numbers, alike[0])
        for k, call in enumerate(alike):
            yield call, [fitting[k]] if len(fitting) == len(alike) else fitting


def _fitting(
    nodes: Sequence[OpLengths], owners: frozenset[str], numbers: Sequence[int], call: Arrival
) -> Sequence[OpLengths]:
    """The nodes that a call with such numbers, made from attributes of `owners`, can be."""
    traced = {int(number) for _, number in call.traced}
    nodes = [node for node in nodes if owners & node.modules] or nodes
    nodes = [node for node in nodes if node.like(numbers)] or nodes
    return [node for node in nodes if traced <= node.known()] or [n for n in nodes if traced & n.known()] or nodes


def _allowed(node: OpLengths, arrival: Arrival, position: int) -> list[AxisLength]:
    """Lengths of the node that the number at `position` of a call's numbers can be.

    A number that came in a sequence (a stride, a shape) is a length only of an argument that is a list as long.
    """
    wanted, together = arrival.numbers[position], arrival.sequences[position]
    if together is not None:
        lists = [
            a for a, is_list in zip(node.arguments, node.lists, strict=True) if is_list and len(a) == len(together)
        ]
        return [length for a in lists if (length := a[position - together.start]) and length.before == wanted]
    for argument in node.arguments:
        if len(argument) == len(arrival.numbers):
            known = argument[position]
            if known is not None and known.before == wanted:
                return [known]
    return [length for argument in node.arguments for length in argument if length and length.before == wanted]


def solve(values: Values, found: Sequence[Constraint], lengths: Lengths) -> Solutions:
    """Values of all attributes that meet the constraints; an attribute that need not change does not."""
    chosen: list[list[dict[Site, int]]] = []
    conflicts: list[list[Constraint]] = []
    for names, bounds in _components(found):
        options = _component(names, bounds, values, lengths) or _component(
            names, [bound for bound in bounds if not bound.number.mixed], values, lengths
        )
        if options:
            chosen.append(options)
        else:
            conflicts.append(bounds)
    if conflicts:
        axes = tuple(tuple(axis for bound in bounds for axis in bound.axes) for bounds in conflicts)
        return Solutions((), _conflict(conflicts[0]), axes)
    combined = itertools.islice(itertools.product(*chosen), MAX_SOLUTIONS)
    merged = [{site: new for part in parts for site, new in part.items() if new != values[site]} for parts in combined]
    return Solutions(tuple(merged))


def _components(found: Sequence[Constraint]) -> list[tuple[list[Site], list[Constraint]]]:
    """Constraints that share attributes, together."""
    groups: list[tuple[set[Site], list[Constraint]]] = []
    for constraint in found:
        touching = [g for g in groups if g[0] & constraint.number.attributes]
        groups = [g for g in groups if not g[0] & constraint.number.attributes]
        names = set(constraint.number.attributes).union(*(g[0] for g in touching))
        groups.append((names, [c for g in touching for c in g[1]] + [constraint]))
    return [(sorted(names, key=describe), bounds) for names, bounds in groups]


def _component(
    names: Sequence[Site], bounds: Sequence[Constraint], values: Values, lengths: Lengths
) -> list[dict[Site, int]]:
    domains = [_domain(site, bounds, values[site], lengths) for site in names]
    tried = itertools.islice(itertools.product(*domains), 4096)
    found = [dict(zip(names, numbers, strict=True)) for numbers in tried]
    return [option for option in found if all(bound.holds(option) for bound in bounds)]


def _domain(site: Site, bounds: Sequence[Constraint], old: int, lengths: Lengths) -> list[int]:
    """Values worth trying for one attribute: what it is, and what a length of that size becomes."""
    direct = [b.allowed for b in bounds if b.number.direct and b.number.attributes == {site}]
    if direct:
        return sorted(frozenset.intersection(*direct), key=lambda n: (n != old, n))
    return options(site, old, lengths)


def options(site: Site, old: int, lengths: Lengths) -> list[int]:
    """`old`, and every length in the attribute's module that was `old` and is no more."""
    return [old, *sorted({after for before, after in lengths.of_module.get(site[0], ()) if before == old != after})]


def _conflict(bounds: Sequence[Constraint]) -> str:
    """The numbers that have to change, and those made of the same attributes."""
    changing = [b for b in bounds if int(b.number) not in b.allowed]
    names = {site for bound in changing for site in bound.number.attributes}
    shown = {b for b in bounds if b.number.attributes & names}
    needs = sorted({(f"{b.place[0]}:{b.place[1]}", int(b.number), tuple(sorted(b.allowed))) for b in shown})
    text = "; ".join(f"{n} has to become {' or '.join(map(str, allowed))} at {at}" for at, n, allowed in needs)
    return f"no value of {', '.join(sorted(map(describe, names)))} fits: {text}"
