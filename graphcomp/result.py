"""CompressedModel: what compression returns."""

from __future__ import annotations

import inspect
import logging
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from graphcomp.arguments import check_dynamic, check_flag, check_path
from graphcomp.capture.capture import example_arguments
from graphcomp.capture.path import Branches, branches_of
from graphcomp.capture.path import Path as SeenPath
from graphcomp.errors import CheckpointError, ExportError, FormError
from graphcomp.ir.module import WATCHED, tensor_leaves
from graphcomp.report.report import Report
from graphcomp.system import listeners

if TYPE_CHECKING:
    from graphcomp.quantization.raising import Raised
    from graphcomp.targets.write import ExportReport

log = logging.getLogger("graphcomp.compressed")

Form = Literal["native", "graph"]


OF_CLASS = ("config", "generate", "generation_config", "main_input_name", "can_generate")
"""What libraries ask a model for that only a class has, not a graph."""


class _Forward:
    """The forward of a wrapper: bound to an instance, a method with the signature of the module inside.

    Trainers read the names of a model's inputs off the signature of its forward.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.made: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()

    def __get__(self, instance: CompressedModel | None, owner: type | None = None) -> Any:
        if instance is None:
            return self.function
        if torch.compiler.is_compiling():
            return types.MethodType(self.function, instance)
        inside = instance.module
        if inside not in self.made:
            self.made[inside] = self._like(inside)
        return types.MethodType(self.made[inside], instance)

    def _like(self, inside: nn.Module) -> Callable[..., Any]:
        """Return the function with the signature of the forward of a module."""
        try:
            inner = inspect.signature(inside.forward)
        except (TypeError, ValueError):  # a forward that is no function of Python
            return self.function
        made: Any = types.FunctionType(self.function.__code__, self.function.__globals__, "forward")
        made.__doc__ = self.function.__doc__
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        made.__signature__ = inner.replace(parameters=[own, *inner.parameters.values()])
        return made  # type: ignore[no-any-return]


class CompressedModel(nn.Module):
    """A smaller model, called like the original.

    Attributes and methods of the user's class (`config`, `generate`) are those of `module`, where `form` is "native".

    Attributes:
        module: the user's own class where that could be verified (`form` "native"), else the sliced graph ("graph").
        kept: parameter or buffer name -> dim -> the indices that were kept ((k,) int64), sliced dims only.
        report: what was removed, what it saves, what was verified.
        reason: for "graph", why it is not the user's class; else "".
        edits: Python attributes of the user's class that were corrected, as (module path, attribute, value).
        example_args, example_kwargs: inputs it was made with; not stored in a checkpoint, so empty after `load`.
        export_report: how the last exported file ran; None before.
        path: the path through the model that was seen: calls that leave it are warned of. None after `load`.
        called: modules of a graph in the model that the rest of the model calls or reads itself.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        form: Form,
        kept: Mapping[str, Mapping[int, Tensor]],
        report: Report | Mapping[str, Any],
        reason: str = "",
        edits: tuple[tuple[str, str, Any], ...] = (),
        original_shapes: Mapping[str, tuple[int, ...]] | None = None,
        example_args: tuple[Any, ...] = (),
        example_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.form: Form = form
        self.kept = _shared(kept)
        self.report = report
        self.reason = reason
        self.edits = edits
        self.original_shapes = dict(original_shapes or {})
        self.example_args = tuple(example_args)
        self.example_kwargs = dict(example_kwargs or {})
        self.export_report: ExportReport | None = None
        self.path: SeenPath | None = None
        self._seen: set[Any] = set()
        self.called: tuple[str, ...] = ()
        self.train(module.training)
        for told in listeners.RESULTS:
            told(self)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original model's. A call that takes another path than the example inputs is warned of, once."""
        path = self.path
        if path is None or torch.compiler.is_compiling() or isinstance(self.module, fx.GraphModule):  # it warns itself
            return self.module(*args, **kwargs)
        self._watch_sizes(path, args, kwargs)
        if not path.has("values"):
            return self.module(*args, **kwargs)
        with Branches(sizes=False) as branches:
            result = self.module(*args, **kwargs)
        self._warn(path.left_by(frozenset(branches.taken)))
        return result

    forward = _Forward(_forward)

    def __getattr__(self, name: str) -> Any:
        """Return what the module inside has.

        Raises:
            FormError: a graph was asked for what only the model's class has.
            AttributeError: nothing of that name.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module" or name.startswith("__"):
                raise
        module = self.module  # raises where a copy or a pickle has not come so far
        if isinstance(module, fx.GraphModule) and name in OF_CLASS:
            raise FormError(
                f"the compressed model has no {name!r}: it is a graph, not of the model's class",
                why=self.reason,
                fix="call it as the model, or compress with options that keep the class (see `reason`)",
            )
        return getattr(module, name)

    @property
    def device(self) -> torch.device:
        """Return the device of the first parameter or buffer; the CPU where there is none."""
        held = next((t for t in (*self.module.parameters(), *self.module.buffers())), None)
        return torch.device("cpu") if held is None else held.device

    def _watch_sizes(self, path: SeenPath, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Where the model's code compares sizes, look once per set of sizes which branches a call takes."""
        self._warn(path.left_with(args, kwargs))
        shapes = tuple(tuple(t.shape) for t in tensor_leaves((args, kwargs)))
        if not path.has("sizes") or shapes in self._seen or len(self._seen) > WATCHED:
            return
        self._seen.add(shapes)
        branches = branches_of(self.module, args, kwargs)
        self._warn(path.left_by(branches))

    def _warn(self, how: str) -> None:
        if how and how not in self._seen:
            self._seen.add(how)
            log.warning(
                "%s was called off the path that the example inputs took, where it was not compared: %s",
                type(self.module).__name__, how,
            )  # fmt: skip

    @property
    def quantized(self) -> Raised | None:
        """Return the fake-quant and the integer graph of a quantized model; None of a float model.

        Made anew from the integers at each use, as the fake-quant graph holds each weight in floats.

        Raises:
            ExportError: the model is of the user's class, and there are no example inputs to capture a graph on, as
                after `load`.
        """
        from graphcomp.quantization.raising import integer_graph, raised

        graph = integer_graph(self._in_a_graph(self.example_args, self.example_kwargs))
        return None if graph is None else raised(graph)

    def _in_a_graph(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
        """Return the module; of a class with weights of integers, the integer graph of the class.

        Raises:
            ExportError: the class holds weights of integers, and there are no example inputs.
            CaptureError, InputError: see `export`.
        """
        from graphcomp.native.integers import quantized_tensors

        if self.form != "native" or not quantized_tensors(self.module):
            return self.module
        if not args and not kwargs:
            raise ExportError(
                "no example inputs",
                why="a graph is captured from the class, whose weights are integers; a loaded model has none",
                fix="small.export(path, example_inputs)",
            )
        from graphcomp.native.lowered import lowered_again

        return lowered_again(self.module, args, kwargs).module

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint folder that `graphcomp.load` rebuilds without the original weights.

        Raises:
            CheckpointError: the folder holds something else, or cannot be written; the model holds modules that are
                no part of its graph.
        """
        from graphcomp.checkpoint.folder import save

        check_path("folder", folder)
        if self.called:
            raise CheckpointError(
                "the model cannot be saved",
                why=f"a part of it is a graph, and the rest calls '{self.called[0]}' of that part itself",
                fix="export to .onnx or .pt2, or compress the whole model, without scope=",
            )
        save(self, folder)

    def export(
        self,
        path: str | Path,
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        dynamic: Mapping[str, Mapping[int, str]] | None = None,
        measure: bool = True,
        guard: bool = False,
        cache: bool = False,
    ) -> None:
        """Write the model for another runtime, chosen by the suffix; a path without suffix is a checkpoint folder.

        `.onnx` (onnxruntime, OpenVINO; needs the `onnx` extra) and `.pt2` (torch.export) files are run on the example
        inputs before they are put in place, and `export_report` then says how that went. Batches of any size may be fed
        to them where the model allows it.

        Args:
            path: a file `.onnx` or `.pt2`, or a folder.
            example_inputs, example_kwargs: as for `compress`; by default those the model was compressed with.
            dynamic: input -> dim -> name, {"x": {2: "height", 3: "width"}}, for lengths that must be open in the file.
                By default, those of an `.onnx` file are open that the graph does not depend on; `export_report`
                names them.
            measure: time an `.onnx` file with layers on integers beside its float form, for about a second (1 thread);
                `export_report.speed` and the report then hold a line such as "53 of 54 layers on integers, 1.52 x the
                float file (1 thread)".
            guard: never slower: leave layers of an `.onnx` file in float where the file is faster so, whole kinds of
                layers, or the whole file. Layers of one shape are judged together; at most 16 shapes beside the kinds
                are timed, for a second or three runs each. The report names what is left, why, and how far the outputs
                move. Weights stay integers in the file, and become floats when it is loaded; those with a step per
                group are written as floats.
            cache: write a decoder of transformers with its keys and values as inputs and outputs, so that one `.onnx`
                file reads a prompt and then token by token: `input_ids` (b, s), `attention_mask` (b, p + s),
                `position_ids` (b, s), `past_key_values.0.key` (b, heads, p, size) … to `logits`, `present.0.key` …; b,
                s ≥ 1 and p ≥ 0 are open. Needs no example inputs. A path without suffix is then a folder for
                onnxruntime-genai: `model.onnx`, `genai_config.json`, and the tokenizer's files of the folder that the
                model was loaded from. Not with `dynamic` or `guard`.

        Raises:
            CaptureError: the model cannot be captured.
            InputError: the model does not run on the example inputs.
            ExportError: another suffix; no example inputs; an op the format lacks; the path cannot be written.
            CheckpointError: the folder holds something else, or cannot be written.
        """
        from graphcomp.targets.write import FORMATS, write_file

        check_path("path", path)
        if dynamic is not None:
            check_dynamic("dynamic", dynamic)
        check_flag("measure", measure)
        check_flag("guard", guard)
        check_flag("cache", cache)
        path = Path(path)
        if guard and not measure:
            raise ExportError(
                "guard=True with measure=False",
                at=str(path),
                why="what stays in float is decided by times",
                fix=f"small.export({str(path)!r}, guard=True), or measure=False alone",
            )
        if cache:
            self._export_decoder(path, example_inputs, example_kwargs, dynamic, measure, guard)
            return
        if not path.suffix and guard:
            raise ExportError(
                "guard=True with a folder",
                at=str(path),
                why="layers are timed in onnxruntime",
                fix=f"small.export({path.name + '.onnx'!r}, guard=True), or no guard",
            )
        if not path.suffix:
            self.save(path)
            return
        if path.suffix not in FORMATS:
            raise ExportError(
                f"there is no format {path.suffix!r}",
                at=str(path),
                fix=f"one of {', '.join(FORMATS)}, or small.save({str(path)!r}) for a folder of that name",
            )
        args, kwargs = self.example_args, self.example_kwargs
        if example_inputs is not None or example_kwargs is not None:
            args, kwargs = example_arguments(() if example_inputs is None else example_inputs, example_kwargs)
        if guard and FORMATS[path.suffix] != "onnx":
            raise ExportError(
                f"guard=True with {path.suffix}",
                why="layers are timed in onnxruntime",
                fix=f"small.export({str(path.with_suffix('.onnx'))!r}, guard=True), or no guard",
            )
        module = self._in_a_graph(args, kwargs)
        self._keep(write_file(module, path, args, kwargs, dynamic, measure=measure, guarded=guard), path)

    def _export_decoder(
        self,
        path: Path,
        example_inputs: Any,
        example_kwargs: Mapping[str, Any] | None,
        dynamic: Mapping[str, Mapping[int, str]] | None,
        measure: bool,
        guard: bool,
    ) -> None:
        from graphcomp.targets.write_decoder import write_decoder

        if dynamic is not None or guard:
            raise ExportError(
                f"cache=True with {'dynamic=' if dynamic is not None else 'guard=True'}",
                why="all lengths of a decoder are open"
                if dynamic is not None
                else "layers are timed one run at a time",
                fix=f"small.export({str(path)!r}, cache=True)",
            )
        if path.suffix not in ("", ".onnx"):
            raise ExportError(
                f"cache=True with {path.suffix}",
                why="a decoder with its cache is written for onnxruntime",
                fix=f"small.export({str(path.with_suffix('.onnx'))!r}, cache=True), or a folder for onnxruntime-genai",
            )
        given = self.example_kwargs
        if example_inputs is not None or example_kwargs is not None:
            args, given = example_arguments(() if example_inputs is None else example_inputs, example_kwargs)
            given = {"input_ids": args[0], **given} if args else given
        tokens = given.get("input_ids")
        genai = not path.suffix
        file = path / "model.onnx" if genai else path
        module = self.module
        report = write_decoder(
            module, file, tokens if isinstance(tokens, Tensor) else None, measure=measure, genai=genai
        )
        self._keep(report, file)

    def _keep(self, written: ExportReport, path: Path) -> None:
        """Keep how a file ran, and put into the report what a reader of the report should know of the file."""
        self.export_report = written
        if not isinstance(self.report, Report):
            return
        said = [f"{path.name} {note}" for note in self.export_report.notes if note not in self.report.notes]
        self.report = replace(self.report, notes=tuple(dict.fromkeys((*self.report.notes, *said))))
        if self.export_report.kernels is not None:
            speed = self.export_report.speed
            own = {} if speed is None else {"speed": speed.to_dict()}
            self.report = replace(self.report, kernels={**self.export_report.kernels.to_dict(), **own})


def _shared(kept: Mapping[str, Mapping[int, Tensor]]) -> dict[str, dict[int, Tensor]]:
    """Return `kept` with one tensor for equal indices: all members of a group have the same."""
    one: dict[bytes, Tensor] = {}
    return {
        name: {dim: one.setdefault(indices.cpu().numpy().tobytes(), indices) for dim, indices in dims.items()}
        for name, dims in kept.items()
    }
