"""Torch-Pruning with its default settings on one model, and whether what it returns is exact.

Exact means: the pruned model computes what the dense model computes when the removed channels are as if they never
existed. The reference is a copy of the dense model with hooks: the inputs and outputs of every layer it cut are zero
at the removed channels, and its normalisations run on the kept channels only.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from benchmarks.common import brief, timed

RATIO = 0.5
TOLERANCE = 1e-4  # relative, float32
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
BOTH_ENDS_ALIKE = (*NORMS, nn.modules.batchnorm._BatchNorm, nn.PReLU, nn.Embedding)

Side: TypeAlias = str
"""'in' or 'out'."""


@dataclass
class PeerResult:
    """What Torch-Pruning made of one model."""

    captured: bool = False  # its dependency graph was built
    cuts: bool = False  # parameters left
    runs: bool = False  # the pruned model runs on the example inputs
    error: float | None = None  # relative, against the reference
    reached: float = 0.0  # share of the parameters whose shape changed
    params: float = 1.0  # share of the parameters that is left
    seconds: float = 0.0  # CPU, graph and cut
    failure: str = ""

    @property
    def exact(self) -> bool:
        return self.error is not None and self.error <= TOLERANCE


def torch_pruning(
    zoo: Any,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Mapping[str, Any] | None = None,
    afterwards: Callable[[Any], None] = lambda pruner: None,
) -> dict[str, Any]:
    """Prune `model` (it is modified) and compare. Plain data, see PeerResult, and `exact`.

    Args:
        options: of the pruner, beside the defaults.
        afterwards: corrects by hand what the pruner leaves, given the pruner.
    """
    result = PeerResult()
    try:
        _run(zoo, model, args, kwargs, result, options or {}, afterwards)
    except Exception as error:
        result.failure = brief(error)
    return {**asdict(result), "exact": result.exact}


def _run(
    zoo: Any,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: PeerResult,
    options: Mapping[str, Any],
    afterwards: Callable[[Any], None],
) -> None:
    import torch_pruning as tp

    warnings.simplefilter("ignore")
    dense = copy.deepcopy(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    ignored = zoo.output_layers(model, args, kwargs)
    names = {module: name for name, module in model.named_modules()}
    cuts = Cuts(model)
    with timed() as clock:
        pruner = tp.pruner.MagnitudePruner(
            model,
            **_inputs(args, kwargs),
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=ignored,
            **options,
        )
    result.captured, result.seconds = True, clock.seconds
    with timed() as clock:
        for group in pruner.step(interactive=True):
            cuts.note(group, pruner.DG, names)
            group.prune()
    afterwards(pruner)
    result.seconds += clock.seconds
    changed = {name for name, p in model.named_parameters() if p.shape != shapes.get(name)}
    total = sum(shape.numel() for shape in shapes.values())
    result.reached = sum(shapes[name].numel() for name in changed if name in shapes) / total
    result.params = sum(p.numel() for p in model.parameters()) / total
    result.cuts = bool(changed)
    with torch.no_grad():
        pruned = _output(model, args, kwargs)
        result.runs = True
        expected = _output(cuts.reference(dense, model), args, kwargs)
    worst, compared, misfits = zoo.rel_diff(zoo.main_outputs(expected), zoo.main_outputs(pruned))
    result.error = worst if compared and not misfits else float("inf")


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not kwargs:
        return {"example_inputs": args}
    if not args:
        return {"example_inputs": kwargs}
    return {"example_inputs": args, "forward_fn": lambda model, inputs: model(*inputs, **kwargs)}


def _output(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    random.seed(0)
    return model(*copy.deepcopy(args), **copy.deepcopy(kwargs))


# ------------------------------------------------------------------------------------------------ the reference
class Cuts:
    """Which channels of which layer were removed, in the numbering of the dense model."""

    def __init__(self, model: nn.Module) -> None:
        self.alive: dict[tuple[str, Side], list[int]] = {}
        self.gone: dict[tuple[str, Side], set[int]] = {}
        self.owners = {name: name.rpartition(".")[0] for name, _ in model.named_parameters()}
        self.sizes: dict[tuple[str, Side], int] = {}

    def note(self, group: Any, graph: Any, names: Mapping[nn.Module, str]) -> None:
        """Remember what `group` is about to remove."""
        for dep, hybrid in group:
            target = dep.target.module
            indices = sorted({int(getattr(i, "idx", i)) for i in hybrid})
            if isinstance(target, nn.Parameter):
                name, side = str(graph._param_to_name.get(target, "")), "parameter"
                size = target.shape[dep.target.pruning_dim]
            elif target in names:
                name = names[target]
                only_in = dep.handler.__name__ == "prune_in_channels" and not _alike(target)
                side = "in" if only_in else "out"
                size = (graph.get_in_channels if only_in else graph.get_out_channels)(dep.target)
            else:
                continue  # concatenations, splits and the like
            self._remove((name, side), indices, size)

    def _remove(self, key: tuple[str, Side], indices: list[int], size: int | None) -> None:
        if size is None:
            return
        alive = self.alive.setdefault(key, list(range(size)))
        self.sizes.setdefault(key, size)
        going = {alive[i] for i in indices if i < len(alive)}
        self.gone.setdefault(key, set()).update(going)
        self.alive[key] = [i for i in alive if i not in going]

    def reference(self, dense: nn.Module, pruned: nn.Module) -> nn.Module:
        """`dense` with hooks, such that the removed channels are as if they never existed."""
        for (name, side), gone in self.gone.items():
            kept = torch.tensor(self.alive[name, side])
            size = self.sizes[name, side]
            owner = self.owners.get(name, "") if side == "parameter" else name
            module = dense.get_submodule(owner)
            if _takes_statistics(module, side):
                module.register_forward_hook(_on_kept(pruned.get_submodule(owner), kept, size))
            elif isinstance(module, nn.MultiheadAttention):
                _zero_attention(module, sorted(gone))
            elif side == "in":
                module.register_forward_pre_hook(_zero_input(_mask(size, gone), _channel_dim(module)))
            elif side == "out":
                module.register_forward_hook(_zero_output(_mask(size, gone), _channel_dim(module)))
        return dense


def _alike(module: nn.Module) -> bool:
    """Whether cutting the layer's inputs is cutting its outputs."""
    depthwise = isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups == module.out_channels
    return depthwise or isinstance(module, (*BOTH_ENDS_ALIKE, nn.MultiheadAttention))


def _takes_statistics(module: nn.Module, side: Side) -> bool:
    """Whether the module is a normalisation over channels: torch's, or a module that owns nothing but its scale."""
    if side != "parameter":
        return isinstance(module, NORMS)
    scales_only = all(p.dim() == 1 for p in module.parameters(recurse=False)) and not list(module.children())
    return scales_only and "norm" in type(module).__name__.lower()


def _mask(size: int, gone: set[int]) -> Tensor:
    mask = torch.ones(size)
    mask[sorted(gone)] = 0
    return mask


def _channel_dim(module: nn.Module) -> int:
    return 1 if isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.PReLU)) else -1


def _broadcast(mask: Tensor, x: Tensor, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return mask.to(x.dtype).view(shape)


def _zero_input(mask: Tensor, dim: int) -> Callable[..., Any]:
    return lambda module, inputs: (inputs[0] * _broadcast(mask, inputs[0], dim), *inputs[1:])


def _zero_output(mask: Tensor, dim: int) -> Callable[..., Any]:
    return lambda module, inputs, output: output * _broadcast(mask, output, dim)


def _on_kept(small: nn.Module, kept: Tensor, size: int) -> Callable[..., Any]:
    """A normalisation on the kept channels only, by the pruned model's own layer; zeros elsewhere."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for dim in (-1, 1):  # where its channels are, only the layer knows
            if inputs[0].shape[dim] == size:
                with suppress(RuntimeError):
                    part = small(inputs[0].index_select(dim, kept))
                    return torch.zeros_like(output).index_copy(dim, kept, part.to(output.dtype))
        raise ValueError(f"{type(module).__name__} has no dim of {size} channels")

    return hook


def _zero_attention(module: nn.MultiheadAttention, gone: list[int]) -> None:
    """Embedding channels of torch's own attention: no input, query, key, value or output has them."""
    width = module.embed_dim
    rows = [i + k * width for k in range(3) for i in gone]
    with torch.no_grad():
        for tensor in (module.in_proj_weight, module.in_proj_bias):
            if tensor is not None:
                tensor[rows] = 0
        if module.in_proj_weight is not None:
            module.in_proj_weight[:, gone] = 0
        module.out_proj.weight[gone] = 0
        module.out_proj.weight[:, gone] = 0
        if module.out_proj.bias is not None:
            module.out_proj.bias[gone] = 0
