"""Where Fashion-MNIST's four files are, and that they are the right ones.

The files are the same everywhere once decompressed; their ``.gz`` forms are not (Debian compresses them anew), so
hashes are of the decompressed bytes.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness import paths
from harness.canonical import digest
from harness.errors import DataError, Unavailable
from harness.tasks.image_data import Labelled

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class IdxFile:
    """One of the four files: its name, shape, and size and sha256 when decompressed."""

    name: str
    shape: tuple[int, ...]
    size: int
    sha256: str


FILES: Mapping[str, IdxFile] = {
    "train_images": IdxFile(
        "train-images-idx3-ubyte",
        (60000, 28, 28),
        47040016,
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train_labels": IdxFile(
        "train-labels-idx1-ubyte",
        (60000,),
        60008,
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "test_images": IdxFile(
        "t10k-images-idx3-ubyte",
        (10000, 28, 28),
        7840016,
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    "test_labels": IdxFile(
        "t10k-labels-idx1-ubyte",
        (10000,),
        10008,
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts the files."""

REMEDY = (
    "Put the four files (.gz or not) into a folder and name it in ASSAY_DATA, install Debian's package "
    "dataset-fashion-mnist, or let torchvision download them."
)


def folder_hash() -> str:
    """Sha256 that stands for the whole data set: the digest of the four files' hashes."""
    return digest([file.sha256 for file in FILES.values()])


def locate(download: bool = True) -> dict[str, Path]:
    """Find the four files in the folders of ``ASSAY_DATA``, Debian's package or the download folder, or download them.

    Parameters
    ----------
    download : bool
        Whether to download what is nowhere; if not, that is Unavailable.

    Returns
    -------
    dict
        Key of :data:`FILES` to path. Contents are not read.

    Raises
    ------
    DataError
        If a folder has some of the four files and lacks others, or ``ASSAY_DATA`` names a folder that does not exist.
    Unavailable
        If the files are nowhere and cannot be downloaded.
    """
    folders: list[Path] = []
    for named in paths.data_folders():
        if not named.is_dir():
            raise DataError(f"ASSAY_DATA names {named}, which is not a folder. Correct or unset ASSAY_DATA.")
        folders += [named, named / "fashion-mnist", named / "FashionMNIST" / "raw"]
    own = paths.home() / "data"
    for folder in [*folders, DEBIAN, own / "FashionMNIST" / "raw"]:
        if found := _inside(folder):
            return found
    if not download:
        raise Unavailable(f"Fashion-MNIST is not on this machine yet. {REMEDY}")
    _download(own)
    if found := _inside(own / "FashionMNIST" / "raw"):
        return found
    raise Unavailable(f"Fashion-MNIST: the download into {own} left no files. {REMEDY}")


def _inside(folder: Path) -> dict[str, Path] | None:
    found: dict[str, Path] = {}
    for key, file in FILES.items():
        for path in (folder / file.name, folder / f"{file.name}.gz"):
            if path.is_file():
                found[key] = path
                break
    if not found:
        return None
    for key, file in FILES.items():
        if key not in found:
            raise DataError(
                f"Fashion-MNIST: {folder} has no {file.name}[.gz], but other files of the data set. {REMEDY}"
            )
    return found


def _download(folder: Path) -> None:
    import socket

    from filelock import FileLock

    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as error:
        raise Unavailable(
            "Fashion-MNIST was not found and cannot be downloaded without torchvision: "
            f'pip install "assay-bench[vision]". {REMEDY}'
        ) from error
    timeout = socket.getdefaulttimeout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".fashion-mnist.lock"):
            socket.setdefaulttimeout(20)  # torchvision sets none: a silent network would hang the run
            FashionMNIST(str(folder), train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"Fashion-MNIST was not found, and the download failed ({error}). {REMEDY}") from error
    finally:
        socket.setdefaulttimeout(timeout)


def read(path: Path, file: IdxFile) -> bytes:
    """The decompressed, verified content of a file.

    Raises
    ------
    DataError
        If the file cannot be read, is not a gzip file, or is truncated, too long or altered.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            content = stream.read(file.size + 1)  # bounded: a file that inflates to gigabytes is not ours
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Fashion-MNIST: {path} cannot be read: {error}. {REMEDY}") from error
    if len(content) != file.size:
        length = f"more than {file.size}" if len(content) > file.size else str(len(content))
        raise DataError(f"Fashion-MNIST: {path} holds {length} bytes decompressed, not {file.size}. {REMEDY}")
    if (found := hashlib.sha256(content).hexdigest()) != file.sha256:
        raise DataError(
            f"Fashion-MNIST: {path} was altered: sha256 of its decompressed content is {found}, "
            f"not {file.sha256}. {REMEDY}"
        )
    return content


def verify(found: Mapping[str, Path]) -> None:
    """Check the four files' contents; files already checked, of unchanged size and time, are not read again.

    Raises
    ------
    DataError
        If a file is not the right one.
    """
    for key, path in found.items():
        state = path.stat()
        mark = paths.cache("data") / digest([FILES[key].sha256, str(path.resolve()), state.st_size, state.st_mtime_ns])
        if mark.exists():
            continue
        read(path, FILES[key])
        # Where the cache cannot be written the files are simply read again next time.
        with contextlib.suppress(OSError):
            mark.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=mark.parent)
            os.close(descriptor)
            Path(name).replace(mark)


def load(part: str) -> Labelled:
    """The images, uint8 (n, 1, 28, 28), and labels of ``part``, "train" (60,000) or "test" (10,000), verified.

    Raises
    ------
    DataError, Unavailable
        See :func:`locate` and :func:`read`.
    """
    found = locate()
    return _load(found[f"{part}_images"], found[f"{part}_labels"], part)


@functools.lru_cache(maxsize=2)
def _load(images: Path, labels: Path, part: str) -> Labelled:
    import numpy as np

    pixels = idx(read(images, FILES[f"{part}_images"]), FILES[f"{part}_images"])
    classes = idx(read(labels, FILES[f"{part}_labels"]), FILES[f"{part}_labels"])
    return Labelled(images=pixels[:, None], labels=classes.astype(np.int64))


def idx(content: bytes, file: IdxFile) -> npt.NDArray[np.uint8]:
    """Parse an IDX file of unsigned bytes: two zeros, type 8, number of axes, big-endian sizes, values.

    Raises
    ------
    DataError
        If the header does not say the expected shape, or the values are not as many.
    """
    import numpy as np

    axes = len(file.shape)
    header = bytes([0, 0, 8, axes]) + b"".join(size.to_bytes(4) for size in file.shape)
    if content[: len(header)] != header:
        raise DataError(f"Fashion-MNIST: {file.name} is not an IDX file of bytes with shape {file.shape}. {REMEDY}")
    values = np.frombuffer(content, np.uint8, offset=len(header))
    if values.size != int(np.prod(file.shape)):
        raise DataError(f"Fashion-MNIST: {file.name} holds {values.size} values, not those of {file.shape}. {REMEDY}")
    return values.reshape(file.shape).copy()  # a copy, since torch wants writable memory
