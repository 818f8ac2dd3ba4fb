"""Pass and Pipeline: one calling convention for all that happens to a program, checked at every seam."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, overload

from torch import Tensor, fx

from graphcomp.errors import GraphcompError, PassError, VerificationError, first_line
from graphcomp.ir.graph import example_size, fetch, neighbourhood, source_line, value
from graphcomp.ir.program import P, Program
from graphcomp.ir.run_nodes import failed_at
from graphcomp.ir.shapes import run_meta, run_shapes
from graphcomp.ir.taught import suspected
from graphcomp.system.threads import unlogged
from graphcomp.torch_compat import FAKE_TENSOR_LOGGER, pytree


class Pass(Protocol):
    """From program to program. A pass changes neither graph nor tensors of the program that it is given.

    A pass is a frozen dataclass: `name` is a ClassVar, the options are the fields. `GraphPass` and `ValuePass` are the
    bases of passes that need nothing but the graph; a pass that reads or adds notes, laws or stages has `__call__`.
    """

    @property
    def name(self) -> str:
        """A verb and a noun, for errors: "fold batch norms"."""

    def __call__(self, program: P, /) -> P:
        """Return another program."""


class GraphPass(ABC):
    """A pass that makes another module of the graph; `rewrite` is all that it says.

    Outside of a pipeline a graph alone is taken, too: the result is a graph alone, checked as at the end of a pipeline.
    (A graph that was moved to another dtype after capture says what it does not compute before and after.)
    """

    name: ClassVar[str]

    @abstractmethod
    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """Return a new module, which shares the tensors that stay with `module`; `module` is not changed."""

    @overload
    def __call__(self, program: P, /) -> P: ...

    @overload
    def __call__(self, program: fx.GraphModule, /) -> fx.GraphModule: ...

    def __call__(self, program: Program | fx.GraphModule, /) -> Program | fx.GraphModule:
        """Return the program of the new module.

        Raises:
            VerificationError: of a graph alone: the new graph is not valid, and the old one was.
        """
        if isinstance(program, Program):
            return program.rewritten(self.rewrite(program.module))
        module = self.rewrite(program)
        check_form(module, f"the pass '{self.name}'")
        wrong = wrong_value(module)
        if wrong is not None and wrong_value(program) is None:
            raise _invalid(module, f"the pass '{self.name}'", *wrong)
        return module


class ValuePass(ABC):
    """A pass that sets values which the passes before left open: ranges of new quantizers, biases of new layers.

    The values are written in place, into tensors that passes of the same pipeline made.
    """

    name: ClassVar[str]

    @abstractmethod
    def fill(self, module: fx.GraphModule, /) -> None:
        """Set the values in `module`."""

    @overload
    def __call__(self, program: P, /) -> P: ...

    @overload
    def __call__(self, program: fx.GraphModule, /) -> fx.GraphModule: ...

    def __call__(self, program: Program | fx.GraphModule, /) -> Program | fx.GraphModule:
        """Return the program, or the graph alone, filled."""
        self.fill(program.module if isinstance(program, Program) else program)
        return program


@dataclass(frozen=True)
class Remember:
    """The pass that keeps the program, or what `passes` make of it, under `stage`: later passes compare with it."""

    stage: str
    passes: tuple[Pass, ...] = ()

    @property
    def name(self) -> str:
        """What is remembered."""
        return f"remember {self.stage}"

    def __call__(self, program: P, /) -> P:
        """Return the program, with one stage more."""
        return replace(program, stages={**program.stages, self.stage: applied(program, *self.passes)})


@dataclass(frozen=True)
class Pipeline:
    """Passes, one after the other.

    After each pass the graph is well-formed, and each tensor that the graph reads is there. After the last, what each
    node computes has the shape and the dtype that the node says. Where one has not, at the end or in front of a pass
    that fails, the passes run again, and nodes are compared after each: the first pass that left such a graph is named.

    Attributes:
        name: of the flow, for errors: "one shot".
        passes: from first to last.
        values: whether what nodes compute is compared; False where what follows infers all shapes anew.
    """

    name: str
    passes: tuple[Pass, ...]
    values: bool = True

    def __call__(self, program: P, /) -> P:
        """Run all passes.

        Raises:
            VerificationError: a graph is not valid; the error names the pass, and the pass before.
            PassError: a pass failed in a way that it has no error for.
            GraphcompError: what a pass raises itself, with a note that names the pass.
        """
        last = self._run(program, check_form)
        if self.values and wrong_value(last.module) is not None:
            self._blame(program)
            check(last.module, self._place(len(self.passes) - 1))
        return last

    def _run(self, program: P, verify: Callable[[fx.GraphModule, str], None]) -> P:
        start = program
        for k, each in enumerate(self.passes):
            try:
                following = each(program)
            except Exception as error:
                if verify is check_form and self.values and wrong_value(program.module) is not None:
                    self._blame(start)
                if isinstance(error, GraphcompError):
                    error.add_note(f"in {self._place(k)}")
                    raise
                raise PassError(
                    f"{self._place(k)} failed",
                    why=f"{type(error).__name__}: {first_line(error)[:300]}",
                    fix=suspected(program.graph),
                ) from error
            verify(following.module, self._place(k))
            program = following
        return program

    def _blame(self, start: Program) -> None:
        """Raise VerificationError for the first pass that leaves a wrong graph, if one does."""
        check(start.module, f"the start of '{self.name}'")
        self._run(start, check)

    def _place(self, k: int) -> str:
        after = f", after '{self.passes[k - 1].name}'" if k else ""
        return f"the pass '{self.passes[k].name}' of '{self.name}'{after}"


def applied(program: P, *passes: Pass) -> P:
    """Return what passes make of a program, unchecked: for what is not handed out, such as plans."""
    for each in passes:
        program = each(program)
    return program


def check(module: fx.GraphModule, place: str) -> None:
    """Raise VerificationError where the graph is not well-formed, or a node computes another shape than it says."""
    check_form(module, place)
    if (wrong := wrong_value(module)) is not None:
        raise _invalid(module, place, *wrong)


def check_form(module: fx.GraphModule, place: str) -> None:
    """Raise VerificationError where the graph is not well-formed, or reads a tensor or a module that is not there."""
    for node in module.graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        try:
            fetch(module, str(node.target))
        except AttributeError:
            raise _invalid(module, place, node, f"there is no '{node.target}'") from None
    try:
        module.graph.lint()
    except Exception as error:  # lint raises errors of several kinds
        raise _invalid(module, place, None, first_line(error)) from error


def wrong_value(module: fx.GraphModule) -> tuple[fx.Node | None, str] | None:
    """Return the first node that computes another shape or dtype than the node says, and what; None without one.

    Nothing is compared where an input that is read does not say what it is.
    """
    places = module.graph.find_nodes(op="placeholder")
    if any(value(place) is None and place.users for place in places):
        return None
    metas = run_meta(module)
    if metas is not None and _difference(metas) is None:
        return None
    try:
        with unlogged(FAKE_TENSOR_LOGGER):
            found = run_shapes(module)
    except Exception as error:  # whatever an op raises whose operands do not fit
        why = f"the graph does not run on fake tensors: {type(error).__name__}: {first_line(error)[:300]}"
        return None, f"{why}\nat {at}" if (at := failed_at(error)) else why
    return _difference(found)


def _difference(found: Mapping[fx.Node, Any]) -> tuple[fx.Node, str] | None:
    """Return the first node that says another shape or dtype than was found, and what."""
    for node, computed in found.items():
        said = value(node)
        if said is None:
            continue
        pairs = zip(_forms(said), _forms(computed), strict=False)
        for one, other in pairs:
            if one != other:
                return node, f"the node says {one}, and computes {other}"
    return None


def _forms(values: Any) -> Iterator[tuple[tuple[int | None, ...], Any]]:
    """Yield shape and dtype of each tensor; lengths that depend on data are None."""
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield tuple(_length(n) for n in leaf.shape), leaf.dtype


def _length(size: Any) -> int | None:
    if isinstance(size, int):
        return size
    return example_size(size) if size.node.has_hint() else None


def _invalid(module: fx.GraphModule, place: str, node: fx.Node | None, why: str) -> VerificationError:
    return VerificationError(
        f"{place} left a graph that is not valid",
        at="" if node is None else f"{node.name} {source_line(node)}".rstrip(),
        why=why if node is None else f"{why}\n{neighbourhood(node)}",
        fix=suspected(module.graph),
    )
