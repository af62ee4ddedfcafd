"""What every constraint set can do, and the registry by which recipes name them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from secateur import codec
from secateur.codec import Quantized, Storage
from secateur.errors import MembershipError, NonFiniteError, SecateurError

if TYPE_CHECKING:
    from secateur.sets.levels import Levels

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

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """Return the member nearest to ``weight`` in the Euclidean norm.

        Ties go to the lower index. The input is never written to; a member is returned bit for bit.

        Args:
            weight: floating point, any shape; dimension 0 counts outputs (OIHW for convolutions).
            metric: how much the squared distance of each element counts, non-negative,
                broadcastable to ``weight``; by default all the same. It decides what patterns
                keep; the scale of levels is always the best in the Euclidean norm.

        Raises:
            NonFiniteError: ``weight`` holds NaN or infinity.
            SecateurError: ``metric`` does not fit or is not finite and non-negative.
        """
        require_finite(weight)
        weight = weight.detach()
        return self._project(weight, None if metric is None else _checked(metric, weight))

    def part_(self, weight: Tensor, rest: Tensor, mask: Tensor, factor: float = 1.0) -> None:
        """Take ``weight + factor * rest`` apart, in place: its projection, and all that is dropped.

        Args:
            weight: floating point; gets the projection.
            rest: of the shape and dtype of ``weight``; gets what is dropped, else 0.
            mask: boolean, of the same shape; gets where ``weight`` is not 0 then.
            factor: of ``rest``, as it comes.

        Raises:
            NonFiniteError: an element is NaN or infinite, unless the set lets that stay.
        """
        whole = weight + factor * rest
        put_parts(whole, self.project(whole), weight, rest, mask)

    @abstractmethod
    def _project(self, weight: Tensor, metric: Tensor | None) -> Tensor:
        """Project a finite, detached weight; must not write to it. ``metric`` is float64."""

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

    @abstractmethod
    def split(self) -> tuple[tuple[Pattern, ...], Levels | None]:
        """Return the patterns and the levels that this set is the intersection of."""

    def relaxed(self, shape: Sequence[int], exponent: float) -> ConstraintSet | None:
        """Return an easier set on the way to this one: density ``d`` becomes ``d ** exponent``.

        Levels are dropped; None if nothing is left then.

        Args:
            shape: of the weight.
            exponent: in [0, 1].
        """
        return None

    def fixed(self, shape: Sequence[int]) -> ConstraintSet:
        """Return this set with shares turned into the counts they are for a weight of a shape."""
        return self

    def rounded(self, shape: Sequence[int], multiple: int) -> ConstraintSet:
        """Return this set with counts of whole channels made multiples, for a weight of a shape."""
        return self

    def changed(self, **options: Any) -> ConstraintSet:
        """Return this set with other options."""
        return replace(self, **options)  # type: ignore[type-var]

    def __and__(self, other: ConstraintSet) -> ConstraintSet:
        """Return the intersection of two sets: patterns in the order given, then levels.

        Raises:
            SecateurError: something follows levels.
        """
        from secateur.sets.intersection import join

        (first, levels), (second, last) = self.split(), other.split()
        if levels is not None:
            raise SecateurError(f"cannot join {self} & {other}: give patterns first, then levels.")
        return join((*first, *second), last)

    def _require_member(self, weight: Tensor) -> None:
        if not self.contains(weight):
            raise MembershipError(f"a tensor of shape {tuple(weight.shape)} is not in {self}.")


class Pattern(ConstraintSet):
    """A constraint set about zeros: it says which supports (sets of non-zeros) are allowed."""

    elementwise: ClassVar[bool] = False
    """Whether any single element of an allowed support may be dropped. If not, an element that is
    kept and has to be on levels without zero is not zero."""

    positional: ClassVar[bool] = False
    """Whether the pattern counts places, so that a weight that loses a channel may leave it."""

    @abstractmethod
    def support(self, gain: Tensor) -> Tensor:
        """Return the allowed support of largest total gain, as a boolean tensor.

        Args:
            gain: float64, the shape of the weight: by how much the squared distance falls when
                the element is kept instead of zeroed. For free values that is ``weight ** 2``.
        """

    def misfit(self, shape: Sequence[int]) -> str:
        """Say why weights of this shape are better left without the pattern; empty if not."""
        return ""

    def cover(self, support: Tensor) -> Tensor:
        """Return the support with everything that is kept or dropped together with part of it."""
        return support

    def fixed(self, shape: Sequence[int]) -> Pattern:
        """Return this pattern with a share turned into the count it is for a shape."""
        return self

    def relaxed(self, shape: Sequence[int], exponent: float) -> Pattern:
        """Return an easier pattern; this one where there is no share to raise."""
        return self

    def rounded(self, shape: Sequence[int], multiple: int) -> Pattern:
        """Return this pattern with a count of whole channels made a multiple."""
        return self

    def split(self) -> tuple[tuple[Pattern, ...], Levels | None]:
        """Return this pattern and no levels."""
        return (self,), None

    def _project(self, weight: Tensor, metric: Tensor | None) -> Tensor:
        keep = self.support(energy(weight, metric))
        return torch.where(keep, weight, torch.zeros_like(weight))


def put_parts(whole: Tensor, member: Tensor, weight: Tensor, rest: Tensor, mask: Tensor) -> None:
    """Write a projection and what it dropped of the whole, as :meth:`ConstraintSet.part_` does."""
    weight.copy_(member)
    torch.ne(member, 0, out=mask)
    rest.copy_(whole).masked_fill_(mask, 0)


def energy(weight: Tensor, metric: Tensor | None) -> Tensor:
    """Return by how much the squared distance falls when an element is kept, in float64."""
    square = weight.double().square()
    return square if metric is None else square * metric


def _checked(metric: Tensor, weight: Tensor) -> Tensor:
    """Return the metric as float64 on the weight's device."""
    metric = metric.detach().to(weight.device, torch.float64)
    try:
        metric.expand_as(weight)
    except RuntimeError as error:
        raise SecateurError(
            f"metric: its shape {tuple(metric.shape)} cannot be broadcast to that of the weight, "
            f"{tuple(weight.shape)}."
        ) from error
    if not bool((torch.isfinite(metric) & (metric >= 0)).all()):
        raise SecateurError("metric: it holds a number that is negative or not finite.")
    return metric


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
    threshold = _nth_smallest(flat, flat.numel() - count)
    keep = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    keep[ties[: count - int(keep.sum())]] = True
    return keep.view_as(gain)


def _nth_smallest(values: Tensor, index: int) -> Tensor:
    """Return the value at an index of the sorted vector."""
    if values.is_cpu and values.dtype in (torch.float32, torch.float64):
        # NumPy's vectorized selection takes a fifth of the time of torch's.
        return torch.from_numpy(np.partition(values.numpy(), index))[index]
    return values.kthvalue(index + 1).values
