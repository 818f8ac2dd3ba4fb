"""What each option of the public functions must be: one table, which every function that takes the option asks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from graphcomp.arguments import (
    check_batches,
    check_callable,
    check_flag,
    check_instance,
    check_mapping,
    check_path,
    check_whole,
    check_word,
    is_number,
    shown,
    wrong,
)
from graphcomp.cost.latency_table import LatencyTable
from graphcomp.coupling.analysis import Analysis
from graphcomp.errors import PlanError
from graphcomp.flows.results import Activations
from graphcomp.methods.registry import check_method
from graphcomp.pruning.allocation import Budget, Scope, is_share
from graphcomp.pruning.prunable import check_roles
from graphcomp.pruning.vocabulary import Logits
from graphcomp.quantization.ptq import PostTraining, check_rounding
from graphcomp.training.options import Training

Check = Callable[[str, Any], None]


def check_options(**given: Any) -> None:
    """Refuse values that the options cannot have; None is taken where an option may be left out.

    Raises:
        PlanError: a value of a wrong type, or out of range.
    """
    for name, value in given.items():
        if value is not None or name in REQUIRED:
            CHECKS[name](name, value)


def check_sparsity(name: str, value: Any) -> None:
    """Refuse anything but a share of units, or shares by module.

    Raises:
        PlanError: `value` is something else.
    """
    if isinstance(value, Mapping):
        if not value:
            raise wrong(name, "a number, or shares by module name", value, 'sparsity={"layer1": 0.5}')
        for share in value.values():
            check_share(name, share)
        return
    check_share(name, value)


def check_share(name: str, value: Any) -> None:
    """Refuse anything but a number from 0 to below 1.

    Raises:
        PlanError: `value` is something else.
    """
    if not is_share(value):
        raise PlanError(
            f"{name}={shown(value)} is outside [0, 1)",
            why="it is the fraction of prunable units to remove, and at least one unit of each group stays",
            fix='sparsity=0.5, or shares by module name: sparsity={"layer1": 0.2, "re:conv": 0.5}',
        )


def _repair(name: str, value: Any) -> None:
    """Raise PlanError where the value is no way to repair a cut."""
    if value is not None:
        check_word(name, value, ("least_squares",))


def _seed(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise PlanError(f"{name}={shown(value)} is not a whole number of 64 bits", fix="seed=0")


def _texts(name: str, value: Any) -> None:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, Iterable) or isinstance(entries, (Tensor, Mapping, nn.Module)):
        raise wrong(name, "a name, or several names", value, f'{name}="…"')
    for entry in entries:
        check_instance(f"each entry of {name}", entry, str, f'{name}="…"')


def _outputs(name: str, value: Any) -> None:
    _texts(name, value)
    if not isinstance(value, str) and not list(value):
        raise wrong(name, "a name, or several names", value, f'{name}="logits", or None for all')


def _keywords(name: str, value: Any) -> None:
    fix = f'{name}={{"mask": mask}}'
    check_mapping(name, value, fix)
    for key in value:
        check_instance(f"each key of {name}", key, str, fix)


def _saliency(name: str, value: Any) -> None:
    if not isinstance(value, str):
        check_callable(name, value, 'saliency="l2"')


def _speedups(name: str, value: Any) -> None:
    fix = f"{name}=[1.5, 2, 3]"
    if isinstance(value, (str, bytes, Tensor, Mapping)) or not isinstance(value, Sequence) or not value:
        raise wrong(name, "a list of numbers", value, fix)
    for each in value:
        if not is_number(each) or each <= 0:
            raise wrong(f"each of {name}", "a number above 0", each, fix)


def _an(kind: type | tuple[type, ...], fix: str) -> Check:
    return partial(check_instance, kinds=kind, fix=fix)


def _shard_size(name: str, value: Any) -> None:
    """Refuse anything but a number of bytes, or a text such as "500MB".

    Raises:
        PlanError: `value` is something else.
    """
    if isinstance(value, str) and re.fullmatch(r"[1-9]\d{0,5}(\.\d+)?[KMGT]?B", value):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise wrong(name, "a number of bytes, or a text with a unit", value, f'{name}="2GB"')


def _floats(name: str, value: Any) -> None:
    """Refuse anything but a dtype of floats.

    Raises:
        PlanError: `value` is something else.
    """
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise wrong(name, "a dtype of floats", value, f"{name}=torch.bfloat16")


CHECKS: dict[str, Check] = {
    "analysis": _an(Analysis, "graphcomp.analyze(model, example_inputs)"),
    "plan": _an(Analysis, "graphcomp.analyze(model, example_inputs)"),
    "model": _an(nn.Module, "give a torch.nn.Module"),
    "example_kwargs": _keywords,
    "sparsity": check_sparsity,
    "activation_bits": _an((int, tuple, list, str), "activation_bits=8, (4, 8), 'same' or None"),
    "activations": partial(check_word, words=get_args(Activations)),
    "group_size": partial(check_whole, least=0),
    "rounding": check_rounding,
    "reduce_range": check_flag,
    "quantization": _an(PostTraining, "quantization=graphcomp.PostTraining(graphcomp.QuantConfig(…))"),
    "layer_bits": partial(check_mapping, fix='layer_bits={"layer1": (8, 8)}'),
    "quantizer": partial(check_word, words=("geta", "lsq")),
    "method": check_method,
    "data": check_batches,
    "loss": partial(check_callable, fix="loss=lambda output, batch: …", modules=True),
    "folder": check_path,
    "path": check_path,
    "training": _an(Training, "training=graphcomp.Training(steps=1000, …)"),
    "saliency": _saliency,
    "ranking": partial(check_word, words=get_args(Scope)),
    "rounds": check_whole,
    "repair": _repair,
    "prune": lambda _, value: check_roles(value),
    "round_to": check_whole,
    "logits": partial(check_word, words=get_args(Logits)),
    "unknown": partial(check_whole, least=0),
    "budget": _an(Budget, "budget=graphcomp.Budget(macs=0.5)"),
    "table": _an(LatencyTable, 'table=graphcomp.LatencyTable.load("table.json")'),
    "speedups": _speedups,
    "outputs": _outputs,
    "prefer_native": check_flag,
    "uniform": check_flag,
    "keep_class": check_flag,
    "trust": _texts,
    "trust_remote_code": check_flag,
    "max_shard_size": _shard_size,
    "dtype": _floats,
    "verify": check_flag,
    "measure_latency": check_flag,
    "progress": check_flag,
    "seed": _seed,
    "learn_exponent": check_flag,
    "recompute": check_flag,
    "model_factory": partial(check_callable, fix="model_factory=lambda: MyModel()", classes=True),
}
"""Option -> its check."""

REQUIRED = frozenset(
    {
        "trust", "analysis", "plan", "model", "activations", "group_size", "rounding", "reduce_range", "path",
        "ranking", "rounds",
        "round_to", "verify", "measure_latency", "progress", "seed", "learn_exponent", "recompute",
        "prefer_native", "uniform", "logits", "speedups", "max_shard_size", "trust_remote_code",
    }
)  # fmt: skip
"""Options for which None is no value."""
