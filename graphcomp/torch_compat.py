"""Bind each private name of torch that graphcomp uses: the one file to mend when a torch moves one of the names.

Every other file of the package takes the names from here. Each binding says why the name is needed, and which public
name would replace the name. `tests/test_torch_compat.py` checks the behaviour that graphcomp relies on, name by name.
Importing this module loads nothing that `import torch` has not loaded.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from graphcomp.errors import TorchError

__all__ = [
    "BatchNormBase",
    "ConvBase",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "NormBase",
    "OpOverload",
    "OpOverloadPacket",
    "PyTreeCodeGen",
    "PyTreeInfo",
    "TorchDispatchMode",
    "causal_mask_test",
    "foreach_add_",
    "foreach_clamp_max_",
    "foreach_clamp_min_",
    "foreach_copy_",
    "foreach_zero_",
    "get_unwrapped",
    "is_batchedtensor",
    "is_functorch_wrapped_tensor",
    "is_legacy_batchedtensor",
    "number_of_dispatch_modes",
    "pytree",
    "saved_tensors_hooks_disabled",
    "takes_numbers_as_tensors",
    "target_format",
    "top_saved_tensors_hooks",
    "transforms_active",
    "tree_flatten_spec",
]


@contextmanager
def bound(*names: str) -> Iterator[None]:
    """Raise TorchError where this torch lacks one of the private `names` that the block binds."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise TorchError(
            f"torch {torch.__version__} has no {' or no '.join(names)}",
            at="graphcomp/torch_compat.py",
            why=f"{error}; a private name of torch may move with any release",
            fix="install a torch that this graphcomp is tested with (pip install --upgrade graphcomp, which picks one),"
            " or bind the new name in graphcomp/torch_compat.py",
        ) from error


# ------------------------------------------------------------------------------------------------ nested values
# Flatten nested arguments and results: torch.export describes inputs and outputs by the specs of this module.
# No public name yet; a public torch.utils.pytree with the same TreeSpec would do.
with bound("torch.utils._pytree"):
    import torch.utils._pytree as pytree

# Flatten the arguments of a call in the order of an exported graph, keywords in any order. Public would be a
# `flatten_up_to` of a public TreeSpec.
with bound("torch.fx._pytree.tree_flatten_spec"):
    from torch.fx._pytree import tree_flatten_spec

# Call a graph with nested values, as torch.export does. `fx.Graph.set_codegen` and `fx.graph.CodeGen` are public; the
# code generator for nested values would have to become public, too.
with bound("torch.fx.graph._PyTreeCodeGen", "torch.fx.graph._PyTreeInfo"):
    from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen
    from torch.fx.graph import _PyTreeInfo as PyTreeInfo

# ------------------------------------------------------------------------------------------------ ops
# Ask an object whether the object is an op: `torch.ops.aten.add.Tensor` is an OpOverload, `torch.ops.aten.add` is a
# packet, `torch.ops.higher_order.cond` is a higher-order op. The objects are public, the classes would have to be.
with bound("torch._ops.OpOverload", "torch._ops.OpOverloadPacket", "torch._ops.HigherOrderOperator"):
    from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

# Know which ops take a number where their schema says Tensor, to check a graph that is read from a file. Public would
# be a question to the schema.
with bound("torch._C._should_allow_numbers_as_tensors"):
    takes_numbers_as_tensors = torch._C._should_allow_numbers_as_tensors

# ------------------------------------------------------------------------------------------------ fake tensors
# Compute shapes and dtypes without data, as torch.export does. The meta device is public, but forgets the device of a
# tensor and refuses ops of mixed devices.
with bound("torch._subclasses.fake_tensor"):
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )

# ------------------------------------------------------------------------------------------------ interception
# Run code of our own for each ATen op of a forward. `torch.overrides.TorchFunctionMode` is public, and sees the
# functions of Python alone: not what they call in C++, nor the backward pass.
with bound("torch.utils._python_dispatch.TorchDispatchMode"):
    from torch.utils._python_dispatch import TorchDispatchMode

# Count the dispatch modes in force: a kernel that reads tensors in pieces would show such a mode other ops.
with bound("torch._C._len_torch_dispatch_stack"):
    number_of_dispatch_modes = torch._C._len_torch_dispatch_stack

# Know torch.func transforms (vmap, grad) and the tensors that stand inside of one: such a tensor has no memory of its
# own. torch.func has no public question of this kind.
with bound("torch._C._are_functorch_transforms_active"):
    transforms_active = torch._C._are_functorch_transforms_active
with bound("torch._C._functorch"):
    get_unwrapped = torch._C._functorch.get_unwrapped
    is_batchedtensor = torch._C._functorch.is_batchedtensor
    is_functorch_wrapped_tensor = torch._C._functorch.is_functorch_wrapped_tensor
    is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor

# Nest in the saved-tensor hooks of a caller: find the hooks in force, and why hooks are refused. Hooks are set by the
# public torch.autograd.graph.saved_tensors_hooks, which tells neither.
with bound("torch._C._autograd"):
    saved_tensors_hooks_disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message
    top_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks

# ------------------------------------------------------------------------------------------------ lists of tensors
# Change a list of tensors by one call instead of a call for each tensor: quantizers are many and small. The names are
# documented, in spite of the underscore; torch.optim uses them (foreach=True).
with bound("torch._foreach_add_"):
    foreach_add_ = torch._foreach_add_
with bound("torch._foreach_clamp_max_"):
    foreach_clamp_max_ = torch._foreach_clamp_max_
with bound("torch._foreach_clamp_min_"):
    foreach_clamp_min_ = torch._foreach_clamp_min_
with bound("torch._foreach_copy_"):
    foreach_copy_ = torch._foreach_copy_
with bound("torch._foreach_zero_"):
    foreach_zero_ = torch._foreach_zero_

# ------------------------------------------------------------------------------------------------ modules
# Know all convolutions and batch norms, classes of users that derive from the common base included. A tuple of the
# public classes (nn.Conv1d, …) would miss the latter.
with bound("torch.nn.modules.conv._ConvNd"):
    from torch.nn.modules.conv import _ConvNd as ConvBase
with bound("torch.nn.modules.batchnorm._BatchNorm", "torch.nn.modules.batchnorm._NormBase"):
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
    from torch.nn.modules.batchnorm import _NormBase as NormBase


# ------------------------------------------------------------------------------------------------ functions of torch
# Write the code of a graph whose submodules have names that are no identifiers. Public would be an option of
# `fx.graph.CodeGen`.
with bound("torch.fx.graph._format_target"):
    torch.fx.graph._format_target  # noqa: B018

# Export the transformers of torch without a question to the values of a mask. Public would be a flag of
# nn.TransformerEncoder.
with bound("torch.nn.modules.transformer._detect_is_causal_mask"):
    torch.nn.modules.transformer._detect_is_causal_mask  # noqa: B018


def target_format(function: Callable[[str, str], str]) -> AbstractContextManager[None]:
    """Within, torch.fx writes the names of submodules and attributes by `function(base, target)`."""
    return _replaced(torch.fx.graph, "_format_target", lambda _: function)


def causal_mask_test(make: Callable[[Callable[..., bool]], Callable[..., bool]]) -> AbstractContextManager[None]:
    """Within, torch.nn's transformers ask `make(the function of before)(mask, is_causal, size)` for a causal mask."""
    return _replaced(torch.nn.modules.transformer, "_detect_is_causal_mask", make)


@contextmanager
def _replaced(module: types.ModuleType, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, make(before))
    try:
        yield
    finally:
        setattr(module, name, before)
