"""Weights of integers in files: parts, tied names, and facts that do not fit."""

import copy

import pytest
import torch
from torch import nn

import graphcomp as gc
from graphcomp.checkpoint.integers import are_facts, put_together, taken_apart
from graphcomp.quantization.operand import Operand
from graphcomp.quantization.quantized_tensor import QuantizedTensor
from graphcomp.quantization.stored import Affine


def weight(bits=4, size=0, operand=None, dtype=torch.bfloat16):
    high = 2 ** (bits - 1) - 1
    codes = torch.randint(-high, high + 1, (6, 8), dtype=torch.int8)
    groups = torch.arange(8) // size if size else None
    scale = torch.rand(6, -(-8 // size)) if size else torch.rand(6)
    stored = Affine(codes, scale, torch.zeros_like(scale, dtype=torch.int32), -high, high, 0, groups)
    return nn.Parameter(QuantizedTensor(stored, dtype, operand), requires_grad=False)


@pytest.mark.parametrize(
    "made",
    [weight(), weight(8), weight(4, 3), weight(3, 8, Operand(True)), weight(8, 0, Operand(levels=(0.1, 3, 0, 255)))],
)
def test_what_is_taken_apart_is_put_together(made):
    plain, facts = taken_apart({"a.weight": made, "b.weight": made, "bias": torch.ones(2)})
    assert not any(isinstance(tensor, QuantizedTensor) for tensor in plain.values())
    assert facts["a.weight"]["names"] == ["a.weight", "b.weight"] and all(map(are_facts, facts.values()))
    found = put_together(plain, facts)
    assert found.keys() == {"a.weight", "b.weight", "bias"} and found["a.weight"] is found["b.weight"]
    again = found["a.weight"]
    assert isinstance(again, nn.Parameter) and isinstance(again, QuantizedTensor)
    assert torch.equal(again.codes, made.codes) and torch.equal(again.dequantize(), made.dequantize())
    assert (again.operand, again.dtype, again.limits) == (made.operand, made.dtype, made.limits)


def broken():
    plain, facts = taken_apart({"w": weight(4, 3)})
    own = facts["w"]
    levels = {"per_token": False, "levels": [0.1, 3, 0, 256]}
    for name, value in {
        "shape": [6, 9], "dtype": "int8", "axis": 2, "limits": [7, -7], "operand": levels, "names": ["w", "bias"],
    }.items():  # fmt: skip
        yield name, {**plain, "bias": torch.ones(1)}, {"w": {**own, name: value}}
    for part, tensor in {
        "packed": torch.zeros(3, dtype=torch.uint8), "scale": torch.ones(6), "zero_point": torch.zeros(2),
        "groups": torch.full((8,), 5),
    }.items():  # fmt: skip
        yield part, {**plain, f"w.{part}": tensor}, facts
    yield "missing", {name: t for name, t in plain.items() if name != "w.scale"}, facts


@pytest.mark.parametrize(("what", "plain", "facts"), list(broken()), ids=lambda value: str(value)[:10])
def test_parts_that_do_not_fit_are_refused(what, plain, facts):
    with pytest.raises(gc.CheckpointError, match=r"weight 'w'"):
        put_together(copy.copy(plain), facts)


@pytest.mark.parametrize(
    "change",
    [
        {"names": "w"}, {"names": [1]}, {"shape": 5}, {"shape": [-1]}, {"shape": [2.0]}, {"dtype": "eval"},
        {"dtype": []},
        {"axis": "0"}, {"limits": None}, {"limits": [1]}, {"limits": [1, 2**40]}, {"operand": {}}, {"operand": 1},
        {"more": 1},
    ],
)  # fmt: skip
def test_a_document_must_hold_facts(change):
    _, facts = taken_apart({"w": weight()})
    assert are_facts(facts["w"]) and not are_facts({**facts["w"], **change}) and not are_facts(None)
