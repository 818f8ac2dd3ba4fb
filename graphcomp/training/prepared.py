"""The module that is trained: the captured graph with fake-quant and mask nodes in place."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType, MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx.graph import PythonCode

from graphcomp.cost import FLOAT_BITS
from graphcomp.coupling.groups import Kept
from graphcomp.errors import CheckpointError, InputError, PlanError
from graphcomp.ir.graph import all_tensors
from graphcomp.ir.module import CapturedModule
from graphcomp.pruning.mask import PREFIX, hold_masks
from graphcomp.pruning.slice import check_groups, check_kept
from graphcomp.quantization.placed import in_floats
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.recompute import made_again
from graphcomp.quantization.sites import Site
from graphcomp.torch_compat import inside_wrapper, non_persistent
from graphcomp.training.session import Session, operands

SESSION = "graphcomp_session"
PROGRESS = "graphcomp_progress"
"""A buffer (2,): how many steps of a schedule are missing until bits and units are settled, and how many settle them. A
buffer, as averages of a module (`AveragedModel`) follow those; the first is above 0 where one reaches back too far."""

ROUNDING = 1e-3
"""How far from 0 or 1 a mask may be: what an average of many ones comes to."""


class MoreThanOneValue(nn.Module):
    """Passes on what a batch norm reads; in training only if there are two values per channel, of which one has no
    variance. The op alone makes the running variance NaN; this is the check that torch's function has around it."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, …) -> itself.

        Raises:
            InputError: one value per channel in training.
        """
        if self.training and x.numel() == x.shape[1]:
            raise InputError(
                "a batch norm needs more than one value per channel in training",
                at=f"'{self.norm}', which reads a tensor of shape {tuple(x.shape)}",
                fix="drop_last=True in the DataLoader, if the last batch holds one example",
            )
        return x


class Prepared(CapturedModule):
    """A model to train, called like the original.

    Parameters and buffers have the original's names; those of the quantizers stand under `graphcomp_quantizers`, and
    one 0/1 mask per group under `graphcomp_mask_*`. Attributes that it lacks itself (`config`, …) are the original's;
    its methods, too, but they are called on this module. Its submodules hold tensors alone: hooks on them are not
    called, and `.eval()` of one of them changes nothing; `freeze_norms` puts batch norms in eval mode.

    Attributes:
        recompute: compute quantized weights and activations again in the backward pass instead of keeping them for it.
        remarks: what was asked of the training and not done, or done otherwise, for the report.
        elements: parameter -> bool mask of its shape, False where an element was pruned; see `keep_elements`.
        tap: runs in place of the graph's code, see `hearing`.
    """

    recompute: bool = False
    remarks: tuple[str, ...] = ()
    elements: Mapping[str, Tensor] = MappingProxyType({})
    tap: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        if not self.recompute:
            return super().__call__(*args, **kwargs)
        with made_again():
            return super().__call__(*args, **kwargs)

    def recompile(self) -> PythonCode:
        """Write the graph as code, behind a forward that stays the same: accelerate keeps the function of a forward for
        mixed precision, and the mode may switch after that."""
        code = super().recompile()
        kind: Any = type(self)
        generated = kind.forward

        def forward(self: Prepared, *args: Any, **kwargs: Any) -> Any:
            run = self.generated if self.tap is None else self.tap
            return run(*args, **kwargs)

        stable: Any = forward
        stable.__signature__ = inspect.signature(generated)
        kind.generated, kind.forward = generated, stable
        return code

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            session = vars(self).get("meta", {}).get(SESSION)
            if session is None or name.startswith("__"):
                raise
            found = getattr(session.plan.model, name)
            of_the_model = isinstance(found, MethodType) and found.__self__ is session.plan.model
            # a method that calls the model is to call this module
            return MethodType(found.__func__, self) if of_the_model else found

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepared:
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, Prepared)
        copied.meta[SESSION] = self.session.bind(copied)
        copied.save_as_the_model()
        copied.recompute, copied.remarks, copied.elements = self.recompute, self.remarks, dict(self.elements)
        return copied

    def bind(self, tensors: Mapping[str, Tensor]) -> Prepared:
        """Return a copy that holds `tensors` in place of the tensors of their names, and copies of all others.

        The graph is copied, too, as `.train()` and `.eval()` write into it.
        """
        return copy.deepcopy(self, {id(own): tensors[name] for name, own in all_tensors(self) if name in tensors})

    def train(self, mode: bool = True) -> Prepared:
        """Switch the mode, as of the model. Frozen norms stay in eval mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, MoreThanOneValue):
                module.training = mode and not self.norms_frozen
        return self

    def freeze_norms(self, frozen: bool = True) -> Prepared:
        """Keep the running statistics of all batch norms as they are, and normalise by them, in training mode too.

        The affine parameters of the norms go on learning: `requires_grad_(False)` holds these. Norms that were in eval
        mode inside of a model in training mode when `prepare` was called are frozen from the outset, and stay so.

        Args:
            frozen: False lets the statistics move again.
        """
        self.norms_frozen = frozen
        return self.train(self.training)

    def __reduce__(self) -> NoReturn:
        raise CheckpointError(
            "a prepared module cannot be pickled",
            why="it holds the plan that it was made by",
            fix="save ready.state_dict(), and load it into one that is prepared anew; finalize(ready).save(folder) "
            "keeps the result",
        )

    def save_as_the_model(self) -> None:
        """Leave out of `state_dict` the buffers that the model leaves out of its own."""
        saved = self.session.plan.model.state_dict().keys()
        for name, _ in self.named_buffers():
            if (name not in saved and not name.startswith("graphcomp_")) or name == PROGRESS:
                path, _, leaf = name.rpartition(".")
                non_persistent(self.get_submodule(path)).add(leaf)

    @property
    def session(self) -> Session:
        """How it was prepared."""
        found: Session = self.meta[SESSION]
        return found

    def kept(self) -> Kept:
        """The units of each group that its mask leaves: (k,) int64 on the CPU.

        Raises:
            PlanError: a mask is neither 0 nor 1.
        """
        masks = {group: self.get_buffer(f"{PREFIX}{k}").detach().cpu() for k, group in enumerate(self.session.groups)}
        for group, mask in masks.items():
            strange = mask[~((mask - mask.round()).abs() <= ROUNDING)]
            if len(strange):
                raise PlanError(
                    f"the mask of '{group.name}' holds {strange[0].item():.3g}, which is neither 0 nor 1",
                    why="an average (EMA) of the whole state_dict that goes back to before units were gone",
                    fix="begin the average in the cool-down, when optimizer.settled",
                )
        return {group: mask.round().nonzero().flatten() for group, mask in masks.items()}

    def keep(self, kept: Kept) -> None:
        """Set the masks, and all elements of masked units to zero: a unit that is gone is as if it never existed.

        Raises:
            PlanError: a group is none of `session.groups`, or its units are no ascending indices.
        """
        check_kept(kept)
        check_groups("kept", self.session.groups, list(kept))
        hold_masks(self, self.session.groups, kept, self.session.computed)

    @torch.no_grad()
    def keep_elements(self, elements: Mapping[str, Tensor]) -> None:
        """Set pruned elements of parameters to zero. Optimizers of graphcomp and `finalize` hold these at zero.

        Args:
            elements: parameter -> mask of its shape, 0 (False) where an element is pruned. Masks given before stay.

        Raises:
            PlanError: a name is no parameter, or a mask has another shape.
        """
        parameters = dict(self.named_parameters())
        for name, mask in elements.items():
            shape = tuple(parameters[name].shape) if name in parameters else None
            if shape != tuple(mask.shape):
                raise PlanError(
                    f"the mask of '{name}' must have the shape of a parameter, got {tuple(mask.shape)} for {shape}",
                    fix="elements={name: parameter != 0}",
                )
        found = {name: mask.to(parameters[name].device).bool() for name, mask in elements.items()}
        self.elements = {**self.elements, **found}
        self.hold_elements()

    @torch.no_grad()
    def hold_elements(self) -> None:
        """Set pruned elements to zero again."""
        for name, mask in self.elements.items():
            parameter = self.get_parameter(name)
            parameter.masked_fill_(~mask.to(parameter.device), 0)

    @contextmanager
    def in_floats(self) -> Iterator[None]:
        """Let quantizers pass on what they read, inside."""
        with in_floats(self):
            yield

    @property
    def progress(self) -> tuple[int, int]:
        """How many steps of a schedule are done, as far as it takes, and how many settle bits and units."""
        missing, settled = (round(count) for count in self.get_buffer(PROGRESS).nan_to_num().tolist())
        return settled - missing, settled

    def set_progress(self, done: int, settled: int) -> None:
        """Say how far a schedule is; waits for no device."""
        buffer = self.get_buffer(PROGRESS)
        buffer[0], buffer[1] = max(settled - done, 0), settled

    def quantizers(self) -> Iterator[tuple[Site, Quantizer]]:
        """Each quantizer with what it stands on."""
        for site in self.session.sites:
            found = self.get_submodule(site.name)
            assert isinstance(found, Quantizer)
            yield site, found

    def bits(self) -> dict[str, tuple[float, float]]:
        """Layer -> bits of its weight, and of what it reads; 32 where it is not quantized."""
        bits = {site.name: float(quantizer.bits.detach()) for site, quantizer in self.quantizers()}
        layers = {site.name: site.layer for site in self.session.sites if site.is_weight}
        found = {layer: (bits[name], float(FLOAT_BITS)) for name, layer in layers.items()}
        for weight, read in operands(self.session).values():
            if weight:
                of_activations = max((bits[name] for name in read), default=float(FLOAT_BITS))
                found[layers[weight]] = bits[weight], of_activations
        return found


def unwrapped(module: nn.Module) -> Prepared:
    """The prepared module inside wrappers such as DistributedDataParallel and torch.compile's.

    Raises:
        PlanError: there is none, or a wrapper has parameters of its own.
    """
    if not isinstance(module, nn.Module):
        raise PlanError(
            f"a {type(module).__name__} is no module",
            why="parameters alone do not say which of them make units",
            fix="give what graphcomp.prepare returned: QASSO(ready, torch.optim.AdamW, …), finalize(ready)",
        )
    inner: Any = module
    while not isinstance(inner, Prepared):
        following = inside_wrapper(inner)
        if following is None:
            raise PlanError(
                f"{type(module).__name__} was not prepared for training",
                why="it has no fake-quant and mask nodes",
                fix="ready = graphcomp.prepare(model, example_inputs, bits=(4, 8))",
            )
        inner = following
    held = {id(p) for p in inner.parameters()}
    others = [name for name, p in module.named_parameters() if id(p) not in held]
    if others:
        raise PlanError(
            f"{type(module).__name__} has parameters outside of the prepared module in it",
            at=", ".join(others)[:300],
            why="they would be left out in silence",
            fix="give the prepared module, QASSO(model.module, …), and the rest by optimizer.add_param_group",
        )
    return inner
