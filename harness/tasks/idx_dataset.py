"""MNIST and Fashion-MNIST: where their four files are, and that they are the right ones.

The files are the same everywhere once decompressed; their ``.gz`` forms are not (Debian compresses them anew), so
hashes are of the decompressed bytes.
"""

from __future__ import annotations

import contextlib
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


@dataclass(frozen=True)
class IdxDataSet:
    """A data set in MNIST's layout: 60,000 training and 10,000 test images, 28x28, in four IDX files.

    Parameters
    ----------
    title : str
        For messages.
    files : mapping
        ``train_images``, ``train_labels``, ``test_images``, ``test_labels``.
    system : Path or None
        Where a package of the operating system puts the files.
    package : str or None
        That package.
    folders : tuple of str
        Subfolders of the folders in ``ASSAY_DATA`` that are looked into.
    torchvision : str
        The class of ``torchvision.datasets`` that downloads it, whose ``raw`` folder has the files.
    """

    title: str
    files: Mapping[str, IdxFile]
    system: Path | None
    package: str | None
    folders: tuple[str, ...]
    torchvision: str

    @property
    def remedy(self) -> str:
        """What a user can do to have it."""
        package = f"install Debian's package {self.package}, " if self.package else ""
        return (
            f"Put the four files (.gz or not) into a folder {self.folders[0]} and name its parent in ASSAY_DATA, "
            f"{package}or let torchvision download them."
        )

    def digest(self) -> str:
        """Sha256 that stands for the whole data set: the digest of the four files' hashes."""
        return digest([file.sha256 for file in self.files.values()])

    def locate(self, download: bool = True) -> dict[str, Path]:
        """Find the files in the folders of ``ASSAY_DATA``, the system's package or the download folder, or download.

        Parameters
        ----------
        download : bool
            Whether to download what is nowhere; if not, that is Unavailable.

        Returns
        -------
        dict
            Key of ``files`` to path. Contents are not read.

        Raises
        ------
        DataError
            If a folder has some of the four files and lacks others, or ``ASSAY_DATA`` names a folder that does not
            exist.
        Unavailable
            If the files are nowhere and cannot be downloaded.
        """
        places: list[Path] = []
        for named in paths.data_folders():
            if not named.is_dir():
                raise DataError(f"ASSAY_DATA names {named}, which is not a folder. Correct or unset ASSAY_DATA.")
            places += [named / folder for folder in self.folders]
        own = paths.home() / "data"
        downloaded = own / self.torchvision / "raw"
        for folder in [*places, *([self.system] if self.system else []), downloaded]:
            if found := self._inside(folder):
                return found
        if not download:
            raise Unavailable(f"{self.title} is not on this machine yet. {self.remedy}")
        self._download(own)
        if found := self._inside(downloaded):
            return found
        raise Unavailable(f"{self.title}: the download into {own} left no files. {self.remedy}")

    def _inside(self, folder: Path) -> dict[str, Path] | None:
        found: dict[str, Path] = {}
        for key, file in self.files.items():
            for path in (folder / file.name, folder / f"{file.name}.gz"):
                if path.is_file():
                    found[key] = path
                    break
        if not found:
            return None
        for key, file in self.files.items():
            if key not in found:
                raise DataError(
                    f"{self.title}: {folder} has no {file.name}[.gz], but other files of the data set. {self.remedy}"
                )
        return found

    def _download(self, folder: Path) -> None:
        import socket

        from filelock import FileLock

        try:
            from torchvision import datasets
        except ImportError as error:
            raise Unavailable(
                f"{self.title} was not found and cannot be downloaded without torchvision: "
                f'pip install "assay-bench[vision]". {self.remedy}'
            ) from error
        timeout = socket.getdefaulttimeout()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{self.folders[0]}.lock"):
                socket.setdefaulttimeout(20)  # torchvision sets none: a silent network would hang the run
                getattr(datasets, self.torchvision)(str(folder), train=True, download=True)
        except (OSError, RuntimeError) as error:
            raise Unavailable(
                f"{self.title} was not found, and the download failed ({error}). {self.remedy}"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)

    def read(self, path: Path, file: IdxFile) -> bytes:
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
            raise DataError(f"{self.title}: {path} cannot be read: {error}. {self.remedy}") from error
        if len(content) != file.size:
            length = f"more than {file.size}" if len(content) > file.size else str(len(content))
            raise DataError(f"{self.title}: {path} holds {length} bytes decompressed, not {file.size}. {self.remedy}")
        if (found := hashlib.sha256(content).hexdigest()) != file.sha256:
            raise DataError(
                f"{self.title}: {path} was altered: sha256 of its decompressed content is {found}, "
                f"not {file.sha256}. {self.remedy}"
            )
        return content

    def verify(self, found: Mapping[str, Path]) -> None:
        """Check the four files' contents; files already checked, of unchanged size and time, are not read again.

        Raises
        ------
        DataError
            If a file is not the right one.
        """
        for key, path in found.items():
            state, file = path.stat(), self.files[key]
            mark = paths.cache("data") / digest([file.sha256, str(path.resolve()), state.st_size, state.st_mtime_ns])
            if mark.exists():
                continue
            self.read(path, file)
            # Where the cache cannot be written the files are simply read again next time.
            with contextlib.suppress(OSError):
                mark.parent.mkdir(parents=True, exist_ok=True)
                descriptor, name = tempfile.mkstemp(dir=mark.parent)
                os.close(descriptor)
                Path(name).replace(mark)

    def load(self, part: str) -> Labelled:
        """The images, uint8 (n, 1, 28, 28), and labels of ``part``, "train" or "test", verified.

        Raises
        ------
        DataError, Unavailable
            See :meth:`locate` and :meth:`read`.
        """
        import numpy as np

        found = self.locate()
        files = {kind: (found[f"{part}_{kind}"], self.files[f"{part}_{kind}"]) for kind in ("images", "labels")}
        key = tuple((str(path), path.stat().st_mtime_ns, file.sha256) for path, file in files.values())
        if key not in _LOADED:
            while len(_LOADED) > 1:  # the training and the test part of one data set
                _LOADED.pop(next(iter(_LOADED)))
            images, labels = (self.parse(self.read(path, file), file) for path, file in files.values())
            _LOADED[key] = Labelled(images=images[:, None], labels=labels.astype(np.int64))
        return _LOADED[key]

    def parse(self, content: bytes, file: IdxFile) -> npt.NDArray[np.uint8]:
        """An IDX file of unsigned bytes: two zeros, type 8, number of axes, big-endian sizes, values.

        Raises
        ------
        DataError
            If the header does not say the expected shape, or the values are not as many.
        """
        import numpy as np

        axes = len(file.shape)
        header = bytes([0, 0, 8, axes]) + b"".join(size.to_bytes(4) for size in file.shape)
        if content[: len(header)] != header:
            raise DataError(
                f"{self.title}: {file.name} is not an IDX file of bytes with shape {file.shape}. {self.remedy}"
            )
        values = np.frombuffer(content, np.uint8, offset=len(header))
        if values.size != int(np.prod(file.shape)):
            raise DataError(
                f"{self.title}: {file.name} holds {values.size} values, not those of {file.shape}. {self.remedy}"
            )
        return values.reshape(file.shape).copy()  # a copy, since torch wants writable memory


_LOADED: dict[tuple[tuple[str, int, str], ...], Labelled] = {}


def _files(train_images: str, train_labels: str, test_images: str, test_labels: str) -> dict[str, IdxFile]:
    """The four files from the sha256 of each."""
    return {
        "train_images": IdxFile("train-images-idx3-ubyte", (60000, 28, 28), 47040016, train_images),
        "train_labels": IdxFile("train-labels-idx1-ubyte", (60000,), 60008, train_labels),
        "test_images": IdxFile("t10k-images-idx3-ubyte", (10000, 28, 28), 7840016, test_images),
        "test_labels": IdxFile("t10k-labels-idx1-ubyte", (10000,), 10008, test_labels),
    }


FASHION_MNIST = IdxDataSet(
    title="Fashion-MNIST",
    files=_files(
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    system=Path("/usr/share/datasets/fashion-mnist"),
    package="dataset-fashion-mnist",
    # Also directly in the folder: it is the older of the two tasks, and a folder holds either data set.
    folders=("fashion-mnist", "FashionMNIST/raw", "."),
    torchvision="FashionMNIST",
)
"""Xiao et al. 2017; hashes of the published files."""

MNIST = IdxDataSet(
    title="MNIST",
    files=_files(
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    system=None,
    package=None,
    folders=("mnist", "MNIST/raw"),
    torchvision="MNIST",
)
"""LeCun et al. 1998; hashes of the files as many public projects pin them, not checked against the authors' server."""
