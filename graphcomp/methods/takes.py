"""Which options of `compress` a method takes: one table of the options that some methods alone have a use for.

An option that is given and has no use is refused, or noted where the result is as asked anyway. All other options
(`data`, `ignore`, `scope`, `outputs`, `verify`, `measure_latency`, …) serve every method.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from graphcomp.errors import PlanError


@dataclass(frozen=True)
class Option:
    """An option that some methods alone have a use for.

    Attributes:
        unset: values that ask for nothing.
        why: what a method without a use for the option does.
        fix: what to do instead.
        holds: the result of such a method is as asked: a note says why, and nothing is refused.
    """

    unset: tuple[Any, ...]
    why: str
    fix: str
    holds: bool = False


_UNITS = 'method="geta", which prunes units, or without'
_START = 'method="oneshot", or method="qat" with one number of bits, or without'

OPTIONS: Mapping[str, Option] = {
    "sparsity by module": Option((False,), "units of modules do not go", _UNITS),
    "budget": Option((None,), "nothing is chosen by costs: no units go, and bits are as asked", _UNITS),
    "saliency": Option((None,), "no units are ranked", _UNITS),
    "round_to": Option((1,), "no units go", _UNITS),
    "prune": Option((None,), "no units go", _UNITS),
    "keep_inputs": Option(((), []), "no units go, and all modules keep their inputs", _UNITS),
    "ranking": Option(("global",), "training ranks all units together", 'method="oneshot", or without'),
    "rounds": Option((1,), "training cuts step by step itself", 'method="oneshot", or without'),
    "prefer_native": Option((True,), "equal counts are for one shot in floats: scores choose in each group", "", True),
    "uniform": Option((False,), "training chooses units group by group", 'method="oneshot", or without'),
    "keep_class": Option((None, False), "training keeps the class where it can", 'method="oneshot", or without'),
    "activation_bits": Option(("same", None), "activations stay float", "activation_bits=None"),
    "activations": Option(("static",), "training knows no ranges at run time", 'method="oneshot", or without'),
    "calibration": Option((None,), "activations stay float, or training sets their ranges", "no calibration"),
    "group_size": Option((0,), "training does not begin with post-training quantization", _START),
    "rounding": Option(("nearest",), "training does not begin with post-training quantization", _START),
    "reduce_range": Option((False,), "training does not begin with post-training quantization", _START),
    "quantization": Option((None,), "training does not begin with post-training quantization", _START),
}  # fmt: skip
"""Each option of `compress` that some methods alone have a use for; "sparsity by module" is `sparsity` as a mapping."""

UNITS = frozenset({"sparsity by module", "budget", "saliency", "round_to", "prune", "keep_inputs"})
"""Options of methods that prune units."""
ACTIVATIONS = frozenset({"activation_bits", "calibration"})
"""Options of methods that quantize activations."""
START = ACTIVATIONS | {"group_size", "rounding", "reduce_range", "quantization"}
"""Options of methods that begin with post-training quantization."""

ONE_SHOT = UNITS | START | {"activations", "ranking", "rounds", "prefer_native", "keep_class", "uniform"}
"""Options of one shot."""


def check_taken(title: str, taken: Collection[str], given: Mapping[str, Any]) -> tuple[str, ...]:
    """Refuse options that a method has no use for.

    Args:
        title: of the method.
        taken: what the method has a use for.
        given: option -> value, of all in OPTIONS.

    Returns:
        Notes of options that change nothing, and whose result is as asked.

    Raises:
        PlanError: others are given.
    """
    idle = {n: own for n, own in OPTIONS.items() if n not in taken and not _is_unset(given[n], own.unset)}
    if refused := {name: own for name, own in idle.items() if not own.holds}:
        raise PlanError(
            f"{', '.join(refused)} with method={title!r}",
            why="; ".join(dict.fromkeys(own.why for own in refused.values())),
            fix="; ".join(dict.fromkeys(own.fix for own in refused.values())),
        )
    return tuple(
        f"{name}={given[name]!r} changes nothing with method={title!r}: {own.why}" for name, own in idle.items()
    )


def asked(given: Mapping[str, Any]) -> list[str]:
    """Return the options among `given` whose values ask for something."""
    return [name for name, value in given.items() if not _is_unset(value, OPTIONS[name].unset)]


def _is_unset(value: Any, unset: tuple[Any, ...]) -> bool:
    return any(value is own or (type(value) is type(own) and value == own) for own in unset)
