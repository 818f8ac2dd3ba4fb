"""graphcomp: make a trained network physically smaller, with nothing to annotate by hand.

import graphcomp as gc
small = gc.compress(model, example_inputs, sparsity=0.5)
"""

from graphcomp.analysis import Analysis
from graphcomp.api import analyze, compress, finalize, load, prepare, prunable_groups, shrink, slice_groups
from graphcomp.compressed import CompressedModel
from graphcomp.coupling.groups import ChannelGroup, Member
from graphcomp.coupling.table import rule
from graphcomp.errors import (
    BudgetError,
    CalibrationError,
    CaptureError,
    CheckpointError,
    ExportError,
    GraphcompError,
    InputError,
    NotBuiltError,
    NothingToPrune,
    PlanError,
    RuleError,
    TrainingError,
    VerificationError,
)
from graphcomp.methods.geta import QASSO
from graphcomp.methods.prepared import Prepared
from graphcomp.methods.schedule import Schedule, Stage
from graphcomp.methods.train import Training
from graphcomp.picture import plot
from graphcomp.pruning.allocation import Budget
from graphcomp.quantization.ptq import PostTraining
from graphcomp.quantization.spec import QuantConfig, QuantSpec
from graphcomp.report import Report

__version__ = "0.1.0.dev0"

__all__ = [
    "QASSO",
    "Analysis",
    "Budget",
    "BudgetError",
    "CalibrationError",
    "CaptureError",
    "ChannelGroup",
    "CheckpointError",
    "CompressedModel",
    "ExportError",
    "GraphcompError",
    "InputError",
    "Member",
    "NotBuiltError",
    "NothingToPrune",
    "PlanError",
    "PostTraining",
    "Prepared",
    "QuantConfig",
    "QuantSpec",
    "Report",
    "RuleError",
    "Schedule",
    "Stage",
    "Training",
    "TrainingError",
    "VerificationError",
    "analyze",
    "compress",
    "finalize",
    "load",
    "plot",
    "prepare",
    "prunable_groups",
    "rule",
    "shrink",
    "slice_groups",
]
