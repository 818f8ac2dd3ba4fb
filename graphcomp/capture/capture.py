"""From a model and example inputs to an fx graph.

`capture` asks torch.export first (complete: its graph trains, is sliced and lowered). What export refuses, mostly
because a branch depends on data, is recorded while it runs (see record.py). The model is left as it was found.
"""

from __future__ import annotations

import difflib
import functools
import keyword
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path as File
from typing import Any, Literal

import sympy
import torch
from torch import fx, nn
from torch.export import Dim, ShapesCollection
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.parameter import is_lazy

import graphcomp
from graphcomp.capture.backward import WrittenBackward, functions_followed
from graphcomp.capture.cache import NOTE as CACHE_NOTE
from graphcomp.capture.cache import loses_the_cache_alone, switched_off
from graphcomp.capture.canonical import canonicalize, is_read
from graphcomp.capture.outside import Outside, watching
from graphcomp.capture.path import Path, guards, seen_path
from graphcomp.capture.record import INSTALLED, STDLIB, Recording, record
from graphcomp.errors import CaptureError, InputError
from graphcomp.ir.calling import calling_convention, graph_called, left_out, parameters_of
from graphcomp.ir.graph import fetch, module_path, source_line
from graphcomp.ir.inputs import Inputs, apart, copies
from graphcomp.ir.module import (
    GUARDS,
    MOMENTUM,
    CapturedModule,
    aliases,
    averages_over_all,
    build,
    canonical_names,
    follow_modules,
    follow_training,
    leaf_names,
    names_quoted,
    set_mode,
    tensor_leaves,
    tensor_names,
)
from graphcomp.ir.module_copy import module_copy
from graphcomp.ir.preserve import HoldParameters, ParameterWritten, eval_copy, same_buffers, writes, written_parameters
from graphcomp.ir.program import Program
from graphcomp.ir.rewrite import replace_node
from graphcomp.ir.run_nodes import failed_at
from graphcomp.ir.shapes import run_shapes
from graphcomp.ir.streamed import is_streamed, put_back, with_plain_tensors
from graphcomp.numerics.compare import relative_error, tolerance_of
from graphcomp.system.files import folder_of
from graphcomp.system.threads import in_this_thread, one_at_a_time, stderr_held
from graphcomp.torch_compat import (
    PRIVATE_LOGGERS,
    DataDependentOutputException,
    DynamicOutputShapeException,
    causal_mask_test,
    codegen_of,
    forget_shape_environments,
    pytree,
    sources_go_with_code,
    stands_for_others,
    version_of,
)

log = logging.getLogger("graphcomp.capture")

NOT_THE_USERS = (folder_of(torch), folder_of(sympy), folder_of(graphcomp), "<")
EXPORT_LOGGERS = (
    *PRIVATE_LOGGERS,
    "torch.export",
    "torch.fx.experimental.symbolic_shapes",
)
CACHE_FIX = "a cache of past keys and values cannot be exported: pass example_kwargs={'use_cache': False}"
DATA_DEPENDENT = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Captured(Program):
    """A model as a graph.

    The graph has placeholders (one per leaf of the inputs; those that are no tensors have no users), get_attr nodes
    under the model's own tensor names, call_function nodes, one output. In eval mode, whatever mode the model is in.
    Its tensors are the model's own. `original` is the model, or its submodule named by `scope`.

    Attributes:
        producer: "export", or "record" where export refused: then the graph holds for one path and one shape.
        reason: why export refused, in a line; "" for "export".
        output_names: one per tensor output of the graph, such as "logits", "out.aux" or "0".
        aliases: first name -> every name, for tensors the model holds under several names.
        scope: path of `original` in the model that was given; "" for the model itself.
        outside: what the rest of the model reads of `original`, with a scope.
        functions: torch.autograd.Functions that the forward calls, whose backward a user wrote.
        path: the path that the example inputs take, and under which conditions other inputs take it.
        second_call: how a second call of the graph differs from one of the model, whose first call changed what the
            next reads; "" where the two agree.
    """

    producer: Literal["export", "record"]
    reason: str
    output_names: tuple[str, ...]
    aliases: dict[str, tuple[str, ...]]
    scope: str
    outside: Outside = field(default_factory=Outside)
    functions: tuple[WrittenBackward, ...] = ()
    path: Path = field(default_factory=Path)
    second_call: str = ""


@one_at_a_time
def capture(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    scope: str = "",
    outputs: str | Sequence[str] | None = None,
    dynamic: bool = True,
    training: bool = False,
    more: Sequence[Collection[int]] = (),
) -> Captured:
    """Turn a model into a graph.

    Args:
        model: any module, on any device, meta included. Not modified.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        example_kwargs: more keyword arguments.
        scope: capture only this submodule ("encoder.layer"), on the inputs it gets when `model` runs.
        outputs: names of the outputs that matter, or prefixes of names up to a dot; the graph returns only these, as
            a flat tuple (or one tensor). None: all, in the model's own structure.
        dynamic: leave the batch (dim 0 of the inputs that share the first one's length) and the sequence (dim 1 of
            integer inputs, and of inputs that are as long there) symbolic where the model allows it.
        more: dims of each tensor input, in order, that are left symbolic, too, where the model allows it.
        training: the graph is to be trained: `.train()` does to it what it does to the model, also where code of the
            user's or the dropout of attention asks for the mode. That takes a second export.

    Raises:
        InputError: the example inputs do not fit the model.
        CaptureError: neither export nor the recorder could follow the model; no such scope; no such output.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}", fix="give a torch.nn.Module")
    _check_is_plain(model)
    args, kwargs = copies(example_arguments(example_inputs, example_kwargs))
    _check_initialized(model)
    _check_is_memory(model)
    in_training = model.training
    outside = Outside()
    if scope:
        whole, given = model, (args, kwargs)
        model, args, kwargs = scoped(whole, scope, args, kwargs)
        outside = _read_outside(whole, scope, *given)
    args, kwargs = apart((args, kwargs))
    if (earlier := graph_called(model)) is not None:  # of an earlier result, which was captured without a cache, say
        kwargs = {**kwargs, **left_out(earlier, args, kwargs)}
    _check_names(model, kwargs)
    with functions_followed(keep=training) as functions:
        traced = _traced(model, args, kwargs, dynamic, more)
    module, names = traced.module, traced.names
    if not names:
        raise CaptureError(f"{type(model).__name__} returns no tensor", fix="compress a module that returns tensors")
    if outputs is not None:
        names = select_outputs(module.graph, names, [outputs] if isinstance(outputs, str) else outputs)
    canonicalize(module)
    _call_as(module.graph, model)
    captured = _finish(module, model)
    for written, node in written_parameters(captured):
        raise _writes_parameter(model, written, source_line(node))
    if traced.producer == "export":
        held = _held_in_eval(model) if in_training else frozenset()
        _follow_modes(captured, model, args, traced.kwargs, training, held, names if outputs is None else ())
    path = _seen_path(model, captured, args, traced.kwargs)
    captured.meta[GUARDS] = guards(captured.graph)
    again = ""
    if traced.producer == "export" and (path.stateful or writes(captured)):
        again = _second_call(model, captured, args, traced.kwargs)
    return Captured(
        module=captured,
        original=model,
        inputs=Inputs(args, traced.kwargs, codegen_of(captured.graph).pytree_info.in_spec),
        notes=traced.notes,
        producer=traced.producer,
        reason=traced.reason,
        output_names=names,
        aliases=aliases(model),
        scope=scope,
        outside=outside,
        functions=tuple(dict.fromkeys(functions)),
        path=path,
        second_call=again,
    )


def _seen_path(model: nn.Module, captured: CapturedModule, args: Args, kwargs: Kwargs) -> Path:
    """Return the path of the example inputs.

    Raises:
        CaptureError: the forward writes into a parameter.
    """
    reads = dict.fromkeys(source_line(node) for node in captured.graph.nodes if is_read(node))
    arguments = codegen_of(captured.graph).pytree_info.orig_args
    try:
        return seen_path(model, arguments, args, kwargs, [line for line in reads if line])
    except ParameterWritten as error:
        raise _run_error(model, error) from error


@dataclass(frozen=True)
class _Traced:
    """The graph of torch.export or of the recorder; the other fields are those of Captured."""

    module: fx.GraphModule
    names: tuple[str, ...]
    kwargs: Kwargs
    producer: Literal["export", "record"] = "export"
    reason: str = ""
    notes: tuple[str, ...] = ()


def _traced(model: nn.Module, args: Args, kwargs: Kwargs, dynamic: bool, more: Sequence[Collection[int]]) -> _Traced:
    try:
        exported = _Traced(*_export(model, args, kwargs, dynamic, more), kwargs)
        _check_lengths_of_data(exported.module)
        return exported
    except Exception as error:  # export has no base class for its refusals
        found = _without_cache(model, args, kwargs, dynamic) if _about_cache(error) else None
        if found is not None:
            return found
        if is_streamed(model):
            raise CaptureError(
                f"{type(model).__name__} cannot be cut while its weights stand in files: torch.export refused it",
                why=_refusal(error),
                fix="load the model into memory, and call graphcomp.compress",
            ) from error
        traced = _Traced(*_record(model, args, kwargs, error), kwargs, "record", _refusal(error))
        log.info("%s was recorded, as torch.export refused it: %s", type(model).__name__, traced.reason)
        return traced


def _check_lengths_of_data(module: fx.GraphModule) -> None:
    """Raise CaptureError where lengths are read off data and the graph holds ops whose sizes nothing can tell then:
    no pass could be checked on such a graph."""
    if any(node.target is torch.ops.aten.item.default for node in module.graph.nodes):
        try:
            run_shapes(module)
        except Exception as error:  # whatever an op raises that cannot take such a length
            why = f"lengths depend on data, and an op cannot take them: {type(error).__name__}"
            raise CaptureError(why, at=failed_at(error), why=str(error)) from error


def _second_call(model: nn.Module, captured: CapturedModule, args: Args, kwargs: Kwargs) -> str:
    """Return how the second call of the graph differs from the model's, "" where it does not."""
    if any(t.is_meta for t in tensor_names(model).values()):
        return ""
    try:
        with eval_copy(model, real=True) as copied:
            first, second = _two_calls(copied, args, kwargs)
        with same_buffers(captured):
            graph_first, graph_second = _two_calls(captured, args, kwargs)
    except Exception as error:  # of the user's code, which was not called twice before
        return f"a second call fails: {_reason(error)}"
    allowed = tolerance_of(first)
    if not relative_error(first, graph_first) <= allowed:  # the graph returns outputs that were selected, or no cache
        log.debug("the second call of %s cannot be compared with that of its graph", type(model).__name__)
        return ""
    off = relative_error(second, graph_second)
    return "" if off <= allowed else f"the second call is off by {off:.1e} (relative)"


def _two_calls(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the tensors that two calls return, and after the second what they made of the inputs."""
    given, named = copies((args, kwargs))
    with torch.no_grad():
        torch.manual_seed(0)
        first = tensor_leaves(copies(module(*given, **named)))
        second = tensor_leaves((module(*given, **named), given, named))
    return first, second


# ---------------------------------------------------------------------------------------------- inputs
def example_arguments(example_inputs: Any, example_kwargs: Mapping[str, Any] | None) -> tuple[Args, Kwargs]:
    """Positional and keyword arguments of the forward.

    Raises:
        InputError: there is no tensor among them.
    """
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise InputError(
            f"example_kwargs must be a dict of keyword inputs, got a {type(example_kwargs).__name__}",
            fix='example_kwargs={"mask": mask}',
        )
    kwargs = dict(example_kwargs or {})
    if isinstance(example_inputs, torch.Tensor):
        args: Args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), {**example_inputs, **kwargs}
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    else:
        raise InputError(
            f"example inputs of type {type(example_inputs).__name__}",
            fix="give a tensor, a tuple of positional inputs, or a dict of keyword inputs",
        )
    if not tensor_leaves((args, kwargs)):
        raise InputError(
            "the example inputs hold no tensor", fix="give at least one tensor, such as torch.randn(1, 3, 224, 224)"
        )
    return args, kwargs


def _check_is_plain(model: nn.Module) -> None:
    """Raise InputError for a module that stands around the model, or was compiled from it."""
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"the model is a {kind}",
            why="torch.jit has compiled its forward, which torch.export cannot follow",
            fix="give the torch.nn.Module that was scripted or traced",
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(
            f"the model is wrapped in {kind}",
            why="the wrapper is bound to the parameters that it was made for, of their present sizes",
            fix="give what it wraps, model.module, and wrap the result anew",
        )


def _check_initialized(model: nn.Module) -> None:
    lazy = [n for n, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise InputError(
            f"{type(model).__name__} has parameters without a shape",
            at=lazy[0],
            why="lazy modules get their shapes in the first forward pass",
            fix="run the model once before compressing it",
        )


def _check_is_memory(model: nn.Module) -> None:
    """Raise InputError for a weight that has no memory of its own, and stands for other tensors."""
    standing = {name: type(p).__name__ for name, p in model.named_parameters() if stands_for_others(p)}
    for name, kind in standing.items():
        raise InputError(
            f"{type(model).__name__} is quantized already" if kind == "QuantizedTensor" else f"a weight is a {kind}",
            at=name,
            why=f"the weight is a {kind}, which stands for other tensors, and has no elements to cut or to round",
            fix="compress the float model",
        )


def _check_names(model: nn.Module, kwargs: Kwargs) -> None:
    """The graph module keeps the model's names at its own top level, so they must not be its own attributes. Names of
    inputs are those of the arguments of its forward."""
    for name in kwargs:
        if not str(name).isidentifier() or keyword.iskeyword(name):
            raise InputError(
                f"an input is called {name!r}",
                why="Python takes it for no name of an argument",
                fix="rename it, or compress a module whose forward hands it on under another name",
            )
    taken = sorted({name.partition(".")[0] for name in tensor_names(model)} & _names_of_graphs())
    if taken:
        raise CaptureError(
            f"{type(model).__name__} has a submodule or tensor called {taken[0]!r}",
            why="torch.fx.GraphModule has an attribute of that name",
            fix="rename it, or wrap the model in torch.nn.Sequential (its names then begin with '0.')",
        )


@functools.cache
def _names_of_graphs() -> frozenset[str]:
    """Return the attributes that a GraphModule has beyond those of any module."""
    return frozenset(dir(fx.GraphModule({}, fx.Graph()))) - frozenset(dir(nn.Module()))


class _Reached(BaseException):
    """Stops the run once the submodule's inputs are known; no model catches it by accident."""


def scoped(model: nn.Module, scope: str, args: Args, kwargs: Kwargs) -> tuple[nn.Module, Args, Kwargs]:
    """A submodule and the inputs it gets first when the whole model runs on `args` and `kwargs`.

    Raises:
        InputError: the model does not run on them.
        CaptureError: there is no such submodule, or it is not called.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if scope not in modules:
        near = difflib.get_close_matches(scope, modules, n=1, cutoff=0.0)
        raise CaptureError(f"{type(model).__name__} has no submodule {scope!r}", fix=f"scope={near[0]!r}")
    _check_is_plain(modules[scope])
    seen: list[tuple[Args, Kwargs]] = []

    def note(_module: nn.Module, inner_args: Args, inner_kwargs: Kwargs) -> None:
        seen.append((inner_args, inner_kwargs))
        raise _Reached

    with eval_copy(model, real=True) as copied:
        copied.get_submodule(scope).register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        try:
            _run(copied, args, kwargs)
        except _Reached:
            pass
        except Exception as error:
            raise _run_error(model, error) from error
    if not seen:
        raise CaptureError(
            f"the submodule {scope!r} of {type(model).__name__} was not called",
            why="the model's forward does not reach it on these example inputs, or calls its methods directly",
            fix="name a submodule that is called, or give example inputs that reach it",
        )
    return modules[scope], *seen[0]


def _read_outside(model: nn.Module, scope: str, args: Args, kwargs: Kwargs) -> Outside:
    """Return what the rest of the model reads of the submodule `scope` in a run on the example inputs.

    Raises:
        InputError: the model does not run on them.
    """
    with eval_copy(model, real=True) as copied, watching(copied, copied.get_submodule(scope)) as found:
        try:
            _run(copied, args, kwargs)
        except Exception as error:
            if not any(t.is_meta for t in tensor_names(model).values()):
                raise _run_error(model, error) from error
            log.debug("%s was watched up to an op that has no values: %s", type(model).__name__, _reason(error))
    return found


def _run(model: nn.Module, args: Args, kwargs: Kwargs, *, hold: bool = True) -> Any:
    """A plain forward pass without gradients, on copies of the inputs (a model may write into them).

    Raises:
        ParameterWritten: the forward writes into a parameter; with `hold` before it does.
        Whatever the model raises.
    """
    args, kwargs = copies((args, kwargs))
    with torch.no_grad(), HoldParameters(model) if hold else nullcontext():
        return model(*args, **kwargs)


# ---------------------------------------------------------------------------------------------- export
def _export(
    model: nn.Module, args: Args, kwargs: Kwargs, dynamic: bool, more: Sequence[Collection[int]] = ()
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The graph of torch.export: with symbolic batch and sequence if the model allows it, else as the inputs are."""
    if is_streamed(model):
        plain, streamed_of = with_plain_tensors(model)
        module, names = _export(plain, args, kwargs, dynamic, more)
        return put_back(module, streamed_of), names
    forget_shape_environments()  # those of captures before
    if dynamic:
        try:
            program = _export_dynamic(model, args, kwargs, more)
        except DATA_DEPENDENT:  # fixed shapes would not help
            raise
        except Exception as error:  # export has no base class for its refusals
            log.debug("%s has no graph for every batch: %s", type(model).__name__, _reason(error))
            program = None
        if program is not None:
            return _released(*_unlifted(program))
    return _released(*_unlifted(_program(model, args, kwargs, None)))


def _released(module: fx.GraphModule, names: tuple[str, ...]) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Return both, with the cycles broken that keep the shape environment of an export in memory for ever.

    The environment lists fake inputs and caches results, whose symbolic lengths hold the environment in C++, where no
    garbage collector looks.
    """
    for node in module.graph.find_nodes(op="placeholder"):
        shape_env = getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None)
        if shape_env is not None:
            shape_env.tracked_fakes = []
            getattr(shape_env, "fake_tensor_cache", {}).clear()
    return module, names


def _export_dynamic(
    model: nn.Module, args: Args, kwargs: Kwargs, more: Sequence[Collection[int]]
) -> torch.export.ExportedProgram | None:
    """Export with symbolic dims. None where that would tie the graph to a batch that is not the user's."""
    batch = _batch(args, kwargs)
    doubled = batch == 1
    if doubled:
        # export takes a length of 1 for a constant, so it is shown two copies of the sample
        args, kwargs = pytree.tree_map_only(torch.Tensor, _twice, (args, kwargs))
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    inputs = tensor_leaves((args, kwargs))
    lengths = {t.shape[1] for t in inputs if t.dim() > 1 and _is_integer(t)}
    for tensor, others in zip_longest(inputs, more, fillvalue=()):
        assert isinstance(tensor, torch.Tensor)
        shapes[tensor] = _symbolic_dims(tensor, 2 if doubled else batch, lengths, others)
    program = _program(model, args, kwargs, shapes)
    values = [n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")]
    fakes = [v for v in values if isinstance(v, torch.Tensor)][-len(inputs) :]
    tied = any(v.dim() > 0 and _as_int(v.shape[0]) == 2 for v in fakes)
    return None if doubled and tied else program


def _as_int(length: int | torch.SymInt) -> int | None:
    """The length where it is one number, whatever the inputs; a symbol may have been found to be one meanwhile."""
    return length.node.maybe_as_int() if isinstance(length, torch.SymInt) else length


def _batch(args: Args, kwargs: Kwargs) -> int | None:
    """Length of dim 0 of the first tensor input that has one."""
    return next((t.shape[0] for t in tensor_leaves((args, kwargs)) if t.dim() > 0), None)


def _twice(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor]) if tensor.dim() > 0 and tensor.shape[0] == 1 else tensor


def _symbolic_dims(
    tensor: torch.Tensor, batch: int | None, lengths: set[int], others: Collection[int]
) -> dict[int, Any] | None:
    """Dim 0 where it is the batch, dim 1 where it is as long as that of a token input (one of `lengths`), and `others`.

    Lengths of 0 and 1 are constants to export.
    """
    dims = [0] if tensor.dim() > 0 and tensor.shape[0] == batch else []
    dims += [1] if tensor.dim() > 1 and tensor.shape[1] in lengths else []
    dims += others
    return {dim: Dim.AUTO for dim in dims if tensor.shape[dim] > 1} or None


def _is_integer(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()


def _without_cache(model: nn.Module, args: Args, kwargs: Kwargs, dynamic: bool) -> _Traced | None:
    """The graph with the cache switched off; None where that would change the outputs."""
    off = switched_off(model, args, kwargs)
    if off is None:
        return None
    try:
        traced = _Traced(*_export(model, args, off, dynamic), off, notes=(CACHE_NOTE,))
        return traced if loses_the_cache_alone(model, args, kwargs, off) else None
    except Exception as error:  # export has no base class for its refusals, nor has the user's code
        log.debug("%s without its cache: %s", type(model).__name__, _reason(error))
        return None


def _program(model: nn.Module, args: Args, kwargs: Kwargs, shapes: Any) -> torch.export.ExportedProgram:
    with eval_copy(model, real=False) as copied, _quiet(), _masks_unread():
        return torch.export.export(copied, args, kwargs, dynamic_shapes=shapes, strict=False)


@contextmanager
def _masks_unread() -> Iterator[None]:
    """Inside, torch's transformers take a mask for what it is: whether it is a causal one, for which there is a faster
    kernel, they would ask of its values."""
    with causal_mask_test(_of_flag):
        yield


def _of_flag(otherwise: Callable[..., bool]) -> Callable[..., bool]:
    """Return a test that believes the flag of the caller, in this thread."""
    return in_this_thread(lambda mask, is_causal=None, size=None: bool(is_causal), otherwise)


def _held_in_eval(model: nn.Module) -> frozenset[str]:
    """Return the paths of the modules in eval mode."""
    return frozenset(path for path, m in model.named_modules(remove_duplicate=False) if not m.training)


def _follow_modes(
    captured: CapturedModule,
    model: nn.Module,
    args: Args,
    kwargs: Kwargs,
    training: bool,
    held: frozenset[str],
    output_names: Sequence[str],
) -> None:
    """Look up which ops follow `.train()`, and what they are given in training mode where export has written down what
    they are given in eval mode; by a second export where the modules do not tell, if it is to be trained.

    Args:
        held: paths of modules that the user put in eval mode inside of a model in training mode; they stay so.
        output_names: names of the outputs in eval mode, compared with those of training mode; none: not compared.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    modes = {**training_modes(model), **dict.fromkeys(held, False)}
    unknown = follow_modules(captured.graph, modules, modes)
    averaging = [path for path, module in modules.items() if averages_over_all(module)]
    if training and averaging:
        log.warning("batch norms of momentum=None get momentum=%g in training: %s", MOMENTUM, ", ".join(averaging))
    if training and (unknown or any(map(asks_for_the_mode, modules.values()))):
        _follow_training(captured, model, args, kwargs, modes, output_names)


def graph_in_training(
    model: nn.Module, args: Args, kwargs: Kwargs, modes: Mapping[str, bool]
) -> tuple[CapturedModule, tuple[str, ...]]:
    """Return the graph of the model in training mode, for inputs of these sizes, and the names of its outputs.

    Raises:
        Whatever torch.export raises.
    """
    plain, streamed_of = with_plain_tensors(model) if is_streamed(model) else (model, {})
    with eval_copy(plain, real=False) as copied, _quiet(), _masks_unread():
        for path, part in copied.named_modules(remove_duplicate=False):
            set_mode(part, modes.get(path, True))
        program = torch.export.export(copied, args, kwargs, strict=False)
    module, names = _unlifted(program)
    canonicalize(module)
    return _finish(put_back(module, streamed_of), model), names


def training_modes(model: nn.Module) -> dict[str, bool]:
    """`training` of each module after the model's own `train()`, which is called on a copy without weights."""
    copied = module_copy(model, _without_values)
    try:
        copied.train()
    except Exception as error:  # of the user's code
        log.debug("%s cannot be switched to training mode: %s", type(model).__name__, _reason(error))
        return {}
    return {path: module.training for path, module in copied.named_modules(remove_duplicate=False)}


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def asks_for_the_mode(module: nn.Module) -> bool:
    """Whether the forward of a module may do something else in training mode than the ops' flags say."""
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout)
    own = [kind for kind in type(module).__mro__ if not kind.__module__.startswith(("torch.nn.modules.", "builtins"))]
    codes = (getattr(function, "__code__", None) for kind in own for function in vars(kind).values())
    return any(code is not None and "training" in code.co_names for code in codes)


def _follow_training(
    captured: CapturedModule,
    model: nn.Module,
    args: Args,
    kwargs: Kwargs,
    modes: Mapping[str, bool],
    output_names: Sequence[str],
) -> None:
    try:
        module, names = graph_in_training(model, args, kwargs, modes)
    except Exception as error:  # export has no base class for its refusals
        log.warning(
            "%s is trained without what it does in training mode alone, of which there is no graph: %s",
            type(model).__name__,
            _reason(error),
        )
        return
    if output_names and tuple(names) != tuple(output_names):
        log.warning(
            "%s is trained without what it does in training mode alone: its outputs are %s there, and a prepared "
            "module returns those of eval mode, %s",
            type(model).__name__, ", ".join(names), ", ".join(output_names),
        )  # fmt: skip
    places: dict[str, list[str]] = {}
    for node in follow_training(captured.graph, module.graph):
        places.setdefault(str(node.target), []).append(f"'{module_path(node)}'")
    for op, paths in places.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        what = f"{op} in {paths[0]}{more}"
        log.warning("%s is trained without what it does in training mode alone: %s", type(model).__name__, what)
    captured.recompile()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what torch.export has to say about graphs: warnings, log lines, and the graph it prints on failure.

    Sources of the modules that torch.export makes go with these modules.
    """
    loggers = [logging.getLogger(name) for name in EXPORT_LOGGERS]
    # the exception says it all; what other threads log is theirs
    silent = in_this_thread(lambda _record: False, lambda _record: True)
    graph = ""
    for logger in loggers:
        logger.addFilter(silent)
    try:
        with stderr_held() as said, warnings.catch_warnings(), sources_go_with_code():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        graph = str(getattr(error, "partial_fx_graph", ""))
        raise
    finally:
        for logger in loggers:
            logger.removeFilter(silent)
        # what the model itself wrote is not ours to swallow
        text = said.getvalue()
        sys.stderr.write(text.replace(f"{graph}\n", "") if graph else text)


def _unlifted(program: torch.export.ExportedProgram) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The program as a module that holds the model's own tensors, and the names of its tensor outputs."""
    with _quiet(), names_quoted():
        module = program.module(check_guards=False)
    spec = program.call_spec.out_spec
    assert spec is not None
    results = module.graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    names = zip(leaf_names(spec), results, strict=True)
    return module, tuple(name for name, result in names if _is_tensor(result))


# ---------------------------------------------------------------------------------------------- record
def _record(model: nn.Module, args: Args, kwargs: Kwargs, refusal: Exception) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The graph of one real run, or the error that says why there is none."""
    copied_args, copied_kwargs = copies((args, kwargs))
    try:
        with eval_copy(model, real=True) as copied, HoldParameters(copied):
            recording = record(copied, copied_args, copied_kwargs)
    except CaptureError:
        raise
    except ParameterWritten as error:
        raise _run_error(model, error) from error
    except Exception as error:
        _check_runs(model, args, kwargs)
        raise CaptureError(
            f"torch.export could not capture {type(model).__name__}.forward, nor could it be recorded",
            at=user_line(refusal),
            why=f"{_reason(refusal)}; recording: {_reason(error)}",
            fix=_fix(refusal),
        ) from refusal
    return recorded_graph(model, recording), recording.output_names


def recorded_graph(model: nn.Module, recording: Recording) -> CapturedModule:
    """Return a recorded run of a copy of `model` as a module that holds the model's own tensors."""
    held = tensor_names(model)  # the copy ran with buffers of its own
    tensors = {name: held.get(name, tensor) for name, tensor in recording.tensors.items()}
    return CapturedModule(tensors, recording.graph)


@contextmanager
def blaming_inputs(captured: Captured) -> Iterator[None]:
    """Where the block fails on inputs that the model itself does not run on, that is the error.

    Export runs the model on tensors without data, some of whose ops take dtypes that the real ones do not.

    Raises:
        InputError: the model does not run on its example inputs, or its weights changed meanwhile.
    """
    before = _versions(captured.original)
    try:
        yield
        _check_unchanged(captured.original, before)
    except Exception:
        _check_unchanged(captured.original, before)
        if not any(t.is_meta for t in (*captured.original.parameters(), *captured.original.buffers())):
            _check_runs(captured.original, captured.inputs.args, captured.inputs.kwargs)
        raise


def _versions(model: nn.Module) -> dict[str, int]:
    """How often each tensor of the model was written into; inference tensors do not count."""
    return {name: version_of(t) for name, t in tensor_names(model).items() if not t.is_inference()}


def _check_unchanged(model: nn.Module, before: Mapping[str, int]) -> None:
    now = _versions(model)
    changed = [name for name, version in before.items() if now.get(name, version) != version]
    if changed:
        raise InputError(
            f"the weights of {type(model).__name__} changed while it was compressed",
            at=changed[0],
            why="another thread trains the model, so that no two runs of it are alike",
            fix="give a copy: copy.deepcopy(model), taken between two steps of the training",
        )


def _check_runs(model: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Raise InputError if the plain model does not run on its example inputs."""
    for hold in (True, False):  # a model may refuse to run under a dispatch mode
        try:
            with eval_copy(model, real=True) as copied:
                _run(copied, args, kwargs, hold=hold)
            return
        except Exception as error:
            if isinstance(error, ParameterWritten) or not hold:
                raise _run_error(model, error) from error


def _run_error(model: nn.Module, error: Exception) -> CaptureError:
    """Return what is wrong where the plain model raises `error` on its example inputs."""
    if isinstance(error, ParameterWritten):
        return _writes_parameter(model, error.name, user_line(error))
    return _input_error(model, error)


def _writes_parameter(model: nn.Module, name: str, at: str) -> CaptureError:
    return CaptureError(
        f"{type(model).__name__}.forward writes into its own parameter '{name}'",
        at=at,
        why="a graph would write at every call, and so would each run here into the weights of the model",
        fix="call the model once in eval mode before, if it writes only then; or keep in a buffer what is written",
    )


def _input_error(model: nn.Module, error: Exception) -> InputError:
    return InputError(
        f"{type(model).__name__} does not run on the example inputs",
        at=user_line(error),
        why=_reason(error),
        fix="give example inputs for which model(*args, **kwargs) works, on the model's device and in its dtype",
    )


def _reason(error: BaseException) -> str:
    """The error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return reason if len(reason) <= 300 else reason[:297] + "..."


def _refusal(error: BaseException) -> str:
    """Why export refused, and what to do about it where there is something to do."""
    return f"{_reason(error)} ({CACHE_FIX})" if _about_cache(error) else _reason(error)


def _fix(error: BaseException) -> str:
    if _about_cache(error):
        return CACHE_FIX
    return 'pass scope="path.to.submodule" to compress one submodule, or example inputs that avoid this line'


def _about_cache(error: BaseException) -> bool:
    """Whether export met a container of past keys and values, which it cannot take apart."""
    return re.search(r"\w*Cache\b.*(in output|input type)|(in output|input type)\b.*\w*Cache\b", str(error)) is not None


def user_line(error: BaseException) -> str:
    """'model.py:12, in forward -> if x.sum() > 0:': the innermost frame inside the model's own code; '' if none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(NOT_THE_USERS)]
    # the standard library's folder holds site-packages, where models may well live
    frames = [f for f in frames if not f.filename.startswith(STDLIB) or f.filename.startswith(INSTALLED)]
    if not frames:
        return ""
    last = frames[-1]
    return f"{File(last.filename).name}:{last.lineno}, in {last.name} -> {last.line}"


# ---------------------------------------------------------------------------------------------- outputs and names
def select_outputs(graph: fx.Graph, names: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    """Let the graph return only the outputs in `wanted` (names, or prefixes up to a dot); the names of what is left.

    Raises:
        CaptureError: a name in `wanted` fits no output.
    """
    for want in wanted:
        if not any(_fits(name, want) for name in names):
            listed = ", ".join(repr(name) for name in names)
            raise CaptureError(f"the model has no output {want!r}", why=f"its outputs are {listed}", fix="name these")
    output = graph.output_node()
    results = [result for result in pytree.tree_leaves(output.args[0]) if _is_tensor(result)]
    kept = [(n, r) for n, r in zip(names, results, strict=True) if any(_fits(n, want) for want in wanted)]
    output.args = (tuple(result for _, result in kept),)
    one_or_tuple = 0 if len(kept) == 1 else tuple(range(len(kept)))
    info = codegen_of(graph).pytree_info
    graph.set_codegen(calling_convention(info.orig_args, info.in_spec, pytree.tree_structure(one_or_tuple)))
    return tuple(name for name, _ in kept)


def _call_as(graph: fx.Graph, model: nn.Module) -> None:
    """Let the graph know the parameters of the model's forward."""
    info = codegen_of(graph).pytree_info
    graph.set_codegen(calling_convention(info.orig_args, info.in_spec, info.out_spec, parameters_of(model)))


def _is_tensor(result: Any) -> bool:
    return isinstance(result, fx.Node) and isinstance(result.meta.get("val"), torch.Tensor)


def _fits(name: str, want: str) -> bool:
    return name == want or name.startswith(want + ".")


def _finish(module: fx.GraphModule, model: nn.Module) -> CapturedModule:
    """The captured module: each tensor read once, under its first name in the model."""
    names = canonical_names(model)
    held: dict[str, Any] = {}
    first: dict[str, fx.Node] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        value = fetch(module, str(node.target))
        node.target = name = names.get(id(value), str(node.target))
        if name in first:
            replace_node(node, first[name])
            continue
        first[name], held[name] = node, value
    return build(held, module.graph, type(model).__name__)
