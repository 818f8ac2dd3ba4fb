"""Check the laws on models of one's own: the law as a function, tiny models, and random networks."""

from graphcomp.numerics.compare import relative_error
from graphcomp.quantization.integers import IntegerInterpreter, check_integers
from graphcomp.testing.law import LawResult, check_law, random_kept
from graphcomp.testing.models import (
    Decoder,
    Encoder,
    ResidualCNN,
    VisionTransformer,
    randomize,
    rotate_half,
    tiny_models,
)
from graphcomp.testing.random_models import Block, random_model

__all__ = [
    "Block",
    "Decoder",
    "Encoder",
    "IntegerInterpreter",
    "LawResult",
    "ResidualCNN",
    "VisionTransformer",
    "check_integers",
    "check_law",
    "random_kept",
    "random_model",
    "randomize",
    "relative_error",
    "rotate_half",
    "tiny_models",
]
