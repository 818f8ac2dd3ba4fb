"""Cut models of transformers, write them by save_pretrained, load them by from_pretrained in a new process.

    python -m benchmarks.hf_reload                                  # all families, at sparsity 0.3
    python -m benchmarks.hf_reload --sparsity 0.5 --ranking local --families llama,bert
    python -m benchmarks.hf_reload --sparsity 0.5 --prune layer       # depth; what is loaded is cut in width then
    python -m benchmarks.hf_reload --prune vocabulary                 # the ids of the inputs alone, likewise
    python -m benchmarks.hf_reload --bits 8 --out int8.jsonl          # weights of 8 bits on disk; rows kept as JSON

The families are those of `benchmarks.hf`: small models with random weights. One process cuts and writes, a second
one, which imports graphcomp alone, reads. Columns: whether the class stayed; parameters left; size of the section in
config.json in bytes; whether the loaded model's outputs equal those of the model that was written bit for bit; tokens
of `generate`, likewise; outputs and section after a second round trip; outputs of a base model (AutoModel) that read
the folder; whether the loaded model is compressed, written and read again. With bits the model that is written is
compared with its own weights in floats, too (column "floats": outputs within 1 % and tokens of `generate`), and what
was read is not cut again.

The exit code is 1 where a model that was written does not come back equal.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import common, hf_models
from benchmarks.hf import difference
from graphcomp.quantization.quantized_tensor import QuantizedTensor

TOKENS = 4
"""New tokens of `generate`."""
ALLOWED = 0.01
"""Largest relative difference of outputs between weights of few bits and the same weights in floats."""
AT_ONCE = 12
"""Families that one process reads, so that an interrupted run keeps the rows before."""

COLUMNS = ("cut", "left", "section", "floats", "equal", "generate", "twice", "base", "again")


def tensors(output: Any) -> list[Tensor]:
    """Return the float tensors of an output, in order."""
    from graphcomp.torch_compat import pytree

    leaves = pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def run(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return what the model gives, from one seed."""
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model(**inputs))


def tokens(model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return what `generate` gives; None of a model that cannot."""
    if not model.can_generate():
        return None
    given = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    with torch.no_grad():
        found: Tensor = model.generate(**given, max_new_tokens=TOKENS, do_sample=False)
    return found


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit (NaN equals NaN)."""
    pairs = list(zip(ours, theirs, strict=False))
    return len(ours) == len(theirs) and all(torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)) for a, b in pairs)


def write(name: str, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Cut one family and write the model, with its inputs and outputs beside the folder."""
    try:
        model, inputs = hf_models.build(name)
    except hf_models.Absent as error:
        return {"cut": f"left out: {error}"}
    before = sum(p.numel() for p in model.parameters())
    try:
        small = cut(model, inputs, options)
    except gc.NothingToPrune:
        return {"cut": "nothing to prune"}
    if small.form != "native":
        return {"cut": f"a graph: {small.reason[:60]}"}
    made = small.module
    row: dict[str, Any] = {"cut": "class", "left": sum(p.numel() for p in made.parameters()) / before}
    outputs, generated = run(made, inputs), tokens(made, inputs)
    if "bits" in options:
        row |= {"generates": generated is not None, "floats": like_floats(made, inputs, outputs, generated)}
    try:
        made.save_pretrained(folder)
    except gc.CheckpointError as error:
        return {**row, "equal": f"refused: {error.why[:90]}"}
    section = json.loads((folder / "config.json").read_text()).get("quantization_config")
    row["section"] = 0 if section is None else len(json.dumps(section, indent=2))
    torch.save((type(made).__name__, inputs, outputs, generated), folder / "expected.pt")
    return row


def like_floats(model: nn.Module, inputs: Mapping[str, Any], outputs: list[Tensor], generated: Tensor | None) -> Any:
    """Return True where a model computes what its weights of few bits, written as floats, do; else what differs."""
    floats, made = copy.deepcopy(model), dict[int, nn.Parameter]()
    for module in list(floats.modules()):
        for name, held in list(module._parameters.items()):
            if isinstance(held, QuantizedTensor):
                made.setdefault(id(held), nn.Parameter(held.dequantize(), requires_grad=False))
                module._parameters[name] = made[id(held)]
    if not made:
        return "no weight of few bits"
    why = difference(run(floats, inputs), outputs, ALLOWED)
    if not why and generated is not None and not torch.equal(tokens(floats, inputs), generated):
        why = "other tokens"
    return why or True


def cut(model: nn.Module, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> gc.CompressedModel:
    """Compress a model, or keep the ids of the inputs alone."""
    if options.get("prune") == ("vocabulary",):
        ids = [inputs[name] for name in inputs if name.endswith("input_ids")]
        if not ids:
            raise gc.NothingToPrune("the model reads no ids")
        return gc.trim_vocabulary(model, ids, (), inputs)
    if "layer" in options.get("prune", ()):
        options = {**options, "calibration": [inputs]}
    return gc.compress(model, (), inputs, **options)


def read(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Load a folder and compare."""
    import transformers

    kind, inputs, outputs, generated = torch.load(folder / "expected.pt", weights_only=False)
    load = getattr(transformers, kind).from_pretrained
    model = load(folder)
    row: dict[str, Any] = {"equal": same(run(model, inputs), outputs)}
    row["generate"] = None if generated is None else torch.equal(tokens(model, inputs), generated)
    model.save_pretrained(folder / "twice")
    row["twice"] = same(run(load(folder / "twice"), inputs), outputs)
    texts = [json.loads((place / "config.json").read_text()) for place in (folder, folder / "twice")]
    row["twice"] = row["twice"] and texts[0].get("quantization_config") == texts[1].get("quantization_config")
    row["base"] = base(folder, model)
    if "bits" in options:
        return row
    return row | attempt(cut_again, model, inputs, folder, options)


def cut_again(model: Any, inputs: Mapping[str, Any], folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Compress the loaded model, write and load it."""
    if options.get("prune") in (("layer",), ("vocabulary",)):
        options = {}
    small = gc.compress(model, (), inputs, **{**options, "sparsity": 0.2})
    if small.form != "native":
        return {"again": "graph"}
    small.module.save_pretrained(folder / "again")
    return {"again": same(run(type(model).from_pretrained(folder / "again"), inputs), run(small.module, inputs))}


def base(folder: Path, model: Any) -> Any:
    """Return whether AutoModel reads the base model of a folder, tensor for tensor."""
    import transformers

    found = transformers.AutoModel.from_pretrained(folder)
    ours = model if type(found) is type(model) else getattr(model, model.base_model_prefix, None)
    if ours is None:
        ours = model
    held = ours.state_dict()
    names = [name for name in found.state_dict() if name in held]
    return bool(names) and all(torch.equal(found.state_dict()[name], held[name]) for name in names)


def attempt(step: Any, *args: Any) -> dict[str, Any]:
    """Run one step; an error is a row."""
    try:
        found: dict[str, Any] = step(*args)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="", help="names, separated by commas; all by default")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--ranking", default="")
    parser.add_argument("--prune", default="")
    parser.add_argument("--bits", type=int, help="bits of the weights that are written; floats by default")
    parser.add_argument("--uniform", action="store_true")
    parser.add_argument("--out", type=Path, help="a file of JSON lines; families in it are not run again")
    parser.add_argument("--read", type=Path, help="read what another process wrote there (this program does so itself)")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    common.import_torchvision()
    options: dict[str, Any] = {"sparsity": asked.sparsity}
    options |= {"ranking": asked.ranking} if asked.ranking else {}
    options |= {"prune": tuple(asked.prune.split(","))} if asked.prune else {}
    options |= {"uniform": True} if asked.uniform else {}
    options |= {"bits": asked.bits, "activation_bits": None} if asked.bits else {}
    names = asked.families.split(",") if asked.families else list(hf_models.families())
    if asked.read:
        for name in names:
            print(json.dumps({"name": name, **attempt(read, asked.read / plain(name), options)}), flush=True)
        return 0
    print(common.header(), flush=True)
    rows = {row["name"]: row for row in common.read_json(asked.out)} if asked.out else {}
    left = [name for name in names if name not in rows]
    for start in range(0, len(left), AT_ONCE):
        for name, row in there_and_back(left[start : start + AT_ONCE], options).items():
            rows[name] = {"name": name, **row}
            common.append_json(asked.out, rows[name])
    return report([rows[name] for name in names])


def there_and_back(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Cut and write families, and read them in another process; return their rows."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        rows = {name: attempt(write, name, place / plain(name), options) for name in names}
        written = [name for name in names if (place / plain(name) / "expected.pt").exists()]
        command = [sys.executable, "-m", "benchmarks.hf_reload", *sys.argv[1:], "--read", str(place)]
        if not written:
            return rows
        done = subprocess.run([*command, "--families", ",".join(written)], capture_output=True, text=True, check=False)
    for text in done.stdout.splitlines():
        row = json.loads(text)
        rows[row.pop("name")] |= row
    for name in written:
        if done.returncode and "equal" not in rows[name]:
            rows[name].setdefault("error", f"the process that reads ended: {done.stderr[-240:]}")
    return rows


def report(rows: Sequence[Mapping[str, Any]]) -> int:
    """Print a line for each family and the totals; return the exit code."""
    print(f"{'':18}" + "".join(f"{column:>9}" for column in COLUMNS))
    for row in rows:
        cells = "".join(f"{common.cell(row.get(column)):>9}" for column in COLUMNS)
        print(f"{row['name']:18}{cells}  {row.get('error', '')}")
    written = [row for row in rows if "section" in row]
    good = [row for row in written if row.get("equal") is True]
    print(f"{len(good)} of {len(rows)} come back bit for bit; {len(written)} were written")
    return int(len(good) != len(written))


def plain(name: str) -> str:
    """Return a family's name as a folder's."""
    return name.replace("/", "_")


if __name__ == "__main__":
    sys.exit(main())
