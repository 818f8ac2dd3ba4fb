"""Which modules and ops a file may name: those of torch and of libraries of models, and those the caller trusts.

A file is data. Without a limit, a name in the file could import any module of the machine, and call any function.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from graphcomp.arguments import wrong
from graphcomp.errors import CheckpointError
from graphcomp.torch_compat import HigherOrderOperator, OpOverload, schema_of

PACKAGES = frozenset({"torch", "torchvision", "transformers", "timm"})
"""Packages whose modules are imported where a file names them."""

OWN = frozenset({"graphcomp.native.vocabulary"})
"""Modules of graphcomp whose classes stand in a model."""

NAMESPACES = frozenset({"aten", "prims", "quantized_decomposed", "graphcomp", "torchvision"})
"""Namespaces whose ops compute and do nothing else, as far as `computes` holds of the op."""

HIGHER_ORDER = frozenset({
    "cond", "while_loop", "scan", "associative_scan", "map", "map_impl", "flex_attention", "strict_mode",
    "wrap_with_set_grad_enabled", "wrap_with_autocast",
})  # fmt: skip
"""Control flow over sub-graphs; other ops of that kind run compiled kernels or functions of Python."""

WORDS = frozenset({
    "reduce", "activation", "padding_side", "norm", "assert_msg", "approximate", "mode", "ord", "rounding_mode",
    "interpolation", "driver", "p", "pad_mode", "UPLO", "side", "padding", "equation", "indexing",
})  # fmt: skip
"""Arguments of ops that are text and choose how to compute. Other text names files, or is printed."""

_NUMBERS = ("Tensor", "number", "int", "bool", "float", "complex", "Device", "Generator")


class Trust:
    """What a file may name.

    Args:
        names: packages, modules or namespaces of ops beyond PACKAGES and NAMESPACES.
        everything: whether there is no limit, as for a pickle, which holds code anyway.
    """

    def __init__(self, names: str | Iterable[str] = (), *, everything: bool = False) -> None:
        found = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
        for name in found:
            if not _is_path(name):
                raise wrong("trust", "names of packages or of namespaces of ops", name, "trust=['mypackage']")
        self.names = frozenset(found)
        self.everything = everything

    def module(self, name: str) -> ModuleType:
        """The module of that name, imported where that is allowed.

        Raises:
            CheckpointError: the module is neither allowed nor imported already, or cannot be imported.
        """
        if not _is_path(name):
            raise CheckpointError(f"the checkpoint names a module {name!r}", why="that is no name of a module")
        if not self._allows_module(name):
            found = sys.modules.get(name)
            if found is None:
                package = name.partition(".")[0]
                raise CheckpointError(
                    f"the module {name}, which the checkpoint names, cannot be imported unasked",
                    why=f"{package} is neither imported already nor one of {', '.join(sorted(PACKAGES))}",
                    fix=f"import {package} first, or graphcomp.load(folder, trust=[{package!r}]), where you trust both",
                )
            return found
        try:
            return importlib.import_module(name)
        except Exception as error:  # a module may raise anything while it is imported
            raise CheckpointError(
                f"the module {name}, which the checkpoint names, cannot be imported",
                why=f"{type(error).__name__}: {error}",
                fix="install its package in the version the checkpoint was made with",
            ) from error

    def _allows_module(self, name: str) -> bool:
        parts = name.split(".")
        prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        return self.everything or parts[0] in PACKAGES or name in OWN or not self.names.isdisjoint(prefixes)

    def allows_op(self, target: Any) -> bool:
        """Whether a graph of a file may call the op `target`."""
        if isinstance(target, HigherOrderOperator):
            return self.everything or str(target) in HIGHER_ORDER or "higher_order" in self.names
        if not isinstance(target, OpOverload):
            return False
        if self.everything or target.namespace in self.names:
            return True
        return target.namespace in NAMESPACES and computes(target)


@functools.cache
def computes(op: OpOverload) -> bool:
    """Whether all that an op takes are tensors, numbers, and words that say how to compute.

    What reads or writes files, prints, or keeps objects needs an argument of another kind: a name, an object, a stream.
    """
    schema = schema_of(op)
    kinds = [(a.name, str(a.type)) for a in schema.arguments] + [("", str(r.type)) for r in schema.returns]
    return bool(kinds) and all(_bare(kind) in _NUMBERS or (_bare(kind) == "str" and n in WORDS) for n, kind in kinds)


def _bare(kind: str) -> str:
    """A type without the Optional[…] and List[…] around it."""
    while kind.startswith(("Optional[", "List[")) and kind.endswith("]"):
        kind = kind.partition("[")[2][:-1]
    return kind


def _is_path(name: Any) -> bool:
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))


EVERYTHING = Trust(everything=True)
