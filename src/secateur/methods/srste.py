"""SR-STE: sparse training from scratch with masks that may change (Zhou et al., arXiv 2102.04010).

Every forward pass sees W~ = E W, the weights projected onto their pattern, E the mask of zeros and
ones. The gradient g by W~ is taken for that by W, pruned weights included: the straight-through
estimator (STE). SR-STE also decays the weights that are pruned now, so that masks settle:

    W = W - lr (g + lambda (1 - E) W)

The term shrinks weights; lambda = 0 is plain STE. The parameters of the model hold W~ and this
method the rest, (1 - E) W. An optimizer that steps from W~ by some amount takes W by the same
amount, so it works with any optimizer. Decay in the optimizer sees W~, the weights in use: what
pruned ones decay by is lambda, all of it (the paper's 2e-4 beside weight decay 5e-5 is 2.5e-4).

Coupled, the term joins gradients when the optimizer reads them, where its own L2 decay does: once
a step, after they were accumulated, averaged over processes, unscaled and clipped, and before
momentum and Adam's scaling. ``decoupled`` goes past these, by lr lambda a step.

A rising lambda (``anneal``) is that of AST (AAAI 2025). Dense training ahead, whose second moments
Adam keeps (``precondition``), is that of STEP; in a loop of your own use
:class:`secateur.methods.FrozenAdam`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.methods.base import Phase, register
from secateur.methods.joining import JoinedGradients
from secateur.methods.moving import MovingLevels
from secateur.methods.retrain import RetrainedMethod, RetrainOptions
from secateur.methods.support import FrozenSupport, levels_of, local
from secateur.sets import NM


class SRSTEOptions(RetrainOptions):
    """Options of SR-STE; levels come in masked retraining, by default none, or are there before."""

    epochs: int = Field(10, ge=1, description="epochs of training with masks that may change")
    lr: float | None = Field(None, gt=0, description="peak learning rate while masks may change")
    decay: float = Field(2e-4, ge=0, description="decay of pruned weights, lambda; 0 is plain STE")
    mode: Literal["coupled", "decoupled"] = Field(
        "coupled", description="decay through the gradient, or beside the optimizer (for Adam)"
    )
    anneal: int = Field(
        0, ge=0, description="optimizer steps in which decay rises from 0 to its full value"
    )
    interval: int = Field(1, ge=1, description="optimizer steps between choices of the masks")
    joint: bool = Field(
        False, description="weights are on their levels already while masks may change"
    )
    precondition: int = Field(
        0,
        ge=0,
        description="epochs of dense training ahead, whose second moments Adam then keeps; "
        "decay has to be decoupled",
    )
    retrain_epochs: int = Field(0, ge=0, description="epochs of masked retraining")

    @field_validator("precondition")
    @classmethod
    def _keeps_decay_apart(cls, epochs: int, others: ValidationInfo) -> int:
        """Refuse decay divided by moments that do not grow with it: it diverges where they are
        small."""
        if epochs and others.data.get("mode") == "coupled":
            raise ValueError("needs mode: decoupled")
        return epochs


@register
class SRSTE(RetrainedMethod):
    """Training with straight-through masks and decay of what they prune.

    **Levels** come in retraining, or (``joint``) are there from the first mask on: W~ is E W
    rounded, straight-through in the same way, and the scale is fitted or trained as in retraining.

    **Shards** of FSDP2 (attach once the model is sharded) choose for themselves, where outputs do:
    at n:m without ``rows`` or levels. Counts of weights are then those of the shard.

    Where there is a pattern any weight may come back, but for zeros of an earlier stage that levels
    of this one have no value for; layers that only get levels keep all their zeros.

    In a loop of your own, ``attach`` leaves the model with masked weights at once. ``step`` needs
    the learning rate if decay is decoupled; if not, the optimizer is one of ``torch.optim`` or
    derived from its base class.

    **SAD**, the sparse architecture divergence, counts the weights whose state, kept or pruned,
    differs between two steps: ``metrics`` has that from the first choice of masks to the latest,
    in total and by layer. The flip rate is that between the two latest choices, as a share.
    """

    name = "srste"
    summary = "training with straight-through masks, pruned weights decayed (arXiv 2102.04010)"
    Options = SRSTEOptions
    options: SRSTEOptions
    joined: JoinedGradients | None = None

    def attach(self, model: nn.Module) -> SRSTE:
        """Bind to a model and mask its weights."""
        super().attach(model)
        self.parameters = self.weights
        self.weights = {name: local(each) for name, each in self.parameters.items()}
        self._require_rows()
        stated, self.plan = self.plan, self.plan.within(self.weights)
        self.patterns = self.plan.without_levels()
        self.revivable = [
            row.parameter for row in self.patterns.compressed if row in stated.without_levels().rows
        ]
        self.support = FrozenSupport(self.plan, model, self.options.scale == "trained")
        self.moving: dict[str, MovingLevels] = {}
        self._drop_masks()
        self._start()
        if self.options.mode == "coupled":
            self.joined = JoinedGradients(self._terms)
        return self

    def _require_rows(self) -> None:
        """Refuse sharded weights whose sets are not about one output at a time."""
        for row in self.plan.compressed:
            whole = self.weights[row.parameter].shape == self.parameters[row.parameter].shape
            if not whole and not (isinstance(row.set, NM) and row.set.rows == 1):
                raise RecipeError(
                    f"set: {row.set} of '{row.layer}' looks at more than the shard that is here.\n"
                    "Remedy: nm without rows and without levels, or leave that layer whole."
                )

    def phases(self) -> tuple[Phase, ...]:
        """Return dense training, if any, masks that may change, and retraining with the last."""
        o = self.options
        ahead = [Phase("precondition", o.precondition, o.lr)] if o.precondition else []
        masked = Phase("srste", o.epochs, o.lr, frozen=bool(ahead))
        return (*ahead, masked, *self.retraining(0, self.quantizes))

    def begin(self, phase: Phase, steps: int) -> None:
        """Take masks away, start with masks afresh from the present weights, or retrain."""
        if phase.name == "precondition":
            self._unmask()
        elif phase.name == "srste":
            self._start()
        else:
            self.harden(phase.snap)

    def _drop_masks(self) -> None:
        self.rest: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.earlier: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}

    @torch.no_grad()
    def _unmask(self) -> None:
        """Give the model W; nothing is left to the method."""
        self._lift()
        self.moving = {}
        for name, rest in self.rest.items():
            self.weights[name].add_(rest)
        self._drop_masks()

    @torch.no_grad()
    def _start(self) -> None:
        self._unmask()
        self.support.release_levels()
        self.support.freeze_zeros(but=self.revivable)
        self.hard, self.count = False, 0
        for row in self.patterns.compressed:
            weight = self.weights[row.parameter]
            self.rest[row.parameter] = torch.zeros_like(weight)
            for masks in (self.masks, self.earlier):
                masks[row.parameter] = torch.zeros_like(weight, dtype=torch.bool)
        self._choose()
        if self.options.joint:
            self.moving = {
                name: MovingLevels(self.weights[name], levels)
                for name, levels in levels_of(self.plan).items()
            }
            self.support.watch_gradients(tuple(self.moving))
        self.first = {name: mask.clone() for name, mask in self.masks.items()}
        self.earlier = {name: mask.clone() for name, mask in self.masks.items()}

    def _choose(self, factor: float = 1.0) -> None:
        """Choose the masks anew; the model gets E W, and the rest, shrunk before, is (1 - E) W."""
        self.masks, self.earlier = self.earlier, self.masks
        weights = {name: self.weights[name].detach() for name in self.rest}
        self.patterns.part_(weights, self.rest, self.masks, self.model, factor)

    def _lift(self) -> None:
        """Give the model its weights in use as they were before rounding."""
        for name, moving in self.moving.items():
            moving.lift(self.weights[name], self.support.gradients.pop(name, None))

    def _lower(self) -> None:
        for name, moving in self.moving.items():
            moving.lower(self.weights[name], fit=not self.support.trained)

    @property
    def flips(self) -> dict[str, int]:
        """How many positions the latest choice of masks changed, by parameter."""
        return _changes(self.earlier, self.masks)

    @property
    def decay(self) -> float:
        """Lambda at the present step."""
        o = self.options
        return o.decay * min(1.0, self.count / o.anneal) if o.anneal else o.decay

    def penalty(self) -> Tensor:
        """Return zero: decay joins gradients, or passes by them."""
        return torch.zeros(())

    def _terms(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yield each weight with what its gradient gets: (1 - E) W, times lambda."""
        if self.decay:
            for name, rest in self.rest.items():
                yield self.parameters[name], rest, self.decay

    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:
        """Take W along; every ``interval`` steps choose the masks anew.

        Raises:
            RecipeError: decay is decoupled and ``lr`` is not given.
        """
        self.support.hold()
        if self.hard or not (self.masks or self.moving):
            return
        self._lift()
        self._move(lr)
        self._lower()

    def _move(self, lr: float | None) -> None:
        """Take W along, which the model and the rest are parts of, and part it again."""
        factor = 1.0
        if self.options.mode == "decoupled":
            if lr is None:
                raise RecipeError("mode: decoupled needs the learning rate; call step(lr).")
            factor = 1 - lr * self.decay
        self.count += 1
        if self.count % self.options.interval == 0:
            self._choose(factor)
            return
        for name, mask in self.masks.items():
            whole = self.rest[name].mul_(factor).add_(self.weights[name])
            self.weights[name].copy_(whole.masked_fill(~mask, 0))
            whole.masked_fill_(mask, 0)

    def harden(self, share: float = 1.0) -> None:
        """Drop what is pruned, freeze zeros, and bring a share of what is left to its levels."""
        super().harden(share)
        self.rest, self.moving = {}, {}

    def finalize(self) -> nn.Module:
        """End training with masks if that has not happened yet; return the model."""
        if not self.hard or self.approximate:
            self.harden()
        self.support.unhook()
        if self.joined:
            self.joined.end()
        return self.model

    @property
    def approximate(self) -> bool:
        """True without masks, and until all levels are in place."""
        free = (self.quantizes and not self.moving) or not (self.masks or self.moving)
        return self.support.partial or (not self.hard and free)

    def metrics(self) -> dict[str, float]:
        """Return lambda, SAD since the masks were first chosen, by layer too, and the flip rate."""
        if self.hard or not self.masks:
            return {}
        sad = _changes(self.first, self.masks)
        total = sum(mask.numel() for mask in self.masks.values())
        layers = {row.parameter: row.layer for row in self.patterns.compressed}
        return {
            "decay": self.decay,
            "sad": sum(sad.values()),
            "flip_rate": sum(self.flips.values()) / max(1, total),
            **{f"sad.{layers[name]}": count for name, count in sad.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Return pruned weights, masks, the position in the schedule, and latent values."""
        return {
            "rest": self.rest,
            "masks": self.masks,
            "first": self.first,
            "earlier": self.earlier,
            "count": self.count,
            "hard": self.hard,
            "moving": {name: moving.state_dict() for name, moving in self.moving.items()},
            "support": self.support.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.rest, self.masks = dict(state["rest"]), dict(state["masks"])
        self.first, self.earlier = dict(state["first"]), dict(state["earlier"])
        self.count, self.hard = state["count"], state["hard"]
        self.support.load_state_dict(state["support"])
        levels = levels_of(self.plan)
        self.moving = {
            name: MovingLevels.restored(saved, self.weights[name], levels[name])
            for name, saved in state["moving"].items()
        }
        self.support.watch_gradients(tuple(self.moving))


def _changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many positions differ between two choices of masks, by parameter."""
    return {name: int((mask ^ after[name]).count_nonzero()) for name, mask in before.items()}
