"""The verbs as commands: options, output for readers or as JSON, exit codes."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from graphcomp.cli import verbs
from graphcomp.cli.output import MANIFEST, PLAN
from graphcomp.cli.plan import SUFFIXES, Plan, inputs_entry
from graphcomp.cli.sources import FORMS, is_factory
from graphcomp.errors import (
    CaptureError,
    CheckpointError,
    ExportError,
    GraphcompError,
    InputError,
    NothingToPrune,
    PlanError,
    VerificationError,
)
from graphcomp.ir.json_values import finite
from graphcomp.report.html import short
from graphcomp.system.version import package_version

app = typer.Typer(
    name="graphcomp", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Make a trained network physically smaller, quantize it, verify it, and write it for another runtime.",
)  # fmt: skip

CODES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], int], ...] = (
    (NothingToPrune, 3),
    ((InputError, PlanError), 2),
    (CaptureError, 3),
    (VerificationError, 4),
    ((CheckpointError, ExportError, OSError), 5),
)
"""Errors -> exit codes; the first that matches counts."""

SAMPLES = 256
"""Calibration samples, at most, where the command does not say."""

FAULT = 4
"""Exit code of `verify` where something does not hold."""

Model = Annotated[str, typer.Argument(help=f"One of: {', '.join(FORMS)}.")]
Folder = Annotated[Path, typer.Argument(help="Output folder of `graphcomp compress`.")]
Shapes = Annotated[
    list[str], typer.Option("--shape", help="Of one example input: [name=]dims[:dtype[:low..high]]; again for more.")
]
Inputs = Annotated[Path | None, typer.Option("--inputs", help="Example inputs: a .npz, .npy or .safetensors file.")]
Pretrained = Annotated[
    bool, typer.Option("--pretrained/--random", help="Weights of torchvision:, timm: and hf: names.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Trust = Annotated[list[str], typer.Option(help="Package whose classes the folder may name; again for more.")]
Guard = Annotated[bool, typer.Option("--guard", help="Leave layers of .onnx in float where that is faster.")]


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code.

    Errors go to the standard error, as one JSON object where `--json` is given.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(name)s: %(message)s")
    try:
        code = app(given, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Exit as exit_:
        return int(exit_.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
        return 130
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a wrong option or argument, in click's words
            error.show()
            return int(error.exit_code)
        return _failed(error, "--json" in given)


def _failed(error: Exception, as_json: bool) -> int:
    code = next((code for kinds, code in CODES if isinstance(error, kinds)), 1)
    if as_json:
        about = {name: getattr(error, name, "") for name in ("what", "at", "why", "fix")}
        about = {**about, "what": about["what"] or str(error), "error": type(error).__name__, "exit_code": code}
        sys.stderr.write(json.dumps(about) + "\n")
    elif code == 1 and not isinstance(error, GraphcompError):
        sys.stderr.write("".join(traceback.format_exception(error)))
    else:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    return code


def _print(found: Mapping[str, Any], as_json: bool, text: Callable[[Console], None] | None = None) -> None:
    if as_json:
        data = finite({name: value for name, value in found.items() if name != "text"})
        sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")
    elif text is not None:
        text(Console(soft_wrap=True, highlight=False))
    else:
        sys.stdout.write(f"{found['text']}\n")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        sys.stdout.write(f"graphcomp {package_version()}\n")
        raise typer.Exit


@app.command()
def inspect(
    model: Model, shape: Shapes = [], inputs: Inputs = None, pretrained: Pretrained = True, as_json: AsJson = False
) -> None:
    """Show which channels, heads and features live or die together, and what stays whole, and why."""
    _print(verbs.inspect(Plan(model, pretrained, inputs_entry(shape, inputs))), as_json)


@app.command()
def compress(
    model: Annotated[str | None, typer.Argument(help=f"One of: {', '.join(FORMS)}. Or see --plan.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder that is written.")] = Path("compressed"),
    shape: Shapes = [],
    inputs: Inputs = None,
    pretrained: Pretrained = True,
    sparsity: Annotated[float | None, typer.Option(help="Share of the units that go; 0: none. Default: 0.5.")] = None,
    budget: Annotated[
        list[str], typer.Option(help="name=limit on params, macs, bops, bytes, latency_ms or speedup; again for more.")
    ] = [],
    bits: Annotated[str | None, typer.Option(help="Of weights and activations, such as 8; or a range, 4,8.")] = None,
    activation_bits: Annotated[str | None, typer.Option(help="Where they differ from --bits; none: floats.")] = None,
    activations: Annotated[str | None, typer.Option(help="static, dynamic or dynamic_per_token.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Input indices of a weight that share a step.")] = None,
    rounding: Annotated[str | None, typer.Option(help="nearest, second_order or reconstruct.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A folder of images, a text file, or a .npz or .safetensors file of samples.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration samples, at most; default: 256.")] = None,
    saliency: Annotated[str | None, typer.Option(help="How units are ranked, such as l2.")] = None,
    ranking: Annotated[str | None, typer.Option(help="global, local or sensitivity.")] = None,
    prune: Annotated[list[str], typer.Option(help="Role to prune, such as head; again for more.")] = [],
    ignore: Annotated[
        list[str], typer.Option(help="Module that keeps its width and stays float; again for more.")
    ] = [],
    round_to: Annotated[int | None, typer.Option(help="Kept lengths are multiples of it.")] = None,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="Equal counts in alike layers; rewrites the config.")
    ] = False,
    measure_latency: Annotated[
        bool, typer.Option("--measure-latency", help="Time the model before and after.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    export: Annotated[list[str], typer.Option(help=f"Format: {' or '.join(SUFFIXES)}; again for more.")] = [],
    guard: Guard = False,
    plan: Annotated[Path | None, typer.Option(help="plan.json to carry out, perhaps edited.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write plan.json into the folder, and nothing else.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prune, quantize, verify, save and export a model."""
    options: dict[str, Any] = {
        "sparsity": sparsity, "bits": _bits("bits", bits), "activations": activations, "group_size": group_size,
        "rounding": rounding, "saliency": saliency, "ranking": ranking, "round_to": round_to,
        "budget": _limits(budget) or None, "prune": prune or None, "ignore": ignore or None, "uniform": uniform or None,
        "measure_latency": measure_latency or None, "seed": seed or None,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    if activation_bits is not None:
        options["activation_bits"] = _bits("activation_bits", activation_bits)
    asked = {
        "inputs": inputs_entry(shape, inputs), "export": tuple(export), "guard": guard,
        "calibration": {} if calibration is None else {"path": str(calibration), "samples": samples or SAMPLES},
    }  # fmt: skip
    whole = _plan(model, pretrained, plan, options, asked)
    if samples is not None and calibration is None:
        raise PlanError("--samples without --calibration", fix="--calibration images/ --samples 64")
    if whole.guard and "onnx" not in whole.export:
        raise PlanError("--guard without --export onnx", why="layers are timed in onnxruntime", fix="--export onnx")
    if dry_run:
        _dry_run(whole, out, as_json)
        return
    found = verbs.compressed(whole, out, replaces=force)
    trust = f" --trust {whole.model.partition(':')[0].partition('.')[0]}" if is_factory(whole.model) else ""
    text = f"{found['text']}\n\nwritten to {out}: report.html, model/ …; graphcomp verify {out}{trust}"
    _print({**found, "text": text}, as_json)


def _plan(
    model: str | None, pretrained: bool, path: Path | None, options: Mapping[str, Any], asked: Mapping[str, Any]
) -> Plan:
    """Return the plan: of the file where one is given, with what the command line says in place of the file's."""
    if path is None and model is None:
        raise PlanError("no model is given", fix="graphcomp compress MODEL --shape 1,3,224,224, or --plan plan.json")
    base = Plan("") if path is None else Plan.read(path)
    own = {name: value for name, value in asked.items() if value}
    whole = replace(base, **own, options={**base.options, **options})
    if model is not None:
        whole = replace(whole, model=model, pretrained=pretrained)
    elif not pretrained:
        whole = replace(whole, pretrained=False)
    if path is not None and set(options) & {"sparsity", "budget", "ranking", "saliency", "prune", "ignore"}:
        whole = replace(whole, groups=())  # chosen anew
    return Plan.checked({name: getattr(whole, name) for name in whole.__dataclass_fields__})


def _dry_run(plan: Plan, out: Path, as_json: bool) -> None:
    path = out / PLAN
    if (out / MANIFEST).exists():
        raise CheckpointError(f"{out} holds an output, whose plan would be replaced", fix="another --out")
    found, report = verbs.planned(plan)
    found.write(path)
    text = f"{_costs(report.to_dict())}\nnothing is compressed; the plan is in {path}: edit `keep`, then --plan {path}"
    _print({"plan": str(path), "report": report.to_dict(), "text": text}, as_json)


def _costs(report: Mapping[str, Any]) -> str:
    rows = [
        f"{name:<8} {short(report[name]['before']):>10} -> {short(report[name]['after']):>10}"
        for name in ("params", "macs", "bops", "bytes")
    ]
    units = report["units"]
    return "\n".join([*rows, f"{'units':<8} {units['removed']} of {units['total']} would go"])


@app.command()
def verify(folder: Folder, trust: Trust = [], as_json: AsJson = False) -> int:
    """Check an output folder: files, the model on several inputs, exported files beside the model."""
    found = verbs.verified(folder, trust)

    def show(console: Console) -> None:
        for text in found["held"]:
            console.print(f"  ok      {text}", markup=False)
        for what, why in found["unchecked"].items():
            console.print(f"  unknown {what}: {why}", markup=False)
        for text in found["failed"]:
            console.print(f"  FAILED  {text}", markup=False)

    _print(found, as_json, show)
    return FAULT if found["failed"] else 0


@app.command(name="export")
def export_(
    folder: Folder, path: Annotated[Path, typer.Argument(help="A file .onnx or .pt2.")], guard: Guard = False,
    trust: Trust = [], as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write the model of an output folder for another runtime."""
    _print(verbs.exported(folder, path, guard=guard, trust=trust), as_json)


@app.command()
def bench(
    folder: Folder,
    original: Annotated[bool, typer.Option("--original/--alone", help="Time the original beside.")] = True,
    repeats: Annotated[int, typer.Option(help="Runs that are counted.")] = 20,
    trust: Trust = [],
    as_json: AsJson = False,
) -> None:
    """Time the model, the exported files and the original: one thread, median of several runs."""
    found = verbs.benched(folder, original=original, repeats=repeats, trust=trust)

    def show(console: Console) -> None:
        table = Table("", "ms", "10 % … 90 %", "bytes")
        for name, row in found["rows"].items():
            spread = f"{row['p10_ms']:.3g} … {row['p90_ms']:.3g}"
            table.add_row(name, f"{row['median_ms']:.3g}", spread, f"{short(row['bytes'], 'B')}")
        console.print(table)
        for note in found["notes"]:
            console.print(note, markup=False)

    _print(found, as_json, show)


@app.command()
def report(
    folder: Folder,
    metric: Annotated[list[str], typer.Option(help="name=before,after: a measure of quality; again for more.")] = [],
    run: Annotated[Path | None, typer.Option(help="Folder of a training run, whose curves are drawn.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the report; with measures of quality or a training run, write report.html anew."""
    _print(verbs.reported(folder, _metrics(metric), run), as_json)


@app.command()
def init() -> None:
    """Ask what is wanted, and print the command."""
    model = typer.prompt(f"Model ({', '.join(FORMS)})")
    words = ["graphcomp", "compress", model]
    shape = typer.prompt("Shape of the example input, such as 1,3,224,224 (empty: the model's own)", default="")
    words += ["--shape", shape] if shape else []
    share = typer.prompt("Share of the channels that go, 0 to 0.9", default=0.5, type=float)
    words += ["--sparsity", f"{share:g}"]
    if typer.confirm("8-bit integers?", default=True):
        words += ["--bits", "8"]
        data = typer.prompt("Calibration data: images/, text.txt, data.npz (empty: the example inputs)", default="")
        words += ["--calibration", data] if data else []
    if typer.confirm("An .onnx file?", default=True):
        words += ["--export", "onnx"]
    words += ["--out", typer.prompt("Folder", default="compressed")]
    import shlex

    sys.stdout.write(f"\n{shlex.join(words)}\n")


def _bits(name: str, text: str | None) -> Any:
    """Return bits, a pair of bounds, or None for floats."""
    if text is None or text == "none":
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise PlanError(f"--{name.replace('_', '-')} must be such as 8 or 4,8, got {text!r}") from error
    return numbers[0] if len(numbers) == 1 else numbers


def _limits(entries: Sequence[str]) -> dict[str, float | int]:
    """Return the limits of a budget."""
    found: dict[str, float | int] = {}
    for entry in entries:
        name, _, number = entry.partition("=")
        try:
            value = float(number)
        except ValueError as error:
            raise PlanError(f"--budget must be name=limit, got {entry!r}", fix="--budget macs=0.5") from error
        found[name] = int(value) if value.is_integer() and "." not in number else value
    return found


def _metrics(entries: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return measures of quality."""
    found = {}
    for entry in entries:
        name, _, pair = entry.partition("=")
        try:
            before, after = (float(number) for number in pair.split(","))
        except ValueError as error:
            raise PlanError(
                f"--metric must be name=before,after, got {entry!r}", fix="--metric accuracy=92.6,92.2"
            ) from error
        found[name] = (before, after)
    return found
