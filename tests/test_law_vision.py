"""Law 2 on the operators of torchvision, called as a compiled torchvision calls them.

Where the compiled operators are not loaded, they are declared here and computed in Python.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.testing import Block, check_law, random_kept, randomize
from tests.vision import import_torchvision

# torch's own, when torchvision's Python roi_align first asks for its compiler
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

SCHEMAS = {
    "roi_align": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    "deform_conv2d": "(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor",
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    """torch.ops.torchvision, compiled or by the functions below."""
    try:
        import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")
    declared, computed = torch.library.Library("torchvision", "FRAGMENT"), torch.library.Library("torchvision", "IMPL")
    for name, schema in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            declared.define(f"{name}{schema}")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"torchvision::{name}", "CPU"):
            computed.impl(name, globals()[name], "CPU")
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"torchvision::{name}", "Meta"):
                computed.impl(name, globals()[f"{name}_shape"], "Meta")
    yield
    computed._destroy()
    declared._destroy()


def roi_align(x: Tensor, rois: Tensor, scale: float, h: int, w: int, ratio: int, aligned: bool) -> Tensor:
    python: Any = importlib.import_module("torchvision.ops.roi_align")
    return python._roi_align(x, rois, scale, h, w, ratio, aligned)  # type: ignore[no-any-return]


def roi_align_shape(x: Tensor, rois: Tensor, scale: float, h: int, w: int, ratio: int, aligned: bool) -> Tensor:
    return x.new_empty(rois.shape[0], x.shape[1], h, w)


def deform_conv2d(x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *numbers: Any) -> Tensor:
    """3 x 3, stride 1, padding 1: each of the nine taps is sampled where its offset says."""
    groups, offset_groups = numbers[6:8]
    n, c, h, w = x.shape
    taps = []
    offset = offset.view(n, offset_groups, 9, 2, h, w)
    for k in range(9):
        y0 = torch.arange(h).view(-1, 1) + k // 3 - 1 + offset[:, :, k, 0]
        x0 = torch.arange(w) + k % 3 - 1 + offset[:, :, k, 1]
        grid = torch.stack([2 * x0 / (w - 1) - 1, 2 * y0 / (h - 1) - 1], -1).flatten(0, 1)
        parts = x.reshape(n * offset_groups, c // offset_groups, h, w)
        tap = F.grid_sample(parts, grid.to(x.dtype), align_corners=True).reshape(n, offset_groups, -1, h, w)
        taps.append((tap * mask.view(n, offset_groups, 9, 1, h, w)[:, :, k]).view(n, c, h, w))
    columns = torch.stack(taps, 2).view(n, groups, c // groups, 9, h, w)
    filters = weight.view(groups, -1, c // groups, 9)
    return torch.einsum("ngikhw,goik->ngohw", columns, filters).flatten(1, 2) + bias.view(-1, 1, 1)


def deform_conv2d_shape(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    python: Any = importlib.import_module("torchvision.ops.boxes")
    overlaps, kept = python.box_iou(boxes, boxes), []
    for k in scores.argsort(descending=True).tolist():
        if all(overlaps[k, other] <= threshold for other in kept):
            kept.append(k)
    return torch.tensor(kept)


# ------------------------------------------------------------------------------------------------ the law
def around(block: nn.Module, out: int) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), block, nn.Conv2d(out, 4, 1))
    return randomize(model).double(), torch.randn(2, 3, 8, 8).double()


@pytest.mark.slow
@pytest.mark.ci
def test_roi_align_keeps_channels_free() -> None:
    rois = torch.tensor([[0, 1.0, 1, 6, 7], [1, 0, 2, 5, 5], [1, 2, 2, 7, 6]]).double()

    def run(m: Any, x: Tensor) -> Tensor:
        return torch.ops.torchvision.roi_align(x, m.rois, 1.0, 2, 2, 2, True)  # type: ignore[no-any-return]

    model, x = around(Block("roi_align", run, rois=nn.Parameter(rois)), 12)
    result = check_law(model, x, rounds=2)
    assert [group.size for group in result.groups] == [12]
    assert result.moved > 1e-3
    assert not result.analysis.unknown_ops


@pytest.mark.parametrize(("groups", "offset_groups"), [(1, 1), (3, 1), (1, 2), (3, 3)])
def test_deform_conv2d_is_a_convolution_to_its_channels(groups: int, offset_groups: int) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        offset, mask = m.offset(x), torch.sigmoid(m.mask(x))
        numbers = (1, 1, 1, 1, 1, 1, groups, offset_groups, True)
        return torch.ops.torchvision.deform_conv2d(x, m.weight, offset, mask, m.bias, *numbers)  # type: ignore[no-any-return]

    parts = {
        "weight": nn.Parameter(torch.randn(9, 12 // groups, 3, 3)),
        "bias": nn.Parameter(torch.randn(9)),
        "offset": nn.Conv2d(12, 18 * offset_groups, 1),
        "mask": nn.Conv2d(12, 9 * offset_groups, 1),
    }
    model, x = around(Block("deform_conv2d", run, **parts), 9)
    result = check_law(model, x, rounds=2)
    assert result.groups
    assert result.moved > 1e-3
    assert not result.analysis.unknown_ops
    assert all(m.name != "1.offset.bias" for group in result.groups for m in group.members)


class Detector(nn.Module):
    """Boxes and scores of 30 places, of which those stay that do not overlap: (30, 6) -> (?, 4), (?, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.box, self.score, self.label = nn.Linear(16, 4), nn.Linear(16, 1), nn.Linear(16, 3)
        self.again = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.normalize(self.stem(x), dim=-1)
        corner, size = self.box(h).sigmoid().chunk(2, -1)
        boxes = torch.cat([corner, corner + size], -1)
        keep = torch.ops.torchvision.nms(boxes, self.score(h).flatten(), 0.6)
        kept = h[keep]
        for _ in range(1 + len(keep) % 3):  # as many rounds as the data says
            kept = torch.cat([kept, self.again(kept).relu()])
        return boxes[keep], self.label(kept)


def test_a_detector_is_recorded_and_cut_natively() -> None:
    torch.manual_seed(0)
    model = randomize(Detector())
    x = torch.randn(30, 6)
    plan = gc.analyze(model, x)
    assert plan.captured.producer == "record"
    assert not plan.unknown_ops
    assert sorted(group.size for group in plan.groups) == [16, 16]
    counts = {len(model(x)[0])}
    for seed in range(4):
        small = gc.slice_groups(plan, random_kept(plan.groups, torch.Generator().manual_seed(seed)))
        assert small.form == "native"
        (error,) = small.report.verified.values()
        assert error < 1e-4
        counts.add(len(small(x)[0]))
    assert len(counts) > 1, "every cut took the path that was recorded"
