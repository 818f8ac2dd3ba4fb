"""Options of the reconstruction of blocks, and what came of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from graphcomp.arguments import check_whole, is_number, wrong

Augment: TypeAlias = Callable[[Sequence[Any], torch.Generator], Sequence[Any]]
"""From flat inputs of a few samples and a source of random numbers to other inputs that the model is made for."""


@dataclass(frozen=True)
class Reconstruction:
    """Second-order rounding, and from there rounding that is learned block by block: `compress(…, rounding=…)`.

    Attributes:
        steps: of Adam for each block, with up to 16 samples each; 0: blocks are not learned one by one.
        whole_steps: of Adam for the model as a whole, towards the outputs and what blocks hand on, with up to 8 samples
            each; None: as `steps`. With 0 of both the second-order rounding stays. What few bits take in many layers
            adds up, and this makes up for: with few samples and activations of 4 bits it is worth more than blocks.
        augment: for each step of the model as a whole, other inputs in place of those of the step, such as images
            mirrored and cut out at random: few samples are learned by heart otherwise. Takes the flat inputs of some
            samples and a `torch.Generator`, and returns inputs of the same kind; None: inputs as they are.
        seconds: for all blocks: each gets a share, by the size of its values, and takes fewer steps where the share is
            short; the result then depends on the speed of the machine. None: no limit.
        seed: of the order of the data, and of what is float at random.

    Raises:
        PlanError: a value out of range.

    Sources: see `graphcomp.quantization.reconstruct`.
    """

    steps: int = 400
    seconds: float | None = None
    seed: int = 0
    whole_steps: int | None = None
    augment: Augment | None = None

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 0, fix="steps=400")
        if self.whole_steps is not None:
            check_whole("whole_steps", self.whole_steps, 0, fix="whole_steps=400, or None for as many as `steps`")
        if self.augment is not None and not callable(self.augment):
            raise wrong("augment", "a function of inputs and a torch.Generator, or None", self.augment, "augment=None")
        check_whole("seed", self.seed, 0, fix="seed=0")
        if self.seconds is not None and not (is_number(self.seconds) and self.seconds >= 0):
            raise wrong("seconds", "a number from 0 on, or None", self.seconds, "seconds=60")

    @property
    def steps_of_whole(self) -> int:
        """Steps of the model as a whole."""
        return self.steps if self.whole_steps is None else self.whole_steps


@dataclass
class Reconstructed:
    """What a reconstruction did.

    Attributes:
        blocks: block that was changed -> relative error of its output on samples that are held out, ||y - t|| / ||t||,
            as it was and as it is, both behind the same blocks.
        left: block -> why the block stayed as it was.
        outputs: the same error of the model's outputs; None where nothing was learned.
        samples: that were learned on, and held out.
    """

    blocks: dict[str, tuple[float, float]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    outputs: tuple[float, float] | None = None
    samples: tuple[int, int] = (0, 0)

    def notes(self) -> tuple[str, ...]:
        """Say what was learned, on which data, and which blocks were not, by reason."""
        said = []
        if self.outputs is not None:
            (learned, held), (before, after) = self.samples, self.outputs
            said.append(
                f"the rounding of {len(self.blocks)} blocks was reconstructed on {learned} samples; on {held} others "
                f"the error of the outputs goes from {before:.3g} to {after:.3g} (relative)"
            )
        return (*said, *(f"not reconstructed, as {why}: {', '.join(names)}" for why, names in self._reasons().items()))

    def _reasons(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, why in self.left.items():
            found.setdefault(why, []).append(f"'{name}'")
        return found
