"""Layer after layer: weights rounded and biases corrected on the operands that each layer will get.

The float graph and the fake-quant graph run side by side; a layer is set the moment it is reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import CalibrationError
from graphcomp.ir.graph import attribute_readers, bind, fetch, value
from graphcomp.ir.rewrite import before
from graphcomp.ir.run_nodes import Lockstep
from graphcomp.ops.answers import clip_of, compute_of, is_convolution, operands_of
from graphcomp.pruning.consumers import moved_parameter, run_moves
from graphcomp.pruning.least_squares import MOST_FEATURES, ROWS, Problem
from graphcomp.pruning.repair import MOST_TAPS, LayerRepair
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.lower import constants_with_quantizers
from graphcomp.quantization.placement import channels_of, layer_name
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.solve import RoundedLayer, round_layer
from graphcomp.quantization.tensors import put, read_by_others, replace_argument

if TYPE_CHECKING:
    from graphcomp.quantization.ptq import PostTraining

aten = torch.ops.aten

ROWS_OF_MANY = 4096
"""Rows, at least, that a layer of many products, such as a depthwise convolution, is set on."""

CLIPPED = 0.05
"""What the squared error of an element counts that a clip makes the same all the same."""

FEWEST_SAMPLES = 16
"""Of each channel, to tell a mean error from chance."""


@dataclass(frozen=True, eq=False)
class Held:
    """A parameter that a quantizer reads, behind ops that move its elements.

    Attributes:
        source: its node.
        moves: the ops, in the order of the graph.
        parameter: its value.
    """

    source: fx.Node
    moves: tuple[fx.Node, ...]
    parameter: Tensor

    @property
    def index(self) -> Tensor:
        """Which element of the parameter, flat, each element of the weight is."""
        shape = self.parameter.shape
        return run_moves(torch.arange(shape.numel()).reshape(shape), self.moves).flatten()

    @property
    def weight(self) -> Tensor:
        """The parameter as the quantizer reads it."""
        return run_moves(self.parameter, self.moves)

    def with_elements(self, weight: Tensor) -> Tensor:
        """Return the parameter that the ops make `weight` of."""
        if not self.moves:
            return weight
        found = self.parameter.flatten().clone()
        found[self.index.to(found.device)] = weight.flatten()
        return found.view(self.parameter.shape)


class Setting:
    """Rounds weights and corrects biases, layer after layer, and measures what is left.

    Attributes:
        errors: layer -> relative error of its output.
        repairs: layer -> what the regression did.
        left: layer -> why its weight is rounded to nearest, and not moved.
        floats: quantizer node of a weight -> what was rounded, in the form that the layer reads.
    """

    def __init__(
        self, folded: fx.GraphModule, fake: fx.GraphModule, options: PostTraining, *, repair: bool = False
    ) -> None:
        self.folded, self.fake, self.options, self.repair = folded, fake, options, repair
        self.constant = constants_with_quantizers(fake)
        self.quantizers = dict(quantizer_nodes(fake))
        self.shared = Counter(self.quantizers.values())
        self.readers = attribute_readers(fake)
        self.twins: dict[fx.Node, fx.Node] = {}
        self.errors: dict[str, float] = {}
        self.repairs: dict[str, LayerRepair] = {}
        self.left: dict[str, str] = {}
        self.floats: dict[fx.Node, Tensor] = {}

    def walk(self, batches: Sequence[Sequence[Any]]) -> dict[str, float]:
        """Relative error of each compute op's output, by the op's layer."""
        exact, rough = Lockstep(self.folded, batches), Lockstep(self.fake, batches)
        float_nodes = iter(self.folded.graph.nodes)
        for node in self.fake.graph.nodes:
            if node in self.quantizers:
                rough.step(node)
                rough.drop(node)
                continue
            twin = self.twins[node] = next(float_nodes)
            exact.step(twin)
            if self._quantized(node):
                name = self._name(node)
                wanted = self._wanted(node, exact, rough)
                settled = self._sets and self._round(node, name, wanted, rough)
                rough.step(node)
                if self.options.correct_bias and not settled:
                    self._correct(node, wanted, rough)
                self.errors[name] = _relative(exact.of(twin), rough.of(node))
            else:
                rough.step(node)
            exact.drop(twin)
            rough.drop(node)
        self.fake.recompile()
        return self.errors

    def notes(self) -> list[str]:
        """Say which layers were asked to be set by their data and are not, by reason."""
        by_reason: dict[str, list[str]] = {}
        for name, why in self.left.items():
            by_reason.setdefault(why, []).append(f"'{name}'")
        return [f"rounded to nearest, as {why}: {', '.join(names)}" for why, names in by_reason.items()]

    @property
    def _sets(self) -> bool:
        """Whether weights are set by what the layer reads."""
        return self.repair or self.options.second_order

    def _quantized(self, node: fx.Node) -> bool:
        return compute_of(node) is not None and any(n in self.quantizers for n in node.all_input_nodes)

    def _name(self, node: fx.Node) -> str:
        operands = operands_of(node)
        name = layer_name(bind(node)[operands.weight] if operands.weight else None, self.constant) or node.name
        return name if name not in self.errors else f"{name} ({node.name})"

    def _wanted(self, node: fx.Node, exact: Lockstep, rough: Lockstep) -> list[Tensor]:
        """Return what the layer is to give; with the repair, and where its result is added to a stream, that is the
        float sum less the stream as it is now."""
        wanted = exact.of(self.twins[node])
        other = self._added_to(node) if self.repair else None
        source = other
        while source in self.quantizers:
            (source,) = source.all_input_nodes
        twin = self.twins.get(source) if source is not None else None
        if other is None or twin is None or not rough.has(other) or not exact.has(twin):
            return wanted
        pairs = list(zip(wanted, exact.of(twin), rough.of(other), strict=True))
        if any(old.shape != t.shape or now.shape != t.shape for t, old, now in pairs):
            return wanted
        return [t + (old - now) for t, old, now in pairs]

    def _added_to(self, node: fx.Node) -> fx.Node | None:
        """Return the other operand of the sum that a layer's result goes into, through quantizers alone."""
        while len(node.users) == 1:
            (user,) = node.users
            if user.target in (aten.add.Tensor, aten.add_.Tensor):
                others = [n for n in user.all_input_nodes if n is not node]
                return others[0] if len(others) == 1 and bind(user)["alpha"] == 1 else None
            if user not in self.quantizers:
                return None
            node = user
        return None

    def _correct(self, node: fx.Node, exact: list[Tensor], rough: Lockstep) -> None:
        """Add the mean error of each output channel to the bias; `rough` gets what the corrected layer gives."""
        channels = channels_of(node)
        mean = significant_mean(exact, rough.of(node), channels)
        if not self._add_to_bias(node, mean):
            return
        shape = [-1 if d == channels else 1 for d in range(exact[0].dim())]
        for r in rough.of(node):
            r += mean.view(shape).to(r.dtype)

    def _add_to_bias(self, node: fx.Node, more: Tensor) -> bool:
        """Add (c,) float64 to the bias of a layer; False where there is none that can be set."""
        name = operands_of(node).bias
        bias = bind(node).get(name) if name else None
        if not isinstance(bias, fx.Node) or bias.op != "get_attr":
            return False
        old = fetch(self.fake, str(bias.target))
        self._give(node, name, (old.double() + more).to(old.dtype))
        return True

    def _has_intercept(self, node: fx.Node) -> bool:
        """Whether a layer has a bias with one element per output channel."""
        name = operands_of(node).bias
        bias = bind(node).get(name) if name else None
        if not isinstance(bias, fx.Node) or bias.op != "get_attr":
            return False
        return tuple(fetch(self.fake, str(bias.target)).shape) == (value(node).shape[channels_of(node)],)

    def _round(self, node: fx.Node, name: str, wanted: list[Tensor], rough: Lockstep) -> bool:
        """Give the layer's weight the values on its grid that its operands make least of; True where the bias is set,
        too."""
        operands, arguments = operands_of(node), bind(node)
        wrapped = arguments[operands.weight]
        held = self.held(wrapped)
        if isinstance(held, str):
            if held:
                self.left[name] = held
            return False
        weight, quantizer = held.weight, self.quantizers[wrapped]
        data = next(argument for argument in operands.data if argument != operands.weight)
        inputs = rough.of(arguments[data])
        intercept = (self.repair or self.options.correct_bias) and self._has_intercept(node)
        problem = Problem.between(node, (data, inputs[0]), (operands.weight, weight), intercept)
        why = problem if isinstance(problem, str) else self._too_large(problem)
        if why or isinstance(problem, str):
            self.left[name] = why
            return False
        rough.put(wrapped, weight)
        rough.step(node)
        rest = [_wide(t) - _wide(y) for t, y in zip(wanted, rough.of(node), strict=True)]
        rows = max(ROWS // problem.design.products, ROWS_OF_MANY)
        try:
            sums = problem.sums(inputs, rest, wanted, rows, self._counted(node, problem, wanted, rest))
            found = round_layer(
                problem, sums, weight, quantizer, regress=self.repair,
                second_order=self.options.second_order, fixed=self.shared[quantizer] > 1,
            )  # fmt: skip
        except CalibrationError as error:
            raise CalibrationError(str(error.what), at=name, why=error.why, fix=error.fix) from error
        self.put(held, wrapped, self._kept(quantizer, found))
        self.floats[wrapped] = found.floats
        rough.put(wrapped, quantizer(found.weight))
        if found.repair is not None:
            self.repairs[name] = found.repair
        if found.shift is None:
            return False
        self._shift(node, found.shift, rough)
        return True

    def _kept(self, quantizer: Quantizer, found: RoundedLayer) -> Tensor:
        """Return what the parameter of a weight holds once the weight is rounded."""
        return found.weight

    def _shift(self, node: fx.Node, shift: Tensor, rough: Lockstep) -> None:
        """Add (c,) float64 to the intercept of a layer that has one; later nodes read the sum."""
        self._add_to_bias(node, shift)
        bias = bind(node)[operands_of(node).bias]
        rough.put(bias, fetch(self.fake, str(bias.target)))

    def _counted(
        self, node: fx.Node, problem: Problem, wanted: list[Tensor], rest: list[Tensor]
    ) -> list[Tensor] | None:
        """Return what the squared error of each element counts behind a clip: the chance that the clip lets the element
        through, with an error as large as that of the channel; None without a clip.

        Only where each output has a matrix of its own, as in a depthwise convolution.
        """
        clip = clip_of(next(iter(node.users))) if len(node.users) == 1 else None
        if (
            not self.repair
            or clip is None
            or not is_convolution(node)
            or problem.design.products != value(node).shape[channels_of(node)]
        ):
            return None
        low, high = clip.bounds(bind(next(iter(node.users))))
        dims = [d for d in range(rest[0].dim()) if d != channels_of(node)]
        spread = torch.stack([r.square().mean(dims, keepdim=True) for r in rest]).mean(0).sqrt()
        spread = spread.clamp(min=torch.finfo(spread.dtype).tiny)
        found = []
        for t in wanted:
            chance = torch.ones_like(t)
            for sign, bound in ((1, low), (-1, high)):
                if bound is not None:
                    chance = chance * torch.special.ndtr(sign * (t - bound) / spread)
            found.append(chance.clamp_(min=CLIPPED))
        return found

    def held(self, wrapped: Any) -> Held | str:
        """Return the parameter whose quantized value a layer alone reads, or why there is none; "" without a weight."""
        if wrapped not in self.quantizers or wrapped not in self.constant:
            return ""
        if len(wrapped.users) > 1:
            return "several layers read the weight"
        chain = moved_parameter(wrapped.all_input_nodes[0])
        if chain is None:
            return "the weight is computed"
        held = Held(*chain, fetch(self.fake, str(chain[0].target)).detach())
        if not held.moves:
            return held
        if read_by_others(self.readers, held.source, held.moves[0]) or any(len(n.users) > 1 for n in held.moves):
            return "several ops read the parameter"
        return held if int(held.index.bincount().max()) == 1 else "the weight repeats elements"

    def _too_large(self, problem: Problem) -> str:
        """Return why no matrix is built for a layer, or ""."""
        most = MOST_FEATURES if self.options.second_order else MOST_TAPS
        return f"more than {most} inputs make one output" if problem.features > most else ""

    def put(self, held: Held, wrapped: fx.Node, weight: Tensor) -> None:
        """Let a quantizer read another weight, in the place of the old one where nothing else reads that."""
        new = nn.Parameter(held.with_elements(weight), fetch(self.fake, str(held.source.target)).requires_grad)
        if not held.moves and read_by_others(self.readers, held.source, wrapped):
            own = before(wrapped).tensor(self.fake, f"{held.source.target}_rounded", new)
            wrapped.replace_input_with(held.source, own)
        else:
            put(self.fake, str(held.source.target), new)

    def _give(self, node: fx.Node, argument: str, tensor: Tensor) -> None:
        name = f"graphcomp_{node.name}_{argument}"
        replace_argument(self.fake, node, argument, nn.Parameter(tensor), name, self.readers)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def significant_mean(exact: Sequence[Tensor], rough: Sequence[Tensor], channels: int) -> Tensor:
    """(c,) float64: the mean of exact - rough over all dims but `channels`, 0 within twice its standard error.

    What few samples say of the mean is mostly chance, and correcting for chance makes the model worse.
    """
    dims = [d for d in range(exact[0].dim()) if d != channels]
    count = sum(e.numel() for e in exact) // max(exact[0].shape[channels], 1)
    total = torch.zeros(exact[0].shape[channels], dtype=torch.float64, device=exact[0].device)
    squares = torch.zeros_like(total)
    if count < FEWEST_SAMPLES:
        return total
    for e, r in zip(exact, rough, strict=True):
        difference = e - r
        total += difference.sum(dims, dtype=torch.float64)
        squares += difference.square_().sum(dims, dtype=torch.float64)
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    return torch.where(mean.abs() > 2 * (variance / count).sqrt(), mean, 0.0)


def _relative(exact: list[Tensor], rough: list[Tensor]) -> float:
    error = sum(float((e - r).square_().sum(dtype=torch.float64)) for e, r in zip(exact, rough, strict=True))
    norm = sum(float(e.square().sum(dtype=torch.float64)) for e in exact)
    return float((error / norm) ** 0.5) if norm > 0 else 0.0
