"""Models whose forward changes what the next call reads: parameters, buffers, attributes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.numerics.compare import relative_error


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.settled = False

    def forward(self, x):
        self.change()
        return self.b(self.a(x).relu())

    def change(self) -> None: ...


class Rescales(Net):
    """Divides its own weights at the first call in eval mode."""

    def change(self):
        if not self.settled:
            self.rescale()
            self.settled = True

    def rescale(self):
        with torch.no_grad():
            self.b.weight[:2].div_(2)


class Replaces(Rescales):
    def rescale(self):
        self.b.weight.data = self.b.weight.data / 2


class Recorded(Rescales):
    def forward(self, x):
        return super().forward(x if x.sum() > -1e9 else -x)


class Counts(Net):
    """Keeps state in a buffer, as a graph does, too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return super().forward(x) * self.count


class First(Net):
    """Does something else at the first call, by an attribute."""

    def forward(self, x):
        y = super().forward(x)
        first, self.settled = not self.settled, True
        return y + 1 if first else y


class Caches(Net):
    """Keeps a table that each call would make alike."""

    def change(self):
        if not self.settled:
            self.table = torch.arange(4.0)
            self.settled = True


def compress(model: nn.Module, x: Tensor, **options: Any) -> gc.CompressedModel:
    return gc.compress(model.eval(), x, progress=False, **options)


@pytest.mark.parametrize("kind", [Rescales, Replaces, Recorded])
@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"scope": "0"}])
def test_a_forward_that_writes_into_parameters_is_refused(kind: type[Net], options: dict[str, Any]) -> None:
    x, part = torch.rand(4, 8), kind().eval()
    model = nn.Sequential(part, nn.Linear(4, 2)).eval() if options.get("scope") else part
    before = part.b.weight.clone()
    with pytest.raises(gc.CaptureError, match=r"writes into its own parameter '(0\.)?b\.weight'"):
        compress(model, x, **options)
    assert part.b.weight.equal(before) and not part.settled


def test_a_model_that_settled_is_taken() -> None:
    x, model = torch.rand(4, 8), Rescales().eval()
    model(x)
    small = compress(model, x)
    assert small.report.units_removed == 8 and torch.equal(small(x), small(x))


def test_state_in_buffers_is_compared_at_the_second_call() -> None:
    x, model = torch.rand(4, 8), Counts().eval()
    for bits in (None, 8):
        small = compress(model, x, sparsity=0.5 if bits is None else 0, bits=bits)
        first, second = small(x), small(x)
        assert relative_error(2 * first, second) < 1e-5
    assert model.count == 0


def test_a_graph_does_not_stand_for_a_model_whose_first_call_is_another() -> None:
    x, model = torch.rand(4, 8), First().eval()
    small = compress(model, x)
    assert small.form == "native" and relative_error(small(x) - 1, small(x)) < 1e-4
    with pytest.raises(gc.PlanError, match="first call alone"):
        compress(model, x, bits=8)
    with pytest.raises(gc.PlanError, match="first call alone"):
        gc.prepare(model, x)
    model(x)
    quantized = compress(model, x, sparsity=0, bits=8)
    assert relative_error(model(x), quantized(x)) < 0.1


def test_a_cache_that_changes_nothing_is_no_matter() -> None:
    x = torch.rand(4, 8)
    assert compress(Caches(), x, bits=8).report.units_removed == 8
    assert compress(Caches(), x).form == "native"


def test_a_forward_that_writes_into_parameters_in_training_mode_alone() -> None:
    class Averages(Net):
        """Keeps a moving average of a weight in another weight, while it trains."""

        def change(self):
            if self.training:
                with torch.no_grad():
                    self.b.weight.mul_(0.9)

    model, x = Averages().train(), torch.rand(4, 8)
    before = model.b.weight.clone()
    small = gc.compress(model, x, progress=False)
    assert small.report.units_removed == 8 and model.b.weight.equal(before)
    assert any("writes into the parameter" in why for why in small.report.unchecked.values())
