"""The folder that one run leaves: model, report, plan, inputs, exported files, and a manifest of all of them.

model/               the checkpoint: graphcomp.load, or from_pretrained where the model is one of transformers
report.json          Report.to_dict()
report.html          the same to look at
plan.json            the plan that was carried out
inputs.safetensors   the example inputs
model.onnx, …        exported files
manifest.json        versions, seconds, checks, and the SHA-256 of every other file
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from graphcomp.errors import CheckpointError
from graphcomp.report.report import Report
from graphcomp.system.files import staging
from graphcomp.system.version import package_version

MANIFEST, REPORT, PAGE, PLAN, INPUTS, MODEL = (
    "manifest.json", "report.json", "report.html", "plan.json", "inputs.safetensors", "model",
)  # fmt: skip
"""Names in the folder."""


@dataclass(frozen=True)
class Output:
    """The folder of one run."""

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> Output:
        """Return the output that a folder holds.

        Raises:
            CheckpointError: the folder holds none.
        """
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(
                f"{folder} holds no output of `graphcomp compress`",
                why=f"there is no {MANIFEST}",
                fix="graphcomp compress MODEL --out FOLDER",
            )
        return cls(folder)

    @property
    def manifest(self) -> dict[str, Any]:
        """Return the manifest.

        Raises:
            CheckpointError: the manifest is damaged.
        """
        return _parsed(self.folder / MANIFEST)

    @property
    def report(self) -> Report:
        """Return the report.

        Raises:
            CheckpointError: the report is damaged.
        """
        try:
            return Report.from_dict(_parsed(self.folder / REPORT))
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder / REPORT} is damaged", why=f"{type(error).__name__}: {error}"
            ) from error

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the example inputs as arguments and keywords.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        path = self.folder / INPUTS
        try:
            held = safetensors.torch.load_file(path)
        except Exception as error:  # safetensors' own error has no public base class
            raise CheckpointError(f"{path} cannot be read", why=f"{type(error).__name__}: {error}") from error
        args = tuple(held[f"arg.{k}"] for k in range(sum(name.startswith("arg.") for name in held)))
        return args, {name.removeprefix("kwarg."): t for name, t in held.items() if name.startswith("kwarg.")}

    def exported(self) -> list[Path]:
        """Return the exported files."""
        return sorted(path for path in self.folder.iterdir() if path.suffix in (".onnx", ".pt2"))

    def damaged(self) -> list[str]:
        """Return what differs from the manifest, file by file."""
        listed: Mapping[str, str] = self.manifest["files"]
        there = dict(_digests(self.folder))
        found = [f"{name} is missing" for name in listed if name not in there]
        found += [f"{name} was changed" for name, digest in listed.items() if there.get(name, digest) != digest]
        return found + [f"{name} is not in the manifest" for name in there if name not in listed]

    def sign(self, about: Mapping[str, Any]) -> None:
        """Write the manifest of what stands in the folder."""
        text = json.dumps({**about, "files": dict(_digests(self.folder))}, indent=1)
        fresh = self.folder / f"{MANIFEST}.new"
        fresh.write_text(text + "\n", encoding="utf-8")
        fresh.replace(self.folder / MANIFEST)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {"graphcomp": package_version(), "torch": torch.__version__, "python": platform.python_version()}


def write_inputs(folder: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Write the example inputs; return the names of those that are no tensors and are left out."""
    named = {f"arg.{k}": value for k, value in enumerate(args)} | {f"kwarg.{name}": v for name, v in kwargs.items()}
    tensors = {name: t.contiguous().clone() for name, t in named.items() if isinstance(t, Tensor)}
    safetensors.torch.save_file(tensors, folder / INPUTS)
    return [name for name in named if name not in tensors]


@contextmanager
def fresh_output(folder: Path, *, replace: bool) -> Iterator[Path]:
    """Give a fresh folder that takes the place of `folder` when the block ends; nothing changes when it raises.

    Raises:
        CheckpointError: the folder is not empty, and is no output that may be replaced.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        ours = (folder / MANIFEST).is_file()
        if not replace or not ours:
            raise CheckpointError(
                f"{folder} exists",
                why="it holds an earlier output" if ours else "it holds something else",
                fix="--force replaces the earlier output" if ours else "another --out",
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staging(folder.parent, f".{folder.name}.new-") as fresh:
        made = fresh / folder.name
        made.mkdir()
        yield made
        old = fresh / "old"
        if folder.exists():
            folder.replace(old)
        made.replace(folder)
        shutil.rmtree(old, ignore_errors=True)


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            with path.open("rb") as file:
                yield name, hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read", why=f"{type(error).__name__}: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged", why=f"it holds a {type(data).__name__}")
    return data
