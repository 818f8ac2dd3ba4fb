"""Losses: what is compared, element by element or as a distribution, stays whole."""

from __future__ import annotations

from typing import Any

import torch

from graphcomp.coupling.axis import Axes
from graphcomp.ops.call import AxesValue, Call
from graphcomp.ops.create import overloads
from graphcomp.ops.facts import in_float
from graphcomp.ops.movement import all_frozen
from graphcomp.ops.registry import op

aten = torch.ops.aten


@op(
    *overloads(
        aten.cross_entropy_loss, aten.nll_loss, aten.nll_loss_nd, aten.nll_loss2d, aten.nll_loss_forward,
        aten.nll_loss2d_forward, aten.mse_loss, aten.l1_loss, aten.smooth_l1_loss, aten.huber_loss, aten.kl_div,
        aten.binary_cross_entropy, aten.binary_cross_entropy_with_logits, aten.ctc_loss, aten._ctc_loss,
        aten.cosine_embedding_loss, aten.triplet_margin_loss, aten.margin_ranking_loss, aten.hinge_embedding_loss,
        aten.multi_margin_loss, aten.multilabel_margin_loss, aten.soft_margin_loss, aten.poisson_nll_loss,
    ),
    facts=in_float("a loss"),
)  # fmt: skip
def loss(call: Call, **arguments: Any) -> list[Axes]:
    """Operands and results are frozen."""
    for axes in arguments.values():
        if isinstance(axes, AxesValue):
            call.freeze(axes, "a loss is taken over it")
    return all_frozen(call)
