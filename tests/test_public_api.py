"""The public names, and who may import whom."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import graphcomp

PACKAGE = Path(graphcomp.__file__).parent

# Lower never imports higher: folders and modules of the package root, from the bottom up.
RANKS = [
    {"errors"},
    {"arguments", "numerics", "system", "torch_compat"},
    {"ir"},
    {"capture"},
    {"coupling", "ops"},
    {"cost"},
    {"pruning", "quantization"},
    {"native"},
    {"training"},
    {"methods"},
    {"report"},
    {"result"},
    {"checkpoint", "targets"},
    {"flows"},
    {"request"},
    {"_moved", "api", "testing"},
    {"hf"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def test_public_names():
    assert len(set(graphcomp.__all__)) == len(graphcomp.__all__)  # ruff keeps their order
    assert {name for name in graphcomp.__all__ if not hasattr(graphcomp, name)} == set()
    asked = {
        "compress",
        "analyze",
        "prepare",
        "finalize",
        "load",
        "slice_groups",
        "rule",
        "op",
        "Budget",
        "QASSO",
        "Method",
        "Run",
        "Schedule",
    }
    assert asked <= set(graphcomp.__all__)


def test_each_public_name_has_one_home_for_readers_and_for_type_checkers():
    tree = ast.parse(Path(graphcomp.__file__).read_text())
    typed = {
        (str(node.module).removeprefix("graphcomp."), alias.name)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = {(module, name) for module, names in graphcomp._HOMES.items() for name in names}
    assert typed == lazy and {name for _, name in lazy} == set(graphcomp.__all__)


def test_submodules_are_attributes_and_unknown_names_are_not():
    assert graphcomp.testing.tiny_models and graphcomp.pruning.saliency.score
    assert set(graphcomp.__all__) <= set(dir(graphcomp))
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        graphcomp.compres  # noqa: B018


def test_importing_loads_torch_and_the_ops_of_lowered_graphs_alone():
    import subprocess
    import sys

    code = """
import sys, torch
before = set(sys.modules)
import graphcomp
heavy = {"sympy", "networkx", "safetensors", "torch.export", "graphcomp.api"} & (set(sys.modules) - before)
assert not heavy, heavy
assert torch.ops.graphcomp.unpack and torch.ops.quantized_decomposed.quantize_per_tensor
assert graphcomp.compress and "graphcomp.api" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_error_is_public():
    errors = importlib.import_module("graphcomp.errors")
    own = {
        name for name, found in vars(errors).items() if isinstance(found, type) and found.__module__ == errors.__name__
    }
    assert own <= set(graphcomp.__all__)


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported(path: Path) -> set[str]:
    """Parts of the package that a file imports when it is imported itself."""
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and getattr(test.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    names = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("graphcomp.")
            and node not in typing_only
        ):
            names.add(node.module.split(".")[1])
    return names


def test_lower_never_imports_higher():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = _part(path)
        assert own in RANK, f"{own} has no rank"
        wrong += [f"{path.name} imports {name}" for name in _imported(path) if RANK[name] > RANK[own]]
    # a result knows how to write itself: the one place that reaches up, from inside a method
    assert set(wrong) <= {"result.py imports checkpoint", "result.py imports targets"}


def test_contributing_lists_every_part_from_the_bottom_up():
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`[^|]+) \|", page, flags=re.MULTILINE)
    parts = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(parts) == sorted(RANK.keys() - {"_moved", "__init__", "__main__"})
    assert [RANK[name] for name in parts] == sorted(RANK[name] for name in parts)


def test_pages_name_files_that_are_there():
    root = PACKAGE.parent
    for page in (root / "CONTRIBUTING.md", root / "README.md", *sorted((root / "docs").glob("*.md"))):
        named = re.findall(r"\b(?:graphcomp|tests|benchmarks)/[\w/]+(?:\.py|/)", page.read_text(encoding="utf-8"))
        assert [name for name in named if not (root / name).exists()] == [], page.name


def test_importing_has_no_side_effects():
    """Importing sets up no logging handler and prints nothing."""
    import subprocess
    import sys

    code = "import logging, graphcomp; print(len(logging.getLogger('graphcomp').handlers), end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0"


def test_no_module_of_the_package_asks_the_package_for_names():
    """`from graphcomp import name` loads graphcomp.api, which may be what is being imported."""
    asked = [
        path.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "graphcomp"
    ]
    assert asked == []
