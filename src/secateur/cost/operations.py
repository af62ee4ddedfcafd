"""Which tensor operations multiply and accumulate, and which are free by convention.

Counted: products of matrices, convolutions and attention, as ``torch.utils.flop_counter`` knows
them (its figure is two per multiply-accumulate), and products of vectors.
Free: views, elementwise operations, normalization, pooling, resizing, reductions, softmax and data
movement. Whatever is in neither list is reported by name, never taken as zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_VECTOR_PRODUCTS = {"mv": 0, "addmv": 1, "dot": 0, "vdot": 0}
"""Operation -> position of the argument with one element per multiply-accumulate."""

_ADD_FIRST = frozenset({"addmm", "addmv", "baddbmm"})
"""Operations whose first argument is added to the product of the next two."""

_FREE_NAMES = """
native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
_batch_norm_no_update _batch_norm_with_update cudnn_batch_norm miopen_batch_norm
native_layer_norm native_group_norm _fused_rms_norm
avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices
_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d
upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
sum mean prod amax amin aminmax max min argmax argmin any all var var_mean std std_mean norm
linalg_vector_norm logsumexp nansum cumsum cumprod count_nonzero
_softmax _log_softmax _safe_softmax
empty empty_like empty_strided empty_permuted new_empty new_empty_strided new_zeros new_ones
new_full zeros zeros_like ones ones_like full full_like arange linspace eye scalar_tensor
rand rand_like randn randn_like randint randint_like bernoulli native_dropout
hardswish as_strided clone copy _to_copy _unsafe_view view_copy contiguous lift_fresh
lift_fresh_copy unsafe_split unsafe_chunk split_with_sizes_copy cat stack
repeat repeat_interleave roll flip rot90 tril triu tril_indices triu_indices constant_pad_nd
reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
replication_pad3d channel_shuffle native_channel_shuffle pixel_shuffle pixel_unshuffle
embedding gather index index_select index_put _unsafe_index masked_select scatter
slice_scatter select_scatter one_hot nonzero im2col col2im
zero fill resize set _local_scalar_dense item is_same_size equal
_assert_async _assert_tensor_metadata _reshape_alias unbind_copy split_copy
"""
_FREE = frozenset(_FREE_NAMES.split())


def macs_of(operation: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> int:
    """Return the multiply-accumulates of one executed operation.

    Raises:
        KeyError: the operation is not one that :func:`is_counted`.
    """
    from torch.utils.flop_counter import flop_registry

    packet = operation._overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*arguments, **keywords, out_val=out)) // 2
    vector = arguments[_VECTOR_PRODUCTS[packet.__name__]]
    return math.prod(vector.shape)


def is_counted(operation: Any) -> bool:
    """Say whether :func:`macs_of` knows this ``OpOverload``."""
    from torch.utils.flop_counter import flop_registry

    packet = operation._overloadpacket
    return packet in flop_registry or (
        operation.namespace == "aten" and packet.__name__ in _VECTOR_PRODUCTS
    )


def is_free(operation: Any) -> bool:
    """Say whether this ``OpOverload`` costs no multiply-accumulates by convention."""
    if operation.namespace in ("prim", "profiler"):
        return True
    if operation.is_view or torch.Tag.pointwise in operation.tags:
        return True
    name = operation._overloadpacket.__name__
    return operation.namespace == "aten" and (name in _FREE or name.removesuffix("_") in _FREE)


def operands(operation: Any, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Return what an operation that :func:`is_counted` multiplies, without biases.

    Each element of an operand takes part in equally many of the multiply-accumulates.
    """
    first = int(operation._overloadpacket.__name__ in _ADD_FIRST)
    return [value for value in arguments[first : first + 2] if isinstance(value, Tensor)]
