"""Copies of example inputs, and other inputs to compare a result on."""

import torch
from torch import nn

from graphcomp.capture.capture import capture
from graphcomp.capture.second_inputs import padded_masks, variants
from graphcomp.ir.inputs import copies


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, ids, mask, x):
        return self.last(self.table(ids) * mask.unsqueeze(-1)) + x.mean()


def named(model, *inputs):
    return {variant.name: variant for variant in variants(capture(model.eval(), inputs))}


def test_a_tensor_in_two_places_is_copied_once() -> None:
    x = torch.ones(2, requires_grad=True)
    found = copies({"a": [x, 3], "b": x, "c": torch.zeros(1)})
    assert found["a"][0] is found["b"] and found["b"] is not x
    assert found["b"].requires_grad and found["b"].grad_fn is None and found["a"][1] == 3


def test_objects_that_pytree_does_not_know_are_copied() -> None:
    class Cache:
        def __init__(self):
            self.keys = [torch.zeros(2)]

    cache = Cache()
    twin = copies((cache,))[0]
    twin.keys[0] += 1
    assert type(twin) is Cache and not cache.keys[0].any()


def test_values_stay_within_their_range() -> None:
    ids, mask = torch.randint(3, 9, (4, 6)), torch.ones(4, 6, dtype=torch.bool)
    x = torch.tensor([[0.0, -torch.inf, 0.0]] * 4)
    found = named(Reader(), ids, mask, x)["other values"].args
    assert found[0].sort(-1).values.equal(ids.sort(-1).values) and not found[0].equal(ids)
    assert found[1].equal(mask)
    assert found[2].isinf().sum() == 4 and found[2].isfinite().sum() == 8
    (floats,) = named(nn.Linear(8, 2), torch.rand(4, 8))["other values"].args
    assert floats.min() >= 0 and floats.max() <= 1 and floats.std() > 0.1
    (noise,) = named(nn.Linear(8, 2), torch.zeros(4, 8))["other values"].args
    assert noise.std() > 0.5


def test_sizes_that_the_graph_has_symbols_for_are_changed() -> None:
    ids, mask = torch.randint(0, 9, (4, 6)), torch.ones(4, 6, dtype=torch.long)
    found = named(Reader(), ids, mask, torch.rand(4, 3))
    assert [t.shape for t in found["another batch size"].args] == [(3, 6), (3, 6), (3, 3)]
    assert [t.shape for t in found["another length"].args] == [(4, 5), (4, 5), (4, 3)]
    padded = found["a padded mask"].args
    assert padded[0].equal(ids) and padded[1].sum(-1).tolist() == [6, 4, 6, 4]
    (one,) = named(nn.Linear(8, 2), torch.rand(1, 8))["another batch size"].args
    assert one.shape == (2, 8)


def test_a_batch_beyond_a_guard_is_not_taken() -> None:
    class Small(nn.Linear):
        def forward(self, x):
            return super().forward(x if x.shape[0] < 3 else x.flip(-1))

    assert "another batch size" not in named(Small(8, 2), torch.rand(2, 8))


def test_the_same_at_each_call_and_the_example_stays() -> None:
    x = torch.rand(4, 8)
    captured = capture(nn.Linear(8, 2).eval(), x)
    before = x.clone()
    first, second = variants(captured), variants(captured)
    assert all(a.args[0].equal(b.args[0]) for a, b in zip(first, second, strict=True))
    first[0].args[0].zero_()
    assert x.equal(before)


def test_tensors_without_values_have_no_variants() -> None:
    with torch.device("meta"):
        assert variants(capture(nn.Linear(8, 2).eval(), torch.rand(4, 8))) == []


class Pooled(nn.Module):
    """Takes two masks that the example leaves out: one counts, one is ignored; `masked_share` is no tensor."""

    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, ids, attention_mask=None, other_mask=None, masked_share=None):
        found = self.table(ids)
        if masked_share is not None:
            found = found * masked_share["value"]
        if attention_mask is not None:
            found = found * attention_mask[..., None]
        return self.last(found.mean(1))


def test_masks_that_the_example_leaves_out_are_tried() -> None:
    ids = torch.randint(0, 9, (4, 6))
    (found,) = padded_masks(capture(Pooled().eval(), ids))
    assert found.name == "a padded mask as attention_mask"
    assert found.kwargs["attention_mask"].sum(-1).tolist() == [6, 4, 6, 4]
    given = capture(Pooled().eval(), (ids, torch.ones(4, 6, dtype=torch.long)))
    assert padded_masks(given) == []
