"""Law 2, slicing is masking made physical: op family by op family, on the tiny models, on random networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphcomp.capture.capture import capture
from graphcomp.coupling.analysis import Analysis, analyze_captured
from graphcomp.coupling.axis import Axes
from graphcomp.coupling.groups import Kept
from graphcomp.errors import VerificationError
from graphcomp.numerics.compare import relative_error
from graphcomp.ops import registry
from graphcomp.pruning.mask import InsertMasks, set_masks
from graphcomp.pruning.slice import SliceGroups
from graphcomp.testing import Block, check_law, random_kept, random_model, randomize, tiny_models

Run = Callable[[Any, Tensor], Tensor]


# ------------------------------------------------------------------------------------------------ families
# Each case: what happens between a first layer, which makes 12 channels, and a last one.
def image(run: Run, out: int = 12, **parts: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """(2, 3, 8, 8) -> conv, 12 channels -> `run` -> `out` channels -> conv"""
    middle = Block("case", run, **parts)
    return nn.Sequential(nn.Conv2d(3, 12, 1), middle, nn.Conv2d(out, 4, 1)), (torch.randn(2, 3, 8, 8),)


def sequence(run: Run, out: int = 12, **parts: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """(2, 6, 5) -> linear, 12 features -> `run` -> `out` features -> linear"""
    return nn.Sequential(nn.Linear(5, 12), Block("case", run, **parts), nn.Linear(out, 4)), (torch.randn(2, 6, 5),)


def conv(c: int, out: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, out, k, padding=k // 2, **options)


def through(f: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Run:
    return lambda m, x: f(x, *args, **kwargs)


def part(m: Any, x: Tensor) -> Tensor:
    return m.part(x)  # type: ignore[no-any-return]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y += x
    y.relu_().mul_(0.5)
    y[:, :4] += 1
    return y  # type: ignore[no-any-return]


def written_out_group_norm(m: Any, x: Tensor) -> Tensor:
    y = x.reshape(x.shape[0], 3, -1)
    var, mean = torch.var_mean(y, -1, keepdim=True, correction=0)
    return ((y - mean) * torch.rsqrt(var + 1e-5)).view_as(x) * m.scale.view(1, -1, 1, 1)


def recurrent(m: Any, x: Tensor) -> Tensor:
    return m.part(x)[0]  # type: ignore[no-any-return]


def attention(m: Any, x: Tensor, **options: Any) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


def grouped_by_the_kernel(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (m.q, m.k, m.v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0].transpose(1, 2).flatten(2)


def grouped_by_expand(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (m.q, m.k, m.v))
    n, h, s, d = k.shape
    k, v = (t[:, :, None].expand(n, h, 2, s, d).reshape(n, h * 2, s, d) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def grouped_by_repeat(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (m.q, m.k, m.v))
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    return ((q @ k.mT * 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def qkv(heads: int = 4, kv_heads: int = 4) -> dict[str, nn.Module]:
    return {"q": nn.Linear(12, 4 * heads), "k": nn.Linear(12, 4 * kv_heads), "v": nn.Linear(12, 4 * kv_heads)}


Case = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]

FAMILIES: dict[str, Case] = {
    # convolution
    "conv1d": lambda: sequence(lambda m, x: m.part(x.mT).mT, 8, part=nn.Conv1d(12, 8, 3, padding=1)),
    "conv2d strided": lambda: image(part, 8, part=conv(12, 8, stride=2, bias=False)),
    "conv3d": lambda: image(lambda m, x: m.part(x[:, :, None]).squeeze(2), 8, part=nn.Conv3d(12, 8, 1)),
    "conv without batch": lambda: image(lambda m, x: torch.stack([m.part(x[0]), m.part(x[1])]), 8, part=conv(12, 8)),
    "conv grouped": lambda: image(part, 24, part=conv(12, 24, groups=3)),
    "conv grouped, narrowing": lambda: image(part, 6, part=conv(12, 6, groups=3)),
    "conv depthwise": lambda: image(part, part=conv(12, 12, groups=12)),
    "conv depthwise, multiplier": lambda: image(part, 36, part=conv(12, 36, groups=12)),
    "conv transposed": lambda: image(part, 8, part=nn.ConvTranspose2d(12, 8, 2, stride=2)),
    "conv transposed, grouped": lambda: image(part, 9, part=nn.ConvTranspose2d(12, 9, 3, groups=3)),
    "conv transposed, depthwise": lambda: image(part, part=nn.ConvTranspose2d(12, 12, 3, groups=12)),
    "conv transposed 1d": lambda: sequence(lambda m, x: m.part(x.mT).mT, 8, part=nn.ConvTranspose1d(12, 8, 1)),
    "conv, padding 'same'": lambda: image(part, 8, part=nn.Conv2d(12, 8, 3, padding="same")),
    "conv, padding reflect": lambda: image(part, 8, part=conv(12, 8, padding_mode="reflect")),
    "conv, padding replicate": lambda: image(part, 8, part=conv(12, 8, padding_mode="replicate")),
    "conv, padding circular": lambda: image(part, 8, part=conv(12, 8, padding_mode="circular")),
    "unfold": lambda: image(lambda m, x: m.part(F.unfold(x, 2).mT).mT[..., None], 8, part=nn.Linear(48, 8)),
    "fold": lambda: image(lambda m, x: F.fold(F.unfold(x, 2), (8, 8), 2)),
    # norms
    "batch norm": lambda: image(part, part=nn.BatchNorm2d(12)),
    "batch norm without affine": lambda: image(part, part=nn.BatchNorm2d(12, affine=False)),
    "batch norm without statistics": lambda: image(part, part=nn.BatchNorm2d(12, track_running_stats=False)),
    "batch norm 1d": lambda: sequence(lambda m, x: m.part(x.mT).mT, part=nn.BatchNorm1d(12)),
    "instance norm": lambda: image(part, part=nn.InstanceNorm2d(12, affine=True)),
    "instance norm with statistics": lambda: image(part, part=nn.InstanceNorm2d(12, track_running_stats=True)),
    "group norm": lambda: image(part, part=nn.GroupNorm(3, 12)),
    "group norm, one group": lambda: image(part, part=nn.GroupNorm(1, 12)),
    "group norm, one channel each": lambda: image(part, part=nn.GroupNorm(12, 12)),
    "group norm without affine": lambda: image(part, part=nn.GroupNorm(4, 12, affine=False)),
    "group norm written out": lambda: image(written_out_group_norm, scale=parameter(12)),
    "layer norm": lambda: sequence(part, part=nn.LayerNorm(12)),
    "layer norm of an image, then a view": lambda: image(
        lambda m, x: m.part(x.permute(0, 2, 3, 1)).view(x.shape[0], 8, -1).unflatten(2, (8, -1)).permute(0, 3, 1, 2),
        part=nn.LayerNorm(12)),
    "layer norm without affine": lambda: sequence(through(F.layer_norm, (12,))),
    "layer norm over two dims": lambda: sequence(part, part=nn.LayerNorm((6, 12))),
    "layer norm written out": lambda: sequence(
        lambda m, x: m.scale * (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-6), scale=parameter(12)
    ),
    "rms norm": lambda: sequence(part, part=nn.RMSNorm(12)),
    "rms norm written out": lambda: sequence(
        lambda m, x: m.scale * x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6), scale=parameter(12)
    ),
    "local response norm": lambda: image(lambda m, x: F.local_response_norm(m.b(m.a(x)), 3),
                                        a=conv(12, 8), b=conv(8, 12)),
    "normalize": lambda: sequence(through(F.normalize, dim=-1)),
    "weight norm by hand": lambda: sequence(
        lambda m, x: F.linear(x, m.scale[:, None] * m.w / m.w.norm(dim=1, keepdim=True)), 8,
        w=parameter(8, 12), scale=parameter(8),
    ),
    "weight standardization": lambda: image(
        lambda m, x: F.conv2d(x, (m.w - m.w.mean((1, 2, 3), True)) / m.w.std((1, 2, 3), keepdim=True)), 8,
        w=parameter(8, 12, 3, 3),
    ),
    # reductions
    "mean over channels": lambda: image(lambda m, x: x * x.mean(1, keepdim=True)),
    "sum over channels": lambda: image(lambda m, x: x * x.sum(1, keepdim=True)),
    "variance over channels": lambda: image(lambda m, x: x * x.var(1, keepdim=True)),
    "deviation over all but the batch": lambda: image(lambda m, x: x / x.std((1, 2, 3), keepdim=True)),
    "var_mean": lambda: image(lambda m, x: torch.add(*torch.var_mean(x, 1, keepdim=True)) * x),
    "var_mean of all": lambda: image(lambda m, x: torch.mul(*torch.var_mean(x)) * x),
    "var_mean, own correction": lambda: image(lambda m, x: torch.var_mean(x, 1, correction=2)[0][:, None] * x),
    "norm over channels": lambda: image(lambda m, x: x / torch.linalg.vector_norm(x, dim=1, keepdim=True)),
    "std_mean": lambda: image(lambda m, x: torch.add(*torch.std_mean(x, 1, keepdim=True)) * x),
    "std_mean of all": lambda: image(lambda m, x: torch.mul(*torch.std_mean(x)) * x),
    "std_mean, own correction": lambda: image(lambda m, x: torch.std_mean(x, 1, correction=2)[0][:, None] * x),
    "mean of all": lambda: image(lambda m, x: x - x.mean()),
    "max over channels": lambda: image(lambda m, x: m.b(m.a(x)) * m.c(x).amax(1, True),
                                        a=conv(12, 8), b=conv(8, 12), c=conv(12, 5)),
    "softmax over channels": lambda: image(lambda m, x: m.part(x).softmax(1) + m.b(m.a(x)),
                                           part=conv(12, 12), a=conv(12, 8), b=conv(8, 12)),
    "softmax over space": lambda: image(lambda m, x: x.flatten(2).softmax(-1).view_as(x)),
    "log-sum-exp over channels": lambda: image(lambda m, x: m.b(m.a(x)) * m.c(x).logsumexp(1, True),
                                               a=conv(12, 8), b=conv(8, 12), c=conv(12, 5)),
    "cumsum over channels": lambda: image(lambda m, x: m.b(m.a(x)).cumsum(1), a=conv(12, 8), b=conv(8, 12)),
    "cumsum over space": lambda: image(lambda m, x: x.cumsum(-1)),
    "cosine similarity": lambda: sequence(lambda m, x: x * F.cosine_similarity(x, m.part(x), -1)[..., None],
                                          part=nn.Linear(12, 12)),
    "argmax over channels": lambda: image(lambda m, x: m.part(x) * m.a(x).argmax(1, True),
                                          part=conv(12, 12), a=conv(12, 5)),
    # windows and resampling
    "max pool": lambda: image(through(F.max_pool2d, 2)),
    "max pool with indices, and back": lambda: image(
        lambda m, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)
    ),
    "average pool": lambda: image(through(F.avg_pool2d, 3, 2, ceil_mode=True)),
    "adaptive pools": lambda: image(lambda m, x: F.adaptive_avg_pool2d(x, 3) + F.adaptive_max_pool2d(x, 3)),
    "max pool 1d": lambda: sequence(lambda m, x: F.max_pool1d(x.mT, 2).mT),
    "interpolate": lambda: image(lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "interpolate to a size": lambda: image(lambda m, x: F.interpolate(x, size=(5, 5), mode="nearest")),
    "pixel shuffle": lambda: image(through(F.pixel_shuffle, 2), 3),
    "pixel unshuffle": lambda: image(through(F.pixel_unshuffle, 2), 48),
    "grid sample": lambda: image(lambda m, x: F.grid_sample(x, torch.tanh(m.part(x)).permute(0, 2, 3, 1),
                                                            align_corners=False), part=conv(12, 2)),
    # movement
    "pad channels": lambda: image(lambda m, x: F.pad(x, (0, 0, 0, 0, 2, 3)), 17),
    "pad channels of a sum": lambda: image(lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 4)) + m.part(x), 16,
                                           part=conv(12, 16)),
    "pad space": lambda: image(lambda m, x: F.pad(x, (1, 2, 0, 1), value=0.5)),
    "concat": lambda: image(lambda m, x: torch.cat([x, m.part(x), x], 1), 32, part=conv(12, 8)),
    "concat and sum": lambda: image(lambda m, x: torch.cat([x, m.a(x)], 1) + m.b(x), 20, a=conv(12, 8), b=conv(12, 20)),
    "chunk": lambda: image(lambda m, x: m.part(x.chunk(2, 1)[0]) * x.chunk(2, 1)[1], 6, part=conv(6, 6)),
    "hsplit": lambda: image(lambda m, x: torch.cat([x.hsplit([3, 7])[k].relu() for k in (2, 0, 1)], 1)),
    "hsplit of one dim": lambda: sequence(lambda m, x: x * torch.cat(torch.hsplit(m.scale, 3)[::-1]),
                                          scale=parameter(12)),
    "vsplit": lambda: image(lambda m, x: torch.cat(x.transpose(0, 1).vsplit([3, 7])[::-1]).transpose(0, 1)),
    "dsplit": lambda: sequence(lambda m, x: torch.cat([y.relu() for y in reversed(x.dsplit([3, 7]))], 2)),
    "split": lambda: image(lambda m, x: torch.cat([y.relu() for y in reversed(x.split([3, 4, 5], 1))], 1)),
    "unbind": lambda: image(lambda m, x: torch.cat(x.unbind(-1), -1)[..., None]),
    "select": lambda: image(lambda m, x: x[..., 0, :, None] * m.part(x)[:, 3:4], part=conv(12, 8)),
    "slice": lambda: image(lambda m, x: x[:, 2:9], 7),
    "slice from the end": lambda: image(lambda m, x: x[:, -5:] + m.part(x)[:, :-2], 5, part=conv(12, 7)),
    "slice with a step": lambda: image(lambda m, x: x[:, ::3] + x[:, 1::3] * x[:, 2::3], 4),
    "slice with a step that does not divide": lambda: image(
        lambda m, x: m.b(m.a(x))[:, ::5], 3, a=conv(12, 8), b=conv(8, 12)
    ),
    "stack": lambda: image(lambda m, x: torch.stack([x, m.part(x)], 2).flatten(1, 2), 24, part=conv(12, 12)),
    "stack and sum": lambda: image(lambda m, x: torch.stack([x, m.part(x)]).sum(0), part=conv(12, 12)),
    "roll space": lambda: image(lambda m, x: x.roll((1, 2), (2, 3))),
    "roll channels": lambda: image(lambda m, x: m.b(m.a(x)).roll(1, 1), a=conv(12, 8), b=conv(8, 12)),
    "flip space": lambda: image(lambda m, x: x.flip(-1)),
    "flip channels": lambda: image(lambda m, x: m.b(m.a(x)).flip(1), a=conv(12, 8), b=conv(8, 12)),
    "expand": lambda: image(lambda m, x: x * m.scale.expand(2, 12, 8, 8), scale=parameter(12, 1, 1)),
    "expand a channel": lambda: image(lambda m, x: m.part(x).expand(-1, 12, -1, -1) * x, part=conv(12, 1)),
    "expand_as": lambda: image(lambda m, x: m.part(x).expand_as(x) * x, part=conv(12, 1)),
    "repeat": lambda: image(lambda m, x: x.repeat(1, 2, 1, 1), 24),
    "repeat a channel": lambda: image(lambda m, x: m.part(x).repeat(1, 12, 1, 1) + x, part=conv(12, 1)),
    "repeat_interleave": lambda: image(lambda m, x: x.repeat_interleave(2, 1) * m.part(x), 24, part=conv(12, 24)),
    "tile": lambda: image(lambda m, x: x.tile(1, 2, 1, 1), 24),
    "flatten into a linear": lambda: image(lambda m, x: m.part(F.avg_pool2d(x, 4).flatten(1))[..., None, None], 8,
                                           part=nn.Linear(48, 8)),
    "reshape, transpose, reshape": lambda: image(
        lambda m, x: x.reshape(2, 3, 4, 8, 8).transpose(1, 2).reshape(2, 12, 8, 8)
    ),
    "views that do not nest": lambda: image(
        lambda m, x: m.b(m.a(x).view(-1, 3, 4, 8, 8).sum(2) + m.a(x).view(-1, 4, 3, 8, 8).sum(1)), 8,
        a=conv(12, 12), b=conv(3, 8),
    ),
    "pieces read as rows": lambda: image(lambda m, x: torch.cat([m.a(x), x], 1).view(2, 3, 5, 8, 8).sum(1), 5,
                                         a=conv(12, 3)),
    "movedim": lambda: image(lambda m, x: m.part(x.movedim(1, -1)).movedim(-1, 1), 8, part=nn.Linear(12, 8)),
    "tril over positions": lambda: sequence(lambda m, x: (x @ x.mT).tril() @ x),
    # gathering
    "index by a constant": lambda: image(lambda m, x: m.b(m.a(x))[:, [3, 1, 2]], 3, a=conv(12, 8), b=conv(8, 5)),
    "index by a mask of positions": lambda: sequence(lambda m, x: x[:, torch.tensor([True, False] * 3)]),
    "sort and gather": lambda: sequence(lambda m, x: x.gather(1, x.sort(1).indices)),
    "sort channels": lambda: sequence(lambda m, x: m.b(m.a(x)).sort(-1).values, 5,
                                      a=nn.Linear(12, 8), b=nn.Linear(8, 5)),
    "top-k positions": lambda: sequence(lambda m, x: x.topk(3, 1).values),
    "where": lambda: image(lambda m, x: torch.where(x > m.part(x), x, 0.5), part=conv(12, 12)),
    "masked_fill": lambda: image(lambda m, x: x.masked_fill(x < 0, -1.0)),
    # products
    "einsum": lambda: sequence(lambda m, x: torch.einsum("nsc,oc->nso", x, m.w), 8, w=parameter(8, 12)),
    "einsum of two activations": lambda: sequence(
        lambda m, x: torch.einsum("nsc,ntc->nst", x, m.part(x)) @ x, part=nn.Linear(12, 12)
    ),
    "bmm": lambda: sequence(lambda m, x: torch.bmm(torch.bmm(x, m.part(x).mT), x), part=nn.Linear(12, 12)),
    "matmul, weight first": lambda: image(lambda m, x: (m.w @ x.flatten(2))[..., None], 8, w=parameter(8, 12)),
    "weight through .t()": lambda: sequence(lambda m, x: x @ m.w.t(), 8, w=parameter(8, 12)),
    "addmm": lambda: sequence(lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w).view(2, 6, 8), 8,
                              b=parameter(8), w=parameter(12, 8)),
    "bilinear": lambda: sequence(lambda m, x: m.part(x, m.a(x)), 8, part=nn.Bilinear(12, 7, 8), a=nn.Linear(12, 7)),
    "low rank": lambda: sequence(lambda m, x: F.linear(x, m.a @ m.b), 8, a=parameter(8, 3), b=parameter(3, 12)),
    "sdpa": lambda: sequence(attention, 16, **qkv()),
    "sdpa, causal": lambda: sequence(lambda m, x: attention(m, x, is_causal=True), 16, **qkv()),
    "sdpa, own scale": lambda: sequence(lambda m, x: attention(m, x, scale=0.3), 16, **qkv()),
    "sdpa with a bias for each head": lambda: sequence(lambda m, x: attention(m, x, attn_mask=m.bias), 16,
                                                      **qkv(), bias=parameter(1, 4, 6, 6)),
    "grouped-query by enable_gqa": lambda: sequence(lambda m, x: attention(m, x, enable_gqa=True), 16, **qkv(4, 2)),
    "grouped-query by the fused kernel": lambda: sequence(grouped_by_the_kernel, 16, **qkv(4, 2)),
    "grouped-query by expand": lambda: sequence(grouped_by_expand, 16, **qkv(4, 2)),
    "grouped-query by repeat_interleave": lambda: sequence(grouped_by_repeat, 16, **qkv(4, 2)),
    "multi-query": lambda: sequence(lambda m, x: attention(m, x, enable_gqa=True), 16, **qkv(4, 1)),
    "nn.MultiheadAttention": lambda: sequence(lambda m, x: m.part(x, x, x, need_weights=False)[0],
                                              part=nn.MultiheadAttention(12, 3, batch_first=True)),
    "nn.MultiheadAttention with weights": lambda: sequence(
        lambda m, x: m.part(x, x, x)[0], part=nn.MultiheadAttention(12, 3, batch_first=True)
    ),
    "nn.TransformerEncoderLayer": lambda: sequence(part, part=nn.TransformerEncoderLayer(12, 3, 16, batch_first=True)),
    # recurrent
    "LSTM": lambda: sequence(recurrent, 8, part=nn.LSTM(12, 8, batch_first=True)),
    "LSTM, two layers, both ways": lambda: sequence(
        recurrent, 16, part=nn.LSTM(12, 8, 2, batch_first=True, bidirectional=True)
    ),
    "GRU": lambda: sequence(recurrent, 8, part=nn.GRU(12, 8, batch_first=True)),
    "GRU without bias": lambda: sequence(recurrent, 8, part=nn.GRU(12, 8, bias=False)),
    "RNN": lambda: sequence(recurrent, 8, part=nn.RNN(12, 8)),
    "LSTM cell": lambda: sequence(lambda m, x: m.part(x[:, 0], m.part(x[:, 1]))[0], 8, part=nn.LSTMCell(12, 8)),
    "GRU cell": lambda: sequence(lambda m, x: m.part(x[:, 0], m.part(x[:, 1])), 8, part=nn.GRUCell(12, 8)),
    # activations with something to them
    "PReLU": lambda: image(part, part=nn.PReLU(12)),
    "PReLU, one slope": lambda: image(part, part=nn.PReLU()),
    "GLU": lambda: image(lambda m, x: F.glu(x, 1), 6),
    "softplus, hardswish, mish": lambda: image(lambda m, x: F.mish(F.hardswish(F.softplus(x) - 1))),
    "dropout": lambda: image(lambda m, x: m.c(m.b(m.a(x))), a=nn.Dropout(), b=nn.Dropout2d(), c=nn.AlphaDropout()),
    # how tensors are held
    "scale and shift parameters": lambda: image(lambda m, x: x * m.scale[:, None, None] + m.shift.view(1, -1, 1, 1),
                                                scale=parameter(12), shift=parameter(12)),
    "positional table": lambda: sequence(lambda m, x: x + m.table[: x.shape[1]], table=parameter(9, 12)),
    "a token put in front": lambda: sequence(lambda m, x: torch.cat([m.token.expand(2, -1, -1), x], 1),
                                             token=parameter(1, 1, 12)),
    "shared module called twice": lambda: image(lambda m, x: m.part(m.part(x).relu()), part=conv(12, 12)),
    "shared pair called twice": lambda: image(lambda m, x: x + m.b(m.a(x + m.b(m.a(x)))), a=conv(12, 8), b=conv(8, 12)),
    "in-place ops": lambda: image(in_place, a=conv(12, 12)),
    "dtype casts": lambda: image(lambda m, x: x.double().square().to(x.dtype)),
    "channels last": lambda: image(lambda m, x: m.part(x.contiguous(memory_format=torch.channels_last)),
                                   part=conv(12, 12)),
    "created tensors": lambda: image(
        lambda m, x: x + torch.ones(12, 1, 1, dtype=x.dtype) * x.new_full((1, 12, 1, 1), 0.3) + torch.zeros_like(x)
    ),
    "numbered channels": lambda: image(lambda m, x: m.b(m.a(x)) * torch.arange(12)[:, None, None],
                                       a=conv(12, 8), b=conv(8, 12)),
    "meshgrid of positions": lambda: image(lambda m, x: x + sum(torch.meshgrid(torch.arange(8.0), torch.arange(8.0),
                                                                              indexing="xy")).to(x.dtype)),
    "frequencies over positions": lambda: sequence(lambda m, x: torch.fft.fft(x, dim=1).real),
    "cdist": lambda: sequence(lambda m, x: torch.cdist(x, m.centres), 7, centres=parameter(7, 12)),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    model, inputs = FAMILIES[name]()
    randomize(model).double()
    result = check_law(model, tuple(x.double() for x in inputs))
    assert result.groups
    assert result.moved > 1e-3
    assert not result.analysis.unknown_ops


IN_HALF = [
    "conv2d strided", "conv grouped", "conv depthwise", "batch norm", "group norm", "layer norm", "rms norm",
    "layer norm written out", "rms norm written out", "mean over channels", "normalize", "std_mean", "concat and sum",
    "sdpa", "grouped-query by repeat_interleave", "nn.MultiheadAttention", "LSTM", "einsum", "GLU", "dtype casts",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", IN_HALF)
def test_family_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """The masked forms keep the model's dtype, and differ by no more than its rounding."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[name]()
    randomize(model).to(dtype)
    result = check_law(model, tuple(x.to(dtype) for x in inputs))
    assert result.groups
    assert result.moved > 0.05
    assert not result.analysis.unknown_ops


class Embedded(nn.Module):
    """Two tables, one of them tied to the head, or a bag."""

    def __init__(self, tied: bool, bag: bool = False) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(9, 12, mode="mean") if bag else nn.Embedding(9, 12, padding_idx=0)
        self.kinds, self.up, self.down = nn.Embedding(3, 12), nn.Linear(12, 8), nn.Linear(8, 12)
        self.head = nn.Linear(12, 9, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + (self.kinds(ids % 3) if isinstance(self.words, nn.Embedding) else 0)
        return self.head(x + self.down(self.up(x).relu()))


class WithBuffers(nn.Module):
    """Buffers that follow a group: a per-channel mean, a running maximum, a constant made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 4)
        self.register_buffer("mean", torch.randn(12))
        self.register_buffer("limit", torch.rand(1, 1, 12) + 0.5, persistent=False)
        self.plain = torch.randn(12)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.minimum(self.up(x) - self.mean, self.limit) * self.plain.to(x.dtype)
        return self.down(y + torch.tensor([0.5], dtype=x.dtype))


class ManyInputs(nn.Module):
    """A keyword input, nested outputs, and an integer output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Any]:
        hidden = self.a(x) * self.b(y)
        logits = self.c(hidden)
        return {"logits": logits, "more": (logits.argmax(-1), hidden.mean(-1))}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embedding(tied: bool) -> None:
    result = check_law(randomize(Embedded(tied)).double(), torch.randint(9, (2, 6)), rounds=2)
    assert [group.size for group in result.groups] == [12, 8]
    assert result.moved > 1e-3


def test_embedding_bag() -> None:
    result = check_law(randomize(Embedded(False, bag=True)).double(), torch.randint(9, (2, 6)), rounds=2)
    assert [group.size for group in result.groups] == [12, 8]


def test_buffers_follow_their_group() -> None:
    result = check_law(WithBuffers().double(), torch.randn(2, 5).double(), rounds=2)
    (group,) = result.groups
    assert {m.name for m in group.members} == {"up.weight", "up.bias", "down.weight", "mean", "limit", "plain"}


def test_keyword_inputs_and_nested_outputs() -> None:
    result = check_law(ManyInputs(), torch.randn(2, 5), {"y": torch.randn(2, 6)}, rounds=2)
    assert [group.size for group in result.groups] == [12]


# ------------------------------------------------------------------------------------------------ whole models
@pytest.mark.parametrize("name", list(tiny_models()))
def test_tiny_model(name: str) -> None:
    """In float32, as models are; the families above are checked in float64."""
    model, inputs = tiny_models()[name]
    result = check_law(model, inputs, rounds=2)
    assert result.moved > 0.05
    assert result.analysis.prunable_share > 0.99


@pytest.fixture(scope="module")
def decoder() -> Analysis:
    return analyze_captured(capture(*tiny_models()["decoder"]))


def sliced_and_masked(analysis: Analysis, kept: Kept) -> tuple[nn.Module, nn.Module]:
    masked = InsertMasks(analysis.coupling, analysis.groups)(analysis.captured.module)
    set_masks(masked, analysis.groups, kept)
    return SliceGroups(analysis.coupling, kept)(analysis.captured.module), masked


def test_every_group_by_itself(decoder: Analysis) -> None:
    ids = torch.randint(11, (2, 6))
    for group in decoder.groups:
        small, masked = sliced_and_masked(decoder, random_kept([group], torch.Generator().manual_seed(0)))
        assert relative_error(masked(ids), small(ids)) < 1e-5
        assert relative_error(decoder.model(ids), small(ids)) > 1e-3


def test_another_batch_and_length_than_the_captured_ones(decoder: Analysis) -> None:
    small, masked = sliced_and_masked(decoder, random_kept(decoder.groups, torch.Generator().manual_seed(1)))
    ids = torch.randint(11, (3, 9))
    assert relative_error(masked(ids), small(ids)) < 1e-5


def test_only_the_named_groups_are_cut() -> None:
    model, inputs = FAMILIES["low rank"]()
    name = check_law(model, inputs).groups[0].name
    assert [group.name for group in check_law(model, inputs, groups=[name]).groups] == [name]


def test_one_unit_of_each_group() -> None:
    model, inputs = tiny_models()["encoder"]
    check_law(model, inputs, keep=(0.0, 0.0))


# ------------------------------------------------------------------------------------------------ random networks
def check_random(seed: int, depth: int) -> None:
    model, (x,) = random_model(seed, depth)
    result = check_law(model.double(), x.double(), seed=seed)
    assert result.groups
    assert result.moved > 1e-4
    assert not result.analysis.unknown_ops


@given(st.integers(0, 10**6), st.integers(1, 3))
@settings(max_examples=15)
def test_random_networks(seed: int, depth: int) -> None:
    check_random(seed, depth)


@pytest.mark.slow
@given(st.integers(0, 10**6), st.integers(1, 10))
@settings(max_examples=300)
def test_many_random_networks(seed: int, depth: int) -> None:
    check_random(seed, depth)


# ------------------------------------------------------------------------------------------------ the check itself
def test_a_broken_law_is_seen_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that lets a flip of channels pass makes a wrong cut."""

    def flip(self: Axes) -> Axes:
        return self

    op = torch.ops.aten.flip.default
    monkeypatch.setitem(registry._ENTRIES, op, dataclasses.replace(registry.known(op), rule=flip))
    registry._known.cache_clear()
    monkeypatch.setattr(registry, "_known", registry._known.__wrapped__)
    model, inputs = FAMILIES["flip channels"]()
    with pytest.raises(VerificationError, match=r"(?s)differ by .*x\.flip|differ by .*> .*conv2d"):
        check_law(model, inputs)


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = tiny_models()["residual_cnn"]
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    check_law(model, inputs)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_random_models_are_reproducible() -> None:
    (first, (x,)), (second, (y,)) = random_model(7, 3), random_model(7, 3)
    assert torch.equal(x, y)
    pairs: Sequence[tuple[Tensor, Tensor]] = list(zip(first.parameters(), second.parameters(), strict=True))
    assert pairs
    assert all(torch.equal(a, b) for a, b in pairs)
    assert first(x).isfinite().all()
