"""Saliency "repairable": the error that is left after the optimal repair, optimal brain surgeon over whole units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from graphcomp.arguments import check_callable, check_number, check_whole
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.errors import PlanError
from graphcomp.pruning.evidence import Evidence, NotedScores, Scores, arguments_of, notes_of
from graphcomp.pruning.grams import RIDGE, STEPS, errors_left, grams, row_counts, uneven
from graphcomp.pruning.influence import rows_alike
from graphcomp.pruning.least_squares import ROWS
from graphcomp.pruning.readers import find_readers
from graphcomp.pruning.repair import within_memory

SMALLEST_RIDGE = 1e-14
"""λ below which H is as good as singular in float64."""


@dataclass(frozen=True)
class Repairable:
    """Relative squared error of the layers that read a unit, once all other inputs make up for the unit's loss.

        err_u = Σ over readers of tr(W_u (H⁻¹_uu)⁻¹ W_uᵀ) / Σ y²

    Units leave one after the other, the cheapest first, and what stays makes up for each (greedy, with downdates of W
    and H⁻¹): two units that stand in for one another do not both count as free. A unit of several indices (a head) is a
    block.

    Source: Frantar and Alistarh, ZipLM, 2023, eq. 2 and algorithm 1; summed over readers, each relative to its output.

    Attributes:
        ridge: λ in H = Σ x xᵀ + λ · mean diag · I; tenfold until H can be factored.
        rows: of each layer at most, or ten for each feature where that is more.
        steps: downdates of a group at most; a group of more units loses several at a time.
        fallback: scores the groups whose readers have no closed form. None: they are an error.
    """

    ridge: float = RIDGE
    rows: int = ROWS
    steps: int = STEPS
    fallback: Callable[[Evidence], Scores] | None = None

    def __post_init__(self) -> None:
        check_number("ridge", self.ridge, SMALLEST_RIDGE, fix=f"ridge={RIDGE}")
        check_whole("rows", self.rows)
        check_whole("steps", self.steps)
        if self.fallback is not None:
            check_callable("fallback", self.fallback, "fallback=Magnitude()")

    def __call__(self, evidence: Evidence) -> Scores:
        """(size,) per group, without unit; needs data.

        Raises:
            PlanError: there are no data, the model could only be recorded, or a group has no closed form.
            CalibrationError: the model does not run on a batch, or values are not finite.
        """
        plan = evidence.analysis
        captured = plan.captured
        if captured.producer == "record":
            raise PlanError(
                "saliency 'repairable' needs a graph that runs, and the model could only be recorded",
                why=f"torch.export refused: {captured.reason}",
                fix='saliency="l2"',
            )
        batches = (
            []
            if evidence.data is None
            else [captured.inputs.of(*arguments_of(captured, b)).flat() for b in evidence.data]
        )
        if not batches:
            raise PlanError("saliency 'repairable' needs activations, and there is no data", fix="data=[batch, …]")
        readers = find_readers(plan, evidence.groups)
        left: dict[ChannelGroup, str] = dict(readers.left)
        found: dict[ChannelGroup, Tensor] = {}
        used = dict(enumerate(within_memory(captured.module, batches)))
        counted, alike = row_counts(plan, readers, used), dict[str, list[str]]()
        for group, own in grams(plan, readers, used, self.rows, counted.present()):
            why = own if isinstance(own, str) else uneven(own, group.size)
            if isinstance(own, str) or why:
                left[group] = why
            else:
                found[group] = errors_left(own, group.size, ridge=self.ridge, steps=self.steps)
                if said := counted.alike(reader.consumer for reader in readers.of[group]):
                    alike.setdefault(said, []).append(group.name)
        notes = [f"saliency 'repairable': {said}" for said in rows_alike(alike)]
        others = self._others(evidence, left)
        return NotedScores({**found, **others}, [*notes, *notes_of(others)])

    def _others(self, evidence: Evidence, left: dict[ChannelGroup, str]) -> Scores:
        """Return the scores of groups without a closed form."""
        if not left:
            return {}
        if self.fallback is None:
            group, why = next(iter(left.items()))
            raise PlanError(
                f"saliency 'repairable' cannot score {len(left)} of {len(evidence.groups)} groups",
                why=f"{group.name}: {why}",
                fix="saliency=Repairable(fallback=Magnitude()), or leave these groups out",
            )
        return self.fallback(evidence.of(tuple(left)))
