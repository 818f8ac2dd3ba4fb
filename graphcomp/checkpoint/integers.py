"""Weights of integers in files: each `QuantizedTensor` taken apart into tensors and numbers, and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.ir.json_values import damaged
from graphcomp.quantization.held import Held
from graphcomp.quantization.operand import Operand
from graphcomp.quantization.quantized_tensor import QuantizedTensor

Facts = dict[str, Any]
"""Of one weight, as JSON has it: names, shape, dtype, axis, limits, operand."""

PARTS = ("packed", "scale", "zero_point", "groups")
"""Attributes of a `QuantizedTensor` that are tensors; "groups" is left out where there are none."""
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Name -> dtype that a weight of integers may show."""


def taken_apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Facts]]:
    """Return the tensors with the parts of each weight of integers in its place, named 'name.packed' and so on.

    Returns:
        Plain tensors; and name -> what else there is to know of each weight, tied weights once.
    """
    plain: dict[str, Tensor] = {}
    facts: dict[str, Facts] = {}
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, QuantizedTensor):
            plain[name] = tensor
        elif id(tensor) in first:
            facts[first[id(tensor)]]["names"].append(name)
        else:
            first[id(tensor)] = name
            facts[name] = {"names": [name], **_facts_of(tensor)}
            parts = {part: getattr(tensor, part) for part in PARTS}
            plain |= {f"{name}.{part}": own for part, own in parts.items() if own is not None}
    return plain, facts


def _facts_of(tensor: QuantizedTensor) -> Facts:
    operand = tensor.operand
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "axis": tensor.axis,
        "limits": list(tensor.limits),
        "operand": None if operand is None else {"per_token": operand.per_token, "levels": operand.levels},
    }


def put_together(tensors: Mapping[str, Tensor], facts: Mapping[str, Facts]) -> dict[str, Tensor]:
    """Return the tensors with each weight of integers under all of its names, as a parameter.

    Raises:
        CheckpointError: parts are missing, or do not fit what is known of the weight.
    """
    found = dict(tensors)
    for name, own in facts.items():
        parts = {part: found.pop(f"{name}.{part}", None) for part in PARTS}
        if any(parts[part] is None for part in PARTS[:3]):
            raise damaged(f"the weight '{name:.100}'", "a part of it is missing")
        try:
            weight = _made(own, *(parts[part] for part in PARTS))  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise damaged(f"the weight '{name:.100}'", f"{type(error).__name__}: {error}") from error
        if name in found or not own["names"] or any(other in found for other in own["names"]):
            raise damaged(f"the weight '{name:.100}' is there twice")
        found |= dict.fromkeys(own["names"], nn.Parameter(weight, requires_grad=False))
    return found


def _made(own: Facts, packed: Tensor, scale: Tensor, zero_point: Tensor, groups: Tensor | None) -> QuantizedTensor:
    """Return a weight of its parts.

    Raises:
        ValueError: the parts do not fit one another.
    """
    held = Held(packed, torch.Size(own["shape"]), scale, zero_point, groups, own["axis"], tuple(own["limits"]))
    held.check()
    return QuantizedTensor.around(held, DTYPES[own["dtype"]], _operand(own["operand"]))


def _operand(own: Any) -> Operand | None:
    if own is None:
        return None
    levels = own["levels"]
    if levels is None:
        return Operand(bool(own["per_token"]))
    scale, zero, low, high = levels
    if not 0 <= int(low) <= int(zero) <= int(high) <= 255 or not float(scale) > 0:
        raise ValueError(f"levels {levels} of an operand")
    return Operand(False, (float(scale), int(zero), int(low), int(high)))


def are_facts(value: Any) -> bool:
    """Return whether a value of JSON can be the facts of a weight."""
    keys = {"names", "shape", "dtype", "axis", "limits", "operand"}
    if not isinstance(value, dict) or value.keys() != keys:
        return False
    names, shape, limits, operand = (value[key] for key in ("names", "shape", "limits", "operand"))
    if not all(isinstance(each, list) for each in (names, shape, limits)) or len(limits) != 2:
        return False
    return (
        all(isinstance(name, str) for name in names)
        and all(type(n) is int and 0 <= n < 2**31 for n in shape)
        and all(type(n) is int and abs(n) < 2**31 for n in limits)
        and isinstance(value["dtype"], str)
        and value["dtype"] in DTYPES
        and (value["axis"] is None or type(value["axis"]) is int)
        and (operand is None or (isinstance(operand, dict) and operand.keys() == {"per_token", "levels"}))
    )
