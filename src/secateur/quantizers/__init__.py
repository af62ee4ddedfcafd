"""Learned quantizers of weights and activations, and how they are attached to a network.

Quantizer(8, power=True)                           # DJPQ: step, range and power; bits follow
Quantizer(4, widths=(4,), channels=64)             # LSQ at 4 bits, one step per channel
attach_weight(layer, ...), attach_input(layer, ...)
"""

from __future__ import annotations

from secateur.quantizers.attach import (
    attach_input,
    attach_output,
    attach_weight,
    detach_input,
    detach_output,
    input_quantizer,
    latent_weight,
    output_quantizer,
    settle_input,
    settle_weight,
    weight_quantizer,
)
from secateur.quantizers.functional import quantize
from secateur.quantizers.quantizer import FixedQuantizer, Quantizer
from secateur.quantizers.signs import unsigned_inputs
from secateur.quantizers.text import activation_bits, grids, has_outputs, regrid

__all__ = [
    "FixedQuantizer",
    "Quantizer",
    "activation_bits",
    "attach_input",
    "attach_output",
    "attach_weight",
    "detach_input",
    "detach_output",
    "grids",
    "has_outputs",
    "input_quantizer",
    "latent_weight",
    "output_quantizer",
    "quantize",
    "regrid",
    "settle_input",
    "settle_weight",
    "unsigned_inputs",
    "weight_quantizer",
]
