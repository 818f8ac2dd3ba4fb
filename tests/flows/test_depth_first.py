"""Blocks beside units, bits and training: the result computes the model in which both are masked."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphcomp as gc
from graphcomp.errors import BudgetError, PlanError
from tests.flows.test_depth import Deep, Net, X, batches
from tests.hf.models import need_transformers


class Basic(nn.Module):
    """A residual block of two convolutions with batch norms; ReLU after the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class Res(nn.Module):
    """Two stages of three blocks: (n, 3, h, w) -> (n, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one = nn.Sequential(*(Basic(8) for _ in range(3)))
        self.down, self.two = nn.Conv2d(8, 12, 1, stride=2), nn.Sequential(*(Basic(12) for _ in range(3)))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(F.relu(self.bn(self.stem(x))))
        found: Tensor = self.head(self.two(F.relu(self.down(x))).mean((2, 3)))
        return found


def res() -> Res:
    torch.manual_seed(0)
    model: Res = gc.testing.randomize(Res())  # type: ignore[assignment]
    return model.eval()


IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def images(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(count)]


def gone(small: gc.CompressedModel) -> list[str]:
    """Names of the blocks that were left out, in the original."""
    assert isinstance(small.report, gc.Report)
    (said,) = [note for note in small.report.notes if note.startswith("left out: ")]
    return [name.partition("/")[0] for name in re.findall(r"'([^']+)'", said)]


def old_names(lists: dict[str, int], dropped: set[str]) -> dict[str, str]:
    """Path of each item of lists in the result -> path in the original."""
    found = {}
    for path, length in lists.items():
        left = [f"{path}.{k}" for k in range(length) if f"{path}.{k}" not in dropped]
        found |= {f"{path}.{place}": name for place, name in enumerate(left)}
    return found


def removed(small: gc.CompressedModel, name: str, size: int, dim: int = 0) -> list[int]:
    kept = small.kept[name][dim].tolist()
    return [k for k in range(size) if k not in kept]


def compress(model: nn.Module, example: Any, **options: Any) -> gc.CompressedModel:
    small = gc.compress(model, example, progress=False, **{"repair": None, **options})
    assert small.form == "native" or options.get("bits"), small.reason
    return small


# ------------------------------------------------------------------------------------------------ the law
def masked_deep(small: gc.CompressedModel) -> Deep:
    """Return the original in which the layer and the hidden units that are gone add nothing."""
    model = Deep().eval()
    dropped = {".".join(name.split(".")[:2]) for name in gone(small)}
    with torch.no_grad():
        for name in dropped:
            layer = model.get_submodule(name)
            for own in (layer.mix, layer.down):
                own.weight.zero_(), own.bias.zero_()
        for new, old in old_names({"layers": 4}, dropped).items():
            units = removed(small, f"{new}.up.weight", 24)
            model.get_submodule(old).up.weight[units] = 0
            model.get_submodule(old).up.bias[units] = 0
    return model


def test_layers_and_hidden_units_are_the_model_in_which_both_are_masked(tmp_path: Path) -> None:
    small = compress(
        Deep().eval(), X, prune=("layer", "hidden"), sparsity={"layer": 0.25, "hidden": 0.5}, calibration=batches()
    )
    masked = masked_deep(small)
    assert small.form == "native", small.reason
    assert type(small.module) is Deep and len(small.module.layers) == 3
    assert small.module.layers[0].up.out_features < 24
    for size in (1, 3, 17):
        x = torch.randn(size, 8)
        torch.testing.assert_close(small(x), masked(x), atol=1e-5, rtol=1e-5)
    small.save(tmp_path)
    loaded = gc.load(tmp_path)
    x = torch.randn(5, 8)
    assert torch.equal(loaded(x), small(x))
    report = small.report
    assert isinstance(report, gc.Report)
    assert {"masked == without blocks", "masked == sliced"} <= report.verified.keys()
    assert report.params.before == sum(p.numel() for p in Deep().parameters())
    assert report.params.after == sum(p.numel() for p in small.parameters())
    assert any(note.startswith("blocks left out before all else: 2 of 8") for note in report.notes)


def test_blocks_and_channels_are_the_model_in_which_both_are_masked(tmp_path: Path) -> None:
    small = compress(res(), IMAGE, prune=("block", "channel"), sparsity=0.34, calibration=images())
    dropped = set(gone(small))
    assert len(dropped) == 2 and small.form == "native"
    masked = res()
    with torch.no_grad():
        for name in dropped:
            own = masked.get_submodule(name).bn2
            own.weight.zero_(), own.bias.zero_()
        for new, old in old_names({"one": 3, "two": 3}, dropped).items():
            if f"{new}.conv1.weight" not in small.kept:
                continue
            bn = masked.get_submodule(old).bn1
            units = removed(small, f"{new}.conv1.weight", bn.num_features)
            bn.weight[units] = 0
            bn.bias[units] = 0
    assert isinstance(small.report, gc.Report) and small.report.units_removed > 0
    for shape in ((1, 3, 8, 8), (3, 3, 12, 10)):
        x = torch.randn(shape)
        torch.testing.assert_close(small(x), masked(x), atol=1e-4, rtol=1e-4)
    small.save(tmp_path)
    assert torch.equal(gc.load(tmp_path)(IMAGE), small(IMAGE))


@pytest.mark.slow
@pytest.mark.ci
def test_a_llama_loses_layers_and_hidden_units(tmp_path: Path) -> None:
    transformers = need_transformers()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(50, (2, 9))
    asked: dict[str, Any] = {"prune": ("layer", "hidden"), "sparsity": {"layer": 0.25, "hidden": 0.5}}
    small = compress(model, ids, calibration=[torch.randint(50, (4, 9)) for _ in range(3)], **asked)
    assert type(small.module) is type(model) and small.module.config.num_hidden_layers == 3
    (dropped,) = {".".join(name.split(".")[:3]) for name in gone(small)}
    masked = copy.deepcopy(model)
    with torch.no_grad():
        layer = masked.get_submodule(dropped)
        layer.self_attn.o_proj.weight.zero_(), layer.mlp.down_proj.weight.zero_()
        for new, old in old_names({"model.layers": 4}, {dropped}).items():
            own = masked.get_submodule(old).mlp
            own.up_proj.weight[removed(small, f"{new}.mlp.up_proj.weight", 24)] = 0
    for shape in ((1, 3), (2, 20)):
        ids = torch.randint(50, shape)
        torch.testing.assert_close(small.module(ids).logits, masked(ids).logits, atol=1e-4, rtol=1e-4)
    small.save(tmp_path)
    assert torch.equal(gc.load(tmp_path).module(ids).logits, small.module(ids).logits)
    tokens = [own.generate(ids[:, :4], max_new_tokens=5, do_sample=False) for own in (small.module, masked)]
    assert torch.equal(*tokens)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("bits", [None, 8])
def test_a_llama_without_blocks_is_cut_further_and_exported(bits: int | None, tmp_path: Path) -> None:
    transformers = need_transformers()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()

    def tokens(*shape: int) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(96, shape), "attention_mask": torch.ones(shape, dtype=torch.long)}

    asked: dict[str, Any] = {"calibration": [tokens(8, 8) for _ in range(2)], "bits": bits, "progress": False}
    small = gc.compress(model, tokens(2, 8), prune=("block", "hidden"), sparsity=0.2, **asked)
    assert small.form == "graph" and isinstance(small.report, gc.Report)
    assert small.report.params.ratio < 0.95
    assert not [note for note in small.report.notes if "recorded" in note]
    for shape in ((2, 8), (3, 13)):
        given = tokens(*shape)
        assert torch.equal(small(**given).logits, small(**given, use_cache=False).logits)
    if bits is None:
        for again in (small, small.module):  # the result itself, and the graph in it
            whole = gc.compress(again, given, sparsity=0.0, progress=False)
            assert torch.equal(whole(**given).logits, small(**given).logits)
            assert isinstance(whole.report, gc.Report) and not [n for n in whole.report.notes if "recorded" in n]
    small.export(tmp_path / "small.pt2")
    small.save(tmp_path / "saved")
    assert torch.equal(gc.load(tmp_path / "saved")(**given).logits, small(**given).logits)


# ------------------------------------------------------------------------------------------------ how much goes
@pytest.mark.slow
@pytest.mark.ci
def test_a_number_is_the_share_of_each() -> None:
    small = compress(Deep().eval(), X, prune=("layer", "hidden"), sparsity=0.5, calibration=batches())
    assert len(small.module.layers) == 2
    assert sum(layer.up.out_features for layer in small.module.layers) == 24
    alone = compress(Deep().eval(), X, prune=("layer", "hidden"), sparsity={"layer": 0.5}, calibration=batches())
    assert len(alone.module.layers) == 2 and all(layer.up.out_features == 24 for layer in alone.module.layers)


@pytest.mark.slow
@pytest.mark.ci
def test_shares_differ_by_role() -> None:
    shares = {"layer": 0.25, "hidden": 0.5, "width": 0.25}
    small = compress(Deep(after=False).eval(), X, prune=tuple(shares), sparsity=shares, calibration=batches())
    assert len(small.module.layers) == 3 and small.module.stem.out_features == 9
    assert sum(layer.up.out_features for layer in small.module.layers) == 36
    with pytest.raises(PlanError, match="names the role 'head'"):
        compress(Deep().eval(), X, prune=("layer", "hidden", "head"), calibration=batches(),
                 sparsity={"layer": 0.25, "hidden": 0.5, "head": 0.1})  # fmt: skip


@pytest.mark.parametrize("cost", ["macs", "params", "bytes"])
@pytest.mark.slow
@pytest.mark.ci
def test_a_budget_is_met_half_by_blocks(cost: str) -> None:
    small = compress(
        Deep().eval(), X, prune=("layer", "hidden"), budget=gc.Budget(**{cost: 0.5}), calibration=batches()
    )
    report = small.report
    assert isinstance(report, gc.Report)
    assert 0.4 < getattr(report, cost).ratio <= 0.5
    assert len(small.module.layers) == 2  # one of four leaves 3/4 of the cost, more than the root of 1/2
    assert sum(layer.up.out_features for layer in small.module.layers) < 48


@pytest.mark.slow
@pytest.mark.ci
def test_beside_a_share_of_the_blocks_units_meet_the_budget() -> None:
    small = compress(
        Deep().eval(), X, prune=("layer", "hidden"), sparsity={"layer": 0.25}, budget=gc.Budget(params=0.5),
        calibration=batches(),
    )  # fmt: skip
    assert len(small.module.layers) == 3
    assert isinstance(small.report, gc.Report) and 0.4 < small.report.params.ratio <= 0.5
    with pytest.raises(BudgetError):
        compress(
            Deep().eval(), X, prune=("layer", "hidden"), sparsity={"layer": 0.25}, budget=gc.Budget(params=0.01),
            calibration=batches(),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ bits, training
@pytest.mark.parametrize("units", [(), ("hidden",)])
@pytest.mark.slow
@pytest.mark.ci
def test_bits_come_last(units: tuple[str, ...], tmp_path: Path) -> None:
    small = compress(Deep().eval(), X, prune=("layer", *units), sparsity=0.25, bits=8, calibration=batches())
    floats = compress(Deep().eval(), X, prune=("layer", *units), sparsity=0.25, calibration=batches())
    report = small.report
    assert isinstance(report, gc.Report) and "masked == without blocks" in report.verified
    assert sum(layer.weight_bits == 8 for layer in report.layers) > 5
    assert report.bytes.after < 0.5 * report.bytes.before
    with torch.no_grad():
        for x in batches(2):
            assert float((small(x) - floats(x)).norm() / floats(x).norm()) < 0.05
    small.save(tmp_path)
    assert torch.equal(gc.load(tmp_path)(X), small(X))


@pytest.mark.slow
@pytest.mark.ci
def test_training_follows_on_the_smaller_model() -> None:
    data = [(x, x[:, 0].gt(0).long()) for x in batches()]
    options: dict[str, Any] = {
        "data": data, "loss": lambda output, batch: F.cross_entropy(output, batch[1]),
        "training": gc.Training(steps=12, lr=0.01), "sparsity": 0.25,
    }  # fmt: skip
    hesso = compress(Deep().eval(), X, prune=("layer", "hidden"), method="hesso", **options)
    assert hesso.form == "native" and len(hesso.module.layers) == 3
    assert sum(layer.up.out_features for layer in hesso.module.layers) == 54
    qat = compress(Deep().eval(), X, prune=("layer",), method="qat", bits=8, **options)
    report = qat.report
    assert isinstance(report, gc.Report) and any(layer.weight_bits == 8 for layer in report.layers)
    assert any(note.startswith("blocks left out before all else: 2 of 8") for note in report.notes)
    with pytest.raises(PlanError, match="prune names no role of units"):
        compress(Deep().eval(), X, prune=("layer",), method="hesso", **options)


# ------------------------------------------------------------------------------------------------ names
@pytest.mark.slow
@pytest.mark.ci
def test_names_of_modules_follow_the_layers_that_are_left() -> None:
    model = Deep().eval()
    with torch.no_grad():  # the second layer does next to nothing
        for own in (model.layers[1].mix, model.layers[1].down):
            own.weight.mul_(1e-6), own.bias.zero_()
    asked: dict[str, Any] = {"prune": ("layer", "hidden"), "sparsity": {"layer": 0.25, "hidden": 0.5}}
    for ignore in ("layers.2.up", "re:2.up$", [model.layers[2].up]):
        small = compress(model, X, calibration=batches(), ignore=ignore, **asked)
        assert gone(small)[0].startswith("layers.1")
        assert [layer.up.out_features == 24 for layer in small.module.layers] == [False, True, False]


def test_a_scope_loses_both() -> None:
    whole = nn.Sequential(nn.Linear(8, 8), Deep()).eval()
    small = compress(
        whole, X, prune=("layer", "hidden"), sparsity={"layer": 0.25, "hidden": 0.5}, scope="1", calibration=batches(),
        ignore=["layers.3"], measure_latency=True,
    )  # fmt: skip
    inner = small.module[1]
    assert len(inner.layers) == 3 and inner.layers[-1].up.out_features == 24
    assert small(torch.randn(3, 8)).shape == (3, 4)
    assert isinstance(small.report, gc.Report) and small.report.latency_ms is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prune": ("block", "layer", "hidden")}, "by whole layers"),
        ({"method": "opq", "bits": 4, "data": [], "loss": F.mse_loss, "epochs": 1}, "removes single weights"),
        ({"sparsity": {"layers.0": 0.5}}, "shares are by the roles"),
        ({"sparsity": 0.5, "budget": gc.Budget(macs=0.5)}, "beside a budget"),
        ({"sparsity": {"layer": 0.5, "hidden": 0.2}, "budget": gc.Budget(macs=0.5)}, "beside a budget"),
        ({"budget": gc.Budget(bytes=0.1), "bits": 8}, "no share of the blocks"),
        ({"budget": gc.Budget(speedup=2)}, "latency is not met"),
        ({"prune": ("layer",), "bits": 8, "saliency": "taylor"}, "saliency with"),
        ({"calibration": None}, "needs calibration"),
        (
            {"prune": ("layer",), "bits": 8, "sparsity": {"layer": 0.5}, "budget": gc.Budget(bytes=0.5)},
            "nothing else may go",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        compress(Deep().eval(), X, **{"prune": ("layer", "hidden"), "calibration": batches(), **options})


# ------------------------------------------------------------------------------------------------ the form
class Fixed(Deep):
    """The forward counts on four layers: the class does not hold fewer."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for k in range(4):
            x = self.layers[k](x)
        found: Tensor = self.head(self.norm(x))
        return found


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("bits", [None, 8])
def test_a_graph_without_blocks_stays_a_graph_behind_units_and_bits(bits: int | None, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"calibration": batches(), "progress": False}
    alone = gc.compress(Fixed().eval(), X, prune=("block",), sparsity=0.5, **asked)
    assert alone.form == "graph" and alone.reason
    small = gc.compress(Fixed().eval(), X, prune=("block", "hidden"), sparsity=0.5, bits=bits, **asked)
    assert isinstance(small.module, fx.GraphModule)
    assert small.form == "graph" and small.edits == ()
    assert small.reason == alone.reason
    small.save(tmp_path)
    loaded = gc.load(tmp_path)
    assert torch.equal(loaded(X), small(X)) and loaded.form == "graph"


@pytest.mark.slow
@pytest.mark.ci
def test_shares_of_blocks_and_units_stand_beside_a_budget_that_chooses_bits() -> None:
    shares = {"layer": 0.25, "hidden": 0.5}
    floats = compress(Deep().eval(), X, prune=("layer", "hidden"), sparsity=shares, calibration=batches())
    for sparsity in (shares, 0.25):
        small = compress(
            Deep().eval(), X, prune=("layer", "hidden"), sparsity=sparsity, bits=(4, 8), budget=gc.Budget(bytes=0.35),
            calibration=batches(),
        )  # fmt: skip
        assert isinstance(small.report, gc.Report) and small.report.bytes.ratio <= 0.35
        units = [len(rows[0]) for name, rows in small.kept.items() if name.endswith("up.weight")]
        if sparsity is shares:
            assert units == [len(rows[0]) for name, rows in floats.kept.items() if name.endswith("up.weight")]
        assert sum(units) == 3 * (12 if sparsity is shares else 18)


@pytest.mark.slow
@pytest.mark.ci
def test_a_role_without_a_share_is_left_alone() -> None:
    asked: dict[str, Any] = {"prune": ("layer", "hidden"), "calibration": batches()}
    units = compress(Deep().eval(), X, sparsity={"hidden": 0.25}, **asked)
    assert len(units.module.layers) == 4
    assert sum(layer.up.out_features for layer in units.module.layers) == 72
    layers = compress(Deep().eval(), X, sparsity={"layer": 0.25}, **asked)
    assert [layer.up.out_features for layer in layers.module.layers] == [24] * 3


# ------------------------------------------------------------------------------------------------ the mode
def test_a_graph_without_blocks_is_analysed_and_prepared_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model = gc.testing.randomize(Net()).eval()
    plan = gc.analyze(model, IMAGE)
    graph = gc.drop_blocks(plan, gc.find_blocks(plan)[:1], calibration=images()).module
    graph.eval()
    assert isinstance(graph, fx.GraphModule)
    wanted, code = graph(IMAGE), graph.code
    for mode in (False, True):
        graph.train(mode)
        torch.testing.assert_close(gc.analyze(graph, IMAGE).captured.module.eval()(IMAGE), wanted)
        ready = gc.prepare(graph, IMAGE, bits=(8, 8))
        assert ready.training == mode
        assert not [record for record in caplog.records if "gradient" in record.message]
    graph.eval()
    assert graph.code == code and torch.equal(graph(IMAGE), wanted)
