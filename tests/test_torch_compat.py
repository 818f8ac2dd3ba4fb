"""What graphcomp relies on of each private name of torch, and that one file alone binds the names."""

import ast
import gc as collector
import importlib
import linecache
import logging
import re
import runpy
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import sympy
import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import graphcomp as gc
from benchmarks.house import private_attributes, private_names
from graphcomp import torch_compat
from graphcomp.torch_compat import (
    DECOMPOSED_HOMES,
    FAKE_TENSOR_LOGGER,
    HOOK_PREFIXES,
    MODULE_HOOKS,
    MODULE_TABLES,
    PRIVATE_LOGGERS,
    BatchNormBase,
    ConvBase,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    NormBase,
    OpOverload,
    OpOverloadPacket,
    PyTreeCodeGen,
    PyTreeInfo,
    TorchDispatchMode,
    bound,
    buffer_table,
    causal_mask_test,
    codegen_of,
    foreach_add_,
    foreach_clamp_max_,
    foreach_clamp_min_,
    foreach_copy_,
    foreach_zero_,
    forget_shape_environments,
    forget_source_with,
    get_unwrapped,
    inside_wrapper,
    int4_products,
    int8_products,
    int_mm,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    make_wrapper,
    module_table,
    non_persistent,
    number_of_dispatch_modes,
    pack_int4,
    pack_int8,
    parameter_table,
    pytree,
    refresh_flat_weights,
    saved_tensors_hooks_disabled,
    schema_of,
    sources_go_with_code,
    stands_for_others,
    storage_key,
    takes_numbers_as_tensors,
    target_format,
    top_saved_tensors_hooks,
    transforms_active,
    tree_flatten_spec,
    version_of,
    without_torch_function,
)

aten = torch.ops.aten
PACKAGE = Path(gc.__file__).parent


# ------------------------------------------------------------------------------------------------ one file
def test_no_other_file_of_the_package_uses_a_private_name_of_torch():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        tree = _tree(path)
        found[path.relative_to(PACKAGE).as_posix()] = {*private_names(tree), *private_attributes(tree)}
    assert found.pop("torch_compat.py")
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch._check(True)",
        "import torch.utils._pytree as pytree",
        "from torch.utils import _pytree as pytree",
        "from torch._ops import OpOverload",
        "from torch import fx as f\nf.graph._format_target",
        "from torch import Tensor\nTensor._make_subclass(Tensor, x)",
        "import torch.nn.functional as F\nF._verify_batch_size((1,))",
    ],
)
def test_each_way_to_a_private_name_is_seen(code):
    assert len(set(private_names(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    "code", ["import torch\ntorch.ops.aten._softmax.default", "x = y._private", "import torch\ntorch.__version__"]
)
def test_ops_and_names_of_others_are_not_taken_for_private_names(code):
    assert not set(private_names(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "op._schema",
        "graph._codegen",
        "f(x).storage()._cdata",
        "getattr(module, '_modules')",
        "'torch._ops'",
        "x._version",
    ],
)
def test_private_attributes_of_objects_of_torch_are_seen(code):
    assert len(set(private_attributes(ast.parse(code)))) == 1


@pytest.mark.parametrize("code", ["self._parameters", "super()._apply(f)", "aten._softmax", "x._ours", "x.__dict__"])
def test_attributes_of_others_are_not_taken_for_those_of_torch(code):
    assert not set(private_attributes(ast.parse(code)))


def test_every_binding_is_listed_and_has_a_test():
    private = set(private_names(_tree(PACKAGE / "torch_compat.py")))
    guarded = set(re.findall(r'"(torch\.[\w.]+)"', (PACKAGE / "torch_compat.py").read_text()))
    assert {name for name in private if not any(name.startswith(guard) for guard in guarded)} == set()
    tested = {node.id for node in ast.walk(_tree(Path(__file__))) if isinstance(node, ast.Name)}
    assert set(torch_compat.__all__) <= tested


def test_a_name_that_torch_lacks_is_an_import_error_with_the_version_the_name_and_a_fix():
    with pytest.raises(ImportError) as caught, bound("torch._C._gone"):
        torch._C._gone  # noqa: B018
    assert isinstance(caught.value, gc.TorchError)
    message = str(caught.value)
    assert f"torch {torch.__version__} has no torch._C._gone" in message
    assert f"pip install 'torch=={torch_compat.TESTED}.*'" in message and "torch_compat.py" in message


def test_the_torch_that_is_named_as_tested_is_this_one():
    assert torch.__version__.startswith(f"{torch_compat.TESTED}."), "set TESTED once the tests of this file pass"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch, "_foreach_zero_"),
        (torch._C, "_len_torch_dispatch_stack"),
        (torch._C._functorch, "get_unwrapped"),
        (torch.fx.graph, "_PyTreeInfo"),
        (torch.nn.modules.transformer, "_detect_is_causal_mask"),
        (torch._subclasses.fake_tensor, "FakeTensorMode"),
    ],
)
def test_importing_says_which_name_is_gone(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    with pytest.raises(gc.TorchError, match=rf"has no .*{name}|cannot import name '{name}'"):
        runpy.run_path(str(PACKAGE / "torch_compat.py"))


def _tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------ nested values
Pair = namedtuple("Pair", "left right")


def test_pytree_flattens_in_the_order_of_the_containers_and_back():
    tree = {"b": [1, (2, None)], "a": Pair(3, 4)}
    leaves, spec = pytree.tree_flatten(tree)
    assert leaves == [1, 2, None, 3, 4] == pytree.tree_leaves(tree)
    assert pytree.tree_unflatten(leaves, spec) == tree
    assert spec.num_leaves == 5 and spec.type is dict and spec.context == ["b", "a"]
    assert spec == pytree.tree_structure(pytree.tree_map(str, tree)) != pytree.tree_structure([1])
    assert pytree.tree_map_only(int, lambda x: -x, tree) == {"b": [-1, (-2, None)], "a": Pair(-3, -4)}


def test_pytree_writes_specs_as_json():
    spec = pytree.tree_structure((1, {"a": [2]}))
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    assert isinstance(pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE, dict)


def test_pytree_describes_the_inputs_and_outputs_of_exported_programs():
    exported = torch.export.export(nn.Identity(), (torch.ones(2),), strict=False)
    assert exported.call_spec.in_spec == pytree.tree_structure(((torch.ones(2),), {}))


def test_tree_flatten_spec_takes_keywords_in_any_order():
    spec = pytree.tree_structure(((1,), {"x": 2, "y": [3]}))
    assert tree_flatten_spec(((10,), {"y": [30], "x": 20}), spec) == [10, 20, 30]


def test_a_graph_with_the_code_generator_for_nested_values_takes_and_returns_nested_values():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output([graph.call_function(torch.sub, (x, y))])
    info = PyTreeInfo(["pair"], pytree.tree_structure((((1, 2),), {})), pytree.tree_structure({"out": 1}))
    graph.set_codegen(PyTreeCodeGen(info))
    module = fx.GraphModule(nn.Module(), graph)
    assert module((torch.tensor(5), torch.tensor(3))) == {"out": torch.tensor(2)}
    assert (info.orig_args, info.in_spec.num_leaves, info.out_spec.context) == (["pair"], 2, ["out"])


# ------------------------------------------------------------------------------------------------ ops
def test_ops_of_exported_graphs_are_overloads_with_a_schema_and_a_namespace():
    exported = torch.export.export(nn.ReLU(), (torch.ones(2),), strict=False)
    [op] = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert isinstance(op, OpOverload) and op is aten.relu.default
    assert op.namespace == "aten" and not isinstance(torch.relu, OpOverload)


def test_packets_hold_their_overloads():
    assert isinstance(aten.add, OpOverloadPacket) and not isinstance(aten.add.Tensor, OpOverloadPacket)
    assert aten.add.Tensor.overloadpacket is aten.add and "Tensor" in aten.add.overloads()


def test_higher_order_ops_are_no_overloads():
    assert isinstance(torch.ops.higher_order.cond, HigherOrderOperator)
    assert not isinstance(torch.ops.higher_order.cond, OpOverload)
    assert not isinstance(aten.add.Tensor, HigherOrderOperator)


def test_add_takes_numbers_as_tensors_and_relu_does_not():
    assert takes_numbers_as_tensors("add") and not takes_numbers_as_tensors("relu")


# ------------------------------------------------------------------------------------------------ fake tensors
def test_int_mm_multiplies_codes_of_eight_bits_to_exact_sums():
    rows = torch.randint(-128, 128, (3, 300), dtype=torch.int8)
    for matrix in (torch.randint(-128, 128, (300, 5), dtype=torch.int8), torch.ones(5, 300, dtype=torch.int8).t()):
        found = int_mm(rows, matrix)
        assert found.dtype is torch.int32
        assert torch.equal(found.to(torch.int64), rows.to(torch.int64) @ matrix.to(torch.int64))
    assert int_mm(rows[:1], matrix).shape == (1, 5)


def test_packed_codes_of_eight_bits_are_multiplied_by_bytes_to_exact_sums_and_come_back():
    codes = torch.randint(-127, 128, (5, 300), dtype=torch.int8)
    rows = torch.randint(0, 128, (3, 300), dtype=torch.uint8)
    packed, ones = pack_int8(codes, None), torch.ones(5)
    zeros = torch.zeros(5, dtype=torch.int32)
    sums = int8_products(rows, 1.0, 64, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    assert torch.equal(sums.double(), (rows.double() - 64) @ codes.double().t())
    assert torch.equal(packed.to_dense().t(), codes)


def test_packed_codes_of_four_bits_are_multiplied_with_scales_of_groups():
    codes = torch.randint(-8, 8, (16, 64))
    scales = torch.stack([torch.full((2, 16), 0.5), torch.zeros(2, 16)], -1).bfloat16()
    rows = torch.eye(64, dtype=torch.bfloat16)
    found = int4_products(rows, pack_int4((codes + 8).int(), 1), 32, scales)
    assert torch.equal(found.double(), codes.double().t() / 2)


def test_a_wrapper_shows_a_shape_without_memory_and_functions_reach_the_ops():
    seen = []

    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            with without_torch_function():
                return func(*args, **(kwargs or {}))

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return torch.ones(())

        def __tensor_flatten__(self):
            return [], None

        @staticmethod
        def __tensor_unflatten__(inner, facts, size, stride):
            raise AssertionError

    wrapper = make_wrapper(Wrapper, (2, 3), dtype=torch.float16, device="cpu", requires_grad=False)
    assert (wrapper.shape, wrapper.dtype) == ((2, 3), torch.float16)
    seen.clear()
    torch.abs(wrapper)
    assert seen == [torch.abs, aten.abs.default]
    assert stands_for_others(wrapper) and not stands_for_others(torch.ones(2)) and not stands_for_others(nn.Parameter())


def test_fake_tensors_know_shapes_dtypes_and_devices_without_data():
    mode = FakeTensorMode()
    weight = mode.from_tensor(torch.ones(3, 4))
    with mode:
        result = aten.mm.default(weight, torch.empty(4, 2, dtype=torch.float32))
    assert isinstance(result, FakeTensor) and result.fake_mode is mode
    assert (result.shape, result.dtype, result.device) == ((3, 2), torch.float32, torch.device("cpu"))


def test_fake_tensors_say_when_a_value_or_a_shape_depends_on_data():
    mode = FakeTensorMode(shape_env=None)
    x = mode.from_tensor(torch.ones(3))
    with mode, pytest.raises(DataDependentOutputException):
        aten._local_scalar_dense.default(x)
    with mode, pytest.raises(DynamicOutputShapeException):
        aten.nonzero.default(x)


# ------------------------------------------------------------------------------------------------ interception
class _Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_aten_ops_of_a_forward_and_of_a_backward_pass():
    x = torch.ones(2, requires_grad=True)
    with _Ops() as ops:
        nn.Hardtanh()(x).sum().backward()
    assert aten.hardtanh.default in ops.seen and aten.hardtanh_backward.default in ops.seen
    assert all(isinstance(op, OpOverload) for op in ops.seen)


def test_dispatch_modes_are_counted():
    assert number_of_dispatch_modes() == 0
    with _Ops(), _Ops():
        assert number_of_dispatch_modes() == 2
    assert number_of_dispatch_modes() == 0


def test_transforms_are_active_inside_of_vmap_and_grad_alone():
    found = []

    def noted(x):
        found.append(transforms_active())
        return x.sum()

    torch.vmap(noted)(torch.ones(2, 3))
    torch.func.grad(noted)(torch.ones(3))
    assert found == [True, True] and not transforms_active()


def test_tensors_inside_of_transforms_are_known_and_unwrapped_to_all_elements():
    shapes = []

    def look(x):
        assert is_functorch_wrapped_tensor(x) and is_batchedtensor(x)
        shapes.append((x.shape, get_unwrapped(x).shape))
        return x

    torch.vmap(look)(torch.ones(2, 3))
    assert shapes == [((3,), (2, 3))]
    assert not is_functorch_wrapped_tensor(torch.ones(2)) and not is_batchedtensor(torch.ones(2))


def test_a_gradient_wrapper_is_no_batch():
    def look(x):
        assert is_functorch_wrapped_tensor(x) and not is_batchedtensor(x)
        return x.sum()

    torch.func.grad(look)(torch.ones(3))


def test_many_gradients_at_once_hold_legacy_batches():
    found = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            found.append(is_legacy_batchedtensor(gradient))
            return gradient * 2

    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(Look.apply(x), x, torch.eye(3), is_grads_batched=True)
    torch.autograd.grad(Look.apply(x), x, torch.ones(3))
    assert found == [True, False]


def test_the_saved_tensor_hooks_in_force_are_found():
    def pack(x):
        return x

    def unpack(x):
        return x

    assert top_saved_tensors_hooks(True) is None
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert top_saved_tensors_hooks(True) == (pack, unpack)


def test_the_reason_why_saved_tensor_hooks_are_refused_is_found():
    assert saved_tensors_hooks_disabled() is None
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert saved_tensors_hooks_disabled() == "not here"


# ------------------------------------------------------------------------------------------------ lists of tensors
def test_lists_of_tensors_change_in_place_by_one_call():
    tensors = [torch.tensor([-2.0, 2.0]), torch.tensor(4.0)]
    foreach_clamp_min_(tensors, -1.0)
    foreach_clamp_max_(tensors, 3.0)
    assert [t.tolist() for t in tensors] == [[-1.0, 2.0], 3.0]
    foreach_add_(tensors, [torch.ones(2), torch.tensor(1.0)])
    assert [t.tolist() for t in tensors] == [[0.0, 3.0], 4.0]
    foreach_copy_(tensors, [torch.zeros(2), torch.tensor(7.0)])
    assert [t.tolist() for t in tensors] == [[0.0, 0.0], 7.0]
    foreach_zero_(tensors)
    assert [t.tolist() for t in tensors] == [[0.0, 0.0], 0.0]


# ------------------------------------------------------------------------------------------------ modules
def test_every_convolution_derives_from_the_base_of_convolutions():
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    assert all(issubclass(kind, ConvBase) for kind in kinds) and not issubclass(nn.Linear, ConvBase)
    conv = nn.Conv2d(4, 6, 3, groups=2)
    assert isinstance(conv, ConvBase) and (conv.in_channels, conv.out_channels, conv.groups) == (4, 6, 2)


def test_every_batch_norm_derives_from_the_base_of_batch_norms():
    batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    assert all(issubclass(kind, BatchNormBase) for kind in batch)
    assert not any(issubclass(kind, BatchNormBase) for kind in instance)
    assert all(issubclass(kind, NormBase) for kind in (*batch, *instance)) and not issubclass(nn.LayerNorm, NormBase)
    norm = nn.BatchNorm2d(4, momentum=None)
    assert (norm.num_features, norm.momentum, norm.track_running_stats) == (4, None, True)


# ------------------------------------------------------------------------------------------------ functions of torch
def test_target_format_writes_the_code_of_graphs_inside_alone():
    graph = fx.Graph()
    graph.output(graph.get_attr("a.b"))
    plain = graph.python_code("self").src
    with target_format(lambda base, target: f"found({base}, {target!r})"):
        assert "found(self, 'a.b')" in graph.python_code("self").src
    assert graph.python_code("self").src == plain


def test_transformers_ask_the_causal_mask_test_inside_alone():
    layer = nn.TransformerEncoderLayer(4, 1, 4, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    x, mask = torch.ones(1, 3, 4), torch.zeros(3, 3)
    asked = []

    def make(otherwise):
        return lambda *args: asked.append(args) or otherwise(*args)

    with causal_mask_test(make):
        encoder(x, mask=mask, is_causal=False)
    assert asked and asked[0][0] is mask
    count = len(asked)
    encoder(x, mask=mask, is_causal=False)
    assert len(asked) == count


# ------------------------------------------------------------------------------------------------ attributes of objects
def test_a_schema_names_the_arguments_their_defaults_and_what_is_written():
    schema = schema_of(aten.add_.Tensor)
    assert (schema.name, schema.overload_name, schema.is_mutable) == ("aten::add_", "Tensor", True)
    assert [a.name for a in schema.arguments] == ["self", "other", "alpha"]
    assert [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write] == ["self"]
    alpha = schema.arguments[-1]
    assert alpha.kwarg_only and alpha.has_default_value() and alpha.default_value == 1
    assert str(schema.arguments[0].type) == "Tensor" and len(schema.returns) == 1
    assert schema_of(aten.relu.default).overload_name == "" and not schema_of(aten.relu.default).is_mutable
    assert schema_of(aten.view.default).returns[0].alias_info is not None


def test_the_code_generator_of_an_exported_graph_tells_how_the_graph_is_called():
    exported = torch.export.export(nn.Identity(), (torch.ones(2),), strict=False).module(check_guards=False)
    info = codegen_of(exported.graph).pytree_info
    assert info.in_spec.num_leaves == 1 and info.orig_args == ["input"]
    assert not hasattr(codegen_of(fx.Graph()), "pytree_info")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_of_one_memory_have_storages_of_one_key(device):
    x, y = torch.empty(4, device=device), torch.empty(4, device=device)
    assert storage_key(x.untyped_storage()) == storage_key(x[1:].untyped_storage())
    assert storage_key(x.untyped_storage()) != storage_key(y.untyped_storage())
    empty = torch.empty(0), torch.empty(0)
    assert storage_key(empty[0].untyped_storage()) != storage_key(empty[1].untyped_storage())


def test_the_version_counts_changes_in_place_through_views_too():
    x = torch.ones(4)
    before = version_of(x)
    x + 1
    assert version_of(x) == before
    x[:2].add_(1)
    assert version_of(x) > before


def test_tables_of_a_module_hold_none_and_take_what_is_put_there():
    module = nn.Linear(2, 3, bias=False)
    module.register_buffer("left_out", None)
    module.register_module("child", None)
    assert list(parameter_table(module)) == ["weight", "bias"] and parameter_table(module)["bias"] is None
    assert buffer_table(module) == {"left_out": None} and module_table(module) == {"child": None}
    parameter_table(module)["bias"] = nn.Parameter(torch.ones(3))
    buffer_table(module)["left_out"] = torch.ones(1)
    module_table(module)["child"] = nn.ReLU()
    assert list(module.state_dict()) == ["weight", "bias", "left_out"]
    assert torch.equal(module(torch.zeros(1, 2)), torch.ones(1, 3)) and isinstance(module.child, nn.ReLU)
    tables = (parameter_table(module), buffer_table(module), module_table(module))
    assert all(vars(module)[name] is table for name, table in zip(MODULE_TABLES, tables, strict=True))


def test_non_persistent_buffers_stay_out_of_the_state_dict():
    module = nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("gone", torch.ones(1), persistent=False)
    assert non_persistent(module) == {"gone"}
    non_persistent(module).add("kept")
    assert not module.state_dict()


def test_hooks_of_users_stand_in_the_attributes_for_hooks():
    module = nn.Linear(1, 1)
    assert not any(vars(module)[name] for name in MODULE_HOOKS)
    module.register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
    module.register_full_backward_hook(lambda *_: None)
    module.register_full_backward_pre_hook(lambda *_: None)
    assert all(vars(module)[name] for name in MODULE_HOOKS)
    assert all(name.startswith(HOOK_PREFIXES) for name in MODULE_HOOKS)


def test_recurrent_layers_read_their_list_of_weights():
    layer, x = nn.GRU(2, 3), torch.ones(1, 1, 2)
    vars(layer)["_parameters"]["weight_ih_l0"] = nn.Parameter(torch.zeros(9, 2))
    refresh_flat_weights(layer)
    other = nn.GRU(2, 3)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], other(x)[0])
    refresh_flat_weights(nn.Linear(1, 1))


def test_wrappers_hold_the_module_inside():
    linear = nn.Linear(1, 1)
    assert (
        inside_wrapper(torch.compile(linear, backend="eager")) is linear
        and inside_wrapper(nn.DataParallel(linear)) is linear
    )
    assert inside_wrapper(linear) is None


# ------------------------------------------------------------------------------------------------ names of modules
@pytest.mark.parametrize("name", PRIVATE_LOGGERS)
def test_loggers_of_torch_have_the_names_of_modules_that_log(name):
    module = importlib.import_module(name)
    assert module.log is logging.getLogger(name)


def test_fake_tensors_log_what_an_op_raises():
    assert FAKE_TENSOR_LOGGER in PRIVATE_LOGGERS


def test_a_module_of_torch_registers_the_ops_of_quantized_graphs():
    importlib.import_module(DECOMPOSED_HOMES[0])
    op = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    names = [a.name for a in schema_of(op).arguments]
    assert names == ["input", "scale", "zero_point", "quant_min", "quant_max", "dtype", "out_dtype"]


def test_forget_shape_environments():
    environment = ShapeEnv()
    environment.simplify(sympy.Integer(1) + sympy.Symbol("s"))  # cached on the method, with the environment
    alive = weakref.ref(environment)
    del environment
    collector.collect()
    assert alive() is not None
    forget_shape_environments()
    collector.collect()
    assert alive() is None


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2


def source_of(module):
    return "".join(linecache.getlines(type(module).forward.__code__.co_filename))


def test_the_source_of_a_generated_forward_goes_with_the_code():
    module = fx.symbolic_trace(Doubled())
    name = type(module).forward.__code__.co_filename
    assert forget_source_with(type(module).forward) is type(module).forward
    collector.collect()
    assert "x * 2" in source_of(module) and name in linecache.cache
    del module
    collector.collect()
    assert name not in linecache.cache and not linecache.getlines(name)
    assert torch.fx.graph_module._loader.get_source(name) is None


def test_sources_of_modules_that_are_made_within_go_with_their_code():
    kept = fx.symbolic_trace(Doubled())
    with sources_go_with_code():
        module = fx.symbolic_trace(Doubled())
    after = fx.symbolic_trace(Doubled())
    names = [type(own).forward.__code__.co_filename for own in (kept, module, after)]
    assert len(set(names)) == 3 and "x * 2" in source_of(module)
    del kept, module, after
    collector.collect()
    assert [bool(torch.fx.graph_module._loader.get_source(name)) for name in names] == [True, False, True]


def test_sources_of_files_are_left_alone():
    name = Doubled.forward.__code__.co_filename
    before = weakref.getweakrefcount(Doubled.forward.__code__)
    assert linecache.getlines(name) and forget_source_with(Doubled.forward) is Doubled.forward
    assert weakref.getweakrefcount(Doubled.forward.__code__) == before
