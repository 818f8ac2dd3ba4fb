"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphcomp.errors import ExportError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name in a fresh folder beside `path`; what the block leaves in that folder is moved beside `path` at its end.

    The file called like `path` is moved last, so that companions it refers to (external data) are there before it.
    Nothing is moved and the folder is removed when the block raises.

    Raises:
        ExportError: the place cannot be written; `path` is a folder.
    """
    path = path.absolute()
    if path.is_dir():
        raise ExportError(f"{path} is a folder", fix="give the name of a file")
    fresh = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        yield fresh / path.name
        for made in sorted(fresh.iterdir(), key=lambda file: file.name == path.name):
            os.replace(made, path.with_name(made.name))
    except OSError as error:
        raise ExportError(
            f"cannot write {path}",
            why=f"{type(error).__name__}: {error}",
            fix="give a path in a folder you may write to",
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
