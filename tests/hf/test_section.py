"""graphcomp's section in config.json, read as if a stranger had written it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from graphcomp.errors import CheckpointError
from graphcomp.hf.section import FORMAT, Section
from graphcomp.hf.skeleton import difference, first_difference, resize


class Part(nn.Module):
    """Two layers, a list, a table that is recomputed, and attributes."""

    def __init__(self, hidden: int = 6, parts: int = 2, pool: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, hidden, bias=bias), nn.Linear(hidden, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(parts))
        self.pool = nn.Linear(4, 4) if pool else None
        self.heads, self.sizes, self.flag, self.name = hidden // 2, (hidden, 1), True, "x"
        self.register_buffer("table", torch.arange(hidden), persistent=False)
        self.tied = nn.Linear(hidden, 4)
        self.tied.weight = self.down.weight


def meta(**options: Any) -> Part:
    with torch.device("meta"):
        return Part(**options)


def written(section: Section) -> Section:
    return Section.of(json.loads(json.dumps(section.to_dict())))


@pytest.mark.parametrize(
    "options", [{"hidden": 4}, {"parts": 1}, {"pool": False}, {"bias": False}, {"hidden": 2, "parts": 1, "pool": False}]
)
def test_the_difference_makes_the_one_the_other(options):
    model, built, again = Part(**options), meta(), meta()
    section = difference(model, built)
    assert not section.plain and first_difference(model, built) == ""
    resize(again, written(section))
    assert first_difference(model, again) == ""
    assert again.tied.weight is again.down.weight and again.up.weight.is_meta
    assert again.down.in_features == model.down.in_features and again.heads == model.heads
    assert ("table" in again.state_dict()) is ("hidden" in options)
    assert type(again.sizes) is tuple


def test_models_that_are_alike_have_a_plain_section():
    section = difference(Part(), meta())
    assert section.plain and written(section) == section


def test_what_a_section_cannot_hold_is_refused():
    model = Part()
    model.more = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="builds no module 'more'"):
        difference(model, meta())
    model = Part()
    model.pool = nn.Bilinear(4, 4, 4)
    with pytest.raises(CheckpointError, match="a Linear at 'pool', and the model has a Bilinear"):
        difference(model, meta())
    with pytest.raises(CheckpointError, match="larger than"):
        difference(Part(hidden=8), meta())
    model = Part()
    model.up.weight = nn.Parameter(torch.ones(6))
    with pytest.raises(CheckpointError, match=r"'up.weight' has 1 dims"):
        difference(model, meta())
    model = Part()
    model.register_buffer("new", torch.ones(2))
    with pytest.raises(CheckpointError, match="no tensor 'new'"):
        difference(model, meta())
    model = Part()
    del model.pool
    with pytest.raises(CheckpointError, match="a module 'pool', which the model has not"):
        difference(model, meta())


GOOD = Section(shapes={"up.weight": (4, 4)}, attributes={("", "heads"): 2}).to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"format": "1"}, {"format": 0}, {"format": True}, {"format": None}, {"shapes": []},
        {"shapes": {"up.weight": 4}},
        {"shapes": {"up.weight": "4x-4"}}, {"shapes": {"up.weight": "9" * 30}}, {"shapes": {"up.weight": [4, 4]}},
        {"shapes": {"up.weight": "x".join("1" * 20)}}, {"attributes": {"heads": 2}}, {"attributes": {":heads": "2"}},
        {"attributes": {":heads": 2.5}}, {"attributes": {":heads": True}}, {"attributes": {":heads": [2, "x"]}},
        {"attributes": {":__class__": 2}}, {"attributes": {":a b": 2}}, {"attributes": {":heads": 2**70}},
        {"attributes": None}, {"without": "pool"}, {"without": [3]}, {"stored": {}}, {"trimmed": []},
        {"trimmed": {"up": 3}}, {"figures": {"parameters": [1]}}, {"figures": {"parameters": ["a", "b"]}},
        {"architecture": 3}, {"graphcomp": None}, {"more": 1},
    ],
)  # fmt: skip
def test_a_damaged_section_is_refused(change):
    with pytest.raises(CheckpointError, match="damaged"):
        Section.of({**GOOD, **change})


def test_an_entry_that_is_missing_and_a_newer_format():
    assert Section.of(GOOD).shapes == {"up.weight": (4, 4)}
    for name in GOOD:
        with pytest.raises(CheckpointError, match="damaged"):
            Section.of({key: value for key, value in GOOD.items() if key != name})
    with pytest.raises(CheckpointError, match="pip install --upgrade"):
        Section.of({**GOOD, "format": FORMAT + 1})


@pytest.mark.parametrize(
    ("section", "why"),
    [
        (Section(shapes={"gone.weight": (4, 4)}), "no module 'gone'"),
        (Section(shapes={"up.gone": (4, 4)}), "no tensor 'up.gone'"),
        (Section(shapes={"up": (4, 4)}), "no tensor 'up'"),
        (Section(shapes={"up.weight": (7, 4)}), "no dim longer"),
        (Section(shapes={"up.weight": (4,)}), "no dim longer"),
        (Section(attributes={("", "gone"): 2}), "no attribute of ints"),
        (Section(attributes={("", "flag"): 2}), "no attribute of ints"),
        (Section(attributes={("", "name"): 2}), "no attribute of ints"),
        (Section(attributes={("", "forward"): 2}), "no attribute of ints"),
        (Section(attributes={("", "_parameters"): 2}), "no attribute of ints"),
        (Section(attributes={("", "heads"): 10**9}), "at most"),
        (Section(without=("gone",)), "no module 'gone'"),
        (Section(without=("",)), "the whole model"),
        (Section(trimmed={"up": "TrimmedEmbedding"}), "no 'TrimmedEmbedding' can take the place"),
        (Section(trimmed={"up": "system"}), "no 'system' can take the place"),
    ],
)
def test_a_section_that_does_not_fit_the_model_is_refused(section, why):
    with pytest.raises(CheckpointError, match=why):
        resize(meta(), written(section))
