"""Linear layers that compute on the levels of their weights, and round what they read to bytes.

Weights alone on levels save bytes but no time: runtimes make floats of them on loading. Two
forms of a layer multiply integers. If it reads up to 8 rows in an inference, its weight has 2, 4 or
8 bits (:mod:`secateur.artifact.nbits`); beyond, where arithmetic takes longer than reading weights,
it has 8 (:mod:`secateur.artifact.dynamic`), unless its levels are too large for that. A row is a
sample or, in a transformer, a token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.artifact import dynamic, nbits
from secateur.codec import Quantized
from secateur.errors import ArtifactError
from secateur.quantizers.attach import INPUT

FEW_ROWS = 8
"""Rows that a layer reads in an inference, up to which its weight has few bits (docs/export.md)."""

WEIGHTS = {nbits.OPERATOR: 1, "MatMulInteger": 1}
"""Position of the weight among the inputs of the operators."""


def with_products(
    model: nn.Module,
    quantized: Mapping[str, Quantized],
    example_input: Tensor | tuple[Tensor, ...],
    batch: int,
) -> tuple[nn.Module, set[str]]:
    """Return a copy of a network that multiplies integers, and the weights that it does so with.

    Layers that read through a grid keep their own integers, and so do others than plain
    ``nn.Linear``, and those that would not get smaller.

    Args:
        model: a plain network.
        quantized: levels of weights, by name of the tensor.
        example_input: a batch, or the tuple of arguments.
        batch: samples of an inference.
    """
    model = copy.deepcopy(model).eval()
    rows = _rows(model, example_input)
    done = set()
    for name, module in model.named_modules():
        weight = f"{name}.weight" if name else "weight"
        levels = quantized.get(weight)
        if levels is None or type(module) is not nn.Linear or hasattr(module, INPUT):
            continue
        bits = nbits.width_of(levels)
        if batch * rows.get(name, 1) > FEW_ROWS and dynamic.fits(levels):
            dynamic.equip(module, levels)
        elif bits is not None and nbits.bytes_of(levels, bits) < module.weight.nbytes:
            nbits.equip(module, levels, bits)
        else:
            continue
        done.add(weight)
    return model, done


@torch.no_grad()
def _rows(model: nn.Module, example_input: Tensor | tuple[Tensor, ...]) -> dict[str, float]:
    """Return how many rows each linear layer reads for a sample."""
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    rows: dict[str, float] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def note(own: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                rows[name] = given[0].shape[:-1].numel() / len(inputs[0])

            handles.append(module.register_forward_pre_hook(note))
    model(*inputs)
    for handle in handles:
        handle.remove()
    return rows


def translations() -> dict[Any, Callable[..., Any]]:
    """Return what the exporter writes for the operators of both forms."""
    return nbits.translations() | dynamic.translations()


def check_products(graph: Any, weights: int) -> None:
    """Raise ArtifactError unless an exported graph multiplies with so many weights of integers."""
    found = {node.inputs[WEIGHTS[node.op_type]].name for node in graph if node.op_type in WEIGHTS}
    if len(found) != weights:
        raise ArtifactError(
            f"onnx: {len(found)} of {weights} linear weights are integers in the exported graph.\n"
            "A layer's forward() was not called; export without a batch size."
        )
