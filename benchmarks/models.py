"""Models of the papers that the benchmarks train, for 32 x 32 images; and a small BERT."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from benchmarks.common import import_torchvision
from benchmarks.digits import ResidualBlock


def resnet20(classes: int = 10) -> nn.Module:
    """ResNet-20 (He et al. 2015, section 4.2), with projections as shortcuts: (n, 3, 32, 32) to (n, classes).

    40.8 million multiply-accumulates an image, 0.3 million parameters.
    """
    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [ResidualBlock(before, after, 1 if before == after else 2) for before, after in pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def vgg7(classes: int = 10, width: int = 128) -> nn.Module:
    """VGG7 as papers on quantization have it, with batch norms: (n, 3, 32, 32) to (n, classes).

    608.1 million multiply-accumulates an image, 4.7 million parameters, with 128 channels in the first layers.
    """
    layers: list[nn.Module] = []
    channels = 3
    for own in (width, 2 * width, 4 * width):
        for before in (channels, own):
            layers += [nn.Conv2d(before, own, 3, padding=1, bias=False), nn.BatchNorm2d(own), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        channels = own
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 4 * 4, classes))


def small_bert(classes: int = 2) -> nn.Module:
    """BERT with random weights, width 256, 4 layers of 4 heads: token ids (n, s) to logits (n, classes)."""
    import_torchvision()
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        num_labels=classes,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)
