from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphcomp.capture.capture import capture
from graphcomp.quantization.fold import FoldBatchNorm, FoldForTraining, chains, folded_nodes
from graphcomp.quantization.insert import InsertQuantizers
from graphcomp.quantization.placement import Placement, place
from graphcomp.quantization.sites import Site
from graphcomp.quantization.spec import ACTIVATIONS, WEIGHTS, QuantConfig, QuantSpec, with_bits
from tests.quantization.models import encoder, residual
from tests.quantization.test_qadg import MODELS, build


def placed(model: nn.Module, inputs: Any, config: QuantConfig = QuantConfig(), ignore: Any = ()) -> Placement:  # noqa: B008
    return place(FoldBatchNorm()(capture(model.eval(), inputs).module), config, ignore)


def names(placement: Placement, weights: bool = False) -> dict[str, list[str]]:
    found = [at for site in placement.sites if site.is_weight == weights for at in site.at.items()]
    return {value: list(users) for value, users in found}


def quantizers(placement: Placement) -> dict[str, str]:
    """Value -> name of its quantizer."""
    return {value: site.name for site in placement.sites for value in site.at}


def readers_of(site: Site) -> list[str]:
    return [user for users in site.at.values() for user in users]


class Of(nn.Module):
    """A convolution, then whatever a test says, then another."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


X = torch.randn(2, 2, 6, 6)


def test_residual_network():
    found = names(placed(*residual()))
    assert found == {
        "x": ["conv2d"],
        "relu6": ["max_pool2d"],  # behind the clip, not between convolution and clip
        "max_pool2d": ["conv2d_1", "add"],
        "relu": ["conv2d_2"],
        "conv2d_2": ["add"],
        "relu_1": ["conv2d_3"],
        "relu_2": ["conv2d_4"],
        "conv2d_4": ["adaptive_avg_pool2d"],
        "adaptive_avg_pool2d": ["flatten"],
        "flatten": ["linear"],
    }


def test_every_weight_has_a_step_per_output_channel():
    sites = [s for s in placed(*residual()).sites if s.is_weight]
    assert len(sites) == 6
    assert {s.dim for s in sites} == {0}


def test_moves_keep_the_scale():
    shared = quantizers(placed(*residual()))
    assert shared["max_pool2d"] == shared["relu6"]
    assert shared["flatten"] == shared["adaptive_avg_pool2d"]
    assert shared["adaptive_avg_pool2d"] != shared["conv2d_4"]


def test_transformer_residuals_stay_float():
    found = names(placed(*encoder()))
    assert "add" not in found and "add_1" not in str(found.get("layer_norm"))
    assert found["layer_norm"] == ["linear_4"]
    # attention's products of activations: queries, transposed keys, probabilities, values
    assert {"linear", "transpose", "softmax", "linear_2"} <= set(found)


def test_tied_weight_is_quantized_once():
    (weight,) = [s for s in placed(*encoder()).sites if s.parameter in ("embed.weight", "head.weight")]
    assert sorted(readers_of(weight)) == ["embedding", "linear_6"]


@pytest.mark.parametrize(
    ("between", "quantized"),
    [
        (functional.relu, {"relu"}),
        (functional.relu6, {"relu6"}),
        (functional.silu, {"conv2d", "silu"}),
        (lambda x: functional.relu(x).transpose(2, 3), {"relu", "transpose"}),
        (lambda x: functional.pad(x, (1, 1)), {"conv2d", "pad"}),
        (lambda x: functional.pad(x, (1, 1), value=3.0), {"conv2d", "pad"}),
        (lambda x: torch.cat(functional.relu(x).chunk(2, 1), 1), {"relu", "getitem", "getitem_1", "cat"}),
        (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), {"conv2d", "mul"}),
    ],
)
def test_what_stands_between_convolutions(between: Any, quantized: set[str]) -> None:
    # what goes in and what comes out is quantized in each case
    assert set(names(placed(Of(between), X))) - {"x", "conv2d_1"} == quantized


def test_padding_with_a_number_is_no_move():
    sites = placed(Of(lambda x: functional.pad(x, (1, 1), value=3.0)), X).sites
    assert len([site for site in sites if not site.is_weight]) == 4


class Two(nn.Module):
    """Two convolutions end to end into a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([functional.relu(self.a(x)), functional.relu(self.b(x))], 1))


@pytest.mark.parametrize(("share", "count"), [(False, 3), (True, 1)])
def test_share_concat(share: bool, count: int) -> None:
    shared = quantizers(placed(Two(), X, QuantConfig(share_concat=share)))
    assert len({shared[value] for value in ("relu", "relu_1", "cat")}) == count


def test_share_add():
    both = {}
    for share in (False, True):
        shared = quantizers(placed(*residual(), QuantConfig(share_add=share)))
        both[share] = shared["conv2d_2"] == shared["max_pool2d"]
    assert both == {False: False, True: True}


def test_first_and_last_layer_have_eight_bits():
    config = QuantConfig(with_bits(WEIGHTS, 4), with_bits(ACTIVATIONS, 4))
    placement = placed(*residual(), config)
    bits = {user: s.spec.bits for s in placement.sites if s.is_weight for user in readers_of(s)}
    assert bits["conv2d"] == bits["linear"] == 8
    assert {bits[f"conv2d_{k}"] for k in range(1, 5)} == {4}
    assert [note for note in placement.notes if "8 bits, as the first and the last quantized layer" in note]
    assert not placed(*residual(), replace(config, first_and_last_bits=4, residual_bits=4)).notes


def test_ignored_layers_stay_float():
    placement = placed(*residual(), ignore=["block", "re:^fc$"])
    readers = {user for s in placement.sites if s.is_weight for user in readers_of(s)}
    assert readers == {"conv2d", "conv2d_3", "conv2d_4"}
    assert {n.name: why for n, why in placement.left_float.items()} == {
        "conv2d_1": "ignored", "conv2d_2": "ignored", "linear": "ignored",
    }  # fmt: skip


def test_overrides_set_bits_by_module():
    config = QuantConfig(
        overrides={
            "block.conv1": (with_bits(WEIGHTS, 3), ACTIVATIONS),
            "block.conv2": (None, None),
            "fc": (WEIGHTS, None),
        }
    )
    placement = placed(*residual(), config)
    bits = {user: s.spec.bits for s in placement.sites if s.is_weight for user in readers_of(s)}
    assert bits["conv2d_1"] == 3 and "conv2d_2" not in bits and bits["conv2d_3"] == 8
    assert "linear" in bits and "linear" not in {
        user for s in placement.sites if not s.is_weight for user in readers_of(s)
    }


def test_weights_only():
    sites = placed(*residual(), QuantConfig(activations=None)).sites
    assert sites and all(s.is_weight for s in sites)


def test_whole_numbers_are_left_alone():
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.transpose(0, 1)

    placement = placed(Counts(), torch.ones(3, 3, dtype=torch.int64))
    assert not placement.sites
    assert set(placement.left_float.values()) == {"computes on whole numbers"}


def test_products_of_constants_are_left_alone():
    class Table(nn.Module):
        """A bias that a small network makes of a fixed table, as in Swin v2."""

        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.fc = nn.Linear(2, 4), nn.Linear(3, 4)
            self.register_buffer("table", torch.randn(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.mlp(self.table).mean(0)

    model, x = Table(), torch.randn(5, 3)
    placement = placed(model, x)
    assert list(placement.left_float.values()) == ["depends on no input"]
    assert {user for site in placement.sites for user in readers_of(site)} == {"linear"}


def test_a_value_called_like_a_method_of_modules():
    model = Of(lambda x: x * 2)
    module = FoldBatchNorm()(capture(model.eval(), X).module)
    (node,) = (n for n in module.graph.nodes if n.name == "mul")
    node._rename("to")
    quantized = InsertQuantizers(place(module, QuantConfig()).sites)(module)
    assert "graphcomp_quantizers.to_1" in dict(quantized.named_modules())


# ------------------------------------------------------------------------------------------------ on training graphs
def sites_by_name(placement: Placement, stands_for: dict[str, str]) -> set[Any]:
    """Each site, with its values and who reads them. A weight is called like its first user."""

    def name(site: Site, value: str) -> str:
        return f"weight of {site.at[value][0]}" if site.is_weight else stands_for.get(value, value)

    def users(site: Site, value: str) -> tuple[str, ...]:
        return tuple(stands_for.get(user, user) for user in site.at[value])

    return {
        (s.spec, s.dim, s.low, s.high, frozenset((name(s, value), users(s, value)) for value in s.at))
        for s in placement.sites
    }


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("form", [lambda module: module, FoldForTraining()], ids=["norms", "scaled weights"])
@pytest.mark.parametrize("name", MODELS)
def test_training_graphs_have_the_sites_of_folded_ones(name: str, form: Any) -> None:
    model, inputs = build(name)
    module = capture(model, inputs).module
    trained = form(module)
    expected = place(FoldBatchNorm()(module), QuantConfig())
    found = place(trained, QuantConfig(), (), folded_nodes(trained.graph))
    pairs = list(chains(trained.graph))
    assert len(pairs) == {"cnn": 3, "residual": 5}.get(name, 0)
    norms = {pair.norm.name: pair.compute.name for pair in pairs}
    assert sites_by_name(found, norms) == sites_by_name(expected, {})


def test_norms_that_stay_are_not_skipped():
    """A batch norm behind a clip is not folded: what the convolution returns is quantized in front of it."""
    module = capture(Of(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))).eval(), X).module
    assert folded_nodes(module.graph) == set()
    assert "relu" in names(place(module, QuantConfig(), (), folded_nodes(module.graph)))


@pytest.mark.parametrize("moved", [lambda k: k.mT, lambda k: k.swapaxes(-2, -1), lambda k: k.moveaxis(-1, -2)])
def test_ops_that_move_elements_carry_scales_as_a_transpose_does(moved: Any) -> None:
    class Scores(nn.Module):
        def __init__(self, move: Any) -> None:
            super().__init__()
            self.both, self.move = nn.Linear(8, 16), move

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.both(x).chunk(2, -1)
            return q @ self.move(k)

    def sites(move: Any) -> list[tuple[list[str], bool]]:
        graph = capture(Scores(move).eval(), (torch.randn(2, 5, 8),)).module
        found = place(graph, QuantConfig()).sites
        return [([user for user in readers_of(site) if "matmul" in user], site.is_weight) for site in found]

    assert sites(moved) == sites(lambda k: k.transpose(-2, -1))


class TiedHead(nn.Module):
    """A table that is looked up, and multiplied by the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.table(ids).relu())
        return result


@pytest.mark.parametrize(("bits", "tables"), [(8, 1), (4, 2)])
def test_a_table_that_a_layer_multiplies_is_stored_once(bits: int, tables: int) -> None:
    module = capture(TiedHead().eval(), torch.randint(0, 12, (2, 5))).module
    weights = QuantSpec(bits, granularity="group", group_size=4)
    placement = place(module, QuantConfig(weights, None, first_and_last_bits=2))
    sites = [site for site in placement.sites if site.is_weight]
    assert len(sites) == tables
    assert any("stored once" in note for note in placement.notes) is (tables == 1)
    named = QuantConfig(weights, None, overrides={"head": (weights, None)}, first_and_last_bits=2)
    assert len([site for site in place(module, named).sites if site.is_weight]) == 2
