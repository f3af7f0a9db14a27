"""Images kept as bytes in memory, converted and augmented batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.contracts import TestSet

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Images, uint8 (n, channels, height, width), with their classes, int64 (n,)."""

    images: ByteArray
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)

    def take(self, indices: Any) -> Labelled:
        """The examples at ``indices``, in that order."""
        return Labelled(images=self.images[indices], labels=self.labels[indices])


def stratified_split(labels: npt.NDArray[np.int64], second: int, *, seed: int) -> tuple[Any, Any]:
    """Split the indices of ``labels`` in two, every class in proportion; both parts come in ascending order.

    Parameters
    ----------
    labels : int64 (n,)
        Classes.
    second : int
        Size of the second part. Each class gives its share rounded down; the classes with the largest remainders
        give one more each (ties: the smaller class).
    seed : int
        Of ``numpy.random.RandomState``, whose stream NumPy has frozen, so that the split never changes.
    """
    import numpy as np

    order = np.random.RandomState(seed).permutation(len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * second / len(labels)
    share = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - share), kind="stable")
    share[largest[: second - int(share.sum())]] += 1
    chosen = np.concatenate([order[labels[order] == c][:n] for c, n in zip(classes, share, strict=True)])
    mask = np.zeros(len(labels), dtype=bool)
    mask[chosen] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def scaled(images: ByteArray, maximum: int) -> npt.NDArray[np.float32]:
    """Images as float32 in [-1, 1]: ``(x / maximum - 0.5) / 0.5``."""
    import numpy as np

    values = images.astype(np.float32)
    values /= np.float32(maximum)
    values -= np.float32(0.5)
    values /= np.float32(0.5)
    return values


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Training and validation images (see :class:`harness.contracts.Data`).

    Parameters
    ----------
    training, validating : Labelled
        The two parts.
    maximum : int
        The pixel value that becomes 1.
    pad : int
        Augmentation: random crops out of images padded with this many zeros on each side.
    flip : bool
        Augmentation: mirror half of the images left to right.
    """

    training: Labelled
    validating: Labelled
    maximum: int
    pad: int = 0
    flip: bool = False

    @property
    def train_size(self) -> int:
        """Number of training examples."""
        return len(self.training)

    @property
    def validation_size(self) -> int:
        """Number of validation examples."""
        return len(self.validating)

    def train(
        self, batch_size: int, *, seed: int, shuffle: bool = True, augment: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the training images, float32 (n, c, h, w), and labels int64 (n,)."""
        import torch
        from torch.nn import functional as F

        generator = torch.Generator().manual_seed(seed)
        images, labels = torch.from_numpy(self.training.images), torch.from_numpy(self.training.labels)
        size = len(labels)
        order = torch.randperm(size, generator=generator) if shuffle else torch.arange(size)
        moves, mirror = augment and self.pad > 0, augment and self.flip
        height, width = images.shape[2:]
        windows = images
        if moves:
            span = 2 * self.pad + 1
            rows = torch.randint(span, (size,), generator=generator)
            columns = torch.randint(span, (size,), generator=generator)
            # A view: windows[i, y, x] is image i cropped at (y, x) of its padded self.
            padded = F.pad(images, (self.pad,) * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
        if mirror:
            flips = torch.rand(size, generator=generator) < 0.5
        for start in range(0, size, batch_size):
            part = slice(start, start + batch_size)
            chosen = order[part]
            x = windows[chosen, rows[part], columns[part]] if moves else windows[chosen]
            if mirror:
                x = torch.where(flips[part, None, None, None], x.flip(3), x)
            yield x.float().div_(self.maximum).sub_(0.5).div_(0.5), labels[chosen]

    def validation(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The validation images in fixed order."""
        import torch

        for x, y in batches(self.validating, batch_size, self.maximum):
            yield torch.from_numpy(x), torch.from_numpy(y)


def batches(examples: Labelled, batch_size: int, maximum: int) -> Iterator[tuple[Any, Any]]:
    """Scaled images and labels in order, ``batch_size`` at a time; the last batch may be short."""
    for start in range(0, len(examples), batch_size):
        part = slice(start, start + batch_size)
        yield scaled(examples.images[part], maximum), examples.labels[part]


def held_out(examples: Labelled, maximum: int) -> TestSet:
    """A test set of images."""
    return TestSet(size=len(examples), batches=lambda batch_size: batches(examples, batch_size, maximum))
