"""LSQ begins with weights that were repaired and rounded as after training, and never ends below that start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.ir.passes import Pipeline
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.ptq import FLOATS
from graphcomp.quantization.trainable import SetTrainableLayers, _TrainableSetting, quantizing_to_train
from tests.quantization.test_reconstruct import Residual, error, weights_of

LONG = [pytest.mark.slow, pytest.mark.ci]
BITS: dict[str, Any] = {"bits": 3, "activation_bits": 4}


def task() -> tuple[nn.Module, list[Tensor], list[tuple[Tensor, Tensor]]]:
    """A network, inputs whose features go together, and those with the network's own outputs as targets."""
    torch.manual_seed(0)
    model, mixing = Residual().eval(), torch.randn(16, 16) / 3
    inputs = [torch.randn(64, 16) @ mixing for _ in range(4)]
    with torch.no_grad():
        return model, inputs, [(x, model(x)) for x in inputs]


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(output, batch[1])


def trained(steps: int, lr: float, **options: Any) -> gc.CompressedModel:
    model, inputs, data = task()
    return gc.compress(
        model, inputs[0][:2], method="qat", data=data, loss=loss, training=gc.Training(steps=steps, lr=lr),
        calibration=inputs, progress=False, **{**BITS, **options},
    )  # fmt: skip


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    _, _, data = task()
    return sum(float(loss(model(x), (x, y))) for x, y in data) / len(data)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("rounding", ["nearest", "second_order"])
def test_training_begins_where_the_repaired_rounding_is(rounding: Any) -> None:
    model, inputs, _ = task()
    # training keeps the channels of activations as they are
    quantization = gc.PostTraining(weights_of(3, 4).config, rounding=rounding, even_activations=False)
    options: dict[str, Any] = {"quantization": quantization, "bits": None, "activation_bits": "same"}
    after = gc.compress(model, inputs[0][:2], sparsity=0, calibration=inputs, progress=False, **options)
    start, plain = (trained(1, 1e-12, repair=repair, **options) for repair in ("least_squares", None))
    assert loss_of(start) == pytest.approx(loss_of(after), rel=0.05)
    assert loss_of(start) < loss_of(plain)
    assert any("layers repaired by least squares" in note for note in start.report.notes)
    assert not any("training began" in note for note in plain.report.notes)


@pytest.mark.parametrize(("steps", "lr"), [(3, 1e-4), (3, 1.0), pytest.param(40, 0.02, marks=LONG)])
@pytest.mark.slow
@pytest.mark.ci
def test_training_never_ends_below_its_start(steps: int, lr: float) -> None:
    start = loss_of(trained(1, 1e-12, rounding="second_order"))
    end = trained(steps, lr, rounding="second_order")
    assert loss_of(end) <= start * (1 + 1e-4)
    (note,) = (note for note in end.report.notes if "before" in note and "after" in note)
    if lr == 1.0:
        assert "the result is that of post-training quantization" in note


def test_channels_of_activations_that_stay_uneven_are_named() -> None:
    quantization = gc.PostTraining(weights_of(3, 4).config, even_activations=True)
    small = trained(1, 1e-12, quantization=quantization, bits=None, activation_bits="same")
    assert any("channels of activations were not scaled" in note for note in small.report.notes)


def test_parameters_hold_the_weight_before_rounding_and_are_rounded_to_the_levels_that_were_chosen() -> None:
    model, inputs, _ = task()
    options, batches = weights_of(3, 4), [[x] for x in inputs]
    graph = capture(model, (inputs[0],))
    passes = quantizing_to_train(graph.module, options, batches, repair=True)
    before = passes[: [isinstance(p, SetTrainableLayers) for p in passes].index(True)]
    found = []
    for keeps in (True, False):
        program = Pipeline("until layers are set", before)(graph)
        setting = _TrainableSetting(program.stages[FLOATS].module, program.module, options, repair=True)
        if not keeps:
            setting._kept = lambda quantizer, found: found.weight  # type: ignore[method-assign]
        setting.walk(batches)
        found.append(setting)
    assert error(found[0], batches) == error(found[1], batches)
    differs = 0
    for (node, quantizer), (twin, _) in zip(*(quantizer_nodes(s.fake) for s in found), strict=True):
        if node not in found[0].constant:
            continue
        weight, level = (s.held(n).weight for s, n in zip(found, (node, twin), strict=True))  # type: ignore[union-attr]
        assert torch.equal(quantizer(weight), quantizer(level))
        differs += int((weight != level).sum())
    assert differs > 0


@pytest.mark.slow
@pytest.mark.ci
def test_training_begins_with_reconstructed_rounding() -> None:
    config, found = weights_of(4, 4).config, []
    ways: tuple[Any, ...] = ("second_order", gc.Reconstruction(steps=120))
    for rounding in ways:
        quantization = gc.PostTraining(config, rounding=rounding)
        found.append(trained(1, 1e-12, quantization=quantization, bits=None, activation_bits="same"))
    assert any("was reconstructed" in note or "reconstructed on" in note for note in found[1].report.notes)
    assert loss_of(found[1]) < loss_of(found[0])
