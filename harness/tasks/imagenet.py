"""A local folder of ImageNet-1k: class folders of image files, read as they are needed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import paths
from harness.canonical import digest
from harness.contracts import Batch
from harness.errors import DataError
from harness.tasks import splits

if TYPE_CHECKING:
    from torch import Tensor

CLASSES = 1000
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")

REMEDY = (
    "There is no ImageNet folder: set the parameter imagenet to a folder that has val/ with 1,000 class folders, or "
    "put it at imagenet/val in a folder of ASSAY_DATA."
)

Example = tuple[Path, int]
"""An image file and its class."""


def locate(given: str | None, part: str) -> Path | None:
    """The folder of class folders for ``part`` ("train" or "val"), or None where there is none.

    Raises
    ------
    DataError
        If ``given`` is not a folder.
    """
    if given is not None:
        root = Path(given).expanduser().absolute()
        if not root.is_dir():
            raise DataError(f"The parameter imagenet names {root}, which is not a folder.")
        if (root / part).is_dir():
            return root / part
        # The class folders themselves: they are test images.
        return root if part == "val" and not (root / "train").is_dir() else None
    for folder in paths.data_folders():
        if (folder / "imagenet" / part).is_dir():
            return folder / "imagenet" / part
    return None


def listing(folder: Path, expected: int | None = CLASSES) -> list[Example]:
    """All images in class folders, by class and name; ``expected`` classes, or any number where None.

    Raises
    ------
    DataError
        If there are not exactly 1,000 class folders (a subset's folders do not say their class numbers), or no images.
    """
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if expected is None and len(classes) < 2:
        raise DataError(
            f"{folder} has {len(classes)} class folders. Data in a folder are images in one folder per class; a table "
            "is named by its file, such as data.npz."
        )
    if expected is not None and len(classes) != expected:
        raise DataError(
            f"ImageNet: {folder} has {len(classes)} class folders, not {CLASSES}. It must hold one folder per class "
            "of ImageNet-1k, named by WordNet id (n01440764, ...), whose sorted order gives the class numbers."
        )
    examples = [
        (path, label)
        for label, inside in enumerate(classes)
        for path in sorted(inside.iterdir())
        if path.suffix.lower() in SUFFIXES
    ]
    if not examples:
        raise DataError(f"The class folders in {folder} hold no images ({', '.join(SUFFIXES)}).")
    return examples


def spaced(examples: Sequence[Example], count: int | None) -> list[Example]:
    """``count`` of the examples, evenly spaced; all where ``count`` is None or larger."""
    if count is None or count >= len(examples):
        return list(examples)
    return [examples[i * len(examples) // count] for i in range(count)]


def load(path: Path, transform: Any) -> Tensor:
    """One image, preprocessed, float32 (3, side, side).

    Raises
    ------
    DataError
        If the file is not a readable image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
    except OSError as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error
    tensor: Tensor = transform(pixels)
    return tensor


def content_hash(folder: Path, examples: Sequence[Example]) -> str:
    """Sha256 over names and contents, remembered as long as names, sizes and times of the files stay."""
    names = [str(path.relative_to(folder)) for path, _ in examples]
    states = [(path.stat().st_size, path.stat().st_mtime_ns) for path, _ in examples]
    memory = paths.cache("data") / f"imagenet-{digest([str(folder), names, states])}"
    if memory.exists():
        return memory.read_text(encoding="ascii")
    total = hashlib.sha256()
    for name, (path, _) in zip(names, examples, strict=True):
        with path.open("rb") as stream:
            total.update(f"{name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    # Where the cache cannot be written, the files are simply read again next time.
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_name(f".{memory.name}.{id(total)}")
        temporary.write_text(total.hexdigest(), encoding="ascii")
        temporary.replace(memory)
    return total.hexdigest()


@dataclass(frozen=True, kw_only=True)
class FolderSplit:
    """Images in files, decoded batch by batch (see :class:`harness.contracts.Split`); the target is "label".

    Parameters
    ----------
    folder : Path
        Folder of the class folders.
    examples : sequence
        Files with classes.
    transform : callable
        PIL image to tensor; augmentation mirrors half of the images.
    name : str
        Name of the input.
    """

    folder: Path
    examples: Sequence[Example]
    transform: Any
    name: str = "input"

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.examples)

    @functools.cached_property
    def identity(self) -> str:
        """Sha256 over the files' names and contents, their classes and the preprocessing."""
        labels = [label for _, label in self.examples]
        return digest([content_hash(self.folder, self.examples), labels, repr(self.transform)])

    def batches(self, size: int, *, seed: int | None = None, augment: bool = False) -> Iterator[Batch]:
        """One pass over the images."""
        import torch

        places, generator = splits.order(self.size, seed)
        flips = torch.rand(self.size, generator=generator) < 0.5
        for start in range(0, self.size, size):
            part = [self.examples[place] for place in places[start : start + size].tolist()]
            x = torch.stack([load(path, self.transform) for path, _ in part])
            if augment:
                x = torch.where(flips[start : start + size, None, None, None], x.flip(3), x)
            yield Batch(inputs={self.name: x}, targets={"label": torch.tensor([label for _, label in part])})


def training_data(
    folder: Path, transform: Any, expected: int | None = CLASSES, name: str = "input"
) -> dict[str, FolderSplit]:
    """The images of a ``train`` folder: every 50th for validation, the others for training."""
    examples = listing(folder, expected)
    return {
        "train": FolderSplit(
            folder=folder,
            examples=[example for place, example in enumerate(examples) if place % 50],
            transform=transform,
            name=name,
        ),
        "validation": FolderSplit(folder=folder, examples=examples[::50], transform=transform, name=name),
    }
