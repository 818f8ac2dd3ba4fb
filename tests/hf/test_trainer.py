"""transformers' Trainer with QASSO, the callback and a teacher."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.training.distill import distillation
from tests.hf.models import bert, llama, need_transformers

transformers = need_transformers()
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.slow, pytest.mark.ci, pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")]

STEPS = 12
SCHEDULE = gc.Schedule(STEPS, warmup=2, projection=3, joint=4, projection_periods=3, pruning_periods=2)


def model_of(kind: str = "bert") -> Any:
    torch.manual_seed(0)
    return bert(attention_probs_dropout_prob=0.1) if kind == "bert" else llama(tie_word_embeddings=True)


def rows(labels: bool = True) -> list[dict[str, Tensor]]:
    tokens = torch.randint(3, 98, (32, 12), generator=torch.Generator().manual_seed(0))
    return [
        {"input_ids": t, "attention_mask": torch.ones_like(t), **({"labels": t[0] % 3} if labels else {})}
        for t in tokens
    ]


def batch(labels: bool = True) -> dict[str, Tensor]:
    own = rows(labels)[:8]
    return {name: torch.stack([row[name] for row in own]) for name in own[0]}


def prepared(model: Any, labels: bool = True, **options: Any) -> tuple[gc.Prepared, gc.QASSO]:
    ready = gc.prepare(model, batch(labels), **{"bits": (4, 8), **options})
    return ready, gc.QASSO(ready, torch.optim.AdamW, lr=1e-3, sparsity=0.5, schedule=SCHEDULE)


def trainer(model: nn.Module, folder: Path, optimizer: Any = None, callback: Any = None, **options: Any) -> Any:
    given = {
        "max_steps": STEPS, "per_device_train_batch_size": 8, "report_to": [], "save_steps": 4, "disable_tqdm": True,
        "use_cpu": True, "logging_steps": 3, "seed": 7, **options,
    }  # fmt: skip
    data = given.pop("data", None) or rows()
    more = {name: given.pop(name) for name in ("compute_loss_func",) if name in given}
    return transformers.Trainer(
        model, transformers.TrainingArguments(output_dir=str(folder), **given), train_dataset=data,
        eval_dataset=data[:8], optimizers=(optimizer, None), callbacks=[callback or gc.GraphcompCallback()], **more,
    )  # fmt: skip


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(t, other[name]) for name, t in a.state_dict().items())


# ------------------------------------------------------------------------------------------------ QASSO
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"max_grad_norm": 0.0, "lr_scheduler_type": "constant"}],
)
def test_a_run_goes_on_bit_for_bit(options, tmp_path):
    """The Trainer's scheduler, clipping, accumulation, autocast and its evaluation in the middle."""
    found = []
    for cut in (False, True):
        ready, optimizer = prepared(model_of())
        folder = tmp_path / str(cut)
        run = trainer(ready, folder, optimizer, eval_strategy="steps", eval_steps=5, **options)
        run.train(resume_from_checkpoint=str(tmp_path / "False" / "checkpoint-8") if cut else None)
        assert optimizer.steps == STEPS and optimizer.settled
        found.append((ready, run.state.log_history))
    (whole, logs), (again, _) = found
    assert same(whole, again)
    lines = [line for line in logs if "loss" in line]
    assert [line["stage"] for line in lines] == ["projection", "joint", "joint", "cool-down"]
    assert lines[-1]["sparsity"] == 0.5 and 4 <= lines[-1]["weight_bits"] <= 8
    assert [line["step"] for line in logs if "eval_loss" in line] == [5, 10, 12]
    small = gc.finalize(again)
    assert small.report.sparsity == 0.5 and small(**batch()).logits.shape == (8, 3)


def test_the_mode_is_followed_under_autocast(tmp_path):
    """accelerate keeps the function of a forward, and the mode switches after that."""
    ready, optimizer = prepared(bert(hidden_dropout_prob=0.5))
    run = trainer(ready, tmp_path, optimizer, bf16=True)
    run.train()
    first, second = (run.evaluate()["eval_loss"] for _ in range(2))
    assert first == second
    ready.train()
    torch.manual_seed(0)
    assert not torch.equal(ready(**batch()).logits, ready(**batch()).logits)


def test_epochs_of_a_float_model_give_its_class(tmp_path):
    ready, optimizer = prepared(model_of(), bits=None)
    trainer(ready, tmp_path / "run", optimizer, max_steps=-1, num_train_epochs=3).train()
    small = gc.finalize(ready)
    assert small.form == "native" and type(small.module).__name__ == "BertForSequenceClassification"
    small.module.save_pretrained(tmp_path / "small")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    x = batch(labels=False)
    assert torch.equal(again(**x).logits, small.module(**x).logits)


def test_a_decoder_with_tied_weights(tmp_path):
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows()]
    example = {name: torch.stack([row[name] for row in data[:8]]) for name in data[0]}
    ready = gc.prepare(model_of("llama"), example, bits=None)
    optimizer = gc.QASSO(ready, torch.optim.AdamW, lr=1e-3, sparsity=0.5, schedule=SCHEDULE)
    trainer(ready, tmp_path / "run", optimizer, data=data).train()
    small = gc.finalize(ready)
    again = gc.prepare(model_of("llama"), example, bits=None)
    resumed = gc.QASSO(again, torch.optim.AdamW, lr=1e-3, sparsity=0.5, schedule=SCHEDULE)
    trainer(again, tmp_path / "again", resumed, data=data).train(str(tmp_path / "run" / "checkpoint-8"))
    assert same(ready, again)
    assert small.form == "native" and small.module.generate(example["input_ids"][:1], max_new_tokens=3).shape[1] == 15


@pytest.mark.parametrize("bits", [(4, 8), 4])
def test_what_training_quantizes_comes_back_in_its_class(bits, tmp_path):
    data = [{**batch(labels=False), "labels": batch(labels=False)["input_ids"]}]
    torch.manual_seed(0)
    small = gc.compress(
        llama(), data[0], method="geta" if bits != 4 else "qat", bits=bits, activation_bits=None, data=data,
        loss=lambda output, own: output.loss, training=gc.Training(steps=20, lr=1e-3), progress=False,
    )  # fmt: skip
    assert small.form == "native", small.reason
    assert "native == integer graph" in small.report.verified
    small.module.save_pretrained(tmp_path)
    again, x = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), batch(labels=False)
    assert torch.equal(again(**x).logits, small.module(**x).logits)
    assert torch.equal(*(m.generate(x["input_ids"][:1], max_new_tokens=3, do_sample=False) for m in (again, small)))


def test_what_a_class_cannot_hold_is_a_graph_and_said(tmp_path):
    ready, optimizer = prepared(model_of())
    trainer(ready, tmp_path, optimizer, save_strategy="no").train()
    small = gc.finalize(ready)
    assert small.form == "graph" and any("not the model's own class" in note for note in small.report.notes)


# ------------------------------------------------------------------------------------------------ what is refused
def test_what_does_not_go_together_is_refused_before_the_first_step(tmp_path):
    ready, optimizer = prepared(model_of())
    other, strange = prepared(model_of())
    floats = gc.prepare(model_of(), batch(), bits=None)
    for model, own, options, message in (
        (ready, optimizer, {"max_steps": 11}, r"QASSO has 12 steps, and the run of the Trainer 11"),
        (ready, optimizer, {"max_steps": -1, "num_train_epochs": 2}, r"12 steps, and the run of the Trainer 8"),
        (ready, None, {}, "bits are learned and units go by QASSO alone"),
        (floats, None, {}, "bits are learned and units go by QASSO alone"),
        (other, optimizer, {}, "of another module than the Trainer's model"),
    ):
        with pytest.raises(gc.PlanError, match=message):
            trainer(model, tmp_path, own, **options).train()
    trainer(other, tmp_path / "other", strange, save_steps=6).train()
    with pytest.raises(gc.PlanError, match="QASSO has done 12 steps, and the Trainer 0"):
        trainer(other, tmp_path, strange).train()
    lsq = gc.prepare(model_of(), batch(), bits=8, quantizer="lsq")
    trainer(lsq, tmp_path / "lsq", max_steps=2).train()  # any optimizer trains these


# ------------------------------------------------------------------------------------------------ a teacher
def apart(small: Any, teacher: Any) -> float:
    with torch.no_grad():
        x = batch(labels=False)
        return float(distillation(small.eval()(**x).logits, copy.deepcopy(teacher).eval()(**x).logits, 2.0))


def sure() -> Any:
    model = model_of()
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    return model


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_cut_model_is_trained_beside_a_teacher(labels, accumulate, tmp_path):
    teacher = sure()
    small = gc.compress(teacher, batch(labels=False), sparsity=0.4, progress=False)
    before, kept = apart(small, teacher), copy.deepcopy(teacher.state_dict())
    distill = gc.Distill(logits=4.0, task=0.01, hidden=["bert.encoder.layer.0", "bert.encoder.layer.1"])
    run = trainer(
        small.module, tmp_path, None, gc.GraphcompCallback(teacher, distill), data=rows(labels), learning_rate=2e-3,
        max_steps=40, gradient_accumulation_steps=accumulate, lr_scheduler_type="constant",
    )  # fmt: skip
    run.train()
    assert apart(small, teacher) < 0.7 * before
    assert all(torch.equal(t, kept[name]) for name, t in teacher.state_dict().items())
    if labels:
        x = batch()
        assert run.evaluate()["eval_loss"] == pytest.approx(small.eval()(**x).loss.item(), rel=1e-4)
    assert not small.module._forward_hooks and not small.module._forward_pre_hooks


def test_qasso_beside_a_teacher(tmp_path):
    teacher = sure()
    ready, optimizer = prepared(teacher, labels=False)
    distill = gc.Distill(hidden=["bert.encoder.layer.1"])
    trainer(ready, tmp_path, optimizer, gc.GraphcompCallback(teacher, distill), data=rows(labels=False)).train()
    small = gc.finalize(ready)
    (note,) = [note for note in small.report.notes if note.startswith("learned from a BertForSequence")]
    assert "1 hidden states x 1" in note and ready.tap is None and small.report.sparsity == 0.5


def test_a_loss_of_the_trainer_leaves_no_place_for_a_teacher(tmp_path):
    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return outputs["logits"].square().mean()

    with pytest.raises(gc.TrainingError, match="leaves out what the teacher says"):
        trainer(model_of(), tmp_path, None, gc.GraphcompCallback(model_of()), compute_loss_func=own).train()


def test_a_map_between_widths_is_for_finetune(tmp_path):
    teacher = sure()
    small = gc.compress(teacher, batch(labels=False), sparsity=0.4, progress=False)
    distill = gc.Distill(hidden=["bert.encoder.layer.0.intermediate"])
    with pytest.raises(gc.PlanError, match=r"another width than the teacher's(.|\n)*finetune"):
        trainer(small.module, tmp_path, None, gc.GraphcompCallback(teacher, distill)).train()
    training = gc.Training(steps=30, lr=2e-3, teacher=teacher, distill=distill)
    tuned = gc.finetune(small, [batch(labels=False)], training=training, progress=False)
    assert apart(tuned, teacher) < 0.7 * apart(small, teacher) and type(tuned.module) is type(teacher)
    with pytest.raises(gc.PlanError, match="without a teacher"):
        gc.GraphcompCallback(distill=distill)
