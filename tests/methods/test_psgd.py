"""PSGD: the warp that it is gradient descent in, targets and scales of gradients, and runs by name."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.api import _prepared
from graphcomp.methods.psgd import Psgd, PsgdRun, distances, targets
from graphcomp.quantization.spec import QuantSpec
from graphcomp.training.optimizer import MethodOptimizer
from tests.methods.learning import Stop, batches, compress, loss, net

DELTA, LEVELS, EPS = 0.25, 3, 1e-3
LEVELS_OF_4 = QuantSpec(4).quant_max
PEAK = torch.tensor(DELTA * LEVELS, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ the warp
def scale(w: Tensor) -> Tensor:
    return distances(w, PEAK, LEVELS, EPS)


def warp(w: Tensor) -> Tensor:
    """f with f' = 1 / sqrt(scale), continuous: gradient descent in f(w) is PSGD in w."""
    target = targets(w, PEAK, LEVELS)
    offset = 4 * (target / DELTA) * (math.sqrt(DELTA / 2 + EPS) - math.sqrt(EPS))
    return 2 * (w - target).sign() * ((w - target).abs().add(EPS).sqrt() - math.sqrt(EPS)) + offset


def unwarp(v: Tensor) -> Tensor:
    half = 2 * (math.sqrt(DELTA / 2 + EPS) - math.sqrt(EPS))
    cell = (v / (2 * half)).round().clamp(-LEVELS, LEVELS)
    rest = v - 2 * half * cell
    return cell * DELTA + rest.sign() * ((rest.abs() / 2 + math.sqrt(EPS)) ** 2 - EPS)


def test_the_warp_is_monotone_invertible_and_has_the_slope_of_the_scale():
    w = torch.linspace(-1.2, 1.2, 4001, dtype=torch.float64)
    v = warp(w)
    assert bool((v.diff() > 0).all())
    assert float((unwarp(v) - w).abs().max()) < 1e-12
    border = ((w / DELTA - 0.5) - (w / DELTA - 0.5).round()).abs() * DELTA
    inside = ((border > 1e-2) | (w.abs() > 0.88)) & (targets(w, PEAK, LEVELS) - w).abs().gt(1e-2)
    h = 1e-6
    slope = (warp(w + h) - warp(w - h)) / (2 * h)
    assert float((slope * scale(w).sqrt() - 1)[inside].abs().max()) < 1e-4


@pytest.mark.parametrize(("eta", "gap"), [(1e-1, 2.738e-4), (1e-2, 2.738e-6), (1e-3, 2.738e-8)])
def test_one_step_is_gradient_descent_in_the_warped_space_to_second_order(eta, gap):
    w = torch.tensor([0.3, 0.07, -0.44, 0.61], dtype=torch.float64)
    gradient = w - 0.9
    scaled = w - eta * scale(w) * gradient
    warped = unwarp(warp(w) - eta * scale(w).sqrt() * gradient)
    assert float((scaled - warped).abs().max()) == pytest.approx(gap, rel=1e-3)


@pytest.mark.parametrize(("eta", "gap"), [(1e-2, 7.39e-5), (1e-3, 7.42e-6)])
def test_after_unit_time_both_paths_agree_to_first_order(eta, gap):
    scaled = warped = torch.tensor([0.3, 0.07, -0.44, 0.61], dtype=torch.float64)
    for _ in range(round(1 / eta)):
        scaled = scaled - eta * scale(scaled) * (scaled - 0.9)
        warped = unwarp(warp(warped) - eta * scale(warped).sqrt() * (warped - 0.9))
    assert float((scaled - warped).abs().max()) == pytest.approx(gap, rel=1e-2)


# ------------------------------------------------------------------------------------------------ gradients
def test_targets_and_distances_on_plain_numbers():
    w = torch.tensor([0.50, -0.21, 0.03, 0.125, -0.49])
    found = targets(w, torch.tensor(0.5), QuantSpec(4).quant_max)
    torch.testing.assert_close(found, torch.tensor([0.5, -0.2142857, 0.0, 0.1428571, -0.5]))
    expected = torch.tensor([0.0, 0.0042857, 0.03, 0.0178571, 0.01])
    torch.testing.assert_close(distances(w, torch.tensor(0.5), 7, 0.0), expected, atol=1e-7, rtol=1e-5)
    assert torch.equal(distances(w, torch.tensor(0.5), 0, 0.0), w.abs())


def begun(
    bits: int | None = 4,
    *,
    lr: float = 0.1,
    decay: float = 0.01,
    model: nn.Module | None = None,
    example: Tensor | None = None,
    **options: object,
) -> tuple[MethodOptimizer, PsgdRun]:
    model, example = model or net(), batches()[0][0] if example is None else example
    source = partial(_prepared, model, example, None, ignore=(), keep_inputs=(), prune=None, scope="", outputs=None)
    goal = gc.Goal(bits=None if bits is None else (bits, bits), activation_bits=None)
    run = PsgdRun(Psgd().prepare(source, goal).train(), **{"strength": 150.0, "eps": 1e-3, "sparsity": 0.0, **options})
    return MethodOptimizer(run, torch.optim.SGD, lr, {"momentum": 0.9, "weight_decay": decay}), run


def step(optimizer: MethodOptimizer, run: PsgdRun) -> dict[str, Tensor]:
    """One step; the gradients before it."""
    optimizer.zero_grad()
    batch = batches()[0]
    run.loss(lambda own, tensors=None: run.ready(own[0]), batch, loss).backward()
    gradients = {name: p.grad.clone() for name, p in run.weights.items()}
    optimizer.step()
    return gradients


def test_gradients_are_scaled_exactly_and_forward_passes_see_the_weights_as_they_are():
    optimizer, run = begun()
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in run.weights.items()}
    scales = {name: run.scale(name) for name in run.weights}
    inputs = batches()[0][0]
    with run.ready.in_floats():
        assert torch.equal(run.ready(inputs), net().train()(inputs))
    gradients = step(optimizer, run)
    for name, p in run.weights.items():
        pointer, old = before[name]
        peak, levels = old.abs().max(), 7
        assert torch.equal(scales[name], ((old - targets(old, peak, levels)).abs() + 1e-3) * 150)
        assert p.data_ptr() == pointer and torch.equal(p.grad, scales[name] * gradients[name])


def test_momentum_holds_scaled_gradients_and_weight_decay_is_not_scaled():
    optimizer, run = begun()
    before = {name: p.detach().clone() for name, p in run.weights.items()}
    scales = {name: run.scale(name) for name in run.weights}
    gradients = step(optimizer, run)
    for name, p in run.weights.items():
        expected = scales[name] * gradients[name] + 0.01 * before[name]
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], expected)


def test_a_weight_of_zero_stays_where_the_target_is_zero_and_eps_is_zero():
    optimizer, run = begun(None, eps=0.0, strength=None)
    weight = run.weights["second.weight"]
    with torch.no_grad():
        weight[0].zero_()
    assert torch.equal(run.scale("second.weight")[0], torch.zeros_like(weight[0]))
    step(optimizer, run)
    assert not bool(weight[0].any()) and bool(weight[1:].any())


def test_running_ranges_follow_and_quantizers_have_the_exact_ones():
    optimizer, run = begun(strength=None)
    old = run.ranges["second.weight"].clone()
    step(optimizer, run)
    weight = run.weights["second.weight"].detach()
    torch.testing.assert_close(run.ranges["second.weight"], 0.9 * old + 0.1 * torch.stack(weight.aminmax()))
    scale = run.quantizers["second.weight"].scale
    torch.testing.assert_close(scale.detach(), weight.abs().max() / 7)


def test_the_default_scale_is_one_on_average_over_a_grid_and_two_at_most():
    _, run = begun(strength=None, eps=0.0)
    weight = run.weights["second.weight"]
    with torch.no_grad():
        weight.copy_(torch.linspace(-1, 1, weight.numel()).view(weight.shape))
        run.ranges["second.weight"] = torch.tensor([-1.0, 1.0])
    assert float(run.scale("second.weight").mean()) == pytest.approx(1.0, abs=0.01)
    assert float(run.scale("second.weight").max()) == pytest.approx(2.0, abs=0.05)
    run.ranges["second.weight"] = torch.tensor([-0.5, 0.25])  # weights ran ahead of the running range
    assert float(run.scale("second.weight").max()) == 2.0


class Task:
    """Ten noisy classes, and a network of three layers that is trained from the same start in either way.

    Attributes:
        distance: squared, of the weights to the grid of 4 bits, in that of the weights to zero.
        floats, rounded: accuracy on other data than those of training, before and after the weights are rounded.
    """

    def __init__(self, seed: int, scaled: bool, steps: int = 500, noise: float = 1.8) -> None:
        draws = torch.Generator().manual_seed(seed)
        centres, labels = torch.randn(10, 32, generator=draws), torch.randint(10, (12000,), generator=draws)
        inputs = centres[labels] + noise * torch.randn(12000, 32, generator=draws)
        torch.manual_seed(seed)
        layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        optimizer, run = begun(
            model=nn.Sequential(*layers), example=inputs[:2], strength=None, eps=1e-5, lr=0.05, decay=1e-4
        )
        if not scaled:
            run.scale = lambda name: torch.ones(())  # plain SGD
        for _ in range(steps):
            rows = torch.randint(4000, (64,), generator=draws)
            optimizer.zero_grad()
            run.loss(lambda batch, tensors=None: run.ready(batch[0]), (inputs[rows], labels[rows]), loss).backward()
            optimizer.step()
        weights = [p.detach() for p in run.weights.values()]
        off = sum(float((p - targets(p, p.abs().max(), LEVELS_OF_4)).square().sum()) for p in weights)
        self.distance = off / sum(float(p.square().sum()) for p in weights)
        run.ready.eval()
        with torch.no_grad():
            self.rounded = self.accuracy(run.ready(inputs[4000:]), labels[4000:])
            with run.ready.in_floats():
                self.floats = self.accuracy(run.ready(inputs[4000:]), labels[4000:])

    @staticmethod
    def accuracy(output: Tensor, labels: Tensor) -> float:
        return float((output.argmax(1) == labels).float().mean())


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("seed", range(3))
def test_rounding_without_data_costs_less_than_after_sgd(seed):
    scaled, plain = Task(seed, True), Task(seed, False)
    assert scaled.distance < 0.5 * plain.distance
    assert scaled.floats - scaled.rounded < plain.floats - plain.rounded
    assert scaled.rounded > plain.rounded and scaled.floats > plain.floats - 0.01


# ------------------------------------------------------------------------------------------------ by name
def test_weights_are_rounded_without_data():
    small = compress("psgd", bits=4)
    bits = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in small.report.layers}
    assert bits == {"first": (4, 32), "second": (4, 32), "head": (4, 32)}
    assert any("activations stay float" in note for note in small.report.notes)


def test_first_and_last_layer_have_8_bits_where_the_others_have_few():
    small = compress("psgd", bits=3, activation_bits=None)
    assert [layer.weight_bits for layer in small.report.layers] == [8, 3, 8]
    assert not any("activations" in note for note in small.report.notes)


def test_the_smallest_weights_are_pruned_to_the_element():
    small = compress("psgd", sparsity=0.9)
    weights = [p for p in small.module.parameters() if p.dim() > 1]
    assert sum(int((p == 0).sum()) for p in weights) == round(0.9 * sum(p.numel() for p in weights))
    assert any("605 of 672 weights in 3 tensors" in note for note in small.report.notes)


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_that_was_cut_short_ends_as_it_would_have(tmp_path):
    whole = compress("psgd", bits=4)
    with pytest.raises(Stop):
        compress("psgd", bits=4, folder=tmp_path, calls=13)
    resumed = compress("psgd", bits=4, folder=tmp_path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    with pytest.raises(gc.CheckpointError, match="strength: None there, 150"):
        compress(Psgd(strength=150.0), bits=4, folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs bits or a sparsity"),
        ({"bits": 4, "sparsity": 0.5}, "needs bits or a sparsity"),
        ({"bits": (4, 8)}, "one number for PSGD"),
        ({"bits": 4, "activation_bits": 8}, "activation_bits with"),
        ({"sparsity": {"second": 0.5}}, "sparsity by module"),
        ({"bits": 4, "budget": gc.Budget(bops=0.1)}, "budget with"),
        ({"sparsity": 0.5, "training": {"steps": None, "schedule": gc.Schedule(24)}}, "a Schedule"),
    ],
)
def test_what_the_method_does_not_do(options, message):
    with pytest.raises(gc.PlanError, match=message):
        compress("psgd", **options)
