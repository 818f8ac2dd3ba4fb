"""Counts that show the structure of the package, for a table of before and after.

    python -m benchmarks.house                       # of this checkout
    python -m benchmarks.house --root ../other       # of another checkout, beside this one in one table

Everything is read off the source by `ast`; nothing of the package is imported.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from benchmarks import common
from benchmarks.common import CHECKOUT, section, table

PACKAGE = "graphcomp"
CARRIERS = ("GraphModule", "CapturedModule", "fx.Graph", "nn.Module", "Captured", "Program")
"""Types of the fields by which a class carries a graph or a model."""
GRAPHS = ("GraphModule", "CapturedModule", "Program", "P")
"""Types by which a function that takes one first, and returns one or nothing, counts as a pass. P is any Program."""
PRIVATE_MODULE = re.compile(r"torch(\.\w+)*\._\w+(\.\w+)*")
"""A string that is the name of a private module of torch, or of what stands in one."""

aten = torch.ops.aten

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, action="append", default=[], metavar="DIR", help="another checkout")
    options = parser.parse_args()
    print(common.header(), flush=True)
    roots = [*options.root, CHECKOUT]
    columns = [counts(root) for root in roots]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    section("Structure", table(["count", *(root.resolve().name for root in roots)], rows))


# ------------------------------------------------------------------------------------------------ counts
def counts(root: Path) -> dict[str, str]:
    """Name of the count -> the count, of one checkout."""
    paths = sorted((root / PACKAGE).rglob("*.py"))
    trees = {path.relative_to(root / PACKAGE): ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    functions = [(path, f) for path, tree in trees.items() for f in nodes(tree, Function)]
    classes = [(path, c) for path, tree in trees.items() for c in nodes(tree, ast.ClassDef)]
    carriers = sorted({c.name for _, c in classes if carries(c)})
    conventions = Counter(convention for _, f in functions if (convention := convention_of(f)))
    private = {name for tree in trees.values() for name in private_names(tree)}
    attributes = {n for tree in trees.values() for n in private_attributes(tree) if n.startswith("_")}
    private_files = [p for p, tree in trees.items() if set(private_names(tree)) | set(private_attributes(tree))]
    return {
        "modules in the root": str(sum(len(path.parts) == 1 for path in trees)),
        "modules": str(len(trees)),
        "largest module, lines": largest([(str(path), end(tree)) for path, tree in trees.items()]),
        "largest class, lines": largest([(c.name, lines(c)) for _, c in classes]),
        "largest function, lines": largest([(f.name, lines(f)) for _, f in functions]),
        "most parameters": largest([(f.name, parameters(f)) for _, f in functions]),
        "functions of more than 10 parameters": str(sum(parameters(f) > 10 for _, f in functions)),
        "classes that carry a graph or a model": str(len(carriers)),
        "calling conventions of functions from graph to graph": str(len(conventions)),
        "of those that return a graph": str(sum(not found.endswith("-> None") for found in conventions)),
        "functions from graph to graph": str(sum(conventions.values())),
        "private torch names": str(len(private)),
        "private attributes of torch objects": str(len(attributes)),
        "files with private names of torch": str(len(private_files)),
    }


def nodes(tree: ast.AST, kind: Any) -> Iterator[Any]:
    """All nodes of one kind."""
    return (node for node in ast.walk(tree) if isinstance(node, kind))


def lines(node: ast.stmt) -> int:
    """Number of source lines, decorators left out."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def end(tree: ast.Module) -> int:
    """The last line of a module."""
    return max((node.end_lineno or 0 for node in tree.body), default=0)


def largest(found: Sequence[tuple[str, int]]) -> str:
    """The largest number, and its name."""
    name, number = max(found, key=lambda pair: pair[1])
    return f"{number} ({name})"


def parameters(function: Function) -> int:
    """Number of parameters, self left out."""
    own = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return sum(a.arg not in ("self", "cls") for a in own)


def carries(kind: ast.ClassDef) -> bool:
    """Whether a field of the class, or an attribute that __init__ annotates or takes, is a graph or a model."""
    fields = [node.annotation for node in kind.body if isinstance(node, ast.AnnAssign)]
    inits = [f for f in kind.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
    taken = [a.annotation for f in inits for a in (*f.args.args, *f.args.kwonlyargs) if a.annotation]
    return any(ast.unparse(a).removeprefix("fx.").split(" | ")[0] in CARRIERS for a in (*fields, *taken))


def convention_of(function: Function) -> str:
    """How a function from graph to graph (or to nothing, in place) is called; "" for any other function."""
    own = [a for a in (*function.args.posonlyargs, *function.args.args) if a.arg not in ("self", "cls")]
    if not own or own[0].annotation is None or function.returns is None:
        return ""
    first, result = (ast.unparse(a).removeprefix("fx.") for a in (own[0].annotation, function.returns))
    if first not in GRAPHS or result not in (*GRAPHS, "None"):
        return ""
    others = [ast.unparse(a.annotation) for a in (*own[1:], *function.args.kwonlyargs) if a.annotation]
    return f"{first}, {', '.join(others)} -> {result}"


def private_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names below torch with a part that begins with an underscore; dunder names and ops left out.

    Names are followed through imports: after `from torch import fx`, `fx.graph._format_target` is such a name.
    """
    home = {"torch": "torch"}
    for node in nodes(tree, ast.Import):
        home.update((a.asname, a.name) for a in node.names if a.asname and a.name.split(".")[0] == "torch")
        yield from (a.name for a in node.names if a.name.split(".")[0] == "torch" and is_private(a.name))
    for node in nodes(tree, ast.ImportFrom):
        if node.module and node.module.split(".")[0] == "torch":
            home.update((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)
            yield from (n for a in node.names if is_private(n := f"{node.module}.{a.name}"))
    inner = {id(node.value) for node in nodes(tree, ast.Attribute)}
    for node in nodes(tree, ast.Attribute):
        name = dotted(node, home) if id(node) not in inner else ""
        if is_private(name) and not name.startswith("torch.ops."):
            yield name


def private_attributes(tree: ast.AST) -> Iterator[str]:
    """Private attributes of objects of torch, written as `x._name` or as the string "_name"; those of self left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in torch_attributes() and not _is_own(node.value):
            yield node.attr
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if text in torch_attributes() or PRIVATE_MODULE.fullmatch(text):
            yield text


def _is_own(value: ast.expr) -> bool:
    """Whether an expression is self, cls, super() or the namespace of ATen ops."""
    called = value.func if isinstance(value, ast.Call) else value
    return isinstance(called, ast.Name) and called.id in ("self", "cls", "super", "aten")


@functools.cache
def torch_attributes() -> frozenset[str]:
    """Private attributes of the objects of torch that the package handles; dunder names left out."""
    linear = fx.symbolic_trace(nn.Linear(1, 1))
    objects = (
        *(linear, linear.graph, linear.graph._codegen, next(iter(linear.graph.nodes)), nn.GRU(1, 1), nn.BatchNorm1d(1)),
        *(linear.weight, torch.UntypedStorage(1), torch.Generator()),
        *(aten.add.Tensor, aten.add, aten.add.Tensor._schema, torch.ops.higher_order.cond),
    )
    names = {n for found in objects for n in dir(found) if n.startswith("_") and not n.startswith("__")}
    return frozenset({*names, "_orig_mod"})  # of torch.compile, which takes seconds to load


def dotted(node: ast.expr, home: Mapping[str, str]) -> str:
    """The dotted name of an attribute of a module or class in `home`; "" for any other expression."""
    if isinstance(node, ast.Name):
        return home.get(node.id, "")
    owner = dotted(node.value, home) if isinstance(node, ast.Attribute) else ""
    return f"{owner}.{node.attr}" if owner else ""


def is_private(name: str) -> bool:
    """Whether a part of a dotted name is private."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


if __name__ == "__main__":
    main()
