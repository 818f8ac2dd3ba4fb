"""What holds for every quantizer."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from graphcomp.coupling.axis import Axis, Reason, fresh, is_frozen, normal
from graphcomp.errors import PlanError
from graphcomp.quantization.quantizers.affine import AffineQuantizer
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.quantizers.mixed import MixedQuantizer
from graphcomp.quantization.quantizers.symmetric import SymmetricQuantizer
from graphcomp.quantization.quantizers.ternary import TernaryQuantizer
from graphcomp.quantization.spec import QuantSpec
from tests.marks import slow

from .cases import SHAPE, SPECS, check_integers, data, make, steps_of


def learned(quantizer: nn.Module) -> list[nn.Parameter]:
    return [p for p in quantizer.parameters() if p.requires_grad]


every_quantizer = pytest.mark.parametrize("name", SPECS)


# ------------------------------------------------------------------------------------------------ integers
def tensors(dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    """Tensors of rank 1 to 4 with any finite or infinite values, and ordinary ones."""
    width = 32 if dtype == torch.float32 else 64
    value = st.one_of(
        st.floats(-3, 3, width=width), st.floats(allow_nan=False, width=width), st.sampled_from([0.0, -0.0, 1e-40])
    )
    shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)
    return shapes.flatmap(
        lambda shape: st.lists(value, min_size=torch.Size(shape).numel(), max_size=torch.Size(shape).numel()).map(
            lambda values: torch.tensor(values, dtype=dtype).view(shape)
        )
    )


@given(
    drawn=st.sampled_from([torch.float32, torch.float64]).flatmap(tensors),
    bits=st.integers(2, 16),
    name=st.sampled_from(list(SPECS)),
    place=st.integers(0, 3),
    ends=st.tuples(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30)),
    ordinary=st.booleans(),
    cast=st.booleans(),
)
def test_integers_stand_for_the_floats(
    drawn: Tensor, bits: int, name: str, place: int, ends: tuple[float, float], ordinary: bool, cast: bool
) -> None:
    """Bit for bit, for any bits, shape, dim, range and value."""
    old = SPECS[name]
    if old.granularity == "group" and drawn.dim() < 2:
        return
    bits = old.bits if old.kind == "ternary" else bits
    spec = dataclasses.replace(old, bits=bits, group_size=min(old.group_size, 2))
    dim = place % drawn.dim() if old.granularity == "channel" else 0
    quantizer = make_quantizer(spec, shape=drawn.shape, dim=dim)
    low, high = (-2.0, 1.0) if ordinary else (min(ends), max(ends))
    quantizer.set_range(torch.tensor(low), torch.tensor(high))
    integers = check_integers(quantizer.to(drawn.dtype) if cast else quantizer, drawn)
    assert quantizer(drawn).isfinite().all()
    assert steps_of(integers).dtype == drawn.dtype
    assert (steps_of(integers) > 0).all()


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("half_parameters", [False, True])
def test_half_floats(name: str, dtype: torch.dtype, half_parameters: bool) -> None:
    quantizer = make(name, dtype if half_parameters else torch.float32)
    x = data(dtype).requires_grad_()
    result = quantizer(x)
    assert result.dtype == dtype
    check_integers(quantizer, x.detach())
    result.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in learned(quantizer))


@every_quantizer
def test_integers_do_not_depend_on_enabled(name: str) -> None:
    quantizer, x = make(name), data()
    codes = quantizer.to_integers(x).values
    quantizer.enabled = False
    assert quantizer(x) is x
    assert torch.equal(quantizer.to_integers(x).values, codes)


@pytest.mark.parametrize(
    ("bits", "symmetric", "dtype"),
    [
        (4, True, torch.int8), (8, True, torch.int8), (9, True, torch.int16), (16, True, torch.int16),
        (4, False, torch.uint8), (8, False, torch.uint8), (9, False, torch.uint16), (16, False, torch.uint16),
    ],
)  # fmt: skip
def test_the_smallest_container(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    quantizer = make_quantizer(QuantSpec(bits, symmetric))
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    assert check_integers(quantizer, data()).values.dtype == dtype


# ------------------------------------------------------------------------------------------------ where it runs
@every_quantizer
def test_copies_and_state(name: str) -> None:
    quantizer, x = make(name), data()
    twin = copy.deepcopy(quantizer)
    assert torch.equal(twin(x), quantizer(x))
    other = make_quantizer(SPECS[name], shape=SHAPE, dim=0)
    assert not torch.equal(other(x), quantizer(x))
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), quantizer(x))


@every_quantizer
def test_autocast(name: str) -> None:
    """A product in bfloat16 goes in, bfloat16 comes out, gradients arrive."""
    quantizer, linear = make(name), nn.Linear(6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        result = quantizer(linear(data()))
        assert result.dtype == torch.bfloat16
        loss = linear(result).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in [*learned(quantizer), linear.weight])


@pytest.mark.slow
@pytest.mark.ci
@every_quantizer
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_compiles_to_one_graph(name: str) -> None:
    quantizer, x = make(name), data()
    results = []
    for run in (quantizer, torch.compile(quantizer, backend="aot_eager", fullgraph=True)):
        quantizer.zero_grad()
        result = run(x)
        result.square().sum().backward()
        results.append([result.detach(), *(p.grad.clone() for p in learned(quantizer))])
    torch.testing.assert_close(results[1], results[0])


@every_quantizer
def test_exports(name: str) -> None:
    quantizer, x = make(name), data()
    program = torch.export.export(quantizer, (x,))
    torch.testing.assert_close(program.module()(x), quantizer(x))


@every_quantizer
def test_vmap(name: str) -> None:
    quantizer, x = make(name), torch.stack([data(), data()])
    assert torch.equal(torch.vmap(quantizer)(x), torch.stack([quantizer(one) for one in x]))


@every_quantizer
def test_never_waits_for_the_device(name: str) -> None:
    """Fake tensors have no data: whatever asked for a number on the host would raise."""
    with FakeTensorMode():
        quantizer = make_quantizer(SPECS[name], shape=SHAPE, dim=0)
        x = torch.empty(SHAPE, requires_grad=True)
        quantizer(x).sum().backward()
        quantizer.set_range(torch.empty(()), torch.empty(()))
        quantizer.project()
        assert quantizer.bits.shape == ()
        if isinstance(quantizer, GetaQuantizer):
            quantizer.project_bits(2, 8)


# ------------------------------------------------------------------------------------------------ staying valid
LOSSES = {
    "fit": lambda result, x: (result - x).square().mean(),
    "shrink": lambda result, x: result.abs().sum(),
    "grow": lambda result, x: -result.abs().sum().clamp(max=1e9),
}


@pytest.mark.slow
@pytest.mark.ci
@every_quantizer
@pytest.mark.parametrize("lr", [1e1, 1e10, *slow(1e4)])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_silly_learning_rate(name: str, lr: float, projected: bool, loss: str) -> None:
    """Steps stay positive and nothing turns NaN, wherever the optimizer throws the parameters."""
    quantizer, x = make(name), data()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=lr)
    negative = False
    for _ in range(30):
        optimizer.zero_grad()
        result = quantizer(x)
        assert result.isfinite().all()
        LOSSES[loss](result, x).backward()
        optimizer.step()
        parameters = [p.detach() for key, p in quantizer.named_parameters() if key != "zero_point"]
        assert all(p.isfinite().all() for p in parameters)
        negative = negative or any((p < 0).any() for p in parameters)
        if projected:
            quantizer.project()
            assert all((p > 0).all() for p in parameters)
    assert negative or loss != "shrink", "no parameter was driven negative: the test is idle"
    integers = check_integers(quantizer, x)
    assert (steps_of(integers) > 0).all() and steps_of(integers).isfinite().all()
    assert quantizer.bits.isfinite()


@every_quantizer
def test_projection_makes_parameters_valid(name: str) -> None:
    """And changes neither what is returned nor parameters that are valid."""
    quantizer, x = make(name), data()
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.project()
    assert all(torch.equal(quantizer.state_dict()[key], before[key]) for key in before)
    for value in (-3.0, 0.0, 1e38):
        with torch.no_grad():
            for parameter in quantizer.parameters():
                parameter.fill_(value)
        expected = quantizer(x)
        quantizer.project()
        torch.testing.assert_close(quantizer(x), expected)
        valid = [p for key, p in quantizer.named_parameters() if key != "zero_point"]
        assert all((p > 0).all() and p.isfinite().all() for p in valid)


@every_quantizer
def test_a_negative_step_recovers(name: str) -> None:
    """The gradient at the floor pushes up where the loss asks for it."""
    quantizer, x = make(name), data()
    step = quantizer.d if isinstance(quantizer, GetaQuantizer) else quantizer.scale
    with torch.no_grad():
        step.fill_(-1e-3)
    (quantizer(x) - x).square().sum().backward()
    moved_down = step.grad > 0
    assert not moved_down.any()


@every_quantizer
@pytest.mark.parametrize("end", [0.0, 1e-40])
def test_an_empty_range_gives_a_positive_step(name: str, end: float) -> None:
    quantizer = make(name)
    quantizer.set_range(torch.tensor(0.0), torch.tensor(end, dtype=torch.float64))
    assert (steps_of(quantizer.to_integers(torch.zeros(SHAPE))) > 0).all()
    assert torch.equal(quantizer(torch.zeros(SHAPE)), torch.zeros(SHAPE))
    assert quantizer(torch.ones(SHAPE)).isfinite().all()


@every_quantizer
def test_the_range_is_spanned(name: str) -> None:
    quantizer = make(name)
    bits = quantizer.widths if isinstance(quantizer, MixedQuantizer) else torch.tensor(SPECS[name].bits)
    torch.testing.assert_close(quantizer.bits, bits.float().mean())
    steps = steps_of(quantizer.to_integers(torch.zeros(SHAPE)))
    if SPECS[name].tabled:
        torch.testing.assert_close(steps, torch.tensor([1.5, 2.0]).expand_as(steps))
        return
    step = 2.0 / (2.0 ** (bits - 1) - 1) if SPECS[name].symmetric else 3.5 / (2.0**bits - 1)
    torch.testing.assert_close(steps, step.expand_as(steps))
    x = torch.linspace(-1.4, 1.9, 72).view(SHAPE)
    assert bool(((quantizer(x) - x).abs().amax((1, 2)) <= step / 2 * (1 + 1e-5)).all())


# ------------------------------------------------------------------------------------------------ making, coupling
def test_the_kinds() -> None:
    kinds = {name: type(make(name)) for name in SPECS}
    assert kinds["symmetric group"] is SymmetricQuantizer
    assert kinds["affine channel"] is AffineQuantizer
    assert kinds["ternary"] is kinds["ternary, two scales, channel"] is TernaryQuantizer
    assert kinds["geta"] is kinds["geta exponent"] is GetaQuantizer


@pytest.mark.parametrize("symmetric", [True, False])
def test_printed(symmetric: bool) -> None:
    quantizer = make_quantizer(QuantSpec(4, symmetric, "group", 3), shape=(4, 7), dim=0)
    assert quantizer.extra_repr() == f"4 bits, {'symmetric' if symmetric else 'affine'}, per group of 3, dim=0"
    assert make_quantizer(QuantSpec(kind="geta")).extra_repr() == "8 bits, symmetric, per tensor"


@pytest.mark.parametrize("symmetric", [True, False])
def test_parameter_shapes(symmetric: bool) -> None:
    shape = (4, 3, 7)
    per_channel = make_quantizer(QuantSpec(symmetric=symmetric, granularity="channel"), shape=shape, dim=-2)
    assert per_channel.dim == 1
    per_group = make_quantizer(QuantSpec(4, symmetric, "group", 3), shape=shape, dim=0)
    assert per_group.groups.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert per_group.groups.dtype == torch.int64
    per_tensor = make_quantizer(QuantSpec(symmetric=symmetric), shape=shape, dim=0)
    assert per_tensor.dim is None
    for quantizer, expected in ((per_channel, (3,)), (per_group, (4, 3)), (per_tensor, ())):
        assert {tuple(p.shape) for p in quantizer.parameters()} == {expected}


@pytest.mark.parametrize(
    ("spec", "shape", "dim"),
    [
        (QuantSpec(granularity="channel"), None, 0),
        (QuantSpec(granularity="channel"), (3, 4), None),
        (QuantSpec(granularity="channel"), (3, 4), 2),
        (QuantSpec(granularity="channel"), (3, 4), -3),
        (QuantSpec(4, granularity="group", group_size=2), None, None),
        (QuantSpec(4, granularity="group", group_size=2), (3, 4), 1),
        (QuantSpec(4, granularity="group", group_size=2), (3,), 0),
    ],
)
def test_a_granularity_that_does_not_fit(spec: QuantSpec, shape: tuple[int, ...] | None, dim: int | None) -> None:
    with pytest.raises(PlanError, match="fix"):
        make_quantizer(spec, shape=shape, dim=dim)


def test_a_spec_of_another_kind() -> None:
    for build in (
        lambda: SymmetricQuantizer(QuantSpec(symmetric=False)),
        lambda: AffineQuantizer(QuantSpec()),
        lambda: GetaQuantizer(QuantSpec()),
        lambda: TernaryQuantizer(QuantSpec()),
        lambda: SymmetricQuantizer(QuantSpec(kind="geta")),
    ):
        with pytest.raises(PlanError):
            build()


def axes_of(quantizer: nn.Module, *sizes: int) -> tuple[tuple[Axis, ...], dict[str, tuple[Axis, ...]]]:
    """Fresh axes for an operand, and what becomes of the quantizer's own once coupled."""
    x = tuple(fresh(n) for n in sizes)
    own = {key: tuple(fresh(n) for n in value.shape) for key, value in quantizer.state_dict().items()}
    assert quantizer.couple_axes(x, own, Reason("test")) is x
    return x, own


@every_quantizer
def test_couples_its_tensors_and_nothing_else(name: str) -> None:
    quantizer = make(name)
    x, own = axes_of(quantizer, *SHAPE)
    assert not any(is_frozen(axis) for axis in x)
    assert len({id(normal(axis)) for axis in x}) == 3
    for key in own.keys() - {"groups"}:
        if own[key]:
            assert normal(own[key][0]) is normal(x[0])
        assert all(is_frozen(axis) for axis in own[key][1:])
    if "groups" in own:
        assert normal(own["groups"][0]) is normal(x[-1])
    assert ("groups" in own) == name.endswith("group")


@pytest.mark.parametrize("name", ["symmetric group", "affine group"])
def test_slicing_inputs_leaves_the_other_groups_as_they_are(name: str) -> None:
    quantizer, x = make(name), data()
    with torch.no_grad():
        quantizer.scale.mul_(torch.rand_like(quantizer.scale) + 0.5)
    rows, columns = torch.tensor([0, 2, 3]), torch.tensor([1, 4, 5])
    small = copy.deepcopy(quantizer)
    small.groups = quantizer.groups[columns]
    for key, value in quantizer.named_parameters():
        setattr(small, key, nn.Parameter(value[rows]))
    cut = x[rows][..., columns]
    assert torch.equal(small(cut), quantizer(x)[rows][..., columns])
    check_integers(small, cut)
