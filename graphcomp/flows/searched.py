"""What a method that searches before training is shown: batches to repair on, and a score of the module as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphcomp.coupling.analysis import Analysis
from graphcomp.errors import PlanError
from graphcomp.ir.inputs import copies
from graphcomp.methods.base import Goal, Method, Shown
from graphcomp.numerics.compare import floating_tensors
from graphcomp.pruning.evidence import Loss, arguments_like
from graphcomp.torch_compat import pytree
from graphcomp.training import distributed
from graphcomp.training.batches import first_batches, to_device
from graphcomp.training.folder import LOSS_CODE
from graphcomp.training.identity import about_model, code_digest, tensors_digest
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.whole import Whole, in_eval_mode

SAMPLES = 512
"""Samples that plans are repaired on, and that plans are scored on, at most; and the rest of a batch."""


def without_training(stages: Sequence[Method], training: Training | None) -> bool:
    """Whether the search alone is asked for: one method that searches, and no length."""
    no_length = training is None or (training.epochs is training.steps is training.schedule is None)
    return len(stages) == 1 and stages[0].searches and no_length


def check_untrained(training: Training | None, title: str) -> None:
    """Refuse options of training beside a search alone; a folder holds the search.

    Raises:
        PlanError: there are some, and nothing is trained.
    """
    if training is None:
        return
    plain = Training()
    pairs = {own.name: (getattr(training, own.name), getattr(plain, own.name)) for own in fields(Training)}
    given = [name for name, (own, usual) in pairs.items() if not (own is usual or _equal(own, usual))]
    if idle := [name for name in given if name != "folder"]:
        raise PlanError(
            f"{', '.join(idle)} with method={title!r}, and no length of training",
            why="without a length the best plan is the result, and nothing is trained",
            fix=f"epochs=10, with data and a loss; or leave {idle[0]} out",
        )


def _equal(own: object, usual: object) -> bool:
    return type(own) is type(usual) and own == usual


def batches_to_search(
    calibration: Iterable[Any] | None, data: Iterable[Any] | None, seed: int
) -> tuple[list[Any], list[Any], Iterable[Any] | None]:
    """Return batches to repair on, batches to score on, and the data, which hold their batches still.

    Plans are repaired on `calibration` and scored on the first `data`. Where one of the two is given, every other batch
    is for the score; a single batch is for both.

    Raises:
        PlanError: neither is given.
    """
    repairs = None if calibration is None else list(calibration)
    scores = None
    if data is not None:
        scores, data = first_batches(data, seed)
        scores = _first(scores)
    if repairs is None and scores is None:
        raise PlanError(
            "a search without data",
            why="plans are repaired on batches, and compared on others",
            fix="calibration=[batch, …]; or data=loader, loss=lambda output, batch: …",
        )
    if repairs is None or scores is None:
        both = repairs if scores is None else scores
        assert both is not None
        repairs, scores = (both[::2], both[1::2]) if len(both) > 1 else (both, both)
    return _first(repairs), scores, data


def _first(batches: Sequence[Any]) -> list[Any]:
    """Return the first batches, the last of which reaches `SAMPLES` samples."""
    found: list[Any] = []
    count = 0
    for batch in batches:
        found.append(batch)
        count += next((len(t) for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.dim()), 1)
        if count >= SAMPLES:
            break
    return found


@dataclass(frozen=True, eq=False)
class Search:
    """Lets methods search on data, with the module in eval mode; random states are as before.

    Several processes search together: all begin with the module of the first one, each repairs and scores plans on
    batches of its own, a score is the mean over processes, and all end with the module of the first one.

    Attributes:
        rows: plan of the prepared module -> flat inputs of the graph, which plans are repaired on.
        batches: in the form of the whole model's inputs, to score on.
        loss: of an output and a batch; None: plans are scored by the error of the outputs.
        repair: whether layers behind units that go are repaired.
        seed: of everything that is drawn.
    """

    rows: Callable[[Analysis], Sequence[Sequence[Any]]]
    batches: Sequence[Any]
    loss: Loss | None
    repair: bool
    seed: int

    def __call__(
        self,
        method: Method,
        ready: Prepared,
        goal: Goal,
        whole: Whole,
        rows: Sequence[Sequence[Any]],
        folder: str | Path | None,
        said: Callable[[str], None],
    ) -> None:
        """Search, and let `ready` be as found.

        Args:
            whole: the model that `ready` stands in.
            rows: what `self.rows` gave.
            folder: of the run.
            said: takes a text on how far the search is.
        """
        kept = None if folder is None else Path(folder)
        device = next(ready.parameters()).device
        shared = (*whole.module.parameters(), *whole.module.buffers())
        distributed.copy_from_first(shared)
        batches = [to_device(batch, device) for batch in self.batches]
        with in_eval_mode(whole.module), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            outputs = _Outputs(whole, batches)
            about = {} if kept is None else self._about(ready, whole, rows, batches)
            loss = self.loss
            if loss is None:
                with ready.in_floats():
                    outputs.remember()
            score = outputs.closeness if loss is None else lambda: -outputs.loss(loss)
            method.search(ready, goal, Shown(rows, score, self.repair, kept, about, self.seed, said))
        distributed.copy_from_first(shared)

    def _about(
        self, ready: Prepared, whole: Whole, rows: Sequence[Sequence[Any]], batches: Sequence[Any]
    ) -> dict[str, str]:
        tensors = (leaf for leaf in pytree.tree_leaves([list(rows), list(batches)]) if isinstance(leaf, Tensor))
        return {
            **about_model(ready, whole.module, whole.outside()[0]),
            "data of the search": " ".join(distributed.gathered(tensors_digest(tensors))),
            LOSS_CODE: "" if self.loss is None else code_digest(self.loss),
            "seed": str(self.seed),
            "repair": str(self.repair),
        }


class _Outputs:
    """The outputs of the whole model on the batches that are scored."""

    def __init__(self, whole: Whole, batches: Sequence[Any]) -> None:
        self.whole, self.batches = whole, batches
        self.wanted: list[list[Tensor]] = []

    @torch.no_grad()
    def _run(self, batch: Any) -> Any:
        whole = self.whole
        args, kwargs = copies(arguments_like(whole.original, whole.args, whole.kwargs, batch))
        return whole.module(*args, **kwargs)

    def remember(self) -> None:
        """Keep the outputs as they are now."""
        self.wanted = [floating_tensors(self._run(batch)) for batch in self.batches]
        if not any(self.wanted):
            raise PlanError(
                "no output is of floats, so nothing says what a plan is worth",
                fix="data=loader, loss=lambda output, batch: …; or Ajpq(evaluate=…)",
            )

    def closeness(self) -> float:
        """Return - Σ ||y - t||² / Σ ||t||², t as remembered."""
        error = norm = 0.0
        for wanted, batch in zip(self.wanted, self.batches, strict=True):
            for t, y in zip(wanted, floating_tensors(self._run(batch)), strict=True):
                error += float((y.double() - t.double()).square().sum())
                norm += float(t.double().square().sum())
        return -error / norm if norm else 0.0

    @torch.no_grad()
    def loss(self, loss: Loss) -> float:
        """Return the mean loss over batches."""
        return sum(float(loss(self._run(batch), batch)) for batch in self.batches) / len(self.batches)
