"""One op, walked: its operands are parameters, so that only its rule can freeze anything."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.coupling.axis import Axes, Axis, Factor, is_frozen, kept_indices, leaves, length, normal
from graphcomp.coupling.propagate import RULE_FAILED, Coupling, propagate
from graphcomp.ir.graph import argument_at, bind, is_op, tensor_values
from graphcomp.ops.answers import masked_form
from graphcomp.ops.call import Call
from graphcomp.ops.registry import facts_of


class OneOp(nn.Module):
    """Calls `function` with its own tensors; those in `computed` depend on the input, too."""

    def __init__(self, function: Callable[..., Any], tensors: dict[str, Tensor], computed: Collection[str]) -> None:
        super().__init__()
        self.function = function
        self.computed = computed
        self.names = list(tensors)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                setattr(self, name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)

    def forward(self, one: Tensor) -> Any:
        tensors = {name: getattr(self, name) for name in self.names}
        return self.function(**{name: t * one if name in self.computed else t for name, t in tensors.items()})


class Walk:
    """The axes of `function(**tensors)`; w["weight"] are those of an operand, w.results those of the results.

    A rule that fails is an error here, unless it `may_fail`. Operands in `computed` are no weights: they depend on an
    input.
    """

    def __init__(
        self, function: Callable[..., Any], may_fail: bool = False, computed: Collection[str] = (), /, **tensors: Tensor
    ) -> None:
        self.function, self.tensors = function, tensors
        exported = torch.export.export(OneOp(function, tensors, computed).eval(), (torch.ones(()),), strict=False)
        self.module: fx.GraphModule = exported.module(check_guards=False)  # type: ignore[assignment]
        nodes = [node for node in self.module.graph.nodes if node.op != "output"]  # outputs would be frozen
        self.coupling: Coupling = propagate(self.module, order=nodes)
        failed = [unknown for unknown in self.coupling.unknown.values() if unknown.why.startswith(RULE_FAILED)]
        assert not failed or may_fail, failed
        for node, call in self.coupling.calls.items():
            check_facts(node, call)
        output = next(iter(self.module.graph.find_nodes(op="output")))
        self.results: list[Axes] = []
        for result in output.all_input_nodes:
            self.results += self.coupling.axes[result]

    def __getitem__(self, name: str) -> Axes:
        return self.coupling.attributes[name]

    @property
    def result(self) -> Axes:
        return self.results[0]

    @property
    def call(self) -> Call:
        """The call of the last op that computes a tensor."""
        return [self.coupling.calls[n] for n in self.module.graph.nodes if is_op(n) and tensor_values(n)][-1]

    @property
    def contracted(self) -> dict[str, set[int]]:
        """Operand -> dims that are summed over, whichever op does it."""
        found: dict[str, set[int]] = {}
        for node, call in self.coupling.calls.items():
            for argument, dims in call.contracted.items():
                found.setdefault(_operand(node, argument), set()).update(dims)
        return found

    def free(self) -> list[Factor]:
        """Unfrozen factors of the operands that take part in no statistics."""
        axes = [axis for name in self.tensors for axis in self[name]]
        found = {leaf: None for axis in axes for leaf in leaves(axis)}
        # zeros are not all that a masked form does
        formed = {
            leaf
            for node, call in self.coupling.calls.items()
            if masked_form(node.target)
            for argument, dims in call.contracted.items()
            for dim in dims
            for leaf in leaves(self.coupling.axes[argument_at(bind(node), argument)][0][dim])
        }
        return [leaf for leaf in found if not leaf.frozen and "normalized" not in leaf.marks and leaf not in formed]


def check_facts(node: fx.Node, call: Call) -> None:
    """What the rule says while it runs is what the facts of the op say."""
    sums = facts_of(node.target).sums
    if sums is None:
        return
    assert not call.products or sums == "products", f"{node.target} multiplies, and its facts say: {sums}"
    assert not call.contracted or sums != "nothing", f"{node.target} sums {call.contracted}, and its facts say: {sums}"
    # einsum may sum a letter of one operand alone, in front of the product
    multiplies = bool(call.contracted) and sums == "products" and node.target is not torch.ops.aten.einsum.default
    assert call.products or not multiplies, f"{node.target} multiplies, and its rule says no products"


def _operand(node: fx.Node, argument: str) -> str:
    name, _, index = argument.partition(".")
    found = bind(node)[name]
    operand = found[int(index)] if index else found
    while operand.op != "get_attr" and operand.target is torch.ops.aten.mul.Tensor:
        operand = operand.args[0]
    return str(operand.target)


def check_law(walk: Walk) -> int:
    """Slice every free factor by one unit: the op on the sliced operands is the masked op, sliced.

    Returns how many factors were tried. `walk.function` must read lengths off its operands.
    """
    factors = walk.free()
    for factor in factors:
        kept = {factor: torch.arange(1, factor.size)}
        sliced = {name: _slice(t, walk[name], kept) for name, t in walk.tensors.items()}
        masked = {
            name: _mask(t, walk[name], walk.contracted.get(name, set()), kept) for name, t in walk.tensors.items()
        }
        got = _tensors(walk.function(**sliced))
        for result, axes, small in zip(_tensors(walk.function(**masked)), walk.results, got, strict=True):
            torch.testing.assert_close(small, _slice(result, axes, kept), rtol=1e-4, atol=1e-5, equal_nan=True)
    return len(factors)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _slice(tensor: Tensor, axes: Axes, kept: dict[Factor, Tensor]) -> Tensor:
    for dim, axis in enumerate(axes):
        indices = kept_indices(axis, kept)
        tensor = tensor if indices is None else tensor.index_select(dim, indices)
    return tensor


def _mask(tensor: Tensor, axes: Axes, dims: set[int], kept: dict[Factor, Tensor]) -> Tensor:
    for dim in dims:
        indices = kept_indices(axes[dim], kept)
        if indices is not None:
            keep = torch.zeros(tensor.shape[dim])
            keep[indices] = 1
            tensor = tensor * keep.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
    return tensor


def same(*axes: Axis) -> bool:
    """Whether all are one and the same axis."""
    return len({repr(normal(axis)) for axis in axes}) == 1


def frozen(*axes: Axis) -> bool:
    """Whether all are frozen, and longer than 1."""
    return all(is_frozen(axis) and length(axis) != 1 for axis in axes)


def free(*axes: Axis) -> bool:
    """Whether no index of any is frozen."""
    return all(not leaf.frozen for axis in axes for leaf in leaves(axis))


def marks(axis: Axis) -> set[str]:
    """All marks on the leaves of `axis`."""
    return {name for leaf in leaves(axis) for name in leaf.marks}
