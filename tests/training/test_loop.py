"""compress by training: each method, checkpoints to go on from bit for bit, and what stops a run."""

import copy
import functools
import io
import itertools
import json
import math
import random
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import graphcomp as gc
from graphcomp.errors import ExportError
from graphcomp.methods.base import Goal
from graphcomp.methods.registry import METHODS
from graphcomp.methods.stages import folders
from graphcomp.training.batches import to_device
from graphcomp.training.folder import read_metrics
from graphcomp.training.loop import train
from graphcomp.training.options import parts
from graphcomp.training.schedule import Schedule
from tests.marks import in_ci

GENERATOR = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(40, 1, 6, 6, generator=GENERATOR), torch.randint(3, (40,), generator=GENERATOR)
STEPS = 30
STAGES = Schedule(STEPS, warmup=4, projection=5, joint=9, projection_periods=2, pruning_periods=3)


def convnet() -> nn.Sequential:
    """A convnet with dropout, so that the random state counts."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def loader(**options) -> DataLoader:
    """Eight batches of five, shuffled."""
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=5, shuffle=True, **options)


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


def compress(model=None, data=None, *, loss=loss, method=None, bits=(4, 8), training=None, **options):
    training = training or gc.Training(schedule=STAGES, folder=options.pop("folder", None), save_every=1)
    return gc.compress(
        model or convnet(),
        IMAGES[:2],
        data=loader() if data is None else data,
        loss=loss,
        method=method,
        bits=bits,
        training=training,
        progress=False,
        **options,
    )


@functools.cache
def prepared():
    """The convnet, prepared once."""
    return gc.prepare(convnet(), IMAGES[:2], bits=(4, 8))


def run(data=None, *, loss=loss, folder=None, training=None, seed=0, **options):
    """What training leaves of a copy of it."""
    ready = copy.deepcopy(prepared())
    training = training or gc.Training(schedule=STAGES, folder=folder, save_every=1)
    train(ready, loader() if data is None else data, loss, training, geta(ready, **options), progress=False, seed=seed)
    return ready


def geta(ready, **goal):
    """What begins a run of GETA."""
    (method,) = METHODS["geta"]
    return functools.partial(method.begin, ready, Goal(**goal))


def weights(small):
    return {name: tensor.clone() for name, tensor in small.state_dict().items()}


def same(first, second):
    a, b = weights(first), weights(second)
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole():
    """What the run leaves that nothing cuts short."""
    return run()


# ------------------------------------------------------------------------------------------------ methods
def test_geta_is_chosen_with_data_loss_and_length_and_meets_what_is_asked():
    report = compress().report
    assert (report.units_removed, report.units_total) == (7, 14)
    quantized = [(layer.weight_bits, layer.activation_bits) for layer in report.layers]
    assert all(4 <= bits <= 8 for pair in quantized for bits in pair)
    assert report.verified["trained == sliced"] <= 1e-9
    assert report.verified["integers == fake-quant, in steps"] <= 1


def test_hesso_prunes_only_and_keeps_the_class():
    small = compress(method="hesso", bits=None, sparsity=0.4)
    assert small.form == "native" and small.report.units_removed == round(0.4 * 14)
    assert {layer.weight_bits for layer in small.report.layers} == {32}


def test_qat_quantizes_only():
    small = compress(method="qat", bits=(4, 6))
    assert small.report.units_removed == 0
    assert all(4 <= layer.weight_bits <= 6 for layer in small.report.layers)


@pytest.mark.slow
@pytest.mark.ci
def test_sequential_prunes_in_its_first_half_and_what_is_gone_stays_gone(tmp_path):
    small = compress(method="sequential", training=gc.Training(steps=31, folder=tmp_path, save_every=100))
    assert small.report.units_removed == 7 and max(layer.weight_bits for layer in small.report.layers) <= 8
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("1-prune", "2-quantize"))
    assert (first[-1]["step"], second[-1]["step"]) == (15, 16)
    assert first[0]["weight_bits"] is None and first[-1]["units_removed"] == 7
    assert {line["units_removed"] for line in second} == {7}


def test_a_budget_is_met():
    small = compress(budget=gc.Budget(bops=20_000))
    assert 10_000 < small.report.bops.after <= 20_000


def test_a_stage_with_nothing_to_do_takes_no_steps():
    assert Schedule.of(100, prune=False).lengths == (5, 10, 0, 85)
    assert Schedule.of(100, quantize=False).lengths == (5, 0, 20, 75)
    assert Schedule.of(100, transformer=True).lengths == (10, 20, 25, 45)


def test_data_and_a_loss_without_a_length_are_for_the_saliency():
    batches = [(IMAGES[:5], LABELS[:5])]
    small = gc.compress(convnet().eval(), IMAGES[:2], data=batches, loss=loss, saliency="taylor", sparsity=0.3)
    assert small.report.units_removed == 4 and small.form == "native"


def test_the_callers_model_and_random_state_are_left_alone():
    model = convnet()
    before = weights(model)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    compress(model)
    assert model.training and all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_the_same_seed_gives_the_same_model(whole):
    noisy = run(data=Augmented())
    for draw in torch.manual_seed, random.seed, np.random.seed:  # of no matter
        draw(123)
    assert same(run(), whole) and same(run(data=Augmented()), noisy)
    assert not same(run(seed=1), whole)


# ------------------------------------------------------------------------------------------------ batches
class Doubler(nn.Module):
    """Two inputs, one of which has a default."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x, scale=None):
        y = torch.relu(self.up(x))
        return self.down(y if scale is None else y * scale)


Pair = namedtuple("Pair", "x label")
ROWS, SCALES = torch.randn(8, 6, generator=GENERATOR), torch.rand(8, 1, generator=GENERATOR)
FORMS = {
    "tensor": (ROWS[:2], ROWS),
    "list": (ROWS[:2], [ROWS, LABELS[:8]]),
    "namedtuple": (ROWS[:2], Pair(ROWS, LABELS[:8])),
    "two inputs": ((ROWS[:2], SCALES[:2]), (ROWS, SCALES, {"labels": LABELS[:8]})),
    "dict": ({"x": ROWS[:2], "scale": SCALES[:2]}, {"x": ROWS, "scale": SCALES, "label": LABELS[:8]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_batches(form):
    example, batch = FORMS[form]
    seen = []

    def own_loss(output, given):
        seen.append(type(given))
        return output.square().mean()

    small = gc.compress(Doubler(), example, data=[batch], loss=own_loss, steps=12, bits=8, progress=False)
    assert small.report.units_removed == 4
    assert set(seen) == {type(batch)} and len(seen) == 12


@pytest.mark.parametrize("form", FORMS)
def test_batches_are_moved_and_stay_what_they_are(form):
    batch = FORMS[form][1]
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    leaves = torch.utils._pytree.tree_leaves(moved)
    assert {leaf.device.type for leaf in leaves} == {"meta"}
    assert len(leaves) == len(torch.utils._pytree.tree_leaves(batch))


def test_what_is_no_tensor_is_not_moved():
    assert to_device(("name", None, 3), torch.device("meta")) == ("name", None, 3)


def test_a_model_in_eval_mode_is_trained_in_training_mode():
    ready = gc.prepare(convnet().eval(), IMAGES[:2], bits=(4, 8))
    before = ready.get_buffer("1.running_mean").clone()
    train(ready, loader(), loss, gc.Training(steps=20), geta(ready), progress=False)
    assert not torch.equal(ready.get_buffer("1.running_mean"), before)
    model = convnet().eval()
    assert not compress(model).training and not model.training


def test_a_batch_that_lacks_an_input():
    with pytest.raises(gc.PlanError, match="has no 'scale'"):
        gc.compress(
            Doubler(), FORMS["dict"][0], data=[{"x": ROWS}], loss=lambda o, b: o.mean(), steps=12, progress=False
        )


@pytest.mark.parametrize("value", [lambda o: o, lambda o: o.mean().detach(), lambda o: 1.0])
def test_a_loss_that_is_no_scalar(value):
    with pytest.raises(gc.PlanError, match="must return a scalar"):
        compress(loss=lambda output, batch: value(output))


def test_accumulated_batches_are_one_step():
    model, halves = Doubler(), [(ROWS[:4], 0), (ROWS[4:], 0)]
    outputs = []
    for data, accumulate in ([(ROWS, 0)], 1), (halves, 2):
        how = gc.Training(steps=12, accumulate=accumulate, optimizer=torch.optim.SGD, lr=0.1)
        small = gc.compress(
            model,
            ROWS[:2],
            data=data,
            loss=lambda output, batch: output.square().mean(),
            training=how,
            method="hesso",
            progress=False,
        )
        outputs.append(small(ROWS))
    assert torch.allclose(*outputs, rtol=1e-4, atol=1e-6)


def test_batches_left_over_at_the_end_of_a_pass_make_a_step(tmp_path):
    calls = []

    def counted(output, batch):
        calls.append(1)
        return loss(output, batch)

    data = [(IMAGES[:5], LABELS[:5])] * 3
    compress(data=data, loss=counted, training=gc.Training(epochs=6, accumulate=2, folder=tmp_path))
    assert len(calls) == 18 and read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 12


# ------------------------------------------------------------------------------------------------ one submodule
class Gated(nn.Module):
    """A body to compress, between a stem that is not, and a head that export refuses: (n, 1, 6, 6) -> (n, 3)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.stem = nn.Conv2d(1, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(6, 5, 2))
        self.head = nn.Linear(5, 3)
        self.fixed = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x):
        if bool((x > 1e9).any()):
            raise ValueError("too large")
        return self.fixed(self.head(self.body(self.stem(x)).flatten(1)))


@pytest.mark.parametrize("method", ["geta", "hesso", *in_ci("qat", "sequential")])
def test_a_submodule_is_compressed_in_the_model_that_is_trained(method):
    bits, removed = (None if method == "hesso" else (4, 8)), (0 if method == "qat" else 3)
    model = Gated()
    before = weights(model)
    small = compress(model, method=method, bits=bits, scope="body", training=gc.Training(steps=30))
    assert isinstance(small.module, Gated) and small.training
    assert (small.report.units_removed, small.report.units_total) == (removed, 6)
    assert {name.partition(".")[0] for name in small.kept} == ({"body"} if removed else set())
    after = weights(small.module)
    assert not torch.equal(after["stem.weight"], before["stem.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])
    assert torch.equal(after["fixed.weight"], before["fixed.weight"])
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items()) and model.training
    assert small.eval()(IMAGES).shape == (40, 3)
    codes = [name for name, b in small.named_buffers() if b.dtype == torch.int8]
    assert all(name.startswith("module.body.") for name in codes) and bool(codes) == (bits is not None)


def test_the_loss_of_the_whole_model_falls(tmp_path):
    compress(Gated(), scope="body", training=gc.Training(steps=80, lr=0.05, folder=tmp_path, log_every=10))
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_of_a_submodule_goes_on(tmp_path):
    whole = compress(Gated(), scope="body")
    with pytest.raises(Stopped):
        compress(Gated(), scope="body", loss=stopping(14), folder=tmp_path)
    assert same(compress(Gated(), scope="body", folder=tmp_path), whole)
    with pytest.raises(gc.CheckpointError, match="tensors: "):
        compress(Gated(), scope="stem", method="qat", folder=tmp_path)


def test_a_parameter_outside_of_the_submodule_is_named_where_it_is_not_finite():
    def bad(output, batch):
        return loss(output, batch) * math.inf

    model = Gated()
    with pytest.raises(gc.TrainingError, match="the loss is inf"):
        compress(model, scope="body", loss=bad)
    calls = []

    def spoilt(output, batch):
        calls.append(1)
        if len(calls) == 3:
            output.register_hook(lambda grad: grad * math.nan)
        return loss(output, batch)

    with pytest.raises(gc.TrainingError, match=r"'stem.weight' holds"):
        compress(model, scope="body", loss=spoilt)


def test_a_submodule_is_calibrated_on_batches_of_the_whole_model():
    narrow, wide = (
        gc.prepare(Gated(), IMAGES[:2], bits=8, scope="body", calibration=[IMAGES * scale]) for scale in (1, 10)
    )
    ranges = [next(q.q_m.item() for s, q in r.quantizers() if not s.is_weight) for r in (narrow, wide)]
    assert 5 < ranges[1] / ranges[0] < 15
    with pytest.raises(gc.CalibrationError, match="batch 0"):
        gc.prepare(Gated(), IMAGES[:2], bits=8, scope="body", calibration=[IMAGES[:, :, :2]])


# ------------------------------------------------------------------------------------------------ options
def run_of(tmp_path, name, **options):
    run(training=gc.Training(steps=20, folder=tmp_path / name, log_every=1, **options))
    return read_metrics(tmp_path / name / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.ci
def test_each_option_of_the_optimizer_matters(tmp_path):
    plain = [line["loss"] for line in run_of(tmp_path, "plain")]
    options = {
        "lr": {"lr": 0.2},
        "lr_quant": {"lr_quant": 0.1},
        "weight_decay": {"weight_decay": 0.5},
        "options": {"options": {"momentum": 0.0}},
        "optimizer": {"optimizer": torch.optim.AdamW},
        "clip_norm": {"clip_norm": 1e-3},
        "autocast": {"autocast": torch.bfloat16},
        "scheduler": {"scheduler": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 0.1)},
    }
    for name, option in options.items():
        assert [line["loss"] for line in run_of(tmp_path, name, **option)] != plain, name


def test_autocast_is_on_for_the_model_and_the_loss_alone():
    seen = []

    def watching(output, batch):
        seen.append((output.dtype, torch.is_autocast_enabled("cpu")))
        output.register_hook(lambda grad: seen.append((grad.dtype, torch.is_autocast_enabled("cpu"))))
        return loss(output, batch)

    how = gc.Training(schedule=STAGES, autocast=torch.bfloat16)
    small = compress(loss=watching, training=how)
    assert set(seen) == {(torch.bfloat16, True), (torch.bfloat16, False)}
    assert small.report.units_removed == 7 and all(t.dtype != torch.bfloat16 for t in small.state_dict().values())
    with pytest.raises(gc.PlanError, match="autocast"):
        gc.Training(steps=1, autocast=torch.float32)


@pytest.mark.parametrize("length", [{"schedule": STAGES}, {"epochs": 4}])
def test_steps_that_the_scaler_skips_do_not_count(tmp_path, length):
    """In half precision the loss is scaled; gradients that overflow lower the scale, and another batch makes up."""
    calls = []

    def overflowing(output, batch):
        calls.append(1)
        if len(calls) in (1, 9):
            output.register_hook(lambda grad: grad * math.inf)
        return loss(output, batch)

    how = gc.Training(**length, autocast=torch.float16, folder=tmp_path, log_every=1, save_every=1000)
    ready = run(loss=overflowing, training=how)
    steps = how.steps_over(loader())
    assert len(calls) == steps + 2
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, steps + 1))
    assert sum(len(units) for units in ready.kept().values()) == 7
    saved = torch.load(next(tmp_path.glob("*.pt")), weights_only=True)
    assert saved["scaler"]["scale"] == 2.0**14


def test_gradients_that_overflow_at_any_scale():
    def overflowing(output, batch):
        output.register_hook(lambda grad: grad * math.inf)
        return loss(output, batch)

    with pytest.raises(gc.TrainingError, match="the gradients are not finite at step 1"):
        run(loss=overflowing, training=gc.Training(schedule=STAGES, autocast=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, *in_ci(torch.bfloat16)])
def test_a_run_under_autocast_goes_on(tmp_path, dtype):
    how = gc.Training(schedule=STAGES, autocast=dtype)
    folder = replace(how, folder=tmp_path, save_every=1)
    whole = run(training=how)
    with pytest.raises(Stopped):
        run(loss=stopping(14), training=folder)
    assert same(run(training=folder), whole)
    with pytest.raises(gc.CheckpointError, match="autocast: torch"):
        run(folder=tmp_path)


def test_clipping_leaves_the_quantizers_alone():
    ends = []
    for lr_quant in (1e-3, 1e-1):
        ready = run(training=gc.Training(schedule=STAGES, clip_norm=1e-8, lr_quant=lr_quant))
        ends.append(torch.stack([quantizer.q_m.detach() for _, quantizer in ready.quantizers()]))
    assert (ends[0] - ends[1]).abs().max() > 1e-3


def test_the_default_rate_rises_and_falls_to_nothing(tmp_path):
    run(training=gc.Training(steps=60, folder=tmp_path, log_every=1))
    rates = [line["lr"] for line in read_metrics(tmp_path / "metrics.jsonl")]  # of the step after each
    assert rates[:3] == pytest.approx([2e-2 / 3, 1e-2, 1e-2]) and rates[-1] == pytest.approx(0, abs=1e-6)
    assert rates[2:] == sorted(rates[2:], reverse=True)


@pytest.mark.slow
@pytest.mark.ci
def test_models_with_attention_get_adamw_and_its_rate(tmp_path):
    from graphcomp.testing import tiny_models

    model, example = tiny_models()["vision_transformer"]
    gc.compress(
        model,
        example,
        data=[example],
        loss=lambda output, batch: output.square().mean(),
        steps=10,
        folder=tmp_path,
        progress=False,
        bits=8,
    )
    first = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert first["lr"] <= 1e-4
    saved = torch.load(tmp_path / "step-000000010.pt", weights_only=True)
    assert saved["about"]["optimizer"] == "AdamW"


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"steps": -1},
        {"accumulate": 0},
        {"lr": 0.0},
        {"clip_norm": -1.0},
        {"keep": 0},
        {"save_every": 0},
        {"scheduler": 3},
        {"epochs": True},
        {"lr": "0.1"},
        {"lr": math.nan},
        {"lr": torch.ones(2)},
        {"clip_norm": np.str_("a")},
        {"lr_quant": "a"},
        {"lr_quant": -1e-3},
        {"weight_decay": "a"},
        {"schedule": "long"},
        {"schedule": 0},
        {"schedule": 20.0},
        {"options": 3},
        {"options": {"lr": 0.1}},
        {"options": {"schedule": 20}},
        {"options": {"sparsity": 0.5}},
        {"options": {"forgetting": "uniform"}},
    ],
)
def test_options_out_of_range(options):
    (name,) = options
    with pytest.raises(gc.PlanError, match=rf"Training\({name}=") as caught:
        gc.Training(**options)
    assert caught.value.fix


def test_numbers_of_numpy_and_tensors_are_pythons():
    how = gc.Training(steps=np.int64(20), lr=torch.tensor(0.5), clip_norm=np.float32(0.5), options={"a": np.float64(1)})
    assert how == gc.Training(steps=20, lr=0.5, clip_norm=0.5, options={"a": 1.0})
    assert [type(v) for v in (how.steps, how.lr, how.clip_norm, how.options["a"])] == [int, float, float, float]


def test_a_number_of_steps_is_a_schedule():
    assert gc.Training(schedule=20) == gc.Training(steps=20)
    with pytest.raises(gc.PlanError, match="steps and by schedule"):
        gc.Training(schedule=20, steps=20)


def test_the_length_is_given_once():
    with pytest.raises(gc.PlanError, match="epochs and by steps"):
        gc.Training(epochs=1, steps=1)
    with pytest.raises(gc.PlanError, match="epochs beside training="):
        compress(epochs=3)


def test_half_of_the_steps_each_in_stages_of_their_own_length():
    data = [0] * 7
    both = parts(gc.Training(epochs=3, folder="run"), data, folders(METHODS["sequential"]))
    assert [part.steps for part in both] == [10, 11]
    assert [str(part.folder) for part in both] == ["run/1-prune", "run/2-quantize"]
    staged = parts(gc.Training(schedule=Schedule(100)), data, folders(METHODS["sequential"]))
    assert [part.schedule for part in staged] == [Schedule(50), Schedule(50)]


# ------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (4, 8)}, "needs a budget"),
        ({"epochs": 3}, "does not train"),
        ({"method": "geta", "bits": 8}, "needs data, a loss and a length"),
        ({"method": "geta", "data": [1], "loss": loss}, "needs data, a loss and a length"),
        ({"method": "getta"}, "one of 'oneshot', 'geta'"),
        ({"method": "qat"}, "no bits are given"),
        ({"method": "sequential"}, "no bits are given"),
        ({"method": "qat", "bits": 8, "sparsity": 0.5}, "does not prune"),
        ({"method": "hesso", "bits": 8}, "does not quantize"),
        ({"method": "geta", "rounding": "second_order", "ranking": "local"}, "ranking, rounding with"),
        ({"method": "sequential", "bits": 8, "budget": gc.Budget(params=100)}, "a budget with"),
        ({"method": "geta", "activation_bits": 4}, "activation_bits needs bits"),
        ({"method": "qat", "bits": 4, "activation_bits": "most"}, "activation_bits='most'"),
        ({"bits": 4, "activation_bits": (4, 8)}, r"activation_bits=\(4, 8\): .* learned in training"),
        ({"method": "hesso", "calibration": [IMAGES]}, "calibration with"),
        (
            {"method": "geta", "bits": 8, "data": 3, "loss": loss, "steps": 20},
            "data must be a series of batches, got 3",
        ),
        ({"training": {"steps": 20}, "data": [1], "loss": loss}, "training must be a Training, got"),
        ({"seed": None}, "seed=None"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"bits": (4, 5, 6), "data": [1], "loss": loss, "steps": 20}, "no pair of bounds"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(gc.PlanError, match=message):
        gc.compress(convnet(), IMAGES[:2], **options)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (torch.optim.lr_scheduler.ReduceLROnPlateau, "a ReduceLROnPlateau as Training.scheduler"),
        (lambda optimizer: None, "returns a NoneType"),
        (torch.optim.lr_scheduler.StepLR, "StepLR, fails"),
    ],
)
def test_a_scheduler_that_cannot_be_stepped(scheduler, message):
    with pytest.raises(gc.PlanError, match=message) as caught:
        run(training=gc.Training(schedule=STAGES, scheduler=scheduler), loss=stopping(0))
    assert "StepLR(optimizer" in caught.value.fix


class Weighted(nn.Module):
    """A loss with a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, output, batch):
        return F.cross_entropy(output * self.scale, batch[1])


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (nn.CrossEntropyLoss(), "torch's CrossEntropyLoss, and a batch is a list"),
        (functools.partial(F.mse_loss, reduction="sum"), "torch's mse_loss, and a batch is a list"),
        (lambda output: output.mean(), "the loss is .*<lambda>"),
        (lambda output, images, labels: output.mean(), "the loss is .*<lambda>"),
        ("cross_entropy", "the loss is str"),
        (Weighted(), "parameters of its own: scale"),
    ],
)
def test_a_loss_that_cannot_be_called_or_is_not_trained(criterion, message):
    with pytest.raises(gc.PlanError, match=message) as caught:
        run(loss=criterion)
    assert caught.value.why and "loss" in caught.value.fix


def test_torchs_own_losses_take_batches_that_are_targets():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    small = gc.compress(model, ROWS[:2], data=[ROWS], loss=nn.MSELoss(), steps=12, bits=8, progress=False)
    assert small.report.units_removed == 4


def test_a_loss_whose_parameters_are_held(whole):
    assert same(run(loss=Weighted().requires_grad_(False)), whole)


def test_gradients_are_on_inside(whole):
    with torch.no_grad():
        assert same(run(), whole) and not torch.is_grad_enabled()
    with torch.inference_mode(), pytest.raises(gc.PlanError, match="inference_mode") as caught:
        compress()
    assert "outside" in caught.value.fix


def test_weights_that_are_not_finite_are_named_before_training():
    model = convnet()
    model[4].weight.data[0, 0, 0, 0] = math.inf
    with pytest.raises(gc.PlanError, match=r"'4.weight' holds 1 values"):
        compress(model)


# ------------------------------------------------------------------------------------------------ data
class Stream(IterableDataset):
    """Without a length."""

    def __iter__(self):
        return iter(TensorDataset(IMAGES, LABELS))


def test_data_without_a_length_need_steps():
    stream = DataLoader(Stream(), batch_size=5)
    with pytest.raises(gc.PlanError, match="length is not known"):
        compress(data=stream, training=gc.Training(epochs=2))
    assert compress(data=stream).report.units_removed == 7


@pytest.mark.parametrize("how", [gc.Training(epochs=2), gc.Training(steps=20)])
def test_no_batches(how):
    with pytest.raises(gc.TrainingError, match="hold no batches"):
        run(data=DataLoader(TensorDataset(IMAGES, LABELS), batch_size=50, drop_last=True), training=how)


def test_an_iterator_that_ends_early_says_so():
    with pytest.raises(gc.TrainingError, match=r"ended at step 8 of 30(.|\n)*only once(.|\n)*list"):
        run(data=iter(loader()))


def test_an_iterator_that_lasts_is_enough():
    assert compress(data=((IMAGES[:5], LABELS[:5]) for _ in range(STEPS))).report.units_removed == 7


class Shrinking:
    """Fewer batches in each pass than its length says, from the second on."""

    def __init__(self, fewest, first=10):
        self.passes, self.fewest, self.first = 0, fewest, first

    def __len__(self):
        return 10

    def __iter__(self):
        self.passes += 1
        return iter([(IMAGES[:5], LABELS[:5])] * (self.first if self.passes == 1 else self.fewest))


def test_a_pass_with_fewer_batches_goes_on_to_the_next(tmp_path):
    data = Shrinking(4)
    run(data=data, training=gc.Training(steps=30, folder=tmp_path))
    assert data.passes == 6 and read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 30
    data = Shrinking(6)
    run(data=data, training=gc.Training(epochs=3, folder=tmp_path / "b"))  # 22 of 30 steps: in the cool-down
    assert data.passes == 3


def test_passes_that_end_before_the_cool_down():
    with pytest.raises(gc.TrainingError, match=r"ended at step 7 of 30, before the cool-down(.|\n)*steps=30"):
        run(data=Shrinking(1, first=5), training=gc.Training(epochs=3))


# ------------------------------------------------------------------------------------------------ going on
class Stopped(Exception):
    """Stands for whatever ends a process."""


def stopping(step):
    """A loss that fails while the step after `step` is made."""
    calls = []

    @functools.wraps(loss)  # a run goes on with the same loss
    def failing(output, batch):
        calls.append(1)
        if len(calls) > step:
            raise Stopped
        return loss(output, batch)

    return failing


@pytest.mark.parametrize("step", [1, 3, 7, 8, 11, 14, 18, 29])  # every stage, its ends, and the end of a pass
@pytest.mark.slow
@pytest.mark.ci
def test_a_run_that_was_cut_short_ends_as_it_would_have(tmp_path, whole, step):
    with pytest.raises(Stopped):
        run(loss=stopping(step), folder=tmp_path)
    torch.manual_seed(99)
    assert same(run(folder=tmp_path), whole)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS


def test_cut_short_again_and_again(tmp_path, whole):
    for _ in range(5):
        with pytest.raises(Stopped):
            run(loss=stopping(5), folder=tmp_path)
    assert same(run(loss=stopping(5), folder=tmp_path), whole)


class Augmented:
    """Batches in an order of Python's and with noise of NumPy's, that end at a batch."""

    def __init__(self, last=None):
        self.last, self.given = last, 0

    def __len__(self):
        return 8

    def __iter__(self):
        for k in random.sample(range(8), 8):
            if self.given == self.last:
                raise Stopped
            self.given += 1
            noise = torch.from_numpy(np.random.standard_normal((5, 1, 6, 6))).float()
            yield IMAGES[5 * k : 5 * k + 5] + noise, LABELS[5 * k : 5 * k + 5]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("batch", [4, 8, 13, 17])
def test_data_that_draw_from_python_and_numpy(tmp_path, batch):
    with pytest.raises(Stopped):
        run(data=Augmented(batch), folder=tmp_path)
    assert same(run(data=Augmented(), folder=tmp_path), run(data=Augmented()))


def test_a_loader_with_a_generator_of_its_own(tmp_path):
    def data():
        return loader(generator=torch.Generator().manual_seed(7))

    with pytest.raises(Stopped):
        run(data=data(), loss=stopping(19), folder=tmp_path)
    assert same(run(data=data(), folder=tmp_path), run(data=data()))


@pytest.mark.slow
@pytest.mark.ci
def test_a_loader_with_a_worker(tmp_path):
    with pytest.raises(Stopped):
        run(data=loader(num_workers=1), loss=stopping(13), folder=tmp_path)
    assert same(run(data=loader(num_workers=1), folder=tmp_path), run(data=loader(num_workers=1)))
    with pytest.raises(gc.PlanError, match="workers persist"):
        run(data=loader(num_workers=1, persistent_workers=True), folder=tmp_path)


def test_metrics_after_the_checkpoint_are_measured_again(tmp_path):
    how = gc.Training(schedule=STAGES, folder=tmp_path, save_every=6, log_every=1)
    with pytest.raises(Stopped):
        run(loss=stopping(9), training=how)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 10))
    run(training=how)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_metrics_go_on_as_they_would_have(tmp_path):
    with pytest.raises(Stopped):
        run(loss=stopping(13), folder=tmp_path / "cut")
    for name in "cut", "whole":
        run(folder=tmp_path / name)
    cut, whole = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("cut", "whole"))
    seconds = [line.pop("seconds") for line in cut]
    assert seconds == sorted(seconds) and all(line.pop("seconds") for line in whole)
    assert cut == whole


def test_accumulation_and_rare_checkpoints(tmp_path):
    def how(folder):
        return gc.Training(steps=20, accumulate=3, save_every=6, folder=folder)

    with pytest.raises(Stopped):
        run(loss=stopping(40), training=how(tmp_path))
    assert [p.name for p in sorted(tmp_path.glob("*.pt"))] == ["step-000000006.pt", "step-000000012.pt"]
    assert same(run(training=how(tmp_path)), run(training=how(None)))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("step", [6, 22])  # of either run
def test_sequential_goes_on_in_either_run(tmp_path, step):
    with pytest.raises(Stopped):
        compress(
            method="sequential", loss=stopping(step), training=gc.Training(steps=30, folder=tmp_path, save_every=1)
        )
    whole = gc.Training(steps=30, folder=tmp_path, save_every=1)
    small = compress(method="sequential", loss=stopping(10**6), training=whole)  # the code of the loss is the same
    assert same(small, compress(method="sequential", training=gc.Training(steps=30)))


def test_a_run_that_is_over_is_not_repeated(tmp_path, whole):
    run(folder=tmp_path)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert same(run(folder=tmp_path), whole)
    assert read_metrics(tmp_path / "metrics.jsonl") == metrics
    with pytest.raises(gc.CheckpointError, match="code of the loss"):
        run(folder=tmp_path, loss=stopping(0))


@pytest.mark.parametrize(
    "options",
    [
        {"lr": np.logspace(-3, -1, 3)[1], "weight_decay": np.float64(1e-4), "lr_quant": np.float32(1e-3)},
        {"lr": torch.tensor(0.01), "options": {"betas": (np.float64(0.8), 0.99)}, "optimizer": torch.optim.AdamW},
        {"scheduler": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, Halving())},
    ],
)
def test_numbers_of_numpy_are_kept(tmp_path, options):
    how = gc.Training(schedule=STAGES, save_every=4, **options)
    with pytest.raises(Stopped):
        run(loss=stopping(9), training=replace(how, folder=tmp_path))
    assert same(run(training=replace(how, folder=tmp_path)), run(training=how))


class Halving:
    """A factor of the learning rate that NumPy makes; a scheduler keeps its attributes."""

    def __init__(self):
        self.factor = np.float64(0.5)

    def __call__(self, step):
        return self.factor ** (step // 10)


def test_a_state_that_cannot_be_kept_is_told_at_the_first_checkpoint(tmp_path):
    def scheduler(optimizer):
        halving = Halving()
        halving.factors = np.arange(3)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, halving)

    with pytest.raises(gc.CheckpointError, match=r"cannot be kept(.|\n)*numpy"):
        run(training=gc.Training(schedule=STAGES, folder=tmp_path, save_every=1, scheduler=scheduler))
    assert not list(tmp_path.glob("step-*"))


@pytest.mark.parametrize("part", ["optimizer", "module", "scheduler", "epoch", "random", "losses"])
def test_a_checkpoint_that_lacks_a_part_is_named(checkpoint, tmp_path, part):
    state = torch.load(checkpoint, weights_only=True)
    state = state | {part: None} if part == "optimizer" else {key: v for key, v in state.items() if key != part}
    torch.save(state, tmp_path / checkpoint.name)
    with pytest.raises(gc.CheckpointError, match="does not fit the run") as caught:
        run(folder=tmp_path)
    assert "remove it" in caught.value.fix


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of the first step."""
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.raises(Stopped):
        run(loss=stopping(1), folder=folder)
    return folder / "step-000000001.pt"


KILLED = """
import os, signal, sys
from tests.training.test_loop import *
@functools.wraps(loss)
def failing(output, batch, calls=[]):
    calls.append(1)
    if len(calls) > int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(output, batch)
torch.set_num_threads(1)
run(folder=sys.argv[1], loss=failing)
"""


@pytest.mark.slow
@pytest.mark.ci
def test_a_process_that_was_killed(tmp_path, whole):
    command = [sys.executable, "-c", KILLED, str(tmp_path), "13"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "step-000000013.pt").exists() and (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert same(run(folder=tmp_path), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.3}, "sparsity: 0.5 there, 0.3 now"),
        ({"bits": (4, 6)}, r"bits: \(4, 8\) there, \(4, 6\) now"),
        ({"method": "hesso", "bits": None}, "forgetting: descent there, uniform now"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"data": [(IMAGES, LABELS)]}, "batches: 8 there, 1 now"),
        ({"saliency": "l2"}, "saliency: geta there, l2 now"),
        ({"budget": gc.Budget(params=500)}, "budget: None there, Budget"),
        ({"round_to": 2, "sparsity": 0.4}, "round_to: 1 there, 2 now"),
        ({"model": nn.Sequential(nn.Conv2d(1, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))}, "tensors: "),
        ({"loss": lambda output, batch: output.mean()}, "why:  loss: loss there, <lambda> now"),
    ],
)
@pytest.mark.slow
@pytest.mark.ci
def test_a_folder_of_another_run_is_refused(tmp_path, options, message):
    with pytest.raises(Stopped):
        run(loss=stopping(2), folder=tmp_path)
    with pytest.raises(gc.CheckpointError, match=message) as error:
        compress(folder=tmp_path, **options)
    assert "another folder" in error.value.fix


@pytest.mark.slow
@pytest.mark.ci
def test_other_weights_go_on_with_a_run_that_was_cut_short_and_not_with_one_that_has_ended(tmp_path, caplog):
    other = nn.Sequential(*convnet()[:-1], nn.Linear(8, 3))
    with pytest.raises(Stopped):
        compress(loss=stopping(2), folder=tmp_path)
    with caplog.at_level("WARNING", "graphcomp"):
        assert same(compress(model=other, folder=tmp_path), compress())
    assert "began with other weights" in caplog.text
    with pytest.raises(gc.CheckpointError, match=r"why:  initial weights: [0-9a-f]+ there, [^;]*$"):
        compress(model=other, folder=tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.5}, "lr: 0.01 there, 0.5 now"),
        ({"schedule": Schedule.of(STEPS)}, "schedule: "),
        ({"accumulate": 2}, "accumulate: 1 there, 2 now"),
        ({"clip_norm": 1.0}, "clip_norm: None there, 1.0 now"),
        ({"optimizer": torch.optim.Adam, "lr": 0.01}, "optimizer: SGD there, Adam now"),
        ({"options": {"momentum": 0.5}}, "options: "),
    ],
)
def test_a_folder_of_a_run_trained_otherwise_is_refused(tmp_path, changed, message):
    with pytest.raises(Stopped):
        run(loss=stopping(2), folder=tmp_path)
    with pytest.raises(gc.CheckpointError, match=message):
        run(training=gc.Training(**{"schedule": STAGES, "folder": tmp_path, **changed}))


def test_how_often_to_save_may_change(tmp_path, whole):
    with pytest.raises(Stopped):
        run(loss=stopping(9), folder=tmp_path)
    how = gc.Training(schedule=STAGES, folder=tmp_path, save_every=7, keep=9, log_every=3)
    assert same(run(training=how), whole)


def test_a_checkpoint_that_is_damaged_is_named_and_the_one_before_is_used(tmp_path, whole):
    with pytest.raises(Stopped):
        run(loss=stopping(9), folder=tmp_path)
    newest = tmp_path / "step-000000009.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(gc.CheckpointError, match=r"step-000000009.pt cannot be read(.|\n)*remove it"):
        run(folder=tmp_path)
    newest.unlink()
    assert same(run(folder=tmp_path), whole)


def test_a_checkpoint_that_is_none(tmp_path):
    torch.save([1], tmp_path / "step-000000001.pt")
    with pytest.raises(gc.CheckpointError, match="no checkpoint"):
        run(folder=tmp_path)


def test_checkpoints_are_written_whole(tmp_path, monkeypatch):
    """A write that fails half-way leaves the checkpoints that were there."""
    with pytest.raises(Stopped):
        run(loss=stopping(3), folder=tmp_path)

    def full(state, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(gc.CheckpointError, match="no space left"):
        run(folder=tmp_path)
    assert [p.name for p in sorted(tmp_path.glob("*.pt"))] == ["step-000000002.pt", "step-000000003.pt"]
    monkeypatch.undo()
    run(folder=tmp_path)
    assert not list(tmp_path.glob("*.new"))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(gc.CheckpointError, match="cannot write"):
        run(folder=tmp_path / "file" / "run")


def test_a_batch_that_the_model_does_not_run_on():
    model, data = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), [(torch.randn(2, 8),)] * 3
    options = {"method": "hesso", "loss": lambda output, batch: output.sum(), "epochs": 5, "progress": False}
    for bad in (torch.randn(2, 9), torch.randn(2, 8).double()):
        with pytest.raises(gc.TrainingError, match=r"(?s)batch \d of the data.*fix: +give batches"):
            gc.compress(model, torch.randn(2, 8), data=[*data, (bad,)], **options)


def test_a_folder_of_a_loss_with_other_code_is_refused(tmp_path):
    model, data = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), [(torch.randn(2, 8),)] * 20
    options = {"method": "hesso", "data": data, "epochs": 1, "folder": tmp_path / "run", "progress": False}
    first, second = (lambda output, batch: output.sum()), (lambda output, batch: output.pow(2).sum())
    gc.compress(model, torch.randn(2, 8), loss=first, **options)
    gc.compress(model, torch.randn(2, 8), loss=first, **options)
    with pytest.raises(gc.CheckpointError, match="code of the loss"):
        gc.compress(model, torch.randn(2, 8), loss=second, **options)


# ------------------------------------------------------------------------------------------------ not finite
def test_a_loss_that_is_nan_keeps_the_last_good_checkpoint(tmp_path):
    calls = []

    def bad(output, batch):
        calls.append(1)
        return loss(output, batch) * (math.nan if len(calls) == 13 else 1)

    with pytest.raises(gc.TrainingError) as error:
        run(loss=bad, folder=tmp_path)
    text = str(error.value)
    assert "the loss is nan at step 13 of 30, in the joint stage" in text
    assert str(tmp_path / "step-000000012.pt") in text and (tmp_path / "step-000000012.pt").exists()


def test_a_parameter_that_is_not_finite_is_named(tmp_path):
    """An infinite gradient makes a weight infinite, and no checkpoint is made of it."""
    calls = []

    def bad(output, batch):
        calls.append(1)
        if len(calls) == 6:
            output.register_hook(lambda grad: grad * math.inf)
        return loss(output, batch)

    with pytest.raises(gc.TrainingError, match=r"not finite after step 6 of 30, in the projection stage"):
        run(loss=bad, training=gc.Training(schedule=STAGES, folder=tmp_path, save_every=6))
    assert not list(tmp_path.glob("*.pt"))
    calls.clear()
    with pytest.raises(gc.TrainingError, match=r"the loss is nan at step 7(.|\n)*'0.weight' holds"):
        run(loss=bad, training=gc.Training(schedule=STAGES))


def test_weights_that_a_step_made_infinite_are_named_where_units_are_scored():
    """In the step that begins a period no loss has told of them yet."""

    def bad(output, batch):
        output.register_hook(lambda grad: grad * math.inf)
        return loss(output, batch)

    stages = Schedule(STEPS, warmup=0, projection=0, joint=9, pruning_periods=3)
    with pytest.raises(gc.TrainingError, match=r"not finite at step 1 of 30, in the joint stage(.|\n)*' holds"):
        run(loss=bad, training=gc.Training(schedule=stages))


def test_a_quantizer_that_is_not_finite_is_named():
    ready = gc.prepare(convnet(), IMAGES[:2], bits=(4, 8))
    site, quantizer = next((site, q) for site, q in ready.quantizers() if site.layer == "4")

    def bad(output, batch):
        quantizer.d.data.fill_(math.nan)
        return loss(output, batch) * math.nan

    with pytest.raises(gc.TrainingError, match=rf"quantizer '{site.name}.d' of '4' holds"):
        train(ready, loader(), bad, gc.Training(steps=20), geta(ready), progress=False)


def test_a_batch_that_is_not_finite_is_named():
    images = IMAGES.clone()
    images[3, 0, 0, 0] = math.nan
    with pytest.raises(gc.TrainingError, match="the batch holds values that are not finite"):
        run(data=[(images, LABELS)])


# ------------------------------------------------------------------------------------------------ metrics, progress
def test_metrics(tmp_path):
    run(training=gc.Training(schedule=STAGES, folder=tmp_path, log_every=1))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    stages = [line["stage"] for line in lines]
    assert stages == ["warm-up"] * 4 + ["projection"] * 5 + ["joint"] * 9 + ["cool-down"] * 12
    removed = [line["units_removed"] for line in lines]
    assert removed[:11] == [0] * 11 and removed[11:14] == [2] * 3 and removed[17:] == [7] * 13
    assert lines[-1]["sparsity"] == 0.5 and lines[-1]["units"] == 14
    assert lines[0]["weight_bits"] == lines[0]["activation_bits"] == 8
    assert 4 <= lines[-1]["weight_bits"] <= 6
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_a_line_where_a_stage_ends(tmp_path):
    run(training=gc.Training(schedule=STAGES, folder=tmp_path, log_every=100))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 4, 9, 18, 30]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("shown", [True, False])
def test_progress_on_a_terminal(monkeypatch, capsys, shown):
    stream = Terminal() if shown else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("graphcomp.system.progress.PAUSE", 0)
    gc.compress(convnet(), IMAGES[:2], data=loader(), loss=loss, steps=20, bits=8)
    text = stream.getvalue()
    if shown:
        assert "cool-down, step 19 of 20, 7 of 14 units removed, bits 8.0/8.0, loss " in text and " s left" in text
        assert text.endswith("\r\x1b[K")
    else:
        assert text == ""
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------ the picture
@pytest.mark.slow
@pytest.mark.ci
def test_a_picture_of_a_run(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs the viz extra")
    compress(method="sequential", training=gc.Training(steps=30, folder=tmp_path))
    gc.plot(tmp_path, tmp_path / "run.svg")
    text = (tmp_path / "run.svg").read_text()
    assert text.count("<path") > 20 and "cool-down" in text
    with pytest.raises(ExportError, match="cannot write"):
        gc.plot(tmp_path, tmp_path / "run.what")


def test_a_picture_without_matplotlib_or_without_a_run(tmp_path, monkeypatch):
    with pytest.raises(gc.CheckpointError, match="holds no metrics"):
        gc.plot(tmp_path, tmp_path / "run.png")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhalf')
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ExportError, match=r"pip install 'graphcomp\[viz\]'"):
        gc.plot(tmp_path, tmp_path / "run.png")


# ------------------------------------------------------------------------------------------------ frozen norms
def statistics_at(steps, **options):
    """Whether the running mean moves in each step but the first, of a run of so many."""
    seen = []

    def watch(output, batch):
        seen.append(ready.get_buffer("1.running_mean").clone())
        return loss(output, batch)

    ready = copy.deepcopy(prepared())
    train(ready, loader(), watch, gc.Training(steps=steps, **options), geta(ready, sparsity=0.0), progress=False)
    return [bool((a != b).any()) for a, b in itertools.pairwise(seen)]


@pytest.mark.parametrize("begin", [6, 0.75])
def test_norms_are_frozen_after_so_many_steps(begin):
    assert statistics_at(8, freeze_norms=begin) == [True] * 5 + [False] * 2
    assert all(statistics_at(8))


def test_a_run_with_frozen_norms_goes_on_bit_for_bit(tmp_path):
    options = {"sparsity": 0.0, "training": gc.Training(steps=8, freeze_norms=3, folder=tmp_path, save_every=1)}
    with pytest.raises(Stopped):
        run(loss=stopping(6), **options)
    assert same(run(**options), run(sparsity=0.0, training=gc.Training(steps=8, freeze_norms=3)))


def test_norms_outside_of_the_scope_stay_as_the_user_set_them():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.held, self.free = convnet(), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.free(self.held(self.body(x)))

    model = Model().train()
    model.held.eval()
    small = compress(model, scope="body", sparsity=0.3)
    assert not small.module.held.running_mean.any() and small.module.free.running_mean.any()
    assert [m.training for m in (model, model.held, model.free)] == [True, False, True]
    small = compress(Model(), scope="body", sparsity=0.3, training=gc.Training(steps=8, freeze_norms=0))
    assert not small.module.held.running_mean.any() and not small.module.free.running_mean.any()


@pytest.mark.parametrize("wrong", [-1, 1.0, "last", True])
def test_a_wrong_begin_of_frozen_norms_is_refused(wrong):
    with pytest.raises(gc.PlanError, match="freeze_norms"):
        gc.Training(steps=8, freeze_norms=wrong)
