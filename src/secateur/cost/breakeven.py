"""When a structured network takes less storage than a sparser one without structure.

Ma et al., "Non-Structured DNN Weight Pruning: Is It Beneficial in Any Platform?" (1907.02124),
count n bits for each weight that is kept, and i more where its place must be stored. Of N weights
a structured network of ratio s then takes N n / s bits, one without structure N (n + i) / u.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secateur.codec import Quantized
from secateur.cost.encodings import ENCODINGS, Encoding
from secateur.errors import SecateurError, did_you_mean

ENTROPY = "entropy"
"""What :func:`index_bits` takes in place of an encoding for the bound of all of them."""


def break_even(ratio: float, bits: float, index_bits: float) -> float:
    """Return the structured ratio above which it beats a non-structured one: u n / (n + i).

    Args:
        ratio: u, weights per non-zero of the network without structure.
        bits: n, of each value, above 0.
        index_bits: i, per non-zero, from :func:`index_bits` or :func:`measured_index_bits`.
    """
    return ratio * bits / (bits + index_bits)


def index_bits(ratio: float, encoding: str | Encoding = ENTROPY, bits: float = 32) -> float:
    """Return the mean index bits per non-zero of a large random support, in closed form.

    Args:
        ratio: elements per non-zero, above 1.
        encoding: a name or an encoding; ``entropy`` is the fewest bits that any code can take.
        bits: of a value. They matter where zeros are stored, as a zero then costs as much.

    Raises:
        SecateurError: the ratio is not above 1, or the encoding is unknown or has no closed form.
    """
    if not 1 < ratio < math.inf:
        raise SecateurError(f"ratio: {ratio} is not above 1; give elements per non-zero.")
    if encoding == ENTROPY:
        return math.log2(ratio) - (ratio - 1) * math.log1p(-1 / ratio) / math.log(2)
    return find(encoding).expected_index_bits(ratio, bits)


def measured_index_bits(
    weight: Tensor, encoding: str | Encoding, quantized: Quantized | None = None
) -> float:
    """Return the bits per non-zero of a tensor beyond the values of its non-zeros.

    Stored zeros and wider values count; header, scale and padding do not.

    Args:
        weight: any shape, with a non-zero.
        encoding: a name or an encoding.
        quantized: the same tensor as levels and scale.

    Raises:
        SecateurError: the encoding is unknown, or the tensor has no non-zero.
        MembershipError: the tensor cannot be encoded so.
    """
    storage = find(encoding).storage(weight, quantized)
    nonzeros = int(torch.count_nonzero(weight))
    if not nonzeros:
        raise SecateurError("weight: all of it is zero, so there are no bits per non-zero.")
    bits = quantized.bits if quantized else 8 * weight.element_size()
    return (storage.values + storage.index) / nonzeros - bits


def find(encoding: str | Encoding) -> Encoding:
    """Return an encoding by its name, with its defaults.

    Raises:
        SecateurError: there is none of this name.
    """
    if isinstance(encoding, Encoding):
        return encoding
    if encoding not in ENCODINGS:
        raise SecateurError(
            f"encoding: there is no '{encoding}'.{did_you_mean(encoding, ENCODINGS)}\n"
            f"Encodings are {', '.join(ENCODINGS)}."
        )
    return ENCODINGS[encoding]()
