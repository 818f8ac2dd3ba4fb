"""Moving averages of what quantizers of activations read in training, while the values pass in floats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from graphcomp.quantization.quantizers.affine import AffineQuantizer
from graphcomp.quantization.quantizers.uniform import UniformQuantizer
from graphcomp.training import distributed

NEW = 0.1
"""Weight of the current step in a moving average."""


class MovingRanges:
    """Moving averages of the mean magnitude of nonzero values, of the least and of the largest value, per quantizer.

    The mean of `|x|` over nonzero values is the mean of positive values behind a ReLU. Values are clipped at a multiple
    of the mean, as of the last step.

    Attributes:
        averages: (q, 3) float32: mean magnitude (NaN until the first step), least and largest value of each quantizer,
            the latter two at first those that the quantizer was calibrated to.

    Args:
        quantizers: name -> quantizer, of activations.
        clips: name -> k, where values are clipped at k times the mean magnitude.
    """

    def __init__(self, quantizers: Mapping[str, UniformQuantizer], clips: Mapping[str, float]) -> None:
        self.quantizers, self.clips = dict(quantizers), dict(clips)
        starts = [torch.stack([torch.tensor(torch.nan), *_ends(q)]) for q in self.quantizers.values()]
        self.averages = torch.stack(starts) if starts else torch.zeros(0, 3)
        self._limits: dict[str, float] = {}
        self._seen: dict[str, list[Tensor]] = {}

    @contextmanager
    def watching(self, *, clipped: bool) -> Iterator[None]:
        """Take down what quantizers read inside, and let them read clipped values where `clipped`."""
        with ExitStack() as stack:
            for name, quantizer in self.quantizers.items():
                limit = self._limits.get(name) if clipped else None
                stack.callback(quantizer.register_forward_pre_hook(partial(self._see, name, limit)).remove)
            yield

    def _see(self, name: str, limit: float | None, _: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        (x,) = given
        own = x.detach()
        low, high = own.aminmax()
        mean = own.abs().sum(dtype=torch.float32) / own.count_nonzero().clamp(min=1)
        self._seen.setdefault(name, []).append(torch.stack([mean, low.float(), high.float()]))
        return None if limit is None else (nn.functional.hardtanh(x, -limit, limit),)

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages to what was seen since the last call, the same in all processes."""
        if not self._seen:
            return
        now = torch.stack([torch.stack(self._seen[name]).mean(0) for name in self.quantizers])
        now = distributed.mean(now)
        old = self.averages.to(now)
        new = torch.where(old.isnan(), now, NEW * now + (1 - NEW) * old)
        self.load(torch.where(now.isfinite(), new, old))
        self._seen = {}

    def load(self, averages: Tensor) -> None:
        """Go on with these averages, (q, 3)."""
        self.averages = averages
        rows = dict(zip(self.quantizers, averages.tolist(), strict=True))
        levels = {name: k * rows[name][0] for name, k in self.clips.items()}
        self._limits = {name: level for name, level in levels.items() if level > 0}  # NaN is not

    @torch.no_grad()
    def set_ranges(self, names: Mapping[str, float] | None = None) -> None:
        """Let quantizers reach from the least to the largest value, as far as values are not clipped.

        Args:
            names: which quantizers; None: all.
        """
        for (name, quantizer), (_, low, high) in zip(self.quantizers.items(), self.averages, strict=True):
            if names is None or name in names:
                limit = self._limits.get(name, torch.inf)
                quantizer.set_range(low.clamp(min=-limit), high.clamp(max=limit))


@torch.no_grad()
def _ends(quantizer: UniformQuantizer) -> tuple[Tensor, Tensor]:
    """Return the least and the largest level, () float32 each."""
    zero = quantizer.zero_point if isinstance(quantizer, AffineQuantizer) else torch.zeros(())
    step, zero = quantizer.scale.detach().float().reshape(()).cpu(), zero.detach().float().reshape(()).cpu()
    return step * (quantizer.spec.quant_min - zero), step * (quantizer.spec.quant_max - zero)
