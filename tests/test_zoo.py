"""The laws on real architectures with seeded random weights; skipped where the collection is absent.

`pytest -m zoo_slice` runs a fixed part, `pytest -m slow tests/test_zoo.py` all of it.
"""

import sys
from pathlib import Path

import pytest
import torch

import graphcomp as gc
from graphcomp.testing import check_law, random_kept

SHARED = Path(__file__).resolve().parents[2] / "shared"
pytest.importorskip("transformers")
if not (SHARED / "zoo.py").exists():
    pytest.skip("no collection of architectures beside the checkout", allow_module_level=True)
sys.path.insert(0, str(SHARED))
zoo = pytest.importorskip("zoo")

CASES = {case.name: case for case in zoo.cases()}
DETECTION = sorted(name for name, case in CASES.items() if case.family == "tv_detection")
EXPORTED = sorted(set(CASES) - set(DETECTION))
SLICE = {
    "tv/resnet18", "tv/mobilenet_v3_small", "tv/shufflenet_v2_x0_5", "tv/regnet_x_400mf", "tv/squeezenet1_1",
    "hf/bert", "hf/llama-gqa4", "hf/gpt2", "hf/t5", "hf/mixtral", "hf/swin", "hf/convnext", "hf/wav2vec2", "hf/mamba",
}  # fmt: skip
DETECTION_SLICE = {"tv/ssdlite320_mobilenet_v3_large"}

pytestmark = pytest.mark.slow


def _parameters(names, part):
    return [pytest.param(n, marks=pytest.mark.zoo_slice) if n in part else n for n in names]


@pytest.mark.parametrize("name", _parameters(EXPORTED, SLICE))
def test_sliced_is_masked(name):
    model, args, kwargs = CASES[name].build()
    result = check_law(model, args, kwargs)
    assert result.moved > 1e-3, "nothing changed: the check is vacuous"
    assert result.analysis.captured.producer == "export"
    assert not result.analysis.unknown_ops
    explained = {f.name for f in result.analysis.frozen}
    inside = {m.name for group in result.groups for m in group.members}
    named = dict(model.named_parameters())
    read = {n.target for n in result.analysis.captured.module.graph.find_nodes(op="get_attr")}
    lost = [n for n, p in named.items() if n in read and p.numel() > 1 and n not in explained | inside]
    assert not lost, "parameters neither in a group nor frozen with a reason"


@pytest.mark.parametrize("name", _parameters(EXPORTED, SLICE & {"tv/resnet18", "hf/bert", "hf/llama-gqa4", "hf/t5"}))
def test_the_result_has_the_models_own_class(name):
    model, args, kwargs = CASES[name].build()
    plan = gc.analyze(model, args, kwargs)
    kept = random_kept(gc.prunable_groups(plan), torch.Generator().manual_seed(0), (0.4, 0.9))
    small = gc.slice_groups(plan, kept)
    assert small.form == "native", small.reason
    assert type(small.module) is type(model)


@pytest.mark.parametrize("name", _parameters(DETECTION, DETECTION_SLICE))
def test_detection_models_are_recorded_and_cut(name):
    model, args, kwargs = CASES[name].build()
    plan = gc.analyze(model, args, kwargs)
    assert plan.captured.producer == "record"
    small = gc.slice_groups(plan, random_kept(plan.groups, torch.Generator().manual_seed(0)))
    assert small.form == "native" and type(small.module) is type(model)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert after < 0.8 * before


QUANTIZED = {"tv/mobilenet_v3_small", "tv/shufflenet_v2_x0_5", "hf/bert", "hf/llama-gqa4", "hf/t5", "hf/swin"}


@pytest.mark.parametrize("name", _parameters(EXPORTED, QUANTIZED))
def test_integers_are_fake_quant(name):
    model, args, kwargs = CASES[name].build()
    small = gc.compress(model, args, kwargs, bits=8, saliency="random", progress=False)
    assert small.report.verified["integers == fake-quant, in steps"] <= 1.001  # and weights bit for bit, or it raises
    assert any(layer.weight_bits == 8 for layer in small.report.layers)
