"""An fx graph as JSON and back: ops by name, no code, nothing to import but libraries of ops.

Loading accepts the ops that `trust.Trust` allows and the functions on lengths listed in FUNCTIONS. Output containers
come back as their own class where that class is registered with torch's pytree (transformers' outputs are, once
transformers is installed), else as a dict or a tuple.

torch.fx writes Python from a graph and runs the Python. So all text of a document that could reach that Python is
checked: names of nodes, inputs and keywords must be identifiers, paths of attributes must be text without quotes.
Where shapes of inputs were stored, the loaded graph is run on fake tensors, so that what does not fit is found at once.
"""

from __future__ import annotations

import inspect
import keyword
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.errors import CheckpointError
from graphcomp.ir.calling import CONSTANTS, REQUIRED, calling_convention, is_constant
from graphcomp.ir.graph import clone, example_size, fetch
from graphcomp.ir.json_values import JSON, damaged, decode, encode
from graphcomp.ir.module import FOLLOWS_MODE, CapturedModule, build
from graphcomp.ir.shapes import run_fake
from graphcomp.ir.spec_json import dump_spec, load_spec
from graphcomp.ir.trust import EVERYTHING, Trust
from graphcomp.system.threads import unlogged
from graphcomp.torch_compat import (
    FAKE_TENSOR_LOGGER,
    FakeTensorMode,
    HigherOrderOperator,
    OpOverload,
    codegen_of,
    pytree,
    schema_of,
    takes_numbers_as_tensors,
)

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
_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

EXAMPLE = "graphcomp_example"
"""In node.meta of a placeholder of a loaded graph: what stood in the document of the input's shape."""

_SETTINGS = (torch.dtype, torch.layout, torch.memory_format)
_VALUES: dict[str, tuple[type, ...]] = {
    "Tensor": (),
    "number": (int, float, complex),
    "int": (int, *_SETTINGS),
    "float": (int, float),
    "complex": (int, float, complex),
    "bool": (bool,),
    "str": (str,),
    "Device": (torch.device,),
}
"""Type in a schema -> what may stand there besides nodes; dtypes and the like are numbers in a schema."""

TAKEN = frozenset({"self", "torch", "inf", "nan", "NoneType", "fx_pytree", "pytree", "getattr"}) | frozenset(
    name.replace(".", "_") for name in FUNCTIONS
)
"""Names that generated code uses for something else than an argument."""


# ------------------------------------------------------------------------------------------------ writing
def dump(module: fx.GraphModule, *, run: bool = True) -> JSON:
    """The graph of `module` in eval mode, without its tensors.

    Args:
        run: whether to note what the graph gives, so that `load` can compare.

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
    info = getattr(codegen_of(plain.graph), "pytree_info", None)
    examples = [_example(node) for node in plain.graph.find_nodes(op="placeholder")]
    return {
        "name": type(module).__name__ if isinstance(module, CapturedModule) else "GraphModule",
        "nodes": [_dump_node(plain, node) for node in plain.graph.nodes],
        "arguments": None if info is None else list(info.orig_args),
        "parameters": _parameters(plain.graph),
        "inputs": None if info is None else dump_spec(info.in_spec),
        "outputs": None if info is None or info.out_spec is None else dump_spec(info.out_spec),
        "examples": examples,
        "results": _results(plain, examples) if run and info is not None else None,
    }


def _parameters(graph: fx.Graph) -> JSON:
    """[name] or [name, default] of each parameter of the model's forward."""
    found = getattr(codegen_of(graph), "parameters", {})
    return [[name] if default is REQUIRED else [name, encode(default)] for name, default in found.items()]


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
        row["graph"] = dump(body, run=False)
    return row


def _target_name(node: fx.Node) -> str:
    target = node.target
    if node.op != "call_function":
        return str(target)
    if isinstance(target, OpOverload):
        return str(target)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target}"
    name = _NAMES.get(id(target))
    if name is None:
        raise CheckpointError(f"node '{node.name}' calls {target}, which a checkpoint cannot hold", at=str(node))
    return name


def _example(node: fx.Node) -> JSON:
    """An input of the example's size: [dtype, shape, device], a number, or None where it is not known."""
    if EXAMPLE in node.meta:
        return node.meta[EXAMPLE]
    found = node.meta.get("val")
    if isinstance(found, Tensor):
        return [str(found.dtype).removeprefix("torch."), [example_size(n) for n in found.shape], str(found.device)]
    if isinstance(found, torch.SymInt):
        return example_size(found)
    return None if found is None else encode(found)


def _results(module: fx.GraphModule, examples: Sequence[JSON]) -> JSON:
    """dtype and shape of each output for inputs like `examples`; None where the graph cannot be run without data."""
    try:
        with unlogged(FAKE_TENSOR_LOGGER):
            return _run(module, examples, {})
    except Exception:  # an op may need data, or know nothing of fake tensors; what it raises is its own affair
        return None


def _run(module: fx.GraphModule, examples: Sequence[JSON], devices: Mapping[str, torch.device]) -> list[JSON]:
    mode = FakeTensorMode()
    with mode:
        inputs = [_input(example, devices) for example in examples]
    (output,) = module.graph.find_nodes(op="output")
    found = run_fake(module, mode, inputs)
    leaves = pytree.tree_leaves(fx.map_arg(output.args[0], lambda node: found[node]))
    return [[str(t.dtype).removeprefix("torch."), list(t.shape)] if isinstance(t, Tensor) else None for t in leaves]


def _input(example: JSON, devices: Mapping[str, torch.device]) -> Any:
    if not isinstance(example, list):
        return decode(example, {}, devices)
    dtype, shape, device = example
    return torch.empty(shape, dtype=decode({"dtype": dtype}, {}, {}), device=decode({"device": device}, {}, devices))


# ------------------------------------------------------------------------------------------------ reading
def load(
    document: JSON, tensors: Mapping[str, Any], devices: Mapping[str, torch.device], trust: Trust = EVERYTHING
) -> CapturedModule:
    """A module in eval mode from what `dump` wrote.

    Args:
        tensors: what the get_attr nodes read.
        devices: for each device named in the graph that is to be another now, which.
        trust: which ops the graph may call.

    Raises:
        CheckpointError: an op that is not registered or not allowed, or a document that is not a graph.
    """
    if not isinstance(document, dict) or not {"name", "nodes", "arguments", "inputs", "outputs"} <= set(document):
        raise damaged("there is no graph", f"{document!r:.100}")
    if not isinstance(document["nodes"], list):
        raise damaged(f"the nodes of the graph are {document['nodes']!r:.100}")
    reading = _Reading(tensors, devices, trust)
    for row in document["nodes"]:
        reading.add(row)
    graph = reading.finished()
    name = document.get("name")
    if not isinstance(name, str) or not name.isprintable():
        raise damaged(f"the graph is called {name!r:.100}")
    if document.get("inputs") is not None:
        _set_calling_convention(graph, document, trust)
    try:
        graph.lint()
        module = build(reading.held, graph, name)
    except Exception as error:  # torch.fx raises any of several kinds for a name it cannot use
        raise damaged("the graph cannot be built", f"{type(error).__name__}: {str(error)[:200]}") from error
    if document.get("results") is not None:
        _check_results(module, document, devices)
    return module


class _Reading:
    """A graph that is being read, row by row."""

    def __init__(self, tensors: Mapping[str, Any], devices: Mapping[str, torch.device], trust: Trust) -> None:
        self.tensors, self.devices, self.trust = tensors, devices, trust
        self.graph = fx.Graph()
        self.held: dict[str, Any] = {}
        self.nodes: dict[str, fx.Node] = {}
        self.ended = False

    def add(self, row: JSON) -> None:
        """Append the node of one row."""
        name, op = self._checked(row)
        args = tuple(self._decoded(a) for a in row.get("args", ()))
        kwargs = {key: self._decoded(a) for key, a in row.get("kwargs", {}).items()}
        target = self._target(row, args, kwargs)
        node = self.nodes[name] = self.graph.create_node(op, target, args, kwargs, name)
        if op == "placeholder":
            node.target = node.name  # as good as any: how the graph is called is said by its specs
        if "constant" in row:
            node.meta["val"] = decode(row["constant"], {}, self.devices)
            if op != "placeholder" or not is_constant(node):
                raise damaged(f"the node '{name}' is the constant {row['constant']!r:.100}")
        if "follows" in row:
            node.meta[FOLLOWS_MODE] = self._follows(row["follows"], node)

    def finished(self) -> fx.Graph:
        """The graph of all rows."""
        if not self.ended:
            raise damaged("the graph has no output")
        return self.graph

    def _decoded(self, value: JSON) -> Any:
        return decode(value, self.nodes, self.devices)

    def _checked(self, row: JSON) -> tuple[str, str]:
        """Name and kind of the node, where the row has the form of one."""
        if not isinstance(row, dict) or not {"name", "op", "target"} <= set(row):
            raise damaged(f"a node is {row!r:.100}")
        name, op = row["name"], row["op"]
        if not isinstance(name, str) or not _NODE_NAME.fullmatch(name) or keyword.iskeyword(name):
            raise damaged(f"a node is called {name!r:.100}", "the name must be an identifier of Python")
        if name in self.nodes:
            raise damaged(f"two nodes are called {name!r:.100}")
        if self.ended:
            raise damaged(f"the node '{name}' stands behind the output")
        if op not in ("placeholder", "get_attr", "output", "call_function"):
            raise CheckpointError(f"node '{name}' is of kind {op!r:.100}, which a checkpoint cannot hold")
        if not isinstance(row["target"], str):
            raise damaged(f"the node '{name}' has the target {row['target']!r:.100}")
        if not isinstance(row.get("args", []), list) or not isinstance(row.get("kwargs", {}), dict):
            raise damaged(f"the node '{name}' has no arguments that a node can have")
        self.ended = op == "output"
        return name, op

    def _target(self, row: JSON, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        name, op, target = row["name"], row["op"], row["target"]
        if op == "call_function":
            found = _function(target, self.trust)
            _check_call(found, args, kwargs, f"the node '{name}' calls {target}")
            return found
        if kwargs or len(args) != (1 if op == "output" else 0):
            raise damaged(f"the node '{name}' of kind {op} has {len(args)} arguments and {len(kwargs)} keywords")
        if op == "get_attr":
            self.held[target] = self._attribute(row)
        return target

    def _attribute(self, row: JSON) -> Any:
        target = row["target"]
        if not all(map(_is_attribute, target.split("."))):
            raise damaged(f"the graph reads {target!r:.100}", "the path of an attribute must be plain names")
        if "graph" in row:
            return load(row["graph"], self.tensors, self.devices, self.trust)
        if target not in self.tensors:
            raise CheckpointError(f"the graph reads '{target}', and the file of tensors has none of that name")
        return self.tensors[target]

    def _follows(self, document: JSON, node: fx.Node) -> dict[str, Any]:
        """What arguments of the op are in eval and in training mode."""
        found = decode(document, {}, self.devices)
        names = [a.name for a in schema_of(node.target).arguments] if isinstance(node.target, OpOverload) else []
        wrong = not isinstance(found, dict) or any(
            name not in names or not isinstance(pair, tuple) or list(map(type, pair)) != [type(pair[0])] * 2
            or not isinstance(pair[0], (bool, int, float))
            for name, pair in found.items()
        )  # fmt: skip
        if wrong:
            raise damaged(f"the node '{node.name}' follows the mode by {document!r:.100}")
        return dict(found)


def _is_attribute(part: str) -> bool:
    """Whether a part of a path may stand in generated code: an identifier as it is, anything else between quotes."""
    if part.isidentifier() and not keyword.iskeyword(part):
        return _is_argument(part) and not part.startswith("__")
    return bool(part) and part.isprintable() and not set(part) & {'"', "\\"}


def _is_argument(name: Any) -> bool:
    """Whether generated code can hold a name as it stands: Python reads identifiers in their NFKC form."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        return False
    return unicodedata.normalize("NFKC", name) == name


def _function(name: str, trust: Trust) -> Any:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    library, _, rest = name.partition(".")
    try:
        found: Any = getattr(torch.ops, library)
        for part in rest.split("."):
            found = getattr(found, part)
    except Exception as error:  # a name that no op can have ends in other errors than one that no op has
        raise CheckpointError(
            f"the graph calls the op '{name:.100}', which is not registered",
            why=(str(error).splitlines() or [""])[0],
            fix=f"import the library that defines '{library:.100}' ops first; a newer torch may have renamed it",
        ) from error
    if not isinstance(found, (OpOverload, HigherOrderOperator)):
        raise CheckpointError(f"'{name:.100}' is not an op", why=f"it is a {type(found).__name__}")
    if not trust.allows_op(found):
        raise CheckpointError(
            f"the graph calls the op '{name}', which a file may not ask for unasked",
            why="the op could do anything, such as write files: it is not known to compute and do nothing else",
            fix=f"graphcomp.load(folder, trust=[{library!r}]), where you trust the library and the file",
        )
    return found


def _check_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], what: str) -> None:
    """Refuse arguments that `function` does not take."""
    if not all(map(_is_argument, kwargs)):
        raise damaged(f"{what} with the keywords {sorted(kwargs)!r:.100}")
    if isinstance(function, OpOverload):
        _check_schema(function, args, kwargs, what)
    elif not isinstance(function, HigherOrderOperator):
        with suppress(ValueError):  # a function without a signature
            _bind(inspect.signature(function), args, kwargs, what)
        if kwargs:
            raise damaged(f"{what} with keywords")


def _bind(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any], what: str) -> None:
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise damaged(what, str(error)) from error


def _check_schema(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], what: str) -> None:
    arguments = schema_of(op).arguments
    positional = [a.name for a in arguments if not a.kwarg_only]
    if len(args) > len(positional):
        raise damaged(f"{what} with {len(args)} arguments", f"it takes {len(positional)}")
    given = {*positional[: len(args)], *kwargs}
    unknown = sorted(set(kwargs) - {a.name for a in arguments}) + sorted(set(kwargs) & set(positional[: len(args)]))
    missing = [a.name for a in arguments if a.name not in given and not a.has_default_value()]
    if unknown or missing:
        raise damaged(what, f"with a wrong argument '{unknown[0]}'" if unknown else f"without '{missing[0]}'")
    types = {a.name: str(a.type) if _is_number_alone(a) else "dtype" for a in arguments}
    numbers = takes_numbers_as_tensors(schema_of(op).name.rpartition("::")[2])
    for name, value in (*zip(positional, args, strict=False), *kwargs.items()):
        if not (_fits(value, types[name]) or (numbers and types[name] == "Tensor" and _fits(value, "number"))):
            raise damaged(f"{what} with {name} = {value!r:.100}", f"it must be {types[name]}")


def _is_number_alone(argument: Any) -> bool:
    """Whether an argument is none of those that a schema calls int and that are dtypes in Python."""
    return str(argument.real_type) not in ("ScalarType", "Optional[ScalarType]")


def _fits(value: Any, kind: str) -> bool:
    """Whether torch takes `value` for an argument of that type; what a node computes may be anything."""
    if isinstance(value, fx.Node):
        return True
    if kind == "dtype":
        return value is None or isinstance(value, torch.dtype)
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[len("Optional[") : -1])
    if kind.startswith("List["):
        return isinstance(value, (list, tuple)) and all(_fits(item, kind[len("List[") : -1]) for item in value)
    if isinstance(value, bool):
        return kind in ("bool", "number")
    return isinstance(value, _VALUES[kind]) if kind in _VALUES else True


def _set_calling_convention(graph: fx.Graph, document: JSON, trust: Trust) -> None:
    """Let the graph be called with the nested inputs, and return the nested outputs, that the document says."""
    names = document.get("arguments")
    if not isinstance(names, list) or not all(map(_is_argument, names)) or TAKEN & set(names):
        raise damaged(f"the inputs are called {names!r:.100}")
    takes = load_spec(document["inputs"], trust)
    gives = load_spec(document.get("outputs"), trust)
    if takes.type is not tuple or takes.num_children != 2 or [c.type for c in takes.children()] != [tuple, dict]:
        raise damaged("the inputs are no arguments and keywords")
    positional, keywords = takes.children()
    if not all(map(_is_argument, keywords.context)):
        raise damaged(f"the inputs have the keywords {keywords.context!r:.100}")
    called = [*names[: positional.num_children], *keywords.context]
    if len(names) != len(called) or len(set(called)) != len(names) or len(set(names)) != len(names):
        raise damaged(f"the inputs are called {names!r:.100}", f"and the model is called with {called!r:.100}")
    (output,) = graph.find_nodes(op="output")
    results = output.args[0]
    if not isinstance(results, (list, tuple)) or any(isinstance(r, (list, tuple, dict, slice)) for r in results):
        raise damaged(f"the graph returns {results!r:.100}", "it must be a flat tuple")
    counts = len(graph.find_nodes(op="placeholder")), len(results)
    if counts != (takes.num_leaves, gives.num_leaves):
        raise damaged(f"the graph has {counts} inputs and outputs, and {takes.num_leaves, gives.num_leaves} are stored")
    graph.set_codegen(calling_convention(names, takes, gives, _load_parameters(document.get("parameters", []))))


def _load_parameters(rows: JSON) -> dict[str, Any]:
    """Name -> default of each parameter; older checkpoints name none."""
    found: dict[str, Any] = {}
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, list) or not 1 <= len(row) <= 2 or not _is_argument(row[0]):
            raise damaged(f"a parameter of the model is {row!r:.100}")
        default = decode(row[1], {}, {}) if len(row) > 1 else REQUIRED
        if default is not REQUIRED and not isinstance(default, CONSTANTS):
            raise damaged(f"the default of {row[0]!r} is {row[1]!r:.100}")
        found[row[0]] = default
    return found


def _check_results(module: CapturedModule, document: JSON, devices: Mapping[str, torch.device]) -> None:
    """Run the graph on fake tensors, and compare what it gives with what was stored."""
    places, examples = module.graph.find_nodes(op="placeholder"), document.get("examples")
    if not isinstance(examples, list) or len(examples) != len(places):
        raise damaged(f"the inputs are like {examples!r:.100}")
    try:
        with unlogged(FAKE_TENSOR_LOGGER):
            found = _run(module, examples, devices)
    except CheckpointError:
        raise
    except Exception as error:  # an op that gets what it cannot take raises in any way
        raise damaged("the graph does not run", f"{type(error).__name__}: {str(error)[:200]}") from error
    if found != document["results"]:
        raise damaged("the graph gives other outputs", f"{found!r:.150}, and {document['results']!r:.150} are stored")
    for node, example in zip(places, examples, strict=True):
        node.meta[EXAMPLE] = example
