"""Residual blocks: regions between two values of one stream, h and h + f(h), that can be left out as a whole.

A block is found in the graph: an addition of which one operand, h, is an ancestor of the other, f(h), where nothing
else reads what f computes on the way, and f multiplies with parameters. What else f reads (masks, tables of rotary
embeddings) does not depend on h. Where the addition and h end in the same ops (layer norm after the sum, as in BERT;
ReLU after the sum, as in ResNet), the block goes from one such end to the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from graphcomp.arguments import wrong
from graphcomp.errors import PlanError
from graphcomp.ir.graph import clone, fetch, is_op, module_path, source_line, tensor_values
from graphcomp.ir.passes import GraphPass
from graphcomp.ir.rewrite import after, redirect
from graphcomp.pruning.consumers import multiplies
from graphcomp.quantization.fold import drop_unread
from graphcomp.torch_compat import OpOverload, schema_of

aten = torch.ops.aten

BLOCK, LAYER = "block", "layer"
"""Roles of residual blocks in `prune=`: each by itself; those together that one item of a list of modules makes."""
DEPTH = (BLOCK, LAYER)

ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
IDENTITIES = (
    aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default,
    aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default,
)  # fmt: skip
"""Ops that compute nothing in eval mode, where dtype and shape stay."""


@dataclass(frozen=True, eq=False)
class Block:
    """One residual block of a graph.

    Attributes:
        name: path of the module that makes the block, with the name of the addition where several blocks have one path.
        start: the value of the stream before.
        end: the value of the stream behind the block, shaped as `start`.
        total: the addition.
        branch: f(h), the operand of the addition.
        ops: the ops of the branch.
        ends: the ops between `total` and `end`, as they also stand in front of `start`; none where that is the sum.
        parameters: names of the parameters that the branch and `ends` read, and nothing else.
        alone: whether nothing but the block reads `start`.
    """

    name: str
    start: fx.Node
    end: fx.Node
    total: fx.Node
    branch: fx.Node
    ops: frozenset[fx.Node]
    ends: tuple[fx.Node, ...]
    parameters: tuple[str, ...]
    alone: bool

    def __repr__(self) -> str:
        return f"Block({self.name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Block) and other.total is self.total

    def __hash__(self) -> int:
        return hash(self.total)

    @property
    def source(self) -> str:
        """The user's line of the addition."""
        return source_line(self.total)


# ------------------------------------------------------------------------------------------------ finding
def find_blocks(module: fx.GraphModule) -> tuple[Block, ...]:
    """Return the residual blocks of a captured graph, in order of execution."""
    place = {node: k for k, node in enumerate(module.graph.nodes)}
    found: list[Block] = []
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in ADDITIONS:
            found += _blocks_at(module, node, place)
    return tuple(_named(found))


def _blocks_at(module: fx.GraphModule, total: fx.Node, place: Mapping[fx.Node, int]) -> Iterator[Block]:
    operands = [n for n in total.args[:2] if isinstance(n, fx.Node)]
    if len(operands) != 2 or operands[0] is operands[1] or total.kwargs.get("alpha", 1) != 1:
        return
    for operand, branch in (operands, operands[::-1]):
        stream = before_identities(operand)
        if not _alike(stream, total) or not _alike(branch, total) or stream.op == "get_attr":
            continue
        ops = _between(stream, branch, place)
        if ops is None or not any(_has_weight(module, node) for node in ops):
            continue
        ends = _ends(stream, total)
        end = ends[-1] if ends else total
        gone = ops | {total, *ends}
        yield Block(
            "", stream, end, total, branch, ops, ends, tuple(_parameters(module, gone, stream)),
            all(user in gone for user in stream.users),
        )  # fmt: skip


def is_identity(node: fx.Node) -> bool:
    """Return whether an op passes on what it reads."""
    return node.op == "call_function" and node.target in IDENTITIES and _alike(node, node.all_input_nodes[0])


def before_identities(node: fx.Node) -> fx.Node:
    """Return the value that ops pass on as `node`."""
    while is_identity(node):
        node = node.all_input_nodes[0]
    return node


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Return whether two values have one shape and one dtype of floats."""
    values = tensor_values(a), tensor_values(b)
    if len(values[0]) != 1 or len(values[1]) != 1:
        return False
    (one,), (other,) = values
    if not one.is_floating_point():
        return False
    return one.dtype == other.dtype and one.dim() == other.dim() and str(one.shape) == str(other.shape)


def _between(start: fx.Node, last: fx.Node, place: Mapping[fx.Node, int]) -> frozenset[fx.Node] | None:
    """Return the ops from `start` to `last`; None where there are none, or others read what they compute."""
    seen: set[fx.Node] = set()
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node not in seen and place[node] > place[start]:
            seen.add(node)
            waiting += node.all_input_nodes
    inside: set[fx.Node] = set()
    for node in sorted(seen, key=place.__getitem__):
        reads = [n for n in node.all_input_nodes if n in inside or n is start]
        # a length of the stream is no value of it
        if any(tensor_values(n) for n in reads) and (tensor_values(node) or any(n is not start for n in reads)):
            inside.add(node)
    if last not in inside:
        return None
    (behind,) = [None] if len(last.users) != 1 else list(last.users)
    closed = behind is not None and all(user in inside or user is behind for node in inside for user in node.users)
    return frozenset(inside) if closed else None


def _has_weight(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether an op multiplies with a parameter, directly or behind ops that move its elements."""
    return multiplies(node) and any(_is_weight(module, operand) for operand in node.all_input_nodes)


def _is_weight(module: fx.GraphModule, node: fx.Node) -> bool:
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node.op == "get_attr" and isinstance(fetch(module, str(node.target)), nn.Parameter)


def _ends(start: fx.Node, total: fx.Node) -> tuple[fx.Node, ...]:
    """Return the ops behind an addition that stand in front of `start`, too."""
    behind = [node for node in _following(total) if not is_identity(node)]
    before = [node for node in _preceding(start) if not is_identity(node)]
    for count in range(min(len(behind), len(before)), 0, -1):
        if all(_same_op(a, b) for a, b in zip(behind[:count], before[-count:], strict=True)):
            return tuple(behind[:count])
    return ()


def _following(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the ops behind a value that read it and nothing else, as long as each is read by one op alone."""
    while len(node.users) == 1:
        (user,) = node.users
        if not _is_unary(user, node):
            return
        yield user
        node = user


def _preceding(node: fx.Node) -> list[fx.Node]:
    """Return the ops that make a value of one other value, first to last."""
    found: list[fx.Node] = []
    while is_op(node):
        data = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if len(data) != 1 or not _is_unary(node, data[0]):
            break
        found.insert(0, node)
        (node,) = data
    return found


def _is_unary(node: fx.Node, data: fx.Node) -> bool:
    """Return whether an op makes of one value another of that shape, with vectors of parameters at most."""
    others = [n for n in node.all_input_nodes if n is not data]
    small = all(n.op == "get_attr" and all(t.dim() <= 1 for t in tensor_values(n)) for n in others)
    return is_op(node) and _alike(node, data) and small and not multiplies(node)


def _same_op(a: fx.Node, b: fx.Node) -> bool:
    """Return whether two ops are one but for the tensors that they read."""

    def plain(node: fx.Node) -> str:
        return str(fx.map_arg((node.args, node.kwargs), lambda _: None))

    return a.target is b.target and plain(a) == plain(b)


def _parameters(module: fx.GraphModule, gone: Collection[fx.Node], start: fx.Node) -> Iterator[str]:
    """Yield the names of parameters that ops in `gone` read, and no other op."""
    dead = set(gone)
    for node in reversed(module.graph.nodes):
        if node is not start and node.users and all(user in dead for user in node.users):
            dead.add(node)
    for node in module.graph.nodes:
        if node.op == "get_attr" and node in dead and isinstance(fetch(module, str(node.target)), nn.Parameter):
            yield str(node.target)


def _named(blocks: Sequence[Block]) -> Iterator[Block]:
    paths = [_common_path(block) for block in blocks]
    for block, path in zip(blocks, paths, strict=True):
        name = path if path and paths.count(path) == 1 else f"{path}/{block.total.name}".lstrip("/")
        yield Block(**{**vars(block), "name": name})


def _common_path(block: Block) -> str:
    """Return the path of the innermost module that holds all parameters of a block, or whose forward adds."""
    owners = [name.rpartition(".")[0].split(".") for name in block.parameters]
    if not owners:
        return module_path(block.total)
    shared: list[str] = []
    for parts in zip(*owners, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


# ------------------------------------------------------------------------------------------------ dropping
def checked_blocks(blocks: Sequence[Block], chosen: Any) -> tuple[Block, ...]:
    """Return the chosen blocks in order of execution.

    Args:
        blocks: of a graph.
        chosen: some of these.

    Raises:
        PlanError: `chosen` is no series of blocks, or one is of another graph.
    """
    fix = "drop_blocks(plan, find_blocks(plan)[2:4])"
    if isinstance(chosen, (str, bytes, Mapping)) or not isinstance(chosen, Iterable):
        raise wrong("blocks", "a series of blocks", chosen, fix)
    found = list(chosen)
    for block in found:
        if block not in blocks:
            raise wrong("each entry of blocks", "a block of this plan", block, fix)
    return order_of(blocks, found)


def check_blocks_alone(prune: Sequence[str], sparsity: Any, budget: Any, given: Iterable[str]) -> None:
    """Refuse options that have no use where whole blocks go.

    Args:
        given: options that ask for something.

    Raises:
        PlanError: both roles of blocks, shares by module, a sparsity beside a budget, or an option without a use.
    """
    if len(set(prune)) > 1:
        raise PlanError(
            f"prune={tuple(prune)!r}: blocks go one by one or by whole layers",
            fix='prune=("block",) or prune=("layer",)',
        )
    if sparsity is not None and budget is not None:
        raise PlanError(f"sparsity={sparsity!r} beside a budget", fix="one of the two")
    names = [name for name in given if name not in ("calibration", "budget", "prune")]
    if names:
        raise PlanError(
            f"{', '.join(names)} with prune={tuple(prune)!r}",
            why="whole blocks go, chosen by the error that the outputs are left with, and no units",
            fix=f'without; or prune=("{prune[0]}", "channel")',
        )


@dataclass(frozen=True)
class DropBlocks(GraphPass):
    """Let what reads the end of a block read the start of the block; what nothing reads any more is deleted.

    Attributes:
        blocks: of the graph.
    """

    blocks: tuple[Block, ...]
    name: ClassVar[str] = "drop blocks"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """Return the graph without the blocks."""
        small, new = clone(module)
        stands_for: dict[fx.Node, fx.Node] = {}
        for block in self.blocks:
            start = stands_for.get(block.start, new[block.start])
            new[block.end].replace_all_uses_with(start)
            stands_for[block.end] = start
        small.graph.eliminate_dead_code(_must_run)  # dropouts, random by their tag, go, too
        drop_unread(small)
        small.graph.lint()
        small.recompile()
        return small


def _must_run(node: fx.Node) -> bool:
    """Return whether a node stays though nothing reads what it computes."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    return isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable


@dataclass(frozen=True)
class MaskBlocks(GraphPass):
    """Multiply what blocks add to their stream by 0: what a graph without the blocks is compared with.

    start + 0 · (end − start): where ops stand behind the sum, they are left out with the branch.

    Attributes:
        blocks: of the graph.
    """

    blocks: tuple[Block, ...]
    name: ClassVar[str] = "mask blocks"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """Return the graph with masked blocks."""
        masked, new = clone(module)
        stands_for: dict[fx.Node, fx.Node] = {}
        for block in self.blocks:
            start, end = stands_for.get(block.start, new[block.start]), new[block.end]
            users = list(end.users)
            make = after(end)
            added = make(aten.mul.Tensor, make(aten.sub.Tensor, end, start), 0.0)
            total = stands_for[block.end] = make(aten.add.Tensor, start, added)
            redirect(users, end, total)
        masked.graph.lint()
        masked.recompile()
        return masked


def order_of(blocks: Sequence[Block], chosen: Collection[Block]) -> tuple[Block, ...]:
    """Return the chosen blocks in order of execution."""
    return tuple(block for block in blocks if block in chosen)
