"""How a module was prepared: its programs, its quantizers and the groups whose units may go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.ir.graph import all_tensors, bind
from graphcomp.ops.answers import compute_of
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.lower import constants_with_quantizers
from graphcomp.quantization.redundant import quantizer_before
from graphcomp.quantization.sites import Site
from graphcomp.quantization.spec import QuantConfig

if TYPE_CHECKING:
    from graphcomp.training.prepared import Prepared
    from graphcomp.training.shrink import CutFrom


@dataclass(frozen=True, eq=False)
class Session:
    """What `finalize` needs to know of how a module was prepared.

    Attributes:
        plan: of the copy of the model that is trained, in floats.
        quantized: the same graph with quantizers; `plan` itself where there are none.
        groups: of `quantized`, those whose units may go.
        bits: the range asked for; None: nothing is quantized.
        config: which tensors are quantized. GETA's quantizers stand on no embedding tables.
        ignore: module names or "re:" patterns that stay float.
        notes: groups that were left whole, and wishes for bits of single layers that were not met, and why.
        computed: parameters that weights are computed of: what leaves is not held at zero in them, see `computed_with`.
        no_groups: why nothing can be pruned, where `groups` is empty.
        cut_from: the module that this one was shrunk from, and how; None: it is whole.
    """

    plan: Analysis
    quantized: Analysis
    groups: tuple[ChannelGroup, ...]
    bits: tuple[int, int] | None
    config: QuantConfig | None
    computed: frozenset[str]
    no_groups: str = ""
    notes: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    cut_from: CutFrom | None = None

    def __repr__(self) -> str:
        return f"Session({self.plan!r}, {len(self.sites)} quantizers)"

    @property
    def sites(self) -> tuple[Site, ...]:
        """The quantizers, in the order of the graph."""
        return self.quantized.captured.sites

    @property
    def has_attention(self) -> bool:
        """Whether the model has heads: it is trained more gently."""
        return any(group.role == "head" for group in self.plan.groups)

    @property
    def learns_bits(self) -> bool:
        """Whether the quantizers learn their bits, as GETA's do; LSQ's have fixed bits."""
        weights = None if self.config is None else self.config.weights
        return self.bits is not None and weights is not None and weights.kind == "geta"

    def bind(self, ready: Prepared) -> Session:
        """Return the same session with the tensors of `ready`: a copy of the module, or the module moved elsewhere."""
        tensors = dict(all_tensors(ready))
        plan = self.plan.bind(tensors)
        if self.quantized is self.plan:
            return replace(self, plan=plan, quantized=plan)
        return replace(self, plan=plan, quantized=self.quantized.bind(tensors))

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self  # nothing changes a session; a copied module binds one of its own


def operands(session: Session) -> dict[str, tuple[str, list[str]]]:
    """Compute op, by the name of its node in both graphs -> the quantizer of its weight, "" without one, and those of
    what else it multiplies."""
    graph = session.quantized.captured.module
    constant = constants_with_quantizers(graph)
    at = {node: str(node.target) for node, _ in quantizer_nodes(graph)}
    found = {}
    for node in graph.graph.nodes:
        places = compute_of(node)
        if places is None:
            continue
        arguments = bind(node)
        weight = arguments[places.weight] if arguments.get(places.weight) in constant else None
        named = dict.fromkeys(arguments[name] for name in (*places.data, places.weight) if name)
        sources = [quantizer_before(n, at) for n in named if isinstance(n, fx.Node) and n is not weight]
        own = "" if weight is None else at.get(weight, "")
        found[node.name] = own, [at[n] for n in sources if n is not None]
    return found
