"""The packed file ``model.secateur``: write it, look into it, load it (docs/format.md)."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import TypeAlias

import torch
from torch import Tensor, nn

from secateur.artifact import container
from secateur.artifact.architecture import SEPARATE, Architecture, Changes, build
from secateur.attention import separated
from secateur.codec import Quantized, Storage, decode, describe, encode, format_of, levels, storage
from secateur.errors import ArtifactError, MembershipError, SecateurError, did_you_mean
from secateur.quantizers import grids, has_outputs

JSON: TypeAlias = "str | int | float | bool | list[JSON] | dict[str, JSON] | None"
Path: TypeAlias = "str | PathLike[str]"

_MODEL, _ARGUMENTS = "model", "arguments"
_WIDTHS, _ACTIVATIONS, _ATTENTION = "widths", "activations", "attention"
_CHANGES = (_WIDTHS, _ACTIVATIONS, _ATTENTION)
_RECORD_SLACK = 16  # bytes by which a record may exceed the tensor's raw bytes


@dataclass(frozen=True)
class PackedSize:
    """What a packed file takes.

    Attributes:
        file: bytes of the whole file.
        tensors: per stored tensor (a tied one under its first name) the bits of its record.
    """

    file: int
    tensors: Mapping[str, Storage]

    @property
    def overhead(self) -> int:
        """Bits of the file that are neither a value nor say where one is."""
        total = sum(self.tensors.values(), Storage())
        return 8 * self.file - total.values - total.index


@dataclass(frozen=True)
class Entry:
    """One stored tensor: bytes of its record, and how it is coded in a few words."""

    bytes: int
    coder: str


@dataclass(frozen=True)
class Header:
    """What a packed file says of itself, known without building the network.

    Attributes:
        version: of the format.
        reference: the function that builds the architecture, if the file names one.
        arguments: its keyword arguments.
        changes: what the network is that the callable does not build.
        metadata: what else the writer noted, such as the input normalization.
        entries: the stored tensors in ``state_dict`` order (their names belong to the network).
        file: bytes of the whole file.
    """

    version: int
    reference: str | None
    arguments: Mapping[str, JSON]
    changes: Changes
    metadata: Mapping[str, str]
    entries: tuple[Entry, ...]
    file: int


@dataclass(frozen=True)
class Unpacked:
    """What a packed file holds.

    Attributes:
        model: the network, in eval mode.
        quantized: levels and scale of the tensors that are stored so, by every name that a tensor
            has in the ``state_dict``.
    """

    model: nn.Module
    quantized: Mapping[str, Quantized]


def save(
    path: Path,
    model: nn.Module,
    quantized: Mapping[str, Quantized],
    *,
    reference: str | None,
    arguments: Mapping[str, JSON] | None = None,
    widths: str = "",
    metadata: Mapping[str, str] | None = None,
) -> PackedSize:
    """Write a network's whole ``state_dict`` as a packed file, at once or not at all.

    The same input gives the same bytes.

    Args:
        path: the file to write, replaced if it exists.
        model: a plain network, on any device; its layers may read through fixed grids.
        quantized: levels and scale of the tensors, by name, that are stored so; the others are
            stored bit for bit.
        reference: ``module:callable`` that builds the network, or None if the reader brings it.
        arguments: keyword arguments of that callable.
        widths: of a network that has lost channels (:func:`secateur.channels.widths`).
        metadata: further strings to note; ``model``, ``arguments``, ``widths``, ``activations``,
            ``attention`` and ``secateur`` are taken.

    Raises:
        SecateurError: ``quantized`` or ``metadata`` has a name that does not fit.
        MembershipError: a tensor is not what its levels and scale say.
        ArtifactError: the network holds state that is not a tensor, or an unknown dtype.
    """
    architecture = Architecture.of(model)
    changes = Changes(widths, grids(model), _attention(model))
    text = _text(reference, arguments, changes, metadata)
    by_name = _by_first_name(architecture, quantized)
    records, sizes = [], {}
    for name, tensor in architecture.tensors.items():
        with _naming(name):
            records.append(encode(tensor, by_name.get(name)))
            sizes[name] = storage(tensor, by_name.get(name))
    activations = 1 if _ACTIVATIONS not in text else 3 if has_outputs(text[_ACTIVATIONS]) else 2
    attention = 4 if changes.attention else 1
    version = max([activations, attention, *map(format_of, records)])
    file = container.write(path, text, architecture, records, version)
    return PackedSize(file, sizes)


def overhead_bytes(
    model: nn.Module,
    *,
    reference: str | None,
    arguments: Mapping[str, JSON] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Return the bytes of a packed file that no tensor's entry takes, before it is written.

    A compressed file may take up to two bytes less for each digit that its length is shorter than
    that of the dense network.

    Args:
        model: the network, compressed or not.
        reference: as :func:`save` takes it.
        arguments: as :func:`save` takes them.
        metadata: as :func:`save` takes it.

    Raises:
        SecateurError: ``metadata`` has a name that is taken.
        ArtifactError: the network holds state that is not a tensor.
    """
    architecture = Architecture.of(model)
    text = _text(reference, arguments, Changes(attention=_attention(model)), metadata)
    return container.overhead_bytes(text, architecture.raw_bytes)


def read_header(path: Path) -> Header:
    """Return what a packed file says of itself; builds and imports nothing.

    Raises:
        ArtifactError: it is not a packed file of a known version, or is damaged.
    """
    with container.opened(path) as packed:
        text = dict(packed.metadata)
        reference, arguments = text.pop(_MODEL, None), _arguments(text.pop(_ARGUMENTS, "{}"))
        changes = Changes(*(text.pop(key, "") for key in _CHANGES))
        version = int(text.pop(container.KEY))
        entries = tuple(Entry(len(record), describe(record)) for record in packed.records())
        return Header(version, reference, arguments, changes, text, entries, packed.file_bytes)


def load(path: Path, model: nn.Module | None = None, trust: bool = False) -> nn.Module:
    """Return the network of a packed file, in eval mode.

    Architectures of ``secateur.zoo`` and ``torchvision.models`` load by name alone, in float32.
    Nothing is unpickled, and no other module is imported unless ``trust`` says so.

    Args:
        path: the packed file.
        model: a network of the right architecture; its tensors are overwritten, it loses the
            channels and gets the grids that the file says, and it is returned. Nothing is
            overwritten unless the whole file is good.
        trust: build whatever the file names, which imports and runs that module, and believe
            its arguments.

    Raises:
        ArtifactError: the file is damaged, hostile, of another version, or of another or unknown
            architecture.
    """
    return unpack(path, model, trust).model


def unpack(path: Path, model: nn.Module | None = None, trust: bool = False) -> Unpacked:
    """Return the network of a packed file, and the levels that its weights are stored as.

    Arguments and errors are those of :func:`load`.
    """
    with container.opened(path) as packed:
        text = packed.metadata
        changes = Changes(*(text.get(key, "") for key in _CHANGES))
        if model is None:
            model = build(
                text.get(_MODEL),
                _arguments(text.get(_ARGUMENTS, "{}")),
                changes,
                fingerprint=packed.fingerprint,
                file_bytes=packed.file_bytes,
                trust=trust,
            )
        architecture, changes = _match(model, changes, packed.fingerprint)
        architecture.require(packed.fingerprint)
        packed.check_size(architecture.raw_bytes, len(architecture.tensors))
        decoded, quantized = _decode(packed, architecture)
    with torch.no_grad():
        for name, tensor in Architecture.of(changes.made(model)).tensors.items():
            tensor.copy_(decoded[name])
    names = architecture.first_names.items()
    return Unpacked(
        model.eval(), {name: quantized[first] for name, first in names if first in quantized}
    )


def _match(model: nn.Module, changes: Changes, fingerprint: int) -> tuple[Architecture, Changes]:
    """Return what a network will be, and the changes that it lacks: it may be as wide already."""
    found = Architecture.of(model)
    if found.fingerprint == fingerprint and grids(model) == changes.activations:
        return found, replace(changes, widths="")
    as_wide = replace(changes, widths="")
    found = Architecture.of(as_wide.made(copy.deepcopy(model)))
    if found.fingerprint == fingerprint:
        return found, as_wide
    return Architecture.of(changes.made(copy.deepcopy(model))), changes


def _decode(
    packed: container.Packed, architecture: Architecture
) -> tuple[dict[str, Tensor], dict[str, Quantized]]:
    records = list(packed.records())
    if len(records) != len(architecture.tensors):
        raise ArtifactError(
            f"the file holds {len(records)} tensors, not {len(architecture.tensors)}."
        )
    decoded, quantized = {}, {}
    for record, (name, tensor) in zip(records, architecture.tensors.items(), strict=True):
        if len(record) > tensor.nbytes + _RECORD_SLACK:
            raise ArtifactError(f"{name}: its record is longer than the tensor itself.")
        with _naming(name):
            found = levels(record, tensor.shape)
            if found is None:
                decoded[name] = decode(record, tensor.shape, tensor.dtype)
            else:
                quantized[name], decoded[name] = found, found.weight(tensor.dtype)
    return decoded, quantized


@contextmanager
def _naming(tensor: str) -> Iterator[None]:
    """Put the tensor's name in front of an error."""
    try:
        yield
    except (ArtifactError, MembershipError) as error:
        raise type(error)(f"{tensor}: {error}") from None


def _text(
    reference: str | None,
    arguments: Mapping[str, JSON] | None,
    changes: Changes,
    metadata: Mapping[str, str] | None,
) -> dict[str, str]:
    """Return the strings that a file notes."""
    text = dict(metadata or {})
    for key in (_MODEL, _ARGUMENTS, *_CHANGES, container.KEY):
        if key in text:
            raise SecateurError(f"metadata: the key '{key}' is taken; choose another.")
    if reference is not None:
        text[_MODEL] = reference
    if changes.widths:
        text[_WIDTHS] = changes.widths
    if changes.activations:
        text[_ACTIVATIONS] = changes.activations
    if changes.attention:
        text[_ATTENTION] = changes.attention
    if arguments:
        text[_ARGUMENTS] = json.dumps(arguments, separators=(",", ":"), sort_keys=True)
    return text


def _attention(model: nn.Module) -> str:
    """Return what a file says of the attention of a network."""
    return SEPARATE if separated(model) else ""


def _by_first_name(
    architecture: Architecture, quantized: Mapping[str, Quantized]
) -> dict[str, Quantized]:
    """Return ``quantized`` keyed by the first name of each tensor."""
    for name in quantized:
        if name not in architecture.first_names:
            raise SecateurError(
                f"quantized: the network has no tensor '{name}'."
                + did_you_mean(name, architecture.first_names)
            )
    return {architecture.first_names[name]: each for name, each in quantized.items()}


def _arguments(text: str) -> dict[str, JSON]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ArtifactError("arguments: they are not a JSON object; the file is damaged.")
    return arguments
