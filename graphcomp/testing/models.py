"""Tiny models to try things on: a CNN, transformers of three kinds, and fresh weights for any model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every vector of parameters and running statistics values of ordinary size, so that no mistake hides.

    Fresh models have scales of one, biases of zero and statistics (0, 1): units that nobody would miss. Matrices keep
    what their initialisation gave them. Returns `model`, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or (tensor.dim() > 1 and isinstance(tensor, nn.Parameter)):
            continue
        if name.endswith(("running_mean", "bias")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        elif name.endswith(("running_var", "weight", "scale")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


class ResidualCNN(nn.Module):
    """Two residual blocks, the second with a strided shortcut: (n, 3, 8, 8) -> (n, 5)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.first = self._branch(width, width, 1)
        self.second = self._branch(width, 2 * width, 2)
        self.shortcut = nn.Conv2d(width, 2 * width, 1, stride=2)
        self.head = nn.Linear(2 * width, 5)

    @staticmethod
    def _branch(c: int, out: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(c, c, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, out, 3, padding=1), nn.BatchNorm2d(out))

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = F.relu(x + self.first(x))
        x = F.relu(self.shortcut(x) + self.second(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, one pre-norm block with fused qkv: (n, 3, 8, 8) -> (n, 5)."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.norm1, self.norm2, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        n, s, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, s, c))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


class Encoder(nn.Module):
    """As BERT: three embeddings, post-norm, separate q, k and v, padding mask: (n, s) ids and mask -> (n, 5)."""

    def __init__(self, vocabulary: int = 11, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.word, self.position = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 32), nn.Linear(32, width)
        self.norm0, self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm0(self.word(ids) + self.position(torch.arange(ids.shape[1])))
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(mask[:, None, None] == 0, -1e4)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.dense(attended))
        x = self.norm2(x + self.down(F.gelu(self.up(x))))
        logits: Tensor = self.head(torch.tanh(self.pooler(x[:, 0])))
        return logits


class Decoder(nn.Module):
    """As Llama: RMS norm, rotary grouped-query attention, gated feed-forward, tied head: (n, s) -> (n, s, 11)."""

    frequency: Tensor

    def __init__(self, vocabulary: int = 11, width: int = 16, heads: int = 4, kv_heads: int = 2, dim: int = 8) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.embed = nn.Embedding(vocabulary, width)
        self.norm1, self.norm2, self.norm = nn.RMSNorm(width), nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, heads * dim, bias=False), nn.Linear(heads * dim, width, bias=False)
        self.k, self.v = (nn.Linear(width, kv_heads * dim, bias=False) for _ in range(2))
        self.gate, self.up, self.down = nn.Linear(width, 24), nn.Linear(width, 24), nn.Linear(24, width)
        self.register_buffer("frequency", 100 ** (-torch.arange(0, dim, 2) / dim), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, repeats = self.embed(ids), self.heads // self.kv_heads
        angle = torch.outer(torch.arange(ids.shape[1]).to(self.frequency), self.frequency).repeat(1, 2)
        q, k, v = (f(self.norm1(x)).unflatten(-1, (n, -1)).transpose(1, 2)
                   for f, n in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads)))  # fmt: skip
        q, k = (t * angle.cos() + rotate_half(t) * angle.sin() for t in (q, k))
        k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        logits: Tensor = self.norm(x) @ self.embed.weight.t()
        return logits


def rotate_half(x: Tensor) -> Tensor:
    """(..., [a | b]) -> (..., [-b | a])"""
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def tiny_models() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Name -> a tiny model with weights of ordinary size, in eval mode, and inputs of batch 2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image, ids = torch.randn(2, 3, 8, 8), torch.randint(11, (2, 6))
        mask = torch.ones_like(ids).tril(3)
        found: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
            "residual_cnn": (ResidualCNN(), (image,)),
            "vision_transformer": (VisionTransformer(), (image,)),
            "encoder": (Encoder(), (ids, mask)),
            "decoder": (Decoder(), (ids,)),
        }
    return {name: (randomize(model), inputs) for name, (model, inputs) in found.items()}
