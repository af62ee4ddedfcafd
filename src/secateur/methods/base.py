"""What every method can do, and the registry by which recipes name them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from secateur.allocation.budget import parse_budgets
from secateur.errors import RecipeError
from secateur.outcome import Outcome
from secateur.plan import Plan, build_plan
from secateur.sets import ConstraintSet

METHODS: dict[str, type[Method]] = {}
"""Methods by the name a recipe uses."""

UPDATES = 100
"""Projections in a phase on the way to the target, unless a stage gives their interval."""

AnyMethod = TypeVar("AnyMethod", bound="type[Method]")


def register(cls: AnyMethod) -> AnyMethod:
    """Class decorator: let recipes name this method."""
    METHODS[cls.name] = cls
    return cls


class MethodOptions(BaseModel):
    """Base of a method's options: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def removes_channels(self) -> bool:
        """Whether the method removes channels by itself, beside what the sets of its stage do."""
        return False


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one optimizer and one learning-rate schedule.

    Attributes:
        name: what the history calls it, for example ``admm`` or ``retrain``.
        epochs: its length.
        lr: peak learning rate, or None for the recipe's.
        step: which progressive step it belongs to.
        rung: which rung of a ladder of penalties it is.
        cycles: how often the learning rate starts again from its peak.
        distill: share of the loss that is agreement with the dense network, in [0, 1].
        average: decay per step of an exponential moving average of the weights, which replaces
            them at the end; 0 for none.
        snap: share of each quantized layer's non-zeros that are on their levels in it.
        frozen: whether Adam keeps the second moments of the end of the phase before.
        best: whether it ends with the network of its best epoch on validation data.
    """

    name: str
    epochs: int
    lr: float | None = None
    step: int = 0
    rung: int = 0
    cycles: int = 1
    distill: float = 0.0
    average: float = 0.0
    snap: float = 1.0
    frozen: bool = False
    best: bool = False


class Method(ABC):
    """A way to train a network into its constraint sets.

    In a loop of your own: ``attach``, then per batch add ``penalty()`` to the loss and call
    ``step()`` after the optimizer's, and ``finalize()`` at the end. The engine does the same and
    also walks through :meth:`phases`.

    Args:
        target: a constraint set for every convolution and linear layer, or a plan by layer.
        example_input: one batch, for methods that look at how the network is connected.
        budget: what the network may cost (``Budget.parse``), for methods that meet it in training.
        options: fields of the method's ``Options``.

    Attributes:
        budgets: one by kind.

    Raises:
        RecipeError: an option does not exist or is out of range, or a budget is not of a kind that
            the method meets.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[MethodOptions]]
    default_sets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"unstructured": {}}
    """The sets of a stage that names none, and their options where it states none."""

    meets: ClassVar[tuple[str, ...]] = ()
    """Kinds of budgets that it meets while it trains; others are distributed before."""

    reestimates: ClassVar[bool] = False
    """Whether BatchNorm statistics of training are not those of evaluation, which has no noise."""

    def __init__(
        self,
        target: ConstraintSet | Plan,
        example_input: Tensor | None = None,
        budget: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.target, self.example_input = target, example_input
        self.budgets = parse_budgets(budget, self.meets) if budget else ()
        self.dense: Mapping[str, float] = {}
        self.overhead = 0
        self.loss: Callable[[], float] | None = None
        try:
            self.options = self.Options(**options)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RecipeError(f"{where}: {first['msg']} (got {first['input']!r}).") from error

    def told(
        self,
        loss: Callable[[], float] | None = None,
        dense: Mapping[str, float] | None = None,
        overhead: int = 0,
    ) -> None:
        """Say how a budget is measured; call it before :meth:`attach`.

        Args:
            loss: of the model in evaluation mode on calibration data, the same at every call.
            dense: by kind, what the dense network costs; by default the model as it is attached.
            overhead: bytes of a packed file that no tensor takes.
        """
        self.loss, self.dense, self.overhead = loss, dense or {}, overhead

    def attach(self, model: nn.Module) -> Method:
        """Bind the method to a model, whose parameters it will change in place.

        Raises:
            RecipeError: a set makes no sense for this method, or no layer can be planned.
        """
        target = self.target
        plan = target if isinstance(target, Plan) else build_plan(model, target)
        self.plan = plan.fitted(model)
        self.model = model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.weights: dict[str, Tensor] = {
            row.parameter: parameters[row.parameter] for row in self.plan.compressed
        }
        return self

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the attached model's parameters as an optimizer takes them.

        Args:
            lr: learning rate. A group may have a multiple of it, its ``lr_scale``.
        """
        return [{"params": list(self.model.parameters()), "lr": lr, "lr_scale": 1.0}]

    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """Return the phases that the engine trains, in order."""

    @abstractmethod
    def begin(self, phase: Phase, steps: int) -> None:
        """Prepare for a phase of ``phase.epochs`` epochs with ``steps`` optimizer steps each."""

    @abstractmethod
    def penalty(self) -> Tensor:
        """Return what this method adds to the loss, a scalar."""

    @abstractmethod
    def step(self, lr: float | None = None) -> None:
        """Do this method's work after an optimizer step.

        Args:
            lr: the learning rate of that step; some options need it.
        """

    @abstractmethod
    def finalize(self) -> nn.Module:
        """Make every weight a member of its set; return the model, a plain ``nn.Module``."""

    def outcome(self) -> Outcome:
        """Return what it has chosen by itself, after ``finalize``."""
        return {"layers": {}, "spent": {}}

    @property
    @abstractmethod
    def approximate(self) -> bool:
        """Whether the weights now only approach their sets, so that projecting changes them."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Return what is worth a line in the log at the end of an epoch."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all state that resuming needs, as tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; the model must hold its saved weights, loaded once before
        :meth:`attach`, which looks at zeros, and once more after it."""

    def members(self) -> dict[str, Tensor]:
        """Return the planned weights as they would be if projected now."""
        return self.plan.project(self.weights, self.model)

    @contextmanager
    def projected(self) -> Iterator[None]:
        """Within this context the model holds its weights as they would be if projected now."""
        before = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.write(self.members())
        try:
            yield
        finally:
            self.write(before)

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Copy tensors into the planned weights."""
        for name, value in values.items():
            self.weights[name].copy_(value)
