"""Float forms of integer files, the line that says how fast a file is, and what a guard leaves in float.

Times are made up: each kind of layers takes as long as a test says, on integers and in float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("onnxruntime")

import onnx

import graphcomp as gc
from graphcomp.errors import ExportError
from graphcomp.quantization.lower import CLIPS
from graphcomp.targets import write
from graphcomp.targets.onnxruntime import speed
from graphcomp.targets.onnxruntime.floats import (
    DEPTHWISE,
    POINTWISE,
    PRODUCT,
    SPATIAL,
    WEIGHTS,
    described_layers,
    integer_layers,
    write_floats,
)
from graphcomp.targets.onnxruntime.kernels import prove
from graphcomp.targets.onnxruntime.speed import Speed, side_by_side
from graphcomp.targets.runtime import run


class Convnet(nn.Module):
    """(n, 3, 8, 8) -> (n, 5): convolutions of each kind, clips of each kind, a sum and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + F.hardtanh(self.deep(x), 0.0, 0.5)
        return self.head(F.relu6(self.point(x)).mean((2, 3)))


X = 4 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
KINDS = {SPATIAL, DEPTHWISE, POINTWISE, PRODUCT}


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return Convnet().eval()


def compressed(model: nn.Module | None = None, x: Tensor = X, **options: Any) -> gc.CompressedModel:
    return gc.compress(model or convnet(), x, progress=False, **{"sparsity": 0.0, "bits": 8, **options})


@pytest.fixture(scope="module")
def small() -> gc.CompressedModel:
    return compressed()


@pytest.fixture(scope="module")
def file(small: gc.CompressedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speed") / "m.onnx"
    small.export(path, measure=False)
    return path


def off(path: Path, model: nn.Module, x: Tensor = X) -> float:
    with torch.no_grad():
        wanted = model(x)
    return float((run(path, (x,))[0] - wanted).norm() / wanted.norm())


# ------------------------------------------------------------------------------------------------ float forms
@pytest.mark.slow
@pytest.mark.ci
def test_the_float_form_computes_what_the_model_computes_with_its_weights(
    small: gc.CompressedModel, file: Path, tmp_path: Path
) -> None:
    """Clips that quantization did the work of are there, far beyond the range that was calibrated, too."""
    clips = small.module.meta[CLIPS]
    assert {(0.0, 6.0), (0.0, 0.5)} == set(clips.values())
    write_floats(file, tmp_path / "f.onnx", clips=clips)
    proof = prove(tmp_path / "f.onnx")
    assert not proof.integer and sum(proof.float_.values()) == 4
    assert off(tmp_path / "f.onnx", convnet()) < 0.02
    assert off(tmp_path / "f.onnx", convnet(), 10 * X) < 0.02 < 0.1 < off(file, convnet(), 10 * X)


@pytest.mark.slow
@pytest.mark.ci
def test_where_clips_are_not_known_the_ends_of_the_ranges_stand_for_them(file: Path, tmp_path: Path) -> None:
    write_floats(file, tmp_path / "f.onnx")
    assert off(tmp_path / "f.onnx", convnet()) < 0.02
    saturated = run(file, (10 * X,))[0]
    assert torch.allclose(run(tmp_path / "f.onnx", (10 * X,))[0], saturated, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.slow
@pytest.mark.ci
def test_one_kind_of_layers_is_left_in_float(small: gc.CompressedModel, file: Path, tmp_path: Path, kind: str) -> None:
    layers = integer_layers(file)
    assert set(layers.values()) == KINDS
    write_floats(
        file, tmp_path / "f.onnx", [name for name, own in layers.items() if own == kind], small.module.meta[CLIPS]
    )
    proof = prove(tmp_path / "f.onnx")
    assert sum(proof.float_.values()) == 1
    assert sum(proof.integer[name] for name in ("QLinearConv", "QGemm") if name in proof.integer) == 3
    assert off(tmp_path / "f.onnx", convnet()) < 0.02


@pytest.mark.parametrize("activations", ["dynamic", "dynamic_per_token"])
@pytest.mark.slow
@pytest.mark.ci
def test_products_with_ranges_at_run_time_become_products_of_floats(tmp_path: Path, activations: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    x = torch.randn(3, 5, 8)
    compressed(model, x, activations=activations).export(tmp_path / "m.onnx", measure=False)
    assert list(integer_layers(tmp_path / "m.onnx").values()) == [PRODUCT, PRODUCT]
    write_floats(tmp_path / "m.onnx", tmp_path / "f.onnx")
    kinds = {node.op_type for node in onnx.load(tmp_path / "f.onnx").graph.node}
    assert not kinds & {"DynamicQuantizeLinear", "MatMulInteger", "Round", "ReduceMax"}
    assert off(tmp_path / "f.onnx", model, x) < 0.01
    names = list(integer_layers(tmp_path / "m.onnx"))
    write_floats(tmp_path / "m.onnx", tmp_path / "half.onnx", names[:1])
    assert len(integer_layers(tmp_path / "half.onnx")) == 1 and off(tmp_path / "half.onnx", model, x) < 0.02


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.slow
@pytest.mark.ci
def test_weights_in_groups_become_floats(tmp_path: Path, bits: int) -> None:
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)).eval(), torch.randn(3, 64)
    small = compressed(model, x, bits=bits, activation_bits=None, group_size=16)
    small.export(tmp_path / "m.onnx", measure=False)
    assert set(integer_layers(tmp_path / "m.onnx").values()) == {WEIGHTS}
    write_floats(tmp_path / "m.onnx", tmp_path / "f.onnx")
    assert not prove(tmp_path / "f.onnx").integer and not integer_layers(tmp_path / "f.onnx")
    assert torch.allclose(run(tmp_path / "f.onnx", (x,))[0], small(x), atol=1e-4)


@pytest.mark.slow
@pytest.mark.ci
def test_two_layers_may_read_one_weight_and_one_of_them_in_float(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model, x = Twice().eval(), torch.randn(3, 8)
    compressed(model, x).export(tmp_path / "m.onnx", measure=False)
    names = list(integer_layers(tmp_path / "m.onnx"))
    write_floats(tmp_path / "m.onnx", tmp_path / "f.onnx", names[1:])
    assert list(integer_layers(tmp_path / "f.onnx")) == names[:1] and off(tmp_path / "f.onnx", model, x) < 0.02


# ------------------------------------------------------------------------------------------------ made-up times
@dataclass
class Clock:
    """Times of files by the layers that they hold, in place of measured ones.

    Attributes:
        integer: kind -> milliseconds of each layer of the kind on integers; others take 1.
        floats: milliseconds of each layer in float.
        layers: how many there are.
    """

    integer: Mapping[str, float]
    floats: float = 1.5
    layers: int = 4
    asked: list[int] = field(default_factory=list)

    def __call__(self, files: Sequence[Path], args: Any, kwargs: Any = None, *, threads: int = 1) -> list[float]:
        self.asked.append(len(files))
        found = []
        for path in files:
            kinds = list(integer_layers(path).values())
            found.append(sum(self.integer.get(k, 1.0) for k in kinds) + self.floats * (self.layers - len(kinds)))
        return found


def clocked(monkeypatch: pytest.MonkeyPatch, integer: Mapping[str, float], **more: Any) -> Clock:
    clock = Clock(integer, **more)
    monkeypatch.setattr(speed, "side_by_side", clock)
    return clock


def test_the_line_says_layers_and_speed() -> None:
    found = Speed(53, 54, 10.0, 15.2)
    assert str(found) == "53 of 54 layers on integers, 1.52 x the float file (1 thread)"
    assert found.to_dict()["line"] == str(found) and found.to_dict()["ratio"] == pytest.approx(1.52)
    assert str(Speed(1, 2, 4.0, 2.0, threads=2)).endswith("0.50 x the float file (2 threads)")


@pytest.mark.slow
@pytest.mark.ci
def test_an_export_is_timed_beside_its_float_form(
    small: gc.CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked(monkeypatch, {})
    small.export(tmp_path / "m.onnx")
    line = "4 of 4 layers on integers, 1.50 x the float file (1 thread)"
    assert str(small.export_report.speed) == line and line in str(small.report)
    assert small.export_report.to_dict()["speed"]["line"] == line
    assert type(small.report).from_dict(small.report.to_dict()).kernels == small.report.kernels
    small.export(tmp_path / "m.onnx", measure=False)
    assert small.export_report.speed is None and "the float file" not in str(small.report)


@pytest.mark.slow
@pytest.mark.ci
def test_what_is_in_float_altogether_is_not_timed(tmp_path: Path) -> None:
    model = compressed(bits=None)
    model.export(tmp_path / "m.onnx", guard=True)
    assert model.export_report.speed is None
    assert "was not guarded: no layer of it reads integers" in model.export_report.notes


@pytest.mark.slow
@pytest.mark.ci
def test_a_float_form_that_cannot_be_made_is_noted(
    small: gc.CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise ExportError("no form", why="of this kind")

    monkeypatch.setattr(speed, "LARGEST", 100)
    small.export(tmp_path / "m.onnx")
    assert any("was not timed" in note and "GiB" in note for note in small.export_report.notes)
    monkeypatch.setattr(speed, "LARGEST", 2**30)
    monkeypatch.setattr(speed, "write_floats", fails)
    for guarded, note in ((False, "was not timed beside its float form"), (True, "was not guarded")):
        small.export(tmp_path / "m.onnx", guard=guarded)
        assert f"{note}: of this kind" in small.export_report.notes and small.export_report.speed is None
        assert (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("integer", "left", "layers"),
    [
        ({}, (), 4),
        ({DEPTHWISE: 3.0}, (DEPTHWISE,), 3),
        ({DEPTHWISE: 3.0, PRODUCT: 2.0}, (DEPTHWISE, PRODUCT), 2),
        ({DEPTHWISE: 1.51}, (), 4),  # within noise
        ({DEPTHWISE: 9.0, PRODUCT: 9.0, SPATIAL: 9.0, POINTWISE: 9.0}, tuple(KINDS), 0),
    ],
)
@pytest.mark.slow
@pytest.mark.ci
def test_a_guard_leaves_in_float_what_does_not_pay(
    integer: Mapping[str, float], left: tuple[str, ...], layers: int,
    small: gc.CompressedModel, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clock = clocked(monkeypatch, integer)
    small.export(tmp_path / "m.onnx", guard=True)
    report = small.export_report
    assert set(report.left_in_float) == set(left) and len(integer_layers(tmp_path / "m.onnx")) == layers
    assert report.speed.integer == layers and report.speed.ratio >= 1
    assert clock.asked[0] == 2 + len(KINDS) and len(clock.asked) == 2  # what was chosen is measured again
    notes = [note for note in report.notes if "left in float" in note]
    assert bool(notes) is bool(left) and all(kind in notes[0] or layers == 0 for kind in left)
    assert not left or any(f"m.onnx {notes[0]}" == note for note in small.report.notes)
    assert off(tmp_path / "m.onnx", convnet()) < 0.02
    if not left:
        assert (tmp_path / "m.onnx").read_bytes() == file.read_bytes()


@pytest.mark.slow
@pytest.mark.ci
def test_words_of_a_guard(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").write_bytes(file.read_bytes())
    clocked(monkeypatch, {DEPTHWISE: 3.0})
    assert speed.guard(tmp_path / "m.onnx", (X,), {}).note == (
        "has depthwise and grouped convolutions left in float: with all on integers it took 1.33 x as long (1 thread); "
        "the outputs move by 0 (relative)"
    )
    clocked(monkeypatch, {}, floats=0.5)
    found = speed.guard(tmp_path / "m.onnx", (X,), {})
    assert found.note.startswith(
        "is left in float: on integers it took 1.75 x as long (1 thread); the outputs move by 0.0"
    )
    assert 0 < found.error < 0.1 and f"{found.error:.1g} (relative)" in found.note


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A file of linear layers of one kind, of five shapes; "2" and "4" have one shape."""
    torch.manual_seed(0)
    widths = (8, 12, 16, 16, 16, 16, 4)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths))).eval()
    path, x = tmp_path_factory.mktemp("chain") / "m.onnx", torch.randn(4, 8)
    compressed(model, x).export(path, measure=False)
    return path, x


@dataclass
class Named(Clock):
    """As `Clock`; layers on integers by name."""

    def __call__(self, files: Sequence[Path], args: Any, kwargs: Any = None, *, threads: int = 1) -> list[float]:
        self.asked.append(len(files))
        names = [[layer.name for layer in described_layers(path).values()] for path in files]
        return [sum(self.integer.get(k, 1.0) for k in own) + self.floats * (self.layers - len(own)) for own in names]


def guarded(chain: tuple[Path, Tensor], folder: Path, monkeypatch: pytest.MonkeyPatch, clock: Named) -> Any:
    monkeypatch.setattr(speed, "side_by_side", clock)
    path, x = chain
    (folder / "m.onnx").write_bytes(path.read_bytes())
    return speed.guard(folder / "m.onnx", (x,), {})


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("integer", "left", "listed"),
    [
        ({"1": 4.0}, ("1",), "1 left"),
        ({"1": 4.0, "5": 3.0}, ("1", "5"), "1 and 5 left"),
        ({"2": 3.0, "3": 3.0, "4": 3.0}, ("2", "3", "4"), "2, 3 and 4 left"),
        ({"2": 9.0}, ("2", "3", "4"), "2, 3 and 4 left"),  # of one shape: judged together
        (dict.fromkeys("015", 1.62), ("0", "1", "5"), "0, 1 and 5 left"),  # little alone, and enough together
        (dict.fromkeys("0", 1.62), (), ""),
        (dict.fromkeys("012345", 3.0), (PRODUCT,), "is left in float"),
    ],
)
def test_a_guard_leaves_layers_of_a_kind_in_float(
    integer: Mapping[str, float], left: tuple[str, ...], listed: str,
    chain: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clock = Named(integer, layers=6)
    found = guarded(chain, tmp_path, monkeypatch, clock)
    assert found.left == left and (listed in found.note if listed else not found.note)
    assert clock.asked[0] == 2 + 5 and clock.asked[1] <= 2 + 3 and len(clock.asked) == 2
    kept = {layer.name for layer in described_layers(tmp_path / "m.onnx").values()}
    assert kept == (set() if left == (PRODUCT,) else set("012345") - set(left))
    wanted = run(chain[0], (chain[1],))[0]
    assert float((run(tmp_path / "m.onnx", (chain[1],))[0] - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.slow
@pytest.mark.ci
def test_shapes_beyond_a_bound_are_judged_with_their_kind(
    chain: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "MOST_SHAPES", 1)
    clock = Named({"2": 3.0, "3": 3.0, "4": 3.0}, layers=6)
    found = guarded(chain, tmp_path, monkeypatch, clock)
    assert found.left == ("2", "3", "4") and clock.asked[0] == 2 + 2  # the largest weights
    assert "; 3 layers of other shapes were judged with their kind" in found.note


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(("off", "of_floats"), [(0.5, 0.1), (1.5, 1.2)])
def test_a_form_that_computes_something_else_is_not_taken(
    off: float, of_floats: float, chain: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [off, of_floats]
    monkeypatch.setattr(speed, "_apart", lambda *_: errors.pop(0))
    with pytest.raises(ExportError, match="is not what the file is"):
        guarded(chain, tmp_path, monkeypatch, Named({"1": 4.0}, layers=6))
    assert (tmp_path / "m.onnx").read_bytes() == chain[0].read_bytes()


@pytest.mark.slow
@pytest.mark.ci
def test_layers_have_the_names_of_their_modules(tmp_path: Path, file: Path) -> None:
    assert [layer.name for layer in described_layers(file).values()] == ["stem", "deep", "point", "head"]
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)).eval(), torch.randn(3, 64)
    ways: tuple[dict[str, Any], ...] = (
        {"activations": "dynamic"}, {"bits": 4}, {"bits": 4, "activation_bits": None, "group_size": 16}
    )  # fmt: skip
    for way in ways:
        compressed(model, x, **way).export(tmp_path / "m.onnx", measure=False)
        found = described_layers(tmp_path / "m.onnx")
        assert [layer.name for layer in found.values()] == ["0", "2"] and list(found) == list(
            integer_layers(tmp_path / "m.onnx")
        )


@pytest.mark.slow
@pytest.mark.ci
def test_a_choice_that_the_second_measurement_does_not_bear_out_is_dropped(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.onnx").write_bytes(file.read_bytes())
    clocks = [Clock({DEPTHWISE: 3.0}), Clock({})]
    monkeypatch.setattr(speed, "side_by_side", lambda *args, **kwargs: clocks.pop(0)(*args, **kwargs))
    found = speed.guard(tmp_path / "m.onnx", (X,), {})
    assert found.left == () and (tmp_path / "m.onnx").read_bytes() == file.read_bytes()


@pytest.mark.slow
@pytest.mark.ci
def test_a_model_that_was_loaded_is_guarded_with_the_ends_of_its_ranges(
    small: gc.CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked(monkeypatch, {}, floats=0.5)
    small.save(tmp_path / "folder")
    back = gc.load(tmp_path / "folder")
    assert write._clips(back.module) is None
    back.export(tmp_path / "m.onnx", X, guard=True)
    assert set(back.export_report.left_in_float) == KINDS and off(tmp_path / "m.onnx", convnet()) < 0.02


@pytest.mark.slow
@pytest.mark.ci
def test_a_guard_is_for_onnx(small: gc.CompressedModel, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"guard=True with \.pt2"):
        small.export(tmp_path / "m.pt2", guard=True)
    with pytest.raises(ExportError, match="guard=True with measure=False"):
        small.export(tmp_path / "x.onnx", guard=True, measure=False)
    with pytest.raises(ExportError, match="guard=True with a folder"):
        small.export(tmp_path / "folder", guard=True)
    for option in ("measure", "guard"):
        with pytest.raises(gc.PlanError, match=option):
            small.export(tmp_path / "m.onnx", **{option: "yes"})


# ------------------------------------------------------------------------------------------------ real times
@pytest.mark.slow
@pytest.mark.ci
def test_files_take_turns_and_medians_are_times(file: Path, tmp_path: Path) -> None:
    write_floats(file, tmp_path / "f.onnx")
    found = side_by_side([file, tmp_path / "f.onnx"], (X,))
    assert len(found) == 2 and all(0 < ms < 1e3 for ms in found)


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.slow
@pytest.mark.ci
def test_a_real_measurement(small: gc.CompressedModel, tmp_path: Path, guard: bool) -> None:
    small.export(tmp_path / "m.onnx", guard=guard)
    report = small.export_report
    assert report.speed.layers == 4 and report.speed.ms > 0 and report.speed.float_ms > 0
    assert off(tmp_path / "m.onnx", convnet()) < 0.02
