"""A captured or lowered graph as torch.export's ExportedProgram, and as a .pt2 file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from graphcomp.capture.backward import LeaveOutBackward
from graphcomp.capture.capture import capture
from graphcomp.capture.resized import input_name
from graphcomp.errors import ExportError, first_line
from graphcomp.ir.graph import clone
from graphcomp.ir.inputs import Inputs
from graphcomp.ir.passes import GraphPass
from graphcomp.ir.preserve import eval_copy
from graphcomp.ir.program import Program
from graphcomp.quantization import ops as _ops  # noqa: F401 (the graph may hold these ops)
from graphcomp.system.files import replacing
from graphcomp.system.threads import LOCK
from graphcomp.targets.lengths import CAPTURED, Lengths
from graphcomp.torch_compat import pytree, sources_go_with_code

log = logging.getLogger("graphcomp.export")

Args = tuple[Any, ...]
Model = TypeVar("Model", bound=nn.Module)


def export_program(
    module: nn.Module,
    args: Args,
    kwargs: Mapping[str, Any] | None = None,
    path: str | Path | None = None,
    *,
    lengths: Lengths = CAPTURED,
) -> ExportedProgram:
    """The ExportedProgram of `module` in eval mode, with the dims left dynamic that capture left symbolic.

    Args:
        module: a graph that `capture` made, lowered or not; or any module, which is captured first. Not modified.
        args, kwargs: example inputs. The batch may be 1; the program takes every batch where the model allows it.
        path: also write it there (.pt2), whole or not at all. `torch.export.load(path)` reads it back. Where the graph
            is quantized, only after `import graphcomp`, which registers its ops; torch fails without ("error when
            deserializing the saved file") and names the op in a warning.
        lengths: which dims of the inputs are dynamic; by default those that capture left symbolic.

    Raises:
        CaptureError: `module` cannot be captured.
        ExportError: torch.export refuses the graph; the path cannot be written.
    """
    kwargs = dict(kwargs or {})
    graph = graph_of(module, args, kwargs).module
    lengths.check(graph)
    args, kwargs, shapes = _dynamic(graph, args, kwargs, lengths)
    with eval_copy(in_eval_mode(graph), real=False) as copied, quiet():
        try:
            program = torch.export.export(copied, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # export has no base class for its refusals
            if lengths.named:
                raise ExportError(
                    f"dynamic={dict(lengths.named)} cannot be met",
                    why=first_line(error),
                    fix="name fewer dims: the model computes something that holds for the example's lengths alone",
                ) from error
            raise ExportError(
                f"torch.export refuses the graph of {type(module).__name__}",
                why=f"{type(error).__name__}: {first_line(error)}",
                fix="please report the model",
            ) from error
    if path is not None:
        save_program(program, path)
    return program


def save_program(program: ExportedProgram, path: str | Path) -> None:
    """Write `program` to a .pt2 file, whole or not at all.

    Raises:
        ExportError: the path cannot be written.
    """
    with replacing(Path(path)) as fresh, quiet():
        try:
            torch.export.save(program, fresh)
        except RuntimeError as error:  # torch's zip writer raises no OSError
            raise ExportError(f"cannot write {path}", why=first_line(error)) from error


@dataclass(frozen=True, eq=False, kw_only=True)
class Written(Program):
    """What a file is written of. The notes say for which inputs alone the graph holds.

    Attributes:
        names: of the tensor outputs, where the graph does not hold them.
    """

    names: Sequence[str] | None = None


def graph_of(
    module: nn.Module, args: Args, kwargs: Mapping[str, Any], more: Mapping[str, Iterable[int]] | None = None
) -> Written:
    """Return `module` if it is a captured graph, else its graph.

    Args:
        module: not modified.
        args, kwargs: example inputs.
        more: input -> dims that are left symbolic, too, where the module allows it.
    """
    if isinstance(module, fx.GraphModule):
        spec = pytree.tree_structure((args, dict(kwargs)))
        program = Written(module=module, original=module, inputs=Inputs(args, dict(kwargs), spec))
        return LeaveOutBackward()(program)
    captured = capture(module, args, kwargs)
    if more and captured.producer == "export":
        places = captured.module.graph.find_nodes(op="placeholder")
        inputs = [input_name(place) for place in places if isinstance(place.meta.get("val"), Tensor)]
        captured = capture(module, args, kwargs, more=[tuple(more.get(name, ())) for name in inputs])
    notes, names = tuple(captured.path.notes()), None
    if captured.producer == "record":
        fixed = f"holds for inputs of the example's sizes alone, as torch.export refused the model: {captured.reason}"
        log.warning("the graph of %s %s", type(module).__name__, fixed)
        notes, names = (fixed, *notes), captured.output_names
    program = Written(module=captured.module, original=module, inputs=captured.inputs, notes=notes, names=names)
    return LeaveOutBackward()(program)


def _dynamic(
    graph: fx.GraphModule, args: Args, kwargs: Mapping[str, Any], lengths: Lengths
) -> tuple[Args, dict[str, Any], tuple[Any, ...] | None]:
    """Example inputs and dynamic shapes for torch.export.

    Export takes a length of 1 for a constant, so such dims are shown to it twice as long.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    places = graph.graph.find_nodes(op="placeholder")
    if len(places) != len(leaves):
        raise ExportError(
            f"the graph has {len(places)} inputs, the example inputs are {len(leaves)}",
            fix="give the example inputs that the model was captured with",
        )
    symbolic = [lengths.of(place, leaf) for place, leaf in zip(places, leaves, strict=True)]
    shown = [_twice(leaf, dims) for leaf, dims in zip(leaves, symbolic, strict=True)]
    shapes = [dims or None for dims in symbolic]
    args, kwargs = pytree.tree_unflatten(shown, spec)
    if not any(symbolic):
        return args, dict(kwargs), None
    by_argument, by_name = pytree.tree_unflatten(shapes, spec)
    return args, dict(kwargs), (*by_argument, *by_name.values())


def _twice(leaf: Any, dims: Iterable[int]) -> Any:
    for dim in dims:
        leaf = torch.cat([leaf, leaf], dim) if leaf.shape[dim] == 1 else leaf
    return leaf


@dataclass(frozen=True)
class InEvalMode(GraphPass):
    """Put the batch norms and dropouts of a graph in eval mode."""

    name: ClassVar[str] = "put in eval mode"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """Return `module`, or a copy where a part is in training mode."""
        return in_eval_mode(module)


def in_eval_mode(module: Model) -> Model:
    """Return a copy of a graph that is in training mode, whose batch norms and dropouts are in eval mode; any other
    module as it is."""
    if not isinstance(module, fx.GraphModule) or not any(part.training for part in module.modules()):
        return module
    copied, _ = clone(module)
    return copied.eval()  # type: ignore[return-value]


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the warnings of torch.export about its own code, and let sources go with the modules that it makes."""
    with LOCK, warnings.catch_warnings(), sources_go_with_code():
        warnings.simplefilter("ignore")
        yield
