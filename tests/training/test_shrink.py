"""Without the units that are gone: outputs, gradients and steps as with masks, and in the end the same small model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphcomp as gc
from graphcomp.cost import CostModel
from graphcomp.pruning.slice import kept_of_tensors, select
from tests.marks import in_ci, slow
from tests.training.runs import SCHEDULE, batch, model_of, ready_of, train

COOLDOWN = gc.Schedule(4, warmup=0, projection=0, joint=0)


def pruned(name: str, bits: tuple[int, int] | None = (4, 8)) -> gc.Prepared:
    """At the end of a joint stage, in training mode."""
    ready = ready_of(name, bits=bits)
    optimizer = gc.QASSO(ready, torch.optim.SGD, lr=0.01, sparsity=0.4, schedule=SCHEDULE)
    train(optimizer, ready, name, SCHEDULE.ends[2] + 1)
    return ready


def grown(small: gc.Prepared) -> gc.Prepared:
    assert small.session.cut_from is not None
    return small.session.cut_from.grown(small)


def in_double(name: str, seed: int) -> tuple[torch.Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in batch(name, seed))


def gradients(module: gc.Prepared, name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    module.zero_grad()
    output = module(*in_double(name, 1))
    output.square().sum().backward()
    return output.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["residual", "decoder", *slow("vit", "encoder", "upsample", "dense")])
def test_it_computes_what_masks_compute(name, training):
    ready = pruned(name)
    small = gc.shrink(ready)
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(p.numel() for p in ready.parameters())
    assert {site.name for site in small.session.sites} == {site.name for site in ready.session.sites}
    expected, all_gradients = gradients(ready.double().train(training), name)
    actual, found = gradients(small.double().train(training), name)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    cuts = kept_of_tensors(ready.session.quantized.coupling, ready.kept())
    assert set(found) == set(all_gradients)
    for parameter, gradient in found.items():
        whole = select(all_gradients[parameter], cuts.get(parameter, {}))
        torch.testing.assert_close(gradient, whole, rtol=1e-7, atol=1e-9, msg=parameter)


def test_training_it_is_training_the_whole():
    ready = pruned("residual")
    small = gc.shrink(ready)
    ready, small = ready.double(), small.double()
    for module in (ready, small):
        optimizer = gc.QASSO(module, torch.optim.SGD, lr=0.01, momentum=0.9, sparsity=0.0, schedule=COOLDOWN)
        for step in range(4):
            optimizer.zero_grad()
            module(*in_double("residual", step)).square().mean().backward()
            optimizer.step()
    found, wanted = grown(small), dict(ready.state_dict())
    masked = {name for name in wanted if "running_" in name or "num_batches" in name}  # of units that are gone
    for name, tensor in found.state_dict().items():
        if name not in masked:
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("bits", [(4, 8), None])
def test_what_is_handed_back_is_of_the_whole(bits):
    ready = pruned("residual", bits)
    small = gc.shrink(ready)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    whole, cut = gc.finalize(ready).report, gc.finalize(small).report
    assert (cut.bops, cut.macs, cut.params, cut.bytes) == (whole.bops, whole.macs, whole.params, whole.bytes)
    assert (cut.units_removed, cut.units_total) == (whole.units_removed, whole.units_total)
    costs = CostModel(small.session.plan)  # of which a budget takes its share
    assert (costs.params(), costs.macs()) == (whole.params.after, whole.macs.after)
    assert cut.units_removed > 0 and cut.verified["trained == sliced"] < 1e-9
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


@pytest.mark.slow
@pytest.mark.ci
def test_what_it_learned_is_handed_back():
    small = gc.shrink(pruned("residual"))
    optimizer = gc.QASSO(small, torch.optim.SGD, lr=0.05, sparsity=0.0, schedule=COOLDOWN)
    train(optimizer, small, "residual", 4)
    x = batch("residual", 9)
    with torch.no_grad():
        wanted, found = small.eval()(*x), gc.finalize(small)(*x)
    assert (found - wanted).norm() < 0.25 * wanted.norm()  # what a few codes that fell the other side make of it


@pytest.mark.slow
@pytest.mark.ci
def test_more_can_go_and_it_can_be_shrunk_again():
    ready = pruned("residual")
    small = gc.shrink(ready)
    optimizer = gc.QASSO(small, torch.optim.SGD, lr=0.01, sparsity=0.25, schedule=SCHEDULE)
    train(optimizer, small, "residual", SCHEDULE.ends[2] + 1)
    again = gc.shrink(small)
    gone_first = sum(group.size for group in ready.session.groups) - sum(len(u) for u in ready.kept().values())
    assert optimizer.removed > 0
    report, once = gc.finalize(again).report, gc.finalize(small).report
    assert report.units_removed == gone_first + optimizer.removed
    assert (report.bops, report.macs, report.bytes) == (once.bops, once.macs, once.bytes)


@pytest.mark.slow
@pytest.mark.ci
def test_it_can_be_copied_and_loaded():
    ready = pruned("residual")
    small = gc.shrink(ready)
    copied = copy.deepcopy(small)
    copied.load_state_dict(small.state_dict())
    x = batch("residual", 3)
    assert torch.equal(copied.eval()(*x), small.eval()(*x))
    assert gc.finalize(copied).report.to_dict() == gc.finalize(small).report.to_dict()


def test_a_schedule_that_was_cut_short_is_refused():
    ready = ready_of("residual", bits=(4, 8))
    optimizer = gc.QASSO(ready, torch.optim.SGD, lr=0.01, sparsity=0.4, schedule=SCHEDULE)
    train(optimizer, ready, "residual", SCHEDULE.ends[1])
    with pytest.raises(gc.PlanError, match="before the cool-down"):
        gc.shrink(ready)
    with pytest.raises(gc.PlanError, match="not prepared"):
        gc.shrink(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("then", [gc.shrink, gc.finalize])
def test_another_dtype_is_refused(then):
    ready = pruned("residual").double()
    with pytest.raises(gc.PlanError, match="prepared in float32, and is in float64"):
        then(ready)
    then(ready.float())


# ------------------------------------------------------------------------------------------------ by the optimizer
def settled(base: type[torch.optim.Optimizer], **options) -> tuple[gc.Prepared, gc.QASSO]:
    """A float64 module and its optimizer after the first step of the cool-down."""
    model = model_of("residual").double()
    ready = gc.prepare(model, *in_double("residual", 0), bits=(4, 8)).train()
    optimizer = gc.QASSO(ready, base, lr=0.01, sparsity=0.4, schedule=SCHEDULE, **options)
    steps(optimizer, ready, range(SCHEDULE.ends[2] + 1))
    return ready, optimizer


def steps(optimizer: gc.QASSO, module: torch.nn.Module, which: range) -> None:
    for step in which:
        optimizer.zero_grad()
        module(*in_double("residual", step)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("how", [(torch.optim.SGD, {"momentum": 0.9}), *in_ci((torch.optim.AdamW, {"amsgrad": True}))])
def test_the_optimizer_goes_on_with_it(how):
    base, options = how
    ready, optimizer = settled(base, **options)
    twin = copy.deepcopy(ready)
    other = gc.QASSO(twin, base, lr=0.01, sparsity=0.4, schedule=SCHEDULE, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rest = range(SCHEDULE.ends[2] + 1, SCHEDULE.steps)
    steps(other, twin, rest)

    halving = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=1.0)  # made before, goes on after
    removed, stage = optimizer.removed, optimizer.stage
    small = optimizer.shrink()
    assert (optimizer.removed, optimizer.stage, optimizer.ready) == (removed, stage, small)
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(p.numel() for p in ready.parameters())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} <= {id(p) for p in small.parameters()}
    steps(optimizer, small, rest)
    halving.step()
    assert optimizer.removed == removed

    found, wanted = grown(small).state_dict(), twin.state_dict()
    for name, tensor in found.items():
        if "running_" not in name:  # of units that are gone, too
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.slow
@pytest.mark.ci
def test_its_state_goes_on_in_another_process():
    """As one would come to it again: prepared anew, and nothing but states."""
    _, optimizer = settled(torch.optim.SGD, momentum=0.9)
    small = optimizer.shrink()
    steps(optimizer, small, range(1))
    state = copy.deepcopy((optimizer.state_dict(), small.state_dict()))

    fresh = gc.prepare(model_of("residual").double(), *in_double("residual", 0), bits=(4, 8)).train()
    other = gc.QASSO(fresh, torch.optim.SGD, lr=0.01, momentum=0.9, sparsity=0.4, schedule=SCHEDULE)
    other.load_state_dict(state[0])
    again = other.ready
    again.load_state_dict(state[1])
    assert again is not fresh and (other.removed, other.steps) == (optimizer.removed, optimizer.steps)
    steps(optimizer, small, range(1, 3))
    steps(other, again, range(1, 3))
    wanted = small.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())

    third = gc.QASSO(small, torch.optim.SGD, lr=0.01, momentum=0.9, sparsity=0, schedule=COOLDOWN)
    with pytest.raises(gc.CheckpointError):
        third.load_state_dict(state[0])
    with pytest.raises(gc.CheckpointError, match="another size"):
        other.load_state_dict(third.state_dict())


def test_it_shrinks_once_units_and_bits_are_settled():
    ready = ready_of("residual", bits=(4, 8))
    optimizer = gc.QASSO(ready, torch.optim.SGD, lr=0.01, sparsity=0.4, schedule=SCHEDULE)
    train(optimizer, ready, "residual", SCHEDULE.ends[2])
    with pytest.raises(gc.PlanError, match="settled at step 16"):
        optimizer.shrink()
    train(optimizer, ready, "residual", 1)
    assert optimizer.shrink() is optimizer.ready is not ready


@pytest.mark.parametrize(
    ("base", "options"),
    [(torch.optim.Adafactor, {}), (torch.optim.Adam, {"amsgrad": True}), (torch.optim.Rprop, {})],
)
@pytest.mark.slow
@pytest.mark.ci
def test_what_an_optimizer_holds_is_cut(base, options):
    """Adafactor's rows and columns among it."""
    ready = ready_of("mlp", bits=(4, 8))
    optimizer = gc.QASSO(ready, base, lr=0.01, sparsity=0.4, schedule=SCHEDULE, **options)
    train(optimizer, ready, "mlp", SCHEDULE.ends[2] + 1)
    small = optimizer.shrink()
    train(optimizer, small, "mlp", 2)
    assert gc.finalize(small).report.units_removed == optimizer.removed == 10


class Rows(torch.optim.SGD):
    """Remembers one number per row, as other optimizers do, in a dim less."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"] if p.dim() > 1):
            self.state[parameter]["rows"] = parameter.square().mean(1)
        return super().step(closure)


def test_what_cannot_be_cut_is_refused_and_nothing_is_changed():
    ready = ready_of("mlp", bits=(4, 8))
    optimizer = gc.QASSO(ready, Rows, lr=0.01, sparsity=0.4, schedule=SCHEDULE)
    train(optimizer, ready, "mlp", SCHEDULE.ends[2] + 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(gc.PlanError, match=r"state 'rows' of up.weight(.|\n)*\(12,\), and the parameter \(12, 6\)"):
        optimizer.shrink()
    assert optimizer.ready is ready and optimizer.state_dict().keys() == before.keys()
    train(optimizer, ready, "mlp", 2)
    assert gc.finalize(ready).report.units_removed == 10


class Normalized(nn.Module):
    """A group norm: its groups, and the channels of each, are two groups of units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x)))).mean((2, 3))


@pytest.mark.parametrize("bits", [None, (4, 8)])
def test_where_one_unit_is_left_of_a_group_the_others_keep_their_names(bits):
    torch.manual_seed(0)
    model, x = Normalized(), torch.randn(2, 3, 8, 8)
    ready = gc.prepare(model, x, bits=bits, prune=("channel", "group"))
    kept = {g: torch.arange(1) if g.size == 2 else torch.arange(3) for g in ready.session.groups}
    assert len({g.size for g in kept}) == 2
    ready.keep(kept)
    small = gc.shrink(ready)
    assert {g.name: g.size for g in small.session.groups} == {g.name: 3 for g in kept if g.size == 4}
    torch.testing.assert_close(small(x), ready(x), rtol=1e-5, atol=1e-6)
    removed = [gc.finalize(module).report.to_dict()["units"]["removed"] for module in (ready, small)]
    assert removed[0] == removed[1] == 2
