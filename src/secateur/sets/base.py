"""What every constraint set can do, and the registry by which recipes name them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor

from secateur import codec
from secateur.codec import Quantized, Storage
from secateur.errors import MembershipError, NonFiniteError, SecateurError

if TYPE_CHECKING:
    from secateur.sets.intersection import Intersection

SETS: dict[str, type[ConstraintSet]] = {}
"""Constraint sets by the name a recipe uses."""

AnySet = TypeVar("AnySet", bound="type[ConstraintSet]")


def register(cls: AnySet) -> AnySet:
    """Class decorator: let recipes name this constraint set."""
    SETS[cls.name] = cls
    return cls


class ConstraintSet(ABC):
    """A set of tensors that a weight is to become a member of. It knows nothing of training."""

    name: ClassVar[str]

    def project(self, weight: Tensor) -> Tensor:
        """Return the member nearest to ``weight`` in the Euclidean norm.

        Ties go to the lower index. The input is never written to; a member is returned bit for bit.

        Args:
            weight: floating point, any shape; dimension 0 counts outputs (OIHW for convolutions).

        Raises:
            NonFiniteError: ``weight`` holds NaN or infinity.
        """
        require_finite(weight)
        return self._project(weight.detach())

    @abstractmethod
    def _project(self, weight: Tensor) -> Tensor:
        """Project a finite, detached weight; must not write to it."""

    @abstractmethod
    def contains(self, weight: Tensor) -> bool:
        """Say whether ``weight`` is a member."""

    def quantized(self, weight: Tensor) -> Quantized | None:
        """Return a member as integer levels times a scale, or None if its values are free."""
        return None

    def encode(self, weight: Tensor) -> bytes:
        """Return the bits on disk of a member.

        Raises:
            MembershipError: ``weight`` is not a member.
        """
        self._require_member(weight)
        return codec.encode(weight, self.quantized(weight))

    @staticmethod
    def decode(record: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the tensor that :meth:`encode` was given, bit for bit.

        Raises:
            ArtifactError: the record is malformed or does not fit ``shape``.
        """
        return codec.decode(record, shape, dtype)

    def storage(self, weight: Tensor) -> Storage:
        """Count the bits that :meth:`encode` would write, by kind, without writing them.

        Raises:
            MembershipError: ``weight`` is not a member.
        """
        self._require_member(weight)
        return codec.storage(weight, self.quantized(weight))

    def __and__(self, other: ConstraintSet) -> Intersection:
        """Return the intersection of two sets, ``pattern & levels``.

        Raises:
            SecateurError: the left side is not a pattern, or the right side not levels.
        """
        from secateur.sets.intersection import Intersection
        from secateur.sets.levels import Levels

        if isinstance(self, Pattern) and isinstance(other, Levels):
            return Intersection(self, other)
        raise SecateurError(f"cannot join {self} & {other}: give a pattern, then levels.")

    def _require_member(self, weight: Tensor) -> None:
        if not self.contains(weight):
            raise MembershipError(f"a tensor of shape {tuple(weight.shape)} is not in {self}.")


class Pattern(ConstraintSet):
    """A constraint set about zeros: it says which supports (sets of non-zeros) are allowed."""

    elementwise: ClassVar[bool] = False
    """Whether every subset of an allowed support is allowed too, so any element may be dropped."""

    @abstractmethod
    def support(self, gain: Tensor) -> Tensor:
        """Return the allowed support of largest total gain, as a boolean tensor.

        Args:
            gain: float64, the shape of the weight: by how much the squared distance falls when
                the element is kept instead of zeroed. For free values that is ``weight ** 2``.
        """

    def _project(self, weight: Tensor) -> Tensor:
        keep = self.support(weight.double().square())
        return torch.where(keep, weight, torch.zeros_like(weight))


def require_finite(weight: Tensor) -> None:
    """Raise :class:`NonFiniteError` if any element is NaN or infinite."""
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise NonFiniteError(
            f"{bad} of {weight.numel()} weights are NaN or infinite, so there is no nearest "
            "member; lower the learning rate or check the data."
        )


def top_k(gain: Tensor, count: int) -> Tensor:
    """Return a boolean tensor that marks the ``count`` largest elements, ties to lower index.

    Args:
        gain: any shape, without NaN.
        count: how many to mark; clipped to the number of elements.
    """
    flat = gain.flatten()
    if count >= flat.numel():
        return torch.ones_like(gain, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(gain, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    keep = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    keep[ties[: count - int(keep.sum())]] = True
    return keep.view_as(gain)
