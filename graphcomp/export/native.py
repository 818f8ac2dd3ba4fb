"""The user's own class with smaller parameters, verified against the sliced graph.

The tensors are cut by name. Then the Python attributes that hold a sliced length are corrected (attributes.py finds
them; a table does the merely descriptive ones of torch's own layers), and the result must give what the sliced graph
gives; where the graph holds for one path only, what the masked model gives (masked_run.py). What cannot be verified
is not returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from graphcomp.analysis import Analysis
from graphcomp.capture import user_line
from graphcomp.compare import TOLERANCE, default_dtype, in_float64, why_silent
from graphcomp.coupling.axis import Factor, all_leaves
from graphcomp.coupling.groups import Kept
from graphcomp.export.attributes import Lengths, Site, constraints, find_lengths, options, put, sites, solve, trace
from graphcomp.export.masked_run import masked_model
from graphcomp.graph import assign, bind, source_line
from graphcomp.graph_module import copied, leaf_names, tensor_names
from graphcomp.inputs import updates
from graphcomp.provenance import compare_before, heard
from graphcomp.pruning.slice import SliceGroups, by_factor, kept_of_tensors, select
from graphcomp.untouched import eval_copy

Edit: TypeAlias = tuple[str, str, Any]
"""Module path, attribute, its new value."""

MAX_TRIES = 16  # runs of the smaller model on the example inputs
EXACT = 1e-6  # largest relative error in float64; some models compute in float32 inside, whatever they are given


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
    """

    module: nn.Module | None
    reason: str = ""
    edits: tuple[Edit, ...] = ()
    error: float = math.nan
    rounding: str = ""
    silent: str = ""


def native(analysis: Analysis, kept: Kept, reference: fx.GraphModule | None = None) -> NativeResult:
    """Cut the user's own model.

    Args:
        kept: the units that stay of each cut group.
        reference: the sliced graph, if it is there already.
    """
    model = analysis.model
    cuts = kept_of_tensors(analysis.coupling, kept)
    lost = sorted(set(cuts) - set(tensor_names(model)))
    if lost:
        return NativeResult(None, f"the model holds no tensor named {lost[0]!r} that could be cut")
    try:
        whole = copied(model, share=True)
    except Exception as error:  # a class may refuse to be copied in any way
        return NativeResult(None, f"the model cannot be copied: {_refusal(error)}")
    try:
        expected = _Reference(analysis, kept, reference)
    except Exception as error:  # a path that data decides may end anywhere
        return NativeResult(None, f"the masked model to compare with does not run: {_refusal(error)}")
    arrivals = trace(whole, *analysis.captured.inputs())
    counts = {factor: len(units) for factor, units in by_factor(kept).items()}
    lengths = find_lengths(analysis.coupling, counts)
    bounds = constraints(arrivals, lengths)
    found = solve(sites(whole), bounds, lengths)
    if found.conflict:
        return NativeResult(None, found.conflict)
    settled = frozenset(site for bound in bounds for site in bound.number.attributes)
    search = _Search(analysis, cuts, lengths, expected, settled)
    for changes in found.candidates[:MAX_TRIES]:
        result = search.follow(changes)
        if result is not None:
            return result
    return NativeResult(None, search.reason(counts))


# ------------------------------------------------------------------------------------------------ building
def _build(model: nn.Module, cuts: Mapping[str, Mapping[int, Tensor]], changes: Mapping[Site, int]) -> _Built:
    """A copy of `model` with smaller tensors and corrected attributes."""
    small = copied(model, share=True)
    named = tensor_names(model)
    cut_of = {id(named[name]): dims for name, dims in cuts.items()}
    new: dict[int, Tensor] = {}
    for name, tensor in named.items():
        if id(tensor) not in new:
            data = select(tensor, cut_of.get(id(tensor), {}))
            is_parameter = isinstance(tensor, nn.Parameter)
            new[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if is_parameter else data
        assign(small, name, new[id(tensor)])
    edits = {(site[0], site[1]): put(small, site, value) for site, value in changes.items()}
    for module in small.modules():
        _refresh_flat_weights(module)
    # a weight may be computed when it is read
    with eval_copy(model, real=False) as before, eval_copy(small, real=False) as after:
        described = {p: _described(before.get_submodule(p), module) for p, module in after.named_modules()}
    for path, values in described.items():
        vars(small.get_submodule(path)).update(values)
        edits.update({(path, name): value for name, value in values.items()})
    return _Built(small, tuple((path, name, value) for (path, name), value in edits.items()))


@dataclass(frozen=True)
class _Built:
    module: nn.Module
    edits: tuple[Edit, ...]


def _refresh_flat_weights(module: nn.Module) -> None:
    """Recurrent layers keep a list of their weights beside the weights."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


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
    (nn.modules.conv._ConvNd, _conv),
    (nn.Embedding, _embedding),
    (nn.EmbeddingBag, _embedding),
    (nn.modules.batchnorm._NormBase, _features),
    (nn.LayerNorm, _normalized),
    (nn.RMSNorm, _normalized),
    (nn.GroupNorm, _group_norm),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent_cell),
    (nn.MultiheadAttention, _attention),
    (nn.PReLU, _prelu),
)
"""Class -> what its attributes say of its tensors. `groups` and the like are no description: the forward uses them."""


def _described(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """Descriptive attributes that no longer fit the tensors of `after`.

    A subclass may mean something else by a name: what did not describe `before` is left alone.
    """
    describe = next((function for kind, function in DESCRIBED if isinstance(before, kind)), None)
    if describe is None:
        return {}
    old, new = describe(before), describe(after)
    return {name: new[name] for name in new if getattr(before, name, None) == old[name] != new[name]}


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
        expected: _Reference,
        settled: frozenset[Site],
    ) -> None:
        self.analysis, self.cuts, self.lengths, self.expected = analysis, cuts, lengths, expected
        self.open = {site: value for site, value in sites(analysis.model).items() if site not in settled}
        self.tries = 0
        self.failure = _Failure("nothing was tried")

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
        built = _build(self.analysis.model, self.cuts, changes)
        try:
            found = self.expected.compare(built.module)
        except Exception as error:  # a length that does not fit shows as any exception
            return None, _Failure(_refusal(error), _modules_of(error, built.module), user_line(error))
        if found.difference:
            return None, _Failure(found.difference)
        return NativeResult(built.module, "", built.edits, found.error, found.rounding, found.silent), _Failure("")

    def reason(self, counts: Mapping[Factor, int]) -> str:
        """Why the last set of changes failed, and the op whose implied constant a cut would change, if there is one."""
        coupling = self.analysis.coupling
        for node, call in coupling.calls.items():
            axes = [axis for n in node.all_input_nodes for value in coupling.axes.get(n, []) for axis in value[-1:]]
            if call.pins and any(leaf in counts for leaf in all_leaves(axes)):
                implied = ", ".join(name for name in call.pins if bind(node).get(name) is None)
                return f"{self.failure.text}; {node.target} takes its {implied} from a length, at {source_line(node)}"
        return self.failure.text


@dataclass(frozen=True)
class _Verdict:
    """How far a model is from the reference; `difference` says in what way it is not the same, "" where it is.

    `silent`: why nothing could be compared, where `error` is NaN.
    """

    error: float = math.nan
    difference: str = ""
    rounding: str = ""
    silent: str = ""


class _Reference:
    """What the native model must return: by the sliced graph, or where the graph holds for one path only, by the
    user's model with everything masked that goes.

    Two runs of the latter may differ by no more than rounding and still take different paths (which of two boxes that
    score alike survives). So what differs is run again in float64, both sides.
    """

    def __init__(self, analysis: Analysis, kept: Kept, graph: fx.GraphModule | None) -> None:
        self.analysis = analysis
        self.masked: nn.Module | None = None
        self.exact: dict[str, Any] | None = None
        captured = analysis.captured
        if captured.producer == "record":
            self.masked = masked_model(analysis, kept)
            self.module: nn.Module = self.masked
            self.expected = _outputs(self.masked, analysis)
        else:
            self.module = graph or SliceGroups(analysis.coupling, kept)(captured.module)
            found = _outputs(self.module, analysis)
            names = (*captured.output_names, *list(found)[len(captured.output_names) :])
            self.expected = dict(zip(names, found.values(), strict=True))

    def compare(self, module: nn.Module) -> _Verdict:
        """Run `module` on the example inputs.

        Raises:
            Whatever the module raises.
        """
        found = _difference(self.expected, _outputs(module, self.analysis))
        if not isinstance(found, str):
            return self._with_floats_before(module, found)
        if self.masked is None or not any(_is_coarse(p) for p in module.parameters()):
            return _Verdict(difference=found)
        try:
            self.exact = self.exact or _outputs(self.masked, self.analysis, exactly=True)
            exact = _difference(self.exact, _outputs(module, self.analysis, exactly=True), EXACT)
        except Exception as error:  # a model may insist on its dtype in any way
            return _Verdict(difference=f"{found}; in float64 the comparison does not run: {_refusal(error)}")
        if isinstance(exact, str):
            return _Verdict(difference=f"{found}, and in float64: {exact}")
        return _Verdict(exact, rounding=found)

    def _with_floats_before(self, module: nn.Module, error: float) -> _Verdict:
        """Compare the floats, too, that outputs are computed from whose own comparison proves nothing."""
        silent = {name: why for name, found in self.expected.items() if (why := why_silent(found))}
        outputs = [name for name in self.expected if not name.startswith("input ")]
        errors = [] if math.isnan(error) else [error]
        if any(name in silent and not self.expected[name].is_meta for name in outputs):
            wanted = dict(zip(outputs, _floats_before(self.module, self.analysis).values(), strict=False))
            got = _floats_before(module, self.analysis)
            for name in silent.keys() & wanted.keys() & got.keys():
                before = compare_before(wanted[name], got[name])
                if before > max((TOLERANCE.get(tensor.dtype, 1e-1) for tensor in wanted[name]), default=0.0):
                    return _Verdict(
                        difference=f"what output '{name}' is computed of differs by {before:.1e} (relative)"
                    )
                errors += [] if math.isnan(before) else [before]
        why = "; ".join(f"output '{name}' {why}" for name, why in silent.items())
        return _Verdict(max(errors, default=math.nan), silent="" if errors else why)


def _is_coarse(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64 and not tensor.is_meta


def _outputs(module: nn.Module, analysis: Analysis, *, exactly: bool = False) -> dict[str, Any]:
    """Name -> tensor, of one run in eval mode: the outputs, then the inputs that the run wrote into.

    The random state is the same each time.

    `exactly`: a copy of `module` runs in float64.
    """
    args, kwargs = analysis.captured.inputs()
    if exactly:
        module = _as_float64(module)
        args, kwargs = pytree.tree_map(in_float64, (args, kwargs))
    dtype = torch.float64 if exactly else None
    with eval_copy(module, real=True) as copied, torch.no_grad(), default_dtype(dtype):
        torch.manual_seed(0)
        outputs = _named(copied(*args, **kwargs))
    return outputs | updates((analysis.captured.args, analysis.captured.kwargs), (args, kwargs))


def _floats_before(module: nn.Module, analysis: Analysis) -> dict[str, list[Tensor]]:
    """Output -> the floats that it is computed from, of one run; see `Provenance`."""
    args, kwargs = analysis.captured.inputs()
    with eval_copy(module, real=True) as copied:
        torch.manual_seed(0)
        output, provenance = heard(copied, args, kwargs)
        return {name: provenance.before(tensor) for name, tensor in _named(output).items()}


def _as_float64(module: nn.Module) -> nn.Module:
    """A copy whose floating tensors are float64: parameters, buffers and plain attributes."""
    exact = copied(module).double()
    for part in exact.modules():
        for name, tensor in [(n, t) for n, t in vars(part).items() if isinstance(t, Tensor)]:
            vars(part)[name] = in_float64(tensor)
        _refresh_flat_weights(part)
    return exact


def _named(output: Any) -> dict[str, Any]:
    leaves, spec = pytree.tree_flatten(output)
    if all(leaf is None or isinstance(leaf, (Tensor, bool, int, float, str)) for leaf in leaves):
        return {n: leaf for n, leaf in zip(leaf_names(spec), leaves, strict=True) if isinstance(leaf, Tensor)}
    return dict(_inside(output, "", 0))


def _inside(value: Any, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors in containers that pytree does not know."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth < 8:
        pairs: Any = value.items() if isinstance(value, Mapping) else ()
        pairs = enumerate(value) if isinstance(value, (list, tuple)) else pairs
        pairs = vars(value).items() if hasattr(value, "__dict__") and not isinstance(value, (type, Mapping)) else pairs
        for key, child in list(pairs):
            yield from _inside(child, f"{name}.{key}", depth + 1)


def _difference(
    expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], allowed: float | None = None
) -> float | str:
    """The largest relative difference, or in what way the outputs differ; `allowed` is by the dtype if None."""
    worst, compared = 0.0, False
    for name, wanted in expected.items():
        got = actual.get(name)
        if got is None:
            return f"the smaller model returns no output '{name}'"
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return f"output '{name}' is {_kind(got)} and has to be {_kind(wanted)}"
        if wanted.is_meta or wanted.numel() == 0:
            continue
        error = _relative(wanted, got)
        if not error <= (TOLERANCE.get(wanted.dtype, 0.0) if allowed is None else allowed):
            return f"output '{name}' differs from the reference by {error:.1e} (relative)"
        if not why_silent(wanted):
            worst, compared = max(worst, error), True
    return worst if compared else math.nan


def _relative(a: Tensor, b: Tensor) -> float:
    if not a.is_floating_point() and not a.is_complex():
        return 0.0 if torch.equal(a, b) else math.inf
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return math.inf
    a, b = a[finite], b[finite]
    if a.numel() == 0:
        return 0.0
    return float((a - b).abs().double().max() / a.abs().double().max().clamp(min=1e-30))


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _refusal(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    at = user_line(error)
    return f"{text} at {at}" if at else text


def _modules_of(error: Exception, root: nn.Module) -> tuple[str, ...]:
    """Paths of the modules whose forward raised `error`, innermost first."""
    paths = {id(module): path for path, module in root.named_modules()}
    found: list[str] = []
    for frame, _ in _frames(error):
        path = paths.get(id(frame.f_locals.get("self")))
        if path is not None and path not in found:
            found.append(path)
    return tuple(reversed(found))


def _frames(error: Exception) -> Iterator[tuple[Any, int]]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next
