"""Terms that join gradients at the moment an optimizer reads them, as its own L2 decay does.

They are then added once a step, to gradients that were accumulated, averaged over processes,
unscaled and clipped, at the cost of one pass over them. In the loss they would cost three, and
depend on how the loss was scaled.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from secateur.methods.support import local

Terms = Callable[[], Iterator[tuple[Tensor, Tensor, float]]]
"""Returns parameters, each with a tensor of its shape and the factor of that."""


class JoinedGradients:
    """Adds terms to gradients in every step of any optimizer that holds their parameters.

    Parameters without a gradient get none, as with decay of the optimizer. Optimizers that compute
    gradients in a closure get the terms each time they do.

    Args:
        terms: a bound method; of a sharded parameter, the term is that of its shard here. Once its
            object is gone, nothing is added any more.
    """

    def __init__(self, terms: Terms) -> None:
        found = weakref.WeakMethod(terms)
        handle = register_optimizer_step_pre_hook(functools.partial(_before_step, found))
        self.end = weakref.finalize(self, handle.remove)
        """Call it to add nothing any more."""


def _before_step(
    found: Callable[[], Terms | None],
    optimizer: Optimizer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    terms = found()
    if terms is None:
        return None
    closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
    if closure is None:
        _join(terms, optimizer)
        return None

    def joined() -> Any:
        loss = closure()
        _join(terms, optimizer)
        return loss

    return (args[0], joined, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}


@torch.no_grad()
def _join(terms: Terms, optimizer: Optimizer) -> None:
    """Add the terms of an optimizer's parameters to their gradients."""
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)  # if it unscales by itself
    for parameter, term, factor in terms():
        if id(parameter) not in own or parameter.grad is None:
            continue
        gradient = local(parameter.grad)
        if scale is None:
            gradient.add_(term, alpha=factor)
        else:
            gradient.addcmul_(term, scale.to(term.device), value=factor)
