"""Batch norm becomes part of the convolution or linear layer in front of it.

FoldBatchNorm          for good, in eval mode: new weights, the norm leaves the graph
FoldForTraining        the weights are scaled as they will be once folded, quantized so, and scaled back before the
                       norm, which goes on learning (Krishnamoorthi 2018, section 3.2.2; Jacob et al. 2018)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from graphcomp.ir.graph import attribute_readers, bind, clone, fetch, set_argument, value
from graphcomp.ir.passes import GraphPass
from graphcomp.ir.rewrite import before, redirect, replace_node
from graphcomp.ir.run_nodes import Constants
from graphcomp.ops.answers import compute_of, operands_of
from graphcomp.quantization.placement import constants
from graphcomp.quantization.tensors import replace_argument
from graphcomp.torch_compat import buffer_table, parameter_table

aten = torch.ops.aten


@dataclass(frozen=True)
class Pair:
    """A compute op and the batch norm that alone reads its result.

    Attributes:
        between: what stands between the two where the graph went through `FoldForTraining`: a division by one number
            per channel, and the bias. In the order of the graph.
    """

    compute: fx.Node
    norm: fx.Node
    between: tuple[fx.Node, ...] = ()


def pairs(graph: fx.Graph) -> Iterator[Pair]:
    """Batch norms that can be folded: right behind a convolution or linear layer, over its output channels."""
    for pair in chains(graph):
        arguments = bind(pair.compute)
        own = [arguments[name] for name in ("weight", "bias") if arguments[name]]
        if not pair.between and all(tensor.op == "get_attr" for tensor in own):
            yield pair


def chains(graph: fx.Graph) -> Iterator[Pair]:
    """As `pairs`, whatever the weight and the bias are made of, with or without what `FoldForTraining` put between."""
    constant = constants(graph)
    for norm in graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        if isinstance(bind(norm)["running_mean"], fx.Node):
            between = _between(norm, constant)
            compute = (between[0] if between else norm).args[0]
            if isinstance(compute, fx.Node) and len(compute.users) == 1 and _channels_second(compute):
                yield Pair(compute, norm, between)


def folded_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that are folded into the op in front of them: batch norms and what belongs with them."""
    return {node for pair in chains(graph) for node in (*pair.between, pair.norm)}


def _between(norm: fx.Node, constant: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes in front of `norm` that divide by constants per channel and add such."""
    found: list[fx.Node] = []
    node = norm.args[0]
    while isinstance(node, fx.Node) and node.target in (aten.div.Tensor, aten.add.Tensor) and len(node.users) == 1:
        other = node.args[1]
        if not isinstance(other, fx.Node) or other not in constant or not _per_channel(other, value(node)):
            break
        found.append(node)
        node = node.args[0]
    return tuple(reversed(found))


def _per_channel(constant: fx.Node, like: Tensor) -> bool:
    found = value(constant)
    return bool(found.dim() == like.dim() and found.numel() == found.shape[1] == like.shape[1])


def _channels_second(compute: fx.Node) -> bool:
    """Whether the channels that a batch norm scales, dim 1 of the result, are one dim of the op's weight."""
    operands = compute_of(compute)
    if operands is None or not operands.bias or not (operands.out == 0 or operands.transposed):
        return False
    if value(compute).dim() != value(bind(compute)[operands.weight]).dim():
        return False  # a convolution of one image, or a layer of sequences: what the norm scales are rows
    # a grouped transposed convolution holds the channels of all its groups in one dim of the weight
    return operands.out == 0 or bool(bind(compute)["groups"] == 1)


@dataclass(frozen=True)
class FoldBatchNorm(GraphPass):
    """Fold every batch norm in eval mode into the op in front of it."""

    name: ClassVar[str] = "fold batch norms"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """A new module; tensors that no fold changes are shared with `module`."""
        folded, _ = clone(module)
        with torch.no_grad():
            readers, values = attribute_readers(folded), Constants(folded)
            for pair in list(pairs(folded.graph)):
                if bind(pair.norm)["training"] is False:
                    _fold(folded, pair, readers, values)
        folded.graph.eliminate_dead_code()
        drop_unread(folded)
        folded.recompile()
        return folded


def _fold(module: fx.GraphModule, pair: Pair, readers: dict[str, list[fx.Node]], values: Constants) -> None:
    arguments = bind(pair.compute)
    weight = fetch(module, arguments["weight"].target)
    factor, bias = affine_of(pair, values)
    scaled = (weight.double() * factor.view(_along(pair.compute, weight))).to(weight.dtype)
    name = str(arguments["weight"].target)
    own_bias = f"{name.removesuffix('weight').rstrip('._') or 'folded'}.bias"
    replace_argument(module, pair.compute, "weight", nn.Parameter(scaled), name, readers)
    replace_argument(module, pair.compute, "bias", nn.Parameter(bias.to(weight.dtype)), own_bias, readers)
    replace_node(pair.norm, pair.compute)


def affine_of(pair: Pair, values: Constants) -> tuple[Tensor, Tensor]:
    """What a batch norm in eval mode makes of the products of the op in front of it.

    Returns:
        (factor, shift), (c,) float64 each: the norm's result is products * factor + shift. The op's bias is in shift.
    """

    def of(node: Any) -> Any:
        return values.of(node).double().flatten() if isinstance(node, fx.Node) else node

    norm = bind(pair.norm)
    factor = torch.rsqrt(of(norm["running_var"]) + norm["eps"]) * (
        1.0 if norm["weight"] is None else of(norm["weight"])
    )
    inner, shift = torch.ones_like(factor), torch.zeros_like(factor)
    if (bias := bind(pair.compute)["bias"]) is not None:
        shift = shift + of(bias)
    for node in pair.between:
        by = of(node.args[1])
        if node.target is aten.div.Tensor:
            inner, shift = inner / by, shift / by
        else:
            shift = shift + by * bind(node)["alpha"]
    shift = (shift - of(norm["running_mean"])) * factor
    if norm["bias"] is not None:
        shift = shift + of(norm["bias"])
    factor = inner * factor
    if pair.between:  # a factor that was taken out again is 1, whatever rounding made of it
        factor = torch.where((factor - 1).abs() < 8 * torch.finfo(value(pair.compute).dtype).eps, 1.0, factor)
    return factor, shift


def _along(compute: fx.Node, weight: Tensor) -> list[int]:
    """The shape in which (c,) broadcasts with the weight along its output channels."""
    dim = operands_of(compute).out
    return [-1 if d == dim else 1 for d in range(weight.dim())]


def drop_unread(module: fx.GraphModule) -> None:
    """Delete the parameters and buffers that no node reads."""
    read = {str(n.target) for n in module.graph.find_nodes(op="get_attr")}
    called = tuple(str(n.target) + "." for n in module.graph.find_nodes(op="call_module"))
    for name in [
        n for n, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    ]:
        if name in read or name.startswith(called):
            continue
        owner_name, _, last = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        parameter_table(owner).pop(last, None)
        buffer_table(owner).pop(last, None)
    module.delete_all_unused_submodules()


# ------------------------------------------------------------------------------------------------ training
@dataclass(frozen=True)
class FoldForTraining(GraphPass):
    """Scale each weight by gamma / sqrt(running_var + eps) in front of its quantizer, and the result back behind it.

    Run before the quantizers are inserted: they then see the weights as they will be once folded. In eval mode the
    graph computes what `FoldBatchNorm` gives; in training the norm takes its statistics of the unscaled result.
    """

    name: ClassVar[str] = "scale weights as norms will"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """A new module that shares the tensors of `module`."""
        folded, _ = clone(module)
        for pair in list(pairs(folded.graph)):
            _scale(pair)
        folded.recompile()
        return folded


def _scale(pair: Pair) -> None:
    norm, arguments = bind(pair.norm), bind(pair.compute)
    weight, rank = arguments["weight"], value(pair.compute).dim()
    shape = _along(pair.compute, value(weight))

    make = before(pair.compute)
    factor = make(aten.rsqrt.default, make(aten.add.Tensor, norm["running_var"], norm["eps"]))
    if norm["weight"] is not None:
        factor = make(aten.mul.Tensor, factor, norm["weight"])
    # a channel with gamma 0 cannot be scaled back: it is left as it is
    factor = make(aten.masked_fill.Scalar, factor, make(aten.eq.Scalar, factor, 0), 1.0)
    scaled = make(aten.mul.Tensor, weight, make(aten.view.default, factor, shape))
    set_argument(pair.compute, "weight", scaled)
    bias = arguments["bias"]
    set_argument(pair.compute, "bias", None)
    channels = [1, -1] + [1] * (rank - 2)
    users = list(pair.compute.users)
    make = before(pair.norm, like=pair.compute)
    back = make(aten.div.Tensor, pair.compute, make(aten.view.default, factor, channels))
    if bias is not None:
        back = make(aten.add.Tensor, back, make(aten.view.default, bias, channels))
    redirect(users, pair.compute, back)
