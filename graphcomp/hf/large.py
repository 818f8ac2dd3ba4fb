"""A folder in, a smaller folder out: models that are larger than memory.

The model is one of the folder's class whose tensors are read at each use (`graphcomp.ir.streamed`): `compress` plans,
cuts and verifies this model as any model in memory, and `save_pretrained` writes shard by shard.
"""

from __future__ import annotations

import difflib
import inspect
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from graphcomp.api import Modules, compress
from graphcomp.arguments import check_path
from graphcomp.errors import CheckpointError, PlanError, first_line
from graphcomp.flows.results import Activations
from graphcomp.hf.example import example_of
from graphcomp.hf.source import open_folder
from graphcomp.ir.streamed import scratch
from graphcomp.pruning.allocation import Budget, Scope
from graphcomp.pruning.saliency import SALIENCIES, Cosine, Saliency, Taylor
from graphcomp.quantization.ptq import Rounding
from graphcomp.report.report import Report
from graphcomp.request import check_options
from graphcomp.system.files import abandoned, locked, staging, sync_folder
from graphcomp.system.progress import progress as show_progress


@dataclass(frozen=True)
class CompressedCheckpoint:
    """What `compress_checkpoint` wrote.

    Attributes:
        folder: that `from_pretrained` reads.
        files: of the folder, by name.
        report: what was cut and verified, in the numbers of the whole model.
    """

    folder: Path
    files: tuple[Path, ...]
    report: Report


def compress_checkpoint(
    source: str | Path,
    target: str | Path,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    sparsity: float | Mapping[Any, float] | None = None,
    bits: int | None = None,
    activation_bits: int | Literal["same"] | None = "same",
    activations: Activations = "static",
    group_size: int = 0,
    rounding: Rounding = "nearest",
    budget: Budget | None = None,
    calibration: Iterable[Any] | None = None,
    saliency: str | Saliency | None = None,
    ranking: Scope = "global",
    repair: Literal["least_squares"] | None = "least_squares",
    ignore: Modules = (),
    keep_inputs: Modules = (),
    prune: Sequence[str] | None = None,
    round_to: int = 1,
    uniform: bool = False,
    max_shard_size: int | str = "2GB",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    progress: bool = True,
    seed: int = 0,
    **others: Any,
) -> CompressedCheckpoint:
    """Cut the model in a folder of transformers without loading the model: the operands of one op, and one shard that
    is being written, are in memory at a time. Weights of integers, and layouts of their kernels, are in memory as well.

    The folder that is written is, file by file, the folder of `from_pretrained`, `compress` and `save_pretrained` with
    the same options, example inputs and `max_shard_size`.

    Args:
        source: folder with config.json and safetensors, in shards or not; not modified. A folder that graphcomp cut
            can be cut again.
        target: folder that is not there yet, or empty. It appears whole or not at all.
        example_inputs, example_kwargs: as for `compress`. Default: tokens, or an image, by the config.
        sparsity, budget, ranking, repair, ignore, keep_inputs, prune, round_to, uniform, verify, seed: as for
            `compress`; names or "re:" patterns in place of modules. prune=("layer",) needs `calibration`.
        bits, activation_bits, activations, group_size, rounding: as for `compress`; the class must be able to hold the
            integers, which most classes are for weights alone (`activation_bits=None`).
        calibration: batches in the form of the example inputs, for repair, for saliencies that read activations, for
            ranges of activations, and to choose layers by.
        saliency: as for `compress`, without those that read gradients. Default: "l2".
        max_shard_size: most bytes of a shard, as "500MB".
        dtype: of the floats; None: as the source says.
        trust_remote_code: run code that the source brings along.
        progress: show a progress line on the terminal.
        others: none; options of `compress` that need the model in memory are refused with the reason.

    Raises:
        CheckpointError: the source lacks something, is damaged, quantized, an adapter, or of a newer version; the
            target is there already or cannot be written.
        NothingToPrune, PlanError, BudgetError, CalibrationError, InputError: as for `compress`; the model's class
            cannot hold the cut, or the integers; an option that there is not.
        VerificationError: the result does not compute what it should. Nothing is written then.
    """
    _refuse_others(others)
    check_options(
        example_kwargs=example_kwargs, sparsity=sparsity, activation_bits=activation_bits, activations=activations,
        group_size=group_size, rounding=rounding, budget=budget, saliency=saliency, ranking=ranking,
        repair=repair, prune=prune, round_to=round_to, uniform=uniform, verify=verify, progress=progress, seed=seed,
        trust_remote_code=trust_remote_code, max_shard_size=max_shard_size, dtype=dtype,
    )  # fmt: skip
    check_path("source", source)
    check_path("target", target)
    _check_reads_no_gradients(saliency)
    if budget is not None and budget.timed:
        raise PlanError(
            "a budget of latency needs a model in memory", why="each op would be timed with the reading of its weights",
            fix="budget=graphcomp.Budget(macs=0.5), or graphcomp.compress",
        )  # fmt: skip
    source, target = Path(source).absolute(), Path(target).absolute()
    _check_target(source, target)
    with show_progress(2, progress) as bar:
        bar.step("reading headers")
        model = open_folder(source, dtype, trust_remote_code=trust_remote_code)
    inputs = example_of(model) if example_inputs is None else example_inputs
    with _beside(target) as (fresh, said), scratch(fresh):
        small = compress(
            model, inputs, example_kwargs, sparsity=sparsity, bits=bits, activation_bits=activation_bits,
            activations=activations, group_size=group_size, rounding=rounding, budget=budget, calibration=calibration,
            saliency=saliency, ranking=ranking, repair=repair, ignore=ignore, keep_inputs=keep_inputs, prune=prune,
            round_to=round_to, uniform=uniform, verify=verify, progress=progress, seed=seed,
        )  # fmt: skip
        if small.form != "native":
            raise _no_folder(type(model).__name__, small.reason, quantized=bits is not None)
        assert isinstance(small.report, Report)
        _write(small.module, fresh, target, max_shard_size)
        report = replace(small.report, notes=(*small.report.notes, *said))
    return CompressedCheckpoint(target, tuple(sorted(target.iterdir())), report)


def _refuse_others(others: Mapping[str, Any]) -> None:
    """Raise PlanError where an option is none of `compress_checkpoint`."""
    for name in others:
        if name in inspect.signature(compress).parameters:
            raise PlanError(
                f"{name}= is no option of compress_checkpoint",
                why="graphcomp.compress takes the option for a model in memory; here weights stand in files",
                fix="graphcomp.compress(model, …), then small.module.save_pretrained(folder)",
            )
        known = [
            own
            for own, kind in inspect.signature(compress_checkpoint).parameters.items()
            if kind.kind is not kind.VAR_KEYWORD
        ]
        near = difflib.get_close_matches(name, known, n=1)
        raise PlanError(
            f"{name}= is no option of compress_checkpoint",
            why="there is no such option",
            fix=f"{near[0]}=" if near else f"one of {', '.join(known[2:])}",
        )


def _no_folder(kind: str, why: str, *, quantized: bool) -> PlanError:
    """Return the error of a result that is a graph."""
    if quantized:
        return PlanError(
            f"{kind} cannot hold the integers, and a graph has no folder that from_pretrained reads",
            why=why,
            fix='activation_bits=None, for weights alone, or activations="dynamic"; or graphcomp.compress, for a graph',
        )
    return PlanError(
        f"{kind} cannot hold the cut, and a graph has no folder that from_pretrained reads",
        why=why,
        fix="uniform=True, or leave groups whole by prune= or ignore=",
    )


def _check_reads_no_gradients(saliency: str | Saliency | None) -> None:
    """Raise PlanError where a saliency needs gradients."""
    scorer = SALIENCIES.get(saliency) if isinstance(saliency, str) else saliency
    if isinstance(scorer, (Taylor, Cosine)):
        raise PlanError(
            f"saliency={saliency!r} reads gradients, and no gradient reaches a weight that stands in a file",
            fix='saliency="l2", or saliency="activation" with calibration=[batch, …]',
        )


def _check_target(source: Path, target: Path) -> None:
    """Raise CheckpointError where the target is there, or one folder would hold the other."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            f"{target} is there already",
            why="nothing is overwritten",
            fix="give the name of a folder that is not there",
        )
    if source == target or source in target.parents:
        raise CheckpointError(
            f"{target} is inside of {source}", why="the source is not modified", fix="give a folder beside the source"
        )


@contextmanager
def _beside(target: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Give a fresh folder beside the target, which is removed at the end; and a note for each that a run which was cut
    short left there, which is removed at once.

    Raises:
        CheckpointError: the place cannot be written.
    """
    prefix = f".{target.name}.new-"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent):
            said = tuple(_removed(left) for left in abandoned(target.parent, prefix))
        with staging(target.parent, prefix) as fresh:
            yield fresh, said
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written", why=f"{type(error).__name__}: {first_line(error)[:200]}",
            fix="give a folder that you may write to",
        ) from error  # fmt: skip


def _removed(left: Path) -> str:
    """Remove the folder that a run left, and say so."""
    size = sum(file.stat().st_size for file in left.rglob("*") if file.is_file())
    shutil.rmtree(left, ignore_errors=True)
    kept = ", in part: some files cannot be removed" if left.exists() else ""
    return f"removed {left.name!r} ({size:,} bytes), which a run to the same folder that was cut short had left{kept}"


def _write(model: Any, fresh: Path, target: Path, max_shard_size: int | str) -> None:
    """Write the folder inside of `fresh`, and move the folder to the target once it is whole.

    Raises:
        CheckpointError: the section cannot hold the model.
    """
    made = fresh / target.name
    model.save_pretrained(made, max_shard_size=max_shard_size)
    for file in made.iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    os.replace(made, target)
    sync_folder(target.parent)
