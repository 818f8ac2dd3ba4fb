"""Now `graphcomp.ir.module`."""

from typing import Any

from graphcomp.ir import module


def __getattr__(name: str) -> Any:
    return getattr(module, name)
