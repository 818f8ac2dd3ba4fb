"""GDRQ: reshaped by clipping in floats, then quantized in groups of filters; section 8 of the methods, items 4 to 6."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.api import _prepared
from graphcomp.methods.gdrq import Gdrq, GdrqRun
from graphcomp.quantization.quantizers.symmetric import SymmetricQuantizer
from graphcomp.quantization.scale_clip import clip_levels, filter_groups, group_steps
from graphcomp.training.optimizer import MethodOptimizer
from tests.marks import in_ci
from tests.methods.learning import Outer, Stop, batches, check_saved_and_exported, compress, loss

W2A4: dict[str, Any] = {"bits": 2, "activation_bits": 4}


class Deep(nn.Module):
    """(n, 1, 6, 6) -> (n, 3): four convolutions, the middle ones with few bits, and a linear layer."""

    def __init__(self, norms: bool = True) -> None:
        super().__init__()
        widths = (1, 8, 8, 8, 8)
        self.layers = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) if norms else nn.Identity() for _ in self.layers)
        self.head = nn.Linear(8, 3)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight)  # long tails, unlike the default

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return self.head(x.mean((2, 3)))


def deep(norms: bool = True) -> Deep:
    torch.manual_seed(0)
    return Deep(norms)


FEW = ("layers.1.weight", "layers.2.weight", "layers.3.weight")


def begun(
    method: Gdrq | None = None, steps: int = 8, optimizer: Any = torch.optim.SGD, **asked: Any
) -> tuple[MethodOptimizer, GdrqRun]:
    method = method or Gdrq()
    source = partial(
        _prepared, deep(), batches()[0][0], None, ignore=(), keep_inputs=(), prune=None, scope="", outputs=None
    )
    goal = gc.Goal(**{"bits": (2, 2), "activation_bits": 4, **asked})
    run = method.begin(method.prepare(source, goal).train(), goal, gc.Training(steps=steps), steps)
    options = {"momentum": 0.9, "weight_decay": 1e-2} if optimizer is torch.optim.SGD else {}
    return MethodOptimizer(run, optimizer, 0.05, options), run


def train(optimizer: MethodOptimizer, run: GdrqRun, steps: int) -> None:
    for k in range(steps):
        optimizer.zero_grad()
        batch = batches()[k % 4]
        run.loss(lambda own, tensors=None: run.ready(own[0]), batch, loss).backward()
        optimizer.step()


# ------------------------------------------------------------------------------------------------ reshaping
@pytest.mark.parametrize("k", [2.0, 1.5])
def test_weights_of_few_bits_are_clipped_after_each_step(k):
    optimizer, run = begun(Gdrq(clip=k))
    assert tuple(run.weights) == FEW and len(run.others) == 2 and not run.quantized
    first = run.ready.get_parameter("layers.0.weight").detach().clone()
    for _ in range(3):
        before = {name: w.parameter.detach().abs().mean() for name, w in run.weights.items()}
        train(optimizer, run, 1)
        for name, weight in run.weights.items():
            peak = weight.parameter.detach().abs()
            assert float(peak.max()) < 1.1 * k * float(
                before[name]
            )  # the mean of the weights as the optimizer left them
            assert float((peak > 0.999 * peak.max()).float().mean()) > 0.01
    assert not torch.equal(run.ready.get_parameter("layers.0.weight"), first)  # trained, and not clipped
    unclipped = run.ready.get_parameter("head.weight").detach().abs()
    assert float((unclipped > 0.999 * unclipped.max()).sum()) == 1


def kurtosis(weight: Tensor) -> float:
    rows = weight.detach().double().flatten()
    rows = rows - rows.mean()
    return float((rows**4).mean() / (rows**2).mean() ** 2)


def test_8_6_kurtosis_is_nearer_to_that_of_a_uniform_density_after_reshaping():
    optimizer, run = begun(steps=40)
    before = {name: kurtosis(w.parameter) for name, w in run.weights.items()}
    train(optimizer, run, run.settles - 1)
    assert not run.quantized
    for name, weight in run.weights.items():
        assert abs(kurtosis(weight.parameter) - 1.8) < 0.5 * abs(before[name] - 1.8)


def test_activations_are_clipped_at_the_average_of_their_positive_mean():
    _, run = begun(Gdrq(activation_clip=1.5))
    assert len(run.few) == 2 and set(run.ranges.clips) == run.few
    seen: dict[str, list[Tensor]] = {name: [] for name in run.few}
    for name in run.few:
        quantizer = run.ready.get_submodule(name)
        quantizer.register_forward_hook(lambda _, given, out, name=name: seen[name].append(out.detach()))
    batch = batches()[0]

    def once() -> Tensor:
        return run.loss(lambda own, tensors=None: run.ready(own[0]), batch, loss)

    once().backward()  # no average yet: nothing is clipped
    means = {name: float(own[0][own[0] > 0].mean()) for name, own in seen.items()}
    run.before_step(0)
    rows = dict(zip(run.ranges.quantizers, run.ranges.averages.tolist(), strict=True))
    for name, mean in means.items():
        assert rows[name][0] == pytest.approx(mean, rel=1e-5)
        assert float(seen[name][0].max()) > 1.5 * mean
    once()
    for name, mean in means.items():
        assert float(seen[name][1].max()) == pytest.approx(1.5 * mean, rel=1e-5)
    run.before_step(1)
    rows = dict(zip(run.ranges.quantizers, run.ranges.averages.tolist(), strict=True))
    for name, mean in means.items():  # nine tenths of the average before, and one of what the second pass read
        assert 0.8 * mean < rows[name][0] < 1.2 * mean
    assert not any(q._forward_pre_hooks for _, q in run.ready.quantizers())


def test_gradients_of_clipped_activations_are_zero():
    _, run = begun(Gdrq(activation_clip=1.5))
    name = next(iter(run.few))
    run.ranges._limits = {name: 0.5}
    quantizer = run.ready.get_submodule(name)
    x = torch.tensor([0.2, 0.7, -0.9], requires_grad=True)
    with run.ready.in_floats(), run.ranges.watching(clipped=True):
        quantizer(x).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 0.0]


# ------------------------------------------------------------------------------------------------ groups of filters
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("grouping", ["contiguous", "sorted"])
def test_filters_of_a_group_keep_one_step_and_learn_it_together(optimizer, grouping):
    made, run = begun(Gdrq(groups=3, grouping=grouping, reshape=0.25), optimizer=optimizer)
    train(made, run, 2)
    assert run.quantized
    groups = {name: w.group_of.clone() for name, w in run.weights.items()}
    before = {name: w.quantizer.scale.detach().clone() for name, w in run.weights.items()}
    for name, weight in run.weights.items():  # of least squared error on the clipped weights
        assert groups[name].bincount().tolist() == [3, 3, 2]
        assert grouping == "sorted" or torch.equal(groups[name], filter_groups(weight.rows, 3, grouping))
        torch.testing.assert_close(before[name], group_steps(weight.rows, groups[name], 1))
    train(made, run, 5)
    for name, weight in run.weights.items():
        scale = weight.quantizer.scale.detach()
        assert torch.equal(weight.group_of, groups[name]) and not torch.equal(scale, before[name])
        assert all(len(set(scale[groups[name] == g].tolist())) == 1 for g in range(3))
        assert len(set(scale.tolist())) == 3
        levels = clip_levels(weight.rows, 2.0, groups[name])
        assert bool((weight.rows.abs().amax(1) <= levels * 1.1).all())


def test_8_5_one_group_learns_as_one_step_for_the_layer_does():
    """The gradient of a group's step is LSQ's of a quantizer with one step for all its weights."""
    _, run = begun(Gdrq(groups=1, reshape=0.0))
    (weight, *_) = run.weights.values()
    whole = SymmetricQuantizer(gc.QuantSpec(2))
    whole.scale.data.copy_(weight.quantizer.scale[0])
    w = weight.parameter.detach()
    pull = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    (weight.quantizer(w) * pull).sum().backward()
    (whole(w) * pull).sum().backward()
    assert torch.equal(weight.quantizer(w), whole(w))
    weight.sum_gradients()
    torch.testing.assert_close(weight.quantizer.scale.grad, whole.scale.grad.expand(8))


def test_a_frozen_weight_is_quantized_and_not_clipped():
    model = deep()
    model.layers[2].weight.requires_grad_(False)
    seen: dict[str, GdrqRun] = {}

    class Watched(Gdrq):
        def begin(self, *args: Any) -> GdrqRun:
            seen["run"] = super().begin(*args)
            return seen["run"]

    small = compress(Watched(), model=model, training={"steps": 8}, **W2A4)
    assert torch.equal(seen["run"].weights["layers.2.weight"].parameter, model.layers[2].weight)
    assert "not clipped, as they are not trained: layers.2.weight" in small.report.notes
    assert [layer.weight_bits for layer in small.report.layers] == [8, 2, 2, 2, 8]


def test_steps_follow_means_and_are_not_trained():
    optimizer, run = begun(Gdrq(steps="mean", reshape=0.25, groups=2))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    train(optimizer, run, 6)
    for weight in run.weights.values():
        assert id(weight.quantizer.scale) not in trained
        torch.testing.assert_close(
            weight.quantizer.scale, clip_levels(weight.rows, 2.0, weight.group_of), rtol=0.1, atol=0
        )
    rows = dict(zip(run.ranges.quantizers, run.ranges.averages.tolist(), strict=True))
    for name in run.few:
        quantizer, (mean, _, high) = run.ready.get_submodule(name), rows[name]
        assert float(quantizer.scale) * 15 == pytest.approx(min(4 * mean, high), rel=1e-5)


def test_8_4_integers_with_folded_steps_are_the_groups_with_a_batch_norm():
    optimizer, run = begun(Gdrq(groups=4, reshape=0.25))
    train(optimizer, run, 6)
    weight = run.weights["layers.2.weight"]
    norm = copy.deepcopy(run.ready.session.plan.model.norms[2]).double().eval()
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).copy_(run.ready.state_dict()[f"norms.2.{name}"])
    stored = weight.quantizer.double().to_integers(weight.parameter.detach().double())
    scale = stored.scale.double()
    x = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    norm.requires_grad_(False)
    grouped = norm(F.conv2d(x, stored.values.double() * scale.view(-1, 1, 1, 1)))
    sigma = (norm.running_var + norm.eps).sqrt()
    factor, shift = norm.weight * scale / sigma, norm.bias - norm.weight * norm.running_mean / sigma
    folded = F.conv2d(x, stored.values.double()) * factor.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    assert len(set(scale.tolist())) == 4
    assert float((grouped - folded).abs().max()) < 3e-15 * max(1.0, float(grouped.abs().max()))


# ------------------------------------------------------------------------------------------------ to the file
def test_what_was_asked_is_met_and_said():
    small = compress("gdrq", model=deep(), **W2A4)
    layers = [(layer.name, layer.weight_bits) for layer in small.report.layers]
    assert layers == [("layers.0", 8), ("layers.1", 2), ("layers.2", 2), ("layers.3", 2), ("head", 8)]
    assert [layer.activation_bits for layer in small.report.layers][2:4] == [4, 4]
    notes = " ".join(small.report.notes)
    assert "filters of 3 layers share steps in 4 groups a layer" in notes
    assert "not clipped, and a step per filter, as they have more bits: layers.0, head" in notes
    assert small.report.verified["trained == sliced"] < 1e-9 and small.report.verified["sliced == folded"] < 1e-6
    levels = [set(own.values.unique().tolist()) for own in small.quantized.lowered.weights.values()]
    assert [len(own) <= 3 for own in levels] == [False, True, True, True, False]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    "method", [Gdrq(), Gdrq(steps="mean", groups=2, grouping="contiguous")], ids=["learned", "mean"]
)
@pytest.mark.parametrize("norms", [True, False])
def test_what_is_saved_and_exported_computes_what_was_trained(tmp_path, method, norms):
    small = compress(method, model=deep(norms), **W2A4).eval()
    assert small.report.verified["trained == sliced"] < 1e-9 and small.report.verified["sliced == folded"] < 1e-6
    check_saved_and_exported(small, tmp_path)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("calls", [5, 12, 17])  # while reshaping, as quantization begins, and after
@pytest.mark.parametrize("method", [Gdrq(), *in_ci(Gdrq(steps="mean"))], ids=["learned", "mean"])
def test_a_run_that_was_cut_short_ends_as_it_would_have(tmp_path, calls, method):
    whole = compress(method, model=deep(), **W2A4)
    with pytest.raises(Stop):
        compress(method, model=deep(), folder=tmp_path, calls=calls, **W2A4)
    resumed = compress(method, model=deep(), folder=tmp_path, **W2A4)
    assert all(torch.equal(resumed.state_dict()[name], own) for name, own in whole.state_dict().items())
    with pytest.raises(gc.CheckpointError, match="groups: 4 there, 2"):
        compress(Gdrq(steps=method.steps, groups=2), model=deep(), folder=tmp_path, **W2A4)


def test_the_model_is_left_alone_and_the_same_seed_gives_the_same():
    model = deep()
    before = copy.deepcopy(model.state_dict())
    first, second = (compress("gdrq", model=model, seed=1, training={"steps": 8}, **W2A4) for _ in range(2))
    assert all(torch.equal(model.state_dict()[name], own) for name, own in before.items())
    assert all(torch.equal(second.state_dict()[name], own) for name, own in first.state_dict().items())


@pytest.mark.slow
@pytest.mark.ci
def test_weights_alone_a_submodule_and_a_layer_that_is_left_out():
    small = compress("gdrq", model=deep(), bits=3, activation_bits=None, training={"steps": 8})
    assert [layer.activation_bits for layer in small.report.layers] == [32] * 5
    small = compress("gdrq", model=Outer(), scope="inner", training={"steps": 8}, **W2A4)
    assert isinstance(small.module, Outer)
    small = compress("gdrq", model=deep(), ignore=["layers.2"], training={"steps": 8}, **W2A4)
    assert [layer.weight_bits for layer in small.report.layers] == [8, 2, 32, 2, 8]


@pytest.mark.slow
@pytest.mark.ci
def test_after_units_are_gone_filters_that_stay_are_clipped_and_quantized():
    small = compress(["hesso", "gdrq"], model=deep(), sparsity=0.5, training={"steps": 80}, **W2A4)
    assert small.report.units_removed == 16 and small.report.verified["trained == sliced"] < 1e-9
    assert [layer.weight_bits for layer in small.report.layers] == [8, 2, 2, 2, 8]


@pytest.mark.slow
@pytest.mark.ci
def test_reshaping_beats_none_on_weights_of_long_tails():
    """Equal steps from one start with a few large weights per layer: the error of rounding is lower where clipped."""

    def heavy() -> Deep:
        model = deep()
        with torch.no_grad():
            for layer in model.layers:
                layer.weight.mul_(layer.weight.abs() / layer.weight.abs().mean())
        return model

    def lost(method: Gdrq) -> float:
        seen: dict[str, GdrqRun] = {}

        class Watched(Gdrq):
            def begin(self, *args: Any) -> GdrqRun:
                seen["run"] = super().begin(*args)
                return seen["run"]

        compress(Watched(**dataclasses.asdict(method)), model=heavy(), **W2A4)
        found = 0.0
        for own in seen["run"].weights.values():
            weight = own.parameter.detach()
            found += float((own.quantizer(weight) - weight).detach().square().sum() / weight.square().sum())
        return found

    assert lost(Gdrq()) < 0.8 * lost(Gdrq(clip=None, activation_clip=None))


# ------------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (2, 8)}, "bits must be one number for GDRQ"),
        ({"bits": 4, "activation_bits": (4, 8)}, "activation_bits must be one number for GDRQ|activation_bits"),
        ({"bits": None}, "no bits are given"),
        ({"bits": 4, "sparsity": 0.5}, "does not prune"),
        ({"bits": 4, "budget": gc.Budget(bytes=0.1)}, "budget with method"),
        ({"bits": 4, "round_to": 4}, "round_to with"),
        ({"bits": 4, "training": {"steps": None, "schedule": gc.Schedule(24)}}, "a Schedule"),
    ],
)
def test_what_the_method_does_not_do(options, message):
    with pytest.raises(gc.GraphcompError, match=message) as caught:
        compress("gdrq", **options)
    assert caught.value.fix


@pytest.mark.parametrize(
    "options",
    [
        {"clip": 1.0}, {"clip": True}, {"activation_clip": 0.5}, {"reshape": 1.0}, {"reshape": -0.1}, {"groups": 0},
        {"groups": 2.5}, {"grouping": "random"}, {"steps": "best"}, {"clip": None, "steps": "mean"},
    ],
)  # fmt: skip
def test_options_out_of_range(options):
    with pytest.raises(gc.PlanError, match=next(iter(options))):
        Gdrq(**options)
