"""Files that appear whole or not at all, and outlive a loss of power."""

from __future__ import annotations

import glob
import os
import shutil
import stat
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from graphcomp.errors import ExportError
from graphcomp.system.locks import LOCK_FILE, lock_file, lock_folder


def folder_of(module: types.ModuleType) -> str:
    """Return the folder of a Python package or module, with a separator at the end: file names of the code begin so."""
    assert module.__file__ is not None
    return os.path.join(os.path.dirname(module.__file__), "")


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}.new-"
        with locked(path.parent):
            for left in abandoned(path.parent, prefix):
                shutil.rmtree(left, ignore_errors=True)
        with staging(path.parent, prefix) as fresh:
            yield fresh / path.name
            for made in sorted(fresh.iterdir(), key=lambda file: file.name == path.name):
                if made.name != LOCK_FILE:
                    put(made, path.with_name(made.name))
            sync_folder(path.parent)
    except OSError as error:
        raise ExportError(
            f"cannot write {path}",
            why=f"{type(error).__name__}: {error}",
            fix="give a path in a folder you may write to",
        ) from error


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Wait until no other process holds the folder, then hold the folder; with `shared`, beside others who share."""
    lock = lock_folder(folder, shared=shared)
    assert lock is not None  # it was waited for
    with lock:
        yield


@contextmanager
def staging(parent: Path, prefix: str) -> Iterator[Path]:
    """A fresh folder in `parent` whose name begins with `prefix`, removed at the end.

    The lock of a file in the folder says that the process lives: see `abandoned`.
    """
    with locked(parent):  # nobody may take the folder for an abandoned one before the file is there
        fresh = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = lock_file(fresh / LOCK_FILE)
    try:
        yield fresh
    finally:
        if lock is not None:
            lock.release()
        shutil.rmtree(fresh, ignore_errors=True)


def abandoned(parent: Path, prefix: str) -> list[Path]:
    """The folders of `staging` in `parent` whose process is gone; none where the system cannot tell. `parent` must be
    locked."""
    found = []
    for folder in sorted(parent.glob(f"{glob.escape(prefix)}*")):
        if folder.is_symlink() or not folder.is_dir():
            continue
        with suppress(OSError):
            lock = lock_file(folder / LOCK_FILE, wait=False)
            if lock is not None and lock.held:
                lock.release()
                found.append(folder)
    return found


def put(made: Path, target: Path) -> None:
    """Move the file `made` to `target` on the same file system, synced to disk; a replaced file's mode is kept."""
    with made.open("rb+") as file:
        os.fsync(file.fileno())
    with suppress(FileNotFoundError):
        os.chmod(made, stat.S_IMODE(target.stat().st_mode))
    os.replace(made, target)


def sync_folder(folder: Path) -> None:
    """Let the names in `folder` outlive a loss of power, where the system can do that."""
    with suppress(OSError):  # Windows opens no folder; some network file systems sync none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
