"""The methods by name, each a list of stages of training."""

from __future__ import annotations

from collections.abc import Sequence

from graphcomp.arguments import check_word, wrong
from graphcomp.errors import PlanError
from graphcomp.methods.ajpq.method import Ajpq
from graphcomp.methods.base import Method
from graphcomp.methods.gdrq import Gdrq
from graphcomp.methods.geta.method import Geta
from graphcomp.methods.opq import Opq
from graphcomp.methods.pqk import Pqk
from graphcomp.methods.prune_ternary import PruneTernary
from graphcomp.methods.psgd import Psgd
from graphcomp.methods.qat import Qat
from graphcomp.methods.qst.method import Qst
from graphcomp.methods.regularized import Regularized
from graphcomp.methods.taylor2.method import Taylor2
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
    "regularized": (Regularized(),),
    "opq": (Opq(),),
    "qst": (Qst(),),
    "gdrq": (Gdrq(),),
    "prune_ternary": (PruneTernary(),),
    "ajpq": (Ajpq(),),
    "taylor2": (Taylor2(),),
}
"""Each method as its stages, which share the steps of a training equally; "oneshot" trains in none."""


TRAINS = tuple(name for name, stages in METHODS.items() if stages)
"""The methods that train, and can stand in a list."""


def stages_of(method: str | Method | Sequence[str | Method]) -> tuple[str, tuple[Method, ...]]:
    """Return the name of a method and its stages; of a list, the names and the stages of all.

    Raises:
        PlanError: there is no such method.
    """
    if isinstance(method, Method):
        return method.name, (method,)
    if not isinstance(method, str):
        found = [stages_of(entry) for entry in method]
        return ", ".join(name for name, _ in found), tuple(stage for _, stages in found for stage in stages)
    if method not in METHODS:
        raise PlanError(f"method={method!r}", fix=f"method= one of {', '.join(METHODS)}")
    return method, METHODS[method]


def check_method(name: str, value: object) -> None:
    """Refuse what is neither a method, nor the name of one, nor a list of these.

    Raises:
        PlanError: `value` is something else.
    """
    if isinstance(value, (list, tuple)) and value:
        for entry in value:
            _check_entry(name, entry, TRAINS)
        return
    _check_entry(name, value, tuple(METHODS))


def _check_entry(name: str, value: object, names: tuple[str, ...]) -> None:
    if isinstance(value, str):
        check_word(name, value, names)
    elif not isinstance(value, Method):
        raise wrong(name, "a name, a graphcomp.Method, or several of these to run in turn", value, 'method="geta"')
    elif not isinstance(getattr(value, "name", None), str) or not value.name:
        raise PlanError(
            f"{name} is a {type(value).__name__} without a name",
            why="messages and the folder of a run name the method",
            fix=f'name = "{type(value).__name__.lower()}" in the class',
        )
