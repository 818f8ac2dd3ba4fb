"""Pruning to ternary weights: section 6 of the methods, items 4 to 6, on runs; to the file, resumed, refused."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.api import _prepared
from graphcomp.cost.conventions import SizeModel
from graphcomp.methods.pqk import sparsity_at
from graphcomp.methods.prune_ternary import PruneTernary, PruneTernaryRun, _parts
from graphcomp.quantization.quantizers.ternary import TernaryQuantizer
from graphcomp.quantization.ternary_direction import cosines, directions
from graphcomp.training.optimizer import MethodOptimizer
from tests.methods.learning import Outer, Stop, batches, check_saved_and_exported, compress, loss
from tests.methods.test_gdrq import Deep, deep

FEW = ("layers.1.weight", "layers.2.weight", "layers.3.weight")
TOTAL = 3 * 8 * 8 * 9


def begun(
    method: PruneTernary | None = None, steps: int = 20, norms: bool = True, training: Any = None, **asked: Any
) -> tuple[MethodOptimizer, PruneTernaryRun]:
    method = method or PruneTernary(every=2)
    source = partial(
        _prepared, deep(norms), batches()[0][0], None, ignore=(), keep_inputs=(), prune=None, scope="", outputs=None
    )
    goal = gc.Goal(**{"bits": (2, 2), "activation_bits": None, "sparsity": 0.8, **asked})
    run = method.begin(method.prepare(source, goal).train(), goal, training or gc.Training(steps=steps), steps)
    return MethodOptimizer(run, torch.optim.SGD, 0.05, {"momentum": 0.9, "weight_decay": 1e-2}), run


def train(optimizer: MethodOptimizer, run: PruneTernaryRun, steps: int) -> None:
    def forward(batch: Any, tensors: Any = None) -> Tensor:
        if tensors is None:
            return run.ready(batch[0])
        return torch.func.functional_call(run.ready, dict(tensors), (batch[0],))

    for _ in range(steps):
        optimizer.zero_grad()
        batch = batches()[run.step % 4]
        run.loss(forward, batch, loss).backward()
        optimizer.step()


# ------------------------------------------------------------------------------------------------ the three stages
def test_filters_keep_their_norms_and_masks_follow_the_cubic_schedule():
    optimizer, run = begun()
    assert run.ends == (8, 16, 18) and tuple(run.weights) == FEW and len(run.others) == 2
    start = {name: w.rows.norm(dim=1) for name, w in run.weights.items()}
    for step in range(9):
        share = sparsity_at(min(step - step % 2, 8), 8, 0.8, 0.3)
        gone = sum(int((~w.mask).sum()) for w in run.weights.values())
        assert gone == round(share * TOTAL) == run.metrics()["weights_pruned"]
        assert all(bool(w.mask.any(1).all()) for w in run.weights.values())
        for name, weight in run.weights.items():
            torch.testing.assert_close(weight.rows.norm(dim=1), start[name])
        train(optimizer, run, 1)
    assert run.stage(7) == "pruning" and run.stage(8) == "ternary" and run.stage(16) == "final"


def test_the_first_views_are_the_pruned_weights_and_then_ternary_directions():
    optimizer, run = begun(PruneTernary(every=2, gentle=0.5))
    for weight in run.weights.values():
        torch.testing.assert_close(weight.view(0.0, 1.0).flatten(1), weight.rows * weight.mask)
    train(optimizer, run, 8)
    assert run._eta() == 0.25
    train(optimizer, run, 3)
    assert run._eta() == 1.0
    for weight in run.weights.values():
        view = weight.view(1.0, 1.0).detach().flatten(1)
        torch.testing.assert_close(view, weight.norms * directions(weight.rows, weight.mask))
        torch.testing.assert_close(
            view.norm(dim=1, keepdim=True), weight.norms
        )  # unit filters, times what norms absorb


def test_6_4_gradients_are_tangent_and_reach_pruned_weights():
    _, run = begun()
    weight = run.weights[FEW[0]]
    with torch.no_grad():
        weight.parameter.data = weight.parameter.data.double()
        weight.norms = weight.norms.double()
    weight.choose(100)
    for eta in (0.0, 0.5, 1.0):
        weight.parameter.grad = None
        pull = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (weight.view(eta, 1.0) * pull).sum().backward()
        gradient = weight.parameter.grad.flatten(1)
        assert float((gradient * weight.rows).sum(1).abs().max()) < 1e-12
        assert bool((gradient[~weight.mask] != 0).all())
        expected = (
            pull.flatten(1) - (pull.flatten(1) * weight.rows).sum(1, keepdim=True) / weight.norms**2 * weight.rows
        )
        torch.testing.assert_close(gradient, expected)  # of s v, at a row of norm s


def test_gradients_above_c_are_zero():
    _, run = begun(norms=False)
    weight = run.weights[FEW[0]]
    weight.view(1.0, 0.2).sum().backward()
    gradient = weight.parameter.grad.flatten(1)
    shares = weight.rows.abs() / weight.rows.norm(dim=1, keepdim=True)
    assert torch.equal(gradient != 0, shares <= 0.2) and bool((shares > 0.2).any())


@pytest.mark.parametrize("norms", [True, False])
def test_6_5_the_pull_strictly_raises_the_cosine(norms):
    _, run = begun(norms=norms)
    for weight in run.weights.values():
        weight.choose(150)
        for _ in range(5):
            before = cosines(weight.rows, weight.mask)
            with torch.no_grad():
                weight.settle(0.05)
            assert bool((cosines(weight.rows, weight.mask) > before).all())


def test_the_pull_rises_to_the_whole_way():
    _, run = begun(PruneTernary(pull=0.1))
    pulls = [run.pull(step) for step in range(18)]
    assert pulls[:8] == [0.0] * 8 and pulls[15] == pytest.approx(0.1) and pulls[17] == 1.0
    assert all(b > a for a, b in itertools.pairwise(pulls[7:]))


@pytest.mark.parametrize("norms", [True, False])
def test_weights_are_ternary_in_the_last_stage_and_stay_while_the_rest_is_trained(norms):
    optimizer, run = begun(steps=30, norms=norms)
    train(optimizer, run, run.ends[2])
    assert run.finished and set(run.cosine) == {"before the last stage", "when weights became ternary"}
    assert run.cosine["when weights became ternary"][1] > 0.999
    before = {name: p.detach().clone() for name, p in run.ready.named_parameters()}
    for weight in run.weights.values():
        own = weight.parameter.detach()
        assert torch.equal(weight.quantizer(own).detach(), own)  # the quantizer gives the weights themselves
        levels = weight.rows.abs().amax(1, keepdim=True)
        assert bool(((weight.rows.abs() == levels) | (weight.rows == 0)).all())
        assert torch.equal(weight.rows != 0, weight.mask)
    train(optimizer, run, 30 - run.ends[2])
    moved = {name for name, p in run.ready.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert not moved & set(FEW) and {"layers.0.weight", "head.weight"} <= moved
    scales = {name for name in moved if name.endswith("scale") and name.rsplit(".", 2)[-2].startswith("layers_")}
    ternary = {site.name for site, q in run.ready.quantizers() if isinstance(q, TernaryQuantizer)}
    assert {f"{name}.scale" for name in ternary} <= scales if not norms else not {f"{n}.scale" for n in ternary} & moved


def test_scales_are_means_where_no_norm_absorbs_them():
    for options in (
        {"norms": False},
        {"training": gc.Training(steps=20, freeze_norms=0)},
        {"training": gc.Training(steps=20, freeze_norms=0.5)},
    ):
        _, run = begun(**options)
        assert all(w.norms is None and w.quantizer.scale.requires_grad for w in run.weights.values())
        weight = run.weights[FEW[1]]
        weight.choose(100)
        kept = weight.rows[0].abs()[weight.mask[0]]
        torch.testing.assert_close(weight.levels(weight.rows)[0, 0], kept.mean())
    _, run = begun()
    assert all(w.norms is not None and not w.quantizer.scale.requires_grad for w in run.weights.values())


def test_a_weight_that_is_read_without_a_norm_too_keeps_its_scale():
    class Twice(Deep):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norms[0](self.layers[0](x)))
            x = torch.relu(self.norms[1](self.layers[1](x)))
            x = torch.relu(self.layers[1](x))
            x = torch.relu(self.norms[2](self.layers[2](x)))
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    small = compress("prune_ternary", model=Twice(), bits=2, training={"steps": 8})
    (said,) = [note for note in small.report.notes if note.startswith("scales are mean magnitudes")]
    assert said.endswith(": layers.1.weight") and small.report.verified["trained == sliced"] < 1e-9


def test_a_frozen_weight_is_not_pruned():
    model = deep()
    model.layers[2].weight.requires_grad_(False)
    small = compress("prune_ternary", model=model, bits=2, training={"steps": 8})
    assert "ternary, and not pruned, as they are not trained: layers.2.weight" in small.report.notes
    assert any(note.startswith(f"{round(0.8 * 1152)} of 1152 weights in 2 tensors") for note in small.report.notes)
    assert [layer.weight_bits for layer in small.report.layers] == [8, 2, 2, 2, 8]


def test_no_other_decay_than_the_pull():
    optimizer, run = begun()
    own = {id(w.parameter) for w in run.weights.values()}
    for group in optimizer.param_groups:
        pulled = {id(p) in own for p in group["params"]}
        assert len(pulled) == 1 and (group["weight_decay"] == 0) >= pulled.pop()
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == len(set(trained)) and own <= set(trained)


@pytest.mark.parametrize(("totals", "share"), [((10, 10, 10), 0.33), ((576, 7, 1), 0.8), ((5,), 0.0), ((3, 3), 1.0)])
def test_shares_of_layers_add_up(totals, share):
    found = _parts(list(totals), list(totals), share)
    assert sum(found) == round(share * sum(totals))
    assert all(abs(own - share * total) <= 1 for own, total in zip(found, totals, strict=True))


def test_what_a_layer_cannot_give_is_taken_of_the_others():
    assert _parts([72, 600, 300], [64, 590, 295], 0.95) == [64, 573, 286]  # 923 - 64, in equal shares of 600 and 300
    assert _parts([72, 600, 300], [64, 568, 295], 0.95) == [64, 568, 291]  # the second is full, too
    assert _parts([8, 8], [6, 8], 0.9) == [6, 8]  # all that there is to take


def test_small_filters_leave_their_share_to_other_layers():
    class Depthwise(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.layers[2] = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    torch.manual_seed(0)
    seen: list[PruneTernaryRun] = []

    class Watched(PruneTernary):
        def begin(self, *args: Any) -> PruneTernaryRun:
            seen.append(super().begin(*args))
            return seen[-1]

    total = 576 + 72 + 576
    small = compress(Watched(), model=Depthwise(), bits=2, sparsity=0.95, training={"steps": 8})
    notes = " ".join(small.report.notes)
    assert f"{round(0.95 * total)} of {total} weights in 3 tensors are pruned" in notes
    assert "not what the result has" not in notes
    assert seen[0].weights["layers.2.weight"].mask.sum(1).tolist() == [1] * 8


# ------------------------------------------------------------------------------------------------ to the file
@pytest.mark.parametrize("sparsity", [0.5, 0.87])
def test_6_6_the_share_of_weights_is_met_and_sizes_are_those_of_the_codes(sparsity):
    small = compress("prune_ternary", model=deep(), bits=2, sparsity=sparsity)
    notes = " ".join(small.report.notes)
    assert f"{round(sparsity * TOTAL)} of {TOTAL} weights in 3 tensors are pruned one by one" in notes
    assert "not what the result has" not in notes
    assert "cosine of filters and ternary directions when weights became ternary" in notes
    assert [layer.weight_bits for layer in small.report.layers] == [8, 2, 2, 2, 8]
    codes = {name: own.counted() for name, own in small.quantized.lowered.weights.items()}
    ternary = {name: own for name, own in codes.items() if own.bits == 2}
    assert len(ternary) == 3 and {v for own in ternary.values() for v in own.values.unique().tolist()} == {-1, 0, 1}
    assert sum(own.kept for own in ternary.values()) == TOTAL - round(sparsity * TOTAL)
    sizes = SizeModel(codes).sizes()
    assert small.report.sizes["C4"] == pytest.approx(sizes["C4"]) and small.report.sizes["C5"] == sizes["C5"]
    of_ternary = SizeModel(ternary)
    assert of_ternary.bits("C4") / TOTAL < {0.5: 1.51, 0.87: 0.70}[sparsity]  # H2(z) + 1 - z at most


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("method", [PruneTernary(), PruneTernary(masks="best", ends=2)], ids=["share", "best"])
def test_6_5_what_is_saved_and_exported_computes_what_was_trained(tmp_path, norms, method):
    small = compress(method, model=deep(norms), bits=2).eval()
    assert small.report.verified["trained == sliced"] < 1e-9 and small.report.verified["sliced == folded"] < 1e-6
    bits = [layer.weight_bits for layer in small.report.layers]
    assert bits == ([8, 2, 2, 2, 8] if method.ends == 8 else [2] * 5)
    packed = [
        t for n, t in small.module.state_dict().items() if n.endswith("_codes") and "layers_2" in n.replace(".", "_")
    ]
    assert packed[0].dtype == torch.uint8 and packed[0].numel() == 8 * 8 * 9 // 4  # four codes a byte
    check_saved_and_exported(small, tmp_path)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("calls", [5, 14, 20, 23])  # pruning, ternary, final, and once weights are ternary
@pytest.mark.parametrize("norms", [True, False])
def test_a_run_that_was_cut_short_ends_as_it_would_have(tmp_path, calls, norms):
    options: dict[str, Any] = {"bits": 2, "sparsity": 0.7}
    whole = compress("prune_ternary", model=deep(norms), **options)
    with pytest.raises(Stop):
        compress("prune_ternary", model=deep(norms), folder=tmp_path, calls=calls, **options)
    resumed = compress("prune_ternary", model=deep(norms), folder=tmp_path, **options)
    assert all(torch.equal(resumed.state_dict()[name], own) for name, own in whole.state_dict().items())
    assert resumed.report.notes == whole.report.notes
    with pytest.raises(gc.CheckpointError, match=r"pull: 0.05 there, 0.1"):
        compress(PruneTernary(pull=0.1), model=deep(norms), folder=tmp_path, **options)


@pytest.mark.slow
@pytest.mark.ci
def test_the_model_is_left_alone_and_the_same_seed_gives_the_same():
    model = deep()
    before = copy.deepcopy(model.state_dict())
    options: dict[str, Any] = {"bits": 2, "seed": 1, "training": {"steps": 10}}
    first, second = (compress("prune_ternary", model=model, **options) for _ in range(2))
    assert all(torch.equal(model.state_dict()[name], own) for name, own in before.items())
    assert all(torch.equal(second.state_dict()[name], own) for name, own in first.state_dict().items())


def test_in_three_steps_all_stages_pass():
    small = compress("prune_ternary", model=deep(), bits=2, training={"steps": 3})
    assert any("when weights became ternary" in note for note in small.report.notes)
    with pytest.raises(gc.GraphcompError):
        compress("prune_ternary", model=deep(), bits=2, training={"steps": 2})


def test_a_submodule_and_a_layer_that_is_left_out():
    small = compress("prune_ternary", model=Outer(), scope="inner", bits=2, training={"steps": 8})
    assert isinstance(small.module, Outer)
    small = compress("prune_ternary", model=deep(), ignore=["layers.2"], bits=2, training={"steps": 8})
    assert [layer.weight_bits for layer in small.report.layers] == [8, 2, 32, 2, 8]


@pytest.mark.slow
@pytest.mark.ci
def test_after_units_are_gone_filters_that_stay_become_ternary():
    method = PruneTernary(masks="best")
    small = compress(["hesso", method], model=deep(), bits=2, activation_bits=None, training={"steps": 80})
    assert small.report.units_removed == 16 and small.report.verified["trained == sliced"] < 1e-9
    assert [layer.weight_bits for layer in small.report.layers] == [8, 2, 2, 2, 8]


# ------------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (PruneTernary(), {"bits": 4}, "bits of ternary weights must be 2"),
        (PruneTernary(), {"sparsity": 0.5}, "bits of ternary weights must be 2"),
        (PruneTernary(), {"bits": 2, "activation_bits": 8}, "activation_bits"),
        (PruneTernary(), {"bits": 2, "budget": gc.Budget(bytes=0.1)}, "budget with"),
        (PruneTernary(), {"bits": 2, "sparsity": {"layers.1": 0.5}}, "sparsity by module"),
        (PruneTernary(masks="best"), {"bits": 2, "sparsity": 0.5}, "sparsity=0.5 with PruneTernary"),
        (
            PruneTernary(),
            {"bits": 2, "sparsity": 0.99},
            r"sparsity must be 0\.9861 at most for this network, got 0\.99",
        ),
        (PruneTernary(), {"bits": 2, "training": {"steps": None, "schedule": gc.Schedule(24)}}, "a Schedule"),
        (PruneTernary(), {"bits": 2, "ignore": ["layers.1", "layers.2", "layers.3"]}, "no weight to make ternary"),
    ],
)
def test_what_the_method_does_not_do(method, options, message):
    with pytest.raises(gc.GraphcompError, match=message) as caught:
        compress(method, model=deep(), **options)
    assert caught.value.fix


@pytest.mark.parametrize(
    "options",
    [
        {"masks": "l2"}, {"prune": -0.1}, {"ternary": True}, {"prune": 0.6, "ternary": 0.4}, {"pull": 2},
        {"gentle": 1.5}, {"c": -1}, {"every": 0}, {"ends": 1},
    ],
)  # fmt: skip
def test_options_out_of_range(options):
    with pytest.raises(gc.PlanError, match=next(iter(options))):
        PruneTernary(**options)
