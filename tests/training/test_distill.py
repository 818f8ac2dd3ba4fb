"""A teacher beside any training: what is learned, what is kept, and what is refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.training.distill import direction_loss, distillation
from graphcomp.training.hidden import hearing
from graphcomp.training.teaching import Teaching
from tests.marks import in_ci
from tests.methods.learning import Outer, Stop, batches, compress, loss, net

X = batches()[0][0]
BITS: dict[str, dict[str, Any]] = {
    "hesso": {}, "geta": {"bits": (4, 8)}, "qat": {"bits": 4}, "sequential": {"bits": (4, 8)}, "psgd": {"bits": 4},
    "pqk": {"bits": 4, "sparsity": 0.5}, "ternary": {"bits": 2},
}  # fmt: skip


class Around(nn.Module):
    """A network under another name."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = net(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def sharp() -> nn.Module:
    """`net()` that is sure of what it says."""
    model = net()
    with torch.no_grad():
        model.head.weight.mul_(20)
    return model


def taught(teacher: nn.Module, **options: Any) -> dict[str, Any]:
    return {"teacher": teacher, "distill": gc.Distill(**options)}


def small_net() -> gc.CompressedModel:
    return gc.compress(net(), X, sparsity=0.5, progress=False)


def finetune(small: gc.CompressedModel, data: Any = None, own: Any = None, **training: Any) -> gc.CompressedModel:
    options = {"steps": 24, "lr": 0.02, **training}
    return gc.finetune(small, data or batches(), own, training=gc.Training(**options), progress=False)


def apart(small: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        return float(distillation(small.eval()(X), copy.deepcopy(teacher).eval()(X), 2.0))


# ------------------------------------------------------------------------------------------------ the loss
def test_the_loss_on_plain_tensors():
    teacher, student = net(1), net(2).eval()
    distill = gc.Distill(logits=0.7, temperature=3.0, task=0.3, hidden=["first", "two"], hidden_weight=0.5)
    teaching = Teaching(teacher, distill, student, (X,), {})
    batch = batches()[1]
    teaching.begin(batch, (batch[0],), {})
    with teaching.listening(student) as hear:
        output = student(batch[0])
        hear(output)
    found = teaching.loss(loss, output, batch)
    wanted = copy.deepcopy(teacher).eval()
    pairs = [(m.first(batch[0]), m.two(m.second(F.relu(m.one(m.first(batch[0])))))) for m in (student, wanted)]
    hidden = sum((own - their).square().mean() / their.square().mean() for own, their in zip(*pairs, strict=True)) / 2
    p, q = (wanted(batch[0]) / 3).softmax(1), (student(batch[0]) / 3).log_softmax(1)
    soft = 9 * (p * (p.log() - q)).sum(1).mean()
    torch.testing.assert_close(found, 0.3 * loss(output, batch) + 0.7 * soft + 0.5 * hidden)


def test_hidden_states_of_a_graph_are_those_of_the_modules():
    model, names = net().eval(), ["first", "one", "second", "two", "head"]
    ready = gc.prepare(model, X, bits=None).eval()
    with torch.no_grad(), hearing(model, names, "model") as wanted, hearing(ready, names, "graph") as found:
        assert torch.equal(ready(X), model(X))
    assert list(found) == names and all(torch.equal(found[name], wanted[name]) for name in names)
    assert torch.equal(ready(X), model(X)) and not model.first._forward_hooks  # as before


def test_a_class_dim_in_the_middle():
    maps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    found = gc.Distill(dim=1).divergence(*maps)
    flat = [m.permute(0, 2, 3, 1).reshape(-1, 3) for m in maps]
    torch.testing.assert_close(found, distillation(*flat, 2.0))


def test_embeddings_are_compared_by_their_directions():
    teacher, student = net(1), net(2).eval()
    teaching = Teaching(teacher, gc.Distill(logits=0, embeddings=0.6), student, (X,), {})
    batch = batches()[1]
    teaching.begin(batch, (batch[0],), {})
    output = student(batch[0])
    wanted = copy.deepcopy(teacher).eval()(batch[0])
    cosine = (output * wanted).sum(1) / (output.norm(dim=1) * wanted.norm(dim=1))
    torch.testing.assert_close(teaching.loss(loss, output, batch), loss(output, batch) + 0.6 * (1 - cosine).mean())
    torch.testing.assert_close(teaching.loss(None, 3 * wanted, batch), torch.tensor(0.0), atol=1e-6, rtol=0)  # no norms
    assert teaching.about()["distill"] != Teaching(teacher, gc.Distill(), student, (X,), {}).about()["distill"]


def test_a_cut_model_learns_directions():
    small = small_net()
    found = finetune(small, steps=60, **taught(net(), logits=0, embeddings=1.0, task=0))
    assert "the direction of embeddings x 1" in " ".join(found.report.notes)
    with torch.no_grad():
        wanted = net().eval()(X)
        far = [float(direction_loss(m.module.eval()(X), wanted)) for m in (small, found)]
    assert far[1] < 0.7 * far[0]


# ------------------------------------------------------------------------------------------------ every method
@pytest.mark.parametrize("method", ["hesso", *in_ci(*(name for name in BITS if name != "hesso"))])
def test_every_method_learns_from_a_teacher(method):
    teacher = net(3)
    before = copy.deepcopy(teacher.state_dict())
    plain = compress(method, **BITS[method])
    small = compress(method, training=taught(teacher, logits=4.0, hidden=["second"]), **BITS[method])
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())
    assert teacher.training and not any(p.grad is not None for p in teacher.parameters())
    (note,) = [note for note in small.report.notes if note.startswith("learned from a Net: logits x 4")]
    assert "the loss of the task x 1" in note and "kept" in note
    assert apart(small, teacher) < apart(plain, teacher)
    assert not any(note.startswith("learned") for note in plain.report.notes)


def test_without_labels_the_teacher_alone_is_learned():
    images = [batch[0] for batch in batches()]
    training = gc.Training(steps=120, lr=0.05, **taught(sharp()))
    small = gc.compress(sharp(), X, sparsity=0.5, data=images, training=training, progress=False)
    assert "no loss of a task" in " ".join(small.report.notes) and small.report.units_removed == 8
    untrained = gc.compress(sharp(), X, sparsity=0.5, progress=False)
    assert apart(small, sharp()) < 0.7 * apart(untrained, sharp())


@pytest.mark.parametrize("method", in_ci("geta", "hesso", "qat"))
@pytest.mark.parametrize("calls", in_ci(5, 17))
def test_a_run_with_a_teacher_goes_on_bit_for_bit(method, calls, tmp_path):
    options = {"training": taught(Around(3), hidden={"second": "inner.second"}), **BITS[method]}
    whole = compress(method, folder=tmp_path / "whole", **options)
    with pytest.raises(Stop):
        compress(method, folder=tmp_path / "cut", calls=calls, **options)
    again = compress(method, folder=tmp_path / "cut", **options)
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in again.state_dict().items())
    with pytest.raises(gc.CheckpointError, match="teacher: "):
        compress(method, folder=tmp_path / "cut", **{**options, "training": taught(net(4), hidden=["second"])})
    with pytest.raises(gc.CheckpointError, match="distill: "):
        compress(method, folder=tmp_path / "cut", **{**options, "training": taught(Around(3), temperature=3.0)})


def test_a_model_around_the_part_that_is_compressed():
    torch.manual_seed(0)
    model = Outer()
    training = taught(Outer(), hidden=["inner.second", "last", "inner"])
    small = compress("hesso", model=model, scope="inner", training=training)
    assert small(X).shape == (16, 3)
    with pytest.raises(gc.PlanError, match=r"no module 'inner.third'(.|\n)*fix:  hidden=\['inner"):
        compress("hesso", model=model, scope="inner", training=taught(Outer(), hidden=["inner.third"]))


# ------------------------------------------------------------------------------------------------ fine-tuning
def test_a_cut_model_learns_from_what_it_was_cut_from(tmp_path):
    small = gc.compress(sharp(), X, sparsity=0.5, progress=False)
    before = copy.deepcopy(small.state_dict())
    options = taught(sharp(), hidden=["first", "second"])
    tuned = finetune(small, steps=120, lr=0.05, **options)
    assert apart(tuned, sharp()) < 0.8 * apart(small, sharp())
    assert tuned.form == small.form == "native" and tuned.kept == small.kept
    assert tuned.report.params == small.report.params and tuned.report.units_removed == small.report.units_removed
    assert "trained == sliced" in tuned.report.verified and tuned(X[:3]).shape == (3, 3)
    assert any("2 of the hidden states by a learned map" in note for note in tuned.report.notes)
    assert all(torch.equal(t, before[n]) for n, t in small.state_dict().items())
    tuned.save(tmp_path)
    assert torch.equal(gc.load(tmp_path, model_factory=net)(X), tuned(X))
    integers = gc.compress(tuned.module, X, sparsity=0.0, bits=8, progress=False)
    with pytest.raises(gc.PlanError, match=r"are integers(.|\n)*train before quantizing"):
        finetune(integers, **options)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("hidden", [(), ("second",)], ids=["logits", "hidden states by a learned map"])
@pytest.mark.parametrize(("lr", "helps"), [(0.05, True), (2.0, False)])
def test_on_held_out_batches_the_better_of_start_and_end_stays(hidden, lr, helps):
    small = gc.compress(sharp(), X, sparsity=0.5, progress=False)
    data = batches()
    options = taught(sharp(), hidden=hidden) | {"steps": 60, "lr": lr, "held_out": data, "clip_norm": 1.0}
    tuned = finetune(small, data, **options)
    (note,) = [note for note in tuned.report.notes if "held-out data" in note]
    before, after = map(float, re.findall(r"loss (\S+) before, (\S+) after", note)[0])
    assert (after < before) is helps or not helps
    assert ("training has not lowered the loss: the result is the model as it was before" in note) is not helps
    same = [torch.equal(t, small.state_dict()[n]) for n, t in tuned.state_dict().items()]
    assert all(same) is not helps
    assert "held-out data" not in " ".join(finetune(small, data, **options | {"held_out": None}).report.notes)


def test_a_model_that_was_finalized_is_trained_on():
    ready = gc.prepare(net(), X, bits=None, prune=["channel"])
    ready.keep({group: torch.arange(3) for group in ready.session.groups})
    tuned = finetune(gc.finalize(ready), **taught(net()))
    assert tuned.report.units_removed == 10 and apart(tuned, net()) < apart(gc.finalize(ready), net())


def test_maps_between_widths_come_back_with_the_run(tmp_path):
    small, options = small_net(), taught(net(), hidden=["second"])
    done = 0

    def stops(output: Tensor, batch: Any) -> Tensor:
        nonlocal done
        done += 1
        if done == limit:
            raise Stop
        return loss(output, batch)

    limit = 10
    with pytest.raises(Stop):
        finetune(small, own=stops, folder=tmp_path / "a", save_every=2, **options)
    state = torch.load(sorted((tmp_path / "a").glob("step-*.pt"))[-1], weights_only=True)
    assert state["maps"]["maps.0.weight"].shape == (8, len(small.kept["second.weight"][0]))
    limit = 0
    again = finetune(small, own=stops, folder=tmp_path / "a", save_every=2, **options)
    whole = finetune(small, own=stops, folder=tmp_path / "b", save_every=2, **options)
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in again.state_dict().items())


# ------------------------------------------------------------------------------------------------ what is kept
@pytest.mark.slow
@pytest.mark.ci
def test_outputs_are_kept_where_batches_stay_the_same():
    small, data = small_net(), batches()
    loader = torch.utils.data.DataLoader([(x, y) for xs, ys in data for x, y in zip(xs, ys, strict=True)], 16)
    for name, own, cache in (("list", data, 2**20), ("loader", loader, 2**20), ("off", data, 0), ("one", data, 200)):
        notes = " ".join(finetune(small, own, steps=2, **taught(net(), cache=cache)).report.notes)
        assert ("kept for batches of the list" in notes) == (name in ("list", "one")), name
    for name, own, cache, calls in (("list", data, 2**20, 4), ("off", data, 0, 24), ("one", data, 200, 1 + 3 * 6)):
        teaching = Teaching(net(), gc.Distill(cache=cache), net(), (X,), {}, keeps=True)
        (inside,) = teaching._teacher
        ran = []
        inside.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        for step in range(24):
            teaching.begin(own[step % 4], (own[step % 4][0],), {})
        assert len(ran) == calls, name


def test_a_batch_that_was_written_into_is_taught_anew():
    teaching = Teaching(net(), gc.Distill(), net(), (X,), {}, keeps=True)
    batch = (X.clone(), batches()[0][1])
    teaching.begin(batch, batch[:1], {})
    first = teaching._taught.output
    teaching.begin(batch, batch[:1], {})
    assert teaching._taught.output is first
    batch[0].mul_(-1)
    teaching.begin(batch, batch[:1], {})
    assert torch.equal(teaching._taught.output, net().eval()(-X)) and teaching._bytes == first.numel() * 4


# ------------------------------------------------------------------------------------------------ what is refused
class Other(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.weight, self.output = nn.Parameter(torch.ones(1)), output

    def forward(self, x: Tensor) -> Any:
        return self.output(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": net().to("meta")}, "must be on the device of the student, cpu, got meta"),
        ({"teacher": Other(lambda x: x.flatten(1))}, r"logits .* shape of the teacher's, got \(16, 3\) for \(16, 36\)"),
        ({"teacher": Other(lambda x: (x, x))}, "the logits of a tuple are not known"),
        ({"teacher": Other(lambda x: x.mean((2, 3)))}, "have 1 class"),
        (taught(Other(lambda x: x.mean((2, 3))), logits=0, embeddings=1), "the embeddings .* have 1 entry"),
        (taught(Other(lambda x: (x, x)), logits=0, embeddings=1), "the embeddings of a tuple are not known"),
        ({"teacher": Other(lambda x: x @ x.new_ones(2, 2))}, "does not run on a batch that the student takes"),
        (taught(net(), hidden=["frist"]), r"the (student|teacher) has no module 'frist'"),
        (taught(net(), hidden={"first": "head"}), r"hidden state 'first' of the student must have the shape"),
        (taught(net(), dim=2), "a tensor of floats with a dim 2"),
        ({"distill": gc.Distill()}, "without a teacher"),
        ({"teacher": net}, "teacher must be a torch.nn.Module"),
        ({"teacher": net(), "distill": 2.0}, "distill must be a graphcomp.Distill"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(options, message):
    with pytest.raises(gc.PlanError, match=message):
        compress("hesso", training=options)


def test_a_distill_that_cannot_be():
    for options in (
        {"logits": -1}, {"temperature": 0}, {"hidden": "first"}, {"hidden": [3]}, {"logits": 0}, {"cache": 1.5},
        {"logits": 0, "hidden": ["a"], "hidden_weight": 0}, {"select": 3}, {"dim": 0.5}, {"task": None},
        {"embeddings": -1},
    ):  # fmt: skip
        with pytest.raises(gc.PlanError, match="Distill"):
            gc.Distill(**options)


def test_nothing_to_learn_is_refused():
    with pytest.raises(gc.PlanError, match="may stand for the loss"):
        gc.finetune(small_net(), batches(), training=gc.Training(steps=3), progress=False)
    with pytest.raises(gc.PlanError, match="needs data, a loss and a length"):
        gc.compress(net(), X, method="hesso", data=batches(), training=gc.Training(steps=3), progress=False)
    loaded = small_net()
    loaded.example_args = ()
    with pytest.raises(gc.PlanError, match="no example inputs"):
        finetune(loaded, **taught(net()))


class Parts(nn.Module):
    """(n, 6) -> (n, 3): two halves of one layer, which the class cannot hold at other lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).split(8, -1)
        return self.down(a * b.sigmoid())


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
def test_a_result_that_is_a_graph_stays_one():
    torch.manual_seed(0)
    model, x = Parts(), torch.randn(8, 6)
    small = gc.compress(model, x, sparsity=0.5, prefer_native=False, progress=False)
    training = gc.Training(steps=60, lr=1e-2, teacher=model)
    tuned = gc.finetune(small, [x, x + 1], training=training, progress=False)
    assert small.form == tuned.form == "graph" and tuned.reason == small.reason
    with torch.no_grad():
        distance = [float(distillation(m(x), model(x), 2.0)) for m in (small, tuned)]
    assert distance[1] < 0.5 * distance[0]
