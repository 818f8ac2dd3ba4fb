"""What a model learns from a teacher beside its task: softened logits, and hidden states of modules by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.arguments import check_whole, is_number, shown, wrong
from graphcomp.errors import PlanError

KEPT = 2**28
"""Bytes of a teacher's outputs that are kept by default: 256 MiB."""


@dataclass(frozen=True)
class Distill:
    """What a student learns from a teacher: `Training(teacher=model, distill=Distill(…))`.

    loss = task · loss(output, batch) + logits · T² KL(softmax(teacher / T) ‖ softmax(student / T))
           + embeddings · mean(1 − cosine(student, teacher))
           + hidden_weight · mean over the names of mean((student − teacher)²) / mean(teacher²)

    Every position counts in logits and embeddings, padding too: `select` may leave positions out. Where a hidden state
    of the student has another width than the teacher's, a linear map without bias goes from the student's width to the
    teacher's: the map is learned beside the model, and no part of the result. With hidden states a long cool-down
    trains with masks (`Training.shrink`).

    Attributes:
        logits: weight of the divergence; 0: the logits are not compared.
        embeddings: weight of one minus the cosine, for models whose output is a vector that is compared by its
            direction: `Distill(logits=0, embeddings=1.0)`.
        hidden: modules whose outputs are compared, by name; or names of the student's modules -> the teacher's.
        temperature: T, above 0.
        task: weight of the loss of the task. With loss=None there is none.
        hidden_weight: weight of the hidden states.
        select: returns the logits or embeddings, (…, classes), of an output of student or teacher; None: the output
            itself, or its `logits`.
        dim: of the classes, or of the embedding: 1 for maps of classes, (n, classes, h, w).
        cache: bytes of the teacher's outputs that are kept, where `data` is a list or a tuple: its batches are the same
            objects in each pass. A batch that was written into is taught anew. A DataLoader makes new batches in
            each pass, so that the teacher runs on each. 0: nothing is kept.

    Raises:
        PlanError: a weight below 0, no part with a weight, or an option of a wrong kind.

    Source: logits: Hinton et al. 2015 (arXiv 1503.02531). Hidden states with learned maps: FitNets (Romero et al. 2015,
    arXiv 1412.6550); how we differ: relative to the teacher's mean square, so that layers count alike.
    """

    logits: float = 1.0
    hidden: Sequence[str] | Mapping[str, str] = ()
    temperature: float = 2.0
    task: float = 1.0
    hidden_weight: float = 1.0
    select: Callable[[Any], Tensor] | None = None
    dim: int = -1
    cache: int = KEPT
    embeddings: float = 0.0

    def __post_init__(self) -> None:
        for name in ("logits", "embeddings", "task", "hidden_weight"):
            value = getattr(self, name)
            if not is_number(value) or not value >= 0:
                raise wrong(f"Distill: {name}", "a weight, 0 at least", value, f"{name}=1.0")
        if not is_number(self.temperature) or not self.temperature > 0:
            raise wrong("Distill: temperature", "a number above 0", self.temperature, "temperature=2.0")
        hidden: Any = self.hidden
        several = isinstance(hidden, (Mapping, list, tuple))
        entries = [*hidden, *(hidden.values() if isinstance(hidden, Mapping) else ())] if several else []
        if not several or not all(isinstance(name, str) and name for name in entries):
            fix = 'hidden=["encoder.layer.1"], or {"name in the student": "name in the teacher"}'
            raise wrong("Distill: hidden", "names of modules", self.hidden, fix)
        if self.select is not None and not callable(self.select):
            raise wrong("Distill: select", "callable", self.select, "select=lambda output: output[0]")
        if isinstance(self.dim, bool) or not isinstance(self.dim, int):
            raise wrong("Distill: dim", "a whole number", self.dim, "dim=1")
        check_whole("Distill: cache", self.cache, least=0)
        if not self.reads_output and not self.pairs():
            raise PlanError(
                "a Distill that compares nothing",
                why="logits, embeddings and hidden states have no weight",
                fix='Distill(logits=1.0), or Distill(logits=0, hidden=["encoder.layer.1"])',
            )

    @property
    def reads_output(self) -> bool:
        """Whether logits or embeddings have a weight."""
        return bool(self.logits or self.embeddings)

    def pairs(self) -> dict[str, str]:
        """Return name in the student -> name in the teacher; nothing where hidden states have no weight."""
        if not self.hidden_weight:
            return {}
        return dict(self.hidden) if isinstance(self.hidden, Mapping) else {name: name for name in self.hidden}

    @property
    def compared(self) -> str:
        """What `of` returns, in a word."""
        return "logits" if self.logits else "embeddings"

    def of(self, output: Any) -> Tensor:
        """Return the logits or embeddings of an output.

        Raises:
            PlanError: there are none, or they have a single entry: its softmax is 1 always, its cosine 1 or −1.
        """
        if self.select is None:
            found = logits_of(
                output, "Distill(select=lambda output: output[0]), or Distill(logits=0, hidden=[…])", self.compared
            )
        else:
            found = self.select(output)
        if not isinstance(found, Tensor) or not found.is_floating_point() or not -found.dim() <= self.dim < found.dim():
            raise wrong(
                f"the {self.compared}", f"a tensor of floats with a dim {self.dim}", found, "Distill(select=…, dim=-1)"
            )
        if found.shape[self.dim] < 2:
            entry, why = "entry", "the cosine of one number is its sign"
            if self.logits:
                entry, why = "class", "the softmax of one class is 1 whatever the model says"
            size = f"{found.shape[self.dim]} {entry} in dim {self.dim}"
            raise PlanError(
                f"the {self.compared} of shape {tuple(found.shape)} have {size}",
                why=why,
                fix="Distill(logits=0, hidden=[…]), or dim= the dim of the classes",
            )
        return found

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the weighted divergence of logits and distance of embeddings, of what `of` returned: ()."""
        parts = [self.logits * self.divergence(student, teacher)] if self.logits else []
        parts += [self.embeddings * direction_loss(student, teacher, self.dim)] if self.embeddings else []
        return torch.stack(parts).sum()

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return T² KL(softmax(teacher / T) ‖ softmax(student / T)), see `distillation`."""
        return distillation(student.movedim(self.dim, -1), teacher.movedim(self.dim, -1), self.temperature)

    def __str__(self) -> str:
        pairs = self.pairs()
        parts = [f"logits x {self.logits:g} at temperature {self.temperature:g}"] if self.logits else []
        parts += [f"the direction of embeddings x {self.embeddings:g}"] if self.embeddings else []
        parts += [f"{len(pairs)} hidden states x {self.hidden_weight:g}"] if pairs else []
        return " and ".join(parts)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over examples; no gradient to the teacher.

    Args:
        student, teacher: (..., classes) logits.
        temperature: T, above 0.

    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2: gradients scale as 1 / T².
    """
    log_student = F.log_softmax(student / temperature, -1).flatten(0, -2)
    log_teacher = F.log_softmax(teacher.detach() / temperature, -1).flatten(0, -2)
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def direction_loss(student: Tensor, teacher: Tensor, dim: int = -1) -> Tensor:
    """Return mean(1 − cosine(student, teacher)) over all vectors along `dim`, (); no gradient to the teacher."""
    return 1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim).mean()


def logits_of(output: Any, fix: str, what: str = "logits") -> Tensor:
    """Return the logits of an output: a tensor itself, or the entry `logits`.

    Args:
        what: the output is, in messages.

    Raises:
        PlanError: the output has none; `fix` says what to do.
    """
    found = output if isinstance(output, Tensor) else output.get("logits") if isinstance(output, Mapping) else None
    found = getattr(output, "logits", None) if found is None else found
    if not isinstance(found, Tensor) or found.dim() < 2:
        raise PlanError(f"the {what} of a {shown_kind(output)} are not known, which the student learns from", fix=fix)
    return found


def shown_kind(output: Any) -> str:
    """Return the class of an output, of a tensor with its shape."""
    return f"tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__


def check_distill(teacher: Any, distill: Any) -> None:
    """Refuse anything but a module as the teacher, and a `Distill` with one.

    Raises:
        PlanError: another kind of value, or a `Distill` without a teacher.
    """
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise wrong("teacher", "a torch.nn.Module", teacher, "teacher=model")
    if distill is not None and not isinstance(distill, Distill):
        raise wrong("distill", "a graphcomp.Distill", distill, "distill=graphcomp.Distill(temperature=2.0)")
    if distill is not None and teacher is None:
        raise PlanError(f"distill={shown(distill)} without a teacher", fix="teacher=model, distill=…")
