"""The raising pass, the inverse of lowering: an integer graph becomes the fake-quant graph of the same integers.

weight      dequantize -> a float parameter on the grid, and a quantizer that gives the same codes
embedding   the rows' scales join the table, which is looked up behind its quantizer
activation  quantize -> dequantize becomes a quantizer
bias        a float parameter
product     of what is quantized at run time: a quantizer, and a linear layer or a product with a matrix

Clips that lowering removed stay removed: the quantizer behind a clip saturates at the same codes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import PlanError
from graphcomp.ir.graph import bind, clone, value
from graphcomp.ir.rewrite import after, before
from graphcomp.ir.run_nodes import Constants
from graphcomp.ops.answers import lookup_of
from graphcomp.quantization import dynamic, ops
from graphcomp.quantization.fold import drop_unread
from graphcomp.quantization.lower import Lowered, layers_of
from graphcomp.quantization.quantizers.make import make_quantizer, quantizer_of
from graphcomp.quantization.sites import PREFIX, names_in
from graphcomp.quantization.spec import DYNAMIC, MIN_BITS, PER_TOKEN
from graphcomp.quantization.stored import Affine, Codebook, Stored

aten = torch.ops.aten


@dataclass(frozen=True)
class Raised:
    """The two forms of a quantized model that its integers determine.

    Attributes:
        fake: the fake-quant graph. Weights are floats on the grids of their quantizers.
        lowered: the integer graph, and where its values stand in `fake`.
    """

    fake: fx.GraphModule
    lowered: Lowered

    def __repr__(self) -> str:
        return f"Raised(fake=…, lowered={self.lowered!r})"

    @property
    def folded(self) -> NoReturn:
        """Refused.

        Raises:
            PlanError: always.
        """
        raise PlanError(
            "the float graph of a quantized model is not kept",
            why="integers do not determine the floats that they were rounded from",
            fix="compress the float model with the same options and bits=None; or "
            "graphcomp.quantization.ptq.quantize(graph, batches, options).folded",
        )


def integer_graph(module: nn.Module) -> fx.GraphModule | None:
    """Return the graph in `module`, or `module` itself, that computes on integers; None without one."""
    graphs = (part for part in module.modules() if isinstance(part, fx.GraphModule))
    return next((g for g in graphs if any(node.target in ops.OF_INTEGERS for node in g.graph.nodes)), None)


def raised(lowered: fx.GraphModule) -> Raised:
    """Return the fake-quant graph of an integer graph, in eval mode; `lowered` is not changed.

    Law: lowering the result gives the same integers, and the outputs are within one quantization step.
    """
    with torch.no_grad():
        return _Raising(lowered).run()


class _Raising:
    def __init__(self, lowered: fx.GraphModule) -> None:
        self.lowered = lowered
        self.module, new_node = clone(lowered)
        self.graph = self.module.graph
        self.old = {new: old for old, new in new_node.items()}
        self.values = Constants(self.module)
        self.names = names_in(self.module)
        self.activations: dict[str, str] = {}
        self.weights: dict[str, Stored] = {}
        self.on_grid: dict[fx.Node, fx.Node] = {}  # codes -> fake-quant node

    def run(self) -> Raised:
        nodes = list(self.graph.nodes)
        for node in nodes:
            if node.target == ops.dequantize_per_tensor and node.args[0].target == ops.quantize_per_tensor:
                self._activation(node)
            elif node.target is dynamic.quantize_dynamic:
                self._at_run_time(node)
            elif node.target == ops.LOOK_UP:
                node.replace_all_uses_with(self._on_grid(node.args[0], self._codebook(node), node))
            elif node.target in (ops.dequantize_per_tensor, ops.dequantize_per_channel, GROUPED):
                self._weight(node, self._integers(node))
        for node in nodes:
            if lookup_of(node) and (product := _product(node)) is not None:
                self._lookup(node, product)
        self.graph.eliminate_dead_code()
        drop_unread(self.module)
        self.graph.lint()
        self.module.recompile()
        lowered = Lowered(self.lowered, self.activations, self.weights, layers_of(self.module))
        return Raised(self.module, lowered)

    # ------------------------------------------------------------------------------------------ reading
    def _integers(self, node: fx.Node) -> Affine:
        """Return the integers that a dequantize node reads."""
        bound = bind(node)
        codes = self.values.of(node.args[0])  # type: ignore[arg-type]
        if node.target == ops.dequantize_per_tensor:
            scale = torch.tensor(bound["scale"], dtype=torch.float32, device=codes.device)
            zero = torch.tensor(bound["zero_point"], dtype=torch.int32, device=codes.device)
            return Affine(codes, scale, zero, bound["quant_min"], bound["quant_max"])
        scale, zero = (self.values.of(bound[name]) for name in ("scales", "zero_points"))
        if node.target is GROUPED:
            low, high = self._limits(node.args[0], codes)  # type: ignore[arg-type]
            return Affine(codes, scale, zero, low, high, 0, self.values.of(bound["groups"]))
        return Affine(codes, scale, zero, bound["quant_min"], bound["quant_max"], bound["axis"])

    def _codebook(self, node: fx.Node) -> Codebook:
        """Return the codes and the table that a lookup in a table reads."""
        bound = bind(node)
        return Codebook(self.values.of(bound["values"]), self.values.of(bound["table"]), bound["axis"])

    def _limits(self, source: fx.Node, codes: Tensor) -> tuple[int, int]:
        """Return the lowest and the highest code, which a graph does not name beside codes of groups and tables."""
        if source.target is UNPACK:
            packed = bind(source)
            bits, signed, shift = packed["bits"], packed["signed"], packed["shift"]
            high = (1 << bits - signed) - 1
            return (-high if signed else 0) << shift, high << shift
        low, high = (int(found) for found in codes.aminmax())
        if codes.dtype is torch.uint8:
            return 0, (1 << max(high.bit_length(), MIN_BITS)) - 1
        high = (1 << max(high, -low, 1).bit_length()) - 1
        return (-high, high) if low >= -high else (-high - 1, high)

    # ------------------------------------------------------------------------------------------ writing
    def _activation(self, node: fx.Node) -> None:
        scale, zero, low, high = node.args[0].args[1:5]  # type: ignore[union-attr]
        integers = Affine(
            torch.zeros((), dtype=torch.int32),
            torch.tensor(scale, dtype=torch.float32),
            torch.tensor(zero, dtype=torch.int32),
            low,  # type: ignore[arg-type]
            high,  # type: ignore[arg-type]
        )
        source = node.args[0].args[0]  # type: ignore[union-attr]
        assert isinstance(source, fx.Node)
        wrapped = self._quantizer(self.names.of(source), integers, source, node)
        self.activations[wrapped.name] = self.old[node].name
        node.replace_all_uses_with(wrapped)

    def _at_run_time(self, node: fx.Node) -> None:
        """quantize_dynamic -> matmul_dynamic becomes a quantizer and layers on floats."""
        source, per_token = node.args
        assert isinstance(source, fx.Node)
        target = f"{PREFIX}.{self.names.of(source)}"
        self.module.add_submodule(target, make_quantizer(PER_TOKEN if per_token else DYNAMIC))
        wrapped = after(source, node).submodule(target, source, val=value(source))
        self.activations[wrapped.name] = self.old[node].name
        products = {user for part in node.users for user in part.users}
        for product in [own for own in self.graph.nodes if own in products]:
            self._layer(product, wrapped)

    def _layer(self, node: fx.Node, data: fx.Node) -> None:
        """Write the layer on floats that a product of integers stands for."""
        bound = bind(node)
        codes, scale, bias = self.values.of(bound["weight"]), self.values.of(bound["weight_scale"]), bound["bias"]
        low, high = self._limits(bound["weight"], codes)
        dim = None if scale.dim() == 0 else 1 - bound["turned"]
        weight = self._on_grid(
            bound["weight"], Affine(codes, scale, torch.zeros_like(scale, dtype=torch.int32), low, high, dim), node
        )
        arguments: tuple[Any, ...] = (data, weight)
        if bound["turned"]:
            node.target, arguments = aten.linear.default, (*arguments, *([] if bias is None else [bias]))
        elif bias is None:
            node.target = aten.matmul.default
        else:
            node.target, arguments = aten.addmm.default, (bias, *arguments)
        node.args, node.kwargs = arguments, {}

    def _weight(self, node: fx.Node, integers: Affine) -> None:
        if integers.values.dtype is torch.int32:  # a bias: on the grid of the sums, without a quantizer of its own
            node.replace_all_uses_with(self._floats(node.args[0], integers))  # type: ignore[arg-type]
        else:
            node.replace_all_uses_with(self._on_grid(node.args[0], integers, node))  # type: ignore[arg-type]

    def _lookup(self, node: fx.Node, last: fx.Node) -> None:
        """(embedding(codes, ids) - zero) * scale, which ends in `last`, becomes embedding(quantizer(table), ids)."""
        codes, scale = self.values.of(node.args[0]), self.values.of(_parameter(last))  # type: ignore[arg-type]
        shift = last.args[0]
        assert isinstance(shift, fx.Node)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        if shift.target is aten.sub.Tensor:
            zero = self.values.of(_parameter(shift)).to(torch.int32)
        low, high = self._limits(node.args[0], codes)  # type: ignore[arg-type]
        integers = Affine(codes, scale, zero, low, high, 0 if scale.dim() else None)
        wrapped = self._on_grid(node.args[0], integers, last)  # type: ignore[arg-type]
        row = before(node, like=last)(node.target, wrapped, *node.args[1:], **node.kwargs)
        last.replace_all_uses_with(row)

    def _on_grid(self, codes: fx.Node, stored: Stored, like: fx.Node) -> fx.Node:
        """Return the fake-quant node of a weight, one for all that read its codes."""
        if codes not in self.on_grid:
            floats = self._floats(codes, stored)
            name = self.names.free(re.sub(r"\W", "_", _stem(codes)))
            self.on_grid[codes] = self._quantizer(name, stored, floats, like)
            self.weights[self.on_grid[codes].name] = stored
        return self.on_grid[codes]

    def _floats(self, codes: fx.Node, stored: Stored) -> fx.Node:
        return after(codes).tensor(self.module, _stem(codes), nn.Parameter(stored.dequantize(), False))

    def _quantizer(self, name: str, stored: Stored, source: fx.Node, like: fx.Node) -> fx.Node:
        target = f"{PREFIX}.{name}"
        own = stored.on_spec()
        self.module.add_submodule(target, quantizer_of(own, own.spec))
        return after(source, like).submodule(target, source, val=value(source))


GROUPED = torch.ops.graphcomp.dequantize_grouped.default
UNPACK = torch.ops.graphcomp.unpack.default


def _stem(codes: Any) -> str:
    source = codes.args[0] if codes.target is UNPACK else codes
    return str(source.target).removesuffix("_codes")


def _product(lookup: fx.Node) -> fx.Node | None:
    """Return the product with the scales of the rows that ends a lookup of codes; None where no codes are looked up."""
    found = lookup
    while found.target in (lookup.target, aten.to.dtype, aten.sub.Tensor) and len(found.users) == 1:
        (found,) = found.users
    if found.target is not aten.mul.Tensor:
        return None
    scale = _parameter(found)
    return found if scale.op == "get_attr" and scale.target == f"{_stem(lookup.args[0])}_scale" else None


def _parameter(node: fx.Node) -> fx.Node:
    """Return the scales or zero points, one in all or one per row, that a lookup of codes is computed with."""
    found: Any = node.args[1]
    while isinstance(found, fx.Node) and found.op != "get_attr":
        found = found.args[0]  # a lookup, of a column
    return found if isinstance(found, fx.Node) else node
