"""A folder of transformers opened without its weights: a model of its class whose tensors are read at each use.

What the folder holds is checked by the headers of its files before anything is computed. Imports transformers inside of
functions: `graphcomp.compress_checkpoint` alone reads folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphcomp.errors import CheckpointError, first_line
from graphcomp.hf.registry import METHOD
from graphcomp.ir.graph import assign
from graphcomp.ir.streamed import StreamedTensor, streamed

CONFIG = "config.json"
"""File of the config of a model."""

WEIGHTS = "model.safetensors"
"""File of the weights of a model that has one shard."""

INDEX = "model.safetensors.index.json"
"""File that says in which shard a tensor stands."""

ADAPTER = "adapter_config.json"
"""File of an adapter (PEFT)."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Name of a dtype in the header of a safetensors file -> the dtype."""


def open_folder(folder: Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> nn.Module:
    """Return the model of a folder as `from_pretrained` loads the model, with parameters that are read at each use.

    Args:
        folder: with config.json and safetensors.
        dtype: of the floats; None: as the folder says.
        trust_remote_code: run code that the folder brings along.

    Raises:
        CheckpointError: something is missing, damaged, of another form, or of a newer version of transformers.
    """
    config = _config(folder, trust_remote_code)
    tensors = tensors_of(folder)
    kind = _class(folder, config, trust_remote_code)
    try:
        model, found = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype="auto" if dtype is None else dtype,
            ignore_mismatched_sizes=True, output_loading_info=True,  # `_check_loaded` names them
        )  # fmt: skip
    except CheckpointError:
        raise
    except Exception as error:  # whatever a class raises on a config or on tensors that are not its own
        raise _refused(
            folder, f"{kind.__name__} cannot be built: {type(error).__name__}: {first_line(error)[:200]}"
        ) from error
    _check_loaded(folder, kind.__name__, found)
    for name, buffer in list(model.named_buffers()):
        if isinstance(buffer, StreamedTensor):  # forwards may write into buffers
            assign(model, name, buffer.read().clone())
    model.config.name_or_path = str(folder)
    _take_generation_config(model, folder, trust_remote_code)
    return model  # type: ignore[no-any-return]


def tensors_of(folder: Path) -> dict[str, StreamedTensor]:
    """Return the tensors of a folder by name; headers are read alone.

    Raises:
        CheckpointError: no safetensors; a shard, or a tensor of a shard, is missing; a damaged header.
    """
    files = _files(folder)
    found: dict[str, StreamedTensor] = {}
    for file, wanted in files.items():
        inside = _header(folder / file)
        for name in sorted(inside) if wanted is None else wanted:
            if name not in inside:
                raise _refused(folder, f"{INDEX} says that {name!r:.80} stands in {file!r}, which has no such tensor")
            shape, kind = inside[name]
            if kind not in DTYPES:
                raise _refused(
                    folder,
                    f"{name!r:.80} is of dtype {kind!r:.20}: weights are quantized",
                    fix="give a folder in floats",
                )
            found[name] = streamed(folder / file, name, shape, DTYPES[kind])
    return found


def _refused(folder: Path, why: str, fix: str = "copy the folder again, or save the model again") -> CheckpointError:
    return CheckpointError(f"{folder} cannot be read as a model of transformers", why=why, fix=fix)


# ------------------------------------------------------------------------------------------------ files
def _files(folder: Path) -> dict[str, list[str] | None]:
    """Return the shards, with the names of their tensors by the index; None where there is no index."""
    if (folder / INDEX).is_file():
        entries = _json(folder, INDEX).get("weight_map")
        if not isinstance(entries, dict) or not entries:
            raise _refused(folder, f"{INDEX} has no weight_map")
        shards: dict[str, list[str] | None] = {}
        for name, file in entries.items():
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise _refused(folder, f"{INDEX} must name files of safetensors in the folder, got {file!r:.80}")
            names = shards.setdefault(file, [])
            assert names is not None
            names.append(name)
        lost = sorted(file for file in shards if not (folder / file).is_file())
        if lost:
            raise _refused(folder, f"the shard {lost[0]!r} is missing ({len(lost)} of {len(shards)} shards are)")
        return shards
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: None}
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if pickles:
        raise _refused(
            folder,
            f"its weights are a pickle ({pickles[0]}), which cannot be read tensor by tensor",
            fix='model.save_pretrained("other folder") writes safetensors',
        )
    if (folder / ADAPTER).is_file():
        raise _adapter(folder)
    raise _refused(folder, f"there is no {WEIGHTS} and no {INDEX}")


def _adapter(folder: Path) -> CheckpointError:
    return _refused(
        folder,
        f"it holds an adapter ({ADAPTER}), whose weights stand beside those of the model",
        fix='merge the adapter first: model.merge_and_unload().save_pretrained("merged")',
    )


def _header(file: Path) -> dict[str, tuple[list[int], str]]:
    """Return name -> shape and dtype of the tensors of a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
            return {name: (list(found.get_shape()), str(found.get_dtype())) for name, found in slices.items()}
    except (SafetensorError, OSError) as error:
        raise _refused(file.parent, f"{file.name} is damaged: {first_line(error)[:200]}") from error


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(folder, f"{name} cannot be read: {first_line(error)[:200]}") from error
    if not isinstance(found, dict):
        raise _refused(folder, f"{name} must hold an object, got a {type(found).__name__}")
    return found


# ------------------------------------------------------------------------------------------------ the class
def _config(folder: Path, trust_remote_code: bool) -> Any:
    """Return the config.

    Raises:
        CheckpointError: see `open_folder`.
    """
    import transformers

    if not folder.is_dir():
        raise _refused(folder, "it is no folder", fix="give a local folder: save_pretrained writes one")
    if (folder / ADAPTER).is_file():
        raise _adapter(folder)
    if not (folder / CONFIG).is_file():
        raise _refused(folder, f"there is no {CONFIG}")
    data = _json(folder, CONFIG)
    if data.get("auto_map") and not trust_remote_code:
        raise _refused(
            folder,
            "its class stands in code that the folder brings along (auto_map)",
            fix="trust_remote_code=True, once you have read the code",
        )
    section = data.get("quantization_config")
    if section and (not isinstance(section, dict) or section.get("quant_method") != METHOD or section.get("integers")):
        raise _refused(folder, "its weights are quantized", fix="give the folder of the model in floats")
    try:
        return transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except CheckpointError:
        raise
    except Exception as error:  # a config of another version may be refused in any way
        written = str(data.get("transformers_version", "an unknown version"))
        raise _refused(
            folder,
            f"{CONFIG} was written by transformers {written:.30}, and {transformers.__version__} refuses it: "
            f"{first_line(error)[:200]}",
            fix="pip install --upgrade transformers",
        ) from error


def _class(folder: Path, config: Any, trust_remote_code: bool) -> Any:
    """Return the class that the config names.

    Raises:
        CheckpointError: no class, or one that this version of transformers has not.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    names = config.architectures
    if not isinstance(names, (list, tuple)) or len(names) != 1 or not isinstance(names[0], str):
        raise _refused(folder, f"{CONFIG} must name one class in architectures, got {names!r:.80}")
    places = getattr(config, "auto_map", None) or {}
    own = next((place for place in places.values() if str(place).rpartition(".")[2] == names[0]), None)
    if own is not None and trust_remote_code:
        return get_class_from_dynamic_module(own, str(folder), local_files_only=True)
    found = getattr(transformers, names[0], None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise _refused(
            folder,
            f"transformers {transformers.__version__} has no class {names[0]!r:.80}",
            fix="pip install --upgrade transformers",
        )
    return found


def _check_loaded(folder: Path, kind: str, found: Mapping[str, Any]) -> None:
    """Refuse tensors that are missing or of another shape: transformers would fill them with random numbers."""
    missing, other = sorted(found["missing_keys"]), sorted(found["mismatched_keys"], key=str)
    if missing:
        raise _refused(folder, f"it lacks {len(missing)} tensors of {kind}, {missing[0]!r} for one")
    if other:
        raise _refused(
            folder, f"{other[0][0]!r} is {tuple(other[0][1])} in the folder and {tuple(other[0][2])} by {CONFIG}"
        )


def _take_generation_config(model: Any, folder: Path, trust_remote_code: bool) -> None:
    """Read generation_config.json, as `from_pretrained` does."""
    if model.can_generate() and hasattr(model, "adjust_generation_fn"):
        model.adjust_generation_fn(
            None, False, None, str(folder), cache_dir=None, force_download=False, proxies=None, token=None,
            revision="main", subfolder="", trust_remote_code=trust_remote_code, local_files_only=True,
        )  # fmt: skip
