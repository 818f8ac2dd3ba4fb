"""What each verb of the command line does, as functions from plain data to plain data."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.api import analyze, compress, load
from graphcomp.capture.capture import example_arguments
from graphcomp.cli.inputs import calibration_of, described
from graphcomp.cli.output import MODEL, PAGE, PLAN, REPORT, Output, fresh_output, versions, write_inputs
from graphcomp.cli.plan import Plan, groups_of
from graphcomp.cli.sources import Source, find_beside, is_factory, open_source
from graphcomp.cost.latency import latency
from graphcomp.errors import CheckpointError, ExportError, GraphcompError, VerificationError
from graphcomp.ir.json_values import finite
from graphcomp.ir.module import tensor_leaves
from graphcomp.numerics.compare import relative_error, tolerance_of
from graphcomp.report.report import Report
from graphcomp.result import CompressedModel

log = logging.getLogger("graphcomp.cli")

SEEDS = (1, 2, 3)
"""Of the random inputs that `verify` tries beside the example inputs."""

LARGEST = 64 * 2**20
"""Bytes of example inputs up to which a larger batch is tried, too."""


# ------------------------------------------------------------------------------------------------ inspect
def inspect(plan: Plan) -> dict[str, Any]:
    """Return the groups, what is frozen and why, and unknown ops; "text" holds them for readers."""
    source = open_source(plan.model, pretrained=plan.pretrained)
    found = analyze(source.model, plan.example(source))
    return {
        "model": type(source.model).__name__,
        "groups": [
            {"name": g.name, "role": g.role, "units": g.size, "members": [f"{m.name}[{m.dim}]" for m in g.members]}
            for g in found.groups
        ],
        "frozen": [
            {"name": axis.name, "dim": axis.dim, "reason": str(axis.reason), "source": axis.reason.source}
            for axis in found.frozen
        ],
        "unknown_ops": [str(op) for op in found.unknown_ops],
        "prunable_share": found.prunable_share,
        "text": found.report(),
    }


# ------------------------------------------------------------------------------------------------ compress
def planned(plan: Plan) -> tuple[Plan, Report]:
    """Return the plan with the groups that its options choose, and the report of what would be done.

    The model is compressed without laws checked, and nothing is written.
    """
    source = open_source(plan.model, pretrained=plan.pretrained)
    small, _ = _compressed(source, replace(plan, options={**plan.options, "verify": False}))
    assert isinstance(small.report, Report)
    edited = {group["name"]: group["keep"] for group in plan.edited}
    groups = [{**g, "keep": edited.get(g["name"], g["keep"])} for g in groups_of(small.report)]
    if edited:  # what the options alone chose stands in the plan that was given
        chosen = {group["name"]: group["chosen"] for group in plan.groups}
        groups = [{**g, "chosen": chosen.get(g["name"], g["chosen"])} for g in groups]
    return replace(plan, groups=tuple(groups)), small.report


def compressed(plan: Plan, folder: Path, *, replaces: bool = False) -> dict[str, Any]:
    """Carry a plan out and write the output folder; return the manifest with the report.

    Raises:
        GraphcompError: see `compress` and `CompressedModel.export`; the folder is as before then.
    """
    begin = time.monotonic()
    source = open_source(plan.model, pretrained=plan.pretrained)
    with fresh_output(folder, replace=replaces) as fresh:
        small, example = _compressed(source, plan)
        seconds = {"compress": round(time.monotonic() - begin, 3)}
        args, kwargs = example_arguments(*((), example) if isinstance(example, Mapping) else (example, None))
        kind = _write_model(small, source, fresh / MODEL)
        notes = _unmet(plan, small)
        left = write_inputs(fresh, args, kwargs)
        notes += [f"the example inputs {left} are no tensors and are not stored"] if left else []
        checks = {"reloaded == result": _reloaded(fresh / MODEL, small, args, kwargs)}
        for suffix in plan.export:
            start = time.monotonic()
            small.export(fresh / f"model.{suffix}", guard=plan.guard and suffix == "onnx")
            seconds[f"export {suffix}"] = round(time.monotonic() - start, 3)
        report = small.report
        assert isinstance(report, Report)
        report = small.report = replace(report, notes=(*report.notes, *notes))
        replace(plan, groups=_kept_groups(plan, report)).write(fresh / PLAN)
        write_report(fresh, report)
        about = {
            "model": plan.model, "class": report.model, "form": small.form, "folder of": kind, "versions": versions(),
            "inputs": described(example), "seconds": seconds, "checks": checks,
        }  # fmt: skip
        Output(fresh).sign(about)
    return {"out": str(folder), **about, "report": report.to_dict(), "text": str(report)}


def _compressed(source: Source, plan: Plan) -> tuple[CompressedModel, Any]:
    example = plan.example(source)
    keywords = plan.keywords()
    if plan.calibration:
        path, samples = Path(plan.calibration["path"]), int(plan.calibration.get("samples", 256))
        keywords["calibration"] = calibration_of(path, source, example, samples=samples)
    return compress(source.model, example, **keywords), example


def _kept_groups(plan: Plan, report: Report) -> tuple[dict[str, Any], ...]:
    chosen = {group["name"]: group["chosen"] for group in plan.groups}
    return tuple({**g, "chosen": chosen.get(g["name"], g["chosen"])} for g in groups_of(report))


def _unmet(plan: Plan, small: CompressedModel) -> list[str]:
    """Say which edited groups keep another number of units than the plan says."""
    assert isinstance(small.report, Report)
    there = {group["name"]: group["units"]["kept"] for group in small.report.groups}
    found = []
    for group in plan.edited:
        kept = there.get(group["name"])
        if kept is None:
            found.append(f"the plan has a group {group['name']!r}, which the model lacks")
        elif kept != group["keep"]:
            found.append(f"the plan keeps {group['keep']} units of {group['name']!r}, and {kept} stay")
    return found


def _write_model(small: CompressedModel, source: Source, folder: Path) -> str:
    """Write the checkpoint; return whose form the folder has."""
    save: Any = getattr(small.module, "save_pretrained", None)
    if small.form == "native" and source.tokenizer is not None and save is not None:
        save(folder)
        try:
            source.tokenizer().save_pretrained(folder)
        except (OSError, ValueError) as error:  # a model without a tokenizer
            log.info("no tokenizer is kept: %s", error)
        return "transformers"
    small.save(folder)
    return "graphcomp"


def open_result(folder: Path, trust: Sequence[str] = ()) -> CompressedModel | nn.Module:
    """Return the model of an output folder.

    Args:
        trust: packages whose classes the folder may name; those in the working folder count.

    Raises:
        CheckpointError: the folder is damaged, or names a class of a package that is not trusted.
    """
    if not (folder / "graphcomp.json").exists():
        return open_source(str(folder)).model
    find_beside()
    try:
        return load(folder, trust=trust)
    except CheckpointError as error:
        if "trust=[" not in error.fix:
            raise
        fix = "--trust PACKAGE, where you trust both the folder and the package"
        raise CheckpointError(error.what, at=str(folder), why=error.why, fix=fix) from error


def _reloaded(folder: Path, small: CompressedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Return how far the reloaded model is off the result, relative.

    Raises:
        VerificationError: further than rounding may move it.
    """
    again = open_result(folder)
    expected, found = (_outputs(module, args, kwargs) for module in (small, again))
    error = relative_error(expected, found)
    if not error <= tolerance_of(expected):
        raise VerificationError(f"the reloaded model is off by {error:.1e} (relative)", at=str(folder))
    return error


def write_report(
    folder: Path, report: Report, metrics: Mapping[str, tuple[float, float]] | None = None, run: Path | None = None
) -> None:
    """Write report.json and report.html."""
    import json

    data = finite(report.to_dict())
    (folder / REPORT).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    report.to_html(folder / PAGE, metrics=metrics, run=run)


# ------------------------------------------------------------------------------------------------ verify
def verified(folder: Path, trust: Sequence[str] = ()) -> dict[str, Any]:
    """Check an output folder: files against the manifest, the model on several inputs, exported files beside the model.

    Returns:
        "held": what holds; "failed": what does not; "unchecked": what could not be checked, and why.

    Raises:
        CheckpointError: the files are whole, and the model cannot be opened: see `open_result`.
    """
    output = Output.open(folder)
    held, failed, unchecked = list[str](), [f"files: {what}" for what in output.damaged()], dict[str, str]()
    if not failed:
        held.append(f"files: {len(output.manifest['files'])} as in the manifest")
    try:
        report = output.report
        held += [f"when it was made: {law} ({error:.1e})" for law, error in report.verified.items()]
        unchecked |= report.unchecked
        module = open_result(folder / MODEL, trust)
        example = output.inputs()
    except GraphcompError as error:  # a damaged file is what this verb looks for
        if not failed:
            raise
        return {"held": held, "failed": [*failed, f"{error.what}: {error.why}"], "unchecked": unchecked}
    if isinstance(module, CompressedModel):
        module = module.module
    for name, (args, kwargs) in _trials(*example).items():
        try:
            outputs = _outputs(module, args, kwargs)
        except Exception as error:  # whatever a model raises on another batch
            if name == "the example inputs":
                failed.append(f"model: raises on {name}: {type(error).__name__}: {error}")
            else:
                unchecked[f"model on {name}"] = f"{type(error).__name__}: {error}"
            continue
        sound = all(bool(t.isfinite().all()) for t in tensor_leaves(outputs) if t.is_floating_point())
        (held if sound else failed).append(f"model: outputs on {name} are {'' if sound else 'not '}finite")
        for path in output.exported():
            _compare_file(path, module, name, args, kwargs, held, failed, unchecked)
    return {"held": held, "failed": failed, "unchecked": unchecked}


def _compare_file(
    path: Path, module: nn.Module, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any],
    held: list[str], failed: list[str], unchecked: dict[str, str],
) -> None:  # fmt: skip
    """Run an exported file beside the model on one set of inputs."""
    from graphcomp.targets.runtime import agreement, compare

    what = f"{path.name} on {name}"
    try:
        if path.suffix == ".onnx":
            found = compare(path, module, args, kwargs, resized=True)
        else:
            exported = open_source(str(path)).model
            actual = tensor_leaves(_outputs(exported, args, kwargs))
            found = agreement(module, actual, args, kwargs, resized=True)
    except Exception as error:  # a file of fixed lengths refuses others, in words of its runtime
        if name.startswith("a batch"):
            unchecked[what] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            failed.append(f"{what}: {type(error).__name__}: {error}")
        return
    text = f"{what}: largest difference {found.error:.1e}, {found.steps:.2f} steps"
    (held if found.within_a_step else failed).append(text)


def _trials(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the inputs to check on: the example inputs, others of the same lengths, and a batch twice as long."""
    found = {"the example inputs": (args, dict(kwargs))}
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        drawn = tuple(_drawn(t, generator) for t in args), {name: _drawn(t, generator) for name, t in kwargs.items()}
        found[f"random inputs {seed}"] = drawn
    tensors = tensor_leaves((args, dict(kwargs)))
    size = sum(t.numel() * t.element_size() for t in tensors)
    if tensors and all(t.dim() for t in tensors) and len({len(t) for t in tensors}) == 1 and size <= LARGEST:
        doubled = tuple(torch.cat([t, t]) for t in args), {name: torch.cat([t, t]) for name, t in kwargs.items()}
        found[f"a batch of {2 * len(tensors[0])}"] = doubled
    return found


def _drawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return other values of the same kind: floats of the same spread, or the same whole numbers in another order."""
    if tensor.is_floating_point():
        spread, mean = (tensor.std() if tensor.numel() > 1 else torch.ones(())), tensor.mean()
        return (torch.randn(tensor.shape, generator=generator) * spread + mean).to(tensor.dtype)
    order = torch.randperm(tensor.numel(), generator=generator)
    return tensor.flatten()[order].reshape(tensor.shape)


def _outputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    with torch.no_grad():
        return module(*args, **kwargs)


# ------------------------------------------------------------------------------------------------ export, bench, report
def exported(folder: Path, path: Path, *, guard: bool = False, trust: Sequence[str] = ()) -> dict[str, Any]:
    """Write the model of an output folder, or of a checkpoint folder, for another runtime."""
    output = Output.open(folder)
    small = open_result(folder / MODEL, trust)
    if not isinstance(small, CompressedModel):
        raise ExportError(
            f"{folder / MODEL} is a folder of transformers, whose exported form is made with the result",
            fix="graphcomp compress … --export onnx",
        )
    args, kwargs = output.inputs()
    small.export(path, args, kwargs, guard=guard)
    found = small.export_report
    if found is None:  # a folder
        return {"path": str(path), "text": f"written to {path}", "report": None}
    speed = "" if found.speed is None else f"; {found.speed}"
    text = f"{path}: {found.bytes:,} bytes; largest difference {found.agreement.error:.1e} on the example inputs{speed}"
    return {"path": str(path), "text": "\n".join([text, *found.notes]), "report": found.to_dict()}


def benched(folder: Path, *, original: bool = True, repeats: int = 20, trust: Sequence[str] = ()) -> dict[str, Any]:
    """Time the model of an output folder, its exported files and the original on the example inputs: one thread.

    Returns:
        "rows": name -> median, 10th and 90th percentile in milliseconds, and bytes of the file or of the weights.
    """
    from graphcomp.targets.runtime import feeds_of, open_session
    from graphcomp.targets.runtime import latency as onnx_latency

    output = Output.open(folder)
    args, kwargs = output.inputs()
    rows: dict[str, dict[str, float]] = {}
    notes = []
    plan = Plan.read(folder / PLAN)
    if original and is_factory(plan.model) and plan.model.partition(".")[0].partition(":")[0] not in trust:
        original = False
        notes.append(f"the original is not timed: {plan.model} is of no package that --trust names")
    if original:
        try:
            source = open_source(plan.model, pretrained=plan.pretrained)
        except GraphcompError as error:
            notes.append(f"the original is not timed: {error.what}")
        else:
            rows["original, PyTorch"] = _timed_row(source.model, args, kwargs, repeats)
    small = open_result(folder / MODEL, trust)
    module = small.module if isinstance(small, CompressedModel) else small
    rows["compressed, PyTorch"] = _timed_row(module, args, kwargs, repeats)
    for path in output.exported():
        if path.suffix == ".onnx":
            feeds = feeds_of(open_session(path), args, kwargs)
            found = onnx_latency(path, feeds, repeats=repeats)
            rows[f"{path.name}, onnxruntime"] = _row(found, path.stat().st_size)
    return {"rows": rows, "notes": notes, "threads": 1}


def _timed_row(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], repeats: int) -> dict[str, float]:
    held = {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
    return _row(latency(module, args, kwargs, repeats=repeats), sum(t.numel() * t.element_size() for t in held))


def _row(found: Any, size: int) -> dict[str, float]:
    return {"median_ms": found.median_ms, "p10_ms": found.p10_ms, "p90_ms": found.p90_ms, "bytes": size}


def reported(
    folder: Path, metrics: Mapping[str, tuple[float, float]] | None = None, run: Path | None = None
) -> dict[str, Any]:
    """Write the report of an output folder anew, with measures of quality and the curves of a training run."""
    output = Output.open(folder)
    report = output.report
    if metrics or run is not None:
        damaged = output.damaged()
        if damaged:
            raise CheckpointError(
                f"{folder} is not as it was made: {damaged[0]}", fix="graphcomp verify says what differs"
            )
        write_report(folder, report, metrics, run)
        output.sign({name: value for name, value in output.manifest.items() if name != "files"})
    return {"page": str(folder / PAGE), "report": report.to_dict(), "text": str(report)}
