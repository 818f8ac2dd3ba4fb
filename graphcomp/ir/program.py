"""Program: what stands between two stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, fx, nn

from graphcomp.ir.graph import all_tensors
from graphcomp.ir.inputs import Inputs
from graphcomp.ir.module import bound_graph, bound_model

if TYPE_CHECKING:
    from graphcomp.coupling.propagate import Coupling
    from graphcomp.quantization.lower import Lowered
    from graphcomp.quantization.sites import Site

P = TypeVar("P", bound="Program")


@dataclass(frozen=True, eq=False, kw_only=True)
class Program:
    """A graph with its tensors, where the graph comes from, and what stages found out on the way. Nothing changes it.

    Attributes:
        module: the graph, and the owner of its tensors; called like `original`. Stages make another module in place of
            this one, which shares the tensors that stay.
        original: the model that the graph was captured from.
        inputs: example inputs of `original`, copies of the caller's. A run gets copies of these.
        coupling: the axes of what each node of the graph computes; None: not known (yet), as of a graph that was
            rewritten. It holds no tensor, and is shared by all programs of one graph.
        sites: the quantizers that were placed, in the order of the graph.
        notes: what the program differs in from the model, and what was asked and not done, each with its reason.
        left_float: layer -> why the layer is not quantized.
        errors: layer -> relative error of its output, ||fake - float|| / ||float||.
        repairs: layer -> relative error of its output before and after the repair of what rounding does to it.
        reconstructions: block -> relative error of its output before and after its rounding was learned.
        verified: law -> largest error that was found when the law was checked.
        unchecked: law, or part of one -> why it could not be checked.
        stages: name -> the program as it was then, for later stages that compare with it.
        lowered: the integers of the module, and where they stand in the graph before; None of a graph of floats.
    """

    module: fx.GraphModule
    original: nn.Module
    inputs: Inputs
    coupling: Coupling | None = None
    sites: tuple[Site, ...] = ()
    notes: tuple[str, ...] = ()
    left_float: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    repairs: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    reconstructions: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    verified: Mapping[str, float] = field(default_factory=dict)
    unchecked: Mapping[str, str] = field(default_factory=dict)
    stages: Mapping[str, Program] = field(default_factory=dict)
    lowered: Lowered | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.original).__name__}, {len(self.module.graph.nodes)} nodes)"

    def __post_init__(self) -> None:
        assert self.coupling is None or self.coupling.graph is self.graph, "the axes must be of the program's graph"

    @property
    def graph(self) -> fx.Graph:
        """The graph; one graph for all programs that `bind` makes of this one."""
        return self.module.graph

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, a tied tensor under each of its names: parameters, buffers, constants."""
        return dict(all_tensors(self.module))

    def bind(self: P, tensors: Mapping[str, Tensor]) -> P:
        """Return the same program with `tensors` in place of the tensors of their names, in graph and model.

        The graph is shared, so that what is known by its nodes holds for both programs. Earlier stages, which hold
        tensors of their own, stay behind.
        """
        module, original = bound_graph(self.module, tensors), bound_model(self.original, tensors)
        return replace(self, module=module, original=original, stages={})

    def rewritten(self: P, module: fx.GraphModule, notes: Sequence[str] = ()) -> P:
        """Return the program of a module that a stage made of this one's, with more notes; its axes are not known."""
        return replace(self, module=module, coupling=None, notes=(*self.notes, *notes), lowered=None)

    def notes_since(self, earlier: Program) -> tuple[str, ...]:
        """Return the notes of the stages between an earlier program and this one."""
        return self.notes[len(earlier.notes) :]
