"""Models of transformers that were cut: saved by `save_pretrained`, loaded by `from_pretrained`.

transformers lets a package take part in both through its registry of quantizers. When a model is saved, the quantizer
compares it with what its config builds, and puts the difference into config.json. When it is loaded, the quantizer
gives the empty model these shapes before the weights are read. Imports transformers: `registry` imports this module.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from graphcomp.errors import CheckpointError, first_line
from graphcomp.hf.integers import facts_of, plain_state, put_parts, take_parts
from graphcomp.hf.registry import METHOD
from graphcomp.hf.section import Section, damaged
from graphcomp.native.integers import put_floats
from graphcomp.native.vocabulary import Trimmed
from graphcomp.quantization.quantized_tensor import QuantizedTensor
from graphcomp.system.listeners import Remade
from graphcomp.system.threads import one_at_a_time
from graphcomp.system.version import package_version
from graphcomp.torch_compat import non_persistent

log = logging.getLogger("graphcomp.hf")


class CutConfig(QuantizationConfigMixin):
    """graphcomp's section in config.json; in transformers' words a quantization config.

    Raises:
        CheckpointError: the section is damaged, or of a newer version.
    """

    def __init__(self, quant_method: str = METHOD, **entries: Any) -> None:
        self.quant_method: Any = quant_method
        self.section = Section.of(entries)

    @staticmethod
    def holding(section: Section) -> CutConfig:
        """Return the config of a section."""
        return CutConfig(**section.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return {"quant_method": self.quant_method, **self.section.to_dict()}

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry, as of the dictionary that transformers reads from config.json."""
        return self.to_dict().get(key, default)


class CutModel(HfQuantizer, Remade):
    """Take part where transformers saves and loads a model that was cut. Weights are floats, and may be trained."""

    requires_calibration = False

    def __init__(self, quantization_config: CutConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.foreign = False
        self.locate: Callable[[str], str | None] | None = None  # while a model is loaded
        self.notes: tuple[str, ...] = ()

    @property
    def section(self) -> Section:
        """What the model was loaded by, or last saved with."""
        assert isinstance(self.quantization_config, CutConfig)
        return self.quantization_config.section

    # -------------------------------------------------------------------------------------------- loading
    def validate_environment(self, *args: Any, **options: Any) -> None:
        """Refuse the section as an argument: it describes a folder.

        Raises:
            CheckpointError: the folder has no section.
        """
        if not self.pre_quantized:
            raise CheckpointError(
                "graphcomp's section cannot be given to from_pretrained: it belongs into the folder's config.json",
                fix="graphcomp.compress(model, …) cuts a model",
            )
        places = options.get("device_map")
        offloaded = [name for name, place in places.items() if place == "disk"] if isinstance(places, dict) else []
        if offloaded and self.section.integers:
            raise CheckpointError(
                f"device_map puts {offloaded[0]!r} on the disk, and weights of integers stay in memory",
                why="a weight stands in the folder in parts, which are not read one by one while the model runs",
                fix='device_map="cpu": weights of integers take a fraction of the memory of floats',
            )

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Put the floats that integers stand for in the place of weights of integers; shapes stay as cut, so that the
        model has a section still."""
        put_floats(model, dtype)
        return model

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        from graphcomp.hf.skeleton import resize

        section, own = self.section, architecture(model)
        self.foreign = own != section.architecture
        self.locate = _names_in(model, section) if self.foreign else str
        used = resize(model, section, self.locate) + sum(self.locate(name) is not None for name in section.integers)
        if self.foreign and not used and not section.plain:
            raise CheckpointError(
                f"the folder holds a {section.architecture}, of which no cut part has a name in {own}",
                fix=f"transformers.{section.architecture}.from_pretrained(folder)",
            )
        _check_files(model, section, checkpoint_files or (), self.foreign)
        put_parts(model, section.integers, self.locate)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        self._check_loaded(model)
        take_parts(model, self.section.integers, self.locate or str)
        self.locate = None
        for module in model.modules():  # weights are floats: transformers forbids training where this is set
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        vars(model)["is_quantized"] = False
        vars(model).pop("quantization_method", None)
        for inner in _inner(model):
            vars(inner)["hf_quantizer"] = _quantizer(replace(self.section, architecture=architecture(inner)))

    def _check_loaded(self, model: PreTrainedModel) -> None:
        """Raise where transformers filled up tensors that the folder lacks with random numbers.

        Of a class that is not the one saved, tensors that were cut must be there; a head of its own may be new.
        """
        if self.foreign:
            locate = _names_in(model, self.section)
            wanted = {locate(name) for name in self.section.shapes}
        else:
            wanted = set(model.state_dict(keep_vars=True))
        held = model.state_dict(keep_vars=True)
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
        for name in sorted(name for name in wanted if name in held and name not in tied):
            tensor = held[name]
            lost = isinstance(tensor, Tensor) and not tensor.is_meta and not vars(tensor).get("_is_hf_initialized")
            if lost and not any(pattern.search(name) for pattern in ignored):
                raise CheckpointError(
                    f"the folder lacks the tensor {name!r}",
                    why="transformers would fill it with random numbers",
                    fix="copy the folder again, or save the model again",
                )

    # -------------------------------------------------------------------------------------------- saving
    def is_serializable(self) -> bool:
        """Yes: plain safetensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model may be trained: its weights are floats."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model, as any model in floats."""
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Any, dict[str, str]]:
        """Bring the section up to date with the model that is being saved, before its config is written.

        A model card and the files of the tokenizer go into the folder where it has none.

        Returns:
            The `state_dict` that `save_pretrained` was given, and no metadata.

        Raises:
            CheckpointError: the section cannot describe the model; nothing is written.
        """
        from graphcomp.hf.card import complete

        given = _arguments_of("save_pretrained", sys._getframe(1))
        if not getattr(model, "_hf_peft_config_loaded", False):  # else adapters alone are saved
            section = self.refresh(model)
            if given.get("save_directory") is not None and given.get("is_main_process", True):
                complete(Path(given["save_directory"]), model.config, section, self.notes)
        state = given.get("state_dict")
        return plain_state(model, state) if self.section.integers else state, {}

    def refresh(self, model: PreTrainedModel) -> Section:
        """Compare the model with what its config builds; put the difference into the config.

        Raises:
            CheckpointError: the section cannot describe the model.
        """
        section = replace(described(model), figures=self.section.figures)
        self.quantization_config = CutConfig.holding(section)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("quantization_config", None)  # of a part that was saved alone
        if not section.plain:
            model.config.quantization_config = self.quantization_config
        return section


def _arguments_of(method: str, frame: FrameType) -> Mapping[str, Any]:
    """Return the arguments of a method that transformers hands on to no quantizer; {} of another caller."""
    return frame.f_locals if frame.f_code.co_name == method else {}


# ------------------------------------------------------------------------------------------------ another config
def with_section(get: Callable[..., Any]) -> Callable[..., Any]:
    """Return transformers' choice of a quantizer, made to see the section of the folder where `from_pretrained` was
    given a config of its own, which has none: weights would be random.

    Args:
        get: `get_hf_quantizer` of transformers, called by `from_pretrained`.
    """

    @functools.wraps(get)
    def get_hf_quantizer(config: Any, *args: Any, **options: Any) -> Any:
        given = _arguments_of("from_pretrained", sys._getframe(1))
        held = given.get("state_dict")
        if isinstance(held, Mapping) and any(isinstance(tensor, QuantizedTensor) for tensor in held.values()):
            raise CheckpointError(
                "from_pretrained was given a state_dict with weights of integers",
                why="transformers copies floats into a model, one by one",
                fix="save_pretrained(folder) and from_pretrained(folder); copy.deepcopy(model) copies a model",
            )
        if getattr(config, "quantization_config", None) is None and given.get("quantization_config") is None:
            section = _section_in(given.get("pretrained_model_name_or_path"), given.get("subfolder") or "")
            if section is not None:
                config.quantization_config = section
        return get(config, *args, **options)

    return get_hf_quantizer


def _section_in(folder: Any, inner: str) -> dict[str, Any] | None:
    """Return graphcomp's section of a local folder; None where it has none."""
    file = Path(folder) / inner / "config.json" if isinstance(folder, (str, Path)) and folder else None
    if file is None or not file.is_file():
        return None
    try:
        section = json.loads(file.read_text()).get("quantization_config")
    except (
        ValueError,
        AttributeError,
    ):  # the file says nothing of the folder, and transformers was not asked to read it
        return None
    return section if isinstance(section, dict) and section.get("quant_method") == METHOD else None


# ------------------------------------------------------------------------------------------------ describing
@one_at_a_time
def described(model: PreTrainedModel) -> Section:
    """Return how a model differs from what its config builds, proved on a second model built from the config.

    Raises:
        CheckpointError: the section cannot describe the model.
    """
    from graphcomp.hf.skeleton import cannot_be_written, difference, first_difference, resize

    graph = next((path for path, m in model.named_modules() if isinstance(m, fx.GraphModule)), None)
    if graph is not None:
        raise cannot_be_written(model, f"{graph!r} is a graph")
    _apart(model)
    section = difference(model, built(model))
    section = replace(section, architecture=architecture(model), version=package_version(), integers=facts_of(model))
    again = built(model)
    resize(again, Section.of(section.to_dict()))
    if odd := first_difference(model, again):
        raise cannot_be_written(model, odd)
    for name in section.stored:
        owner, _, last = name.rpartition(".")
        non_persistent(model.get_submodule(owner)).discard(last)
    return section


def built(model: PreTrainedModel, config: Any = None) -> PreTrainedModel:
    """Return what the model's class builds from its config, or from another one, on the meta device.

    Raises:
        CheckpointError: the constructor refuses.
    """
    own = copy.deepcopy(model.config if config is None else config)
    vars(own).pop("quantization_config", None)
    try:
        with torch.device("meta"):
            build: Callable[[Any], PreTrainedModel] = _class(model)._from_config
            return build(own)
    except Exception as error:  # of the user's code: a constructor may refuse a config in any way
        from graphcomp.hf.skeleton import cannot_be_written

        raise cannot_be_written(
            model, f"its class cannot be built from its config: {type(error).__name__}: {first_line(error)}"
        ) from error


def architecture(model: PreTrainedModel) -> str:
    """Return the name of the model's class, as transformers writes it into config.json."""
    return _class(model).__name__


def _class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the model's class: FSDP puts one of its own in front."""
    kinds = [kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP")]
    return kinds[0]


def _apart(model: nn.Module) -> None:
    """Let id maps of a trimmed vocabulary share no memory: transformers writes tied parameters alone."""
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, Trimmed):
            continue
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.data_ptr() in seen:
                module.register_buffer(name, buffer.clone())
            seen.add(buffer.data_ptr())


def _names_in(model: PreTrainedModel, section: Section) -> Callable[[str], str | None]:
    """Return a function from names of the class that was saved to names of another class with the same base model."""
    prefix = f"{model.base_model_prefix}."
    present = {*dict(model.named_modules()), *model.state_dict(), *dict(model.named_buffers())}
    named = (*section.shapes, *section.integers, *section.without, *section.trimmed)
    entries = (*named, *(path for path, _ in section.attributes))
    nested = any(name.startswith(prefix) for name in entries)
    holds = hasattr(model, model.base_model_prefix)

    def locate(name: str) -> str | None:
        inside = name.removeprefix(prefix)
        if nested:
            wanted = (name if holds else inside) if name.startswith(prefix) else None
        else:
            wanted = prefix + name if holds else name
        return wanted if wanted in present else None

    return locate


def _check_files(model: nn.Module, section: Section, files: Sequence[str], foreign: bool) -> None:
    """Raise where a tensor in the folder has another shape than the section says, by the headers of the files."""
    if foreign or not all(str(file).endswith(".safetensors") for file in files):
        return
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in (set(opened.keys()) & set(section.shapes)) - set(section.integers):
                found = tuple(opened.get_slice(name).get_shape())
                if found != section.shapes[name]:
                    raise damaged(f"{name!r} is {found} in the folder and {section.shapes[name]} in the section")


# ------------------------------------------------------------------------------------------------ results
def attach(result: Any) -> None:
    """Let the transformers models in a result of compression be saved by `save_pretrained`.

    Args:
        result: a CompressedModel.
    """
    for model in result.module.modules():
        if isinstance(model, PreTrainedModel):
            before = getattr(model, "hf_quantizer", None)
            if before is not None and not isinstance(before, CutModel):
                continue  # quantized by another package, which writes the folder
            known = Section() if before is None else before.section
            own = model is result.module
            figures = _figures(result, known) if own else known.figures
            vars(model)["hf_quantizer"] = _quantizer(replace(known, architecture=architecture(model), figures=figures))
            vars(model)["hf_quantizer"].notes = tuple(getattr(result.report, "notes", ())) if own else ()


def _figures(result: Any, known: Section) -> dict[str, tuple[int, int]]:
    """Return the figures of a report; what was there before the first cut counts as before."""
    report = result.report.to_dict() if hasattr(result.report, "to_dict") else result.report
    figures = dict(known.figures)
    for name, entry in (("parameters", "params"), ("multiply_accumulates", "macs")):
        pair = report.get(entry) if isinstance(report, Mapping) else None
        if isinstance(pair, Mapping) and {"before", "after"} <= set(pair):
            first = figures.get(name, (int(pair["before"]), 0))[0]
            figures[name] = first, int(pair["after"])
    return figures


def _quantizer(section: Section) -> CutModel:
    return CutModel(CutConfig.holding(section), pre_quantized=True)


def _inner(model: nn.Module) -> Iterator[PreTrainedModel]:
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module is not model:
            yield module
