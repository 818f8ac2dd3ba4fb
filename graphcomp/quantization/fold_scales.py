"""The end of training: a trained fake-quant graph becomes one whose integers are those it was trained with.

weight        becomes the values that its codes stand for; its codes do not change
batch norm    folded into the steps: d |gamma / sqrt(var + eps)| per channel, codes mirrored where gamma < 0; the bias
              takes the shift
quantizer     GETA's and ternary ones become quantizers to the nearest of the same levels

Folding a batch norm into a weight *before* it is quantized gives other integers than those that were trained; folding
it into the step does not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import PlanError, VerificationError
from graphcomp.ir.graph import attribute_readers, bind, clone, fetch, value
from graphcomp.ir.passes import GraphPass, Pass, Pipeline, Remember
from graphcomp.ir.program import P, Program
from graphcomp.ir.rewrite import before, replace_node
from graphcomp.ir.run_nodes import Constants
from graphcomp.ops.answers import compute_of, is_fused, operands_of
from graphcomp.quantization.biases import FitBiases
from graphcomp.quantization.calibrate import calibrate_weight
from graphcomp.quantization.floats import float_layers
from graphcomp.quantization.fold import Pair, affine_of, chains, drop_unread
from graphcomp.quantization.insert import InsertQuantizers, quantizer_nodes
from graphcomp.quantization.lower import FAKE, Lower, constants_with_quantizers
from graphcomp.quantization.placement import FUSED, layer_name, place
from graphcomp.quantization.ptq import FLOATS, Quantized, layer_errors, quantized_of
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.quantization.quantizers.make import quantizer_of
from graphcomp.quantization.redundant import RepeatQuantizers
from graphcomp.quantization.spec import MAX_BITS, MIN_BITS, TABLES, QuantConfig, QuantSpec
from graphcomp.quantization.stored import Stored, spread
from graphcomp.quantization.tensors import put, replace_argument

TRAINED_IN_FLOATS = "trained in floats"
"""Why a layer has no integers, where training made the model."""


@dataclass(frozen=True)
class Finish(GraphPass):
    """Fold batch norms into the steps of trained quantizers, and let every quantizer round to the nearest level.

    In eval mode the result computes what the trained graph computes, up to the rounding of floats.

    Attributes:
        rounded: False gives the float twin: the same graph with no quantizer, and each weight as it was before it was
            rounded (for GETA's quantizer with an exponent t, sign(w) |w|^t, which is what it rounds).
    """

    rounded: bool = True
    name: ClassVar[str] = "fold norms into steps"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """A new module; `module`, a graph in eval mode with trained quantizers, is not changed.

        Raises:
            PlanError: the graph is in training mode; a quantizer has learned bits that are not whole, or that of an
                activation an exponent other than 1.
            VerificationError: a weight's dtype is too narrow for its codes.
        """
        finished, _ = clone(module)
        with torch.no_grad():
            _Finishing(finished, self.rounded).run()
        return finished


def finishing(batches: Sequence[Sequence[Any]]) -> tuple[Pass, ...]:
    """Return the passes from a trained fake-quant graph in eval mode to integers; see `from_training`."""
    return (
        Remember(FLOATS, (Finish(rounded=False),)),
        Finish(),
        MeasureLayers(batches),
        FitTrainedBiases(),
        NameTrainedInFloats(),
        Remember(FAKE),
        Lower(),
    )


def from_training(program: Program, batches: Sequence[Sequence[Any]]) -> Quantized:
    """The integers of a trained fake-quant graph, and what `quantize` gives beside them.

    Args:
        program: in eval mode, not changed.
        batches: flat inputs, in the order of the placeholders; errors are measured on them.

    Raises:
        PlanError, VerificationError: as `Finish`.
    """
    return quantized_of(Pipeline("end of training", finishing(batches))(program), program)


@dataclass(frozen=True)
class MeasureLayers:
    """Measure how far each layer is from its float twin, see `layer_errors`."""

    batches: Sequence[Sequence[Any]]
    name: ClassVar[str] = "measure layers"

    def __call__(self, program: P, /) -> P:
        """Return the program with the errors of its layers."""
        return replace(program, errors=layer_errors(program.stages[FLOATS].module, program.module, self.batches))


@dataclass(frozen=True)
class FitTrainedBiases:
    """Fit biases, see `FitBiases`, and name the layers whose weights are rounded again.

    Where the weights of a channel are next to nothing beside its bias, the bias as a multiple of the products' step
    does not fit into an int32: the step is widened and the codes are rounded again, the only ones that are not those
    that were trained. (Left float, such a bias would be rounded by onnxruntime itself, which lets it overflow.)
    """

    name: ClassVar[str] = "fit biases"

    def __call__(self, program: P, /) -> P:
        """Return the program with a note for each such layer."""
        trained = _weight_codes(program.module)
        program = FitBiases()(program)
        again = _rounded_again(trained, _weight_codes(program.module))
        return replace(program, notes=(*program.notes, *again))


@dataclass(frozen=True)
class NameTrainedInFloats:
    """Name the layers that compute in float, since they were trained in floats."""

    name: ClassVar[str] = "name float layers"

    def __call__(self, program: P, /) -> P:
        """Return the program with these layers in `left_float`."""
        left = float_layers(program.module, _float_products(program.module), TRAINED_IN_FLOATS)
        return replace(program, left_float=left)


@dataclass(frozen=True)
class QuantizeTables(GraphPass):
    """Give tables that were looked up in floats their quantizers.

    Attributes:
        spec: how tables are quantized; None leaves them float.
        ignore: module names or "re:" patterns that stay float.
    """

    spec: QuantSpec | None = TABLES
    ignore: Sequence[str] = ()
    name: ClassVar[str] = "quantize tables"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """Return a new module; the quantizers are calibrated."""
        before = {str(node.target) for node, _ in quantizer_nodes(module)}
        config = QuantConfig(weights=None, activations=None, embeddings=self.spec)
        found = InsertQuantizers(place(module, config, self.ignore).sites).rewrite(module)
        values = Constants(found)
        for node, quantizer in quantizer_nodes(found):
            if str(node.target) not in before:
                calibrate_weight(quantizer, values.of(node.all_input_nodes[0]), str(node.target))
        return found


@dataclass(frozen=True)
class ProjectBits(GraphPass):
    """Give each quantizer that learns its bits so many, for plans."""

    bits: int
    name: ClassVar[str] = "project bits"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """Return a copy; nothing is shared."""
        copied = copy.deepcopy(module)
        for _, quantizer in quantizer_nodes(copied):
            if isinstance(quantizer, GetaQuantizer):
                quantizer.project()
                quantizer.project_bits(self.bits, self.bits)
        return copied


def planning() -> tuple[Pass, ...]:
    """Return the passes to the integer graph that training will leave of a fake-quant graph in eval mode, as far as the
    shapes of its tensors go: at 8 bits and not packed, whatever bits there are now."""
    return (ProjectBits(8), RepeatQuantizers(), QuantizeTables(), Finish(), FitBiases(), Lower(pack=False))


@torch.no_grad()
def _weight_codes(fake: fx.GraphModule) -> dict[str, Stored]:
    """Layer -> the integers of its weight."""
    constant, values = constants_with_quantizers(fake), Constants(fake)
    return {
        layer_name(node, constant): quantizer.to_integers(values.of(node.all_input_nodes[0]))
        for node, quantizer in quantizer_nodes(fake)
        if node in constant
    }


def _rounded_again(trained: Mapping[str, Stored], fitted: Mapping[str, Stored]) -> Iterator[str]:
    for layer, integers in trained.items():
        if not torch.equal(integers.values, fitted[layer].values):
            yield f"{layer}: weights next to nothing beside their bias were rounded again, so that it fits into 32 bits"


def _float_products(fake: fx.GraphModule) -> dict[str, str]:
    """Return the products of two activations that read no quantized one, though activations are quantized elsewhere,
    with the reason."""
    quantized, constant = dict(quantizer_nodes(fake)), constants_with_quantizers(fake)
    if constant.issuperset(quantized):
        return {}
    found = {
        node.name: TRAINED_IN_FLOATS
        for node in fake.graph.nodes
        if compute_of(node)
        and constant.isdisjoint(node.all_input_nodes)
        and quantized.keys().isdisjoint(node.all_input_nodes)
    }
    return found | {node.name: FUSED for node in fake.graph.nodes if is_fused(node)}


@dataclass(frozen=True)
class _Weight:
    """What becomes of a weight, for those that read it.

    Attributes:
        readers: its fake-quant nodes, several where names are tied; the compute op where the weight is float.
        tensor: the new values.
        fold: where a batch norm is folded into it: what for, and the quantizer and the bias that come of it.
    """

    readers: tuple[fx.Node, ...]
    tensor: Tensor
    fold: _Fold | None = None


@dataclass(frozen=True)
class _Fold:
    pair: Pair
    quantizer: Quantizer | None
    bias: Tensor


class _Finishing:
    def __init__(self, module: fx.GraphModule, rounded: bool) -> None:
        self.module, self.graph, self.rounded = module, module.graph, rounded
        self.quantizers = dict(quantizer_nodes(module))
        self.constants = constants_with_quantizers(module)
        self.readers = attribute_readers(module)
        self.values = Constants(module)
        self.uniform = {str(node.target): self._uniform(node, quantizer) for node, quantizer in self.quantizers.items()}

    def run(self) -> None:
        pairs = {pair.compute: pair for pair in chains(self.graph) if self._folds(pair)}
        # all are computed before the first is changed: layers may share a weight
        weights = [self._folded(pair) for pair in pairs.values()]
        weights += self._unfolded(set(pairs))
        for name, quantizer in self.uniform.items():
            self.module.set_submodule(name, quantizer)
        for weight in weights:
            self._store(weight)
        if not self.rounded:
            for node, _ in quantizer_nodes(self.module):
                node.replace_all_uses_with(node.all_input_nodes[0])
        self.graph.eliminate_dead_code()
        drop_unread(self.module)
        self.graph.lint()
        self.module.recompile()

    # ------------------------------------------------------------------------------------------ quantizers
    def _uniform(self, node: fx.Node, quantizer: Quantizer) -> Quantizer:
        """A quantizer of its own for the finished graph, to the nearest of the same levels."""
        if quantizer.nearest:
            return copy.deepcopy(quantizer)
        spec = quantizer.spec
        if isinstance(quantizer, GetaQuantizer):
            spec = self._learned_spec(node, quantizer)
        x = next(quantizer.parameters()).new_zeros(()) if quantizer.dim is None else self._read(node)
        return quantizer_of(quantizer.to_integers(x), spec)

    def _read(self, node: fx.Node) -> Tensor:
        """What a quantizer of a weight reads."""
        return self.values.of(node.all_input_nodes[0])

    def _learned_spec(self, node: fx.Node, quantizer: GetaQuantizer) -> QuantSpec:
        """The spec with the bits that GETA's quantizer has learned."""
        if node not in self.constants and quantizer.exponent != 1:
            raise PlanError(
                f"the quantizer of an activation has the exponent {quantizer.exponent:.4g}",
                at=str(node.target),
                why="its levels are not evenly spaced over the activation, and no integer kernel raises to a power",
                fix="train activations with QuantSpec(learn_exponent=False)",
            )
        return replace(quantizer.spec, learn_exponent=False, bits=_whole_bits(node, quantizer))

    # ------------------------------------------------------------------------------------------ weights, values
    def _folds(self, pair: Pair) -> bool:
        """Whether the layer's weight is a constant with steps that can take one factor per output channel."""
        if bind(pair.norm)["training"]:
            raise PlanError(
                "the graph is in training mode",
                at=pair.norm.name,
                why="its batch norms are still moving",
                fix=".eval()",
            )
        operands = operands_of(pair.compute)
        weight = bind(pair.compute)[operands.weight]
        quantizer = self.quantizers.get(weight)
        if weight not in self.constants:
            return False
        return quantizer is None or quantizer.dim in (None, operands.out)

    def _folded(self, pair: Pair) -> _Weight:
        operands = operands_of(pair.compute)
        weight, dim = bind(pair.compute)[operands.weight], operands.out
        factor, shift = affine_of(pair, self.values)
        quantizer = self.quantizers.get(weight)
        if quantizer is None or not self.rounded:
            floats = self._floats(weight)
            scaled = (floats.double() * spread(factor, floats.dim(), dim)).to(floats.dtype)
            return _Weight((weight if quantizer else pair.compute,), scaled, _Fold(pair, quantizer, shift))
        floats = self.values.of(weight.all_input_nodes[0])
        folded = quantizer.to_integers(floats).times(factor, dim)
        own = quantizer_of(folded, self.uniform[str(weight.target)].spec)
        return _Weight((weight,), _on_grid(weight, own, folded, floats.dtype), _Fold(pair, own, shift))

    def _unfolded(self, without: set[fx.Node]) -> Iterator[_Weight]:
        """The quantized weights, for their readers other than `without`; what is read under tied names is one."""
        tied: dict[object, list[fx.Node]] = {}
        for node in self.quantizers:
            if node in self.constants and not without.issuperset(node.users):
                (source,) = node.all_input_nodes
                tensor = fetch(self.module, str(source.target)) if source.op == "get_attr" else source
                tied.setdefault((id(tensor), node.target), []).append(node)
        for node, *others in tied.values():
            tensor = self._floats(node)
            if self.rounded:
                integers = self.quantizers[node].to_integers(self.values.of(node.all_input_nodes[0]))
                tensor = _on_grid(node, self.uniform[str(node.target)], integers, tensor.dtype)
            yield _Weight((node, *others), tensor)

    def _floats(self, weight: fx.Node) -> Tensor:
        """What is rounded to make a weight."""
        quantizer = self.quantizers.get(weight)
        if quantizer is None:
            return self.values.of(weight)
        floats = self.values.of(weight.all_input_nodes[0])
        return floats if quantizer.exponent == 1 else floats.sign() * floats.abs() ** quantizer.exponent

    # ------------------------------------------------------------------------------------------ weights, graph
    def _store(self, weight: _Weight) -> None:
        readers, fold = weight.readers, weight.fold
        if fold is not None and fold.quantizer is not None:
            readers = (self._own_node(readers[0], fold.pair.compute, fold.quantizer),)
        name = self._give(readers, nn.Parameter(weight.tensor))
        if fold is not None:
            bias = nn.Parameter(fold.bias.to(weight.tensor.dtype))
            self._fold(fold.pair, bias, f"{name.removesuffix('weight').rstrip('._') or 'folded'}.bias")

    def _own_node(self, wrapped: fx.Node, compute: fx.Node, quantizer: Quantizer) -> fx.Node:
        """The fake-quant node of the weight of `compute` alone, with a quantizer of its own."""
        same = [node for node in self.graph.find_nodes(op="call_module") if node.target == wrapped.target]
        if len(same) == len(wrapped.users) == 1:
            self.module.set_submodule(str(wrapped.target), quantizer)
            return wrapped
        name = f"{wrapped.target}_{compute.name}"
        self.module.add_submodule(name, quantizer)
        own = before(compute, like=wrapped).submodule(name, *wrapped.all_input_nodes, val=value(wrapped))
        compute.replace_input_with(wrapped, own)
        return own

    def _give(self, readers: Sequence[fx.Node], tensor: nn.Parameter) -> str:
        """Let `readers` read `tensor` as their weight: where the one it was made of stands, if nothing else reads that.

        Returns:
            The name of what it was made of.
        """
        sources = [bind(r)[operands_of(r).weight] if compute_of(r) else r.all_input_nodes[0] for r in readers]
        paths = [self._path(source) for source in sources]
        name = str(paths[0][-1].target)
        if all(self._read_by(path, readers) for path in paths):
            for path in paths:
                put(self.module, str(path[-1].target), tensor)
                path[-1].meta["val"] = value(path[0])
            places = [path[-1] for path in paths]
        else:
            places = [before(min(readers)).tensor(self.module, name, tensor)] * len(readers)
        for reader, source, new in zip(readers, sources, places, strict=True):
            reader.replace_input_with(source, new)
        return name

    def _path(self, source: fx.Node) -> list[fx.Node]:
        """From a weight back to the tensor that it is made of: the first where it is made of several."""
        path = [source]
        while path[-1].op != "get_attr":
            path.append(next(node for node in path[-1].all_input_nodes if node in self.constants))
        return path

    def _read_by(self, path: Sequence[fx.Node], readers: Sequence[fx.Node]) -> bool:
        """Whether what lies on the way of a weight, the tensor under all its names too, is for `readers` alone."""
        allowed = set(readers)
        for node in path:
            same = self.readers.get(str(node.target), [node]) if node.op == "get_attr" else [node]
            if not all(allowed.issuperset(n.users) for n in same):
                return False
            allowed = {node}
        return True

    def _fold(self, pair: Pair, bias: nn.Parameter, name: str) -> None:
        replace_argument(self.module, pair.compute, "bias", bias, name, self.readers)
        replace_node(pair.norm, pair.compute)
        for node in reversed(pair.between):
            self.graph.erase_node(node)


def _whole_bits(node: fx.Node, quantizer: GetaQuantizer) -> int:
    """The bits that were learned, from the codes."""
    most = quantizer.to_integers(quantizer.d.new_zeros(())).quant_max
    bits = most.bit_length() + 1
    if most != 2 ** (bits - 1) - 1 or not MIN_BITS <= bits <= MAX_BITS:
        raise PlanError(
            f"a quantizer has learned {float(quantizer.bits):.2f} bits",
            at=str(node.target),
            why=f"integers have a whole number of them, from {MIN_BITS} to {MAX_BITS}",
            fix="quantizer.project_bits(b, b), then train on with it held; an EMA begins when optimizer.settled",
        )
    return bits


def _on_grid(node: fx.Node, quantizer: Quantizer, integers: Stored, dtype: torch.dtype) -> Tensor:
    """The tensor that `integers` stand for, as the weight that `quantizer` gives the same codes."""
    tensor = integers.dequantize().to(dtype)
    if not torch.equal(quantizer.to_integers(tensor).values.int(), integers.values.int()):
        raise VerificationError(
            "a weight's codes are lost in its dtype",
            at=str(node.target),
            why=f"{dtype} does not tell {integers.quant_max - integers.quant_min + 1} levels apart",
            fix="model.float()",
        )
    return tensor
