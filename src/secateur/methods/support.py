"""Frozen support: pruned weights stay zero, quantized ones stay on their levels.

The weights themselves are corrected after every optimizer step, so neither momentum nor Adam's
moments nor weight decay can bring a pruned weight back, and every forward pass sees a member of
the constraint set.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.methods.latent import LatentLevels
from secateur.plan import PRUNABLE, Plan
from secateur.sets import Levels


class FrozenSupport:
    """Holds the planned weights of a model, and the biases of their dead outputs, in place.

    Args:
        plan: whose rows are to be held once they are frozen.
        model: the network, changed in place.
        trained: whether scales of levels are trained and not fitted.
    """

    def __init__(self, plan: Plan, model: nn.Module, trained: bool = False) -> None:
        self.rows = plan.compressed
        self.trained = trained
        self.gradients: dict[str, Tensor] = {}
        self.hooks: list[RemovableHandle] = []
        named = model.named_parameters(remove_duplicate=False)
        self.parameters = {name: local(each) for name, each in named}
        self.levels = levels_of(plan)
        self.last = [n for n, each in model.named_modules() if isinstance(each, PRUNABLE)][-1]
        self.dead: dict[str, Tensor] = {}
        self.latent: dict[str, LatentLevels] = {}

    @torch.no_grad()
    def freeze_zeros(self, but: Collection[str] = ()) -> None:
        """Keep every weight zero that is zero now, and the bias of every output without weights.

        The last layer keeps its biases: a class without weights still has a prior. Weights that
        are held on levels keep the zeros that they were frozen with.

        Args:
            but: names of weights whose zeros may come back.
        """
        for row in self.rows:
            dead = self.parameters[row.parameter] == 0
            if row.parameter in (*self.latent, *but) or not bool(dead.any()):
                continue
            self.dead[row.parameter] = dead
            if row.bias in self.parameters and row.layer != self.last:
                self.dead[row.bias] = dead.flatten(1).all(dim=1)

    @torch.no_grad()
    def freeze_levels(self, plan: Plan, free: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Also keep a share of the non-zeros of every layer with levels on these levels.

        Args:
            plan: its rows with levels are held from now on, in the support that their weights have
                now as members of their sets; rows that are held already stay so.
            free: by parameter name, the weights before they became members.
            share: of the non-zeros of each layer, cumulative; the others move freely.
        """
        for name, levels in levels_of(plan).items():
            if name not in self.latent:
                member = self.parameters[name]
                self.latent[name] = LatentLevels(free[name], member, levels)
        for name, latent in self.latent.items():
            latent.snap(share)
            latent.write(self.parameters[name])
        self.watch_gradients()

    def release_levels(self) -> None:
        """Let values move freely again; zeros stay."""
        self.latent.clear()
        self.unhook()

    def watch_gradients(self, others: tuple[str, ...] = ()) -> None:
        """Have the gradients at hand that train the scales, after the optimizer dropped them.

        What is kept is the tensor that the optimizer reads, so that a gradient is one that was
        accumulated, averaged over processes, unscaled and clipped.

        Args:
            others: names of weights whose gradients somebody else takes from ``gradients``.
        """
        self.unhook()
        for name in (*self.latent, *others) if self.trained else ():
            seen = functools.partial(_remember, self.gradients, name)
            handle = self.parameters[name].register_post_accumulate_grad_hook(seen)  # type: ignore[no-untyped-call]
            self.hooks.append(handle)

    def unhook(self) -> None:
        """Leave the model's parameters as they were found."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.gradients.clear()

    @property
    def partial(self) -> bool:
        """Whether a layer that is held has values that are not on levels yet."""
        return any(latent.partial for latent in self.latent.values())

    def members(self) -> dict[str, Tensor]:
        """Return the weights that are held on levels, with all their values there."""
        return {name: each.member(self.parameters[name]) for name, each in self.latent.items()}

    @torch.no_grad()
    def hold(self) -> None:
        """Restore what is frozen; call it after every optimizer step."""
        self.hold_zeros()
        for name, latent in self.latent.items():
            latent.hold(self.parameters[name], self.gradients.pop(name, None), self.trained)

    @torch.no_grad()
    def hold_zeros(self) -> None:
        """Restore zeros, but for layers on levels, which restore their own."""
        for name, dead in self.dead.items():
            if name not in self.latent:
                self.parameters[name].masked_fill_(dead, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return masks, latent values and scales."""
        latent = {name: held.state_dict() for name, held in self.latent.items()}
        return {"dead": dict(self.dead), "latent": latent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict` for weights that already hold their saved values."""
        self.dead = dict(state["dead"])
        self.latent = {
            name: LatentLevels.restored(saved, self.levels[name])
            for name, saved in state["latent"].items()
        }
        self.watch_gradients()


@torch.no_grad()
def local(parameter: Tensor) -> Tensor:
    """Return a parameter's shard in this process, of the same memory, or all if it is whole."""
    shard = getattr(parameter, "to_local", None)  # only a DTensor, as FSDP2 makes them, has it
    return parameter if shard is None else shard()


def _remember(gradients: dict[str, Tensor], name: str, weight: Tensor) -> None:
    """Keep the gradient of a weight."""
    if weight.grad is not None:
        gradients[name] = weight.grad


def levels_of(plan: Plan) -> dict[str, Levels]:
    """Return, by parameter name, the levels of the rows that have some."""
    found = {row.parameter: row.set.split()[1] for row in plan.rows if row.set}
    return {name: levels for name, levels in found.items() if levels}
