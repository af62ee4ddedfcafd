"""Runtimes that execute an ONNX file on the CPU: one batch again and again, or batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.artifact.onnx import INPUT_NAME, require
from secateur.errors import ArtifactError, MissingDependencyError, SecateurError

Feeds = Mapping[str, npt.NDArray[Any]]
"""What a network reads, by the name of the input."""

Outputs = list[npt.NDArray[Any]]
"""What a network returns; the memory may be that of the runtime, for the next run to overwrite."""

Loaded = Callable[[Feeds], Outputs]
"""A file in a runtime, for feeds of the shapes that it was loaded for."""

Inference = Callable[[], Outputs]
"""One inference."""

INTEGERS = frozenset(
    ("DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "MatMulNBits")
)
"""Operators that read integers; runtimes choose how to multiply these."""


@dataclass(frozen=True)
class Runtime:
    """A program that runs networks.

    Attributes:
        title: its name for people.
        package: that has to be installed.
        install: command that does so.
        load: reads a file for feeds of such shapes and a number of threads.
    """

    title: str
    package: str
    install: str
    load: Callable[[Path, Feeds, int], Loaded]

    @property
    def version(self) -> str | None:
        """What is installed; None if nothing is."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None

    def prepare(self, path: Path, feeds: Feeds, threads: int) -> Inference:
        """Load a file and run it once.

        Args:
            path: an ONNX file.
            feeds: what it reads; their shapes may be compiled in.
            threads: that one inference may use.

        Raises:
            MissingDependencyError: the runtime is not installed.
            ArtifactError: it refuses the file or what it reads.
        """
        with self.named(path):
            run = self.load(path, feeds, threads)
            run(feeds)
        return lambda: run(feeds)

    @contextmanager
    def named(self, path: Path) -> Iterator[None]:
        """Turn what this runtime raises about a file into errors that name both."""
        try:
            yield
        except ImportError as error:
            raise MissingDependencyError(
                f"runtime: {self.title} is not installed.\nInstall it with: {self.install}"
            ) from error
        except Exception as error:  # each runtime has exception classes of its own
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(f"{path}: {self.title} cannot run this file.\n{reason}") from error


class RuntimeModel:
    """An ONNX file of ours, with one input and one output, in a runtime; called like a module.

    Args:
        runtime: that runs it.
        path: the file; it is loaded again for batches of another size.
        threads: that one inference may use.
    """

    def __init__(self, runtime: Runtime, path: Path, threads: int) -> None:
        self._runtime, self._path, self._threads = runtime, path, threads
        self._shape: torch.Size | None = None
        self._run: Loaded

    def __call__(self, batch: Tensor) -> Tensor:
        """Return the output for a batch.

        Raises:
            MissingDependencyError: the runtime is not installed.
            ArtifactError: it refuses the file or what it reads.
        """
        feeds = {INPUT_NAME: batch.detach().cpu().contiguous().numpy()}
        with self._runtime.named(self._path):
            if batch.shape != self._shape:
                self._run = self._runtime.load(self._path, feeds, self._threads)
                self._shape = batch.shape
            return torch.from_numpy(self._run(feeds)[0].copy())


def _onnxruntime(path: Path, feeds: Feeds, threads: int) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return lambda given: session.run(None, dict(given))


def _openvino(path: Path, feeds: Feeds, threads: int) -> Loaded:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({name: list(value.shape) for name, value in feeds.items()})
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # not bfloat16 behind the user's back
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(given: Feeds) -> Outputs:
        request.infer(dict(given), share_inputs=True)
        return [tensor.data for tensor in request.output_tensors]

    return run


RUNTIMES = {
    "onnxruntime": Runtime(
        "ONNX Runtime", "onnxruntime", 'pip install "secateur[onnx]"', _onnxruntime
    ),
    "openvino": Runtime("OpenVINO", "openvino", 'pip install "secateur[openvino]"', _openvino),
}
"""The runtimes by the name of their package."""


def feeds_of(path: Path, batch: int) -> dict[str, npt.NDArray[Any]]:
    """Return something that a file can read: random numbers, or zeros where it takes integers.

    Args:
        path: an ONNX file whose inputs have fixed sizes but for the batch, dimension 0.
        batch: samples at a time.

    Raises:
        ArtifactError: it is no ONNX file.
        SecateurError: the file fixes another batch, or leaves another size open.
    """
    graph = _graph(path)
    from onnx.helper import tensor_dtype_to_np_dtype

    weights = {each.name for each in graph.initializer}
    generator = np.random.default_rng(0)
    feeds: dict[str, npt.NDArray[Any]] = {}
    for given in graph.input:
        if given.name in weights:
            continue
        kind = given.type.tensor_type
        shape = _shape(path, given.name, [each.dim_value for each in kind.shape.dim], batch)
        dtype = tensor_dtype_to_np_dtype(kind.elem_type)
        real = np.issubdtype(dtype, np.floating)
        values = generator.standard_normal(shape) if real else np.zeros(shape)
        feeds[given.name] = values.astype(dtype)
    return feeds


def holds_integers(path: Path) -> bool:
    """Return whether an ONNX file has weights as integers, or rounds to such what it multiplies.

    Raises:
        MissingDependencyError: the extra ``onnx`` is not installed.
        ArtifactError: it is no ONNX file.
    """
    from onnx import TensorProto

    graph = _graph(path)
    kinds = {node.op_type for node in graph.node}
    integers = any(each.data_type == TensorProto.INT8 for each in graph.initializer)
    return integers or bool(kinds & INTEGERS) or any(k.startswith("QLinear") for k in kinds)


def _graph(path: Path) -> Any:
    """Read the graph of a file without the weights that lie beside it."""
    require("onnx")
    import onnx

    try:
        return onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf, and the operating system, raise kinds of their own
        raise ArtifactError(f"{path}: this is no ONNX file that can be read.") from error


def _shape(path: Path, name: str, sizes: list[int], batch: int) -> tuple[int, ...]:
    """Return the sizes of an input, 0 where the file leaves them open, for a batch."""
    first, *others = sizes or [0]
    if first not in (0, batch):
        raise SecateurError(
            f"batch: {batch} is not what {path} takes, which fixes {first}.\n"
            "Export it with an open batch dimension, or ask for that batch only."
        )
    if 0 in others:
        raise SecateurError(
            f"{path}: the input '{name}' leaves more open than its batch, so nothing can be timed."
            "\nExport it with fixed sizes in all other dimensions."
        )
    return (batch, *others)
