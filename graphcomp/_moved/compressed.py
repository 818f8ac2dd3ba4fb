"""Now `graphcomp.result`."""

from typing import Any

from graphcomp import result


def __getattr__(name: str) -> Any:
    return getattr(result, name)
