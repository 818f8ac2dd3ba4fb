"""Every test starts from the same seed, on one thread, and downloads nothing."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import hypothesis
import pytest
import torch

# The same examples on every run; `--hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("fixed")


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the tests run in parallel, one process a core


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
