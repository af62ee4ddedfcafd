"""Ten thousand damaged files: an ArtifactError each, or exactly the original tensors."""

from __future__ import annotations

import contextlib
import json
import math
import random
import resource
import struct
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.artifact.architecture import Architecture
from secateur.artifact.packed import load, read_header, save
from secateur.codec import Quantized, decode, describe, encode
from secateur.codec.values import Spacing
from secateur.errors import ArtifactError, SecateurError
from secateur.quantizers import regrid
from secateur.zoo import lenet5

LENET = "secateur.zoo:lenet5"


class Small(nn.Module):
    """A tensor for every coder: raw, levels, powers, arithmetic, bitmap, Rice, live, tied, rows ...

    One layer reads through a grid.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.rows = nn.Linear(30, 4, bias=False)
        self.wide = nn.Linear(60, 40)
        self.tied = nn.Linear(60, 40, bias=False)
        self.tied.weight = self.wide.weight
        self.skewed = nn.Parameter(torch.zeros(12, 20))
        self.full = nn.Parameter(torch.zeros(100))
        self.gate = nn.Parameter(torch.zeros(30, dtype=torch.bfloat16))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("none", torch.zeros(0, 3))


def small(seed: int) -> tuple[nn.Module, dict[str, Quantized]]:
    generator = torch.Generator().manual_seed(seed)
    model, quantized = Small(), {}

    def quantize(
        name: str,
        density: float,
        bits: int,
        zero: bool,
        live: bool = False,
        spacing: Spacing = "uniform",
        used: int = 128,
    ) -> None:
        weight = model.get_parameter(name)
        largest = min(2 ** (bits - 1) - zero, used)
        levels = torch.randint(1, largest + 1, weight.shape, generator=generator)
        if spacing == "power_of_two":
            levels = 2 ** (levels - 1)
        levels *= 1 - 2 * torch.randint(0, 2, weight.shape, generator=generator)
        levels *= torch.rand(weight.shape, generator=generator) < density
        if live:
            levels[8:], levels[:, 20:] = 0, 0
        scale = (0.5, 0.375, 0.25, 2.0**-4) if name == "rows.weight" else 2.0**-4
        quantized[name] = Quantized(levels, scale, bits, zero, spacing)
        weight.data = quantized[name].weight(torch.float32)

    quantize("conv.weight", 0.4, 4, False)
    quantize("wide.weight", 0.1, 3, False, live=True)
    quantize("rows.weight", 0.9, 5, True)
    quantize("wide.bias", 0.1, 8, True)
    quantize("conv.bias", 1.0, 3, False, spacing="power_of_two")
    quantize("skewed", 0.4, 4, True, used=2)
    quantize("full", 1.0, 4, False, used=2, spacing="power_of_two")
    regrid(model, "u15;;s3;")
    model.gate.data[::7] = torch.randn(5, generator=generator).bfloat16()
    model.norm.num_batches_tracked += seed + 1
    return model, quantized


def spans(data: bytes) -> list[tuple[int, int]]:
    """Where each entry of the blob starts and ends in the file."""
    (length,) = struct.unpack_from("<Q", data)
    at, found = 8 + length + 4, []
    while at < len(data) - 4:
        size, start = data[at] & 0x7F, at + 1
        if data[at] >= 0x80:
            size, start = size | data[at + 1] << 7, at + 2
        found.append((at, start + size))
        at = start + size
    return found


def flip(data: bytearray, rng: random.Random, _other: bytes) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def truncate(data: bytearray, rng: random.Random, _other: bytes) -> None:
    del data[rng.randrange(len(data)) :]


def insert(data: bytearray, rng: random.Random, _other: bytes) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice((rng.randbytes(rng.randint(1, 9)), bytes(rng.randint(1, 9))))
    resize(data)


def delete(data: bytearray, rng: random.Random, _other: bytes) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randint(1, 40)]
    resize(data)


def edit_header(data: bytearray, rng: random.Random, _other: bytes) -> None:
    (length,) = struct.unpack_from("<Q", data)
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(8 + length)] = rng.choice(b'0123456789-,:"{}[] abes_/\\u\0\xff')


def splice(data: bytearray, rng: random.Random, other: bytes) -> None:
    """Put an entry, or any range of bytes, of this or another file in the place of one."""
    source = rng.choice((bytes(data), other))
    if rng.random() < 0.7:
        (start, end), (first, last) = rng.choice(spans(data)), rng.choice(spans(source))
        if rng.random() < 0.5:
            index = rng.randrange(len(spans(data)))
            (start, end), (first, last) = spans(data)[index], spans(source)[index]
    else:
        start, first, size = rng.randrange(len(data)), rng.randrange(len(source)), 20
        end, last = start + rng.randrange(size), first + rng.randrange(size)
    data[start:end] = source[first:last]
    resize(data)


def resize(data: bytearray) -> None:
    """Make the container's lengths right again, so that the damage reaches the blob."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(bytes(data[8 : 8 + length]))
        size = len(data) - 8 - length
        header["b"].update(shape=[size], data_offsets=[0, size])
    except (ValueError, LookupError, TypeError, AttributeError, struct.error):
        return
    text = json.dumps(header, separators=(",", ":")).encode()
    data[: 8 + length] = struct.pack("<Q", len(text)) + text


MUTATIONS: tuple[Callable[[bytearray, random.Random, bytes], None], ...] = (
    *(flip, flip, truncate, insert, delete, edit_header, splice, splice),
)


def fuzz(path: Path, other: bytes, target: Callable[[], nn.Module | None], count: int) -> Counter:
    """Mutate the file ``count`` times; every outcome is an error or the original."""
    original = path.read_bytes()
    expected = {name: t.clone() for name, t in load(path, target()).state_dict().items()}
    rng, outcomes = random.Random(count), Counter()
    for index in range(count):
        data = bytearray(original)
        MUTATIONS[index % len(MUTATIONS)](data, rng, other)
        mutant = path.with_name(f"{path.name}-{index}")  # rewriting one file would be slow
        mutant.write_bytes(data)
        started = time.process_time()
        try:
            state = load(mutant, target()).state_dict()
        except ArtifactError as error:
            outcomes["refused"] += 1
            outcomes["long message"] += len(str(error).splitlines()) > 3
        else:
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], expected[name]) for name in expected)
            outcomes["unchanged" if data == original else "harmless"] += 1
        assert time.process_time() - started < 2
        if index % 5 == 0:
            with contextlib.suppress(ArtifactError):
                read_header(mutant)
        mutant.unlink()
    return outcomes


def test_nine_thousand_mutations_of_a_file_with_every_coder(tmp_path: Path) -> None:
    for seed in (0, 1):
        model, quantized = small(seed)
        save(tmp_path / str(seed), model, quantized, reference=None, metadata={"mean": "0.5"})
    header = read_header(tmp_path / "0")
    coders = " ".join(entry.coder for entry in header.entries)
    assert all(
        word in coders
        for word in ("raw", "zeros", "bitmap", "rice", "live", "powers", "all", "arithmetic")
    )
    brought = Small()

    def reset() -> nn.Module:
        with torch.no_grad():
            brought.wide.weight.fill_(7)
        return brought

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = fuzz(tmp_path / "0", (tmp_path / "1").read_bytes(), reset, 9_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert outcomes["refused"] > 8_000
    assert outcomes["long message"] == 0
    assert outcomes["harmless"] < 500  # spaces in the header, for example


def test_a_thousand_mutations_of_a_file_that_names_its_network(tmp_path: Path) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        model, quantized = lenet5(), {}
        for name, weight in model.named_parameters():
            levels = torch.randint(1, 5, weight.shape) * (torch.rand(weight.shape) < 0.003)
            quantized[name] = Quantized(levels, 0.125, 3, False)
            weight.data = levels.float() * 0.125
        save(tmp_path / str(seed), model, quantized, reference=LENET, arguments={"classes": 10})
    outcomes = fuzz(tmp_path / "0", (tmp_path / "1").read_bytes(), lambda: None, 1_000)
    assert outcomes["refused"] > 850


def test_records_with_right_checksums_but_hostile_content() -> None:
    """Skip the checksum, as a forger can: still only errors, and memory as the shape says."""
    rng = random.Random(0)
    model, quantized = small(0)
    originals = [
        (encode(tensor, quantized.get(name)), tuple(tensor.shape), tensor.dtype)
        for name, tensor in Architecture.of(model).tensors.items()
    ]
    refused = 0
    tracemalloc.start()
    for index in range(20_000):
        record, shape, dtype = originals[index % len(originals)]
        data = bytearray(record or b"\0")
        for _ in range(rng.choice((0, 1, 1, 2, 4))):
            data[rng.randrange(min(len(data), rng.choice((8, 10**6))))] = rng.choice(
                (rng.randrange(256), 0, 1, 2, 30, 127, 255)
            )
        if rng.random() < 0.2:
            data[rng.randrange(len(data)) :] = rng.randbytes(rng.choice((0, 4, 60)))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            tensor = decode(bytes(data), shape, dtype)
            describe(bytes(data))
        except ArtifactError:
            refused += 1
        else:
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        peak = tracemalloc.get_traced_memory()[1] - before
        assert peak < 100_000 + 64 * math.prod(shape) + 16 * len(data)
    tracemalloc.stop()
    assert 5_000 < refused < 19_000


@pytest.mark.parametrize("count", [2**7, 2**31, 2**62])
def test_counts_beyond_the_shape_allocate_nothing(count: int) -> None:
    from secateur.codec.bits import varint

    for k in (0, 3, 60, 250):
        record = bytes([0, 2 + k]) + varint(count) + bytes(10)
        with pytest.raises(ArtifactError):
            decode(record, (8, 8), torch.float32)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_hostile_architectures_with_right_checksums(tmp_path: Path) -> None:
    """A forged reference and arguments; the reader may refuse, but not crash, hang or fetch."""
    rng = random.Random(0)
    path = tmp_path / "m"
    references = (LENET, "torchvision.models:vgg11", "torchvision.models:vit_b_16", "x:y", "", ":")
    keys = (
        "classes",
        "num_classes",
        "weights",
        "image_size",
        "dropout",
        "hidden_dim",
        "norm_layer",
    )
    values = (None, True, -1, 0, 3, 10**6, 10**10, 10**40, 1e308, "a", [], [10**9], {}, math.nan)
    for _ in range(150):
        arguments = {rng.choice(keys): rng.choice(values)}
        reference = rng.choice(references)
        save(path, lenet5(), {}, reference=reference, arguments=arguments)  # type: ignore[arg-type]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if reference == LENET and arguments == {"classes": 10}:
            continue
        with pytest.raises(SecateurError):
            load(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3_000_000


def test_the_checksum_is_the_one_of_the_format(tmp_path: Path) -> None:
    """An independent computation of docs/format.md."""
    model = nn.Linear(3, 2)
    save(tmp_path / "m", model, {}, reference=None)
    data = (tmp_path / "m").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    blob = struct.pack("<I", zlib.crc32(b"weight float32 [2, 3]\nbias float32 [2]\n"))
    for tensor in (model.weight, model.bias):
        record = bytes([0, 0]) + tensor.detach().numpy().tobytes()
        blob += bytes([len(record)]) + record
    assert data[8 + length :] == blob + struct.pack("<I", zlib.crc32(b'{"secateur":"1"}' + blob))
