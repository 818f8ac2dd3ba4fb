"""OPQ: which weights go, and the steps and bits of each layer, planned once from the weights; then weights are trained.

The plan takes no data: `graphcomp/pruning/analytic.py` says how many weights of each layer go, and
`graphcomp/quantization/analytic.py` the steps and bits. All channels of a layer share one step. The plan is fixed while
weights are trained by the straight-through estimator; pruned weights get no gradient.

Source: One-shot Pruning-Quantization (Hu et al. 2021, arXiv 2205.11141), reconstructed from its structure: the paper's
weights of layers (omega) could not be read, and no code is public. Ours are: omega as an option, steps that clip where
the error is less (the closed form of high rates is `closed_steps`), the search for whole bits, and units in place of
weights, whose density is not Laplace's, so that their energies are ranked as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from graphcomp.arguments import check_word
from graphcomp.cost.conventions import Convention
from graphcomp.coupling.groups import Kept
from graphcomp.errors import NothingToPrune, PlanError
from graphcomp.ir.graph import module_path
from graphcomp.methods.base import Goal, Method, Source, of_activations, refuse
from graphcomp.methods.geta.units import nothing_trainable, trainable
from graphcomp.methods.sizes import bytes_within, check_sized
from graphcomp.pruning.allocation import allocate, rounding_note
from graphcomp.pruning.analytic import Density, Omega, analytic_masks, omegas, unit_errors
from graphcomp.quantization.analytic import step_errors, whole_bits
from graphcomp.quantization.quantizers.symmetric import SymmetricQuantizer
from graphcomp.quantization.sites import Site
from graphcomp.quantization.spec import ACTIVATIONS, MIN_BITS, QuantConfig, QuantSpec
from graphcomp.training.elements import drop_gradients, multiplied, pruned_counts
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Choice, Run
from graphcomp.training.schedule import Schedule, is_number

SPARSITY = 0.5
"""Share that goes where none is given."""

FULL_RANGE = 8
"""Bits of activations from which on levels reach the largest value; with fewer, the range has the least error."""


class OpqRun(Run):
    """Trains weights with masks, units and steps fixed.

    Attributes:
        masks: parameter -> bool mask, False where a weight is pruned.
    """

    name: ClassVar[str] = "opq"

    def __init__(
        self,
        ready: Prepared,
        masks: Mapping[str, Tensor],
        kept: Kept,
        *,
        about: Mapping[str, str] | None = None,
        lr_quant: float | None = None,
    ) -> None:
        super().__init__(ready, lr_quant=lr_quant)
        self.masks, self.about = dict(masks), about or {}
        self.kept = {group: kept.get(group, units) for group, units in self.kept.items()}
        ready.keep_elements(self.masks)

    def before_step(self, step: int) -> None:
        """Take the gradients of pruned weights away, which momentum would gather."""
        super().before_step(step)
        drop_gradients(self.ready, self.masks)

    def metrics(self) -> dict[str, Any]:
        """How many weights are pruned, too."""
        return {**super().metrics(), **pruned_counts(self.masks)}

    def choice(self) -> Choice:
        """The plan's."""
        return Choice(self.kept, self.masks)

    def state_dict(self) -> dict[str, Any]:
        """The masks."""
        return {"masks": self.masks}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on where `state_dict` was taken."""
        self.masks = {name: state["masks"][name].to(mask.device) for name, mask in self.masks.items()}
        self.ready.keep_elements(self.masks)


@dataclass(frozen=True)
class Opq(Method):
    """Plans which weights go and how the rest is rounded, from the weights alone, and trains with the plan fixed.

    `bits=4` gives each layer 4 bits. With a range, `bits=(2, 8)`, layers get bits of their own, within
    `budget=Budget(bytes=…)` by `convention`, or of `mean_bits` per weight that stays.

    Attributes:
        per: "element": single weights go; "unit": channels, heads and features, which are cut.
        omega: what the sum of errors is of, see `graphcomp.pruning.analytic.OMEGAS`.
        density: "laplace", or "empirical": each weight is ranked; units always are.
        mean_bits: bits per weight that stays, with a range of bits and no budget.
        convention: that a budget on bytes counts by: "C0" (nonzeros times bits), "C3" (and a bitmap).
    """

    name: ClassVar[str] = "opq"
    prunes = True
    quantizes = True
    per: Literal["element", "unit"] = "element"
    omega: Omega = "mean"
    density: Density = "laplace"
    mean_bits: float | None = None
    convention: Convention | None = "C0"

    def __post_init__(self) -> None:
        check_word("per", self.per, ("element", "unit"))
        check_word("omega", self.omega, get_args(Omega))
        check_word("density", self.density, get_args(Density))
        check_word("convention", self.convention, ("C0", "C3"))
        if self.mean_bits is not None and not (is_number(self.mean_bits) and self.mean_bits >= MIN_BITS):
            fix = "method=Opq(mean_bits=4.0)"
            raise PlanError(f"Opq(mean_bits={self.mean_bits!r}): must be a number, {MIN_BITS} at least", fix=fix)

    # ------------------------------------------------------------------------------------------ what is asked
    def takes(self, goal: Goal) -> Collection[str]:
        """A budget on bytes; what units go by; bits of activations where they are a number of their own."""
        units = ("round_to", "prune", "keep_inputs") if self.per == "unit" else ()
        return {"budget", *units, *(of_activations(goal) if isinstance(goal.activation_bits, int) else ())}

    def check(self, goal: Goal) -> None:
        """A share of weights or units; bits with one of: a number, a budget, a mean."""
        check_sized(goal.budget, self.name, goal.bits is not None)
        given = [what for what, own in (("a budget", goal.budget), ("mean_bits", self.mean_bits)) if own is not None]
        ranged = goal.bits is not None and goal.bits[0] != goal.bits[1]
        if (ranged and len(given) != 1) or (not ranged and given):
            bits = goal.bits if ranged or goal.bits is None else goal.bits[0]
            raise PlanError(
                f"method='opq' with bits={bits} and {' and '.join(given) or 'neither a budget nor mean_bits'}",
                why="within a range, layers get bits of their own, as a budget or a mean allows",
                fix="bits=(2, 8), method=Opq(mean_bits=4); or bits=4 for each layer",
            )
        if goal.bits is not None and self.mean_bits is not None:
            low, high = goal.bits
            if not low <= self.mean_bits <= high:
                raise PlanError(
                    f"mean_bits must be within bits={goal.bits}, got {self.mean_bits}",
                    fix=f"Opq(mean_bits={(low + high) / 2})",
                )

    # ------------------------------------------------------------------------------------------ the plan
    def prepare(self, source: Source, goal: Goal) -> Prepared:
        """Stand a quantizer on each weight, one step per layer, with bits and steps as planned."""
        if goal.bits is None:
            return source()
        ready = source(config=_config(goal, {}))
        bits = self._layer_bits(ready, goal)
        if len(set(goal.bits)) > 1:
            ready = source(config=_config(goal, bits))
        _set_steps(ready, self._left(ready, goal))
        ready.remarks = (*ready.remarks, *_remarks(ready, goal, bits))
        return ready

    def prune(self, ready: Prepared, goal: Goal) -> tuple[dict[str, Tensor], Kept]:
        """Return masks of weights, or the units that stay, of a share of all; weights of zero are the first to go."""
        share = _share(goal)
        if not share:
            return {}, {}
        if self.per == "element":
            weights = multiplied(ready)
            if not weights:
                raise NothingToPrune("OPQ finds no weight to prune", fix="requires_grad_(True), or less ignore=")
            return analytic_masks(weights, share, self.omega, self.density), {}
        groups = trainable(ready, ready.session.groups)
        if not groups:
            raise nothing_trainable()
        errors = unit_errors(ready.session.quantized, groups, self.omega)
        kept = allocate(
            groups, errors, sparsity=share, normalize="none", round_to=goal.round_to, already=ready.kept(), nearest=True
        )
        return {}, kept

    def _left(self, ready: Prepared, goal: Goal) -> dict[str, Tensor]:
        """Return quantizer -> weight, with zeros where pruned, of the quantizers that read a parameter."""
        masks, kept = self.prune(ready, goal)
        if kept:
            ready.keep(kept)
        found = {}
        for site in _sites(ready):
            weight = ready.get_parameter(site.parameter).detach()
            mask = masks.get(site.parameter)
            found[site.name] = weight if mask is None else weight.masked_fill(~mask, 0)
        return found

    def _layer_bits(self, ready: Prepared, goal: Goal) -> dict[str, int]:
        """Return module -> bits of its weights."""
        assert goal.bits is not None
        parts = _parts(ready)
        if goal.bits[0] == goal.bits[1]:
            return {path: goal.bits[0] for part in parts for path in sorted(part.paths)}
        choices = range(goal.bits[0], goal.bits[1] + 1)
        left = self._left(ready, goal)
        weights = [[left[name] for name in part.names] for part in parts]
        counts = [sum(int((weight != 0).sum()) for weight in own) for own in weights]
        scales = [sum(float(w.abs().sum()) for w in own) / max(n, 1) for own, n in zip(weights, counts, strict=True)]
        factors = omegas([max(n, 1) for n in counts], scales, self.omega)
        squares = [[_errors(weight, choices) for weight in own] for own in weights]
        errors = [
            [factor / max(n, 1) * sum(of_weight[k] for of_weight in of_part) for k in range(len(choices))]
            for of_part, factor, n in zip(squares, factors, counts, strict=True)
        ]
        if goal.budget is None:
            assert self.mean_bits is not None
            budget = self.mean_bits * sum(counts)
        else:
            total = sum(weight.numel() for own in weights for weight in own)
            budget = 8 * bytes_within(goal.budget, total) - (total if self.convention == "C3" else 0)
        chosen = zip(parts, whole_bits(counts, errors, choices, budget), strict=True)
        return {path: n for part, n in chosen for path in sorted(part.paths)}

    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> OpqRun:
        """Begin a run."""
        refuse(self, {"a Schedule": isinstance(training.schedule, Schedule)}, "its stages are GETA's; give steps")
        masks, kept = self.prune(ready, goal)
        density = "" if kept or self.density == "laplace" else ", weights ranked as they are"
        ready.remarks = (*ready.remarks, f"planned by the errors of omega={self.omega!r}{density}")
        if note := rounding_note(tuple(kept), kept, _share(goal), goal.round_to) if kept else "":
            ready.remarks = (*ready.remarks, note)
        options = {name: getattr(self, name) for name in ("per", "omega", "density", "mean_bits", "convention")}
        asked = {"sparsity": goal.sparsity, "bits": goal.bits, "budget": goal.budget}
        about = {name: str(value) for name, value in {**options, **asked}.items()}
        return OpqRun(ready, masks, kept, about=about, lr_quant=training.lr_quant)


def _share(goal: Goal) -> float:
    """Return the share that goes."""
    assert not isinstance(goal.sparsity, Mapping)
    return SPARSITY if goal.sparsity is None else goal.sparsity


# ------------------------------------------------------------------------------------------------ quantizers
def _config(goal: Goal, bits: Mapping[str, int]) -> QuantConfig:
    """Return where quantizers stand: one step per weight, modules with bits of their own, the first and last too."""
    assert goal.bits is not None
    activations = None
    if isinstance(goal.activation_bits, int):
        observer: Literal["minmax", "mse"] = "minmax" if goal.activation_bits >= FULL_RANGE else "mse"
        activations = replace(ACTIVATIONS, bits=goal.activation_bits, observer=observer)
    own = {name: (QuantSpec(n), activations) for name, n in sorted(bits.items())}  # parents in front
    least = MIN_BITS if activations is None else goal.bits[0]
    return QuantConfig(QuantSpec(goal.bits[1]), activations, first_and_last_bits=least, overrides=own)


def _sites(ready: Prepared) -> list[Site]:
    """Return the quantizers that read a parameter."""
    return [site for site in ready.session.sites if site.is_weight and site.parameter]


@dataclass
class _Part:
    """Quantizers that have bits together, as ops of one module read them, or one op of each of several.

    Attributes:
        paths: of the modules.
        names: of the quantizers.
    """

    paths: set[str]
    names: list[str]


def _parts(ready: Prepared) -> list[_Part]:
    """Return the quantizers that read a parameter, by the modules whose ops read them, in the order of the graph."""
    nodes = {node.name: node for node in ready.session.quantized.captured.module.graph.nodes}
    found: list[_Part] = []
    for site in _sites(ready):
        users = (user for own in site.at.values() for user in own)
        part = _Part({module_path(nodes[user]) for user in users if user in nodes} or {site.layer}, [])
        for other in [other for other in found if other.paths & part.paths]:
            found.remove(other)
            part = _Part(other.paths | part.paths, [*part.names, *other.names])
        part.names.append(site.name)
        found.append(part)
    return found


def _errors(weight: Tensor, choices: Sequence[int]) -> list[float]:
    return [error for _, error in step_errors(weight, choices)]


@torch.no_grad()
def _set_steps(ready: Prepared, left: Mapping[str, Tensor]) -> None:
    """Fix the step of each quantizer at that of least error on the weights that stay."""
    for name, weight in left.items():
        quantizer = ready.get_submodule(name)
        assert isinstance(quantizer, SymmetricQuantizer)
        ((step, _),) = step_errors(weight, (quantizer.spec.bits,))
        quantizer.scale.fill_(step).requires_grad_(False)


def _remarks(ready: Prepared, goal: Goal, bits: Mapping[str, int]) -> Iterable[str]:
    """Say which bits were chosen, and what was not planned."""
    assert goal.bits is not None
    if goal.activation_bits == "same":
        yield "activations stay float: OPQ plans weights; activation_bits=8 quantizes activations, too"
    if len(set(goal.bits)) > 1:
        yield f"bits of each layer, planned: {', '.join(f'{site.layer} {site.high}' for site in _sites(ready))}"
    own = {name: bits.get(path) for part in _parts(ready) for name in part.names for path in part.paths}
    other = [f"{site.layer} ({site.high})" for site in _sites(ready) if site.high != own[site.name]]
    if other:
        yield f"bits are not as planned, as the op is in no module of its own: {', '.join(other)}"
    if computed := [site.layer for site in ready.session.sites if site.is_weight and not site.parameter]:
        yield f"steps were not planned of weights that are computed, and are trained: {', '.join(computed)}"
