"""Residual blocks left out: the law, what makes up for them, who chooses, and the user's own class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphcomp as gc
from graphcomp.errors import BudgetError, NothingToPrune, PlanError
from graphcomp.flows.repaired import Judged
from graphcomp.ir.graph import assign, clone, fetch
from graphcomp.numerics.compare import relative_error
from graphcomp.pruning import depth as depth_module
from graphcomp.pruning.blocks import DropBlocks, MaskBlocks
from graphcomp.pruning.depth import Depth, _within
from graphcomp.pruning.repair import Repaired, repair_behind
from graphcomp.testing import tiny_models
from tests.marks import in_ci
from tests.targets.models import import_transformers


class Layer(nn.Module):
    """Two branches: x + mix(x), then x + feed(norm(x))."""

    def __init__(self, width: int, place: int, after: bool) -> None:
        super().__init__()
        self.place, self.after = place, after
        self.mix = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.after:
            x = self.norm1(x + torch.tanh(self.mix(x)) * 0.3)
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = x + self.mix(torch.tanh(self.norm1(x)))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Deep(nn.Module):
    """An embedding, layers and a head: (n, 8) -> (n, 4)."""

    def __init__(self, layers: int = 4, width: int = 12, after: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.norm = nn.Linear(8, width), nn.Linear(width, 4), nn.LayerNorm(width)
        self.layers = nn.ModuleList(Layer(width, k, after) for k in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)) if self.layers[0].after else self.stem(x)
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.head(x if self.layers[0].after else self.norm(x))
        return found


class Counted(Deep):
    """The forward counts its layers by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for k in range(self.count):
            x = self.layers[k](x)
        found: Tensor = self.head(self.norm(x))
        return found


class Net(nn.Module):
    """Convolutions, ReLU after the sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a, self.b = (nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2)) for _ in "ab")
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for k in range(2):
            y = self.norms[2 * k + 1](self.b[k](F.relu(self.norms[2 * k](self.a[k](x)))))
            x = F.relu(x + y)
        found: Tensor = self.head(x.mean((2, 3)))
        return found


X = torch.linspace(-2, 2, 80).reshape(10, 8)


def batches(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 8, generator=generator) for _ in range(count)]


def models() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    image = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return {
        **tiny_models(),
        "pre-norm": (Deep().eval(), (X,)),
        "post-norm": (Deep(after=True).eval(), (X,)),
        "relu": (gc.testing.randomize(Net()), (image,)),
    }


COUNTS = {
    "residual_cnn": 1, "vision_transformer": 2, "encoder": 2, "decoder": 2, "pre-norm": 8, "post-norm": 8, "relu": 2
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the law
@pytest.mark.parametrize("name", COUNTS)
def test_a_model_without_blocks_is_the_model_in_which_they_add_nothing(name: str) -> None:
    model, inputs = models()[name]
    plan = gc.analyze(model, inputs)
    blocks = gc.find_blocks(plan)
    assert len(blocks) == COUNTS[name] and len({block.name for block in blocks}) == len(blocks)
    for chosen in (*((block,) for block in blocks), blocks):
        small = DropBlocks(chosen)(plan.captured.module)
        masked = MaskBlocks(chosen)(plan.captured.module)
        with torch.no_grad():
            assert torch.equal(small(*inputs), masked(*inputs))
        gone = sum(dict(model.named_parameters())[n].numel() for block in chosen for n in block.parameters)
        assert gone and not {n for block in chosen for n in block.parameters} & {n for n, _ in small.named_parameters()}
    report = gc.drop_blocks(plan, blocks[:1]).report
    assert isinstance(report, gc.Report) and report.verified["masked == without blocks"] == 0
    assert report.macs.after < report.macs.before and report.units_removed == 1


def test_a_block_in_front_of_a_layer_norm_goes_from_norm_to_norm() -> None:
    model = Deep(after=True).eval()
    plan = gc.analyze(model, X)
    small = gc.drop_blocks(plan, gc.find_blocks(plan)[2:4])
    short = Deep(after=True).eval()
    short.load_state_dict(model.state_dict())
    del short.layers[1]
    assert torch.equal(small(X), short(X))


class Peeked(Deep):
    """The value inside of a branch is returned, too."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        inside = self.layers[0].mix(x)
        return self.head(self.norm(x + inside)), inside


class Polynomial(nn.Module):
    """x + x³: a sum of what is made of x, without a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        found: Tensor = self.down(x + 0.1 * x**3)
        return found


@pytest.mark.parametrize("model", [Peeked(), Polynomial()])
def test_a_branch_that_others_read_or_without_weights_is_no_block(model: nn.Module) -> None:
    plan = gc.analyze(model.eval(), X)
    assert gc.find_blocks(plan) == ()
    with pytest.raises(NothingToPrune, match="no residual block"):
        gc.compress(model.eval(), X, prune=("block",), calibration=batches(), progress=False)


# ------------------------------------------------------------------------------------------------ the repair
class Linear(nn.Module):
    """Blocks without a nonlinearity behind the first: one linear map makes up for them exactly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(8, 6), nn.Linear(6, 3)
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = x + self.first(x)
        x = x + self.second(x)
        x = x + self.third(x)
        found: Tensor = self.head(x)
        return found


def test_the_layer_in_front_makes_up_for_what_is_linear() -> None:
    model = Linear().double().eval()
    data = [batch.double() for batch in batches()]
    plan = gc.analyze(model, X.double())
    blocks = gc.find_blocks(plan)
    plain = gc.drop_blocks(plan, blocks[1:3])
    small = gc.drop_blocks(plan, blocks[1:3], calibration=data)
    folded = Depth(plan, blocks, [[x] for x in data]).without(blocks[1:3]).graph
    x = data[0]
    assert (plain(x) - model(x)).norm() > 0.1 * model(x).norm()
    assert (small(x) - model(x)).norm() < 1e-2 * model(x).norm()  # but for the ridge
    assert isinstance(small.report, gc.Report)
    assert small.report.repairs["first"].ratio < 0.05
    assert (small(x) - model(x)).norm() <= (folded(x)[0] - model(x)).norm()


@pytest.mark.parametrize("name", ["pre-norm", "post-norm", "relu"])
@pytest.mark.slow
@pytest.mark.ci
def test_the_repair_brings_the_outputs_nearer(name: str) -> None:
    model, inputs = models()[name]
    generator = torch.Generator().manual_seed(3)
    data = [torch.randn(32, *inputs[0].shape[1:], generator=generator) for _ in range(6)]
    plan = gc.analyze(model, inputs)
    blocks = gc.find_blocks(plan)
    chosen = blocks[-1:] if name == "relu" else blocks[2:4]
    plain, small = gc.drop_blocks(plan, chosen), gc.drop_blocks(plan, chosen, calibration=data[:5])
    before, after = ((found(data[5]) - model(data[5])).norm() for found in (plain, small))
    assert after < before
    assert isinstance(small.report, gc.Report) and small.report.repairs


def test_blocks_that_no_layer_makes_up_for_are_named() -> None:
    model, inputs = tiny_models()["decoder"]
    plan = gc.analyze(model, inputs)
    small = gc.drop_blocks(plan, gc.find_blocks(plan)[:1], calibration=[inputs[0]])
    assert isinstance(small.report, gc.Report) and not small.report.repairs
    assert any("no layer in front of it can hold a map" in note for note in small.report.notes)


def off(graph: Any, plan: Any, data: list[list[Tensor]]) -> float:
    with torch.no_grad():
        return sum(float((graph(*x)[0] - plan.captured.module(*x)[0]).square().sum()) for x in data)


@pytest.mark.parametrize("name", ["pre-norm", "post-norm", "relu"])
@pytest.mark.slow
@pytest.mark.ci
def test_layers_behind_blocks_are_repaired_and_the_error_on_the_calibration_rows_never_grows(name: str) -> None:
    model, inputs = models()[name]
    generator = torch.Generator().manual_seed(3)
    data = [[torch.randn(32, *inputs[0].shape[1:], generator=generator)] for _ in range(5)]
    plan = gc.analyze(model, inputs)
    blocks = gc.find_blocks(plan)
    helped = 0
    for chosen in (blocks[-1:], blocks[1:2], blocks[:1]):
        depth = Depth(plan, blocks, data)
        folded, walked = depth.without(chosen), depth.walked(chosen)
        assert off(walked.graph, plan, data) <= off(folded.graph, plan, data)
        assert all(layer.after <= layer.before for layer in walked.behind.values())
        assert not {*walked.behind} & {*walked.layers}
        assert all(torch.equal(fetch(walked.graph, name), fetch(folded.graph, name)) for name in folded.changed)
        helped += bool(walked.behind)
    assert helped


def test_maps_stay_alone_where_the_repair_behind_them_does_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    def harm(plan: Any, small: fx.GraphModule, *_: Any) -> Repaired:
        worse, _copy = clone(small)
        head = fetch(worse, "head.weight")
        assign(worse, "head.weight", nn.Parameter(3 * head))
        return Repaired(plan, {}, worse, ("head.weight",))

    monkeypatch.setattr(depth_module, "repair_behind", harm)
    plan = gc.analyze(Deep().eval(), X)
    blocks = gc.find_blocks(plan)
    depth = Depth(plan, blocks, [[batch] for batch in batches()])
    assert depth.walked(blocks[2:3]).changed == depth.without(blocks[2:3]).changed


def test_the_stream_behind_a_block_is_what_it_was_behind_the_block() -> None:
    """A sum behind the block: the layer is to give the old sum less the stream as it is now."""
    model = Linear().double().eval()
    with torch.no_grad():
        model.third.weight.zero_()
        model.third.bias.zero_()
    data = [[batch.double()] for batch in batches()]
    plan = gc.analyze(model, X.double())
    blocks = gc.find_blocks(plan)
    small = DropBlocks(blocks[1:2]).rewrite(plan.captured.module)
    found = repair_behind(plan, small, (), data)
    assert "third" in found.layers  # it alone can make up for the second one, as far as a linear map can
    assert found.layers["third"].after < 0.02 * found.layers["third"].before
    assert off(found.graph, plan, data) < 1e-3 * off(small, plan, data)


# ------------------------------------------------------------------------------------------------ the choice
def test_compress_leaves_out_the_block_that_matters_least() -> None:
    model = Deep().eval()
    with torch.no_grad():
        model.layers[2].down.weight *= 1e-3
        model.layers[2].down.bias *= 0
    small = gc.compress(model, X, prune=("block",), sparsity=1 / 8, calibration=batches(), progress=False)
    assert isinstance(small.report, gc.Report)
    assert any(note == "left out: 'layers.2'" or "'layers.2/" in note for note in small.report.notes)
    assert (small(X) - model(X)).norm() < 1e-2 * model(X).norm()
    assert small.report.units_removed == 1 and small.report.units_total == 8


@pytest.mark.slow
@pytest.mark.ci
def test_whole_layers_go_together_and_keep_the_class() -> None:
    model = Deep().eval()
    small = gc.compress(model, X, prune=("layer",), sparsity=0.25, calibration=batches(), progress=False)
    assert small.form == "native" and len(small.module.layers) == 3
    assert isinstance(small.report, gc.Report) and small.report.units_removed == 2
    shared = gc.compress(
        model, X, prune=("layer",), budget=gc.Budget(params=0.7), calibration=batches(), progress=False
    )
    assert shared.form == "native" and len(shared.module.layers) == 2
    with pytest.raises(NothingToPrune, match="no item of a list"):
        gc.compress(Linear().eval(), X, prune=("layer",), calibration=batches(), progress=False)


@pytest.mark.slow
@pytest.mark.ci
def test_a_budget_is_met_with_as_few_blocks_as_possible() -> None:
    model = Deep().eval()
    for budget in (gc.Budget(params=0.8), gc.Budget(macs=0.8), gc.Budget(bytes=0.8), gc.Budget(bops=0.8)):
        small = gc.compress(model, X, prune=("block",), budget=budget, calibration=batches(), progress=False)
        assert isinstance(small.report, gc.Report)
        (name,) = budget.limits()
        assert getattr(small.report, name).ratio <= 0.8 and small.report.units_removed <= 4
    with pytest.raises(BudgetError, match="no choice of blocks"):
        gc.compress(model, X, prune=("block",), budget=gc.Budget(params=0.01), calibration=batches(), progress=False)


@pytest.mark.slow
@pytest.mark.ci
def test_blocks_are_chosen_beside_masked_logits() -> None:
    model, inputs = tiny_models()["decoder"]
    trimmed = gc.trim_vocabulary(model, inputs[0], inputs)
    assert not trimmed(*inputs).isfinite().all()
    small = gc.compress(
        trimmed.module, inputs, prune=("block",), sparsity=0.5, calibration=[inputs[0]] * 2, progress=False
    )
    assert isinstance(small.report, gc.Report) and small.report.units_removed == 1
    assert torch.equal(small(*inputs).isfinite(), trimmed(*inputs).isfinite())


def test_few_batches_do_where_memory_is_small() -> None:
    plan = gc.analyze(Deep().eval(), X)
    blocks = gc.find_blocks(plan)
    nodes = {blocks[0].total, blocks[0].end}
    found = _within(plan.captured.module, nodes, [[X]] * 5, most=3 * 10 * 12 * 4)
    assert len(found) == 3 and len(_within(plan.captured.module, nodes, [[X]] * 5, most=1)) == 1


class Nested(nn.Module):
    """A block within a block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.up, self.down, self.head = (nn.Linear(8, 8) for _ in range(4))
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        h = self.up(x)
        found: Tensor = self.head(x + self.down(torch.relu(h + self.inner(torch.tanh(h)))))
        return found


def test_a_block_within_a_block_goes_alone_or_with_the_other() -> None:
    model = Nested().eval()
    plan = gc.analyze(model, X)
    inner, outer = gc.find_blocks(plan)
    assert inner.total in outer.ops and inner.parameters == ("inner.weight", "inner.bias")
    both = gc.drop_blocks(plan, [inner, outer], calibration=batches())
    assert torch.equal(both(X), gc.drop_blocks(plan, [outer], calibration=batches())(X))
    assert isinstance(both.report, gc.Report)
    assert any("within another block" in note for note in both.report.notes)
    torch.testing.assert_close(gc.drop_blocks(plan, [outer])(X), model.head(torch.tanh(model.stem(X))))
    chosen = gc.compress(model, X, prune=("block",), sparsity=0.99, calibration=batches(), progress=False)
    assert isinstance(chosen.report, gc.Report) and chosen.report.units_removed <= 2


def test_ignored_modules_keep_their_blocks() -> None:
    model = Deep().eval()
    options: dict[str, Any] = {"prune": ("block",), "calibration": batches(), "progress": False}
    small = gc.compress(model, X, sparsity=0.99, ignore=["layers.1", "re:layers.2"], **options)
    assert isinstance(small.report, gc.Report) and small.report.units_removed == 4
    assert {"layers.0", "layers.1"} <= {
        n.rpartition(".")[0].rpartition(".")[0] for n, _ in small.module.named_parameters()
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prune": ("block", "layer")}, "by whole layers"),
        ({"saliency": "taylor"}, "saliency with prune"),
        ({"round_to": 2}, "round_to with prune"),
        ({"sparsity": 0.2, "budget": gc.Budget(macs=0.5)}, "beside a budget"),
        ({"sparsity": {"stem": 0.5}}, "sparsity by module"),
        ({"budget": gc.Budget(latency_ms=1.0)}, "latency is not met"),
        ({"calibration": None}, "needs calibration"),
        (
            {"method": "hesso", "data": [X], "loss": lambda y, _: y.sum(), "steps": 12, "calibration": None},
            "no role of units",
        ),
    ],
)
def test_what_does_not_go_with_blocks_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        gc.compress(Deep().eval(), X, **{"prune": ("block",), "calibration": batches(), "progress": False, **options})


def test_blocks_of_another_plan_are_refused() -> None:
    plan, other = gc.analyze(Deep().eval(), X), gc.analyze(Deep().eval(), X)
    with pytest.raises(PlanError, match="a block of this plan"):
        gc.drop_blocks(plan, gc.find_blocks(other)[:1])
    with pytest.raises(PlanError, match="a series of blocks"):
        gc.drop_blocks(plan, "layers.0")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ the user's class
@pytest.mark.slow
@pytest.mark.ci
def test_whole_children_of_a_list_leave_the_class(tmp_path: Path) -> None:
    model = Deep().eval()
    plan = gc.analyze(model, X)
    small = gc.drop_blocks(plan, gc.find_blocks(plan)[2:4], calibration=batches())
    assert small.form == "native" and type(small.module) is Deep and len(small.module.layers) == 3
    assert [layer.place for layer in small.module.layers] == [0, 1, 2], "attributes that count follow"
    assert len(model.layers) == 4 and model.layers[3].place == 3
    small.save(tmp_path)
    loaded = gc.load(tmp_path)
    assert torch.equal(loaded(X), small(X))
    again = gc.compress(small.module, X, sparsity=0.3, progress=False)
    assert again.form == "native"


def test_the_attribute_that_counts_the_layers_follows() -> None:
    model = Counted().eval()
    plan = gc.analyze(model, X)
    small = gc.drop_blocks(plan, gc.find_blocks(plan)[2:6])
    assert small.form == "native" and small.module.count == 2 and ("", "count", 2) in small.edits
    assert small(torch.randn(3, 8)).shape == (3, 4)


def test_parts_of_children_leave_a_graph_for_any_batch(tmp_path: Path) -> None:
    model = Deep().eval()
    plan = gc.analyze(model, X)
    small = gc.drop_blocks(plan, gc.find_blocks(plan)[3:4], calibration=batches())
    assert small.form == "graph" and "beside what stays" in small.reason
    assert small(torch.randn(3, 8)).shape == (3, 4)
    small.save(tmp_path / "folder")
    assert torch.equal(gc.load(tmp_path / "folder")(X), small(X))
    small.export(tmp_path / "model.pt2")


@pytest.mark.parametrize("kind", in_ci("Llama", "Bert"))
def test_transformers_lose_whole_layers(kind: str, tmp_path: Path) -> None:
    transformers = import_transformers()
    options: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "Llama":
        config = transformers.LlamaConfig(**options, num_key_value_heads=1, eos_token_id=2, pad_token_id=0)
        model = transformers.LlamaForCausalLM(config).eval()
    else:
        model = transformers.BertModel(transformers.BertConfig(**options), add_pooling_layer=False).eval()
    ids = torch.arange(4, 20).reshape(2, 8)
    kwargs = {"use_cache": False} if kind == "Llama" else None
    plan = gc.analyze(model, {"input_ids": ids}, kwargs)
    blocks = gc.find_blocks(plan)
    assert len(blocks) == 6
    small = gc.drop_blocks(plan, blocks[2:4])
    assert small.form == "native", small.reason
    assert small.module.config.num_hidden_layers == 2 and model.config.num_hidden_layers == 3
    if kind == "Llama":
        assert [layer.self_attn.layer_idx for layer in small.module.model.layers] == [0, 1]
        said = small.module.generate(ids, max_new_tokens=4, do_sample=False)
        again = small.module.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
        assert torch.equal(said, again)
    small.save(tmp_path)
    loaded = gc.load(tmp_path)
    assert type(loaded.module) is type(model)
    assert torch.equal(loaded(input_ids=ids, **(kwargs or {}))[0], small(input_ids=ids, **(kwargs or {}))[0])


@pytest.mark.slow
@pytest.mark.ci
def test_both_stacks_lose_layers_and_the_config_says_how_many(tmp_path: Path) -> None:
    """T5's layers are lists of sublayers, whose number the class counts on; masks of what goes are read by nobody."""
    transformers = import_transformers()
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = transformers.T5ForConditionalGeneration(config).eval(), torch.arange(4, 20).reshape(2, 8)
    given = {"input_ids": ids, "decoder_input_ids": ids, "attention_mask": torch.ones_like(ids)}
    small = gc.compress(
        model, (), given, sparsity=0.6, prune=("layer",), calibration=[given], ignore="encoder.block.1", progress=False
    )
    assert small.form == "native", small.reason
    assert (small.module.config.num_layers, small.module.config.num_decoder_layers) == (2, 1)
    small.module.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**given).logits, small(**given).logits)


@pytest.mark.slow
@pytest.mark.ci
def test_what_the_config_builds_no_more_goes_with_the_last_layer_of_its_kind(tmp_path: Path) -> None:
    """Gemma 3 holds angles for each kind of attention."""
    transformers = import_transformers()
    config = transformers.Gemma3TextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, layer_types=["sliding_attention", "full_attention"], sliding_window=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = transformers.Gemma3ForCausalLM(config).eval(), torch.arange(4, 20).reshape(2, 8)
    small = gc.compress(
        model, {"input_ids": ids}, sparsity=0.9, prune=("layer",), ignore="model.layers.0",
        calibration=[{"input_ids": ids}], progress=False,
    )  # fmt: skip
    assert small.module.config.layer_types == ["sliding_attention"]
    small.module.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, small.module(ids).logits)


@pytest.mark.parametrize("helps", [True, False])
def test_the_outputs_judge_the_repair(helps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, data = gc.analyze(Deep().eval(), X), batches()
    chosen = gc.find_blocks(plan)[1:3]
    if not helps:
        monkeypatch.setattr("graphcomp.flows.depth.judge", lambda *_: Judged((0.1, 0.2), 64))
    small, plain = gc.drop_blocks(plan, chosen, calibration=data), gc.drop_blocks(plan, chosen)
    same = all(torch.equal(a, b) for a, b in zip(small.module.parameters(), plain.module.parameters(), strict=True))
    assert same != helps and bool(small.report.repairs) == helps
    said = (
        "by the repair the error of the outputs goes from" if helps else "not repaired, as it would not help: the error"
    )
    assert any(note.startswith(said) for note in small.report.notes)
    if helps:
        before, after = (relative_error(plan.model(data[0]), model(data[0])) for model in (plain, small))
        assert after < before
