"""Large models: peak memory and seconds of `compress` and of `compress_checkpoint` on one random Llama.

    python -m benchmarks.large --params 1e9                       # minutes, and about 6 GB of disk
    python -m benchmarks.large --params 1e8 --what checkpoint
    python -m benchmarks.large --params 3e8 --bits 4 --group-size 32       # weights of integers
    python -m benchmarks.large --params 3e8 --layers                        # a share of the layers, in place of units

The model has a width of 2048, feed-forward layers of 8192, 8 key heads of 32, a vocabulary of 32,000 and as many layers
as the parameters ask for (16 for one billion), in bfloat16, in shards of --shard. Each step runs in a process of its
own; its peak is the largest resident set that the system saw (`ru_maxrss`), beside the set once all is imported. Pages
of files that are mapped count, though the system may take them back. `compress` reads the folder, cuts and saves; both
folders are compared file by file, and the last column sums the sums of all files. The exit code is 1 where they differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import header, section, table

WHAT = ("compress", "checkpoint")
WIDTH, HIDDEN, VOCABULARY, HEADS, KEY_HEADS = 2048, 8192, 32_000, 32, 8
PER_LAYER = WIDTH * (2 * WIDTH + 2 * WIDTH * KEY_HEADS // HEADS) + 3 * WIDTH * HIDDEN + 2 * WIDTH
BATCH, TOKENS = 2, 128
"""Rows, and tokens, of a batch of calibration."""
MIB = 2**20


def llama(params: float) -> Any:
    """A config with about so many parameters."""
    import transformers

    layers = max(1, round((params - 2 * VOCABULARY * WIDTH) / PER_LAYER))
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def make(folder: Path, params: float, shard: str) -> None:
    """Write a random model."""
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    transformers.LlamaForCausalLM(llama(params)).save_pretrained(folder, max_shard_size=shard)


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what is asked of both functions."""
    asked: dict[str, Any] = {"sparsity": arguments.sparsity, "progress": False}
    if arguments.bits:
        asked |= {"bits": arguments.bits, "activation_bits": None, "group_size": arguments.group_size}
    if arguments.layers:
        tokens = torch.randint(3, VOCABULARY, (2, BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
        asked |= {"prune": ("layer",), "calibration": [{"input_ids": batch} for batch in tokens]}
    return asked


def compress(source: Path, target: Path, shard: str, asked: dict[str, Any], steps: dict[str, float]) -> None:
    """Load, cut and save."""
    import transformers

    import graphcomp as gc
    from graphcomp.hf.example import example_of

    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    steps["loaded"] = peak()
    small = gc.compress(model, example_of(model), **asked)
    steps["cut"] = peak()
    del model
    small.module.save_pretrained(target, max_shard_size=shard)


def checkpoint(source: Path, target: Path, shard: str, asked: dict[str, Any], steps: dict[str, float]) -> None:
    """Cut from folder to folder."""
    import graphcomp as gc

    gc.compress_checkpoint(source, target, max_shard_size=shard, **asked)


def peak() -> float:
    """Return the largest resident set so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(step: str, source: Path, target: Path, arguments: argparse.Namespace) -> None:
    """Run one step, and print what it took as JSON."""
    with suppress(ImportError):
        from tests.vision import import_torchvision

        import_torchvision()
    import transformers.models.llama.modeling_llama  # noqa: F401

    import graphcomp.api  # noqa: F401

    started, steps = time.perf_counter(), {"imported": peak()}
    if step == "make":
        make(source, arguments.params, arguments.shard)
    else:
        run = compress if step == "compress" else checkpoint
        run(source, target, arguments.shard, options_of(arguments), steps)
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime
    print(json.dumps({"seconds": time.perf_counter() - started, "cpu": cpu, **steps, "peak": peak()}))


def sums(folder: Path) -> dict[str, str]:
    """Return file -> SHA-256."""
    found = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--what", default=",".join(WHAT), help=f"of {', '.join(WHAT)}, with commas")
    parser.add_argument("--params", type=float, default=1e9)
    parser.add_argument("--shard", default="300MB")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--bits", type=int, help="of weights; default: floats")
    parser.add_argument("--group-size", type=int, default=0, help="of weights of integers")
    parser.add_argument("--layers", action="store_true", help="leave layers out, by calibration on random tokens")
    parser.add_argument("--folder", type=Path, help="of the source, made where it is not there; default: temporary")
    parser.add_argument("--child", nargs=3, metavar=("STEP", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        step, source, target = arguments.child
        child(step, Path(source), Path(target), arguments)
        return 0
    print(header())
    with tempfile.TemporaryDirectory(dir=arguments.folder and arguments.folder.parent) as temporary:
        source = arguments.folder or Path(temporary) / "source"
        if not source.exists():
            run("make", source, source, arguments)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        shards = len(list(source.glob("*.safetensors")))
        rows, written = [], {}
        for step in arguments.what.split(","):
            target = Path(temporary) / step
            found = run(step, source, target, arguments)
            above = found["peak"] - found["imported"]
            rows.append(
                [
                    step,
                    f"{found['seconds']:.0f}",
                    f"{found['cpu']:.0f}",
                    f"{found['peak']:,.0f}",
                    f"{above:,.0f}",
                    f"{above * MIB / size:.2f}",
                ]
            )
            written[step] = sums(target)
            rows[-1].append(hashlib.sha256(json.dumps(written[step]).encode()).hexdigest()[:12])
            shutil.rmtree(target)
        columns = ["", "seconds", "of the CPU", "peak, MiB", "above imports, MiB", "of the weights", "SHA-256"]
        section(f"{size / MIB:,.0f} MiB of weights, {shards} shards of {arguments.shard}", table(columns, rows))
    if len(written) < 2:
        return 0
    first, *others = written.values()
    same = all(other == first for other in others)
    print(f"\n{len(first)} files, {'identical' if same else 'DIFFERENT'}")
    return 0 if same else 1


def run(step: str, source: Path, target: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one step in a process of its own; return what it printed."""
    options = ["--params", str(arguments.params), "--shard", arguments.shard, "--sparsity", str(arguments.sparsity)]
    options += ["--group-size", str(arguments.group_size), *(["--layers"] if arguments.layers else [])]
    options += ["--bits", str(arguments.bits)] if arguments.bits else []
    command = [sys.executable, "-m", "benchmarks.large", *options, "--child", step, str(source), str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
