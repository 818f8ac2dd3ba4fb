"""Everything a user can get wrong with `prepare`, `QASSO` and `finalize` ends in a typed error that says the fix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from tests.training.runs import SCHEDULE, Mlp, batch, ready_of, train

X = batch("mlp")


def qasso(ready: nn.Module, *base: Any, **options: Any) -> gc.QASSO:
    return gc.QASSO(ready, *base, **{"lr": 0.01, "schedule": SCHEDULE, **options})


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("lr", [float("nan"), float("inf")])
def test_a_learning_rate_is_finite(base, lr):
    with pytest.raises(gc.PlanError, match="lr must be a finite number"):
        qasso(ready_of("mlp"), base, lr=lr)


# ------------------------------------------------------------------------------------------------ modules
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, nn.Sequential])
def test_a_module_that_was_not_prepared(wrap):
    for call in (qasso, gc.finalize):
        with pytest.raises(gc.PlanError, match="was not prepared") as caught:
            call(wrap(Mlp()))
        assert "graphcomp.prepare(" in caught.value.fix and caught.value.why


@pytest.mark.parametrize("given", [lambda m: m.parameters(), lambda m: list(m.parameters()), lambda m: None])
def test_no_module(given):
    for call in (qasso, gc.finalize, gc.shrink):
        with pytest.raises(gc.PlanError, match="is no module") as caught:
            call(given(ready_of("mlp")))
        assert "graphcomp.prepare" in caught.value.fix


class Headed(nn.Module):
    """Holds a prepared module as wrappers do, and a head: (n, 6) -> (n, 2)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.head = module, nn.Linear(3, 2)


def test_a_wrapper_with_parameters_of_its_own():
    for call in (qasso, gc.finalize):
        with pytest.raises(gc.PlanError, match="has parameters outside") as caught:
            call(nn.DataParallel(Headed(ready_of("mlp"))))
        assert "head.weight, module.head.bias" in str(caught.value) and "add_param_group" in caught.value.fix


def test_parameters_of_the_model_instead_of_the_prepared_module():
    model = Mlp()
    ready = gc.prepare(model, X)
    for given in (model.parameters(), [{"params": model.parameters()}], [{"params": model.up.weight}]):
        with pytest.raises(gc.PlanError, match=r"shape \(12, 6\) is none of the prepared module") as caught:
            qasso(ready, params=given)
        assert caught.value.why and caught.value.fix == "params=ready.parameters()"


def test_all_parameters_frozen():
    ready = ready_of("mlp").requires_grad_(False)
    with pytest.raises(gc.NothingToPrune, match="requires_grad=False"):
        qasso(ready)
    with pytest.raises(gc.PlanError, match="no parameter can be trained"):
        qasso(ready, sparsity=0.0)


def test_no_parameters_given():
    with pytest.raises(gc.PlanError, match="no parameter can be trained"):
        qasso(ready_of("mlp"), params=[])


def test_a_frozen_layer_keeps_its_units():
    ready = ready_of("mlp")
    ready.get_parameter("up.weight").requires_grad_(False)
    optimizer = qasso(ready, sparsity=0.5)
    before = ready.get_parameter("up.weight").detach().clone()
    assert [group.name for group in optimizer.groups] == ["middle/hidden"]
    train(optimizer, ready, "mlp", SCHEDULE.steps)
    assert optimizer.removed == 6 and torch.equal(ready.get_parameter("up.weight"), before)
    assert gc.finalize(ready).report.to_dict()["units"]["removed"] == 6


def test_nothing_to_prune_says_why():
    ready = gc.prepare(nn.Linear(6, 3), X)
    with pytest.raises(gc.NothingToPrune, match="model input"):
        qasso(ready)
    assert qasso(ready, sparsity=0.0).removed == 0  # it can still be quantized


def test_a_model_that_can_only_be_recorded():
    class Branching(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2 if x.sum() > 1e9 else super().forward(x)

    with pytest.raises(gc.CaptureError, match="could only be recorded") as caught:
        gc.prepare(Branching(), X)
    assert caught.value.why and "scope=" in caught.value.fix


# ------------------------------------------------------------------------------------------------ options
@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"sparsity": True}, "sparsity"),
        ({"lr_quant": -1e-3}, "lr_quant"),
        ({"lr_quant": float("nan")}, "lr_quant"),
        ({"eta": 0}, "eta"),
        ({"eta": 1.5}, "eta"),
        ({"xi": 1}, "xi"),
        ({"forgetting": "hard"}, "forgetting"),
        ({"max_quantizer_gradient": 0}, "max_quantizer_gradient"),
        ({"max_quantizer_gradient": float("nan")}, "max_quantizer_gradient"),
        ({"round_to": 0}, "at least 1"),
        ({"max_group_sparsity": 1.5}, "from 0 to 1, got 1.5"),
        ({"saliency": "l3"}, "l2"),
        ({"saliency": "activation"}, "needs activations"),
        ({"bits": (2, 8)}, "not within"),
        ({"bits": (4, 9)}, "not within"),
        ({"bits": (6, 5)}, "bits"),
        ({"bits": (4.5, 6)}, "bits"),
        ({"bits": 0}, "bits"),
        ({"schedule": 0}, "at least one step"),
        ({"schedule": 1}, "joint"),
        ({"schedule": gc.Schedule(100, joint=0)}, "joint"),
        ({"schedule": 0.5}, "schedule"),
        ({"base": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)}, "base"),
        ({"lr_quant": "1e-3"}, "lr_quant"),
        ({"schedule": True}, "whole number"),
        ({"params": 3}, "params is a int"),
        ({"params": [{"lr": 1.0}]}, "a group without parameters"),
        ({"params": [{"params": []}, nn.Parameter(torch.ones(1))]}, "groups and something else"),
        ({"params": ["up.weight"]}, "a 'up.weight' is none of the prepared"),
        ({"base_options": {"momentun": 0.9}}, "no SGD can be made(.|\n)*momentun"),
        ({"base_options": {"momentum": 0.9}, "momentum": 0.8}, "no SGD can be made(.|\n)*multiple values"),
        ({"base": torch.optim.LBFGS}, "no LBFGS can be made(.|\n)*parameter groups"),
        ({"momentun": 0.9}, "no SGD can be made(.|\n)*momentun"),
        ({"lr": -1.0}, "no SGD can be made(.|\n)*learning rate"),
        ({"sparsity": "0.5"}, "sparsity"),
    ],
)
def test_an_option_out_of_range(options, what):
    with pytest.raises(gc.PlanError, match=what) as caught:
        qasso(ready_of("mlp", bits=(4, 8)), **options)
    assert caught.value.fix or caught.value.why or "at least" in str(caught.value) or "outside" in str(caught.value)


def test_an_optimizer_that_needs_a_closure():
    with pytest.raises(gc.PlanError, match="steps of LBFGS need a closure") as caught:
        qasso(ready_of("mlp", bits=None), torch.optim.LBFGS)
    assert caught.value.why and caught.value.fix == "base=torch.optim.AdamW"


def test_bits_that_a_layer_cannot_have():
    ready = ready_of("mlp", bits=(2, 8), layer_bits=(("down", (8, 8)),))
    with pytest.raises(gc.PlanError, match=r"not within the \(8, 8\) of down") as caught:
        qasso(ready, bits=(4, 6))
    assert "a range of its own" in caught.value.why and caught.value.fix


def test_bits_of_a_module_that_has_none():
    with pytest.raises(gc.PlanError, match="without quantizers") as caught:
        qasso(ready_of("mlp", bits=None), bits=(4, 8))
    assert "prepare(" in caught.value.fix


def test_one_number_of_bits_is_a_range():
    assert qasso(ready_of("mlp", bits=(4, 8)), bits=5).bank.low.unique().tolist() == [5]


@pytest.mark.parametrize("bits", [(1, 4), (4, 17), (8, 4), (4.5, 8), 1])
def test_bits_of_prepare(bits):
    with pytest.raises(gc.PlanError, match="bits"):
        gc.prepare(Mlp(), X, bits=bits)


@pytest.mark.parametrize("own", [{"up": (1, 4)}, {"up": (8, 4)}])
def test_bits_of_a_layer(own):
    with pytest.raises(gc.PlanError, match="bits"):
        gc.prepare(Mlp(), X, layer_bits=own)


@pytest.mark.parametrize("own", [{"upp": (4, 8)}, {"re:^layer": (4, 8)}])
def test_bits_of_a_layer_that_is_not_there(own):
    with pytest.raises(gc.PlanError, match=r"layer_bits.*no module") as caught:
        gc.prepare(Mlp(), X, layer_bits=own)
    assert "up" in caught.value.fix


def test_calibration_that_is_not_finite():
    with pytest.raises(gc.CalibrationError):
        gc.prepare(Mlp(), X, calibration=[torch.full((2, 6), float("nan"))])


def test_a_sparsity_that_no_choice_meets():
    with pytest.raises(gc.BudgetError, match="22"):
        qasso(ready_of("mlp"), sparsity=0.95)


# ------------------------------------------------------------------------------------------------ too early
@pytest.mark.parametrize("bits", [(4, 8), None])
@pytest.mark.parametrize("steps", [1, 5, 11, 15])
def test_finalize_before_the_cool_down(steps, bits):
    ready = ready_of("residual", bits=bits)
    optimizer = qasso(ready)
    train(optimizer, ready, "residual", steps)
    with pytest.raises(gc.PlanError, match=rf"stopped at step {steps}, before the cool-down(.|\n)*step 16"):
        gc.finalize(ready)
    train(optimizer, ready, "residual", 1)
    assert (steps < 15) or gc.finalize(ready).report.units_removed == optimizer.removed
