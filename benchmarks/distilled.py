"""Real weights at half of the heads and feed-forward units: right after the cut, repaired, distilled, and in int8.

    python -m benchmarks.distilled                     # MiniLM and stories260k, ten CPU minutes of training each
    python -m benchmarks.distilled --models stories --seconds 120 --json distilled.jsonl

Units go by sensitivity; the model before the cut teaches. MiniLM learns the directions of the teacher's embeddings, on
512 unlabelled sentences and sentences of WikiText-2's validation text; stories260k learns next tokens and the teacher's
logits, on stories that are no test stories. Learning rates were set beforehand, and no test data decide anything: the
better of start and end stays by the loss on batches held out of training. A model whose rows stand in the JSON file is
not run again. Seconds are of the CPU. After each stage stories260k goes on with the beginning of a test story,
greedily.
"""

from __future__ import annotations

import argparse
import gzip
import random
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import common, oneshot
from benchmarks.common import append_json, read_json, section, table

SPARSITY = 0.5
ROLES = ("head", "hidden")
BATCH = 32
WINDOW, STORIES_BATCH = 128, 16
"""Tokens, and rows, of a batch of stories."""
WORDS = 5, 40
"""Fewest and most words of a sentence of WikiText."""
TIMED = 5
"""Steps that the time of a step is read off."""
HELD_OUT = 8
"""Batches that are not trained on, and decide whether the result of training stays."""
BEGINNING, CONTINUED = 8, 48
"""Tokens of a test story, and tokens that the model goes on with."""


@dataclass(frozen=True)
class Course:
    """A model, and what it learns.

    Attributes:
        task: the model, calibration data and the measure.
        data: batches to train on.
        loss: of the task; None: the teacher alone.
        distill: what is learned of the model before the cut.
        lr: at its highest.
        integers: options of the last stages, for weights of 8 bits and of 4.
        sample: what the model writes, as text; None: the model writes none.
        held_out: batches that the loss is measured on before and after training.
    """

    task: oneshot.Task
    data: list[Any]
    loss: Callable[[Tensor, Any], Tensor] | None
    distill: gc.Distill
    lr: float
    integers: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"int8": {"bits": 8}})
    sample: Callable[[nn.Module], str] | None = None
    held_out: list[Any] = field(default_factory=list)


def minilm() -> Course:
    task = oneshot.minilm()
    data = oneshot.realdata()
    sentences = [np.asarray(s) for s in data.ragged(np.load(common.shared("data", "text_minilm.npz")), "calib")]
    batches = of_one_length(sentences + wikitext(task.model.folder))
    return Course(
        task, batches[HELD_OUT:], None,
        gc.Distill(logits=0, embeddings=1.0), 2e-4,
        held_out=batches[:HELD_OUT],
    )  # fmt: skip


def wikitext(folder: str) -> list[np.ndarray[Any, Any]]:
    """Return sentences of WikiText-2's validation text as token ids."""
    from transformers import AutoTokenizer

    text = gzip.decompress(common.shared("data", "wikitext2_valid.txt.gz").read_bytes()).decode()
    lines = [line.strip() for line in text.splitlines() if not line.strip().startswith("=")]
    found = [part.replace("<unk>", "").strip() for line in lines for part in line.split(" . ")]
    kept = [part for part in found if WORDS[0] <= len(part.split()) <= WORDS[1]]
    return [np.asarray(ids) for ids in AutoTokenizer.from_pretrained(folder)(kept)["input_ids"]]


def of_one_length(sentences: Sequence[np.ndarray[Any, Any]]) -> list[tuple[Tensor, Tensor]]:
    """Return batches of sentences of one length each, so that there is no padding; in a random order."""
    by_length: dict[int, list[Tensor]] = {}
    for ids in sentences:
        by_length.setdefault(len(ids), []).append(torch.from_numpy(ids.astype(np.int64)))
    rows = [
        (torch.stack(own[k : k + BATCH]), torch.ones(BATCH, length))
        for length, own in by_length.items()
        for k in range(0, len(own) - BATCH + 1, BATCH)
    ]
    random.Random(0).shuffle(rows)
    return rows


def stories() -> Course:
    task = oneshot.stories()
    found = oneshot.realdata().ragged(np.load(common.shared("data", "tinystories_600.npz")), "ids")
    text = torch.from_numpy(np.concatenate(found[oneshot.STORIES :]).astype(np.int64))
    windows = text[: len(text) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    data = [(rows[:, :-1], rows[:, 1:]) for rows in windows.split(STORIES_BATCH)]
    weights = {
        "int8": {"bits": 8, "activation_bits": None},
        "4 bits, groups of 32": {"bits": 4, "activation_bits": None, "group_size": 32},
    }
    return Course(
        task, data[HELD_OUT:], oneshot.cross_entropy, gc.Distill(temperature=1.0, task=0.5), 1e-3, weights,
        partial(continued, found[0][:BEGINNING], pieces()), data[:HELD_OUT],
    )  # fmt: skip


def pieces() -> list[bytes]:
    """Return the pieces of text of the 512 tokens, in llama2.c's format: a score (float32), a length (int32), bytes."""
    data = common.shared("data", "tok512.bin").read_bytes()
    found, at = [], 4  # behind the longest length
    while at < len(data):
        _, length = struct.unpack("<fi", data[at : at + 8])
        found.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    return found


@torch.no_grad()
def continued(beginning: np.ndarray[Any, Any], texts: Sequence[bytes], model: nn.Module) -> str:
    """Return the beginning of a story, and how the model goes on, as text."""
    ids = torch.from_numpy(beginning.astype(np.int64))[None]
    for _ in range(CONTINUED):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    special = range(3)
    found = [
        b"".join(texts[k] for k in part.tolist() if k not in special) for part in ids[0].split([BEGINNING, CONTINUED])
    ]
    return " | ".join(part.decode(errors="replace").strip() for part in found)


COURSES: dict[str, Callable[[], Course]] = {"minilm": minilm, "stories": stories}


def main() -> None:
    options = _parsed()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    print(common.header(), flush=True)
    for name in options.models.split(","):
        known = [] if options.json is None else [row for row in read_json(options.json) if row["model"] == name]
        rows = known if known else run(name, COURSES[name](), options.seconds)
        for row in rows if not known else ():
            append_json(options.json, row)
        columns = ["stage", *rows[0]["scores"], "parameters %", "seconds"]
        cells = [[r["stage"], *r["scores"].values(), f"{r['parameters']:.1f}", f"{r['seconds']:.0f}"] for r in rows]
        for row in rows:
            said = [row[key] for key in ("note", "text") if key in row]
            print("\n".join([f"{row['stage']}:", *said]) if said else "", end="\n" * bool(said))
        section(
            f"{name}: {SPARSITY:.0%} of {' and '.join(ROLES)} units, {rows[0]['steps']} steps", table(columns, cells)
        )


def run(name: str, course: Course, seconds: float) -> list[dict[str, Any]]:
    """Cut, repair, distil and quantize a model; the measures after each."""
    task, model = course.task, course.task.model
    whole = sum(p.numel() for p in model.parameters())
    rows: list[dict[str, Any]] = []
    begun = time.process_time()

    def tell(stage: str, module: nn.Module, parameters: float | None = None) -> None:
        nonlocal begun
        spent = time.process_time() - begun
        share = 100 * (sum(p.numel() for p in module.parameters()) / whole if parameters is None else parameters)
        scores = {score.metric: str(score) for score in task.evaluate(module)}
        rows.append({"model": name, "stage": stage, "scores": scores, "parameters": share, "seconds": spent})
        if course.sample is not None:
            rows[-1]["text"] = course.sample(module)
        print(rows[-1], flush=True)
        begun = time.process_time()

    tell("as it was", model)
    asked: dict[str, Any] = {
        "sparsity": SPARSITY, "prune": ROLES, "ranking": "sensitivity", "calibration": task.calibration,
        "progress": False,
    }  # fmt: skip
    example = task.example[:2] if name == "minilm" else task.example
    tell("cut", gc.compress(model, example, repair=None, **asked))
    small = gc.compress(model, example, **asked)
    tell("+ repaired", small)
    steps = steps_in(seconds, small, course)
    begun = time.process_time()
    tuned = distilled(small, course, steps)
    tell(f"+ distilled, {steps} steps", tuned)
    rows[-1]["note"] = next(note for note in tuned.report.notes if "held-out data" in note)
    share = rows[-1]["parameters"] / 100
    for form, options in course.integers.items():
        integers = gc.compress(
            tuned.module, example, sparsity=0.0, calibration=task.calibration, progress=False, **options
        )
        tell(f"+ {form}", integers, share)
    return [{**row, "steps": steps} for row in rows]


def distilled(small: gc.CompressedModel, course: Course, steps: int) -> gc.CompressedModel:
    """Train a cut model, with the model before the cut as the teacher."""
    training = gc.Training(steps=steps, held_out=course.held_out, **learning(course))
    return gc.finetune(small, course.data, course.loss, training=training, progress=False)


def learning(course: Course) -> dict[str, Any]:
    """The options of training but for its length. AdamW in one kernel takes a sixth of the time on MiniLM's table."""
    options = {"fused": True}
    teacher = {"teacher": course.task.model, "distill": course.distill}
    return {"lr": course.lr, "clip_norm": 1.0, "options": options, **teacher}


def steps_in(seconds: float, small: gc.CompressedModel, course: Course) -> int:
    """Return how many steps take so many seconds of the CPU, by the time that some take."""
    data = Clocked(course.data)
    gc.finetune(small, data, course.loss, training=gc.Training(steps=TIMED + 2, **learning(course)), progress=False)
    return max(20, int(seconds / ((data.times[-1] - data.times[1]) / TIMED)))


class Clocked(list[Any]):
    """Batches that tell when each was asked for."""

    def __init__(self, batches: Sequence[Any]) -> None:
        super().__init__(batches)
        self.times: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.times.append(time.process_time())
            yield batch


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="minilm,stories", metavar="A,B", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=600, metavar="S", help="of training; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="one line of JSON per stage, read again")
    return parser.parse_args()


if __name__ == "__main__":
    main()
