"""Entries of a config, found by the constructor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from graphcomp.native.config import (
    ConfigEdit,
    as_read,
    config_edits,
    config_of,
    edited,
    entry_of,
    follow_config,
    partial_edits,
    shapes_of,
)


class Config:
    """Of a small transformer; `size` and `stale` build nothing."""

    def __init__(self, part: Any = None, **entries: Any) -> None:
        self.width, self.heads, self.keys, self.inner, self.size, self.stale = 8, 4, 2, 12, 2, 12
        self.part = part
        vars(self).update(entries)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Model(nn.Module):
    """Projections and a gated feed-forward layer, fused."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.heads % config.keys:
            raise ValueError("heads by keys")
        self.config, self.groups = config, config.heads // config.keys
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.keys) * config.size)
        self.out = nn.Linear(config.heads * config.size, config.width)
        self.up = nn.Linear(config.width, 2 * config.inner)
        self.down = nn.Linear(config.inner, config.width)
        self.part = None if config.part is None else Model(config.part)


def edits(model: Model, **entries: Any) -> Any:
    return config_edits(model, shapes_of(Model(Config(**entries))))


@pytest.mark.parametrize(
    "entries",
    [
        {"inner": 7},
        {"heads": 2, "keys": 1},
        {"keys": 1},
        {"width": 6},
        {"heads": 2, "inner": 3},
        {"heads": 2, "width": 5},
    ],
)
def test_entries_that_build_the_shapes(entries):
    found = edits(Model(Config()), **entries)
    assert {edit.entry: edit.value for edit in found} == entries


def test_nothing_to_change_and_nothing_that_helps():
    model = Model(Config())
    assert config_edits(model, shapes_of(model)) == ()
    uneven = {**shapes_of(model), "down.weight": (8, 9)}
    assert config_edits(model, uneven) is None
    assert config_edits(model, {"other": (3,)}) is None
    assert config_edits(nn.Linear(2, 2), {"weight": (2, 2)}) is None and config_of(nn.Linear(2, 2)) is None


def test_a_config_in_a_config():
    found = edits(Model(Config(Config(inner=10))), part=Config(inner=4))
    assert found == (ConfigEdit("part", "inner", 4),) and str(found[0]) == "part.inner=4"


def test_the_size_of_a_head_becomes_an_entry():
    class Attention(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            self.q = nn.Linear(config.hidden_size, config.num_attention_heads * size)

    config = Config(hidden_size=12, num_attention_heads=4, heads=1, keys=1)
    found = config_edits(Attention(config), {"q.weight": (9, 12), "q.bias": (9,)})
    assert {edit.entry: edit.value for edit in found} == {"head_dim": 3, "num_attention_heads": 3}


def test_a_model_follows_its_config():
    model = Model(Config(Config()))
    before, shared = copy.deepcopy(model.config.to_dict()), model.config
    smaller = Model(Config(Config(inner=4), heads=4, keys=1))
    for name in ("qkv", "out", "up", "down"):
        setattr(model, name, getattr(smaller, name))
    model.part = smaller.part
    model.part.config = model.config.part
    found = config_edits(model, shapes_of(model))
    assert found is not None and model.groups == 2
    assert follow_config(model, edited(model.config, found))
    assert model.config is not shared and model.part.config is model.config.part
    assert (model.config.keys, model.config.part.inner, model.groups) == (1, 4, 4)
    assert shared.keys == before["keys"] and shared.part.inner == before["part"].inner
    assert not follow_config(model, Config(Config()))
    assert model.config.keys == 1 and torch.is_tensor(model.qkv.weight)


def with_inner(up: int, down: int) -> Model:
    """A model whose feed-forward layers are cut, and whose config does not say so."""
    model = Model(Config())
    model.up, model.down = nn.Linear(8, 2 * up), nn.Linear(down, 8)
    return model


def test_an_entry_is_taken_where_all_lengths_that_it_stands_for_are_so():
    assert partial_edits(with_inner(7, 7), 12, 7) == (ConfigEdit("", "inner", 7),)
    assert partial_edits(with_inner(9, 7), 12, 7) == ()  # another layer is cut to 9, and would be built with 7
    assert partial_edits(with_inner(12, 7), 12, 7) == ()
    assert partial_edits(Model(Config()), 12, 7) == ()
    cut_beside = with_inner(7, 7)
    cut_beside.out = nn.Linear(6, 8)
    assert partial_edits(cut_beside, 12, 7) == (ConfigEdit("", "inner", 7),)


def test_one_entry_that_is_the_length():
    shapes = shapes_of(Model(Config(width=5)))
    assert entry_of(Model(Config()), shapes) == ConfigEdit("", "width", 5)
    assert entry_of(Model(Config()), shapes_of(Model(Config()))) is None
    assert entry_of(Model(Config()), shapes_of(Model(Config(heads=2)))) is None


class Scaled(Model):
    """A model with a scale that no file holds, and a number of a module of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.register_buffer("scale", torch.tensor(config.width**0.5), persistent=False)


def test_a_reader_builds_what_no_file_holds_from_the_config():
    model = Scaled(Config())
    model.groups = 9
    model.config = Config(width=16)
    read = as_read(model)
    assert read is not None and read.qkv.weight is model.qkv.weight and read.groups == 9
    assert float(read.scale) == 4.0 and float(model.scale) < 3
    model.extra = nn.Linear(2, 2)
    assert as_read(model) is None
