"""Bits that go down while weights are trained: at each change every quantizer is set anew on what it reads by then.

The levels before are of little use to fewer bits, whose best step is neither the old one nor the old range divided by
fewer levels. Steps of least squared error are found on the weights that stay, and of activations on one batch, in the
mode of training; LSQ goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.quantization.calibrate import calibrate, calibrate_weight
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.sites import Site
from graphcomp.quantization.spec import with_bits
from graphcomp.training import distributed
from graphcomp.training.lsq import steps_of, with_steps
from graphcomp.training.prepared import Prepared


def levels_of(path: Sequence[int], low: int) -> tuple[int, ...]:
    """Return the bits that training goes through, most first: those of `path` above `low`, then `low`."""
    return (*sorted({bits for bits in path if bits > low}, reverse=True), low)


def changes_at(begin: int, steps: int, levels: int) -> tuple[int, ...]:
    """Return the step before which each number of bits begins.

    All but the last share the first half of the steps from `begin` on equally; each has one step at least.
    """
    half = max((steps - begin) // 2, levels - 1)
    return tuple(begin + half * k // max(levels - 1, 1) for k in range(levels))


class Progressive:
    """The quantizers of a module at the bits of a stage.

    Attributes:
        levels: bits of the stages; a quantizer that ends with more (the first, the last layer) never has fewer.
        at: the stage that quantizers were set for; -1: none yet.
        fitted: mean of each step when it was last set, in the order of `steps_of`.
    """

    def __init__(self, ready: Prepared, levels: Sequence[int]) -> None:
        self.ready, self.levels, self.at = ready, tuple(levels), -1
        self.ends = {site.name: quantizer.spec for site, quantizer in ready.quantizers()}
        self.fitted: list[float] = self._sizes()

    def bits_of(self, site: Site, stage: int) -> int:
        """Return the bits of a quantizer in a stage; the last stage has those that it ends with."""
        end = self.ends[site.name].bits
        return end if stage == len(self.levels) - 1 else max(self.levels[stage], end)

    def enter(self, stage: int) -> None:
        """Give quantizers the bits of a stage; -1: of the end. Steps stay."""
        self.at = stage
        for site, quantizer in self.ready.quantizers():
            end = self.ends[site.name]
            bits = end.bits if stage < 0 else self.bits_of(site, stage)
            quantizer.spec = end if bits == end.bits else with_bits(end, bits)

    @torch.no_grad()
    def fit(self, stage: int, run: Callable[[], Any]) -> None:
        """Enter a stage and set all steps by what `run` lets quantizers read; all processes have those of the first.

        Args:
            run: runs the module on a batch in the mode that it is in; running statistics stay as they are.
        """
        self.enter(stage)
        before = {name: buffer.clone() for name, buffer in self.ready.named_buffers()}
        read: dict[Quantizer, list[Tensor]] = {}

        def note(quantizer: nn.Module, given: tuple[Any, ...]) -> None:
            assert isinstance(quantizer, Quantizer)
            read.setdefault(quantizer, []).append(given[0].detach())

        with ExitStack() as stack:
            for _, quantizer in self.ready.quantizers():
                stack.callback(quantizer.register_forward_pre_hook(note).remove)
            stack.enter_context(self.ready.in_floats())
            run()
        for name, buffer in self.ready.named_buffers():
            buffer.copy_(before[name])  # statistics of norms, which the training step is to move alone
        for site, quantizer in self.ready.quantizers():
            if site.is_weight:
                calibrate_weight(quantizer, read[quantizer][0].float(), site.layer)
            else:
                calibrate(quantizer, [x.float() for x in read[quantizer]], site.layer)
        distributed.copy_from_first(p for _, quantizer in self.ready.quantizers() for p in quantizer.parameters())
        self.fitted = self._sizes()

    def follow(self, small: Prepared) -> None:
        """Go on with the quantizers of a module that was cut; bits are those of the end."""
        self.ready = small
        self.ends = {site.name: quantizer.spec for site, quantizer in small.quantizers()}

    def _sizes(self) -> list[float]:
        return [float(step.detach().mean()) for step in steps_of(with_steps(self.ready))]
