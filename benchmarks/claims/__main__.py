"""What the papers on pruning with quantization claim, on real data of this size, beside what each is to beat.

    python -m benchmarks.claims --methods opq,qst           # hours; a method alone: --methods opq
    python -m benchmarks.claims --methods opq --models resnet20 --images 6400 --epochs 1
    python -m benchmarks.claims --methods qst --models lenet --epochs 6 --seeds 3

Each table is one run: the same start, data, steps and seed in all rows. Bytes are those of the codes by convention
(C0: nonzeros times bits, no index; C4: entropy; C5: zlib), and of the folder that `small.save` writes, with all else in
it. The file's time is that of `small.export("model.onnx")` in onnxruntime, on 16 images. Test data are never trained
on, and choose nothing.

    ajpq  bits per channel with 0 among them, beside 0 and one number of bits, bits alone, and what is not searched, at
          equal bit operations and at equal bytes of codes; `--plans` plans each on 500 training images, repaired in
          closed form and not trained. CPU seconds of this process.
    opq   a plan from the weights alone, at the C0 bytes of a uniform one (the same share and the same bits in each
          layer), then fine-tuned with the plan fixed. Seconds of the plan are those without capturing the model.
    gdrq  weights and activations clipped in floats and then quantized (W2A4, W4A4), beside the same two stages without
          clips, quantization from the first step on, and LSQ; no bytes are claimed.
    prune_ternary
          pruned ternary weights: C5 bytes against accuracy, cosines of filters and ternary directions; beside ternary
          weights that are not pruned, and no pull to the directions.
    qst   thresholds and steps trained from scratch, beside magnitude pruning on the same cubic schedule and LSQ, at the
          same C0 bytes, and per unit.
    taylor2
          Taylor scores divided by costs beside the scores alone, at equal multiply-accumulates; what is gone may return
          or not; bits at equal bit operations. The U-Net segments drawn shapes, and is trained here first.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.claims.ajpq import ajpq
from benchmarks.claims.cases import CASES, Case
from benchmarks.claims.gdrq import gdrq
from benchmarks.claims.opq import opq
from benchmarks.claims.prune_ternary import prune_ternary
from benchmarks.claims.qst import qst
from benchmarks.claims.taylor2 import taylor2, unet

CLAIMS: dict[str, Callable[[Case, argparse.Namespace], None]] = {
    "opq": opq,
    "qst": qst,
    "gdrq": gdrq,
    "prune_ternary": prune_ternary,
    "ajpq": ajpq,
    "taylor2": taylor2,
}
MODELS: dict[str, Callable[[int], Case]] = {**CASES, "unet": unet}
USUAL = {
    "opq": "resnet20,resnet56",
    "qst": "lenet,vgg7",
    "gdrq": "resnet20",
    "prune_ternary": "lenet,resnet20",
    "ajpq": "resnet20",
    "taylor2": "resnet20,resnet56,unet",
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(CLAIMS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--models", metavar="A,B", help=f"of {', '.join(MODELS)}; default: as each claim has them")
    parser.add_argument("--images", type=int, default=25_000, metavar="N", help="to train on, at most")
    parser.add_argument("--test", type=int, metavar="N", help="images to test on; default: all")
    parser.add_argument("--epochs", type=int, metavar="N", help="default: as each model has them")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--rows", default="", metavar="REGEX", help="rows whose names match (not opq, qst)")
    parser.add_argument("--plans", type=int, default=300, metavar="N", help="of a search; default: %(default)s")
    parser.add_argument("--short", action="store_true", help="the first setting of each claim alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one line of JSON per row")
    return parser.parse_args()


def main() -> None:
    """Print one table per method and model."""
    options = _options()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    for name in options.methods.split(","):
        for model in (options.models or USUAL[name]).split(","):
            case = MODELS[model](options.images)
            images, labels = case.test
            CLAIMS[name](replace(case, test=(images[: options.test], labels[: options.test])), options)


if __name__ == "__main__":
    main()
