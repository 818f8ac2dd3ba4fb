"""Integer ONNX files: size, speed, kernels and quality, beside onnxruntime's own quantization and torch's PT2E.

    python -m benchmarks.quantized                              # all models: about half an hour on two quiet cores
    python -m benchmarks.quantized --models resnet50,minilm
    python -m benchmarks.quantized --no-latency                 # quality and kernels alone

All files of a model are timed in one run, taking turns, so that ratios hold whatever else the machine does; they run
in onnxruntime as users run it by default. Quality is that of a session with exact integer sums: the default kernels
saturate on x86 without VNNI (`graphcomp.targets.runtime.open_session`), but for weights of reduced range (7 bits).

Data and weights come from the shared folder beside the checkout. Calibration data are never test data.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import common, demo, digits, oneshot
from benchmarks.common import append_json, section, table
from graphcomp.cost import file_bytes
from graphcomp.targets.onnxruntime.export import export_onnx
from graphcomp.targets.onnxruntime.kernels import INTEGER_LAYERS, KernelProof, prove
from graphcomp.targets.runtime import feeds_of, open_session

ROUNDS = 40
CALIBRATION_BATCHES = 2  # of 50 images, or 32 sentences

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A model to quantize.

    Attributes:
        example: inputs of the size that is timed (batch 1).
        calibration: batches of inputs.
        test: one batch of inputs that outputs are compared on.
        evaluate: qualities of a module that is called like the model; None where there are no trained weights.
        attention: whether there is attention in one op, which may be written out and quantized.
    """

    name: str
    model: nn.Module
    example: Inputs
    calibration: Sequence[Inputs]
    test: Inputs
    evaluate: Callable[[nn.Module], list[oneshot.Score]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    attention: bool = False


@dataclass
class File:
    """One exported model."""

    label: str
    path: Path
    failure: str = ""
    proof: KernelProof | None = None


def main() -> None:
    options = _options()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    for name in options.models.split(","):
        case = CASES[name]()
        with tempfile.TemporaryDirectory() as folder:
            report(case, list(files(case, Path(folder), options)), options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CASES), metavar="A,B", help="default: %(default)s")
    parser.add_argument(
        "--macs", type=float, metavar="F", help="one more file, with so much of the multiply-accumulates"
    )
    parser.add_argument(
        "--only", metavar="A;B", help="those files and the float one, such as 'ours int8;ours half, int8'"
    )
    parser.add_argument("--no-latency", action="store_true", help="do not time")
    parser.add_argument("--no-quality", action="store_true", help="do not evaluate on data")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one line of JSON per file")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------ files
def files(case: Case, folder: Path, options: argparse.Namespace) -> Iterator[File]:
    """Each way to a file, the float original first."""
    ways: dict[str, Callable[[Path], None]] = {
        "float": lambda path: export_onnx(case.model, case.example, {}, path),
        "float, torch.onnx.export": lambda path: plain(case, path),
        "PT2E, exported": lambda path: pt2e(case, path),
        "onnxruntime static": lambda path: static(case, folder / "0.onnx", path),
        "ours int8": lambda path: ours(case, path, sparsity=0.0, bits=8),
        "ours int8, reduced range": lambda path: ours(case, path, sparsity=0.0, bits=8, reduce_range=True),
        "onnxruntime dynamic": lambda path: dynamic(folder / "0.onnx", path),
        "ours int8, dynamic": lambda path: ours(case, path, sparsity=0.0, bits=8, activations="dynamic"),
        "ours int8, dynamic per token": lambda path: ours(
            case, path, sparsity=0.0, bits=8, activations="dynamic_per_token"
        ),
        "ours half the units": lambda path: ours(case, path, sparsity=0.5),
        "ours half, int8": lambda path: ours(case, path, sparsity=0.5, bits=8),
        "ours half, int8, reduced range": lambda path: ours(case, path, sparsity=0.5, bits=8, reduce_range=True),
    }
    if case.attention:
        written_out = gc.PostTraining(gc.QuantConfig(attention=True))
        ways["ours int8, attention too"] = lambda path: ours(case, path, sparsity=0.0, quantization=written_out)
    if options.macs is not None:
        budget = gc.Budget(macs=options.macs)
        ways[f"ours {options.macs:.0%} of the MACs, int8"] = lambda path: ours(
            case, path, budget=budget, bits=8, ranking="global", round_to=8
        )
    only = [] if options.only is None else [label.strip() for label in options.only.split(";")]
    for k, (label, way) in enumerate(ways.items()):
        if only and label not in ("float", *only):
            continue
        path = folder / f"{k}.onnx"
        start = time.process_time()
        try:
            way(path)
            proof = prove(path)
            yield File(label, path, "", proof)
        except Exception as error:
            if label.startswith("ours") or label == "float":
                raise
            yield File(label, path, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")
        print(f"{case.name}: {label} in {time.process_time() - start:.0f} s", flush=True)


def ours(case: Case, path: Path, **options: Any) -> None:
    calibration = case.calibration if len(options) > 1 and "activations" not in options else None
    options = {"ranking": "local", **case.options, **options}
    small = gc.compress(case.model, case.example, calibration=calibration, progress=False, **options)
    small.export(path)


def plain(case: Case, path: Path) -> None:
    """What users have without graphcomp; batch and sequence are dynamic, as in the other files."""
    shapes = tuple(dict.fromkeys(range(1 if t.dim() == 4 else t.dim()), torch.export.Dim.AUTO) for t in case.example)
    inputs = tuple(torch.cat([t, t]) for t in case.example)  # export takes a length of 1 for a constant
    written = torch.onnx.export(case.model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert written is not None
    written.save(str(path))


def static(case: Case, source: Path, path: Path) -> None:
    """onnxruntime's static quantization with its own preparation: QDQ, per channel, uint8 activations."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    session = open_session(source)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter([feeds_of(session, batch, {}) for batch in case.calibration])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    quantize_static(
        str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def dynamic(source: Path, path: Path) -> None:
    """onnxruntime's dynamic quantization with its own preparation: weights int8 per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_dynamic(str(prepared), str(path), per_channel=True, weight_type=QuantType.QInt8)


def pt2e(case: Case, path: Path) -> None:
    """torch's own route: torchao's quantizer for x86, its passes, and the exporter as they are."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    program = torch.export.export(case.model, case.example)
    prepared = prepare_pt2e(program.module(), quantizer)
    for batch in case.calibration:
        for parts in zip(*(t.split(1) for t in batch), strict=True):
            if all(a.shape == b.shape for a, b in zip(parts, case.example, strict=True)):
                prepared(*parts)
    converted = convert_pt2e(prepared)
    torch.onnx.export(torch.export.export(converted, case.example), (), dynamo=True, verbose=False).save(str(path))


# ------------------------------------------------------------------------------------------------ measuring
class Runtime(nn.Module):
    """An ONNX file, called like the model it came from."""

    def __init__(self, path: Path, exact: bool) -> None:
        super().__init__()
        self.session = open_session(path, exact=exact, threads=2)

    def forward(self, *inputs: Tensor) -> Tensor:
        # a route that knows no dynamic batch gets one sample at a time
        fixed = self.session.get_inputs()[0].shape[0] == 1
        parts = zip(*(t.split(1) for t in inputs), strict=True) if fixed else [inputs]
        return torch.cat(
            [torch.from_numpy(self.session.run(None, feeds_of(self.session, part, {}))[0]) for part in parts]
        )


def report(case: Case, found: Sequence[File], options: argparse.Namespace) -> None:
    """Print the table of one model."""
    ready = [f for f in found if not f.failure]
    times = {n: {} if options.no_latency else latencies(case, ready, n) for n in (1, 2)}
    wanted = Runtime(found[0].path, exact=True)(*case.test).double()
    rows, size = [], file_bytes(found[0].path)
    for file in found:
        if file.failure:
            rows.append([file.label, file.failure, *["–"] * 6])
            continue
        exact, default = (distance(wanted, Runtime(file.path, mode)(*case.test)) for mode in (True, False))
        scores = [] if case.evaluate is None or options.no_quality else case.evaluate(Runtime(file.path, exact=True))
        row = {
            "model": case.name, "file": file.label, "bytes": file_bytes(file.path),
            "kernels": file.proof and file.proof.to_dict(),
            "error": exact, "default": default, "scores": [f"{s.metric} {s}" for s in scores],
            "ms": {n: found_times.get(file.label) for n, found_times in times.items()},
        }  # fmt: skip
        append_json(options.json, row)
        rows.append([
            file.label,
            f"{row['bytes'] / 2**20:.2f} MiB",
            f"{size / row['bytes']:.1f}×",
            *(_speed(times[n], file.label) for n in (1, 2)),
            _kernels(file),
            f"{exact:.1e}" + (f" ({default:.1e})" if default > 1.5 * exact + 1e-6 else ""),
            ", ".join(f"{s}" for s in scores) or "–",
        ])  # fmt: skip
    quality = ", ".join(s.metric for s in (case.evaluate(case.model) if case.evaluate else [])) or "quality"
    columns = [
        "file",
        "bytes",
        "smaller",
        "1 thread",
        "2 threads",
        "integer kernels",
        "error (default kernels)",
        quality,
    ]
    section(f"{case.name}, in onnxruntime", table(columns, rows))
    for file in ready:
        if file.label.startswith("ours") and file.proof is not None:
            for name, why in file.proof.stayed_float:
                print(f"{file.label}: {name} stayed float: {why}")


def latencies(case: Case, found: Sequence[File], threads: int) -> dict[str, float]:
    """Median milliseconds of each file; the files take turns."""
    sessions = {f.label: open_session(f.path, threads=threads) for f in found}
    feeds = {label: feeds_of(session, case.example, {}) for label, session in sessions.items()}
    times: dict[str, list[float]] = {label: [] for label in sessions}
    for k in range(ROUNDS + 5):
        for label, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feeds[label])
            if k >= 5:
                times[label].append(1e3 * (time.perf_counter() - start))
    return {label: statistics.median(values) for label, values in times.items()}


def _speed(times: Mapping[str, float], label: str) -> str:
    return f"{times[label]:.1f} ms, {times['float'] / times[label]:.2f}×" if label in times else "–"


def _kernels(file: File) -> str:
    """Of the quantized layers, how many run in integers; what else multiplies runs in floats."""
    proof = file.proof
    integer = sum(n for name, n in proof.integer.items() if name in INTEGER_LAYERS) if proof else 0
    if proof is None or not integer:
        return "–"
    stayed, floats = len(proof.stayed_float), sum(proof.float_.values())
    others = f" (and {floats - stayed} float products)" if floats > stayed else ""
    return f"{integer} of {integer + stayed}{others}"


def distance(wanted: Tensor, given: Tensor) -> float:
    """||a - b|| / ||a||."""
    return float((wanted - given.double()).norm() / wanted.norm())


# ------------------------------------------------------------------------------------------------ cases
def vision(task: oneshot.Task) -> Case:
    images = [batch[:1] for batch in task.calibration[:CALIBRATION_BATCHES]]
    return Case(task.name, task.model, (task.example[0][:1],), images, (task.calibration[-1][0][:8],), task.evaluate)


def _torchvision(name: str) -> Case:
    """Seeded random weights: sizes and speed, and how far outputs are off, but no accuracy."""
    common.import_torchvision()
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    # random images are further from one another than real ones; batch norms see them first, as in training
    batches = [(torch.randn(8, 3, 224, 224),) for _ in range(2)]
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the mean over the batches
                module.reset_running_stats()
        for (batch,) in batches:
            model(batch)
    return Case(name, model.eval(), (torch.randn(1, 3, 224, 224),), batches, (torch.randn(8, 3, 224, 224),))


def minilm() -> Case:
    """All sentences padded to 128 tokens for the time; embeddings compared by their mean cosine."""
    task = oneshot.minilm()
    ids, mask = task.calibration[0]
    example = tuple(nn.functional.pad(t[:1], (0, 128 - t.shape[1])) for t in (ids, mask))
    example = (example[0], torch.ones(1, 128))
    test = task.calibration[-1]
    wanted = task.model(*test).detach()

    def evaluate(model: nn.Module) -> list[oneshot.Score]:
        with torch.no_grad():
            cosine = nn.functional.cosine_similarity(wanted, model(*test)).mean()
        return [oneshot.Score("100 - 100 x cosine", 100 - 100 * float(cosine), 0.0, len(wanted)), *task.evaluate(model)]

    calibration = task.calibration[:CALIBRATION_BATCHES]
    return Case("MiniLM-L6", task.model, example, calibration, test, evaluate, attention=True)


def stories() -> Case:
    """One story of 128 tokens for the time."""
    task = oneshot.stories()
    tokens = torch.cat([batch[0] for batch in task.calibration], 1)[:, :128]
    batches = [batch[:1] for batch in task.calibration]
    return Case(task.name, task.model, (tokens,), batches[:-1], batches[-1], task.evaluate, attention=True)


def _digits(name: str, make: Callable[[], nn.Module], epochs: int, learning_rate: float) -> Case:
    """Trained here, as in the demo; calibrated on 512 of the training images."""
    torch.manual_seed(0)
    model, data = make(), digits.load()
    demo.train(model, data, epochs, learning_rate, f"{name}: training")

    @torch.no_grad()
    def evaluate(given: nn.Module) -> list[oneshot.Score]:
        hits = int((given(data.test_x).argmax(1) == data.test_y).sum())
        return [oneshot.proportion("accuracy %", hits, len(data.test_y))]

    calibration = [(images,) for images in data.train_x[: demo.CALIBRATION].split(64)]
    held_out = (data.train_x[demo.CALIBRATION :][:64],)
    attention = isinstance(model, digits.DigitTransformer)
    return Case(name, model, (data.test_x[:1],), calibration, held_out, evaluate, attention=attention)


CASES: dict[str, Callable[[], Case]] = {
    "digits-cnn": lambda: _digits("digits, residual CNN", digits.ResidualCNN, 10, 3e-3),
    "digits-transformer": lambda: _digits("digits, transformer", digits.DigitTransformer, 45, 4e-3),
    "efficientnet": lambda: vision(oneshot.TASKS["efficientnet"]()),
    "mobilenet": lambda: vision(oneshot.TASKS["mobilenet"]()),
    "minilm": minilm,
    "stories": stories,
    "resnet18": lambda: _torchvision("resnet18"),
    "resnet50": lambda: _torchvision("resnet50"),
    "resnet20": lambda: vision(oneshot.TASKS["resnet20"]()),
}

if __name__ == "__main__":
    main()
