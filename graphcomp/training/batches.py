"""The batches of a training run: the first ones, passes over all, and where batches are moved to."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from graphcomp.errors import PlanError, TrainingError
from graphcomp.training import distributed
from graphcomp.training.folder import generators_of, seeded

MEASURED = 16
"""Training batches, the first ones, that LSQ is calibrated on, and that the loss is measured on before and after."""


def first_batches(data: Iterable[Any], seed: int) -> tuple[list[Any], Iterable[Any]]:
    """Return the first batches of the data, and data to train on that hold them still; random states stay.

    Raises:
        PlanError: `data` cannot be iterated over.
        TrainingError: there is no batch.
    """
    check_iterable(data)
    generators = generators_of(data)
    before = [generator.get_state() for generator in generators]
    with seeded(seed + distributed.rank()):
        batches = iter(data)
        found = list(itertools.islice(batches, MEASURED))
    for generator, state in zip(generators, before, strict=True):
        generator.set_state(state)
    if not found:
        raise no_batches(data, 0, 0)
    return found, _joined(found, batches) if batches is data else data


def _joined(first: Sequence[Any], rest: Iterator[Any]) -> Iterator[Any]:
    yield from first
    yield from rest


def check_iterable(data: Any) -> None:
    """Raise PlanError where it cannot be iterated over."""
    if not isinstance(data, Iterable):
        raise PlanError(f"data is a {type(data).__name__}", why="it holds no batches", fix="data=[batch, …]")


def no_batches(data: Any, step: int, total: int) -> TrainingError:
    if isinstance(data, Iterator) and total:
        return TrainingError(
            f"the data ended at step {step} of {total}",
            why=f"a {type(data).__name__} can be gone over only once",
            fix="data=list(…), or a DataLoader",
        )
    return TrainingError(
        "the data hold no batches",
        why="a DataLoader with drop_last=True has none where there are fewer examples than a batch takes",
        fix="data=[batch, …]",
    )


def check_shares(data: Iterable[Any], steps: int) -> None:
    """Raise PlanError where the processes would not make the same number of steps."""
    found = distributed.gathered((length_of(data), steps))
    if len(set(found)) > 1:
        raise PlanError(
            "the processes have different numbers of batches",
            at=", ".join(f"{length} in process {k}" for k, (length, _) in enumerate(found)),
            why="all make each step together",
            fix="DataLoader(…, sampler=torch.utils.data.DistributedSampler(dataset))",
        )


def set_epoch(data: Any, epoch: int) -> None:
    """Tell a DistributedSampler and its kin which pass begins: their order follows from it."""
    for owner in (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)):
        announce = getattr(owner, "set_epoch", None)
        if callable(announce):
            announce(epoch)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`, in the same kind of container."""
    if hasattr(batch, "to"):  # a tensor, or what Hugging Face's tokenizers return
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def length_of(data: Any) -> int | None:
    """Of a pass, in batches; None where it is not known."""
    try:
        return len(data)
    except TypeError:
        return None
