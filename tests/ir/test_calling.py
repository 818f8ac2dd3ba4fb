"""A graph is called as the model that it was captured from."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.capture.capture import capture


class Model(nn.Module):
    """Has arguments of all kinds with defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        scale: float = 2.0,
        *,
        flag: bool = False,
    ) -> Tensor:
        y = self.b(self.a(x).relu()) * scale
        y = y if mask is None else y * mask
        return -y if flag else y


X, MASK = torch.randn(2, 4), torch.rand(2, 4)

CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((X, MASK), {}),
    ((X,), {"mask": MASK}),
    ((), {"mask": MASK, "x": X}),
    ((X, MASK, None), {}),
    ((X, MASK), {"labels": None, "scale": 2.0, "flag": False}),
]


@pytest.mark.parametrize("example", [(X, MASK), {"mask": MASK, "x": X}, {"x": X, "mask": MASK, "flag": False}])
def test_positions_names_and_defaults_are_those_of_the_model(example: Any) -> None:
    model = Model().eval()
    graph = capture(model, example).module
    for args, kwargs in CALLS:
        torch.testing.assert_close(graph(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda small: small])
def test_a_result_is_called_as_the_model_after_it_was_copied_and_stored(again: Any, tmp_path: Path) -> None:
    small = again(gc.compress(Model().eval(), {"mask": MASK, "x": X}, sparsity=0.5, bits=8))
    small.save(tmp_path / "small")
    loaded = gc.load(tmp_path / "small")
    for args, kwargs in CALLS:
        assert torch.equal(small(*args, **kwargs), small(X, MASK))
        assert torch.equal(loaded(*args, **kwargs), small(X, MASK))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.slow
@pytest.mark.ci
def test_a_prepared_module_is_called_as_the_model_compiled_or_not() -> None:
    ready = gc.prepare(Model(), {"x": X, "mask": MASK, "flag": False})
    assert torch.equal(ready(X, MASK), ready(x=X, mask=MASK, flag=False))
    compiled = torch.compile(ready, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(X, mask=MASK, flag=False), ready(X, MASK))


def test_what_the_graph_lacks_is_refused() -> None:
    graph = capture(Model().eval(), (X,)).module
    with pytest.raises(gc.InputError, match="takes no 'mask'"):
        graph(X, MASK)
    with pytest.raises(gc.InputError, match="takes no 'scale'"):
        graph(X, scale=3.0)
    with pytest.raises(gc.InputError, match="takes no 'other'"):
        graph(X, other=None)
    with pytest.raises(TypeError, match="multiple values for argument 'x'"):
        graph(X, x=X)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        graph()


def test_a_constant_that_is_left_out_and_has_another_default_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    graph = capture(Model().eval(), {"x": X, "flag": True}).module
    with caplog.at_level(logging.WARNING, "graphcomp"):
        first, second = graph(X), graph(X)
    assert torch.equal(first, graph(X, flag=True))
    assert torch.equal(first, second)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("graphcomp")] == [
        "flag is left out: the graph holds True, the default of the model is False"
    ]
    with pytest.raises(gc.InputError, match="flag is False"):
        graph(X, flag=False)


# ------------------------------------------------------------------------------------------------ caches
class Cache:
    """What pytree does not know."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class Decoder(nn.Module):
    """Returns a cache unless told otherwise; `logits` may depend on the switch."""

    def __init__(self, depends: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.depends = nn.Linear(4, 8), nn.Linear(8, 4), depends

    def forward(self, x: Tensor, use_cache: bool | None = None) -> dict[str, Any]:
        hidden = self.a(x).relu()
        logits = self.b(hidden)
        if use_cache is False:
            return {"logits": logits}
        return {"logits": 2 * logits if self.depends else logits, "cache": Cache(hidden)}


def test_a_cache_is_switched_off_where_nothing_else_depends_on_it() -> None:
    model = Decoder().eval()
    captured = capture(model, X)
    assert captured.producer == "export"
    assert captured.output_names == ("logits",)
    torch.testing.assert_close(captured.module(X)["logits"], model(X)["logits"])
    small = gc.compress(model, X, sparsity=0.5)
    assert small.form == "native"
    assert any("use_cache=False" in note for note in small.report.notes)
    assert small.module(X)["cache"].keys.shape == (2, 4)
    ready = gc.prepare(model, X)
    assert ready(X)["logits"].shape == (2, 4)


def test_a_cache_that_other_outputs_depend_on_stays() -> None:
    captured = capture(Decoder(depends=True).eval(), X)
    assert captured.producer == "record"
    assert captured.output_names == ("logits", "cache.keys")


@pytest.mark.parametrize("example", [{"x": X, "use_cache": True}, (X, True)])
def test_a_cache_that_the_caller_asks_for_stays(example: Any) -> None:
    assert capture(Decoder().eval(), example).producer == "record"


def test_a_cache_is_switched_off_on_the_meta_device() -> None:
    captured = capture(Decoder().eval().to("meta"), X.to("meta"))
    assert captured.producer == "export"
