"""Quantizers on the layers of a network, which stays a plain module with a few more tensors.

Weights are quantized by ``torch.nn.utils.parametrize``, inputs of a layer by a forward pre-hook
that runs its child ``input_quantizer``, what a module returns by a forward hook that runs its child
``output_quantizer``. The hooks are functions and find that child through the module that they are
given, so copies of a network have quantizers of their own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur import parametrized
from secateur.quantizers.quantizer import FixedQuantizer, Quantizer

INPUT = "input_quantizer"
"""Name of the child that quantizes what a layer reads."""

OUTPUT = "output_quantizer"
"""Name of the child that quantizes what a module returns."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules that would take such a child for one of those that they contain."""


def attach_weight(layer: nn.Module, quantizer: Quantizer) -> None:
    """Quantize the weight of a layer from now on; its range is fitted to the weight as it is."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    quantizer.to(weight).fit(weight)
    parametrize.register_parametrization(layer, "weight", quantizer)


def attach_input(layer: nn.Module, quantizer: Quantizer | FixedQuantizer) -> None:
    """Quantize what a layer reads from now on, instead of as it may have been before."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if input_quantizer(layer) is None:
        layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    setattr(layer, INPUT, quantizer.to(weight))


def _quantize_input(
    layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    grid = getattr(layer, INPUT)
    if inputs:
        return (grid(inputs[0]), *inputs[1:]), named
    return inputs, {**named, "input": grid(named["input"])}


def weight_quantizer(layer: nn.Module) -> Quantizer | None:
    """Return the quantizer of a layer's weight, if it has one."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    (quantizer,) = layer.parametrizations["weight"]  # type: ignore[index]
    assert isinstance(quantizer, Quantizer)
    return quantizer


def latent_weight(layer: nn.Module) -> Tensor:
    """Return the weight that training moves beneath the quantizer of a layer's weight."""
    weight = layer.parametrizations["weight"].original  # type: ignore[index, union-attr]
    assert isinstance(weight, Tensor)
    return weight


def input_quantizer(layer: nn.Module) -> Quantizer | FixedQuantizer | None:
    """Return the quantizer of what a layer reads, if it has one."""
    found = getattr(layer, INPUT, None)
    assert found is None or isinstance(found, Quantizer | FixedQuantizer)
    return found


def settle_weight(layer: nn.Module) -> None:
    """Leave the quantized weight of a layer in place of its quantizer; a parameter as before."""
    parametrized.settle(layer, "weight")


def settle_input(layer: nn.Module) -> None:
    """Fix the grid of what a layer reads, or drop a quantizer that has never seen data."""
    quantizer = input_quantizer(layer)
    assert isinstance(quantizer, Quantizer)
    if quantizer.waits:
        detach_input(layer)
    else:
        setattr(layer, INPUT, FixedQuantizer.of(quantizer))


def detach_input(layer: nn.Module) -> None:
    """Let a layer read what it is given, as it is."""
    if input_quantizer(layer) is None:
        return
    delattr(layer, INPUT)
    for key in _unhook(layer._forward_pre_hooks, _quantize_input):
        del layer._forward_pre_hooks_with_kwargs[key]


def attach_output(module: nn.Module, grid: FixedQuantizer) -> None:
    """Round what a module returns, one tensor, from now on; it is none of ``CONTAINERS``."""
    assert not isinstance(module, CONTAINERS)
    if output_quantizer(module) is None:
        module.register_forward_hook(_quantize_output)
    setattr(module, OUTPUT, grid)


def _quantize_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return getattr(module, OUTPUT)(output)  # type: ignore[no-any-return]


def output_quantizer(module: nn.Module) -> FixedQuantizer | None:
    """Return the grid of what a module returns, if it has one."""
    found = getattr(module, OUTPUT, None)
    assert found is None or isinstance(found, FixedQuantizer)
    return found


def detach_output(module: nn.Module) -> None:
    """Let a module return what it computes, as it is."""
    if output_quantizer(module) is None:
        return
    delattr(module, OUTPUT)
    _unhook(module._forward_hooks, _quantize_output)


def _unhook(hooks: dict[int, Any], hook: Any) -> list[int]:
    """Take a hook away whose handle nobody keeps, since copies of a network have it, too.

    Returns:
        The keys that it had.
    """
    keys = [key for key, each in hooks.items() if each is hook]
    for key in keys:
        del hooks[key]
    return keys
