"""What graphcomp relies on of each private name of torch, and that one file alone binds the names."""

import re
from collections import namedtuple

import pytest
import torch
from torch import nn

import graphcomp as gc
from graphcomp.torch_compat import bound, pytree


def test_a_name_that_torch_lacks_is_an_import_error_with_the_version_the_name_and_a_fix():
    with pytest.raises(ImportError) as caught, bound("torch._C._gone"):
        torch._C._gone  # noqa: B018
    assert isinstance(caught.value, gc.TorchError)
    message = str(caught.value)
    assert re.search(rf"torch {re.escape(torch.__version__)} has no torch._C._gone", message)
    assert "fix:" in message and "torch_compat.py" in message


Pair = namedtuple("Pair", "left right")


def test_pytree_flattens_in_the_order_of_the_containers_and_back():
    tree = {"b": [1, (2, None)], "a": Pair(3, 4)}
    leaves, spec = pytree.tree_flatten(tree)
    assert leaves == [1, 2, None, 3, 4]
    assert pytree.tree_unflatten(leaves, spec) == tree
    assert spec.num_leaves == 5 and spec.type is dict and spec.context == ["b", "a"]
    assert spec == pytree.tree_structure(pytree.tree_map(str, tree)) != pytree.tree_structure([1])
    assert pytree.treespec_loads(pytree.treespec_dumps(pytree.tree_structure((1, {"a": [2]})))).num_leaves == 2


def test_pytree_describes_the_inputs_and_outputs_of_exported_programs():
    exported = torch.export.export(nn.Identity(), (torch.ones(2),), strict=False)
    assert exported.call_spec.in_spec == pytree.tree_structure(((torch.ones(2),), {}))
