"""What a saliency may look at: weights, gradients of a loss, second moments of activations.

Gradients and activations are computed when a scorer first asks for them, on a model left as it was found.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from graphcomp.capture.capture import Captured
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.axis import Factor, coordinates, leaves
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.coupling.propagate import Coupling
from graphcomp.errors import PlanError, first_line
from graphcomp.ir.graph import argument_at, attributes, bind
from graphcomp.ir.inputs import copies
from graphcomp.ir.module import tensor_leaves
from graphcomp.ir.preserve import eval_copy
from graphcomp.ir.run_nodes import failed_at, run_tapped
from graphcomp.ops.registry import facts_of
from graphcomp.pruning.acting import Acting, acting_weights
from graphcomp.torch_compat import inside_wrapper

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""loss(model output, batch) -> scalar tensor."""

Scores: TypeAlias = Mapping[ChannelGroup, Tensor]
"""For each group one number per unit: (size,) float32 on the CPU. Low: the unit can go."""


class NotedScores(dict[ChannelGroup, Tensor]):
    """Scores with notes on how they came about, which a saliency may return; the report holds the notes.

    Attributes:
        notes: what was not done as asked, each with the reason.
    """

    def __init__(self, scores: Scores, notes: Sequence[str] = ()) -> None:
        super().__init__(scores)
        self.notes = tuple(notes)


def notes_of(scores: Scores) -> tuple[str, ...]:
    """Return the notes on scores."""
    return scores.notes if isinstance(scores, NotedScores) else ()


Place: TypeAlias = tuple[fx.Node, int]
"""One dim of one value of the graph."""

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Evidence:
    """What there is to judge the units of `groups` by.

    Attributes:
        analysis: of the model.
        groups: the groups to score.
        data: batches, each a tensor, a tuple that begins with the model's positional inputs, or a dict that holds its
            keyword inputs; labels may follow. None: nothing that needs data can be computed.
        loss: loss(model output, batch) -> scalar. None: no gradients.
        seed: of scorers that draw at random.
    """

    analysis: Analysis
    groups: Sequence[ChannelGroup]
    data: Iterable[Any] | None = None
    loss: Loss | None = None
    seed: int = 0

    @property
    def has_gradients(self) -> bool:
        """Whether `gradients` can be computed."""
        return self.data is not None and self.loss is not None

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return {str(node.target): tensor for node, tensor in attributes(self.analysis.captured.module)}

    @cached_property
    def acting(self) -> dict[str, Acting]:
        """Weights that are computed from parameters, by the names that members of the groups have for them."""
        return acting_weights(self.analysis.coupling)

    def weight(self, name: str) -> Tensor:
        """The values of a parameter, or of a weight that acts, as float32, without gradient.

        Raises:
            PlanError: it is on the meta device.
        """
        if name in self.acting:
            return self.acting[name].value(self.weight_of)
        return self.weight_of(name).float()

    def weight_of(self, name: str) -> Tensor:
        """A parameter or buffer of the graph, in its own dtype.

        Raises:
            PlanError: it is on the meta device.
        """
        tensor = self._tensors[name]
        if tensor.is_meta:
            raise PlanError(
                "weights on the meta device cannot be scored",
                at=f"parameter '{name}'",
                fix='load the weights, or use saliency="random"',
            )
        return tensor.detach()

    def gradient(self, name: str) -> Tensor:
        """d loss / d weight as float32, mean over the batches; zeros where the loss does not depend on it."""
        found = self.gradients.get(name)
        return torch.zeros_like(self.weight(name)) if found is None else found.float()

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """See the function `gradients`.

        Raises:
            PlanError: there is no data or no loss.
        """
        if self.data is None or self.loss is None:
            missing = " and ".join(k for k, v in (("data", self.data), ("loss", self.loss)) if v is None)
            raise PlanError(
                f"this saliency needs gradients, and there is no {missing}",
                fix="data=batches, loss=lambda output, batch: …, or a saliency that needs none, such as 'l2'",
            )
        names = {weight.node: name for name, weight in self.acting.items()}
        if not names:
            return gradients(self.analysis.captured, self.loss, self.data)
        batches = list(self.data)  # gone over twice
        found = gradients(self.analysis.captured, self.loss, batches)
        return found | gradients_at(self.analysis.captured, self.loss, batches, names)

    @cached_property
    def meetings(self) -> tuple[Meeting, ...]:
        """Where the groups' units are summed away."""
        return tuple(find_meetings(self.analysis.coupling, {group.factor for group in self.groups}))

    @cached_property
    def moments(self) -> dict[Place, Tensor]:
        """Mean square of the activations at every meeting: (length of the dim,) float32.

        Raises:
            PlanError: there is no data, or the graph does not run on it.
        """
        if self.data is None:
            raise PlanError("this saliency needs activations, and there is no data", fix="data=calibration batches")
        sources = self.analysis.coupling.sources
        places = {p for m in self.meetings for p in (m.left, m.right) if p[0] not in sources}
        return mean_squares(self.analysis.captured, self.data, places)

    def of(self, groups: Sequence[ChannelGroup]) -> Evidence:
        """The same for other groups; what is known already is kept."""
        other = replace(self, groups=groups)
        vars(other).update({name: vars(self)[name] for name in ("gradients", "acting") if name in vars(self)})
        return other


# ------------------------------------------------------------------------------------------------ batches
def arguments_of(captured: Captured, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As `arguments_like`, for the model that was captured."""
    return arguments_like(captured.original, captured.inputs.args, captured.inputs.kwargs, batch)


def arguments_like(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and keyword arguments that a batch has for the model, by the form of its example inputs.

    Args:
        args, kwargs: example inputs of `model`.
        batch: a tensor, a tuple that begins with the positional inputs, or a dict that holds its keyword inputs.

    Raises:
        PlanError: the batch has not what the example inputs have.
    """
    if isinstance(batch, Mapping):
        names = list(inspect.signature(_innermost(model).forward).parameters)[: len(args)]
        found = (
            tuple(_entry(batch, name, old) for name, old in zip(names, args, strict=False)),
            {name: _entry(batch, name, old) for name, old in kwargs.items()},
        )
    else:
        items = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        if any(isinstance(old, Tensor) for old in kwargs.values()):
            raise PlanError(
                f"a batch of type {type(batch).__name__} for a model whose example inputs are keywords",
                fix=f"let a batch be a dict with {', '.join(repr(name) for name in kwargs)}",
            )
        if len(items) < len(args) or not args:
            raise PlanError(f"a batch has {len(items)} items and the model takes {len(args)} positional inputs")
        found = items[: len(args)], dict(kwargs)
    _check_types(found, (args, dict(kwargs)))
    return found


def _innermost(model: nn.Module) -> nn.Module:
    """The module whose forward names its inputs: that of torch.compile and of DataParallel does not."""
    while (inner := inside_wrapper(model)) is not None:
        names = inspect.signature(model.forward).parameters.values()
        if not all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in names):
            break
        model = inner
    return model


def _entry(batch: Mapping[str, Any], name: str, example: Any) -> Any:
    if name in batch:
        return batch[name]
    if isinstance(example, Mapping):  # an input that is a dict itself: its entries may be the batch's own
        found: Any = copy.copy(example)
        found.update((key, _entry(batch, key, old)) for key, old in example.items())
        return found
    if tensor_leaves(example):
        raise PlanError(
            f"a batch has no {name!r}, which the example inputs have",
            why=f"it has {list(batch)}",
            fix=f"let a batch be a dict with {name!r}, or a tuple that begins with the model's inputs",
        )
    return example


def _check_types(found: Any, example: Any) -> None:
    """Tensors where the example inputs have tensors, nested alike."""
    nested = next((kind for kind in (Tensor, Mapping, (tuple, list)) if isinstance(example, kind)), None)
    if nested is None:
        return
    if not isinstance(found, nested) or (nested is not Tensor and len(found) < len(example)):
        raise PlanError(
            f"a batch holds {_named(found)} where the example inputs hold {_named(example)}",
            fix="let a batch be a tensor, a tuple that begins with the model's inputs, or a dict that holds them",
        )
    if isinstance(example, Mapping):
        for key, value in example.items():
            _check_types(found[key], value)
    elif not isinstance(example, Tensor):
        for one, other in zip(found, example, strict=False):
            _check_types(one, other)


def _named(value: Any) -> str:
    if value is None or isinstance(value, Tensor):
        return "None" if value is None else "a tensor"
    return f"{len(value)} values" if isinstance(value, (tuple, list, Mapping)) else f"a {type(value).__name__}"


# ------------------------------------------------------------------------------------------------ gradients
def check_loss(value: Any) -> None:
    """Raise PlanError where a loss function returned no scalar that can be differentiated."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not (value.requires_grad and value.is_floating_point()):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise PlanError(
            "loss(output, batch) must return a scalar that depends on the parameters",
            why=f"it returned a {type(value).__name__}{shape}",
        )


def gradients(captured: Captured, loss: Loss, batches: Iterable[Any]) -> dict[str, Tensor]:
    """d loss / d parameter by the parameter's first name, mean over `batches`; the model's own .grad stays as it is.

    The model runs in eval mode. Parameters the loss does not depend on are left out; frozen ones (requires_grad=False)
    are not.

    Raises:
        PlanError: there are no batches, or `loss` gives no scalar that depends on the parameters.
    """
    model = captured.original
    free = {
        name: parameter.detach().requires_grad_()
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
    }
    count = 0
    with eval_copy(model, real=True) as copied, torch.enable_grad():
        for batch in batches:
            args, kwargs = copies(arguments_of(captured, batch))
            value = loss(torch.func.functional_call(copied, free, args, kwargs), batch)
            check_loss(value)
            value.backward()  # type: ignore[no-untyped-call]
            count += 1
    if not count:
        raise PlanError("there are no batches to take gradients on", fix="data=[batch, …]; an iterator runs only once")
    return {name: tensor.grad / count for name, tensor in free.items() if tensor.grad is not None}


def gradients_at(
    captured: Captured, loss: Loss, batches: Iterable[Any], names: Mapping[fx.Node, str]
) -> dict[str, Tensor]:
    """d loss / d value of some nodes of the graph by their names, mean over `batches`; of others the loss does not
    depend on, nothing.

    Raises:
        PlanError: the graph does not run on a batch, or `loss` gives no scalar that depends on the nodes.
    """
    leaves: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}

    def leaf(node: fx.Node, found: Any) -> Any:
        """Give the users of a named node a leaf, one for all batches."""
        return leaves.setdefault(names[node], found.detach().requires_grad_()) if node in names else found

    count = 0
    for batch in batches:
        output = _run(captured, copies(arguments_of(captured, batch)), instead=leaf, gradients=True)
        with torch.enable_grad():
            value = loss(captured.module.graph.process_outputs(output), batch)
            check_loss(value)
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                totals[name] = totals[name] + gradient if name in totals else gradient
        count += 1
    return {name: total / count for name, total in totals.items()}


def _run(captured: Captured, arguments: tuple[tuple[Any, ...], Mapping[str, Any]], **how: Any) -> Any:
    """Run the captured graph as `run_tapped` does.

    Raises:
        PlanError: the graph does not run on the arguments.
    """
    try:
        return run_tapped(captured.module, captured.inputs.of(*arguments).flat(), **how)
    except Exception as error:  # whatever the ops raise on inputs of another shape
        raise PlanError(
            "the model does not run on a batch of data",
            at=failed_at(error),
            why=first_line(error)[:300],
            fix="give batches of the shape of the example inputs" if captured.producer == "record" else "",
        ) from error


# ------------------------------------------------------------------------------------------------ activations
@dataclass(frozen=True)
class Meeting:
    """Two operands of an op whose dims, `left` and `right`, are multiplied index by index and summed away."""

    left: Place
    right: Place

    def factors(self, coupling: Coupling) -> set[Factor]:
        """What is summed away."""
        return set(leaves(axis_at(coupling, self.left))) & set(leaves(axis_at(coupling, self.right)))


def axis_at(coupling: Coupling, place: Place) -> Any:
    """The axis of one dim of one value."""
    return coupling.axes[place[0]][0][place[1]]


def find_meetings(coupling: Coupling, factors: set[Factor]) -> Iterator[Meeting]:
    """Every product in which a unit of one of `factors` is summed away. Statistics (norms, means) are none."""
    for node, call in coupling.calls.items():
        for key, dims in call.contracted.items():
            operand = argument_at(bind(node), key)
            for dim in dims:
                summed = factors & set(leaves(axis_at(coupling, (operand, dim))))
                yield from (Meeting(place, (operand, dim)) for place in _partners(coupling, node, key, summed))


def _partners(coupling: Coupling, node: fx.Node, key: str, summed: set[Factor]) -> Iterator[Place]:
    """Dims of the operands that are multiplied with the summed one: of an activation where that one is a parameter."""
    arguments, products = bind(node), coupling.calls[node].products
    operand = argument_at(arguments, key)
    names = dict.fromkeys(name for product in products if key in product.operands for name in product.operands)
    others = [argument_at(arguments, name) for name in names if name != key]
    if not others and (products or facts_of(node.target).sums is None):  # nothing says with what: with any other
        others = [n for n in node.all_input_nodes if n is not operand]
    if operand in coupling.sources:
        others = [n for n in others if n not in coupling.sources]
    for other in others:
        axes = coupling.axes[other][0] if coupling.axes.get(other) else ()
        dims = [dim for dim, axis in enumerate(axes) if summed & set(leaves(axis))]
        if dims:
            yield other, dims[-1]


def mean_squares(captured: Captured, batches: Iterable[Any], places: Iterable[Place]) -> dict[Place, Tensor]:
    """Mean of the squared values at each place over all other dims and all batches: (length of the dim,) float32.

    Raises:
        PlanError: there are no batches, or the graph does not run on one of them.
    """
    dims: dict[fx.Node, list[int]] = {}
    for node, dim in places:
        dims.setdefault(node, []).append(dim)
    totals: dict[Place, Tensor] = {}
    counts: dict[Place, int] = {}

    def add(node: fx.Node, found: Any) -> None:
        for dim in dims.get(node, ()):
            squares = found.detach().double().square()
            total = squares.sum([d for d in range(squares.dim()) if d != dim]) if squares.dim() > 1 else squares
            totals[node, dim] = totals.get((node, dim), 0) + total.cpu()
            counts[node, dim] = counts.get((node, dim), 0) + squares.numel() // squares.shape[dim]

    count = 0
    for batch in batches:
        _run(captured, arguments_of(captured, batch), see=add)
        count += 1
    if not count:
        raise PlanError("there are no batches to observe", fix="data=[batch, …]; an iterator runs only once")
    return {place: (total / counts[place]).float() for place, total in totals.items()}


def units_at(coupling: Coupling, place: Place, group: ChannelGroup) -> Tensor:
    """(length of the dim,) int64: the unit of `group` that an index belongs to, -1 where it belongs to none."""
    rows = [row for factor, row in coordinates(axis_at(coupling, place)) if factor is group.factor]
    result = rows[0]
    for row in rows[1:]:
        result = torch.maximum(result, row)
    return result
