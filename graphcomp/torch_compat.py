"""Bind each private name of torch that graphcomp uses: the one file to mend when a torch moves one of the names.

Every other file of the package takes the names from here. Each binding says why the name is needed, and which public
name would replace the name. `tests/test_torch_compat.py` checks the behaviour that graphcomp relies on, name by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from graphcomp.errors import TorchError

__all__ = ["pytree"]


@contextmanager
def bound(*names: str) -> Iterator[None]:
    """Raise TorchError where this torch lacks one of the private `names` that the block binds."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise TorchError(
            f"torch {torch.__version__} has no {' or no '.join(names)}",
            at="graphcomp/torch_compat.py",
            why=f"{error}; a private name of torch may move with any release",
            fix="install a torch that this graphcomp is tested with (pip install --upgrade graphcomp, which picks one),"
            " or bind the new name in graphcomp/torch_compat.py",
        ) from error


# Flatten nested arguments and results: torch.export describes inputs and outputs by the specs of this module.
# No public name yet; a public torch.utils.pytree with the same TreeSpec would do.
with bound("torch.utils._pytree"):
    import torch.utils._pytree as pytree
