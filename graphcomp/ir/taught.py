"""Ops that users taught: what is said of them is not proved, so that they are suspected first where a law breaks."""

from __future__ import annotations

from torch import fx

from graphcomp.ir.graph import source_line
from graphcomp.torch_compat import OpOverload, schema_of

REPORT = "please report the model"

TAUGHT: set[OpOverload | str] = set()
"""Ops that users taught, as the users named the ops: overloads, or "lib::op" for all overloads."""


def taught_as(op: object) -> OpOverload | str | None:
    """Return the name under which a user taught `op`; None where no user did."""
    if not isinstance(op, OpOverload):
        return None
    return next((key for key in (op, schema_of(op).name) if key in TAUGHT), None)


def forgetting(key: OpOverload | str) -> str:
    """Return the line after which an op can be taught anew."""
    spelt = repr(key) if isinstance(key, str) else f"torch.ops.{key}"
    return f"graphcomp.ops.registry.forget({spelt})"


def suspected(graph: fx.Graph, otherwise: str = REPORT) -> str:
    """Return what to do about a result that breaks a law: correct what users taught, else `otherwise`."""
    found = {key: source_line(node) for node in reversed(graph.nodes) if (key := taught_as(node.target)) is not None}
    if not found:
        return otherwise
    named = ", ".join(f"{key} ({at})" if at else str(key) for key, at in found.items())
    again = "; ".join(map(forgetting, found))
    return (
        f"correct what graphcomp was taught of {named}: {again}, then graphcomp.op(…) anew, with masked= where the op "
        "takes statistics"
    )
