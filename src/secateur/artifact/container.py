"""The container of a packed file: safetensors with one blob of records and checksums."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from secateur.artifact.architecture import Architecture
from secateur.codec.bits import read_varint, varint
from secateur.errors import ArtifactError
from secateur.files import atomic

KEY = "secateur"
"""The metadata key that holds the format version."""

VERSION = 1
_BLOB = "b"
_MAX_HEADER = 1 << 20
_ENTRY_SLACK = 64  # bytes an entry may take beyond its tensor's raw bytes
_HEAD = struct.Struct("<BII")  # version, CRC-32 of the metadata, fingerprint
_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class Item:
    """One entry of the blob."""

    record: bytes
    checksum: int


def checksum(before: int, identity: bytes, record: bytes) -> int:
    """Return the running CRC-32 of a file up to and including a record.

    It binds the record to the tensor it is for and to all that stands before it, so that not
    even a whole entry of another file can take its place.
    """
    return zlib.crc32(record, zlib.crc32(identity, before))


def entry_bytes(record: int) -> int:
    """Return the bytes that a tensor takes whose record has this many."""
    return len(varint(record)) + record + _CRC.size


def overhead_bytes(metadata: Mapping[str, str], tensors: int, blob: int) -> int:
    """Return the bytes of a file that are not entries.

    Args:
        metadata: as :func:`write` takes it.
        tensors: number of entries.
        blob: bytes of the blob; only its number of digits matters.
    """
    return len(_header(_text(metadata), blob)) + _HEAD.size + len(varint(tensors))


def write(
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    architecture: Architecture,
    records: Sequence[bytes],
) -> int:
    """Write the file in one step and return its bytes.

    The header is written here, since the library orders the metadata differently at every run.
    """
    text = _text(metadata)
    head = _HEAD.pack(VERSION, _metadata_crc(text), architecture.fingerprint)
    blob = bytearray(head + varint(len(records)))
    running = zlib.crc32(head)
    for identity, record in zip(architecture.identities.values(), records, strict=True):
        running = checksum(running, identity, record)
        blob += varint(len(record)) + record + _CRC.pack(running)
    data = _header(text, len(blob)) + blob
    with atomic(Path(path)) as temporary:
        temporary.write_bytes(data)
    return len(data)


def _text(metadata: Mapping[str, str]) -> dict[str, str]:
    return {KEY: str(VERSION), **dict(sorted(metadata.items()))}


def _header(text: Mapping[str, str], blob: int) -> bytes:
    """Return what safetensors has in front of a blob of this many bytes."""
    tensor = {"dtype": "U8", "shape": [blob], "data_offsets": [0, blob]}
    header = json.dumps({"__metadata__": text, _BLOB: tensor}, separators=(",", ":")).encode()
    if len(header) > _MAX_HEADER:
        raise ArtifactError(f"metadata: {len(header):,} bytes, more than {_MAX_HEADER:,}.")
    return struct.pack("<Q", len(header)) + header


class Packed:
    """An open packed file, its metadata checked."""

    def __init__(self, handle: Any, file_bytes: int) -> None:
        self._handle = handle
        self.file_bytes = file_bytes
        self.metadata: dict[str, str] = handle.metadata() or {}
        self._check_version(self.metadata.get(KEY))
        blob = handle.get_slice(_BLOB) if list(handle.keys()) == [_BLOB] else None
        if blob is None or blob.get_dtype() != "U8" or len(blob.get_shape()) != 1:
            raise ArtifactError(f"it is not one tensor '{_BLOB}' of bytes; the file is damaged.")
        head = bytes(blob[0 : _HEAD.size])
        if len(head) < _HEAD.size:
            raise ArtifactError("the file is cut off.")
        version, metadata_crc, self.fingerprint = _HEAD.unpack(head)
        self.checksum = zlib.crc32(head)
        self._check_version(str(version))
        if metadata_crc != _metadata_crc(self.metadata):
            raise ArtifactError("the checksum of the metadata is wrong; the file is damaged.")

    @staticmethod
    def _check_version(version: str | None) -> None:
        if version is None:
            raise ArtifactError("it is not a packed file of secateur.")
        if version != str(VERSION):
            raise ArtifactError(
                f"format version {version[:20]!r} is unknown to this secateur, which reads "
                f"{VERSION}; a newer one may read it."
            )

    def check_size(self, raw_bytes: int, tensors: int) -> None:
        """Refuse a file longer than its network stored raw could make it, before reading it."""
        limit = 8 + _MAX_HEADER + raw_bytes + _ENTRY_SLACK * (tensors + 1)
        if self.file_bytes > limit:
            raise ArtifactError(
                f"{self.file_bytes:,} bytes are more than the {limit:,} its network can take."
            )

    def items(self) -> Iterator[Item]:
        """Yield the entries in order; what follows the last one is an error."""
        blob = self._handle.get_tensor(_BLOB).tobytes()
        count, position = read_varint(blob, _HEAD.size)
        for _ in range(count):
            length, position = read_varint(blob, position)
            end = position + length
            if end + _CRC.size > len(blob):
                raise ArtifactError("the file is cut off.")
            yield Item(blob[position:end], *_CRC.unpack_from(blob, end))
            position = end + _CRC.size
        if position != len(blob):
            raise ArtifactError(f"{len(blob) - position:,} bytes follow the last tensor.")


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Packed]:
    """Open a packed file; any ArtifactError inside gets the path in front.

    Raises:
        ArtifactError: it cannot be read, is not a packed file, or its metadata is damaged.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            file_bytes = file.seek(0, os.SEEK_END)
        if len(start) == 8 and struct.unpack("<Q", start)[0] > _MAX_HEADER:
            raise ArtifactError(f"its header is longer than {_MAX_HEADER:,} bytes.")
        with safe_open(path, framework="numpy") as handle:
            yield Packed(handle, file_bytes)
    except SafetensorError as error:
        raise ArtifactError(f"{path}: it is not a whole packed file ({error}).") from None
    except OSError as error:
        raise ArtifactError(f"{path}: it cannot be read ({error.strerror or error}).") from None
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None


def _metadata_crc(metadata: Mapping[str, str]) -> int:
    text = json.dumps(metadata, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    return zlib.crc32(text.encode())
