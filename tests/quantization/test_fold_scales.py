"""A trained fake-quant graph and its finished form compute the same, on the same integers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphcomp.capture.capture import Captured, capture
from graphcomp.coupling.groups import find_groups
from graphcomp.coupling.propagate import propagate
from graphcomp.errors import PlanError, VerificationError
from graphcomp.ir.graph import bind, fetch, set_argument
from graphcomp.ir.inputs import Inputs as Example
from graphcomp.ir.program import Program
from graphcomp.ir.rewrite import before
from graphcomp.ir.run_nodes import Constants, run_tapped
from graphcomp.numerics.compare import relative_error
from graphcomp.pruning.slice import SliceGroups
from graphcomp.quantization.fold import FoldForTraining, chains, folded_nodes
from graphcomp.quantization.fold_scales import Finish, from_training
from graphcomp.quantization.insert import InsertQuantizers, quantizer_nodes
from graphcomp.quantization.integers import check_integers
from graphcomp.quantization.lower import constants_with_quantizers
from graphcomp.quantization.placement import place
from graphcomp.quantization.ptq import calibrate_activations, calibrate_weights
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.quantization.quantizers.uniform import UniformQuantizer
from graphcomp.quantization.spec import QuantConfig, QuantSpec
from graphcomp.quantization.stored import Affine
from graphcomp.quantization.verify import check_lowering
from graphcomp.targets.pt2 import export_program
from graphcomp.testing import random_kept
from graphcomp.torch_compat import pytree
from tests.marks import in_ci, slow
from tests.quantization.test_qadg import MODELS, build

CURVED, EVEN = QuantSpec(kind="geta", learn_exponent=True), QuantSpec(kind="geta")
GETA = QuantConfig(CURVED, EVEN, CURVED)
CONFIGS = {
    "geta": GETA,
    "lsq": QuantConfig(QuantSpec(5), QuantSpec(6), QuantSpec(5)),
    "lsq channel": QuantConfig(QuantSpec(4, granularity="channel"), QuantSpec(8)),
    "lsq group": QuantConfig(QuantSpec(4, granularity="group", group_size=5)),
    "lsq+": QuantConfig(QuantSpec(6, symmetric=False)),
    "lsq+ channel": QuantConfig(QuantSpec(6, symmetric=False, granularity="channel")),
}
FORMS: dict[str, Any] = {"norms": lambda module: module, "scaled weights": FoldForTraining()}
# there is a norm to fold in two of the models
FORMED = [(name, form) for form in FORMS for name in MODELS if form == "norms" or name in ("cnn", "residual")]
QUICK = {("cnn", "norms"), ("cnn", "scaled weights"), ("vit", "norms")}
SPLIT = [case if case in QUICK else slow(case)[0] for case in FORMED]


def odd_norms(model: nn.Module) -> nn.Module:
    """Every third gamma negative, one 0: what a wrong fold would show on."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[::3] *= -1
            module.weight.data[1] = 0
    return model


@functools.cache
def captured(name: str, dtype: torch.dtype) -> Captured:
    model, inputs = build(name)
    same = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    return capture(odd_norms(model.to(dtype)), same)


def learned(
    module: fx.GraphModule, inputs: Sequence[Any], config: QuantConfig, bits: Sequence[int] = (8,), t: float = 1.0
) -> fx.GraphModule:
    """A graph with quantizers as training leaves them: exponents of weights, and bits that go round through `bits`."""
    placement = place(module, config, ("re:ignored",), folded_nodes(module.graph))
    fake = InsertQuantizers(placement.sites)(module)
    calibrate_activations(fake, [inputs])
    calibrate_weights(fake)
    for k, (_, quantizer) in enumerate(quantizer_nodes(fake)):
        if isinstance(quantizer, GetaQuantizer):
            quantizer.t.data.fill_(t)
            quantizer.project_bits(bits[k % len(bits)], bits[k % len(bits)])
        elif isinstance(quantizer, UniformQuantizer):
            quantizer.scale.data *= torch.rand_like(quantizer.scale) * 0.5 + 0.6
    return fake


def trained(
    name: str, config: QuantConfig, dtype: torch.dtype = torch.float32, form: str = "norms", **how: Any
) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    found = captured(name, dtype)
    return learned(FORMS[form](copy.deepcopy(found.module)), found.inputs.args, config, **how), found.inputs.args


class Inputs:
    """Keeps what the quantizers of a graph read; goes on with what another graph's returned, where given."""

    def __init__(self, module: fx.GraphModule, returned: dict[str, Tensor] | None = None) -> None:
        self.quantized = {node for node, _ in quantizer_nodes(module)} - constants_with_quantizers(module)
        self.sources = {node.all_input_nodes[0] for node in self.quantized}
        self.follow = returned
        self.values: dict[fx.Node, Any] = {}
        self.read: dict[str, Tensor] = {}
        self.returned: dict[str, Tensor] = {}

    def __call__(self, node: fx.Node, result: Any) -> Any:
        if node in self.quantized:
            self.read[node.name] = self.values[node.all_input_nodes[0]]
            self.returned[node.name] = result = result if self.follow is None else self.follow[node.name]
        if node in self.sources:
            self.values[node] = result
        return result


def program(fake: fx.GraphModule, inputs: Sequence[Any]) -> Program:
    """The program of a graph alone."""
    spec = pytree.tree_structure((tuple(inputs), {}))
    return Program(module=fake, original=fake, inputs=Example(tuple(inputs), {}, spec))


def check_same(fake: fx.GraphModule, finished: fx.GraphModule, inputs: Sequence[Any], tolerance: float) -> None:
    """Each quantizer reads the same in both graphs, on equal operands; so does who reads the outputs."""
    one = Inputs(fake)
    expected = run_tapped(fake, inputs, instead=one)
    other = Inputs(finished, one.returned)
    actual = run_tapped(finished, inputs, instead=other)
    assert one.read.keys() == other.read.keys()
    for name, value in one.read.items():
        assert relative_error(value, other.read[name]) < tolerance, name
    assert relative_error(expected, actual) < tolerance


def codes(fake: fx.GraphModule) -> dict[str, Affine]:
    """Reader of a fake-quantized weight -> its integers."""
    constant, values = constants_with_quantizers(fake), Constants(fake)
    return {
        user.name: quantizer.to_integers(values.of(node.all_input_nodes[0]))
        for node, quantizer in quantizer_nodes(fake)
        for user in node.users
        if node in constant
    }


def offsets(integers: Affine) -> Tensor:
    """Codes less their zero point."""
    wide = Affine(integers.values.to(torch.int32), torch.ones_like(integers.scale, dtype=torch.float64), *[
        integers.zero_point, integers.quant_min, integers.quant_max, integers.dim, integers.groups
    ])  # fmt: skip
    return wide.dequantize().to(torch.int64)


def check_codes(fake: fx.GraphModule, finished: fx.GraphModule) -> None:
    """Bit for bit, but for the sign of the gamma that was folded."""
    before, after = codes(fake), codes(finished)
    signs = {}
    for pair in chains(fake.graph):
        gamma = fetch(fake, str(bind(pair.norm)["weight"].target)).detach().sign().to(torch.int64)
        # scaling the weight by gamma in front of its quantizer has the sign in the codes already
        signs[pair.compute.name] = gamma.abs() if pair.between else gamma
    assert before.keys() == after.keys()
    for name, integers in before.items():
        expected = offsets(integers)
        if name in signs:
            expected = expected * signs[name].view(-1, *[1] * (expected.dim() - 1))
        assert torch.equal(offsets(after[name]), expected), name
        assert bool((after[name].scale > 0).all())
        assert (integers.quant_min, integers.quant_max) == (after[name].quant_min, after[name].quant_max)


def check_finished(fake: fx.GraphModule, inputs: Sequence[Any], tolerance: float) -> fx.GraphModule:
    finished = Finish()(fake)
    assert not finished.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    assert all(isinstance(quantizer, UniformQuantizer) for _, quantizer in quantizer_nodes(finished))
    check_same(fake, finished, inputs, tolerance)
    check_codes(fake, finished)
    return finished


# ------------------------------------------------------------------------------------------------ the law
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case", SPLIT, ids=str)
@pytest.mark.slow
@pytest.mark.ci
def test_the_finished_graph_is_the_trained_graph(case: tuple[str, str], config: str) -> None:
    name, form = case
    check_finished(*trained(name, CONFIGS[config], form=form), tolerance=1e-5)


@pytest.mark.parametrize("t", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("case", SPLIT, ids=str)
@pytest.mark.slow
@pytest.mark.ci
def test_exponents_and_bits_from_2_to_16(case: tuple[str, str], t: float) -> None:
    name, form = case
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        fake, inputs = trained(name, GETA, dtype, form, bits=range(2, 17), t=t)
        finished = check_finished(fake, inputs, tolerance)
    with torch.no_grad():  # in float64 no code is off by rounding, so whole runs agree
        assert relative_error(fake(*inputs), finished(*inputs)) < 1e-10


@pytest.mark.parametrize("name", ["cnn", "bert", *slow("residual", "vit", "encoder")])
def test_the_float_twin(name: str) -> None:
    """Nothing is rounded: it is the model."""
    found = captured(name, torch.float64)
    twin = Finish(rounded=False)(learned(found.module, found.inputs.args, GETA))
    assert not list(quantizer_nodes(twin))
    with torch.no_grad():
        assert relative_error(found.module(*found.inputs.args), twin(*found.inputs.args)) < 1e-10


def test_the_float_twin_of_an_exponent():
    fake, _ = trained("cnn", GETA, torch.float64, bits=(8,), t=1.3)
    twin = Finish(rounded=False)(fake)
    old, new = fetch(fake, "head.weight"), fetch(twin, "head.weight")
    assert torch.allclose(new, old.sign() * old.abs() ** 1.3)


def test_a_graph_that_was_made_double_after_capture():
    fake, inputs = trained("cnn", GETA, bits=(8, 5))
    check_finished(copy.deepcopy(fake).double(), tuple(x.double() for x in inputs), 1e-10)


def test_the_trained_graph_is_left_alone():
    fake, inputs = trained("cnn", CONFIGS["lsq channel"])
    fetch(fake, "norm1.weight").data[0] = 1e-12  # a step that is widened
    before = {name: t.clone() for name, t in fake.state_dict().items()}
    graph = str(fake.graph)
    assert from_training(program(fake, inputs), [inputs]).notes
    assert str(fake.graph) == graph
    assert all(torch.equal(before[name], t) for name, t in fake.state_dict().items())


def test_after_a_cut():
    fake, inputs = trained("cnn", GETA, torch.float64, bits=(4, 8, 3))
    coupling = propagate(fake)
    kept = random_kept(find_groups(coupling), torch.Generator().manual_seed(0))
    sliced = SliceGroups(coupling, kept)(fake)
    assert sum(p.numel() for p in sliced.parameters()) < sum(p.numel() for p in fake.parameters())
    check_finished(sliced, inputs, 1e-10)


# ------------------------------------------------------------------------------------------------ who reads what
class Shared(nn.Module):
    """A convolution called twice, in front of two norms; tied weights; a layer that stays float with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.ignored, self.c = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(self.ignored(F.relu(self.b(self.conv(F.relu(self.a(self.conv(x)))))))))
        return self.two(F.relu(self.one(x.mean((2, 3)))))


def shared() -> tuple[fx.GraphModule, tuple[Tensor]]:
    torch.manual_seed(0)
    model = odd_norms(Shared())
    for norm in (model.a, model.b, model.c):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(3, 4, 5, 5)
    module = capture(model.eval(), x).module
    _, last = module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    # capture reads tied tensors under one name
    set_argument(last, "weight", before(last).tensor(module, "two.weight", model.two.weight))
    module.recompile()
    return learned(module, (x,), QuantConfig(QuantSpec(8))), (x,)


def test_shared_and_ignored_layers():
    fake, inputs = shared()
    finished = check_finished(fake, inputs, 1e-5)
    convs = finished.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    steps = [dict(quantizer_nodes(finished)).get(node.args[1]) for node in convs]
    assert steps[0] is not steps[1] and steps[2] is None
    linears = finished.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    sources = [node.args[1].all_input_nodes[0].target for node in linears]
    assert sources[0] != sources[1] and fetch(finished, sources[0]) is fetch(finished, sources[1])
    result = from_training(program(fake, inputs), [inputs])
    assert result.left_float == {"ignored": "trained in floats"}
    assert check_lowering(result.fake, result.lowered, inputs).steps <= 1.001
    assert len(result.errors) == 4 and all(0 < error < 1 for error in result.errors.values())


# ------------------------------------------------------------------------------------------------ what is refused
def test_exponents_of_activations_are_refused():
    fake, _ = trained("cnn", QuantConfig(EVEN, CURVED), t=1.1)
    with pytest.raises(PlanError, match="learn_exponent=False"):
        Finish()(fake)


@pytest.mark.parametrize("bits", [4.4, 17.0, 1.5])
def test_bits_that_are_not_whole_are_refused(bits: float) -> None:
    fake, _ = trained("cnn", GETA)
    next(iter(dict(quantizer_nodes(fake)).values())).project_bits(bits, bits)  # type: ignore[operator]
    with pytest.raises(PlanError, match=f"learned {bits:.2f} bits"):
        Finish()(fake)


def test_training_mode_is_refused():
    fake, _ = trained("cnn", GETA)
    with pytest.raises(PlanError, match="training mode"):
        Finish()(fake.train())


def test_a_dtype_too_narrow_for_the_codes_is_refused():
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
    fake = learned(capture(model.eval(), x.bfloat16()).module, (x.bfloat16(),), GETA, bits=(16,), t=1.3)
    with pytest.raises(VerificationError, match="bfloat16 does not tell 65535 levels apart"):
        Finish()(fake)


# ------------------------------------------------------------------------------------------------ integers
@pytest.mark.parametrize("bits", [(8,), range(2, 17)], ids=str)
@pytest.mark.parametrize("name", ["cnn", "vit", "bert", *slow("residual", "encoder")])
@pytest.mark.slow
@pytest.mark.ci
def test_lowered_and_in_integers(name: str, bits: Sequence[int]) -> None:
    fake, inputs = trained(name, GETA, bits=bits, t=1.3)
    result = from_training(program(fake, inputs), [inputs])
    error = check_lowering(result.fake, result.lowered, inputs)
    assert error.weights == 0 and error.steps <= 1.001
    assert check_integers(result.lowered.module, inputs).steps <= 1
    before = codes(fake)
    for layer in result.lowered.layers:
        if layer.weight_bits != 32 and layer.node in before:
            assert layer.weight_bits == before[layer.node].quant_max.bit_length() + 1
    assert result.errors and result.notes == ()


def test_storage_follows_the_learned_bits():
    fake, inputs = trained("cnn", GETA, bits=(9, 4, 8, 3, 16))
    state = from_training(program(fake, inputs), [inputs]).lowered.module.state_dict()
    stored = [state[f"{name}.weight_codes"].dtype for name in ("stem", "expand", "depthwise", "project", "head")]
    assert stored == [torch.int16, torch.uint8, torch.int8, torch.uint8, torch.int16]
    assert state["expand.weight_codes"].numel() == 12 * 8 // 2


@pytest.mark.parametrize("scale", [1e-12, 0.0])
def test_a_channel_of_nothing_beside_a_bias(scale: float) -> None:
    """The bias comes out right. Codes of such a channel are rounded again, and named; where they are 0 none change."""
    fake, inputs = trained("cnn", GETA, bits=(8,))
    norm = next(iter(chains(fake.graph))).norm
    fetch(fake, str(bind(norm)["weight"].target)).data[2] = scale
    fetch(fake, str(bind(norm)["bias"].target)).data[2] = 3.0
    result = from_training(program(fake, inputs), [inputs])
    assert [note.split(":")[0] for note in result.notes] == (["expand"] if scale else [])
    state = result.lowered.module.state_dict()
    assert float(state["expand.bias_codes"][2] * state["expand.bias_scale"][2]) == pytest.approx(3.0, rel=1e-4)
    assert check_lowering(result.fake, result.lowered, inputs).steps <= 1.001


@pytest.mark.parametrize("bits", [(8,), *in_ci(range(2, 9)), *slow((16, 8, 9))], ids=str)
@pytest.mark.parametrize("name", ["cnn", "vit", *slow("residual", "encoder", "bert")])
@pytest.mark.slow
@pytest.mark.ci
def test_onnxruntime_multiplies_integers(name: str, bits: Sequence[int], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from graphcomp.targets.onnxruntime.export import export_onnx
    from graphcomp.targets.onnxruntime.kernels import prove
    from graphcomp.targets.runtime import run

    fake, inputs = trained(name, GETA, bits=bits)
    lowered = from_training(program(fake, inputs), [inputs]).lowered.module
    export_onnx(lowered, inputs, None, tmp_path / "m.onnx")
    (found,) = run(tmp_path / "m.onnx", inputs)
    with torch.no_grad():
        expected = lowered(*inputs)
    assert relative_error(expected, found) < 2.0 ** (1 - min(bits))
    reasons = {reason for _, reason in prove(tmp_path / "m.onnx").stayed_float}
    assert reasons == ({"integers of 16 bits have no kernel"} if max(bits) > 8 else set())


def test_a_program_computes_what_the_lowered_graph_computes():
    fake, inputs = trained("cnn", GETA, bits=range(2, 17))
    lowered = from_training(program(fake, inputs), [inputs]).lowered.module
    exported = export_program(lowered, inputs, {}).module()
    with torch.no_grad():
        assert torch.equal(lowered(*inputs), exported(*inputs))


def test_quantizers_are_modules_of_their_own():
    fake, _ = trained("cnn", CONFIGS["lsq"])
    mine: list[Quantizer] = [quantizer for _, quantizer in quantizer_nodes(Finish()(fake))]
    theirs = {id(p) for _, quantizer in quantizer_nodes(fake) for p in quantizer.parameters()}
    assert mine and not theirs & {id(p) for quantizer in mine for p in quantizer.parameters()}
