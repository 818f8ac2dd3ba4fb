"""An fx graph as JSON and back: ops by name, no code, nothing to import but libraries of ops.

Loading accepts ops registered with torch (`torch.ops.*`) and the functions on lengths listed in FUNCTIONS. Output
containers come back as their own class where that class is registered with torch's pytree (transformers' outputs are,
once transformers is installed), else as a dict or a tuple.
"""

from __future__ import annotations

import importlib
import json
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from graphcomp.errors import CheckpointError
from graphcomp.graph import clone, fetch
from graphcomp.graph_module import FOLLOWS_MODE, CapturedModule, build, calling_convention, is_constant

JSON = Any
OUTPUT_LIBRARIES = ("transformers",)  # packages that register output classes when imported

FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in (
        (operator, "getitem add sub mul truediv floordiv mod neg pow abs eq ne lt le gt ge and_ or_ not_ xor"),
        (math, "floor ceil trunc sqrt pow log exp"),
        (torch, "sym_int sym_float sym_max sym_min sym_not sym_sqrt sym_ite sym_sum"),
    )
    for name in names.split()
}
"""Functions on lengths that may stand in a graph beside ops."""

_NAMES = {id(function): name for name, function in FUNCTIONS.items()}
_KINDS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


# ------------------------------------------------------------------------------------------------ writing
def dump(module: fx.GraphModule) -> JSON:
    """The graph of `module` in eval mode, without its tensors.

    Raises:
        CheckpointError: a target or argument that has no JSON form.
    """
    plain, _ = clone(module)
    plain.eval()
    called = next((node for node in plain.graph.nodes if node.op == "call_module"), None)
    if called is not None:
        raise CheckpointError(
            "a graph with quantizers in it cannot be stored: they are modules",
            at=str(called),
            fix="save ready.state_dict() and load it into what graphcomp.prepare returns for the same model",
        )
    info = getattr(plain.graph._codegen, "pytree_info", None)
    return {
        "name": type(module).__name__ if isinstance(module, CapturedModule) else "GraphModule",
        "nodes": [_dump_node(plain, node) for node in plain.graph.nodes],
        "arguments": None if info is None else list(info.orig_args),
        "inputs": None if info is None else _dump_spec(info.in_spec),
        "outputs": None if info is None or info.out_spec is None else _dump_spec(info.out_spec),
    }


def _dump_node(module: fx.GraphModule, node: fx.Node) -> JSON:
    row: dict[str, Any] = {"name": node.name, "op": node.op, "target": _target_name(node)}
    if node.args:
        row["args"] = [encode(a) for a in node.args]
    if node.op == "placeholder" and is_constant(node):
        row["constant"] = encode(node.meta["val"])
    own = {name: pair for name, pair in node.meta.get(FOLLOWS_MODE, {}).items() if pair != (False, True)}
    if own:  # flags follow the mode wherever nothing else is said: see `build`
        row["follows"] = encode(own)
    if node.kwargs:
        row["kwargs"] = {name: encode(a) for name, a in node.kwargs.items()}
    if node.op == "get_attr" and isinstance(body := fetch(module, str(node.target)), fx.GraphModule):
        row["graph"] = dump(body)
    return row


def _target_name(node: fx.Node) -> str:
    target = node.target
    if node.op != "call_function":
        return str(target)
    if isinstance(target, OpOverload):
        return str(target)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target._name}"
    name = _NAMES.get(id(target))
    if name is None:
        raise CheckpointError(f"node '{node.name}' calls {target}, which a checkpoint cannot hold", at=str(node))
    return name


def _dump_spec(spec: pytree.TreeSpec) -> JSON:
    try:
        return json.loads(pytree.treespec_dumps(spec))
    except (NotImplementedError, TypeError, ValueError):
        # a container pytree cannot name in JSON: its leaves, as a flat tuple
        return json.loads(pytree.treespec_dumps(pytree.tree_structure((0,) * spec.num_leaves)))


def encode(value: Any) -> JSON:
    """An argument of a node as JSON: numbers, strings, lists and None as they are, the rest as {"kind": …}.

    Raises:
        CheckpointError: there is no form for it.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, Mapping):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, type_ in _KINDS.items():
        if isinstance(value, type_):
            return {kind: str(value).removeprefix("torch.")}
    raise CheckpointError(f"a value of type {type(value).__name__} cannot be stored", why=repr(value)[:200])


# ------------------------------------------------------------------------------------------------ reading
def load(document: JSON, tensors: Mapping[str, Any], devices: Mapping[str, torch.device]) -> CapturedModule:
    """A module in eval mode from what `dump` wrote.

    Args:
        tensors: what the get_attr nodes read.
        devices: for each device named in the graph that is to be another now, which.

    Raises:
        CheckpointError: an op that is not registered, or a document that is not a graph.
    """
    graph = fx.Graph()
    held: dict[str, Any] = {}
    nodes: dict[str, fx.Node] = {}
    for row in document["nodes"]:
        args = tuple(decode(a, nodes, devices) for a in row.get("args", ()))
        kwargs = {name: decode(a, nodes, devices) for name, a in row.get("kwargs", {}).items()}
        if row["op"] == "get_attr":
            target = row["target"]
            held[target] = load(row["graph"], tensors, devices) if "graph" in row else _tensor(tensors, target)
        nodes[row["name"]] = graph.create_node(row["op"], _target(row), args, kwargs, row["name"])
        if "constant" in row:
            nodes[row["name"]].meta["val"] = decode(row["constant"], nodes, devices)
        if "follows" in row:
            nodes[row["name"]].meta[FOLLOWS_MODE] = decode(row["follows"], nodes, devices)
    if document["inputs"] is not None:
        specs = _load_spec(document["inputs"]), _load_spec(document["outputs"])
        graph.set_codegen(calling_convention(document["arguments"], *specs))
    graph.lint()
    return build(held, graph, document["name"])


def _tensor(tensors: Mapping[str, Any], name: str) -> Any:
    if name not in tensors:
        raise CheckpointError(f"the graph reads '{name}', and the file of tensors has none of that name")
    return tensors[name]


def _target(row: JSON) -> Any:
    name: str = row["target"]
    if row["op"] in ("placeholder", "get_attr", "output"):
        return name
    if row["op"] != "call_function":
        raise CheckpointError(f"node '{row['name']}' is of kind {row['op']!r}, which a checkpoint cannot hold")
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    library, _, rest = name.partition(".")
    found: Any = getattr(torch.ops, library)
    try:
        for part in rest.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise CheckpointError(
            f"the graph calls the op '{name}', which is not registered",
            why=str(error).splitlines()[0],
            fix=f"import the library that defines '{library}' ops first; a newer torch may have renamed it",
        ) from error
    if not isinstance(found, (OpOverload, HigherOrderOperator)):
        raise CheckpointError(f"'{name}' is not an op")
    return found


def decode(value: JSON, nodes: Mapping[str, fx.Node], devices: Mapping[str, torch.device]) -> Any:
    """What `encode` wrote.

    Raises:
        CheckpointError: a kind nobody writes.
    """
    if isinstance(value, list):
        return [decode(item, nodes, devices) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        return nodes[inner]
    if kind == "device":
        return devices.get(inner, torch.device(inner))
    if kind in _KINDS:
        return getattr(torch, inner)
    if kind == "float":
        return float(inner)
    if kind == "complex":
        return complex(*inner)
    items = [decode(item, nodes, devices) for item in inner]
    if kind == "tuple":
        return tuple(items)
    if kind == "slice":
        return slice(*items)
    if kind == "dict":
        return dict(items)
    raise CheckpointError(f"the checkpoint holds a value of the unknown kind {kind!r}")


def _load_spec(document: JSON) -> pytree.TreeSpec:
    protocol, spec = document
    return pytree.treespec_loads(json.dumps([protocol, _known(spec)]))


def _known(spec: JSON) -> JSON:
    """The spec with containers that this process does not know as dicts and tuples."""
    name, children = spec["type"], [_known(child) for child in spec["children_spec"]]
    if name is None or _registered(name):
        return {**spec, "children_spec": children}
    keys = json.loads(spec["context"]) if isinstance(spec["context"], str) else None
    named = isinstance(keys, list) and len(keys) == len(children) and all(isinstance(k, str) for k in keys)
    plain, context = ("builtins.dict", json.dumps(keys)) if named else ("builtins.tuple", "null")
    return {"type": plain, "context": context, "children_spec": children}


def _registered(name: str) -> bool:
    if name.partition(".")[0] in OUTPUT_LIBRARIES and name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        try:
            importlib.import_module(name.rpartition(".")[0])
        except ImportError:
            return False
    return name in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
