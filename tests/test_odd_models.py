"""Models with odd names, in wrappers, and with objects that no code can write down."""

from __future__ import annotations

import copy
import operator
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.testing import check_law


class Named(nn.Module):
    """Its second layer is called as one likes."""

    def __init__(self, name: str = "head") -> None:
        super().__init__()
        self.name = name
        self.a = nn.Linear(8, 16)
        self.add_module(name, nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(self.a(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["class", "a b", "it's"])
def test_a_submodule_may_have_any_name(name: str, tmp_path: Path) -> None:
    model, x = Named(name).eval(), torch.randn(2, 8)
    check_law(model, x)
    small = gc.compress(model, x, sparsity=0.5)
    assert small.form == "native"
    assert small.kept.keys() == {"a.weight", "a.bias", f"{name}.weight"}
    integers = gc.compress(model, x, sparsity=0.5, bits=8)
    integers.save(tmp_path / "integers")
    assert torch.equal(gc.load(tmp_path / "integers")(x), integers(x))
    ready = gc.prepare(model, x)
    ready.train()
    ready(x).sum().backward()
    assert dict(ready.named_parameters())[f"{name}.weight"].grad is not None
    copy.deepcopy(ready).eval()(x)


@pytest.mark.slow
@pytest.mark.ci
def test_a_file_of_a_model_with_a_keyword_in_it(tmp_path: Path) -> None:
    x = torch.randn(2, 8)
    small = gc.compress(Named("lambda").eval(), x, sparsity=0.5, bits=8)
    small.export(tmp_path / "model.onnx")
    small.export(tmp_path / "model.pt2")
    assert small.export_report is not None


def test_keys_of_a_dict_of_modules_may_be_keywords() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 16)
            self.heads = nn.ModuleDict({"in": nn.Linear(16, 3), "from": nn.Linear(16, 2)})

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {name: head(self.body(x).relu()) for name, head in self.heads.items()}

    small = gc.compress(Heads().eval(), torch.randn(2, 8), sparsity=0.5)
    assert small.form == "native"
    assert list(small(torch.randn(2, 8))) == ["in", "from"]


def test_an_input_called_by_a_keyword_is_refused() -> None:
    class Mapped(Named):
        def forward(self, **inputs: Tensor) -> Tensor:
            return super().forward(inputs["class"])

    with pytest.raises(gc.InputError, match="input is called 'class'"):
        gc.analyze(Mapped(), {"class": torch.randn(2, 8)})


def _scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval())  # type: ignore[no-any-return]


def _traced() -> nn.Module:
    return torch.jit.trace(Named().eval(), torch.rand(2, 8))  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [_scripted, _traced, lambda: nn.DataParallel(Named())])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_stands_around_a_model_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(gc.InputError, match=r"fix: .* give ") as caught:
        gc.compress(make(), torch.rand(2, 8), sparsity=0.5)
    assert type(make()).__name__ in caught.value.what


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part_is_cut_with_the_rest() -> None:
    part = _scripted().train()
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8), part).eval()
    part.train()
    small = gc.compress(model, torch.rand(2, 8), sparsity=0.5)
    with pytest.raises(gc.InputError, match="that was scripted"):
        gc.compress(model, torch.rand(2, 8), sparsity=0.5, scope="2")
    assert part.training
    assert small.form == "native"
    assert small.kept["2.0.weight"][0].numel() < 16


def test_a_data_parallel_part_is_left_whole(tmp_path: Path) -> None:
    """The op that sends its buffers around takes a group of processes."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        part = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))
        model = nn.Sequential(part, nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 4, 1)).eval()
        with pytest.raises(gc.InputError, match=r"give what it wraps, model\.module"):
            gc.compress(part, torch.rand(1, 3, 4, 4), sparsity=0.5)
        small = gc.compress(model, torch.rand(1, 3, 4, 4), sparsity=0.5)
    finally:
        dist.destroy_process_group()
    assert small.form == "native"
    assert small.kept.keys() == {"1.weight", "1.bias", "3.weight"}


class Through(nn.Module):
    """Hands its activations through a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(1, 16, 1), nn.Conv2d(16, 4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(torch.relu(self.a(x))))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_with_objects_that_cannot_be_copied_keeps_its_class() -> None:
    model = Through(torch.jit.script(_doubled)).eval()
    model.lock = threading.Lock()  # type: ignore[assignment]
    x = torch.randn(1, 1, 4, 4)
    small = gc.compress(model, x, sparsity=0.5)
    assert small.form == "native"
    assert small.module.lock is model.lock
    assert small.module.a is not model.a
    assert small.kept["a.weight"][0].numel() == 8


def _doubled(x: Tensor) -> Tensor:
    return x * 2


def test_a_shallow_copy_of_a_tensor_is_the_tensor() -> None:
    captured = capture(Through(copy.copy).eval(), torch.randn(1, 1, 4, 4))
    targets = [node.target for node in captured.module.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.set_.source_Storage_storage_offset not in targets
    small = gc.compress(Through(copy.copy).eval(), torch.randn(1, 1, 4, 4), sparsity=0.5)
    assert small.form == "native"
    assert small.kept["a.weight"][0].numel() == 8


def test_a_copy_of_bytes_is_refused_with_its_line() -> None:
    with pytest.raises(gc.CaptureError, match="memory that no op wrote") as caught:
        gc.compress(Through(copy.deepcopy).eval(), torch.randn(1, 1, 4, 4), sparsity=0.5)
    assert "self.function(torch.relu(self.a(x)))" in caught.value.at


def test_layers_that_hold_integers_already_stay_as_they_are() -> None:
    floats = nn.Sequential(nn.Conv1d(2, 8, 1), nn.ReLU(), nn.Conv1d(8, 8, 1), nn.Linear(8, 4)).eval()
    with warnings.catch_warnings():  # torch warns of the function itself
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(floats)
    x = torch.randn(1, 2, 8)
    small = gc.compress(model, x, sparsity=0.5)
    assert small.form == "native"
    assert small.kept.keys() == {"0.weight", "0.bias", "2.weight"}
    with pytest.raises(gc.PlanError, match="is quantized already"):
        gc.compress(model, x, sparsity=0.5, bits=8)


def test_kept_names_what_the_model_holds() -> None:
    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.factors = nn.Linear(8, 16), nn.Linear(16, 4), [1.0 + i for i in range(16)]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * torch.tensor(self.factors))  # type: ignore[no-any-return]

    small = gc.compress(Factors().eval(), torch.rand(2, 8), sparsity=0.5)
    assert small.kept.keys() == {"a.weight", "a.bias", "b.weight"}


class PerSample(nn.Module):
    """Every sample has kernels of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.w, self.style = nn.Parameter(torch.randn(8, 6, 3, 3) / 5), nn.Linear(4, 6)
        self.front, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        x = self.front(x)
        b, c, h, w = x.shape
        kernels = self.w[None] * self.style(z)[:, None, :, None, None]
        if self.how == "loop":
            y = torch.cat([F.conv2d(x[i : i + 1], kernels[i], padding=1) for i in range(b)])
        elif self.how == "vmap":
            y = torch.vmap(lambda one, own: F.conv2d(one[None], own, padding=1)[0])(x, kernels)
        else:
            y = F.conv2d(x.reshape(1, -1, h, w), kernels.reshape(-1, c, 3, 3), padding=1, groups=b).reshape(b, -1, h, w)
        return self.last(y.relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("how", ["groups", "loop", "vmap"])
def test_kernels_of_each_sample_are_cut_or_refused_with_a_reason(how: str, batch: int) -> None:
    model, inputs = PerSample(how).eval(), (torch.rand(batch, 3, 6, 6), torch.randn(batch, 4))
    plan = gc.analyze(model, inputs)
    assert not any("Error" in frozen.reason.text for frozen in plan.frozen)
    if how == "loop":
        assert gc.compress(model, inputs, sparsity=0.5).form == "native"


def test_results_in_a_list_among_results_are_frozen() -> None:
    """An op may return a list beside other results; getitem reaches into both."""
    captured = capture(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).eval(), torch.rand(2, 8))
    graph = captured.module.graph
    first = next(node for node in graph.nodes if node.target is torch.ops.aten.linear.default)
    with graph.inserting_after(first):
        several = graph.call_function(_several, (first,))
        several.meta["val"] = ([first.meta["val"]], None)
    with graph.inserting_after(several):
        items = graph.call_function(operator.getitem, (several, 0))
        items.meta["val"] = [first.meta["val"]]
    with graph.inserting_after(items):
        item = graph.call_function(operator.getitem, (items, 0))
        item.meta["val"] = first.meta["val"]
    first.replace_all_uses_with(item, delete_user_cb=lambda user: user is not several)
    captured.module.recompile()
    assert gc.coupling.analysis.analyze_captured(captured).groups == ()


def _several(x: Tensor) -> tuple[list[Tensor], None]:
    return [x], None
