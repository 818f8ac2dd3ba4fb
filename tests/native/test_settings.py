"""Numbers in an object of settings that several modules share, one of which needs another number."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.ir.settings import OwnSettings, ints_of, is_settings, with_own


@dataclass
class Config:
    """As libraries have them."""

    width: int = 16
    heads: int = 4
    activation: str = "relu"


class Attention(nn.Module):
    """Reads the number of heads off the config whenever it runs, as the attention of Phi-3 does."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.head_dim = config, config.width // config.heads
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        n = self.config.heads * self.head_dim
        every = self.qkv(x)
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in (every[..., :n], every[..., n : 2 * n], every[..., 2 * n :])
        )
        found = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        result: Tensor = self.out(found)
        return result if self.config.activation == "relu" else -result


class Layers(nn.Module):
    """Two layers of one config."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.config = Config(width)
        self.layers = nn.ModuleList(Attention(self.config) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def _compressed() -> tuple[Layers, Tensor, gc.CompressedModel]:
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        model.layers[0].out.weight[:, :8] *= 0.01
        model.layers[0].qkv.weight[32:40] *= 0.01
    return model, x, gc.compress(model, x, sparsity=0.25, prune=("head",), progress=False)


def test_each_module_gets_a_number_of_its_own() -> None:
    model, x, small = _compressed()
    assert type(small.module) is Layers, small.reason
    assert [layer.config.heads for layer in small.module.layers] == [2, 4]
    assert small.module.config.heads == 4 and [layer.config.heads for layer in model.layers] == [4, 4]
    assert ("layers.0", "config.heads", 2) in small.edits
    small.module.config.activation = "none"
    assert torch.equal(small.module.layers[0](x), -_compressed()[2].module.layers[0](x))


def test_a_checkpoint_has_the_numbers(tmp_path: Path) -> None:
    _, x, small = _compressed()
    small.save(tmp_path / "small")
    again = gc.load(tmp_path / "small", model_factory=Layers)
    assert torch.equal(again(x), small(x))
    copied: Any = copy.deepcopy(small)
    assert torch.equal(copied(x), small(x))
    copied.module.config.activation = "none"
    assert not torch.equal(copied(x), small(x))


def test_settings_are_plain_data_under_names() -> None:
    own = with_own(Config(), "heads", 2)
    assert isinstance(own, Config) and type(own) is OwnSettings
    assert (own.heads, own.width, ints_of(own)) == (2, 16, {"width": 16, "heads": 2})
    again = pickle.loads(pickle.dumps(with_own(own, "width", 8)))
    assert (again.heads, again.width) == (2, 8)
    assert is_settings(Config()) and is_settings(own)
    assert not any(map(is_settings, (nn.Linear(2, 2), torch.ones(1), Config, print, {}, "text", object())))
