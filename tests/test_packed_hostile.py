"""What the reader of a packed file refuses, with right checksums and wrong ones."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.artifact.packed import load, read_header, save
from secateur.errors import ArtifactError
from secateur.zoo import lenet5

LENET = "secateur.zoo:lenet5"


def test_a_file_runs_no_code_unless_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile.py").write_text(
        "import pathlib\nfrom secateur.zoo import lenet5\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    save(tmp_path / "m", lenet5(), {}, reference="hostile:lenet5")
    with pytest.raises(ArtifactError, match="trust=True"):
        load(tmp_path / "m")
    assert not (tmp_path / "ran").exists()
    load(tmp_path / "m", trust=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("reference", "arguments", "reason"),
    [
        (LENET, {"classes": 10**12}, "exceeds"),
        (LENET, {"classes": 10**30}, "cannot be built"),
        (LENET, {"classes": -1}, "cannot be built"),
        (LENET, {"classes": "ten"}, "cannot be built"),
        (LENET, {"shapes": 3}, "cannot be built"),
        (LENET, {"classes": 11}, "not those that were saved"),
        (LENET, {"weights": "DEFAULT"}, "'weights' would fetch"),
        ("torchvision.models:resnet18", {"weights": "DEFAULT"}, "'weights' would fetch"),
        ("torchvision.models:resnet18", {"pretrained": True}, "'pretrained' would fetch"),
        ("torchvision.models:resnet18", {"width_per_group": 10**6}, "cannot be built|exceeds"),
        (
            "torchvision.models:mobilenet_v2",
            {"inverted_residual_setting": [[1, 8, 10**9, 1]]},
            "exceeds",
        ),
        ("torchvision.models:list_models", {}, "is not an architecture"),
        ("secateur.zoo:nn", {}, "is not an architecture"),
        ("os:system", {"command": "true"}, "is not an architecture"),
        ("nonsense", {}, "is not an architecture"),
        ("", {}, "is not an architecture"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_hostile_architectures_are_refused(
    tmp_path: Path, reference: str, arguments: dict[str, object], reason: str
) -> None:
    save(tmp_path / "m", lenet5(), {}, reference=reference, arguments=arguments)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=reason) as caught:
        load(tmp_path / "m")
    assert len(str(caught.value).splitlines()) <= 3


def rewrite(path: Path, edit: Callable[[dict[str, object]], object]) -> None:
    """Change the JSON header of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda h: h["__metadata__"].pop("secateur"), "not a packed file of secateur"),
        (lambda h: h.pop("__metadata__"), "not a packed file of secateur"),
        (lambda h: h["__metadata__"].update(secateur="5"), "version '5' is unknown"),
        (lambda h: h["__metadata__"].update(model="os:system"), "its checksum is wrong"),
        (lambda h: h["__metadata__"].update(extra="x"), "its checksum is wrong"),
        (lambda h: h["__metadata__"].update(extra="x" * 2**20), "longer than 1,048,576 bytes"),
        (lambda h: h.update(c=h.pop("b")), "not one tensor 'b'"),
        (lambda h: h["b"].update(dtype="I8"), "not one tensor 'b'"),
        (lambda h: h["b"].update(shape=[1, *h["b"]["shape"]]), "not one tensor 'b'"),
        (lambda h: h["b"].update(data_offsets=[0, 5]), "not a whole packed file"),
    ],
)
def test_edited_headers_are_refused(
    tmp_path: Path, edit: Callable[[dict[str, object]], object], reason: str
) -> None:
    save(tmp_path / "m", lenet5(), {}, reference=LENET)
    rewrite(tmp_path / "m", edit)
    for read in (load, read_header):
        with pytest.raises(ArtifactError, match=reason):
            read(tmp_path / "m")


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    torch.save(lenet5().state_dict(), tmp_path / "pickle")
    (tmp_path / "empty").touch()
    (tmp_path / "zeros").write_bytes(bytes(1000))
    (tmp_path / "ones").write_bytes(b"\xff" * 1000)
    for name in ("pickle", "empty", "zeros", "ones", "missing", "."):
        for read in (load, read_header):
            with pytest.raises(ArtifactError):
                read(tmp_path / name)


def forge(
    path: Path, metadata: dict[str, str] | None = None, edit: Callable[[bytes], bytes] = bytes
) -> None:
    """Change a file as a hostile writer would: its lengths and its checksum stay right."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = text = metadata or header["__metadata__"]
    blob = edit(data[8 + length : -4])
    canonical = json.dumps(text, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    blob += struct.pack("<I", zlib.crc32(canonical.encode() + blob))
    header["b"].update(shape=[len(blob)], data_offsets=[0, len(blob)])
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + blob)


def test_a_file_longer_than_its_network_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "m", nn.Linear(2, 2), {}, reference=None)
    forge(tmp_path / "m", edit=lambda blob: blob + bytes(2 * 2**20))
    with pytest.raises(ArtifactError, match="more than the"):
        load(tmp_path / "m", model=nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda blob: b"", "cut off"),
        (lambda blob: blob[:-1], "its last record is cut off"),
        (lambda blob: blob + b"\x80", "malformed or cut off"),
        (lambda blob: blob + b"\x05four", "its last record is cut off"),
        (lambda blob: blob + b"\0", "holds 3 tensors, not 2"),
        (lambda blob: blob[:4], "holds 0 tensors, not 2"),
        (lambda blob: blob[:3] + bytes([blob[3] ^ 1]) + blob[4:], "not those that were saved"),
        (lambda blob: blob[:4] + b"\x7f" + bytes(128), "weight: its record is longer"),
    ],
)
def test_hostile_blobs_with_right_checksums_are_refused(
    tmp_path: Path, edit: Callable[[bytes], bytes], reason: str
) -> None:
    save(tmp_path / "m", nn.Linear(2, 2), {}, reference=None)
    forge(tmp_path / "m", edit=edit)
    with pytest.raises(ArtifactError, match=reason):
        load(tmp_path / "m", model=nn.Linear(2, 2))


def test_damage_anywhere_is_found_without_the_network(tmp_path: Path) -> None:
    path = tmp_path / "m"
    size = save(path, nn.Linear(2, 2), {}, reference=LENET, metadata={"note": "x"})
    original = path.read_bytes()
    (length,) = struct.unpack_from("<Q", original)
    for at in range(8 + length, size.file):
        damaged = bytearray(original)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="its checksum is wrong"):
            read_header(path)


def test_numbers_in_the_metadata_do_not_hang_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for arguments in ("[" * 5000, "9" * 5000, "[]", "null", '{"classes":' + "9" * 5000 + "}"):
        save(path, lenet5(), {}, reference=LENET)
        forge(path, {"secateur": "1", "model": LENET, "arguments": arguments})
        with pytest.raises(ArtifactError, match="not a JSON object"):
            load(path)
