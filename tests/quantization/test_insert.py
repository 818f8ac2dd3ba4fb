"""Graphs with quantizers in them, as they are trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphcomp.capture.capture import capture
from graphcomp.quantization.insert import InsertQuantizers, quantizer_nodes
from graphcomp.quantization.placement import place
from graphcomp.quantization.ptq import calibrate_activations, calibrate_weights
from graphcomp.quantization.spec import QuantConfig, QuantSpec
from tests.marks import in_ci

from .models import residual


@pytest.mark.parametrize("spec", in_ci(QuantSpec(6, kind="geta"), QuantSpec(6)), ids=["geta", "uniform"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_a_graph_in_training_compiles_without_breaks(spec: QuantSpec) -> None:
    """The compiled step has the loss and the gradients of the eager one, those of the quantizers included."""
    model, x = residual()
    plain = capture(model, (x,)).module
    fake = InsertQuantizers(place(plain, QuantConfig(spec, spec)).sites)(plain)
    calibrate_activations(fake, [(x,)])
    calibrate_weights(fake)
    fake.train()
    learned = [p for _, quantizer in quantizer_nodes(fake) for p in quantizer.parameters() if p.requires_grad]
    found = []
    for run in (fake, torch.compile(fake, backend="aot_eager", fullgraph=True)):
        fake.zero_grad()
        loss = nn.functional.cross_entropy(run(x), torch.arange(len(x)) % 5)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in fake.parameters() if p.requires_grad)])
    assert sum(bool(p.grad.abs() > 0) for p in learned) > len(learned) / 2
    torch.testing.assert_close(found[1], found[0])
