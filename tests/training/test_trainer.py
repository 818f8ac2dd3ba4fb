"""Loops that others wrote: Hugging Face's Trainer, accelerate."""

import pytest
import torch
import torch.nn.functional as F

import graphcomp as gc
from tests.vision import import_torchvision

import_torchvision()  # transformers imports it where it is installed, and takes it for broken on a CPU-only torch
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

STEPS = 12


def bert(dropout=0.0):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=3,
        hidden_dropout_prob=dropout / 5,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def rows():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (32, 10), generator=generator)
    return [{"input_ids": t, "attention_mask": torch.ones(10, dtype=torch.int64), "labels": t[0] % 3} for t in tokens]


def prepared():
    batch = {key: torch.stack([row[key] for row in rows()[:4]]) for key in rows()[0]}
    ready = gc.prepare(bert(), batch, bits=(4, 8))
    schedule = gc.Schedule(STEPS, warmup=2, projection=3, joint=4, projection_periods=3, pruning_periods=2)
    return ready, gc.QASSO(ready, torch.optim.AdamW, lr=1e-3, sparsity=0.5, schedule=schedule)


@pytest.mark.slow
@pytest.mark.ci
def test_a_prepared_model_has_the_dropout_of_the_model():
    """That of attention too, which is an argument of one op: the same draws give the same outputs."""
    model = bert(dropout=0.5)
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in rows()[:4]])}
    ready = gc.prepare(model, inputs, bits=None)
    for mode in (True, False):
        outputs = []
        for module in (model.train(mode), ready.train(mode)):
            torch.manual_seed(0)
            outputs += [module(**inputs).logits for _ in range(2)]
        first, second, own, again = outputs
        assert torch.equal(first, own) and torch.equal(second, again)
        assert torch.equal(first, second) is not mode


@pytest.mark.slow
@pytest.mark.ci
def test_the_trainer_of_transformers_trains_a_prepared_model(tmp_path):
    ready, optimizer = prepared()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        report_to=[],
        save_steps=6,
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=6,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = transformers.Trainer(ready, arguments, train_dataset=rows(), optimizers=(optimizer, scheduler))
    result = trainer.train()
    assert result.global_step == STEPS
    assert torch.isfinite(torch.tensor(result.training_loss))
    assert optimizer.stage == gc.Stage.COOLDOWN
    assert optimizer.removed == sum(g.size for g in optimizer.groups) // 2
    assert (tmp_path / "checkpoint-6").exists()
    small = gc.finalize(ready)
    assert small.report.units_removed == optimizer.removed
    assert ready.config.num_labels == 3  # the original's attributes are there


@pytest.mark.slow
@pytest.mark.ci
def test_accelerate_wraps_module_and_optimizer():
    accelerator = accelerate.Accelerator(cpu=True)
    ready, optimizer = prepared()
    loader = torch.utils.data.DataLoader(rows(), batch_size=8)
    model, wrapped, loader = accelerator.prepare(ready, optimizer, loader)
    done = 0
    while done < STEPS:
        for batch in loader:
            wrapped.zero_grad()
            accelerator.backward(F.cross_entropy(model(**batch)["logits"], batch["labels"]))
            wrapped.step()
            done += 1
    bits = optimizer.bank.bits()
    assert torch.equal(bits, bits.round()) or float((bits - bits.round()).abs().max()) < 1e-4
    assert gc.finalize(accelerator.unwrap_model(model)).report.units_removed == optimizer.removed
