"""Ranges chosen by the results of the ops that read a tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphcomp.capture.capture import capture
from graphcomp.quantization.calibrate import OutputObserver, make_observer
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.ptq import PostTraining, quantize
from graphcomp.quantization.ranges import choose_ranges
from graphcomp.quantization.spec import QuantConfig, QuantSpec


class Heavy(nn.Module):
    """Two readers of one tensor whose first channel has rare, large values; `weight` says how much those matter."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4, bias=False)
        with torch.no_grad():
            self.fc.weight[:, 0] = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def data() -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    x[::8, 0] *= 12
    return x


def reach(model: nn.Module, observer: str) -> float:
    """The largest level of what the layer reads, at 3 bits."""
    x = data()
    spec = QuantSpec(3, symmetric=True, observer=observer)  # type: ignore[arg-type]
    config = QuantConfig(weights=None, activations=spec, first_and_last_bits=3)
    found = quantize(capture(model.eval(), (x,)), [[x]], PostTraining(config))
    ((_, quantizer),) = quantizer_nodes(found.fake)
    return float(quantizer(torch.tensor(1e6)).detach())


def test_what_the_reader_makes_of_a_tensor_decides() -> None:
    """Where the large channel is all that matters, all of its range; where nothing reads the channel, a clip."""
    wide, narrow = (reach(Heavy(weight), "output") for weight in (30.0, 0.0))
    assert wide == reach(Heavy(30.0), "minmax")
    assert narrow < 0.7 * wide


def test_candidates_are_the_other_observers_ranges() -> None:
    x = data()
    spec = QuantSpec(4, symmetric=False, observer="output")
    observer = make_observer(spec)
    assert isinstance(observer, OutputObserver)
    observer.observe(x[:32])
    observer.observe(x[32:])
    expected = []
    for name in ("minmax", "percentile", "mse", "entropy"):
        other = make_observer(QuantSpec(4, symmetric=False, observer=name))  # type: ignore[arg-type]
        other.observe(x[:32])
        other.observe(x[32:])
        expected.append(other.range())
    for found, wanted in zip(observer.candidates(), expected, strict=True):
        torch.testing.assert_close(torch.stack(found), torch.stack(wanted))


def test_nothing_else_of_the_graph_changes() -> None:
    x = data()
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).eval()
    found = quantize(capture(model, (x,)), [[x]], PostTraining(QuantConfig(activations=QuantSpec(4, symmetric=False))))
    chosen = [q for node, q in quantizer_nodes(found.fake) if q.spec.bits < 8 or not q.spec.symmetric]
    assert chosen
    before = {name: t.clone() for name, t in found.fake.state_dict().items()}
    ends = torch.tensor(-1.0), torch.tensor(2.0)
    choose_ranges(found.fake, {chosen[0]: [ends, (ends[0] * 3, ends[1] * 3)]}, [[x]])
    own = {f"{name}.{p}" for name, m in found.fake.named_modules() if m is chosen[0] for p in ("scale", "zero_point")}
    after = found.fake.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} <= own
    assert all(q.enabled for _, q in quantizer_nodes(found.fake))
