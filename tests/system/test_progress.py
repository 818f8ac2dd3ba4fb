import io

import pytest
import torch
from torch import nn

import graphcomp as gc
from graphcomp.system.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_silent_off_a_terminal():
    stream = io.StringIO()
    with progress(3, stream=stream) as bar:
        bar.step("capture")
    assert stream.getvalue() == ""


def test_shown_and_wiped_on_a_terminal():
    stream = Terminal()
    with pytest.raises(ValueError), progress(2, stream=stream) as bar:
        bar.step("capture")
        bar.step("cut")
        raise ValueError
    shown = stream.getvalue()
    assert "capture" in shown and "[############------------] cut" in shown
    assert shown.endswith("\r\x1b[K")


def test_many_quick_steps_are_shown_at_times_with_what_is_left(monkeypatch):
    stream, now = Terminal(), [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with progress(100, stream=stream) as bar:
        bar.done = 20  # a run that goes on
        for _ in range(40):
            now[0] += 0.0625
            bar.advance(lambda: "training")
    lines = stream.getvalue().split("\r\x1b[K")[1:-1]
    assert lines[0] == "[#####-------------------] training, ? s left"
    assert lines[-1] == "[#############-----------] training, 3 s left" and len(lines) == 10


def test_what_is_not_shown_is_not_asked_for():
    with progress(2, stream=io.StringIO()) as bar:
        bar.advance(lambda: pytest.fail("asked for"))


@pytest.mark.parametrize("wanted", [True, False])
def test_compress_shows_it_where_wanted(monkeypatch, wanted):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    gc.compress(model, torch.randn(2, 4), progress=wanted)
    assert ("scoring" in stream.getvalue()) is wanted
