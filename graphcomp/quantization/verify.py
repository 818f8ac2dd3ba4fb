"""Law 3: the lowered graph is the fake-quant graph, weights bit for bit, activations within one step.

Each quantized activation is compared on the operands of the fake-quant graph: the lowered graph goes on with the
values of the other from there, so that a step at one layer is not counted again at the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphcomp.errors import VerificationError
from graphcomp.ir.graph import bind
from graphcomp.ir.program import P
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.numerics.compare import relative_error
from graphcomp.quantization.dynamic import quantize_dynamic
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.lower import FAKE, Lowered
from graphcomp.torch_compat import pytree

LAW = "integers == fake-quant, in steps"
STEPS_ALLOWED = 1.0
Codes = tuple[Tensor, Tensor, Tensor]
"""What is quantized at run time: codes, scale and zero point."""
_ROUNDING = 1e-3  # of a step: what a product of two float32 may be off


@dataclass(frozen=True)
class LoweringError:
    """How far a lowered graph is from its fake-quant graph.

    Attributes:
        weights: largest difference of a dequantized weight; 0 by Law 3.
        steps: largest difference of a quantized activation, in its quantization steps.
        where: the activation it was found at.
        output: largest relative difference of the outputs, on equal operands of the last layers.
    """

    weights: float
    steps: float
    where: str
    output: float


@dataclass(frozen=True)
class CheckLowering:
    """Check Law 3 on one batch: the integers are those of the program that is remembered as `FAKE`.

    Attributes:
        inputs: flat, in the order of the placeholders.
    """

    inputs: Sequence[Any]
    name: ClassVar[str] = "check integers"

    def __call__(self, program: P, /) -> P:
        """Return the program with the law among `verified` or `unchecked`.

        Raises:
            VerificationError: see `check_lowering`.
        """
        lowered = program.lowered
        assert lowered is not None, "the program was lowered"
        if not lowered.weights and not lowered.activations:
            return replace(program, unchecked={**program.unchecked, LAW: "nothing was quantized"})
        found = check_lowering(program.stages[FAKE].module, lowered, self.inputs)
        return replace(program, verified={**program.verified, LAW: found.steps})


def check_lowering(fake: fx.GraphModule, lowered: Lowered, flat_inputs: Sequence[Any]) -> LoweringError:
    """Compare the two on one batch.

    Raises:
        VerificationError: a weight differs, or an activation by more than a step.
    """
    quantizers, values = dict(quantizer_nodes(fake)), dict[str, Tensor]()
    sources = {node.all_input_nodes[0]: node for node, own in quantizers.items() if own.spec.dynamic}
    codes: dict[str, Codes] = {}
    weights: dict[str, float] = {}

    def keep(node: fx.Node, found: Any) -> None:
        if node.name in lowered.weights:  # compared at once: all weights in floats are as large as the model
            integers = lowered.weights[node.name].dequantize().to(found.dtype)  # what integers are cast to
            weights[node.name] = float((integers - found).abs().max()) if found.numel() else 0.0
        elif node in quantizers:
            values[node.name] = found
        if node in sources:
            own = sources[node]
            codes[own.name] = quantize_dynamic(found, quantizers[own].spec.granularity == "token")

    follow = _Follow(lowered, values, codes)
    expected = run_tapped(fake, flat_inputs, see=keep)
    actual = run_tapped(lowered.module, flat_inputs, instead=follow)
    off, worst = max((weights[name], name) for name in lowered.weights) if lowered.weights else (0.0, "")
    found = LoweringError(off, follow.steps, follow.where, _output_error(expected, actual))
    if not off <= 0:
        raise VerificationError(f"the integers of {worst} are not its fake-quantized weight", why=f"off by {off:.1e}")
    if not found.steps <= STEPS_ALLOWED + _ROUNDING:
        raise VerificationError(
            "the integer graph does not compute what the fake-quant graph computes",
            at=found.where,
            why=f"an activation is {found.steps:.2f} quantization steps off, allowed is one",
        )
    return found


class _Follow:
    """Compares each dequantized activation of a lowered graph, and goes on with the other graph's.

    Of activations with ranges at run time, the codes are followed: `codes` are those of what the other graph quantized.
    """

    def __init__(self, lowered: Lowered, expected: dict[str, Tensor], codes: dict[str, Codes]) -> None:
        self.fake_of = {name: fake for fake, name in lowered.activations.items()}
        self.expected, self.codes = expected, codes
        self.steps, self.where = 0.0, ""

    def __call__(self, node: fx.Node, result: Any) -> Any:
        if node.name not in self.fake_of:
            return result
        fake = self.fake_of[node.name]
        expected, following = self.expected[fake], self.codes.get(fake, self.expected[fake])
        if isinstance(following, tuple):
            found, own, zero = result
            result, scale = (found.float() - zero) * own, following[1].double()
        else:
            scale = bind(node)["scale"]
        # float32 holds the code 40000 to within 0.004, so that one code apart may look like a little more
        lost = 4 * torch.finfo(torch.float32).eps * expected.double().abs()
        beyond = ((result.double() - expected.double()).abs() - lost).clamp(min=0) / scale
        steps = float(beyond.max()) if expected.numel() else 0.0
        if not steps <= self.steps:
            self.steps, self.where = steps, node.name
        return following


def _output_error(expected: Any, actual: Any) -> float:
    a, b = ([t for t in pytree.tree_leaves(v) if isinstance(t, Tensor)] for v in (expected, actual))
    return relative_error(a, b)
