"""QuantSpec and QuantConfig: what they refuse, and what each field changes."""

from __future__ import annotations

import dataclasses

import pytest

from graphcomp.errors import PlanError
from graphcomp.quantization.spec import ACTIVATIONS, WEIGHTS, QuantConfig, QuantSpec, check_bits, matches, with_bits


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 32, 8.0, True, "8", None])
def test_bits_out_of_range(bits: object) -> None:
    with pytest.raises(PlanError, match="2 to 16"):
        QuantSpec(bits)
    with pytest.raises(PlanError):
        check_bits(bits)
    with pytest.raises(PlanError):
        with_bits(WEIGHTS, bits)


@pytest.mark.parametrize("bits", range(2, 17))
def test_codes(bits: int) -> None:
    symmetric, affine = QuantSpec(bits), QuantSpec(bits, symmetric=False)
    assert (symmetric.quant_min, symmetric.quant_max) == (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
    assert (affine.quant_min, affine.quant_max) == (0, 2**bits - 1)


@pytest.mark.parametrize(
    ("granularity", "size"),
    [("tensor", 32), ("channel", 32), ("group", 0), ("group", -1), ("tensor", 1), ("tensor", -1)],
)
def test_group_size_belongs_to_groups(granularity: str, size: int) -> None:
    with pytest.raises(PlanError, match="group_size"):
        QuantSpec(granularity=granularity, group_size=size)


@pytest.mark.parametrize(
    "changed",
    [{"symmetric": False}, {"granularity": "channel"}, {"granularity": "group", "group_size": 4}],
)
def test_geta_is_symmetric_and_per_tensor(changed: dict) -> None:
    with pytest.raises(PlanError, match="GETA"):
        QuantSpec(kind="geta", **changed)


def test_only_geta_learns_an_exponent() -> None:
    with pytest.raises(PlanError, match="learn_exponent"):
        QuantSpec(learn_exponent=True)
    assert QuantSpec(kind="geta", learn_exponent=True) != QuantSpec(kind="geta")


@pytest.mark.parametrize(
    ("field", "value", "near"),
    [
        ("granularity", "chanel", "channel"),
        ("kind", "Geta", "geta"),
        ("observer", "min_max", "minmax"),
        ("observer", "??", "percentile"),
    ],
)
def test_unknown_words(field: str, value: str, near: str) -> None:
    with pytest.raises(PlanError, match=near):
        QuantSpec(**{field: value})


def test_specs_are_values() -> None:
    assert QuantSpec(4) == QuantSpec(4) and len({QuantSpec(4), QuantSpec(4)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        WEIGHTS.bits = 4
    assert with_bits(WEIGHTS, 4) == QuantSpec(4, granularity="channel")
    assert with_bits(None, 4) is None


def test_the_last_override_that_matches_counts() -> None:
    four = QuantSpec(4)
    config = QuantConfig(overrides={"head": (None, None), "re:attn$": (four, None), "head.attn": (four, four)})
    assert config.specs("body.0") == (WEIGHTS, ACTIVATIONS)
    assert config.specs("head") == config.specs("head.out") == (None, None)
    assert config.specs("body.1.attn") == (four, None)
    assert config.specs("head.attn") == config.specs("head.attn.q") == (four, four)
    assert config.specs("header") == (WEIGHTS, ACTIVATIONS)


def test_names_match_whole_steps() -> None:
    assert matches("layers.1", "layers.1") and matches("layers.1", "layers.1.fc")
    assert not matches("layers.1", "layers.10") and not matches("layers.1.fc", "layers.1")
    assert matches("re:fc$", "layers.10.fc") and not matches("re:fc$", "fc.weight")
