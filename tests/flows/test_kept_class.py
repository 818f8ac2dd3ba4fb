"""Quantized models of the user's own class: what the class holds, refusals, files, and the graph it came from."""

import copy

import onnxruntime
import pytest
import torch
from torch import nn

import graphcomp as gc
from graphcomp.native.integers import quantized_tensors
from graphcomp.quantization import held
from graphcomp.quantization.operand import exact_products
from graphcomp.testing.models import Decoder, Encoder, randomize

LAW = "native == integer graph"
IDS = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 9, dtype=torch.int64)
WEIGHTS_ALONE = {"bits": 4, "activation_bits": None}
AT_RUN_TIME = {"bits": 8, "activations": "dynamic"}


class Network(nn.Module):
    """Every matrix is a layer: nothing is quantized but what layers read."""

    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(11, 12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, ids):
        x = self.table(ids)
        return self.head(self.down(self.up(x).relu()).mean(1))


class Tied(Network):
    """The table is the weight of the head, too."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.table.weight


def small(model=None, inputs=(IDS,), **options):
    model = model or randomize(Network()).eval()
    return gc.compress(model, inputs, sparsity=0.3, keep_class=True, progress=False, **options)


@pytest.mark.parametrize("options", [WEIGHTS_ALONE, AT_RUN_TIME, {"bits": 8}, {**WEIGHTS_ALONE, "group_size": 4}])
def test_the_class_computes_what_the_integer_graph_computes(options, monkeypatch):
    monkeypatch.setattr(held, "KEPT_FLOAT", 0)
    model = randomize(Network()).eval()
    found = small(model, **options)
    assert found.form == "native" and type(found.module) is Network and found.reason == ""
    assert found.report.verified[LAW] < 1e-5
    assert set(quantized_tensors(found.module)) == {"table.weight", "up.weight", "down.weight", "head.weight"}
    graph = gc.compress(model, (IDS,), sparsity=0.3, keep_class=False, progress=False, **options)
    assert graph.form == "graph" and found.module.up.out_features < 20
    other = torch.randint(0, 11, (5, 4))
    with exact_products():
        assert torch.allclose(found(other), graph(other), atol=1e-5)
    assert torch.allclose(found(other), graph(other), atol=0.05 * float(graph(other).detach().abs().max()))


@pytest.mark.slow
@pytest.mark.ci
def test_attention_keeps_the_class():
    found = small(randomize(Encoder()).eval(), (IDS, MASK), **WEIGHTS_ALONE)
    assert found.form == "native" and found.report.verified[LAW] < 1e-5
    assert torch.isfinite(found(IDS, MASK)).all()


def test_a_table_that_is_quantized_behind_an_op_and_in_place_is_no_parameter_of_a_class():
    with pytest.raises(gc.PlanError, match="cannot hold") as caught:
        small(randomize(Decoder()).eval(), **WEIGHTS_ALONE)
    assert "'embed.weight' is quantized in one place, and read by" in caught.value.why


def test_a_tied_weight_stays_one_parameter():
    found = small(randomize(Tied()).eval(), **WEIGHTS_ALONE)
    assert found.module.head.weight is found.module.table.weight
    assert sum(name.endswith(("table.weight", "head.weight")) for name in quantized_tensors(found.module)) == 1


def test_without_being_asked_a_model_becomes_a_graph():
    found = gc.compress(randomize(Network()).eval(), (IDS,), sparsity=0.3, progress=False, **WEIGHTS_ALONE)
    assert found.form == "graph"


class Convolution(nn.Module):
    """Its convolution reads what is quantized."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).mean((2, 3)))


def test_what_stands_in_no_parameter_is_refused_with_the_reason():
    with pytest.raises(gc.PlanError, match="cannot hold the quantized model") as caught:
        small(randomize(Convolution()).eval(), (torch.randn(2, 3, 8, 8),), bits=8)
    assert "no product with a weight" in caught.value.why and "activation_bits=None" in caught.value.fix


def test_weights_of_convolutions_alone_stay_in_the_class():
    found = small(randomize(Convolution()).eval(), (torch.randn(2, 3, 8, 8),), bits=8, activation_bits=None)
    assert found.form == "native" and found.report.verified[LAW] < 1e-5


@pytest.mark.parametrize("options", [WEIGHTS_ALONE, AT_RUN_TIME, {"bits": 8}, {**WEIGHTS_ALONE, "group_size": 4}])
def test_a_saved_class_comes_back_bit_for_bit(tmp_path, options):
    found = small(randomize(Tied()).eval(), **options)
    found.save(tmp_path / "small")
    again = gc.load(tmp_path / "small", model_factory=Tied)
    assert again.form == "native" and type(again.module) is Tied
    assert again.module.head.weight is again.module.table.weight
    assert torch.equal(again(IDS), found(IDS))
    for name, tensor in quantized_tensors(found.module).items():
        other = again.module.get_parameter(name)
        assert torch.equal(other.codes, tensor.codes) and other.operand == tensor.operand


@pytest.mark.parametrize("options", [WEIGHTS_ALONE, {"bits": 8}])
@pytest.mark.slow
@pytest.mark.ci
def test_a_file_for_onnxruntime_is_written_from_the_class(tmp_path, options):
    found = small(**options)
    found.export(tmp_path / "small.onnx", measure=False)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (name,) = [i.name for i in session.get_inputs()]
    got = torch.tensor(session.run(None, {name: IDS.numpy()})[0])
    assert torch.allclose(got, found(IDS), atol=0.05 * float(found(IDS).detach().abs().max()))
    assert found.quantized is not None and len(found.quantized.lowered.weights) == 4
    assert (tmp_path / "small.onnx").stat().st_size < 9000


def test_a_model_of_integers_is_not_compressed_again():
    found = small(**WEIGHTS_ALONE)
    with pytest.raises(gc.InputError, match="quantized already") as caught:
        gc.compress(found.module, (IDS,), sparsity=0.3, progress=False)
    assert caught.value.fix == "compress the float model"


def test_the_users_model_is_as_it_was():
    model = randomize(Network()).eval()
    before = copy.deepcopy(model.state_dict())
    gc.compress(model, (IDS,), sparsity=0.3, keep_class=True, progress=False, **WEIGHTS_ALONE)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not quantized_tensors(model)


def test_a_cut_model_can_be_repaired_and_rounded_to_second_order_in_its_class():
    batches = [torch.randint(0, 11, (8, 9), generator=torch.Generator().manual_seed(k)) for k in range(8)]
    found = small(calibration=batches, rounding="second_order", **WEIGHTS_ALONE)
    assert found.form == "native" and found.report.repairs and found.report.verified[LAW] < 1e-5
