"""Families of transformers: cut as users have them, the native result against the masked original on every path.

    python -m benchmarks.hf                                # every family
    python -m benchmarks.hf --names llama t5 --out hf.json # some; families already in the file are left out
    python -m benchmarks.hf --prune head hidden width      # other roles than the default ones

Each family is a tiny model with random weights, with its cache on where the family has one, and without any hint. The
reference is the user's model with zeros in all that was removed, run by the same code. Cells:

    given    compress takes the model as it is
    native   the result is of the model's class
    exact    the example inputs, another batch size, other lengths
    padded   masks with padding at the right and at the left; what stands in padding is left out
    cache    the cache off, and two steps on one cache
    attn     each of the above with eager attention and with sdpa
    greedy, static, beam, left
             8 new tokens, token for token: greedy, on a static cache, with 3 beams, and of a batch padded at the left

"-" says that the family has no such path: the user's own model refuses the inputs. Where rounding shows, both sides run
in float64. The exit code is 1 where a cell fails.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import common, hf_models
from benchmarks.common import bounded, section, table
from graphcomp.torch_compat import pytree

CELLS = ("given", "native", "exact", "padded", "cache", "attn", "greedy", "static", "beam", "left")
TOLERANCE = 1e-3
"""Largest relative difference in float32; what differs by more is run in float64."""
EXACT = 1e-6
NEW_TOKENS = 8
Inputs = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", help="families; default all")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--ranking", default="local", help="local cuts every group, and so heads, too")
    parser.add_argument("--prune", nargs="*", help="roles to prune; default as compress has them")
    parser.add_argument("--timeout", type=int, default=180, help="CPU seconds of one family")
    parser.add_argument("--out", type=Path, help="a file to which each row is added as a line of JSON")
    options = parser.parse_args()
    print(common.header(), flush=True)
    common.import_torchvision()
    families = hf_models.families()
    done = {row["name"]: row for row in common.read_json(options.out)} if options.out else {}
    rows = []
    for name in options.names or families:
        row = done.get(name)
        if row is None:
            found = bounded(measure, name, options.sparsity, options.ranking, options.prune, seconds=options.timeout)
            row = found.value or {"name": name, "given": found.error}
            common.append_json(options.out, row)
            print(line(row), flush=True)
        rows.append(row)
    report(rows)
    return int(any(faults(row) for row in rows))


def line(row: Mapping[str, Any]) -> str:
    """Return one row in a line, for a reader who waits."""
    why = row.get("skipped") or "; ".join(f"{cell}: {row[cell]}" for cell in faults(row)) or "ok"
    return f"{row['name']:18} {row.get('params', 1):.2f} {row.get('seconds', 0):5.1f} s  {row.get('roles', '')}  {why}"


def faults(row: Mapping[str, Any]) -> list[str]:
    """Return the cells that fail."""
    return [cell for cell in CELLS if row.get(cell, "-") not in ("ok", "-")]


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the totals, and the families of which not every cell holds."""
    there = [row for row in rows if "skipped" not in row]
    counted = [
        Counter("ok" if row.get(c) == "ok" else "fails" if c in faults(row) else "-" for row in there) for c in CELLS
    ]
    body = [[cell, n["ok"], n["fails"], n["-"]] for cell, n in zip(CELLS, counted, strict=True)]
    section(f"{len(there)} families", table(["cell", "ok", "fails", "no such path"], body))
    failing = [[row["name"], cell, row[cell]] for row in there for cell in faults(row)]
    if failing:
        section("What does not hold", table(["family", "cell", "why"], failing))
    skipped = [[row["name"], row["skipped"]] for row in rows if "skipped" in row]
    if skipped:
        section("Left out", table(["family", "why"], skipped))
    seconds = sorted(row["seconds"] for row in there if "seconds" in row)
    if seconds:
        print(f"\nseconds of compress: median {seconds[len(seconds) // 2]:.1f}, at most {seconds[-1]:.1f}")


# ------------------------------------------------------------------------------------------------ one family
def measure(name: str, sparsity: float, ranking: str, prune: Sequence[str] | None) -> dict[str, Any]:
    """Return the row of one family."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        model, inputs = hf_models.build(name)
    except hf_models.Absent as error:
        return {"name": name, "skipped": str(error)}
    row: dict[str, Any] = {"name": name}
    asked = {} if prune is None else {"prune": tuple(prune)}
    with common.timed() as clock:
        try:
            small = gc.compress(model, (), inputs, sparsity=sparsity, ranking=ranking, **asked)
        except Exception as error:
            return row | {"given": common.brief(error)}
    row |= {"given": "ok", "seconds": round(clock.seconds, 1)}
    row["native"] = "ok" if small.form == "native" else small.reason
    row["params"] = weights(small.module) / weights(model)
    row["roles"] = " ".join(f"{role} {n}" for role, n in removed(small).items())
    row["notes"] = list(small.report.notes)
    row["unchecked"] = dict(small.report.unchecked)
    if small.form != "native":
        return row
    pair = Pair(masked(model, small), small.module.eval())
    for cell in CELLS[2:]:
        row[cell] = verdict(CHECKS[cell](pair, inputs))
    return row


def weights(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def removed(small: gc.CompressedModel) -> dict[str, int]:
    """Return the units removed, by role."""
    found: Counter[str] = Counter()
    for group in small.report.groups:
        found[group["role"]] += group["units"]["total"] - group["units"]["kept"]
    return {role: n for role, n in found.items() if n}


def masked(model: nn.Module, small: gc.CompressedModel) -> nn.Module:
    """Return a copy of the model with zeros at every index that was removed."""
    whole = copy.deepcopy(model).eval()
    tensors = {
        **dict(whole.named_parameters(remove_duplicate=False)),
        **dict(whole.named_buffers(remove_duplicate=False)),
    }
    for name, dims in small.kept.items():
        for dim, kept in dims.items():
            gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
            gone[kept] = False
            tensors[name].detach().index_fill_(dim, gone.nonzero().flatten(), 0)
    for path, module in list(whole.named_modules()):
        stays = small.kept.get(f"{path}.weight", {}).get(0)
        if stays is not None and any(word in type(module).__name__ for word in ("LayerNorm", "RMSNorm")):
            whole.set_submodule(path, OverKept(module, stays))
    return whole


class OverKept(nn.Module):
    """A norm over the last dim that takes its statistics over the indices that stay."""

    def __init__(self, norm: nn.Module, stays: Tensor) -> None:
        super().__init__()
        self.norm, self.stays = norm, stays

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """Norm a tensor (..., c), and put zeros where nothing stays."""
        module, norm = self.norm, copy.copy(self.norm)
        norm._parameters = {k: None if p is None else p[self.stays] for k, p in module._parameters.items()}
        if hasattr(norm, "group_size"):
            norm.group_size = len(self.stays)
        if hasattr(norm, "normalized_shape"):
            norm.normalized_shape = (len(self.stays),)
        found = norm(x[..., self.stays], *(o[..., self.stays] for o in others))
        return torch.zeros_like(x).index_copy(-1, self.stays, found)


def verdict(found: Iterator[tuple[str, str]]) -> str:
    """Return "ok", "-" where nothing ran, or the first thing that differs.

    Args:
        found: (what was compared, how it differs or ""); "-" for what the user's model refuses.
    """
    ran = False
    for what, why in found:
        if why not in ("", "-"):
            return f"{what}: {why}"
        ran = ran or not why
    return "ok" if ran else "-"


class Pair:
    """The masked original and the smaller model, run alike."""

    def __init__(self, whole: nn.Module, small: nn.Module) -> None:
        self.whole, self.small = whole, small

    def compare(self, run: Callable[[nn.Module, Inputs], list[Tensor]], inputs: Inputs, exactly: bool = False) -> str:
        """Return how what `run` gives differs, "" where it does not, "-" where the user's model refuses."""
        whole, small = (in_float64(m) for m in (self.whole, self.small)) if exactly else (self.whole, self.small)
        given = pytree.tree_map(_double, inputs) if exactly else inputs
        precision = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if exactly else precision)
        try:
            with torch.no_grad():
                torch.manual_seed(0)
                try:
                    wanted = run(whole, copy.deepcopy(given))
                except Exception as error:
                    return f"float64 does not run: {common.brief(error)}" if exactly else "-"
                torch.manual_seed(0)
                try:
                    got = run(small, copy.deepcopy(given))
                except Exception as error:
                    return common.brief(error)
        finally:
            torch.set_default_dtype(precision)
        why = difference(wanted, got, EXACT if exactly else TOLERANCE)
        return self.compare(run, inputs, exactly=True) if why and not exactly else why


def in_float64(model: nn.Module) -> nn.Module:
    """Return a copy in float64; experts one by one, as the grouped product takes no float64."""
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")
    return exact


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def difference(wanted: list[Tensor], got: list[Tensor], allowed: float) -> str:
    """Return in what way two lists of tensors differ, "" where they do not."""
    if [t.shape for t in wanted] != [t.shape for t in got]:
        return f"shapes {[tuple(t.shape) for t in got]}, wanted {[tuple(t.shape) for t in wanted]}"
    for a, b in zip(wanted, got, strict=True):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"{int((a != b).sum())} of {a.numel()} integers differ"
            continue
        if not torch.equal(a.isfinite(), b.isfinite()):
            return "other values are finite"
        a, b = a[a.isfinite()].double(), b[b.isfinite()].double()
        error = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) if a.numel() else 0.0
        if not error <= allowed:
            return f"off by {error:.1e} (relative)"
    return ""


# ------------------------------------------------------------------------------------------------ inputs
def forward(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run the model; return the tensors of its outputs, without caches and without what stands in padding."""
    return outside_padding(outputs_of(model(**inputs)), inputs)


def outputs_of(output: Any) -> list[Tensor]:
    """Return the tensors of a ModelOutput, without its caches."""
    fields = [(k, v) for k, v in output.items() if "past" not in k and "cache" not in k and k != "mems"]
    return [leaf for _, value in fields for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def outside_padding(outputs: list[Tensor], inputs: Inputs) -> list[Tensor]:
    """Set to zero what a model returns for padding."""
    mask = next((inputs[name] for name in ("attention_mask", "padding_mask") if name in inputs), None)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool((mask == 1).all()):
        return outputs
    like = [t.dim() >= 3 and t.shape[:2] == mask.shape and t.is_floating_point() for t in outputs]
    return [t[mask.bool()] if is_like else t for t, is_like in zip(outputs, like, strict=True)]


def token_names(inputs: Inputs) -> list[str]:
    """Return the names of batches of token numbers and of masks over them."""
    return [k for k, t in inputs.items() if isinstance(t, Tensor) and t.dim() == 2 and not t.is_floating_point()]


def other_sizes(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """Yield the inputs with another batch size and with other lengths."""
    batch = {k: torch.cat([t, t.roll(1, -1)[:1]]) if isinstance(t, Tensor) else t for k, t in inputs.items()}
    yield "another batch size", batch
    names = token_names(inputs)
    if names:
        yield "shorter", {k: t[:, :-5] if k in names and t.shape[1] > 7 else t for k, t in inputs.items()}
        yield "longer", {k: torch.cat([t, t[:, -3:]], 1) if k in names else t for k, t in inputs.items()}


def padded(model: nn.Module, inputs: Inputs, *, left: bool) -> Inputs | None:
    """Return the inputs with padding in the first row; None where the model takes no mask over its tokens."""
    data = next((inputs[n] for n in ("input_ids", "input_values") if isinstance(inputs.get(n), Tensor)), None)
    if data is None or data.dim() != 2:
        return None
    mask = torch.ones(data.shape, dtype=torch.long)
    length = 2 if left else data.shape[1] // 4
    mask[0, :length] = 0
    mask = mask if left else mask.flip(1)
    found = {**inputs, "attention_mask": mask}
    pad = getattr(model.config, "pad_token_id", None)
    if "input_ids" in inputs and pad is not None:
        found["input_ids"] = inputs["input_ids"].masked_fill(mask == 0, pad)
    return found


# ------------------------------------------------------------------------------------------------ cells
Found = Iterator[tuple[str, str]]


def exact(pair: Pair, inputs: Inputs) -> Found:
    """Compare on the example inputs and on other sizes."""
    found = pair.compare(forward, inputs)
    yield "the example inputs", "the masked original does not run" if found == "-" else found
    for name, other in other_sizes(inputs):
        yield name, pair.compare(forward, other)


def masks(pair: Pair, inputs: Inputs) -> Found:
    """Compare on masks with padding."""
    for left in (False, True):
        given = padded(pair.whole, inputs, left=left)
        if given is not None:
            yield f"padding at the {'left' if left else 'right'}", pair.compare(forward, given)


def cache(pair: Pair, inputs: Inputs) -> Found:
    """Compare with the cache off, and on a second step that reads the cache of the first."""
    yield "use_cache=False", pair.compare(forward, {**inputs, "use_cache": False})
    yield "two steps on one cache", pair.compare(two_steps, inputs)


def two_steps(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run all but three tokens of the decoder, then these three on the cache."""
    name = next(n for n in ("decoder_input_ids", "input_ids") if n in inputs)
    ids, plain = inputs[name], {k: t for k, t in inputs.items() if k not in token_names(inputs)}
    encoder = {k: inputs[k] for k in ("input_ids", "attention_mask") if name == "decoder_input_ids" and k in inputs}
    first = model(**plain, **encoder, **{name: ids[:, :-3]}, use_cache=True)
    key = next(k for k in ("past_key_values", "cache_params") if first.get(k) is not None)
    kept = {"encoder_outputs": (first.encoder_last_hidden_state,)} if "encoder_last_hidden_state" in first else {}
    found = outputs_of(first)
    for k in range(ids.shape[1] - 3, ids.shape[1]):
        mask = {"attention_mask": encoder["attention_mask"]} if "attention_mask" in encoder else {}
        step = model(**kept, **mask, **{name: ids[:, k : k + 1], key: first[key]}, use_cache=True)
        found.append(step.logits if "logits" in step else step[0])
    return found


def attention(pair: Pair, inputs: Inputs) -> Found:
    """Compare the inputs of the cells before with each attention."""
    before = pair.whole.config._attn_implementation
    for kind in ("eager", "sdpa"):
        try:
            pair.whole.set_attn_implementation(kind)
        except (ValueError, AttributeError):  # the family has no such attention
            continue
        pair.small.set_attn_implementation(kind)
        for check in (exact, masks, cache, left):
            yield from ((f"{kind}, {what}", why) for what, why in check(pair, inputs))
    for model in (pair.whole, pair.small):
        with suppress(ValueError):  # a backbone may lack the attention that it was made with
            model.set_attn_implementation(before)


def generated(**options: Any) -> Callable[[nn.Module, Inputs], list[Tensor]]:
    """Return a function that lets a model generate, and returns the tokens."""

    def run(model: Any, inputs: Inputs) -> list[Tensor]:
        if not model.can_generate():
            raise NotImplementedError("no generation")
        given = {k: t for k, t in inputs.items() if not k.startswith("decoder_")}
        found = model.generate(
            **given, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, **options
        )
        return [found if isinstance(found, Tensor) else found.sequences]

    return run


def greedy(pair: Pair, inputs: Inputs) -> Found:
    """Compare greedy generation, with the cache and without."""
    yield "greedy", pair.compare(generated(), inputs)
    yield "greedy without a cache", pair.compare(generated(use_cache=False), inputs)


def static(pair: Pair, inputs: Inputs) -> Found:
    """Compare generation on a static cache."""
    yield "static cache", pair.compare(generated(cache_implementation="static", disable_compile=True), inputs)


def beam(pair: Pair, inputs: Inputs) -> Found:
    """Compare beam search."""
    yield "3 beams", pair.compare(generated(num_beams=3), inputs)


def left(pair: Pair, inputs: Inputs) -> Found:
    """Compare generation of a batch that is padded at the left."""
    given = padded(pair.whole, inputs, left=True)
    if given is not None:
        yield "generation after padding at the left", pair.compare(generated(), given)


CHECKS: dict[str, Callable[[Pair, Inputs], Found]] = {
    "exact": exact, "padded": masks, "cache": cache, "attn": attention,
    "greedy": greedy, "static": static, "beam": beam, "left": left,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
