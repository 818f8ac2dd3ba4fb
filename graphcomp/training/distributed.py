"""What the processes that train one model together agree on. One process alone agrees with itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graphcomp.torch_compat import foreach_copy_

T = TypeVar("T")

BUCKET = 25 * 2**20
"""Bytes of gradients that are averaged at once."""


def count() -> int:
    """How many there are: 1 unless `torch.distributed` was set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is."""
    return dist.get_rank() if count() > 1 else 0


def mean(value: Tensor) -> Tensor:
    """The mean over all processes of a tensor on the device of the model."""
    if count() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / count()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Let each gradient be its mean over all processes, in as few messages as BUCKET allows.

    A parameter that a process had no use for counts as a gradient of 0 there. This is what DistributedDataParallel
    does, but after the backward pass instead of during it; in return the loss need not depend on all parameters.
    """
    trained = [p for p in parameters if p.requires_grad]
    if count() == 1 or not trained:
        return
    used = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter, somewhere in zip(trained, used.tolist(), strict=True):
        if somewhere:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
    for bucket in (bucket for gradients in by_dtype.values() for bucket in _buckets(gradients)):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        parts = torch.split(flat / count(), [gradient.numel() for gradient in bucket])
        foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of at least BUCKET bytes, the last one of what is left."""
    found: list[Tensor] = []
    size = 0
    for tensor in tensors:
        found.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= BUCKET:
            yield found
            found, size = [], 0
    if found:
        yield found


def every(condition: bool, device: torch.device) -> bool:
    """Whether it is so in each of them."""
    if count() == 1:
        return condition
    found = torch.tensor(int(condition), device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return bool(found)


def gathered(value: Any) -> list[Any]:
    """The value of each, in the order of their ranks; it is pickled on the way."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns, or raises, in the first process; the others wait for it, and do not call it."""
    if count() == 1:
        return make()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found = [make(), None]
        except Exception as error:  # whatever it is, all stop with it rather than wait for ever
            found = [None, error]
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    made: T = found[0]
    return made


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Let all hold the values of the first one."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)
