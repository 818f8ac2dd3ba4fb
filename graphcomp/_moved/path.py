"""Now `graphcomp.capture.path`."""

from typing import Any

from graphcomp.capture import path


def __getattr__(name: str) -> Any:
    return getattr(path, name)
