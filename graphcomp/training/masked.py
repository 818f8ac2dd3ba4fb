"""From a session to the module that is trained: the graph with quantizers, and a mask per group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import fx, nn

from graphcomp.coupling.groups import ChannelGroup
from graphcomp.errors import PlanError
from graphcomp.ir.graph import bind, clone, fetch, module_path, value
from graphcomp.ir.module import trains
from graphcomp.ir.passes import GraphPass, Pipeline
from graphcomp.ir.rewrite import before, redirect
from graphcomp.pruning.mask import PREFIX, InsertMasks
from graphcomp.training.prepared import PROGRESS, SESSION, MoreThanOneValue, Prepared
from graphcomp.training.session import Session


class Part(nn.Module):
    """A submodule of a prepared module: it holds tensors, and the graph of the whole does the rest."""

    def forward(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refused.

        Raises:
            PlanError: always.
        """
        raise PlanError(
            "a submodule of a prepared module is called on its own",
            why="what was prepared is the forward of the whole model",
            fix='call the prepared module; or prepare(model, example_inputs, scope="path.of.the.submodule")',
        )


def with_masks(session: Session) -> Prepared:
    """The module of a session, in eval mode: its quantized graph with a mask per group."""
    masked = Pipeline("masks to train", (
        InsertMasks(session.quantized.coupling, session.groups, held=True),
        GuardBatchNorms(),
    ), values=False)(session.quantized.captured)  # fmt: skip
    ready = _as_prepared(masked.module, type(session.plan.model).__name__, session.groups)
    ready.meta[SESSION] = session
    ready.save_as_the_model()
    return ready


@dataclass(frozen=True)
class GuardBatchNorms(GraphPass):
    """Check in front of each batch norm that training gives it more than one value per channel."""

    name: ClassVar[str] = "guard batch norms"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """Return a new module that shares the tensors of `module`."""
        found, _ = clone(module)
        for node in found.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default):
            if trains(node):
                name, read = f"graphcomp_check_{node.name}", bind(node)["input"]
                found.add_submodule(name, MoreThanOneValue(module_path(node)))
                redirect([node], read, before(node).submodule(name, read, val=value(read)))
        return found


def _as_prepared(masked: fx.GraphModule, name: str, groups: Sequence[ChannelGroup]) -> Prepared:
    masks = {f"{PREFIX}{k}": masked.get_buffer(f"{PREFIX}{k}") for k in range(len(groups))}
    for node in masked.graph.find_nodes(op="get_attr"):
        if str(node.target) in masks and not node.users:
            masked.graph.erase_node(node)
    held = {
        str(n.target): fetch(masked, str(n.target)) for n in masked.graph.nodes if n.op in ("get_attr", "call_module")
    }
    ready = Prepared(held, masked.graph, class_name=name)
    for mask_name, mask in masks.items():
        if mask_name not in held:
            ready.register_buffer(mask_name, mask)
    device = next((tensor.device for tensor in masked.parameters()), None)
    for module in ready.modules():
        if type(module) is nn.Module:
            module.__class__ = Part
    ready.register_buffer(PROGRESS, torch.zeros(2, device=device), persistent=False)
    ready.eval()
    return ready
