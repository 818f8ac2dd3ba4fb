"""Every method with every option of `compress`: what is given changes the result, or is noted, or is refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch import nn

import graphcomp as gc
from graphcomp.methods.ajpq.method import Ajpq
from graphcomp.methods.registry import METHODS
from graphcomp.methods.takes import OPTIONS, UNITS
from tests.methods.learning import batches, loss, net
from tests.methods.test_own_method import of_the_page

X = batches()[0][0]
STEPS = 12
GIVEN: dict[str, Any] = {
    "sparsity by module": {"sparsity": {"second": 0.5}},
    "budget": {"budget": gc.Budget(params=0.6), "sparsity": None},
    "saliency": {"saliency": "random"},
    "round_to": {"round_to": 4},
    "prune": {"prune": ["hidden"]},
    "keep_inputs": {"keep_inputs": ["second"]},
    "ranking": {"ranking": "local"},
    "rounds": {"rounds": 2, "ranking": "sensitivity", "calibration": [X]},
    "prefer_native": {"prefer_native": False},
    "uniform": {"uniform": True, "bits": None},
    "keep_class": {"keep_class": True, "activation_bits": None},
    "activation_bits": {"activation_bits": 6},
    "activations": {"activations": "dynamic"},
    "calibration": {"calibration": [3 * X]},
    "group_size": {"group_size": 4},
    "rounding": {"rounding": "second_order", "calibration": [X]},
    "reduce_range": {"reduce_range": True},
    "quantization": {"quantization": gc.PostTraining(gc.QuantConfig(gc.QuantSpec(5))), "bits": None},
}
"""What asks for each option of the table."""
EVERY: dict[str, Any] = {
    "ignore": {"ignore": ["second"]},
    "outputs": {},
    "scope": {},
    "verify": {"verify": False},
    "measure_latency": {"measure_latency": True},
}
"""What asks for the options that serve every method; empty where a single output, or a whole model, is as without."""
NOTHING_LEFT = ("prune", "keep_inputs")
"""Options that leave nothing of the network to prune, as they are asked for here; only methods that prune take them."""
EMPTIED = {"prune_ternary": ("ignore",)}
"""Method -> options of `EVERY` that leave no weight that the method prunes, of the network here."""
PLAIN = {
    "bits", "sparsity", "method", "data", "loss", "epochs", "steps", "lr", "folder", "training", "seed", "progress",
    "repair",
}  # fmt: skip
"""Options that every method is given here, that are a method's own question (`check_goal`), or that stand for what one
shot does by default, and training without: a repair."""
BASE: dict[str, Any] = {
    "oneshot": {"bits": 8},
    "geta": {"bits": (4, 8)},
    "hesso": {},
    "qat": {"bits": 4},
    "sequential": {"bits": (4, 8)},
    "psgd": {"bits": 4},
    "pqk": {"bits": 4, "sparsity": 0.5},
    "ternary": {"bits": 2},
    "regularized": {},
    "opq": {"bits": 4, "activation_bits": 8},
    "qst": {"bits": 4},
    "gdrq": {"bits": 4},
    "prune_ternary": {"bits": 2},
    "ajpq": {"bits": (2, 8), "budget": gc.Budget(macs=0.6)},
    "taylor2": {"bits": 4},
    "own": {},
}


def compress(method: str, **options: Any) -> gc.CompressedModel:
    given = {"sparsity": None, **BASE[method], **options}
    if method != "oneshot":
        given |= {"data": batches(), "loss": loss, "training": gc.Training(steps=STEPS, lr=0.05)}
    own = {"own": of_the_page()["Shrinkage"](), "ajpq": Ajpq(evaluations=8)}.get(method, method)
    model = nn.Sequential(net()) if "scope" in options else net()
    return gc.compress(model, X, method=own, progress=False, **given)


def shown(small: gc.CompressedModel) -> list[Any]:
    """All that a user sees of a result: tensors, and the report."""
    tensors = {name: (t.dtype, t.shape, t.flatten().tolist()) for name, t in small.state_dict().items()}
    report = small.report
    of_layers = [(layer.name, layer.weight_bits, layer.activation_bits) for layer in report.layers]
    return [tensors, report.notes, of_layers, report.verified.keys(), report.unchecked, report.latency_ms is None]


def test_the_tables_hold_every_option_of_compress():
    named = {*OPTIONS, *EVERY, *PLAIN} - {"sparsity by module"}
    assert named == {*inspect.signature(gc.compress).parameters} - {"model", "example_inputs", "example_kwargs"}
    assert OPTIONS.keys() == GIVEN.keys() and BASE.keys() == {*METHODS, "own"}


SIZED = {"budget": {"budget": gc.Budget(bytes=0.06), "bits": (2, 8), "sparsity": 0.5}}
OWN: dict[str, dict[str, Any]] = {"opq": SIZED, "qst": {"budget": {"budget": gc.Budget(bytes=0.06)}}}
"""Method -> what asks for an option in a form that the method takes."""

REFUSED = {
    "geta": {
        "keep_class", "ranking", "rounds", "uniform", "activations", "group_size", "rounding", "reduce_range",
        "quantization",
    },
    "hesso": OPTIONS.keys() - UNITS - {"prefer_native"},
    "regularized": OPTIONS.keys() - UNITS - {"prefer_native"},
    "qat": {"keep_class", *UNITS, "ranking", "rounds", "uniform", "activations"},
    "psgd": OPTIONS.keys() - {"prefer_native"},
    "pqk": {"keep_class", *UNITS, "ranking", "rounds", "uniform", "activations"},
    "ternary": OPTIONS.keys() - {"prefer_native"},
    "opq": OPTIONS.keys() - {"prefer_native", "budget", "activation_bits", "calibration"},
    "qst": OPTIONS.keys() - {"prefer_native", "budget"},
    "gdrq": OPTIONS.keys() - {"prefer_native", "activation_bits", "calibration"},
    "prune_ternary": OPTIONS.keys() - {"prefer_native"},
    "ajpq": OPTIONS.keys()
    - {"prefer_native", "budget", "round_to", "prune", "keep_inputs", "activation_bits", "calibration"},
    "taylor2": OPTIONS.keys() - (UNITS - {"saliency"}) - {"prefer_native", "activation_bits"},
    "own": OPTIONS.keys() - {"prefer_native"},
    "oneshot": set(),
}  # fmt: skip
REFUSED["sequential"] = {*REFUSED["geta"], "budget"}
"""Method -> the options that it has no use for."""


@pytest.mark.parametrize("method", BASE)
def test_an_option_without_a_use_is_refused(method):
    for option in REFUSED[method]:
        with pytest.raises(
            gc.PlanError, match=rf"{option}(, \w+)* with method=|does not prune|no bits are given"
        ) as caught:
            compress(method, **GIVEN[option])
        assert caught.value.fix and (
            caught.value.why or "does not" in str(caught.value) or "no bits" in str(caught.value)
        )


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("method", BASE)
def test_every_other_option_changes_the_result_or_is_noted(method):
    plain = shown(compress(method))
    for option in OPTIONS.keys() - REFUSED[method]:
        if option in NOTHING_LEFT:
            with pytest.raises(gc.NothingToPrune, match=f"{option}="):
                compress(method, **GIVEN[option])
        else:
            given = {**GIVEN, **OWN.get(method, {})}[option]
            assert shown(compress(method, **given)) != plain, option
    for option, given in EVERY.items():
        if option in EMPTIED.get(method, ()):
            with pytest.raises(gc.NothingToPrune, match="no weight"):
                compress(method, **given)
        elif given:
            assert shown(compress(method, **given)) != plain, option
    part = compress(method, scope="0")
    assert isinstance(part.module, nn.Sequential) and part(X).shape == (len(X), 3)
    for option in ("scope", "outputs", "ignore"):
        with pytest.raises(gc.GraphcompError, match="nowhere"):
            compress(method, **{option: "nowhere"})


def test_calibration_is_refused_where_activations_stay_float():
    with pytest.raises(gc.PlanError, match="calibration with method='geta'"):
        compress("geta", activation_bits=None, calibration=[X])


def test_several_stages_say_nothing_of_multiples_that_were_not_asked_for():
    assert not any("round_to" in note for note in compress("sequential").report.notes)
