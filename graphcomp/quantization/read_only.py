"""Floats that stand for a part of a weight of integers: read as any tensor, and never written into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from graphcomp.errors import PlanError
from graphcomp.torch_compat import pytree, schema_of, storage_key, version_of, without_torch_function


class ReadOnlyFloats(Tensor):
    """Floats made of the codes of a weight where torch would give a view: what is written there would be forgotten.

    Views of it are such floats as well; results with memory of their own are plain tensors. A write raises PlanError.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        found: Tensor = memo.setdefault(id(self), _plain(self).clone())
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given: list[tuple[Tensor, int]] = []

        def own(tensor: ReadOnlyFloats) -> Tensor:
            found = _plain(tensor)
            given.append((found, version_of(found)))
            return found

        plain = pytree.tree_map_only(ReadOnlyFloats, own, (args, dict(kwargs or {})))
        found = func(*plain[0], **plain[1])
        if any(version_of(tensor) != before for tensor, before in given):
            raise cannot_be_written(getattr(func, "__name__", func))
        memories = {storage_key(tensor.untyped_storage()) for tensor, _ in given}
        return pytree.tree_map_only(
            Tensor, lambda t: read_only(t) if storage_key(t.untyped_storage()) in memories else t, found
        )


def read_only(floats: Tensor) -> Tensor:
    """Return the floats as a tensor that refuses to be written into."""
    return floats if isinstance(floats, ReadOnlyFloats) else floats.as_subclass(ReadOnlyFloats)


def _plain(tensor: Tensor) -> Tensor:
    with without_torch_function():
        return tensor.as_subclass(Tensor)


def gives_views(func: Any) -> bool:
    """Return whether an op gives views of its operand, by its schema."""
    results = schema_of(func).returns
    return any(result.alias_info is not None and not result.alias_info.is_write for result in results)


def cannot_be_written(what: object) -> PlanError:
    """Return the error of a write into a weight of integers."""
    return PlanError(
        f"{what} writes into a weight of integers",
        why="codes and scales stand for the floats, and no op changes them",
        fix="weight.dequantize() makes floats; graphcomp.compress(model, …) makes integers of floats again",
    )
