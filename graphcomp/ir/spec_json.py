"""The nesting of a graph's inputs and outputs (pytree specs) as JSON and back.

torch reads such a spec by importing what the spec names (enums, factories of default dicts). So everything is looked
at before torch is asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from types import ModuleType
from typing import Any

import torch

from graphcomp.errors import CheckpointError
from graphcomp.ir.json_values import JSON, damaged
from graphcomp.ir.trust import Trust
from graphcomp.torch_compat import pytree

OUTPUT_LIBRARIES = ("transformers",)
"""Packages that register output classes when they are imported."""

_NAMEDTUPLE = "collections.namedtuple"


def dump_spec(spec: pytree.TreeSpec) -> JSON:
    """A spec as JSON; of a container that has no name there, the leaves as a flat tuple."""
    try:
        return json.loads(pytree.treespec_dumps(spec))
    except (NotImplementedError, TypeError, ValueError, AttributeError):
        return json.loads(pytree.treespec_dumps(pytree.tree_structure((0,) * spec.num_leaves)))


def load_spec(document: JSON, trust: Trust) -> pytree.TreeSpec:
    """What `dump_spec` wrote. A container that this process does not know comes back as a dict or a tuple.

    Raises:
        CheckpointError: the document is no spec.
    """
    if not isinstance(document, list) or len(document) != 2 or document[0] != 1:
        raise damaged(f"the nesting of inputs or outputs is {document!r:.100}")
    try:
        spec = pytree.treespec_loads(json.dumps([1, _known(document[1], trust)]))
        pytree.tree_unflatten([torch.zeros(())] * spec.num_leaves, spec)
        return spec
    except CheckpointError:
        raise
    except Exception as error:  # a container that the user registered reads its context in any way
        raise damaged("the nesting of inputs or outputs", f"{type(error).__name__}: {error}") from error


def _known(spec: JSON, trust: Trust) -> JSON:
    """The spec, checked, with containers that this process does not know as dicts and tuples."""
    if not isinstance(spec, dict) or set(spec) != {"type", "context", "children_spec"}:
        raise damaged(f"a container of inputs or outputs is {spec!r:.100}")
    name, text, children = spec["type"], spec["context"], spec["children_spec"]
    if not isinstance(children, list) or not (name is None or isinstance(name, str)):
        raise damaged(f"a container of inputs or outputs is {spec!r:.100}")
    if name is None:
        if text is not None or children:
            raise damaged("a leaf of inputs or outputs holds something")
        return spec
    context, known = _context(text, trust), [_known(child, trust) for child in children]
    if name in _FITS:
        if not _FITS[name](context, len(known)):
            raise damaged(f"a {name} with {len(known)} entries says {text!r:.100} of itself")
        return {**spec, "children_spec": known}
    if name == "collections.defaultdict" and _names_another_factory(context):
        context = context.get("dict_context")
    elif _registered(name, trust) and (name != _NAMEDTUPLE or _registered(context, trust)):
        return {**spec, "children_spec": known}
    if _are_keys(context, len(known)) and all(isinstance(key, str) for key in context):
        return {"type": "builtins.dict", "context": json.dumps(context), "children_spec": known}
    return {"type": "builtins.tuple", "context": "null", "children_spec": known}


def _context(text: JSON, trust: Trust) -> Any:
    """What a container says of itself: JSON as text, a name, or data; each enum among them may be imported."""
    found = text
    if isinstance(text, str):
        with suppress(ValueError):
            found = json.loads(text)
    waiting = [found]
    while waiting:
        value = waiting.pop()
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if isinstance(value, dict) and "__enum__" in value:
            _check_enum(value, trust)
    return found


def _check_enum(value: dict[str, Any], trust: Trust) -> None:
    """Refuse what is no member of an enum of a trusted module: torch would import and read what stands there."""
    module, _, path = str(value.get("fqn")).partition(":")
    found: Any = trust.module(module)
    for part in path.split("."):
        found = vars(found).get(part) if isinstance(found, (ModuleType, type)) else None
    if not isinstance(found, type) or not issubclass(found, Enum) or value.get("name") not in found.__members__:
        raise damaged(f"a key of inputs or outputs is {value!r:.100}", "there is no such member of an enum")


def _names_another_factory(context: Any) -> bool:
    """Whether a defaultdict makes its entries by a function that is no plain container or number."""
    if not isinstance(context, dict) or context.get("default_factory_module") != "builtins":
        return True
    return context.get("default_factory_name") not in ("list", "dict", "set", "int", "float", "bool", "str", "tuple")


def _are_keys(context: Any, count: int) -> bool:
    if not isinstance(context, list) or len(context) != count:
        return False
    return len({json.dumps(key) for key in context}) == count


def _says_nothing(context: Any, count: int) -> bool:
    return context is None


_FITS: dict[str, Callable[[Any, int], bool]] = {
    "builtins.tuple": _says_nothing,
    "builtins.list": _says_nothing,
    "builtins.dict": _are_keys,
    "collections.OrderedDict": _are_keys,
    "collections.deque": lambda context, count: context is None or (type(context) is int and context >= count),
}
"""Container -> whether it can say that of itself with so many entries."""


def _registered(name: Any, trust: Trust) -> bool:
    """Whether pytree knows the class, once the library is imported that registers it."""
    if not isinstance(name, str):
        return False
    if name.partition(".")[0] in OUTPUT_LIBRARIES and name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        try:
            trust.module(name.rpartition(".")[0])
        except CheckpointError:
            return False
    return name in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
