"""A prepared module is the model, with quantizers and masks: its names, its values, its place in the world."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphcomp as gc
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.training.prepared import Prepared, unwrapped
from tests.marks import slow
from tests.quantization.models import encoder

from .runs import MODELS, SCHEDULE, batch, bits_of, model_of, ready_of, same, state_of, train

SOME = ["dense", "decoder", "mlp", *slow(*(name for name in MODELS if name not in ("dense", "decoder", "mlp")))]
PREFIXES = ("graphcomp_quantizers.", "graphcomp_mask_")


# ------------------------------------------------------------------------------------------------ the model
@pytest.mark.parametrize("name", SOME)
def test_names_are_the_models_and_those_of_quantizers_and_masks(name):
    model, ready = model_of(name), ready_of(name, bits=(4, 8))
    own = {key for key in ready.state_dict() if not key.startswith(PREFIXES)}
    aliases = {key for key, p in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    counters = {key for key in model.state_dict() if key.endswith("num_batches_tracked")}
    assert own == model.state_dict().keys() - counters - aliases
    added = ready.state_dict().keys() - own
    assert {key.split(".")[-1] for key in added if key.startswith(PREFIXES[0])} == {"d", "q_m", "t"}
    masks = [key for key in added if key.startswith(PREFIXES[1])]
    assert len(masks) == len(ready.session.groups)
    twin = copy.deepcopy(ready)
    assert twin.state_dict().keys() == ready.state_dict().keys()


@pytest.mark.parametrize("name", SOME)
def test_without_quantizers_it_computes_what_the_model_computes(name):
    model, ready = model_of(name).eval(), ready_of(name, bits=None).eval()
    assert torch.equal(ready(*batch(name, 1)), model(*batch(name, 1)))


def test_sixteen_bits_are_close_and_two_are_not():
    model, x = model_of("mlp").eval(), batch("mlp")
    close, far = (gc.prepare(model, x, bits=bits)(*x) for bits in (16, 2))
    expected = model(*x)
    assert (close - expected).norm() < 1e-3 * expected.norm() < (far - expected).norm()


@pytest.mark.parametrize("name", ["dense", *slow("residual", "decoder")])
def test_the_users_model_is_unchanged(name):
    model = model_of(name).train()
    before, ids = state_of(model), {key: id(p) for key, p in model.named_parameters()}
    ready = gc.prepare(model, batch(name), bits=(4, 8))
    train(gc.QASSO(ready, lr=0.1, schedule=SCHEDULE, sparsity=0.3), ready, name, SCHEDULE.steps)
    gc.finalize(ready)
    assert same(state_of(model), before) and model.training
    assert {key: id(p) for key, p in model.named_parameters()} == ids
    assert not any(isinstance(m, Quantizer) for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not {id(p) for p in ready.parameters()} & set(ids.values())


def test_it_has_the_mode_and_the_attributes_of_the_model():
    class Configured(nn.Linear):
        config = "linear"

    assert gc.prepare(Configured(6, 3).train(), batch("mlp")).training
    ready = gc.prepare(Configured(6, 3).eval(), batch("mlp"))
    assert not ready.training and ready.config == "linear"
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = ready.nothing_of_the_kind


def test_tied_weights_stay_one_parameter():
    model, ids = encoder()
    ready = gc.prepare(model, ids, bits=None).train()
    assert [key for key, _ in ready.named_parameters() if key in ("embed.weight", "head.weight")] == ["embed.weight"]
    optimizer = gc.QASSO(ready, torch.optim.Adam, lr=0.01, schedule=SCHEDULE, sparsity=0.3)
    in_groups = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(p is ready.get_parameter("embed.weight") for p in in_groups) == 1
    for _ in range(SCHEDULE.steps):
        optimizer.zero_grad()
        ready(ids).square().mean().backward()
        optimizer.step()
    small = gc.finalize(ready).module
    assert small.head.weight is small.embed.weight
    assert torch.equal(small.head.weight, ready.get_parameter("embed.weight"))


# ------------------------------------------------------------------------------------------------ bits
def test_bits_start_at_the_most_and_are_told_by_layer():
    ready = ready_of("residual", bits=(4, 8), layer_bits=(("head", (2, 6)), ("re:first", (4, 5))))
    most = {site.name: site.high for site, _ in ready.quantizers()}
    assert {name: round(bits) for name, bits in bits_of(ready).items()} == most
    assert {(s.layer, s.low, s.high) for s, _ in ready.quantizers() if s.is_weight} >= {
        ("stem.0", 4, 8), ("first.0", 4, 5), ("first.3", 4, 5), ("head", 2, 6)
    }  # fmt: skip
    found = ready.bits()
    assert found.keys() == {"stem.0", "first.0", "first.3", "second.0", "second.3", "shortcut", "head"}
    assert {layer: pair[0] for layer, pair in found.items()} == {
        "stem.0": 8, "first.0": 5, "first.3": 5, "second.0": 8, "second.3": 8, "shortcut": 8, "head": 6
    }  # fmt: skip


def test_the_last_pattern_that_matches_counts():
    ready = ready_of("residual", bits=(4, 8), layer_bits=(("re:first", (2, 3)), ("first.0", (6, 7))))
    ranges = {s.layer: (s.low, s.high) for s, _ in ready.quantizers() if s.is_weight}
    assert ranges["first.0"] == (6, 7) and ranges["first.3"] == (2, 3) and ranges["head"] == (4, 8)


def test_weights_alone_and_layers_left_float():
    ready = ready_of("residual", bits=(4, 8), activation_bits=None, ignore="first")
    assert all(site.is_weight for site, _ in ready.quantizers())
    found = ready.bits()
    assert not any(layer.startswith("first") for layer in found)
    assert all(pair == (8, 32) for pair in found.values())
    assert not any(group.name.startswith("first") for group in ready.session.groups)


def ranges(ready: Prepared, *, weights: bool) -> set[tuple[int, int]]:
    """The ranges of all quantizers of weights, or of activations."""
    return {(site.low, site.high) for site, _ in ready.quantizers() if site.is_weight == weights}


@pytest.mark.parametrize(
    ("given", "expected"), [(8, (8, 8)), ((6, 8), (6, 8)), ("same", (2, 4))], ids=["number", "range", "same"]
)
def test_activations_have_bits_of_their_own(given, expected):
    ready = ready_of("residual", bits=(2, 4), activation_bits=given)
    assert ranges(ready, weights=True) == {(2, 4)} and ranges(ready, weights=False) == {expected}
    assert {read for _, read in ready.bits().values()} == {float(expected[1])}


@pytest.mark.parametrize("wrong", ["nonsense", 1, 8.0, (8, 4), (4, 5, 6)])
def test_activation_bits_are_checked(wrong):
    with pytest.raises(gc.PlanError, match="activation_bits"):
        gc.prepare(model_of("mlp"), batch("mlp"), bits=(4, 8), activation_bits=wrong)
    with pytest.raises(gc.PlanError, match="activation_bits needs bits"):
        gc.prepare(model_of("mlp"), batch("mlp"), bits=None, activation_bits=8)


@pytest.mark.slow
@pytest.mark.ci
def test_a_layer_given_a_pair_of_ranges_reads_bits_of_its_own():
    ready = ready_of("residual", bits=(4, 4), activation_bits=8, layer_bits=(("head", ((2, 2), (6, 6))),))
    found = gc.finalize(ready).report.layers
    assert {(row.weight_bits, row.activation_bits) for row in found if row.name == "head"} == {(2, 6)}
    assert {(row.weight_bits, row.activation_bits) for row in found if row.name != "head"} == {(4, 8)}


class Shared(nn.Module):
    """Two layers read one value, the first of them through a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.a(x).relu()
        return self.b(functional.max_pool2d(hidden, 2)), self.c(hidden)


def test_a_wish_reaches_the_quantizer_in_front_of_a_pooling():
    x = torch.randn(2, 2, 6, 6)
    ready = gc.prepare(Shared().eval(), x, bits=4, activation_bits=8, layer_bits={"b": (3, 3)})
    assert ready.bits() == {"a": (4, 8), "b": (3, 3), "c": (4, 3)}
    assert {(s.low, s.high) for s, _ in ready.quantizers() if s.layer == "relu"} == {(3, 3)}


def test_layers_that_share_a_quantizer_and_ask_for_different_bits_are_named():
    x = torch.randn(2, 2, 6, 6)
    ready = gc.prepare(Shared().eval(), x, bits=4, layer_bits={"b": (3, 3), "c": (6, 6)})
    assert {(s.low, s.high) for s, _ in ready.quantizers() if s.layer == "relu"} == {(6, 6)}
    (note,) = ready.session.notes
    assert note.startswith("b: its input has 6 to 6 bits, not 3 to 3") and "with c" in note


def test_ranges_of_activations_are_read_off_the_calibration_data():
    x = batch("mlp")[0]
    narrow, wide = (gc.prepare(model_of("mlp"), x, calibration=[x * scale]) for scale in (1, 10))
    found = [next(q.q_m.item() for s, q in r.quantizers() if s.layer == "x") for r in (narrow, wide)]
    assert found == pytest.approx([x.abs().max().item(), 10 * x.abs().max().item()], rel=1e-5)


# ------------------------------------------------------------------------------------------------ units
def test_masked_units_are_zeros_and_count_for_nothing():
    ready = ready_of("width", bits=None, prune=("width",)).eval()
    (group,) = ready.session.groups
    kept = {group: torch.tensor([0, 2, 3, 7, 11])}
    ready.keep(kept)
    assert torch.equal(ready.kept()[group], kept[group])
    assert not ready.get_parameter("norm1.weight")[[1, 4, 5]].any()
    assert not ready.get_parameter("head.weight")[:, [1, 4, 5]].any()
    plan = gc.analyze(model_of("width").eval(), batch("width"))
    small = gc.slice_groups(plan, {plan.group(group.name): kept[group]})
    torch.testing.assert_close(ready(*batch("width", 1)), small(*batch("width", 1)), rtol=1e-5, atol=1e-6)


def test_a_batch_norm_of_one_value_is_refused_as_torch_does():
    """The op alone makes the running variance NaN, and nothing says so until the end."""
    model, x = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), torch.randn(4, 6)
    ready = gc.prepare(model, x, bits=(4, 8)).train()
    for called in (model.train(), ready, copy.deepcopy(ready)):
        with pytest.raises(ValueError, match=r"more than (1|one) value per channel"):
            called(x[:1])
        assert called.eval()(x[:1]).isfinite().all()
    images = gc.prepare(nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3)), torch.randn(2, 1, 4, 4), bits=None)
    assert images.train()(torch.randn(1, 1, 4, 4)).isfinite().all()  # nine values


def test_a_tensor_that_is_not_finite_is_named_at_the_end():
    ready = ready_of("dense", bits=(4, 8))
    ready.get_buffer("norm.running_var")[1] = float("nan")
    with pytest.raises(gc.TrainingError, match=r"'norm.running_var' holds values that are NaN"):
        gc.finalize(ready)


# ------------------------------------------------------------------------------------------------ wrappers
class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_it_is_found_inside_wrappers():
    ready = ready_of("mlp")
    assert unwrapped(Wrapper(Wrapper(ready))) is unwrapped(torch.compile(ready, backend="eager")) is ready


def test_a_state_is_loaded_into_another():
    first, second = ready_of("mlp", bits=(4, 8)), ready_of("mlp", bits=(4, 8))
    train(gc.QASSO(first, lr=0.05, schedule=SCHEDULE, sparsity=0.3), first, "mlp", SCHEDULE.steps)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    first.eval(), second.eval()
    assert torch.equal(first(*batch("mlp")), second(*batch("mlp")))
    kept = [{group.name: units.tolist() for group, units in r.kept().items()} for r in (first, second)]
    assert kept[0] == kept[1] and sum(map(len, kept[0].values())) == 17
    expected, found = gc.finalize(first), gc.finalize(second)
    assert torch.equal(expected(*batch("mlp", 3)), found(*batch("mlp", 3)))


@pytest.mark.parametrize("name", ["dense", *slow("vit")])
def test_quantized_tensors_are_computed_again_in_the_backward_pass(name):
    """The gradients are the same bit for bit, of a copy, too; what is kept is less."""
    found = []
    for recompute in (False, True):
        ready = copy.deepcopy(gc.prepare(model_of(name), batch(name), bits=(4, 8), recompute=recompute).train())
        found.append(_gradients_and_bytes_kept(ready, batch(name)))
    (plain, before), (again, after) = found
    assert same(plain, again) and any("quantizers" in key for key in again)
    assert after < before


def _gradients_and_bytes_kept(ready, inputs):
    torch.manual_seed(0)
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        loss = ready(*inputs).square().mean()
    loss.backward()
    gradients = {key: p.grad for key, p in ready.named_parameters() if p.grad is not None}
    return gradients, sum(t.untyped_storage().nbytes() for t in kept.values())


# ------------------------------------------------------------------------------------------------ copying
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_a_hook_computes_is_copied():
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, 6)
    expected = model(x)
    ready = gc.prepare(model, x, bits=None)
    torch.testing.assert_close(ready(x), expected)
    assert {"0.weight_g", "0.weight_v"} <= {name for name, _ in ready.named_parameters()}


def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model.lock = threading.Lock()
    with pytest.raises(gc.InputError, match="Sequential cannot be copied") as caught:
        gc.prepare(model, torch.randn(4, 6), bits=None)
    assert "deepcopy" in caught.value.fix


# ------------------------------------------------------------------------------------------------ the model's methods
class WithStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
        self._scale = 2.0

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

    def training_step(self, x):
        return self(x).square().mean() * self._scale

    def encode(self, x):
        return self.up(x)


def test_a_method_of_the_model_runs_the_prepared_module():
    x = torch.randn(4, 6)
    ready = gc.prepare(WithStep(), x, bits=2).train()
    loss = ready.training_step(x)
    assert torch.equal(loss, 2.0 * ready(x).square().mean())
    loss.backward()
    assert all(p.grad is not None for _, q in ready.quantizers() for p in q.parameters() if p.requires_grad)
    twin = copy.deepcopy(ready)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin.training_step(x) == 0 != ready.training_step(x)


@pytest.mark.parametrize("bits", [None, (4, 8)])
def test_it_is_not_pickled(bits):
    with pytest.raises(gc.CheckpointError, match="cannot be pickled") as caught:
        pickle.dumps(ready_of("mlp", bits=bits))
    assert "state_dict" in caught.value.fix


def test_a_submodule_is_not_called_on_its_own():
    ready = gc.prepare(WithStep(), torch.randn(4, 6), bits=2)
    for twin in (ready, copy.deepcopy(ready)):
        with pytest.raises(gc.PlanError, match="called on its own") as caught:
            twin.encode(torch.randn(4, 6))
        assert "scope=" in caught.value.fix


@pytest.mark.parametrize("bits", [(4, 8), 8])
@pytest.mark.slow
@pytest.mark.ci
def test_bits_that_quantize_nothing_are_named_with_the_reason(bits: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 5, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.gru(x)[0]

    ready = gc.prepare(Recurrent(), torch.randn(2, 7, 4), bits=bits)
    note = "nothing is quantized: 'gru' stays float: gru has no integer form: states and gates are floats"
    assert note in ready.session.notes
    assert note in gc.finalize(ready).report.notes
