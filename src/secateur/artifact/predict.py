"""Classify samples with the model.onnx beside this file; needs numpy and onnxruntime, no more.

    python predict.py images.npy

The array holds one sample or several, in the shape that the network takes. Of images, whole
numbers are pixels from 0 to 255 and others pixels from 0 to 1: model.onnx says how to normalize
them and what the classes are called, if that was known when it was made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime


class Network:
    """A network in an ONNX file, with what the file says of its inputs and classes."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0]
        notes = self.session.get_modelmeta().custom_metadata_map
        self.classes: list[str] = json.loads(notes.get("classes", "[]"))
        self.mean, self.std = (
            np.array(notes.get(key, default).split(","), np.float32)
            for key, default in (("mean", "0"), ("std", "1"))
        )

    def __call__(self, samples: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return the outputs, one row a sample."""
        samples = samples.reshape(-1, *self.input.shape[1:])
        if self.input.type == "tensor(float)":
            pixels = samples / 255 if np.issubdtype(samples.dtype, np.integer) else samples
            channels = (-1, *(1,) * (samples.ndim - 2))
            samples = (pixels - self.mean.reshape(channels)) / self.std.reshape(channels)
            samples = samples.astype(np.float32)
        (outputs,) = self.session.run(None, {self.input.name: samples})
        return np.asarray(outputs)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    network = Network(Path(__file__).with_name("model.onnx"))
    for row in network(np.load(sys.argv[1])):
        shares = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        best = int(row.argmax())
        print(network.classes[best] if network.classes else best, f"{shares[best]:.1%}", sep="\t")


if __name__ == "__main__":
    main()
