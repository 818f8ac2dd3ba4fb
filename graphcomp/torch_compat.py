"""Bind each private name of torch that graphcomp uses: the one file to mend when a torch moves one of the names.

Every other file of the package takes the names from here. Each binding says why the name is needed, and which public
name would replace the name. `tests/test_torch_compat.py` checks the behaviour that graphcomp relies on, name by name.
Importing this module loads nothing that `import torch` has not loaded.
"""

from __future__ import annotations

import linecache
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import TorchError

__all__ = [
    "DECOMPOSED_HOMES",
    "FAKE_TENSOR_LOGGER",
    "HOOK_PREFIXES",
    "MODULE_HOOKS",
    "MODULE_TABLES",
    "PRIVATE_LOGGERS",
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
    "buffer_table",
    "causal_mask_test",
    "codegen_of",
    "foreach_add_",
    "foreach_clamp_max_",
    "foreach_clamp_min_",
    "foreach_copy_",
    "foreach_zero_",
    "forget_shape_environments",
    "forget_source_with",
    "get_unwrapped",
    "inside_wrapper",
    "int4_products",
    "int8_products",
    "int_mm",
    "is_batchedtensor",
    "is_functorch_wrapped_tensor",
    "is_legacy_batchedtensor",
    "make_wrapper",
    "module_table",
    "non_persistent",
    "number_of_dispatch_modes",
    "pack_int4",
    "pack_int8",
    "parameter_table",
    "pytree",
    "refresh_flat_weights",
    "saved_tensors_hooks_disabled",
    "schema_of",
    "sources_go_with_code",
    "stands_for_others",
    "storage_key",
    "takes_numbers_as_tensors",
    "target_format",
    "top_saved_tensors_hooks",
    "transforms_active",
    "tree_flatten_spec",
    "version_of",
    "without_torch_function",
]

TESTED = "2.13"
"""The torch that the tests of this module ran with."""


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
            fix=f"pip install --upgrade graphcomp, or the torch of its tests: pip install 'torch=={TESTED}.*'",
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

# Multiply matrices of int8 to int32, by kernels that use the integer units of a CPU. No public name yet; a public
# `torch.int_mm`, or `torch.mm` of int8 with an int32 result, would do.
with bound("torch._int_mm"):
    int_mm = torch._int_mm

# Multiply by integer weights, by torch's own kernels for CPUs: codes of eight bits with exact sums, and codes of four
# bits in bfloat16. No public names: torch offers the kernels through torchao's tensors and
# torch.compile alone. The layout of what is packed belongs to the kernel.
with bound("torch.ops.onednn.qlinear_prepack", "torch.ops.onednn.qlinear_pointwise"):
    pack_int8 = torch.ops.onednn.qlinear_prepack
    int8_products = torch.ops.onednn.qlinear_pointwise
with bound("torch._weight_int4pack_mm_for_cpu", "torch._convert_weight_to_int4pack_for_cpu"):
    int4_products = torch.ops.aten._weight_int4pack_mm_for_cpu.default
    pack_int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default

# Make a tensor that stands for others: shape, dtype and device of a weight in floats, and integers inside. Subclasses
# with a memory of their own are made by the public `Tensor.as_subclass`; one without has no public name.
with bound("torch.Tensor._make_wrapper_subclass"):
    make_wrapper = Tensor._make_wrapper_subclass
with bound("torch.utils._python_dispatch.is_traceable_wrapper_subclass"):
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def stands_for_others(tensor: Tensor) -> bool:
    """Return whether a tensor has no memory of its own, and stands for others that are inside."""
    return bool(is_traceable_wrapper_subclass(tensor))


with bound("torch._C.DisableTorchFunctionSubclass"):
    without_torch_function = torch._C.DisableTorchFunctionSubclass

# ------------------------------------------------------------------------------------------------ fake tensors
# Compute shapes and dtypes without data, as torch.export does. The meta device is public, but forgets the device of a
# tensor and refuses ops of mixed devices.
with bound("torch._subclasses.fake_tensor.FakeTensorMode", "torch._subclasses.fake_tensor.FakeTensor"):
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
with bound("torch._C._functorch.get_unwrapped"):
    get_unwrapped = torch._C._functorch.get_unwrapped
with bound("torch._C._functorch.is_batchedtensor"):
    is_batchedtensor = torch._C._functorch.is_batchedtensor
with bound("torch._C._functorch.is_functorch_wrapped_tensor"):
    is_functorch_wrapped_tensor = torch._C._functorch.is_functorch_wrapped_tensor
with bound("torch._C._functorch.is_legacy_batchedtensor"):
    is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor

# Nest in the saved-tensor hooks of a caller: find the hooks in force, and why hooks are refused. Hooks are set by the
# public torch.autograd.graph.saved_tensors_hooks, which tells neither.
with bound("torch._C._autograd._saved_tensors_hooks_get_disabled_error_message"):
    saved_tensors_hooks_disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message
with bound("torch._C._autograd._top_saved_tensors_default_hooks"):
    top_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks

# ------------------------------------------------------------------------------------------------ lists of tensors
# Change a list of tensors by one call, not by a call for each tensor: quantizers are many and small. No public names;
# torch.optim uses the same ones (foreach=True).
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


# ------------------------------------------------------------------------------------------------ attributes of objects
# Read the schema of an op: names, defaults and types of arguments, and which of them are written. Public would be
# `OpOverload.schema`.
with bound("torch._ops.OpOverload._schema"):
    torch.ops.aten.relu.default._schema  # noqa: B018


def schema_of(op: Any) -> torch.FunctionSchema:
    """The schema of an op, which must be an OpOverload."""
    found: torch.FunctionSchema = op._schema
    return found


# Read how a graph is called. `fx.Graph.set_codegen` is public, a getter would have to be.
with bound("torch.fx.Graph._codegen"):
    fx.Graph()._codegen  # noqa: B018


def codegen_of(graph: fx.Graph) -> Any:
    """The code generator of a graph: of a class of its own where the graph takes nested values."""
    return graph._codegen


# Know whether two tensors live in the same memory. Public data_ptr() is 0 for all storages without data: fake, meta and
# empty ones.
with bound("torch.UntypedStorage._cdata"):
    torch.UntypedStorage._cdata  # noqa: B018


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that two storages share if and only if they are the same memory, while both live."""
    return int(storage._cdata)


# Notice that a tensor was written into. No public name; torch.autograd itself refuses stale tensors by this count.
with bound("torch.Tensor._version"):
    Tensor._version  # noqa: B018


def version_of(tensor: Tensor) -> int:
    """The number of in-place changes of a tensor and of all that share its memory by views."""
    return tensor._version


# Put tensors and children in place of others, None among them, in the order that they have, without the checks and
# hooks of setattr. Public `named_parameters(recurse=False)` and the like leave out None, and do not write.
with bound("torch.nn.Module._parameters", "torch.nn.Module._buffers", "torch.nn.Module._modules"):
    _MODULE = nn.Module()
    _MODULE._parameters, _MODULE._buffers, _MODULE._modules  # noqa: B018
MODULE_TABLES = ("_parameters", "_buffers", "_modules")
"""Attributes of a module that are tables of tensors and children."""


def parameter_table(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of the module itself by name; None for one that is left out."""
    return module._parameters


def buffer_table(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of the module itself by name; None for one that is left out."""
    return module._buffers


def module_table(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children of a module by name; None for one that is left out."""
    return module._modules


# Keep a buffer out of the state dict, and ask whether a buffer is. `register_buffer(persistent=False)` is public, a
# question would have to be.
with bound("torch.nn.Module._non_persistent_buffers_set"):
    _MODULE._non_persistent_buffers_set  # noqa: B018


def non_persistent(module: nn.Module) -> set[str]:
    """Names of the buffers of the module itself that stay out of the state dict."""
    return module._non_persistent_buffers_set


# Know whether a module has hooks of the user, and which of its attributes are torch's own. Public would be a question.
MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module that hold hooks of a forward or a backward pass."""
HOOK_PREFIXES = ("_forward", "_backward")
"""Beginnings of attributes of a module that hold hooks, or what torch.compile and wrappers put over a forward."""
with bound(*(f"torch.nn.Module.{name}" for name in MODULE_HOOKS)):
    [getattr(_MODULE, name) for name in MODULE_HOOKS]


# Keep the list of weights that a recurrent layer has beside the weights. `setattr` keeps the list by itself; weights
# that are put in place otherwise do not. Public `flatten_parameters` works on the old list.


def refresh_flat_weights(module: nn.Module) -> None:
    """Set the list of weights of a recurrent layer to the weights."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def inside_wrapper(module: nn.Module) -> nn.Module | None:
    """The module inside of torch.compile's or DataParallel's; None where there is none.

    `module` of DataParallel is public, `_orig_mod` of torch.compile is not.
    """
    return module._modules.get("_orig_mod") or module._modules.get("module")


# ------------------------------------------------------------------------------------------------ names of modules
# Keep quiet what torch logs on the way to an error that graphcomp raises itself, or tries another way for. Loggers have
# the names of the modules that log; torch._logging has no switch for one call.
FAKE_TENSOR_LOGGER = "torch._subclasses.fake_tensor"
PRIVATE_LOGGERS = ("torch._export.non_strict_utils", FAKE_TENSOR_LOGGER)
"""Loggers of torch.export beside the public ones."""

# Register the ops `quantized_decomposed` that torch.export writes for quantized models. The ops are public, the module
# that registers the ops is not; graphcomp defines the ops where neither module is there.
DECOMPOSED_HOMES = ("torch.ao.quantization.fx._decomposed", "torchao.quantization.pt2e._decomposed")
"""Modules that register `quantized_decomposed`, the first one that is there."""


# ------------------------------------------------------------------------------------------------ caches
def forget_shape_environments() -> None:
    """Empty the caches that torch keeps on the methods of ShapeEnv.

    The caches hold the environments that the methods were called on, with all symbols and fake tensors of an export,
    for the life of the process.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # loads sympy

    for method in vars(ShapeEnv).values():
        found = method
        while found is not None:
            if hasattr(found, "cache_clear"):
                found.cache_clear()
            found = getattr(found, "__wrapped__", None)


# Let the source of a generated forward go with the code. torch.fx keeps the source of each GraphModule that there ever
# was, some ten for an export, in a table of its own and in linecache. Public would be a table that goes with the
# modules.
with bound("torch.fx.graph_module._loader.eval_cache", "torch.fx.graph_module._method_from_src"):
    torch.fx.graph_module._loader.eval_cache, torch.fx.graph_module._method_from_src  # noqa: B018

GENERATED = "<eval_with_key>"
"""Beginning of the file names that torch.fx gives to generated code."""


def forget_source_with(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that torch.fx generated; the source is forgotten when the code of the function is collected."""
    code: types.CodeType = function.__code__
    if code.co_filename.startswith(GENERATED):
        weakref.finalize(code, _forget_source, code.co_filename).atexit = False
    return function


def _forget_source(name: str) -> None:
    torch.fx.graph_module._loader.eval_cache.pop(name, None)
    linecache.cache.pop(name, None)


def sources_go_with_code() -> AbstractContextManager[None]:
    """Within, the source of each GraphModule that is made goes with the code of the module."""

    def make(before: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: forget_source_with(before(*args, **kwargs))

    return _replaced(torch.fx.graph_module, "_method_from_src", make)
