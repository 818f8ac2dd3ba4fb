"""Even levels piece by piece: the numbers of the ops on whole tensors, and when it steps aside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graphcomp.quantization.quantizers import blocked, geta, gradients
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.quantization.spec import QuantSpec

from .cases import pattern

LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(blocked, "PIECE", 100 // torch.get_num_threads())


def levels_of(d: Tensor, q_m: Tensor) -> blocked.Levels:
    return blocked.Levels.of(d.detach(), d.item(), q_m.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("d", "q_m"), [(0.03, 9.0), (0.03, 2.0), (0.5, 0.2), (1.0, 0.1)])
def test_the_numbers_of_whole_tensors(dtype, layout, d, q_m):
    """None, a few and most elements beyond; with a step of twice the range, no level but 0."""
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 26).to(dtype)).requires_grad_()
    x.data[0, 0, 0, :5] = torch.tensor([q_m, -q_m, 0.0, -0.0, d / 2]).to(dtype)
    own = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (d, q_m)]
    levels = levels_of(*own)
    result, beyond, peak = blocked.quantize(x.detach(), levels)
    whole = geta._Even.apply(x, *own)
    assert torch.equal(pattern(result), pattern(whole.detach())) and result.stride() == x.stride()
    assert len(beyond) == 7 and any(beyond) == bool((x.abs() > own[1]).any()) and peak == x.detach().abs().max()
    for arrange in (lambda t: t, LAYOUTS["channels last"]):
        upstream = arrange(torch.randn_like(x))
        grad_x, *rest = blocked.gradients(upstream, x.detach(), levels, beyond)
        wanted = torch.autograd.grad(whole, [x, *own], upstream, retain_graph=True)
        assert torch.equal(grad_x, wanted[0])
        torch.testing.assert_close(torch.tensor(rest).to(dtype), torch.stack(wanted[1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_on_the_host_are_those_of_tensors(dtype):
    """Ties among them: quotients of whole numbers and a half."""
    steps = ((1 - torch.rand(400)) * 10.0 ** torch.randint(-9, 9, (400,))).to(dtype)
    ranges = torch.cat(
        [steps[:200] * (torch.randint(0, 999, (200,)) + 0.5).to(dtype), steps[200:] * 300 * torch.rand(200).to(dtype)]
    )
    for d, q_m in zip(steps, ranges, strict=True):
        levels = levels_of(d, q_m)
        assert levels.most == (q_m / d).round().item()
        assert levels.above == torch.nextafter(q_m, torch.tensor(torch.inf, dtype=dtype)).item()


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_what_fits():
    x = torch.randn(2, 3, 4)
    assert blocked.fits(x) and blocked.fits(torch.nn.Parameter(x))
    assert blocked.fits(x.transpose(0, 2)) and blocked.fits(x[1])
    for other in (x[:, ::2], x[:, :1].expand(2, 3, 4), x[:0], x.to("meta")):
        assert not blocked.fits(other)
    seen = []

    def see(one: Tensor) -> Tensor:
        seen.append(blocked.fits(one))
        return one

    torch.vmap(see)(x)
    torch.jit.trace(see, (x,), check_trace=False)
    with Watch():
        seen.append(blocked.fits(x))
    assert seen == [False, False, False]


def build(q_m: float = 1.0) -> GetaQuantizer:
    quantizer = GetaQuantizer(QuantSpec(4, kind="geta"))
    quantizer.set_range(torch.tensor(-q_m), torch.tensor(q_m))
    return quantizer


def test_the_quantizer_goes_by_pieces_where_its_parameters_are_valid(monkeypatch):
    calls = []
    quantize = blocked.quantize
    monkeypatch.setattr(blocked, "quantize", lambda *given: calls.append(1) or quantize(*given))
    quantizer, x = build(), torch.randn(300)
    quantizer(x)
    assert len(calls) == 1
    quantizer.d.data.fill_(-1.0)
    assert quantizer(x).isfinite().all() and len(calls) == 1


@pytest.mark.parametrize("follow", [False, True])
def test_the_peak(follow):
    quantizer, x = build(), torch.randn(300)
    quantizer.follow = follow
    quantizer(x)
    assert quantizer.peak == (x.abs().max() if follow else 0)
    quantizer(x / 2)
    assert quantizer.peak == (x.abs().max() if follow else 0)


def test_many_gradients_at_once():
    """`is_grads_batched` hands the backward pass a batch of gradients that it cannot loop over."""
    quantizer, x = build(), torch.randn(300, requires_grad=True)
    upstream = torch.randn(3, 300)
    inputs = [x, quantizer.d, quantizer.q_m]
    at_once = torch.autograd.grad(quantizer(x), inputs, upstream, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(quantizer(x), inputs, one) for one in upstream]
    torch.testing.assert_close(at_once, tuple(map(torch.stack, zip(*one_by_one, strict=True))), rtol=1e-4, atol=1e-5)


def test_a_parameter_that_was_modified_before_the_backward_pass():
    quantizer, x = build(), torch.randn(300, requires_grad=True)
    loss = quantizer(x).sum()
    quantizer.d.data.mul_(1.0)  # .data hides it from autograd, by design
    quantizer.q_m.detach().mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("zero", "scale"), [(None, 0.3), (3.0, 0.3), (0.0, 0.1), (7.0, 1e-30)])
def test_levels_between_ends_are_those_of_whole_tensors(dtype, layout, zero, scale):
    """None, some and all elements beyond; elements on the ends count as inside, and 0 is never -0."""
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 26).to(dtype))
    own = [None if value is None else torch.tensor(value, dtype=dtype, requires_grad=True) for value in (scale, zero)]
    ends = [(end - (zero or 0)) * own[0].detach() for end in (-8, 7)]
    x[0, 0, 0, :5] = torch.stack([*ends, *(torch.tensor(v, dtype=dtype) for v in (0.0, -0.0, scale / 2))])
    x.requires_grad_()
    asked = [t for t in (x, *own) if t is not None]
    whole = gradients._FakeQuantize.apply(x, *own, -8, 7)
    result = gradients.fake_quantize(x, *own, -8, 7)
    assert type(result.grad_fn).__name__.startswith("_FakeQuantizeInPieces")
    assert torch.equal(pattern(result.detach()), pattern(whole.detach())) and result.stride() == x.stride()
    for arrange in (lambda t: t, LAYOUTS["channels last"]):
        upstream = arrange(torch.randn_like(x))
        found, wanted = (torch.autograd.grad(y, asked, upstream, retain_graph=True) for y in (result, whole))
        assert torch.equal(found[0], wanted[0])
        for a, b in zip(found[1:], wanted[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
