"""N:M masks: the compiled kernel beside torch.compile and argsort, and what SR-STE adds to a step.

    python benchmarks/nm_kernel.py

All variants are interleaved, on one thread, in seconds of that thread's processor time, so that
other work on the machine disturbs the medians little; ratios are medians of ratios within a round.
Writes benchmarks/results/nm-kernel.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from runs import RESULTS
from torch import Tensor, nn
from torch.nn.functional import linear

from secateur.doctor import doctor
from secateur.kernels import nm_apply, nm_decay_
from secateur.methods import SRSTE
from secateur.sets import NM

ROWS, COLUMNS = 4096, 1024  # 4.2 M weights
PATTERNS = ((2, 4), (1, 4), (4, 8), (2, 8), (1, 8), (1, 16))
DECAY = 2e-4
Mask = Callable[[Tensor, int, int], Tensor]


def argsort(weight: Tensor, n: int, m: int) -> Tensor:
    """Return the mask as most implementations of N:M make it, ties aside."""
    groups = weight.abs().view(-1, m)
    dropped = groups.argsort(dim=1)[:, : m - n]
    return torch.ones_like(groups).scatter_(1, dropped, 0).view_as(weight)


def compare(weight: Tensor, n: int, m: int) -> Tensor:
    """Return the mask by comparing all pairs of a group, as torch.compile likes it."""
    size = weight.abs().view(-1, m)
    index = torch.arange(m)
    earlier = index[None, :] < index[:, None]  # ties go to the lower index
    mine, rival = size[:, :, None], size[:, None, :]
    beaten = ((rival > mine) | ((rival == mine) & earlier)).sum(2)
    return (beaten < n).to(weight.dtype).view_as(weight)


def by_mask(mask: Mask, compiled: bool) -> type[torch.autograd.Function]:
    """Return 2:4 SR-STE as a function of the weight that keeps its mask for the way back."""

    def forward(weight: Tensor) -> tuple[Tensor, Tensor]:
        kept = mask(weight, 2, 4)
        return weight * kept, kept

    def backward(grad: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
        return grad + DECAY * (1 - kept) * weight

    if compiled:
        forward, backward = torch.compile(forward), torch.compile(backward)

    class SRSTE(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            masked, kept = forward(weight)
            ctx.save_for_backward(weight, kept)
            return masked

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return backward(grad, *ctx.saved_tensors)

    return SRSTE


class Fused(torch.autograd.Function):
    """2:4 on the kernel, straight through; the decay joins the gradient where it is stored."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return nm_apply(weight, 2, 4)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Perceptron(nn.Module):
    """1024-4096-1024, with a function on its weights."""

    def __init__(self, function: type[torch.autograd.Function] | None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1024, 4096), nn.Linear(4096, 1024)
        self.on = function.apply if function else nn.Identity()
        if function is Fused:
            for layer in (self.first, self.second):
                layer.weight.register_post_accumulate_grad_hook(decay)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(linear(x, self.on(self.first.weight), self.first.bias))
        return linear(hidden, self.on(self.second.weight), self.second.bias)


def decay(weight: Tensor) -> None:
    """Add the term of SR-STE to the gradient of a weight."""
    assert weight.grad is not None
    nm_decay_(weight.grad, weight, 2, 4, decay=DECAY)


def step(
    function: type[torch.autograd.Function] | None, batch: int, mode: str = ""
) -> Callable[[], float]:
    """Return a function that trains one step and returns the loss; by the method, if in a mode."""
    torch.manual_seed(0)
    model = Perceptron(function)
    method = SRSTE(NM(2, 4), decay=DECAY, mode=mode).attach(model) if mode else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(batch, 1024), torch.randn(batch, 1024)

    def train() -> float:
        loss = nn.functional.mse_loss(model(x), y)
        (loss + method.penalty() if method else loss).backward()
        optimizer.step()
        if method:
            method.step(lr=0.01)
        optimizer.zero_grad()
        return loss.item()

    return train


def measure(variants: dict[str, Callable[[], Any]], base: str, rounds: int) -> dict[str, Any]:
    """Return median milliseconds of each variant and its ratio to the base."""
    spent: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 2):
        for name, run in variants.items():
            start = time.thread_time()
            run()
            if number > 1:  # the first rounds compile and warm up
                spent[name].append(1e3 * (time.thread_time() - start))
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, spent[base], strict=True))
        for name, values in spent.items()
    }
    return {
        name: {"ms": round(statistics.median(values), 3), f"to {base}": round(ratios[name], 3)}
        for name, values in spent.items()
    }


def masks(rounds: int) -> dict[str, Any]:
    """Measure mask-and-apply; a copy reads and writes as many bytes."""
    weight = torch.randn(ROWS, COLUMNS)
    out, grad = torch.empty_like(weight), torch.randn_like(weight)
    compiled = torch.compile(lambda w: w * compare(w, 2, 4))
    assert torch.equal(compiled(weight), nm_apply(weight, 2, 4))
    assert torch.equal(weight * argsort(weight, 2, 4), nm_apply(weight, 2, 4))
    variants: dict[str, Callable[[], Any]] = {
        "copy": lambda: out.copy_(weight),
        "2:4 torch.compile": lambda: compiled(weight),
        "2:4 argsort": lambda: weight * argsort(weight, 2, 4),
        "2:4 decay": lambda: nm_decay_(grad, weight, 2, 4, decay=DECAY),
        "2:4 along axis 0": lambda: nm_apply(weight, 2, 4, axis=0),
    }
    for n, m in PATTERNS:
        variants[f"{n}:{m}"] = lambda n=n, m=m: nm_apply(weight, n, m)  # type: ignore[misc]
    return measure(variants, "copy", rounds)


def steps(batch: int, rounds: int) -> dict[str, Any]:
    """Measure a training step of SR-STE at 2:4; all variants must have the same loss."""
    variants = {
        "dense": step(None, batch),
        "kernel": step(Fused, batch),
        "srste": step(None, batch, "coupled"),
        "torch.compile": step(by_mask(compare, compiled=True), batch),
        "argsort": step(by_mask(argsort, compiled=False), batch),
    }
    losses = [[variants[name]() for _ in range(3)] for name in list(variants)[1:]]
    assert all(torch.allclose(torch.tensor(each), torch.tensor(losses[0])) for each in losses)
    variants["srste, decoupled"] = step(None, batch, "decoupled")
    return measure(variants, "dense", rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batches", type=int, nargs="*", default=[32, 128, 512])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = doctor()
    result = {
        "machine": {key: facts[key] for key in ("cpu", "kernels", "packages")},
        "rounds": arguments.rounds,
        f"mask and apply, {ROWS} x {COLUMNS} float32": masks(arguments.rounds),
        "SR-STE step, 1024-4096-1024, SGD with momentum": {
            f"batch {batch}": steps(batch, arguments.rounds) for batch in arguments.batches
        },
    }
    text = json.dumps(result, indent=1)
    (RESULTS / "nm-kernel.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
