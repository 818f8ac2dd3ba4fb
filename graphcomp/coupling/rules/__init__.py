"""The coupling rules, one file per op family. Importing this package registers them all."""

from graphcomp.coupling import table
from graphcomp.coupling.rules import (
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
)

table.close_built_in()

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
