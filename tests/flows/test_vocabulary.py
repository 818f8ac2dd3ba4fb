"""A model on part of its vocabulary computes what the whole model computes, on all texts of the kept ids."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.errors import InputError, PlanError
from graphcomp.native.vocabulary import TrimmedEmbedding, TrimmedLinear
from graphcomp.testing import tiny_models
from tests.marks import in_ci
from tests.targets.models import import_transformers

KEPT = torch.tensor([1, 2, 5, 7, 9, 10, 14, 18])
IDS = torch.tensor([[1, 5, 7, 9], [2, 18, 14, 10]])


class Reader(nn.Module):
    """Ids and kinds -> mean of rows through a layer; two tables, of which one is the vocabulary: (n, 3)."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.word, self.kind = nn.Embedding(20, 6, padding_idx=padding), nn.Embedding(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        found: Tensor = self.head((self.word(ids) + self.kind(kinds)).mean(1))
        return found


class Speaker(nn.Module):
    """Ids -> logits, by a head that is tied to the table or not: (n, s, 20)."""

    def __init__(self, *, tied: bool, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.word, self.inner, self.head = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20, bias=bias)
        if tied:
            self.head.weight = self.word.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.inner(self.word(ids))))
        return found


class Functional(Speaker):
    """A tied head without a module."""

    def __init__(self) -> None:
        super().__init__(tied=False)
        del self.head

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.inner(self.word(ids))) @ self.word.weight.t()


class Scaled(nn.Embedding):
    """A class of the user's own."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 2


KINDS = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])


def others(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [KEPT[torch.randint(len(KEPT), (3, 6), generator=generator)] for _ in range(count)]


# ------------------------------------------------------------------------------------------------ the law
def test_outputs_are_bit_equal_on_all_texts_of_the_kept_ids() -> None:
    model = Reader().eval()
    small = gc.trim_vocabulary(model, KEPT, (IDS, KINDS))
    assert small.form == "native" and type(small.module) is Reader
    assert small.module.word.weight.shape == (8, 6) and small.module.kind.weight.shape == (4, 6)
    for ids in others():
        kinds = torch.zeros_like(ids)
        assert torch.equal(model(ids, kinds), small(ids, kinds))
    assert model.word.weight.shape == (20, 6), "the caller's model is as it was"
    assert torch.equal(small.kept["word.weight"][0], KEPT)
    report = small.report
    assert isinstance(report, gc.Report)
    assert report.verified == {"trimmed == original, at the kept ids": 0.0, "native == trimmed": 0.0}
    assert report.params.before - report.params.after == 12 * 6
    assert report.bytes.before - report.bytes.after == 12 * 6 * 4 - 20 * 4, "less the id map, of 32 bits an id"
    assert report.units_removed == 12 and report.units_total == 20


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_gives_the_old_columns_with_minus_infinity_where_ids_are_gone(tied: bool, bias: bool) -> None:
    model = Speaker(tied=tied, bias=bias).eval()
    small = gc.trim_vocabulary(model, KEPT, IDS, heads=() if tied else "head")
    assert small.form == "native" and isinstance(small.module.head, TrimmedLinear)
    assert small.module.head.weight.shape == (8, 6) and (small.module.head.weight is small.module.word.weight) is tied
    gone = [i for i in range(20) if i not in KEPT.tolist()]
    for ids in others():
        before, after = model(ids), small(ids)
        torch.testing.assert_close(after[..., KEPT], before[..., KEPT])
        assert (after[..., gone] == -torch.inf).all() and after.shape == before.shape
    assert isinstance(small.report, gc.Report) and small.report.macs.after < small.report.macs.before
    assert set(small.kept) == {"word.weight", "head.weight", *(["head.bias"] if bias else [])}


def test_narrow_logits_have_one_column_per_kept_id() -> None:
    model = Speaker(tied=True).eval()
    small = gc.trim_vocabulary(model, KEPT, IDS, logits="narrow")
    assert small.form == "native" and type(small.module.head) is nn.Linear
    for ids in others():
        torch.testing.assert_close(small(ids), model(ids)[..., KEPT])


def test_a_head_of_its_own_stays_unless_it_is_named_and_the_report_says_so() -> None:
    model = Speaker(tied=False).eval()
    small = gc.trim_vocabulary(model, KEPT, IDS)
    assert torch.equal(small(IDS), model(IDS)) and small.module.head.weight.shape == (20, 6)
    assert isinstance(small.report, gc.Report)
    assert any("heads='head'" in note for note in small.report.notes)


def test_a_head_without_a_module_is_cut_in_a_graph() -> None:
    model = Functional().eval()
    small = gc.trim_vocabulary(model, KEPT, IDS)
    assert small.form == "graph" and small.reason
    for ids in others():
        torch.testing.assert_close(small(ids)[..., KEPT], model(ids)[..., KEPT])


class Shifted(nn.Embedding):
    """Reads rows of a smaller table otherwise, which no id map in front makes up for."""

    def forward(self, ids: Tensor) -> Tensor:
        return (
            F.embedding((ids + 1) % self.num_embeddings, self.weight)
            if self.num_embeddings < 20
            else super().forward(ids)
        )


def test_an_embedding_with_a_forward_of_its_own_stays_of_its_class_or_is_cut_in_a_graph_for_any_batch() -> None:
    model = Speaker(tied=False).eval()
    model.word = Scaled(20, 6)
    small = gc.trim_vocabulary(model, KEPT, IDS)
    assert small.form == "native" and isinstance(small.module.word, Scaled)
    assert all(torch.equal(small(ids), model(ids)) for ids in others())
    model.word = Shifted(20, 6)
    small = gc.trim_vocabulary(model, KEPT, IDS)
    assert small.form == "graph" and "other outputs" in small.reason
    assert all(torch.equal(small(ids), model(ids)) for ids in others())


# ------------------------------------------------------------------------------------------------ other ids
def test_ids_without_a_row_are_refused() -> None:
    for model in (Speaker(tied=True).eval(), Functional().eval()):
        small = gc.trim_vocabulary(model, KEPT, IDS)
        with pytest.raises(IndexError):
            small(torch.tensor([[0, 1, 2, 5]]))


def test_ids_without_a_row_are_read_as_the_unknown_one() -> None:
    for model in (Speaker(tied=True).eval(), Functional().eval()):
        small = gc.trim_vocabulary(model, KEPT, IDS, unknown=4)
        known = sorted({*KEPT.tolist(), 4})
        assert torch.equal(small(torch.tensor([[0, 1, 2, 5]])), small(torch.tensor([[4, 1, 2, 5]])))
        torch.testing.assert_close(small(IDS)[..., known], model(IDS)[..., known])
        assert (small(IDS)[..., 0] == -torch.inf).all(), "the head speaks no other id"


def test_the_padding_row_is_kept_and_stays_without_a_gradient() -> None:
    model = Reader(padding=3).eval()
    small = gc.trim_vocabulary(model, KEPT, (IDS, KINDS))
    assert 3 in small.kept["word.weight"][0]
    word: Any = small.module.word
    ids = torch.tensor([[3, 5, 3, 7]])
    small(ids, torch.zeros_like(ids)).sum().backward()
    row = int(word.rows[3])
    assert word.padding_idx == 3 and not word.weight.grad[row].any() and word.weight.grad.any()


# ------------------------------------------------------------------------------------------------ what is kept with it
@pytest.mark.slow
@pytest.mark.ci
def test_a_folder_and_files_hold_the_trimmed_model(tmp_path: Path) -> None:
    for k, model in enumerate((Speaker(tied=True).eval(), Functional().eval())):
        small = gc.trim_vocabulary(model, KEPT, IDS)
        small.save(tmp_path / str(k))
        factory = (lambda: Speaker(tied=True)) if k == 0 else None
        loaded = gc.load(tmp_path / str(k), model_factory=None if factory is None else factory)
        assert loaded.form == small.form and all(torch.equal(loaded(ids), small(ids)) for ids in others())
        small.export(tmp_path / f"{k}.pt2")
        assert small.export_report is not None and small.export_report.agreement.error < 1e-5


@pytest.mark.parametrize("name", in_ci("model.onnx"))
def test_an_onnx_file_holds_the_id_map(name: str, tmp_path: Path) -> None:
    small = gc.trim_vocabulary(Speaker(tied=True).eval(), KEPT, IDS)
    small.export(tmp_path / name)
    assert small.export_report is not None and small.export_report.agreement.error < 1e-5


def test_a_recipe_alone_builds_the_trimmed_model_again(tmp_path: Path) -> None:
    small = gc.trim_vocabulary(nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 3)).eval(), KEPT, IDS)
    assert small.form == "native" and isinstance(small.module[0], TrimmedEmbedding)
    small.save(tmp_path)
    loaded = gc.load(tmp_path)
    assert type(loaded.module) is nn.Sequential and torch.equal(loaded(IDS), small(IDS))


@pytest.mark.slow
@pytest.mark.ci
def test_the_trimmed_model_is_compressed_further_and_a_compressed_one_is_trimmed() -> None:
    model, inputs = tiny_models()["decoder"]
    kept = inputs[0].unique()
    small = gc.trim_vocabulary(model, kept, inputs)
    both = gc.compress(small.module, inputs, sparsity=0.3, progress=False)
    cut = gc.compress(model, inputs, sparsity=0.3, progress=False)
    other = gc.trim_vocabulary(cut, kept, inputs)
    for found in (both, other):
        assert (found(*inputs)[..., kept].isfinite()).all() and not found(*inputs).isfinite().all()
    torch.testing.assert_close(other(*inputs)[..., kept], cut(*inputs)[..., kept])


@pytest.mark.parametrize("trimmed", in_ci(True))
def test_the_trimmed_model_is_quantized(trimmed: bool) -> None:
    model, inputs = tiny_models()["decoder"]
    small = gc.trim_vocabulary(model, inputs[0], inputs)
    integers = gc.compress(small.module, inputs, sparsity=0.0, bits=8, progress=False)
    known = inputs[0].unique()
    torch.testing.assert_close(integers(*inputs)[..., known], small(*inputs)[..., known], atol=2.0, rtol=0.2)
    assert (integers(*inputs) == -torch.inf).any()
    with pytest.raises(PlanError, match="quantized already"):
        gc.trim_vocabulary(integers, inputs[0], inputs)


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "holds no id"),
        ([-1, 2], "at least 0"),
        ([1, 20], "below 20"),
        ([0.5], "got a float"),
        (torch.rand(3), "float32"),
        ("abc", "got a str"),
        ({"input_ids": [1]}, "got a dict"),
        (range(20), "nothing to trim"),
        ([1, 2], "example inputs hold the id 5"),
    ],
)
def test_ids_that_cannot_be_are_refused(ids: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        gc.trim_vocabulary(Speaker(tied=True).eval(), ids, IDS)


def test_ids_come_in_any_nesting() -> None:
    batches = [KEPT[:3], [KEPT[3:5].numpy(), int(KEPT[5])], (row.tolist() for row in KEPT[6:].split(1))]
    small = gc.trim_vocabulary(Speaker(tied=True).eval(), batches, IDS)
    assert torch.equal(small.kept["word.weight"][0], KEPT)


class Offset(nn.Module):
    """Ids with an offset: what the rows stand for cannot be told from the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(30, 4)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.word(ids + 10)
        return found


class Normed(Speaker):
    """The table is read by an op that is neither a lookup nor a head."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.word.weight) / self.word.weight.norm()


def test_models_without_such_a_table_are_refused() -> None:
    with pytest.raises(PlanError, match="no embedding table"):
        gc.trim_vocabulary(Offset().eval(), KEPT, IDS)
    with pytest.raises(PlanError, match="no embedding table"):
        gc.trim_vocabulary(nn.Linear(4, 4).eval(), KEPT, torch.rand(2, 4))
    with pytest.raises(PlanError, match="reads them, too"):
        gc.trim_vocabulary(Normed(tied=False).eval(), KEPT, IDS)
    with pytest.raises(PlanError, match="2 embedding tables"):
        gc.trim_vocabulary(Reader().eval(), [0, 1, 2], (IDS % 3, KINDS % 3))
    with pytest.raises(PlanError, match="holds no table"):
        gc.trim_vocabulary(Speaker(tied=True).eval(), KEPT, IDS, embedding="inner")
    with pytest.raises(PlanError, match="does not multiply"):
        gc.trim_vocabulary(Speaker(tied=True).eval(), KEPT, IDS, heads="inner")
    with pytest.raises(InputError):
        gc.trim_vocabulary(Speaker(tied=True).eval(), KEPT, torch.rand(2, 4))
    with pytest.raises(PlanError, match="unknown must be"):
        gc.trim_vocabulary(Speaker(tied=True).eval(), KEPT, IDS, unknown=20)


def test_the_table_that_is_meant_can_be_named() -> None:
    model = Reader().eval()
    kinds = torch.tensor([[0, 1, 0, 2], [1, 2, 0, 0]])
    small = gc.trim_vocabulary(model, [0, 1, 2], (IDS, kinds), embedding="kind")
    assert small.module.kind.weight.shape == (3, 6) and torch.equal(small(IDS, kinds), model(IDS, kinds))


# ------------------------------------------------------------------------------------------------ transformers
@pytest.mark.parametrize("tied", in_ci(True, False))
def test_generate_speaks_kept_ids_of_the_old_tokenizer(tied: bool, tmp_path: Path) -> None:
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(4, 20).reshape(2, 8)
    inputs = {"input_ids": ids}
    small = gc.trim_vocabulary(model, ids, inputs, {"use_cache": False})
    assert type(small.module) is type(model) and isinstance(small.report, gc.Report)
    kept = small.kept["model.embed_tokens.weight"][0].tolist()
    assert kept == [1, 2, *range(3, 20)], "ids that the config names are kept besides"
    said = small.module.generate(ids, max_new_tokens=5, do_sample=False)
    assert set(said.flatten().tolist()) <= set(kept)
    small.save(tmp_path)
    loaded = gc.load(tmp_path)
    assert type(loaded.module) is type(model)
    assert torch.equal(loaded.module(ids).logits, small.module(ids).logits)


@pytest.mark.slow
@pytest.mark.ci
def test_a_head_of_its_own_stays_whole_where_no_head_is_asked_for() -> None:
    transformers = import_transformers()
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, tie_word_embeddings=False
    )
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.arange(4, 20).reshape(2, 8)
    small = gc.trim_vocabulary(model, ids, {"input_ids": ids}, heads=(), embedding="transformer.wte")
    assert small.module.lm_head.weight.shape == (40, 16)
    assert gc.trim_vocabulary(model, ids, {"input_ids": ids}).module.lm_head.weight.shape[0] < 40


@pytest.mark.slow
@pytest.mark.ci
def test_an_embedding_with_a_forward_of_its_own_keeps_it(tmp_path: Path) -> None:
    """BART multiplies what it looks up by a scale."""
    transformers = import_transformers()
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
        scale_embedding=True, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = transformers.BartForConditionalGeneration(config).eval(), torch.arange(4, 20).reshape(2, 8)
    given = {"input_ids": ids, "decoder_input_ids": ids}
    small = gc.trim_vocabulary(model, ids, given)
    assert small.form == "native", small.reason
    kind = type(model.model.shared)
    assert kind is not nn.Embedding and isinstance(small.module.model.shared, kind)
    before, after, kept = model(**given).logits, small(**given).logits, small.kept["model.shared.weight"][0]
    torch.testing.assert_close(after[..., kept], before[..., kept])
    small.module.save_pretrained(tmp_path / "hf")
    small.save(tmp_path / "ours")
    copies = {
        "from_pretrained": type(model).from_pretrained(tmp_path / "hf"),
        "load": gc.load(tmp_path / "ours").module,
        "deepcopy": copy.deepcopy(small.module),
        "pickle": pickle.loads(pickle.dumps(small.module)),
    }
    for name, again in copies.items():
        assert torch.equal(again(**given).logits, after), name
    with pytest.raises(IndexError, match="an id has no row"):
        small.module(input_ids=ids + 20, decoder_input_ids=ids)
    with pytest.raises(PlanError, match="another number of rows"):
        small.module.resize_token_embeddings(60)


@pytest.mark.parametrize("form", in_ci("encoder-decoder"))
def test_a_table_that_encoder_and_decoder_share_is_cut_once(form: str) -> None:
    transformers = import_transformers()
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.arange(4, 20).reshape(2, 8)
    given = {"input_ids": ids, "labels": ids.clone()}
    with pytest.raises(PlanError, match=r"outputs=\['logits', 'encoder_last_hidden_state'\]"):
        gc.trim_vocabulary(model, ids, given, {"use_cache": False})  # the loss is one over all ids
    small = gc.trim_vocabulary(model, ids, given, {"use_cache": False}, outputs="logits")
    assert small.form == "native", small.reason
    other = {"input_ids": ids.flip(0), "labels": ids.flip(1)}
    before, after = model(**other, use_cache=False), small(**other, use_cache=False)
    kept = small.kept["shared.weight"][0]
    torch.testing.assert_close(after.logits[..., kept], before.logits[..., kept])


class Reads(nn.Module):
    """A tied head, and what reads its logits."""

    def __init__(self, read: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.read = nn.Embedding(30, 8), read

    def forward(self, ids: Tensor) -> Any:
        return self.read(F.linear(self.table(ids), self.table.weight), ids)


TOGETHER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": lambda z, ids: z.softmax(-1),
    "cross_entropy_loss": lambda z, ids: F.cross_entropy(z[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
    "argmax": lambda z, ids: z.argmax(-1),
    "mean": lambda z, ids: z.mean(-1),
}


@pytest.mark.parametrize("op", TOGETHER)
def test_an_output_of_all_logits_together_is_refused(op: str) -> None:
    keep, ids = torch.arange(0, 30, 3), torch.tensor([[0, 3, 6], [9, 27, 3]])
    with pytest.raises(PlanError, match=f"aten::{op}.* reads the logits of all ids together"):
        gc.trim_vocabulary(Reads(TOGETHER[op]).eval(), keep, ids)
    both = Reads(lambda z, ids: {"logits": z, "other": TOGETHER[op](z, ids)}).eval()
    small = gc.trim_vocabulary(both, keep, ids, outputs="logits")
    assert torch.allclose(
        small(ids)[..., keep] if isinstance(small(ids), Tensor) else small(ids)["logits"][..., keep],
        both(ids)["logits"][..., keep],
    )


def test_what_ops_make_of_the_logits_that_are_gone_is_named() -> None:
    keep, ids = torch.arange(0, 30, 3), torch.tensor([[0, 3, 6], [9, 27, 3]])
    model = Reads(lambda z, ids: (5 * torch.tanh(z / 5))[:, -1:]).eval()
    small = gc.trim_vocabulary(model, keep, ids)
    assert torch.allclose(small(ids)[..., keep], model(ids)[..., keep])
    assert any("outputs of ids that are gone are -5 to -5" in note for note in small.report.notes)


def test_a_product_that_sums_over_the_rows_is_no_head() -> None:
    """exp(logits) @ table: the expected row, for which all rows are needed."""
    model = Reads(lambda z, ids: z).eval()
    model.read = lambda z, ids: torch.exp(z) @ model.table.weight
    with pytest.raises(PlanError, match=r"the rows of 'table\.weight' cannot be cut: aten::(matmul|mm) reads them"):
        gc.trim_vocabulary(model, torch.arange(0, 30, 3), torch.tensor([[0, 3, 6], [9, 27, 3]]))
    small = gc.trim_vocabulary(Turned(), torch.arange(0, 30, 3), torch.tensor([[0, 3, 6], [9, 27, 3]]))
    assert any("logits of ids that are gone are -inf" in note for note in small.report.notes)


class Turned(nn.Module):
    """A head written as a product with the turned table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) @ self.table.weight.permute(1, 0)


def test_a_vocabulary_is_trimmed_once() -> None:
    for model in (Reader().eval(), Turned().eval()):
        inputs = (IDS, torch.zeros_like(IDS)) if isinstance(model, Reader) else IDS
        small = gc.trim_vocabulary(model, KEPT, inputs, embedding="word" if isinstance(model, Reader) else ())
        with pytest.raises(PlanError, match="trimmed already"):
            gc.trim_vocabulary(small, KEPT[:6], inputs)


@pytest.mark.slow
@pytest.mark.ci
def test_ids_of_32_bits_are_mapped_in_a_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    small = gc.trim_vocabulary(nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 3)).eval(), KEPT, IDS.int())
    small.export(tmp_path / "small.onnx", measure=False)
    assert small.export_report is not None and small.export_report.agreement.within_a_step
