"""Each flow is a pipeline: a pass that fails, or leaves a wrong graph, is named, and the pass before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
import graphcomp.pruning.slice
from graphcomp.flows.one_shot import cut_groups, cut_to_integers
from graphcomp.pruning.slice import SliceGroups
from graphcomp.pruning.verify import LAW as SLICING
from graphcomp.pruning.verify import CheckSlicing
from graphcomp.quantization.attention import WriteOutAttention
from graphcomp.quantization.fold_scales import QuantizeTables
from graphcomp.quantization.lower import Lower
from graphcomp.quantization.ptq import PostTraining, SetLayers
from graphcomp.quantization.verify import LAW as LOWERING

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def in_floats() -> None:
    gc.compress(model(), X)


def with_bits() -> None:
    gc.compress(model(), X, bits=8)


def by_hand() -> None:
    plan = gc.analyze(model(), X)
    gc.slice_groups(plan, {plan.groups[0]: range(5)})


def after_training() -> None:
    gc.finalize(gc.prepare(model(), X, bits=8))


def fail(*_: Any) -> Any:
    raise KeyError("lost")


@pytest.mark.parametrize(
    ("flow", "broken", "method", "says"),
    [
        (in_floats, SliceGroups, "rewrite", "the pass 'slice groups' of 'one shot' failed"),
        (in_floats, CheckSlicing, "__call__", "the pass 'check slicing' of 'one shot', after 'slice groups' failed"),
        (by_hand, CheckSlicing, "__call__", "the pass 'check slicing' of 'one shot', after 'slice groups' failed"),
        (
            with_bits,
            SetLayers,
            "__call__",
            "the pass 'set layers' of 'one shot, with bits', after 'check placed quantizers' failed",
        ),
        (with_bits, Lower, "__call__", "the pass 'lower' of 'one shot, with bits', after 'remember fake-quant' failed"),
        (
            after_training,
            QuantizeTables,
            "rewrite",
            "the pass 'quantize tables' of 'finalize', after 'repeat quantizers behind moves' failed",
        ),
    ],
)
def test_a_pass_that_fails_names_itself_and_the_one_before(
    monkeypatch: pytest.MonkeyPatch, flow: Callable[[], None], broken: type, method: str, says: str
) -> None:
    monkeypatch.setattr(broken, method, fail)
    with pytest.raises(gc.PassError) as raised:
        flow()
    assert str(raised.value).startswith(says) and "KeyError" in str(raised.value)


def test_a_pass_that_fails_in_export_names_itself_and_the_one_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("onnx")
    small = gc.compress(model(), X, bits=8)
    monkeypatch.setattr(WriteOutAttention, "rewrite", fail)
    says = "the pass 'write out attention' of 'writing ONNX', after 'return tensors of their own' failed"
    with pytest.raises(gc.PassError, match=says):
        small.export(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flow", "name"),
    [
        (in_floats, "one shot"),
        (with_bits, "one shot, with bits"),
        (by_hand, "one shot"),
    ],
)
def test_a_graph_whose_values_are_not_as_its_nodes_say_names_the_pass_that_left_it(
    monkeypatch: pytest.MonkeyPatch, flow: Callable[[], None], name: str
) -> None:
    """Also where the wrong graph is seen many passes later, or makes a later pass fail."""
    monkeypatch.setattr(graphcomp.pruning.slice, "_update_value", lambda *_: None)
    says = (
        rf"^the pass 'slice groups' of '{name}' left a graph that is not valid\n(.|\n)*the node says .* and computes "
    )
    with pytest.raises(gc.VerificationError, match=says):
        flow()


def test_finalize_checks_what_it_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = gc.prepare(model(), X, bits=8)
    (group,) = ready.session.groups
    ready.keep({group: torch.arange(5)})
    monkeypatch.setattr(graphcomp.pruning.slice, "_update_value", lambda *_: None)
    with pytest.raises(gc.VerificationError, match=r"^the pass 'slice groups' of '(one shot|finalize)' left a graph"):
        gc.finalize(ready, verify=False)


def test_with_bits_the_pipeline_goes_on_where_it_ends_in_floats() -> None:
    plan = gc.analyze(model(), X)
    kept = {plan.groups[0]: torch.arange(5)}
    floats = cut_groups(plan, kept, plan.groups, verify=True)
    cut, integers = cut_to_integers(plan, kept, plan.groups, PostTraining(), [[X]], verify=True)
    assert str(cut.program.graph) == str(floats.program.graph)
    tensors = cut.program.tensors
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in floats.program.tensors.items())
    assert list(integers.verified) == [SLICING, LOWERING] and list(cut.program.verified) == [SLICING]
    assert integers.lowered is not None and integers.lowered.module is integers.module
    assert plan.captured.lowered is None and not plan.captured.stages


class Chaos(nn.Module):
    """Each of seven sines makes what a sum was rounded by 37 times larger."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 3001), nn.Linear(3001, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 8) -> (n, 8)."""
        x = self.down(torch.tanh(self.up(x)))
        for _ in range(7):
            x = torch.sin(37 * x)
        return x


def test_roundings_that_a_network_makes_large_are_no_wrong_cut() -> None:
    small = gc.compress(Chaos().eval(), torch.randn(4, 8), sparsity=0.4, progress=False)
    assert isinstance(small.report, gc.Report)
    assert small.report.verified["masked == sliced"] < 1e-3
    assert any("in float64, since in the model's own precision rounding shows" in note for note in small.report.notes)
