"""The folder of a run: which files are its own, what cannot be kept, and damage of every kind, which is named."""

import pickle

import numpy as np
import pytest
import torch

import graphcomp as gc
from graphcomp.system import locks
from graphcomp.training.folder import METRICS, RunFolder, plain

ABOUT = {"model": "Mlp"}
STATE = {"weight": torch.arange(4000.0), "lr": 0.1}


@pytest.fixture
def folder(tmp_path):
    """Three steps, of which two checkpoints stay."""
    made = RunFolder(tmp_path, ABOUT, 100, keep=2)
    for step in (1, 2, 3):
        made.log({"step": step})
        made.save(step, STATE)
    return made


def test_the_newest_is_read(folder):
    state = folder.load()
    assert state["step"] == 3 and torch.equal(state["weight"], STATE["weight"])
    assert sorted(p.name for p in folder.path.iterdir()) == [METRICS, "step-000000002.pt", "step-000000003.pt"]


@pytest.mark.parametrize("name", ["step-best.pt", "step-000000009 (copy).pt", "step-.pt"])
def test_a_copy_of_another_name_is_the_users(folder, name):
    copy = folder.path / name
    copy.write_bytes((folder.path / "step-000000002.pt").read_bytes())
    assert folder.load()["step"] == 3
    folder.save(4, STATE)
    assert folder.load()["step"] == 4 and copy.exists()
    assert not (folder.path / "step-000000002.pt").exists()


def test_steps_are_numbers_not_words(folder):
    folder.save(10**9, STATE)
    assert folder.load()["step"] == 10**9


# ------------------------------------------------------------------------------------------------ one run at a time
def test_two_runs_in_one_folder_are_refused(folder):
    with pytest.raises(gc.CheckpointError, match="another run is at work") as caught:
        RunFolder(folder.path, ABOUT, 100, keep=2)
    assert "another folder" in caught.value.fix
    copy = pickle.loads(pickle.dumps(folder))  # as the other processes of a distributed run get it
    copy.close()
    with pytest.raises(gc.CheckpointError, match="another run is at work"):
        RunFolder(folder.path, ABOUT, 100, keep=2)
    folder.close()
    RunFolder(folder.path, ABOUT, 100, keep=2).close()


def test_a_folder_that_cannot_be_locked_is_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "fcntl", None)
    RunFolder(tmp_path, ABOUT, 100, keep=2)
    assert "cannot be locked" in caplog.text


# ------------------------------------------------------------------------------------------------ damage
def text(path):
    path.write_text("hello")


def a_byte_of_a_tensor(path):
    content = bytearray(path.read_bytes())
    content[content.index(STATE["weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)


def a_byte_of_the_pickle(path):
    path.write_bytes(path.read_bytes().replace(b"weight", b"\xff\xffight"))


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [text, a_byte_of_a_tensor, a_byte_of_the_pickle, half, a_folder])
def test_a_damaged_checkpoint_is_named(folder, damage):
    path = folder.newest()
    damage(path)
    with pytest.raises(gc.CheckpointError, match=r"step-000000003\.pt cannot be read") as caught:
        folder.load()
    assert caught.value.why and "remove it" in caught.value.fix


@pytest.mark.parametrize(
    "state",
    [
        [1],
        {"format": 1},
        {"format": 1, "step": 3},
        {"format": 1, "about": ABOUT},
        {"format": "1", "about": ABOUT, "step": 3},
        {"format": 2, "about": ABOUT, "step": 3},
        {"format": 1, "about": None, "step": 3},
        {"format": 1, "about": ABOUT, "step": "3"},
    ],
)
def test_what_is_no_checkpoint_is_named(folder, state):
    torch.save(state, folder.newest())
    with pytest.raises(gc.CheckpointError, match=r"step-000000003\.pt is no checkpoint") as caught:
        folder.load()
    assert "remove it" in caught.value.fix


@pytest.mark.parametrize("content", [b"hello\n", b"{}\n", b"[1]\n", b'{"step": "1"}\n', b"\xff\xfe\x00\n"])
def test_damaged_metrics_are_named(folder, content):
    (folder.path / METRICS).write_bytes(content)
    with pytest.raises(gc.CheckpointError, match="holds no metrics") as caught:
        folder.load()
    assert caught.value.why and "remove it" in caught.value.fix


@pytest.mark.parametrize("content", [b"", b'{"step": 3}\n{"ste', None])
def test_metrics_that_end_early_or_are_gone_are_no_damage(folder, content):
    path = folder.path / METRICS
    path.unlink() if content is None else path.write_bytes(content)
    assert folder.load()["step"] == 3


# ------------------------------------------------------------------------------------------------ what can be kept
@pytest.mark.parametrize("value", [np.arange(3), lambda: 0, pytest])
def test_what_cannot_be_read_back_is_told_at_the_first_checkpoint(tmp_path, value):
    made = RunFolder(tmp_path, ABOUT, 100, keep=2)
    with pytest.raises(gc.CheckpointError, match="cannot be kept") as caught:
        made.save(1, {"scheduler": {"factor": value}})
    assert caught.value.why and "state_dict" in caught.value.fix
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_become_pythons():
    found = plain({"lr": np.float64(0.1), 3: [np.float32(0.5), (np.int64(2), np.bool_(True))], "array": np.array(7)})
    assert found == {"lr": 0.1, 3: [0.5, (2, True)], "array": 7}
    assert [type(v) for v in (found["lr"], *found[3][1], found["array"])] == [float, int, bool, int]
    assert plain(STATE)["weight"] is STATE["weight"]
