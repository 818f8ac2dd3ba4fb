"""Cut a graph into pieces that can be timed alone: each op that multiplies, with what a runtime fuses behind the op.

A node belongs to the piece of the latest op that multiplies among all that the node is computed from. So no piece reads
what a later piece computes, each node belongs to one piece, and the times of the pieces add up to that of the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from graphcomp.ir.run_nodes import run_tapped
from graphcomp.torch_compat import FakeTensorMode, pytree

HEAD = "head"
"""Name of the piece in front of the first op that multiplies."""

Values = Mapping[fx.Node, Any]
"""What each node of a graph computed in one run."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a graph.

    Attributes:
        name: of the node that multiplies; HEAD of the piece in front of all.
        nodes: in the order of the graph. Constants and lengths are no part of any piece.
        inputs: nodes that the piece reads.
        outputs: nodes of the piece that others read.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def computed_values(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """Return what each node computes from flat `inputs`."""
    found: dict[fx.Node, Any] = {}
    run_tapped(module, inputs, see=lambda node, value: found.update({node: value}))
    return found


def pieces_of(
    module: fx.GraphModule, values: Values, anchors: Collection[str], inlined: Collection[Any] = ()
) -> tuple[Piece, ...]:
    """Cut a graph.

    Args:
        module: the graph.
        values: of a run of `module`.
        anchors: names of the nodes that begin a piece.
        inlined: functions that are computed anew in each piece that reads what they compute: a dequantization, which
            runtimes fuse with what reads the floats.
    """
    of: dict[fx.Node, int] = {}
    names = [HEAD]
    moving = _moving(module, values)
    for node in module.graph.nodes:
        if node not in moving or node.op in ("placeholder", "output"):
            continue
        if node.name in anchors:
            names.append(node.name)
            of[node] = len(names) - 1
        else:
            of[node] = max((of.get(read, 0) for read in node.all_input_nodes), default=0)
    own = {node: place for node, place in of.items() if node.target not in inlined}
    members: list[list[fx.Node]] = [[] for _ in names]
    for node, place in own.items():
        members[place].append(node)
    found = []
    for name, nodes in zip(names, members, strict=True):
        inside = set(nodes)
        read = dict.fromkeys(r for n in nodes for r in _sources(n, moving, own) if r not in inside)
        outputs = [n for n in nodes if any(not _users(u, own) <= inside for u in n.users)]
        if nodes and outputs:
            found.append(Piece(name, tuple(nodes), tuple(read), tuple(outputs)))
    return tuple(found)


def _moving(module: fx.GraphModule, values: Values) -> set[fx.Node]:
    """Return the nodes whose tensors depend on the inputs."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        depends = node.op == "placeholder" or any(read in found for read in node.all_input_nodes)
        if node.op == "output" or (depends and _has_tensors(values.get(node))):
            found.add(node)
    return found


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value)
    )


def _sources(node: fx.Node, moving: set[fx.Node], own: Mapping[fx.Node, int]) -> Iterator[fx.Node]:
    """Yield what a node reads of other nodes, behind what is computed anew."""
    for read in node.all_input_nodes:
        if read in own or read.op == "placeholder":
            if read in moving:
                yield read
        elif read in moving:
            yield from _sources(read, moving, own)


def _users(node: fx.Node, own: Mapping[fx.Node, int]) -> set[fx.Node]:
    """Return the nodes that read a node: behind it, where it is computed anew."""
    if node in own or node.op == "output" or not node.users:
        return {node}
    return {user for reader in node.users for user in _users(reader, own)}


def touched(pieces: Sequence[Piece], values: Values) -> int:
    """Return the bytes that the pieces read of weights and write. Constants of the first piece are tables that are
    looked up, of which a run reads some rows."""
    weights = {n for piece in pieces if piece.name != HEAD for node in piece.nodes for n in constants(node)}
    written = {node for piece in pieces for node in piece.outputs}
    tensors = [t for node in weights | written for t in pytree.tree_leaves(values[node]) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def constants(node: fx.Node) -> set[fx.Node]:
    """Return the tensors that a node reads, itself or behind what is computed of constants."""
    found: set[fx.Node] = set()
    for read in node.all_input_nodes:
        if read.op == "get_attr":
            found.add(read)
        elif read.all_input_nodes and all(source.op == "get_attr" for source in read.all_input_nodes):
            found.update(read.all_input_nodes)
    return found


# ------------------------------------------------------------------------------------------------ side by side
@dataclass(frozen=True, eq=False)
class SideBySide:
    """Pieces in one graph, which share nothing but constants.

    Attributes:
        module: the graph. A flat list of tensors in, a flat list of tensors out.
        inputs: of the graph, values of one run.
        reads: for each piece the positions of its inputs.
        returns: for each piece the positions of its outputs.
    """

    module: fx.GraphModule
    inputs: tuple[Tensor, ...]
    reads: tuple[tuple[int, ...], ...]
    returns: tuple[tuple[int, ...], ...]


def side_by_side(module: fx.GraphModule, values: Values, pieces: Sequence[Piece]) -> SideBySide:
    """Put copies of pieces into one graph, all lengths fixed to those of a run.

    Args:
        module: what the pieces are of. Its tensors are shared.
        values: of a run of `module`.
        pieces: of `module`.
    """
    graph = fx.Graph()
    copy = _Copy(module, graph, values, FakeTensorMode(allow_non_fake_inputs=True))
    places: list[list[fx.Node]] = []
    for piece in pieces:
        copy.begin()
        places.append([copy.place(node) for node in piece.inputs])
        for node in piece.nodes:
            copy.node(node)
        copy.end(piece.outputs)
    for made in reversed(copy.places):  # inputs stand in front of all
        next(iter(graph.nodes)).prepend(made)
    graph.output(list(copy.outputs))
    order = {node: k for k, node in enumerate(copy.places)}
    found = fx.GraphModule(module, graph)
    reads = tuple(tuple(order[node] for node in own) for own in places)
    return SideBySide(found.eval(), tuple(copy.inputs), reads, tuple(copy.returns))


class _Copy:
    """Copies nodes of one graph into another."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph, values: Values, mode: FakeTensorMode) -> None:
        self.module, self.graph, self.values, self.mode = module, graph, values, mode
        self.places: list[fx.Node] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[fx.Node] = []
        self.returns: list[tuple[int, ...]] = []
        self._made: dict[fx.Node, fx.Node] = {}

    def begin(self) -> None:
        """Begin a piece: nothing is shared with those before."""
        self._made = {}

    def place(self, node: fx.Node) -> fx.Node:
        """Return a new input that stands for a node."""
        made = self.graph.placeholder(f"in_{len(self.places)}")
        made.meta["val"] = self._fake(self.values[node])
        self.places.append(made)
        self.inputs.append(self.values[node].detach())
        self._made[node] = made
        return made

    def node(self, node: fx.Node) -> fx.Node | Any:
        """Return the copy of a node; of what is no tensor, its value."""
        if node in self._made:
            return self._made[node]
        if node.op != "get_attr" and not _has_tensors(self.values[node]):
            return self.values[node]
        made = self.graph.node_copy(node, self.node)
        made.meta = {key: value for key, value in node.meta.items() if key != "val"}
        made.meta["val"] = self._fake(self.values[node])
        self._made[node] = made
        return made

    def end(self, outputs: Sequence[fx.Node]) -> None:
        """End a piece, which returns `outputs`."""
        first = len(self.outputs)
        self.outputs += [self._made[node] for node in outputs]
        self.returns.append(tuple(range(first, len(self.outputs))))

    def _fake(self, value: Any) -> Any:
        return pytree.tree_map(
            lambda leaf: self.mode.from_tensor(leaf.detach(), static_shapes=True) if isinstance(leaf, Tensor) else leaf,
            value,
        )


# ------------------------------------------------------------------------------------------------ what is equal
def text_of(piece: Piece, values: Values) -> str:
    """Return a piece as text: ops, lengths, dtypes and shapes. Numbers that are no lengths and names are left out.

    Pieces of one text take the same time.
    """
    places: dict[fx.Node, str] = {node: f"in{k}:{_shape(values[node])}" for k, node in enumerate(piece.inputs)}

    def argument(value: Any) -> str:
        if isinstance(value, fx.Node):
            return places.get(value) or constant(value)
        if isinstance(value, (list, tuple)):
            return f"[{','.join(map(argument, value))}]"
        return "float" if isinstance(value, float) else str(value)

    def constant(node: fx.Node) -> str:
        value = values[node]
        if node.op == "get_attr" or not _has_tensors(value):
            return _shape(value)
        return f"{node.target}({','.join(map(argument, node.args))})"

    lines = []
    for k, node in enumerate(piece.nodes):
        places[node] = f"%{k}"
        named = ",".join(f"{key}={argument(value)}" for key, value in sorted(node.kwargs.items()))
        lines.append(f"%{k}:{_shape(values[node])}={node.target}({','.join(map(argument, node.args))};{named})")
    return "\n".join([*lines, ",".join(places[node] for node in piece.outputs)])


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_shape, value))}]"
    return "float" if isinstance(value, float) else str(value)
