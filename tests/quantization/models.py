"""Small models that hold each structure a placement has to tell apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + x)


class ResidualNet(nn.Module):
    """Stem with ReLU6 and a pool, one residual block, a depthwise pair, pooled into a classifier."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, c, 3, stride=2, bias=False), nn.BatchNorm2d(c)
        self.block = Block(c)
        self.depthwise, self.pointwise = nn.Conv2d(c, c, 3, groups=c), nn.Conv2d(c, 2 * c, 1)
        self.fc = nn.Linear(2 * c, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu6(self.bn(self.stem(x))), 2)
        x = self.pointwise(functional.relu(self.depthwise(self.block(x))))
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Encoder(nn.Module):
    """Token embedding, one attention head written out, a feed-forward layer; logits share the embedding."""

    def __init__(self, d: int = 16, vocabulary: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.norm = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 4
        x = self.norm(x + self.o(scores.softmax(-1) @ self.v(x)))
        return self.head(x + self.down(functional.gelu(self.up(x))))


def random_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms with statistics of their own, in eval mode: the defaults would hide a wrong fold."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.3)
    return model.eval()


def residual() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return random_norms(ResidualNet()), torch.randn(6, 3, 24, 24)


def encoder() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Encoder().eval(), torch.randint(0, 40, (4, 7))
