"""The formats that a network is exported to, each a folder that its readers take as it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from secateur.artifact import pack_quantized, qonnx
from secateur.artifact.onnx import export_onnx
from secateur.codec import Quantized
from secateur.errors import SecateurError, did_you_mean

MODEL, PREDICT = "model.onnx", "predict.py"


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        model: the network, in evaluation mode.
        example: a batch that it takes.
        quantized: levels of its tensors, by name.
        metadata: what is noted of its inputs (``mean``, ``std``) and ``classes``, as text.
        batch: samples of an inference as it is deployed, if that is known.
    """

    model: nn.Module
    example: Tensor
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    batch: int | None = None


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        summary: who reads it, in a few words.
        write: puts its files into a folder and returns them.
    """

    summary: str
    write: Callable[[Source, Path], list[Path]]


def write_onnx(source: Source, folder: Path) -> list[Path]:
    """Write ``model.onnx`` and a program that runs it with numpy and onnxruntime alone.

    Raises:
        SecateurError: as :func:`secateur.export_onnx` does.
    """
    path = folder / MODEL
    export_onnx(source.model, source.example, path, source.quantized, source.batch, source.metadata)
    shutil.copyfile(Path(__file__).with_name(PREDICT), folder / PREDICT)
    return [path, folder / PREDICT]


def _write_qonnx(source: Source, folder: Path) -> list[Path]:
    return [qonnx.export_qonnx(source.model, source.example, folder / MODEL, source.quantized)]


def _write_compressed_tensors(source: Source, folder: Path) -> list[Path]:
    return pack_quantized.save(source.model, source.quantized, folder)


FORMATS = {
    "onnx": Format("ONNX Runtime, OpenVINO and others", write_onnx),
    "qonnx": Format("FPGA flows such as FINN and hls4ml; any number of bits", _write_qonnx),
    "compressed-tensors": Format("vLLM and transformers; linear layers", _write_compressed_tensors),
}
"""Every format, by the name that a user gives."""


def export(source: Source, format: str, folder: Path) -> list[Path]:
    """Write a network in a format.

    Args:
        source: the network.
        format: a name in :data:`FORMATS`.
        folder: where its files go; created if it is not there.

    Returns:
        The files.

    Raises:
        SecateurError: there is no such format, or the network cannot be written in it.
    """
    if format not in FORMATS:
        raise SecateurError(
            f"format: '{format}' is none of {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return FORMATS[format].write(source, folder)
