"""Run an exported file in its runtime, compare it with the module it came from, and time it."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from graphcomp.capture.resized import outputs
from graphcomp.cost import Latency
from graphcomp.errors import ExportError, first_line
from graphcomp.ir.module import tensor_leaves
from graphcomp.numerics.compare import floating_tensors, tolerance_of
from graphcomp.quantization.dynamic import HIGHEST, quantize_dynamic
from graphcomp.quantization.ops import dequantize_per_tensor, quantize_per_tensor
from graphcomp.targets.onnxruntime.export import need
from graphcomp.targets.pt2 import in_eval_mode
from graphcomp.torch_compat import pytree

if TYPE_CHECKING:
    import onnxruntime

Args = tuple[Any, ...]


@dataclass(frozen=True)
class Agreement:
    """How far two runs of one model are apart.

    Attributes:
        error: the largest difference of two numbers, in the units of the outputs.
        steps: the same in quantization steps, the worst over the outputs. The step of an output that is quantized is
            its own. For another one it is what its range in the reference run would be cut into by the graph's
            coarsest activation quantizer; in a graph without these it is the rounding error that
            `graphcomp.numerics.compare.TOLERANCE` grants.
    """

    error: float
    steps: float

    @property
    def within_a_step(self) -> bool:
        """Whether no number is more than one step off; a whisker is granted for the last bit of a float."""
        return self.steps <= 1 + 1e-3

    def to_dict(self) -> dict[str, float]:
        """JSON-able."""
        return asdict(self)


# ------------------------------------------------------------------------------------------------ onnxruntime
def open_session(
    path: str | Path, *, threads: int = 1, exact: bool = False, optimized: Path | None = None
) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU.

    Args:
        threads: of one operator; operators run one after the other.
        exact: integer sums as the file says. On x86 without VNNI, onnxruntime multiplies uint8 activations with int8
            weights by an instruction that adds pairs of products in 16 bits and saturates them: large weights meeting
            large activations come out wrong, by far more than one step. The option "session.x64quantprecision" widens
            weights to uint8, whose kernels do not saturate, at some cost in speed. It is for comparing; what users run
            by default is timed. MatMulNBits reads its activations as floats, not rounded to int8, here.
        optimized: write the optimized graph there.

    Raises:
        ExportError: the `onnx` extra is not installed; onnxruntime cannot load the file.
    """
    need("running ONNX", ("onnxruntime",))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if optimized is not None:
        options.optimized_model_filepath = os.fspath(optimized)
    disabled: list[str] = []
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        # it makes weights share zero points, and widening a shared one fails (onnxruntime 1.32)
        disabled = ["ConstantSharing"]
    try:
        return _session(path, options, disabled)
    except ExportError:
        if not exact:
            raise
    # widening also fails where two layers share a weight: then without any integer kernel
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _session(path, options, disabled)


def _session(path: str | Path, options: Any, disabled: list[str]) -> onnxruntime.InferenceSession:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except Exception as error:  # onnxruntime's exceptions have no public base class
        raise ExportError(
            f"onnxruntime cannot load {path}", why=f"{type(error).__name__}: {first_line(error)}"
        ) from error


def feeds_of(session: onnxruntime.InferenceSession, args: Args, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The tensors among the arguments by the names of the file's inputs, in order, as numpy arrays."""
    tensors = tensor_leaves((args, dict(kwargs or {})))
    names = [given.name for given in session.get_inputs()]
    if len(names) != len(tensors):
        raise ExportError(
            f"the file has {len(names)} inputs, the example inputs hold {len(tensors)} tensors", at=", ".join(names)
        )
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}


def run(path: str | Path, args: Args, kwargs: Mapping[str, Any] | None = None, *, exact: bool = True) -> list[Tensor]:
    """The outputs of an ONNX file in onnxruntime, flat.

    Args:
        args, kwargs: as the module's; nested tensors are fed in order.
        exact: see `open_session`.

    Raises:
        ExportError: onnxruntime is not installed, cannot load the file, or fails to run it on these inputs.
    """
    session = open_session(path, exact=exact)
    try:
        return [torch.from_numpy(array) for array in session.run(None, feeds_of(session, args, kwargs))]
    except ExportError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no public base class
        raise ExportError(
            f"onnxruntime cannot run {path}", why=f"{type(error).__name__}: {first_line(error)}"
        ) from error


def latency(
    path: str | Path,
    feeds: Mapping[str, Any],
    *,
    threads: int = 1,
    warmup: int = 5,
    repeats: int = 50,
    exact: bool = False,
) -> Latency:
    """Time an ONNX file in onnxruntime on the CPU.

    Args:
        feeds: tensors or arrays by input name (see `feeds_of`).
        threads: of one operator.
        warmup, repeats: runs that are not counted, and that are.
        exact: see `open_session`; False is what users get by default.

    Raises:
        ExportError: see `run`; `repeats` is below 1.
    """
    session = open_session(path, threads=threads, exact=exact)
    arrays = {name: v.detach().cpu().numpy() if isinstance(v, Tensor) else v for name, v in feeds.items()}
    return timed(lambda: session.run(None, arrays), warmup, repeats)


def timed(call: Callable[[], object], warmup: int, repeats: int) -> Latency:
    """Milliseconds of `call`, over `repeats` calls after `warmup` that are not counted.

    Raises:
        ExportError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ExportError(f"latency over {repeats} runs", fix="repeats=50")
    times = []
    for count in range(warmup + repeats):
        start = time.perf_counter()
        call()
        if count >= warmup:
            times.append(1e3 * (time.perf_counter() - start))
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return Latency(statistics.median(times), tenths[0], tenths[-1], len(times))


# ------------------------------------------------------------------------------------------------ comparing
def compare(
    path: str | Path,
    module: nn.Module,
    args: Args,
    kwargs: Mapping[str, Any] | None = None,
    *,
    exact: bool = True,
    resized: bool = False,
) -> Agreement:
    """Run an ONNX file in onnxruntime and `module` in torch on the same inputs.

    Args:
        resized: the inputs have other lengths than the example inputs, which a graph need not warn of.

    Raises:
        ExportError: see `run`; the outputs differ in number or shape.
    """
    return agreement(module, run(path, args, kwargs, exact=exact), args, kwargs, resized=resized)


def agreement(
    module: nn.Module,
    actual: list[Tensor],
    args: Args,
    kwargs: Mapping[str, Any] | None = None,
    *,
    resized: bool = False,
) -> Agreement:
    """What `module` in eval mode computes from `args` and `kwargs`, against flat outputs of another runtime.

    Raises:
        ExportError: the outputs differ in number or shape.
    """
    expected = outputs(in_eval_mode(module), args, kwargs or {}, resized=resized)
    shapes = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in actual]
    if shapes[0] != shapes[1]:
        raise ExportError(
            "the exported file gives other outputs than the module", why=f"shapes {shapes[1]} instead of {shapes[0]}"
        )
    steps = output_steps(module, expected)
    worst = [largest_distance(a, b) for a, b in zip(expected, actual, strict=True)]
    in_steps = [error / step if error else 0.0 for error, step in zip(worst, steps, strict=True)]
    return Agreement(max(worst, default=0.0), max(in_steps, default=0.0))


def largest_distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two numbers; equal infinities and two NaN are none, one NaN is infinite."""
    if a.numel() == 0:
        return 0.0
    a, b = a.detach().cpu().double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, torch.zeros_like(a), (a - b).abs())
    return math.inf if bool(error.isnan().any()) else float(error.max())


def output_steps(module: nn.Module, computed: list[Tensor]) -> list[float]:
    """The quantization step of each output, in its units (see Agreement)."""
    if not isinstance(module, fx.GraphModule):
        return [_rounding(output) for output in computed]
    codes = [_levels(node) for node in module.graph.find_nodes(op="call_function", target=quantize_per_tensor)]
    codes += [HIGHEST for _ in module.graph.find_nodes(op="call_function", target=quantize_dynamic)]
    results = [r for r in pytree.tree_leaves(module.graph.output_node().args[0]) if _is_tensor(r)]
    found = []
    for k, output in enumerate(computed):
        result = results[k] if len(results) == len(computed) else None
        if result is not None and result.target is dequantize_per_tensor:
            found.append(_scale(result))
        elif codes and output.is_floating_point() and output.numel():
            spread = float(output.max()) - min(0.0, float(output.min()))
            found.append(max(spread / min(codes), _rounding(output)))
        else:
            found.append(_rounding(output))
    return found


def _levels(node: fx.Node) -> int:
    """Steps between the lowest and the highest code of a quantize node."""
    low, high = node.args[3], node.args[4]
    assert isinstance(low, int) and isinstance(high, int)
    return high - low


def _scale(node: fx.Node) -> float:
    scale = node.args[1]
    assert isinstance(scale, float)
    return scale


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and (
        isinstance(value.meta.get("val"), Tensor) or value.target is dequantize_per_tensor
    )


def _rounding(output: Tensor) -> float:
    """What rounding may do to an output of floats; whole numbers must be equal."""
    largest = max((float(t.abs().max()) for t in floating_tensors([output]) if t.numel()), default=0.0)
    return max(tolerance_of([output]) * largest, 1e-30)
