"""Masked retraining: what every method ends in that first finds out which weights matter.

The weights are projected, their zeros are frozen, and what is left is trained further. Levels come
all at once, or (``snap``) share by share, the nearest values of each layer first.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from torch import Tensor, nn

from secateur.methods.base import Method, MethodOptions, Phase
from secateur.methods.support import FrozenSupport
from secateur.plan import Plan


def _rises_to_one(values: tuple[float, ...]) -> tuple[float, ...]:
    if values[-1] != 1 or not values[0] > 0 or list(values) != sorted(set(values)):
        raise ValueError("should rise from above 0 to 1, for example [0.7, 1]")
    return values


RisingToOne = Annotated[tuple[float, ...], Field(min_length=1), AfterValidator(_rises_to_one)]
"""An option of stages on the way, the last of which is all of it."""


class RetrainOptions(MethodOptions):
    """Options of masked retraining."""

    retrain_epochs: int = Field(10, ge=0, description="epochs of masked retraining")
    retrain_lr: float | None = Field(None, gt=0, description="peak learning rate of retraining")
    distill: float = Field(
        0.0, ge=0, le=1, description="share of the retraining loss that is the dense network's"
    )
    average: float = Field(
        0.0, ge=0, lt=1, description="decay per step of weight averaging in retraining; 0 is off"
    )
    scale: Literal["fitted", "trained"] = Field(
        "fitted",
        description="scales of levels in retraining: fitted by least squares at every step, or "
        "trained with the loss (LSQ)",
    )
    snap: RisingToOne = Field(
        (1.0,),
        description="cumulative shares of each layer's non-zeros that go to their levels, the "
        "nearest first, and stay there while the others are retrained; the last is 1. A phase "
        "each: retrain_epochs is divided among them",
    )

    @field_validator("snap")
    @classmethod
    def _an_epoch_each(cls, snap: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        epochs = info.data.get("retrain_epochs", len(snap))
        if len(snap) > max(1, epochs):
            raise ValueError(f"should not be more shares than retrain_epochs, {epochs}")
        return snap


class RetrainedMethod(Method):
    """Base of methods that end in masked retraining.

    In a loop of your own, trained scales need the gradients that the optimizer read: call ``step``
    before they are set to zero in place. (Setting them to None, the default, does no harm.)
    """

    options: RetrainOptions
    support: FrozenSupport
    hard: bool = False
    """Whether weights have been brought to their sets for good."""

    @property
    def quantizes(self) -> bool:
        """Whether any layer's target has levels."""
        target = self.target
        sets = [row.set for row in target.rows] if isinstance(target, Plan) else [target]
        return any(each.split()[1] for each in sets if each)

    def retraining(self, step: int, quantizes: bool) -> list[Phase]:
        """Return the phases of retraining, one for each share of ``snap`` if there are levels."""
        o = self.options
        shares = o.snap if quantizes else (1.0,)
        return [
            Phase(
                "retrain",
                epochs,
                o.retrain_lr,
                step,
                distill=o.distill,
                average=o.average,
                snap=share,
            )
            for share, epochs in zip(shares, divided(o.retrain_epochs, len(shares)), strict=True)
        ]

    def members(self) -> dict[str, Tensor]:
        """Return the planned weights as members of their sets; levels in place keep their scale."""
        return super().members() | self.support.members()

    def harden(self, share: float = 1.0) -> None:
        """Project the weights, freeze zeros, and bring a share of what is left to its levels."""
        free = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.write(self.members())
        self.support.freeze_zeros()
        self.support.hold_zeros()
        self.support.freeze_levels(self.plan, free, share)
        self.hard = True

    def finalize(self) -> nn.Module:
        """Bring weights to their sets if training has not yet ended there; return the model."""
        if self.approximate:
            self.harden()
        self.support.unhook()
        return self.model

    @property
    def approximate(self) -> bool:
        """True until weights are in their sets, and until all levels are in place."""
        return not self.hard or self.support.partial


def divided(epochs: int, parts: int) -> list[int]:
    """Return whole numbers that add up to ``epochs``, as equal as can be, the larger ones last."""
    ends = [epochs * part // parts for part in range(parts + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]
