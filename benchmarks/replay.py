"""Fingerprints of everything graphcomp computes, to prove that a change of structure changes no result.

    python -m benchmarks.replay --out before.jsonl                       # on the commit before: an hour on one core
    python -m benchmarks.replay --out after.jsonl --against before.jsonl # on the commit after: prints each difference
    python -m benchmarks.replay --sets tiny,random --out before.jsonl    # a few minutes

A subject is a tiny model of `graphcomp.testing`, a random network of a fixed seed, or a model of the shared zoo. Each
subject has sections: channel groups and frozen axes, the sliced model, the lowered integer graph, both reports, the
weights after 30 QASSO steps and the model finalized from them, and digests of the files of a saved folder (and of the
ONNX file, of tiny models). A section is text, and tensors stand in it as shape, dtype and SHA-256. Each subject runs
in a process of its own, on one thread. Digests of floats hold for one kind of processor and one torch: compare files
made on one machine.

The exit code is 1 where a section differs.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import graphcomp as gc
from benchmarks import common
from benchmarks.common import append_json, bounded, brief, read_json
from graphcomp.testing import random_model, tiny_models
from graphcomp.torch_compat import pytree

SETS = ("tiny", "random", "zoo")
SEEDS = range(30)
"""Seeds of the random networks."""
ZOO = (
    "tv/alexnet", "tv/convnext_tiny", "tv/densenet121", "tv/efficientnet_b0", "tv/efficientnet_v2_s",
    "tv/googlenet", "tv/inception_v3", "tv/mnasnet0_5", "tv/mobilenet_v2", "tv/mobilenet_v3_small",
    "tv/regnet_x_400mf", "tv/regnet_y_400mf", "tv/resnet18", "tv/resnet50", "tv/resnext50_32x4d",
    "tv/shufflenet_v2_x1_0", "tv/squeezenet1_1", "tv/swin_t", "tv/swin_v2_t", "tv/vit_b_32",
    "tv/lraspp_mobilenet_v3_large", "tv/r3d_18", "hf/bert", "hf/roberta", "hf/distilbert", "hf/electra",
    "hf/deberta-v2", "hf/gpt2", "hf/llama", "hf/mistral", "hf/qwen3", "hf/mixtral", "hf/t5", "hf/bart",
    "hf/whisper", "hf/wav2vec2", "hf/vit", "hf/swin", "hf/segformer", "hf/mamba",
)  # fmt: skip
"""Models of the shared zoo: one of each family, 40 in all."""
SECONDS = 900
STEPS = 30
SPARSITY = 0.4
DIGITS = 9
"""Significant digits of the floats in a report."""
SHOWN = 40
"""Lines of a difference that are printed."""

Built = tuple[nn.Module, Any, Mapping[str, Any]]
Sections = dict[str, list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join(SETS), metavar="A,B", help="of %(default)s")
    parser.add_argument("--names", metavar="A,B", help="only these subjects, such as tiny/encoder,zoo/tv/resnet18")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write one line of JSON per subject")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with a file that --out wrote")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    before = {row["name"]: row["sections"] for row in read_json(options.against)} if options.against else {}
    if options.out:
        options.out.unlink(missing_ok=True)
    names = set(options.names.split(",")) if options.names else None
    changed = 0
    for name, build in subjects(options.sets.split(",")):
        if names is not None and name not in names:
            continue
        found = bounded(fingerprints, build, seconds=SECONDS)
        sections: Sections = found.value or {"failure": [found.error]}
        append_json(options.out, {"name": name, "sections": sections})
        print(f"{name:36} {summary(sections)}", flush=True)
        if options.against:
            changed += show_changes(name, before.get(name), sections)
    if options.against:
        print(f"{changed} subjects differ" if changed else "no difference", flush=True)
    sys.exit(1 if changed else 0)


# ------------------------------------------------------------------------------------------------ subjects
def subjects(sets: Iterable[str]) -> Iterator[tuple[str, Callable[[], Built]]]:
    """Name, and the function that builds model, positional and keyword inputs."""
    for which in sets:
        if which == "tiny":
            yield from ((f"tiny/{name}", lambda name=name: (*tiny_models()[name], {})) for name in tiny_models())
        elif which == "random":
            yield from ((f"random/{seed}", lambda seed=seed: (*random_model(seed), {})) for seed in SEEDS)
        elif which == "zoo":
            zoo = common.shared_module("zoo.py")
            yield from ((f"zoo/{case.name}", case.build) for case in zoo.cases(names=ZOO))
        else:
            raise SystemExit(f"no set {which!r}; there are {', '.join(SETS)}")


# ------------------------------------------------------------------------------------------------ fingerprints
def fingerprints(build: Callable[[], Built]) -> Sections:
    """All sections of one subject. A step that raises has its error as text."""
    found: Sections = {}
    steps: dict[str, Callable[[nn.Module, Any, Any], Sections]] = {
        "groups": groups,
        "sliced": sliced,
        "integers": integers,
        "trained": trained,
    }
    for name, step in steps.items():
        model, args, kwargs = build()
        torch.manual_seed(0)
        try:
            found |= step(model, args, kwargs)
        except Exception as error:  # a refusal is a result to compare, too
            found[name] = [brief(error)]
    return found


def groups(model: nn.Module, args: Any, kwargs: Any) -> Sections:
    """Channel groups with their members, frozen axes with reasons, unknown ops."""
    plan = gc.analyze(model, args, kwargs)
    lines = []
    for group in plan.groups:
        lines.append(f"{group.name} {group.role} {group.size}{' normalized' if group.normalized else ''}")
        for member in group.members:
            side = "consumes" if member.consumes else "makes"
            lines.append(f"  {member.name} dim {member.dim} {side} {digest(member.unit_of)}")
    frozen = [f"{axis.name} dim {axis.dim} ({axis.indices}): {axis.reason}" for axis in plan.frozen]
    return {"groups": lines, "frozen": frozen, "unknown": [op.op for op in plan.unknown_ops]}


def sliced(model: nn.Module, args: Any, kwargs: Any) -> Sections:
    """The model cut in one shot, its report, and the files of its folder."""
    small = gc.compress(model, args, kwargs, sparsity=SPARSITY, progress=False)
    edits = [f"{path}.{name} = {value}" for path, name, value in small.edits]
    found = {"sliced": [small.form, small.reason, *edits, *state_of(small.module)], "report": report_of(small)}
    return found | files_of(small, "files")


def integers(model: nn.Module, args: Any, kwargs: Any) -> Sections:
    """The model cut and quantized to 8 bits after training: graph, tensors, report and files."""
    small = gc.compress(model, args, kwargs, sparsity=SPARSITY, bits=8, progress=False)
    found = {"lowered": [*graph_of(small.module), *state_of(small.module)], "report, 8 bits": report_of(small)}
    onnx = sum(p.numel() for p in model.parameters()) < 20_000
    return found | files_of(small, "files, 8 bits", onnx)


def trained(model: nn.Module, args: Any, kwargs: Any) -> Sections:
    """Weights, steps and ranges after some QASSO steps, and the model finalized from them."""
    ready = gc.prepare(model, args, kwargs, bits=(4, 8)).train()
    schedule = gc.Schedule(STEPS, warmup=3, projection=5, joint=14, projection_periods=2, pruning_periods=4)
    optimizer = gc.QASSO(ready, torch.optim.SGD, lr=1e-3, sparsity=SPARSITY, schedule=schedule)
    for _ in range(STEPS):
        optimizer.zero_grad()
        outputs = [t for t in pytree.tree_leaves(ready(*args, **kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        torch.stack([t.square().mean() for t in outputs]).sum().backward()
        optimizer.step()
    found = {"trained": state_of(ready)}
    small = gc.finalize(ready)
    lines = [*graph_of(small.module), *state_of(small.module)]
    return {**found, "finalized": lines, "report, trained": report_of(small)}


def state_of(module: nn.Module) -> list[str]:
    """One line per tensor of the state."""
    return [f"{name} {digest(tensor)}" for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)]


def graph_of(module: nn.Module) -> list[str]:
    """One line per node: name, target, arguments and shape."""
    if not isinstance(module, fx.GraphModule):
        return [f"a {type(module).__name__}, not a graph"]
    lines = []
    for node in module.graph.nodes:
        shape = tuple(value.shape) if isinstance(value := node.meta.get("val"), Tensor) else ""
        lines.append(f"{node.name} = {node.op} {node.target} {node.args} {dict(node.kwargs)} {shape}")
    return lines


def report_of(small: gc.CompressedModel) -> list[str]:
    """The report as sorted JSON, floats rounded."""
    assert isinstance(small.report, gc.Report)
    return json.dumps(rounded(small.report.to_dict()), indent=1, sort_keys=True).splitlines()


def rounded(value: Any) -> Any:
    """The nested value with floats of fewer digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {str(key): rounded(own) for key, own in value.items()}
    return [rounded(own) for own in value] if isinstance(value, (list, tuple)) else value


def files_of(small: gc.CompressedModel, section: str, onnx: bool = False) -> Sections:
    """Digests of what `save` (and, where `onnx`, `export`) writes; a refusal in place of a digest."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, write in (("folder", small.save), *((("model.onnx", small.export),) if onnx else ())):
            target = Path(folder) / name
            try:
                write(target)
            except Exception as error:  # a refusal is a result to compare, too
                lines.append(f"{name}: {brief(error)}")
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            lines.append(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}")
    return {section: lines}


def digest(tensor: Tensor) -> str:
    """Shape, dtype and the first digits of the SHA-256 of the elements."""
    flat = tensor.detach().cpu().contiguous().flatten()
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {hashlib.sha256(data).hexdigest()[:16]}"


# ------------------------------------------------------------------------------------------------ differences
def summary(sections: Sections) -> str:
    """One digest per section."""
    return "  ".join(f"{k} {hashlib.sha256(chr(10).join(v).encode()).hexdigest()[:6]}" for k, v in sections.items())


def show_changes(name: str, before: Sections | None, after: Sections) -> bool:
    """Print the difference of each section. Return whether there is one."""
    if before is None:
        print(f"--- {name}: not in the file compared with", flush=True)
        return True
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    for key in changed:
        lines = list(difflib.unified_diff(before.get(key, []), after.get(key, []), lineterm="", n=1))[2:]
        print(f"--- {name}, {key}: {sum(line[:1] in '+-' for line in lines)} lines", flush=True)
        for line in lines[:SHOWN]:
            print(f"    {line[:200]}")
        if len(lines) > SHOWN:
            print(f"    … {len(lines) - SHOWN} more", flush=True)
    return bool(changed)


if __name__ == "__main__":
    main()
