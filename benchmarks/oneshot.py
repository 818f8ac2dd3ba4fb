"""Real weights: quality right after a one-shot cut, as it is and repaired, and after a short fine-tuning.

    python -m benchmarks.oneshot                                   # six models, 10 to 50 % of the units
    python -m benchmarks.oneshot --finetune                        # and ResNet-20 after five short epochs
    python -m benchmarks.oneshot --models resnet20,stories --saliencies l2,random
    python -m benchmarks.oneshot --models resnet20,resnet56 --saliencies repairable --sensitivity
    python -m benchmarks.oneshot --models mobilenet,efficientnet --saliencies repairable --sensitivity --macs 0.8,0.7
    python -m benchmarks.oneshot --models minilm --saliencies repairable --sensitivity --samples 512

Data and weights come from the shared folder beside the checkout. Calibration data (gradients, activations, batch norm
statistics, repair) are never test data: CIFAR-10's training images, every fifth of the 500 ImageNet images (the other
400 are the test), unlabelled sentences, other stories. No weight is trained, unless --finetune.
"""

from __future__ import annotations

import argparse
import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import append_json, percent, section, table, timed
from graphcomp.api import analyze, prunable_groups, repair, slice_groups
from graphcomp.cost import CostModel
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.flows.repaired import flat_batches
from graphcomp.pruning.allocation import Budget, Meter, Scope, allocate, allocate_budget
from graphcomp.pruning.evidence import Scores
from graphcomp.pruning.saliency import score
from graphcomp.pruning.sensitivity import Curve, marginal, probe
from graphcomp.result import CompressedModel

SPARSITIES = (0.1, 0.2, 0.3, 0.5)
SALIENCIES = ("l2", "taylor", "activation")
BATCH = 50
BN_BATCH, MOMENTUM = 256, 0.1  # images at once to re-estimate from; the momentum of the models' batch norms
CIFAR_CURVE, CIFAR_CALIBRATION = 2000, 512
FINETUNE_IMAGES, FINETUNE_EPOCHS, FINETUNE_BATCH, LEARNING_RATE = 10_000, 5, 128, 0.01
STORIES, CALIBRATION_STORIES, CALIBRATION_SENTENCES = 200, 32, 256

Batch = tuple[Tensor, ...]  # the model's inputs, then labels


@dataclass(frozen=True)
class Score:
    """One measured quality: `value` ± `error`, the standard error over `n` samples."""

    metric: str
    value: float
    error: float
    n: int

    def __str__(self) -> str:
        digits = 3 if "nats" in self.metric else 1
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


@dataclass(frozen=True)
class Task:
    """A trained model, what it is judged by, and what may be looked at before the cut."""

    name: str
    model: nn.Module
    example: Batch
    calibration: Sequence[Batch]
    loss: Callable[[Tensor, Batch], Tensor]
    evaluate: Callable[[nn.Module], list[Score]]
    has_batch_norm: bool = False


def main() -> None:
    options = _options()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(common.header(), flush=True)
    if options.json:
        options.json.unlink(missing_ok=True)
    SAMPLES.update({"calibration": options.samples} if options.samples else {})
    for name in options.models.split(","):
        task = TASKS[name]()
        budgets = [Budget(macs=float(share)) for share in options.macs.split(",") if share]
        targets: Sequence[float | Budget] = budgets or SPARSITIES
        rows, sizes = curves(task, options.saliencies.split(","), targets, options.sensitivity, options.json)
        columns = [
            "metric",
            "saliency",
            "dense",
            *(percent(t.macs if isinstance(t, Budget) else t, 0) for t in targets),
        ]
        by = "share of MACs left" if budgets else "share of units removed"
        section(f"{task.name}: right after the cut, by {by}", table(columns, rows))
        print("\n" + table(["saliency", "left", *columns[3:]], sizes), flush=True)
    if options.finetune:
        finetune_resnet20(options.saliencies.split(",")[0])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(TASKS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--saliencies", default=",".join(SALIENCIES), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--sensitivity", action="store_true", help="choose by the outputs' sensitivity, too")
    parser.add_argument("--macs", default="", metavar="A,B", help="shares of MACs to leave, in place of units removed")
    parser.add_argument("--samples", type=int, metavar="N", help="sentences (MiniLM) or stories to calibrate on")
    parser.add_argument("--finetune", action="store_true", help="fine-tune ResNet-20 after the cut (first saliency)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one line of JSON per measurement")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------ curves
def curves(
    task: Task, saliencies: Sequence[str], targets: Sequence[float | Budget], sensitivity: bool, file: Path | None
) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of the table of qualities, and of the table of sizes."""
    dense = task.evaluate(task.model)
    with timed() as clock:
        analysis = analyze(task.model, task.example)
        groups = prunable_groups(analysis)
    units = sum(group.size for group in groups)
    print(f"\n{task.name}: {len(groups)} groups, {units} units, analysed in {clock.seconds:.1f} s; dense: "
          + ", ".join(f"{s.metric} {s} (n = {s.n})" for s in dense), flush=True)  # fmt: skip
    rows: list[list[str]] = []
    sizes: list[list[str]] = []
    for saliency, scope in [(s, scope) for s in saliencies for scope in ("global", "sensitivity")[: 1 + sensitivity]]:
        name = saliency if scope == "global" else f"{saliency}, by sensitivity"
        scores = score(saliency, analysis, groups, data=task.calibration, loss=task.loss)
        cuts = [cut(analysis, scores, saliency, target, scope, task.calibration) for target in targets]
        with timed() as clock:
            mended = [repair(small, analysis, task.calibration).eval() for small in cuts]
        print(f"{name}: repaired in {clock.seconds / len(cuts):.0f} s each", flush=True)
        found = {name: [task.evaluate(small) for small in cuts]}
        if task.has_batch_norm:
            found[f"{name}, BN re-estimated"] = [task.evaluate(reestimated(s, task.calibration)) for s in cuts]
        found[f"{name}, repaired"] = [task.evaluate(small) for small in mended]
        for label, results in found.items():
            for k, whole in enumerate(dense):
                rows.append([f"{whole.metric} (n = {whole.n})", label, str(whole), *(str(r[k]) for r in results)])
                _note(file, task, label, targets, [whole, *(r[k] for r in results)])
        sizes += _sizes(name, cuts)
        forms = {small.form: small.reason for small in mended}
        print("\n".join(f"{name}: {form} {reason and f'({reason})'}" for form, reason in forms.items()), flush=True)
    return rows, sizes


def cut(
    analysis: Analysis,
    scores: Scores,
    saliency: str,
    target: float | Budget,
    scope: Scope,
    calibration: Sequence[Batch],
) -> CompressedModel:
    """Remove a share of all units, or units down to a budget, the least important first; the laws are checked."""
    groups = tuple(scores)
    budget = target if isinstance(target, Budget) else None
    if scope == "sensitivity":
        with timed() as clock:
            scores = by_sensitivity(analysis, scores, saliency, budget, calibration)
        print(f"sensitivity: {clock.seconds:.0f} s", flush=True)
    if isinstance(target, Budget):
        kept = allocate_budget(analysis, groups, scores, target, scope=scope)
    else:
        kept = allocate(groups, scores, sparsity=target, scope=scope)
    return slice_groups(analysis, kept, up_for_pruning=groups).eval()


def by_sensitivity(
    analysis: Analysis, scores: Scores, saliency: str, budget: Budget | None, calibration: Sequence[Batch]
) -> Scores:
    """Return scores that compare between groups; each group is probed once for all targets.

    "repairable" stands for no saliency: units are ordered by the Gram matrices of the probes.
    """
    if (analysis, saliency) not in PROBED:
        order = None if saliency == "repairable" else scores
        PROBED[analysis, saliency] = probe(analysis, tuple(scores), order, _flat(analysis, calibration))
    meter = None if budget is None else Meter(CostModel(analysis), budget, tuple(scores))
    return marginal(PROBED[analysis, saliency], (lambda _: 1.0) if meter is None else meter.saved_by_a_unit)


def _flat(analysis: Analysis, calibration: Sequence[Batch]) -> list[list[Any]]:
    """Return flat inputs, of which every second batch can judge."""
    halves = [half for batch in calibration for half in zip(*(t.chunk(2) for t in batch), strict=True)]
    return flat_batches(analysis, list(calibration) if len(calibration) > 1 else halves)


PROBED: dict[tuple[Analysis, str], dict[ChannelGroup, Curve]] = {}
"""Plan and saliency -> what was found of each group."""


def _sizes(saliency: str, cuts: Sequence[CompressedModel]) -> list[list[str]]:
    reports = [small.report for small in cuts]
    params = [percent(report.params.ratio) for report in reports]
    return [[saliency, "parameters", *params], [saliency, "MACs", *(percent(report.macs.ratio) for report in reports)]]


def _note(
    file: Path | None, task: Task, label: str, targets: Sequence[float | Budget], scores: Sequence[Score]
) -> None:
    for target, found in zip((0.0, *targets), scores, strict=True):
        asked = {"macs": target.macs} if isinstance(target, Budget) else {"sparsity": target}
        append_json(file, {"model": task.name, "saliency": label, **asked, **vars(found)})


@torch.no_grad()
def reestimated(model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """A copy whose batch norms have the statistics of all inputs in `batches`. No weight is touched."""
    model = copy.deepcopy(model).train()
    statistics = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    totals = [torch.zeros_like(buffer) for buffer in statistics]
    parts = torch.cat([batch[0] for batch in batches]).split(BN_BATCH)
    for images in parts:
        for buffer in statistics:
            buffer.zero_()
        model(images)  # leaves MOMENTUM times the batch's statistics
        for buffer, total in zip(statistics, totals, strict=True):
            total += buffer / MOMENTUM
    for buffer, total in zip(statistics, totals, strict=True):
        buffer.copy_(total / len(parts))
    return model.eval()


# ------------------------------------------------------------------------------------------------ metrics
def proportion(metric: str, hits: int, n: int) -> Score:
    """Percent, with the binomial standard error."""
    p = hits / n
    return Score(metric, 100 * p, 100 * math.sqrt(p * (1 - p) / n), n)


def top1(metric: str, images: Tensor, labels: Tensor) -> Callable[[nn.Module], list[Score]]:
    """Share of the images whose highest logit is the label's."""

    @torch.no_grad()
    def evaluate(model: nn.Module) -> list[Score]:
        pairs = zip(images.split(BATCH), labels.split(BATCH), strict=True)
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
        return [proportion(metric, hits, len(labels))]

    return evaluate


def spearman(metric: str, rho: float, n: int) -> Score:
    """Times 100; standard error by Bonett and Wright, 2000."""
    error = math.sqrt((1 + rho**2 / 2) / (n - 3)) * (1 - rho**2)
    return Score(metric, 100 * rho, 100 * error, n)


def nats_per_token(metric: str, sums: Sequence[float], counts: Sequence[int]) -> Score:
    """Mean loss over all tokens; standard error over stories, of a ratio of means."""
    losses, lengths = torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)
    mean = float(losses.sum() / lengths.sum())
    spread = float((losses - mean * lengths).square().sum())
    return Score(metric, mean, math.sqrt(spread) / float(lengths.sum()), len(counts))


# ------------------------------------------------------------------------------------------------ tasks
@cache
def realdata() -> Any:
    return common.shared_module("data", "realdata.py")


def calibrating(usual: int) -> int:
    """Return how many sentences or stories calibrate: as many as were asked for, or as usual."""
    return SAMPLES.get("calibration", usual)


SAMPLES: dict[str, int] = {}
"""What --samples asked for."""


def cross_entropy(output: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), batch[-1].flatten())


def _batches(images: Tensor, labels: Tensor) -> list[Batch]:
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


@cache
def cifar(split: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Normalised images (n, 3, 32, 32), labels (n,)."""
    images, labels = realdata().cifar10(split)
    return realdata().prep(realdata().ResNetCifar, images[:limit]), labels[:limit]


def resnet(depth: int) -> Task:
    model = realdata().load(f"cifar10_resnet{depth}")
    images, labels = cifar("train_a", FINETUNE_IMAGES)
    calibration = _batches(images[:CIFAR_CALIBRATION], labels[:CIFAR_CALIBRATION])
    evaluate = top1("CIFAR-10 top-1 %", *cifar("test", CIFAR_CURVE))
    return Task(f"ResNet-{depth}", model, (images[:2],), calibration, cross_entropy, evaluate, has_batch_norm=True)


def imagenet(name: str, weights: str) -> Task:
    model = realdata().load(weights)
    images, labels = realdata().images(common.shared("data", "imagenet_500_even.npz"), model.size)
    x = realdata().prep(model, images)
    held_out = torch.arange(len(x)) % 5 == 0
    calibration = _batches(x[held_out], labels[held_out])
    evaluate = top1("ImageNet top-1 %", x[~held_out], labels[~held_out])
    return Task(name, model, (x[:2],), calibration, cross_entropy, evaluate, has_batch_norm=True)


def minilm() -> Task:
    """Gradients are those of an unlabelled loss: every sentence apart from the others of its batch."""
    common.import_torchvision()
    data = realdata()
    path = common.shared("data", "text_minilm.npz")
    arrays = np.load(path)
    sentences = data.ragged(arrays, "calib")
    calibration = [_padded(sentences[k : k + 32]) for k in range(0, calibrating(CALIBRATION_SENTENCES), 32)]
    n_sst2, n_stsb = len(arrays["sst2_dev_label"]), len(arrays["stsb_dev_score"])

    def evaluate(model: nn.Module) -> list[Score]:
        hits = round(data.sst2_acc(model, path) / 100 * n_sst2)
        rho = data.stsb_spearman(model, path, "dev") / 100
        sst2 = proportion("SST-2 accuracy %", hits, n_sst2)
        return [sst2, spearman("STS-B Spearman x 100", float(np.nan_to_num(rho)), n_stsb)]

    return Task("MiniLM", data.load("minilm_l6_v2"), calibration[0], calibration, apart, evaluate)


def apart(embeddings: Tensor, _: Batch) -> Tensor:
    """Cross-entropy of telling which sentence of the batch an embedding (b, d) belongs to, temperature 0.05."""
    return F.cross_entropy(embeddings @ embeddings.T / 0.05, torch.arange(len(embeddings)))


def _padded(sentences: Sequence[Any]) -> Batch:
    """Token ids (b, t) and mask (b, t)."""
    tokens = [torch.from_numpy(s.astype(np.int64)) for s in sentences]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(t)) for t in tokens], batch_first=True)
    return ids, mask


def stories() -> Task:
    data = realdata()
    found = data.ragged(np.load(common.shared("data", "tinystories_600.npz")), "ids")
    tokens = [torch.from_numpy(story.astype(np.int64)) for story in found]
    calibration = [(t[None, :-1], t[None, 1:]) for t in tokens[STORIES : STORIES + calibrating(CALIBRATION_STORIES)]]
    model = data.load("stories260k")

    @torch.no_grad()
    def evaluate(small: nn.Module) -> list[Score]:
        losses = [float(F.cross_entropy(small(t[None, :-1])[0], t[1:], reduction="sum")) for t in tokens[:STORIES]]
        return [nats_per_token("nats per token", losses, [len(t) - 1 for t in tokens[:STORIES]])]

    return Task("stories260k Llama", model, (torch.stack([tokens[0][:64]] * 2),), calibration, cross_entropy, evaluate)


TASKS: dict[str, Callable[[], Task]] = {
    "resnet20": lambda: resnet(20),
    "resnet56": lambda: resnet(56),
    "efficientnet": lambda: imagenet("EfficientNet-Lite0", "imagenet_efficientnet_lite0"),
    "mobilenet": lambda: imagenet("MobileNetV2", "imagenet_mobilenet_v2"),
    "minilm": minilm,
    "stories": stories,
}


# ------------------------------------------------------------------------------------------------ fine-tuning
def finetune_resnet20(saliency: str) -> None:
    """ResNet-20 after five short epochs on part of CIFAR-10's training images, on all 10 000 test images."""
    task = resnet(20)
    evaluate = top1("top-1 %", *cifar("test", None))
    analysis = analyze(task.model, task.example)
    groups = prunable_groups(analysis)
    scores = score(saliency, analysis, groups, data=task.calibration, loss=task.loss)
    rows = []
    for sparsity in (0.0, *SPARSITIES):
        small = cut(analysis, scores, saliency, sparsity, "global", task.calibration)
        before = evaluate(small)[0]
        with timed() as clock:
            finetune(small, *cifar("train_a", FINETUNE_IMAGES))
        after = evaluate(small.eval())[0]
        ratios = [percent(small.report.params.ratio), percent(small.report.macs.ratio)]
        rows.append([percent(sparsity, 0), *ratios, str(before), str(after), f"{clock.seconds:.0f}"])
        print(f"fine-tuned at {percent(sparsity, 0)}: {before} -> {after}", flush=True)
    columns = ["units removed", "parameters", "MACs", "after the cut", "after fine-tuning", "s"]
    how = f"{FINETUNE_EPOCHS} epochs of {FINETUNE_IMAGES} training images, SGD {LEARNING_RATE}, momentum 0.9, cosine"
    title = f"ResNet-20 on all {len(cifar('test', None)[1])} CIFAR-10 test images ({saliency}), fine-tuned for {how}"
    section(title, table(columns, rows))


def finetune(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train in place, with shifts of up to four pixels and mirror images."""
    torch.manual_seed(0)
    steps = FINETUNE_EPOCHS * math.ceil(len(images) / FINETUNE_BATCH)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(FINETUNE_EPOCHS):
        for chosen in torch.randperm(len(images)).split(FINETUNE_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(augmented(images[chosen])), labels[chosen]).backward()
            optimizer.step()
            schedule.step()


def augmented(images: Tensor, shift: int = 4) -> Tensor:
    """(n, c, h, w): each mirrored with probability one half, all moved by up to `shift` pixels (black comes in)."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    padded = F.pad(mirrored, [shift] * 4, value=float(images.min()))
    top, left = torch.randint(2 * shift + 1, (2,)).tolist()
    return padded[..., top : top + images.shape[-2], left : left + images.shape[-1]]


if __name__ == "__main__":
    main()
