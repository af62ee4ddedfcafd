"""What quantizers and gates add to a training step of ResNet-20: interleaved medians.

    python benchmarks/quantized_step.py

The network of CIFAR-10 (3x32x32) at batch 128, every layer's weight and input quantized. The rival
is ``torch.ao.quantization``'s learnable fake quantization (LSQ by autograd) on the same places.
Writes benchmarks/results/quantized-step.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from interleaved import interleaved
from runs import RESULTS
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.methods import DJPQ
from secateur.sets import Levels
from secateur.zoo import resnet20

BATCH = 128
VARIANTS: dict[str, dict[str, Any]] = {
    "power quantizers and VIB gates": {},
    "power quantizers and hard-concrete gates": {"gates": "hard_concrete"},
    "power quantizers": {"gates": "none"},
    "LSQ": {"gates": "none", "quantizer": "lsq", "learn_bits": False},
}


def stepper(prepare: Callable[[nn.Module, Tensor], Any]) -> Callable[[], None]:
    """Return a function that trains one step as the engine does."""
    torch.manual_seed(0)
    model = resnet20(channels=3).to(memory_format=torch.channels_last)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    method = prepare(model, images[:1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(images), labels)
        (loss + method.penalty() if method else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if method:
            method.step(1e-3)

    return step


def learnable_fake_quantization(model: nn.Module, example: Tensor) -> None:
    """Put torch's own LSQ where ours goes."""
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
    from torch.ao.quantization.observer import MovingAverageMinMaxObserver

    def made(low: int, high: int, kind: torch.dtype) -> nn.Module:
        module = _LearnableFakeQuantize(
            MovingAverageMinMaxObserver, low, high, 0.05, use_grad_scaling=True, dtype=kind
        )
        module.toggle_qparam_learning(True)
        return module

    class Quantized(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            weights = made(-128, 127, torch.qint8)
            parametrize.register_parametrization(layer, "weight", weights)
            self.layer, self.inputs = layer, made(0, 255, torch.quint8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.inputs(x))  # type: ignore[no-any-return]

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d | nn.Linear):
                setattr(parent, name, Quantized(child))


def main() -> None:
    """Measure, print and keep the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = {"dense": stepper(lambda model, example: None)}
    for name, chosen in VARIANTS.items():
        steps[name] = stepper(
            lambda model, example, chosen=chosen: DJPQ(  # type: ignore[misc]
                Levels(8, zero=True), example_input=example, **chosen
            ).attach(model)
        )
    steps["torch.ao learnable fake quantization"] = stepper(learnable_fake_quantization)
    measured = interleaved(steps, options.rounds)
    results = {"threads": options.threads, "rounds": options.rounds, "batch": BATCH}
    for name, ratio in measured["ratio"].items():
        print(f"{name}: {measured['seconds'][name]:.3f} s, {ratio:.2f}x")
    (RESULTS / "quantized-step.json").write_text(json.dumps({**results, **measured}, indent=1))


if __name__ == "__main__":
    main()
