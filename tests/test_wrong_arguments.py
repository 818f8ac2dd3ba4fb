"""Every argument of every public function, replaced by every wrong value: a result, or an error of graphcomp's."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.ops.registry import forget
from graphcomp.pruning import allocation, saliency
from tests.flows.fake_timer import MACHINE, FakeTimer

X = torch.linspace(-1, 1, 32).reshape(4, 8)


class Net(nn.Module):
    """8 -> 6 -> 4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 8) -> (n, 4)."""
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


def loss(output: Tensor, _: Any) -> Tensor:
    return output.square().mean()


def wrong_values() -> dict[str, Any]:
    """Values that hardly any argument can have."""
    return {
        "None": None, "True": True, "-1": -1, "0": 0, "3": 3, "0.5": 0.5, "nan": math.nan, "inf": math.inf, "text": "x",
        "empty text": "", "bytes": b"x", "list": [], "dict": {}, "pair": (2, 1), "texts": ["x"], "mapping": {"x": 1},
        "nested": [[None]], "object": object(), "module": nn.Linear(2, 2), "tensor": torch.ones(2, 3),
        "function": lambda *_, **__: None, "class": int, "pattern": "re:[",
    }  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A public callable with arguments that it takes.

    Attributes:
        make: makes the callable, anew for each call.
        good: makes its arguments by name, anew for each call.
        only: names of the arguments that are replaced; None: all.
    """

    make: Callable[[Path], Callable[..., Any]]
    good: Callable[[Path], dict[str, Any]]
    only: tuple[str, ...] | None = None

    def names(self, folder: Path) -> list[str]:
        """The names of the arguments that are replaced."""
        found = inspect.signature(self.make(folder)).parameters.values()
        return [p.name for p in found if p.kind is not p.VAR_KEYWORD and (self.only is None or p.name in self.only)]


@cache
def plan() -> gc.Analysis:
    return gc.analyze(Net().eval(), X)


@cache
def prepared(bits: int | None) -> gc.Prepared:
    return gc.prepare(Net(), X, bits=bits)


def ready(bits: int | None = None) -> gc.Prepared:
    return copy.deepcopy(prepared(bits))


@cache
def small() -> gc.CompressedModel:
    return gc.compress(Net().eval(), X, progress=False)


def saved(folder: Path) -> Path:
    if not (folder / "saved").exists():
        small().save(folder / "saved")
    return folder / "saved"


def ones() -> dict[gc.ChannelGroup, Tensor]:
    return {group: torch.arange(1.0, group.size + 1) for group in plan().groups}


def model_and_inputs(**options: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda _: {"model": Net().eval(), "example_inputs": X, **options}


class Residual(Net):
    """8 -> 8 -> 4, with a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.tanh(self.inner(torch.relu(x))))


@cache
def residual() -> gc.Analysis:
    return gc.analyze(Residual().eval(), X)


def reading() -> dict[str, Any]:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)).eval()
    return {"model": model, "token_ids": [1, 3, 4], "example_inputs": torch.tensor([[1, 3], [4, 1]])}


def op(
    op: Any, text: Any, integer: Any = None, masked: Any = None, macs: Any = None, keeps_zeros: Any = None,
    scales: Any = None, facts: Any = None, coupling: Any = None,
) -> Any:  # fmt: skip
    try:
        return gc.op(
            op, text, integer=integer, masked=masked, macs=macs, keeps_zeros=keeps_zeros, scales=scales, facts=facts,
            coupling=coupling,
        )  # fmt: skip
    finally:
        forget("a::c")


def checkpoint(folder: Path) -> dict[str, Any]:
    from tests.hf.folders import llama_folder  # transformers may not be installed

    source = folder / "source"
    if not source.exists():
        llama_folder(source)
    return {"source": source, "target": folder / f"small {next(TARGETS)}", "progress": False}


TARGETS = itertools.count()
TRAINING = {"data": [X] * 2, "loss": loss, "steps": 12, "progress": False}
FOR_TRAINING = (
    "sparsity", "bits", "activation_bits", "calibration", "method", "data", "loss", "epochs", "steps", "lr", "folder",
    "training", "saliency", "ignore", "keep_inputs", "prune", "round_to", "budget", "scope", "outputs", "verify",
)  # fmt: skip
FOR_QUANTIZING = (
    "sparsity", "bits", "activation_bits", "group_size", "calibration", "rounding", "reduce_range", "quantization",
    "ignore", "scope", "outputs", "verify",
)  # fmt: skip
QUANTIZING = {"bits": 8, "calibration": [X], "sparsity": 0.0, "progress": False}

CALLS: dict[str, Call] = {
    "analyze": Call(lambda _: gc.analyze, model_and_inputs()),
    "compress": Call(lambda _: gc.compress, model_and_inputs(progress=False)),
    "compress, quantizing": Call(lambda _: gc.compress, model_and_inputs(**QUANTIZING), FOR_QUANTIZING),
    "compress, training": Call(lambda _: gc.compress, model_and_inputs(method="hesso", **TRAINING), FOR_TRAINING),
    "compress_checkpoint": Call(
        lambda _: gc.compress_checkpoint,
        checkpoint,
        (
            "source",
            "target",
            "example_inputs",
            "example_kwargs",
            "budget",
            "saliency",
            "max_shard_size",
            "dtype",
            "trust_remote_code",
        ),
    ),
    "prepare": Call(lambda _: gc.prepare, model_and_inputs()),
    "family": Call(lambda _: gc.family, model_and_inputs(speedups=[1.5], progress=False)),
    "time_layers": Call(lambda _: gc.time_layers, model_and_inputs(progress=False)),
    "LatencyTable": Call(lambda _: gc.LatencyTable, lambda _: {}),
    "prunable_groups": Call(lambda _: gc.prunable_groups, lambda _: {"analysis": plan()}),
    "slice_groups": Call(lambda _: gc.slice_groups, lambda _: {"plan": plan(), "kept": {plan().groups[0]: [0, 1]}}),
    "repair": Call(
        lambda _: gc.repair,
        lambda _: {"small": gc.slice_groups(plan(), {plan().groups[0]: [0, 1]}), "plan": plan(), "batches": [X]},
    ),
    "finetune": Call(
        lambda _: gc.finetune,
        lambda _: {
            "small": small(),
            "data": [X] * 2,
            "loss": loss,
            "training": gc.Training(steps=1),
            "progress": False,
        },
    ),
    "trim_vocabulary": Call(lambda _: gc.trim_vocabulary, lambda _: reading()),
    "find_blocks": Call(lambda _: gc.find_blocks, lambda _: {"plan": residual()}),
    "drop_blocks": Call(
        lambda _: gc.drop_blocks,
        lambda _: {"plan": residual(), "blocks": gc.find_blocks(residual()), "calibration": [X] * 2},
    ),
    "compress, blocks": Call(
        lambda _: gc.compress,
        model_and_inputs(prune=("block",), calibration=[X] * 2, progress=False),
        ("sparsity", "budget", "prune", "ignore", "calibration", "repair", "scope"),
    ),
    "shrink": Call(lambda _: gc.shrink, lambda _: {"ready": ready(8)}),
    "finalize": Call(lambda _: gc.finalize, lambda _: {"ready": ready(8)}),
    "load": Call(lambda _: gc.load, lambda folder: {"folder": saved(folder)}),
    "plot": Call(lambda _: gc.plot, lambda folder: {"folder": folder, "path": folder / "a.png"}),
    "rule": Call(lambda _: lambda op, text: gc.rule(op, text), lambda _: {"op": "a::b", "text": "n c -> n c"}),
    "op": Call(lambda _: op, lambda _: {"op": "a::c", "text": "n c -> n c"}),
    "save": Call(lambda _: small().save, lambda folder: {"folder": folder / "new"}),
    "export": Call(lambda _: small().export, lambda folder: {"path": folder / "a.pt2"}),
    "group": Call(lambda _: plan().group, lambda _: {"name": plan().groups[0].name}),
    "keep": Call(lambda _: ready().keep, lambda _: {"kept": {}}),
    "freeze_norms": Call(lambda _: ready().freeze_norms, lambda _: {}),
    "Budget": Call(lambda _: gc.Budget, lambda _: {"params": 0.5}),
    "PostTraining": Call(lambda _: gc.PostTraining, lambda _: {}),
    "Reconstruction": Call(lambda _: gc.Reconstruction, lambda _: {}),
    "QuantConfig": Call(lambda _: gc.QuantConfig, lambda _: {}),
    "QuantSpec": Call(lambda _: gc.QuantSpec, lambda _: {}),
    "Schedule": Call(lambda _: gc.Schedule, lambda _: {"steps": 100}),
    "Schedule.of": Call(lambda _: gc.Schedule.of, lambda _: {"steps": 100}),
    "Training": Call(lambda _: gc.Training, lambda _: {"steps": 100}),
    "Distill": Call(lambda _: gc.Distill, lambda _: {}),
    "GraphcompCallback": Call(lambda _: gc.GraphcompCallback, lambda _: {}),
    "QASSO": Call(lambda _: gc.QASSO, lambda _: {"ready": ready(), "lr": 0.1, "schedule": 100}),
    "allocate": Call(lambda _: allocation.allocate, lambda _: {"groups": plan().groups, "scores": ones()}),
    "iterative": Call(lambda _: allocation.iterative, lambda _: {"sparsity": 0.5, "steps": 3}),
    "score": Call(lambda _: saliency.score, lambda _: {"saliency": "l2", "analysis": plan(), "groups": plan().groups}),
    "Magnitude": Call(lambda _: saliency.Magnitude, lambda _: {}),
    "Taylor": Call(lambda _: saliency.Taylor, lambda _: {}),
    "Cosine": Call(lambda _: saliency.Cosine, lambda _: {}),
    "Geta": Call(lambda _: saliency.Geta, lambda _: {}),
    "NormScale": Call(lambda _: saliency.NormScale, lambda _: {}),
    "GeometricMedian": Call(lambda _: saliency.GeometricMedian, lambda _: {}),
    "Activation": Call(lambda _: saliency.Activation, lambda _: {}),
    "Repairable": Call(lambda _: saliency.Repairable, lambda _: {}),
}


RESULTS = {
    "Analysis",
    "ChannelGroup",
    "CompressedCheckpoint",
    "CompressedModel",
    "Member",
    "Prepared",
    "Report",
    "Stage",
}
"""Public classes that graphcomp makes and users read."""

METHODS = {"Choice", "Goal", "Method", "Run"}
"""Public classes that a training method of a user's own is made of."""


def calls(name: str, folder: Path) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Each argument with each wrong value: the call."""
    call = CALLS[name]
    for argument in call.names(folder):
        for label, value in wrong_values().items():
            yield (
                argument,
                label,
                lambda argument=argument, value=value: call.make(folder)(**{**call.good(folder), argument: value}),
            )


def use(found: Any) -> None:
    """Use what was made, so that a wrong field shows: a saliency scores, options quantize and train."""
    if type(found).__module__ in (saliency.__name__, saliency.Repairable.__module__) and callable(found):
        saliency.score(found, plan(), plan().groups, data=[X], loss=loss)
    elif isinstance(found, gc.Reconstruction):
        use(gc.PostTraining(rounding=found))
    elif isinstance(found, gc.PostTraining):
        gc.compress(Net().eval(), X, sparsity=0.0, quantization=found, calibration=[X], progress=False)
    elif isinstance(found, gc.QuantConfig):
        use(gc.PostTraining(found))
    elif isinstance(found, gc.QuantSpec) and found.kind == "uniform":
        use(gc.QuantConfig(weights=found, activations=None))
    elif isinstance(found, gc.Distill):
        use(gc.Training(steps=1, teacher=Net(), distill=found))
    elif isinstance(found, gc.Training):
        gc.compress(Net(), X, training=found, data=[X] * 2, loss=loss, method="hesso", progress=False)
    elif isinstance(found, gc.Budget):
        gc.compress(Net().eval(), X, budget=found, progress=False)
    elif isinstance(found, gc.QASSO):
        found.zero_grad()
        loss(found.ready(X), None).backward()
        found.step()


def test_every_public_callable_is_called() -> None:
    errors = {
        name for name in gc.__all__ if isinstance(found := getattr(gc, name), type) and issubclass(found, Exception)
    }
    assert set(gc.__all__) - errors - RESULTS - METHODS <= CALLS.keys()


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_end_in_a_result_or_an_error_of_graphcomps(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("graphcomp.flows.timed.timer_of", lambda runtime, threads: FakeTimer(threads))
    monkeypatch.setattr("graphcomp.flows.timed.this_machine", lambda runtime: MACHINE)
    torch.manual_seed(0)
    raw = []
    for argument, label, run in calls(name, tmp_path):
        try:
            use(run())
        except gc.GraphcompError:
            continue
        except Exception as error:
            raw.append(f"{argument}={label}: {type(error).__name__}: {str(error)[:120]}")
    assert not raw, "\n".join(raw)
