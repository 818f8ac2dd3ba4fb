"""Where quantizers go: the plan that follows from how ops behave on integers (`graphcomp.ops.facts.Integer`).

    Compute   multiplies and sums: its operands are quantized; a convolution's result too (no integer kernel without)
    Move      moves or picks elements: what goes in on one scale comes out on it
    Rescale   has an integer kernel that rescales: its result is quantized where its operands are
    Clip      a clip is part of the quantizer behind it
    others    compute in float

A quantizer belongs to a value and to those of its users that read it on integers: the others go on reading floats. A
product that reads fewer bits than a value has for its other readers has a second quantizer behind the first.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from graphcomp.ir.graph import bind, fetch, module_path, op_name, source_line, tensor_values, value
from graphcomp.ir.memory import writers
from graphcomp.ops.answers import (
    clip_of,
    compute_of,
    is_convolution,
    is_fill,
    is_fused,
    lookup_of,
    move_of,
    operands_of,
    parameter_behind,
    rescales,
)
from graphcomp.quantization.sites import PREFIX, Site, names_in
from graphcomp.quantization.spec import DYNAMIC_BITS, QuantConfig, QuantSpec, matches
from graphcomp.quantization.wishes import Chosen, Wish, Wishes

aten = torch.ops.aten

ROWS = frozenset({aten.linear.default, aten.mm.default, aten.matmul.default, aten.addmm.default})
"""Products of rows and a matrix."""

FUSED = "attention in one op; QuantConfig(attention=True) writes it out"
"""Why fused attention stays float."""


FUSED_AT_RUN_TIME = "attention in one op: products of two activations have no kernel with ranges at run time that pays"
"""Why fused attention stays float beside layers with ranges at run time."""

NAMED = 8
"""Layers that a note names before it counts the rest."""


@dataclass
class _Spot:
    """One value that is quantized for some of its users.

    `shares` is the representative value: spots with the same one have one quantizer.
    """

    value: fx.Node
    users: list[fx.Node]
    spec: QuantSpec
    dim: int | None = None
    is_weight: bool = False
    shares: object = None


@dataclass(frozen=True)
class Placement:
    """All sites in the order of their first values; which compute ops stay float, and why; what else was not met."""

    sites: tuple[Site, ...]
    left_float: Mapping[fx.Node, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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
        self.written = writers(module)
        self.asked_in_vain: dict[fx.Node, dict[fx.Node, None]] = {}
        self.why_floats: dict[fx.Node, str] = {}  # op that was to read ranges at run time -> why it reads floats
        self.compute = {node: self._chosen(node) for node in module.graph.nodes if compute_of(node)}
        self.ends = self._ends()
        self.floats = self._reading_floats()
        self.readers: dict[fx.Node, dict[fx.Node, None]] = {}
        self.weights: list[_Spot] = []
        self.at_run_time: dict[tuple[fx.Node, QuantSpec], list[fx.Node]] = {}  # value -> what reads the value
        self.left_float: dict[fx.Node, str] = {}
        self.notes: list[str] = []
        self.raised: list[str] = []  # layers with more bits than asked
        self.streams: dict[tuple[int, int], int] = {}  # bits and bits that were asked for -> how many values
        self.wishes = Wishes(config.residual_bits)

    def plan(self) -> Placement:
        for node, chosen in self.compute.items():
            self._compute(node, chosen)
        for node in self.graph.nodes:
            if lookup_of(node):
                self._embedding(node)
            elif is_fused(node):
                self._fused(node)
        self._store_tables_once()
        if self.config.activations is not None or self.config.overrides:
            self._spread()
        position = {node: k for k, node in enumerate(self.graph.nodes)}
        spots = sorted((*self.weights, *self._activations()), key=lambda spot: position[spot.value])
        for spot in spots:
            spot.users.sort(key=position.__getitem__)
        self._answer_overrides()
        self.notes.extend(self._written_notes())
        self.notes.extend(self._reading_notes())
        if self.raised:
            least = self.config.first_and_last_bits
            self.notes.append(
                f"{', '.join(self.raised)}: {least} bits, as the first and the last quantized layer get at least that "
                "many: QuantConfig(first_and_last_bits=…)"
            )
        self.notes.extend(
            f"{count} value{'s' * (count > 1)} that sums and other ops than products read: {bits} bits in place of "
            f"{asked}: QuantConfig(residual_bits=…)"
            for (bits, asked), count in self.streams.items()
        )
        return Placement(tuple(self._sites(spots)), self.left_float, tuple(self.notes))

    def _sites(self, spots: Sequence[_Spot]) -> Iterator[Site]:
        """Yield one site for all spots that share a quantizer, in the order of the first spots."""
        names, shared = names_in(self.module), dict[object, list[_Spot]]()
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        for spot in spots:
            shared.setdefault(spot.shares, []).append(spot)
        for first, *others in shared.values():
            weight, bits = first.value if first.is_weight else None, first.spec.bits
            yield Site(
                name=f"{PREFIX}.{names.of(first.value)}",
                at={spot.value.name: tuple(user.name for user in spot.users) for spot in (first, *others)},
                layer=first.value.name if weight is None else layer_name(weight, self.constants),
                parameter="" if weight is None else parameter_behind(weight, parameters),
                is_weight=first.is_weight,
                spec=first.spec,
                dim=first.dim,
                low=bits,
                high=bits,
            )

    # ------------------------------------------------------------------------------------------ what ops ask for
    def _chosen(self, node: fx.Node) -> Chosen:
        """Return the specs of an op: none where it is ignored, those of an override, or the default ones."""
        path = module_path(node)
        if any(matches(name, path) for name in self.ignore):
            return Chosen(None, None, named=True, ignored=True)
        chosen = Chosen(*self.config.specs(path), named=self.config.override(path) is not None)
        if compute_of(node) and chosen.activations is not None and chosen.activations.dynamic:
            why = why_not_at_run_time(node, chosen.weights, self.constants)
            if why:
                self.why_floats[node] = why
                return replace(chosen, activations=None)
        return chosen

    def _ends(self) -> set[fx.Node]:
        """Return the first and the last op that is quantized."""
        inside = [node for node, chosen in self.compute.items() if chosen.any]
        return {inside[0], inside[-1]} if inside else set()

    def _reading_floats(self) -> set[fx.Node]:
        """Return the ops that are to read floats, or quantize what they read, and moves and clips in front of these."""
        specs = {node: chosen.activations for node, chosen in self.compute.items()}
        found = {node for node, spec in specs.items() if spec is None or spec.dynamic}
        for node in reversed(self.graph.nodes):
            users = [user in found for user in node.users]
            if not users or node in self.constants:
                continue
            if (self._moves(node) and any(users)) or (clip_of(node) and all(users)):
                found.add(node)
        return found

    def _moves(self, node: fx.Node) -> bool:
        return move_of(node) is not None or self._source(node) is not None

    def _compute(self, node: fx.Node, chosen: Chosen) -> None:
        if not chosen.any:
            self.left_float[node] = "ignored" if chosen.ignored else self.why_floats.get(node, "no spec")
            return
        if node in self.constants:
            self.left_float[node] = "depends on no input"
            return
        operands, arguments = operands_of(node), bind(node)
        read = [arguments[name] for name in (*operands.data, operands.weight) if name and arguments.get(name)]
        if not all(t.is_floating_point() for n in read for t in tensor_values(n)):
            self.left_float[node] = "computes on whole numbers"
            return
        if operands.weight not in operands.data and arguments[operands.weight] not in self.constants:
            self.left_float[node] = "its weight is computed from the inputs"
            return
        if arguments[operands.weight] in self.constants and arguments[operands.weight] in self.written:
            self.left_float[node] = self._why_written(arguments[operands.weight])
            return
        if node in self.ends and not chosen.named:
            asked, chosen = chosen, chosen.at_least(self.config.first_and_last_bits)
            if chosen != asked:
                self.raised.append(self.label(node))
        weights, activations = chosen.weights, chosen.activations
        for name in operands.data:
            operand = arguments[name]
            if operand not in self.constants and activations is not None and activations.dynamic:
                self._at_run_time(operand, activations, node)
            elif operand not in self.constants and activations is not None:
                self._need(operand, [node])
                self.wishes.add(operand, Wish(activations, node, chosen.named, reads=True))
            elif operand in self.constants and name != operands.weight and weights is not None:
                self._weight(operand, node, -2, weights)  # a constant on the left: its rows are the channels
        if operands.weight and arguments[operands.weight] in self.constants and weights is not None:
            self._weight(arguments[operands.weight], node, operands.out, weights)
        if activations is not None and is_convolution(node):
            result = self._result(node)
            self._need(result, list(result.users))
            self.wishes.add(result, Wish(activations, node, chosen.named, reads=False))
            if result.users and self.floats.issuperset(result.users):
                self.notes.append(
                    f"{self.label(node)} returns floats, as what reads them was given float inputs by name"
                )

    def _at_run_time(self, operand: fx.Node, spec: QuantSpec, user: fx.Node) -> None:
        """Quantize a value for `user` by the range that the value has at run time."""
        if operand in self.written:
            self.asked_in_vain.setdefault(operand, {})[user] = None
        else:
            self.at_run_time.setdefault((operand, spec), []).append(user)

    def _weight(self, operand: fx.Node, user: fx.Node, dim: int, spec: QuantSpec) -> None:
        rank = value(operand).dim()
        if rank < 2:  # a vector makes one output
            spec = replace(spec, granularity="tensor", group_size=0)
        where = dim % rank if spec.granularity != "tensor" else None
        if spec.granularity == "group" and (where != 0 or rank != 2 or lookup_of(user)):
            self.notes.append(
                f"{self.label(user)}: one step per output channel, not per group of {spec.group_size}: groups divide "
                "the rows of a linear layer's matrix"
            )
            spec = replace(spec, granularity="channel", group_size=0)
        key = (self._tensor_key(operand), where, spec)
        for spot in self.weights:
            if spot.value is operand and spot.shares == key:
                spot.users.append(user)
                return
        self.weights.append(_Spot(operand, [user], spec, where, True, key))

    def _tensor_key(self, operand: fx.Node) -> object:
        """The same for every node that reads one tensor under any of its names."""
        if operand.op == "get_attr":
            return id(fetch(self.module, str(operand.target)))
        return operand

    def _embedding(self, node: fx.Node) -> None:
        lookup = lookup_of(node)
        assert lookup is not None
        table = bind(node)[lookup.weight]
        path = module_path(node)
        name = self.config.override(path)
        spec = self.config.embeddings if name is None else self.config.overrides[name][0]
        if spec is None or table not in self.constants or any(matches(entry, path) for entry in self.ignore):
            return
        if table in self.written:
            self.notes.append(f"{self.label(node)} stays float: {self._why_written(table)}")
            return
        if spec.tabled:
            self.notes.append(f"{self.label(node)} stays float: ternary embeddings must be symmetric")
            return
        self._weight(table, node, 0, spec)

    def _store_tables_once(self) -> None:
        """Give layers that multiply a table (a tied head) the codes of the table, where these have as many bits and the
        layers are not named."""
        for table in [spot for spot in self.weights if any(lookup_of(user) for user in spot.users)]:
            for other in [spot for spot in self.weights if spot.value is table.value and spot is not table]:
                named = any(user in self.compute and self.compute[user].named for user in other.users)
                if other.dim != table.dim or other.spec.bits != table.spec.bits or other.spec.tabled or named:
                    continue
                table.users.extend(other.users)
                self.weights.remove(other)
                self.notes.append(
                    f"{', '.join(map(self.label, other.users))}: {table.spec.bits} bits, one step per row, as the "
                    "table that the layer multiplies is stored once: QuantConfig(embeddings=…)"
                )

    def _fused(self, node: fx.Node) -> None:
        spec = self._chosen(node).activations
        if spec is not None:
            self.left_float[node] = FUSED_AT_RUN_TIME if spec.dynamic else FUSED

    def _need(self, value_: fx.Node, users: Iterable[fx.Node]) -> None:
        """Quantize a value for those of `users` that do not read floats.

        A value that an op writes into stays float: the quantizer would stand between the definition and the write.
        """
        wanted = dict.fromkeys(user for user in users if user not in self.floats)
        if wanted and value_ in self.written:
            self.asked_in_vain.setdefault(value_, {}).update(wanted)
        elif wanted:
            self.readers.setdefault(value_, {}).update(wanted)

    def _result(self, node: fx.Node) -> fx.Node:
        """The value behind what will be folded into `node`, and behind the clip that alone reads that."""
        while user := next((u for u in node.users if u in self.folded), None):
            node = user
        if len(node.users) == 1:
            (user,) = node.users
            if clip_of(user):
                return user
        return node

    # ------------------------------------------------------------------------------------------ what follows from it
    def _spread(self) -> None:
        """Carry scales through ops that move elements, and forward through ops with integer kernels."""
        for node in reversed(self.graph.nodes):
            if node in self.readers:
                self._through_same(node)
        leads = self._leading_to_compute()
        for node in self.graph.nodes:
            source = self._source(node)
            if source in self.readers and node in leads and node not in self.readers and source is not None:
                self._carry(node, source)
            elif rescales(node) and node in leads:
                self._own(node)

    def _source(self, node: fx.Node) -> fx.Node | None:
        """What an op moves; for an item of a split, what was split."""
        if node.target is operator.getitem:
            container = node.args[0]
            assert isinstance(container, fx.Node)
            return self._source(container)
        move = move_of(node)
        if move is None or fills(node):
            return None
        source = bind(node)[move.operand]
        return source if isinstance(source, fx.Node) and source not in self.constants else None

    def _through_same(self, node: fx.Node) -> None:
        source = self._source(node)
        move = move_of(node)
        if source is not None and move is not None and move.pools and fills(source):
            return  # the constant is there for no output to see: it is no part of what is quantized
        if source is not None and _is_float(source) and self._reader(node) not in self.floats:
            self._need(source, [self._reader(node)])
            self.wishes.union(source, node)

    def _reader(self, node: fx.Node) -> fx.Node:
        """The op that reads the source: for an item of a split, the split."""
        container = node.args[0]
        return container if node.target is operator.getitem and isinstance(container, fx.Node) else node

    def _carry(self, node: fx.Node, source: fx.Node) -> None:
        if not _is_float(node) or self._reader(node) in self.floats:
            return  # the list that a split returns: its items follow
        self._need(source, [self._reader(node)])
        self._need(node, list(node.users))
        self.wishes.union(source, node)

    def _leading_to_compute(self) -> set[fx.Node]:
        """Values that reach a quantized compute op through clips, moves and ops with integer kernels alone."""
        found: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            for user in node.users:
                passes = clip_of(user) or rescales(user) or self._source(user) is not None
                split = move_of(user) and user in found
                asked = user in self.readers.get(node, {}) and compute_of(user)
                if asked or split or (passes and user in found):
                    found.add(node)
        return found

    def _own(self, node: fx.Node) -> None:
        operands = node.all_input_nodes
        if not operands or not all(n in self.readers for n in operands) or not _is_float(node):
            return
        if any(matches(name, module_path(node)) for name in self.ignore):
            return
        result = self._result(node)
        for operand in operands:
            self._need(operand, [node])
        self._need(result, list(result.users))
        self.wishes.derive(result, operands)
        if node.target is aten.cat.default and self.config.share_concat:
            for operand in operands:
                self.wishes.union(operand, result)
        if node.target is aten.add.Tensor and self.config.share_add:
            self.wishes.union(operands[0], operands[-1])

    # ------------------------------------------------------------------------------------------ what comes of it
    def _activations(self) -> Iterator[_Spot]:
        """Yield the spots of activations: one per value, one per reader that was given another spec by name, and one
        behind the first for products that read fewer bits than the value has for others."""
        others = {
            value_: [user for user in readers if user not in self.compute and self._source(user) is not value_]
            for value_, readers in self.readers.items()
        }
        self.wishes.settle(others)
        for value_, readers in self.readers.items():
            spec, asked, shares = self.wishes.spec(value_), self.wishes.asked(value_), self.wishes.shared(value_)
            if spec.bits > asked.bits:
                self.streams[spec.bits, asked.bits] = self.streams.get((spec.bits, asked.bits), 0) + 1
            apart: dict[QuantSpec, list[fx.Node]] = {}
            products: dict[fx.Node, None] = {}
            for wish in self.wishes.of(value_):
                if not wish.reads or wish.node not in readers:
                    continue
                if wish.named and wish.spec != asked:
                    apart.setdefault(wish.spec, []).append(wish.node)
                else:
                    products[wish.node] = None
            away = {user for users in apart.values() for user in users}
            together = [user for user in readers if user not in away]
            if together:
                yield _Spot(value_, together, spec, shares=shares)
            behind = [user for user in products if user not in away]
            if asked != spec and behind:
                yield _Spot(value_, behind, asked, shares=(shares, asked))
            for own, users in apart.items():
                yield _Spot(value_, list(dict.fromkeys(users)), own, shares=(value_, own))
        for (value_, spec), users in self.at_run_time.items():
            yield _Spot(value_, users, spec, shares=(value_, spec))

    def _written_notes(self) -> Iterator[str]:
        """Name what stays float since an op writes into it."""
        for value_, readers in self.asked_in_vain.items():
            layers = dict.fromkeys(self.label(reader) for reader in readers if compute_of(reader))
            named = f"what {', '.join(layers)} reads" if layers else ""
            if not named and compute_of(value_):
                named = f"what {self.label(value_)} returns"
            if named:
                yield f"{named} stays float: {self._why_written(value_)}"

    def _reading_notes(self) -> Iterator[str]:
        """Name the layers with integer weights that read floats, as no kernel quantizes what they read at run time."""
        by_reason: dict[str, list[str]] = {}
        for node, why in self.why_floats.items():
            if node not in self.left_float:
                by_reason.setdefault(why, []).append(self.label(node))
        for why, layers in by_reason.items():
            more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
            yield f"{', '.join(layers[:NAMED])}{more}: weights alone are quantized, as {why}"

    def _why_written(self, value_: fx.Node) -> str:
        op = self.written[value_]
        line = source_line(op)
        return f"{op_name(op)} writes into it in place" + (f", at {line}" if line else "")

    def _answer_overrides(self) -> None:
        """Note the overrides that ask for something and change no op."""
        for name, specs in self.config.overrides.items():
            if specs == (None, None):
                continue
            inside = [n for n in self.graph.nodes if n.op == "call_function" and matches(name, module_path(n))]
            if any(self.config.override(module_path(n)) != name for n in inside):
                continue  # another entry goes before
            able = [n for n in inside if compute_of(n) or lookup_of(n) or is_fused(n)]
            if not able:
                self.notes.append(f"{name}: the override changes nothing, as no op in it can be quantized")

    def label(self, node: fx.Node) -> str:
        """The name of the layer that an op belongs to, or of the op."""
        return op_label(node, self.constants)


def why_not_at_run_time(node: fx.Node, weights: QuantSpec | None, constant: set[fx.Node]) -> str:
    """Return why a compute op cannot read activations whose range is known at run time alone; "" where it can.

    The op multiplies rows by a constant matrix of int8 with one step per column or in all.
    """
    operands, arguments = operands_of(node), bind(node)
    weight = arguments[operands.weight]
    if operands.convolution:
        return "an integer convolution with ranges at run time takes several times as long as one in floats"
    if weight not in constant:
        return "a product of two activations with ranges at run time does not pay"
    if value(weight).dim() != 2 or node.target not in ROWS:
        return "ranges at run time are for rows times one matrix"
    if node.target is aten.addmm.default and (arguments["beta"], arguments["alpha"]) != (1, 1):
        return "it adds another operand by a factor"
    if weights is None:
        return "its weight is float, and integers are multiplied with integers"
    if weights.granularity == "group":
        return "weights with one step per group have no integer kernel beside ranges at run time"
    if not weights.symmetric or weights.kind == "geta" or weights.bits > DYNAMIC_BITS:
        return "ranges at run time need symmetric weights of 8 bits or fewer"
    return ""


def op_label(node: fx.Node, constant: set[fx.Node]) -> str:
    """Return the name of the layer whose weight the op reads; without one, the module's and the op's name."""
    reads = compute_of(node) or lookup_of(node)
    weight = None if reads is None else bind(node)[reads.weight]
    name = layer_name(weight, constant) if weight in constant else ""
    return name or f"{module_path(node)}.{node.name}".lstrip(".")


def channels_of(node: fx.Node) -> int:
    """Return the dim of a compute op's result that counts the output channels; an input of a convolution may have no
    batch."""
    rank: int = value(node).dim()
    kernel: int = value(bind(node)[operands_of(node).weight]).dim() if is_convolution(node) else 2
    return rank + 1 - kernel


def padded_with(node: fx.Node) -> float:
    """Return the number that a padding puts around its operand; 0 for another op, or one that repeats elements."""
    move = move_of(node)
    if move is None or not move.pads or bind(node).get("mode", "constant") != "constant":
        return 0.0
    return float(bind(node)["value"] or 0)


def fills(node: fx.Node) -> bool:
    """Whether the op puts a constant other than 0 beside the elements that it passes on."""
    return is_fill(node) or padded_with(node) != 0


def _is_float(node: fx.Node) -> bool:
    found = value(node)
    return isinstance(found, torch.Tensor) and found.is_floating_point()
