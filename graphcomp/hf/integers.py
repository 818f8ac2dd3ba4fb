"""Weights of integers in folders of transformers: tensors beside each weight, while it is saved or loaded.

`q_proj.weight` stands in a folder as `q_proj.weight_packed`, `q_proj.weight_scale` and so on. While a model is loaded,
these are buffers of the weight's module, and the weight itself is an empty tensor: code that initializes or ties
weights finds what it looks for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.checkpoint.integers import PARTS, Facts, put_together, taken_apart
from graphcomp.errors import CheckpointError
from graphcomp.hf.section import GUARD, damaged
from graphcomp.ir.module import tensor_names
from graphcomp.torch_compat import buffer_table, parameter_table

Locate = Callable[[str], str | None]

IGNORED = "_keys_to_ignore_on_load_missing"
"""Attribute of a model of transformers: patterns of names that a folder may lack."""


def facts_of(model: nn.Module) -> dict[str, Facts]:
    """Return what there is to know of each weight of integers, dtypes and shapes of its parts included."""
    plain, facts = taken_apart(tensor_names(model))
    found = {name: {**own, "parts": _kinds(name, plain)} for name, own in facts.items()}
    if found:
        found[_guarded(model, found)]["parts"][GUARD] = ["float32", [0]]
    return found


def _guarded(model: nn.Module, facts: Mapping[str, Facts]) -> str:
    """Return the weight that has a guard: of a linear layer, which nothing but loading looks at, if there is one."""
    plain = [n for n, own in facts.items() if len(own["names"]) == 1 and type(_owner(model, n)[0]) is nn.Linear]
    return next(iter(plain or facts), "")


def _kinds(name: str, plain: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    parts = {part: plain[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in plain}
    return {part: [str(t.dtype).removeprefix("torch."), list(t.shape)] for part, t in parts.items()}


def plain_state(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the `state_dict` of a model with the parts of each weight in its place."""
    held = model.state_dict(keep_vars=True) if given is None else given
    plain, facts = taken_apart(held)
    for name in facts:
        for part in PARTS:
            if (tensor := plain.pop(f"{name}.{part}", None)) is not None:
                plain[f"{name}_{part}"] = tensor
    if facts:
        plain[_guarded(model, facts)] = torch.empty(0)
    return {name: t.detach() if isinstance(t, Tensor) else t for name, t in plain.items()}


def put_parts(model: nn.Module, integers: Mapping[str, Facts], locate: Locate) -> None:
    """Put empty parts beside each weight of integers.

    Args:
        model: on the meta device.
        locate: from a name in the section to the name in `model`, None for what `model` does not have.

    Raises:
        CheckpointError: a name that the model does not have.
    """
    lacking = []
    for own in integers.values():
        for k, name in enumerate(_placed(own, locate)):
            module, last = _owner(model, name)
            if last not in parameter_table(module):
                raise damaged(f"{type(model).__name__} has no parameter {name!r:.80}")
            lacking.append(rf"^{re.escape(name)}$")
            for part, (dtype, shape) in own["parts"].items() if k == 0 else ():
                empty = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
                if part == GUARD:
                    old = module.get_parameter(last)
                    parameter_table(module)[last] = nn.Parameter(empty.to(old.dtype), requires_grad=False)
                else:
                    module.register_buffer(f"{last}_{part}", empty)
    if lacking:
        vars(model)[IGNORED] = [*(getattr(model, IGNORED, None) or ()), *lacking]


def take_parts(model: nn.Module, integers: Mapping[str, Facts], locate: Locate) -> None:
    """Put a weight of integers in the place of each empty one, and take its parts away.

    Raises:
        CheckpointError: the parts do not fit what the section says.
    """
    for name, own in integers.items():
        placed = _placed(own, locate)
        if not placed:
            continue
        module, last = _owner(model, placed[0])
        buffers = buffer_table(module)
        parts = {f"{name}.{part}": buffers.pop(f"{last}_{part}") for part in own["parts"] if part != GUARD}
        facts = {key: value for key, value in own.items() if key != "parts"}
        tensors = {key: tensor for key, tensor in parts.items() if tensor is not None}
        weight = put_together(tensors, {name: {**facts, "names": [name]}})[name]
        empty_one = parameter_table(module)[last]
        if empty_one is not None and empty_one.dtype is not weight.dtype:
            weight = nn.Parameter(weight.to(empty_one.dtype), requires_grad=False)
        for each in placed:
            module, last = _owner(model, each)
            parameter_table(module)[last] = weight  # type: ignore[assignment]  # put_together makes parameters
    if integers:
        vars(model).pop(IGNORED, None)


def _placed(own: Facts, locate: Locate) -> list[str]:
    """Return the names of a weight in the model at hand."""
    return [found for name in own["names"] if (found := locate(name)) is not None]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, last = name.rpartition(".")
    try:
        return model.get_submodule(owner), last
    except AttributeError as error:
        raise no_module(model, owner) from error


def no_module(model: nn.Module, path: str) -> CheckpointError:
    """Return the error of a section that names a module which the config does not build."""
    names = path.split(".")
    for k, name in enumerate(names):
        held = model.get_submodule(".".join(names[:k])) if ".".join(names[:k]) in dict(model.named_modules()) else None
        if isinstance(held, nn.ModuleList) and name.isdigit() and int(name) >= len(held):
            return CheckpointError(
                f"the config builds {len(held)} modules in {'.'.join(names[:k])!r}, and the folder holds more",
                why=f"{path!r:.80} has no place in the model",
                fix="from_pretrained(folder) without another number of layers; graphcomp.drop_blocks leaves layers out",
            )
    return damaged(f"{type(model).__name__} has no module {path!r:.80}")
