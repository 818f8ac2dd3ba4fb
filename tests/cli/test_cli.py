"""The command line, as a user runs it."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import graphcomp
from graphcomp.cli.app import run
from graphcomp.cli.output import Output
from graphcomp.cli.plan import Plan

NET = ["tests.cli.models:net", "--shape", "2,3,8,8"]
LAYOUT = {
    "model", "model.onnx", "report.json", "report.html", "plan.json", "inputs.safetensors", "manifest.json"
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "out"
    assert run(["compress", *NET, "--sparsity", "0.5", "--bits", "8", "--export", "onnx", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    data: dict[str, Any] = json.loads(lines[0])
    return data


def test_compress_leaves_a_folder_of_fixed_layout(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == LAYOUT
    assert [path.name for path in made.parent.iterdir()] == ["out"]
    output = Output(made)
    assert output.damaged() == []
    manifest = output.manifest
    assert manifest["class"] == "Sequential" and manifest["checks"] == {"reloaded == result": 0.0}
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["inputs"] == ["2,3,8,8:float32"]
    (args, kwargs), small = output.inputs(), graphcomp.load(made / "model")
    assert small(*args, **kwargs).shape == (2, 10)
    assert output.report.units_removed == 10 and output.report.layers[0].weight_bits == 8
    plan = Plan.read(made / "plan.json")
    assert plan.options == {"sparsity": 0.5, "bits": 8} and [group["units"] for group in plan.groups] == [8, 12]
    assert "Sequential, compressed" in (made / "report.html").read_text(encoding="utf-8")


def test_the_same_call_gives_the_same_files(made: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert run(["compress", *NET, "--sparsity", "0.5", "--bits", "8", "--out", str(again)]) == 0
    first, second = Output(made).manifest["files"], Output(again).manifest["files"]
    assert first["model/model.safetensors"] == second["model/model.safetensors"]


def test_verify_finds_what_was_changed(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(out), "--json"]) == 0
    found = printed(capsys)
    assert found["failed"] == [] and len([text for text in found["held"] if text.startswith("model.onnx on")]) == 5
    (out / "report.html").write_text("other")
    (out / "more.txt").write_text("other")
    assert run(["verify", str(out), "--json"]) == 4
    assert printed(capsys)["failed"] == [
        "files: report.html was changed", "files: more.txt is not in the manifest"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["report.json", "inputs.safetensors", "model/graphcomp.json", "model/model.safetensors"]
)
def test_verify_names_a_file_that_cannot_be_read(name: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for damage in (lambda: (out / name).write_bytes(b"none"), (out / name).unlink):
        damage()
        assert run(["verify", str(out), "--json"]) == 4
        failed = printed(capsys)["failed"]
        assert failed[0].startswith(f"files: {name} ") and len(failed) >= 2


@pytest.mark.slow
@pytest.mark.ci
def test_verify_finds_an_exported_file_of_another_model(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    other = graphcomp.compress(linear, torch.randn(2, 3, 8, 8), sparsity=0, bits=8)
    other.export(out / "model.onnx", measure=False)
    manifest = Output(out).manifest
    Output(out).sign({name: value for name, value in manifest.items() if name != "files"})
    assert run(["verify", str(out)]) == 4
    text = capsys.readouterr().out
    assert "FAILED  model.onnx on the example inputs" in text and "FAILED  files" not in text


def test_a_dry_run_writes_a_plan_that_can_be_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compress", *NET, "--sparsity", "0.5", "--dry-run", "--out", str(tmp_path)]) == 0
    assert "nothing is compressed" in capsys.readouterr().out
    path = tmp_path / "plan.json"
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    data = json.loads(path.read_text())
    assert sum(group["units"] - group["keep"] for group in data["groups"]) == 10
    data["groups"][0]["keep"], data["groups"][1]["keep"] = 3, 12
    path.write_text(json.dumps(data))
    assert run(["compress", "--plan", str(path), "--out", str(tmp_path / "out"), "--json"]) == 0
    found = printed(capsys)
    assert [group["units"]["kept"] for group in found["report"]["groups"]] == [3, 12]
    assert graphcomp.load(tmp_path / "out" / "model").module[0].out_channels == 3  # type: ignore[index]
    assert not any("the plan keeps" in note for note in found["report"]["notes"])
    kept = json.loads((tmp_path / "out" / "plan.json").read_text())["groups"]
    assert [group["keep"] for group in kept] == [3, 12]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "no plan of format 1"),
        ({"surprise": 1}, "entries of a plan must be"),
        ({"options": {"spasity": 1}}, "no option 'spasity'"),
        ({"options": 3}, "options"),
        ({"export": ["tflite"]}, "no format 'tflite'"),
        ({"inputs": {"shape": ["2,3,8,8"]}}, "entries of inputs"),
        ({"calibration": {"samples": 3}}, "entries of calibration"),
        ({"groups": [{"name": "0"}]}, "each group must have"),
        ({"groups": [{"name": "0", "role": "", "module": "0", "units": 8, "chosen": 8, "keep": 9}]}, "from 1 to 8"),
    ],
)
def test_a_plan_that_is_none(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {**json.loads(Plan("tests.cli.models:net", inputs={"shapes": ["2,3,8,8"]}).to_json()), **change}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert run(["compress", "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["compress"], 2, "no model is given"),
        (["compress", "nothing"], 2, "no model is called 'nothing'"),
        (["compress", "nowhere:net"], 2, "no module 'nowhere'"),
        (["compress", "tests.cli.models:other"], 2, "one of: net, Two, two, frozen, no_model"),
        (["compress", "tests.cli.models:no_model"], 2, "must be a module"),
        (["compress", "tests.cli.models:NUMBER"], 2, "must be a module"),
        (["compress", "torchvision:resnet19"], 2, "torchvision"),
        (["compress", "tests.cli.models:net"], 2, "no example inputs"),
        (["compress", "tests.cli.models:net", "--shape", "2x3"], 2, "a shape must be"),
        (["compress", "tests.cli.models:net", "--shape", "2,3,8,8:float99"], 2, "no dtype"),
        (["compress", "tests.cli.models:net", "--shape", "2,5,8,8"], 2, "InputError"),
        (["compress", *NET, "--bits", "many"], 2, "--bits must be"),
        (["compress", *NET, "--budget", "macs"], 2, "--budget must be"),
        (["compress", *NET, "--budget", "weight=0.5"], 2, "budget"),
        (["compress", *NET, "--export", "tflite"], 2, "no format 'tflite'"),
        (["compress", *NET, "--calibration", "nothing.npz", "--bits", "8"], 2, "there is no nothing.npz"),
        (["compress", *NET, "--samples", "4"], 2, "--samples without --calibration"),
        (["compress", *NET, "--guard"], 2, "--guard without --export onnx"),
        (["compress", *NET, "--bogus"], 2, "No such option"),
        (["compress", "tests.cli.models:frozen", "--shape", "2,4"], 3, "NothingToPrune"),
        (["verify", "nothing"], 5, "holds no output"),
        (["bench", "nothing"], 5, "holds no output"),
        (["report", "nothing"], 5, "holds no output"),
        (["export", "nothing", "a.onnx"], 5, "holds no output"),
    ],
)
def test_exit_codes(
    words: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end = ["--out", str(tmp_path / "out")] if words[0] == "compress" else []
    assert run([*words, *end]) == code
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_errors_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compress", *NET, "--sparsity", "2", "--json", "--out", str(tmp_path / "out")]) == 2
    error = json.loads(capsys.readouterr().err)
    assert (
        error["error"] == "PlanError" and error["exit_code"] == 2 and "outside [0, 1)" in error["what"] and error["fix"]
    )


def test_an_earlier_output_is_replaced_on_request_alone(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Output(out).manifest["files"]
    call = ["compress", *NET, "--sparsity", "0.25", "--out", str(out)]
    assert run(call) == 5 and "--force" in capsys.readouterr().err
    assert Output(out).damaged() == [] and Output(out).manifest["files"] == before
    assert run([*call, "--dry-run"]) == 5 and Output(out).damaged() == []
    assert run([*call, "--force"]) == 0
    assert Output(out).report.units_removed == 5 and not (out / "model.onnx").exists()
    other = out.parent / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    assert run(["compress", *NET, "--out", str(other), "--force"]) == 5
    assert (other / "thesis.txt").read_text() == "precious"


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", *NET]) == 0
    assert "2 groups, 20 units" in capsys.readouterr().out
    assert run(["inspect", *NET, "--json"]) == 0
    found = printed(capsys)
    assert [group["units"] for group in found["groups"]] == [8, 12] and found["unknown_ops"] == []
    assert any("reaches output" in axis["reason"] for axis in found["frozen"])


def test_export_and_bench(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = out.parent / "again.onnx"
    assert run(["export", str(out), str(path), "--json"]) == 0
    assert printed(capsys)["report"]["agreement"]["steps"] <= 1
    assert run(["bench", str(out), "--repeats", "2", "--trust", "tests", "--json"]) == 0
    rows = printed(capsys)["rows"]
    assert list(rows) == ["original, PyTorch", "compressed, PyTorch", "model.onnx, onnxruntime"]
    assert rows["compressed, PyTorch"]["bytes"] < rows["original, PyTorch"]["bytes"] / 3
    assert all(row["median_ms"] > 0 for row in rows.values())


def test_report_with_measures_of_quality(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(out)]) == 0
    assert "10 of 20 removed" in capsys.readouterr().out
    assert run(["report", str(out), "--metric", "accuracy=98.2,97.9"]) == 0
    assert "<b>−0.3</b> accuracy" in (out / "report.html").read_text(encoding="utf-8")
    assert Output(out).damaged() == []
    assert run(["report", str(out), "--metric", "accuracy=98.2"]) == 2


def test_init_prints_a_command_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = ["tests.cli.models:net", "2,3,8,8", "0.5", "n", "n", str(tmp_path / "my out")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(answers) + "\n"))
    assert run(["init"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[0] == "graphcomp" and "--bits" not in words
    assert run(words[1:]) == 0
    assert Output.open(tmp_path / "my out").report.units_removed == 10


def test_named_inputs_and_a_range_of_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["--shape", "ids=5:int64:0..19", "--shape", "x=5,4"]
    call = ["compress", "tests.cli.models:two", *shapes, "--bits", "4,8", "--activation-bits", "none"]
    assert run([*call, "--budget", "bytes=0.5", "--out", str(tmp_path / "out"), "--json"]) == 0
    found = printed(capsys)
    assert found["inputs"] == ["ids=5:int64", "x=5,4:float32"]
    assert all(4 <= layer["weight_bits"] <= 8 for layer in found["report"]["layers"])
    assert run(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.slow
@pytest.mark.ci
def test_as_a_program(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from tests.cli.models import two\n")
    root = str(Path(__file__).parents[2])

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "graphcomp", *words]
        environment = {"PYTHONPATH": root, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    assert call("--version").stdout.startswith("graphcomp ")
    words = ["--shape", "ids=5:int64:0..19", "--shape", "x=5,4", "--out", "out", "--json"]
    done = call("compress", "mine:two", *words)
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["report"]["model"] == "Two"
    refused = call("verify", "out")
    assert refused.returncode == 5 and "--trust PACKAGE" in refused.stderr
    assert call("verify", "out", "--trust", "tests").returncode == 0
    rows = json.loads(call("bench", "out", "--trust", "tests", "--repeats", "1", "--json").stdout)
    assert list(rows["rows"]) == ["compressed, PyTorch"] and "mine:two" in rows["notes"][0]
    assert "--sparsity" in call("compress", "--help").stdout
