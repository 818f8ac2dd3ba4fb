"""Everything a user can get wrong ends in a typed error that says what, where, why and the fix."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphcomp as gc
from graphcomp.testing import ResidualCNN, relative_error


class MLP(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.up = nn.Linear(8, width)
        self.down = nn.Linear(width, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def test_nothing_to_prune_says_why_each_axis_is_frozen():
    with pytest.raises(gc.NothingToPrune) as caught:
        gc.compress(nn.Linear(8, 4), X)
    assert "model input" in str(caught.value) and "reaches output" in str(caught.value)


def test_everything_ignored_is_nothing_to_prune():
    with pytest.raises(gc.NothingToPrune, match="left out by ignore"):
        gc.compress(MLP(), X, ignore=["up"])


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, True, float("nan"), "0.5"])
def test_sparsity_outside_range(sparsity):
    with pytest.raises(gc.PlanError, match=r"outside \[0, 1\)"):
        gc.compress(MLP(), X, sparsity=sparsity)


def test_sparsity_that_no_choice_meets_says_what_is_possible():
    with pytest.raises(gc.BudgetError, match=r"1[0-9] "):
        gc.compress(MLP(), X, sparsity=0.99)


def test_round_to_takes_the_nearest_number_of_units_and_says_so():
    small = gc.compress(MLP(), X, sparsity=0.4, round_to=8)
    assert small.module.up.out_features == 8
    assert any("round_to=8" in note and "sparsity=0.4" in note for note in small.report.notes)
    exact = gc.compress(MLP(), X, sparsity=0.5, round_to=8)
    assert not any("round_to" in note for note in exact.report.notes)


def test_round_to_that_no_group_can_meet():
    with pytest.raises(gc.BudgetError, match="in steps of 32"):
        gc.compress(MLP(), X, sparsity=0.4, round_to=32)


def test_sparsity_zero_returns_the_same_function():
    model = MLP().eval()
    small = gc.compress(model, X, sparsity=0.0)
    assert torch.equal(small(X), model(X))
    assert small.report.to_dict()["units"]["removed"] == 0


def test_budget_below_the_smallest_network():
    with pytest.raises(gc.BudgetError):
        gc.compress(MLP(), X, budget=gc.Budget(params=3))


def test_example_inputs_that_do_not_fit():
    with pytest.raises(gc.InputError, match="8"):
        gc.compress(MLP(), torch.randn(2, 9))


@pytest.mark.parametrize("call", [gc.compress, gc.prepare])
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("x", [torch.ones(2, 8, dtype=torch.int64), X.double()])
def test_example_inputs_of_another_dtype(call, bits, x):
    """Export takes them: its tensors have no data, and some ops no check of dtypes then."""
    if call is gc.prepare and bits is None:
        return  # nothing is run
    with pytest.raises(gc.InputError, match=r"does not run on the example inputs(.|\n)*dtype"):
        call(MLP(), x, bits=bits)


@pytest.mark.parametrize("model", [5, lambda x: x, MLP])
def test_a_model_that_is_none(model):
    with pytest.raises(gc.InputError, match=r"the model is a .*(.|\n)*torch.nn.Module"):
        gc.compress(model, X)


def test_example_inputs_of_the_wrong_number():
    with pytest.raises(gc.InputError):
        gc.compress(MLP(), (X, X))


class Branching(nn.Module):
    """Data-dependent control flow: export refuses it, the recorder does not."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()

    def forward(self, x):
        if x.sum() > 1e9:
            return self.mlp(x) * 2
        return self.mlp(x)


def test_data_dependent_control_flow_is_recorded_and_cut():
    model = Branching().eval()
    small = gc.compress(model, X, sparsity=0.5)
    assert small.form == "native" and isinstance(small.module, Branching)
    assert small.module.mlp.up.out_features == 8
    assert any("torch.export refused" in note for note in small.report.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    small = gc.compress(MLP().to(dtype).eval(), X.to(dtype), sparsity=0.5)
    assert small.module.up.weight.dtype == dtype
    assert small(X.to(dtype)).dtype == dtype


def test_meta_device_has_no_weights_to_score():
    with torch.device("meta"):
        model = MLP()
    with pytest.raises(gc.PlanError, match="meta device"):
        gc.compress(model, torch.empty(2, 8, device="meta"))


def test_meta_device_can_be_analysed_and_cut():
    with torch.device("meta"):
        model = MLP()
    plan = gc.analyze(model, torch.empty(2, 8, device="meta"))
    small = gc.slice_groups(plan, {plan.groups[0]: range(5)})
    assert small.module.up.weight.shape == (5, 8) and small.module.up.weight.is_meta


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.stem = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(torch.relu(self.inner(torch.relu(self.inner(self.stem(x))))))


def test_shared_module_called_twice():
    small = gc.compress(Twice().eval(), X, sparsity=0.5)
    inner = small.module.inner
    assert inner.weight.shape == (4, 4) and small.module.stem.weight.shape == (4, 8)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.relu(self.mix(self.embed(ids))))


def test_tied_parameters_stay_tied():
    model = Tied().eval()
    small = gc.compress(model, torch.randint(0, 11, (2, 5)), sparsity=0.5)
    assert small.module.head.weight is small.module.embed.weight
    assert small.module.head.weight is not model.head.weight


def test_non_contiguous_parameters():
    model = MLP().eval()
    model.up.weight = nn.Parameter(torch.randn(8, 16).t())
    assert not model.up.weight.is_contiguous()
    small = gc.compress(model, X, sparsity=0.5)
    assert small.module.up.weight.shape == (8, 8)


def test_parametrized_weight():
    model = MLP().eval()
    torch.nn.utils.parametrizations.weight_norm(model.up)
    small = gc.compress(model, X, sparsity=0.5)
    assert small(X).shape == (2, 4)
    assert small.report.to_dict()["units"]["removed"] == 8


def test_hooks_are_left_alone():
    model, seen = MLP().eval(), []
    model.up.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    gc.compress(model, X, sparsity=0.5)
    assert len(model.up._forward_hooks) == 1
    seen.clear()
    model(X)
    assert seen == [(2, 16)]


@torch.library.custom_op("graphcomp_test::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1).clone()


@mystery.register_fake
def _(x):
    return torch.empty_like(x)


class Mysterious(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.c(torch.relu(self.b(mystery(self.a(x)))))


def test_unknown_op_freezes_and_is_named():
    plan = gc.analyze(Mysterious().eval(), X)
    (unknown,) = plan.unknown_ops
    assert "graphcomp_test" in unknown.op and 'graphcomp.rule("graphcomp_test::mystery"' in unknown.fix
    assert "mystery(self.a(x))" in unknown.source
    (group,) = plan.groups
    assert {m.name for m in group.members} == {"b.weight", "b.bias", "c.weight"}
    assert "graphcomp_test" in plan.report()


def test_nan_weights():
    model = MLP().eval()
    with torch.no_grad():
        model.down.weight[0, 0] = float("nan")
    with pytest.raises(gc.PlanError, match=r"'down.weight' holds 1 values that are NaN"):
        gc.compress(model, X)


@pytest.mark.parametrize("kept", [[], [3, 99], [-1, 2]])
def test_kept_units_that_are_none(kept):
    plan = gc.analyze(MLP().eval(), X)
    with pytest.raises(gc.PlanError):
        gc.slice_groups(plan, {plan.groups[0]: torch.tensor(kept, dtype=torch.int64)})


@pytest.mark.parametrize("bits", [1, 0, -4, 17, 8.0, True, "8", (), [4, 5, 6]])
def test_bits_outside_range(bits):
    with pytest.raises(gc.PlanError, match="bits"):
        gc.compress(MLP(), X, bits=bits)
    with pytest.raises(gc.PlanError, match="bits"):
        gc.compress(MLP(), X, bits=8, activation_bits=bits)


def test_options_of_a_quantization_that_was_not_asked_for():
    asked = {
        "activation_bits": 8,
        "group_size": 4,
        "rounding": "second_order",
        "reduce_range": True,
    }
    for name, value in asked.items():
        with pytest.raises(gc.PlanError, match="need bits"):
            gc.compress(MLP(), X, **{name: value})
    with pytest.raises(gc.PlanError, match="no bits are given"):
        gc.compress(MLP(), X, calibration=[X], repair=None)
    with pytest.raises(gc.PlanError, match="rounding"):
        gc.compress(MLP(), X, bits=8, rounding="up")


@pytest.mark.parametrize(
    "options",
    [{"bits": 4}, {"activation_bits": None}, {"group_size": 4}, {"rounding": "second_order"}, {"reduce_range": True}],
)
def test_options_beside_all_options_of_quantization(options):
    (name,) = options
    with pytest.raises(gc.PlanError, match=f"{name} beside quantization="):
        gc.compress(MLP(), X, quantization=gc.PostTraining(), **options)


@pytest.mark.parametrize(
    "options", [{"rounding": "up"}, {"equalize": "yes"}, {"walk_batches": 0}, {"walk_batches": 1.5}]
)
def test_options_of_post_training_out_of_range(options):
    (name,) = options
    with pytest.raises(gc.PlanError, match=name):
        gc.PostTraining(**options)


@pytest.mark.parametrize("entry", ["upp", "re:layer.*"])
def test_names_of_post_training_that_are_no_module(entry):
    eight = gc.QuantSpec(8, granularity="channel")
    for option, how in (
        ("ignore", gc.PostTraining(ignore=(entry,))),
        ("overrides", gc.PostTraining(gc.QuantConfig(overrides={entry: (eight, None)}))),
    ):
        with pytest.raises(gc.PlanError, match=rf"{option} (names|pattern) (.|\n)*up"):
            gc.compress(MLP(), X, sparsity=0, quantization=how)


def test_a_sparsity_beside_a_budget():
    with pytest.raises(gc.PlanError, match=r"sparsity=0\.5 beside a budget"):
        gc.compress(MLP(), X, sparsity=0.5, budget=gc.Budget(params=0.5))


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        ([], "no batch"),
        ([torch.randn(2, 9)], r"does not run on batch 0(.|\n)*at: .*test_bad_input.py"),
        ([X, torch.randn(3, 7)], "does not run on batch 1"),
        ([torch.full((2, 8), float("nan"))], "not finite"),
        ([torch.full((2, 8), float("inf"))], "not finite"),
        ([torch.randn(0, 8)], "holds no sample"),
        (X, "each of its rows would be taken for a batch"),
        ({"x": X}, "not a series of batches"),
        (3, "not a series of batches"),
    ],
)
def test_calibration_data_that_do_not_fit(calibration, says):
    with pytest.raises(gc.CalibrationError, match=says):
        gc.compress(MLP(), X, bits=8, calibration=calibration)
    with pytest.raises(gc.CalibrationError, match=says):
        gc.prepare(MLP(), X, bits=8, calibration=calibration)


def test_stacked_batches_are_batches():
    model, stacked = MLP(), torch.stack([X, 10 * X])
    outputs = [gc.compress(model, X, bits=8, calibration=c)(X) for c in (stacked, list(stacked), [X])]
    assert torch.equal(*outputs[:2]) and not torch.equal(*outputs[1:])


@pytest.mark.slow
@pytest.mark.ci
def test_what_is_quantized_is_not_quantized_again():
    small, ready = gc.compress(MLP(), X, sparsity=0, bits=8), gc.prepare(MLP(), X, bits=8)
    for model, why in ((small, "weights are integers"), (small.module, "weights are integers"), (ready, "quantizers")):
        with pytest.raises(gc.PlanError, match=rf"quantized already(.|\n)*{why}"):
            gc.compress(model, X, sparsity=0, bits=4)
        with pytest.raises(gc.PlanError, match=rf"quantized already(.|\n)*{why}"):
            gc.prepare(model, X, bits=4)


@pytest.mark.parametrize("constant", [0.0, 3.0, -2.0])
def test_constant_calibration_data_give_a_valid_step(constant):
    small = gc.compress(MLP(), X, bits=8, calibration=[torch.full((2, 8), constant)])
    assert torch.isfinite(small(X)).all()


def test_an_activation_that_is_always_zero():
    model = MLP()
    model.up.bias.data.fill_(-100)
    small = gc.compress(model, X, sparsity=0, bits=8)
    assert torch.allclose(small(X), model(X), atol=1e-2)


def test_a_weight_channel_of_zeros():
    model = MLP()
    model.up.weight.data[3] = 0
    model.down.weight.data[1] = 0
    small = gc.compress(model, X, sparsity=0, bits=8)
    assert gc.testing.relative_error(model(X), small(X)) < 0.05


def test_whole_numbers_in_a_product_stay_as_they_are():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x, counts):
            return self.down(torch.relu(self.up(x))), counts @ counts.transpose(0, 1)

    counts = torch.arange(6).view(2, 3)
    model = Counts().eval()
    small = gc.compress(model, (X, counts), bits=8)
    assert torch.equal(small(X, counts)[1], model(X, counts)[1])
    assert {layer.weight_bits for layer in small.report.layers} == {8}


def test_a_recorded_model_cannot_be_quantized():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            y = torch.relu(self.up(x))
            return self.down(y if float(x.sum()) > 0 else y + 1)

    with pytest.raises(gc.PlanError, match="could only be recorded"):
        gc.compress(Branching(), X, bits=8)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(gc.PlanError, match="up"):
        gc.compress(MLP(), X, ignore="upp")
    with pytest.raises(gc.PlanError, match="up"):
        gc.compress(MLP(), X, sparsity=0, bits=8, ignore="upp")
    with pytest.raises(gc.PlanError, match="channel"):
        gc.compress(MLP(), X, prune=["chanel"])
    with pytest.raises(gc.PlanError):
        gc.compress(MLP(), X, saliency="l3")
    with pytest.raises(TypeError):
        gc.compress(MLP(), X, sparcity=0.5)


def test_the_users_model_is_left_as_it_was():
    model = ResidualCNN().train()
    model.head.eval() if hasattr(model, "head") else None
    before = copy.deepcopy(model)
    flags = [m.training for m in model.modules()]
    tensors = [id(p) for p in model.parameters()]
    x = torch.randn(2, 3, 16, 16)
    small = gc.compress(model, x, sparsity=0.5)
    assert [m.training for m in model.modules()] == flags
    assert [id(p) for p in model.parameters()] == tensors
    for (name, a), (_, b) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not storages & {p.untyped_storage().data_ptr() for p in small.parameters()}


def test_deterministic_under_a_seed():
    model, x = ResidualCNN().eval(), torch.randn(2, 3, 16, 16)
    runs = [gc.compress(model, x, saliency="random", seed=s) for s in (1, 1, 2)]
    kept = [{k: {d: i.tolist() for d, i in v.items()} for k, v in r.kept.items()} for r in runs]
    assert kept[0] == kept[1] != kept[2]


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = MLP()

    def forward(self, x):
        if bool((x > 1e9).any()):
            raise ValueError("too large")
        return F.softmax(self.body(x), -1)


def test_scope_replaces_one_submodule():
    model = Whole().eval()
    small = gc.compress(model, X, sparsity=0.5, scope="body")
    assert isinstance(small.module, Whole) and small.module.body.up.out_features == 8
    assert set(small.kept) == {"body.up.weight", "body.up.bias", "body.down.weight"}
    assert model.body.up.out_features == 16
    assert relative_error(small(X).sum(-1), torch.ones(2)) < 1e-6


def test_scope_that_is_no_submodule():
    with pytest.raises(gc.CaptureError, match="body"):
        gc.compress(Whole(), X, scope="bodi")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.slow
@pytest.mark.ci
def test_integers_of_a_model_in_another_dtype(dtype):
    """Its activations cannot be stored as integers, and it says how they can; its weights can."""
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype), torch.randn(3, 6).to(dtype)
    ready = gc.prepare(model, x, bits=8)
    for call in (lambda: gc.compress(model, x, bits=8), lambda: gc.finalize(ready)):
        with pytest.raises(gc.PlanError, match=rf"activations in {str(dtype)[6:]}(.|\n)*model\.float\(\)"):
            call()
    small = gc.finalize(gc.prepare(model, x, bits=8, activation_bits=None))
    assert small(x).dtype is dtype and relative_error(model(x), small(x)) < 0.05


def test_data_and_a_loss_without_a_length():
    with pytest.raises(gc.PlanError, match="no length of training"):
        gc.compress(MLP(), X, data=[X], loss=lambda y, _: y.square().mean())
    small = gc.compress(MLP(), X, data=[X], loss=lambda y, _: y.square().mean(), saliency="taylor", progress=False)
    assert small.report.units_removed == 8 and "not used" not in str(small.report)
    small = gc.compress(MLP(), X, data=[X], method="oneshot", repair=None, progress=False)
    assert "data not used" in small.report.notes[0]


@pytest.mark.parametrize("call", [gc.compress, gc.prepare])
@pytest.mark.parametrize("prune", [["nope"], "channel", 5])
def test_roles_that_do_not_exist(call, prune):
    with pytest.raises(gc.PlanError, match="prune"):
        call(MLP(), X, prune=prune)


@pytest.mark.parametrize("saliency", [5, lambda evidence: None, lambda evidence: {}, lambda e: {e.groups[0]: 3}])
def test_saliencies_that_give_no_scores(saliency):
    with pytest.raises(gc.PlanError, match=r"saliency"):
        gc.compress(MLP(), X, saliency=saliency)


def test_layer_bits_without_bits() -> None:
    with pytest.raises(gc.PlanError, match="layer_bits needs bits"):
        gc.prepare(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), bits=None, layer_bits={"0": (4, 4)})
