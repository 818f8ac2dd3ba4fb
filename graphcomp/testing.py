"""The law as a function, tiny models to try things on, and random networks.

Law 2: for every choice of kept units, the sliced model and the masked model compute the same function.

    result = check_law(model, example_inputs)      # raises VerificationError where the law does not hold
    assert result.groups and result.moved > 0.01   # something was cut, and cutting it changed the output
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from graphcomp.analysis import Analysis, analyze_captured
from graphcomp.capture import capture
from graphcomp.compare import relative_error, tolerance_of, why_silent
from graphcomp.coupling.axis import kept_indices
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.errors import VerificationError
from graphcomp.graph import neighbourhood, source_line
from graphcomp.graph_module import tensor_leaves
from graphcomp.pruning.law import check_slicing
from graphcomp.pruning.mask import InsertMasks, computed_with, hold_masks, set_masks
from graphcomp.pruning.slice import SliceGroups, by_factor, select
from graphcomp.quantization.integers import IntegerInterpreter as IntegerInterpreter
from graphcomp.quantization.integers import check_integers as check_integers
from graphcomp.untouched import eval_copy, same_buffers

KeptUnits: TypeAlias = dict[ChannelGroup, Tensor]


# ------------------------------------------------------------------------------------------------ the law
@dataclass(frozen=True, eq=False)
class LawResult:
    """What `check_law` saw.

    Attributes:
        analysis: groups, frozen axes and unknown ops of the model.
        groups: the groups that were cut.
        max_relative_error: sliced against masked, the worst of all rounds.
        identity_error: the masked model with every unit kept, against the model.
        moved: relative change of the output by the cut, the least of all rounds. 0 says that the check was vacuous.
        unchecked: the law, or a part of it, that could not be checked -> why. Where outputs prove nothing (classes,
            flags, NaN), the floats that they are computed from are compared.
    """

    analysis: Analysis
    groups: tuple[ChannelGroup, ...]
    max_relative_error: float
    identity_error: float
    moved: float
    unchecked: Mapping[str, str] = field(default_factory=dict)


def check_law(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    rounds: int = 1,
    keep: tuple[float, float] = (0.3, 0.9),
    groups: Sequence[str] | None = None,
    tolerance: float | None = None,
) -> LawResult:
    """Check on the example inputs that slicing is masking made physical, that masks of ones change nothing, and that
    units whose parameters are held at zero, as in training, count as masked.

    Args:
        model: any module that `capture` takes; it is left as it was.
        example_inputs, example_kwargs: as for `capture`.
        seed: of the random choice of units.
        rounds: number of random choices.
        keep: each group keeps a share of its units that is drawn from this range, and at least one unit.
        groups: names of the groups to cut; None: all.
        tolerance: largest relative error; None: by the dtype of the output, see `compare.TOLERANCE`.

    Raises:
        VerificationError: the law does not hold; the message shows the first node whose values differ.
    """
    captured = capture(model, example_inputs, example_kwargs)
    analysis = analyze_captured(captured)
    wanted = analysis.groups if groups is None else tuple(analysis.group(name) for name in groups)
    masked = InsertMasks(analysis.coupling, wanted)(captured.module)
    held = InsertMasks(analysis.coupling, wanted, held=True)(captured.module)

    def run(module: nn.Module) -> Any:
        args, kwargs = captured.inputs()
        return module(*args, **kwargs), args, kwargs

    def run_graph(graph: fx.GraphModule) -> Any:
        with same_buffers(graph):
            return run(graph)

    with torch.no_grad(), eval_copy(captured.original, real=True) as copied:
        dense = run(copied)
        allowed = tolerance_of(dense) if tolerance is None else tolerance
        identity = relative_error(dense, run_graph(masked))
        if not identity <= allowed:
            raise VerificationError(
                f"with every unit kept the masked model is off by {identity:.1e} (relative), allowed {allowed:.0e}"
            )
        generator = torch.Generator().manual_seed(seed)
        errors, moves, unchecked = [0.0], [math.inf], dict[str, str]()
        for _ in range(rounds):
            kept = random_kept(wanted, generator, keep)
            set_masks(masked, wanted, kept)
            small = SliceGroups(analysis.coupling, kept)(captured.module)
            expected, actual = run_graph(masked), run_graph(small)
            errors.append(relative_error(expected, actual))
            moves.append(relative_error(dense, expected))
            if not errors[-1] <= allowed:
                raise _violated(errors[-1], allowed, analysis, masked, small, kept)
            if any(map(why_silent, tensor_leaves(expected[0]))):
                found = check_slicing(analysis.coupling, captured, kept, small)
                errors += [] if math.isnan(found.error) else [found.error]
                unchecked |= found.unchecked
            zeroed = copy.deepcopy(held)
            hold_masks(zeroed, wanted, kept, computed_with(analysis.coupling))
            off = relative_error(expected, run_graph(zeroed))
            if not off <= allowed:
                raise VerificationError(
                    f"with masked units held at zero the model is off by {off:.1e} (relative), allowed {allowed:.0e}"
                )
    return LawResult(analysis, wanted, max(errors), identity, min(moves), unchecked)


def random_kept(
    groups: Sequence[ChannelGroup], generator: torch.Generator, keep: tuple[float, float] = (0.3, 0.9)
) -> KeptUnits:
    """For each group a random share of its units, unequal from group to group, at least one: (k,) int64, ascending."""
    low, high = keep
    kept: KeptUnits = {}
    for group in groups:
        share = low + (high - low) * torch.rand((), generator=generator).item()
        count = max(1, int(group.size * share))
        kept[group] = torch.randperm(group.size, generator=generator)[:count].sort().values
    return kept


def _violated(
    error: float, allowed: float, analysis: Analysis, masked: fx.GraphModule, small: fx.GraphModule, kept: KeptUnits
) -> VerificationError:
    node = _first_difference(analysis, masked, small, kept, allowed)
    return VerificationError(
        f"sliced and masked model differ by {error:.1e} (relative), allowed {allowed:.0e}",
        at="" if node is None else source_line(node),
        why="no single value differs" if node is None else f"the values differ from here on\n{neighbourhood(node)}",
    )


def _first_difference(
    analysis: Analysis, masked: fx.GraphModule, small: fx.GraphModule, kept: KeptUnits, allowed: float
) -> fx.Node | None:
    """The first node of the captured graph whose sliced value is not its masked value at the kept indices."""
    captured, coupling, units = analysis.captured, analysis.coupling, by_factor(kept)
    inputs = pytree.tree_leaves((captured.args, captured.kwargs))
    expected, actual = _values(masked, inputs), _values(small, inputs)
    nodes: list[fx.Node] = list(captured.module.graph.nodes)
    for node in nodes:
        if node.op != "call_function" or node.name not in expected or node.name not in actual:
            continue
        for full, cut, axes in zip(
            _tensors(expected[node.name]), _tensors(actual[node.name]), coupling.axes.get(node, []), strict=False
        ):
            found = {dim: kept_indices(axis, units) for dim, axis in enumerate(axes)}
            wanted = select(full, {dim: index for dim, index in found.items() if index is not None})
            if not relative_error(wanted, cut) <= allowed:
                return node
    return None


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _values(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, Any]:
    """Node name -> value, of one run."""
    values: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    Recorder(module).run(*inputs, enable_io_processing=False)
    return values


# ------------------------------------------------------------------------------------------------ ordinary weights
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


# ------------------------------------------------------------------------------------------------ tiny models
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


# ------------------------------------------------------------------------------------------------ random networks
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
