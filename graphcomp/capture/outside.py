"""What the rest of a model reads of a submodule that is compressed alone."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.capture.record import SKIPPED_FRAMES
from graphcomp.ir.module import canonical_names, tensor_names
from graphcomp.torch_compat import TorchDispatchMode, pytree, storage_key


@dataclass(frozen=True)
class Outside:
    """What the rest of a model reads of one of its submodules, by the names that the submodule has for it.

    Attributes:
        reads: tensor -> where the rest reads it, or as what the rest holds it.
        tied: tensors that the rest holds, too, under names of its own.
        called: submodules whose forward the rest calls itself.
    """

    reads: Mapping[str, str] = field(default_factory=dict)
    tied: frozenset[str] = frozenset()
    called: tuple[str, ...] = ()

    def modules(self) -> list[str]:
        """Return the paths of the modules that are called, or of which tensors are read; no path inside another."""
        owners = (name.rpartition(".")[0] for name in self.reads if name not in self.tied)
        paths = list(dict.fromkeys((*self.called, *(owner for owner in owners if owner))))
        return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def held_outside(model: nn.Module, part: nn.Module) -> dict[str, str]:
    """Return the tensors of `part` that modules of the rest of `model` hold, too: name in the part -> in the rest.

    Modules of the part itself may be registered in the rest under other names: they become what those in the part do.
    """
    names, own = canonical_names(part), set(part.modules())
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, str] = {}
    for name, tensor in tensor_names(model).items():
        if id(tensor) in names and modules[name.rpartition(".")[0]] not in own:
            found.setdefault(names[id(tensor)], name)
    return found


def registered_outside(model: nn.Module, part: nn.Module) -> dict[str, str]:
    """Return the modules inside of `part` that the rest of `model` registers, too: path in the part -> in the rest."""
    inside = [path for path, module in model.named_modules(remove_duplicate=False) if module is part]
    paths = {id(module): path for path, module in part.named_modules() if path}
    found: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in paths and not any(path.startswith(f"{own}.") or not own for own in inside):
            found.setdefault(paths[id(module)], path)
    return found


@contextmanager
def watching(model: nn.Module, part: nn.Module) -> Iterator[Outside]:
    """Watch a run of `model` inside; what is yielded is filled while it runs."""
    held = held_outside(model, part)
    reads = {name: f"the rest of the model holds it as '{other}'" for name, other in held.items()}
    called: list[str] = []
    reader = _Reader(part, reads)
    hooks = [
        part.register_forward_pre_hook(lambda *_: reader.enter(), prepend=True),
        part.register_forward_hook(lambda *_: reader.leave(), always_call=True),
    ]
    for path, module in part.named_modules():
        if module is not part:
            hooks.append(module.register_forward_pre_hook(_caller(path, reader, called)))
    found = Outside(reads, frozenset(held))
    try:
        with reader:
            yield found
    finally:
        for hook in hooks:
            hook.remove()
        outermost = [p for p in called if not any(p.startswith(f"{other}.") for other in called)]
        object.__setattr__(found, "called", tuple(outermost))


def _caller(path: str, reader: _Reader, called: list[str]) -> Any:
    def note(_module: nn.Module, _inputs: Any) -> None:
        if not reader.depth and path not in called:
            called.append(path)

    return note


class _Reader(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which tensors of `part` an op reads while the forward of `part` does not run."""

    def __init__(self, part: nn.Module, reads: dict[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = reads
        self.depth = 0
        self.names = canonical_names(part)
        tensors = tensor_names(part)
        strided = {name: t for name, t in tensors.items() if t.layout is torch.strided and not t.is_meta}
        self.storages = {storage_key(t.untyped_storage()): self.names[id(t)] for t in strided.values()}

    def enter(self) -> None:
        """The forward of the part begins."""
        self.depth += 1

    def leave(self) -> None:
        """The forward of the part ends."""
        self.depth -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.depth:
            for leaf in pytree.tree_leaves((args, kwargs)):
                name = self._name(leaf) if isinstance(leaf, Tensor) else None
                if name is not None and name not in self.reads:
                    self.reads[name] = f"the rest of the model reads it{_place()}"
        return func(*args, **(kwargs or {}))

    def _name(self, tensor: Tensor) -> str | None:
        known = self.names.get(id(tensor))
        if known is None and tensor.layout is torch.strided and not tensor.is_meta:
            known = self.storages.get(storage_key(tensor.untyped_storage()))
        return known


def _place() -> str:
    """Return the innermost line outside of torch and of this package, or ""."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(SKIPPED_FRAMES):
            file = frame.filename.rpartition("/")[2]
            return f" at {file}:{frame.lineno}, in {frame.name} -> {frame.line}"
    return ""
