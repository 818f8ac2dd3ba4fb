"""A picture of a training run: sparsity, bits and loss over its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphcomp.arguments import check_path
from graphcomp.errors import CheckpointError, ExportError
from graphcomp.training.folder import METRICS, read_metrics

COLORS = {"warm-up": "0.95", "projection": "#dce9f7", "joint": "#f9e3d2", "cool-down": "#e3f1df"}


def plot(folder: str | Path, path: str | Path) -> None:
    """Draw what a run measured: sparsity, mean bits and loss over its steps, with the stages behind.

    Args:
        folder: of the run (`Training.folder`); the runs of a method that has several are drawn one after the other.
        path: of the picture; its suffix says in which format: .png, .svg, .pdf.

    Raises:
        PlanError: `folder` or `path` is no path.
        CheckpointError: the folder holds no metrics.
        ExportError: matplotlib is not installed, does not know the format, or the picture cannot be written.
    """
    check_path("folder", folder)
    check_path("path", path)
    lines = lines_of_run(Path(folder))
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExportError(
            "drawing needs matplotlib", why="it is not installed", fix="pip install 'graphcomp[viz]'"
        ) from error
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for ax in axes:
        _shade(ax, lines)
        ax.grid(alpha=0.3)
    _draw(axes[0], lines, {"units removed": "sparsity"})
    _draw(axes[1], lines, {"weights": "weight_bits", "activations": "activation_bits"})
    _draw(axes[2], lines, {"loss": "loss"})
    for ax in axes[:2]:
        ax.set_ylim(bottom=0)
    for ax, title in zip(axes, ("share of units removed", "mean bits", "loss"), strict=True):
        ax.set_ylabel(title)
    axes[1].legend(loc="best")
    axes[2].set_xlabel("step")
    _legend_of_stages(figure, lines)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: of a format that matplotlib does not know
        raise ExportError(f"cannot write {path}", why=str(error), fix='path="run.png"') from error


def lines_of_run(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a folder, or of those in it, steps counted through."""
    files = [folder / METRICS] if (folder / METRICS).exists() else sorted(folder.glob(f"*/{METRICS}"))
    found: list[dict[str, Any]] = []
    for file in files:
        before = found[-1]["step"] if found else 0
        found += [{**line, "step": line["step"] + before} for line in read_metrics(file)]
    if not found:
        raise CheckpointError(
            f"{folder} holds no metrics",
            why=f"a training run writes them to {METRICS} in its folder",
            fix='graphcomp.compress(…, folder="run")',
        )
    return found


def _draw(ax: Any, lines: list[dict[str, Any]], series: dict[str, str]) -> None:
    for label, name in series.items():
        points = [(line["step"], line[name]) for line in lines if line[name] is not None]
        ax.plot([x for x, _ in points], [y for _, y in points], label=label)


def _shade(ax: Any, lines: list[dict[str, Any]]) -> None:
    begin = 0
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        if following is None or following["stage"] != line["stage"]:
            ax.axvspan(begin, line["step"], color=COLORS[line["stage"]], linewidth=0)
            begin = line["step"]


def _legend_of_stages(figure: Any, lines: list[dict[str, Any]]) -> None:
    from matplotlib.patches import Patch

    stages = dict.fromkeys(line["stage"] for line in lines)
    handles = [Patch(color=COLORS[stage], label=stage) for stage in stages]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
