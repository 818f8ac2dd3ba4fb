"""The caller's tensors stay as they are, and models that write into their inputs are cut as other models are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp import testing
from graphcomp.ir.inputs import updates

AS_CUT = ("not repaired: no calibration= was given",)
"""The notes of a cut about which there is nothing else to say."""


class Cell(nn.Module):
    """Updates the state that a caller gives, in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x, state):
        y = self.b(torch.relu(self.a(x + state["h"][0])))
        state["h"][0] = 0.5 * state["h"][0] + y
        return y


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = Cell()

    def forward(self, x, state):
        return self.cell(x, state) + 1


class ByValue(Cell):
    """torch.export refuses the branch: the model is recorded."""

    def forward(self, x, state):
        return super().forward(x if x.sum() > -1e9 else -x, state)


def given() -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(2, 8), {"h": torch.randn(1, 2, 8)}


def squared(output: Any, _batch: Any) -> Tensor:
    return output.square().mean()


def train(x: Any, state: Any) -> Any:
    data = [(x, state)] * 2
    return gc.compress(Cell(), (x, state), method="geta", data=data, loss=squared, steps=6, progress=False)


USES: dict[str, Callable[[Tensor, Any], Any]] = {
    "compress": lambda x, s: gc.compress(Cell(), (x, s), measure_latency=True, progress=False),
    "recorded": lambda x, s: gc.compress(ByValue(), (x, s), progress=False),
    "quantized": lambda x, s: gc.compress(
        Cell(), (x, s), bits=8, calibration=[(x, s)], rounding="second_order", progress=False
    ),
    "gradients": lambda x, s: gc.compress(
        Cell(), (x, s), saliency="taylor", data=[(x, s)], loss=squared, progress=False
    ),
    "activations": lambda x, s: gc.compress(Cell(), (x, s), saliency="activation", data=[(x, s)], progress=False),
    "scoped": lambda x, s: gc.compress(Outer(), (x, s), scope="cell", bits=8, calibration=[(x, s)], progress=False),
    "prepare": lambda x, s: gc.prepare(Cell(), (x, s)),
    "train": train,
    "check_law": lambda x, s: testing.check_law(Cell(), (x, s)),
}


@pytest.mark.parametrize("use", USES)
def test_the_callers_tensors_stay_as_they_are(use: str) -> None:
    x, state = given()
    before = x.clone(), state["h"].clone()
    USES[use](x, state)
    assert x.equal(before[0]) and state["h"].equal(before[1])


@pytest.mark.parametrize("kind", [Cell, ByValue])
def test_what_a_model_writes_into_its_inputs_is_compared(kind: type[Cell]) -> None:
    x, state = given()
    model = kind().eval()
    small = gc.compress(model, (x, state), progress=False)
    assert small.form == "native" and small.report.units_removed == 16
    keep = small.kept["a.weight"][0]
    masked = kind().eval()
    masked.load_state_dict(model.state_dict())
    with torch.no_grad():
        masked.b.weight[:, [k for k in range(32) if k not in keep.tolist()]] = 0
        for _ in range(2):
            twin = {"h": state["h"].clone()}
            assert torch.allclose(masked(x, state), small(x, twin), atol=1e-6)
            assert torch.allclose(state["h"], twin["h"], atol=1e-6)


def test_a_state_that_is_updated_in_another_way_is_refused() -> None:
    """The output is the same whatever order the channels have; the state is not."""

    @torch.library.custom_op("tests::flipped", mutates_args=())
    def flipped(x: Tensor) -> Tensor:
        return x.flip(-1).clone()

    @flipped.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    gc.rule("tests::flipped", "n c -> n c")  # wrong on purpose

    class Wrong(Cell):
        def forward(self, x, state):
            y = torch.relu(self.a(x))
            state["h"][0] = self.b(torch.ops.tests.flipped(y))
            return self.b(y)

    x, state = given()
    with pytest.raises(gc.VerificationError):
        gc.compress(Wrong().eval(), (x, state), progress=False)


def test_updates_are_named() -> None:
    before = {"a": torch.zeros(2), "b": [torch.full((2,), torch.nan)]}
    after = {"a": torch.ones(2), "b": [torch.full((2,), torch.nan)]}
    assert list(updates(before, after)) == ["input a"]
    after["b"].append(torch.zeros(2))
    assert list(updates(before, after)) == ["input a", "input b.1"]


class Cached(nn.Module):
    """Puts another tensor into a dict of the caller's."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x, cache):
        y = self.b(torch.relu(self.a(x + cache["k"])))
        cache["k"] = y
        return y


def test_inputs_that_the_forward_replaces() -> None:
    x, cache = torch.randn(2, 8), {"k": torch.randn(2, 8)}
    model, before = Cached().eval(), cache["k"]
    small = gc.compress(model, (x, cache), progress=False)
    assert small.form == "native" and cache["k"] is before and small.report.notes == AS_CUT
    notes = gc.compress(model, (x, cache), bits=8, progress=False).report.notes
    assert any("cache.k, and the graph does not" in note for note in notes)
