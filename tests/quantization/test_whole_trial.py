"""The model as a whole, learned: nearer to the float model on samples held out, on other samples, within memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.ir.inputs import sample_count
from graphcomp.quantization import reconstruct as module
from graphcomp.quantization.block_trial import Data
from graphcomp.quantization.pieces import in_parts, pieces_of
from graphcomp.quantization.reconstruct import JUDGES, SAMPLES_AT_ONCE, WHOLE, _Walk, reconstruct
from graphcomp.quantization.reconstruction import Reconstruction
from graphcomp.quantization.setting import Setting
from graphcomp.quantization.whole_trial import WholeTrial
from tests.quantization.test_reconstruct import Residual, error, residual, set_up, state, weights_of

WHOLE_ALONE = Reconstruction(steps=0, whole_steps=100)


def trial_of(setting: Setting, batches: list[list[Tensor]], options: Reconstruction) -> WholeTrial:
    """Return the trial of the model as a whole, and let no one learn it."""
    walk, found = _Walk(setting, pieces_of(setting.folded, batches), options), list[WholeTrial]()
    walk._try = lambda name, trial, size, steps: found.append(trial)  # type: ignore[assignment, method-assign, return-value, func-returns-value]
    walk._whole()
    return found[0]


@pytest.mark.slow
@pytest.mark.ci
def test_the_whole_alone_gets_nearer_on_samples_held_out() -> None:
    setting, batches = residual()
    held_out = [piece for k, piece in enumerate(pieces_of(setting.folded, batches)) if k % JUDGES == JUDGES - 1]
    before = error(setting, held_out)
    found = reconstruct(setting, batches, WHOLE_ALONE)
    assert set(found.blocks) == {WHOLE} and not found.left
    assert error(setting, held_out) < 0.97 * before
    assert found.outputs == pytest.approx((before, error(setting, held_out)))
    assert found.samples == (384, 128)


@pytest.mark.slow
@pytest.mark.ci
def test_what_blocks_hand_on_is_learned_along() -> None:
    setting, batches = residual()
    trial = trial_of(setting, batches, WHOLE_ALONE)
    assert [node.name for node in trial.exits] == ["relu", "add", "add_1", "linear_4"]
    loss = trial._loss(0, 0.0, 1.0, torch.Generator().manual_seed(0))
    trial.exits = {}
    alone = trial._loss(0, 0.0, 1.0, torch.Generator().manual_seed(0))
    assert loss.item() > alone.item() > 0
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(bool(soft.free.grad.any()) for soft in trial.softs.values() if soft.free.grad is not None)
    assert all(soft.free.grad is not None for soft in trial.softs.values())
    assert all(bias.grad is not None for bias in trial.biases.values())


@pytest.mark.slow
@pytest.mark.ci
def test_other_samples_are_learned_and_the_floats_of_those_are_the_targets() -> None:
    setting, batches = residual()
    seen: list[int] = []

    def doubled(inputs: Sequence[Any], generator: torch.Generator) -> list[Tensor]:
        (x,) = inputs
        seen.append(len(x))
        return [x * (1 + torch.rand((), generator=generator))]

    options = Reconstruction(steps=0, whole_steps=20, augment=doubled)
    trial = trial_of(setting, batches, options)
    (placeholder,) = setting.fake.graph.find_nodes(op="placeholder")
    for k in range(3):
        again = torch.Generator().manual_seed(k)
        other = doubled([trial.data.given[k][placeholder]], again)
        plain = trial_of(setting, [other, other], Reconstruction(steps=0, whole_steps=20))
        plain.data = Data([{placeholder: other[0]}], None, [], [0], [])
        one, same = trial._loss(k, 0.0, 1.0, torch.Generator().manual_seed(k)), plain._loss(0, 0.0, 1.0, again)
        assert one.item() == same.item()
    seen.clear()
    reconstruct(setting, batches, options)
    assert len(seen) == 20 and set(seen) == {SAMPLES_AT_ONCE}  # what judges stays as it is


def test_steps_take_as_many_samples_as_memory_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, batches = residual()
    sizes = []
    for share in (1.0, 0.5):
        trial = trial_of(setting, batches, WHOLE_ALONE)
        bytes_of_one = module.KEPT_FOR_GRADIENTS * module._bytes(trial.segment) / 64  # the example has 64 samples
        monkeypatch.setattr(module, "LIVE", int(bytes_of_one * SAMPLES_AT_ONCE * share))
        trial = trial_of(setting, batches, WHOLE_ALONE)
        sizes.append({len(t) for given in trial.data.given for t in given.values()})
    assert sizes == [{SAMPLES_AT_ONCE}, {SAMPLES_AT_ONCE // 2}]
    assert len(trial.data.learns) == 3 * len(trial.data.judges)


def test_a_model_that_no_memory_is_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Centred(nn.Module):
        """Whose batches cannot be divided."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.two(torch.relu(self.one(x - x.mean(0))))
            return y

    torch.manual_seed(0)
    batches = [[torch.randn(32, 6)] for _ in range(2)]
    setting = set_up(Centred().eval(), (batches[0][0],), batches, weights_of(2, None))
    before = state(setting.fake)
    monkeypatch.setattr(module, "LIVE", 1000)
    found = reconstruct(setting, batches, Reconstruction(steps=0, whole_steps=5))
    assert "memory" in found.left[WHOLE] and not found.blocks
    assert all(torch.equal(t, before[name]) for name, t in setting.fake.state_dict().items())


@pytest.mark.slow
@pytest.mark.ci
def test_blocks_without_the_whole_and_the_integers_of_the_whole() -> None:
    setting, batches = residual()
    found = reconstruct(setting, batches, Reconstruction(steps=20, whole_steps=0))
    assert WHOLE not in {*found.blocks, *found.left} and len({*found.blocks, *found.left}) == 4
    torch.manual_seed(0)
    model, given = Residual().eval(), [batch[0] for batch in batches]  # as in `residual`
    options = replace(weights_of(4, 4), rounding=WHOLE_ALONE)
    small = gc.compress(model, given[0], quantization=options, calibration=given, repair=None, progress=False)
    assert set(small.report.reconstructions) == {WHOLE}
    assert any("integers" in law for law in small.report.verified)


def test_parts_of_a_batch_hold_all_samples() -> None:
    x = torch.randn(19, 4)
    parts = in_parts([x, 3], 8)
    assert max(map(sample_count, parts)) <= 8 and torch.equal(torch.cat([part[0] for part in parts]), x)
    assert all(part[1] == 3 for part in parts)


@pytest.mark.parametrize("options", [{"whole_steps": -1}, {"whole_steps": 0.5}, {"augment": "mirror"}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(gc.PlanError, match=next(iter(options))):
        gc.Reconstruction(**options)


@pytest.mark.slow
@pytest.mark.ci
def test_what_is_no_inputs_of_the_model_is_refused() -> None:
    setting, batches = residual()
    for augment in (lambda inputs, generator: [*inputs, *inputs], lambda inputs, generator: None):
        with pytest.raises(gc.PlanError, match="augment"):
            reconstruct(setting, batches, Reconstruction(steps=0, whole_steps=2, augment=augment))
