"""Short training runs on tiny models, and what slicing removes from them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.coupling.groups import Kept
from graphcomp.pruning.evidence import Evidence, Scores
from graphcomp.pruning.slice import kept_of_tensors
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.testing import Decoder, Encoder, ResidualCNN, VisionTransformer, randomize
from graphcomp.training.prepared import Prepared

SCHEDULE = gc.Schedule(20, warmup=3, projection=6, joint=6, projection_periods=3, pruning_periods=2)
"""Steps 0 to 2 warm up, 3 to 8 project, 9 to 11 and 12 to 14 prune, 15 to 19 cool down."""


# ------------------------------------------------------------------------------------------------ models
class Mlp(nn.Module):
    """(n, 6) -> (n, 3); a sigmoid of a unit that is zero is not zero."""

    def __init__(self, width: int = 12, activation: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
        super().__init__()
        self.activation = activation
        self.up, self.middle, self.down = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.middle(self.activation(self.up(x)))))


class Unequal(nn.Module):
    """Two convolutions that make one residual stream, with weights of very different sizes: (n, 3, 6, 6) -> (n, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.large.weight.mul_(10)
            self.small.weight.mul_(0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.large(x)
        return self.head((x + self.small(x.sigmoid())).mean((2, 3)))


class Upsample(nn.Module):
    """A transposed convolution, whose units lie in dim 1, then a depthwise one: (n, 3, 4, 4) -> (n, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 8, 2, stride=2)
        self.depthwise, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depthwise(F.relu(self.wide(self.stem(x)))).mean((2, 3)))


class Dense(nn.Module):
    """Two convolutions laid end to end, a batch norm on both: (n, 3, 6, 6) -> (n, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        both = torch.cat([left, self.right(F.relu(left))], 1)
        return self.head(F.relu(self.norm(both)).mean((2, 3)))


class NormedWidth(nn.Module):
    """A residual stream of width 12 under layer norms: (n, 4, 6) -> (n, 4, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(6, 12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.norm2(x + self.down(F.gelu(self.up(self.norm1(x))))))


class Experts(nn.Module):
    """Three experts in stacked weights, all of them run and mixed: (n, 6) -> (n, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(6, 3), nn.Linear(5, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 10)), nn.Parameter(torch.randn(3, 10, 5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(torch.einsum("ni,eih->neh", x, self.up))
        found = torch.einsum("neh,eho->neo", hidden, self.down)
        return self.head((self.router(x).softmax(-1)[..., None] * found).sum(1))


IMAGE, IDS = (2, 3, 8, 8), (2, 6)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (ResidualCNN, IMAGE),
    "vit": (VisionTransformer, IMAGE),
    "encoder": (Encoder, IDS),
    "decoder": (Decoder, IDS),
    "mlp": (Mlp, (8, 6)),
    "unequal": (Unequal, (2, 3, 6, 6)),
    "upsample": (Upsample, (2, 3, 4, 4)),
    "dense": (Dense, (2, 3, 6, 6)),
    "width": (NormedWidth, (4, 4, 6)),
    "experts": (Experts, (8, 6)),
}


def model_of(name: str) -> nn.Module:
    make, _ = MODELS[name]
    torch.manual_seed(0)
    made = make()
    return made if make is Unequal else randomize(made)


def batch(name: str, step: int = 0) -> tuple[Tensor, ...]:
    """The inputs of a step: the same whenever it is asked for."""
    _, shape = MODELS[name]
    generator = torch.Generator().manual_seed(step)
    if shape != IDS:
        return (torch.randn(shape, generator=generator),)
    ids = torch.randint(11, shape, generator=generator)
    return (ids, torch.ones_like(ids).tril(3)) if name == "encoder" else (ids,)


@cache
def _prepared(name: str, options: tuple[tuple[str, Any], ...]) -> Prepared:
    given = {key: dict(value) if key == "layer_bits" else value for key, value in options}
    return gc.prepare(model_of(name), batch(name), **given)


def ready_of(name: str, **options: Any) -> Prepared:
    """A prepared model of that name in training mode; `layer_bits` as a tuple of pairs."""
    return copy.deepcopy(_prepared(name, tuple(options.items()))).train()


# ------------------------------------------------------------------------------------------------ training
def backward(ready: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Gradients of a loss that no tiny model can bring to zero."""
    output = ready(*inputs)
    (output - torch.linspace(-1, 1, output.shape[-1])).square().mean().backward()


def train(optimizer: torch.optim.Optimizer, ready: nn.Module, name: str, steps: range | int) -> None:
    """Steps on the batches of those numbers."""
    for step in range(steps) if isinstance(steps, int) else steps:
        optimizer.zero_grad()
        backward(ready, batch(name, step))
        optimizer.step()


def state_of(ready: nn.Module) -> dict[str, Tensor]:
    """A copy of all that a module holds."""
    return {name: tensor.detach().clone() for name, tensor in ready.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equal bit for bit, names and all."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def weights_of(ready: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters but for those of quantizers, by name."""
    return {name: p for name, p in ready.named_parameters() if "graphcomp_" not in name}


def bits_of(ready: nn.Module) -> dict[str, float]:
    """b = log2(q_m^t / d + 1) + 1 of each quantizer, on plain numbers."""
    found = {}
    for name, module in ready.named_modules():
        if isinstance(module, GetaQuantizer):
            d, q_m, t = (float(p.detach()) for p in (module.d, module.q_m, module.t))
            found[name] = math.log2(q_m ** (t if module.spec.learn_exponent else 1) / d + 1) + 1
    return found


# ------------------------------------------------------------------------------------------------ units
def removed_by_slicing(ready: Prepared, kept: Kept) -> dict[str, Tensor]:
    """For each parameter a mask, True where slicing to `kept` takes the element away."""
    cuts = kept_of_tensors(ready.session.quantized.coupling, kept)
    found = {}
    for name, parameter in weights_of(ready).items():
        stays = torch.ones(parameter.shape, dtype=torch.bool)
        for dim, indices in cuts.get(name, {}).items():
            here = torch.zeros(parameter.shape, dtype=torch.bool)
            stays &= here.index_fill_(dim, indices, True)
        found[name] = ~stays
    return found


def leave(**units: Sequence[int]) -> Callable[[Evidence], Scores]:
    """A saliency by which these units of the groups of these names ("." and "/" as "_") go first, in this order."""

    def scores(evidence: Evidence) -> Scores:
        found = {}
        for group in evidence.groups:
            values = torch.ones(group.size) * group.size
            chosen = [v for key, v in units.items() if group.name.replace(".", "_").replace("/", "_") == key]
            for rank, unit in enumerate(chosen[0] if chosen else ()):
                values[unit] = 1e-6 * (rank + 1)
            found[group] = values
        return found

    return scores
