"""Pass and Pipeline: one calling convention for all that happens to a program, checked at every seam."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx

from graphcomp.errors import GraphcompError, PassError, VerificationError, first_line
from graphcomp.ir.graph import example_size, fetch, neighbourhood, source_line, value
from graphcomp.ir.program import P, Program
from graphcomp.ir.run_nodes import failed_at
from graphcomp.ir.shapes import run_shapes
from graphcomp.torch_compat import pytree


class Pass(Protocol):
    """From program to program. A pass changes neither graph nor tensors of the program that it is given."""

    @property
    def name(self) -> str:
        """A verb and a noun, for errors: "fold batch norms"."""

    def __call__(self, program: P, /) -> P:
        """Return another program."""


@dataclass(frozen=True)
class Rewrite:
    """The pass that puts `rewrite(module)`, a new module that shares the tensors that stay, in place of the module."""

    name: str
    rewrite: Callable[[fx.GraphModule], fx.GraphModule]

    def __call__(self, program: P, /) -> P:
        """Return the program of the new module."""
        return program.rewritten(self.rewrite(program.module))


@dataclass(frozen=True)
class Fill:
    """The pass that sets values which the passes before left open: ranges of new quantizers, biases of new layers.

    The values are written in place, into tensors that passes of the same pipeline made.
    """

    name: str
    fill: Callable[[fx.GraphModule], None]

    def __call__(self, program: P, /) -> P:
        """Return the program, filled."""
        self.fill(program.module)
        return program


@dataclass(frozen=True)
class Pipeline:
    """Passes, one after the other.

    After each pass the graph is well-formed, and each tensor that the graph reads is there. After the last, what each
    node computes has the shape and the dtype that the node says; where one has not, the passes are looked through for
    the first after which that is so.
    """

    name: str
    passes: tuple[Pass, ...]

    def __call__(self, program: P, /) -> P:
        """Run all passes.

        Raises:
            VerificationError: a graph is not valid; the error names the pass, and the pass before.
            PassError: a pass failed in a way that it has no error for.
            GraphcompError: what a pass raises itself, with a note that names the pass.
        """
        seen = [program]
        for k, each in enumerate(self.passes):
            try:
                program = each(program)
            except GraphcompError as error:
                error.add_note(f"in {self._place(k)}")
                raise
            except Exception as error:
                raise PassError(
                    f"{self._place(k)} failed",
                    why=f"{type(error).__name__}: {first_line(error)[:300]}",
                    fix="please report the model",
                ) from error
            check_form(program, self._place(k))
            seen.append(program)
        if (wrong := wrong_value(program)) is not None:
            at = next(k for k, each in enumerate(seen) if k == len(seen) - 1 or wrong_value(each) is not None)
            raise _invalid(self._place(at - 1) if at else f"the start of '{self.name}'", *wrong)
        return program

    def _place(self, k: int) -> str:
        after = f", after '{self.passes[k - 1].name}'" if k else ""
        return f"the pass '{self.passes[k].name}' of '{self.name}'{after}"


def check_form(program: Program, place: str) -> None:
    """Raise VerificationError where the graph is not well-formed, or reads a tensor or a module that is not there."""
    for node in program.graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        try:
            fetch(program.module, str(node.target))
        except AttributeError:
            raise _invalid(place, node, f"there is no '{node.target}'") from None
    try:
        program.graph.lint()
    except Exception as error:  # lint raises errors of several kinds
        raise _invalid(place, None, first_line(error)) from error


def wrong_value(program: Program) -> tuple[fx.Node | None, str] | None:
    """Return the first node that computes another shape or dtype than the node says, and what; None without one."""
    try:
        found = run_shapes(program.module)
    except Exception as error:  # whatever an op raises whose operands do not fit
        why = f"the graph does not run on fake tensors: {type(error).__name__}: {first_line(error)[:300]}"
        return None, f"{why}\nat {at}" if (at := failed_at(error)) else why
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


def _invalid(place: str, node: fx.Node | None, why: str) -> VerificationError:
    return VerificationError(
        f"{place} left a graph that is not valid",
        at="" if node is None else f"{node.name} {source_line(node)}".rstrip(),
        why=why if node is None else f"{why}\n{neighbourhood(node)}",
        fix="please report the model",
    )
