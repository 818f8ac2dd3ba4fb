"""Quantized language models of their own class, in PyTorch: time per token, time of a prompt, memory, bytes on disk.

    python -m benchmarks.kept_class                       # a Llama shape of hidden size 1024, 4 layers
    python -m benchmarks.kept_class --hidden 2048 --layers 2

All forms take turns in one process, and times are CPU seconds of one thread, so that ratios hold whatever else the
machine does. Memory is
read in a process for each form: what loading the saved folder and generating tokens adds to resident memory. Random
weights; needs transformers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc as collector
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphcomp as gc
from benchmarks.common import header, import_torchvision, section, table
from benchmarks.memory import resident

FORMS: Mapping[str, dict[str, Any]] = {
    "float32": {},
    "weights 8 bits": {"sparsity": 0.0, "bits": 8, "activation_bits": None},
    "weights 4 bits": {"sparsity": 0.0, "bits": 4, "activation_bits": None},
    "weights 4 bits, groups of 128": {"sparsity": 0.0, "bits": 4, "activation_bits": None, "group_size": 128},
    "8 bits, activations at run time": {"sparsity": 0.0, "bits": 8, "activations": "dynamic"},
    "8 bits, activations static": {"sparsity": 0.0, "bits": 8},
}
"""Form -> options of `compress`; of the first, none is asked for, and the model itself is measured."""
PROMPT, TOKENS = 128, 16
ROUNDS = 5


def model_of(hidden: int, layers: int) -> nn.Module:
    import_torchvision()
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=4000, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def token_ms(model: Any, ids: torch.Tensor) -> float:
    begun = time.thread_time()
    model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    return (time.thread_time() - begun) / TOKENS * 1e3


@torch.no_grad()
def prompt_ms(model: Any, ids: torch.Tensor) -> float:
    begun = time.thread_time()
    model(ids)
    return (time.thread_time() - begun) * 1e3


def memory_of(folder: str, hidden: int, layers: int, pipe: Any) -> None:
    """Send the bytes that a saved model adds to resident memory, once it has generated tokens."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import_torchvision()
    import transformers

    tiny = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    )
    token_ms(transformers.LlamaForCausalLM(tiny).eval(), torch.ones(1, 4, dtype=torch.long))
    before = resident()
    model: Any = gc.load(folder).module if folder else model_of(hidden, layers)
    collector.collect()
    token_ms(model, torch.ones(1, 8, dtype=torch.long))
    collector.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the C library holds free is not the model's
    pipe.send(resident() - before)


def run(hidden: int, layers: int, words: list[str]) -> None:
    torch.set_num_threads(1)
    model, ids = model_of(hidden, layers), torch.randint(3, 3999, (1, PROMPT))
    forms: dict[str, nn.Module] = {}
    memory: dict[str, int] = {}
    disk: dict[str, int] = {}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        for name, options in FORMS.items():
            if options and not any(word in name for word in words):
                continue
            folder = ""
            if name == "float32":
                forms[name] = model
                disk[name] = 4 * sum(p.numel() for p in model.parameters())
            else:
                small = gc.compress(model, {"input_ids": ids[:, :16]}, progress=False, **options)
                if small.form != "native":
                    print(f"{name}: {small.reason}")
                    continue
                folder = str(Path(place) / name.replace(" ", "_"))
                small.save(folder)
                forms[name], disk[name] = small.module, (Path(folder) / "model.safetensors").stat().st_size
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=memory_of, args=(folder, hidden, layers, theirs))
            child.start()
            memory[name] = ours.recv()
            child.join()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            times[name].append((token_ms(form, ids[:, :16]), prompt_ms(form, ids)))
    best = {name: [min(each) for each in zip(*own[1:], strict=True)] for name, own in times.items()}
    first = best["float32"]
    rows = [
        [
            name,
            f"{first[0] / best[name][0]:.2f} x", f"{first[1] / best[name][1]:.2f} x",
            f"{memory[name] / 2**20:.0f} MiB", f"{disk[name] / 2**20:.1f} MiB",
        ]
        for name in forms
    ]  # fmt: skip
    columns = ["form", "speed of a token", f"speed of a prompt of {PROMPT}", "memory", "weights on disk"]
    title = f"Llama shape, hidden size {hidden}, {layers} layers: {first[0]:.1f} ms a token, {first[1]:.0f} ms a prompt"
    section(title, table(columns, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--forms", default="", help="words, of which a form's name must hold one, with commas between")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(header())
    run(arguments.hidden, arguments.layers, arguments.forms.split(","))


if __name__ == "__main__":
    main()
