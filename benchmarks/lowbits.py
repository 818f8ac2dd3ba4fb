"""Few bits without training: accuracy by rounding and repair, on calibration data without labels.

    python -m benchmarks.lowbits                                    # every case: hours on two cores
    python -m benchmarks.lowbits --models resnet20
    python -m benchmarks.lowbits --models mobilenet --cases "W4 A8" --ways "second order, repaired"
    python -m benchmarks.lowbits --models mobilenet --cases "W4 A4" --ways reconstructed --seconds 600
    python -m benchmarks.lowbits --models mobilenet --cases "W4 A4" --ways "learned as a whole" --steps 1000
    python -m benchmarks.lowbits --models minilm --batches 3 --ways "nearest;nearest, channels as they are"
    python -m benchmarks.lowbits --models vit --ways "nearest;nearest, channels as they are"

Models, calibration and test data are those of `benchmarks.oneshot`. One step per output channel, every layer; "ends 8"
gives the first and the last layer 8 bits, as `compress` does by default. Quality is that of the integers.

Peers, which have 8 bits alone, stand beside ours in the case "W8 A8": onnxruntime's static quantization and torch's
PT2E (torchao's quantizer for x86), each as a file run by onnxruntime with exact sums, on the same calibration images.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphcomp as gc
from benchmarks import common, oneshot
from benchmarks import quantized as files
from benchmarks.common import append_json, brief, section, table, timed


@dataclass(frozen=True)
class Case:
    """Bits of weights and activations (None: floats), of the ends at least, and the share of units cut."""

    weights: int
    activations: int | None
    ends: int
    cut: float = 0.0

    def __str__(self) -> str:
        acts = "" if self.activations is None else f" A{self.activations}"
        ends = f", ends {self.ends}" if self.ends > self.weights else ""
        return f"W{self.weights}{acts}{ends}" + (f", {self.cut:.0%} of the units cut" if self.cut else "")


WAYS: dict[str, dict[str, Any]] = {
    "nearest": {"rounding": "nearest", "repair": None},
    "nearest, channels as they are": {"rounding": "nearest", "repair": None, "even": False},
    "nearest, repaired": {"rounding": "nearest", "repair": "least_squares"},
    "second order": {"rounding": "second_order", "repair": None},
    "second order, repaired": {"rounding": "second_order", "repair": "least_squares"},
    "reconstructed": {"rounding": "reconstruct", "repair": "least_squares"},
    "learned as a whole": {"rounding": "whole", "repair": None},
}
PEERS = ("onnxruntime static", "PT2E")

LEAST_AREA, MOST_STRETCH = 0.6, 1.2
"""Of what is cut out of an image: the least share of its area, and how much longer or shorter a side may be."""

EIGHT = Case(8, 8, 8)

CASES: dict[str, tuple[Case, ...]] = {
    "resnet20": (EIGHT, Case(4, None, 4), Case(3, None, 3), Case(4, 4, 4), Case(4, 8, 4, cut=0.3)),
    "mobilenet": (EIGHT, Case(4, 8, 8), Case(4, 4, 8)),
    "efficientnet": (EIGHT, Case(4, 8, 8), Case(4, 4, 8)),
    "minilm": (EIGHT, Case(4, 8, 8), Case(4, 4, 8)),
    "vit": (EIGHT, Case(4, 4, 8)),
}


def main() -> None:
    options = _options()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    for name in options.models.split(","):
        task = vit() if name == "vit" else oneshot.TASKS[name]()
        dense = task.evaluate(task.model)
        rows = list(_rows(task, CASES[name], options))
        metrics = ", ".join(f"{score.metric} (n = {score.n}), float {score}" for score in dense)
        section(f"{task.name}, {metrics}", table(["case", *_ways(options)], rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CASES), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--cases", default="", metavar="A;B", help="those that begin so; default: all")
    parser.add_argument("--ways", default=";".join((*WAYS, *PEERS)), metavar="A;B", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, metavar="N", help="for reconstruction; default: no limit")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of the model as a whole; default: 400")
    parser.add_argument("--batches", type=int, metavar="N", help="of calibration data, the first; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one line of JSON per measurement")
    return parser.parse_args()


def _ways(options: argparse.Namespace) -> list[str]:
    return [way.strip() for way in options.ways.split(";")]


def _rows(task: oneshot.Task, cases: tuple[Case, ...], options: argparse.Namespace) -> Iterator[list[str]]:
    wanted = tuple(start.strip() for start in options.cases.split(";"))
    for case in cases:
        if not str(case).startswith(wanted):
            continue
        row = [str(case)]
        for way in _ways(options):
            if way in PEERS and case != EIGHT:
                row.append("–")
                continue
            try:
                with timed() as clock:
                    small = peer(task, way) if way in PEERS else quantized(task, case, options, **WAYS[way])
            except Exception as error:
                if way not in PEERS:
                    raise
                row.append(f"fails: {brief(error)}")
                print(f"{task.name}, {case}, {way}: {row[-1]}", flush=True)
                continue
            notes = small.report.notes if isinstance(small, gc.CompressedModel) else ()
            print("\n".join(note for note in notes if "reconstructed" in note), flush=True)
            scores = task.evaluate(small)
            quality = ", ".join(map(str, scores))
            print(f"{task.name}, {case}, {way}: {quality}{held_out(task, small, options)} in {clock.seconds:.0f} s")
            for score in scores:
                append_json(options.json, {"model": task.name, "case": str(case), "way": way, **vars(score)})
            row.append(quality)
        yield row


@torch.no_grad()
def held_out(task: oneshot.Task, small: nn.Module, options: argparse.Namespace) -> str:
    """Say how far the outputs are off on the last batch of calibration data, where that was not read."""
    if options.batches is None or options.batches >= len(task.calibration):
        return ""
    inputs = task.calibration[-1][: len(task.example)]
    wanted = task.model(*inputs)
    return f", outputs {float((small(*inputs) - wanted).norm() / wanted.norm()):.3f} off"


def quantized(
    task: oneshot.Task, case: Case, options: argparse.Namespace, *, rounding: Any, repair: Any, even: bool | None = None
) -> gc.CompressedModel:
    """Return the model in integers; where rounding is learned, in the steps and seconds of `options`."""
    if rounding == "reconstruct":
        rounding = gc.Reconstruction(seconds=options.seconds)
    elif rounding == "whole":
        augment = images_at_random if task.example[0].dim() == 4 else None
        rounding = gc.Reconstruction(0, options.seconds, whole_steps=options.steps, augment=augment)
    activations = None
    if case.activations is not None:
        observer: Any = "mse" if case.activations < 8 else "minmax"
        activations = gc.QuantSpec(case.activations, symmetric=False, observer=observer)
    weights = gc.QuantSpec(case.weights, granularity="channel", observer="mse" if case.weights < 8 else "minmax")
    config = gc.QuantConfig(weights, activations, first_and_last_bits=case.ends)
    cut: dict[str, Any] = {"saliency": "activation", "ranking": "sensitivity"} if case.cut else {}
    read = [batch[: len(task.example)] for batch in task.calibration[: options.batches]]
    quantization = gc.PostTraining(config, rounding=rounding, even_activations=even)
    return gc.compress(
        task.model, task.example, sparsity=case.cut, quantization=quantization, calibration=read,
        data=task.calibration if cut else None, loss=task.loss if cut else None, repair=repair, progress=False, **cut,
    ).eval()  # fmt: skip


def vit() -> oneshot.Task:
    """A small ViT of transformers with weights by chance, whose norms span an order of magnitude, on noise."""
    common.import_torchvision()
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=32, patch_size=8,
        num_labels=10, initializer_range=0.15,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = ViTForImageClassification(config)

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.vit(images).logits
            return found

    torch.manual_seed(0)
    model = Logits().eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data *= torch.randn(64, generator=generator).exp()
            module.bias.data += torch.randn(64, generator=generator)
    *calibration, other = (torch.randn(16, 3, 32, 32, generator=generator) for _ in range(5))
    with torch.no_grad():
        wanted = model(other)

    @torch.no_grad()
    def evaluate(small: nn.Module) -> list[oneshot.Score]:
        off = (small(other) - wanted).norm(dim=1) / wanted.norm(dim=1)
        return [
            oneshot.Score("relative error of the logits, %", 100 * float(off.mean()), 100 * float(off.std()) / 4, 16)
        ]

    return oneshot.Task(
        "ViT", model, (other[:2],), [(batch,) for batch in calibration], oneshot.cross_entropy, evaluate
    )


def images_at_random(inputs: Sequence[Any], generator: torch.Generator) -> list[Tensor]:
    """Return images of the same size: cut out, stretched and mirrored at random."""
    (images,) = inputs
    height, width = images.shape[-2:]
    found = []
    for image in images.split(1):
        (area, shape, down, right, mirror) = torch.rand(5, generator=generator).tolist()
        side, stretch = (LEAST_AREA + (1 - LEAST_AREA) * area) ** 0.5, MOST_STRETCH ** (2 * shape - 1)
        h, w = min(height, round(height * side * stretch)), min(width, round(width * side / stretch))
        top, left = round(down * (height - h)), round(right * (width - w))
        part = image[..., top : top + h, left : left + w]
        part = nn.functional.interpolate(part, size=(height, width), mode="bilinear", antialias=True)
        found.append(part.flip(-1) if mirror < 0.5 else part)
    return [torch.cat(found)]


def peer(task: oneshot.Task, way: str) -> nn.Module:
    """Return the file of another library, run by onnxruntime."""
    case = replace(files.vision(task), calibration=[batch[:1] for batch in task.calibration])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peer.onnx"
        if way == "PT2E":
            files.pt2e(case, path)
        else:
            files.plain(case, Path(folder) / "float.onnx")
            files.static(case, Path(folder) / "float.onnx", path)
        return files.Runtime(path, exact=True)


if __name__ == "__main__":
    main()
