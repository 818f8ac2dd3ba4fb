"""Random networks: image and sequence models of blocks that couple channels in many ways, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.testing.models import randomize

Run: TypeAlias = Callable[[Any, Any], Any]
"""What a block does with itself, for its submodules, and with a value."""


class Block(nn.Module):
    """One function of one value, with the submodules and parameters it uses under their own names."""

    def __init__(self, kind: str, run: Run, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.kind, self.run = kind, run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.run(self, x)
        return result

    def extra_repr(self) -> str:
        return self.kind


Made: TypeAlias = tuple[Block, int]
"""A block and the number of channels it returns."""


def random_model(seed: int, depth: int = 4) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A random network with weights of ordinary size, in eval mode, and its example inputs (batch 2).

    Half of them see images (2, 3, 8, 8) first and may turn to sequences, the others see sequences (2, 6, 10). The same
    `seed` and `depth` give the same network, and a smaller `depth` gives its first blocks.
    """
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _image_model(rng, depth) if rng.random() < 0.6 else _sequence_model(rng, depth)
        inputs = torch.randn(2, 3, 8, 8) if model[0].kind == "stem" else torch.randn(2, 6, 10)
        return randomize(model, seed), (inputs,)


def _image_model(rng: random.Random, depth: int) -> nn.Sequential:
    c = rng.choice([8, 12, 16])
    blocks: list[nn.Module] = [Block("stem", lambda m, x: m.conv(x), conv=_conv(3, c, 3))]
    for _ in range(depth):
        block, c = (rng.choice(IMAGE_BLOCKS) if c >= 8 else _widened)(rng, c)
        blocks.append(block)
    if rng.random() < 0.5:
        return nn.Sequential(*blocks, *_image_head(rng, c))
    blocks.append(Block("to sequence", lambda m, x: x.flatten(2).transpose(1, 2)))
    block, c = rng.choice(SEQUENCE_BLOCKS)(rng, c)
    return nn.Sequential(*blocks, block, *_sequence_head(rng, c))


def _image_head(rng: random.Random, c: int) -> list[nn.Module]:
    if rng.random() < 0.5:
        return [Block("pool", lambda m, x: F.adaptive_avg_pool2d(x, 1).flatten(1)), nn.Linear(c, 5)]
    return [Block("flatten", lambda m, x: F.adaptive_max_pool2d(x, 2).flatten(1)), nn.Linear(4 * c, 5)]


def _sequence_model(rng: random.Random, depth: int) -> nn.Sequential:
    c = rng.choice([8, 16, 24])
    blocks: list[nn.Module] = [Block("embed", lambda m, x: m.linear(x), linear=nn.Linear(10, c))]
    for _ in range(depth):
        block, c = rng.choice(SEQUENCE_BLOCKS)(rng, c)
        blocks.append(block)
    return nn.Sequential(*blocks, *_sequence_head(rng, c))


def _sequence_head(rng: random.Random, c: int) -> list[nn.Module]:
    last = rng.choice([nn.Identity(), nn.LayerNorm(c)])
    return [last, *([Block("mean", lambda m, x: x.mean(1))] if rng.random() < 0.5 else []), nn.Linear(c, 5)]


def _conv(c: int, out: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, out, kernel, padding=kernel // 2, **options)


def _divisor(rng: random.Random, c: int) -> int:
    return rng.choice([g for g in (2, 4) if c % g == 0] or [1])


def _activation(rng: random.Random) -> Callable[[Any], Any]:
    some_do_not_map_0_to_0: list[Callable[[Any], Any]] = [F.relu, F.gelu, torch.sigmoid, F.hardswish, torch.cos]
    return rng.choice(some_do_not_map_0_to_0)


# images: (n, c, h, w)
def _conv_norm(rng: random.Random, c: int) -> Made:
    out, act = rng.choice([8, 12, 16]), _activation(rng)
    norm = rng.choice(
        [nn.BatchNorm2d(out), nn.GroupNorm(_divisor(rng, out), out), nn.GroupNorm(out, out), nn.Identity(),
         nn.InstanceNorm2d(out, affine=True)]
    )  # fmt: skip
    return Block("conv, norm", lambda m, x: act(m.norm(m.conv(x))), conv=_conv(c, out, 3), norm=norm), out


def _widened(rng: random.Random, c: int) -> Made:
    return Block("widen", lambda m, x: m.conv(x), conv=_conv(c, 8)), 8


def _layer_norm_2d(rng: random.Random, c: int) -> Made:
    return Block("norm over channels", lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
                 norm=rng.choice([nn.LayerNorm(c), nn.RMSNorm(c, eps=1e-6)])), c  # fmt: skip


def _residual(rng: random.Random, c: int) -> Made:
    act, k = _activation(rng), rng.choice([8, 12])
    return Block("residual", lambda m, x: x + m.b(act(m.a(x))), a=_conv(c, k, 3), b=_conv(k, c)), c


def _dense(rng: random.Random, c: int) -> Made:
    if c > 24:
        return Block("narrow", lambda m, x: m.conv(x), conv=_conv(c, 8)), 8
    return Block("dense", lambda m, x: torch.cat([x, F.relu(m.conv(x))], 1), conv=_conv(c, 8, 3)), c + 8


def _parts(rng: random.Random, c: int) -> Made:
    swap = rng.random() < 0.5

    def run(m: Any, x: Any) -> Any:
        a, b = x.split([c // 4, c - c // 4], 1)
        return torch.cat([b, m.conv(a)] if swap else [m.conv(a), b], 1)

    return Block("split and concat", run, conv=_conv(c // 4, 8)), c - c // 4 + 8


def _gate(rng: random.Random, c: int) -> Made:
    if rng.random() < 0.5:
        return Block("glu", lambda m, x: F.glu(m.conv(x), 1), conv=_conv(c, 16)), 8
    return Block("gate", lambda m, x: torch.mul(*m.conv(x).chunk(2, 1)), conv=_conv(c, 24)), 12


def _grouped(rng: random.Random, c: int) -> Made:
    g = _divisor(rng, c)
    return Block("grouped conv", lambda m, x: F.relu(m.conv(x)), conv=_conv(c, 2 * c, 3, groups=g)), 2 * c


def _depthwise(rng: random.Random, c: int) -> Made:
    multiplier = rng.choice([1, 1, 2])
    conv = _conv(c, c * multiplier, 3, groups=c, padding_mode=rng.choice(["zeros", "reflect", "circular"]))
    return Block("depthwise conv", lambda m, x: m.b(m.norm(m.a(x))), a=conv,
                 norm=nn.BatchNorm2d(c * multiplier), b=_conv(c * multiplier, 8)), 8  # fmt: skip


def _shuffle(rng: random.Random, c: int) -> Made:
    g = _divisor(rng, c)
    conv = _conv(c, c, 3, groups=g)
    return Block("channel shuffle",
                 lambda m, x: m.conv(x).unflatten(1, (g, -1)).transpose(1, 2).flatten(1, 2), conv=conv), c  # fmt: skip


def _squeeze_excite(rng: random.Random, c: int) -> Made:
    return Block("squeeze-excite", lambda m, x: x * torch.sigmoid(m.b(F.relu(m.a(x.mean((2, 3), keepdim=True))))),
                 a=_conv(c, 4), b=_conv(4, c)), c  # fmt: skip


def _pool(rng: random.Random, c: int) -> Made:
    pools: list[Callable[..., Any]] = [F.max_pool2d, F.avg_pool2d]
    pool = rng.choice(pools)
    return Block("pool", lambda m, x: pool(x, 2, ceil_mode=True) if x.shape[-1] > 1 else x), c


def _pad(rng: random.Random, c: int) -> Made:
    before, after = rng.choice([(0, 4), (2, 2)])
    return Block("padded channels", lambda m, x: F.pad(x, (0, 0, 0, 0, before, after)) + m.conv(x),
                 conv=_conv(c, c + 4)), c + 4  # fmt: skip


def _scaled(rng: random.Random, c: int) -> Made:
    return Block("scale", lambda m, x: x * m.scale[:, None, None] + m.shift.view(1, -1, 1, 1),
                 scale=nn.Parameter(torch.rand(c) + 0.5), shift=nn.Parameter(torch.randn(c))), c  # fmt: skip


def _folded(rng: random.Random, c: int) -> Made:
    g = _divisor(rng, c)
    reductions: list[Callable[..., Any]] = [torch.sum, torch.mean, torch.amax]
    reduce = rng.choice(reductions)
    inner = rng.random() < 0.5

    def run(m: Any, x: Any) -> Any:
        shape = (c // g, g) if inner else (g, c // g)
        return reduce(x.reshape(x.shape[0], *shape, *x.shape[2:]), 2 if inner else 1)

    return Block("fold channels", run), c // g


def _every_other(rng: random.Random, c: int) -> Made:
    k = rng.choice([c // 2, c - 3])
    if c % 2 == 0 and rng.random() < 0.5:
        return Block("every other channel", lambda m, x: x[:, ::2] * x[:, 1::2]), c // 2
    return Block("first channels", lambda m, x: x[:, :k] - m.conv(x[:, c - k :]), conv=_conv(k, k)), k


def _transposed(rng: random.Random, c: int) -> Made:
    g = _divisor(rng, c)
    return Block("transposed conv", lambda m, x: F.interpolate(m.conv(x), scale_factor=0.5, mode="bilinear"),
                 conv=nn.ConvTranspose2d(c, 8, 2, stride=2, groups=g)), 8  # fmt: skip


IMAGE_BLOCKS: tuple[Callable[[random.Random, int], Made], ...] = (
    _conv_norm, _conv_norm, _layer_norm_2d, _residual, _dense, _parts, _gate, _grouped, _depthwise, _shuffle,
    _squeeze_excite, _pool, _pad, _scaled, _folded, _every_other, _transposed,
)  # fmt: skip


# sequences: (n, s, c)
def _feed_forward(rng: random.Random, c: int) -> Made:
    act, norm = _activation(rng), rng.choice([nn.LayerNorm(c), nn.RMSNorm(c, eps=1e-6), nn.Identity()])
    return Block("feed-forward", lambda m, x: x + m.b(act(m.a(m.norm(x)))),
                 norm=norm, a=nn.Linear(c, 12), b=nn.Linear(12, c, bias=False)), c  # fmt: skip


def _gated_feed_forward(rng: random.Random, c: int) -> Made:
    if rng.random() < 0.5:
        return Block("gated feed-forward", lambda m, x: x + m.down(F.silu(m.gate(x)) * m.up(x)),
                     gate=nn.Linear(c, 12), up=nn.Linear(c, 12), down=nn.Linear(12, c)), c  # fmt: skip

    def fused(m: Any, x: Any) -> Any:
        gate, up = m.both(x).chunk(2, -1)
        return x + m.down(F.silu(gate) * up)

    return Block("fused gated feed-forward", fused, both=nn.Linear(c, 24), down=nn.Linear(12, c)), c


def _rms_norm(rng: random.Random, c: int) -> Made:
    return Block("RMS norm written out", lambda m, x: m.scale * (x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6)),
                 scale=nn.Parameter(torch.rand(c) + 0.5)), c  # fmt: skip


def _layer_norm(rng: random.Random, c: int) -> Made:
    def run(m: Any, x: Any) -> Any:
        centred = x - x.mean(-1, keepdim=True)
        return m.scale * centred / torch.sqrt(x.var(-1, keepdim=True, correction=0) + 1e-5)

    return Block("layer norm written out", run, scale=nn.Parameter(torch.rand(c) + 0.5)), c


def _attention(rng: random.Random, c: int) -> Made:
    """Self-attention: heads, head_dim, the layout of qkv and the way to compute it are drawn."""
    h, d = rng.choice([(2, 4), (3, 4), (4, 2)])
    layout, by_hand = rng.choice(["separate", "(3 h d)", "[q | k | v]", "(h 3 d)"]), rng.random() < 0.4

    def heads(m: Any, x: Any) -> Any:
        if layout == "separate":
            return [f(x).unflatten(-1, (h, d)).transpose(1, 2) for f in (m.q, m.k, m.v)]
        qkv = m.qkv(x)
        if layout == "(3 h d)":
            return qkv.unflatten(-1, (3, h, d)).permute(2, 0, 3, 1, 4).unbind(0)
        if layout == "(h 3 d)":
            return qkv.unflatten(-1, (h, 3 * d)).transpose(1, 2).chunk(3, -1)
        return [t.unflatten(-1, (h, d)).transpose(1, 2) for t in qkv.split(h * d, -1)]

    def run(m: Any, x: Any) -> Any:
        q, k, v = heads(m, x)
        y = (q @ k.mT * d**-0.5).softmax(-1) @ v if by_hand else F.scaled_dot_product_attention(q, k, v)
        return x + m.o(y.transpose(1, 2).flatten(2))

    inside = {name: nn.Linear(c, h * d) for name in "qkv"} if layout == "separate" else {"qkv": nn.Linear(c, 3 * h * d)}
    return Block(f"attention {layout}", run, **inside, o=nn.Linear(h * d, c)), c


def _grouped_query(rng: random.Random, c: int) -> Made:
    g, r, d = 2, rng.choice([2, 3]), 4
    expanded = rng.random() < 0.5

    def run(m: Any, x: Any) -> Any:
        q = m.q(x).unflatten(-1, (g * r, d)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (g, d)).transpose(1, 2) for f in (m.k, m.v))
        if expanded:
            k, v = (t[:, :, None].expand(-1, -1, r, -1, -1).flatten(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=not expanded)
        return m.o(y.transpose(1, 2).flatten(2))

    k, v, o = nn.Linear(c, g * d), nn.Linear(c, g * d), nn.Linear(g * r * d, c)
    return Block("grouped-query attention", run, q=nn.Linear(c, g * r * d), k=k, v=v, o=o), c


def _over_positions(rng: random.Random, c: int) -> Made:
    return Block("1d conv over positions", lambda m, x: x + m.conv(x.transpose(1, 2)).transpose(1, 2),
                 conv=nn.Conv1d(c, c, 3, padding=1, groups=rng.choice([1, c]))), c  # fmt: skip


def _joined(rng: random.Random, c: int) -> Made:
    if c > 24:
        return Block("narrow", lambda m, x: m.linear(x), linear=nn.Linear(c, 8)), 8
    return Block("concat", lambda m, x: torch.cat([m.a(x), x, m.b(x)], -1), a=nn.Linear(c, 4), b=nn.Linear(c, 4)), c + 8


def _weights_by_hand(rng: random.Random, c: int) -> Made:
    weight = nn.Parameter(torch.randn(12, c) / c**0.5)
    how: Run = rng.choice(
        [lambda m, x: x @ m.w.t(), lambda m, x: torch.einsum("nsc,oc->nso", x, m.w), lambda m, x: F.linear(x, m.w)]
    )
    return Block("weight by hand", how, w=weight), 12


SEQUENCE_BLOCKS: tuple[Callable[[random.Random, int], Made], ...] = (
    _feed_forward, _gated_feed_forward, _rms_norm, _layer_norm, _attention, _attention, _attention, _grouped_query,
    _over_positions, _joined, _weights_by_hand,
)  # fmt: skip
