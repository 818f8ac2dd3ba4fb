"""graphcomp: make a trained network physically smaller, with nothing to annotate by hand.

import graphcomp as gc
small = gc.compress(model, example_inputs, sparsity=0.5)

A public name loads its module when the name is first used (PEP 562), so that the import is quick. The ops of lowered
graphs are registered at once: torch.export.load reads a quantized file after `import graphcomp` alone.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from graphcomp.hf.registry import install as _install
from graphcomp.quantization import ops as _ops  # noqa: F401  (registers the ops of lowered graphs)
from graphcomp.quantization import pickled as _pickled  # noqa: F401  (torch.load reads weights of integers)

if TYPE_CHECKING:
    from graphcomp.api import (
        analyze,
        compress,
        drop_blocks,
        family,
        finalize,
        find_blocks,
        finetune,
        load,
        prepare,
        prunable_groups,
        repair,
        shrink,
        slice_groups,
        time_layers,
        trim_vocabulary,
    )
    from graphcomp.cost.latency_table import LatencyTable
    from graphcomp.coupling.analysis import Analysis
    from graphcomp.coupling.groups import ChannelGroup, Member
    from graphcomp.errors import (
        BudgetError,
        CalibrationError,
        CaptureError,
        CheckpointError,
        ExportError,
        FormError,
        GraphcompError,
        InputError,
        NotBuiltError,
        NothingToPrune,
        PassError,
        PlanError,
        RuleError,
        TorchError,
        TrainingError,
        VerificationError,
    )
    from graphcomp.hf.large import CompressedCheckpoint, compress_checkpoint
    from graphcomp.hf.trainer import GraphcompCallback
    from graphcomp.methods.base import Goal, Method
    from graphcomp.methods.geta.qasso import QASSO
    from graphcomp.ops.registry import op, rule
    from graphcomp.pruning.allocation import Budget
    from graphcomp.quantization.ptq import PostTraining
    from graphcomp.quantization.reconstruction import Reconstruction
    from graphcomp.quantization.spec import QuantConfig, QuantSpec
    from graphcomp.report.plot import plot
    from graphcomp.report.report import Report
    from graphcomp.result import CompressedModel
    from graphcomp.training.distill import Distill
    from graphcomp.training.options import Training
    from graphcomp.training.prepared import Prepared
    from graphcomp.training.run import Choice, Run
    from graphcomp.training.schedule import Schedule, Stage

__version__ = "0.1.0.dev0"

_install()
__path__.append(f"{__path__[0]}/_moved")  # pickles of earlier versions name modules of the root that are gone

__all__ = [
    "QASSO",
    "Analysis",
    "Budget",
    "BudgetError",
    "CalibrationError",
    "CaptureError",
    "ChannelGroup",
    "CheckpointError",
    "Choice",
    "CompressedCheckpoint",
    "CompressedModel",
    "Distill",
    "ExportError",
    "FormError",
    "Goal",
    "GraphcompCallback",
    "GraphcompError",
    "InputError",
    "LatencyTable",
    "Member",
    "Method",
    "NotBuiltError",
    "NothingToPrune",
    "PassError",
    "PlanError",
    "PostTraining",
    "Prepared",
    "QuantConfig",
    "QuantSpec",
    "Reconstruction",
    "Report",
    "RuleError",
    "Run",
    "Schedule",
    "Stage",
    "TorchError",
    "Training",
    "TrainingError",
    "VerificationError",
    "analyze",
    "compress",
    "compress_checkpoint",
    "drop_blocks",
    "family",
    "finalize",
    "find_blocks",
    "finetune",
    "load",
    "op",
    "plot",
    "prepare",
    "prunable_groups",
    "repair",
    "rule",
    "shrink",
    "slice_groups",
    "time_layers",
    "trim_vocabulary",
]

_HOMES = {
    "coupling.analysis": ("Analysis",),
    "api": (
        "analyze",
        "compress",
        "family",
        "drop_blocks",
        "finalize",
        "find_blocks",
        "finetune",
        "load",
        "prepare",
        "prunable_groups",
        "repair",
        "shrink",
        "slice_groups",
        "trim_vocabulary",
        "time_layers",
    ),
    "cost.latency_table": ("LatencyTable",),
    "result": ("CompressedModel",),
    "coupling.groups": (
        "ChannelGroup",
        "Member",
    ),
    "ops.registry": ("op", "rule"),
    "errors": (
        "BudgetError",
        "CalibrationError",
        "CaptureError",
        "CheckpointError",
        "ExportError",
        "FormError",
        "GraphcompError",
        "InputError",
        "NotBuiltError",
        "NothingToPrune",
        "PassError",
        "PlanError",
        "RuleError",
        "TorchError",
        "TrainingError",
        "VerificationError",
    ),
    "methods.geta.qasso": ("QASSO",),
    "training.prepared": ("Prepared",),
    "training.schedule": (
        "Schedule",
        "Stage",
    ),
    "hf.trainer": ("GraphcompCallback",),
    "training.distill": ("Distill",),
    "training.options": ("Training",),
    "training.run": (
        "Choice",
        "Run",
    ),
    "methods.base": (
        "Goal",
        "Method",
    ),
    "hf.large": ("CompressedCheckpoint", "compress_checkpoint"),
    "report.plot": ("plot",),
    "pruning.allocation": ("Budget",),
    "quantization.ptq": ("PostTraining",),
    "quantization.reconstruction": ("Reconstruction",),
    "quantization.spec": (
        "QuantConfig",
        "QuantSpec",
    ),
    "report.report": ("Report",),
}
"""Module -> the public names it defines."""
_HOME_OF = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Return a public name, or a submodule."""
    if name in _HOME_OF:
        found = getattr(importlib.import_module(_HOME_OF[name]), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        importlib.import_module(f"{__name__}.api")  # so that submodules of a folder are its attributes
        found = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
