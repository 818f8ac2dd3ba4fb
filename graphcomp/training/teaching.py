"""A teacher beside a model that is trained: its outputs, kept where batches stay the same, and the loss of both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.capture.capture import user_line
from graphcomp.errors import GraphcompError, PlanError, TrainingError, first_line
from graphcomp.ir.inputs import copies
from graphcomp.ir.module import CapturedModule, tensor_leaves, tensor_names
from graphcomp.ir.module_copy import module_copy, own_memory
from graphcomp.ir.preserve import same_buffers
from graphcomp.pruning.evidence import Loss
from graphcomp.torch_compat import version_of
from graphcomp.training.distill import Distill
from graphcomp.training.hidden import hearing
from graphcomp.training.identity import code_digest, name_of, tensors_digest
from graphcomp.training.whole import in_eval_mode


@dataclass
class Taught:
    """What the teacher says of a batch, without gradients.

    Attributes:
        output: logits or embeddings, (…, classes); None where they are not compared.
        hidden: name in the student -> output of the teacher's module.
    """

    output: Tensor | None
    hidden: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        held = [*self.hidden.values(), *([] if self.output is None else [self.output])]
        return sum(t.numel() * t.element_size() for t in held)


@dataclass
class _Kept:
    given: Any
    versions: tuple[int, ...]
    taught: Taught


class Teaching(nn.Module):
    """Loss of a task and of a teacher's outputs. The module's own parameters are the maps between hidden states.

    The teacher runs in eval mode, without gradients, on buffers of its own; it is not modified.

    Attributes:
        distill: what is learned.
        maps: of each hidden state whose width differs, a linear map to the teacher's width, in the order of the names.

    Args:
        teacher: takes the inputs of the student.
        student: is run once on the example inputs, in eval mode.
        args, kwargs: example inputs of the student.
        seed: of the maps.
        keeps: whether batches stay the same objects, so that what the teacher says may be kept.

    Raises:
        PlanError: the teacher is on another device, does not run on the inputs, or does not fit the student.
    """

    def __init__(
        self,
        teacher: nn.Module,
        distill: Distill,
        student: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        seed: int = 0,
        keeps: bool = False,
    ) -> None:
        super().__init__()
        _check_device(teacher, student)
        self.distill, self.kind, self.original = distill, type(teacher).__name__, (teacher,)
        self.keeps = keeps and distill.cache > 0
        self.pairs = distill.pairs()
        self._teacher = (_to_run(teacher),)  # in a tuple: no submodule, whose weights would be this module's
        self._kept: dict[int, _Kept] = {}
        self._bytes = 0
        self._heard: list[tuple[Any, Mapping[str, Tensor]]] = []
        self._taught = Taught(None)
        self.axes: dict[str, int] = {}
        self.maps = nn.ModuleList()
        self.mapped: list[str] = []
        self._fit(student, args, kwargs, seed)

    # ------------------------------------------------------------------------------------------ a batch
    def begin(self, given: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Let the teacher say what the loss of a batch is of.

        Args:
            given: the batch as the data give it.
            args, kwargs: what the student is called with.

        Raises:
            TrainingError: the teacher does not run on the batch.
        """
        self._heard = []
        versions = _versions(given)
        known = self._kept.get(id(given))
        if known is not None and known.given is given and known.versions == versions:
            self._taught = known.taught
            return
        self._taught = self._teach(args, kwargs)
        if known is not None:
            self._bytes -= self._kept.pop(id(given)).taught.bytes
        if self.keeps and self._bytes + self._taught.bytes <= self.distill.cache:
            self._kept[id(given)] = _Kept(given, versions, self._taught)
            self._bytes += self._taught.bytes

    @contextmanager
    def listening(self, student: nn.Module) -> Iterator[Callable[[Any], None]]:
        """Hear hidden states of the student inside; the function that is yielded takes the output of the run."""
        if not self.pairs:
            yield lambda output: None
            return
        with hearing(student, self.pairs, "the student") as found:
            yield lambda output: self.heard(output, found)

    def heard(self, output: Any, hidden: Mapping[str, Tensor]) -> None:
        """Take what the student's modules gave in the run that returned `output`."""
        self._heard.append((output, hidden))

    def loss(self, task: Loss | None, output: Any, batch: Any) -> Tensor:
        """Return the loss of an output of the student, (): of the task, and of what the teacher says of the batch.

        Raises:
            PlanError: the output does not fit the teacher's.
        """
        distill, taught = self.distill, self._taught
        parts = [] if task is None or not distill.task else [distill.task * task(output, batch)]
        if taught.output is not None:
            student = distill.of(output)
            _check_shapes(distill.compared, student, taught.output)
            parts.append(distill.distance(student, taught.output))
        if self.pairs:
            heard = next((found for own, found in reversed(self._heard) if own is output), None)
            if heard is None:
                raise PlanError(
                    "the loss is of an output that the student has not returned",
                    why="hidden states are those of the run that gave the output",
                    fix="loss(output, batch) with the very output of forward(batch)",
                )
            distances = [self._distance(name, heard[name], wanted) for name, wanted in taught.hidden.items()]
            parts.append(distill.hidden_weight * torch.stack(distances).mean())
        return torch.stack([part.reshape(()) for part in parts]).sum()

    def _distance(self, name: str, own: Tensor, wanted: Tensor) -> Tensor:
        """Return mean((map(own) − wanted)²) / mean(wanted²)."""
        own, wanted = own.float(), wanted.float()
        if name in self.mapped:
            dim = self.axes[name]
            own = self.maps[self.mapped.index(name)](own.movedim(dim, -1)).movedim(-1, dim).float()
        _check_shapes(f"hidden state {name!r}", own, wanted)
        energy = wanted.square().mean().clamp_min(torch.finfo(wanted.dtype).tiny)
        return (own - wanted).square().mean() / energy

    # ------------------------------------------------------------------------------------------ the teacher
    @torch.no_grad()
    def _teach(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Taught:
        (teacher,) = self._teacher
        given, named = copies((args, dict(kwargs)))
        still = same_buffers(teacher) if isinstance(teacher, CapturedModule) else nullcontext()
        with still, hearing(teacher, self.pairs.values(), "the teacher") as found:
            try:
                output = teacher(*given, **named)
            except GraphcompError:
                raise
            except Exception as error:  # whatever the teacher raises
                raise TrainingError(
                    f"the teacher, a {self.kind}, does not run on a batch that the student takes",
                    at=user_line(error),
                    why=f"{type(error).__name__}: {first_line(error)[:300]}",
                    fix="a teacher that takes the student's inputs: a module around it may translate them",
                ) from error
        silent = [name for name in self.pairs.values() if name not in found]
        if silent:
            raise PlanError(
                f"the teacher's module {silent[0]!r} returns no tensor of floats, or is not called",
                fix="hidden= names of modules that each run calls",
            )
        told = self.distill.of(output).detach() if self.distill.reads_output else None
        return Taught(told, {name: found[other].detach() for name, other in self.pairs.items()})

    def _fit(self, student: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int) -> None:
        """Compare shapes on the example inputs, and make the maps that hidden states need.

        Raises:
            PlanError: shapes do not fit.
        """
        cuda = sorted({p.device.index or 0 for p in student.parameters() if p.is_cuda})
        with torch.random.fork_rng(devices=cuda):
            try:
                taught = self._teach(args, kwargs)
            except TrainingError as error:
                raise PlanError(error.what, at=error.at, why=error.why, fix=error.fix) from error
            given, named = copies((args, dict(kwargs)))
            inner = in_eval_mode(student)
            with inner, torch.no_grad(), hearing(student, self.pairs, "the student") as found:
                output = student(*given, **named)
            if taught.output is not None:
                _check_shapes(self.distill.compared, self.distill.of(output), taught.output)
            torch.manual_seed(seed)
            for name, wanted in taught.hidden.items():
                if name not in found:
                    raise PlanError(f"the student's module {name!r} returns no tensor of floats, or is not called")
                self._map(name, found[name], wanted)

    def _map(self, name: str, own: Tensor, wanted: Tensor) -> None:
        """Make a map where one dim of a hidden state differs."""
        if own.shape == wanted.shape:
            return
        same_rank = own.dim() == wanted.dim()
        dims = [d for d in range(own.dim()) if own.shape[d] != wanted.shape[d]] if same_rank else []
        if len(dims) != 1 or dims == [0]:
            _check_shapes(f"hidden state {name!r}", own, wanted)
        made = nn.Linear(own.shape[dims[0]], wanted.shape[dims[0]], bias=False)
        nn.init.orthogonal_(made.weight)
        self.axes[name] = dims[0]
        self.mapped.append(name)
        self.maps.append(made.to(own.device))

    # ------------------------------------------------------------------------------------------ words
    def about(self) -> dict[str, str]:
        """Return what tells this teacher from another one, for the folder of a run."""
        (teacher,), distill = self.original, self.distill
        numbers = (distill.logits, distill.temperature, distill.task, distill.hidden_weight, distill.dim)
        direction = f", embeddings {distill.embeddings}" if distill.embeddings else ""
        select = "" if distill.select is None else f", {name_of(distill.select)} {code_digest(distill.select)}"
        return {
            "teacher": f"{self.kind} {tensors_digest(tensor_names(teacher).values())}",
            "distill": f"{numbers}, {self.pairs}{direction}{select}",
        }

    def note(self, task: bool) -> str:
        """Say what was learned, for the report."""
        own = f"the loss of the task x {self.distill.task:g}" if task and self.distill.task else "no loss of a task"
        kept = "kept for batches of the list" if self.keeps else "computed for each batch anew"
        maps = f"; {len(self.maps)} of the hidden states by a learned map" if len(self.maps) else ""
        return f"learned from a {self.kind}: {self.distill}{maps}, beside {own}; the teacher's outputs were {kept}"


def _to_run(teacher: nn.Module) -> nn.Module:
    """Return a copy in eval mode that shares the parameters, and has buffers of its own."""
    inner: Any = teacher
    if any(isinstance(module, CapturedModule) for module in inner.modules()):
        deep: nn.Module = copy.deepcopy(inner).eval()
        return deep  # ops of a graph follow the mode, so that the graph is copied, too
    copied = module_copy(inner, own_memory(list(tensor_names(inner).values())))
    for module in copied.modules():
        module.training = False
    return copied


def _check_device(teacher: nn.Module, student: nn.Module) -> None:
    """Raise PlanError where the teacher is on another device than the student."""
    held = [{t.device for t in tensor_names(module).values()} for module in (teacher, student)]
    if strange := held[0] - held[1]:
        own = ", ".join(sorted(map(str, held[1]))) or "cpu"
        raise PlanError(
            f"the teacher must be on the device of the student, {own}, got {', '.join(sorted(map(str, strange)))}",
            fix=f"teacher=teacher.to({own!r})",
        )


def _check_shapes(what: str, student: Tensor, teacher: Tensor) -> None:
    """Raise PlanError where shapes differ."""
    if student.shape != teacher.shape:
        raise PlanError(
            f"{what} of the student must have the shape of the teacher's, got {tuple(student.shape)} for "
            f"{tuple(teacher.shape)}",
            why="logits are compared class by class, and a learned map of a hidden state changes one width",
            fix="a teacher with the same outputs, or Distill(select=…) that returns what both have",
        )


def _versions(given: Any) -> tuple[int, ...]:
    """Return how often each tensor of a batch was written into."""
    return tuple(-1 if t.is_inference() else version_of(t) for t in tensor_leaves(given))
