"""Random networks of torchvision, what they compute with channels masked, and under DJPQ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from secateur.attention import separate
from secateur.channels import compact
from secateur.channels.surgery import CONVOLUTIONS, Kept
from secateur.gates import HardConcreteGate
from secateur.methods import DJPQ
from secateur.sets import Levels

SLOW = ("kaiming_uniform_", "kaiming_normal_", "trunc_normal_", "normal_", "uniform_")
"""Initializations that would only be overwritten."""


def lively(builder: Any, **arguments: Any) -> nn.Module:
    """Build a network whose weights, scales and statistics are all random."""
    generator = torch.Generator().manual_seed(0)
    with mock.patch.multiple("torch.nn.init", **dict.fromkeys(SLOW, mock.DEFAULT)):
        model: nn.Module = builder(num_classes=10, **arguments)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            reach = math.sqrt(3 / tensor[0].numel()) if tensor.ndim > 1 else 0.2
            tensor.uniform_(-reach, reach, generator=generator)
    return model.eval()


def masked_outputs(model: nn.Module, kept: Kept, images: Tensor) -> Tensor:
    """Run the whole network with zeros for every removed channel wherever a layer reads it."""

    def masking(indices: list[int], dim: int) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
            mask = torch.zeros(given[0].shape[dim])
            mask[indices] = 1
            return given[0] * mask.view(-1, *[1] * (given[0].ndim - 1 - dim % given[0].ndim))

        return hook

    handles = []
    for name, entry in kept.items():
        if "in" in entry:
            module = model.get_submodule(name)
            dim = 1 if isinstance(module, CONVOLUTIONS) else -1
            handles.append(module.register_forward_pre_hook(masking(entry["in"], dim)))
    with torch.no_grad():
        outputs: Tensor = model(images)
    for handle in handles:
        handle.remove()
    return outputs


@dataclass
class Done:
    """A network that DJPQ was trained on for two steps.

    Attributes:
        method: after ``finalize``.
        before: outputs with gates and quantizers, in evaluation mode.
        after: outputs of the finalized network.
        whole: that network.
        small: the same without its closed channels.
        closed: how many those are.
        notes: what stayed whole, and why.
    """

    method: DJPQ
    before: Tensor
    after: Tensor
    whole: nn.Module
    small: nn.Module
    closed: int
    notes: list[str]


def djpq(model: nn.Module, images: Tensor) -> Done:
    """Attach, train two steps, close every fourth channel of each gate, finalize and cut.

    Attention is separated first, as runs do.
    """
    model = separate(model)
    method = DJPQ(Levels(8, zero=True), images, gates="hard_concrete", quantizer="linear")
    method.attach(model)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(method.parameter_groups(1e-4))
    for _ in range(2):
        outputs = model.train()(images)
        loss = nn.functional.cross_entropy(outputs, torch.arange(len(outputs)))
        (loss + method.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.step()
    with torch.no_grad():
        for gate, _, _ in method.gates:
            assert isinstance(gate, HardConcreteGate)
            gate.logit[::4] = -9
    closed = sum(int((~gate.open()).sum()) for gate, _, _ in method.gates)
    with torch.no_grad():
        before = model.eval()(images)
        after = method.finalize()(images)
    small = compact(model, images, fixed=set(method.weights))
    return Done(method, before, after, model, small.model, closed, list(small.notes))


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference in units of the largest value that is expected."""
    return float(((found - expected).abs().max() / expected.abs().max()).detach())
