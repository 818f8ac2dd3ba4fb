"""How a graph is called: as the model that it was captured from, defaults included."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import fx, nn

from graphcomp.errors import InputError
from graphcomp.torch_compat import PyTreeCodeGen, PyTreeInfo, codegen_of, pytree

CONSTANTS = (bool, int, float, complex, str, type(None))
REQUIRED = inspect.Parameter.empty
"""In place of the default of a parameter that has none, or one that is no constant."""

Parameters = Mapping[str, Any]
"""Name of each parameter of a forward, in order -> its default."""


class Calling(PyTreeCodeGen):
    """The code generator of a graph that takes and returns nested values.

    Attributes:
        parameters: of the forward of the model; empty where they are not known.
    """

    def __init__(self, info: PyTreeInfo, parameters: Parameters) -> None:
        super().__init__(info)
        self.parameters = dict(parameters)


def calling_convention(
    arg_names: Sequence[str],
    in_spec: pytree.TreeSpec,
    out_spec: pytree.TreeSpec,
    parameters: Parameters | None = None,
) -> Calling:
    """The code generator of a graph that is called with `arg_names`, positional ones first, then keywords."""
    return Calling(PyTreeInfo(list(arg_names), in_spec, out_spec), parameters or {})


def parameters_of(model: nn.Module) -> dict[str, Any]:
    """Name of each parameter of the model's forward -> its default, REQUIRED where that is no constant.

    A captured graph has those of the model that it was captured from.
    """
    before = getattr(codegen_of(model.graph), "parameters", {}) if isinstance(model, fx.GraphModule) else {}
    if before:
        return dict(before)
    listed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(model.forward).parameters
    return {
        name: p.default if isinstance(p.default, CONSTANTS) else REQUIRED
        for name, p in found.items()
        if p.kind not in listed
    }


def is_constant(node: fx.Node) -> bool:
    """Whether a placeholder stands for a number, a flag, a word or None, which the graph holds fixed."""
    return "val" in node.meta and isinstance(node.meta["val"], CONSTANTS)


def argument_names(graph: fx.Graph) -> list[str]:
    """Names of the arguments in the order of their placeholders; none where the graph takes flat inputs."""
    info = getattr(codegen_of(graph), "pytree_info", None)
    if info is None:
        return []
    positional, keywords = info.in_spec.children()
    return [*info.orig_args[: positional.num_children], *keywords.context]


def bind_call(graph: fx.Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, in the order of their placeholders.

    Names and positions are those of the model's forward. Constants that the call leaves out are those that the graph
    was captured with; an argument that the graph lacks may be given its default. None where None is the default is as
    if it were left out.

    Raises:
        TypeError: too many arguments, or one twice, as from the forward.
        InputError: an argument that the graph was captured without.
    """
    names = argument_names(graph)
    parameters: Parameters = getattr(codegen_of(graph), "parameters", {})
    positions = _positions(graph)
    if len(args) > len(positions):
        raise TypeError(f"forward() takes {len(positions)} positional arguments, got {len(args)}")
    given = dict(zip(positions, args, strict=False))
    twice = given.keys() & kwargs.keys()
    if twice:
        raise TypeError(f"forward() got multiple values for argument {min(twice)!r}")
    given.update(kwargs)
    for name in given.keys() - set(names):
        _check_default(name, given.pop(name), parameters)
    for name, value in constants_of(graph).items():
        if name not in given or (given[name] is None and parameters.get(name, REQUIRED) is None):
            given[name] = value
    return {name: given[name] for name in names if name in given}


def left_out(graph: fx.Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constants of a graph, by name, that a call leaves out."""
    if not argument_names(graph):
        return {}
    given = {*_positions(graph)[: len(args)], *kwargs}
    return {name: value for name, value in constants_of(graph).items() if name not in given}


def graph_called(model: nn.Module) -> fx.Graph | None:
    """Return the graph that a call of the model runs with the same arguments; None where that is not known.

    A model that is a graph, or one around a graph, `module`, whose forward has the signature of the graph.
    """
    for found in (model, getattr(model, "module", None)):
        if not isinstance(found, fx.GraphModule):
            continue
        if found is model or inspect.signature(model.forward) == inspect.signature(found.forward):
            return found.graph
    return None


def other_than_default(graph: fx.Graph, left_out: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """Return name -> (constant of the graph, default of the model), of those that a call leaves out and that differ."""
    parameters: Parameters = getattr(codegen_of(graph), "parameters", {})
    defaults = {name: parameters.get(name, REQUIRED) for name in left_out}
    pairs = {name: (value, defaults[name]) for name, value in constants_of(graph).items() if name in defaults}
    return {name: pair for name, pair in pairs.items() if pair[1] not in (REQUIRED, None) and pair[0] != pair[1]}


def _positions(graph: fx.Graph) -> list[str]:
    """Return the names of the arguments in the order that a call may give them in."""
    names = argument_names(graph)
    first = names[: _positional(graph)]
    return [*first, *(name for name in getattr(codegen_of(graph), "parameters", {}) or names if name not in first)]


def _positional(graph: fx.Graph) -> int:
    return int(codegen_of(graph).pytree_info.in_spec.child(0).num_children)


def _check_default(name: str, value: Any, parameters: Parameters) -> None:
    default = parameters.get(name, REQUIRED)
    if default is not REQUIRED and type(value) is type(default) and value == default:
        return
    raise InputError(
        f"the graph takes no {name!r}",
        why="the model was captured without that argument",
        fix=f"capture the model with example inputs that hold {name!r}",
    )


def constants_of(graph: fx.Graph) -> dict[str, Any]:
    """The arguments that the graph holds fixed, by name."""
    names = argument_names(graph)
    places = iter(graph.find_nodes(op="placeholder"))
    positional, keywords = codegen_of(graph).pytree_info.in_spec.children()
    found = {}
    for name, spec in zip(names, (*positional.children(), *keywords.children()), strict=True):
        nodes = [next(places) for _ in range(spec.num_leaves)]
        if all(map(is_constant, nodes)):
            found[name] = pytree.tree_unflatten([node.meta["val"] for node in nodes], spec)
    return found
