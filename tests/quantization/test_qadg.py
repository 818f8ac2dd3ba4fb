"""The coupling of a graph is the same with quantizers in it and without; masks and slices work all the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphcomp
from graphcomp.capture.capture import capture
from graphcomp.coupling.analysis import Analysis, analyze_captured
from graphcomp.coupling.groups import ChannelGroup, find_frozen, find_groups
from graphcomp.coupling.propagate import Coupling, propagate
from graphcomp.ir.run_nodes import Lockstep
from graphcomp.numerics.compare import relative_error
from graphcomp.pruning.mask import InsertMasks, set_masks
from graphcomp.pruning.slice import SliceGroups
from graphcomp.quantization.calibrate import calibrate, calibrate_weight
from graphcomp.quantization.fold import FoldBatchNorm
from graphcomp.quantization.insert import InsertQuantizers, quantizer_nodes
from graphcomp.quantization.placement import place
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.uniform import UniformQuantizer
from graphcomp.quantization.spec import QuantConfig, QuantSpec
from graphcomp.testing import Encoder, ResidualCNN, VisionTransformer, random_kept, randomize
from tests.marks import in_ci, slow
from tests.targets.models import import_transformers
from tests.vision import import_torchvision

from .written import WRITTEN, Make, quantize_in_place

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IDS = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))


class DepthwiseResidual(nn.Module):
    """An inverted residual block with batch norms: (n, 3, 8, 8) -> (n, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1, bias=False)
        self.depthwise, self.project = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 8, 1)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(12), nn.BatchNorm2d(12), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        y = F.relu6(self.norm2(self.depthwise(F.relu(self.norm1(self.expand(x))))))
        logits: Tensor = self.head((x + self.norm3(self.project(y))).mean((2, 3)))
        return logits


class Bert(nn.Module):
    """The last hidden state of a one-layer BERT of transformers."""

    def __init__(self) -> None:
        super().__init__()
        transformers = import_transformers()
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}
        config = transformers.BertConfig(vocab_size=11, max_position_embeddings=16, **sizes)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.bert(input_ids=ids).last_hidden_state
        return states


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "cnn": (DepthwiseResidual, (IMAGE,)),
    "residual": (ResidualCNN, (IMAGE,)),
    "vit": (VisionTransformer, (IMAGE,)),
    "encoder": (Encoder, (IDS, torch.ones_like(IDS).tril(3))),
    "bert": (Bert, (IDS,)),
}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    return randomize(make()).double(), inputs


def own_tensors(model: nn.Module) -> set[str]:
    return {name for name, _ in (*model.named_parameters(), *model.named_buffers())}


Picture = tuple[dict[str, Any], set[Any]]


def picture(coupling: Coupling, own: Collection[str]) -> Picture:
    """The groups by name, and the frozen axes, as far as they concern the tensors `own`."""
    groups = {}
    for group in find_groups(coupling):
        members = {(m.name, m.dim): (m.consumes, m.unit_of.tolist(), m.shape) for m in group.members if m.name in own}
        groups[group.name] = group.size, group.role, members
    return groups, {(f.name, f.dim, f.indices) for f in find_frozen(coupling) if f.name in own}


def masked_and_sliced(
    coupling: Coupling, groups: Sequence[ChannelGroup], module: fx.GraphModule, seed: int = 0
) -> tuple[fx.GraphModule, fx.GraphModule, dict[ChannelGroup, Tensor]]:
    kept = random_kept(groups, torch.Generator().manual_seed(seed))
    masked = InsertMasks(coupling, groups)(module)
    set_masks(masked, groups, kept)
    return masked, SliceGroups(coupling, kept)(module), kept


# ------------------------------------------------------------------------------------------------ ours
SPECS = {
    "symmetric": QuantSpec(4),
    "affine": QuantSpec(4, symmetric=False),
    "geta": QuantSpec(4, kind="geta"),
    "geta exponent": QuantSpec(4, kind="geta", learn_exponent=True),
    "channel": QuantSpec(4, granularity="channel"),
    "affine channel": QuantSpec(4, symmetric=False, granularity="channel"),
    "group": QuantSpec(4, granularity="group", group_size=3),
    "affine group": QuantSpec(4, symmetric=False, granularity="group", group_size=4),
}


def config(spec: QuantSpec) -> QuantConfig:
    """`spec` for weights, and for activations where it is per tensor; tables have no groups."""
    activations = spec if spec.granularity == "tensor" else SPECS["affine"]
    embeddings = SPECS["channel"] if spec.granularity == "group" else spec
    return QuantConfig(spec, activations, embeddings, first_and_last_bits=2)


@torch.no_grad()
def calibrated(module: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Give every quantizer of `module` the range of what it reads; returns `module`."""
    quantizers = dict(quantizer_nodes(module))
    steps = Lockstep(module, [inputs])
    for node in module.graph.nodes:
        if node in quantizers:
            (((x,), _),) = steps.arguments(node)
            set_range(quantizers[node], x)
        steps.step(node)
        steps.drop(node)
    return module


def set_range(quantizer: Quantizer, x: Tensor) -> None:
    if quantizer.dim is None:
        calibrate(quantizer, [x])
    else:
        calibrate_weight(quantizer, x)


IN_CI = {("vit", "channel"), ("encoder", "group")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("cnn", kind) for kind in SPECS),
        *(pytest.param(*own, marks=(pytest.mark.slow, pytest.mark.ci)) for own in sorted({*IN_CI, ("bert", "geta")})),
        *(
            pytest.param(name, kind, marks=pytest.mark.slow)
            for name in ("vit", "encoder")
            for kind in SPECS
            if (name, kind) not in IN_CI
        ),
        pytest.param("bert", "channel", marks=pytest.mark.slow),
    ],
)
def test_our_quantizers_change_no_group(name: str, kind: str) -> None:
    model, inputs = build(name)
    captured = capture(model, inputs)
    plain = FoldBatchNorm()(captured.module)
    quantized = calibrated(InsertQuantizers(place(plain, config(SPECS[kind])).sites)(plain), inputs)
    own = {str(node.target) for node in plain.graph.find_nodes(op="get_attr")}
    coupling = propagate(quantized, captured.output_names)
    found = picture(coupling, own)
    assert found[0]
    assert found == picture(propagate(plain, captured.output_names), own)
    assert not coupling.unknown

    groups = find_groups(coupling)
    masked, small, _ = masked_and_sliced(coupling, groups, quantized)
    with torch.no_grad():
        whole, expected, actual = quantized(*inputs), masked(*inputs), small(*inputs)
    assert relative_error(whole, expected) > 1e-2
    assert relative_error(expected, actual) < 1e-9
    assert_sliced(quantized, small)


def assert_sliced(quantized: fx.GraphModule, small: fx.GraphModule) -> None:
    """Steps per channel, and the groups of the last dim, are as long as the weight they belong to."""
    before = {str(node.target): quantizer for node, quantizer in quantizer_nodes(quantized)}
    shorter = 0
    for node, quantizer in quantizer_nodes(small):
        assert isinstance(quantizer, Quantizer)
        if quantizer.dim is None:
            continue
        assert isinstance(quantizer, UniformQuantizer)
        shape = node.all_input_nodes[0].meta["val"].shape
        old = before[str(node.target)]
        assert isinstance(old, UniformQuantizer)
        assert len(quantizer.scale) == shape[quantizer.dim]
        if quantizer.groups is not None:
            assert len(quantizer.groups) == shape[-1]
            assert quantizer.scale.shape[1] == old.scale.shape[1]
        shorter += len(quantizer.scale) < len(old.scale)
    assert shorter > 0 or all(q.dim is None for q in before.values())


def torchvision_models() -> Any:
    """The module, or the test is skipped."""
    try:
        return import_torchvision().models
    except ImportError:
        pytest.skip("needs torchvision")


VISION = {"resnet18": 12, "vgg11_bn": 10, "mobilenet_v2": 25, "densenet121": 120, "vit_b_16": 37}
"""Groups of each; those of MobileNetV2 are as many as GETA's reference code finds in the float model."""


@pytest.mark.parametrize("name", [*in_ci("vgg11_bn", "mobilenet_v2"), *slow("resnet18", "densenet121", "vit_b_16")])
def test_real_networks_have_the_groups_of_the_float_model(name: str) -> None:
    """The same ops with quantizers between them, of weights alone and of activations too."""
    models = torchvision_models()
    size = 224 if name == "vit_b_16" else 64
    with torch.device("meta"):
        model, image = getattr(models, name)().eval(), torch.empty(2, 3, size, size)
    captured = capture(model, image)
    plain = captured.module
    own = {str(node.target) for node in plain.graph.find_nodes(op="get_attr")}
    expected = picture(propagate(plain, captured.output_names), own)
    assert len(expected[0]) == VISION[name]
    for activations in (None, SPECS["geta"]):
        config = QuantConfig(SPECS["geta"], activations)
        quantized = InsertQuantizers(place(plain, config).sites)(plain)
        inserted = {node for node, _ in quantizer_nodes(quantized)}
        assert len(inserted) > len(
            list(plain.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default))
        )
        assert picture(propagate(quantized, captured.output_names), own) == expected
        left = [node for node in quantized.graph.nodes if node not in inserted]
        assert [node.target for node in left] == [node.target for node in plain.graph.nodes]


def test_a_quantizer_shared_by_several_values_couples_nothing() -> None:
    model, inputs = build("residual")
    captured = capture(model, inputs)
    plain = FoldBatchNorm()(captured.module)
    shared = InsertQuantizers(place(plain, QuantConfig(share_add=True, share_concat=True)).sites)(plain)
    nodes = [quantizer for _, quantizer in quantizer_nodes(shared)]
    assert len({id(quantizer) for quantizer in nodes}) < len(nodes)
    own = {str(node.target) for node in plain.graph.find_nodes(op="get_attr")}
    assert picture(propagate(shared, captured.output_names), own) == picture(
        propagate(plain, captured.output_names), own
    )


def test_steps_of_kept_units_stay() -> None:
    linear = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    captured = capture(linear, (torch.randn(2, 4).double(),))
    spec = QuantConfig(QuantSpec(4, granularity="group", group_size=2), None)
    quantized = calibrated(InsertQuantizers(place(captured.module, spec).sites)(captured.module), captured.inputs.args)
    coupling = propagate(quantized, captured.output_names)
    (group,) = find_groups(coupling)
    small = SliceGroups(coupling, {group: torch.tensor([0, 3, 4])})(quantized)
    (first, second), (old, last) = ([q for _, q in quantizer_nodes(m)] for m in (small, quantized))
    assert torch.equal(first.scale, old.scale[[0, 3, 4]])  # type: ignore[index]
    assert torch.equal(second.scale, last.scale)  # type: ignore[arg-type]
    assert second.groups.tolist() == [0, 1, 2]  # type: ignore[union-attr, operator]


# ------------------------------------------------------------------------------------------------ written by hand
def _none(like: Tensor, dim: int) -> nn.Module:
    return nn.Identity()


CUT_NATIVELY = {"cnn": ("channel", "width"), "vit": ("hidden",), "bert": ("width", "head", "hidden")}
"""Head dims imply a constant, and the tiny vision transformer computes one width from the other."""


def check_written(name: str, weight: Make, activation: Make, producers: Collection[str] = ("export",)) -> Analysis:
    """Groups as without the quantizers; masked is sliced; the user's class is cut, and computes what the graph does."""
    model, inputs = build(name)
    own = own_tensors(model)
    expected = picture(analyze_captured(capture(model, inputs)).coupling, own)
    quantize_in_place(model, weight, activation)
    analysis = analyze_captured(capture(model, inputs))
    assert analysis.captured.producer in producers
    assert not analysis.unknown_ops
    assert picture(analysis.coupling, own) == expected

    module = analysis.captured.module
    masked, small, kept = masked_and_sliced(analysis.coupling, analysis.groups, module)
    with torch.no_grad():
        whole, zeroed, cut = model(*inputs), masked(*inputs), small(*inputs)
    assert relative_error(whole, zeroed) > 1e-3
    assert relative_error(zeroed, cut) < 1e-9

    native = graphcomp.slice_groups(analysis, {g: units for g, units in kept.items() if g.role in CUT_NATIVELY[name]})
    assert native.form == "native"
    assert type(native.module) is type(model)
    return analysis


ORDINARY = ["Geta", "Lsq", "Pact"]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("kind", [*ORDINARY, *in_ci(*sorted(set(WRITTEN) - {"FakeQuantizeOps", *ORDINARY}))])
def test_written_quantizers_change_no_group(kind: str) -> None:
    check_written("cnn", WRITTEN[kind], WRITTEN[kind])


@pytest.mark.parametrize(
    ("name", "weight", "activation"),
    [
        ("vit", "Geta", "Pact"),
        ("bert", "ChannelMax", "Lsq"),
        *(
            pytest.param(name, *pair, marks=pytest.mark.slow)
            for name, pair in (
                ("vit", ("DoReFa", "ChannelLsq")),
                ("vit", ("ChannelMax", "Lsq")),
                ("bert", ("Geta", "Pact")),
                ("bert", ("DoReFa", "ChannelLsq")),
            )
        ),
    ],
)
@pytest.mark.slow
@pytest.mark.ci
def test_written_quantizers_in_transformers(name: str, weight: str, activation: str) -> None:
    check_written(name, WRITTEN[weight], WRITTEN[activation])


def test_the_op_of_torch_per_channel() -> None:
    """torch.export knows no shape of it: recorded."""
    check_written("cnn", WRITTEN["FakeQuantizeOps"], _none, producers=("export", "record"))


def test_steps_per_channel_are_members() -> None:
    analysis = check_written("cnn", WRITTEN["ChannelLsq"], _none)
    (group,) = (g for g in analysis.groups if any(m.name == "depthwise.weight" for m in g.members))
    members = {(m.name, m.dim, m.consumes) for m in group.members}
    assert {("expand.of_weight.step", 0, False), ("depthwise.of_weight.step", 0, False)} <= members
    assert not any(m.name == "project.of_weight.step" and m.dim == 1 for m in group.members)


def test_a_global_maximum_is_taken_over_the_kept_units() -> None:
    """DoReFa divides by the largest weight: without that weight, all others become larger, sliced and masked alike."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight[2] = 3.0  # type: ignore[index, operator]
    quantize_in_place(model, WRITTEN["DoReFa"], _none)
    inputs = (torch.randn(5, 4).double(),)
    analysis = analyze_captured(capture(model, inputs))
    (group,) = analysis.groups
    kept = {group: torch.tensor([0, 1, 3, 4, 5])}
    masked = InsertMasks(analysis.coupling, [group])(analysis.captured.module)
    set_masks(masked, [group], kept)
    native = graphcomp.slice_groups(analysis, kept)
    assert native.form == "native"
    by_hand = F.relu(F.linear(inputs[0], model[0].of_weight(model[0].weight[kept[group]]), model[0].bias[kept[group]]))  # type: ignore[index, operator]
    expected = F.linear(by_hand, model[2].of_weight(model[2].weight[:, kept[group]]), model[2].bias)  # type: ignore[index, operator, arg-type]
    torch.testing.assert_close(native(*inputs), expected)
    torch.testing.assert_close(masked(*inputs), expected)


def test_who_reads_positions_freezes() -> None:
    """Which index is the largest depends on which there are."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model.forward = lambda x: model[1](model[0](x)) + model[0](x).max(-1)[1][:, None]  # type: ignore[method-assign, assignment]
    assert not analyze_captured(capture(model, (torch.randn(2, 4),))).groups
    model.forward = lambda x: model[1](model[0](x)) + model[0](x).max(-1)[0][:, None]  # type: ignore[method-assign, assignment]
    assert len(analyze_captured(capture(model, (torch.randn(2, 4),))).groups) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_modules_of_torch_ao(fused: bool) -> None:
    """Their observers off, as they are when a model is deployed; the unfused one asks a buffer whether it is on."""
    from torch.ao.quantization import FakeQuantize, FusedMovingAvgObsFakeQuantize

    def make(like: Tensor, dim: int) -> nn.Module:
        module = (FusedMovingAvgObsFakeQuantize if fused else FakeQuantize)(quant_min=0, quant_max=255)
        module(torch.tensor([-1.5, 2.5]))
        module.disable_observer()
        return module

    model, inputs = build("cnn")
    model, inputs = model.float(), (inputs[0].float(),)
    own = own_tensors(model)
    expected = picture(analyze_captured(capture(model, inputs)).coupling, own)
    quantize_in_place(model, make, make).eval()
    analysis = analyze_captured(capture(model, inputs))
    assert not analysis.unknown_ops
    assert picture(analysis.coupling, own) == expected
    kept = random_kept(analysis.groups, torch.Generator().manual_seed(0))
    assert graphcomp.slice_groups(analysis, kept).form == "native"
