"""The container of a packed file: safetensors with one blob of records and a checksum."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from secateur.artifact.architecture import Architecture
from secateur.codec.bits import read_varint, varint
from secateur.errors import ArtifactError
from secateur.files import atomic

KEY = "secateur"
"""The metadata key that holds the format version."""

VERSIONS = (1, 2, 3, 4)
"""Those that are read; a file states the first that has all it holds."""

_BLOB = "b"
_MAX_HEADER = 1 << 20
_ENTRY_SLACK = 64  # bytes an entry may take beyond its tensor's raw bytes
_CRC = struct.Struct("<I")  # the fingerprint at the start of the blob, the checksum at its end
_CHUNK = 1 << 20  # bytes read at a time to check them


def entry_bytes(record: int) -> int:
    """Return the bytes that a tensor takes whose record has this many."""
    return len(varint(record)) + record


def overhead_bytes(metadata: Mapping[str, str], blob: int) -> int:
    """Return the bytes of a file that are not entries.

    Args:
        metadata: as :func:`write` takes it.
        blob: bytes of the blob; only its number of digits matters.
    """
    return len(_header(_text(metadata, VERSIONS[0]), blob)) + 2 * _CRC.size


def write(
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    architecture: Architecture,
    records: Sequence[bytes],
    version: int,
) -> int:
    """Write the file in one step and return its bytes.

    The header is written here, since the library orders the metadata differently at every run.
    """
    text = _text(metadata, version)
    blob = _CRC.pack(architecture.fingerprint)
    blob += b"".join(varint(len(record)) + record for record in records)
    blob += _CRC.pack(zlib.crc32(blob, _metadata_crc(text)))
    data = _header(text, len(blob)) + blob
    with atomic(Path(path)) as temporary:
        temporary.write_bytes(data)
    return len(data)


def _text(metadata: Mapping[str, str], version: int) -> dict[str, str]:
    return {KEY: str(version), **dict(sorted(metadata.items()))}


def _header(text: Mapping[str, str], blob: int) -> bytes:
    """Return what safetensors has in front of a blob of this many bytes."""
    tensor = {"dtype": "U8", "shape": [blob], "data_offsets": [0, blob]}
    header = json.dumps({"__metadata__": text, _BLOB: tensor}, separators=(",", ":")).encode()
    if len(header) > _MAX_HEADER:
        raise ArtifactError(f"metadata: {len(header):,} bytes, more than {_MAX_HEADER:,}.")
    return struct.pack("<Q", len(header)) + header


class Packed:
    """An open packed file, its version and checksum checked."""

    def __init__(self, handle: Any, file_bytes: int) -> None:
        self._handle = handle
        self.file_bytes = file_bytes
        self.metadata: dict[str, str] = handle.metadata() or {}
        self._check_version()
        blob = handle.get_slice(_BLOB) if list(handle.keys()) == [_BLOB] else None
        if blob is None or blob.get_dtype() != "U8" or len(blob.get_shape()) != 1:
            raise ArtifactError(f"it is not one tensor '{_BLOB}' of bytes; the file is damaged.")
        self._end = blob.get_shape()[0] - _CRC.size
        if self._end < _CRC.size:
            raise ArtifactError("the file is cut off.")
        running = _metadata_crc(self.metadata)
        for start in range(0, self._end, _CHUNK):
            running = zlib.crc32(blob[start : min(start + _CHUNK, self._end)], running)
        if _CRC.unpack(blob[self._end :]) != (running,):
            raise ArtifactError("its checksum is wrong; the file is damaged.")
        (self.fingerprint,) = _CRC.unpack(blob[: _CRC.size])

    def _check_version(self) -> None:
        version = self.metadata.get(KEY)
        if version is None:
            raise ArtifactError("it is not a packed file of secateur.")
        if version not in map(str, VERSIONS):
            raise ArtifactError(
                f"format version {version[:20]!r} is unknown to this secateur, which reads "
                f"{VERSIONS[0]} to {VERSIONS[-1]}; a newer one may read it."
            )

    def check_size(self, raw_bytes: int, tensors: int) -> None:
        """Refuse a file longer than its network stored raw could make it, before loading it."""
        limit = 8 + _MAX_HEADER + raw_bytes + _ENTRY_SLACK * (tensors + 1)
        if self.file_bytes > limit:
            raise ArtifactError(
                f"{self.file_bytes:,} bytes are more than the {limit:,} its network can take."
            )

    def records(self) -> Iterator[bytes]:
        """Yield the records in order; they end where the checksum begins."""
        blob = self._handle.get_tensor(_BLOB)[: self._end].tobytes()
        position = _CRC.size
        while position < len(blob):
            length, position = read_varint(blob, position)
            if position + length > len(blob):
                raise ArtifactError("its last record is cut off.")
            yield blob[position : position + length]
            position += length


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Packed]:
    """Open a packed file; any ArtifactError inside gets the path in front.

    Raises:
        ArtifactError: it cannot be read, is not a packed file, or is damaged.
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
