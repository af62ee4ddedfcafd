"""Linear layers that compute on the levels of their weights, and round what they read to bytes.

Weights alone on levels save bytes but no time: ONNX Runtime makes floats of them on every run. Two
forms of a layer multiply integers. Up to a batch of 8 its weight has 2, 4 or 8 bits
(:mod:`secateur.artifact.nbits`); beyond, where arithmetic takes longer than reading weights, it has
8 (:mod:`secateur.artifact.dynamic`), unless its levels are too large for that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from secateur.artifact import dynamic, nbits
from secateur.codec import Quantized
from secateur.errors import ArtifactError
from secateur.quantizers.attach import INPUT

SMALL_BATCH = 8
"""Samples of an inference up to which weights have few bits (docs/export.md)."""

WEIGHTS = {nbits.OPERATOR: 1, "MatMulInteger": 1}
"""Position of the weight among the inputs of the operators."""


def with_products(
    model: nn.Module, quantized: Mapping[str, Quantized], batch: int
) -> tuple[nn.Module, set[str]]:
    """Return a copy of a network that multiplies integers, and the weights that it does so with.

    Layers that read through a grid keep their own integers, and so do others than plain
    ``nn.Linear``, and those that would not get smaller.

    Args:
        model: a plain network.
        quantized: levels of weights, by name of the tensor.
        batch: samples of an inference.
    """
    model = copy.deepcopy(model)
    done = set()
    for name, module in model.named_modules():
        weight = f"{name}.weight" if name else "weight"
        levels = quantized.get(weight)
        if levels is None or type(module) is not nn.Linear or hasattr(module, INPUT):
            continue
        bits = nbits.width_of(levels)
        if batch > SMALL_BATCH and dynamic.fits(levels):
            dynamic.equip(module, levels)
        elif bits is not None and nbits.bytes_of(levels, bits) < module.weight.nbytes:
            nbits.equip(module, levels, bits)
        else:
            continue
        done.add(weight)
    return model, done


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
