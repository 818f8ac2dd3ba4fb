"""A tensor that stands in a file and is read at each use: `StreamedTensor`.

A model of such tensors is a model like any other: it runs, it is captured, scored, sliced, verified and saved, and at
most the operands of one op are in memory at a time. Ops that only move elements (a selection, a concatenation, another
dtype) are written down and carried out when something reads the result, so that a slice of a tensor in a file is a
tensor in a file, too.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import InputError
from graphcomp.ir.graph import all_tensors, assign
from graphcomp.ir.module_copy import module_copy
from graphcomp.torch_compat import make_wrapper, pytree, storage_key, version_of, without_torch_function

aten = torch.ops.aten

Function: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file.

    Attributes:
        file: of the tensor.
        name: of the tensor in the file.
    """

    file: Path
    name: str

    def read(self) -> Tensor:
        """Return the tensor; its memory is the file's, mapped as long as the tensor lives."""
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as opened:
            found: Tensor = opened.get_tensor(self.name)
        return found


@dataclass(frozen=True, eq=False)
class Applied:
    """An op that moves elements, written down.

    Attributes:
        function: of torch.
        args, kwargs: with streamed tensors among them.
        which: of the results, where the op returns several; None: the op returns one.
    """

    function: Function
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    which: int | None = None

    def read(self) -> Tensor:
        """Carry out the op, and the ops before."""
        args, kwargs = read_all((self.args, dict(self.kwargs)))
        found = self.function(*args, **kwargs)
        return found if self.which is None else found[self.which]  # type: ignore[no-any-return]


_ADDRESSES = itertools.count(1)
_APART = 2**44
"""Bytes between two memories, more than any tensor has."""


@dataclass(frozen=True)
class Memory:
    """Memory that a streamed tensor would have: what savers ask of a storage of torch.

    Attributes:
        address: of the first byte.
        size: bytes.
    """

    address: int
    size: int

    @staticmethod
    def of(size: int) -> Memory:
        """Return memory that no other tensor has."""
        return Memory(next(_ADDRESSES) * _APART, size)

    @property
    def _cdata(self) -> int:
        return self.address

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def data_ptr(self) -> int:
        """Return the address of the first byte."""
        return self.address

    def nbytes(self) -> int:
        """Return the number of bytes."""
        return self.size


@dataclass(eq=False)
class _Held:
    """What tensors of the same elements share.

    Attributes:
        source: where the elements come from.
        written: whether an op may write into the elements: not into those of the folder, nor into a part of others.
    """

    source: Stored | Applied
    written: bool = False


class StreamedTensor(Tensor):
    """A tensor on the CPU without memory of its own. No gradient reaches it.

    Args:
        held: what tensors of the same elements share.
        like: on the meta device, with the tensor's shape, strides and dtype.
        place: the address and the memory; None: of memory that no other tensor has.

    Attributes:
        address: where the elements would begin in memory. Tensors of the same elements have the same, by which savers
            know parameters that are tied.
        memory: that the elements would stand in; a view has the memory of the tensor that it is a view of.
    """

    held: _Held
    address: int
    memory: Memory

    def __new__(cls, held: _Held, like: Tensor, place: tuple[int, Memory] | None = None) -> StreamedTensor:
        """Return a tensor in the shape of `like`."""
        found: StreamedTensor = make_wrapper(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu"), requires_grad=False
        )
        return found

    def __init__(self, held: _Held, like: Tensor, place: tuple[int, Memory] | None = None) -> None:
        self.held = held
        if place is None:
            memory = Memory.of(like.untyped_storage().nbytes())
            place = memory.address, memory
        self.address, self.memory = place

    def read(self) -> Tensor:
        """Return the elements as a plain tensor without gradient."""
        with torch.no_grad():
            found = self.held.source.read()
        return found.detach() if found.requires_grad else found

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch passes its own keywords
        """Return shape and dtype; the elements stand in a file."""
        return f"StreamedTensor({tuple(self.shape)}, {str(self.dtype).removeprefix('torch.')})"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        found: tuple[Any, ...] = self.read().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedTensor:
        if id(self) not in memo:
            copied = StreamedTensor(_Held(self.held.source, written=True), _like(self))
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        found: StreamedTensor = memo[id(self)]
        return found

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTS or (getattr(func, "__name__", "") == "__get__" and func != DATA):
            with without_torch_function():
                return func(*args, **kwargs)
        if func == SET_DATA and isinstance(args[1], StreamedTensor):
            with without_torch_function():
                func(*args)
            args[0].held, args[0].address = args[1].held, args[1].address
            return None
        own = MOVES.get(func)
        if own is not None:
            found = own(func, args, kwargs)
            if found is not NotImplemented:
                return found
        return _on_read(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares no classmethod, and calls one
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (aten.detach.default, aten.alias.default):
            return _shared(args[0])
        return _on_read(func, args, kwargs or {})


def streamed(file: Path, name: str, shape: Sequence[int], dtype: torch.dtype) -> StreamedTensor:
    """Return the tensor `name` of a safetensors file, which is not read yet."""
    return StreamedTensor(_Held(Stored(file, name)), torch.empty(tuple(shape), dtype=dtype, device="meta"))


_SCRATCH: ContextVar[str | None] = ContextVar("folder of tensors that were computed", default=None)


@contextmanager
def scratch(folder: Path) -> Iterator[None]:
    """Within, `put_aside` writes into the folder; else where the system keeps temporary files."""
    token = _SCRATCH.set(str(folder))
    try:
        yield
    finally:
        _SCRATCH.reset(token)


def put_aside(tensor: Tensor) -> StreamedTensor:
    """Write a tensor to a file, and return the tensor that stands there. The file goes with the last that reads it."""
    from safetensors.torch import save_file

    number, path = tempfile.mkstemp(suffix=".safetensors", prefix="graphcomp-", dir=_SCRATCH.get())
    os.close(number)
    file = Path(path)
    save_file({"tensor": tensor.detach().contiguous()}, file)
    source = Stored(file, "tensor")
    weakref.finalize(source, file.unlink, missing_ok=True)
    return StreamedTensor(_Held(source), _like(tensor))


def in_memory(tensor: Tensor) -> Tensor:
    """Return a plain tensor of the elements; a tensor that is one is returned as it is."""
    return tensor.read() if isinstance(tensor, StreamedTensor) else tensor


def as_before(tensor: Tensor, old: Tensor) -> Tensor:
    """Return a new value of `old` that stands where `old` stood: in a file, or in memory."""
    return put_aside(tensor) if isinstance(old, StreamedTensor) and not isinstance(tensor, StreamedTensor) else tensor


def is_streamed(model: nn.Module) -> bool:
    """Return whether some parameter or buffer of a model stands in a file."""
    tensors = (*model.parameters(), *model.buffers())
    return any(isinstance(tensor, StreamedTensor) for tensor in tensors)


def read_all(values: Any) -> Any:
    """Return nested values with the elements of each streamed tensor in its place; a tensor met twice is read once."""
    read: dict[int, Tensor] = {}

    def own(tensor: StreamedTensor) -> Tensor:
        if id(tensor) not in read:
            read[id(tensor)] = tensor.read()
        return read[id(tensor)]

    return pytree.tree_map_only(StreamedTensor, own, values)


def with_plain_tensors(model: nn.Module) -> tuple[nn.Module, dict[int, StreamedTensor]]:
    """Return a copy of a model for torch.export, which takes plain tensors alone, and the way back.

    Their memory is never touched, and the system gives no page to what nothing reads: elements are not set, and export
    looks at shapes alone.

    Returns:
        The copy, and id of a plain tensor of the copy -> the streamed tensor.
    """
    streamed_of: dict[int, StreamedTensor] = {}

    def plain(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, StreamedTensor):
            return tensor
        found = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype)
        found = nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found
        streamed_of[id(found)] = tensor
        return found

    return module_copy(model, plain), streamed_of


def put_back(module: fx.GraphModule, streamed_of: Mapping[int, StreamedTensor]) -> fx.GraphModule:
    """Put the streamed tensors in the place of the plain ones of `with_plain_tensors`; return the graph module."""
    for name, tensor in list(all_tensors(module)) if streamed_of else ():
        assign(module, name, streamed_of.get(id(tensor), tensor))
    return module


# ------------------------------------------------------------------------------------------------ running
def _on_read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function on elements.

    Raises:
        InputError: the function wrote into a tensor that stands in a file.
    """
    read: list[tuple[Tensor, int]] = []

    streams: dict[int, StreamedTensor] = {}

    def own(tensor: StreamedTensor) -> Tensor:
        found = tensor.read()
        read.append((found, version_of(found)))
        streams[storage_key(found.untyped_storage())] = tensor
        return found

    plain_args, plain_kwargs = pytree.tree_map_only(StreamedTensor, own, (args, kwargs))
    with _read_again(streams) if torch.is_grad_enabled() else nullcontext():
        found = func(*plain_args, **plain_kwargs)
    if any(version_of(tensor) != before for tensor, before in read):
        raise InputError(
            f"{getattr(func, '__name__', func)} writes into a weight that is read from its file at each use",
            why="nothing written there would be seen by the next op",
            fix="load the model into memory, and call graphcomp.compress",
        )
    return found


@contextmanager
def _read_again(streams: Mapping[int, StreamedTensor]) -> Iterator[None]:
    """Within, autograd keeps no weight for the backward pass, which reads the weight once more.

    Args:
        streams: key of the storage of a weight that was read -> the weight.
    """

    def pack(tensor: Tensor) -> Any:
        stream = streams.get(storage_key(tensor.untyped_storage())) if tensor.layout is torch.strided else None
        if stream is None:
            return tensor
        return stream, tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.dtype

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        stream, size, stride, offset, dtype = packed
        found = torch.as_strided(stream.read(), size, stride, offset)
        assert found.dtype == dtype
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _shared(tensor: StreamedTensor) -> StreamedTensor:
    """Return another tensor of the same elements."""
    return StreamedTensor(tensor.held, _like(tensor), (tensor.address, tensor.memory))


def _like(tensor: Tensor) -> Tensor:
    with torch.no_grad(), without_torch_function():
        return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")


# ------------------------------------------------------------------------------------------------ memory
def _storage(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].memory


def _data_ptr(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].address


# ------------------------------------------------------------------------------------------------ moving
def _share(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _shared(args[0])


def _same(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]


def _move(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Write the op down; NotImplemented where shapes depend on elements."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(t.dtype is torch.bool or t.is_meta for t in tensors) or kwargs.get("out") is not None:
        return NotImplemented
    with torch.no_grad():
        like_args, like_kwargs = pytree.tree_map_only(Tensor, _like, (args, kwargs))
        found = func(*like_args, **like_kwargs)
    memories = {
        storage_key(like.untyped_storage()): tensor
        for tensor, like in zip(
            tensors,
            (leaf for leaf in pytree.tree_leaves((like_args, like_kwargs)) if isinstance(leaf, Tensor)),
            strict=True,
        )
    }
    args, kwargs = pytree.tree_map_only(StreamedTensor, _as_now, (args, kwargs))

    def result(like: Tensor, which: int | None) -> StreamedTensor:
        seen = memories.get(storage_key(like.untyped_storage()))  # whose view the result is
        held = _Held(Applied(func, args, kwargs, which), written=seen is None)
        if not isinstance(seen, StreamedTensor):
            return StreamedTensor(held, like)
        return StreamedTensor(
            held, like, (seen.address + int(like.storage_offset()) * like.element_size(), seen.memory)
        )

    if isinstance(found, Tensor):
        return result(found, None)
    return type(found)(result(like, k) for k, like in enumerate(found))


def _as_now(tensor: StreamedTensor) -> StreamedTensor:
    """Return a tensor of the elements as they are, whatever is written into `tensor` afterwards."""
    return StreamedTensor(_Held(tensor.held.source), _like(tensor), (tensor.address, tensor.memory))


def _fill(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Write down that indices of a dim get one value; NotImplemented for what is not written into."""
    tensor, *rest = args
    if not tensor.held.written:
        return NotImplemented
    tensor.held.source = Applied(Tensor.index_fill, (_as_now(tensor), *rest), kwargs)
    return tensor


def _to(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Write another dtype down; NotImplemented for another device."""
    tensor, *given = args
    given += [value for name, value in kwargs.items() if name in ("dtype", "device", "other")]
    devices = [value for value in given if isinstance(value, (str, torch.device))]
    devices += [value.device for value in given if isinstance(value, Tensor)]
    if any(torch.device(device).type != "cpu" for device in devices):
        return NotImplemented
    dtypes = [value for value in given if isinstance(value, torch.dtype)]
    dtypes += [value.dtype for value in given if isinstance(value, Tensor)]
    return _in_dtype(tensor, dtypes[-1] if dtypes else tensor.dtype)


def _in_dtype(tensor: StreamedTensor, dtype: torch.dtype) -> StreamedTensor:
    if dtype == tensor.dtype:
        return tensor
    return StreamedTensor(
        _Held(Applied(Tensor.to, (_as_now(tensor), dtype), {}), written=True), _like(tensor).to(dtype)
    )


def _named(dtype: torch.dtype) -> Callable[[Function, tuple[Any, ...], dict[str, Any]], Any]:
    return lambda func, args, kwargs: _in_dtype(args[0], dtype)


_DATA: Any = Tensor.data  # the descriptor of the class
DATA: Any = _DATA.__get__
"""What reads `tensor.data`."""

SET_DATA: Any = _DATA.__set__
"""What writes `tensor.data`."""

FACTS: frozenset[Any] = frozenset({
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.element_size,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.storage_offset,
    Tensor.requires_grad_, Tensor.__len__, Tensor.get_device, Tensor.__hash__, torch.is_floating_point,
    torch.is_complex, torch.numel, Tensor.is_conj, Tensor.is_neg, torch.is_conj, torch.is_neg,
    Tensor.register_hook, Tensor.is_set_to, Tensor.is_pinned, Tensor.is_signed, Tensor.is_shared,
})  # fmt: skip
"""Functions that read no elements."""

MOVES: Mapping[Any, Callable[[Function, tuple[Any, ...], dict[str, Any]], Any]] = {
    DATA: _share,
    Tensor.detach: _share,
    torch.detach: _share,
    Tensor.cpu: _same,
    Tensor.index_fill_: _fill,
    Tensor.untyped_storage: _storage,
    Tensor.data_ptr: _data_ptr,
    Tensor.to: _to,
    Tensor.float: _named(torch.float32),
    Tensor.double: _named(torch.float64),
    Tensor.half: _named(torch.float16),
    Tensor.bfloat16: _named(torch.bfloat16),
    **dict.fromkeys((
        Tensor.clone, torch.clone, Tensor.index_select, torch.index_select, Tensor.__getitem__, Tensor.narrow,
        torch.narrow, torch.cat, torch.concat, torch.stack, Tensor.chunk, torch.chunk, Tensor.split, torch.split,
        Tensor.unbind, torch.unbind, Tensor.transpose, torch.transpose, Tensor.t, torch.t, Tensor.permute,
        torch.permute, Tensor.movedim, torch.movedim, Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze,
        torch.squeeze, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.view,
    ), _move),
}  # fmt: skip
"""Function that moves elements -> how the function is written down. `contiguous` is none: savers call it last."""
