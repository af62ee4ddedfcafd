"""What users name on the command line: a network, the shape of its input, whole numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.artifact.onnx import export_onnx, require
from secateur.artifact.packed import Header, read_header, unpack
from secateur.codec import Quantized
from secateur.cost import FULL_BITS, bits_by_layer
from secateur.errors import ArtifactError, SecateurError
from secateur.finish import ONNX, PACKED
from secateur.quantizers import activation_bits
from secateur.recipe.source import apply_overrides
from secateur.reference import build

INPUT_KEY = "input"
"""Metadata key of a packed file: the shape of one input batch, written like 1x3x224x224."""


@dataclass(frozen=True)
class Target:
    """A network that the user named.

    Attributes:
        model: the network.
        input_shape: shape of one input batch as the packed file states it, or None.
        header: what the packed file says of itself, or None for a network from a callable.
        quantized: levels and scale of its quantized tensors, by name.
    """

    model: nn.Module
    input_shape: str | None = None
    header: Header | None = None
    quantized: Mapping[str, Quantized] = field(default_factory=dict)

    @property
    def weight_bits(self) -> dict[str, int]:
        """Bits of the weights of the layers that are quantized, by layer."""
        return bits_by_layer(self.quantized)

    @property
    def activation_bits(self) -> dict[str, int]:
        """Bits of what layers read through a grid, by layer."""
        return activation_bits(self.model)

    def bits(self, weight_bits: int | None, activation_bits: int) -> tuple[int, int]:
        """Return the bits (of weights, of activations) of layers that are not quantized.

        Raises:
            SecateurError: bits of weights are asked for, but the file has its own.
        """
        own = sorted(set(self.weight_bits.values()))
        if own and weight_bits is not None:
            raise SecateurError(
                f"--weight-bits: {weight_bits} is not for this network, whose weights are "
                f"quantized to {' and '.join(map(str, own))} bits.\n"
                "Leave it out; each layer counts with the bits that it has in the file."
            )
        return FULL_BITS if weight_bits is None else weight_bits, activation_bits

    def example(self, shape: str | None) -> Tensor:
        """Return an input of zeros, of the shape that is asked for or that the file states.

        Raises:
            SecateurError: no shape is known, or it is malformed.
        """
        return example_input(shape or self.input_shape)

    def inference(self, shape: str | None) -> Callable[[], Any]:
        """Return one inference as a call, on random numbers, which cost more energy than zeros."""
        batch = torch.randn_like(self.example(shape))
        model = self.model.eval()
        return torch.inference_mode()(lambda: model(batch))

    def dense(self) -> nn.Module | None:
        """Build the network that a packed file was made from, with other weights; else None."""
        if self.header is None or self.header.reference is None:
            return None
        return build(self.header.reference, self.header.arguments)


def open_target(target: str, trust: bool, settings: Sequence[str] | None = None) -> Target:
    """Load or build what the user names.

    Args:
        target: folder of a run, packed file, or ``module:callable``.
        trust: whether a packed file may name a module of any kind.
        settings: ``key=value``, arguments of the callable.

    Raises:
        SecateurError: nothing is there, it is damaged, or what is called is no network; or there
            are settings, but nothing is called.
    """
    path, arguments = Path(target), apply_overrides({}, settings or ())
    if arguments and path.exists():
        raise SecateurError(
            f"--set: '{target}' is stored, arguments and all; leave --set out, or name what "
            "builds the network as module:callable."
        )
    if path.is_dir():
        if not (path / PACKED).is_file():
            raise SecateurError(
                f"target: the folder '{target}' holds no {PACKED}.\n"
                "Give the folder that 'secateur compress --out' wrote."
            )
        path /= PACKED
    if path.is_file():
        return _open_packed(path, trust)
    if ":" not in target:
        raise SecateurError(
            f"target: '{target}' is no file, no folder and not of the form module:callable.\n"
            "Examples: runs/demo, model.secateur, torchvision.models:resnet18"
        )
    return Target(build(target, arguments, "target"))


def _open_packed(path: Path, trust: bool) -> Target:
    try:
        header, found = read_header(path), unpack(path, trust=trust)
        return Target(found.model, header.metadata.get(INPUT_KEY), header, found.quantized)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def example_input(shape: str | None) -> Tensor:
    """Return zeros of a shape written like ``1x3x224x224``.

    Raises:
        SecateurError: no shape is known, or it is malformed.
    """
    example = "for example --input 1x3x224x224 (batch, channels, height, width)"
    if shape is None:
        raise SecateurError(f"--input: the shape of the input is not known; give it,\n{example}.")
    if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})*", shape):
        raise SecateurError(f"--input: '{shape}' is not a shape; give it as\n{example}.")
    sizes = [int(size) for size in shape.split("x")]
    if torch.Size(sizes).numel() > 2**30:
        raise SecateurError(f"--input: '{shape}' has over 2^30 elements; give a smaller one.")
    return torch.zeros(sizes)


def whole_numbers(text: str, option: str) -> list[int]:
    """Return whole numbers written like ``0,1,2``.

    Raises:
        SecateurError: the text is something else.
    """
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise SecateurError(f"{option}: '{text}' should be whole numbers, for example 0,1,2.")
    return [int(number) for number in text.split(",")]


def onnx_file(target: str, path: Path, shape: str | None, trust: bool, batch: int) -> Path:
    """Return the ONNX file of what the user names; one that there is, or a new one.

    Args:
        target: an ONNX file, or anything that :func:`open_target` takes.
        path: of the file to write if there is none.
        shape: of its input, if it is not known.
        trust: whether to run the module that a packed file names.
        batch: samples of an inference; a new file is in the form for it.

    Raises:
        SecateurError: it cannot be opened or exported.
    """
    given = Path(target) / ONNX if Path(target).is_dir() else Path(target)
    if given.suffix == ".onnx" and given.is_file():
        return given
    opened = open_target(target, trust)
    return export_onnx(opened.model, opened.example(shape), path, opened.quantized, batch)


def dense_onnx_file(target: str, path: Path, shape: str | None, trust: bool) -> Path:
    """Write the ONNX file of the dense network that a run or a packed file was made from.

    Its weights are new ones: how fast it runs does not depend on them.

    Raises:
        SecateurError: it is not known.
    """
    opened = None if target.endswith(".onnx") else open_target(target, trust)
    dense = opened.dense() if opened else None
    if opened is None or dense is None:
        raise SecateurError(
            f"--against: '{target}' does not say which dense network it was made from.\n"
            "Name that network, or its ONNX file: --against dense.onnx"
        )
    return export_onnx(dense, opened.example(shape), path)


def notes_of(target: str, opened: Target) -> dict[str, str]:
    """Return what is known of a network's inputs and classes, for an ONNX file.

    Args:
        target: of which a run has an ONNX file with the names of its classes.
        opened: of which a packed file knows the normalization.
    """
    notes = dict(opened.header.metadata) if opened.header else {}
    path = Path(target) / ONNX
    if path.is_file():
        require("onnx")
        import onnx

        stored = onnx.load(path, load_external_data=False)
        notes |= {each.key: each.value for each in stored.metadata_props}
    return notes
