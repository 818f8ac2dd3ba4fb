"""The methods by name, each a list of stages of training."""

from __future__ import annotations

from collections.abc import Sequence

from graphcomp.arguments import check_word, wrong
from graphcomp.errors import PlanError
from graphcomp.methods.base import Method
from graphcomp.methods.geta.method import Geta
from graphcomp.methods.pqk import Pqk
from graphcomp.methods.psgd import Psgd
from graphcomp.methods.qat import Qat
from graphcomp.methods.ternary import Ternary

HESSO = Geta("hesso", quantizes=False, forgetting="uniform")

METHODS: dict[str, tuple[Method, ...]] = {
    "oneshot": (),
    "geta": (Geta(),),
    "hesso": (HESSO,),
    "qat": (Qat(),),
    "sequential": (HESSO, Geta("geta", prunes=False)),
    "psgd": (Psgd(),),
    "pqk": (Pqk(),),
    "ternary": (Ternary(),),
}
"""Each method as its stages, which share the steps of a training equally; "oneshot" trains in none."""


def stages_of(method: str | Method | Sequence[Method]) -> tuple[str, tuple[Method, ...]]:
    """Return the name of a method and its stages.

    Raises:
        PlanError: there is no such method.
    """
    if isinstance(method, Method):
        return method.name, (method,)
    if not isinstance(method, str):
        found = tuple(method)
        return ", ".join(stage.name for stage in found), found
    if method not in METHODS:
        raise PlanError(f"method={method!r}", fix=f"method= one of {', '.join(METHODS)}")
    return method, METHODS[method]


def check_method(name: str, value: object) -> None:
    """Refuse what is neither the name of a method, nor a method, nor a list of methods.

    Raises:
        PlanError: `value` is something else.
    """
    if isinstance(value, str):
        check_word(name, value, tuple(METHODS))
        return
    entries = value if isinstance(value, (list, tuple)) else [value]
    if not entries or not all(isinstance(entry, Method) for entry in entries):
        raise wrong(name, "a name, a graphcomp.Method, or several of these to run in turn", value, 'method="geta"')
