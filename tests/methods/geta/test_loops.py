"""QASSO in the loops that people write: resumed, scheduled, scaled, clipped, compiled, copied."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import graphcomp as gc
from tests.marks import slow
from tests.training.runs import SCHEDULE, Mlp, backward, batch, bits_of, ready_of, same, state_of, train, weights_of

ADAMW: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}


def qasso(ready: nn.Module, **options: Any) -> gc.QASSO:
    return gc.QASSO(ready, torch.optim.AdamW, **{"schedule": SCHEDULE, "sparsity": 0.4, **ADAMW, **options})


# ------------------------------------------------------------------------------------------------ resumed
def saved(*states: Any) -> list[Any]:
    """Written and read back, by the reader that runs no code."""
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return list(torch.load(file, weights_only=True))


@cache
def uninterrupted() -> dict[str, Tensor]:
    ready = ready_of("mlp", bits=(4, 8), learn_exponent=True)
    train(qasso(ready), ready, "mlp", SCHEDULE.steps)
    return state_of(ready)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("stopped", [5, 10, 13])
def test_a_run_with_a_budget_goes_on_bit_for_bit(stopped):
    """What the budget leaves was found out when the projection began."""

    def run(*, to: int, state: list[Any] | None = None, begin: int = 0) -> tuple[nn.Module, gc.QASSO]:
        ready = ready_of("residual", bits=(2, 8))
        optimizer = qasso(ready, budget=gc.Budget(bops=0.0015))
        if state is not None:
            ready.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        train(optimizer, ready, "residual", range(begin, to))
        return ready, optimizer

    ready, optimizer = run(to=stopped)
    anyway = SCHEDULE.most_bits(stopped, optimizer.bank.low, optimizer.bank.high)
    assert bool((optimizer.most_bits() < anyway).any())
    resumed, _ = run(to=SCHEDULE.steps, state=saved(ready.state_dict(), optimizer.state_dict()), begin=stopped)
    whole, _ = run(to=SCHEDULE.steps)
    assert same(state_of(resumed), state_of(whole))


@pytest.mark.parametrize("stopped", [0, 2, 3, 5, 9, 10, 12, 13, 15, 18])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(stopped):
    """In each stage, at the start, inside and at the end of its periods."""
    first = ready_of("mlp", bits=(4, 8), learn_exponent=True)
    before = qasso(first)
    train(before, first, "mlp", stopped)
    of_model, of_optimizer = saved(first.state_dict(), before.state_dict())

    second = ready_of("mlp", bits=(4, 8), learn_exponent=True)
    after = qasso(second)
    second.load_state_dict(of_model)
    after.load_state_dict(of_optimizer)
    assert after.stage == SCHEDULE.moment(stopped).stage and after.removed == before.removed
    train(after, second, "mlp", range(stopped, SCHEDULE.steps))
    assert same(state_of(second), uninterrupted())
    assert after.removed == 10


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_batch_norms_and_a_scheduler_go_on_bit_for_bit(base):
    def run(ready: nn.Module, steps: range, states: list[Any] | None) -> list[Any]:
        optimizer = gc.QASSO(ready, base, lr=0.01, sparsity=0.4, schedule=SCHEDULE)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 20)
        if states is not None:
            ready.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
            scheduler.load_state_dict(states[2])
        for step in steps:
            train(optimizer, ready, "dense", range(step, step + 1))
            scheduler.step()
        return saved(ready.state_dict(), optimizer.state_dict(), scheduler.state_dict())

    whole, parts = ready_of("dense", bits=(4, 8)), ready_of("dense", bits=(4, 8))
    run(whole, range(20), None)
    half = run(parts, range(10), None)
    parts = ready_of("dense", bits=(4, 8))
    run(parts, range(10, 20), half)
    assert same(state_of(parts), state_of(whole))


def test_the_state_of_another_optimizer_or_model_is_refused():
    ready = ready_of("mlp", bits=(4, 8))
    optimizer = qasso(ready)
    with pytest.raises(gc.CheckpointError, match="not of QASSO"):
        optimizer.load_state_dict(torch.optim.SGD(ready.parameters(), lr=0.1).state_dict())
    with pytest.raises(gc.CheckpointError, match="another model"):
        optimizer.load_state_dict(qasso(ready_of("dense", bits=(4, 8))).state_dict())
    wide = gc.prepare(Mlp(16), batch("mlp"), bits=(4, 8))
    with pytest.raises(gc.CheckpointError, match="'up/hidden' had 16 units, and has 12"):
        optimizer.load_state_dict(qasso(wide).state_dict())
    state = optimizer.state_dict()
    state["qasso"]["format"] = 99
    with pytest.raises(gc.CheckpointError, match="format 99"):
        optimizer.load_state_dict(state)


def test_a_state_that_does_not_fit_changes_nothing():
    """Though it is of a module that was shrunk."""
    ready = ready_of("mlp", bits=(4, 8))
    optimizer = qasso(ready)
    train(optimizer, ready, "mlp", SCHEDULE.ends[2] + 1)
    optimizer.shrink()
    of_sgd = copy.deepcopy(optimizer.state_dict())
    of_sgd["qasso"]["base"] = "SGD"
    other_groups = copy.deepcopy(optimizer.state_dict())
    other_groups["param_groups"][0]["params"].pop()
    for state, what in ((of_sgd, "of SGD, and the base optimizer is"), (other_groups, r"other groups(.|\n)*5, 12")):
        fresh = ready_of("mlp", bits=(4, 8))
        other, before = qasso(fresh), state_of(fresh)
        with pytest.raises(gc.CheckpointError, match=what):
            other.load_state_dict(state)
        assert (other.ready, other.steps, other.removed) == (fresh, 0, 0) and same(state_of(fresh), before)


def test_hooks_of_states_are_called():
    optimizer = qasso(ready_of("mlp", bits=(4, 8)))
    called = []
    optimizer.register_state_dict_pre_hook(lambda own: called.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda own, state: {**state, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda own, state: called.append(state.pop("more")))
    optimizer.register_load_state_dict_post_hook(lambda own: called.append("after loading"))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert called == ["before saving", 1, "after loading"] and state["more"] == 1


# ------------------------------------------------------------------------------------------------ names
class Layers(nn.Module):
    """Layers in a row, called as `names` says: (n, 6) -> (n, 3)."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for k, name in enumerate(names):
            made = nn.Linear(6 if k == 0 else 5, 3 if k == len(names) - 1 else 5)
            self.add_module(name, made)

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = (self.get_submodule(name) for name in self.names)
        for layer in inner:
            x = torch.tanh(layer(x))
        return last(x)


def run_layers(names: list[str]) -> list[Tensor]:
    torch.manual_seed(0)
    ready = gc.prepare(Layers(names), batch("mlp"), bits=(4, 8)).train()
    train(qasso(ready, sparsity=0.3), ready, "mlp", SCHEDULE.steps)
    return [p.detach() for name in names for p in (ready.get_parameter(f"{name}.{k}") for k in ("weight", "bias"))]


def test_names_that_begin_or_end_alike_do_not_interfere():
    plain = run_layers([f"layer_{chr(97 + k)}" for k in range(7)])
    for names in (
        ["1", "10", "11", "12", "18", "19", "2"],
        ["a", "b", "head", "aa", "head2", "weight", "d"],
    ):
        assert all(torch.equal(a, b) for a, b in zip(run_layers(names), plain, strict=True))


# ------------------------------------------------------------------------------------------------ groups and schedulers
def test_each_parameter_is_in_one_group_and_quantizers_are_in_their_own():
    ready = ready_of("decoder", bits=(4, 8))  # its head is tied to its embedding
    decay = [p for name, p in weights_of(ready).items() if "norm" not in name]
    rest = [p for name, p in weights_of(ready).items() if "norm" in name]
    groups = [{"params": decay}, {"params": rest, "weight_decay": 0.0, "lr": 0.001}]
    optimizer = qasso(ready, params=groups, lr_quant=0.005)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in ready.parameters() if p.requires_grad]
    assert sorted(ids) == sorted(id(p) for p in trained)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.001, 0.005]
    own = {id(p) for _, q in ready.quantizers() for p in q.parameters() if p.requires_grad}
    assert {id(p) for p in optimizer.param_groups[-1]["params"]} == own
    assert optimizer.param_groups is optimizer.base.param_groups and optimizer.state is optimizer.base.state


@pytest.mark.parametrize("given", ["all", "an iterator", "quantizers among them"])
def test_parameters_can_be_given_in_any_way(given):
    ready = ready_of("mlp", bits=(4, 8))
    choices: dict[str, Callable[[], Any]] = {
        "all": lambda: None,
        "an iterator": lambda: iter(weights_of(ready).values()),
        "quantizers among them": lambda: [{"params": list(ready.parameters())}],
    }
    optimizer = qasso(ready, params=choices[given]())
    assert [len(g["params"]) for g in optimizer.param_groups] == [6, 12]
    train(optimizer, ready, "mlp", SCHEDULE.steps)
    assert optimizer.removed == 10


@pytest.mark.parametrize("in_a_group", [False, True])
def test_parameters_can_be_given_with_their_names(in_a_group):
    ready = ready_of("mlp", bits=(4, 8))
    given = list(ready.named_parameters())
    optimizer = qasso(ready, params=[{"params": given}] if in_a_group else iter(given))
    train(optimizer, ready, "mlp", SCHEDULE.ends[2] + 1)
    small = optimizer.shrink()
    named = dict(small.named_parameters())
    pairs = [pair for g in optimizer.param_groups for pair in zip(g["param_names"], g["params"], strict=True)]
    assert len(pairs) == 18 and all(named[name] is parameter for name, parameter in pairs)
    assert optimizer.removed == 10


def test_options_of_the_base_optimizer_that_qasso_has_too():
    class Own(torch.optim.SGD):
        def __init__(self, params: Any, lr: float, eta: float, momentum: float) -> None:
            super().__init__(params, lr=lr, momentum=momentum)
            self.eta = eta

    ready = ready_of("mlp", bits=(4, 8))
    optimizer = gc.QASSO(ready, Own, lr=0.01, schedule=SCHEDULE, eta=0.9, momentum=0.5, base_options={"eta": 7.0})
    assert (optimizer.base.eta, optimizer.run.rule.eta, optimizer.param_groups[0]["momentum"]) == (7.0, 0.9, 0.5)


def test_groups_of_equal_length():
    ready = ready_of("mlp", bits=(4, 8))
    weights, biases = ([p for name, p in weights_of(ready).items() if name.endswith(k)] for k in ("weight", "bias"))
    optimizer = qasso(ready, params=[{"params": weights}, {"params": biases, "weight_decay": 0.0}])
    assert [len(g["params"]) for g in optimizer.param_groups] == [3, 3, 12]


def test_a_layer_that_thaws_is_added():
    ready = ready_of("mlp", bits=(4, 8))
    thawed = ready.get_parameter("up.weight").requires_grad_(False)
    optimizer = qasso(ready)
    before = thawed.detach().clone()
    train(optimizer, ready, "mlp", 2)
    assert torch.equal(thawed, before)
    optimizer.add_param_group({"params": [thawed.requires_grad_(True)], "lr": 0.1})
    train(optimizer, ready, "mlp", range(2, SCHEDULE.steps))
    assert optimizer.base.param_groups[-1]["params"] == [thawed] and optimizer.base.param_groups[-1]["lr"] == 0.1
    assert not torch.equal(thawed, before) and optimizer.removed == 5  # of the group that was free from the start


def test_norms_without_decay_are_not_decayed():
    ready = ready_of("vit", bits=(4, 8))
    norms = [p for name, p in weights_of(ready).items() if "norm" in name]
    others = [p for name, p in weights_of(ready).items() if "norm" not in name]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    optimizer = gc.QASSO(ready, lr=0.1, schedule=20, sparsity=0.0, params=groups, weight_decay=0.5)
    before = [p.detach().clone() for p in norms], [p.detach().clone() for p in others]
    for parameter in ready.parameters():
        parameter.grad = torch.zeros_like(parameter)
    steps = {name: q.d.item() for name, q in ((s.name, q) for s, q in ready.quantizers() if s.is_weight)}
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before[0], norms, strict=True))
    assert all(torch.allclose(0.95 * a, b) for a, b in zip(before[1], others, strict=True))
    assert all(d > 0 for d in steps.values())


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=21),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
}


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_learning_rate_schedulers_drive_the_base_optimizer(name):
    ready, model = ready_of("mlp", bits=None), ready_of("mlp", bits=None)
    optimizer, alone = qasso(ready, sparsity=0.0), torch.optim.AdamW(model.parameters(), **ADAMW)
    schedulers = SCHEDULERS[name](optimizer), SCHEDULERS[name](alone)
    seen = set()
    for step in range(20):
        train(optimizer, ready, "mlp", range(step, step + 1))
        train(alone, model, "mlp", range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step()
        seen.add(optimizer.param_groups[0]["lr"])
    assert len(seen) > 3 and same(state_of(ready), state_of(model))


def test_a_scheduler_that_waits_for_a_plateau():
    ready = ready_of("mlp", bits=(4, 8))
    optimizer = qasso(ready)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    for step in range(SCHEDULE.steps):
        train(optimizer, ready, "mlp", range(step, step + 1))
        scheduler.step(1.0 if step < 5 else 2.0)
    assert optimizer.base.param_groups[0]["lr"] < 0.01 and optimizer.removed == 10


# ------------------------------------------------------------------------------------------------ gradients
def test_accumulated_gradients_are_those_of_the_whole_batch():
    whole, parts = ready_of("mlp", bits=(4, 8)), ready_of("mlp", bits=(4, 8))
    optimizers = [gc.QASSO(r, lr=0.05, schedule=SCHEDULE, sparsity=0.4) for r in (whole, parts)]
    for step in range(SCHEDULE.steps):
        (x,) = batch("mlp", step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(whole, (x,))
        backward(parts, (x[:4],))
        backward(parts, (x[4:],))
        for parameter in parts.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2
        for optimizer in optimizers:
            optimizer.step()
    # sums in another order, and a code that fell the other side
    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(parts.get_parameter(name), weight, rtol=1e-3, atol=1e-4)
    assert same(*({k: v for k, v in r.state_dict().items() if "mask" in k} for r in (whole, parts)))


def test_steps_that_a_gradient_scaler_skips_do_not_count():
    ready = ready_of("mlp", bits=(4, 8))
    optimizer = qasso(ready)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    taken = 0
    for step in range(30):
        optimizer.zero_grad()
        output = ready(*batch("mlp", step))
        loss = output.square().mean()
        scaler.scale(loss * torch.inf if step % 5 == 2 else loss).backward()
        before = state_of(ready)
        scaler.step(optimizer)
        scaler.update()
        taken += step % 5 != 2
        assert optimizer.steps == taken
        assert same(before, state_of(ready)) == (step % 5 == 2)
    assert optimizer.stage == gc.Stage.COOLDOWN and optimizer.removed == 10
    assert all(torch.isfinite(t).all() for t in state_of(ready).values())


def test_clipped_gradients_are_what_the_base_optimizer_gets():
    ready = ready_of("mlp", bits=(4, 8))
    optimizer = gc.QASSO(ready, lr=1.0, schedule=SCHEDULE, sparsity=0.0)
    backward(ready, batch("mlp"))
    before = {name: p.detach().clone() for name, p in weights_of(ready).items()}
    nn.utils.clip_grad_norm_(ready.parameters(), 1e-3)
    optimizer.step()
    moved = sum(float((p.detach() - before[name]).square().sum()) for name, p in weights_of(ready).items()) ** 0.5
    assert 0 < moved <= 1.001e-3


def test_gradients_of_quantizers_are_clamped_and_those_of_weights_are_not():
    ready = ready_of("mlp", bits=(4, 8))
    optimizer = qasso(ready, max_quantizer_gradient=0.5)
    for parameter in ready.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    assert all(float(p.grad) == 0.5 for _, q in ready.quantizers() for p in (q.d, q.q_m))
    assert all(bool((p.grad == 3).all()) for p in weights_of(ready).values())


def test_a_closure_is_called_once_with_gradients_on():
    ready = ready_of("mlp", bits=(4, 8))
    optimizer = qasso(ready)
    calls = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = ready(*batch("mlp")).square().mean()
        loss.backward()
        calls.append(loss.item())
        return calls[-1]

    assert optimizer.step(closure) == calls[0] and len(calls) == 1


def test_parameters_without_a_gradient_stay():
    """As with any optimizer: a step before the first backward pass moves nothing but the bits."""
    ready = ready_of("mlp", bits=(4, 8))
    before = {name: p.detach().clone() for name, p in weights_of(ready).items()}
    qasso(ready).step()
    assert all(torch.equal(p, before[name]) for name, p in weights_of(ready).items())


# ------------------------------------------------------------------------------------------------ wrapped
def test_copies_train_on_their_own():
    first = ready_of("mlp", bits=(4, 8))
    second = copy.deepcopy(first)
    untouched = state_of(first)
    train(qasso(second), second, "mlp", SCHEDULE.steps)
    assert same(state_of(first), untouched)
    train(qasso(first, sparsity=0.2), first, "mlp", SCHEDULE.steps)
    removed = [gc.finalize(r).report.to_dict()["units"]["removed"] for r in (first, second, first)]
    assert removed == [5, 10, 5]


@pytest.mark.parametrize("steps", [2, 10, 17])
def test_a_copy_of_module_and_optimizer_goes_on_bit_for_bit(steps):
    ready = ready_of("mlp", bits=(4, 8))
    optimizer = qasso(ready, base_options={"amsgrad": True})
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.9)  # wraps `step`
    train(optimizer, ready, "mlp", steps)
    scheduler.step()
    twin, other = copy.deepcopy((ready, optimizer))
    assert other.ready is twin and other.param_groups is other.base.param_groups and other.state is other.base.state
    before = state_of(ready)
    train(other, twin, "mlp", range(steps, SCHEDULE.steps))
    assert same(state_of(ready), before) and optimizer.steps == steps
    train(optimizer, ready, "mlp", range(steps, SCHEDULE.steps))
    assert same(state_of(twin), state_of(ready)) and other.removed == optimizer.removed == 10
    assert gc.finalize(other.shrink()).report.units_removed == 10


def test_it_is_not_pickled():
    with pytest.raises(gc.CheckpointError, match="cannot be pickled") as caught:
        pickle.dumps(qasso(ready_of("mlp", bits=(4, 8))))
    assert "state_dict()" in caught.value.fix


def test_gradients_per_sample_while_ranges_follow():
    """torch.func.vmap: each range sees the whole batch."""
    ready = ready_of("mlp", bits=(4, 8))
    bank = qasso(ready).bank
    (x,) = batch("mlp")
    ready(x)
    expected = torch.stack([quantizer.peak for quantizer in bank.quantizers])
    bank.follow(True)
    parameters = {name: p.detach() for name, p in ready.named_parameters()}

    def loss(own: dict[str, Tensor], one: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(ready, own, (one[None],))
        return result.square().mean()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    peaks = torch.stack([quantizer.peak for quantizer in bank.quantizers])
    torch.testing.assert_close(peaks, expected)
    ready(x).square().sum(0).mean().backward()
    torch.testing.assert_close(found["up.weight"].sum(0), ready.get_parameter("up.weight").grad)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should:DeprecationWarning"
)  # dynamo's own
def test_compiled_it_trains_the_same():
    x = batch("mlp")
    plain = gc.prepare(nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)), x, bits=(4, 8)).train()
    inner = copy.deepcopy(plain)
    compiled = torch.compile(inner, backend="aot_eager")
    schedule = gc.Schedule(12, warmup=0, projection=4, joint=4, projection_periods=2, pruning_periods=2)
    for called in (plain, compiled):
        train(gc.QASSO(called, lr=0.05, schedule=schedule, sparsity=0.4), called, "mlp", 12)
    for name, weight in weights_of(plain).items():
        torch.testing.assert_close(inner.get_parameter(name), weight, rtol=1e-3, atol=1e-4)
    assert gc.finalize(compiled).report.to_dict()["units"]["removed"] == 4


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_compiled_each_is_one_graph_after_another_model():
    torch.compiler.reset()
    for name in ("dense", "decoder"):  # with other inputs: sizes and strides of the second are symbols
        ready, x = ready_of(name, bits=(4, 8)).train(), batch(name)
        found = []
        for run in (ready, torch.compile(ready, backend="aot_eager", fullgraph=True)):
            ready.zero_grad()
            run(*x).square().mean().backward()
            found.append([p.grad.clone() for p in ready.parameters() if p.grad is not None])
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", *slow("vit")])
def test_autocast(name):
    ready = ready_of(name, bits=(4, 8))
    optimizer = qasso(ready)
    losses = []
    for _ in range(SCHEDULE.steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = ready(*batch(name, 0))
            loss = (output.float() - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert output.dtype == torch.bfloat16 and losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in ready.parameters())
    assert all(b == pytest.approx(round(b), abs=1e-5) for b in bits_of(ready).values())
    assert gc.finalize(ready).report.to_dict()["units"]["removed"] == optimizer.removed > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    x = tuple(t.to(dtype) for t in batch("mlp"))
    ready = gc.prepare(Mlp().to(dtype), x, bits=(4, 8)).train()
    optimizer = gc.QASSO(ready, lr=0.05, schedule=SCHEDULE, sparsity=0.4)
    for _ in range(SCHEDULE.steps):
        optimizer.zero_grad()
        ready(*x).square().mean().backward()
        optimizer.step()
    assert optimizer.removed == 10
    assert all(p.dtype == dtype for p in weights_of(ready).values())
    tolerance = 1e-5 if dtype == torch.float64 else 0.05  # eight bits of mantissa for a step
    assert all(b == pytest.approx(round(b), abs=tolerance) for b in bits_of(ready).values())
