"""Compression without training, from a few hundred inputs.

fits = reconstruct(model, batches, sets.NM(2, 4))      # weights, layer by layer, in place
reestimate(small, batches)                             # BatchNorms after channels have gone
found = quantize(model, batches)                       # weights and activations to int8, in place
export_onnx(model, example_input, path, found.quantized)
"""

from secateur.posttraining.biases import round_biases
from secateur.posttraining.equalization import equalize
from secateur.posttraining.integers import Quantization, deployable, quantize, require_int8
from secateur.posttraining.ranges import Calibration
from secateur.posttraining.sequence import Fit, reconstruct, reestimate

__all__ = [
    "Calibration",
    "Fit",
    "Quantization",
    "deployable",
    "equalize",
    "quantize",
    "reconstruct",
    "reestimate",
    "require_int8",
    "round_biases",
]
