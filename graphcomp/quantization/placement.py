"""Where quantizers go: a table of how ops behave on integers, and the plan that follows from it.

    COMPUTE   multiplies and sums: its operands are quantized; a convolution's result too (no integer kernel without)
    SAME      moves or picks elements: what goes in on one scale comes out on it
    OWN       has an integer kernel that rescales: its result is quantized where its operands are
    CLIPS     a clip is part of the quantizer behind it
    others    compute in float

A quantizer belongs to a value and to those of its users that read it on integers: the others go on reading floats.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from graphcomp.graph import bind, fetch, module_path, tensor_values, value
from graphcomp.quantization.attention import FUSED
from graphcomp.quantization.spec import QuantConfig, QuantSpec, matches

aten = torch.ops.aten


@dataclass(frozen=True)
class Operands:
    """Which arguments of a compute op are data, and which dim of its weight is the output channel."""

    data: tuple[str, ...]
    weight: str = ""
    dim: int = 0
    bias: str = ""


_CONV = Operands(("input",), "weight", 0, "bias")
_TRANSPOSED = Operands(("input",), "weight", 1, "bias")
COMPUTE: dict[object, Operands] = {
    **dict.fromkeys(
        (
            aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding,
            aten.conv3d.default, aten.conv3d.padding, aten.linear.default,
        ),
        _CONV,
    ),
    **dict.fromkeys(
        (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), _TRANSPOSED
    ),
    aten.addmm.default: Operands(("mat1",), "mat2", 1, "self"),
    aten.mm.default: Operands(("self", "mat2"), "mat2", 1),
    aten.bmm.default: Operands(("self", "mat2"), "mat2", 2),
    aten.baddbmm.default: Operands(("batch1", "batch2"), "batch2", 2),
    aten.matmul.default: Operands(("self", "other"), "other", -1),
}  # fmt: skip

CONVOLUTIONS = frozenset(op for op, operands in COMPUTE.items() if operands.data == ("input",)) - {aten.linear.default}

TRANSPOSED = frozenset(op for op, operands in COMPUTE.items() if operands is _TRANSPOSED)

EMBEDDINGS = frozenset({aten.embedding.default})

# op -> the argument whose elements it moves
SAME: dict[object, str] = {
    **dict.fromkeys(
        (
            aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
            aten.unflatten.int, aten.permute.default, aten.transpose.int, aten.t.default, aten.squeeze.default,
            aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default, aten.contiguous.default,
            aten.clone.default, aten.alias.default, aten.slice.Tensor, aten.select.int, aten.constant_pad_nd.default,
            aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.pixel_shuffle.default,
            aten.pixel_unshuffle.default, aten.channel_shuffle.default, aten.flip.default, aten.roll.default,
            aten.split_with_sizes.default, aten.unbind.int, aten.movedim.intlist, aten.repeat.default,
        ),
        "self",
    ),
    aten.dropout.default: "input",
    aten.feature_dropout.default: "input",
}  # fmt: skip

OWN = frozenset(
    {
        aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.avg_pool1d.default, aten.avg_pool2d.default,
        aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.sigmoid.default,
        aten.hardsigmoid.default, aten.leaky_relu.default,
    }
)  # fmt: skip

CLIPS = frozenset(
    {
        aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default,
        aten.clamp_max.default,
    }
)  # fmt: skip


@dataclass
class Site:
    """One value that is quantized for some of its users.

    `shares` is the representative value: sites with the same one have one quantizer.
    """

    value: fx.Node
    users: list[fx.Node]
    spec: QuantSpec
    dim: int | None = None
    is_weight: bool = False
    shares: object = None


@dataclass(frozen=True)
class Placement:
    """All sites in the order of the graph, and which compute ops stay float, and why."""

    sites: tuple[Site, ...]
    left_float: Mapping[fx.Node, str] = field(default_factory=dict)


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on parameters, buffers and numbers only, not on the inputs."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and node.all_input_nodes and found.issuperset(node.all_input_nodes)
        ):
            found.add(node)
    return found


def layer_name(weight: fx.Node | None, constants: set[fx.Node]) -> str:
    """The name of the layer that a weight belongs to: of its (first) parameter, without '.weight'; '' without one."""
    while weight is not None and weight.op != "get_attr":
        weight = next((n for n in weight.all_input_nodes if n in constants), None)
    return str(weight.target).removesuffix(".weight") if weight is not None else ""


def place(
    module: fx.GraphModule, config: QuantConfig, ignore: Sequence[str] = (), folded: Collection[fx.Node] = ()
) -> Placement:
    """Decide which values of a captured graph are quantized.

    Args:
        module: in canonical form, batch norms folded where they can be.
        ignore: module names or "re:" patterns that stay float.
        folded: nodes that will be folded into the op in front of them (see `fold.folded_nodes`), for a graph that is
            trained with its batch norms: what the op returns is quantized behind them.
    """
    return _Planner(module, config, ignore, folded).plan()


class _Planner:
    def __init__(
        self, module: fx.GraphModule, config: QuantConfig, ignore: Sequence[str], folded: Collection[fx.Node]
    ) -> None:
        self.graph = module.graph
        self.module = module
        self.config = config
        self.ignore = ignore
        self.folded = folded
        self.constants = constants(module.graph)
        self.sites: dict[fx.Node, Site] = {}
        self.weights: list[Site] = []
        self.left_float: dict[fx.Node, str] = {}
        self.shared = _Classes()

    def plan(self) -> Placement:
        compute = [n for n in self.graph.nodes if n.target in COMPUTE]
        chosen = {n: self._specs(n) for n in compute}
        inside = [n for n in compute if chosen[n] != (None, None)]
        for node in {inside[0], inside[-1]} if inside else ():
            chosen[node] = tuple(_at_least(s, self.config.first_and_last_bits) for s in chosen[node])  # type: ignore[assignment]
        for node in compute:
            self._compute(node, *chosen[node])
        for node in self.graph.nodes:
            if node.target in EMBEDDINGS:
                self._embedding(node)
            elif node.target in FUSED and self._specs(node)[1] is not None:
                self.left_float[node] = "attention in one op; QuantConfig(attention=True) writes it out"
        if self.config.activations is not None or self.config.overrides:
            self._spread()
        sites = [*self.weights, *self.sites.values()]
        position = {node: k for k, node in enumerate(self.graph.nodes)}
        for site in sites:
            site.shares = self.shared.of(site.value) if not site.is_weight else site.shares
            site.users.sort(key=position.__getitem__)
        self._agree()
        return Placement(tuple(sorted(sites, key=lambda s: position[s.value])), self.left_float)

    # ------------------------------------------------------------------------------------------ what ops ask for
    def _specs(self, node: fx.Node) -> tuple[QuantSpec | None, QuantSpec | None]:
        path = module_path(node)
        if any(matches(name, path) for name in self.ignore):
            self.left_float[node] = "ignored"
            return None, None
        return self.config.specs(path)

    def _compute(self, node: fx.Node, weights: QuantSpec | None, activations: QuantSpec | None) -> None:
        if weights is None and activations is None:
            self.left_float.setdefault(node, "no spec")
            return
        if node in self.constants:
            self.left_float[node] = "depends on no input"
            return
        operands, arguments = COMPUTE[node.target], bind(node)
        read = [arguments[name] for name in (*operands.data, operands.weight) if name and arguments.get(name)]
        if not all(t.is_floating_point() for n in read for t in tensor_values(n)):
            self.left_float[node] = "computes on whole numbers"
            return
        for name in operands.data:
            operand = arguments[name]
            if operand not in self.constants and activations is not None:
                self._need(operand, [node], activations)
            elif operand in self.constants and name != operands.weight and weights is not None:
                self._weight(operand, node, -2, weights)  # a constant on the left: its rows are the channels
        if operands.weight and arguments[operands.weight] in self.constants and weights is not None:
            self._weight(arguments[operands.weight], node, operands.dim, weights)
        if activations is not None and node.target in CONVOLUTIONS:
            result = self._result(node)
            self._need(result, list(result.users), activations)

    def _weight(self, operand: fx.Node, user: fx.Node, dim: int, spec: QuantSpec) -> None:
        rank = value(operand).dim()
        where = dim % rank if spec.granularity != "tensor" else None
        if spec.granularity == "group" and (where != 0 or rank != 2):
            # groups run along the last dim of a matrix whose rows are channels; elsewhere, one step per channel
            spec = replace(spec, granularity="channel", group_size=0)
        key = (self._tensor_key(operand), where, spec)
        for site in self.weights:
            if site.value is operand and site.shares == key:
                site.users.append(user)
                return
        self.weights.append(Site(operand, [user], spec, where, True, key))

    def _tensor_key(self, operand: fx.Node) -> object:
        """The same for every node that reads one tensor under any of its names."""
        if operand.op == "get_attr":
            return id(fetch(self.module, str(operand.target)))
        return operand

    def _embedding(self, node: fx.Node) -> None:
        table = bind(node)["weight"]
        spec = self.config.embeddings
        path = module_path(node)
        for name, (weights, _) in self.config.overrides.items():
            if matches(name, path):
                spec = weights
        if spec is None or table not in self.constants or any(matches(name, path) for name in self.ignore):
            return
        self._weight(table, node, 0, spec)

    def _need(self, value_: fx.Node, users: Iterable[fx.Node], spec: QuantSpec) -> None:
        site = self.sites.get(value_)
        if site is None:
            self.sites[value_] = Site(value_, list(dict.fromkeys(users)), spec)
            return
        site.users += [u for u in users if u not in site.users]
        site.spec = max(site.spec, spec, key=lambda s: s.bits)

    def _result(self, node: fx.Node) -> fx.Node:
        """The value behind what will be folded into `node`, and behind the clip that alone reads that."""
        while user := next((u for u in node.users if u in self.folded), None):
            node = user
        if len(node.users) == 1:
            (user,) = node.users
            if user.target in CLIPS:
                return user
        return node

    # ------------------------------------------------------------------------------------------ what follows from it
    def _spread(self) -> None:
        """Carry scales through ops that move elements, and forward through ops with integer kernels."""
        for node in reversed(self.graph.nodes):
            if node in self.sites:
                self._through_same(node)
        leads = self._leading_to_compute()
        for node in self.graph.nodes:
            source = self._source(node)
            if source in self.sites and node in leads and node not in self.sites and source is not None:
                self._carry(node, source)
            elif node.target in OWN and node in leads:
                self._own(node)

    def _source(self, node: fx.Node) -> fx.Node | None:
        """What a SAME op moves; for an item of a split, what was split."""
        if node.target is operator.getitem:
            container = node.args[0]
            assert isinstance(container, fx.Node)
            return self._source(container)
        if node.target not in SAME:
            return None
        if node.target is aten.constant_pad_nd.default and bind(node)["value"] != 0:
            return None
        source = bind(node)[SAME[node.target]]
        return source if isinstance(source, fx.Node) and source not in self.constants else None

    def _through_same(self, node: fx.Node) -> None:
        source = self._source(node)
        if source is not None and _is_float(source):
            self._need(source, [self._reader(node)], self.sites[node].spec)
            self.shared.union(source, node)

    def _reader(self, node: fx.Node) -> fx.Node:
        """The op that reads the source: for an item of a split, the split."""
        container = node.args[0]
        return container if node.target is operator.getitem and isinstance(container, fx.Node) else node

    def _carry(self, node: fx.Node, source: fx.Node) -> None:
        if not _is_float(node):
            return  # the list that a split returns: its items follow
        self._need(source, [self._reader(node)], self.sites[source].spec)
        self._need(node, list(node.users), self.sites[source].spec)
        self.shared.union(source, node)

    def _leading_to_compute(self) -> set[fx.Node]:
        """Values that reach a quantized compute op through clips, moves and ops with integer kernels alone."""
        found: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            for user in node.users:
                passes = user.target in CLIPS or user.target in OWN or self._source(user) is not None
                split = user.target in SAME and user in found
                asked = node in self.sites and user in self.sites[node].users and user.target in COMPUTE
                if asked or split or (passes and user in found):
                    found.add(node)
        return found

    def _own(self, node: fx.Node) -> None:
        operands = node.all_input_nodes
        if not operands or not all(n in self.sites for n in operands) or not _is_float(node):
            return
        if any(matches(name, module_path(node)) for name in self.ignore):
            return
        spec = max((self.sites[n].spec for n in operands), key=lambda s: s.bits)
        result = self._result(node)
        for operand in operands:
            self._need(operand, [node], self.sites[operand].spec)
        self._need(result, list(result.users), spec)
        if node.target is aten.cat.default and self.config.share_concat:
            for operand in operands:
                self.shared.union(operand, result)
        if node.target is aten.add.Tensor and self.config.share_add:
            self.shared.union(operands[0], operands[-1])

    def _agree(self) -> None:
        """Sites with one quantizer have one spec, the one with the most bits."""
        specs: dict[object, QuantSpec] = {}
        for site in self.sites.values():
            known = specs.get(site.shares, site.spec)
            specs[site.shares] = max(known, site.spec, key=lambda s: s.bits)
        for site in self.sites.values():
            site.spec = specs[site.shares]


class _Classes:
    """Union-find over nodes."""

    def __init__(self) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}

    def of(self, node: fx.Node) -> fx.Node:
        while (above := self.parent.get(node, node)) is not node:
            node = above
        return node

    def union(self, a: fx.Node, b: fx.Node) -> None:
        a, b = self.of(a), self.of(b)
        if a is not b:
            self.parent[b] = a


def _at_least(spec: QuantSpec | None, bits: int) -> QuantSpec | None:
    if spec is None or spec.bits >= bits:
        return spec
    return replace(spec, bits=bits)


def _is_float(node: fx.Node) -> bool:
    found = value(node)
    return isinstance(found, torch.Tensor) and found.is_floating_point()
