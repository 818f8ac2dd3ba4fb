"""The captured model: an fx GraphModule that keeps the caller's tensors and can be switched between train and eval.

A captured module holds the very tensors of the model it came from, under their original names, and is called like it.
"""

from __future__ import annotations

import copy
import keyword
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import sympy
import torch
from torch import fx, nn
from torch.fx.graph import PythonCode

from graphcomp.errors import InputError
from graphcomp.ir.calling import argument_names, bind_call, is_constant, other_than_default
from graphcomp.ir.graph import all_tensors, bind, is_op, module_path, names_by_tensor, set_argument, tensor_values
from graphcomp.ir.module_copy import module_copy
from graphcomp.ir.rewrite import after, redirect
from graphcomp.system.threads import LOCK
from graphcomp.torch_compat import (
    BatchNormBase,
    OpOverload,
    codegen_of,
    forget_source_with,
    pytree,
    schema_of,
    target_format,
)

log = logging.getLogger("graphcomp.graph_module")

Bound = TypeVar("Bound", bound=nn.Module)

FOLLOWS_MODE = "follows_mode"
"""In node.meta: argument of the op -> what it is in eval and in training mode; CapturedModule.train() gives it that."""


LEFT_OUT = "graphcomp_left_out"
"""In the meta of a module: that a constant was warned of which a call left out, and whose default is another."""
WATCHED = 32
"""Sets of sizes that a model is watched for."""

RESIZED = "graphcomp_resized"
"""In the meta of a module: that an input of another size was warned of."""

GUARDS, GUARDED = "graphcomp_guards", "graphcomp_guarded"
"""In the meta of a module: what its graph holds for (a Guard each), and the sizes that were looked at."""

MOMENTUM = 0.1
"""Of a batch norm that averages over all batches (momentum=None): a graph holds one number, and this is torch's."""

aten = torch.ops.aten
DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)


@dataclass(frozen=True)
class Guard:
    """A comparison of sizes in the model's code, whose outcome for the example inputs is fixed in the graph.

    Attributes:
        text: in the names of the inputs: "x.shape[0] <= 8".
        source: file, line and code.
        holds: over `symbols`.
        symbols: symbol -> (placeholder, dim).
    """

    text: str
    source: str
    holds: sympy.Basic
    symbols: Mapping[sympy.Symbol, tuple[str, int]]

    def broken_by(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Return whether inputs of these sizes lead to the other outcome."""
        values = {symbol: shapes[name][dim] for symbol, (name, dim) in self.symbols.items()}
        return bool(self.holds.subs(values) == sympy.false)


class CapturedModule(fx.GraphModule):
    """A GraphModule whose batch norms, dropouts and recurrent layers follow `.train()` and `.eval()`.

    Export bakes the mode into an argument of each such op. The nodes that were in eval mode when the model was
    captured carry `meta["follows_mode"]`, and `train` rewrites their argument; so do, where they are known (see
    `follow_training`), those that take another number in training mode, as the dropout of attention does. What stayed
    in training mode during an evaluation (a dropout that is always on, a batch norm without running statistics) is not
    touched, nor is what stays in eval mode when the model is trained (a frozen batch norm): see `follow_modules`.

    Attributes:
        norms_frozen: norms use their running statistics, and leave the statistics as they are, in training mode too.
            Read by `train`.
    """

    norms_frozen: bool = False
    argument_count: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model, defaults included. Numbers, flags and words may be left out, and must else be those that it was
        captured with: they are fixed in the graph. So is what the model computed from sizes: where these are others, a
        warning is logged, once. Labels may be left out: losses are None then.

        Raises:
            InputError: a number, flag or word is another, or an argument is given that the model was captured without.
        """
        if torch.compiler.is_compiling() and len(args) + len(kwargs) == self.argument_count:
            return super().__call__(*args, **kwargs)
        without = self._without_labels(args, kwargs)
        if without is not None:
            return without[0]
        args, kwargs = self._as_captured(args, kwargs)
        if not torch.compiler.is_compiling():
            self._check_inputs(args, kwargs)
        return super().__call__(*args, **kwargs)

    def _without_labels(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """What a call without labels returns; None of a call that is complete, or lacks more."""
        info = getattr(codegen_of(self.graph), "pytree_info", None)
        given = (*args, *kwargs.values())
        if info is None or (len(given) >= self.argument_count and not any(value is None for value in given)):
            return None
        bound = {name: v for name, v in bind_call(self.graph, args, kwargs).items() if v is not None}
        if bound.keys() == set(info.orig_args):
            return None
        from graphcomp.ir.left_out import run_without

        return run_without(self, bound)

    def _as_captured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that the graph takes: constants may be left out, and defaults be given."""
        info = getattr(codegen_of(self.graph), "pytree_info", None)
        if info is None:
            return args, kwargs
        bound = bind_call(self.graph, args, kwargs)
        if bound.keys() != set(info.orig_args):
            return args, kwargs  # the forward says what is missing
        named = {**dict(zip(info.orig_args, args, strict=False)), **kwargs}
        as_given = len(args) + len(kwargs) == len(bound) and named.keys() == bound.keys()
        if as_given and all(named[name] is bound[name] for name in bound):
            return args, kwargs
        if LEFT_OUT not in self.meta:
            for name, (held, default) in other_than_default(self.graph, bound.keys() - named.keys()).items():
                self.meta[LEFT_OUT] = True
                log.warning("%s is left out: the graph holds %r, the default of the model is %r", name, held, default)
        return tuple(bound[name] for name in info.orig_args), {}

    def _check_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        pairs = by_placeholder(self, args, kwargs)
        self._check_guards({n.name: tuple(leaf.shape) for n, leaf in pairs if isinstance(leaf, torch.Tensor)})
        for node, leaf in pairs:
            if is_constant(node) and (isinstance(leaf, torch.Tensor) or leaf != node.meta["val"]):
                raise InputError(
                    f"{node.name} is {_shown(leaf)}, and the graph was captured with {node.meta['val']!r}",
                    why="what is no tensor is a constant of the graph",
                    fix=f"capture the model with example inputs that hold {_shown(leaf)}",
                )
            if RESIZED not in self.meta and is_resized(node, leaf):
                self.meta[RESIZED] = True
                log.warning(
                    "%s of shape %s was of shape %s when %s was captured: what a model computes from sizes is constant",
                    node.name, tuple(leaf.shape), tuple(node.meta["val"].shape), self.__class__.__name__,
                )  # fmt: skip

    def _check_guards(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Log a warning, once for each set of sizes, where the model itself would take another path than the graph."""
        seen = self.meta.setdefault(GUARDED, set())
        key = tuple(shapes.values())
        if not self.meta.get(GUARDS) or not shapes or key in seen or len(seen) > WATCHED:
            return
        seen.add(key)
        for guard in self.meta[GUARDS]:
            if guard.broken_by(shapes):
                log.warning(
                    "%s takes the path that the example inputs took, though %s does not hold: %s",
                    self.__class__.__name__, guard.text, guard.source,
                )  # fmt: skip

    def train(self, mode: bool = True) -> CapturedModule:
        """Switch the mode of this module and of the ops in its graph; recompiles only where something changed."""
        super().train(mode)
        self.switch_ops(mode)
        return self

    def switch_ops(self, mode: bool) -> None:
        """Switch the ops in the graph alone, not the flags of modules."""
        following = [node for node in self.graph.nodes if FOLLOWS_MODE in node.meta]
        switched = [_switch(n, mode and not (self.norms_frozen and keeps_statistics(n))) for n in following]
        if any(switched):
            self.recompile()

    def recompile(self) -> PythonCode:
        """Write the graph as code, whatever the model's submodules are called."""
        info = getattr(codegen_of(self.graph), "pytree_info", None)
        self.argument_count = len(self.graph.find_nodes(op="placeholder") if info is None else info.orig_args)
        targets = (str(node.target) for node in self.graph.nodes if node.op in ("get_attr", "call_module"))
        with nullcontext() if all(map(_is_plain_path, targets)) else names_quoted():
            code = super().recompile()
        forget_source_with(type(self).forward)
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        with warnings.catch_warnings():
            # torch warns about its own deprecated class when a pytree spec is copied
            warnings.simplefilter("ignore", FutureWarning)
            copied: Any = super().__deepcopy__(memo)
        copied.norms_frozen = self.norms_frozen
        return copied  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as in a checkpoint: tensors, and the graph by the names of its ops. fx would run the generated code
        again, which fails for graphs of torch.export."""
        from graphcomp.ir.graph_json import dump

        return _unpickled, (dump(self, run=False), tensor_names(self), self.training)


def set_mode(module: nn.Module, mode: bool) -> None:
    """Set the flag of one module, and the ops of a graph: a model's own `train()` may do more than that."""
    module.training = mode
    if isinstance(module, CapturedModule):
        module.switch_ops(mode)


def _unpickled(document: Any, tensors: Mapping[str, Any], training: bool) -> CapturedModule:
    from graphcomp.ir.graph_json import load

    return load(document, tensors, {}).train(training)


@contextmanager
def names_quoted() -> Iterator[None]:
    """Let torch.fx write `getattr(self, 'class')` where a submodule is called by a keyword, or by no identifier."""
    with LOCK, target_format(_quoted):
        yield


def _quoted(base: str, target: str) -> str:
    for name in target.split("."):
        base = f"{base}.{name}" if _is_plain(name) else f"getattr({base}, {name!r})"
    return base


def _is_plain_path(target: str) -> bool:
    return all(map(_is_plain, target.split(".")))


def _is_plain(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def build(tensors: Mapping[str, Any], graph: fx.Graph, name: str) -> CapturedModule:
    """A CapturedModule in eval mode.

    Args:
        tensors: what each get_attr target of `graph` stands for, not copied: tensors, sub-graphs of control flow.
        graph: its code generator carries the pytree specs of the inputs and outputs (see `calling_convention`).
        name: the class name of the model it came from.
    """
    for node in graph.nodes:
        flag = _mode_argument(node)
        if flag is not None and bind(node)[flag] is False:
            node.meta.setdefault(FOLLOWS_MODE, {}).setdefault(flag, (False, True))
    module = CapturedModule(dict(tensors), graph, class_name=name)
    module.eval()
    return module


def leaf_names(spec: pytree.TreeSpec, prefix: str = "") -> list[str]:
    """A name per leaf of a nested value, such as "logits", "out.aux", "hidden_states.0"; "0" for a bare leaf."""
    if spec.is_leaf():
        return [prefix or "0"]
    children = list(spec.children())
    keys = _keys(spec, len(children))
    return [
        name
        for key, child in zip(keys, children, strict=True)
        for name in leaf_names(child, f"{prefix}.{key}" if prefix else str(key))
    ]


def _keys(spec: pytree.TreeSpec, count: int) -> Sequence[Any]:
    """What the children of one node of a spec are called: dict keys, field names, else positions."""
    fields = getattr(spec.type, "_fields", None)
    for keys in (fields, spec.context, _first(spec.context)):
        if isinstance(keys, (list, tuple)) and len(keys) == count and all(isinstance(k, (str, int)) for k in keys):
            return keys
    return range(count)


def _first(context: Any) -> Any:
    """The first entry of a context such as a dataclass's [field names, names of the fields that are None]."""
    return context[0] if isinstance(context, (list, tuple)) and context else None


def by_placeholder(module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[fx.Node, Any]]:
    """Return each placeholder with the leaf that a call gives it; nothing where the call has other leaves."""
    places = module.graph.find_nodes(op="placeholder")
    info = getattr(codegen_of(module.graph), "pytree_info", None)
    given: Any = args
    if info is not None:
        by_name = {**dict(zip(info.orig_args, args, strict=False)), **kwargs}
        given = [by_name[name] for name in argument_names(module.graph) if name in by_name]
    leaves = pytree.tree_leaves(given)
    return list(zip(places, leaves, strict=True)) if len(leaves) == len(places) else []  # the forward says what lacks


def is_resized(node: fx.Node, leaf: Any) -> bool:
    """Whether a tensor has another length along a dim that the graph has no symbol for."""
    expected = node.meta.get("val")
    if not isinstance(expected, torch.Tensor) or not isinstance(leaf, torch.Tensor) or leaf.dim() != expected.dim():
        return False
    return any(type(b) is int and a != b for a, b in zip(leaf.shape, expected.shape, strict=True))


def _shown(leaf: Any) -> str:
    return f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)


def tensor_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor a model holds, by its full name, tied ones once per name: parameters, buffers, plain attributes."""
    tensors: dict[str, torch.Tensor] = {}
    tensors.update(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        plain = {key: value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
        tensors.update({f"{path}.{key}" if path else key: value for key, value in plain.items()})
    return tensors


def copied(model: nn.Module, *, share: bool = False) -> nn.Module:
    """A copy of the module tree; with `share` it holds the very tensors of `model`, and what cannot be copied."""
    tensors = {id(tensor): tensor for tensor in tensor_names(model).values()}
    # what a hook computes from parameters before each forward is no leaf, which deepcopy refuses
    memo: dict[int, Any] = {i: t if share else t.detach().clone() for i, t in tensors.items() if share or not t.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # a lock, a file, a function of torch.jit, or a class that refuses
        if not share or any(hasattr(module, "__deepcopy__") for module in model.modules()):
            raise
        return module_copy(model)


def bound_graph(module: Bound, tensors: Mapping[str, torch.Tensor]) -> Bound:
    """Return a module of the same graph, in which `tensors` take the place of the tensors of their names.

    The graph is shared: what is known by its nodes holds for both modules. Neither module changes.
    """
    assert isinstance(module, fx.GraphModule)
    module.graph.owning_module = None  # a graph of several modules keeps none of them alive
    return _bound(module, dict(all_tensors(module)), tensors, partial(module_copy, share_graphs=True))


def bound_model(model: Bound, tensors: Mapping[str, torch.Tensor]) -> Bound:
    """Return a copy of the model in which `tensors` take the place of the tensors of their names, under all names."""
    return _bound(model, tensor_names(model), tensors, _deep_copy)


def _bound(
    module: Bound,
    own: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    copy_with: Callable[[nn.Module, Callable[[torch.Tensor], torch.Tensor]], nn.Module],
) -> Bound:
    new = {id(own[name]): tensor for name, tensor in tensors.items() if name in own}
    bound: Any = copy_with(module, lambda tensor: new.get(id(tensor), tensor))
    return bound  # type: ignore[no-any-return]


def _deep_copy(model: nn.Module, tensor: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Return a deep copy that holds tensor(t) for each tensor t; what refuses to be copied is shared."""
    try:
        return copy.deepcopy(model, {id(own): tensor(own) for own in tensor_names(model).values()})
    except Exception:  # a lock, a file, a function of torch.jit, or a class that refuses
        return module_copy(model, tensor)


def canonical_names(model: nn.Module) -> dict[int, str]:
    """id(tensor) -> its first name in the model."""
    names: dict[int, str] = {}
    for name, tensor in tensor_names(model).items():
        names.setdefault(id(tensor), name)
    return names


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name -> all names, for the tensors that have more than one (tied parameters, shared modules)."""
    found = names_by_tensor(tensor_names(model).items()).values()
    return {names[0]: tuple(names) for names in found if len(names) > 1}


def tensor_leaves(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among the leaves of a nested value."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


# ---------------------------------------------------------------------------------------------- train and eval
def _mode_argument(node: fx.Node) -> str | None:
    """Name of the op's argument `train` or `training`, if it has one."""
    if not is_op(node):
        return None
    return next((name for name in bind(node) if name in ("train", "training", "use_input_stats")), None)


def trains(node: fx.Node) -> bool:
    """Whether the op is another one in training mode: a flag of it follows the mode."""
    return (False, True) in node.meta.get(FOLLOWS_MODE, {}).values()


def keeps_statistics(node: fx.Node) -> bool:
    """Return whether the op is a norm with running statistics, which training mode updates."""
    return isinstance(node.target, OpOverload) and isinstance(bind(node).get("running_mean"), fx.Node)


def _switch(node: fx.Node, mode: bool) -> bool:
    """Give the op's arguments that follow the mode their values in `mode`; False where they have them already."""
    switched = False
    for name, values in node.meta[FOLLOWS_MODE].items():
        now = bind(node).get(name)
        if now is not None and now != values[mode]:
            set_argument(node, name, values[mode])
            switched = True
    return switched


def averages_over_all(module: nn.Module) -> bool:
    """Whether it is a batch norm whose running statistics are the mean over all batches, however many there are."""
    return isinstance(module, BatchNormBase) and module.momentum is None and module.track_running_stats


def follow_modules(graph: fx.Graph, modules: Mapping[str, nn.Module], modes: Mapping[str, bool]) -> list[fx.Node]:
    """Leave the ops in eval mode whose module stays in it when the model is trained.

    Args:
        graph: of the model in eval mode.
        modules: of the model, by path.
        modes: `training` of each after the model's own `train()`, which may leave some as they were.

    Returns:
        The ops that a module of the user's own code calls: what it tells them in training mode is not known.
    """
    unknown = []
    for node in graph.nodes:
        flag, path = _mode_argument(node), module_path(node)
        if flag is None or flag not in node.meta.get(FOLLOWS_MODE, {}):
            continue
        if not modes.get(path, True):
            node.meta[FOLLOWS_MODE][flag] = (False, False)
        elif not type(modules.get(path)).__module__.startswith("torch.nn."):
            unknown.append(node)
        if path in modules and averages_over_all(modules[path]) and "momentum" in bind(node):
            node.meta[FOLLOWS_MODE]["momentum"] = (bind(node)["momentum"], MOMENTUM)
    return unknown


def follow_training(graph: fx.Graph, training: fx.Graph) -> list[fx.Node]:
    """Let the arguments of the ops in `graph`, of a model in eval mode, follow the mode that are others in `training`,
    the graph of the same model in training mode; a dropout that is called in training mode alone is put into `graph`.

    An op is the same as one of the other graph where a module calls it as many times in both: it is known by how many
    calls went before. What else a model does in training mode alone stays unknown.

    Returns:
        The ops of `training` that are random or write into tensors, and are not in `graph`.
    """
    ours, theirs = _sites(graph), _sites(training)
    same: dict[fx.Node, fx.Node] = {}
    for site, nodes in ours.items():
        if len(nodes) == len(twins := theirs.get(site, [])):
            same.update(zip(twins, nodes, strict=True))
    for twin, node in same.items():
        arguments, flag = bind(twin), _mode_argument(node)
        for name, value in bind(node).items():
            other = arguments[name]
            if name == flag and value is False:
                node.meta[FOLLOWS_MODE][flag] = (value, bool(other))
            elif isinstance(value, float) and isinstance(other, float) and value != other:
                node.meta.setdefault(FOLLOWS_MODE, {})[name] = (value, other)
    return [n for n in training.nodes if n not in same and _matters(n) and not _insert_dropout(n, same)]


def _matters(node: fx.Node) -> bool:
    """Whether it is random, or writes into a tensor of floats."""
    if not isinstance(node.target, OpOverload):
        return False
    writes = schema_of(node.target).is_mutable and any(t.is_floating_point() for t in tensor_values(node))
    return writes or torch.Tag.nondeterministic_seeded in node.target.tags


def _insert_dropout(dropout: fx.Node, same: dict[fx.Node, fx.Node]) -> bool:
    """Put a dropout of the training graph behind what it reads in the other; False where that is not to be found.
    In eval mode it passes on what it gets."""
    if dropout.target not in DROPOUTS:
        return False
    read = dropout.args[0]
    if not isinstance(read, fx.Node) or read not in same or len(read.users) > 1:
        return False
    ours = same[read]
    users = list(ours.users)
    same[dropout] = added = after(ours, like=dropout)(dropout.target, ours, dropout.args[1], False)
    added.meta[FOLLOWS_MODE] = {"train": (False, True)}
    redirect(users, ours, added)
    return True


def _sites(graph: fx.Graph) -> dict[tuple[str, Any], list[fx.Node]]:
    """The ops of a graph by the module that calls them and by what they are."""
    found: dict[tuple[str, Any], list[fx.Node]] = {}
    for node in graph.nodes:
        if is_op(node):
            found.setdefault((module_path(node), node.target), []).append(node)
    return found
