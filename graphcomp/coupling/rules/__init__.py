"""The coupling rules, one file per op family. Importing this package registers them all."""

from graphcomp.coupling.rules import linear, movement, pointwise, reductions

__all__ = ["linear", "movement", "pointwise", "reductions"]
