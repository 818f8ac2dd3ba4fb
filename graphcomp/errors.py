"""Every exception graphcomp raises on purpose.

GraphcompError
├── CaptureError          the model could not be turned into a graph
│   └── InputError        the example inputs do not fit the model
├── RuleError             a coupling rule is malformed or registered twice
├── PlanError             what was asked cannot be planned
│   ├── NothingToPrune    no axis is free; the message says why each one is frozen
│   ├── BudgetError       a sparsity or budget no choice of units can meet
│   └── CalibrationError  no range can be read off the data
├── TrainingError         a training run cannot go on: a loss that is not finite, data that end
├── VerificationError     a law does not hold on the result: a bug of ours, never handed on in silence
├── PassError             a pass failed in a way that it has no error for: a bug of ours
├── CheckpointError       a folder cannot be written or read back
├── ExportError           a model cannot be written for, or run by, another runtime
├── FormError             a graph has no attributes and methods of the model's class
├── TorchError            the installed torch lacks a private name that graphcomp uses
└── NotBuiltError         an option that exists in the design and not yet in the code
"""

from __future__ import annotations


class GraphcompError(Exception):
    """Base of all errors: what went wrong, then where, why and how to fix it, one per line.

    Args:
        what: one sentence.
        at: the place, a node with the user's source line where there is one.
        why: the cause.
        fix: what to do, as code to paste where possible.
    """

    def __init__(self, what: str, *, at: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.at, self.why, self.fix = what, at, why, fix
        rows = [what] + [f"  {k + ':':<5} {v}" for k, v in (("at", at), ("why", why), ("fix", fix)) if v]
        super().__init__("\n".join(rows))


class CaptureError(GraphcompError):
    """The model could not be turned into a graph."""


class InputError(CaptureError, ValueError):
    """The example inputs do not fit the model."""


class RuleError(GraphcompError, ValueError):
    """A coupling rule is malformed, or an op got a second one."""


class PlanError(GraphcompError, ValueError):
    """What was asked cannot be planned."""


class NothingToPrune(PlanError):
    """No group of the model may be pruned; the message says why each axis is frozen."""


class BudgetError(PlanError):
    """No choice of units meets the sparsity or the budget."""


class CalibrationError(PlanError):
    """No range can be read off the data: none was seen, or it is not finite."""


class TrainingError(GraphcompError):
    """A training run cannot go on; its last checkpoint stays as it is."""


class VerificationError(GraphcompError):
    """A law does not hold on the result."""


class PassError(GraphcompError):
    """A pass of a pipeline failed in a way that it has no error for; the message names the pass."""


class CheckpointError(GraphcompError):
    """A checkpoint folder cannot be written or read back."""


class ExportError(GraphcompError):
    """A model cannot be written for another runtime, or does not run there."""


class FormError(GraphcompError, AttributeError):
    """A compressed model that is a graph was asked for an attribute or a method of the model's class."""


class TorchError(GraphcompError, ImportError):
    """The installed torch lacks a private name that graphcomp uses."""


class NotBuiltError(GraphcompError, NotImplementedError):
    """An option of the design that is not built yet."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
