"""A copy of a prepared module shares nothing with the module that either of them changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphcomp as gc
from graphcomp.ir.graph import all_tensors
from graphcomp.ir.module import tensor_names
from graphcomp.testing.memory import held_bytes
from tests.training.runs import SCHEDULE, batch, ready_of, same, state_of, train


def trained(name: str = "mlp", **options: object) -> tuple[gc.Prepared, gc.QASSO]:
    """Into the cool-down, so that it can be finalized or shrunk, and goes on."""
    ready = ready_of(name, **{"bits": (4, 8), **options})
    optimizer = gc.QASSO(ready, torch.optim.SGD, lr=0.01, sparsity=0.4, schedule=SCHEDULE)
    train(optimizer, ready, name, SCHEDULE.ends[2] + 1)
    return ready, optimizer


def tensors_of_session(ready: gc.Prepared) -> dict[str, torch.Tensor]:
    session = ready.session
    found = {f"float {name}": t for name, t in all_tensors(session.plan.captured.module)}
    found |= {f"fake {name}": t for name, t in all_tensors(session.quantized.captured.module)}
    return found | {f"model {name}": t for name, t in tensor_names(session.plan.model).items()}


@pytest.mark.parametrize("through", [gc.finalize, gc.shrink])
@pytest.mark.parametrize("bits", [(4, 8), None])
def test_what_is_made_of_a_twin_leaves_the_module_alone(through, bits) -> None:
    ready, optimizer = trained(bits=bits)
    held, before = tensors_of_session(ready), state_of(ready)
    session = ready.session
    twin = copy.deepcopy(ready)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    through(twin)
    assert ready.session is session and same(state_of(ready), before)
    after = tensors_of_session(ready)
    assert held.keys() == after.keys() and all(held[name] is after[name] for name in held)
    train(optimizer, ready, "mlp", 2)
    alone, own = trained(bits=bits)
    train(own, alone, "mlp", 2)
    assert same(state_of(ready), state_of(alone))
    x = batch("mlp", 1)
    assert torch.equal(gc.finalize(ready)(*x), gc.finalize(alone)(*x))


def test_a_twin_is_finalized_as_the_module_would_be() -> None:
    ready, _ = trained("residual")
    small, of_twin = gc.finalize(ready), gc.finalize(copy.deepcopy(ready))
    x = batch("residual", 1)
    assert torch.equal(small(*x), of_twin(*x)) and small.report.to_dict() == of_twin.report.to_dict()


def test_no_tensor_is_shared() -> None:
    ready, _ = trained()
    twin = copy.deepcopy(ready)
    pointers = [{t.data_ptr() for t in tensors_of_session(own).values()} for own in (ready, twin)]
    assert pointers[0].isdisjoint(pointers[1])
    names = dict(all_tensors(twin))
    for name, tensor in tensors_of_session(twin).items():
        own = names.get(name.partition(" ")[2])
        assert own is None or own is tensor, name


@pytest.mark.parametrize("made", [copy.deepcopy, gc.shrink])
def test_a_copy_does_not_keep_the_module_alive(made) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64)).eval()
    ready = gc.prepare(model, torch.randn(4, 64), bits=(4, 8))
    size = held_bytes(ready)
    assert held_bytes(ready.state_dict()) <= size <= 1.3 * held_bytes(ready.state_dict())  # groups hold indices
    if made is copy.deepcopy:
        assert held_bytes(made(made(ready))) <= 1.01 * size
        return
    ready.keep({group: torch.arange(group.size // 2) for group in ready.session.groups})
    whole = size  # kept for the report and for growing back
    assert held_bytes(made(ready)) <= 0.6 * size + whole


def test_attributes_of_the_model_are_the_twins_own() -> None:
    class Configured(nn.Sequential):
        config = None

    model = Configured(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model.config = {"name": "a"}
    ready = gc.prepare(model, torch.randn(4, 6), bits=(4, 8))
    twin = copy.deepcopy(ready)
    twin.config["name"] = "b"
    assert ready.config == {"name": "a"} and model.config == {"name": "a"}
