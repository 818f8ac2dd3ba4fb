"""Training by LSQ: the start is what post-training quantization gives, and the result is never above it in loss."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import graphcomp as gc
from graphcomp.quantization.quantizers.affine import AffineQuantizer
from graphcomp.training.folder import read_metrics
from graphcomp.training.lsq import FARTHEST, decaying, with_steps
from tests.marks import in_ci
from tests.training.runs import MODELS, batch, model_of
from tests.training.test_loop import IMAGES, LABELS, Stopped, convnet, loader, loss, same, stopping

STEPS = 12


def options_of(weights: gc.QuantSpec, activations: int | None = 5, **more: Any) -> gc.PostTraining:
    acts = None if activations is None else gc.QuantSpec(activations, symmetric=False, observer="mse")
    return gc.PostTraining(gc.QuantConfig(weights, acts, first_and_last_bits=2), equalize=False, **more)


KINDS = {
    "per channel": options_of(gc.QuantSpec(3, granularity="channel", observer="mse")),
    "in groups": options_of(gc.QuantSpec(4, granularity="group", group_size=4)),
    "with zero points, second order": options_of(
        gc.QuantSpec(3, granularity="channel", symmetric=False), rounding="second_order"
    ),
    "per tensor": options_of(gc.QuantSpec(4)),
    "weights only": options_of(gc.QuantSpec(2, granularity="channel"), None),
    "ternary": options_of(gc.QuantSpec(kind="ternary", granularity="channel")),
    "ternary, per tensor": options_of(gc.QuantSpec(kind="ternary")),
    "ternary, two scales": options_of(gc.QuantSpec(kind="ternary", granularity="channel", symmetric=False)),
}


def compress(model: nn.Module | None = None, **options: Any) -> gc.CompressedModel:
    given = {"method": "qat", "data": loader(), "loss": loss, "progress": False, **options}
    if "training" not in given:
        given["steps"] = STEPS
    return gc.compress(convnet() if model is None else model, IMAGES[:2], **given)


def lsq(name: str, kind: str = "per channel", **options: Any) -> Any:
    return gc.prepare(
        model_of(name), batch(name), quantization=KINDS[kind], calibration=[batch(name, k) for k in range(2)], **options
    )


def codes(small: gc.CompressedModel) -> dict[str, torch.Tensor]:
    return {name: integers.values for name, integers in small.quantized.lowered.weights.items()}


def tensor_in(output: Any) -> torch.Tensor:
    if isinstance(output, dict):
        output = next(iter(output.values()))
    return output if isinstance(output, torch.Tensor) else output[0]


# ------------------------------------------------------------------------------------------------ the start
START = {
    f"{name}, {kind}": (name, kind)
    for kind, names in {
        "per channel": MODELS, "per tensor": ("residual", "dense", "mlp"), "in groups": ("vit", "decoder"),
        "with zero points, second order": ("residual", "dense", "decoder"), "weights only": ("residual", "encoder"),
        "ternary": ("residual", "encoder"), "ternary, per tensor": ("residual",),
        "ternary, two scales": ("dense", "decoder"),
    }.items()
    for name in names
}  # fmt: skip
SOME = ["dense, per channel", "dense, per tensor", "mlp, per tensor", "dense, with zero points, second order"]


@pytest.mark.parametrize("case", [*SOME, *in_ci(*(case for case in START if case not in SOME))])
def test_the_start_is_what_post_training_quantization_gives(case):
    """To the last code of each weight. What rounding of floats moves across the middle of two codes is little."""
    name, kind = START[case]
    after = gc.compress(
        model_of(name), batch(name), sparsity=0, progress=False, repair=None, quantization=KINDS[kind],
        calibration=[batch(name, k) for k in range(2)],
    )  # fmt: skip
    start = gc.finalize(lsq(name, kind))
    expected, found = (sorted(codes(small).values(), key=lambda c: str(c.tolist())) for small in (after, start))
    assert len(expected) == len(found) and all(map(torch.equal, expected, found))
    a, b = (tensor_in(small(*batch(name, 5))) for small in (after, start))
    assert (a - b).norm() <= 0.02 * a.norm()
    assert start.report.verified["integers == fake-quant, in steps"] <= 1


def test_the_start_of_a_model_without_statistics_is_calibrated_on_those_of_its_batches():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    ready = gc.prepare(model, 100 * IMAGES[:8], bits=4, quantizer="lsq")
    assert not ready.get_buffer("1.running_mean").any()
    (step,) = (q.scale for s, q in ready.quantizers() if s.layer == "relu")
    assert step < 1  # not 100 / 255: the norm divides by the deviation of the batch


def test_names_are_the_models_but_for_biases_of_convolutions_without_norms():
    ready = lsq("residual")
    own = {key for key in ready.state_dict() if "graphcomp_" not in key}
    added = own - model_of("residual").state_dict().keys()
    assert all(key.endswith("bias") for key in added)
    assert {key.split(".")[-1] for key in ready.state_dict() if "graphcomp_quantizers" in key} == {
        "scale",
        "zero_point",
    }


def test_frozen_parameters_stay_frozen_and_the_model_unchanged():
    model = convnet().requires_grad_(False)
    model[8].requires_grad_(True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ready = gc.prepare(
        model, IMAGES[:2], quantization=replace(KINDS["per channel"], rounding="second_order"), calibration=[IMAGES]
    )
    trained = {name for name, p in ready.named_parameters() if p.requires_grad and "graphcomp_" not in name}
    assert trained == {"8.weight", "8.bias"}
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_norms_that_are_frozen_keep_their_statistics():
    """What post-training quantization corrects stands in the bias of the norm."""
    model = convnet().train()
    model(3 * IMAGES)
    found = []
    for frozen in (True, False):
        model[1].train(not frozen)
        options = {"quantization": KINDS["per channel"], "calibration": [IMAGES]}
        ready = gc.prepare(model, IMAGES[:2], **options).eval()
        found.append((ready.get_buffer("1.running_mean"), ready.get_parameter("1.bias").detach(), ready(IMAGES)))
    (held, bias, output), (shifted, same_bias, expected) = found
    assert torch.equal(held, model[1].running_mean) and not torch.equal(bias, model[1].bias)
    assert not torch.equal(shifted, model[1].running_mean) and torch.equal(same_bias, model[1].bias)
    torch.testing.assert_close(output, expected)


# ------------------------------------------------------------------------------------------------ options
@pytest.mark.parametrize(
    ("asked", "weights", "activations"),
    [
        ({"bits": (3, 3), "activation_bits": 8}, 3, 8),
        ({"quantization": KINDS["weights only"]}, 2, 32),
    ],
)
def test_bits_are_those_that_are_asked_for(asked, weights, activations):
    layers = compress(**asked).report.layers
    assert (layers[1].weight_bits, layers[1].activation_bits) == (weights, activations)
    if "bits" in asked:
        assert layers[0].weight_bits == layers[-1].weight_bits == 8


def test_groups_names_and_other_options_are_as_in_one_shot():
    small = compress(bits=4, group_size=4, rounding="second_order", ignore="4", calibration=[IMAGES])
    last = small.quantized.lowered.weights["graphcomp_quantizers_8_weight"]
    assert last.groups is not None and last.scale.shape == (3, 2)
    assert [layer.weight_bits for layer in small.report.layers] == [8, 32, 8]
    assert compress(bits=4, reduce_range=True).report.layers[0].weight_bits == 7


def test_a_layer_has_the_bits_that_it_is_given_by_name():
    layer_bits = {"4": 5, "re:^4$": ((6, 6), (6, 6))}
    ready = gc.prepare(convnet(), IMAGES[:2], bits=4, quantizer="lsq", layer_bits=layer_bits)
    assert ready.bits()["4"][0] == 6
    read = {s.layer: s.low for s in ready.session.sites if not s.is_weight}
    assert read["relu"] == 6  # what the layer reads; what it returns is pooled, as no product reads that: residual_bits
    assert read["relu_1"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (4, 8), "quantizer": "lsq"}, "bits of LSQ must be one number"),
        ({"bits": None, "quantizer": "lsq"}, "needs bits"),
        ({"bits": 4, "quantizer": "lsq", "activation_bits": (4, 8)}, "activation_bits of LSQ"),
        ({"bits": 4, "quantizer": "lsq", "layer_bits": {"4": (4, 8)}}, "layer_bits of LSQ"),
        ({"bits": 4, "quantizer": "lsq", "layer_bits": {"nope": 4}}, "nope"),
        ({"bits": 4, "quantizer": "lsq", "learn_exponent": True}, "no exponent"),
        ({"bits": 4, "quantizer": "qst"}, "quantizer must be one of 'geta', 'lsq'"),
        ({"bits": 4, "quantizer": "geta", "group_size": 4}, "GETA's quantizer"),
        ({"bits": 6, "quantization": KINDS["per channel"]}, "bits beside quantization"),
        ({"quantization": 8}, "quantization must be a PostTraining"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(gc.PlanError, match=message):
        gc.prepare(convnet(), IMAGES[:2], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4, "budget": gc.Budget(bops=0.1)}, "budget with"),
        ({"bits": 4, "ranking": "local"}, "ranking"),
        ({"bits": (4, 8), "group_size": 4}, "group_size"),
        ({"bits": (4, 8), "training": gc.Training(steps=2, held_out=[])}, "held_out"),
        ({"quantization": KINDS["per channel"], "bits": 4}, "bits beside quantization"),
        ({"bits": 4, "training": gc.Training(steps=2, held_out=[])}, "held_out.* holds no batches"),
        ({}, "no bits are given"),
    ],
)
def test_compress_refuses_what_lsq_cannot_do(options, message):
    with pytest.raises(gc.PlanError, match=message):
        compress(**options)


# ------------------------------------------------------------------------------------------------ never below the start
def note_of(small: gc.CompressedModel) -> str:
    (found,) = (line for line in small.report.notes if "before" in line)
    return found


def test_training_that_does_not_lower_the_loss_gives_the_start_back():
    """A learning rate that ruins the model; running statistics go back, too."""
    small = compress(bits=4, training=gc.Training(steps=STEPS, lr=5.0))
    assert "training has not lowered the loss: the result is that of post-training quantization" in note_of(small)
    again = compress(bits=4, training=gc.Training(steps=1, lr=1e-9, freeze_norms=0))
    assert all(torch.equal(a, codes(again)[name]) for name, a in codes(small).items())


@pytest.mark.slow
@pytest.mark.ci
def test_training_that_lowers_the_loss_is_kept():
    small = compress(bits=2, training=gc.Training(steps=60, lr=0.05))
    note = note_of(small)
    assert note.startswith("loss ") and "8 batches of the training data" in note
    assert float(note.split()[1]) > float(note.split()[3])


def test_held_out_data_that_hold_no_batches_are_refused():
    with pytest.raises(gc.PlanError, match="held_out must be a series of batches"):
        gc.Training(steps=2, held_out=5)


@pytest.mark.slow
@pytest.mark.ci
def test_the_loss_is_measured_on_held_out_batches():
    """Labels that say the opposite: what training learns is worse there."""
    wrong = [(IMAGES, (LABELS + 1) % 3)]
    small = compress(bits=4, training=gc.Training(steps=60, lr=0.05, held_out=wrong))
    assert "has not lowered the loss" in note_of(small) and "1 batches of held-out data" in note_of(small)


def test_batches_that_can_be_read_once_are_all_trained_on():
    seen = []

    def watch(output, batch):
        seen.append(len(batch[0]))
        return loss(output, batch)

    compress(bits=4, data=iter(list(loader())), loss=watch, training=gc.Training(steps=8))
    assert len(seen) == 8 + 2 * 8


@pytest.mark.slow
@pytest.mark.ci
def test_a_scope_goes_back_with_what_is_around_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm, self.head = convnet(), nn.BatchNorm1d(3), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.norm(self.body(x)))

    torch.manual_seed(0)
    model = Model().eval()
    small = compress(model, bits=4, scope="body", training=gc.Training(steps=STEPS, lr=5.0))
    assert "has not lowered" in note_of(small)
    assert torch.equal(small.module.head.weight, model.head.weight)
    assert torch.equal(small.module.norm.running_var, model.norm.running_var)
    assert not small.module.norm.training and not model.training


# ------------------------------------------------------------------------------------------------ training
@pytest.mark.slow
@pytest.mark.ci
def test_bits_that_are_few_train_better_than_they_round():
    torch.manual_seed(0)
    centres = torch.randn(6, 12) * 1.5
    labels = torch.randint(6, (480,))
    inputs = centres[labels] + 1.3 * torch.randn(480, 12)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 6))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    spec = gc.QuantSpec(2, granularity="channel", observer="mse")
    config = gc.QuantConfig(spec, gc.QuantSpec(2, symmetric=False, observer="mse"), first_and_last_bits=2)
    options = {"quantization": gc.PostTraining(config), "progress": False}
    after = gc.compress(model, inputs[:2], sparsity=0, calibration=list(inputs.split(60)), repair=None, **options)
    during = gc.compress(
        model, inputs[:2], method="qat", data=DataLoader(TensorDataset(inputs, labels), 60, shuffle=True), loss=loss,
        epochs=15, lr=3e-3, **options,
    )  # fmt: skip
    right = [float((small(inputs).argmax(1) == labels).float().mean()) for small in (after, during)]
    assert right[1] > right[0] + 0.02


@pytest.mark.parametrize("base", [torch.optim.SGD, *in_ci(torch.optim.AdamW)])
def test_an_update_of_a_step_is_bounded_and_has_no_weight_decay(base):
    ready = lsq("mlp").train()
    optimizer = gc.QASSO(ready, base, lr=10.0, weight_decay=0.5, sparsity=0, schedule=4)
    before = [q.scale.detach().clone() for q in with_steps(ready)]
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert all(groups[id(q.scale)]["weight_decay"] == 0 for q in with_steps(ready))
    ready(*batch("mlp")).square().mean().backward()
    optimizer.step()
    for old, quantizer in zip(before, with_steps(ready), strict=True):
        assert bool((quantizer.scale / old - 1).abs().max() <= FARTHEST * 1.001) and bool((quantizer.scale > 0).all())


def test_learning_rates_of_steps_fit_the_optimizer():
    ready = lsq("mlp")
    sgd = gc.QASSO(ready, torch.optim.SGD, lr=0.02, sparsity=0, schedule=4)
    assert [group["lr"] for group in sgd.param_groups] == [0.02, 0.02]
    adam = gc.QASSO(ready, torch.optim.AdamW, lr=1e-4, sparsity=0, schedule=4)
    rates = {id(p): group["lr"] for group in adam.param_groups for p in group["params"]}
    for quantizer in with_steps(ready):
        assert rates[id(quantizer.scale)] == pytest.approx(1e-3 * float(quantizer.scale.detach().mean()))
        if isinstance(quantizer, AffineQuantizer):
            assert rates[id(quantizer.zero_point)] == pytest.approx(1e-3 * 31)
    fixed = gc.QASSO(ready, torch.optim.AdamW, lr=1e-4, lr_quant=0.0, sparsity=0, schedule=4)
    assert {group["lr"] for group in fixed.param_groups} == {1e-4, 0.0}


def test_biases_and_norms_do_not_decay():
    matrices, vectors = decaying(list(convnet().parameters()))
    assert [p.dim() for p in matrices["params"]] == [4, 4, 2] and vectors["weight_decay"] == 0


def test_a_loop_of_the_users_own_needs_a_plain_optimizer_alone():
    ready = gc.prepare(convnet(), IMAGES[:2], bits=4, activation_bits=8, quantizer="lsq").train()
    optimizer = torch.optim.SGD(ready.parameters(), lr=0.01)
    for x, y in loader():
        optimizer.zero_grad()
        F.cross_entropy(ready(x), y).backward()
        optimizer.step()
    assert all(q.scale.grad is not None for q in with_steps(ready))
    state = copy.deepcopy(ready.state_dict())
    other = gc.prepare(convnet(), IMAGES[:2], bits=4, activation_bits=8, quantizer="lsq")
    other.load_state_dict(state)
    assert same(gc.finalize(ready), gc.finalize(other))
    assert ready.bits()["4"] == (4, 8)


def test_recomputed_quantizers_have_the_same_gradients():
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        ready = lsq("dense", recompute=recompute).train()
        tensor_in(ready(*batch("dense", 3))).square().mean().backward()
        found.append({name: p.grad for name, p in ready.named_parameters()})
    torch.testing.assert_close(*found, rtol=0, atol=0)


PRUNED = [(name, "per channel") for name in MODELS] + [("dense", "ternary"), ("encoder", "ternary, two scales")]


@pytest.mark.parametrize("case", [PRUNED[0], *in_ci(*PRUNED[1:])])
@pytest.mark.slow
@pytest.mark.ci
def test_units_are_pruned_and_the_module_is_shrunk(case):
    """Law 2 and Law 3 with steps per channel that leave with their channel."""
    name, kind = case
    ready = lsq(name, kind).train()
    optimizer = gc.QASSO(
        ready, torch.optim.AdamW, lr=1e-3, sparsity=0.3, schedule=gc.Schedule(8, warmup=1, projection=0, joint=4)
    )
    for k in range(8):
        optimizer.zero_grad()
        tensor_in(optimizer.ready(*batch(name, k))).square().mean().backward()
        optimizer.step()
        if k == 6:
            optimizer.shrink()
    small = gc.finalize(optimizer.ready)
    assert small.report.units_removed == optimizer.removed > 0
    assert small.report.verified["trained == sliced"] < 1e-9
    assert small.report.verified["integers == fake-quant, in steps"] <= 1


# ------------------------------------------------------------------------------------------------ runs and results
@pytest.mark.slow
@pytest.mark.ci
def test_a_run_goes_on_bit_for_bit(tmp_path):
    training = gc.Training(steps=STEPS, folder=tmp_path, save_every=1, log_every=1)
    with pytest.raises(Stopped):
        compress(bits=3, training=training, loss=stopping(8 + 5))
    small = compress(bits=3, training=training)
    assert same(small, compress(bits=3))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["weight_bits"] == pytest.approx((8 + 3 + 8) / 3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.ci
def test_it_runs_under_autocast():
    small = compress(bits=4, training=gc.Training(steps=4, autocast=torch.bfloat16))
    assert small.report.layers[1].weight_bits == 4


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("kind", [None, "ternary", "ternary, two scales"])
def test_the_result_is_saved_and_exported(tmp_path, kind):
    given = {"bits": 4, "activation_bits": 8} if kind is None else {"quantization": KINDS[kind]}
    small = compress(**given)
    assert small.report.verified["integers == fake-quant, in steps"] <= 1
    small.save(tmp_path / "small")
    assert torch.equal(gc.load(tmp_path / "small")(IMAGES), small(IMAGES))
    pytest.importorskip("onnxruntime")
    from graphcomp.targets.runtime import compare

    small.export(tmp_path / "small.onnx")
    assert compare(tmp_path / "small.onnx", small, (IMAGES[:2],)).steps <= 1


# ------------------------------------------------------------------------------------------------ tables and attention
class Words(nn.Module):
    """(n, s) word ids -> (n, 4)."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8, sparse=sparse)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, ids):
        return self.head(F.relu(self.hidden(self.words(ids).mean(1))))


@pytest.mark.parametrize("sparse", [True, *in_ci(False)])
def test_tables_get_the_bits_that_are_asked_for(sparse):
    ids = torch.randint(20, (4, 5))
    config = gc.QuantConfig(embeddings=gc.QuantSpec(4, granularity="channel"))
    ready = gc.prepare(Words(sparse), ids, quantization=gc.PostTraining(config)).train()
    ready(ids).square().mean().backward()
    assert ready.get_parameter("words.weight").grad.is_sparse == sparse
    found = gc.finalize(ready).quantized.lowered.weights
    assert next(own for name, own in found.items() if "words" in name).quant_max == 7
    floats = replace(config, embeddings=None)
    ready = gc.prepare(Words(sparse), ids, quantization=gc.PostTraining(floats))
    assert not any("words" in name for name in gc.finalize(ready).quantized.lowered.weights)


def test_ignored_tables_stay_float():
    ready = gc.prepare(Words(), torch.randint(20, (4, 5)), bits=(4, 8), ignore="words")
    assert not any("words" in name for name in gc.finalize(ready).quantized.lowered.weights)


class Attends(nn.Module):
    """(n, s, 8) -> (n, s, 8), with dropout of attention weights in training."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        p = 0.5 if self.training else 0.0
        return self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2))


def test_attention_that_is_written_out_keeps_its_dropout():
    x = torch.randn(2, 5, 8)
    options = gc.PostTraining(gc.QuantConfig(attention=True))
    ready = gc.prepare(Attends().eval(), x, quantization=options)
    assert torch.equal(ready(x), ready(x))
    ready.train()
    assert not torch.equal(ready(x), ready(x))
    assert len([s for s in ready.session.sites if not s.is_weight]) > 3
    gc.finalize(ready.eval())
