"""The user's own class, cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.errors import VerificationError
from graphcomp.native.model import native
from graphcomp.pruning.slice import SliceGroups
from tests.targets import models
from tests.targets.models import INPUTS, analysed, import_transformers, some


@pytest.mark.parametrize("name", ["Mlp", "Residual", "Attention", "Recurrent", "Tied", "Grouped", "Branching"])
def test_is_of_the_users_class_and_computes_what_the_reference_does(name: str) -> None:
    model = getattr(models, name)().eval()
    analysis = analysed(model, *INPUTS[name])
    result = native(analysis, some(analysis))
    assert type(result.module) is type(model), result.reason
    assert result.error <= 1e-5
    assert sum(p.numel() for p in result.module.parameters()) < sum(p.numel() for p in model.parameters())
    if analysis.captured.producer == "export":
        small = SliceGroups(analysis.coupling, some(analysis))(analysis.captured.module)
        torch.testing.assert_close(result.module(*INPUTS[name]), small(*INPUTS[name]))


def test_attributes_of_torch_layers_follow() -> None:
    analysis = analysed(models.Residual().eval(), *INPUTS["Residual"])
    result = native(analysis, some(analysis))
    assert result.module is not None
    got = {name: m for name, m in result.module.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))}
    for conv in (m for m in got.values() if isinstance(m, nn.Conv2d)):
        assert conv.out_channels == conv.weight.shape[0]
        assert conv.in_channels == conv.weight.shape[1] * conv.groups
    assert got["depthwise"].groups == got["depthwise"].weight.shape[0] < 16
    assert got["bn"].num_features == got["bn"].weight.shape[0] < 8
    assert ("bn", "num_features", got["bn"].num_features) in result.edits


def test_attributes_with_equal_values_are_told_apart() -> None:
    analysis = analysed(models.Attention(), *INPUTS["Attention"])
    heads = next(g for g in analysis.groups if g.role == "head")
    result = native(analysis, {heads: torch.tensor([1, 2, 3])})
    assert result.module is not None, result.reason
    assert (result.module.heads, result.module.head_dim) == (3, 4)
    assert ("", "heads", 3) in result.edits


def test_a_length_computed_from_an_attribute_and_another_length() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = 10
            self.up, self.a, self.b = nn.Linear(6, 16), nn.Linear(10, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.up(x))
            left, right = torch.split(h, [self.first, h.shape[1] - self.first], 1)
            return self.a(left) + self.b(right)

    analysis = analysed(Halves(), *INPUTS["Mlp"])
    sizes = {g.size: g for g in analysis.groups}
    result = native(analysis, {sizes[10]: torch.arange(7), sizes[6]: torch.arange(2)})
    assert result.module is not None, result.reason
    assert result.module.first == 7


def test_an_attribute_that_would_need_two_values_is_named() -> None:
    analysis = analysed(models.Attention(), *INPUTS["Attention"])
    dims = [g for g in analysis.groups if g.role == "head_dim"]
    result = native(analysis, {dims[0]: torch.arange(2)})
    assert result.module is None
    assert "head_dim" in result.reason
    assert "models.py:" in result.reason
    both = native(analysis, {g: torch.arange(2) for g in dims})
    assert both.module is not None
    assert both.module.head_dim == 2


def test_heads_of_torch_attention_cannot_be_said_in_its_class() -> None:
    analysis = analysed(models.TorchAttention().eval(), *INPUTS["TorchAttention"])
    heads = next(g for g in analysis.groups if g.role == "head")
    result = native(analysis, {heads: torch.arange(2)})
    assert result.module is None
    assert result.reason


def test_an_implied_constant_is_named() -> None:
    class Implied(models.Attention):
        def forward(self, x: Tensor) -> Tensor:
            n, s, _ = x.shape
            q, k, v = (f(x).view(n, s, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
            attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return self.out(attended.flatten(2))

    analysis = analysed(Implied(), *INPUTS["Attention"])
    dims = next(g for g in analysis.groups if g.role == "head_dim")
    result = native(analysis, {dims: torch.arange(2)})
    assert result.module is None
    assert "takes its scale from a length" in result.reason


def test_the_users_model_is_left_as_it_was() -> None:
    model = models.Attention().train()
    model.q.eval()
    model.k.weight.requires_grad_(False)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    attributes = {name: {k: v for k, v in vars(m).items() if type(v) is int} for name, m in model.named_modules()}
    analysis = analysed(model, *INPUTS["Attention"])
    result = native(analysis, some(analysis))
    assert result.module is not None
    for name, p in model.named_parameters():
        assert id(p) == before[name][0]
        assert torch.equal(p, before[name][1])
    assert attributes == {n: {k: v for k, v in vars(m).items() if type(v) is int} for n, m in model.named_modules()}
    held = [value for m in result.module.modules() for value in vars(m).values() if isinstance(value, int)]
    assert {type(value) for value in held} <= {int, bool}
    assert [m.training for m in result.module.modules()] == [m.training for m in model.modules()]
    assert not result.module.k.weight.requires_grad
    memory = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not memory & {p.untyped_storage().data_ptr() for p in result.module.parameters()}


def test_tied_parameters_stay_tied_and_buffers_follow() -> None:
    analysis = analysed(models.Tied(), *INPUTS["Tied"])
    result = native(analysis, some(analysis))
    assert result.module is not None, result.reason
    assert result.module.head.weight is result.module.embed.weight
    assert result.module.position.shape == (32, 6)
    assert "position" not in result.module.state_dict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = models.Mlp().to(dtype)
    analysis = analysed(model, INPUTS["Mlp"][0].to(dtype))
    result = native(analysis, some(analysis))
    assert result.module is not None
    assert {p.dtype for p in result.module.parameters()} == {dtype}


def test_a_model_without_weights() -> None:
    with torch.device("meta"):
        model, x = models.Attention(), torch.empty(2, 5, 16)
    analysis = analysed(model, x)
    result = native(analysis, some(analysis))
    assert result.module is not None
    assert result.module.q.weight.is_meta
    assert result.module.q.weight.shape == (4, 16)
    assert result.error != result.error  # nothing was compared


def test_hooks_and_parametrizations_stay() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = models.Mlp()
    parametrize.register_parametrization(model.up, "weight", Double())
    model.up.register_forward_hook(lambda _module, _inputs, output: output + 1)
    analysis = analysed(model, *INPUTS["Mlp"])
    assert analysis.groups
    result = native(analysis, some(analysis))
    assert result.module is not None, result.reason
    assert parametrize.is_parametrized(result.module.up)
    assert result.module.up.weight.shape == (8, 6)
    assert len(result.module.up._forward_hooks) == 1


def test_a_model_that_cannot_be_copied() -> None:
    class Stubborn(models.Mlp):
        def __deepcopy__(self, memo: object) -> Stubborn:
            raise TypeError("one of a kind")

    analysis = analysed(Stubborn(), *INPUTS["Mlp"])
    result = native(analysis, some(analysis))
    assert result.module is None
    assert "one of a kind" in result.reason


def test_a_shared_module_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = models.Attention()
            self.again = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.again(torch.tanh(self.first(x)))

    analysis = analysed(Twice(), *INPUTS["Attention"])
    heads = next(g for g in analysis.groups if g.role == "head")
    result = native(analysis, {heads: torch.tensor([0, 3])})
    assert result.module is not None, result.reason
    assert result.module.first is result.module.again
    assert result.module.first.heads == 2


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 16), nn.LayerNorm(16), nn.RMSNorm(16)], ids=lambda n: type(n).__name__
)
def test_a_recorded_model_with_statistics_over_what_is_cut(norm: nn.Module) -> None:
    class Normed(models.Branching):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(torch.relu(self.up(x)))
            return self.down(h) if float(x.sum()) > -1e9 else x

    analysis = analysed(Normed(), *INPUTS["Branching"])
    assert analysis.captured.producer == "record"
    assert any(group.normalized for group in analysis.groups)
    result = native(analysis, some(analysis))
    assert result.module is not None, result.reason
    assert result.error <= 1e-5


class Branched(models.Branching):
    """A recorded model whose hidden units are put to use by `use`."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.use = use
        self.other = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, torch.sigmoid(self.up(x))) if float(x.sum()) > -1e9 else x


OVER_ACTIVATIONS = {
    "normalize": lambda m, h: m.down(nn.functional.normalize(h, dim=-1)),
    "mean": lambda m, h: m.down(h - h.mean(-1, keepdim=True)),
    "standard deviation": lambda m, h: m.down(h / torch.std(h, -1, keepdim=True)),
    "sum": lambda m, h: m.down(h) + h.sum(-1, keepdim=True),
    "product of activations": lambda m, h: m.down(h) * (h @ m.other(h).t()).mean(),
    "more often than recorded": lambda m, h: sum(
        (m.down(nn.functional.normalize(h + k, dim=-1)) for k in range(40 - int(h.sum()))), torch.zeros(())
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OVER_ACTIVATIONS)
def test_a_recorded_model_that_sums_over_what_is_cut(name: str) -> None:
    """No parameter reads the removed units there: the reference has to leave them out of the op itself."""
    torch.manual_seed(0)
    analysis = analysed(Branched(OVER_ACTIVATIONS[name]).eval(), *INPUTS["Branching"])
    assert analysis.captured.producer == "record"
    result = native(analysis, some(analysis))
    assert result.module is not None, result.reason
    assert result.module.up.weight.shape[0] == 8
    assert result.error <= 1e-5
    assert result.rounding == ""


def rounded(m: Any, h: Tensor) -> Tensor:
    """An output that rounding decides: sixteen addends, eight of them zeros, are summed up in another order than eight.
    For a few rows the sums may be equal all the same, so the tests take many."""
    return torch.sin(h.sum(-1, keepdim=True) * 1e6) + m.down(h)


def test_what_rounding_decides_is_verified_in_float64() -> None:
    torch.manual_seed(0)
    model = Branched(lambda m, h: rounded(m, h)).eval()
    analysis = analysed(model, torch.randn(64, 6))
    result = native(analysis, some(analysis))
    assert result.module is not None, result.reason
    assert "differs from the reference" in result.rounding
    assert result.error <= 1e-6
    assert next(result.module.parameters()).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    report = gc.slice_groups(analysis, some(analysis)).report
    assert list(report.verified) == ["native == masked, in float64"]
    assert any(note.startswith("verified in float64") for note in report.notes)


def test_a_choice_that_rounding_decides_is_verified_in_float64() -> None:
    """The output is False wherever it is computed; the floats before it are those that rounding moves."""
    torch.manual_seed(0)
    model = Branched(lambda m, h: (m.down(h), rounded(m, h) > 1e3)).eval()
    analysis = analysed(model, torch.randn(64, 6))
    result = native(analysis, some(analysis))
    assert result.module is not None, result.reason
    assert "what output '1' is computed of differs" in result.rounding
    assert result.error <= 1e-6


def test_a_choice_that_differs_in_float64_too_is_refused() -> None:
    model = Branched(lambda m, h: (m.down(h), m.down(h) / len(h[0]) > 1e3)).eval()
    analysis = analysed(model, *INPUTS["Branching"])
    with pytest.raises(VerificationError, match=r"what output '1' is computed of differs .*, and in float64: what"):
        gc.slice_groups(analysis, some(analysis))


def test_what_differs_in_float64_too_is_refused() -> None:
    analysis = analysed(Branched(lambda m, h: m.down(h) / len(h[0])).eval(), *INPUTS["Branching"])
    with pytest.raises(VerificationError, match=r"differs from the reference by .*, and in float64: output"):
        gc.slice_groups(analysis, some(analysis))


def test_what_cannot_run_in_float64_is_refused() -> None:
    def use(m: Any, h: Tensor) -> Tensor:
        if h.dtype != torch.float32:
            raise TypeError("single precision only")
        return rounded(m, h)

    torch.manual_seed(0)
    analysis = analysed(Branched(use).eval(), torch.randn(64, 6))
    with pytest.raises(VerificationError, match=r"in float64 the comparison does not run: .*single precision"):
        gc.slice_groups(analysis, some(analysis))


def test_dropped_outputs_are_not_compared() -> None:
    class Two(models.Mlp):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            h = torch.relu(self.up(x))
            return {"out": self.down(h), "mean": h.mean(1)}

    from graphcomp.coupling.analysis import analyze_captured

    analysis = analyze_captured(capture(Two(), INPUTS["Mlp"], outputs="out"))
    result = native(analysis, some(analysis))
    assert result.module is not None, result.reason
    assert set(result.module(*INPUTS["Mlp"])) == {"out", "mean"}


# ---------------------------------------------------------------------------------------------- Hugging Face
TINY = {"vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


@pytest.mark.slow
def test_bert_keeps_its_class() -> None:
    transformers = import_transformers()
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TINY)).eval()
    ids = {"input_ids": torch.randint(37, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    from graphcomp.coupling.analysis import analyze_captured

    analysis = analyze_captured(capture(model, ids))
    result = native(analysis, some(analysis))  # equal shares of the head dims of query, key and value
    assert type(result.module) is type(model), result.reason
    layer = result.module.bert.encoder.layer[0].attention.self
    assert layer.attention_head_size == 4
    assert layer.query.weight.shape == (8, 16)


@pytest.mark.slow
def test_llama_generates_after_the_cut() -> None:
    transformers = import_transformers()
    from graphcomp.coupling.analysis import analyze_captured

    config = transformers.LlamaConfig(**TINY, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 37, (2, 6))
    analysis = analyze_captured(capture(model, {"input_ids": ids, "use_cache": False}))
    result = native(analysis, some(analysis, "head_dim"))
    assert isinstance(result.module, transformers.LlamaForCausalLM), result.reason
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached = result.module.generate(ids, use_cache=True, **options)
    plain = result.module.generate(ids, use_cache=False, **options)
    assert cached.shape[1] > 6
    assert torch.equal(cached, plain)
    assert copy.deepcopy(result.module).generation_config == result.module.generation_config


class StridedGroups(nn.Module):
    """The stride, the padding and the number of groups are one and the same number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=2, groups=2)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.grouped(torch.relu(self.stem(x)))))


def test_a_stride_that_equals_the_number_of_groups_stays() -> None:
    plan = analysed(StridedGroups().eval(), torch.randn(2, 3, 9, 9))
    (group,) = [g for g in plan.groups if g.role == "group"]
    result = native(plan, {group: torch.tensor([1])})
    assert result.module is not None, result.reason
    conv = result.module.grouped
    assert (conv.groups, conv.stride, conv.padding) == (1, (2, 2), (2, 2))


class PaddedByHand(nn.Conv2d):
    """Pads and convolves in one line, as ports of other frameworks' "same" padding do."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, 2, 0, 1, self.groups)


def test_two_ops_on_one_line() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), PaddedByHand(8, 8, 3, groups=8), nn.Conv2d(8, 3, 1)).eval()
    plan = analysed(model, torch.randn(2, 3, 8, 8))
    (group,) = plan.groups
    result = native(plan, {group: torch.arange(5)})
    assert result.module is not None, result.reason
    assert result.module[2].groups == 5


def test_reading_a_computed_weight_leaves_the_model_as_it_is() -> None:
    norm = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(norm(nn.Linear(6, 12)), nn.ReLU(), norm(nn.Linear(12, 3))).train()
    x = torch.randn(4, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analysis = analysed(model, x)
    result = native(analysis, some(analysis))
    assert result.module is not None, result.reason
    after = model.state_dict()
    assert model.training and all(torch.equal(after[name], value) for name, value in before.items())
