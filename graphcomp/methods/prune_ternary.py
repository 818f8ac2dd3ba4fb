"""Pruning to ternary weights: filters are pruned, pulled to their ternary directions, and end there.

Of a filter w, with v = w / ||w|| and the mask M of what is kept (`graphcomp.quantization.ternary_direction`):

    pruning       floats; the share that is pruned rises on a cubic schedule, the largest |v| of each layer stay
                      forward  s v M
    ternary       T = sign(v) M / sqrt(k); the share eta of T in the forward pass rises from 0 to 1
                      forward  s ((1 - eta) v M + eta T)       backward  g 1[|v| <= c]
                      after each step  v <- v + lambda (T - v), with lambda rising from 0 to `pull`
    final         M stays; lambda rises to 1, until cos(v, T) > 0.999 for all filters; then weights are s T, their signs
                  stay, and all else trains on: norms, biases, layers with more bits

The scale: where a batch norm that follows the mode stands behind the layer, filters are normalised to the norm s that
each began with, and the scale of T is s, which the norm absorbs. Elsewhere filters keep their norms, the scale is that
of least squared error, alpha = mean of kept |w|, and is trained in the last stage once weights are ternary.

Source: Pruning Ternary Quantization (Liu et al. 2021, arXiv 2107.10998), reconstructed from the abstracts: no code is
public. Ours: the pull is decoupled from the gradient, as AdamW's decay is, so that its strength depends on no learning
rate; the schedule of eta; each filter keeps a weight, and layers of small filters leave
what they cannot give to the others; gradients also reach pruned weights until the mask stays, so that
weights can return; the first and the last layer have 8 bits by default.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from graphcomp.arguments import check_word
from graphcomp.errors import NothingToPrune, PlanError
from graphcomp.methods.base import Goal, Method, Source, refuse
from graphcomp.methods.pqk import sparsity_at
from graphcomp.methods.ternary import check_two_bits, with_ternary_weights
from graphcomp.pruning.evidence import Loss
from graphcomp.quantization.calibrate import calibrate_weight
from graphcomp.quantization.placed import switched_off
from graphcomp.quantization.quantizers.ternary import TernaryQuantizer
from graphcomp.quantization.spec import check_bits
from graphcomp.quantization.ternary_direction import cosines
from graphcomp.training.elements import pruned_counts
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Choice, Forward, Run
from graphcomp.training.schedule import Schedule, is_number, is_whole
from graphcomp.training.ternary_filters import filters_of, in_front_of_norms

STAGES = ("pruning", "ternary", "final")
"""Names of the three stages."""

SPARSITY = 0.8
"""Share of the weights that is pruned where no share is given."""

FIRST = 0.3
"""Share of the weights that is pruned in the first step."""

CLOSE = 0.999
"""Cosine between a filter and its direction from which on the filter is taken to be ternary."""

Masks = Literal["share", "best"]


class PruneTernaryRun(Run):
    """Prunes filters in floats, pulls filters to their ternary directions, and trains what is left on.

    Attributes:
        weights: parameter -> filters.
        ends: steps after which the stages end; the last number is the step at which weights are ternary at the latest.
        finished: whether weights are ternary.
        cosine: mean and least cosine between filters and directions: at the end of the second stage, and when weights
            became ternary.
    """

    name: ClassVar[str] = "prune_ternary"

    def __init__(
        self,
        ready: Prepared,
        steps: int,
        method: PruneTernary,
        sparsity: float | None,
        *,
        absorbs: bool = True,
        lr_quant: float | None = None,
    ) -> None:
        super().__init__(ready, lr_quant=lr_quant)
        self.method, self.sparsity, self.finished, self.step = method, sparsity, False, 0
        first = min(max(1, round(method.prune * steps)), steps - 2)
        second = min(max(first + 1, round((method.prune + method.ternary) * steps)), steps - 1)
        self.ends = first, second, second + (steps - second + 1) // 2
        self.settles = self.ends[2]
        sites = [(s, q) for s, q in ready.quantizers() if s.is_weight and s.parameter]
        normed = in_front_of_norms(ready) if absorbs and not ready.norms_frozen else set()
        ternary = {s.parameter: q for s, q in sites if isinstance(q, TernaryQuantizer)}
        trained = {name: q for name, q in ternary.items() if ready.get_parameter(name).requires_grad}
        self.weights = {name: filters_of(ready, name, q, normed) for name, q in trained.items()}
        if not self.weights:
            raise NothingToPrune(
                "prune_ternary finds no weight to make ternary",
                why="the first and the last layer have more bits, and no other layer has a weight of its own to train",
                fix="PruneTernary(ends=2), which makes these ternary, too",
            )
        self._check_share()
        self.others = [(q, ready.get_parameter(s.parameter)) for s, q in sites if s.parameter not in self.weights]
        self.cosine: dict[str, tuple[float, float]] = {}
        asked = {"sparsity": sparsity, "absorbs": absorbs}
        self.about = {name: str(value) for name, value in {**asdict(method), **asked}.items()}
        ready.remarks = (
            *ready.remarks,
            *self._remarks(
                [s.layer for s, _ in sites if s.parameter not in ternary], [*ternary.keys() - trained.keys()]
            ),
        )
        self._enter(0)

    def _check_share(self) -> None:
        """Refuse a share that leaves fewer weights than filters."""
        totals, most = self._counts()
        if self.sparsity is not None and round(self.sparsity * sum(totals)) > sum(most):
            raise PlanError(
                f"sparsity must be {sum(most) / sum(totals):.4f} at most for this network, got {self.sparsity}",
                why=f"each filter keeps a weight: {sum(totals) - sum(most)} filters have {sum(totals)} weights",
                fix=f"sparsity={min(SPARSITY, int(100 * sum(most) / sum(totals)) / 100)}",
            )

    def _counts(self) -> tuple[list[int], list[int]]:
        """Return how many weights each layer has, and how many of the weights are pruned at most."""
        totals = [weight.parameter.numel() for weight in self.weights.values()]
        return totals, [total - len(w.mask) for total, w in zip(totals, self.weights.values(), strict=True)]

    def param_groups(self, base: type[Optimizer], lr: Any) -> list[dict[str, Any]]:
        """Groups of all that is trained; weights that become ternary have no other decay than the pull."""
        own = {id(w.parameter) for w in self.weights.values()}
        found = []
        for group in super().param_groups(base, lr):
            pulled = [p for p in group["params"] if id(p) in own]
            left = [p for p in group["params"] if id(p) not in own]
            found += [{**group, "params": left}] if left else []
            found += [{**group, "params": pulled, "weight_decay": 0.0}] if pulled else []
        return found

    def stage(self, step: int) -> str:
        """Pruning, ternary or final."""
        return STAGES[sum(step >= end for end in self.ends[:2])]

    # ------------------------------------------------------------------------------------------ the loss
    def loss(self, forward: Forward, batch: Any, task: Loss) -> Tensor:
        """The loss of the views on weights; that of the quantized model, once weights are ternary."""
        if self.finished:
            return task(forward(batch), batch)
        eta = self._eta()
        views = {name: weight.view(eta, self.method.c) for name, weight in self.weights.items()}
        ternary = [weight.quantizer for weight in self.weights.values()]
        with self.ready.in_floats() if self.step < self.ends[0] else switched_off(ternary):
            return task(forward(batch, views), batch)

    def _eta(self) -> float:
        """Return the share of the ternary direction in the forward pass."""
        start, end, _ = self.ends
        gentle = self.method.gentle * (end - start)
        return 0.0 if self.step < start else 1.0 if not gentle else min((self.step - start + 1) / gentle, 1.0)

    def pull(self, step: int) -> float:
        """Return lambda after step `step` (from 0): the share of the way to the ternary direction that filters go."""
        start, end, last = self.ends
        if step < end:
            return max(0.0, self.method.pull * (step + 1 - start) / (end - start))
        return self.method.pull + (1 - self.method.pull) * min((step + 1 - end) / (last - end), 1.0)

    # ------------------------------------------------------------------------------------------ a step
    def before_step(self, step: int) -> None:
        """Take all gradients of ternary weights away, and those of pruned weights once the mask stays."""
        super().before_step(step)
        for weight in self.weights.values():
            if self.finished:
                weight.parameter.grad = None
            elif step >= self.ends[1] and weight.parameter.grad is not None:
                weight.parameter.grad.masked_fill_(~weight.shaped(weight.mask), 0)

    def after_step(self, step: int) -> None:
        """Pull filters to their directions, and get ready for the next step."""
        super().after_step(step)
        if not self.finished:
            for weight in self.weights.values():
                weight.settle(self.pull(step))
        self._enter(step + 1)

    @torch.no_grad()
    def _enter(self, step: int) -> None:
        """Choose masks, calibrate the other layers, or let weights be ternary, where a step asks."""
        self.step = step
        if self.finished:
            return
        first, second, last = self.ends
        if step < second and (step % self.method.every == 0 or step == first):
            self._choose(step)
        if step == first:
            for quantizer, parameter in self.others:
                calibrate_weight(quantizer, parameter.detach())
        if step == second:
            self._choose(step)
            self.cosine["before the last stage"] = self.cosines()
        if step > second and (step == last or self.cosines()[1] > CLOSE):
            self._finish()

    def _choose(self, step: int) -> None:
        if self.method.masks == "best":
            for weight in self.weights.values():
                weight.choose(None)
            return
        assert self.sparsity is not None
        share = sparsity_at(step, self.ends[0], self.sparsity, min(FIRST, self.sparsity))
        for weight, gone in zip(self.weights.values(), _parts(*self._counts(), share), strict=True):
            weight.choose(weight.parameter.numel() - gone)

    def _finish(self) -> None:
        self.cosine["when weights became ternary"] = self.cosines()
        for weight in self.weights.values():
            weight.finish()
        self.finished = True
        self.ready.keep_elements(self.choice().elements)
        self._say_cosines()

    def cosines(self) -> tuple[float, float]:
        """Return the mean and the least cosine between filters and their ternary directions."""
        found = torch.cat([cosines(weight.rows, weight.mask) for weight in self.weights.values()])
        return float(found.mean()), float(found.min())

    # ------------------------------------------------------------------------------------------ where the run stands
    def metrics(self) -> dict[str, Any]:
        """How many weights are pruned, and the mean cosine between filters and directions, too."""
        counts = pruned_counts({name: weight.mask for name, weight in self.weights.items()})
        return {**super().metrics(), **counts, "cosine": round(self.cosines()[0], 6)}

    def choice(self) -> Choice:
        """The masks."""
        return Choice(self.kept, {name: weight.shaped(weight.mask) for name, weight in self.weights.items()})

    def state_dict(self) -> dict[str, Any]:
        """Masks, the norms that filters keep, and whether weights are ternary."""
        masks = {name: weight.mask for name, weight in self.weights.items()}
        norms = {name: weight.norms for name, weight in self.weights.items()}
        return {"finished": self.finished, "masks": masks, "norms": norms, "cosine": self.cosine}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on where `state_dict` was taken."""
        self.step, self.finished, self.cosine = step, bool(state["finished"]), dict(state["cosine"])
        for name, weight in self.weights.items():
            device, norms = weight.parameter.device, state["norms"][name]
            weight.mask = state["masks"][name].to(device)
            weight.norms = None if norms is None else norms.to(device)
        if self.finished:
            self.ready.keep_elements(self.choice().elements)
            self._say_cosines()

    # ------------------------------------------------------------------------------------------ what is said
    def _remarks(self, finer: list[str], frozen: list[str]) -> list[str]:
        kept = [name for name, weight in self.weights.items() if weight.norms is None]
        found = []
        if frozen:
            found.append(f"ternary, and not pruned, as they are not trained: {', '.join(sorted(frozen))}")
        if kept:
            why = "no batch norm that learns its statistics absorbs them"
            found.append(f"scales are mean magnitudes, and trained at the end, as {why}: {', '.join(kept)}")
        if finer:
            found.append(
                f"not pruned and not ternary, as the first and the last layer have more bits: {', '.join(finer)}"
            )
        if computed := [s.layer for s in self.ready.session.sites if s.is_weight and not s.parameter]:
            found.append(f"weights that are computed are not pruned: {', '.join(computed)}")
        return found

    def _say_cosines(self) -> None:
        for when, (mean, least) in self.cosine.items():
            said = f"cosine of filters and ternary directions {when}: {mean:.4f} in the mean, {least:.4f} at least"
            self.ready.remarks = (*self.ready.remarks, said)


@dataclass(frozen=True)
class PruneTernary(Method):
    """Trains weights that are pruned and ternary, -a, 0 and a per filter, in 2 bits; activations stay float.

    `sparsity` is the share of the weights of ternary layers that is pruned, 0.8 by default.

    Attributes:
        prune, ternary: shares of the run of the first two stages; what is left is the last one.
        pull: share of the way to its ternary direction that a filter goes per step at the end of the second stage.
        gentle: share of the second stage in which the ternary direction is mixed in.
        c: magnitudes in unit filters above which gradients are 0; 1: none are.
        masks: "share": the largest of each layer stay; "best": what each filter's best ternary direction keeps, and no
            sparsity is given.
        every: steps from one choice of masks to the next.
        ends: bits of the first and the last layer; 2: they are ternary, too.
    """

    name: ClassVar[str] = "prune_ternary"
    prunes = True
    quantizes = True
    prune: float = 0.4
    ternary: float = 0.4
    pull: float = 0.05
    gentle: float = 0.5
    c: float = 1.0
    masks: Masks = "share"
    every: int = 16
    ends: int = 8

    def __post_init__(self) -> None:
        check_word("masks", self.masks, get_args(Masks))
        for name in ("prune", "ternary", "pull", "gentle", "c"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise PlanError(f"PruneTernary({name}={value!r}): must be a share, 0 to 1", fix=f"{name}=0.4")
        if self.prune + self.ternary >= 1:
            raise PlanError(
                f"PruneTernary(prune={self.prune}, ternary={self.ternary}): must be below 1 together",
                why="weights become ternary in the last stage",
                fix="prune=0.4, ternary=0.4",
            )
        if not is_whole(self.every) or self.every < 1:
            raise PlanError(f"PruneTernary(every={self.every!r}): must be a whole number, 1 at least", fix="every=16")
        check_bits(self.ends, "ends")

    def takes(self, goal: Goal) -> Collection[str]:
        """Nothing: single weights are pruned, and become ternary."""
        return ()

    def check(self, goal: Goal) -> None:
        """Two bits, for weights; no share where masks are those of the best directions."""
        check_two_bits(goal)
        if self.masks == "best" and goal.sparsity is not None:
            raise PlanError(
                f'sparsity={goal.sparsity} with PruneTernary(masks="best")',
                why="each filter keeps what its best ternary direction keeps",
                fix='masks="share", or sparsity=None',
            )

    def least_steps(self, goal: Goal, training: Training) -> int:
        """One of each stage."""
        return len(STAGES)

    def prepare(self, source: Source, goal: Goal) -> Prepared:
        """Stand a ternary quantizer with a scale per filter on each weight but the first and the last."""
        return with_ternary_weights(source, goal, "channel", symmetric=True, ends=self.ends)

    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> PruneTernaryRun:
        """Begin a run."""
        refuse(self, {"a Schedule": isinstance(training.schedule, Schedule)}, "its stages are GETA's; give steps")
        assert not isinstance(goal.sparsity, Mapping)
        sparsity = None if self.masks == "best" else SPARSITY if goal.sparsity is None else goal.sparsity
        absorbs = training.freeze_norms is None
        return PruneTernaryRun(ready, steps, self, sparsity, absorbs=absorbs, lr_quant=training.lr_quant)


def _parts(totals: list[int], most: list[int], share: float) -> list[int]:
    """Return the share of each total, whole numbers whose sum is the share of the sum to the nearest.

    Args:
        totals: how many there are.
        most: how many are taken at most; what is missing then is taken of the others, in equal shares.
        share: of all.
    """
    asked = min(round(share * sum(totals)), sum(most))
    exact, full = [share * total for total in totals], set[int]()
    while over := {k for k, own in enumerate(exact) if own > most[k]} - full:
        full |= over
        left = asked - sum(most[k] for k in full)
        rest = sum(total for k, total in enumerate(totals) if k not in full)
        exact = [float(most[k]) if k in full else left * total / rest for k, total in enumerate(totals)]
    found = [int(own) for own in exact]
    missing = asked - sum(found)
    for k in sorted((k for k in range(len(totals)) if found[k] < most[k]), key=lambda k: found[k] - exact[k])[:missing]:
        found[k] += 1
    return found
