"""Learning from the dense network while the compressed one is retrained."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

TEMPERATURE = 4.0


def distillation_loss(outputs: Tensor, teacher: Tensor) -> Tensor:
    """Return T^2 KL(teacher || student) of the softened classes (Hinton et al., 1503.02531).

    Shapes: both ``(batch, classes)`` logits; the result is a scalar, the mean over the batch.
    """
    return (
        functional.kl_div(
            functional.log_softmax(outputs / TEMPERATURE, dim=1),
            functional.log_softmax(teacher / TEMPERATURE, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        * TEMPERATURE**2
    )
