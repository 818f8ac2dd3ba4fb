"""What falls out of the algebra without any special case: the groups of each structure, and the law on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.coupling.groups import ChannelGroup, Member
from graphcomp.testing import Block, LawResult, check_law, randomize, rotate_half


def checked(model: nn.Module, *inputs: Tensor) -> dict[str, ChannelGroup]:
    """The groups of the model by name; the law holds on it in float64, and cutting them changes the output."""
    result = law(model, *inputs)
    assert result.moved > 1e-3
    return {group.name: group for group in result.groups}


def law(model: nn.Module, *inputs: Tensor) -> LawResult:
    randomize(model).double()
    result = check_law(model, tuple(x.double() if x.is_floating_point() else x for x in inputs))
    assert not result.analysis.unknown_ops
    return result


def where(group: ChannelGroup) -> set[str]:
    """'name.dim' of every member, with a '<' where the member consumes the units."""
    return {f"{m.name}.{m.dim}{'<' if m.consumes else ''}" for m in group.members}


def sizes(groups: dict[str, ChannelGroup]) -> dict[str, int]:
    return {name: group.size for name, group in groups.items()}


def member(group: ChannelGroup, name: str) -> Member:
    (found,) = (m for m in group.members if m.name == name)
    return found


def indices(group: ChannelGroup, name: str, unit: int = 0) -> list[int]:
    """Which indices of a member belong to one unit."""
    return member(group, name).indices(torch.tensor([unit])).tolist()


def net(run: Callable[[Any, Tensor], Tensor], **parts: Any) -> nn.Module:
    return Block("structure", run, **parts)


def conv(c: int, out: int, k: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, out, k, padding=k // 2, bias=False, **options)


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SEQUENCE = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------ convolutions
def test_residual_connection() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x + m.b(F.relu(m.a(x))))  # type: ignore[no-any-return]

    groups = checked(net(run, stem=conv(3, 8), a=conv(8, 6, 3), b=conv(6, 8), head=conv(8, 4)), IMAGE)
    assert sizes(groups) == {"stem/width": 8, "a/channel": 6}
    assert where(groups["stem/width"]) == {"stem.weight.0", "b.weight.0", "a.weight.1<", "head.weight.1<"}
    assert where(groups["a/channel"]) == {"a.weight.0", "b.weight.1<"}
    assert groups["stem/width"].role == "width"


def test_convolution_over_tokens_passes_their_channels() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.down(m.mix(m.up(x).relu()))  # type: ignore[no-any-return]

    groups = checked(net(run, up=nn.Linear(5, 12), mix=nn.Conv1d(6, 6, 1), down=nn.Linear(12, 4)), SEQUENCE)
    assert sizes(groups) == {"up/hidden": 12}


def test_a_filter_for_each_sample() -> None:
    """The batch, a symbol, is the number of groups."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        n, c, h, w = x.shape
        filters = m.filters * m.style(x.mean((2, 3)))[:, None, :, None, None]
        y = F.conv2d(x.reshape(1, -1, h, w), filters.reshape(-1, c, 3, 3), padding=1, groups=n)
        return m.head(y.reshape(n, -1, h, w))  # type: ignore[no-any-return]

    filters = nn.Parameter(torch.randn(6, 8, 3, 3))
    groups = checked(net(run, stem=conv(3, 8), style=nn.Linear(8, 8), filters=filters, head=conv(6, 4)), IMAGE)
    assert sorted(sizes(groups).values()) == [6, 8]
    assert {group.role for group in groups.values()} == {"channel"}


def test_dense_connection() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = torch.cat([x, m.a(x)], 1)
        return m.head(torch.cat([x, m.b(x)], 1))  # type: ignore[no-any-return]

    groups = checked(net(run, stem=conv(3, 8), a=conv(8, 4), b=conv(12, 5), head=conv(17, 4)), IMAGE)
    assert sizes(groups) == {"stem/channel": 8, "a/channel": 4, "b/channel": 5}
    assert where(groups["a/channel"]) == {"a.weight.0", "b.weight.1<", "head.weight.1<"}
    assert indices(groups["stem/channel"], "head.weight", 2) == [2]
    assert indices(groups["a/channel"], "head.weight", 2) == [10]
    assert indices(groups["b/channel"], "head.weight", 2) == [14]


def test_depthwise_convolution() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(m.b(m.a(x)))  # type: ignore[no-any-return]

    groups = checked(net(run, a=conv(3, 8), b=conv(8, 8, 3, groups=8), c=conv(8, 4)), IMAGE)
    assert sizes(groups) == {"a/channel": 8}
    assert where(groups["a/channel"]) == {"a.weight.0", "b.weight.0", "c.weight.1<"}


def test_depthwise_convolution_with_a_multiplier() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(m.b(m.a(x)))  # type: ignore[no-any-return]

    groups = checked(net(run, a=conv(3, 8), b=conv(8, 24, 3, groups=8), c=conv(24, 4)), IMAGE)
    (inputs, multiplier) = groups.values()
    assert (inputs.size, multiplier.size) == (8, 3)
    assert where(inputs) == {"a.weight.0", "b.weight.0", "c.weight.1<"}
    assert where(multiplier) == {"b.weight.0", "c.weight.1<"}
    assert indices(inputs, "c.weight", 1) == [3, 4, 5]


def test_grouped_convolution() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(m.b(m.a(x)))  # type: ignore[no-any-return]

    groups = checked(net(run, a=conv(3, 12), b=conv(12, 8, 3, groups=4), c=conv(8, 4)), IMAGE)
    by_role = {(g.role, g.size): g for g in groups.values()}
    assert set(by_role) == {("group", 4), ("channel", 3), ("channel", 2)}
    assert where(by_role["group", 4]) == {"a.weight.0", "b.weight.0", "c.weight.1<"}
    assert where(by_role["channel", 3]) == {"a.weight.0", "b.weight.1<"}
    assert where(by_role["channel", 2]) == {"b.weight.0", "c.weight.1<"}
    assert indices(by_role["group", 4], "a.weight", 1) == [3, 4, 5]
    assert indices(by_role["channel", 3], "a.weight", 1) == [1, 4, 7, 10]


def test_squeeze_excite() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        gate = m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return m.head(x * gate)  # type: ignore[no-any-return]

    groups = checked(net(run, stem=conv(3, 8), down=conv(8, 4), up=conv(4, 8), head=conv(8, 4)), IMAGE)
    assert sizes(groups) == {"stem/channel": 8, "down/channel": 4}
    assert where(groups["stem/channel"]) == {"stem.weight.0", "up.weight.0", "down.weight.1<", "head.weight.1<"}


def test_channel_shuffle() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = m.a(x).view(n, 2, 4, h, w).transpose(1, 2).reshape(n, 8, h, w)
        return m.c(m.b(x))  # type: ignore[no-any-return]

    groups = checked(net(run, a=conv(3, 8), b=conv(8, 8, 3, groups=8), c=conv(8, 4)), IMAGE)
    outer, inner = groups.values()
    assert (outer.size, inner.size) == (2, 4)
    for group in (outer, inner):
        assert where(group) == {"a.weight.0", "b.weight.0", "c.weight.1<"}
    assert indices(outer, "a.weight", 1) == [4, 5, 6, 7]
    assert indices(outer, "b.weight", 1) == [1, 3, 5, 7]


def test_channel_shuffle_between_grouped_convolutions() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.b(m.a(x))
        x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return m.d(m.c(x))  # type: ignore[no-any-return]

    model = net(run, a=conv(3, 8), b=conv(8, 8, groups=2), c=conv(8, 8, groups=2), d=conv(8, 4))
    groups = checked(model, IMAGE)
    assert {indices(g, "b.weight")[0] for g in groups.values() if any(m.name == "b.weight" for m in g.members)} == {0}
    assert all(g.size in (2, 4) for g in groups.values())


def test_flatten_between_conv_and_linear() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.linear(F.max_pool2d(m.conv(x), 4).flatten(1))  # type: ignore[no-any-return]

    groups = checked(net(run, conv=conv(3, 8), linear=nn.Linear(32, 5)), IMAGE)
    assert sizes(groups) == {"conv/channel": 8}
    assert where(groups["conv/channel"]) == {"conv.weight.0", "linear.weight.1<"}
    assert indices(groups["conv/channel"], "linear.weight", 2) == [8, 9, 10, 11]


# ------------------------------------------------------------------------------------------------ attention
def fused_3hd(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def fused_q_k_v(m: Any, x: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in m.qkv(x).split(8, -1))
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def fused_h3d(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, -1)
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("run", "head", "q_dim", "v_dim"),
    [
        # (3 h d) is read by number, so q, k and v of a fused projection keep the same units of head_dim
        (fused_3hd, [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23], [1, 5, 9, 13, 17, 21], None),
        (fused_q_k_v, [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23], [1, 5, 9, 13], [17, 21]),
        (fused_h3d, list(range(12, 24)), [1, 5, 13, 17], [9, 21]),
    ],
    ids=["(3 h d)", "[q | k | v]", "(h 3 d)"],
)
def test_fused_qkv(
    run: Callable[[Any, Tensor], Tensor], head: list[int], q_dim: list[int], v_dim: list[int] | None
) -> None:
    groups = checked(net(run, qkv=nn.Linear(5, 24), o=nn.Linear(8, 4)), SEQUENCE)
    (heads,) = (g for g in groups.values() if g.role == "head")
    dims = [g for g in groups.values() if g.role == "head_dim"]
    assert heads.size == 2
    assert where(heads) == {"qkv.weight.0", "qkv.bias.0", "o.weight.1<"}
    assert indices(heads, "qkv.weight", 1) == head
    assert indices(heads, "o.weight", 1) == [4, 5, 6, 7]
    assert all(g.size == 4 for g in dims)
    assert [indices(g, "qkv.weight", 1) for g in dims] == ([q_dim] if v_dim is None else [q_dim, v_dim])
    assert "o.weight.1<" in where(dims[-1])


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v)


def einsums_of_open_dims(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("...jd,...ij->...id", v, torch.einsum("...id,...jd->...ij", q, k).softmax(-1))


def einsum_of_three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhid,bhjd,bhje->bhie", q, k, v)


@pytest.mark.parametrize("attention", [products, einsums, einsums_of_open_dims, einsum_of_three])
def test_attention_written_out(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (m.q, m.k, m.v))
        return m.o(attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    parts = {"q": nn.Linear(5, 8), "k": nn.Linear(5, 8), "v": nn.Linear(5, 8), "o": nn.Linear(8, 4)}
    groups = checked(net(run, **parts), SEQUENCE)
    assert sizes(groups) == {"q/head": 2, "q/head_dim": 4, "v/head_dim": 4}


def test_einsum_of_a_matrix_for_each_expert() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).unflatten(-1, (3, 4))
        return m.o(torch.einsum("...ei,eio->...eo", y, m.w).flatten(2))  # type: ignore[no-any-return]

    weight = nn.Parameter(torch.randn(3, 4, 6))
    groups = checked(net(run, a=nn.Linear(5, 12), w=weight, o=nn.Linear(18, 4)), SEQUENCE)
    assert {(group.role, group.size) for group in groups.values()} == {("expert", 3), ("hidden", 4), ("hidden", 6)}


def grouped_query(how: str) -> Callable[[Any, Tensor], Tensor]:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (m.q, m.k, m.v))
        if how == "repeat_interleave":
            k, v = (t.repeat_interleave(3, 1) for t in (k, v))
        elif how == "expand":
            k, v = (t[:, :, None].expand(-1, -1, 3, -1, -1).flatten(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=how == "enable_gqa")
        return m.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    return run


@pytest.mark.parametrize("how", ["repeat_interleave", "expand", "enable_gqa"])
def test_a_key_value_head_takes_its_query_heads_along(how: str) -> None:
    parts = {"q": nn.Linear(5, 24), "k": nn.Linear(5, 8), "v": nn.Linear(5, 8), "o": nn.Linear(24, 4)}
    groups = checked(net(grouped_query(how), **parts), SEQUENCE)
    (kv,), (repeats,) = ([g for g in groups.values() if g.role == role] for role in ("head", "group"))
    assert (kv.size, repeats.size) == (2, 3)
    assert {m.name for m in kv.members} >= {"q.weight", "k.weight", "v.weight", "o.weight"}
    assert indices(kv, "k.weight", 1) == [4, 5, 6, 7]
    assert indices(kv, "q.weight", 1) == list(range(12, 24))
    assert indices(kv, "o.weight", 1) == list(range(12, 24))
    assert {m.name for m in repeats.members} == {"q.weight", "q.bias", "o.weight"}
    assert sorted(g.size for g in groups.values() if g.role == "head_dim") == [4, 4]


class Rotary(nn.Module):
    """Attention scores of rotated queries and keys; the tables are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(5, 16), nn.Linear(5, 16)
        angle = torch.outer(torch.arange(6.0), 10 ** (-torch.arange(4) / 4)).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x: Tensor) -> Tensor:
        q, k = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k))
        q, k = (t * self.cos + rotate_half(t) * self.sin for t in (q, k))
        return (q @ k.mT).sum(1)


def test_rotary_embedding_couples_the_halves_of_head_dim_and_the_tables() -> None:
    groups = checked(Rotary(), SEQUENCE)
    (dims,) = (g for g in groups.values() if g.role == "head_dim")
    assert dims.size == 4
    assert {f"{m.name}.{m.dim}" for m in dims.members} == {
        "q.weight.0", "q.bias.0", "k.weight.0", "k.bias.0", "cos.1", "sin.1"
    }  # fmt: skip
    assert indices(dims, "cos", 1) == [1, 5]
    assert indices(dims, "q.weight", 1) == [1, 5, 9, 13]


def test_relative_position_bias_table_loses_the_column_of_a_head() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (m.q, m.k, m.v))
        position = torch.arange(6)
        bias = m.table[(position[:, None] - position + 5).flatten()].view(6, 6, 2).permute(2, 0, 1)
        scores = (q @ k.mT / math.sqrt(4) + bias).softmax(-1)
        return m.o((scores @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    parts = {name: nn.Linear(5, 8) for name in "qkv"}
    groups = checked(net(run, **parts, o=nn.Linear(8, 4), table=nn.Parameter(torch.randn(11, 2))), SEQUENCE)
    (heads,) = (g for g in groups.values() if g.role == "head")
    assert heads.size == 2
    assert "table.1" in where(heads)
    assert {m.name for m in heads.members} == {f"{n}.{p}" for n in "qkv" for p in ("weight", "bias")} | {
        "o.weight", "table"
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ feed-forward
def test_gated_feed_forward() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.down(F.silu(m.gate(x)) * m.up(x))  # type: ignore[no-any-return]

    groups = checked(net(run, gate=nn.Linear(5, 12), up=nn.Linear(5, 12), down=nn.Linear(12, 4)), SEQUENCE)
    assert sizes(groups) == {"gate/hidden": 12}
    assert where(groups["gate/hidden"]) == {
        "gate.weight.0", "gate.bias.0", "up.weight.0", "up.bias.0", "down.weight.1<"
    }  # fmt: skip


def test_fused_gated_feed_forward() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        gate, up = m.both(x).chunk(2, -1)
        return m.down(F.silu(gate) * up)  # type: ignore[no-any-return]

    groups = checked(net(run, both=nn.Linear(5, 24), down=nn.Linear(12, 4)), SEQUENCE)
    assert sizes(groups) == {"both/hidden": 12}
    assert where(groups["both/hidden"]) == {"both.weight.0", "both.bias.0", "down.weight.1<"}
    assert indices(groups["both/hidden"], "both.weight", 3) == [3, 15]


class Experts(nn.Module):
    """Three experts in stacked weights, all of them run and mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 3)
        self.up = nn.Parameter(torch.randn(3, 5, 12))
        self.down = nn.Parameter(torch.randn(3, 12, 4))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        tokens = x.flatten(0, 1).expand(3, -1, -1)
        y = torch.bmm(F.relu(torch.bmm(tokens, self.up)), self.down)
        return torch.einsum("etc,te->tc", y, weights.flatten(0, 1))


def test_stacked_expert_weights() -> None:
    result = law(Experts(), SEQUENCE)
    (hidden,) = result.groups
    assert (hidden.size, hidden.role) == (12, "hidden")
    assert where(hidden) == {"up.2", "down.1<"}
    assert ("up", 0) in {(f.name, f.dim) for f in result.analysis.frozen}  # the router's softmax tells experts apart


# ------------------------------------------------------------------------------------------------ embeddings, norms
class Tied(nn.Module):
    """A language model's two ends on one table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(9, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.b(F.relu(self.a(x))))


def test_tied_embeddings() -> None:
    result = law(Tied(), torch.randint(9, (2, 6)))
    width, hidden = sorted(result.groups, key=lambda g: -g.size)
    assert (width.size, width.role, hidden.size) == (8, "width", 6)
    assert {f"{m.name}.{m.dim}" for m in width.members} == {"embed.weight.1", "a.weight.1", "b.weight.0", "b.bias.0"}
    assert {(f.name, f.dim) for f in result.analysis.frozen} == {("embed.weight", 0)}


def test_patch_merging() -> None:
    """As Swin: four neighbours side by side, [c | c | c | c]."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).permute(0, 2, 3, 1)
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return m.reduce(torch.cat(corners, -1))  # type: ignore[no-any-return]

    groups = checked(net(run, stem=conv(3, 8), reduce=nn.Linear(32, 4, bias=False)), IMAGE)
    assert sizes(groups) == {"stem/channel": 8}
    assert where(groups["stem/channel"]) == {"stem.weight.0", "reduce.weight.1<"}
    assert indices(groups["stem/channel"], "reduce.weight", 3) == [3, 11, 19, 27]


def test_rms_norm_written_out() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.b(m.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))  # type: ignore[no-any-return]

    groups = checked(net(run, a=nn.Linear(5, 12), b=nn.Linear(12, 4), scale=nn.Parameter(torch.randn(12))), SEQUENCE)
    assert sizes(groups) == {"a/hidden": 12}
    (group,) = groups.values()
    assert group.normalized
    assert where(group) == {"a.weight.0", "a.bias.0", "scale.0", "b.weight.1<"}


def test_norm_parameters_are_producers() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.b(m.norm(m.a(x)))  # type: ignore[no-any-return]

    (group,) = checked(net(run, norm=nn.LayerNorm(12), a=nn.Linear(5, 12), b=nn.Linear(12, 4)), SEQUENCE).values()
    assert group.name == "a/hidden"
    assert group.normalized
    assert where(group) == {"norm.weight.0", "norm.bias.0", "a.weight.0", "a.bias.0", "b.weight.1<"}


# ------------------------------------------------------------------------------------------------ quantizers
def fake_quant(x: Tensor, step: Tensor) -> Tensor:
    """A chain a user might write, with a straight-through rounding."""
    scaled = torch.clamp(x / step, -8, 7)
    return (scaled + (scaled.round() - scaled).detach()) * step


class Quantized(nn.Module):
    """Two convolutions and a residual, with or without fake-quantized weights and activations."""

    def __init__(self, quantized: bool) -> None:
        super().__init__()
        self.quantized = quantized
        self.stem, self.a, self.b, self.head = conv(3, 8), conv(8, 6, 3), conv(6, 8), conv(8, 4)
        self.register_buffer("step_a", torch.full((6, 1, 1, 1), 0.05))
        self.register_buffer("step_x", torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.quantized:
            hidden = F.conv2d(fake_quant(x, self.step_x), fake_quant(self.a.weight, self.step_a), padding=1)
            return self.head(x + F.conv2d(hidden.relu(), fake_quant(self.b.weight, self.step_x)))
        return self.head(x + self.b(self.a(x).relu()))


def test_groups_are_the_same_with_and_without_quantizers() -> None:
    plain, quantized = checked(Quantized(False), IMAGE), checked(Quantized(True), IMAGE)

    def parameters(groups: dict[str, ChannelGroup]) -> dict[str, tuple[int, str, set[str]]]:
        return {n: (g.size, g.role, {w for w in where(g) if not w.startswith("step")}) for n, g in groups.items()}

    assert parameters(plain) == parameters(quantized)
    assert "step_a.0" in where(quantized["a/channel"])  # a step for each channel goes with its channel


def test_observers_of_torch_are_pointwise() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = torch.fake_quantize_per_channel_affine(m.w, m.scale, m.zero, 0, -8, 7)
        x = torch.fake_quantize_per_tensor_affine(F.linear(x, y), 0.1, 0, -128, 127)
        return m.b(x)  # type: ignore[no-any-return]

    model = net(run, w=nn.Parameter(torch.randn(12, 5)), b=nn.Linear(12, 4))
    model.register_buffer("scale", torch.rand(12) + 0.05)
    model.register_buffer("zero", torch.zeros(12, dtype=torch.int32))
    result = check_law(model, SEQUENCE)
    (group,) = result.groups
    assert {m.name for m in group.members} == {"w", "scale", "zero", "b.weight"}
