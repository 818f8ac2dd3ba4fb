"""A method of a user's own: one class for what happens around a step, and one that begins it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import graphcomp as gc
from graphcomp.methods.registry import METHODS
from graphcomp.methods.stages import folders
from tests.methods.learning import Stop, batches, compress, loss, net

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def of_the_page() -> dict[str, Any]:
    """The names that the first example of the page defines."""
    (code, *_) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


@pytest.mark.slow
@pytest.mark.ci
def test_the_method_of_the_page_trains_saves_and_goes_on(tmp_path):
    method = of_the_page()["Shrinkage"]
    whole = compress(method(strength=0.05))
    plain = compress(method(strength=0.0))
    small, large = (sum(float(p.detach().abs().sum()) for p in own.parameters()) for own in (whole, plain))
    assert small < large
    with pytest.raises(Stop):
        compress(method(strength=0.05), folder=tmp_path, calls=9)
    resumed = compress(method(strength=0.05), folder=tmp_path)
    assert all(torch.equal(resumed.state_dict()[name], own) for name, own in whole.state_dict().items())
    with pytest.raises(gc.CheckpointError, match=r"strength: 0\.05 there, 0\.1 now"):
        compress(method(strength=0.1), folder=tmp_path)
    with pytest.raises(gc.CheckpointError, match="method: shrinkage there, qat now"):
        compress("qat", bits=8, folder=tmp_path)
    with pytest.raises(gc.CheckpointError, match="method: shrinkage there, qasso now") as caught:
        compress("hesso", folder=tmp_path)
    assert "saliency: None there, geta now" in str(caught.value) and "budget" not in str(caught.value)


def test_a_method_that_does_not_quantize_refuses_bits():
    with pytest.raises(gc.PlanError, match="method='shrinkage' does not quantize"):
        compress(of_the_page()["Shrinkage"](), bits=8)
    with pytest.raises(gc.PlanError, match="method='shrinkage' does not prune"):
        compress(of_the_page()["Shrinkage"](), sparsity=0.5)


def test_methods_run_in_turn_as_stages(tmp_path):
    stages = [*METHODS["hesso"], of_the_page()["Shrinkage"]()]
    assert folders(stages) == ["1-prune", "2-shrinkage"]
    small = compress(stages, sparsity=0.5, training={"steps": 48}, folder=tmp_path)
    assert small.report.units_removed == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-prune", "2-shrinkage"]


def test_single_weights_that_one_stage_prunes_stay_zero_in_the_next():
    small = compress([*METHODS["psgd"], of_the_page()["Shrinkage"]()], sparsity=0.5)
    weights = [p for p in small.module.parameters() if p.dim() > 1]
    assert sum(int((p == 0).sum()) for p in weights) == 336
    assert any("336 of 672 weights" in note for note in small.report.notes)


@pytest.mark.parametrize("method", [3, [], [3], ["geta", None], gc.Method, {"geta"}])
def test_what_is_no_method(method):
    with pytest.raises(gc.PlanError, match=r"method must be a name, a graphcomp\.Method"):
        compress(method)


# ------------------------------------------------------------------------------------------------ elements
def pruned(bits: int | None = 8) -> tuple[Any, dict[str, torch.Tensor]]:
    ready = gc.prepare(net(), batches()[0][0], bits=bits).train()
    masks = {"second.weight": torch.rand(8, 8, 3, 3) < 0.5, "head.weight": torch.rand(3, 8) < 0.5}
    ready.keep_elements(masks)
    return ready, masks


def test_pruned_elements_are_held_through_training_shrinking_and_copies():
    ready, masks = pruned()
    schedule = gc.Schedule(12, warmup=2, projection=3, joint=3)
    optimizer = gc.QASSO(ready, torch.optim.SGD, lr=0.05, momentum=0.9, sparsity=0.4, schedule=schedule)
    for k in range(12):
        if k == 10:
            optimizer.shrink()
        optimizer.zero_grad()
        loss(optimizer.ready(batches()[k % 4][0]), batches()[k % 4]).backward()
        optimizer.step()
    small = optimizer.ready
    for name, mask in small.elements.items():
        assert mask.shape == small.get_parameter(name).shape != masks[name].shape
        assert not bool(small.get_parameter(name)[~mask].any())
    pruned_here = sum(int((~mask).sum()) for mask in small.elements.values())
    found = gc.finalize(small)
    (note,) = [note for note in found.report.notes if "one by one" in note]
    assert note.startswith(f"{pruned_here} of {sum(m.numel() for m in small.elements.values())} weights in 2 tensors")


def test_elements_that_another_optimizer_moved_are_refused_or_set_to_zero():
    ready, masks = pruned(None)
    ready.eval()
    with torch.no_grad():
        ready.get_parameter("second.weight").add_(1e-4)
    small = gc.finalize(ready)
    assert not bool(small.module.second.weight[~masks["second.weight"]].any())
    assert bool(ready.get_parameter("second.weight")[~masks["second.weight"]].any())  # left as it was
    with torch.no_grad():
        ready.get_parameter("second.weight").add_(1.0)
    with pytest.raises(gc.VerificationError, match="for elements that are pruned"):
        gc.finalize(ready)


def test_masks_that_do_not_fit_are_refused():
    ready, _ = pruned()
    for elements in ({"nowhere": torch.ones(2)}, {"head.weight": torch.ones(8)}):
        with pytest.raises(gc.PlanError, match="must have the shape of a parameter"):
            ready.keep_elements(elements)
