"""Four cells of the table of benchmarks/whitebox.py; the whole is the benchmark's."""

from __future__ import annotations

import pytest

from tests.targets.models import import_transformers

pytest.importorskip("sklearn")
whitebox = pytest.importorskip("benchmarks.whitebox")


@pytest.mark.parametrize(
    ("name", "sparsity", "bits"),
    [
        ("ViT", 0.5, (2, 4)),
        pytest.param("depthwise net", 0.9, (4, 16), marks=[pytest.mark.slow, pytest.mark.ci]),
        pytest.param("residual CNN", 0.3, (2, 4), marks=pytest.mark.slow),
        pytest.param("BERT", 0.7, (4, 8), marks=pytest.mark.slow),
    ],
)
def test_what_was_asked_is_met_and_kept_in_every_step(name, sparsity, bits):
    if name == "BERT":
        import_transformers()
    cell = whitebox.run(name, sparsity, bits)
    assert cell.holds, str(cell)
    assert 0 < cell.removed < cell.total


def test_a_cell_says_what_is_missing():
    assert str(whitebox.Cell(5, 5, 10, (4.0, 5.0), 0, True, "")) == "5/10 exact, bits 4–5"
    wrong = whitebox.Cell(4, 5, 10, (4.0, 5.5), 2, False, "VerificationError: differs")
    assert not wrong.holds and str(wrong) == "NOT 5/10, bits NOT whole, OUTSIDE in 2 steps, VerificationError: differs"
