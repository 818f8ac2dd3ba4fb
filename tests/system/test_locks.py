"""Locks on folders: one holder at a time, across processes, and none after the holder's end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from graphcomp.system import locks
from graphcomp.system.locks import LOCK_FILE, lock_folder

pytestmark = pytest.mark.skipif(locks.fcntl is None, reason="needs file locks")

HOLD = """
import sys, time
from pathlib import Path
from graphcomp.system.locks import lock_folder
held = lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    first = lock_folder(tmp_path)
    assert first is not None and first.held
    assert lock_folder(tmp_path, wait=False) is None
    first.release()
    first.release()
    assert not first.held
    with lock_folder(tmp_path, wait=False) as second:
        assert second.held
    assert not list(tmp_path.iterdir())


def test_readers_share(tmp_path: Path) -> None:
    with lock_folder(tmp_path, shared=True), lock_folder(tmp_path, shared=True, wait=False) as second:
        assert second.held
        assert lock_folder(tmp_path, wait=False) is None


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    assert lock_folder(tmp_path, wait=False) is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with lock_folder(tmp_path, wait=False) as mine:
        assert mine.held


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    held = lock_folder(tmp_path)
    assert held is not None
    ready, release = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # as a worker of a DataLoader that outlives its parent
        os.write(ready[1], b"x")
        os.read(release[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    assert held.held
    held.release()
    with lock_folder(tmp_path, wait=False) as mine:
        assert mine.held
    os.write(release[1], b"x")
    os.waitpid(child, 0)
    for end in (*ready, *release):
        os.close(end)


def test_where_folders_cannot_be_locked_a_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = locks.fcntl.flock

    def of_files_alone(descriptor: int, kind: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(9, "Bad file descriptor")
        flock(descriptor, kind)

    monkeypatch.setattr(locks.fcntl, "flock", of_files_alone)
    with lock_folder(tmp_path) as first:
        assert first.held
        assert lock_folder(tmp_path, wait=False) is None
    assert [p.name for p in tmp_path.iterdir()] == [LOCK_FILE]


def test_where_nothing_can_be_locked_nothing_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(descriptor: int, kind: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", refuses)
    with lock_folder(tmp_path) as lock:
        assert not lock.held
    monkeypatch.setattr(locks, "fcntl", None)
    with lock_folder(tmp_path, wait=False) as lock:
        assert not lock.held
