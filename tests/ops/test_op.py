"""graphcomp.op: one registration says what a user's op couples, costs, and is on integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.cost import CostModel, macs
from graphcomp.coupling.axis import Axes
from graphcomp.ops import registry
from graphcomp.ops.call import Call
from graphcomp.ops.facts import Clip, Compute
from graphcomp.ops.registry import facts_of, forget

DENSE, ATTEND, RMS, CAP = (f"graphcomp_op::{name}" for name in ("dense", "attend", "rms", "cap"))


@torch.library.custom_op(DENSE, mutates_args=())
def dense(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """A linear layer."""
    return nn.functional.linear(x, w, b)


@dense.register_fake
def _(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


@torch.library.custom_op(ATTEND, mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention whose scores are not scaled."""
    return (q @ k.mT).softmax(-1) @ v


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@torch.library.custom_op(RMS, mutates_args=())
def rms(x: Tensor) -> Tensor:
    """Divide by the root mean square of the last dim."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@rms.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    for name in (DENSE, ATTEND, RMS, CAP):
        forget(name)


class Dense(nn.Module):
    """Two layers of the user's own op."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        """(n, 4) -> (n, 3)."""
        op = torch.ops.graphcomp_op.dense
        return op(torch.relu(op(x, self.a.weight, self.a.bias)), self.b.weight, self.b.bias)


def test_an_op_like_a_linear_layer_is_cut_counted_and_quantized() -> None:
    torch.manual_seed(0)
    gc.op(DENSE, "... i, o i, o -> ... o", integer="like aten::linear")
    assert facts_of(torch.ops.graphcomp_op.dense.default).integer == Compute(("x",), "w", 0, "b")
    x = torch.randn(5, 4)
    small = gc.compress(Dense(), x, sparsity=0.5, bits=8, progress=False)
    assert small.report.macs.before == 5 * (4 * 8 + 8 * 3) and small.report.macs.after == 5 * (4 * 4 + 4 * 3)
    assert not any("float" in note or "counted" in note for note in small.report.notes)
    bits = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in small.report.layers}
    assert bits == {"a": (8, 8), "b": (8, 8)}
    assert small.report.verified["integers == fake-quant, in steps"] == 0


def test_a_rule_alone_leaves_the_op_float_and_says_so() -> None:
    gc.rule(DENSE, "... i, o i, o -> ... o")
    small = gc.compress(Dense(), torch.randn(5, 4), bits=8, progress=False)
    assert "'a', 'b' stay float: dense has no integer form" in small.report.notes


class Attending(nn.Module):
    """The user's own attention between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(4, 6), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Any:
        """(b, t, 4) -> (b, t, 3)."""
        return self.out(torch.ops.graphcomp_op.attend(self.q(x), self.k(x), self.v(x)))


@pytest.mark.parametrize("rule", ["b s d, b t d, b t e -> b s e", "b *s d, b *t d, b *u e -> b *s e"])
def test_costs_that_a_rule_does_not_tell(rule: str) -> None:
    """Two products: from left to right where all dims have letters, or said where positions are frozen."""
    x, linear = torch.randn(2, 5, 4), 2 * 5 * (2 * 4 * 8 + 4 * 6 + 6 * 3)
    gc.op(ATTEND, rule, macs=("b *s *t d", "b *s *t e") if "*" in rule else None)
    costs = CostModel(gc.analyze(Attending(), x))
    assert costs.uncounted == ()
    assert costs.macs_by_kind()["attention"] == 2 * 5 * 5 * (8 + 6)
    assert costs.macs() == linear + 2 * 5 * 5 * (8 + 6)
    forget(ATTEND)
    gc.op(ATTEND, rule, macs=())
    costs = CostModel(gc.analyze(Attending(), x))
    assert (costs.macs(), costs.uncounted) == (linear, ())


def test_a_masked_form_of_the_users_own() -> None:
    def masked(mask: Tensor, x: Tensor) -> Tensor:
        share = mask.sum() / mask.numel()
        return x * ((x * mask).square().mean(-1, keepdim=True) / share + 1e-6).rsqrt()

    @gc.op(RMS, masked=masked)
    def rule(x: Axes, *, call: Call) -> Axes:
        call.contract("x", len(x) - 1)
        return x

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            return self.b(torch.ops.graphcomp_op.rms(self.a(x)))

    model, x = Normed(), torch.randn(5, 4)
    plan = gc.analyze(model, x)
    (group,) = plan.groups
    small = gc.slice_groups(plan, {group: torch.arange(3)})
    assert small.report.verified and macs(plan) == 5 * (4 * 8 + 8 * 3)


def test_bounds_of_a_clip_by_name() -> None:
    library = torch.library.Library("graphcomp_op_clip", "DEF")
    library.define("cap(Tensor x, float most) -> Tensor")
    gc.op("graphcomp_op_clip::cap", "... -> ...", integer=Clip(0.0, "most"))
    try:
        found = facts_of(torch.ops.graphcomp_op_clip.cap.default).integer
        assert isinstance(found, Clip) and found.bounds({"most": 2}) == (0.0, 2.0)
    finally:
        forget("graphcomp_op_clip::cap")
        library._destroy()


def test_integers_like_an_op_that_nothing_is_known_of() -> None:
    with pytest.raises(gc.RuleError, match="nothing is known of 'mylib::nothing' on integers"):
        gc.op(DENSE, "... i, o i, o -> ... o", integer="like mylib::nothing")


def test_a_convolution_must_have_the_arguments_of_torchs() -> None:
    with pytest.raises(gc.RuleError, match="no argument bias, dilation, groups, input, padding, stride, weight"):
        gc.op(DENSE, "... i, o i, o -> ... o", integer="like aten::conv2d")


def test_an_answer_before_the_op_is_there_is_checked_when_the_op_is_met() -> None:
    name = "graphcomp_op_later::cap"
    gc.op(name, "... -> ...", integer=Clip(0.0, "highest"))
    library = torch.library.Library("graphcomp_op_later", "DEF")
    try:
        library.define("cap(Tensor x, float most) -> Tensor")
        with pytest.raises(gc.RuleError, match="high of Clip must be an argument of"):
            facts_of(torch.ops.graphcomp_op_later.cap.default)
    finally:
        forget(name)
        library._destroy()


def test_one_registration_says_all() -> None:
    gc.rule(DENSE, "... i, o i, o -> ... o")
    again: tuple[dict[str, Any], ...] = ({"integer": "like aten::linear"}, {"macs": ()})
    for answers in again:
        with pytest.raises(gc.RuleError, match="has a coupling rule already") as error:
            gc.op(DENSE, **answers)
        assert f"forget('{DENSE}')" in error.value.fix
    exec(error.value.fix.partition(",")[0], {"graphcomp": gc})
    gc.op(DENSE, "... i, o i, o -> ... o", integer="like aten::linear")


@gc.op("graphcomp_op::unused", macs=())
def no_products(x: Axes) -> Axes:
    """A rule in Python of an op without multiply-accumulates."""
    return x


def test_a_rule_in_python_may_have_no_products() -> None:
    assert registry._ENTRIES["graphcomp_op::unused"].facts.sums == "products"
    with pytest.raises(gc.RuleError, match=r"macs must be \(\) for a rule in Python"):
        gc.op("graphcomp_op::other", macs="n i o")


# ------------------------------------------------------------------------------------------------ masked forms
class Normed(nn.Module):
    """The user's own norm between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        """(n, 4) -> (n, 3)."""
        y = self.a(x)
        return self.b(torch.ops.graphcomp_op.rms(y) + y)


def test_a_masked_form_that_no_mask_reaches_is_refused() -> None:
    with pytest.raises(gc.RuleError, match="is never called: the rule contracts nothing"):
        gc.op(RMS, "... c -> ... c", masked=lambda mask, x: x)


def test_a_masked_form_must_take_a_mask_and_the_arguments() -> None:
    with pytest.raises(gc.RuleError, match="must take a mask and the arguments") as error:
        gc.op(RMS, "... c -> ...", masked=lambda x: x)
    assert error.value.fix == "def masked(mask, x): …"


def test_a_masked_form_that_fails_names_the_op() -> None:
    @gc.op(RMS, masked=lambda mask, x: 1 / 0)
    def rule(x: Axes, *, call: Call) -> Axes:
        call.contract("x", len(x) - 1)
        return x

    with pytest.raises(gc.RuleError, match=f"the masked form of {RMS} failed") as error:
        gc.compress(Normed(), torch.randn(5, 4), sparsity=0.5, progress=False)
    assert error.value.why == "ZeroDivisionError: division by zero"


def test_the_taught_op_is_suspected_first_where_a_law_does_not_hold() -> None:
    gc.op(RMS, "... c -> ... c", macs=())  # wrong on purpose: statistics over c
    with pytest.raises(gc.VerificationError) as error:
        gc.compress(Normed(), torch.randn(5, 4), sparsity=0.5, progress=False)
    assert f"taught of {RMS} (test_op.py:" in error.value.fix and f"forget('{RMS}')" in error.value.fix


# ------------------------------------------------------------------------------------------------ names
def test_a_float_op_is_named_where_something_is_quantized() -> None:
    gc.op(RMS, "n c -> n c", macs=())
    small = gc.compress(Normed(), torch.randn(5, 4), sparsity=0, bits=8, progress=False)
    assert "'rms' stays float: rms has no integer form" in small.report.notes


# ------------------------------------------------------------------------------------------------ files
class Layers(nn.Module):
    """(n, 8) -> (n, 4), two layers of a user's op."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer
        self.up, self.down = nn.Parameter(torch.randn(16, 8) / 4), nn.Parameter(torch.randn(4, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x, self.up).relu(), self.down)


@pytest.fixture
def composite() -> Iterator[Any]:
    """An op that is a name for other ops, which exporters find."""
    with torch.library._scoped_library("graphcomp_op", "FRAGMENT") as library:
        library.define("named(Tensor x, Tensor w) -> Tensor")
        library.impl("named", nn.functional.linear, "CompositeImplicitAutograd")
        gc.op("graphcomp_op::named", "... i, o i -> ... o", integer="like aten::linear")
        yield torch.ops.graphcomp_op.named
        forget("graphcomp_op::named")


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("options", [{}, {"bits": 8}])
def test_an_op_that_is_made_of_other_ops_is_written_as_onnx(tmp_path, composite, options) -> None:
    pytest.importorskip("onnxruntime")
    from graphcomp.targets.runtime import compare

    x = torch.randn(4, 8)
    small = gc.compress(Layers(composite), x, progress=False, **options)
    assert small.report.units_removed == 8
    small.export(tmp_path / "model.onnx")
    found = compare(tmp_path / "model.onnx", small, (x,))
    assert found.steps <= 1 if options else found.error < 1e-5
    small.export(tmp_path / "model.pt2")


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("options", [{}, {"bits": 8}])
def test_an_op_that_onnx_does_not_know_is_refused_by_name_and_written_as_pt2(tmp_path, options) -> None:
    pytest.importorskip("onnxruntime")
    gc.op(DENSE, "... i, o i, o -> ... o", integer="like aten::linear")
    x = torch.randn(4, 8)
    small = gc.compress(Layers(dense), x, progress=False, **options)
    with pytest.raises(gc.ExportError) as caught:
        small.export(tmp_path / "model.onnx")
    error = caught.value
    assert "graphcomp_op.dense" in error.why and "test_op.py" in error.at and ".pt2" in error.fix
    assert not list(tmp_path.iterdir())
    small.export(tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), small(x))
