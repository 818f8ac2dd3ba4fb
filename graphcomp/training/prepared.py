"""The module that is trained: the captured graph with fake-quant and mask nodes in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType, MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from graphcomp.cost import FLOAT_BITS
from graphcomp.coupling.analysis import Analysis, analyze_captured
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import CheckpointError, InputError, PlanError
from graphcomp.ir.graph import all_tensors, bind, fetch, module_path
from graphcomp.ir.module import CapturedModule, trains
from graphcomp.ops.answers import compute_of
from graphcomp.pruning.mask import PREFIX, InsertMasks, computed_with, hold_masks, parameter_behind
from graphcomp.pruning.slice import check_groups, check_kept
from graphcomp.quantization.einsum import WriteOutEinsum
from graphcomp.quantization.floats import nothing_quantized
from graphcomp.quantization.fold import folded_nodes
from graphcomp.quantization.insert import InsertQuantizers, quantizer_nodes
from graphcomp.quantization.lower import constants_with_quantizers
from graphcomp.quantization.placement import layer_name, place
from graphcomp.quantization.ptq import PostTraining, calibrate_weights
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.quantization.quantizers.recompute import made_again
from graphcomp.quantization.redundant import moved_from, quantizer_before, without_repeats
from graphcomp.quantization.spec import MAX_BITS, MIN_BITS, QuantConfig, QuantSpec, matches
from graphcomp.quantization.trainable import calibrate_in_training, quantize_to_train
from graphcomp.system.threads import one_at_a_time
from graphcomp.torch_compat import inside_wrapper, non_persistent

SESSION = "graphcomp_session"
PROGRESS = "graphcomp_progress"
"""A buffer (2,): how many steps of a schedule are missing until bits and units are settled, and how many settle them. A
buffer, as averages of a module (`AveragedModel`) follow those; the first is above 0 where one reaches back too far."""

ROUNDING = 1e-3
"""How far from 0 or 1 a mask may be: what an average of many ones comes to."""


@dataclass(frozen=True)
class Site:
    """One quantizer of a prepared module.

    Attributes:
        name: of the quantizer among the modules.
        layer: the layer whose weight it quantizes, or the node whose value.
        parameter: the parameter that it reads element by element; "" for activations and computed weights.
        is_weight: whether what it quantizes depends on no input.
        low, high: the bits it may have.
    """

    name: str
    layer: str
    parameter: str
    is_weight: bool
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Session:
    """What `finalize` needs to know of how a module was prepared.

    Attributes:
        plan: of the copy of the model that is trained, in floats.
        quantized: the same graph with quantizers; `plan` itself where there are none.
        groups: of `quantized`, those whose units may go.
        sites: the quantizers.
        bits: the range asked for; None: nothing is quantized.
        config: which tensors are quantized. GETA's quantizers stand on no embedding tables.
        ignore: module names or "re:" patterns that stay float.
        notes: groups that were left whole, and wishes for bits of single layers that were not met, and why.
        computed: parameters that weights are computed of: what leaves is not held at zero in them, see `computed_with`.
        no_groups: why nothing can be pruned, where `groups` is empty.
        whole: the module as it was before it was shrunk; None: it is whole.
    """

    plan: Analysis
    quantized: Analysis
    groups: tuple[ChannelGroup, ...]
    sites: tuple[Site, ...]
    bits: tuple[int, int] | None
    config: QuantConfig | None
    computed: frozenset[str]
    no_groups: str = ""
    notes: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    whole: Prepared | None = None

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


class MoreThanOneValue(nn.Module):
    """Passes on what a batch norm reads; in training only if there are two values per channel, of which one has no
    variance. The op alone makes the running variance NaN; this is the check that torch's function has around it."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, …) -> itself.

        Raises:
            InputError: one value per channel in training.
        """
        if self.training and x.numel() == x.shape[1]:
            raise InputError(
                "a batch norm needs more than one value per channel in training",
                at=f"'{self.norm}', which reads a tensor of shape {tuple(x.shape)}",
                fix="drop_last=True in the DataLoader, if the last batch holds one example",
            )
        return x


class Part(nn.Module):
    """A submodule of a prepared module: it holds tensors, and the graph of the whole does the rest."""

    def forward(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refused.

        Raises:
            PlanError: always.
        """
        raise PlanError(
            "a submodule of a prepared module is called on its own",
            why="what was prepared is the forward of the whole model",
            fix='call the prepared module; or prepare(model, example_inputs, scope="path.of.the.submodule")',
        )


class Prepared(CapturedModule):
    """A model to train, called like the original.

    Parameters and buffers have the original's names; those of the quantizers stand under `graphcomp_quantizers`, and
    one 0/1 mask per group under `graphcomp_mask_*`. Attributes that it lacks itself (`config`, …) are the original's;
    its methods, too, but they are called on this module. Its submodules hold tensors alone: hooks on them are not
    called, and `.eval()` of one of them changes nothing; `freeze_norms` puts batch norms in eval mode.

    Attributes:
        recompute: compute quantized weights and activations again in the backward pass instead of keeping them for it.
        remarks: what was asked of the training and not done, or done otherwise, for the report.
        elements: parameter -> bool mask of its shape, False where an element was pruned; see `keep_elements`.
    """

    recompute: bool = False
    remarks: tuple[str, ...] = ()
    elements: Mapping[str, Tensor] = MappingProxyType({})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        if not self.recompute:
            return super().__call__(*args, **kwargs)
        with made_again():
            return super().__call__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            session = vars(self).get("meta", {}).get(SESSION)
            if session is None or name.startswith("__"):
                raise
            found = getattr(session.plan.model, name)
            of_the_model = isinstance(found, MethodType) and found.__self__ is session.plan.model
            # a method that calls the model is to call this module
            return MethodType(found.__func__, self) if of_the_model else found

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepared:
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, Prepared)
        copied.meta[SESSION] = self.session.bind(copied)
        copied.save_as_the_model()
        copied.recompute, copied.remarks, copied.elements = self.recompute, self.remarks, dict(self.elements)
        return copied

    def train(self, mode: bool = True) -> Prepared:
        """Switch the mode, as of the model. Frozen norms stay in eval mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, MoreThanOneValue):
                module.training = mode and not self.norms_frozen
        return self

    def freeze_norms(self, frozen: bool = True) -> Prepared:
        """Keep the running statistics of all batch norms as they are, and normalise by them, in training mode too.

        The affine parameters of the norms go on learning: `requires_grad_(False)` holds these. Norms that were in eval
        mode inside of a model in training mode when `prepare` was called are frozen from the outset, and stay so.

        Args:
            frozen: False lets the statistics move again.
        """
        self.norms_frozen = frozen
        return self.train(self.training)

    def __reduce__(self) -> NoReturn:
        raise CheckpointError(
            "a prepared module cannot be pickled",
            why="it holds the plan that it was made by",
            fix="save ready.state_dict(), and load it into one that is prepared anew; finalize(ready).save(folder) "
            "keeps the result",
        )

    def save_as_the_model(self) -> None:
        """Leave out of `state_dict` the buffers that the model leaves out of its own."""
        saved = self.session.plan.model.state_dict().keys()
        for name, _ in self.named_buffers():
            if (name not in saved and not name.startswith("graphcomp_")) or name == PROGRESS:
                path, _, leaf = name.rpartition(".")
                non_persistent(self.get_submodule(path)).add(leaf)

    @property
    def session(self) -> Session:
        """How it was prepared."""
        found: Session = self.meta[SESSION]
        return found

    def kept(self) -> Kept:
        """The units of each group that its mask leaves: (k,) int64 on the CPU.

        Raises:
            PlanError: a mask is neither 0 nor 1.
        """
        masks = {group: self.get_buffer(f"{PREFIX}{k}").detach().cpu() for k, group in enumerate(self.session.groups)}
        for group, mask in masks.items():
            strange = mask[~((mask - mask.round()).abs() <= ROUNDING)]
            if len(strange):
                raise PlanError(
                    f"the mask of '{group.name}' holds {strange[0].item():.3g}, which is neither 0 nor 1",
                    why="an average (EMA) of the whole state_dict that goes back to before units were gone",
                    fix="begin the average in the cool-down, when optimizer.settled",
                )
        return {group: mask.round().nonzero().flatten() for group, mask in masks.items()}

    def keep(self, kept: Kept) -> None:
        """Set the masks, and all elements of masked units to zero: a unit that is gone is as if it never existed.

        Raises:
            PlanError: a group is none of `session.groups`, or its units are no ascending indices.
        """
        check_kept(kept)
        check_groups("kept", self.session.groups, list(kept))
        hold_masks(self, self.session.groups, kept, self.session.computed)

    @torch.no_grad()
    def keep_elements(self, elements: Mapping[str, Tensor]) -> None:
        """Set pruned elements of parameters to zero. Optimizers of graphcomp and `finalize` hold these at zero.

        Args:
            elements: parameter -> mask of its shape, 0 (False) where an element is pruned. Masks given before stay.

        Raises:
            PlanError: a name is no parameter, or a mask has another shape.
        """
        parameters = dict(self.named_parameters())
        for name, mask in elements.items():
            shape = tuple(parameters[name].shape) if name in parameters else None
            if shape != tuple(mask.shape):
                raise PlanError(
                    f"the mask of '{name}' must have the shape of a parameter, got {tuple(mask.shape)} for {shape}",
                    fix="elements={name: parameter != 0}",
                )
        found = {name: mask.to(parameters[name].device).bool() for name, mask in elements.items()}
        self.elements = {**self.elements, **found}
        self.hold_elements()

    @torch.no_grad()
    def hold_elements(self) -> None:
        """Set pruned elements to zero again."""
        for name, mask in self.elements.items():
            parameter = self.get_parameter(name)
            parameter.masked_fill_(~mask.to(parameter.device), 0)

    @contextmanager
    def in_floats(self) -> Iterator[None]:
        """Let quantizers pass on what they read, inside."""
        found = [quantizer for _, quantizer in self.quantizers()]
        before = [quantizer.enabled for quantizer in found]
        for quantizer in found:
            quantizer.enabled = False
        try:
            yield
        finally:
            for quantizer, enabled in zip(found, before, strict=True):
                quantizer.enabled = enabled

    @property
    def progress(self) -> tuple[int, int]:
        """How many steps of a schedule are done, as far as it takes, and how many settle bits and units."""
        missing, settled = (round(count) for count in self.get_buffer(PROGRESS).nan_to_num().tolist())
        return settled - missing, settled

    def set_progress(self, done: int, settled: int) -> None:
        """Say how far a schedule is; waits for no device."""
        buffer = self.get_buffer(PROGRESS)
        buffer[0], buffer[1] = max(settled - done, 0), settled

    def quantizers(self) -> Iterator[tuple[Site, Quantizer]]:
        """Each quantizer with what it stands on."""
        for site in self.session.sites:
            found = self.get_submodule(site.name)
            assert isinstance(found, Quantizer)
            yield site, found

    def bits(self) -> dict[str, tuple[float, float]]:
        """Layer -> bits of its weight, and of what it reads; 32 where it is not quantized."""
        bits = {site.name: float(quantizer.bits.detach()) for site, quantizer in self.quantizers()}
        layers = {site.name: site.layer for site in self.session.sites if site.is_weight}
        found = {layer: (bits[name], float(FLOAT_BITS)) for name, layer in layers.items()}
        for weight, read in operands(self.session).values():
            if weight:
                of_activations = max((bits[name] for name in read), default=float(FLOAT_BITS))
                found[layers[weight]] = bits[weight], of_activations
        return found


def unwrapped(module: nn.Module) -> Prepared:
    """The prepared module inside wrappers such as DistributedDataParallel and torch.compile's.

    Raises:
        PlanError: there is none, or a wrapper has parameters of its own.
    """
    if not isinstance(module, nn.Module):
        raise PlanError(
            f"a {type(module).__name__} is no module",
            why="parameters alone do not say which of them make units",
            fix="give what graphcomp.prepare returned: QASSO(ready, torch.optim.AdamW, …), finalize(ready)",
        )
    inner: Any = module
    while not isinstance(inner, Prepared):
        following = inside_wrapper(inner)
        if following is None:
            raise PlanError(
                f"{type(module).__name__} was not prepared for training",
                why="it has no fake-quant and mask nodes",
                fix="ready = graphcomp.prepare(model, example_inputs, bits=(4, 8))",
            )
        inner = following
    held = {id(p) for p in inner.parameters()}
    others = [name for name, p in module.named_parameters() if id(p) not in held]
    if others:
        raise PlanError(
            f"{type(module).__name__} has parameters outside of the prepared module in it",
            at=", ".join(others)[:300],
            why="they would be left out in silence",
            fix="give the prepared module, QASSO(model.module, …), and the rest by optimizer.add_param_group",
        )
    return inner


# ------------------------------------------------------------------------------------------------ making one
def training_config(bits: int, activation_bits: int | None, learn_exponent: bool) -> QuantConfig:
    """Return the configuration of GETA's quantizers on weights and activations, with the bits that training starts at.

    Embedding tables are looked up in floats, and quantized when training is over.

    Args:
        bits: of weights.
        activation_bits: of activations; None: activations stay float.
        learn_exponent: whether quantizers of weights learn an exponent.
    """
    return QuantConfig(
        weights=QuantSpec(bits, kind="geta", learn_exponent=learn_exponent),
        activations=None if activation_bits is None else QuantSpec(activation_bits, kind="geta"),
        first_and_last_bits=bits,
    )


@one_at_a_time
def prepare_graph(
    plan: Analysis,
    groups: Sequence[ChannelGroup],
    *,
    bits: tuple[int, int] | None,
    activation_bits: tuple[int, int] | None,
    config: QuantConfig | None,
    layer_bits: Mapping[str, LayerBits],
    ignore: Sequence[str],
    batches: Sequence[Sequence[Any]],
    no_groups: str = "",
    notes: Sequence[str] = (),
    start: PostTraining | None = None,
) -> Prepared:
    """Insert quantizers and masks into a captured graph.

    Args:
        plan: of a model whose tensors the result will share, and train.
        groups: of `plan`, whose units may go.
        bits: the range of bits of weights that is learned; None: no quantizers, or those of `config` at its bits.
        activation_bits: the range of bits of activations; None: activations stay float.
        config: where quantizers go, at the most bits of each range.
        layer_bits: module name or "re:" pattern -> ranges of its own; the last that matches counts.
        ignore: modules that stay float.
        batches: flat inputs that the ranges of activations are read off.
        no_groups: why nothing can be pruned, where `groups` is empty.
        notes: what a reader of the report should know of the groups.
        start: post-training quantization that LSQ starts from, in place of bits, config and layer_bits; None: GETA's
            quantizers.
    """
    quantized = plan
    sites: tuple[Site, ...] = ()
    wishes: tuple[str, ...] = ()
    if start is not None:
        start = replace(start, ignore=(*start.ignore, *ignore))
        graph, wishes = quantize_to_train(plan.captured.module, batches, start)
        sites, config, ignore = _fixed_sites(graph), start.config, start.ignore
        bits = _bounds(sites)
        quantized = analyze_captured(plan.captured.rewritten(graph))
    elif config is not None:
        floats = WriteOutEinsum()(plan.captured.module)
        placement = place(floats, replace(config, embeddings=None), ignore, folded_nodes(floats.graph))
        graph = InsertQuantizers(without_repeats(placement))(floats)
        calibrate_weights(graph)
        calibrate_in_training(graph, batches)
        if bits is None:
            sites, wishes, bits = _fixed_sites(graph), (), _bounds(_fixed_sites(graph))
        else:
            sites, wishes = _Ranges(graph, bits, activation_bits or bits, layer_bits).sites()
            _start_at_the_most(graph, sites)
        wishes = (*placement.notes, *wishes)
        quantized = analyze_captured(plan.captured.rewritten(graph))
    if quantized is not plan and not sites:
        wishes = (*wishes, nothing_quantized(quantized.captured.module))
    by_name = {group.name: group for group in quantized.groups}
    chosen = tuple(by_name[group.name] for group in groups)
    session = Session(
        plan,
        quantized,
        chosen,
        sites,
        bits,
        config,
        computed_with(plan.coupling),
        no_groups,
        (*notes, *wishes),
        tuple(ignore),
    )
    ready = with_masks(session)
    ready.train(plan.model.training)
    return ready


def with_masks(session: Session) -> Prepared:
    """The module of a session, in eval mode: its quantized graph with a mask per group."""
    quantized, groups = session.quantized, session.groups
    masked = InsertMasks(quantized.coupling, groups, held=True)(quantized.captured.module)
    ready = _as_prepared(masked, type(session.plan.model).__name__, len(groups))
    ready.meta[SESSION] = session
    ready.save_as_the_model()
    return ready


def _as_prepared(masked: fx.GraphModule, name: str, groups: int) -> Prepared:
    masks = {f"{PREFIX}{k}": masked.get_buffer(f"{PREFIX}{k}") for k in range(groups)}
    for node in masked.graph.find_nodes(op="get_attr"):
        if str(node.target) in masks and not node.users:
            masked.graph.erase_node(node)
    _check_batch_norms(masked)
    held = {
        str(n.target): fetch(masked, str(n.target)) for n in masked.graph.nodes if n.op in ("get_attr", "call_module")
    }
    ready = Prepared(held, masked.graph, class_name=name)
    for mask_name, mask in masks.items():
        if mask_name not in held:
            ready.register_buffer(mask_name, mask)
    device = next((tensor.device for tensor in masked.parameters()), None)
    for module in ready.modules():
        if type(module) is nn.Module:
            module.__class__ = Part
    ready.register_buffer(PROGRESS, torch.zeros(2, device=device), persistent=False)
    ready.eval()
    return ready


def _check_batch_norms(masked: fx.GraphModule) -> None:
    for node in masked.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default):
        if trains(node):
            name, read = f"graphcomp_check_{node.name}", bind(node)["input"]
            masked.add_submodule(name, MoreThanOneValue(module_path(node)))
            with masked.graph.inserting_before(node):
                check = masked.graph.call_module(name, (read,))
            check.meta["val"] = read.meta["val"]
            node.replace_input_with(read, check)


@dataclass(frozen=True)
class LayerBits:
    """Ranges of bits that one layer is given by name: of its weight, and of what the layer reads."""

    weights: tuple[int, int]
    activations: tuple[int, int]


class _Ranges:
    """The range of bits of each quantizer: the general one, or one that a layer was given by name."""

    def __init__(
        self,
        graph: fx.GraphModule,
        bits: tuple[int, int],
        activation_bits: tuple[int, int],
        layer_bits: Mapping[str, LayerBits],
    ) -> None:
        self.graph, self.bits, self.activation_bits, self.layer_bits = graph, bits, activation_bits, layer_bits
        self.constant = constants_with_quantizers(graph)
        self.parameters = dict(graph.named_parameters(remove_duplicate=False))
        self.matched: set[str] = set()
        self.notes: list[str] = []

    def sites(self) -> tuple[tuple[Site, ...], tuple[str, ...]]:
        """Return the quantizers with their ranges, and a note for each wish that is not met.

        Raises:
            PlanError: an entry of `layer_bits` names no layer with a quantizer.
        """
        nodes: dict[str, list[fx.Node]] = {}
        for node, _ in quantizer_nodes(self.graph):
            nodes.setdefault(str(node.target), []).append(node)
        found = tuple(self._site(name, readers) for name, readers in nodes.items())
        if unmatched := sorted(self.layer_bits.keys() - self.matched):
            layers = dict.fromkeys(site.layer for site in found if site.is_weight)
            raise PlanError(
                f"layer_bits names {', '.join(unmatched)}, which is no module with a quantizer",
                fix=f"quantized layers: {', '.join(layers)}",
            )
        return found, tuple(self.notes)

    def _site(self, name: str, nodes: Sequence[fx.Node]) -> Site:
        """Return the site of one quantizer, which stands at each of `nodes`."""
        (source,) = nodes[0].all_input_nodes
        is_weight = nodes[0] in self.constant
        layer = layer_name(source, self.constant) if is_weight else source.name
        paths = {module_path(reader): None for node in nodes for reader in _readers(node)} | {layer: None}
        wishes = {path: wish for path in paths if (wish := self._wish(path, is_weight)) is not None}
        low, high = self.bits if is_weight else self.activation_bits
        if wishes:
            low, high = max(wishes.values(), key=lambda own: (own[1], own[0]))
        for path, wish in wishes.items():
            if wish != (low, high):
                what = "weight" if is_weight else "input"
                self.notes.append(
                    f"{path}: its {what} has {low} to {high} bits, not {wish[0]} to {wish[1]}, "
                    f"as it shares the quantizer of {layer} with {', '.join(p for p in wishes if p != path)}"
                )
        parameter = parameter_behind(source, self.parameters) if is_weight else ""
        return Site(name, layer, parameter, is_weight, low, high)

    def _wish(self, path: str, is_weight: bool) -> tuple[int, int] | None:
        """Return the range that the last matching entry of `layer_bits` gives; None without one."""
        found = None
        for pattern, own in self.layer_bits.items():
            if matches(pattern, path):
                found = own.weights if is_weight else own.activations
                self.matched.add(pattern)
        return found


def _bounds(sites: Sequence[Site]) -> tuple[int, int]:
    """Return the fewest and the most bits of quantizers."""
    return min((site.low for site in sites), default=MIN_BITS), max((site.high for site in sites), default=MAX_BITS)


def _fixed_sites(graph: fx.GraphModule) -> tuple[Site, ...]:
    """Return the quantizers, each with the bits of its spec."""
    constant = constants_with_quantizers(graph)
    parameters = dict(graph.named_parameters(remove_duplicate=False))
    found: dict[str, Site] = {}
    for node, quantizer in quantizer_nodes(graph):
        (source,) = node.all_input_nodes
        name, is_weight, bits = str(node.target), node in constant, quantizer.spec.bits
        layer = layer_name(source, constant) if is_weight else source.name
        parameter = parameter_behind(source, parameters) if is_weight else ""
        found.setdefault(name, Site(name, layer, parameter, is_weight, bits, bits))
    return tuple(found.values())


@torch.no_grad()
def _start_at_the_most(graph: fx.GraphModule, sites: Sequence[Site]) -> None:
    """Give quantizers that learn their bits the most bits of their range."""
    for site in sites:
        quantizer = graph.get_submodule(site.name)
        if isinstance(quantizer, GetaQuantizer) and round(float(quantizer.bits)) != site.high:
            quantizer.project_bits(site.high, site.high)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the ops that read the elements of `node`, through ops that only move them."""
    for user in node.users:
        if moved_from(user) is node:
            yield from _readers(user)
        else:
            yield user


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
