"""Paths that the example inputs did not take: named in the report, and warned of when a call takes them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphcomp as gc

AS_CUT = ("not repaired: no calibration= was given",)
"""The notes of a cut about which there is nothing else to say."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.most = nn.Linear(8, 16), nn.Linear(16, 4), 8

    def forward(self, x, *more, **named):
        y = self.a(x).relu()
        return self.b(y.flip(-1) if self.other(x, *more, **named) else y)

    def other(self, x) -> bool:
        return False


class Batch(Net):
    def other(self, x):
        return x.shape[0] > self.most


class Length(Net):
    def other(self, x):
        return x.size(1) * x.dim() >= 20


class Even(Net):
    def other(self, x):
        batch, *_ = x.size()
        return not batch % 2


class Counted(Net):
    def other(self, x):
        return len(x) > 8


class Inner(Net):
    """Compares a size that is no input's."""

    def other(self, x):
        y = torch.cat([x, x], 1)
        return y.shape[1] / 2 > 7


class Value(Net):
    def other(self, x):
        return x.sum() < 0


class Flag(Net):
    def other(self, x, flip=False):
        return flip


class Count(Net):
    def other(self, x):
        return x.sum().item() < 0


def compress(model: nn.Module, inputs: Any, **options: Any) -> gc.CompressedModel:
    return gc.compress(model.eval(), inputs, progress=False, **options)


LONG = torch.rand(4, 10, 8)
SHORT = torch.rand(4, 6, 8)
OTHERS: dict[type[Net], tuple[Any, Any]] = {
    Batch: (torch.rand(4, 8), torch.rand(16, 8)),
    Length: (SHORT, LONG),
    Even: (torch.rand(3, 8), torch.rand(4, 8)),
    Counted: (torch.rand(4, 8), torch.rand(16, 8)),
    Inner: (SHORT, LONG),
    Value: (torch.rand(4, 8), -torch.rand(4, 8)),
    Flag: ((torch.rand(4, 8), False), (torch.rand(4, 8), True)),
}


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Returns what graphcomp warned of since it was called last."""

    def new() -> list[str]:
        records = [r for r in caplog.records if r.name.startswith("graphcomp") and r.levelno >= logging.WARNING]
        messages = [r.getMessage() for r in records]
        caplog.clear()
        return messages

    return new


def call(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_call_that_takes_another_path_is_warned_of_once(kind: type[Net], warned: Callable[[], list[str]]) -> None:
    example, other = OTHERS[kind]
    small = compress(kind(), example)
    assert small.form == "native"
    call(small, example)
    assert warned() == []
    call(small, other)
    call(small, other)
    (message,) = warned()
    assert "off the path that the example inputs took" in message


@pytest.mark.parametrize("kind", [k for k in OTHERS if k is not Flag])
def test_the_report_names_the_branch(kind: type[Net]) -> None:
    (note,) = (n for n in compress(kind(), OTHERS[kind][0]).report.notes if "not seen" in n)
    assert "test_path.py" in note and ("values" if kind is Value else "sizes") in note


def test_numbers_that_are_read_are_named() -> None:
    notes = compress(Count(), torch.rand(4, 8)).report.notes
    assert any("other values that are read" in note and "x.sum().item()" in note for note in notes)


@pytest.mark.parametrize("kind", [Batch, Even])
def test_a_graph_warns_too(kind: type[Net], warned: Callable[[], list[str]]) -> None:
    example, other = OTHERS[kind]
    small = compress(kind(), example, bits=8)
    small(example)
    assert warned() == []
    small(other)
    small(other)
    (message,) = warned()
    assert "x.shape[0]" in message and "does not hold" in message


def test_other_sizes_on_the_same_path_are_no_matter(warned: Callable[[], list[str]]) -> None:
    small = compress(Batch(), torch.rand(4, 8))
    small(torch.rand(7, 8))
    small(torch.rand(1, 8))
    assert warned() == []
    assert compress(Net(), torch.rand(4, 8)).report.notes == AS_CUT


def test_assertions_are_no_branches() -> None:
    class Strict(Net):
        def other(self, x):
            assert x.shape[1] == 8
            if x.shape[-1] > 8:
                raise ValueError("too wide")
            return False

    assert compress(Strict(), torch.rand(4, 8)).report.notes == AS_CUT


def test_a_scope_is_watched_by_the_inputs_of_the_whole(warned: Callable[[], list[str]]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Batch()).eval()
    small = compress(model, torch.rand(4, 8), scope="1")
    assert sum("not seen" in note for note in small.report.notes) == 1
    small(torch.rand(16, 8))
    assert len(warned()) == 1


def test_sizes_stay_plain_for_the_user() -> None:
    class Returns(Batch):
        def forward(self, x):
            return super().forward(x), x.shape[0]

    small = compress(Returns(), torch.rand(4, 8))
    assert type(small(torch.rand(5, 8))[1]) is int


def test_many_branches_are_one_note() -> None:
    class Many(Net):
        def other(self, x):
            first = x.shape[0] > 100
            second = x.shape[0] > 200
            third = x.shape[1] > 300
            return first or second or third

    *others, note = compress(Many(), torch.rand(4, 8)).report.notes
    assert tuple(others) == AS_CUT
    assert note.startswith("3 paths were not seen, by conditions on sizes at test_path.py:") and note.count(",") == 3


@pytest.mark.parametrize("bits", [None, 8])
def test_a_model_that_compares_sizes_is_exported_with_an_open_batch(bits: int | None, tmp_path: Path) -> None:
    small = compress(Batch(), torch.rand(4, 8), bits=bits)
    small.export(tmp_path / "small.pt2")
    program = torch.export.load(tmp_path / "small.pt2").module()
    for batch in (2, 7):
        x = torch.rand(batch, 8)
        assert torch.allclose(program(x), small(x), atol=1e-6)
    (place,) = gc.analyze(small, torch.rand(4, 8)).captured.module.graph.find_nodes(op="placeholder")
    assert type(place.meta["val"].shape[0]) is torch.SymInt


class Optional(Net):
    def forward(self, x, flip=False, extra=None):
        y = self.a(x).relu()
        return self.b(y.flip(-1) if flip or extra is not None else y)


@pytest.mark.parametrize(
    ("named", "said"),
    [({"flip": True}, "flip is True, and was False"), ({"extra": torch.ones(1)}, "extra is a tensor, and was None")],
)
def test_an_argument_that_the_example_left_at_its_default_is_warned_of(named, said, caplog):
    small = compress(Optional(), torch.randn(2, 8))
    with caplog.at_level(logging.WARNING, "graphcomp"):
        small(torch.randn(3, 8), flip=False)
        assert "off the path" not in caplog.text
        small(torch.randn(3, 8), **named)
    assert said in caplog.text
