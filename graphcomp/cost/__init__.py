"""What a network costs: one definition each, with its unit.

params    scalars of the model's parameters: a tied one counts once, one that the graph never reads counts too
macs      multiply-accumulates of one forward on the example inputs (their batch, not one sample)
bops      macs of convolutions, linear and recurrent layers x bits of the weight x bits of the activation;
          products of two activations (attention) stand apart
bytes     parameters and persistent buffers in their dtypes: the tensors of a safetensors file, without its header
sizes     integer weights under the six conventions that papers count storage by, in bytes
latency   milliseconds of one forward, measured
"""

from graphcomp.cost.bops import FLOAT_BITS, Bits, BitsOf, Bops
from graphcomp.cost.conventions import Codes, SizeModel, file_bytes
from graphcomp.cost.latency import Latency, latency
from graphcomp.cost.model import (
    CostModel,
    Counts,
    Lengths,
    Operation,
    Polynomial,
    counts_of,
    macs,
    param_bytes,
    params,
)
from graphcomp.ops.call import Kind

__all__ = [
    "FLOAT_BITS",
    "Bits",
    "BitsOf",
    "Bops",
    "Codes",
    "CostModel",
    "Counts",
    "Kind",
    "Latency",
    "Lengths",
    "Operation",
    "Polynomial",
    "SizeModel",
    "counts_of",
    "file_bytes",
    "latency",
    "macs",
    "param_bytes",
    "params",
]
