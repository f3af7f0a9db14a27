"""Folders of class folders of images, such as ImageNet's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import DataError, Unavailable
from harness.tasks import imagenet
from harness.tasks.sets import Loaded, Wanted
from harness.tasks.torchvision_models import INSTALL


@dataclass(frozen=True)
class Folder:
    """``train`` and ``val`` with one folder a class, or the class folders themselves, which are the test set.

    The sorted names of the class folders are the classes 0, 1, ....

    Parameters
    ----------
    place : Path or None
        None where ImageNet is nowhere.
    imagenet : bool
        Whether there must be 1,000 classes.
    """

    place: Path | None
    imagenet: bool = False

    def unavailable(self) -> str | None:
        """Why the images cannot be read here, or None."""
        if self.place is None:
            return "There is no ImageNet: put it at imagenet/val (and imagenet/train) in a folder of ASSAY_DATA."
        return None if importlib.util.find_spec("torchvision") else INSTALL

    def load(self, wanted: Wanted) -> Loaded:
        """Test images, and training images where there are some; every 50th of these validates."""
        if self.place is None:
            raise Unavailable(str(self.unavailable()))
        transform = wanted.made.transform or _resized(wanted)
        expected = imagenet.CLASSES if self.imagenet else None
        test = next((self.place / name for name in ("val", "test") if (self.place / name).is_dir()), self.place)
        examples = imagenet.listing(test, expected)
        parts: dict[str, Any] = {
            "test": imagenet.FolderSplit(folder=test, examples=examples, transform=transform, name=_name(wanted))
        }
        if (self.place / "train").is_dir():
            parts |= imagenet.training_data(self.place / "train", transform, expected, _name(wanted))
        return Loaded(parts=parts)


def _name(wanted: Wanted) -> str:
    return wanted.names[0] if wanted.names else "input"


def _resized(wanted: Wanted) -> Callable[[Any], Any]:
    """For a model that brings no preprocessing: the shorter side to the input's, cropped, values in [0, 1]."""
    from torchvision import transforms

    shape = wanted.made.inputs[0].shape if wanted.made.inputs else ()
    if len(shape) != 3 or not all(isinstance(size, int) for size in shape):
        raise DataError(
            f'{wanted.where}: the size of the images is not known. Give the parameter input = "1x3x224x224:float32".'
        )
    side = [int(size) for size in shape[1:]]
    steps = [transforms.Resize(min(side)), transforms.CenterCrop(side), transforms.ToTensor()]
    composed: Callable[[Any], Any] = transforms.Compose(steps)
    return composed
