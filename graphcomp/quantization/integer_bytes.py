"""How many bytes an integer graph will take when only some units stay, known before anything is cut or trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from torch import fx

from graphcomp.cost import Bits, Counts, Lengths, Polynomial
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.axis import Factor, leaves
from graphcomp.coupling.propagate import Coupling, propagate
from graphcomp.ir.graph import bind
from graphcomp.ops.answers import compute_of
from graphcomp.quantization.einsum import RESULT_OF
from graphcomp.quantization.lower import LoweredLayer
from graphcomp.quantization.ops import PACKED_BITS, dequantize_per_channel
from graphcomp.quantization.stored import LOOKUP_OF

STEP_BYTES, ZERO_BYTES, GROUP_BYTES = 4, 4, 8
"""Of a float32 step, an int32 zero point, and the int64 number of a group."""


class StoredBytes:
    """Bytes of all tensors of an integer graph, as the report counts them: packed codes, steps, zero points, integer
    biases, and what stays float.

    The graph is lowered once, of the whole model; the axes of its tensors are those of the analysed graph, whose nodes
    it shares the names of. An axis that has no counterpart there counts as whole, so that no budget is exceeded.

    Args:
        plan: the analysis of the float graph.
        lowered: the integer graph made of it, its codes not packed, with one step per tensor or channel.
        layers: bits of each op and of each lookup, where a call gives none.
        group_size: so many inputs of a matrix are to share a step, where it has one per row; 0: that stays.
    """

    def __init__(
        self, plan: Analysis, lowered: fx.GraphModule, layers: Sequence[LoweredLayer], group_size: int = 0
    ) -> None:
        self.planned = {layer.node: Bits(layer.weight_bits, layer.activation_bits) for layer in layers}
        self.group_size = group_size
        coupling = propagate(lowered, plan.captured.output_names)
        twins = _twins(plan.coupling, coupling)
        groups = {group.factor for group in plan.groups}
        size = Lengths(plan.captured, {own: twin for own, twin in twins.items() if twin in groups}).size
        codes = _codes(lowered)
        self._rest = Polynomial()
        self._codes: list[tuple[str, Polynomial]] = []  # op, elements
        self._grouped: list[tuple[Polynomial, Polynomial]] = []  # rows, columns
        seen = set()
        for name, tensor in (*lowered.named_parameters(), *lowered.named_buffers()):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            known = name in coupling.attributes
            numel = size(coupling.attributes[name]) if known else Polynomial.constant(tensor.numel())
            if name in codes:
                op, by_row = codes[name]
                self._codes.append((op, numel))
                if group_size and by_row and known and tensor.dim() == 2:
                    rows, columns = (size([axis]) for axis in coupling.attributes[name])
                    self._grouped.append((rows, columns))
            else:
                self._rest += numel * Polynomial.constant(tensor.element_size())

    def __call__(self, counts: Counts, bits: Mapping[str, Bits]) -> int:
        """Bytes when `counts` units stay, and the weight of each op, by its name, has `bits`; others as planned."""
        known = {**self.planned, **bits}
        packed = sum(-(-numel(counts) * stored_bits(known[op].weight) // 8) for op, numel in self._codes)
        grouped = sum(self._of_groups(rows(counts), columns(counts)) for rows, columns in self._grouped)
        return self._rest(counts) + packed + grouped

    def _of_groups(self, rows: int, columns: int) -> int:
        """What more steps and zero points than one per row take, and the number of its group for each column."""
        return rows * (-(-columns // self.group_size) - 1) * (STEP_BYTES + ZERO_BYTES) + columns * GROUP_BYTES


def stored_bits(bits: float | Fraction) -> int:
    """What a code of so many bits takes where it is stored."""
    whole = round(bits)
    if whole <= max(PACKED_BITS):
        return max(whole, min(PACKED_BITS))
    return 8 if whole <= 8 else 16


def _codes(lowered: fx.GraphModule) -> dict[str, tuple[str, bool]]:
    """The tensor that holds the codes of a weight -> the first op that multiplies with it or looks its rows up, and
    whether it is a matrix that is multiplied with, each row with a step of its own."""
    found: dict[str, tuple[str, bool]] = {}
    for node in lowered.graph.nodes:
        if LOOKUP_OF in node.meta:
            found.setdefault(str(node.args[0].target), (node.meta[LOOKUP_OF], False))
        compute = compute_of(node)
        weight = None if compute is None else bind(node)[compute.weight]
        if isinstance(weight, fx.Node) and weight.op == "call_function" and weight.args:
            source = weight.args[0]
            if isinstance(source, fx.Node) and source.op == "get_attr":
                by_row = weight.target is dequantize_per_channel and bind(weight)["axis"] == 0
                found.setdefault(str(source.target), (node.name, by_row))
    return found


def _twins(ours: Coupling, theirs: Coupling) -> dict[Factor, Factor]:
    """Factor of `theirs` -> the factor of `ours` that it is wherever both graphs have a value of one name."""
    named = {node.name: axes for node, axes in ours.axes.items()}
    found: dict[Factor, Factor] = {}
    ambiguous: set[Factor] = set()
    for node, results in theirs.axes.items():
        for own, other in zip(results, named.get(node.meta.get(RESULT_OF, node.name), ()), strict=False):
            for axis, twin in zip(own, other, strict=False):
                pairs = list(leaves(axis)), list(leaves(twin))
                if [leaf.size for leaf in pairs[0]] != [leaf.size for leaf in pairs[1]]:
                    continue
                for leaf, its_twin in zip(*pairs, strict=True):
                    if found.setdefault(leaf, its_twin) is not its_twin:
                        ambiguous.add(leaf)
    return {leaf: twin for leaf, twin in found.items() if leaf not in ambiguous}
