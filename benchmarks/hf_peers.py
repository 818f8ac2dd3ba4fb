"""Torch-Pruning and graphcomp on models of transformers, side by side in one run, each under a time limit.

    python -m benchmarks.hf_peers                        # Llama, Qwen 2, GPT-2, T5, BERT, ViT
    python -m benchmarks.hf_peers --names llama bert --seconds 60

Both cut half of the units of the same small models with random weights. Torch-Pruning runs with default settings, and
with its example's for language models: heads are named, whole heads go, and attributes are corrected by hand. Columns:

    ended    the cut came back within the limit
    left     share of the parameters that is left
    runs     the cut model runs on the example inputs
    exact    its outputs are those of the dense model without the removed channels (relative error at most 1e-4)
    reloads  `save_pretrained`, then `from_pretrained`, gives the same outputs bit for bit
    eager    it runs with eager attention, too, and computes the same (1e-4)
    seconds  CPU, of analysis and cut
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import common
from benchmarks.common import bounded, section, table
from benchmarks.hf import masked, outputs_of
from benchmarks.peers import RATIO, TOLERANCE, torch_pruning

NAMES = ("llama", "qwen2", "gpt2", "t5", "bert", "vit")
COLUMNS = ("ended", "left", "runs", "exact", "reloads", "eager", "seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", default=NAMES)
    parser.add_argument("--seconds", type=int, default=120, help="CPU seconds of one cut")
    options = parser.parse_args()
    print(common.header(), flush=True)
    common.import_torchvision()
    body = []
    for name in options.names:
        for title, cut in CUTS.items():
            found = bounded(cut, name, seconds=options.seconds)
            row = found.value or {"ended": False, "failure": found.error}
            body.append(
                [name, title, *(common.cell(row.get(column), 2) for column in COLUMNS), row.get("failure", "")[:90]]
            )
            print(*body[-1], flush=True)
    section("transformers", table(["family", "by", *COLUMNS, "failure"], body))
    return 0


def by_torch_pruning(name: str, by_hand: bool = False) -> dict[str, Any]:
    """Return the row of Torch-Pruning."""
    model, inputs = built(name)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # its graph cannot be built with a cache
    options = (
        {"num_heads": heads_of(model), "prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": RATIO}
        if by_hand
        else {}
    )
    correct = partial(corrected, model) if by_hand else (lambda pruner: None)
    found = torch_pruning(common.shared_module("zoo.py"), model, (), dict(inputs), options, correct)
    row = {
        "ended": bool(found["captured"]), "left": found["params"], "runs": found["runs"], "exact": found["exact"],
        "seconds": found["seconds"], "failure": found["failure"],
    }  # fmt: skip
    return row | (used(model, inputs) if found["runs"] else {})


def projections(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield modules of attention with the projections of queries, keys and values."""
    for module in model.modules():
        children = dict(module.named_children())
        for names in (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v")):
            if all(name in children for name in names):
                yield module, [children[name] for name in names]


def heads_of(model: Any) -> dict[nn.Module, int]:
    """Return the number of heads of each projection, as its example for language models gives them."""
    config, found = model.config, {}
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    for _, (query, key, value) in projections(model):
        found |= {query: queries, key: keys, value: keys}
    return found


def corrected(model: Any, pruner: Any) -> None:
    """Set attributes of attention by hand, as its example for language models does after the cut."""
    for module, (query, key, _) in projections(model):
        queries, keys = pruner.num_heads[query], pruner.num_heads[key]
        values = {
            "num_heads": queries, "num_attention_heads": queries, "n_heads": queries, "num_key_value_heads": keys,
            "num_key_value_groups": queries // keys, "all_head_size": query.out_features,
            "inner_dim": query.out_features,
        }  # fmt: skip
        for name, value in values.items():
            if hasattr(module, name):
                setattr(module, name, value)


def by_graphcomp(name: str) -> dict[str, Any]:
    """Return the row of graphcomp."""
    warnings.simplefilter("ignore")
    model, inputs = built(name)
    before = sum(p.numel() for p in model.parameters())
    with common.timed() as clock:
        small = gc.compress(model, (), inputs, sparsity=RATIO, ranking="local", progress=False)
    made = small.module
    wanted, got = run(masked(model, small), inputs), run(made, inputs)
    row = {
        "ended": True, "left": sum(p.numel() for p in made.parameters()) / before, "runs": True,
        "exact": close(wanted, got), "seconds": clock.seconds, "failure": small.reason,
    }  # fmt: skip
    return row | used(made, inputs)


def built(name: str) -> tuple[Any, Mapping[str, Any]]:
    """Return a family of the shared folder, and its inputs."""
    torch.set_num_threads(1)
    model, inputs = common.shared_module("hf_families.py").build(name)
    return model, inputs


def used(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Use a cut model as people do: save and load it, and choose another attention."""
    return {"reloads": holds(reloads, model, inputs), "eager": holds(eager, model, inputs)}


def holds(check: Callable[..., bool], *arguments: Any) -> bool:
    """Whether a check holds; what raises does not hold."""
    try:
        return check(*arguments)
    except Exception:
        return False


def reloads(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether a folder gives the model back."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder)
    return all(map(torch.equal, run(model, inputs), run(again, inputs)))


def eager(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether eager attention computes the same."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return close(run(model, inputs), run(other, inputs))


def run(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that a model gives."""
    torch.manual_seed(0)
    with torch.no_grad():
        return outputs_of(model(**inputs))


def close(wanted: list[Tensor], got: list[Tensor]) -> bool:
    """Whether all tensors are equal up to the tolerance, relative to the largest value."""
    pairs = zip(wanted, got, strict=True)
    return all(a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * a.abs().max()) for a, b in pairs)


CUTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "Torch-Pruning": by_torch_pruning,
    "Torch-Pruning, heads named": partial(by_torch_pruning, by_hand=True),
    "graphcomp": by_graphcomp,
}


if __name__ == "__main__":
    sys.exit(main())
