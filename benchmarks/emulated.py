"""What ONNX Runtime computes on a processor without VNNI, where the machine at hand has it.

QEMU's user mode (Debian: `apt install qemu-user-static`) runs Python as on an Intel Haswell: AVX2,
and int8 in pairs of products that saturate. Times mean nothing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

EMULATOR = "qemu-x86_64-static"

_RUN = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
(outputs,) = session.run(None, {session.get_inputs()[0].name: numpy.load(sys.argv[2])})
numpy.save(sys.argv[3], outputs)
"""


def haswell(path: Path, inputs: Tensor) -> Tensor | None:
    """Return the output of an ONNX file of one input and one output; None without the emulator."""
    if not shutil.which(EMULATOR):
        return None
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.npy", Path(folder) / "found.npy"
        np.save(given, inputs.numpy())
        python = [sys.executable, "-c", _RUN, str(path), str(given), str(found)]
        # its warnings list features of Haswell that ordinary programs do not see
        subprocess.run([EMULATOR, "-cpu", "Haswell", *python], check=True, capture_output=True)
        return torch.from_numpy(np.load(found))
