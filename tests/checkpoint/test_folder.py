"""Checkpoint folders: what is written comes back, in another process too; what is damaged is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.checkpoint.document import written
from graphcomp.checkpoint.folder import read, write
from graphcomp.errors import CheckpointError
from graphcomp.ir.module import CapturedModule
from graphcomp.native.model import native
from graphcomp.pruning.slice import SliceGroups, kept_of_tensors
from tests.targets import models
from tests.targets.models import INPUTS, analysed, import_transformers, some

ROOT = Path(__file__).parents[2]
READ = """
import sys, torch
from graphcomp.checkpoint.folder import read
torch.set_num_threads(1)
inputs, expected = torch.load(sys.argv[2])
got = read(sys.argv[1], trust="tests.targets.models").module(*inputs)
assert torch.equal(got, expected), (got - expected).abs().max()
"""


def cut(name: str, form: str) -> tuple[nn.Module, dict[str, Any]]:
    """A smaller model and the arguments of `write`."""
    model = getattr(models, name)().eval()
    analysis = analysed(model, *INPUTS[name])
    kept = some(analysis)
    facts = {"form": form, "kept": kept_of_tensors(analysis.coupling, kept), "report": {"params": 1}}
    if form == "graph":
        return SliceGroups(analysis.coupling, kept)(analysis.captured.module), facts
    result = native(analysis, kept)
    assert result.module is not None, result.reason
    return result.module, {**facts, "edits": result.edits}


def same(a: nn.Module, b: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    return torch.equal(a(*inputs), b(*inputs))


@pytest.mark.parametrize("form", ["native", "graph"])
@pytest.mark.parametrize("name", ["Mlp", "Residual", "Attention", "Recurrent", "Tied", "Grouped"])
def test_round_trip(name: str, form: str, tmp_path: Path) -> None:
    module, facts = cut(name, form)
    write(tmp_path / "out", module, **facts)
    found = read(tmp_path / "out")
    assert isinstance(found.module, CapturedModule if form == "graph" else type(module))
    assert same(found.module, module, INPUTS[name])
    assert found.form == form
    assert found.report == {"params": 1}
    assert found.edits == tuple(facts.get("edits", ()))
    assert all(torch.equal(found.kept[n][d], i) for n, dims in facts["kept"].items() for d, i in dims.items())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.safetensors", "graphcomp.json"}


@pytest.mark.parametrize("form", ["native", "graph"])
@pytest.mark.slow
@pytest.mark.ci
def test_another_process_gets_the_same_numbers(form: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    module, facts = cut("Residual", form)
    write(tmp_path / "out", module, **facts)
    inputs = INPUTS["Residual"]
    torch.save((inputs, module(*inputs).detach()), tmp_path / "expected.pt")
    torch.set_num_threads(threads)
    command = [sys.executable, "-c", READ, str(tmp_path / "out"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_is_not_a_parameter_or_a_shape_comes_back(tmp_path: Path) -> None:
    module, facts = cut("Tied", "native")
    module.note = "mine"
    module.embed.weight.requires_grad_(False)
    module.train()
    module.head.eval()
    write(tmp_path / "out", module, **facts)
    found = read(tmp_path / "out").module
    assert found.head.weight is found.embed.weight
    assert torch.equal(found.position, module.position)
    assert "position" not in found.state_dict()
    assert found.note == "mine"
    assert not found.head.weight.requires_grad
    assert (found.training, found.head.training, found.embed.training) == (True, False, True)


def test_a_loaded_graph_switches_modes_and_trains(tmp_path: Path) -> None:
    module, facts = cut("Residual", "graph")
    write(tmp_path / "out", module.train(), **facts)
    found = read(tmp_path / "out").module
    assert found.training
    before = found.bn.running_mean.clone()
    found(*INPUTS["Residual"]).sum().backward()
    assert not torch.equal(found.bn.running_mean, before)
    assert all(p.grad is not None for p in found.parameters())
    after = found.eval().bn.running_mean.clone()
    found(*INPUTS["Residual"])
    assert torch.equal(found.bn.running_mean, after)


def test_a_model_that_holds_a_graph(tmp_path: Path) -> None:
    whole = models.Outer()
    part = analysed(whole.inner, *INPUTS["Mlp"])
    whole.inner = SliceGroups(part.coupling, some(part))(part.captured.module)
    write(tmp_path / "out", whole, form="graph", kept={}, report={})
    found = read(tmp_path / "out").module
    assert isinstance(found, models.Outer)
    assert isinstance(found.inner, CapturedModule)
    assert same(found, whole, INPUTS["Mlp"])


def test_dtypes_are_kept(tmp_path: Path) -> None:
    module = models.Mlp().bfloat16()
    write(tmp_path / "out", module, form="native", kept={}, report={})
    assert {p.dtype for p in read(tmp_path / "out").module.parameters()} == {torch.bfloat16}


def test_layers_of_torch_in_a_sequential(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.LazyLinear(12)), nn.PReLU(12), nn.Linear(12, 4),
    ).eval()  # fmt: skip
    model(torch.randn(1, 3, 8, 8))
    analysis = analysed(model, *INPUTS["Residual"])
    result = native(analysis, some(analysis))
    assert result.module is not None, result.reason
    write(tmp_path / "out", result.module, form="native", kept={}, report={}, edits=result.edits)
    found = read(tmp_path / "out").module
    assert same(found, result.module, INPUTS["Residual"])
    assert repr(found) == repr(result.module)


class Normed(nn.Module):
    """Weights that are computed of others, by classes that torch makes for one module each."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
        self.down = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def test_a_model_with_parametrizations(tmp_path: Path) -> None:
    model, x = Normed().eval(), torch.randn(2, 4)
    write(tmp_path / "out", model, form="native", kept={}, report={})
    assert same(read(tmp_path / "out").module, model, (x,))


# ---------------------------------------------------------------------------------------------- not to be rebuilt
class Settings:
    """What no file can hold."""

    width = 8


class Configured(models.Mlp):
    """A class whose constructor takes an object that a model keeps."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.width)
        self.settings = settings


def test_a_class_whose_state_is_no_data_needs_a_factory(tmp_path: Path) -> None:
    model = Configured(Settings())
    analysis = analysed(model, *INPUTS["Mlp"])
    result = native(analysis, some(analysis))
    assert result.module is not None
    needs = write(tmp_path / "out", result.module, form="native", kept={}, report={}, edits=result.edits)
    assert ["model_factory=lambda: Configured" in need for need in needs] == [True]
    with pytest.raises(CheckpointError, match="model_factory=lambda: Configured"):
        read(tmp_path / "out")
    found = read(tmp_path / "out", model_factory=lambda: Configured(Settings())).module
    assert same(found, result.module, INPUTS["Mlp"])
    assert found.up.out_features == result.module.up.out_features
    with pytest.raises(CheckpointError, match="must be Configured, got Attention"):
        read(tmp_path / "out", model_factory=models.Attention)


def test_a_local_class_needs_a_factory(tmp_path: Path) -> None:
    class Local(models.Mlp):
        pass

    write(tmp_path / "out", Local(), form="native", kept={}, report={})
    with pytest.raises(CheckpointError, match="model_factory=lambda: Local"):
        read(tmp_path / "out")


def test_a_class_that_is_gone(tmp_path: Path) -> None:
    write(tmp_path / "out", models.Mlp(), form="native", kept={}, report={})
    edit(tmp_path / "out", lambda d: d["recipe"].update({"class": "no_such_package.models:Mlp"}))
    with pytest.raises(CheckpointError, match=r"(?s)cannot be imported.*model_factory"):
        read(tmp_path / "out")


def test_only_modules_are_called(tmp_path: Path) -> None:
    write(tmp_path / "out", models.Mlp(), form="native", kept={}, report={})
    edit(tmp_path / "out", lambda d: d["recipe"].update({"class": "os:system", "arguments": {"command": "true"}}))
    with pytest.raises(CheckpointError, match=r"not an nn\.Module class"):
        read(tmp_path / "out")


def test_only_ops_are_called(tmp_path: Path) -> None:
    module, facts = cut("Mlp", "graph")
    write(tmp_path / "out", module, **facts)

    def change(document: dict[str, Any]) -> None:
        next(n for n in document["graph"]["nodes"] if n["op"] == "call_function")["target"] = "os.system"

    edit(tmp_path / "out", change)
    with pytest.raises(CheckpointError, match="not registered"):
        read(tmp_path / "out")


# ------------------------------------------------------------------------------------------------ damage
def edit(folder: Path, change: Any) -> None:
    path = folder / "graphcomp.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(written(document))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "out", models.Mlp(), form="native", kept={}, report={"saved": "first"})
    return tmp_path / "out"


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="truncated"):
        read(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        read(folder)


def test_a_truncated_document(folder: Path) -> None:
    path = folder / "graphcomp.json"
    path.write_text(path.read_text()[:-50])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        read(folder)
    path.write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="damaged"):
        read(folder)


def test_a_folder_from_the_future(folder: Path) -> None:
    edit(folder, lambda d: d.update(format=99, graphcomp="9.0"))
    with pytest.raises(CheckpointError, match=r"newer graphcomp \(9\.0\)"):
        read(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read(tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------ replacing
def test_a_failure_leaves_the_old_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(CheckpointError, match="disk full"):
        write(folder, models.Mlp(), form="native", kept={}, report={"saved": "second"})
    assert read(folder).report == {"saved": "first"}
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_an_interruption_leaves_the_old_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(folder, models.Mlp(), form="native", kept={}, report={"saved": "second"})
    monkeypatch.undo()
    assert read(folder).report == {"saved": "first"}
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_an_interruption_between_the_renames_is_undone(folder: Path) -> None:
    folder.rename(folder.with_name(".out.old"))
    assert read(folder).report == {"saved": "first"}


def test_what_is_no_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty"):
        write(tmp_path, models.Mlp(), form="native", kept={}, report={})
    with pytest.raises(CheckpointError, match="is a file"):
        write(tmp_path / "thesis.tex", models.Mlp(), form="native", kept={}, report={})
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write(.|\n)*NotADirectoryError"):
        write(tmp_path / "file" / "folder", nn.Linear(2, 2), form="native", kept={}, report={})


def test_a_model_without_data(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = models.Mlp()
    with pytest.raises(CheckpointError, match="meta device"):
        write(tmp_path / "out", model, form="native", kept={}, report={})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ Hugging Face
@pytest.mark.slow
@pytest.mark.parametrize("form", ["native", "graph"])
def test_hugging_face(form: str, tmp_path: Path) -> None:
    transformers = import_transformers()
    from graphcomp.capture.capture import capture
    from graphcomp.coupling.analysis import analyze_captured
    from tests.native.test_model import TINY

    config = transformers.LlamaConfig(**TINY, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(3, 37, (2, 6)), "use_cache": False}
    analysis = analyze_captured(capture(model, inputs))
    kept = some(analysis, "head_dim")
    result = native(analysis, kept)
    assert result.module is not None, result.reason
    module = result.module if form == "native" else SliceGroups(analysis.coupling, kept)(analysis.captured.module)
    write(tmp_path / "out", module, form=form, kept={}, report={}, edits=result.edits)
    found = read(tmp_path / "out").module
    expected, got = module(**inputs), found(**inputs)
    assert type(got) is type(expected)
    assert torch.equal(got.logits, expected.logits)
    if form == "native":
        assert torch.equal(found.generate(inputs["input_ids"], max_new_tokens=3),
                           module.generate(inputs["input_ids"], max_new_tokens=3))  # fmt: skip


def _layers(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 2)).eval()


def _fails() -> nn.Module:
    raise KeyError("no such config")


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (lambda: _layers(nn.GELU()), "the module '1' must be ReLU, got GELU"),
        (lambda: nn.Sequential(nn.Linear(4, 6)), "the module '1' must be ReLU, got not there"),
        (lambda: nn.ModuleList(_layers(nn.ReLU())), "the model must be Sequential, got ModuleList"),
        (_fails, "KeyError: 'no such config'"),
        (lambda: 5, "must return an nn.Module, got int"),
    ],
)
def test_a_factory_of_another_architecture_is_refused(factory: Any, said: str, tmp_path: Path) -> None:
    gc.compress(_layers(nn.ReLU()), torch.randn(3, 4), sparsity=0.3, progress=False).save(tmp_path / "m")
    with pytest.raises(CheckpointError) as caught:
        gc.load(tmp_path / "m", model_factory=factory)
    assert said in str(caught.value)
    assert gc.load(tmp_path / "m", model_factory=lambda: _layers(nn.ReLU())).form == "native"


def test_a_factory_whose_model_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    gc.compress(_layers(nn.ReLU()), torch.randn(3, 4), sparsity=0.3, progress=False).save(tmp_path / "m")
    with pytest.raises(CheckpointError, match="does not have the tensors"):
        gc.load(
            tmp_path / "m", model_factory=lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
        )
