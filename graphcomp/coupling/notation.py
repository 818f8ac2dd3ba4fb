"""The einops-like notation of coupling rules.

    linear   "... i, o i, o -> ... o"
    conv     "n (g i) *s, (g o) i +k, (g o) -> n (g o) *t"

Operands are separated by commas, results follow the arrow. For each dim:

    i        a letter: equal letters couple
    (g i)    a row-major product; the length of all but one letter must be known
    *s       any number of dims, frozen (what the op addresses by position)
    +k       any number of dims of a kernel: frozen, and summed away
    ...      any number of leading dims that broadcast, at most once per operand

A letter that stands on the left only is contracted: its units are summed away. Masks stand in each operand that holds
the letter, but for the first: whatever the op multiplies with what, a masked unit adds nothing.

Operands are multiplied from left to right, and each product that sums something away costs one multiply-accumulate per
index of its letters, kernels and dims of the result. Where the data share a contracted letter with several operands,
each of these operands is multiplied with the data by itself, as in a gated layer: "... i, o i, o i -> ... o" is two
products, of "... i" with either matrix. What else an op multiplies is said by `macs=`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from graphcomp.coupling.axis import UNIT, Axes, Axis, Reason, couple, freeze, fresh, length, product, regroup
from graphcomp.coupling.size import Size, divide, multiply
from graphcomp.errors import RuleError

_TOKEN = re.compile(r"\s*(\.\.\.|[*+][a-z]|[A-Za-z]|\([^()]*\)|\S)")


@dataclass(frozen=True)
class Pattern:
    """The dims of one operand: letters "i", products ("g", "i"), stars "*s", kernels "+k" and "..."."""

    dims: tuple[str | tuple[str, ...], ...]

    def letters(self) -> set[str]:
        found: set[str] = set()
        for dim in self.dims:
            found |= {dim} if isinstance(dim, str) else set(dim)
        return {name for name in found if name.isalpha()}

    @property
    def kernels(self) -> set[str]:
        """The dims of a kernel: "+k"."""
        return {str(dim) for dim in self.dims if str(dim).startswith("+")}


@dataclass(frozen=True)
class Contraction:
    """Dim `dim` of operand number `operand` is summed away."""

    operand: int
    dim: int


@dataclass(frozen=True)
class Product:
    """Operands that are multiplied and summed: one multiply-accumulate per index of `axes`."""

    axes: Axes
    operands: tuple[int, ...]
    kernel: bool


@dataclass(frozen=True)
class Applied:
    """What a rule says of one op."""

    results: list[Axes]
    contractions: list[Contraction]
    products: list[Product]


@dataclass(frozen=True)
class Notation:
    """A parsed rule."""

    text: str
    operands: tuple[Pattern, ...]
    results: tuple[Pattern, ...]

    @property
    def kept(self) -> set[str]:
        """The letters of the results."""
        return set().union(*(pattern.letters() for pattern in self.results))

    @property
    def contracted(self) -> set[str]:
        """The letters that stand on the left only."""
        return set().union(*(pattern.letters() for pattern in self.operands)) - self.kept


@cache
def parse(text: str) -> Notation:
    """Parse a rule; every malformed form raises RuleError with what is wrong."""
    if text.count("->") != 1:
        raise RuleError(f"rule {text!r} needs exactly one '->'", fix='e.g. "... i, o i, o -> ... o"')
    left, right = text.split("->")
    notation = Notation(text, _side(left, text), _side(right, text))
    known = set().union(*(p.letters() for p in notation.operands))
    for pattern in notation.results:
        unknown = pattern.letters() - known
        if unknown:
            raise RuleError(f"rule {text!r}: {sorted(unknown)} stands only on the right", fix="write *x: a new dim")
    if any(p.kernels for p in notation.results):
        raise RuleError(f"rule {text!r}: a kernel stands on the right", fix="write *x: dims of the result")
    has_ellipsis = any("..." in p.dims for p in notation.operands)
    if any("..." in p.dims for p in notation.results) and not has_ellipsis:
        raise RuleError(f"rule {text!r}: '...' stands only on the right")
    return notation


def _side(text: str, rule: str) -> tuple[Pattern, ...]:
    return tuple(_pattern(part, rule) for part in text.split(","))


def _pattern(text: str, rule: str) -> Pattern:
    dims: list[str | tuple[str, ...]] = []
    for token in _TOKEN.findall(text):
        if token.startswith("("):
            letters = tuple(token[1:-1].split())
            if len(letters) < 2 or not all(len(x) == 1 and x.isalpha() for x in letters):
                raise RuleError(f"rule {rule!r}: {token} must hold two or more letters")
            dims.append(letters)
        elif token == "..." or token.isalpha() or (token[0] in "*+" and len(token) == 2):
            dims.append(token)
        else:
            raise RuleError(f"rule {rule!r}: cannot read {token!r}")
    if sum(map(is_open, dims)) > 1:
        raise RuleError(f"rule {rule!r}: {text.strip()!r} has two dims of open number")
    return Pattern(tuple(dims))


def is_open(dim: str | tuple[str, ...]) -> bool:
    """Return whether `dim` stands for any number of dims."""
    return isinstance(dim, str) and dim[0] in ".*+"


def apply(
    notation: Notation,
    operands: Sequence[Axes | None],
    result_shapes: Sequence[Sequence[Size]],
    why: Reason,
    sizes: Mapping[str, Size] | None = None,
    counted: Sequence[Sequence[str]] | None = None,
    data: int = 0,
) -> Applied:
    """Couple `operands` as the rule says; return the results, which dims are contracted, and what is multiplied.

    An operand may be None (an optional one left out). `sizes` gives lengths of letters, e.g. a conv's groups; `counted`
    the names of each product (see `products_of`), where they are not those of the rule; `data` the number of the
    operand that weights are multiplied with.
    """
    bound = _Binding(why, dict(sizes or {}))
    given = zip(notation.operands, operands, strict=True)
    present = [(k, pattern, axes) for k, (pattern, axes) in enumerate(given) if axes is not None]
    for _, pattern, axes in present:
        bound.learn_sizes(pattern, axes)
    for _, pattern, axes in present:
        bound.take(pattern, axes)
    results = [bound.give(p, shape) for p, shape in zip(notation.results, result_shapes, strict=False)]
    products = _products(notation, present, bound, results, counted, data)
    return Applied(results, _contractions(present, notation.kept), products)


def _products(
    notation: Notation,
    present: Sequence[tuple[int, Pattern, Axes]],
    bound: _Binding,
    results: Sequence[Axes],
    counted: Sequence[Sequence[str]] | None,
    data: int,
) -> list[Product]:
    first, given = notation.results[0], tuple(k for k, _, _ in present)
    if counted is None:
        found = [(names, operands, True) for names, operands in products(notation, given, data)]
    else:
        found = [(list(names), given, False) for names in counted]
    made = []
    for names, operands, stars in found:
        axes = [axis for name in names for axis in bound.extent(name)]
        axes += _in_stars(first, results) if stars else ()
        made.append(Product(tuple(axes), operands, any(name.startswith("+") for name in names)))
    return made


def products(
    notation: Notation, present: Sequence[int] | None = None, data: int = 0
) -> Sequence[tuple[list[str], tuple[int, ...]]]:
    """Return the letters and the operands of each product that sums something away.

    Args:
        notation: a rule.
        present: numbers of the operands that are given; None: all.
        data: number of the operand that weights are multiplied with.
    """
    return _products_of(notation.text, tuple(range(len(notation.operands)) if present is None else present), data)


@cache
def _products_of(rule: str, present: tuple[int, ...], data: int) -> Sequence[tuple[list[str], tuple[int, ...]]]:
    notation = parse(rule)
    letters = {k: _summable(notation.operands[k]) for k in present}
    kept = notation.kept | {"..."}
    others = Counter(name for k in present if k != data for name in set(letters[k]))
    again = {name for name in letters.get(data, ()) if others[name] > 1 and name not in kept}
    found = []
    if again:  # the data meet several operands
        mine = [name for name in letters.pop(data) if name in kept or others[name]]
        for k, own in letters.items():
            if again & set(own):
                both = list(dict.fromkeys((*mine, *own)))
                found.append((both, (data, k)))
                letters[k] = [name for name in both if name not in again and not name.startswith("+")]
    numbers = tuple(letters)
    return [*found, *((names, numbers[:n]) for names, n in summed_products(list(letters.values()), kept))]


def products_of(notation: Notation, texts: Sequence[str]) -> list[list[str]]:
    """Read products that are written out, each a list of the names of the rule's operands whose lengths are multiplied.

    Raises:
        RuleError: a name stands in no operand.
    """
    known = {name for pattern in notation.operands for name in _names(pattern)}
    found = [str(text).split() for text in texts]
    for name in (name for names in found for name in names):
        if name not in known:
            raise RuleError(
                f"macs of rule {notation.text!r}: {name!r} is none of {', '.join(sorted(known))}", fix='macs="n o i"'
            )
    return found


def _names(pattern: Pattern) -> list[str]:
    """Every name of `pattern`, in order."""
    return [name for dim in pattern.dims for name in ((dim,) if isinstance(dim, str) else dim)]


def _summable(pattern: Pattern) -> list[str]:
    """The names of `pattern` whose dims count in a product: all but the stars."""
    return [name for name in _names(pattern) if not name.startswith("*")]


def _in_stars(pattern: Pattern, results: Sequence[Axes]) -> Axes:
    """The axes of the first result that stand for a star."""
    at = next((k for k, dim in enumerate(pattern.dims) if str(dim).startswith("*")), None)
    return () if at is None else results[0][at : at + len(results[0]) - len(pattern.dims) + 1]


def summed_products(operands: Sequence[Sequence[str]], result: Collection[str]) -> list[tuple[list[str], int]]:
    """Multiply operands from left to right, as einsum does.

    Return for each product that sums something away the letters that the product runs over, and how many operands have
    been multiplied by then. A letter that one of two operands has alone is summed before they are multiplied, and a
    product that sums nothing away is pointwise: both cost no multiply-accumulate.
    """
    found = []
    done = list(operands[0]) if operands else []
    for k in range(1, len(operands)):
        own, later = operands[k], set(result).union(*operands[k + 1 :])
        met = later | (set(done) & set(own))
        both = [x for x in dict.fromkeys((*done, *own)) if x in met or x.startswith("+")]
        done = [x for x in both if x in later]
        if len(done) != len(both):
            found.append((both, k + 1))
    return found


def _contractions(present: Sequence[tuple[int, Pattern, Axes]], kept: set[str]) -> list[Contraction]:
    """Where masks stand. Of two operands that are multiplied one is not the first: its zeros take the unit out."""
    where: dict[str, list[Contraction]] = {}
    for k, pattern, axes in present:
        for name, dim in _positions(pattern, len(axes)):
            if name not in kept:
                where.setdefault(name, []).append(Contraction(k, dim))
    return [place for places in where.values() for place in places[1:] or places]


def _positions(pattern: Pattern, rank: int) -> list[tuple[str, int]]:
    """Each letter of `pattern` with the dim it stands in."""
    found, dim = [], 0
    for item in pattern.dims:
        if is_open(item):
            dim += rank - (len(pattern.dims) - 1)
            continue
        found += [(name, dim) for name in ((item,) if isinstance(item, str) else item)]
        dim += 1
    return found


class _Binding:
    """Letters and what they stand for while one rule is applied."""

    def __init__(self, why: Reason, sizes: dict[str, Size]) -> None:
        self.why = why
        self.sizes = sizes
        self.axes: dict[str, Axis] = {}
        self.open: dict[str, Axes] = {}  # what "*s" and "+k" stand for
        self.batch: list[Axis] = []  # what "..." stands for, broadcast over the operands

    def extent(self, name: str) -> Sequence[Axis]:
        """The axes that a letter, a star, a kernel or "..." stands for."""
        if name == "...":
            return self.batch
        return self.open[name] if name[0] in "*+" else (self.axes[name],)

    def learn_sizes(self, pattern: Pattern, axes: Axes) -> None:
        for item, found in self._items(pattern, axes):
            if isinstance(item, str) and len(item) == 1 and not isinstance(found, tuple):
                self.sizes.setdefault(item, length(found))

    def take(self, pattern: Pattern, axes: Axes) -> None:
        for item, found in self._items(pattern, axes):
            if isinstance(found, tuple):
                self._take_open(str(item), found)
            elif isinstance(item, tuple):
                lengths = self._lengths(item, length(found))
                for name, part in zip(item, regroup([found], lengths, self.why), strict=True):
                    self._letter(name, part)
            else:
                self._letter(item, found)

    def give(self, pattern: Pattern, shape: Sequence[Size]) -> Axes:
        axes: list[Axis] = []
        open_dims = len(shape) - (len(pattern.dims) - 1)
        for item in pattern.dims:
            if item == "...":
                axes += self.batch
            elif isinstance(item, tuple):
                axes.append(product(*(self.axes[name] for name in item)))
            elif item.startswith("*"):
                start = len(axes)
                axes += [fresh(n, self.why) for n in shape[start : start + open_dims]]
            else:
                axes.append(self.axes[item])
        return tuple(axes)

    def _items(self, pattern: Pattern, axes: Axes) -> list[tuple[str | tuple[str, ...], Axis | tuple[Axis, ...]]]:
        """Each item of the pattern with its axis, or the tuple of axes of an item of open number."""
        rank, fixed = len(axes), len(pattern.dims)
        open_at = next((k for k, dim in enumerate(pattern.dims) if is_open(dim)), None)
        if open_at is None:
            if rank != fixed:
                raise RuleError(f"the rule expects {fixed} dims and the operand has {rank}", at=str(self.why))
            return list(zip(pattern.dims, axes, strict=True))
        count = rank - (fixed - 1)
        if count < 0:
            raise RuleError(f"the rule expects {fixed - 1} dims or more and the operand has {rank}", at=str(self.why))
        found: list[Axis | tuple[Axis, ...]] = [*axes[:open_at], axes[open_at : open_at + count]]
        found += axes[open_at + count :]
        return list(zip(pattern.dims, found, strict=True))

    def _take_open(self, item: str, axes: tuple[Axis, ...]) -> None:
        if item == "...":
            self.batch = broadcast([tuple(self.batch), axes], self.why)
            return
        self.open.setdefault(item, axes)
        for axis in axes:
            freeze(axis, self.why)

    def _letter(self, name: str, axis: Axis) -> None:
        if name in self.axes:
            couple(self.axes[name], axis, self.why)
        else:
            self.axes[name] = axis

    def _lengths(self, names: tuple[str, ...], total: Size) -> list[Size]:
        unknown = [name for name in names if name not in self.sizes]
        if len(unknown) > 1:
            raise RuleError(f"the lengths of {unknown} are both unknown in ({' '.join(names)})", at=str(self.why))
        if unknown:
            known = multiply(self.sizes[name] for name in names if name != unknown[0])
            rest = divide(total, known)
            if rest is None:
                raise RuleError(f"a length of {total} is no multiple of {known} for all inputs", at=str(self.why))
            self.sizes[unknown[0]] = rest
        return [self.sizes[name] for name in names]


def broadcast(operands: Sequence[Axes], why: Reason) -> list[Axis]:
    """Couple dims aligned from the right as pointwise ops do; dims of length 1 stretch."""
    rank = max((len(axes) for axes in operands), default=0)
    result: list[Axis] = []
    for k in range(rank):
        axis: Axis = UNIT
        for axes in operands:
            own = axes[k - rank + len(axes)] if k - rank + len(axes) >= 0 else UNIT
            if length(own) == 1:
                continue
            if length(axis) == 1:
                axis = own
            else:
                couple(axis, own, why)
        result.append(axis)
    return result


def from_end(axes: Axes, back: int) -> Axis:
    """The axis at `back`, -1 for the last, as broadcasting reads it: of length 1 where there are fewer dims."""
    return axes[back] if len(axes) >= -back else UNIT


def einsum_letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The letters of each operand of `torch.einsum` and of its result, one a dim.

    "..." becomes letters of its own, the last of them for the last dim that it stands for; a result that is left out is
    "..." and then, in alphabetical order, what stands only once.

    Args:
        ranks: number of dims of each operand.
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    names = left.split(",")
    counts = [rank - len(n.replace("...", "")) if "..." in n else 0 for n, rank in zip(names, ranks, strict=True)]
    most = max(counts)
    own = "".join(chr(ord("α") + k) for k in range(most))  # einsum itself takes a to z and A to Z
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        result = "..." + "".join(sorted(x for x in letters if letters.count(x) == 1))
    spelt = [n.replace("...", own[most - count :]) for n, count in zip(names, counts, strict=True)]
    return spelt, result.replace("...", own)
