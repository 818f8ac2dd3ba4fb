"""A compressed model as a folder: model.safetensors and graphcomp.json. No pickle, no code.

A native model is rebuilt from a recipe (recipe.py), then every tensor is put in place at its stored shape,
non-persistent buffers included. A graph is rebuilt from its ops' names (ir/graph_json.py). What a folder may name is
limited (trust.py).

Both files are written into a fresh folder inside the folder, synced to disk and moved into place, tensors first. Other
files of the folder are left alone. A process that is killed between the two moves leaves the new document in the fresh
folder; whoever comes next moves that document, too. So there is always one whole checkpoint, the old or the new one.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from graphcomp.arguments import check_path
from graphcomp.checkpoint import recipe
from graphcomp.checkpoint.document import FORMAT, Document, check_fields, parsed, written
from graphcomp.checkpoint.integers import put_together, taken_apart
from graphcomp.checkpoint.names import MAIN, class_path
from graphcomp.checkpoint.state import Decoder, replace_tensors, submodule
from graphcomp.errors import CheckpointError
from graphcomp.ir import graph_json
from graphcomp.ir.graph import assign, names_by_tensor
from graphcomp.ir.json_values import damaged, decode, encode, finite
from graphcomp.ir.module import tensor_names
from graphcomp.ir.trust import NAMESPACES, Trust
from graphcomp.native.vocabulary import trim_as
from graphcomp.system.files import abandoned, locked, put, staging, sync_folder
from graphcomp.system.locks import LOCK_FILE
from graphcomp.system.threads import one_at_a_time
from graphcomp.system.version import package_version
from graphcomp.torch_compat import OpOverload

if TYPE_CHECKING:
    from graphcomp.report.report import Report
    from graphcomp.result import CompressedModel

log = logging.getLogger("graphcomp.checkpoint")

DOCUMENT, TENSORS = "graphcomp.json", "model.safetensors"
STAGING = ".graphcomp-save-"
"""First part of the name of the fresh folder that a save writes into."""

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
    """Write a CompressedModel. What `load` will need besides the folder is logged, and noted in the report.

    Raises:
        CheckpointError: see `write`.
    """
    from graphcomp.report.report import Report

    report = compressed.report
    needs = write(
        folder,
        compressed.module,
        form=compressed.form,
        kept=compressed.kept,
        report=dict(report) if isinstance(report, Mapping) else report.to_dict(),
        reason=compressed.reason,
        edits=compressed.edits,
        original_shapes=compressed.original_shapes,
    )
    if isinstance(report, Report):
        compressed.report = replace(report, notes=tuple(_with_notes({"notes": report.notes}, needs)["notes"]))


@one_at_a_time
def load(
    folder: str | Path,
    *,
    model_factory: Callable[[], nn.Module] | None = None,
    map_location: str | torch.device = "cpu",
    trust: str | Iterable[str] = (),
) -> CompressedModel:
    """The CompressedModel that `save` wrote; its report is the stored dict where that is of another version.

    Raises:
        CheckpointError: see `read`.
    """
    from graphcomp.result import CompressedModel

    found = read(folder, model_factory, map_location, trust)
    return CompressedModel(
        found.module,
        form=found.form,
        kept=found.kept,
        report=_report(found.report),
        reason=found.reason,
        edits=found.edits,
        original_shapes=found.original_shapes,
    )


def _report(data: dict[str, Any]) -> Report | dict[str, Any]:
    """The stored report, where it can be read and printed; as plain data where entries of this version are missing."""
    from graphcomp.report.report import Report

    try:
        report = Report.from_dict(data)
    except KeyError:
        return data
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise damaged("the report", f"{type(error).__name__}: {error}") from error
    try:
        str(report)
        report.to_dict()
    except Exception as error:  # numbers that are none show in any way
        raise damaged("the report", f"{type(error).__name__}: {error}") from error
    return report


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
) -> tuple[str, ...]:
    """Write a checkpoint folder; one that is there already is replaced once the new one is complete.

    Args:
        module: the smaller model: of the user's class, a captured graph, or a model that holds a captured graph.
        kept: tensor name -> dim -> kept indices.
        report: JSON-able.
        edits: attributes corrected by the cut, for models that only a `model_factory` can build again.

    Returns:
        What `load` will need besides the folder, and what the folder does not hold, a sentence each.

    Raises:
        CheckpointError: the folder holds something that is no checkpoint; the model has no data (meta device), a
            tensor type or an op that cannot be stored.
    """
    folder = _absolute(folder)
    _check_target(folder)
    structure, extra, needs = _structure(module)
    tensors, integers = taken_apart({**tensor_names(module), **extra})
    document = {
        "format": FORMAT if integers else 1,
        "integers": integers,
        "graphcomp": package_version(),
        "torch": str(torch.__version__),
        "form": form,
        "reason": reason,
        "kept": {name: {str(d): indices.tolist() for d, indices in dims.items()} for name, dims in kept.items()},
        "report": finite(_with_notes(report, needs)),
        "edits": [(path, name, encode(value)) for path, name, value in edits],
        "original_shapes": {name: list(shape) for name, shape in (original_shapes or {}).items()},
        "class": class_path(type(module)),
        "modules": {path: type(part).__name__ for path, part in module.named_modules()}
        if structure["graph_at"] != ""
        else None,
        "device": str(next((t.device for t in tensors.values()), torch.device("cpu"))),
        **structure,
        **_tensor_facts(tensors),
        "plain": sorted(set(tensor_names(module)) - _registered(module)),
        "inside_attributes": sorted(extra),
        "eval": [path for path, m in module.named_modules() if not m.training],
    }
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            _finish(folder)
        with staging(folder, STAGING) as fresh:
            document["tensors"] = _write_tensors(fresh / TENSORS, tensors)
            document["tensors_sha256"] = _digest(fresh / TENSORS)
            (fresh / DOCUMENT).write_text(written(document), encoding="utf-8")
            shutil.copymode(fresh / DOCUMENT, fresh / TENSORS)  # safetensors makes files that others cannot read
            _commit(fresh, folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder}",
            why=f"{type(error).__name__}: {error}",
            fix="give a folder you may write to, on a disk with room",
        ) from error
    finally:
        if made:
            with suppress(OSError):  # a folder that holds something stays
                folder.rmdir()
    for need in needs:
        log.warning("%s", need)
    return needs


def _with_notes(report: Mapping[str, Any], notes: Iterable[str]) -> dict[str, Any]:
    """A report with these notes, too, each once."""
    there = list(report.get("notes", ()))
    added = [note for note in notes if note not in there]
    return {**report, "notes": [*there, *added]} if added else dict(report)


def _structure(module: nn.Module) -> tuple[dict[str, Any], Mapping[str, Tensor], tuple[str, ...]]:
    """The graph or the recipe, and the attributes a fresh model has otherwise; both for a model that holds a graph.
    Then the tensors inside these attributes, and what a reader has to know."""
    at = _graph_path(module)
    found: dict[str, Any] = {"graph_at": at, "graph": None, "recipe": None, "attributes": [], "modules": None}
    needs: list[str] = []
    extra: Mapping[str, Tensor] = {}
    if at is not None:
        part = module.get_submodule(at)
        assert isinstance(part, fx.GraphModule)
        found["graph"] = graph_json.dump(part)
        needs += _needed_namespaces(part)
    if at != "":
        found["modules"] = {path: type(part).__name__ for path, part in module.named_modules()}
        how = recipe.find_recipe(module, at)
        found["recipe"], found["attributes"], extra = how.recipe, how.attributes, how.extra
        needs += _needed_of(module, how)
    return found, extra, tuple(needs)


def _needed_of(module: nn.Module, how: recipe.Found) -> list[str]:
    kind = type(module)
    if how.recipe is None:
        why = f": its attribute {', '.join(how.lost[:5])} is no plain data" if how.lost else ""
        return [
            f"graphcomp.load of this checkpoint needs model_factory=lambda: {kind.__name__}(…), since "
            f"{class_path(kind)} cannot be built from what a file can hold{why}"
        ]
    found = []
    if any(type(m).__module__ == MAIN for m in module.modules()):
        found.append(
            "graphcomp.load of this checkpoint needs model_factory= in every program but this script, which defines "
            "the model's class: move the class to a module that both import"
        )
    if how.lost:
        found.append(f"the checkpoint does not hold the attribute {', '.join(how.lost[:5])}, which is no plain data")
    return found


def _needed_namespaces(graph: fx.GraphModule) -> list[str]:
    used = {n.target.namespace for n in graph.graph.nodes if isinstance(n.target, OpOverload)}
    return [
        f"graphcomp.load of this checkpoint needs trust=[{name!r}], and the library of these ops imported"
        for name in sorted(used - NAMESPACES)
    ]


def _registered(module: nn.Module) -> set[str]:
    parameters, buffers = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    return {name for name, _ in parameters} | {name for name, _ in buffers}


def _graph_path(module: nn.Module) -> str | None:
    return next((path for path, part in module.named_modules() if isinstance(part, fx.GraphModule)), None)


def _tensor_facts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Which names are one tensor, which are parameters, and which of these are not trained."""
    names = names_by_tensor(tensors.items())
    parameters = [n for n, t in tensors.items() if isinstance(t, nn.Parameter)]
    return {
        "aliases": {first: others for first, *others in names.values() if others},
        "parameters": parameters,
        "not_trained": [n for n in parameters if not tensors[n].requires_grad],
    }


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, list[int]]]:
    """Write every tensor once, by its first name. Return name -> (dtype, shape)."""
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
        # one entry: safetensors writes several in another order in each process
        safetensors.torch.save_file(plain, path, metadata={"format": "pt"})
    except (safetensors.SafetensorError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"cannot write {path.name}", why=str(error)) from error
    return {name: _kind(tensor) for name, tensor in plain.items()}


def _kind(tensor: Tensor) -> tuple[str, list[int]]:
    """dtype and shape, as they stand in the document."""
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


# ------------------------------------------------------------------------------------------------ the folder
def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file", fix="give the name of a folder")
    entries = list(folder.iterdir()) if folder.exists() else []
    held = sorted(e.name for e in entries if e.name != LOCK_FILE and not e.name.startswith(STAGING))
    if held and DOCUMENT not in held:
        raise CheckpointError(
            f"{folder} is not empty and no graphcomp checkpoint",
            why=f"it holds {held[0]!r} and no {DOCUMENT}",
            fix="give a new or empty folder",
        )
    for entry in entries:
        if entry.name in (DOCUMENT, TENSORS) and entry.is_dir():
            raise CheckpointError(f"{entry} is a folder", fix="give the name of another folder")


def _absolute(folder: str | Path) -> Path:
    """The folder as an absolute path, with an interrupted save of version 0.1 undone."""
    check_path("folder", folder)
    found = Path(folder).absolute()
    try:
        _restore(found)
    except OSError as error:  # a name that the file system cannot have
        raise CheckpointError(f"{folder!s:.200} is no path", why=str(error.strerror), fix='folder="small"') from error
    return found


def _restore(folder: Path) -> None:
    """Undo a save of version 0.1, which moved whole folders, that was interrupted between its two moves."""
    old = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and (old / DOCUMENT).is_file():
        old.rename(folder)


def _commit(fresh: Path, folder: Path) -> None:
    """Move the two files of `fresh` into `folder`, where no other process reads or moves files at the same time."""
    sync_folder(fresh)
    with locked(folder):
        put(fresh / TENSORS, folder / TENSORS)
        sync_folder(folder)
        put(fresh / DOCUMENT, folder / DOCUMENT)
        sync_folder(folder)
    sync_folder(folder.parent)


def _finish(folder: Path) -> None:
    """Complete a save whose process was killed after the tensors were moved and before the document was, and remove
    what other killed processes left. The folder must be locked."""
    for left in abandoned(folder, STAGING):
        waits = (left / DOCUMENT).is_file() and not (left / TENSORS).exists()
        if waits and _digest(folder / TENSORS) == parsed(left / DOCUMENT).get("tensors_sha256"):
            put(left / DOCUMENT, folder / DOCUMENT)
            sync_folder(folder)
        shutil.rmtree(left, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ reading
def read(
    folder: str | Path,
    model_factory: Callable[[], nn.Module] | None = None,
    map_location: str | torch.device = "cpu",
    trust: str | Iterable[str] = (),
) -> Loaded:
    """Read a checkpoint folder.

    Args:
        model_factory: returns the original architecture with any weights; needed for native models whose class or
            constructor arguments could not be stored, used in place of the stored ones if given.
        trust: packages, modules and namespaces of ops that the folder may name, besides those of `trust.Trust`.

    Raises:
        CheckpointError: no checkpoint, a truncated or changed file, a newer format, a class that cannot be built, a
            module or an op that the folder may not name.
    """
    folder, trusted, device = _absolute(folder), Trust(trust), torch.device(map_location)
    if not (folder / DOCUMENT).is_file():
        what = "does not exist" if not folder.exists() else f"holds no {DOCUMENT}"
        raise CheckpointError(f"{folder} is no graphcomp checkpoint", why=f"it {what}")
    try:
        with suppress(OSError), locked(folder):  # a folder on a read-only disk is finished by nobody
            _finish(folder)
        with locked(folder, shared=True):
            document = check_fields(parsed(folder / DOCUMENT))
            tensors = put_together(_read_tensors(folder / TENSORS, document, device), document["integers"])
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}", why=f"{type(error).__name__}: {error}") from error
    skeleton = None if document["graph_at"] == "" else _skeleton(folder, document, model_factory, trusted)
    try:
        return _read(document, tensors, skeleton, device, trusted, by_factory=model_factory is not None)
    except CheckpointError:
        raise
    except Exception as error:  # names and values that nobody writes end in any error of torch
        raise CheckpointError(f"{folder / DOCUMENT} is damaged", why=f"{type(error).__name__}: {error}") from error


def _read(
    document: Document,
    tensors: Mapping[str, Tensor],
    skeleton: nn.Module | None,
    device: torch.device,
    trust: Trust,
    *,
    by_factory: bool,
) -> Loaded:
    at, graph = document["graph_at"], None
    if at is not None:
        prefix = f"{at}." if at else ""
        inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        graph = graph_json.load(document["graph"], inside, {document["device"]: device}, trust)
    if skeleton is None:
        assert graph is not None
        module: nn.Module = graph
    else:
        module = skeleton
        if graph is not None:
            submodule(module, at)  # there is one, which the graph takes the place of
            module.set_submodule(at, graph)
        if by_factory:
            _say_what_is_left_out(module, tensors, document)
        _fill(module, tensors, document)
        recipe.apply_attributes(
            module, document["edits"] if by_factory else document["attributes"], Decoder(module, tensors, trust)
        )
    _set_modes(module, set(document["eval"]))
    return Loaded(
        module,
        document["form"],
        _kept(document),
        document["report"],
        document["reason"],
        tuple((path, name, decode(value, {}, {})) for path, name, value in document["edits"]),
        {name: tuple(shape) for name, shape in document["original_shapes"].items()},
    )


def _kept(document: Document) -> dict[str, dict[int, Tensor]]:
    """Kept indices, which must be indices of the original shapes where these are stored."""
    shapes = document["original_shapes"]
    for name, dims in document["kept"].items():
        for dim, indices in dims.items():
            length = shapes[name][int(dim)] if int(dim) < len(shapes.get(name, ())) else None
            if (name in shapes and length is None) or any(length is not None and i >= length for i in indices):
                raise damaged(f"the kept indices of '{name}', dim {dim}", f"its shape was {shapes[name]}")
    return {
        name: {int(d): torch.tensor(indices, dtype=torch.int64) for d, indices in dims.items()}
        for name, dims in document["kept"].items()
    }


def _read_tensors(path: Path, document: Document, device: torch.device) -> dict[str, Tensor]:
    """Name -> parameter or tensor, under all names of each."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} holds no {path.name}", fix="copy the whole folder")
    if _digest(path) != document["tensors_sha256"]:
        raise CheckpointError(
            f"{path} is truncated or was changed", why=f"its SHA-256 is not the one in {DOCUMENT}", fix="copy it again"
        )
    try:
        found = safetensors.torch.load_file(path, device=str(device))
    except Exception as error:  # a dtype that torch lacks, or memory that does, ends in any error
        raise CheckpointError(f"cannot read {path}", why=f"{type(error).__name__}: {error}") from error
    # a mapped file has no aligned memory, for which kernels round otherwise
    found = {name: tensor.clone() for name, tensor in found.items()}
    _check_kinds(found, document["tensors"])
    parameters, fixed = set(document["parameters"]), set(document["not_trained"])
    wrong = [n for n in fixed if n not in parameters]
    wrong += [name for name in parameters - fixed if name in found and not _can_be_trained(found[name])]
    if wrong:
        raise damaged(f"the parameter {wrong[0]!r:.100}", "there is none that could be trained")
    tensors: dict[str, Tensor] = {
        name: nn.Parameter(t, name not in fixed) if name in parameters else t for name, t in found.items()
    }
    for first, others in document["aliases"].items():
        if first not in found or any(name in found for name in others):
            raise damaged(f"the tensor '{first:.100}' is also called {others!r:.100}")
        tensors |= dict.fromkeys(others, tensors[first])
    unknown = sorted(parameters - set(tensors))
    if unknown:
        raise damaged(f"the parameter {unknown[0]!r:.100}", "the file of tensors has none of that name")
    return tensors


def _check_kinds(tensors: Mapping[str, Tensor], stored: Mapping[str, Any] | None) -> None:
    """Refuse tensors of other dtypes or shapes than the document says; documents up to 0.1 say nothing."""
    if stored is None:
        return
    found = {name: list(_kind(tensor)) for name, tensor in tensors.items()}
    different = sorted(name for name in {*found, *stored} if found.get(name) != stored.get(name))
    if different:
        name = different[0]
        raise damaged(f"the tensor '{name:.100}' is {found.get(name)}, and {stored.get(name)} is stored")


def _can_be_trained(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _skeleton(folder: Path, document: Document, factory: Callable[[], nn.Module] | None, trust: Trust) -> nn.Module:
    """The model with the original architecture, in any shapes and with any values."""
    if factory is not None:
        return _from_factory(factory, document)
    name = document["class"].rpartition(":")[2].rpartition(".")[2]
    fix = FACTORY.format(folder=str(folder), name=name)
    if document["recipe"] is None:
        raise CheckpointError(
            f"{document['class']} cannot be built from what the checkpoint holds",
            why="its class cannot be imported, or it has hooks or attributes that are no plain data",
            fix=fix,
        )
    try:
        return recipe.build(document["recipe"], trust)
    except CheckpointError:
        raise
    except Exception as error:  # the class may have changed since, in any way
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{document['class']} cannot be built", why=why, fix=fix) from error


def _from_factory(factory: Callable[[], nn.Module], document: Document) -> nn.Module:
    try:
        built = factory()
    except Exception as error:  # the caller's own code
        raise CheckpointError(
            "model_factory cannot build the model",
            why=f"{type(error).__name__}: {error}",
            fix=f"return a {document['class']} of the original architecture from model_factory",
        ) from error
    if not isinstance(built, nn.Module):
        raise CheckpointError(f"model_factory must return an nn.Module, got {type(built).__name__}")
    trim_as(built, document["modules"] or {})
    _check_architecture(built, document)
    return built


def _check_architecture(built: nn.Module, document: Document) -> None:
    """Refuse another architecture, whose tensors may have the same names and shapes. Modules of classes may have moved
    since: only the names of classes are compared. Documents up to 0.1 hold none."""
    graph = document["graph_at"]
    inside = f"{graph}." if graph else None
    for path, stored in (document["modules"] or {}).items():
        if path == graph or (inside and path.startswith(inside)):
            continue
        try:
            found = type(built.get_submodule(path)).__name__
        except AttributeError:
            found = "not there"
        if found != stored:
            raise CheckpointError(
                "model_factory built another architecture",
                why=f"{f'the module {path!r}' if path else 'the model'} must be {stored}, got {found}",
                fix="build the original architecture in model_factory, or fine-tune from small.module",
            )


def _say_what_is_left_out(module: nn.Module, tensors: Mapping[str, Tensor], document: Document) -> None:
    """Log the plain attributes of the saved model that the model of the factory has not: caches of a forward pass."""
    left = sorted(set(document["plain"]) & set(tensors) - set(tensor_names(module)))
    if left:
        log.warning(
            "%s: left out, as the model of model_factory has no such attribute: what a forward pass keeps is no weight",
            ", ".join(left),
        )


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], document: Document) -> None:
    """Put every tensor in its place. Tensors that are plain attributes are left to the recipe, or to the factory, where
    one side alone has them: a cache that a forward pass left behind."""
    at = document["graph_at"]
    prefix = None if at is None else f"{at}."
    there, registered, plain = tensor_names(module), _registered(module), set(document["plain"])
    missing = sorted(set(tensors) - set(there) - plain - set(document["inside_attributes"]))
    extra = sorted(registered - set(tensors))
    if missing or extra:
        found = f"it lacks {missing[0]!r}" if missing else f"it has {extra[0]!r} besides"
        raise CheckpointError(
            f"a fresh {type(module).__name__} does not have the tensors of the checkpoint",
            why=f"{found} ({len(missing)} missing, {len(extra)} too many)",
            fix="give the architecture that was compressed: model_factory=lambda: …",
        )
    new: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if name in there and (prefix is None or not name.startswith(prefix)):
            if isinstance(tensor, nn.Parameter) != isinstance(there[name], nn.Parameter):
                raise damaged(f"the tensor '{name}' is a parameter on one side alone")
            new[id(there[name])] = tensor
            assign(module, name, tensor)
    replace_tensors(module, new)


def _set_modes(module: nn.Module, evaluating: set[str]) -> None:
    """The train/eval flag of every submodule as it was."""
    graphs = [part for part in module.modules() if isinstance(part, fx.GraphModule)]
    unknown = evaluating - {path for path, _ in module.named_modules()}
    if unknown:
        raise damaged(f"the submodule {min(unknown)!r:.100} is in eval mode", "the model has none of that name")
    for path, part in module.named_modules():
        part.training = path not in evaluating
    for graph in graphs:
        graph.train(graph.training)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
