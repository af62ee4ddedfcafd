"""N:M masks made and used in one pass: torch operators on a compiled kernel, or on PyTorch alone.

Groups are m consecutive elements along one axis. In each group the n of largest magnitude are kept:

- ties go to the lower index, and zeros of both signs are equal;
- NaN counts as larger than infinity, so that it stays and is seen;
- an axis that m does not divide ends as if padded with zeros: a shorter group of at most n elements
  is kept whole, and of a longer one n are kept.

The operators are ``torch.ops.secateur.nm_mask``, ``nm_apply``, ``nm_decay_`` and ``nm_part_``.
``torch.compile`` and ``torch.export`` take them as they are, without a graph break; a process that
loads an exported program imports this module first. They run on the compiled kernel for float32,
float16, bfloat16 and float64 on the CPU (those that end in ``_`` for float32), and else, or where
the kernel was not built, on :mod:`secateur.kernels.twin`, with the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.kernels import native, twin

__all__ = ["nm_apply", "nm_decay_", "nm_mask", "nm_part_"]


def nm_mask(weight: Tensor, n: int, m: int, axis: int = 1) -> Tensor:
    """Mark the n largest magnitudes of each m elements along an axis.

    Args:
        weight: floating point, at least one dimension, any strides.
        n: elements kept of each group.
        m: elements of a group, more than ``n``.
        axis: along which groups run; 1 is the input of linear and convolution weights.

    Returns:
        Boolean, of the shape of ``weight``.

    Raises:
        SecateurError: an argument is out of range.
    """
    mask: Tensor = _mask(weight, n, m, axis)
    return mask


def nm_apply(weight: Tensor, n: int, m: int, axis: int = 1) -> Tensor:
    """Return the weight with zeros where :func:`nm_mask` is false. No zero of it is negative.

    Its derivative is the mask; a straight-through estimator is the caller's business. Arguments and
    errors are those of :func:`nm_mask`.
    """
    result: Tensor = _apply(weight, n, m, axis)
    return result


def nm_decay_(
    target: Tensor, weight: Tensor, n: int, m: int, axis: int = 1, *, decay: float
) -> None:
    """Add ``decay * weight`` to a target, in place, where :func:`nm_mask` of the weight is false.

    With a gradient as the target this is the term of SR-STE; with the weight itself and a negative
    ``decay`` it shrinks the weights that are not kept. What is kept is not touched. No autograd.

    Args:
        target: of the shape and dtype of ``weight``; the weight itself, or of other memory.
        weight: as in :func:`nm_mask`, and so are ``n``, ``m`` and ``axis``.
        decay: factor, rounded to the precision in which the dtype is computed.

    Raises:
        SecateurError: an argument is out of range, or the target does not fit the weight.
    """
    _decay(target.detach(), weight.detach(), n, m, axis, decay)


def nm_part_(
    weight: Tensor,
    rest: Tensor,
    mask: Tensor,
    n: int,
    m: int,
    axis: int = 1,
    *,
    factor: float = 1.0,
) -> None:
    """Take ``weight + factor * rest`` apart, in place: what :func:`nm_apply` keeps, and all else.

    A step of training that has changed the weights in use is so brought to all of them, and the
    choice made anew. No autograd.

    Args:
        weight: as in :func:`nm_mask`, and so are ``n``, ``m`` and ``axis``; gets what is kept.
        rest: of the shape and dtype of ``weight``, of other memory; gets what is not kept.
        mask: boolean, of the same shape; gets where ``weight`` is not 0 then.
        factor: rounded to the precision in which the dtype is computed.

    Raises:
        SecateurError: an argument is out of range, or tensors do not fit the weight.
    """
    _part(weight.detach(), rest, mask, n, m, axis, factor)


@torch.library.custom_op(
    "secateur::nm_mask", mutates_args=(), schema="(Tensor weight, int n, int m, int axis) -> Tensor"
)
def _mask(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    axis = _checked(weight, n, m, axis)
    weight = _dense(weight)
    if not native.serves(weight, m):
        return twin.nm_mask(weight, n, m, axis)
    mask = torch.empty_like(weight, dtype=torch.bool)
    native.run(native.MASK, weight, mask, n, m, axis)
    return mask


@torch.library.custom_op(
    "secateur::nm_apply",
    mutates_args=(),
    schema="(Tensor weight, int n, int m, int axis) -> Tensor",
)
def _apply(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    axis = _checked(weight, n, m, axis)
    weight = _dense(weight)
    if not native.serves(weight, m):
        return twin.nm_apply(weight, n, m, axis)
    result = torch.empty_like(weight)
    native.run(native.APPLY, weight, result, n, m, axis)
    return result


@torch.library.custom_op(
    "secateur::nm_decay_",
    mutates_args=("target",),
    schema="(Tensor(a!) target, Tensor weight, int n, int m, int axis, float decay) -> ()",
)
def _decay(target: Tensor, weight: Tensor, n: int, m: int, axis: int, decay: float) -> None:
    axis = _checked(weight, n, m, axis)
    _fits(target, weight, "target")
    alike = _is_dense(weight) and target.stride() == weight.stride()
    if alike and weight.dtype == torch.float32 and native.serves(weight, m):
        native.run(native.DECAY, weight, target, n, m, axis, decay)
    else:
        twin.nm_decay_(target, weight, n, m, axis, decay)


@torch.library.custom_op(
    "secateur::nm_part_",
    mutates_args=("weight", "rest", "mask"),
    schema="(Tensor(a!) weight, Tensor(b!) rest, Tensor(c!) mask, int n, int m, int axis, "
    "float factor) -> ()",
)
def _part(
    weight: Tensor, rest: Tensor, mask: Tensor, n: int, m: int, axis: int, factor: float
) -> None:
    axis = _checked(weight, n, m, axis)
    _fits(rest, weight, "rest")
    _fits(mask, weight, "mask", torch.bool)
    alike = _is_dense(weight) and weight.stride() == rest.stride() == mask.stride()
    if alike and weight.dtype == torch.float32 and native.serves(weight, m):
        native.part(weight, rest, mask, n, m, axis, factor)
    else:
        twin.nm_part_(weight, rest, mask, n, m, axis, factor)


@_mask.register_fake
def _(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    _checked(weight, n, m, axis)
    return torch.empty_like(weight, dtype=torch.bool)


@_apply.register_fake
def _(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    _checked(weight, n, m, axis)
    return torch.empty_like(weight)


@_decay.register_fake
def _(target: Tensor, weight: Tensor, n: int, m: int, axis: int, decay: float) -> None:
    _checked(weight, n, m, axis)
    _fits(target, weight, "target")


@_part.register_fake
def _(weight: Tensor, rest: Tensor, mask: Tensor, n: int, m: int, axis: int, factor: float) -> None:
    _checked(weight, n, m, axis)
    _fits(rest, weight, "rest")
    _fits(mask, weight, "mask", torch.bool)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, *ctx.pattern = inputs
    ctx.save_for_backward(weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    return torch.where(_mask(weight, *ctx.pattern), grad, 0), None, None, None


_apply.register_autograd(_backward, setup_context=_save)


def _checked(weight: Tensor, n: int, m: int, axis: int) -> int:
    """Return the axis counted from the front, or raise what is wrong with the arguments."""
    if not weight.is_floating_point():
        raise SecateurError(f"weight: it is {weight.dtype}; give a floating point tensor.")
    if weight.layout != torch.strided:
        raise SecateurError(f"weight: its layout is {weight.layout}; give a strided tensor.")
    if not 1 <= n < m:
        raise SecateurError(f"n: {n} of m: {m} cannot be kept; give 1 <= n < m.")
    if not -weight.ndim <= axis < weight.ndim:
        raise SecateurError(
            f"axis: {axis} is not one of a weight of shape {tuple(weight.shape)}; "
            f"give {-weight.ndim} to {weight.ndim - 1}."
            if weight.ndim
            else "weight: a scalar has no axis; give a tensor of one dimension or more."
        )
    return axis % weight.ndim


def _fits(other: Tensor, weight: Tensor, name: str, dtype: torch.dtype | None = None) -> None:
    """Raise if a tensor is not of the shape, device and dtype, by default, of the weight."""
    expected = (weight.shape, dtype or weight.dtype, weight.device)
    if (other.shape, other.dtype, other.device) != expected:
        raise SecateurError(
            f"{name}: {other.dtype} of shape {tuple(other.shape)} on {other.device} does not "
            f"fit the weight, {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}."
        )


def _dense(weight: Tensor) -> Tensor:
    """Return the weight, as a copy if its elements do not fill one stretch of memory."""
    return weight if _is_dense(weight) else torch.empty_like(weight).copy_(weight)


def _is_dense(weight: Tensor) -> bool:
    """Say whether elements fill one stretch of memory, dimensions in any order."""
    expected = 1
    for stride, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
