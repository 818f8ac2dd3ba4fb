"""Example inputs and calibration data from the command line: shapes, files of arrays, images, text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphcomp.cli.sources import Source
from graphcomp.errors import CalibrationError, InputError
from graphcomp.ir.module import tensor_leaves

SPEC = re.compile(
    r"^(?:(?P<name>\w+)=)?(?P<dims>\d+(?:,\d+)*|scalar)(?::(?P<dtype>\w+)(?::(?P<low>-?\d+)\.\.(?P<high>-?\d+))?)?$"
)
"""[name=]dims[:dtype[:low..high]], such as 1,3,224,224 or input_ids=1,16:int64:0..30000."""

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
"""Suffixes of images."""

TEXTS = (".txt", ".md")
"""Suffixes of text."""


def from_shapes(specs: Sequence[str], seed: int = 0) -> Any:
    """Return random example inputs: normal numbers, or whole numbers from a range.

    Args:
        specs: `SPEC` each; all with a name, or none.

    Returns:
        A tensor, a tuple of tensors, or a dict where the specs have names.

    Raises:
        InputError: a spec is of another form.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[str, Tensor]] = []
    for spec in specs:
        match = SPEC.match(spec.replace(" ", ""))
        if match is None:
            raise InputError(
                f"a shape must be [name=]dims[:dtype[:low..high]], got {spec!r}",
                fix="--shape 1,3,224,224, --shape input_ids=1,16:int64:0..30000, or --shape t=scalar",
            )
        found.append((match["name"] or "", _random(spec, match, generator)))
    names = [name for name, _ in found]
    if any(names) and (not all(names) or len(set(names)) < len(names)):
        raise InputError(
            f"shapes must have names of their own, or none, got {names}", fix="--shape a=1,3 --shape b=1,4"
        )
    if all(names):
        return dict(found)
    tensors = tuple(tensor for _, tensor in found)
    return tensors[0] if len(tensors) == 1 else tensors


def _random(spec: str, match: re.Match[str], generator: torch.Generator) -> Tensor:
    dims = [] if match["dims"] == "scalar" else [int(n) for n in match["dims"].split(",")]
    dtype = getattr(torch, match["dtype"] or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(
            f"torch has no dtype {match['dtype']!r}", at=spec, fix="float32, float16, bfloat16, int64, bool"
        )
    low, high = int(match["low"] or 0), int(match["high"] or 1)
    if high < low:
        raise InputError(f"a range must be low..high, got {low}..{high}", at=spec, fix=f"{high}..{low}")
    if dtype.is_floating_point and match["low"] is None:
        return torch.randn(dims, generator=generator).to(dtype)
    return torch.randint(low, high + 1, dims, generator=generator).to(dtype)


def from_file(path: Path) -> Any:
    """Return the arrays of a file: a dict by name; of `numpy.savez(file, a, b)` without names, a tensor or a tuple.

    Raises:
        InputError: the file is of another kind, or cannot be read.
    """
    arrays = _arrays(path)
    if all(re.fullmatch(r"arr_\d+", name) for name in arrays):
        tensors = tuple(arrays[f"arr_{k}"] for k in range(len(arrays)))
        return tensors[0] if len(tensors) == 1 else tensors
    return arrays


def _arrays(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as held:
                return {name: torch.from_numpy(np.ascontiguousarray(held[name])) for name in held.files}
        if path.suffix == ".npy":
            return {"arr_0": torch.from_numpy(np.load(path, allow_pickle=False))}
        if path.suffix == ".safetensors":
            import safetensors.torch

            return dict(safetensors.torch.load_file(path))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} cannot be read", why=f"{type(error).__name__}: {error}") from error
    raise InputError(f"{path} is of no kind that is read", fix="a .npz, .npy or .safetensors file")


def calibration_of(path: Path, source: Source, example: Any, *, samples: int) -> list[Any]:
    """Return batches in the form of the example inputs.

    Args:
        path: a folder of images, a text file, or a file of arrays whose first dim counts samples.
        source: says how images are normalized, and how text is cut into tokens.
        example: says how long a batch is, and which size images have.
        samples: at most so many.

    Raises:
        CalibrationError: the data are of another kind, are none, or do not fit the example inputs.
    """
    if not path.exists():
        raise CalibrationError(f"there is no {path}", fix="--calibration images/, text.txt or data.npz")
    if path.is_dir():
        return _batches_of(_images(path, source, example, samples), example)
    if path.suffix in TEXTS:
        return _tokens(path, source, example, samples)
    try:
        held = from_file(path)
    except InputError as error:
        raise CalibrationError(error.what, why=error.why, fix=error.fix) from error
    lengths = {len(t) if t.dim() else 0 for t in tensor_leaves(held)}
    if len(lengths) != 1 or 0 in lengths:
        raise CalibrationError(f"{path} must hold arrays of one number of samples, got {sorted(lengths)}")
    kinds = [type(own).__name__ for own in (held, example)]
    if isinstance(held, Mapping) and (not isinstance(example, Mapping) or set(held) != set(example)):
        if len(held) == 1 and isinstance(example, Tensor):
            held = next(iter(held.values()))
        else:
            own = sorted(example) if isinstance(example, Mapping) else kinds[1]
            raise CalibrationError(f"{path} holds {sorted(held)}, the example inputs are {own}")
    elif len(tensor_leaves(held)) != len(tensor_leaves(example)):
        raise CalibrationError(f"{path} holds a {kinds[0]}, the example inputs are a {kinds[1]}")
    elif isinstance(example, Mapping):
        held = dict(zip(example, tensor_leaves(held), strict=True))
    return _batches_of(held, example, samples)


def _batches_of(held: Any, example: Any, samples: int | None = None) -> list[Any]:
    """Return batches as long as the example; a last one that is shorter is left out, where there are others."""
    size = max(next((len(t) for t in tensor_leaves(example) if t.dim()), 1), 1)
    total = min(len(tensor_leaves(held)[0]), samples or 2**62)
    if total < size:
        raise CalibrationError(
            f"the data hold {total} samples, and a batch of the example inputs has {size}",
            fix="more data, or a smaller first dim of the example inputs",
        )
    return [_part(held, slice(k, k + size)) for k in range(0, total - size + 1, size)]


def _part(held: Any, at: slice) -> Any:
    if isinstance(held, Tensor):
        return held[at]
    if isinstance(held, Mapping):
        return {name: tensor[at] for name, tensor in held.items()}
    return tuple(tensor[at] for tensor in held)


def _images(folder: Path, source: Source, example: Any, samples: int) -> Any:
    """Return images as numbers (n, channels, height, width): resized to the example's size, cut in the middle."""
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError("images need Pillow", why="it is not installed", fix="pip install pillow") from error
    tensor = next((t for t in tensor_leaves(example) if t.dim() == 4), None)
    if tensor is None:
        raise CalibrationError("no example input is a batch of images", fix="--shape 1,3,224,224")
    channels, height, width = (int(n) for n in tensor.shape[1:])
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)[:samples]
    if not files:
        raise CalibrationError(f"{folder} holds no images", fix=f"files that end in {', '.join(PICTURES)}")
    mean, std = (torch.tensor(own)[:, None, None] for own in source.normalization)
    rows = []
    for path in files:
        with Image.open(path) as opened:
            image = opened.convert("RGB" if channels == 3 else "L")
            scale = max(height / image.height, width / image.width)
            image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))))
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
            pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
        rows.append((pixels.permute(2, 0, 1) - mean) / std if channels == 3 else pixels[None])
    images = torch.stack(rows).to(tensor.dtype)
    if isinstance(example, Tensor):
        return images
    if isinstance(example, Mapping) and len(example) == 1:
        return {next(iter(example)): images}
    raise CalibrationError("images calibrate models of one input alone", fix="--calibration data.npz")


def _tokens(path: Path, source: Source, example: Any, samples: int) -> list[Any]:
    """Return the tokens of a text, cut into batches of the example's shape."""
    if source.tokenizer is None or not isinstance(example, Mapping) or "input_ids" not in example:
        raise CalibrationError("text calibrates models of transformers alone", fix="hf:…, or --calibration data.npz")
    ids = source.tokenizer()(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    batch, length = (int(n) for n in example["input_ids"].shape)
    rows = min(len(ids) // length, samples)
    if rows < batch:
        raise CalibrationError(
            f"{path} holds {len(ids)} tokens, and a batch has {batch} x {length}", fix="a longer text"
        )
    table = torch.tensor(ids[: rows * length], dtype=torch.int64).reshape(rows, length)
    return [_like(example, table[k : k + batch]) for k in range(0, rows - batch + 1, batch)]


def _like(example: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
    """Return the example inputs with other tokens; all of them count."""
    filled: dict[str, Any] = {}
    for name, value in example.items():
        is_mask = name.endswith("attention_mask") and isinstance(value, Tensor)
        filled[name] = ids if name.endswith("input_ids") else torch.ones_like(value) if is_mask else value
    return filled


def described(inputs: Any) -> list[str]:
    """Return the shape of each input as text, with the names of a dict."""
    pairs: Iterable[tuple[str, Any]]
    pairs = inputs.items() if isinstance(inputs, Mapping) else [("", t) for t in tensor_leaves(inputs)]
    return [
        f"{name}{'=' if name else ''}{','.join(map(str, t.shape)) or 'scalar'}:{str(t.dtype).removeprefix('torch.')}"
        for name, t in pairs
        if isinstance(t, Tensor)
    ]
