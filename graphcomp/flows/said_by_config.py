"""The config of a model that was cut: entries that say its lengths, where the model computes the same with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import Kept
from graphcomp.ir.inputs import Inputs, copies
from graphcomp.ir.module import tensor_leaves
from graphcomp.ir.preserve import eval_copy
from graphcomp.native.config import (
    as_read,
    changes_of,
    config_edits,
    config_of,
    edited,
    follow_config,
    hold_config,
    partial_edits,
    shapes_of,
)
from graphcomp.native.model import NativeResult
from graphcomp.system.threads import one_at_a_time
from graphcomp.torch_compat import buffer_table, non_persistent


@one_at_a_time
def with_config(plan: Analysis, found: NativeResult) -> tuple[NativeResult, list[str]]:
    """Return the model with a config that builds it, and a note; as it was, where its outputs would not be the same.

    The entries are those that build the model's tensors. Ints that the class's constructor makes of them take the place
    of the model's. Outputs on the example inputs are compared bit for bit, also of what a reader of the config builds.
    """
    model = found.module
    if model is None or config_of(model) is None:
        return found, []
    edits = config_edits(model, shapes_of(model))
    if edits is None:
        return found, ["uniform=True: no entries of the config build the model; its sizes stay in a section beside it"]
    inputs = plan.captured.inputs
    before = _outputs(model, inputs.copies())
    old = {id(module): dict(vars(module)) for module in model.modules()}
    if not follow_config(model, edited(config_of(model), edits)) or not _reads_alike(model, before, inputs):
        for module in model.modules():
            vars(module).update(old[id(module)])
        return found, ["uniform=True: the model that the config builds computes something else; a section stays"]
    said = ", ".join(map(str, changes_of(config_of(plan.model), config_of(model)))) or "nothing"
    return replace(found, edits=()), [f"uniform=True: the config builds the model, with {said}"]


@one_at_a_time
def with_width(plan: Analysis, kept: Kept, found: NativeResult) -> tuple[str, ...]:
    """Let the config of a model say its residual widths, in place, and return notes.

    Code beside the model reads a width off the config: heads on top, poolings, adapters. All else that was cut stays in
    a section. An entry that the model's own code reads, for a scale, stays as well: outputs on the example inputs, also
    of what a reader of the config builds, are compared bit for bit.
    """
    model = found.module
    widths = {(group.size, len(units)) for group, units in kept.items() if group.role == "width"}
    if model is None or config_of(model) is None:
        return ()
    notes = []
    for old, new in sorted(pair for pair in widths if pair[0] != pair[1]):
        edits = partial_edits(model, old, new)
        if edits:
            config, inputs = config_of(model), plan.captured.inputs
            before = _outputs(model, inputs.copies())
            hold_config(model, edited(config, edits), own=True)
            if _reads_alike(model, before, inputs):
                continue
            hold_config(model, config, own=True)
        why = "the model would compute something else" if edits else "its class builds no such model"
        notes.append(f"a width is {new}, and the config says {old}: {why}; uniform=True cuts what the config can say")
    return tuple(notes)


def without_unread_buffers(plan: Analysis, found: NativeResult) -> None:
    """Take the buffers that no file holds, and that the model's config builds no more, off a model, in place.

    A model whose last layer of one kind is gone needs no angles of that kind. The buffers stay where outputs on the
    example inputs are others without them.
    """
    model = found.module
    read = None if model is None or config_of(model) is None else as_read(model)
    if model is None or read is None:
        return
    tables = [(buffer_table(own), buffer_table(read.get_submodule(path)), own) for path, own in model.named_modules()]
    odd = [(table, name) for table, built, own in tables for name in table.keys() - built.keys() & non_persistent(own)]
    if not odd:
        return
    inputs = plan.captured.inputs
    before = _outputs(model, inputs.copies())
    taken = [(table, name, table.pop(name)) for table, name in odd]
    try:
        unread = _same(before, _outputs(model, inputs.copies()))
    except Exception:  # of the user's code, which reads them
        unread = False
    for table, name, buffer in [] if unread else taken:
        table[name] = buffer


def _outputs(model: nn.Module, inputs: tuple[Any, Any]) -> list[Tensor]:
    args, kwargs = copies(inputs)
    with eval_copy(model, real=True) as twin, torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return list(tensor_leaves(twin(*args, **kwargs)))


def _reads_alike(model: nn.Module, before: Sequence[Tensor], inputs: Inputs) -> bool:
    """Whether the model, and what a reader of its config builds, give the outputs that the model gave before."""
    read = as_read(model)
    if read is None or not _same(before, _outputs(model, inputs.copies())):
        return False
    try:
        return _same(before, _outputs(read, inputs.copies()))
    except Exception:  # of the user's code, which the new config does not suit
        return False


def _same(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    pairs = list(zip(before, after, strict=False))
    return len(before) == len(after) and all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
