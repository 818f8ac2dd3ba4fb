"""Now `graphcomp.result`."""

from typing import Any

import graphcomp.result as result


def __getattr__(name: str) -> Any:
    return getattr(result, name)
