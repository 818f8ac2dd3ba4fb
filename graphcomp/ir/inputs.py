"""Example inputs, and copies of them: a model may write into the tensors that a caller gives."""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graphcomp.ir.module import leaf_names
from graphcomp.torch_compat import pytree, tree_flatten_spec

T = TypeVar("T")

IMMUTABLE = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, types.FunctionType)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Arguments of one call of a captured model.

    Attributes:
        args, kwargs: positional and keyword arguments.
        spec: nesting of (args, kwargs) that the graph was captured with, the leaves in the order of its placeholders.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    spec: pytree.TreeSpec

    def copies(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return copies of the arguments: a run may write into them."""
        return copies((self.args, self.kwargs))

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
        """Return the inputs of another call of the same graph."""
        return replace(self, args=tuple(args), kwargs=dict(kwargs))

    def flat(self) -> list[Any]:
        """Return the leaves in the order of the placeholders, keywords in any order."""
        leaves: list[Any] = tree_flatten_spec((self.args, self.kwargs), self.spec)
        return leaves

    def to(self, device: torch.device) -> Inputs:
        """Return the same inputs with their tensors on `device`."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)


def copies(values: T) -> T:
    """Return `values` with every tensor cloned, without history; one tensor in two places stays one tensor.

    Objects that pytree does not know, such as a cache of past keys and values, are copied deeply where that works.
    """
    seen: dict[int, Any] = {}

    def copied(leaf: Any) -> Any:
        if id(leaf) not in seen:
            seen[id(leaf)] = _copy(leaf)
        return seen[id(leaf)]

    result: T = pytree.tree_map(copied, values)
    return result


def apart(values: T) -> T:
    """Return `values` with a tensor of its own in each place: two places captured as one input stay one."""
    seen: set[int] = set()

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or id(leaf) not in seen:
            seen.add(id(leaf))
            return leaf
        return _copy(leaf)

    result: T = pytree.tree_map(own, values)
    return result


def updates(before: Any, after: Any) -> dict[str, Tensor]:
    """Return what a run made of its inputs: "input <name>" -> tensor, of those with other values than in `before`."""
    old = named_tensors(before)
    return {f"input {name}": new for name, new in named_tensors(after).items() if not _same(new, old.get(name))}


def named_tensors(values: Any) -> dict[str, Tensor]:
    """Return the tensors of nested values by their names; see `leaf_names`."""
    leaves, spec = pytree.tree_flatten(values)
    return {name: leaf for name, leaf in zip(leaf_names(spec), leaves, strict=True) if isinstance(leaf, Tensor)}


def _same(new: Tensor, old: Tensor | None) -> bool:
    if old is None:  # the run put it into a list or dict of the caller's
        return False
    if new.is_meta or new.layout is not torch.strided:
        return True
    old = old.to(new.dtype)
    return new.shape == old.shape and bool(((new == old) | ((new != new) & (old != old))).all())


def _copy(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        clone = leaf.detach().clone()
        return clone.requires_grad_() if leaf.requires_grad else clone
    if isinstance(leaf, (*IMMUTABLE, nn.Module)):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # a class may refuse to be copied in any way: a lock, an open file, a computed tensor
        return leaf


def sample_count(batch: Sequence[Any]) -> int:
    """Return the number of samples in flat inputs: the length of the first tensor with dims; 1 without any."""
    return next((len(t) for t in batch if isinstance(t, Tensor) and t.dim()), 1)


def first_samples(batches: Sequence[Sequence[Any]], most: int) -> list[Sequence[Any]]:
    """Return the first batches of flat inputs, the last of which reaches `most` samples; all where none does."""
    found: list[Sequence[Any]] = []
    count = 0
    for batch in batches:
        found.append(batch)
        count += sample_count(batch)
        if count >= most:
            break
    return found
