"""Saving a checkpoint: only its own files change, all at once, and whatever interrupts it leaves a whole checkpoint."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from graphcomp.checkpoint import folder as checkpoint
from graphcomp.checkpoint.folder import DOCUMENT, STAGING, TENSORS, read, write
from graphcomp.errors import CheckpointError
from graphcomp.system import files
from tests.targets import models


def save(folder: Path, width: int = 16) -> None:
    torch.manual_seed(width)
    write(folder, models.Mlp(width), form="native", kept={}, report={"width": width})


def width(folder: Path) -> int:
    """The width of the model in a folder, where the report and the tensors agree."""
    found = read(folder)
    assert found.module.up.weight.shape[0] == found.report["width"]
    return found.report["width"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "out", 4)
    return tmp_path / "out"


# ------------------------------------------------------------------------------------------------ only its own files
def test_other_files_stay(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "tokenizer.json").symlink_to(folder / "README.md")
    save(folder, 8)
    assert width(folder) == 8
    assert sorted(p.name for p in folder.iterdir()) == [".git", "README.md", DOCUMENT, TENSORS, "tokenizer.json"]
    assert (folder / ".git" / "HEAD").read_text() == "ref"
    assert (folder / "tokenizer.json").is_symlink()
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_a_link_to_a_folder_stays_a_link(folder: Path) -> None:
    link = folder.with_name("latest")
    link.symlink_to(folder, target_is_directory=True)
    save(link, 8)
    assert link.is_symlink()
    assert width(folder) == width(link) == 8


def test_modes_stay(folder: Path) -> None:
    folder.chmod(0o700)
    (folder / TENSORS).chmod(0o600)
    (folder / DOCUMENT).chmod(0o640)
    save(folder, 8)
    assert [p.stat().st_mode & 0o777 for p in (folder, folder / TENSORS, folder / DOCUMENT)] == [0o700, 0o600, 0o640]


def test_a_new_folder_has_the_modes_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(tmp_path / "deep" / "out")
    finally:
        os.umask(before)
    out = tmp_path / "deep" / "out"
    assert [p.stat().st_mode & 0o777 for p in (out, out / TENSORS, out / DOCUMENT)] == [0o750, 0o640, 0o640]


def test_an_empty_folder_of_the_user_outlives_a_failure(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    model = models.Mlp()
    model.up.weight = torch.nn.Parameter(torch.empty(16, 6, device="meta"))
    for name in ("mine", "new"):
        with pytest.raises(CheckpointError, match="meta device"):
            write(tmp_path / name, model, form="native", kept={}, report={})
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_files_are_synced_before_they_are_moved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, move = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def moved(a: Any, b: Any) -> None:
        done.append("move " + Path(b).name)
        move(a, b)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    save(folder, 8)
    done = [step for step in done if STAGING not in step]
    assert done == [
        f"sync {TENSORS}", f"move {TENSORS}", "sync out",
        f"sync {DOCUMENT}", f"move {DOCUMENT}", "sync out", f"sync {folder.parent.name}",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ interruptions
def killed_at(folder: str, step: str) -> None:
    """Save in this process, which kills itself before `step`."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    put = files.put

    def put_tensors_alone(made: Path, target: Path) -> None:
        die() if target.name == step else put(made, target)

    if step == "digest":
        checkpoint._digest = die  # type: ignore[assignment]
    checkpoint.put = put_tensors_alone
    save(Path(folder), 8)


@pytest.mark.parametrize(("step", "stays"), [("digest", 4), (TENSORS, 4), (DOCUMENT, 8)])
def test_a_killed_save_leaves_a_whole_checkpoint(folder: Path, step: str, stays: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed_at, args=(str(folder), step))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(folder.glob(f"{STAGING}*"))) == 1
    twin = shutil.copytree(folder, folder.with_name("twin"))
    assert width(folder) == stays
    assert sorted(p.name for p in folder.iterdir()) == [DOCUMENT, TENSORS]
    save(twin, 12)
    assert width(twin) == 12
    assert sorted(p.name for p in twin.iterdir()) == [DOCUMENT, TENSORS]


def test_a_first_save_that_was_killed_is_no_obstacle(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed_at, args=(str(tmp_path / "out"), TENSORS))
    process.start()
    process.join()
    assert [p.name.startswith(STAGING) for p in (tmp_path / "out").iterdir()] == [True]
    save(tmp_path / "out", 4)
    assert width(tmp_path / "out") == 4


def test_the_document_of_an_older_save_is_not_put_in_place(folder: Path) -> None:
    left = folder / f"{STAGING}left"
    left.mkdir()
    shutil.copy(folder / DOCUMENT, left / DOCUMENT)
    save(folder.with_name("other"), 8)
    for name in (DOCUMENT, TENSORS):
        shutil.copy(folder.with_name("other") / name, folder / name)
    assert width(folder) == 8
    assert not left.exists()


def test_what_a_living_process_writes_is_not_cleaned(folder: Path) -> None:
    with files.staging(folder, STAGING) as fresh:
        (fresh / TENSORS).write_bytes(b"half")
        save(folder, 8)
        assert width(folder) == 8
        assert (fresh / TENSORS).read_bytes() == b"half"
    assert sorted(p.name for p in folder.iterdir()) == [DOCUMENT, TENSORS]


def test_a_file_of_an_export_that_was_killed_is_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".m.onnx.new-left").mkdir()
    (tmp_path / ".m.onnx.new-users.txt").touch()
    with files.replacing(tmp_path / "m.onnx") as path:
        path.write_text("model")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.onnx.new-users.txt", "m.onnx"]


def test_one_file_is_replaced_inside_another_replacement(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "m.onnx") as outer, files.replacing(outer) as inner:
        inner.write_text("model")
        inner.with_name("m.data").write_text("weights")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.data", "m.onnx"]


# ------------------------------------------------------------------------------------------------ several at once
def save_often(folder: str, seed: int) -> None:
    for k in range(4):
        save(Path(folder), 4 * seed + k + 4)


@pytest.mark.slow
@pytest.mark.ci
def test_several_processes_save_and_read_at_once(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=save_often, args=(str(folder), seed)) for seed in range(3)]
    for process in processes:
        process.start()
    seen = set()
    while any(process.is_alive() for process in processes):
        seen.add(width(folder))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert width(folder) in (7, 11, 15)
    assert len(seen) > 1
    assert sorted(p.name for p in folder.iterdir()) == [DOCUMENT, TENSORS]


def test_several_threads_save_at_once(folder: Path) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            save_often(str(folder), seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert json.loads((folder / DOCUMENT).read_text())["report"]["width"] in (7, 11, 15)
    found = read(folder)
    assert found.module.up.weight.shape[0] == found.report["width"]
    assert sorted(p.name for p in folder.iterdir()) == [DOCUMENT, TENSORS]


# ------------------------------------------------------------------------------------------------ reproducible
@pytest.mark.slow
@pytest.mark.ci
def test_processes_write_the_same_bytes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    for name in ("one", "two"):
        process = context.Process(target=save, args=(tmp_path / name,))
        process.start()
        process.join()
    for file in (DOCUMENT, TENSORS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
