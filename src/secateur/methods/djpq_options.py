"""Options of DJPQ."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from secateur.methods.base import MethodOptions


def _rising(values: tuple[int, ...]) -> tuple[int, ...]:
    if list(values) != sorted(set(values)) or any(not 2 <= each <= 16 for each in values):
        raise ValueError("should rise, from 2 or more to 16 or less, for example [2, 4, 8, 16]")
    return values


class DJPQOptions(MethodOptions):
    """Options of DJPQ."""

    epochs: int = Field(10, ge=1, description="epochs of joint training")
    lr: float | None = Field(None, gt=0, description="peak learning rate")
    beta: float = Field(1e-3, ge=0, description="weight of the gates' KL term")
    gamma: float = Field(
        10.0, ge=0, description="weight of BOPs relative to fp32; without a budget"
    )
    gates: Literal["vib", "hard_concrete", "none"] = Field(
        "vib", description="what prunes channels"
    )
    threshold: float = Field(
        1e-3, gt=0, description="of VIB gates: mu^2/sigma^2 below which a channel goes"
    )
    quantizer: Literal["power", "linear", "lsq"] = Field(
        "power",
        description="of weights: with a trained power, without one, or one trained range and step "
        "per output channel (LSQ)",
    )
    activation_bits: int = Field(8, ge=2, le=16, description="bits of layer inputs to start with")
    learn_bits: bool = Field(True, description="false keeps all bits as they start")
    widths: Annotated[tuple[int, ...], AfterValidator(_rising)] = Field(
        (), description="the only bits allowed, such as [2, 4, 8, 16]; empty for all"
    )
    quantizer_lr: float = Field(
        10.0, gt=0, description="learning rate of steps and ranges, as a multiple"
    )
    gate_lr: float = Field(20.0, gt=0, description="learning rate of gates, as a multiple")
    tune_epochs: int = Field(
        0, ge=0, description="epochs of fine-tuning with bits and channels frozen"
    )
    tune_lr: float | None = Field(None, gt=0, description="peak learning rate of fine-tuning")
    distill: float = Field(
        0.0, ge=0, le=1, description="share of the fine-tuning loss that is the dense network's"
    )

    @property
    def removes_channels(self) -> bool:
        """Whether there are gates."""
        return self.gates != "none"
