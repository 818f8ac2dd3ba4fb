"""How a user teaches an op, as code to paste: proposed from shapes, or a correction of what was taught."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import Tensor, fx

from graphcomp.coupling.notation import parse
from graphcomp.coupling.size import Size, size_of
from graphcomp.errors import RuleError
from graphcomp.ir.graph import bind, tensor_values, value
from graphcomp.ir.taught import forgetting, taught_as
from graphcomp.ops import registry
from graphcomp.ops.fit import is_written, tensors_of
from graphcomp.torch_compat import OpOverload, schema_of

LETTERS = "abcdefghijklmnopqrstuvwxyz"
_LETTER = re.compile(r"(?<!\*)[a-z]")


def rule_fix(node: fx.Node) -> str:
    """Return the line that teaches an op how its dims couple; "" where nothing that a user can say would help."""
    op = node.target
    if not isinstance(op, OpOverload):
        return ""
    if (key := taught_as(op)) is not None:
        return f"correct the rule: {forgetting(key)}, then graphcomp.rule({_name(op)!r}, …)"
    if (entry := registry.known(op)) is not registry.NOTHING_KNOWN:
        return entry.fix
    if (rule := proposal(node)) is None:
        return f"@graphcomp.rule({_name(op)!r}) above a rule in Python, see help(graphcomp.rule)"
    return f'graphcomp.rule("{_name(op)}", "{rule}")'


def macs_fix(node: fx.Node) -> str:
    """Return the line that says what an op multiplies; "" where nothing that a user can say would help."""
    op = node.target
    if not isinstance(op, OpOverload):
        return ""
    if (key := taught_as(op)) is not None:
        first, rule = f"{forgetting(key)}, then ", registry.text_of(op)
    elif registry.known(op) is registry.NOTHING_KNOWN:
        first, rule = "", proposal(node) or ""
    else:
        return ""
    spelt = f'"{rule}"' if rule else "rule"
    return f'{first}graphcomp.op("{_name(op)}", {spelt}, macs=…), macs=() where it multiplies nothing'


def _name(op: OpOverload) -> str:
    return schema_of(op).name


# ------------------------------------------------------------------------------------------------ proposals
def proposal(node: fx.Node) -> str | None:
    """Return a rule in notation that the shapes of a call suggest: dims of equal lengths have equal letters.

    The user is to check the rule against what the op computes: lengths may be equal by chance. None where no notation
    can name the operands: tensors in lists.
    """
    op = node.target
    assert isinstance(op, OpOverload)
    arguments, names = bind(node), tensors_of(op)
    listed = [item for found in arguments.values() if isinstance(found, (list, tuple)) for item in found]
    if any(isinstance(item, fx.Node) and tensor_values(item) for item in listed):
        return None
    shapes = [_shape(arguments.get(name)) for name in names]
    while shapes and shapes[-1] is None:
        shapes.pop()
    results = [tuple(map(size_of, tensor.shape)) for tensor in tensor_values(node)]
    written = [argument.name for argument in schema_of(op).arguments if is_written(argument)]
    of_written = [names.index(name) for name in written if name in names] if not results else []
    ends = results or [shape for k in of_written if (shape := shapes[k]) is not None]
    for lead in dict.fromkeys((_leading(shapes, ends), 0)):
        text = _spelt(shapes, results, of_written, lead)
        if text is not None:
            return text
    stars = iter(LETTERS)
    return f"{', '.join(f'*{next(stars)}' for _ in shapes)} -> {', '.join(f'*{next(stars)}' for _ in results)}"


Shape = tuple[Size, ...]


def _shape(argument: object) -> Shape | None:
    found = value(argument) if isinstance(argument, fx.Node) else argument
    return tuple(map(size_of, found.shape)) if isinstance(found, Tensor) else None


def _leading(shapes: Sequence[Shape | None], results: Sequence[Shape]) -> int:
    """Return how many leading dims the first operand and the first result have in common, and no other operand has."""
    first = shapes[0] if shapes else None
    if not first or not results:
        return 0
    others = {length for shape in shapes[1:] if shape is not None and shape[:1] != first[:1] for length in shape}
    count = 0
    for a, b in zip(first[:-1], results[0][:-1], strict=False):
        if a != b or a in others:
            break
        count += 1
    return count


def _spelt(shapes: Sequence[Shape | None], results: Sequence[Shape], written: Sequence[int], lead: int) -> str | None:
    """Return the rule whose first `lead` dims are "..."; None where the notation has no such rule."""
    letters = _Letters()
    batch = (shapes[0] or ())[:lead] if shapes else ()
    left = [None if shape is None else letters.of(*_behind(shape, batch)) for shape in shapes]
    meeting = letters.meeting([names for names in left if names is not None])
    right = [letters.of(*_behind(shape, batch), later=meeting, new=False) for shape in results]
    right += [left[k] or [] for k in written]
    times = [name for names in (*left, *right) for name in names or ()]
    stars = iter(LETTERS[::-1])
    sides = []
    for part in (left, right):
        spelt = [_pattern(names, times, stars) for names in part]
        if any(found is None for found in spelt):
            return None
        sides.append(", ".join(str(found) for found in spelt))
    text = f"{sides[0]} -> {sides[1]}".rstrip()
    order = dict.fromkeys(_LETTER.findall(text))
    new = dict(zip(order, LETTERS, strict=False))
    text = _LETTER.sub(lambda found: new[found[0]], text)
    try:
        parse(text)
    except RuleError:
        return None
    return text


def _behind(shape: Shape, batch: Shape) -> tuple[Shape, bool]:
    """Return the dims behind the leading ones, and whether the tensor has the leading ones."""
    has = bool(batch) and shape[: len(batch)] == batch
    return (shape[len(batch) :], True) if has else (shape, False)


class _Letters:
    """Letters by length."""

    def __init__(self) -> None:
        self.by_length: dict[Size, list[str]] = {}
        self.free = iter(LETTERS)

    def of(self, shape: Shape, leads: bool, later: frozenset[str] = frozenset(), new: bool = True) -> list[str]:
        """Name the dims of a tensor, from the last to the first: the last dim of a weight meets the last of the data.

        Args:
            shape: lengths.
            leads: whether "..." stands in front.
            later: letters that come after others of the same length.
            new: whether a dim that none has named yet gets a letter; else it is "".
        """
        names: list[str] = []
        for length in reversed(shape):
            known = self.by_length.setdefault(length, [])
            left = sorted((name for name in known if name not in names), key=lambda name: name in later)
            if not left and new:
                left = [next(self.free)]
                known += left
            names.append(left[0] if left else "")
        return ["...", *reversed(names)] if leads else names[::-1]

    @staticmethod
    def meeting(operands: Sequence[Sequence[str]]) -> frozenset[str]:
        """Return the letters of the first operand that a matrix with another dim has, too: sums run over these."""
        first = set(operands[0]) if operands else set()
        return frozenset(name for own in operands[1:] if set(own) - first for name in own if name in first)


def _pattern(names: Sequence[str] | None, times: Sequence[str], stars: Iterator[str]) -> str | None:
    """Spell the dims of a tensor. Dims that no other tensor has are one star; None where they are not side by side."""
    if names is None:
        return f"*{next(stars)}"
    alone = [k for k, name in enumerate(names) if name != "..." and (not name or times.count(name) < 2)]
    if not alone:
        return " ".join(names)
    if "..." in names or alone[-1] - alone[0] + 1 != len(alone):
        return None
    return " ".join([*names[: alone[0]], f"*{next(stars)}", *names[alone[-1] + 1 :]])
