"""Ops that take statistics, with some indices left out: what they would give had the masked units never existed.

Each function takes a 0/1 `mask` that broadcasts with the input, then the op's own arguments. A mask dim is longer
than 1 only where the op reduces. A result stands in memory as that of the op, since views that follow need the layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _dims(dim: Any, rank: int) -> list[int]:
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return list(range(rank))
    return [d % rank for d in ([dim] if isinstance(dim, int) else dim)]


def _share(mask: Tensor) -> Tensor:
    """Fraction of the indices that count, as a scalar; never 0, so that no masked unit turns into NaN."""
    return mask.sum().clamp(min=1) / mask.numel()


def _as_suggested(result: Tensor, input: Tensor) -> Tensor:
    """Return `result` with channels last where the input has them so, else contiguous: as torch allocates outputs."""
    for rank, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if input.dim() == rank and not input.is_contiguous() and input.is_contiguous(memory_format=layout):
            return result.contiguous(memory_format=layout)
    return result.contiguous()


def mean(
    mask: Tensor, self: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Mean over the kept indices."""
    dims = _dims(dim, self.dim())
    return (self * mask).mean(dims, keepdim, dtype=dtype) / _share(mask).to(self.dtype)


def var(mask: Tensor, self: Tensor, dim: Any = None, correction: float | None = 1, keepdim: bool = False) -> Tensor:
    """Variance over the kept indices; `correction` is subtracted from their number."""
    dims = _dims(dim, self.dim())
    count = math.prod(self.shape[d] for d in dims) * _share(mask)
    centred = (self - mean(mask, self, dims, True)) * mask
    divisor = (count - (1 if correction is None else correction)).clamp(min=0)
    return centred.square().sum(dims, keepdim) / divisor.to(self.dtype)


def var_unbiased(mask: Tensor, self: Tensor, *args: Any, unbiased: bool = True, **kwargs: Any) -> Tensor:
    return var(mask, self, correction=int(unbiased), **kwargs)


def _root(variance: Tensor) -> Tensor:
    """Its square root, whose gradient at 0 is 0, as that of torch's deviations."""
    flat = variance == 0
    return torch.where(flat, 0, torch.where(flat, 1, variance).sqrt())


def std(mask: Tensor, self: Tensor, **kwargs: Any) -> Tensor:
    """Standard deviation over the kept indices."""
    return _root(var(mask, self, **kwargs))


def std_unbiased(mask: Tensor, self: Tensor, **kwargs: Any) -> Tensor:
    return _root(var_unbiased(mask, self, **kwargs))


def var_mean(
    mask: Tensor, self: Tensor, dim: Any = None, correction: float | None = 1, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Both, as aten.var_mean."""
    return var(mask, self, dim, correction, keepdim), mean(mask, self, dim, keepdim)


def var_mean_unbiased(mask: Tensor, self: Tensor, *, unbiased: bool = True, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return var_mean(mask, self, correction=int(unbiased), **kwargs)


def std_mean(
    mask: Tensor, self: Tensor, dim: Any = None, correction: float | None = 1, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Both, as aten.std_mean."""
    return _root(var(mask, self, dim, correction, keepdim)), mean(mask, self, dim, keepdim)


def std_mean_unbiased(mask: Tensor, self: Tensor, *, unbiased: bool = True, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return std_mean(mask, self, correction=int(unbiased), **kwargs)


def _filled(mask: Tensor, x: Tensor, value: float) -> Tensor:
    return x.masked_fill(mask == 0, value)


def amax(mask: Tensor, self: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    """The largest of the kept indices."""
    return aten.amax.default(_filled(mask, self, -math.inf), _dims(dim, self.dim()), keepdim)  # type: ignore[no-any-return]


def amin(mask: Tensor, self: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    """The smallest of the kept indices."""
    return aten.amin.default(_filled(mask, self, math.inf), _dims(dim, self.dim()), keepdim)  # type: ignore[no-any-return]


def max_dim(mask: Tensor, self: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The largest of the kept indices, and where it stands among all."""
    return torch.max(_filled(mask, self, -math.inf), dim, keepdim)


def min_dim(mask: Tensor, self: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The smallest of the kept indices, and where it stands among all."""
    return torch.min(_filled(mask, self, math.inf), dim, keepdim)


def aminmax(mask: Tensor, self: Tensor, *, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Both extremes of the kept indices."""
    return amin(mask, self, dim, keepdim), amax(mask, self, dim, keepdim)


def logsumexp(mask: Tensor, self: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    """log Σ exp over the kept indices."""
    return torch.logsumexp(_filled(mask, self, -math.inf), _dims(dim, self.dim()), keepdim)


def layer_norm(
    mask: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Layer norm whose mean and variance are those of the kept indices."""
    return native_layer_norm(mask, input, normalized_shape, weight, bias, eps)[0]


def native_layer_norm(
    mask: Tensor, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm with its mean and reciprocal deviation, as aten.native_layer_norm."""
    dims = list(range(input.dim() - len(normalized_shape), input.dim()))
    centre = mean(mask, input, dims, True)
    scale = torch.rsqrt(var(mask, input, dims, 0, True) + eps)
    return _affine((input - centre) * scale, weight, bias).contiguous(), centre, scale


def rms_norm(
    mask: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """RMS norm over the kept indices."""
    return _fused_rms_norm(mask, input, normalized_shape, weight, eps)[0]


def _fused_rms_norm(
    mask: Tensor, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """RMS norm with its reciprocal root mean square, as aten._fused_rms_norm."""
    dims = list(range(input.dim() - len(normalized_shape), input.dim()))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    scale = torch.rsqrt(mean(mask, input.square(), dims, True) + eps)
    return _as_suggested(_affine(input * scale, weight, None), input), scale


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def batch_norm(
    mask: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Standardize a weight (1, c, …): mean and variance of each channel over the kept indices of all other dims."""
    return _as_suggested(_per_channel(mask, input, [0, *range(2, input.dim())], weight, bias, eps), input)


def instance_norm(
    mask: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Standardize a weight (n, c, …): mean and variance of each channel of each n over the kept indices."""
    return _per_channel(mask, input, list(range(2, input.dim())), weight, bias, eps).contiguous()


def _per_channel(
    mask: Tensor, input: Tensor, dims: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    scale = torch.rsqrt(var(mask, input, dims, 0, True) + eps)
    shape = (1, input.shape[1], *[1] * (input.dim() - 2))
    affine = (None if own is None else own.reshape(shape) for own in (weight, bias))
    return _affine((input - mean(mask, input, dims, True)) * scale, *affine)


def group_norm(
    mask: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Group norm over the kept channels of each group; `mask` has length 1 but for dim 1."""
    return _group_norm(mask, input, num_groups, weight, bias, eps)[0]


def native_group_norm(
    mask: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Group norm with its mean and reciprocal deviation (n, groups), as aten.native_group_norm."""
    return _group_norm(mask, input, group, weight, bias, eps)


def _group_norm(
    mask: Tensor, input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, c = input.shape[:2]
    x = input.reshape(n, groups, c // groups, -1)
    m = mask.reshape(1, groups, c // groups, 1).to(input.dtype)
    count = (m.sum((2, 3), keepdim=True) * x.shape[-1]).clamp(min=1)  # an emptied group must not yield NaN
    centre = (x * m).sum((2, 3), keepdim=True) / count
    spread = ((x - centre) * m).square().sum((2, 3), keepdim=True) / count
    scale = torch.rsqrt(spread + eps)
    y = ((x - centre) * scale).reshape(input.shape)
    shape = (1, c, *[1] * (input.dim() - 2))
    y = _affine(y, None if weight is None else weight.reshape(shape), None if bias is None else bias.reshape(shape))
    return y, centre.flatten(1), scale.flatten(1)
