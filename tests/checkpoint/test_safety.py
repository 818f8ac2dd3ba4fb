"""A folder is data: what stands in a document runs no code, imports no module and writes no file."""

from __future__ import annotations

import json
import shutil
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import graphcomp as gc
from graphcomp.checkpoint.document import DEPTH, written
from graphcomp.checkpoint.folder import read, write
from graphcomp.errors import CheckpointError, GraphcompError, PlanError
from graphcomp.ir import spec_json
from graphcomp.ir.trust import EVERYTHING, HIGHER_ORDER, Trust, computes
from graphcomp.torch_compat import pytree
from tests.targets import models
from tests.targets.models import INPUTS, analysed

PROOF = "proof_of_execution"
CODE = f"open({PROOF!r}, 'w').close()"

Document = dict[str, Any]


@pytest.fixture(scope="module")
def saved_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "out"
    write(folder, analysed(models.Mlp(), *INPUTS["Mlp"]).captured.module, form="graph", kept={}, report={})
    return folder


@pytest.fixture
def graph(saved_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the graph of an Mlp, in the working folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(saved_graph, tmp_path / "out")


@pytest.fixture
def native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "out", models.Mlp(), form="native", kept={}, report={})
    return tmp_path / "out"


def edit(folder: Path, change: Callable[[Document], Any], *, bare: bool = False) -> None:
    """Change the document, and give it a checksum that fits, or none, nor anything to compare with."""
    path = folder / "graphcomp.json"
    document = json.loads(path.read_text())
    change(document)
    if bare:
        document = {k: v for k, v in document.items() if k not in ("tensors", "document_sha256")}
        document["graph"] = document["graph"] and {**document["graph"], "results": None}
    path.write_text(json.dumps(document) if bare else written(document))


def first(document: Document, op: str) -> Document:
    return next(node for node in document["graph"]["nodes"] if node["op"] == op)


def refused(folder: Path, match: str = "", **options: Any) -> None:
    with pytest.raises(CheckpointError, match=match or None) as caught:
        gc.load(folder, **options)
    assert caught.value.fix or caught.value.why
    assert not Path(PROOF).exists(), "code of the document was run"


# ------------------------------------------------------------------------------------------------ generated code
def rename_input(document: Document, name: str) -> None:
    first(document, "placeholder")["name"] = name


def target_of_input(document: Document, name: str) -> None:
    first(document, "placeholder")["target"] = name


def rename_op(document: Document, name: str) -> None:
    first(document, "call_function")["name"] = name


def keyword_of_op(document: Document, name: str) -> None:
    first(document, "call_function")["kwargs"] = {name: 1}


def argument(document: Document, name: str) -> None:
    document["graph"]["arguments"] = [name]


def keyword_of_inputs(document: Document, name: str) -> None:
    positional, keywords = document["graph"]["inputs"][1]["children_spec"]
    keywords |= {"context": json.dumps([name]), "children_spec": positional["children_spec"]}
    positional["children_spec"] = []


def read_attribute(document: Document, name: str) -> None:
    first(document, "get_attr")["target"] = name


PLACES = (rename_input, target_of_input, rename_op, keyword_of_op, argument, keyword_of_inputs, read_attribute)
ATTACKS = (
    f"x={CODE}", f"x=[{CODE}]#", f"x\n    {CODE}", f"x: {CODE}", f"x'+{CODE}+'", f'x"); {CODE}; ("', f"{CODE}, x",
    f"*x, y={CODE}", f"x\r{CODE}", f"x\\\n{CODE}", f'x\\"); {CODE}#', "class", "", "x y", "\ud800", "ﬁ", "x\x00",
)  # fmt: skip


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_no_text_becomes_code(graph: Path, place: Callable[[Document, str], None], bare: bool) -> None:
    before = (graph / "graphcomp.json").read_text()
    tensors = safetensors.torch.load_file(graph / "model.safetensors")
    for attack in ATTACKS:
        (graph / "graphcomp.json").write_text(before)
        edit(graph, lambda document, attack=attack: place(document, attack), bare=bare)
        if place is read_attribute and attack.isprintable() and "\\" not in attack:  # a tensor that has the name
            rename_tensor(graph, tensors, attack)
        try:
            found = gc.load(graph).module
        except CheckpointError:
            assert not Path(PROOF).exists(), attack
            continue
        assert place is target_of_input or attack == "x y", (attack, found.code)
        found(*INPUTS["Mlp"])
        assert not Path(PROOF).exists(), attack


def rename_tensor(folder: Path, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Give a tensor of the folder another name, in both files."""
    import hashlib

    (old, tensor), *others = tensors.items()
    safetensors.torch.save_file({name: tensor, **dict(others)}, folder / "model.safetensors")

    def change(document: Document) -> None:
        content = (folder / "model.safetensors").read_bytes()
        document["tensors_sha256"] = hashlib.sha256(content).hexdigest()
        document["tensors"][name] = document["tensors"].pop(old)
        document["parameters"] = [name if n == old else n for n in document["parameters"]]
        for node in document["graph"]["nodes"]:
            node["target"] = name if node["target"] == old else node["target"]

    if "tensors" in json.loads((folder / "graphcomp.json").read_text()):
        edit(folder, change)


def test_text_in_arguments_stays_text(tmp_path: Path) -> None:
    class Rounded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.div(x, 2, rounding_mode="floor")

    x = torch.randn(2, 3)
    write(tmp_path / "out", analysed(Rounded(), x).captured.module, form="graph", kept={}, report={})
    assert torch.equal(read(tmp_path / "out").module(x), Rounded()(x))
    edit(tmp_path / "out", lambda d: first(d, "call_function")["kwargs"].update(rounding_mode=f"' + {CODE} + '"))
    refused(tmp_path / "out", "does not run")


class Odd(nn.Module):
    """Names that no identifier can have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a-b c": nn.Linear(3, 3), "größe": nn.Linear(3, 3), "1x1/bn": nn.Linear(3, 3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def test_odd_names_of_modules_are_no_obstacle(tmp_path: Path) -> None:
    model, x = Odd(), torch.randn(2, 3)
    write(tmp_path / "out", analysed(model, x).captured.module, form="graph", kept={}, report={})
    assert torch.allclose(read(tmp_path / "out").module(x), model(x))


# ------------------------------------------------------------------------------------------------ modules
@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that leaves a proof when it is imported."""
    package = tmp_path / "stranger_package"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"from torch import nn\n{CODE}\nclass Net(nn.Linear): pass\nclass Config: pass\nimport enum\n"
        "class Keys(enum.Enum):\n    A = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package.name
    sys.modules.pop(package.name, None)


def test_no_module_is_imported_unasked(native: Path, stranger: str) -> None:
    def change(document: Document) -> None:
        document["recipe"] |= {"class": f"{stranger}:Net", "arguments": {"in_features": 6, "out_features": 3}}

    edit(native, change)
    refused(native, rf"(?s)cannot be imported.*trust=\['{stranger}'\]")
    with pytest.raises(CheckpointError, match="does not have the tensors"):
        gc.load(native, trust=stranger)
    assert Path(PROOF).exists()


@pytest.mark.parametrize(
    "recipe",
    [
        {"kind": "tree", "class": "{}:Net", "parameters": {}, "buffers": {}, "modules": {}},
        {"kind": "class", "class": "torch.nn.modules.container:Sequential", "children": {
            "0": {"kind": "class", "class": "{}:Net", "arguments": {}}}},
        {"kind": "transformers", "class": "{}:Net", "config_class": "{}:Config", "config": "{}"},
        {"kind": "class", "class": "{}.Net", "arguments": {}},
        {"kind": "class", "class": "..{}:Net", "arguments": {}},
        {"kind": "class", "class": "torch.nn:os.system", "arguments": {}},
        {"kind": "class", "class": "subprocess:Popen", "arguments": {"args": "true"}},
        {"kind": "class", "class": "torch.nn.modules.linear:Linear.__init__", "arguments": {}},
    ],
)  # fmt: skip
def test_only_classes_of_modules_are_built(native: Path, stranger: str, recipe: Document) -> None:
    if recipe["kind"] == "transformers":
        models.import_transformers()
    text = json.dumps({**recipe, "device": "cpu"}).replace('"{}', f'"{stranger}')
    edit(native, lambda document: document.update(recipe=json.loads(text)))
    refused(native)


def test_a_config_names_no_code(native: Path) -> None:
    transformers = models.import_transformers()
    kinds = {"class": "transformers.models.bert.modeling_bert:BertModel",
             "config_class": "transformers.models.bert.configuration_bert:BertConfig"}  # fmt: skip
    for own in ({"attention": "owner/kernel"}, {"config": '{"_attn_implementation": "owner/kernel@v1"}'},
                {"config": '{"sub": [{"attn_implementation": {"": "owner/kernel"}}]}'}, {"config": "[1]"},
                {"config": 5}, {"config_class": "torch.nn.modules.linear:Linear"}):  # fmt: skip
        recipe = {"kind": "transformers", **kinds, "config": "{}", "device": "meta", **own}
        edit(native, lambda document, recipe=recipe: document.update(recipe=recipe))
        refused(native)
    assert transformers.__name__ == "transformers"


def test_builders_load_nothing(native: Path) -> None:
    from tests.vision import import_torchvision

    import_torchvision()
    for own in ({"weights": "DEFAULT"}, {"weights_backbone": "DEFAULT"}, {"pretrained": True}, {"progress": True}):
        recipe = {"kind": "torchvision", "builder": "resnet18", "arguments": own, "device": "meta"}
        edit(native, lambda document, recipe=recipe: document.update(recipe=recipe))
        refused(native, "would load something")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forward", 5), ("_parameters", {"tuple": []}), ("training", 5), ("__class__", 5), ("up", 5), ("state_dict", 5),
        ("width", {"function": "os:system"}), ("width", {"function": "torch.serialization:load"}),
        ("width", {"function": "torch:save"}), ("width", {"function": "torch:from_file"}),
        ("width", {"class": "subprocess:Popen"}), ("width", {"module": "up.nothing"}), ("width", {"tensor": "nothing"}),
        ("width", {"partial": [{"function": "builtins:exec"}, {"tuple": ["1"]}, {"dict": []}]}), ("width", {"set": 5}),
    ],
)  # fmt: skip
def test_attributes_are_data(native: Path, name: str, value: Any) -> None:
    edit(native, lambda document: document["attributes"].append(["", name, value]))
    refused(native)


# ------------------------------------------------------------------------------------------------ ops
def call(target: str, args: list[Any], kwargs: Document | None = None) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        node = {"name": "f", "op": "call_function", "target": target, "args": args, "kwargs": kwargs or {}}
        document["graph"]["nodes"][-1:] = [node, document["graph"]["nodes"][-1]]

    return change


@pytest.mark.parametrize(
    ("target", "args"),
    [
        ("aten.from_file.default", [PROOF, True, 64]),
        ("aten.save.default", [{"node": "x"}, PROOF]),
        ("aten._print.default", ["hello"]),
        ("aten.warn.default", ["hello", 2]),
        ("aten.format.default", ["hello"]),
        ("profiler._record_function_enter.default", ["hello", None]),
        ("debugprims.load_tensor.default", [PROOF, [1]]),
        ("c10d.barrier.default", []),
        ("os.system", ["true"]),
        ("load_library", ["lib.so"]),
        ("higher_order.triton_kernel_wrapper_mutation", []),
        ("ops.aten.relu.default", []),
        ("aten.__class__", []),
        ("aten.relu", [{"node": "x"}]),
        ("", []),
        ("operator.attrgetter", ["x"]),
    ],
)
def test_only_ops_that_compute_are_called(graph: Path, target: str, args: list[Any]) -> None:
    edit(graph, call(target, args), bare=True)
    refused(graph)


def test_which_ops_compute_is_a_rule_over_their_schemas() -> None:
    refused_ops, count = set(), 0
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        op, _, overload = rest.partition(".")
        found = getattr(getattr(getattr(torch.ops, namespace), op, None), overload or "default", None)
        if namespace == "aten" and found is not None:
            count += 1
            refused_ops |= {op} - ({op} if computes(found) else set())
    assert count > 2000
    assert {"from_file", "_print", "record_stream", "qscheme"} <= refused_ops
    assert {op for op in refused_ops if "quantized" in op or op.startswith("set")} | {
        "from_file", "_print", "record_stream", "qscheme", "get_gradients", "_linalg_check_errors",
        "_sparse_semi_structured_tile", "_test_string_default", "_test_ambiguous_defaults",
    } == refused_ops  # fmt: skip


@torch.library.custom_op("stranger_ops::halve", mutates_args=())
def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2


@halve.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return halve(self.layer(x))


def test_ops_of_other_libraries_are_trusted_by_name(tmp_path: Path) -> None:
    model, x = Halved(), torch.randn(2, 3)
    needs = write(tmp_path / "out", analysed(model, x).captured.module, form="graph", kept={}, report={})
    assert any("trust=['stranger_ops']" in need for need in needs)
    refused(tmp_path / "out", r"(?s)stranger_ops.halve.*trust=\['stranger_ops'\]")
    assert torch.allclose(gc.load(tmp_path / "out", trust="stranger_ops")(x), model(x))


def test_control_flow_is_allowed_and_kernels_are_not() -> None:
    operators = torch._higher_order_ops
    assert Trust().allows_op(torch.ops.higher_order.cond)
    assert "triton_kernel_wrapper_mutation" not in HIGHER_ORDER
    assert not Trust().allows_op(operators.triton_kernel_wrap.triton_kernel_wrapper_mutation)
    assert Trust("higher_order").allows_op(operators.triton_kernel_wrap.triton_kernel_wrapper_mutation)
    assert not EVERYTHING.allows_op(len)


# ------------------------------------------------------------------------------------------------ containers
class Key(Enum):
    A = 1


@pytest.mark.parametrize(
    "value",
    [{"a": [1, (2, 3)]}, OrderedDict(b=1, a=2), defaultdict(list, {"a": 1}), {Key.A: 1}, {3: 1, "x": 2}, (), {}],
)
def test_containers_of_inputs_and_outputs_come_back(value: Any) -> None:
    spec = pytree.tree_structure(value)
    assert spec_json.load_spec(json.loads(json.dumps(spec_json.dump_spec(spec))), Trust()) == spec


@pytest.mark.parametrize(
    "context",
    [
        {"default_factory_module": "{}", "default_factory_name": "Net", "dict_context": ["a"]},
        {"default_factory_module": "os", "default_factory_name": "getcwd", "dict_context": ["a"]},
        {"default_factory_module": "builtins", "default_factory_name": "exec", "dict_context": ["a"]},
    ],
)
def test_a_default_dict_with_another_factory_comes_back_as_a_dict(
    context: Document, stranger: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    context = json.loads(json.dumps(context).replace("{}", stranger))
    document = spec_json.dump_spec(pytree.tree_structure(defaultdict(list, {"a": 1})))
    found = spec_json.load_spec([1, {**document[1], "context": context}], Trust())
    assert found == pytree.tree_structure({"a": 1})
    assert not Path(PROOF).exists()


@pytest.mark.parametrize("fqn", ["{}:Keys", "os:system", "enum:Enum", "{}", "", None, 5])
def test_enums_are_imported_from_trusted_modules_alone(
    fqn: Any, stranger: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    document = spec_json.dump_spec(pytree.tree_structure({"a": 1}))
    key = {"__enum__": True, "fqn": fqn.replace("{}", stranger) if isinstance(fqn, str) else fqn, "name": "A"}
    for text in (json.dumps([key]), json.dumps([key]).replace("__enum__", "\\u005f_enum__")):
        with pytest.raises(CheckpointError):
            spec_json.load_spec([1, {**document[1], "context": text}], Trust())
    assert not Path(PROOF).exists()


@pytest.mark.parametrize(
    "spec",
    [
        None, 5, [], [1], [2, {}], [1, 5], [1, {"type": None}],
        [1, {"type": None, "context": "x", "children_spec": []}],
        [1, {"type": "builtins.dict", "context": '["a"]', "children_spec": []}],
        [1, {"type": "builtins.tuple", "context": '["a"]', "children_spec": []}],
        [1, {"type": "builtins.list", "context": "null", "children_spec": 5}],
        [1, {"type": "collections.deque", "context": "-1", "children_spec": []}],
        [1, {"type": 5, "context": "null", "children_spec": []}],
    ],
)  # fmt: skip
def test_what_is_no_container_is_refused(spec: Any) -> None:
    with pytest.raises(CheckpointError):
        spec_json.load_spec(spec, Trust())


# ------------------------------------------------------------------------------------------------ the document
def test_every_change_of_the_document_is_seen(graph: Path) -> None:
    path = graph / "graphcomp.json"
    text = path.read_text()
    for old, new in (('"reason": ""', '"reason": " "'), ('"nodes"', '"nodez"'), ("gelu", "relu")):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        refused(graph, "SHA-256" if old != '"nodes"' else "")
    path.write_text(json.dumps(json.loads(text)))  # the same document, written in another way
    assert gc.load(graph).form == "graph"


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "5", "null", "{}", '{"format": true}', '{"format": 0}', '{"format": 1, "format": 1}',
        '{"format": NaN}', '{"format": 1, "x": ' + "[" * 300 + "]" * 300 + "}", "[" * 100_000,
        '{"format": 1' + "0" * 5000 + "}", "\ufeff{}",
    ],
)  # fmt: skip
def test_what_is_no_document_is_refused(graph: Path, text: str) -> None:
    (graph / "graphcomp.json").write_text(text)
    refused(graph)


def test_nesting_has_a_limit(graph: Path) -> None:
    def nest(document: Document) -> None:
        value: Any = 1
        for _ in range(DEPTH):
            value = [value]
        document["report"]["deep"] = value

    edit(graph, nest)
    refused(graph, "nested")


def test_a_document_that_is_no_text_is_refused(graph: Path) -> None:
    (graph / "graphcomp.json").write_bytes(b"\xff\xfe{")
    refused(graph, "damaged")


def test_tensors_of_another_dtype_or_shape_are_refused(graph: Path) -> None:
    before = (graph / "graphcomp.json").read_text()
    for kind in (["float64", [16, 6]], ["float32", [6, 16]]):
        (graph / "graphcomp.json").write_text(before)
        edit(graph, lambda document, kind=kind: document["tensors"].update({"up.weight": kind}))
        refused(graph, "'up.weight' is")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["parameters"].append("nothing"),
        lambda d: d["parameters"].remove("up.weight"),
        lambda d: d["not_trained"].append("nothing"),
        lambda d: d["aliases"].update({"nothing": ["up.weight"]}),
        lambda d: d["aliases"].update({"up.weight": ["up.bias"]}),
        lambda d: d["aliases"].update({"up.weight": ["other"]}),
        lambda d: d["eval"].append("nothing"),
        lambda d: d["kept"].update({"up.weight": {"0": [10**9]}}),
        lambda d: d["kept"].update({"up.weight": {"9": [0]}}),
        lambda d: d["kept"].update({"up.weight": {"x": [0]}}),
        lambda d: d.update(form="pickle"),
        lambda d: d.update(graph_at=""),
        lambda d: d.update(device=5),
        lambda d: d["recipe"].update(kind="eval"),
        lambda d: d["recipe"].update(device="cuda"),
        lambda d: d["attributes"].append(["nothing", "x", 5]),
        lambda d: d["attributes"].append(["", "x", {"tuple": 5}]),
        lambda d: d["attributes"].append(["", "x"]),
        lambda d: d["edits"].append(["", "x", {"eval": "1"}]),
    ],
)
def test_fields_that_do_not_fit_are_refused(native: Path, change: Callable[[Document], Any]) -> None:
    edit(native, lambda document: (document["original_shapes"].update({"up.weight": [16, 6]}), change(document)))
    refused(native)


# ------------------------------------------------------------------------------------------------ arguments of load
@pytest.mark.parametrize("folder", [None, 5, "a\0b", b"bytes", ["list"], "x" * 5000, ""])
def test_what_is_no_folder_is_refused(folder: Any, native: Path) -> None:
    with pytest.raises(GraphcompError):
        gc.load(folder)
    with pytest.raises(GraphcompError):
        write(folder, models.Mlp(), form="native", kept={}, report={})


@pytest.mark.parametrize("factory", [5, "Mlp", models.Mlp()])
def test_a_factory_must_be_a_function(factory: Any, native: Path) -> None:
    with pytest.raises(PlanError, match="model_factory must be"):
        gc.load(native, model_factory=factory)


def test_a_class_is_a_factory(native: Path) -> None:
    assert isinstance(gc.load(native, model_factory=models.Mlp).module, models.Mlp)


@pytest.mark.parametrize("trust", [5, [5], "a b", [None], ["os;system"], models])
def test_trust_must_hold_names(trust: Any, native: Path) -> None:
    with pytest.raises(PlanError, match="trust"):
        gc.load(native, trust=trust)
