"""The packed file's own record, as one more encoding to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur import codec
from secateur.codec import Quantized, Storage
from secateur.cost.encodings.base import Encoding, register


@register
@dataclass(frozen=True)
class Packed(Encoding):
    """The shortest record of docs/format.md. It keeps -0.0, as a value that is stored."""

    name: ClassVar[str] = "packed"

    def storage(self, weight: Tensor, quantized: Quantized | None = None) -> Storage:
        """Count the record; see :meth:`Encoding.storage`."""
        return codec.storage(weight, quantized)

    def encode(self, weight: Tensor, quantized: Quantized | None = None) -> bytes:
        """Return the record; see :meth:`Encoding.encode`."""
        return codec.encode(weight, quantized)

    def decode(self, stream: bytes, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the tensor of a record; see :meth:`Encoding.decode`."""
        return codec.decode(stream, shape, dtype)
