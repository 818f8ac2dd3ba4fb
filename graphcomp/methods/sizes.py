"""`Budget(bytes=…)` by a named convention of storage: what papers on single weights give sizes in.

The bytes are those of the codes of all quantized weights (`report.sizes`), without steps, biases and norms, which are
the remainder in the report. A float up to 1 is a share of the weights' bytes in float32.
"""

from __future__ import annotations

from typing import get_args

from graphcomp.arguments import check_word
from graphcomp.cost.conventions import Convention
from graphcomp.errors import PlanError
from graphcomp.pruning.allocation import Budget
from graphcomp.training.prepared import Prepared

FLOAT_BYTES = 4
"""Of one weight before."""


def check_sized(budget: Budget | None, method: str, quantizes: bool) -> None:
    """Refuse a budget that is on anything but the bytes of codes.

    Args:
        method: in the message.
        quantizes: whether bits are asked for.

    Raises:
        PlanError: a limit other than bytes, or no codes to count.
    """
    if budget is None:
        return
    others = [name for name in budget.limits() if name != "bytes"] + ["speedup"] * (budget.speedup is not None)
    if others:
        raise PlanError(
            f"Budget({others[0]}=…) with method={method!r}",
            why="single weights go: no operation is saved, and bytes by a convention of storage are",
            fix="budget=Budget(bytes=0.05), with the convention as an option of the method",
        )
    if not quantizes:
        raise PlanError(
            f"Budget(bytes=…) with method={method!r}, and no bits are given",
            why="the convention counts codes, of so many bits each",
            fix="bits=4; or sparsity=0.9 in place of the budget",
        )


def quantized_parameters(ready: Prepared) -> list[str]:
    """Return the parameters that quantizers read, each once: those whose codes count."""
    return list(dict.fromkeys(site.parameter for site in ready.session.sites if site.is_weight and site.parameter))


def check_convention(name: Convention) -> None:
    """Refuse what is no convention.

    Raises:
        PlanError: `name` is none of C0 to C5.
    """
    check_word("convention", name, get_args(Convention))


def bytes_within(budget: Budget, weights: int) -> float:
    """Return the bytes of codes that a budget allows.

    Args:
        budget: on bytes.
        weights: how many are quantized, before any goes.
    """
    assert budget.bytes is not None
    share = isinstance(budget.bytes, float) and budget.bytes <= 1
    return budget.bytes * FLOAT_BYTES * weights if share else budget.bytes
