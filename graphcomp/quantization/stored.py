"""How many bytes an integer graph will take when only some units stay, known before anything is cut or trained."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from graphcomp.analysis import Analysis
from graphcomp.cost import Bits, Counts, Lengths, Polynomial
from graphcomp.coupling.axis import Factor, leaves
from graphcomp.coupling.propagate import Coupling, propagate
from graphcomp.graph import bind
from graphcomp.quantization.ops import PACKED_BITS
from graphcomp.quantization.placement import COMPUTE


class StoredBytes:
    """Bytes of all tensors of an integer graph, as the report counts them: packed codes, steps, zero points, integer
    biases, and what stays float.

    The graph is lowered once, of the whole model; the axes of its tensors are those of the analysed graph, whose nodes
    it shares the names of. An axis that has no counterpart there counts as whole, so that no budget is exceeded.

    Args:
        plan: the analysis of the float graph.
        lowered: the integer graph made of it, its codes not packed.
    """

    def __init__(self, plan: Analysis, lowered: fx.GraphModule) -> None:
        coupling = propagate(lowered, plan.captured.output_names)
        twins = _twins(plan.coupling, coupling)
        groups = {group.factor for group in plan.groups}
        size = Lengths(plan.captured, {own: twin for own, twin in twins.items() if twin in groups}).size
        codes = _codes(lowered)
        self._rest = Polynomial()
        self._codes: list[tuple[str, Polynomial]] = []  # op, elements
        seen = set()
        for name, tensor in (*lowered.named_parameters(), *lowered.named_buffers()):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            known = name in coupling.attributes
            numel = size(coupling.attributes[name]) if known else Polynomial.constant(tensor.numel())
            if name in codes:
                self._codes.append((codes[name], numel))
            else:
                self._rest += numel * Polynomial.constant(tensor.element_size())

    def __call__(self, counts: Counts, bits: Mapping[str, Bits]) -> int:
        """Bytes when `counts` units stay, and the weight of each op, by its name, has `bits`."""
        packed = sum(-(-numel(counts) * stored_bits(bits[op].weight) // 8) for op, numel in self._codes)
        return self._rest(counts) + packed


def stored_bits(bits: float) -> int:
    """What a code of so many bits takes where it is stored."""
    whole = round(bits)
    if whole <= max(PACKED_BITS):
        return max(whole, min(PACKED_BITS))
    return 8 if whole <= 8 else 16


def _codes(lowered: fx.GraphModule) -> dict[str, str]:
    """The tensor that holds the codes of a weight -> the first op that multiplies with it."""
    found: dict[str, str] = {}
    for node in lowered.graph.nodes:
        weight = bind(node)[COMPUTE[node.target].weight] if node.target in COMPUTE else None
        if isinstance(weight, fx.Node) and weight.op == "call_function" and weight.args:
            source = weight.args[0]
            if isinstance(source, fx.Node) and source.op == "get_attr":
                found.setdefault(str(source.target), node.name)
    return found


def _twins(ours: Coupling, theirs: Coupling) -> dict[Factor, Factor]:
    """Factor of `theirs` -> the factor of `ours` that it is wherever both graphs have a value of one name."""
    named = {node.name: axes for node, axes in ours.axes.items()}
    found: dict[Factor, Factor] = {}
    ambiguous: set[Factor] = set()
    for node, results in theirs.axes.items():
        for own, other in zip(results, named.get(node.name, ()), strict=False):
            for axis, twin in zip(own, other, strict=False):
                pairs = list(leaves(axis)), list(leaves(twin))
                if [leaf.size for leaf in pairs[0]] != [leaf.size for leaf in pairs[1]]:
                    continue
                for leaf, its_twin in zip(*pairs, strict=True):
                    if found.setdefault(leaf, its_twin) is not its_twin:
                        ambiguous.add(leaf)
    return {leaf: twin for leaf, twin in found.items() if leaf not in ambiguous}
