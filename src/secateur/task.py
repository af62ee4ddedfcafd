"""The user's side of a run: a model, its data, how it is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset


def hits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 1.0 for each sample whose largest logit is the target class, else 0.0.

    Shapes: outputs ``(batch, classes)``, targets ``(batch,)`` int64, result ``(batch,)`` float.
    """
    return (outputs.argmax(dim=1) == targets).float()


@dataclass
class Task:
    """A model and the data it is trained, chosen and judged on.

    Args:
        model: any ``nn.Module``; trained in place.
        train: pairs of input and target that gradients are computed on.
        validation: pairs that every choice is made on.
        test: pairs that are read once, at the end.
        loss: from a batch of outputs and targets to a scalar.
        score: from a batch of outputs and targets to one number per sample, in [0, 1]; its mean
            is what reports call accuracy.
        name: what reports call the run.
        reference: ``module:callable`` that builds the model, if it can be named; a packed file
            then loads by name.
        arguments: keyword arguments for ``reference``.
        metadata: further text that the packed file carries, such as the input normalization.
        classes: names of the classes by label, for ``model.onnx``; empty when unknown.
        labelled: whether the targets mean anything. If not, nothing can be trained, and they become
            the classes that the dense network says.
    """

    model: nn.Module
    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    score: Callable[[Tensor, Tensor], Tensor] = hits
    name: str = "run"
    reference: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    classes: Sequence[str] = ()
    labelled: bool = True

    @property
    def example_input(self) -> Tensor:
        """One validation input as a batch of one."""
        return torch.as_tensor(self.validation[0][0]).unsqueeze(0)
