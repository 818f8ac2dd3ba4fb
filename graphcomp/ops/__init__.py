"""All that is known of ops, one file per family. Importing this package registers every family."""

from graphcomp.ops import (
    conv,
    create,
    index,
    linalg,
    linear,
    loss,
    meta,
    movement,
    norm,
    pointwise,
    quantize,
    recurrent,
    reductions,
    registry,
)

registry.seal()

__all__ = [
    "conv",
    "create",
    "index",
    "linalg",
    "linear",
    "loss",
    "meta",
    "movement",
    "norm",
    "pointwise",
    "quantize",
    "recurrent",
    "reductions",
]
