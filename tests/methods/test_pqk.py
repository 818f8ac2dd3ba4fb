"""PQK: gradients parted by a mask, two sets of norms, the schedule of masks, and runs by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import graphcomp as gc
from graphcomp.methods.pqk import Pqk, PqkRun, distillation, sparsity_at
from graphcomp.training.elements import largest
from graphcomp.training.folder import read_metrics
from graphcomp.training.optimizer import MethodOptimizer
from tests.methods.learning import Net, Outer, Stop, batches, compress, loss, net, weight_of

STEPS = 12
"""Steps 0 to 3 prune, 4 to 7 quantize, 8 to 11 distil."""


def begun(*, dtype: torch.dtype = torch.float32, base: Any = torch.optim.SGD, **options: Any) -> tuple[Any, PqkRun]:
    model = net().to(dtype)
    ready = gc.prepare(model, batches()[0][0].to(dtype), bits=4, quantizer="lsq").train()
    run = PqkRun(ready, STEPS, **{"sparsity": 0.75, "every": 2, **options})
    return MethodOptimizer(run, base, 0.05, {"momentum": 0.9} if base is torch.optim.SGD else {}), run


def forward_of(run: PqkRun) -> Any:
    def forward(batch: Any, tensors: Any = None) -> Any:
        inputs = batch[0].to(next(run.ready.parameters()).dtype)
        return run.ready(inputs) if tensors is None else functional_call(run.ready, dict(tensors), (inputs,))

    return forward


def train(optimizer: MethodOptimizer, run: PqkRun, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        run.loss(forward_of(run), batches()[optimizer.steps % 4], loss).backward()
        optimizer.step()


# ------------------------------------------------------------------------------------------------ equations
def test_the_schedule_is_cubic():
    assert sparsity_at(0, 8, 0.9) == 0
    assert sparsity_at(4, 8, 0.9) == pytest.approx(0.875 * 0.9)
    assert sparsity_at(8, 8, 0.9) == sparsity_at(20, 8, 0.9) == 0.9


def test_the_divergence_is_zero_for_equal_outputs_and_the_teacher_learns_nothing_from_it():
    logits = torch.randn(5, 7, dtype=torch.float64)
    assert abs(float(distillation(logits, logits.clone(), 2.0))) < 1e-15
    student, teacher = logits.clone().requires_grad_(), (2 * logits).requires_grad_()
    found = distillation(student, teacher, 2.0)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    torch.testing.assert_close(found, 4 * (p * (p / q).log()).sum(-1).mean())
    found.backward()
    assert teacher.grad is None and bool(student.grad.any())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 0.99])
def test_masks_are_global_and_met_to_the_element(sparsity):
    weights = {"a": torch.randn(7, 9), "b": 3 * torch.randn(5, 4, 3), "ties": torch.ones(10)}
    masks = largest(weights, sparsity)
    pruned, total = sum(int((~m).sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert pruned == round(sparsity * total)
    kept = torch.cat([weights[name][mask].abs() for name, mask in masks.items()])
    gone = torch.cat([weights[name][~mask].abs() for name, mask in masks.items()])
    assert not len(gone) or float(gone.max()) <= float(kept.min())
    if sparsity == 0.75:
        assert len({round(float(mask.float().mean()), 3) for mask in masks.values()}) > 1


# ------------------------------------------------------------------------------------------------ two forward passes
def test_gradients_are_parted_by_the_mask():
    """On the mask exactly the student's, outside exactly the teacher's."""
    optimizer, run = begun(dtype=torch.float64)
    train(optimizer, run, 9)
    forward, batch = forward_of(run), batches()[0]
    parameters = list(run.weights.values())
    student = forward(batch, run.student_view())
    with run.ready.in_floats():
        teacher = forward(batch, run.teacher_view())
    alone = loss(student, batch) + distillation(student, teacher, 2.0)
    of_student = torch.autograd.grad(alone, parameters, retain_graph=True)
    of_teacher = torch.autograd.grad(loss(teacher, batch), parameters)
    both = torch.autograd.grad(run.loss(forward, batch, loss), parameters)
    for name, together, first, second in zip(run.weights, both, of_student, of_teacher, strict=True):
        mask = run.masks[name]
        torch.testing.assert_close(together[mask], first[mask], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(together[~mask], second[~mask], rtol=1e-12, atol=1e-15)
        assert not bool(first[~mask].any()) and not bool(second[mask].any()) and bool(second[~mask].any())


def test_the_student_does_not_see_what_is_pruned_and_its_norms_not_the_teacher():
    optimizer, run = begun()
    train(optimizer, run, 9)
    forward, batch = forward_of(run), batches()[1]
    run.ready.eval()
    before = forward(batch, run.student_view())
    with torch.no_grad():
        for name, weight in run.weights.items():
            weight[~run.masks[name]] += 1.0
    assert torch.equal(forward(batch, run.student_view()), before)
    run.ready.train()
    statistics = {name: b.clone() for name, b in run.ready.named_buffers() if "running" in name or "tracked" in name}
    own = {name: tensor.clone() for name, tensor in run.teacher.items() if "running" in name}
    with run.ready.in_floats():
        forward(batch, run.teacher_view())
    assert all(torch.equal(run.ready.get_buffer(name), b) for name, b in statistics.items()) and len(statistics) >= 4
    assert all(not torch.equal(run.teacher[name], tensor) for name, tensor in own.items()) and len(own) == 4


def test_the_teacher_begins_as_the_student_and_weights_come_back_as_they_were():
    optimizer, run = begun()
    train(optimizer, run, 8)
    for name, tensor in run.teacher.items():
        assert torch.equal(tensor, run.ready.state_dict()[name]), name
    assert all(bool(weight[~run.masks[name]].any()) for name, weight in run.weights.items())


def test_weights_can_return_while_the_mask_moves_and_not_after():
    optimizer, run = begun(every=1, sparsity=0.5, lr_quant=0.0)
    train(optimizer, run, 2)
    pruned = {name: ~mask for name, mask in run.masks.items()}
    assert any(bool(mask.any()) for mask in pruned.values())
    optimizer.zero_grad()
    run.loss(forward_of(run), batches()[0], loss).backward()
    assert any(bool(run.weights[name].grad[mask].any()) for name, mask in pruned.items())
    optimizer.step()
    train(optimizer, run, 1)
    fixed = run.masks
    optimizer.zero_grad()
    run.loss(forward_of(run), batches()[0], loss).backward()
    assert not any(bool(run.weights[name].grad[~mask].any()) for name, mask in fixed.items())
    optimizer.step()
    train(optimizer, run, 7)
    assert run.masks is fixed and run.stage(run.step) == "distillation"


def test_without_distillation_the_student_trains_as_before():
    """The teacher's own loss moves nothing that the student sees."""

    def student_after(stages: int) -> dict[str, Tensor]:
        optimizer, run = begun(distills=False)
        if stages == 2:
            run.ends = run.ends[0], STEPS + 1  # no teacher
        train(optimizer, run, STEPS)
        seen = {**dict(run.ready.named_parameters()), **run.student_view()}
        return {name: tensor.detach() for name, tensor in seen.items()}

    plain, beside = student_after(2), student_after(3)
    assert all(torch.equal(plain[name], beside[name]) for name in plain)


# ------------------------------------------------------------------------------------------------ by name
def test_pruned_weights_are_zero_in_the_integers_and_the_teacher_is_gone():
    small = compress("pqk", bits=8, sparsity=0.75)
    zeros = sum(int((weight_of(small, name) == 0).sum()) for name in ("first", "second"))
    assert zeros >= 486  # and what rounding makes zero
    assert any("486 of 648 weights in 2 tensors are pruned one by one" in note for note in small.report.notes)
    assert sum(t.numel() for t in small.state_dict().values()) < 800
    assert [layer.weight_bits for layer in small.report.layers] == [8, 8, 8]


def test_the_result_is_the_student():
    seen: dict[str, Any] = {}

    class Watched(Pqk):
        def begin(self, *args: Any) -> PqkRun:
            seen["run"] = super().begin(*args)
            return seen["run"]

    small = compress(Watched(), sparsity=0.75)
    run, inputs = seen["run"], batches()[2][0]
    run.ready.eval()
    student = functional_call(run.ready, run.student_view(), (inputs,))
    torch.testing.assert_close(small.eval()(inputs), student)
    assert isinstance(small.module, Net)
    assert all(not bool(small.module.get_parameter(name)[~mask].any()) for name, mask in run.masks.items())


@pytest.mark.parametrize("calls", [5, 13, 20])
@pytest.mark.slow
@pytest.mark.ci
def test_a_run_that_was_cut_short_ends_as_it_would_have(tmp_path, calls):
    """In each stage; a batch of the last one takes two losses."""
    whole = compress("pqk", bits=4, sparsity=0.75, training={"autocast": torch.bfloat16})
    asked = {"bits": 4, "sparsity": 0.75, "training": {"autocast": torch.bfloat16}, "folder": tmp_path}
    with pytest.raises(Stop):
        compress("pqk", calls=calls, **asked)
    resumed = compress("pqk", **asked)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    stages = [line["stage"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert list(dict.fromkeys(stages)) == ["pruning", "quantization", "distillation"]


def test_loss_scaling_takes_the_teachers_gradients_too(tmp_path):
    small = compress("pqk", bits=8, sparsity=0.5, training={"autocast": torch.float16, "clip_norm": 1.0})
    assert all(bool(t.isfinite().all()) for t in small.state_dict().values() if t.is_floating_point())


def test_a_submodule_with_a_teacher():
    small = compress("pqk", model=Outer(), scope="inner", sparsity=0.75)
    inner = small.module.inner
    assert sum(int((p == 0).sum()) for p in (inner.first.weight, inner.second.weight)) == 486


def test_outputs_that_hold_logits():
    class Output(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x)}

    def run(method: Any, model: torch.nn.Module) -> gc.CompressedModel:
        data = batches()
        how = gc.Training(steps=6, lr=0.01)
        return gc.compress(
            model, data[0][0], method=method, data=data, sparsity=0.5, training=how, progress=False,
            loss=lambda output, batch: F.cross_entropy(next(iter(output.values())), batch[1]),
        )  # fmt: skip

    assert run("pqk", Output()).report.notes

    class Other(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": super().forward(x)}

    with pytest.raises(gc.PlanError, match=r"the logits of a .* are not known"):
        run("pqk", Other())
    assert run(Pqk(logits=lambda output: output["scores"]), Other()).report.notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (4, 8)}, "one number for PQK"),
        ({"budget": gc.Budget(macs=0.5)}, "budget with"),
        ({"saliency": "l2", "round_to": 8}, "saliency, round_to with"),
        ({"training": {"steps": 2}}, "3 at least"),
        ({"ignore": "re:first|second"}, "finds no weight to prune"),
    ],
)
def test_what_the_method_does_not_do(options, message):
    with pytest.raises((gc.PlanError, gc.NothingToPrune), match=message):
        compress("pqk", **options)
