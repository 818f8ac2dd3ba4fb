"""The model around a prepared module: what is called and trained, and in whose place the prepared module stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphcomp.ir.graph import replace_module
from graphcomp.torch_compat import BatchNormBase
from graphcomp.training.prepared import Prepared


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; outside, each submodule is in the mode that it was in."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode
        for each, mode in modes:
            if isinstance(each, Prepared):
                each.train(mode)


@dataclass(eq=False)
class Whole:
    """The model whose output the loss is of: the prepared one, or one in which the prepared one stands.

    All its parameters are trained, those outside of the prepared module by the same optimizer.

    Attributes:
        module: what is called, and trained.
        part: the prepared module, which is `module` or stands in it.
        original: whose forward tells the names of positional inputs.
        args, kwargs: example inputs, whose form batches have.
    """

    module: nn.Module
    part: Prepared
    original: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @staticmethod
    def of(ready: Prepared) -> Whole:
        """The prepared module, which is all there is."""
        captured = ready.session.plan.captured
        return Whole(ready, ready, captured.original, captured.inputs.args, captured.inputs.kwargs)

    def hold(self, part: Prepared) -> None:
        """Let `part` stand in the place of the prepared module: what that was shrunk to, or that itself again."""
        self.module = replace_module(self.module, self.part, part)
        self.part = part

    def train(self) -> None:
        """Switch to training mode; what the user put in eval mode inside of a model in training mode stays in it."""
        prepared = [m for m in self.module.modules() if isinstance(m, Prepared)]
        inside = {id(m) for ready in prepared for m in ready.modules()}  # its graph knows which ops follow the mode
        held = [m for m in self.module.modules() if not m.training and id(m) not in inside]
        held = held if self.module.training else []
        self.module.train()
        for module in held:
            module.training = False

    def freeze_norms(self) -> None:
        """Keep the running statistics of all batch norms as they are."""
        for module in self.module.modules():
            if isinstance(module, Prepared):
                module.freeze_norms()
            elif isinstance(module, BatchNormBase) and module.track_running_stats:
                module.training = False

    def outside(self) -> tuple[str, list[nn.Parameter]]:
        """Where the prepared module stands, as a prefix of names, and the parameters outside that can be trained."""
        prefix = next(f"{name}." if name else "" for name, m in self.module.named_modules() if m is self.part)
        inside = {id(p) for p in self.part.parameters()}
        return prefix, [p for p in self.module.parameters() if p.requires_grad and id(p) not in inside]


@contextmanager
def standing_in(model: nn.Module, ready: Prepared, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Whole]:
    """Let `ready` stand inside in the place of the part of `model` that was prepared; `model` itself may be the part.

    Outside, the part stands in its place again, and holds the tensors that were trained.

    Args:
        args, kwargs: example inputs of `model`.
    """
    part = ready.session.plan.model
    if part is model:
        yield Whole.of(ready)
        return
    replace_module(model, part, ready)
    try:
        yield Whole(model, ready, model, args, kwargs)
    finally:
        replace_module(model, ready, ready.session.bind(ready).plan.model)
