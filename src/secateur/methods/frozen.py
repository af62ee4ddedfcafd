"""Adam with frozen second moments: the mask-learning phase of STEP (Lu et al., arXiv 2302.01172).

Gradients that masked weights cause make Adam's second moments unreliable. STEP estimates them in
dense training, v, and keeps them:

    m = b1 m + (1 - b1) g,    w = w - lr m / (1 - b1^t) / (sqrt(v) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


class FrozenAdam(torch.optim.Optimizer):
    """Adam or AdamW from here on with the second moments that it has now, corrected for bias.

    First moments start at zero. Elements that had no gradient yet stay as they are.

    Args:
        adam: whose parameters, options and second moments these are; it is not to be used further.
    """

    def __init__(self, adam: torch.optim.Adam) -> None:
        decoupled = isinstance(adam, torch.optim.AdamW)
        keys = ("params", "lr", "betas", "eps", "weight_decay")
        groups = [{key: group[key] for key in keys} for group in adam.param_groups]
        super().__init__(groups, {"decoupled": decoupled})
        for group in self.param_groups:
            for weight in group["params"]:
                before = adam.state.get(weight)
                if before:
                    correction = 1 - group["betas"][1] ** float(before["step"])
                    self.state[weight] = {
                        "step": 0,
                        "exp_avg": torch.zeros_like(weight),
                        "exp_avg_sq": before["exp_avg_sq"] / correction,
                    }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step along the first moments."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and weight in self.state:
                    _step(weight, weight.grad, self.state[weight], group)
        return loss


def _step(
    weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    """Change one parameter and its state in place."""
    lr, decay, (first, _) = group["lr"], group["weight_decay"], group["betas"]
    if group["decoupled"]:
        weight.mul_(1 - lr * decay)
    elif decay:
        gradient = gradient.add(weight, alpha=decay)
    state["step"] += 1
    state["exp_avg"].lerp_(gradient, 1 - first)
    second = state["exp_avg_sq"]
    spread = second.sqrt().add_(group["eps"]).masked_fill_(second == 0, math.inf)
    weight.addcdiv_(state["exp_avg"], spread, value=-lr / (1 - first ** state["step"]))
