"""Locks on folders. A lock belongs to a process and ends with that process, however the process ends."""

from __future__ import annotations

import errno
import importlib
import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

LOCK_FILE = ".graphcomp.lock"
"""In a folder that belongs to a process, and in place of the folder on file systems that lock files alone (NFS)."""

try:
    fcntl: Any = importlib.import_module("fcntl")
except ImportError:  # Windows
    fcntl = None

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """A lock that is held until `release`, garbage collection, or the end of the process.

    A forked child (a DataLoader worker) gives up its copy of the lock, so that the lock ends with the process that
    took the lock.
    """

    def __init__(self, descriptor: int | None) -> None:
        """Hold the locked `descriptor`; None: this file system has no locks, and nothing is held."""
        self._descriptor = descriptor
        _close_in_forks()
        _held.add(self)

    @property
    def held(self) -> bool:
        """Whether others are kept out: False once released, and where the file system has no locks."""
        return self._descriptor is not None

    def release(self) -> None:
        """Give the lock up. A second call does nothing."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def lock_folder(folder: Path, *, shared: bool = False, wait: bool = True) -> FolderLock | None:
    """Lock `folder` against other processes and threads that call this function; see `FolderLock.held`.

    Args:
        folder: an existing folder.
        shared: exclude only those who do not share (readers beside readers).
        wait: for whoever holds the lock. False: return None then.

    Raises:
        OSError: the folder cannot be opened.
    """
    if fcntl is None:
        return FolderLock(None)
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, kind)
        return FolderLock(descriptor)
    except OSError as error:
        os.close(descriptor)
        if error.errno in _BUSY and not wait:
            return None
    return FolderLock(None) if shared else lock_file(folder / LOCK_FILE, wait=wait)


def lock_file(path: Path, *, wait: bool = True) -> FolderLock | None:
    """Lock a file, which is made where there is none; otherwise as `lock_folder`."""
    if fcntl is None:
        return FolderLock(None)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return FolderLock(descriptor)
    except OSError as error:
        os.close(descriptor)
        return None if error.errno in _BUSY and not wait else FolderLock(None)


_registered = False


def _close_in_forks() -> None:
    global _registered
    if not _registered and hasattr(os, "register_at_fork"):
        _registered = True
        os.register_at_fork(after_in_child=_release_all)


def _release_all() -> None:
    for lock in list(_held):
        lock.release()
