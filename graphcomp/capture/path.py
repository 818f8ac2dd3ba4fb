"""The path through a model that its example inputs take: which branches of its code, and with which constants.

A run notes each comparison that the model's own code makes of a size (`if x.shape[0] > 8`), and each truth value that
the code takes of a tensor (`if x.sum() > 0`). Inputs with another outcome take a path that no result was compared on.
"""

from __future__ import annotations

import dis
import inspect
import linecache
import logging
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from types import CodeType, FrameType
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from graphcomp.capture.record import SKIPPED_FRAMES
from graphcomp.errors import first_line
from graphcomp.ir.graph import tensor_values
from graphcomp.ir.inputs import copies
from graphcomp.ir.module import Guard, leaf_names
from graphcomp.ir.preserve import HoldParameters, ParameterWritten, eval_copy
from graphcomp.torch_compat import pytree

log = logging.getLogger("graphcomp.path")

TRUTH = frozenset(
    {Tensor.__bool__, Tensor.item, Tensor.equal, Tensor.allclose, torch.is_nonzero, torch.equal, torch.allclose}
)
"""Functions that may take a truth value of a tensor."""
SHAPES: frozenset[Any] = frozenset({Tensor.shape.__get__, Tensor.size})  # type: ignore[attr-defined]
NUMBERS: frozenset[Any] = frozenset({Tensor.ndim.__get__, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.size})  # type: ignore[attr-defined]
"""Functions that return sizes of a tensor: all of them, or one number."""
CONSTANTS = (bool, int, float, str, type(None))
"""Inputs that a forward branches on by their value."""
SHOWN = 2
"""Branches that a report gives a note each; of more, a note names the lines."""


@dataclass(frozen=True)
class Branch:
    """The outcome of a comparison in the model's code.

    Attributes:
        file, line, function: where.
        kind: "sizes" or "values".
        taken: the outcome; the number itself where `len(tensor)` is compared.
    """

    file: str
    line: int
    function: str
    kind: str
    taken: int

    @property
    def source(self) -> str:
        """File, line and code."""
        code = linecache.getline(self.file, self.line).strip()
        return f"{File(self.file).name}:{self.line}, in {self.function} -> {code}"


@dataclass(frozen=True)
class Path:
    """What the example inputs' path hangs on.

    Attributes:
        branches: outcomes of comparisons.
        reads: places where a recorded run read numbers from tensors.
        arguments: names of the arguments of the forward, in the order of the call.
        constants: numbers, flags, words and None among the inputs, by name; also defaults of arguments left out.
        stateful: whether the forward changes attributes of its modules, which the next call may read.
        replaced: inputs in lists and dicts that the forward replaces by other tensors or adds, which a graph does not.
    """

    branches: frozenset[Branch] = frozenset()
    reads: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    stateful: bool = False
    replaced: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """Return what a report says: which branches the model was seen on."""
        ordered = sorted(self.branches, key=lambda b: (b.file, b.line, b.taken))
        found = [
            f"one path was not seen: the condition on {b.kind} is {b.taken} for the example inputs, at {b.source}"
            for b in ordered
            if not self.branches & _others(b)
        ]
        places = {b.source for b in self.branches}
        reads = [read for read in self.reads if read not in places]
        found += [f"other values that are read may lead to a path that was not seen, at {read}" for read in reads]
        if len(found) <= SHOWN:
            return found
        kinds = " and ".join(sorted({b.kind for b in ordered}) or ["values"])
        lines = ", ".join(dict.fromkeys(line.rpartition(" at ")[2].partition(",")[0] for line in found))
        return [f"{len(found)} paths were not seen, by conditions on {kinds} at {lines}"]

    def left_by(self, branches: frozenset[Branch]) -> str:
        """Return at which branch a run leaves the path, "" where it does not."""
        new = sorted(branches - self.branches, key=lambda b: (b.file, b.line, b.taken))
        return f"the condition on {new[0].kind} is {new[0].taken} at {new[0].source}" if new else ""

    def left_with(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Return which constant of a call is another one than in the example, "" where none is."""
        inputs = named_inputs(self.arguments, args, kwargs)
        for name, known in self.constants.items():
            given = inputs.get(name, known)
            if isinstance(given, Tensor):
                return f"{name} is a tensor, and was {known!r}"
            if isinstance(given, CONSTANTS) and given != known:
                return f"{name} is {given!r}, and was {known!r}"
        return ""

    def has(self, kind: str) -> bool:
        """Return whether some branch of the path is on "sizes" or on "values"."""
        return any(b.kind == kind for b in self.branches)


def _others(branch: Branch) -> frozenset[Branch]:
    """Return the same branch with the other outcome; nothing for a number."""
    return frozenset([replace(branch, taken=not branch.taken)] if isinstance(branch.taken, bool) else [])


def named_inputs(arguments: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of a call by name: "x", "state.h"."""
    found: dict[str, Any] = {}
    for name, value in {**dict(zip(arguments, args, strict=False)), **kwargs}.items():
        leaves, spec = pytree.tree_flatten(value)
        names = [name] if spec.is_leaf() else leaf_names(spec, name)
        found.update(zip(names, leaves, strict=True))
    return found


def seen_path(
    model: nn.Module,
    arguments: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    reads: Sequence[str] = (),
) -> Path:
    """Return the path that the example inputs take.

    Args:
        arguments: names of the arguments of the forward.
        reads: places where a recorded run read numbers from tensors.
    """
    inputs = {**_defaults(model), **named_inputs(arguments, args, kwargs)}
    constants = {name: leaf for name, leaf in inputs.items() if isinstance(leaf, CONSTANTS)}
    run = _watched(model, arguments, args, kwargs)
    return Path(run.branches, tuple(reads), tuple(arguments), constants, run.stateful, run.replaced)


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Return the defaults of the arguments of the forward, which a call that leaves the arguments out takes."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a forward that is no Python function
        return {}
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def branches_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> frozenset[Branch]:
    """Return the branches that the code of `model` takes on these inputs; those up to the first line that does not
    take sizes that are traced."""
    return _watched(model, (), args, kwargs).branches


@dataclass(frozen=True)
class _Run:
    """What one run showed; the fields are those of Path."""

    branches: frozenset[Branch]
    stateful: bool
    replaced: tuple[str, ...]


def _watched(model: nn.Module, arguments: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Run:
    """Run a copy of the model, and look at its branches, its attributes and its inputs.

    Raises:
        ParameterWritten: the run would change the model's own parameters.
    """
    given, named = copies((tuple(args), dict(kwargs)))
    with eval_copy(model, real=True) as copied, torch.no_grad(), HoldParameters(copied):
        attributes, inputs = _attributes(copied), named_inputs(arguments, given, named)
        with Branches(sizes=True) as branches:
            try:
                copied(*given, **named)
            except ParameterWritten:
                raise
            except Exception as error:  # of the user's code, which may insist on `type(n) is int`
                log.debug("%s was followed up to an error: %s", type(model).__name__, first_line(error))
        after = named_inputs(arguments, given, named)
        replaced = (n for n, t in after.items() if isinstance(t, Tensor) and t is not inputs.get(n))
        return _Run(frozenset(branches.taken), _attributes(copied) != attributes, tuple(replaced))


def _attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Return the plain attributes of all modules: numbers and words by value, all else by identity and length."""
    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_") and name in vars(nn.Module()):
                continue  # torch's own tables
            plain = isinstance(value, (bool, int, float, str, type(None)))
            size = len(value) if isinstance(value, (list, dict, set)) else 0
            found[path, name] = value if plain else (id(value), size)
    return found


def guards(graph: fx.Graph) -> list[Guard]:
    """Return the comparisons in the model's code that torch.export fixed in a graph with symbolic sizes."""
    symbols: dict[sympy.Symbol, tuple[str, int]] = {}
    environment: Any = None
    for place in graph.find_nodes(op="placeholder"):
        for tensor in tensor_values(place):
            environment = environment or getattr(getattr(tensor, "fake_mode", None), "shape_env", None)
            shape: Any = tensor.shape
            for dim, size in enumerate(shape):
                if isinstance(size, torch.SymInt):
                    symbols.setdefault(size.node.expr, (place.name, dim))
    found = []
    shown = {symbol: sympy.Symbol(f"{name}.shape[{dim}]") for symbol, (name, dim) in symbols.items()}
    for guard in environment.guards if environment is not None else ():
        frame = guard.sloc.framework_loc
        if not isinstance(frame, traceback.FrameSummary) or frame.filename.startswith(SKIPPED_FRAMES):
            continue
        used = {symbol: symbols[symbol] for symbol in guard.expr.free_symbols & symbols.keys()}
        if used and used.keys() == guard.expr.free_symbols and not _raises(frame.filename, frame.lineno or 0):
            source = Branch(frame.filename, frame.lineno or 0, frame.name, "sizes", True).source
            found.append(Guard(str(guard.expr.xreplace(shown)), source, guard.expr, used))
    return found


# ------------------------------------------------------------------------------------------------ watching a run
class Branches(TorchFunctionMode):
    """Notes the truth values that the model's code takes of tensors.

    Args:
        sizes: note comparisons of sizes, too. The code gets sizes that are traced: its results are not to be used.
    """

    def __init__(self, *, sizes: bool) -> None:
        super().__init__()
        self.sizes = sizes
        self.taken: set[Branch] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, bool):
            if func in TRUTH:
                self._note("values", result, _own_frame(sys._getframe(1)))
        elif self.sizes and type(result) is torch.Size and func in SHAPES:
            return torch.Size([TracedInt.of(self, n) for n in result])
        elif self.sizes and type(result) is int:
            if func in NUMBERS:
                return TracedInt.of(self, result)
            frame = _own_frame(sys._getframe(1))
            if func is Tensor.__len__ and _compares(frame):  # len() returns a plain int
                self._note("sizes", result, frame)
        return result

    def _note(self, kind: str, taken: int, frame: FrameType | None) -> None:
        if frame is None or frame.f_code.co_filename.startswith(SKIPPED_FRAMES):
            return
        place = frame.f_code.co_filename, frame.f_lineno
        if not _raises(*place):
            self.taken.add(Branch(*place, frame.f_code.co_name, kind, taken))


def _own_frame(frame: FrameType | None) -> FrameType | None:
    """Return `frame`, or the innermost frame above it, that is outside of torch and of this package."""
    while frame is not None and frame.f_code.co_filename.startswith(SKIPPED_FRAMES):
        frame = frame.f_back
    return frame


def _compares(frame: FrameType | None) -> bool:
    """Whether the line that `frame` is at holds a comparison."""
    return frame is not None and any(place == frame.f_lineno for place in _comparing_lines(frame.f_code))


def _comparing_lines(code: CodeType) -> set[int | None]:
    return {op.positions.lineno for op in dis.get_instructions(code) if op.opname == "COMPARE_OP" and op.positions}


def _raises(file: str, line: int) -> bool:
    """Whether the comparison stands in an assertion, or in front of a `raise`: other sizes are refused there."""
    then = linecache.getline(file, line + 1).strip()
    return "assert" in linecache.getline(file, line) or then.startswith("raise ")


# ------------------------------------------------------------------------------------------------ sizes that are traced
class TracedInt(int):
    """A size, or a number computed from sizes, that notes comparisons."""

    branches: Branches

    @staticmethod
    def of(branches: Branches, value: int) -> TracedInt:
        """An int of this value."""
        made = TracedInt(value)
        made.branches = branches
        return made

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __deepcopy__(self, memo: Any) -> TracedInt:
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __bool__(self) -> bool:
        taken = int(self) != 0
        self.branches._note("sizes", taken, sys._getframe(1))
        return taken


class TracedFloat(float):
    """A quotient of sizes that notes comparisons."""

    branches: Branches

    def __hash__(self) -> int:
        return float.__hash__(self)


def _traced(branches: Branches, value: Any) -> Any:
    if type(value) is int:
        return TracedInt.of(branches, value)
    if type(value) is float:
        made = TracedFloat(value)
        made.branches = branches
        return made
    return value


def _comparison(kind: type, name: str) -> None:
    plain = getattr(kind.__mro__[1], name)

    def method(self: Any, other: Any) -> Any:
        taken = plain(self, other)
        if isinstance(taken, bool):
            self.branches._note("sizes", taken, sys._getframe(1))
        return taken

    setattr(kind, name, method)


def _arithmetic(kind: type, name: str) -> None:
    plain = getattr(kind.__mro__[1], name)

    def method(self: Any, other: Any) -> Any:
        return _traced(self.branches, plain(self, other))

    setattr(kind, name, method)


for _kind in (TracedInt, TracedFloat):
    for _name in ("lt", "le", "eq", "ne", "gt", "ge"):
        _comparison(_kind, f"__{_name}__")
    for _name in ("add", "sub", "mul", "floordiv", "truediv", "mod"):
        _arithmetic(_kind, f"__{_name}__")
        _arithmetic(_kind, f"__r{_name}__")
