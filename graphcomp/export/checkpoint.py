"""A compressed model as a folder: model.safetensors and graphcomp.json. No pickle, no code.

A native model is rebuilt from its class and constructor arguments (recipe.py), then every tensor is put in place at
its stored shape, non-persistent buffers included. A graph is rebuilt from its ops' names (graph_json.py).

A folder is written beside its place and moved there when complete. A reader never sees half of one; a failure leaves
the old one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from graphcomp import graph_json
from graphcomp.errors import CheckpointError
from graphcomp.export import recipe
from graphcomp.graph import assign
from graphcomp.graph_module import tensor_names
from graphcomp.threads import one_at_a_time

if TYPE_CHECKING:
    from graphcomp.compressed import CompressedModel
    from graphcomp.report import Report

FORMAT = 1
DOCUMENT, TENSORS = "graphcomp.json", "model.safetensors"

Form = Literal["native", "graph"]
Kept = Mapping[str, Mapping[int, Tensor]]
Edit = tuple[str, str, Any]
FACTORY = "graphcomp.load({folder!r}, model_factory=lambda: {name}(…))"


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint folder holds."""

    module: nn.Module
    form: Form
    kept: dict[str, dict[int, Tensor]]
    report: dict[str, Any]
    reason: str = ""
    edits: tuple[Edit, ...] = ()
    original_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------ the public pair
@one_at_a_time
def save(compressed: CompressedModel, folder: str | Path) -> None:
    """Write a CompressedModel.

    Raises:
        CheckpointError: see `write`.
    """
    report = compressed.report
    write(
        folder,
        compressed.module,
        form=compressed.form,
        kept=compressed.kept,
        report=dict(report) if isinstance(report, Mapping) else report.to_dict(),
        reason=compressed.reason,
        edits=compressed.edits,
        original_shapes=compressed.original_shapes,
    )


@one_at_a_time
def load(
    folder: str | Path,
    *,
    model_factory: Callable[[], nn.Module] | None = None,
    map_location: str | torch.device = "cpu",
) -> CompressedModel:
    """The CompressedModel that `save` wrote; its report is the stored dict where that is of another version.

    Raises:
        CheckpointError: see `read`.
    """
    from graphcomp.compressed import CompressedModel
    from graphcomp.report import Report

    found = read(folder, model_factory, map_location)
    report: Report | dict[str, Any] = found.report
    with suppress(KeyError):
        report = Report.from_dict(found.report)
    return CompressedModel(
        found.module,
        form=found.form,
        kept=found.kept,
        report=report,
        reason=found.reason,
        edits=found.edits,
        original_shapes=found.original_shapes,
    )


# ------------------------------------------------------------------------------------------------ writing
def write(
    folder: str | Path,
    module: nn.Module,
    *,
    form: Form,
    kept: Kept,
    report: Mapping[str, Any],
    reason: str = "",
    edits: Iterable[Edit] = (),
    original_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Write a checkpoint folder; one that is there already is replaced once the new one is complete.

    Args:
        module: the smaller model: of the user's class, a captured graph, or a model that holds a captured graph.
        kept: tensor name -> dim -> kept indices.
        report: JSON-able.
        edits: attributes corrected by the cut, for models that only a `model_factory` can build again.

    Raises:
        CheckpointError: the folder holds something that is no checkpoint; the model has no data (meta device), a
            tensor type or an op that cannot be stored.
    """
    folder = Path(folder).absolute()
    _check_target(folder)
    tensors = tensor_names(module)
    document = {
        "format": FORMAT,
        "graphcomp": _version(),
        "torch": str(torch.__version__),
        "form": form,
        "reason": reason,
        "kept": {name: {str(d): indices.tolist() for d, indices in dims.items()} for name, dims in kept.items()},
        "report": _finite(dict(report)),
        "edits": [(path, name, graph_json.encode(value)) for path, name, value in edits],
        "original_shapes": {name: list(shape) for name, shape in (original_shapes or {}).items()},
        "class": recipe.class_path(type(module)),
        "device": str(next((t.device for t in tensors.values()), torch.device("cpu"))),
        **_structure(module),
        **_tensor_facts(tensors),
        "eval": [path for path, m in module.named_modules() if not m.training],
    }
    try:
        with _replacing(folder) as fresh:
            _write_tensors(fresh / TENSORS, tensors)
            document["tensors_sha256"] = _digest(fresh / TENSORS)
            (fresh / DOCUMENT).write_text(json.dumps(document, allow_nan=False, indent=1), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder}",
            why=f"{type(error).__name__}: {error}",
            fix="give a folder you may write to, on a disk with room",
        ) from error


def _structure(module: nn.Module) -> dict[str, Any]:
    """The graph or the recipe, and the attributes a fresh model has otherwise; both for a model that holds a graph."""
    at = _graph_path(module)
    found: dict[str, Any] = {"graph_at": at, "graph": None, "recipe": None, "attributes": []}
    if at is not None:
        part = module.get_submodule(at)
        assert isinstance(part, fx.GraphModule)
        found["graph"] = graph_json.dump(part)
    if at != "":
        found["recipe"] = recipe.find_recipe(module, at)
        if found["recipe"] is not None:
            found["attributes"] = recipe.differing_attributes(recipe.build(found["recipe"]), module, at)
    return found


def _graph_path(module: nn.Module) -> str | None:
    return next((path for path, part in module.named_modules() if isinstance(part, fx.GraphModule)), None)


def _tensor_facts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Which names are one tensor, which are parameters, and which of these are not trained."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    parameters = [n for n, t in tensors.items() if isinstance(t, nn.Parameter)]
    return {
        "aliases": {first: others for first, *others in names.values() if others},
        "parameters": parameters,
        "not_trained": [n for n in parameters if not tensors[n].requires_grad],
    }


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor once, by its first name."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    memory: set[int] = set()
    for name, tensor in tensors.items():
        if id(tensor) in seen:
            continue
        if tensor.is_meta:
            raise CheckpointError(f"'{name}' is on the meta device and has no data to store")
        seen.add(id(tensor))
        data = tensor.detach().contiguous()
        storage = data.untyped_storage().data_ptr()
        plain[name] = data.clone() if storage in memory else data
        memory.add(storage)
    try:
        safetensors.torch.save_file(plain, path, metadata={"format": "pt", "graphcomp": str(FORMAT)})
    except (safetensors.SafetensorError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"cannot write {path.name}", why=str(error)) from error


def _finite(value: Any) -> Any:
    """JSON has no NaN; null stands for it."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version() -> str:
    try:
        return importlib.metadata.version("graphcomp")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


# ------------------------------------------------------------------------------------------------ the folder
def _check_target(folder: Path) -> None:
    _restore(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / DOCUMENT).is_file():
        raise CheckpointError(
            f"{folder} is not empty and no graphcomp checkpoint",
            why=f"it holds {min(entry.name for entry in folder.iterdir())!r} and no {DOCUMENT}",
            fix="give a new or empty folder",
        )
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file", fix="give the name of a folder")


class _replacing:
    """A fresh folder beside `folder`, which takes its place when the block ends well, and leaves no trace if not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fresh = folder.with_name(f".{folder.name}.new-{os.getpid()}")

    def __enter__(self) -> Path:
        shutil.rmtree(self.fresh, ignore_errors=True)
        self.fresh.mkdir(parents=True)
        return self.fresh

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.fresh, ignore_errors=True)
            return
        old = _old(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(old)
        self.fresh.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _restore(folder: Path) -> None:
    """Undo a replacement that was interrupted between its two renames."""
    if not folder.exists() and (_old(folder) / DOCUMENT).is_file():
        _old(folder).rename(folder)


# ------------------------------------------------------------------------------------------------ reading
def read(
    folder: str | Path,
    model_factory: Callable[[], nn.Module] | None = None,
    map_location: str | torch.device = "cpu",
) -> Loaded:
    """Read a checkpoint folder.

    Args:
        model_factory: returns the original architecture with any weights; needed for native models whose class or
            constructor arguments could not be stored, used in place of the stored ones if given.

    Raises:
        CheckpointError: no checkpoint, a truncated or changed file, a newer format, a class that cannot be built.
    """
    folder = Path(folder).absolute()
    _restore(folder)
    document = _read_document(folder)
    try:
        return _read(folder, document, model_factory, torch.device(map_location))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{folder / DOCUMENT} is damaged", why=f"{type(error).__name__}: {error}") from error


def _read(
    folder: Path, document: dict[str, Any], factory: Callable[[], nn.Module] | None, device: torch.device
) -> Loaded:
    tensors = _read_tensors(folder, document, device)
    at = document["graph_at"]
    graph = None
    if document["graph"] is not None:
        prefix = f"{at}." if at else ""
        inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        graph = graph_json.load(document["graph"], inside, {document["device"]: device})
    if graph is not None and at == "":
        module: nn.Module = graph
    else:
        module = _skeleton(folder, document, factory)
        if graph is not None:
            module.set_submodule(at, graph)
        _fill(module, tensors, document)
        by_factory = factory is not None or document["recipe"] is None
        recipe.apply_attributes(module, document["edits"] if by_factory else document["attributes"])
    _set_modes(module, set(document["eval"]))
    return Loaded(
        module,
        document["form"],
        {name: {int(d): torch.tensor(i) for d, i in dims.items()} for name, dims in document["kept"].items()},
        document["report"],
        document["reason"],
        tuple((path, name, graph_json.decode(value, {}, {})) for path, name, value in document["edits"]),
        {name: tuple(shape) for name, shape in document["original_shapes"].items()},
    )


def _read_document(folder: Path) -> dict[str, Any]:
    path = folder / DOCUMENT
    if not path.is_file():
        what = "does not exist" if not folder.exists() else f"holds no {DOCUMENT}"
        raise CheckpointError(f"{folder} is no graphcomp checkpoint", why=f"it {what}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or truncated", why=str(error)) from error
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path} is damaged", why=f"format {version!r}")
    if version > FORMAT:
        raise CheckpointError(
            f"{folder} was made by a newer graphcomp ({document.get('graphcomp', 'unknown')})",
            why=f"its format is {version}, and this version reads up to {FORMAT}",
            fix="pip install --upgrade graphcomp",
        )
    found: dict[str, Any] = document
    return found


def _read_tensors(folder: Path, document: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Name -> parameter or tensor, under all names of each."""
    path = folder / TENSORS
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {TENSORS}", fix="copy the whole folder")
    if _digest(path) != document["tensors_sha256"]:
        raise CheckpointError(
            f"{path} is truncated or was changed", why=f"its SHA-256 is not the one in {DOCUMENT}", fix="copy it again"
        )
    try:
        found = safetensors.torch.load_file(path, device=str(device))
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot read {path}", why=str(error)) from error
    # a mapped file has no aligned memory, for which kernels round otherwise
    found = {name: tensor.clone() for name, tensor in found.items()}
    parameters, fixed = set(document["parameters"]), set(document["not_trained"])
    tensors: dict[str, Tensor] = {
        name: nn.Parameter(t, name not in fixed) if name in parameters else t for name, t in found.items()
    }
    for first, others in document["aliases"].items():
        tensors |= dict.fromkeys(others, tensors[first])
    return tensors


def _skeleton(folder: Path, document: dict[str, Any], factory: Callable[[], nn.Module] | None) -> nn.Module:
    """The model with the original architecture, in any shapes and with any values."""
    if factory is not None:
        built = factory()
        if not isinstance(built, nn.Module):
            raise CheckpointError(f"model_factory returned a {type(built).__name__}, not an nn.Module")
        return built
    name = document["class"].rpartition(":")[2].rpartition(".")[2]
    fix = FACTORY.format(folder=str(folder), name=name)
    if document["recipe"] is None:
        raise CheckpointError(
            f"{document['class']} cannot be built from what the checkpoint holds",
            why="its constructor arguments are not attributes of the same name, or its class cannot be imported",
            fix=fix,
        )
    try:
        return recipe.build(document["recipe"])
    except CheckpointError:
        raise
    except Exception as error:  # the class may have changed since, in any way
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{document['class']} cannot be built", why=why, fix=fix) from error


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], document: dict[str, Any]) -> None:
    """Put every tensor in its place."""
    at = document["graph_at"]
    prefix = None if at is None else f"{at}."
    names = set(tensor_names(module))
    missing, extra = sorted(set(tensors) - names), sorted(names - set(tensors))
    if missing or extra:
        found = f"it lacks {missing[0]!r}" if missing else f"it has {extra[0]!r} besides"
        raise CheckpointError(
            f"a fresh {type(module).__name__} does not have the tensors of the checkpoint",
            why=f"{found} ({len(missing)} missing, {len(extra)} too many)",
            fix="give the architecture that was compressed: model_factory=lambda: …",
        )
    for name, tensor in tensors.items():
        if prefix is None or not name.startswith(prefix):
            assign(module, name, tensor)
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            part._flat_weights = [getattr(part, name, None) for name in part._flat_weights_names]


def _set_modes(module: nn.Module, evaluating: set[str]) -> None:
    """The train/eval flag of every submodule as it was."""
    graphs = [part for part in module.modules() if isinstance(part, fx.GraphModule)]
    for path, part in module.named_modules():
        part.training = path not in evaluating
    for graph in graphs:
        graph.train(graph.training)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
