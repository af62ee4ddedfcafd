"""Rounding to a grid as fused autograd functions with closed-form straight-through gradients.

Autograd through ``clamp``, ``div``, ``round`` and ``mul`` keeps four temporaries of each activation
and walks through all of them again. These functions keep input and output, which the layers before
and behind keep anyway.

All of them take the grid as its step d > 0 and the largest input q > 0 that it reaches. With ``r``
for rounding to the nearest integer, ties to even, and x~ for the clipped (and warped) input:

    y = d r(x~ / d)

In the gradients rounding counts as the identity, so

    dy/dd = r(x~ / d) - x~ / d      everywhere, clipped or not

What is clipped has no gradient by x, and what is not has none by q. There is no inverse of the
warp: what is deployed is d times an integer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEAST_MAGNITUDE = 1e-8
"""Magnitudes below count as this where a logarithm or a negative power is taken."""


def quantize(
    x: Tensor, step: Tensor, limit: Tensor, power: Tensor | None = None, signed: bool = True
) -> Tensor:
    """Round to multiples of a step, after clipping and, if a power is given, warping.

    Args:
        x: any shape, floating point.
        step: d, of the warped values; a scalar, or of a shape that broadcasts to that of x.
        limit: q, the largest magnitude before the warp, of the shape of ``step``.
        power: t of the warp x~ = sgn(x) min(|x|, q)^t; None is 1 and costs nothing. With it the
            grid is signed.
        signed: whether values below zero have levels.

    Returns:
        The shape and dtype of x. The largest level is d r(q^t / d).
    """
    if torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (x, step, limit, power)
    ):
        if power is None:
            return _Uniform.apply(x, step, limit, signed)  # type: ignore[no-any-return]
        return _Power.apply(x, step, limit, power)  # type: ignore[no-any-return]
    if power is None:
        return _round_uniform(x, step, limit, signed)
    return _round_warped(x, step, limit, power)


def _round_uniform(x: Tensor, step: Tensor, limit: Tensor, signed: bool) -> Tensor:
    """Clip after rounding: the same, since rounding keeps order."""
    if _traced():
        most = torch.round(limit / step)
        levels = torch.minimum(torch.round(x / step), most)
        return (torch.maximum(levels, -most) if signed else torch.relu(levels)) * step
    d, q = _scalars(x, step, limit)
    highest = round(q / d) if isinstance(q, float) else torch.round(q / d)
    y: Tensor = (x / d).round_()  # in place from here on: memory traffic is what it costs
    return y.clamp_(-highest if signed else highest * 0, highest).mul_(d)


def _round_warped(x: Tensor, step: Tensor, limit: Tensor, power: Tensor) -> Tensor:
    warped = _warp(x, limit, power)
    return torch.round(warped / step) * step


def _warp(x: Tensor, limit: Tensor, power: Tensor) -> Tensor:
    magnitude: Tensor = torch.minimum(x.abs(), limit).clamp_min(LEAST_MAGNITUDE)
    return x.sign() * magnitude.pow(power)


class _Uniform(torch.autograd.Function):
    """y = d r(clip(x) / d), clipped to [-q, q], or to [0, q] where the grid is unsigned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, limit: Tensor, signed: bool) -> Tensor:
        y = _round_uniform(x, step, limit, signed)
        ctx.save_for_backward(x, y, step, limit)
        ctx.signed = signed
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, y, step, limit = ctx.saved_tensors
        _d, q = _scalars(x, step, limit)
        low = -q if ctx.signed else q * 0
        inside = _inside(g, x, low, q, ctx.signed)
        clipped = x.clamp(low, q)
        outside = g - inside
        by_limit = _summed(outside, clipped, limit) / limit
        by_step = -_summed(g, clipped.sub_(y), step) / step
        return inside, by_step, by_limit, None


def _scalars(x: Tensor, step: Tensor, limit: Tensor) -> tuple[Any, Any]:
    """Return both as numbers where that is faster: on a CPU, which has nothing to wait for."""
    if x.device.type == "cpu" and step.numel() == limit.numel() == 1 and not _traced():
        return float(step), float(limit)
    return step, limit


def _traced() -> bool:
    """Tell whether torch.export or torch.compile looks on, which know no numbers."""
    return bool(torch.compiler.is_compiling())


def _inside(g: Tensor, x: Tensor, low: Any, high: Any, signed: bool) -> Tensor:
    """Return the gradient where x is not clipped, else 0; 0 itself is not clipped."""
    if isinstance(high, float):  # in one pass
        low = low if signed else -torch.finfo(x.dtype).tiny
        return torch.ops.aten.hardtanh_backward(g, x, low, high)  # type: ignore[no-any-return]
    above = x > low if signed else x >= 0
    return torch.where(above & (x < high), g, 0.0)


def _summed(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Return the sum of a product in the shape of another tensor."""
    if like.numel() > 1:
        return (a * b).sum_to_size(like.shape)
    if a.stride() == b.stride() and (a.is_contiguous() or _channels_last(a)):
        flat = [each.as_strided((each.numel(),), (1,), each.storage_offset()) for each in (a, b)]
        return torch.dot(*flat).view(like.shape)
    return (a * b).sum().view(like.shape)


def _channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


class _Power(torch.autograd.Function):
    """y = d r(x~ / d) with x~ = sgn(x) min(|x|, q)^t. Gradients, inside and where clipped:

    dy/dq = 0                   sgn(x) t q^(t-1)
    dy/dt = sgn(x) |x|^t ln|x|  sgn(x) q^t ln q
    dy/dx = t |x|^(t-1)         0
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, limit: Tensor, power: Tensor) -> Tensor:
        y = _round_warped(x, step, limit, power)
        ctx.save_for_backward(x, y, step, limit, power)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, y, step, limit, power = ctx.saved_tensors
        magnitude = torch.minimum(x.abs(), limit).clamp_min(LEAST_MAGNITUDE)
        inside = x.abs() < limit
        warped = x.sign() * magnitude.pow(power)
        slope = power * magnitude.pow(power - 1)
        by_limit = (g * x.sign() * slope).masked_fill(inside, 0)
        by_power = g * warped * magnitude.log()
        by_step = g * (y - warped) / step
        return (
            g * slope * inside,
            by_step.sum_to_size(step.shape),
            by_limit.sum_to_size(limit.shape),
            by_power.sum_to_size(power.shape),
        )
