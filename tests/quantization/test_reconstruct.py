"""Rounding that is learned block by block: never worse than its start, the same in integers, and named where left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.ir.passes import Pipeline
from graphcomp.ir.program import Program
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.numerics.compare import floating_tensors, squared_error
from graphcomp.quantization import segments
from graphcomp.quantization.pieces import PIECE, pieces_of
from graphcomp.quantization.ptq import FLOATS, SetLayers, quantizing
from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.reconstruct import JUDGES, WHOLE, reconstruct
from graphcomp.quantization.reconstruction import Reconstructed, Reconstruction
from graphcomp.quantization.segments import segments_of
from graphcomp.quantization.setting import Setting
from graphcomp.quantization.soft_rounding import SoftRounding
from graphcomp.quantization.spec import QuantConfig, QuantSpec
from tests.flows.test_low_bits import Inverted, quantized

FEW = Reconstruction(steps=100)


class Attention(nn.Module):
    """One layer of a transformer, with a mask of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = (q @ k.mT / 8**0.5).masked_fill(~mask[:, None], -30.0)
        x = x + self.out(scores.softmax(-1) @ v)
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.head(x)


class Residual(nn.Module):
    """Two residual blocks of two linear layers, and a head."""

    def __init__(self, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, hidden) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(hidden, width) for _ in range(2))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        y: Tensor = self.head(x)
        return y


def weights_of(bits: int, activations: int | None = 8) -> gc.PostTraining:
    acts = None if activations is None else QuantSpec(activations, symmetric=False)
    config = QuantConfig(QuantSpec(bits, granularity="channel"), acts, first_and_last_bits=bits)
    return gc.PostTraining(config, rounding="second_order")


def set_up(model: nn.Module, example: Any, batches: list[list[Tensor]], options: gc.PostTraining) -> Setting:
    """Return the setting of a fake-quant graph whose layers are rounded to second order."""
    passes = quantizing(options, batches)
    before = passes[: [isinstance(p, SetLayers) for p in passes].index(True)]
    program = Pipeline("until layers are set", before)(capture(model, example))
    assert isinstance(program, Program)
    setting = Setting(program.stages[FLOATS].module, program.module, options)
    setting.walk(batches)
    return setting


def state(fake: fx.GraphModule) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in fake.state_dict().items()}


def error(setting: Setting, batches: list[list[Tensor]]) -> float:
    found = norm = 0.0
    for batch in batches:
        outputs = (floating_tensors(run_tapped(graph, batch)) for graph in (setting.folded, setting.fake))
        one, energy = squared_error(*outputs)
        found, norm = found + one, norm + energy
    return float((found / norm) ** 0.5)


def residual(bits: int = 4, activations: int | None = 4) -> tuple[Setting, list[list[Tensor]]]:
    torch.manual_seed(0)
    model, mixing = Residual().eval(), torch.randn(16, 16) / 3
    batches = [[torch.randn(64, 16) @ mixing] for _ in range(8)]
    return set_up(model, (batches[0][0],), batches, weights_of(bits, activations)), batches


# ------------------------------------------------------------------------------------------------ laws
@pytest.mark.parametrize("options", [Reconstruction(steps=0), Reconstruction(seconds=0), Reconstruction(seconds=1e-9)])
@pytest.mark.slow
@pytest.mark.ci
def test_without_steps_or_time_the_start_stays_bit_for_bit(options: Reconstruction) -> None:
    setting, batches = residual()
    before = state(setting.fake)
    found = reconstruct(setting, batches, options)
    assert not found.blocks
    assert all(torch.equal(t, before[name]) for name, t in setting.fake.state_dict().items())
    if options.seconds:
        assert set(found.left.values()) == {"there is no time for 20 steps"}


@pytest.mark.slow
@pytest.mark.ci
def test_blocks_get_nearer_to_the_float_ones_on_samples_held_out() -> None:
    setting, batches = residual(bits=4, activations=4)
    held_out = [piece for k, piece in enumerate(pieces_of(setting.folded, batches)) if k % JUDGES == JUDGES - 1]
    before = error(setting, held_out)
    found = reconstruct(setting, batches, Reconstruction(steps=120))
    assert found.blocks and all(new < old for old, new in found.blocks.values())
    assert found.samples == (384, 128)
    assert found.outputs == pytest.approx((before, error(setting, held_out)))
    assert found.outputs is not None and found.outputs[1] < 0.97 * before


@pytest.mark.slow
@pytest.mark.ci
def test_what_does_not_help_is_taken_back_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, batches = residual()
    before = state(setting.fake)
    monkeypatch.setattr("graphcomp.quantization.reconstruct._Walk._outputs_error", farther())
    found = reconstruct(setting, batches, FEW)
    assert not found.blocks and found.outputs == (1.0, 1.0)
    assert any("outputs" in why for why in found.left.values())
    assert all(torch.equal(t, before[name]) for name, t in setting.fake.state_dict().items())


def farther() -> Any:
    """Return an error of outputs that grows with each call."""
    count = iter(range(1, 1000))
    return lambda self: float(next(count))


@pytest.mark.slow
@pytest.mark.ci
def test_the_seed_decides() -> None:
    found = []
    for seed in (0, 0, 1):
        setting, batches = residual()
        reconstruct(setting, batches, Reconstruction(steps=20, seed=seed))
        found.append(torch.cat([t.flatten().float() for t in setting.fake.state_dict().values()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.slow
@pytest.mark.ci
def test_compress_reports_blocks_and_hands_out_what_was_learned() -> None:
    torch.manual_seed(0)
    model, mixing = Residual().eval(), torch.randn(16, 16) / 3
    batches = [torch.randn(64, 16) @ mixing for _ in range(4)]
    before = copy.deepcopy(model.state_dict())
    options: dict[str, Any] = {"bits": 3, "activation_bits": 4}
    plain, small = (quantized(model, batches, rounding=own, **options) for own in ("second_order", FEW))
    changes = small.report.reconstructions
    assert changes and all(change.after < change.before for change in changes.values())
    assert any("integers" in law for law in small.report.verified)
    assert any("reconstructed on 192 samples; on 64 others" in note for note in small.report.notes)
    assert "reconstruction" in str(small.report) and not plain.report.reconstructions
    assert gc.Report.from_dict(small.report.to_dict()).reconstructions == dict(changes)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    same = quantized(model, batches, rounding=Reconstruction(steps=0), **options)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), plain.state_dict().values(), strict=True))


@pytest.mark.slow
@pytest.mark.ci
def test_a_depthwise_block_is_reconstructed_no_worse() -> None:
    torch.manual_seed(0)
    images = nn.functional.avg_pool2d(torch.randn(48, 3, 12, 12) + 0.5, 5, 1)
    batches = [[x] for x in images.split(16)]
    setting = set_up(Inverted().eval(), (images[:2],), batches, weights_of(4, 4))
    before = error(setting, batches[2:])
    found = reconstruct(setting, batches, FEW)
    assert found.samples == (32, 16) and error(setting, batches[2:]) <= before
    assert len(found.blocks) + len(found.left) == 4  # stem, inverted block, head, the whole


@pytest.mark.slow
@pytest.mark.ci
def test_attention_with_a_mask_is_reconstructed() -> None:
    torch.manual_seed(0)
    model = Attention().eval()
    batches = [[torch.randn(16, 5, 8), torch.rand(16, 5) < 0.8] for _ in range(4)]
    setting = set_up(model, tuple(batches[0]), batches, weights_of(2))
    before = error(setting, batches)
    found = reconstruct(setting, batches, FEW)
    assert found.blocks and error(setting, batches) < before


# ------------------------------------------------------------------------------------------------ what is left
def left(model: nn.Module, batches: list[list[Tensor]], example: Any = None) -> Reconstructed:
    setting = set_up(model.eval(), tuple(batches[0]) if example is None else example, batches, weights_of(2, None))
    return reconstruct(setting, batches, Reconstruction(steps=5))


def test_an_op_without_a_gradient_is_named() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.heaviside(self.one(x), x.new_ones(1)))

    torch.manual_seed(0)
    found = left(Steep(), [[torch.randn(32, 6)]])
    assert any("no gradient" in why for why in found.left.values())
    assert any("no gradient" in note for note in found.notes())


def test_one_sample_leaves_nothing_to_judge_on() -> None:
    torch.manual_seed(0)
    found = left(nn.Sequential(nn.Linear(6, 3)), [[torch.randn(1, 6)]], (torch.randn(2, 6),))
    assert "one batch" in found.left[WHOLE] and found.outputs is None and not found.blocks


def test_batches_are_divided_where_each_sample_is_computed_by_itself() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x - x.mean(0))

    x = torch.randn(2 * PIECE + 3, 4)
    for model, sizes in ((nn.ReLU(), [12, 12, 11]), (Centred(), [len(x)])):
        graph = capture(model, (x,)).module
        assert [len(piece[0]) for piece in pieces_of(graph, [[x]])] == sizes


# ------------------------------------------------------------------------------------------------ segments
def test_segments_hold_each_node_once_and_end_in_front_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, _ = residual()
    found = segments_of(setting.fake)
    nodes = [node for segment in found for node in segment.nodes]
    assert nodes == [node for node in setting.fake.graph.nodes if node.op != "output"]
    # nothing is carried around the first products, as the input hangs on no weight; the second block; the head
    assert [len(segment.weights) for segment in found] == [1, 1, 2, 1]
    assert [segment.entry for segment in found[1:]] == [segment.exit for segment in found[:-1]]
    monkeypatch.setattr(segments, "MOST_LAYERS", 1)
    single = segments_of(setting.fake)
    assert [node for segment in single for node in segment.nodes] == nodes
    assert [len(segment.weights) for segment in single if segment.weights] == [1] * 5


@pytest.mark.slow
@pytest.mark.ci
def test_single_layers_of_a_long_block_are_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MOST_LAYERS", 0)
    setting, batches = residual()
    before = error(setting, batches)
    found = reconstruct(setting, batches, FEW)
    assert len(found.blocks) + len(found.left) == 6 and found.blocks and error(setting, batches) < before


# ------------------------------------------------------------------------------------------------ soft rounding
SPECS = {
    "symmetric": QuantSpec(3, granularity="channel"),
    "affine": QuantSpec(2, symmetric=False, granularity="channel"),
    "group": QuantSpec(3, granularity="group", group_size=4),
}


@pytest.mark.parametrize("name", SPECS)
def test_learning_begins_at_the_level_of_each_weight(name: str) -> None:
    torch.manual_seed(0)
    floats = torch.randn(6, 8)
    quantizer = make_quantizer(SPECS[name], shape=floats.shape, dim=0)
    quantizer.set_range(*(torch.full_like(quantizer.get_parameter("scale"), v) for v in (-1.5, 1.5)))
    levels = quantizer(floats + 0.3 * torch.randn(6, 8)).detach()  # some are not the nearest ones
    soft = SoftRounding.of(quantizer, levels, floats)
    assert soft is not None
    assert torch.equal(soft.hard(), levels)
    assert torch.equal(quantizer(soft.hard()), soft.hard())
    drawn = soft.soft() - levels
    assert bool((drawn * (floats - levels) >= -1e-6).all())  # towards the float weight
    with torch.no_grad():
        for value in (-9.0, 9.0):
            soft.free.fill_(value)
            assert torch.equal(quantizer(soft.hard()).detach(), soft.hard())
            torch.testing.assert_close(soft.soft(), soft.hard())
            assert float(soft.undecided(2.0)) == pytest.approx(0, abs=1e-5)


def test_levels_that_are_not_even_have_no_rounding() -> None:
    weight = torch.randn(4, 6)
    quantizer = make_quantizer(QuantSpec(2, kind="ternary", granularity="channel"), shape=weight.shape, dim=0)
    quantizer.fit(weight)
    soft = SoftRounding.of(quantizer, quantizer(weight).detach(), weight)
    assert (soft is None) == quantizer.spec.tabled


@pytest.mark.parametrize("rounding", ["rounded", 3, None])
def test_a_wrong_rounding_is_refused(rounding: Any) -> None:
    with pytest.raises(gc.PlanError, match="rounding"):
        gc.PostTraining(rounding=rounding)
    with pytest.raises(gc.PlanError, match="rounding"):
        gc.compress(Inverted().eval(), torch.randn(2, 3, 16, 16), bits=4, rounding=rounding, progress=False)
