"""Tokens per second of decoders with their cache: PyTorch, onnxruntime, onnxruntime-genai; float, int8, int4.

    python -m benchmarks.decoding                        # stories260k with its weights, and a Llama shape
    python -m benchmarks.decoding --models llama --layers 4 --forms float32 "4 bits, groups of 32"

All forms of a model take turns in one process, one thread, so that ratios hold whatever else the machine does. A prompt
of 128 tokens, then tokens one by one behind the prompt; the best of the turns counts. The last column says how many of
the tokens are PyTorch's of the same form, up to the first other one: onnxruntime rounds activations beside weights of
few bits to int8, and PyTorch products of four bits to bfloat16. The Llama shape has random weights. Needs transformers;
genai where it is installed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import graphcomp as gc
from benchmarks.common import header, import_torchvision, section, shared, shared_module, table
from benchmarks.kept_class import model_of
from graphcomp.errors import ExportError
from graphcomp.targets.runtime import open_session

FORMS: Mapping[str, dict[str, Any]] = {
    "float32": {},
    "8 bits": {"bits": 8, "activation_bits": None},
    "8 bits, activations at run time": {"bits": 8, "activations": "dynamic"},
    "4 bits, groups of 32": {"bits": 4, "activation_bits": None, "group_size": 32},
}
"""Form -> options of `compress`, beside the sparsity."""

PROMPT, TOKENS = 128, 32
ROUNDS = 4


def stories() -> Any:
    """Return stories260k as a model of transformers: rows of queries and keys are in another order there."""
    import_torchvision()
    import transformers

    source = shared_module("data", "realdata.py").load("stories260k")
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    weights = {"model.embed_tokens.weight": source.tok.weight, "model.norm.weight": source.norm.weight}
    for k, layer in enumerate(source.layers):
        at = f"model.layers.{k}"
        weights |= {
            f"{at}.self_attn.q_proj.weight": _halves(layer.wq.weight, 8),
            f"{at}.self_attn.k_proj.weight": _halves(layer.wk.weight, 4),
            f"{at}.self_attn.v_proj.weight": layer.wv.weight, f"{at}.self_attn.o_proj.weight": layer.wo.weight,
            f"{at}.mlp.gate_proj.weight": layer.w1.weight, f"{at}.mlp.down_proj.weight": layer.w2.weight,
            f"{at}.mlp.up_proj.weight": layer.w3.weight, f"{at}.input_layernorm.weight": layer.attention_norm.weight,
            f"{at}.post_attention_layernorm.weight": layer.ffn_norm.weight,
        }  # fmt: skip
    model.load_state_dict({**weights, "lm_head.weight": source.tok.weight})
    ids = prompt("stories")[:, :32]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, source(ids), atol=1e-3), "the weights are in another order"
    return model


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Return rows of pairs (a, b, a, b) as (a, a, b, b) in each head, as transformers rotates them."""
    rows, width = weight.shape
    return weight.detach().view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def prompt(name: str) -> Tensor:
    if name == "stories":
        found = np.load(shared("data", "tinystories_600.npz"))
        return torch.from_numpy(found["ids"][:PROMPT].astype(np.int64))[None]
    return torch.randint(3, 3999, (1, PROMPT), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------ three runtimes
Times = tuple[float, float, list[int]]
"""Seconds of a prompt, seconds of a token behind it, and the tokens."""


@torch.no_grad()
def in_torch(model: Any, ids: Tensor) -> Times:
    begun = time.perf_counter()
    found = model(input_ids=ids, use_cache=True)
    read = time.perf_counter()
    tokens = []
    for _ in range(TOKENS):
        tokens.append(int(found.logits[0, -1].argmax()))
        one = torch.tensor([[tokens[-1]]])
        found = model(input_ids=one, past_key_values=found.past_key_values, use_cache=True)
    return read - begun, (time.perf_counter() - read) / TOKENS, tokens


def in_onnxruntime(session: Any, ids: Tensor) -> Times:
    names = [given.name for given in session.get_inputs()]
    cache = [np.zeros((1, g.shape[1], 0, g.shape[3]), np.float32) for g in session.get_inputs()[3:]]
    length = ids.shape[1]
    one = ids.numpy()
    begun = read = time.perf_counter()
    tokens: list[int] = []
    for k in range(TOKENS + 1):
        mask = np.ones((1, length), np.int64)
        positions = np.arange(length - one.shape[1], length)[None]
        logits, *cache = session.run(None, dict(zip(names, [one, mask, positions, *cache], strict=True)))
        if k == 0:
            read = time.perf_counter()
        if k < TOKENS:
            tokens.append(int(logits[0, -1].argmax()))
        one, length = np.array([[tokens[-1]]]), length + 1
    return read - begun, (time.perf_counter() - read) / TOKENS, tokens


def in_genai(model: Any, ids: Tensor) -> Times:
    import onnxruntime_genai

    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=ids.shape[1] + TOKENS + 1, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    begun = time.perf_counter()
    generator.append_tokens(ids.numpy().astype(np.int32))
    read = time.perf_counter()
    for _ in range(TOKENS + 1):
        generator.generate_next_token()
    spent = time.perf_counter() - read
    return read - begun, spent / TOKENS, generator.get_sequence(0)[ids.shape[1] :].tolist()[:TOKENS]


def genai_of(folder: Path) -> Any:
    """Return the model of a folder for genai, which runs with one thread; None where genai is not installed."""
    try:
        import onnxruntime_genai
    except ImportError:
        return None
    config = onnxruntime_genai.Config(str(folder))
    config.overlay('{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}')
    return onnxruntime_genai.Model(config)


# ------------------------------------------------------------------------------------------------ tables
def run(title: str, model: Any, ids: Tensor, sparsity: float, forms: Sequence[str]) -> None:
    runs: dict[tuple[str, str], Callable[[], Times]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in forms:
            small = gc.compress(model, {"input_ids": ids}, sparsity=sparsity, progress=False, **FORMS[name])
            if small.form != "native":
                print(f"{title}, {name}: {small.reason}")
                continue
            folder = Path(place) / str(len(runs))
            try:
                small.export(folder, cache=True, measure=False)
                file, genai = folder / "model.onnx", genai_of(folder)
            except ExportError as error:  # layers with unlike heads
                print(f"{title}, {name}: no folder for genai: {error.why}")
                file, genai = folder / "model.onnx", None
                small.export(file, cache=True, measure=False)
            session = open_session(file)
            runs[name, "PyTorch"] = lambda small=small: in_torch(small.module, ids)
            runs[name, "onnxruntime"] = lambda session=session: in_onnxruntime(session, ids)
            if genai is not None:
                runs[name, "genai"] = lambda genai=genai: in_genai(genai, ids)
        found: dict[tuple[str, str], list[Times]] = {key: [] for key in runs}
        for _ in range(ROUNDS):
            for key, call in runs.items():
                found[key].append(call())
    best = {key: (min(t[0] for t in own), min(t[1] for t in own), own[0][2]) for key, own in found.items()}
    first = next(iter(best.values()))
    rows = [
        [
            name, runtime, f"{PROMPT / prompt_s:,.0f}", f"{1 / token_s:,.0f}", f"{first[0] / prompt_s:.2f} x",
            f"{first[1] / token_s:.2f} x", f"{_alike(tokens, best[name, 'PyTorch'][2])} of {TOKENS}",
        ]
        for (name, runtime), (prompt_s, token_s, tokens) in best.items()
    ]  # fmt: skip
    columns = ["form", "runtime", "prompt tokens/s", "tokens/s", "prompt", "token", "same tokens as PyTorch"]
    section(title, table(columns, rows))


def _alike(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Return how many tokens are alike, up to the first that differs."""
    return next((k for k, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), len(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["stories", "llama"], choices=["stories", "llama"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.0, 0.3])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(header())
    for name in arguments.models:
        model = stories() if name == "stories" else model_of(arguments.hidden, arguments.layers)
        what = (
            "stories260k" if name == "stories" else f"Llama shape, {arguments.hidden} wide, {arguments.layers} layers"
        )
        for sparsity in arguments.sparsities:
            cut = f"{sparsity:.0%} cut" if sparsity else "whole"
            run(f"{what}, {cut}", model, prompt(name), sparsity, arguments.forms)


if __name__ == "__main__":
    main()
