"""Methods under autocast and in a submodule: each goes on bit for bit, and leaves alone what is not its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphcomp as gc
from graphcomp.methods.psgd import Psgd, PsgdRun
from tests.marks import in_ci
from tests.methods.learning import Outer, Stop, batches, compress

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "psgd, rounded": ("psgd", {"bits": 4}),
    "psgd, pruned": ("psgd", {"sparsity": 0.9}),
    "ternary": ("ternary", {"bits": 2}),
    "gdrq": ("gdrq", {"bits": 4}),
    "prune_ternary": ("prune_ternary", {"bits": 2, "sparsity": 0.5}),
    "taylor2": ("taylor2", {"bits": 8, "sparsity": 0.25}),
}

BITS = {
    "psgd, rounded": [4, 4, 4], "psgd, pruned": [32, 32, 32], "ternary": [8, 2, 8], "gdrq": [8, 4, 8],
    "prune_ternary": [8, 2, 8], "taylor2": [8, 8, 8],
}  # fmt: skip
"""Case -> bits of the weights of the three layers."""
OTHERS = [case for case in CASES if not case.startswith("psgd")]


@pytest.mark.parametrize("case", ["psgd, rounded", *in_ci("psgd, pruned", *OTHERS)])
@pytest.mark.slow
@pytest.mark.ci
def test_a_run_in_bfloat16_goes_on_bit_for_bit(tmp_path, case):
    method, options = CASES[case]
    options = {**options, "training": {"autocast": torch.bfloat16}}
    whole = compress(method, **options)
    with pytest.raises(Stop):
        compress(method, calls=9, folder=tmp_path, **options)
    resumed = compress(method, folder=tmp_path, **options)
    assert all(torch.equal(resumed.state_dict()[name], own) for name, own in whole.state_dict().items())
    assert all(t.dtype == torch.float32 for t in whole.state_dict().values() if t.is_floating_point())


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("case", CASES)
def test_scaled_losses_of_float16_change_little(case):
    """Gradients are unscaled before a method acts on them: the result is near that of float32."""
    method, options = CASES[case]
    plain, half = (
        compress(method, **options, training={"autocast": dtype, "optimizer": torch.optim.SGD, "steps": 4})
        for dtype in (None, torch.float16)
    )
    inputs = batches()[0][0]
    assert not torch.equal(plain(inputs), half(inputs))  # the forward passes were in float16
    torch.testing.assert_close(half(inputs), plain(inputs), rtol=0.1, atol=0.1)


def test_gradients_are_scaled_by_distances_in_the_dtype_of_the_weights():
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Watched(PsgdRun):
        def before_step(self, step: int) -> None:
            expected = {name: p.grad * self.scale(name) for name, p in self.weights.items()}
            super().before_step(step)
            seen.extend((p.grad.clone(), expected[name]) for name, p in self.weights.items())

    class Watching(Psgd):
        def begin(self, ready: Any, goal: gc.Goal, training: gc.Training, steps: int) -> PsgdRun:
            return Watched(ready, strength=None, eps=1e-5, sparsity=0.0)

    compress(Watching(), bits=4, training={"autocast": torch.bfloat16, "steps": 3})
    assert len(seen) == 9
    for scaled, expected in seen:
        assert scaled.dtype == torch.float32 and bool(scaled.any()) and torch.equal(scaled, expected)


# ------------------------------------------------------------------------------------------------ a submodule
@pytest.mark.parametrize("case", ["psgd, pruned", *in_ci("psgd, rounded", *OTHERS)])
def test_a_submodule_is_compressed_and_the_rest_is_trained(case):
    method, options = CASES[case]
    model = Outer()
    before = model.last.weight.detach().clone()
    small = compress(method, model=model, scope="inner", **options)
    assert isinstance(small.module, Outer) and torch.equal(model.last.weight, before)
    last = small.module.last.weight.detach()
    assert not torch.equal(last, before) and bool((last != 0).all())  # trained, in floats, and not pruned
    assert small.report.verified["whole model around the submodule"] < 1e-6
    bits = [layer.weight_bits for layer in small.report.layers]
    assert bits == BITS[case]
    if case == "psgd, pruned":
        weights = [p for p in small.module.inner.parameters() if p.dim() > 1]
        assert sum(int((p == 0).sum()) for p in weights) == round(0.9 * sum(p.numel() for p in weights))
