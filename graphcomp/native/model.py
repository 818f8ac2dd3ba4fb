"""The user's own class with smaller parameters, verified against the sliced graph.

The tensors are cut by name. Then the Python attributes that hold a sliced length are corrected (attributes.py finds
them; a table does the merely descriptive ones of torch's own layers), and the result must give what the sliced graph
gives; where the graph holds for one path only, what the masked model gives (masked_run.py). What cannot be verified
is not returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, fx, nn

from graphcomp.capture.capture import user_line
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.axis import Axis, Factor, all_leaves
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.coupling.propagate import Coupling
from graphcomp.ir.graph import all_tensors, assign, bind, source_line
from graphcomp.ir.module import copied, tensor_names
from graphcomp.ir.preserve import eval_copy
from graphcomp.native.attributes import (
    LINE,
    Lengths,
    Site,
    constraints,
    find_lengths,
    options,
    put,
    sites,
    solve,
    trace,
)
from graphcomp.native.other_runs import OtherRuns
from graphcomp.native.reference import Reference, Verdict, refusal
from graphcomp.native.ties import FactorTie, first_mismatch, ties_among
from graphcomp.pruning.slice import by_factor, kept_of_model, select
from graphcomp.pruning.ties import merged
from graphcomp.torch_compat import ConvBase, NormBase, refresh_flat_weights

Edit: TypeAlias = tuple[str, str, Any]
"""Module path, attribute, its new value."""

MAX_TRIES = 16  # runs of the smaller model on the example inputs


@dataclass(frozen=True)
class NativeResult:
    """A smaller model of the user's class, or why there is none.

    Attributes:
        module: shares no memory with the user's model; same train/eval flags, same requires_grad. None: see `reason`.
        reason: "" with a module.
        edits: attributes that were corrected.
        error: largest relative difference from the reference; nan where nothing was compared: see `silent`.
        rounding: how the two differ in the model's own precision, where only float64 shows that they are one
            function (`error` is then that of float64); else "".
        silent: why nothing was compared: the outputs prove nothing; "" where something was.
        others: name of other inputs -> largest relative difference on them.
        unchecked: name of other inputs -> why nothing could be compared on them.
        ties: without a module, sets of factors of which equally many units must stay, that the class may hold the cut.
        blamed: without a module, cut groups that the line in `reason` reads.
        suspects: without a module, sets of cut groups one of which the class may not be able to hold cut.
    """

    module: nn.Module | None
    reason: str = ""
    edits: tuple[Edit, ...] = ()
    error: float = math.nan
    rounding: str = ""
    silent: str = ""
    others: Mapping[str, float] = field(default_factory=dict)
    unchecked: Mapping[str, str] = field(default_factory=dict)
    ties: tuple[FactorTie, ...] = ()
    blamed: tuple[ChannelGroup, ...] = ()
    suspects: tuple[tuple[ChannelGroup, ...], ...] = ()


def native(
    analysis: Analysis,
    kept: Kept,
    reference: fx.GraphModule | None = None,
    *,
    explain: bool = True,
    share: bool = False,
) -> NativeResult:
    """Cut the user's own model.

    Args:
        kept: the units that stay of each cut group.
        reference: the sliced graph, if it is there already.
        explain: look for the line that stands in the way, and for ties, where the class cannot hold the cut.
        share: the module may have the memory of `reference`, which nobody goes on with.
    """
    model = analysis.model
    cuts = kept_of_model(analysis.coupling, kept)
    lost = sorted(set(cuts) - set(tensor_names(model)))
    if lost:
        return NativeResult(None, f"the model holds no tensor named {lost[0]!r} that could be cut")
    try:
        whole = copied(model, share=True)
    except Exception as error:  # a class may refuse to be copied in any way
        return NativeResult(None, f"the model cannot be copied: {refusal(error)}")
    try:
        expected = Reference(analysis, kept, reference)
    except Exception as error:  # a path that data decides may end anywhere
        return NativeResult(None, f"the masked model to compare with does not run: {refusal(error)}")
    arrivals = trace(whole, *analysis.captured.inputs.copies())
    counts = {factor: len(units) for factor, units in by_factor(kept).items()}
    lengths = find_lengths(analysis.coupling, counts)
    bounds = constraints(arrivals, lengths)
    found = solve(sites(whole), bounds, lengths)
    if found.conflict:
        ties = merged(tie for axes in found.axes for tie in ties_among(axes))
        blamed = _groups_of([axis for axes in found.axes for axis in axes], kept)
        return NativeResult(None, found.conflict, ties=ties, blamed=blamed, suspects=(blamed,) if blamed else ())
    settled = frozenset(site for bound in bounds for site in bound.number.attributes)
    others = OtherRuns(analysis, kept, expected.module)
    made = dict(all_tensors(reference)) if share and reference is not None else {}
    search = _Search(analysis, cuts, lengths, expected, others, settled, made)
    for changes in found.candidates[:MAX_TRIES]:
        result = search.follow(changes)
        if result is not None:
            return result
    return _refused(analysis, kept, search, whole) if explain else NativeResult(None, search.failure.text)


# ------------------------------------------------------------------------------------------------ refusing
def _refused(analysis: Analysis, kept: Kept, search: _Search, whole: nn.Module) -> NativeResult:
    """Say which line of the class does not follow the cut, which ties may mend that, and what to pass."""
    coupling, counts = analysis.coupling, {factor: len(units) for factor, units in by_factor(kept).items()}
    mismatch = None
    if search.built is not None:
        mismatch = first_mismatch(coupling, counts, whole, search.built, analysis.captured.inputs.copies)
    path = next(iter(search.failure.paths), None)
    blamed = tuple(g for g in kept if path and any(m.name.rpartition(".")[0] == path for m in g.members))
    text = search.reason(counts)
    if path:
        text += f" in {type(analysis.model.get_submodule(path)).__name__} '{path}'"
    if mismatch is not None:
        text = mismatch.text or text
        blamed = _groups_of(mismatch.axes, kept) or blamed
    read = _groups_of(_read_at(search.failure.line, coupling), kept)
    blamed = blamed or read
    suspects = (
        blamed,
        *(tuple(g for g in read if g.role == role) for role in dict.fromkeys(g.role for g in read)),
        read,
    )
    return NativeResult(
        None,
        text,
        ties=() if mismatch is None else mismatch.ties,
        blamed=blamed,
        suspects=tuple(dict.fromkeys(found for found in suspects if found)),
    )


def _read_at(line: str, coupling: Coupling) -> list[Axis]:
    """Return the axes of what the ops on a source line read, in the captured graph and beside it."""
    place = LINE.match(line)
    found: list[Axis] = []
    for own in (coupling, *coupling.beside) if place else ():
        for node in own.calls:
            here = LINE.match(source_line(node))
            if place and here and here.groups() == place.groups():
                found += [a for n in node.all_input_nodes for axes in own.axes.get(n, []) for a in axes]
    return found


def _groups_of(axes: Sequence[Axis], kept: Kept) -> tuple[ChannelGroup, ...]:
    """Return the cut groups that `axes` are made of."""
    inside = set(all_leaves(axes))
    return tuple(group for group, units in kept.items() if group.factor in inside and len(units) < group.size)


# ------------------------------------------------------------------------------------------------ building
def _build(
    model: nn.Module,
    cuts: Mapping[str, Mapping[int, Tensor]],
    changes: Mapping[Site, int],
    made: Mapping[str, Tensor] | None = None,
) -> _Built:
    """A copy of `model` with smaller tensors and corrected attributes.

    Args:
        made: name -> tensor that was cut already, in the place of another cut of the same.
    """
    made = made or {}
    small = copied(model, share=True)
    named = tensor_names(model)
    cut_of = {id(named[name]): dims for name, dims in cuts.items()}
    new: dict[int, Tensor] = {}
    for name, tensor in named.items():
        if id(tensor) not in new:
            is_parameter = isinstance(tensor, nn.Parameter)
            dims = cut_of.get(id(tensor), {})
            of_graph = made.get(name) if is_parameter else None  # buffers may be written into
            same = of_graph is not None and of_graph.shape == _cut_shape(tensor, dims)
            data = of_graph.detach() if same and of_graph is not None else select(tensor, dims)
            new[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if is_parameter else data
        assign(small, name, new[id(tensor)])
    edits = {(site[0], site[1]): put(small, site, value) for site, value in changes.items()}
    for module in small.modules():
        refresh_flat_weights(module)
    # a weight may be computed when it is read
    with eval_copy(model, real=False) as before, eval_copy(small, real=False) as after:
        described = {p: _described(before.get_submodule(p), module) for p, module in after.named_modules()}
    for path, values in described.items():
        vars(small.get_submodule(path)).update(values)
        edits.update({(path, name): value for name, value in values.items()})
    return _Built(small, tuple((path, name, value) for (path, name), value in edits.items()))


def _cut_shape(tensor: Tensor, dims: Mapping[int, Tensor]) -> tuple[int, ...]:
    return tuple(len(dims[dim]) if dim in dims else size for dim, size in enumerate(tensor.shape))


@dataclass(frozen=True)
class _Built:
    module: nn.Module
    edits: tuple[Edit, ...]


# ------------------------------------------------------------------------------------------------ descriptions
def _linear(m: Any) -> dict[str, Any]:
    return {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]}


def _bilinear(m: Any) -> dict[str, Any]:
    return dict(zip(("out_features", "in1_features", "in2_features"), m.weight.shape, strict=True))


def _conv(m: Any) -> dict[str, Any]:
    first, second = m.weight.shape[:2]
    if m.transposed:
        return {"in_channels": first, "out_channels": second * m.groups}
    return {"out_channels": first, "in_channels": second * m.groups}


def _embedding(m: Any) -> dict[str, Any]:
    return {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}


def _features(m: Any) -> dict[str, Any]:
    tensor = m.weight if m.weight is not None else m.running_mean
    return {} if tensor is None else {"num_features": tensor.shape[0]}


def _normalized(m: Any) -> dict[str, Any]:
    return {} if m.weight is None else {"normalized_shape": tuple(m.weight.shape)}


def _group_norm(m: Any) -> dict[str, Any]:
    return {} if m.weight is None else {"num_channels": m.weight.shape[0]}


def _recurrent(m: Any) -> dict[str, Any]:
    gates = {"LSTM": 4, "GRU": 3}.get(m.mode, 1)
    return {"hidden_size": m.weight_ih_l0.shape[0] // gates, "input_size": m.weight_ih_l0.shape[1]}


def _recurrent_cell(m: Any) -> dict[str, Any]:
    return {"hidden_size": m.weight_hh.shape[1], "input_size": m.weight_ih.shape[1]}


def _attention(m: Any) -> dict[str, Any]:
    if m.in_proj_weight is None:
        return {"kdim": m.k_proj_weight.shape[1], "vdim": m.v_proj_weight.shape[1]}
    width = m.in_proj_weight.shape[1]
    return {"embed_dim": width, "kdim": width, "vdim": width, "head_dim": width // m.num_heads}


def _prelu(m: Any) -> dict[str, Any]:
    return {"num_parameters": m.weight.shape[0]}


DESCRIBED: tuple[tuple[type[nn.Module], Callable[[Any], dict[str, Any]]], ...] = (
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (ConvBase, _conv),
    (nn.Embedding, _embedding),
    (nn.EmbeddingBag, _embedding),
    (NormBase, _features),
    (nn.LayerNorm, _normalized),
    (nn.RMSNorm, _normalized),
    (nn.GroupNorm, _group_norm),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent_cell),
    (nn.MultiheadAttention, _attention),
    (nn.PReLU, _prelu),
)
"""Class -> what its attributes say of its tensors. `groups` and the like are no description: the forward uses them."""


def description(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a layer of torch's that say what shapes its tensors have; {} of other modules."""
    describe = next((function for kind, function in DESCRIBED if isinstance(module, kind)), None)
    return {} if describe is None else describe(module)


def _described(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """Descriptive attributes that no longer fit the tensors of `after`.

    A subclass may mean something else by a name: what did not describe `before` is left alone.
    """
    return redescribed(before, description(before), description(after))


def redescribed(module: nn.Module, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `new` that take the place of an attribute of `module` that `old` described."""
    return {name: new[name] for name in new if name in old and getattr(module, name, None) == old[name] != new[name]}


# ------------------------------------------------------------------------------------------------ verifying
@dataclass(frozen=True)
class _Failure:
    """Why a candidate is not the answer: it raised, in some module, or its outputs differ."""

    text: str
    paths: tuple[str, ...] = ()  # modules whose forward was running, innermost first
    line: str = ""


class _Search:
    """Builds candidates and tries them on the example inputs, a bounded number of times."""

    def __init__(
        self,
        analysis: Analysis,
        cuts: Mapping[str, Mapping[int, Tensor]],
        lengths: Lengths,
        expected: Reference,
        others: OtherRuns,
        settled: frozenset[Site],
        made: Mapping[str, Tensor],
    ) -> None:
        self.analysis, self.cuts, self.lengths, self.made = analysis, cuts, lengths, made
        self.expected, self.others = expected, others
        unsettled = {site: value for site, value in sites(analysis.model).items() if site not in settled}
        # a module's own numbers first: those of a config are many, and most are read when a model is built
        self.open = dict(sorted(unsettled.items(), key=lambda entry: "." in entry[0][1]))
        self.tries = 0
        self.failure = _Failure("nothing was tried")
        self.built: nn.Module | None = None  # by the last try

    def follow(self, changes: dict[Site, int]) -> NativeResult | None:
        """Try `changes`; where the model raises, try the attributes of the module that did, as long as that helps."""
        result, failure = self.attempt(changes)
        self.failure = failure
        while result is None and failure.paths:
            step = self._step(changes, failure)
            if step is None:
                break
            changes, result, failure = step
        return result

    def _step(
        self, changes: dict[Site, int], failure: _Failure
    ) -> tuple[dict[Site, int], NativeResult | None, _Failure] | None:
        for site, value in self._guesses(failure, changes):
            if self.tries >= MAX_TRIES:
                return None
            wider = {**changes, site: value}
            result, then = self.attempt(wider)
            if result is not None or (then.line, then.paths) != (failure.line, failure.paths):
                return wider, result, then
        return None

    def _guesses(self, failure: _Failure, changes: Mapping[Site, int]) -> Iterator[tuple[Site, int]]:
        for path in failure.paths:
            for site, old in self.open.items():
                if site[0] == path and site not in changes:
                    yield from ((site, new) for new in options(site, old, self.lengths) if new != old)

    def attempt(self, changes: Mapping[Site, int]) -> tuple[NativeResult | None, _Failure]:
        """Build and run one candidate."""
        self.tries += 1
        built = _build(self.analysis.model, self.cuts, changes, self.made)
        self.built = built.module
        try:
            found = self.expected.compare(built.module)
            other = Verdict() if found.difference else self.others.compare(built.module)
        except Exception as error:  # a length that does not fit shows as any exception
            return None, _Failure(refusal(error), _modules_of(error), user_line(error))
        if found.difference:
            return None, _Failure(found.difference)
        if other.difference:
            return None, _Failure(other.difference, self._unread())
        errors, unchecked = dict(self.others.errors), dict(self.others.unchecked)
        result = NativeResult(
            built.module, "", built.edits, found.error, found.rounding, found.silent, others=errors, unchecked=unchecked
        )
        return result, _Failure("")

    def _unread(self) -> tuple[str, ...]:
        """Paths of modules with attributes that no run has settled and that may hold a length that was cut."""
        paths = (site[0] for site, old in self.open.items() if len(options(site, old, self.lengths)) > 1)
        return tuple(dict.fromkeys(paths))

    def reason(self, counts: Mapping[Factor, int]) -> str:
        """Why the last set of changes failed, and the op whose implied constant a cut would change, if there is one."""
        coupling = self.analysis.coupling
        for node, call in coupling.calls.items():
            axes = [axis for n in node.all_input_nodes for value in coupling.axes.get(n, []) for axis in value[-1:]]
            if call.pins and any(leaf in counts for leaf in all_leaves(axes)):
                implied = ", ".join(name for name in call.pins if bind(node).get(name) is None)
                return f"{self.failure.text}; {node.target} takes its {implied} from a length, at {source_line(node)}"
        return self.failure.text


def _modules_of(error: Exception) -> tuple[str, ...]:
    """Paths of the modules whose forward raised `error`, innermost first."""
    running = [frame.f_locals.get("self") for frame, _ in _frames(error)]
    modules = [module for module in running if isinstance(module, nn.Module)]
    if not modules:
        return ()
    paths = {id(module): path for path, module in modules[0].named_modules()}  # of the copy that ran
    found = dict.fromkeys(paths[id(module)] for module in modules if id(module) in paths)
    return tuple(reversed(found))


def _frames(error: Exception) -> Iterator[tuple[Any, int]]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next
