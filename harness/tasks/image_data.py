"""Images kept as bytes in memory, converted and augmented batch by batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.contracts import Batch
from harness.tasks import splits

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

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


@dataclass(frozen=True, kw_only=True)
class ImageSplit:
    """Images with their classes (see :class:`harness.contracts.Split`): input "input", target "label".

    Parameters
    ----------
    examples : Labelled
        The images.
    maximum : int
        The pixel value that becomes 1.
    pad : int
        Augmentation: random crops out of images padded with this many zeros on each side.
    flip : bool
        Augmentation: mirror half of the images left to right.
    """

    examples: Labelled
    maximum: int
    pad: int = 0
    flip: bool = False

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.examples)

    @functools.cached_property
    def identity(self) -> str:
        """Sha256 (hex) of all images, scaled, and classes."""
        return splits.identity(self.batches(1024))

    def batches(self, size: int, *, seed: int | None = None, augment: bool = False) -> Iterator[Batch]:
        """One pass over the images, float32 (n, c, h, w), and classes int64 (n,)."""
        import torch
        from torch.nn import functional as F

        images, labels = torch.from_numpy(self.examples.images), torch.from_numpy(self.examples.labels)
        count = len(labels)
        order, generator = splits.order(count, seed)
        moves, mirror = augment and self.pad > 0, augment and self.flip
        height, width = images.shape[2:]
        windows = images
        if moves:
            span = 2 * self.pad + 1
            rows = torch.randint(span, (count,), generator=generator)
            columns = torch.randint(span, (count,), generator=generator)
            # A view: windows[i, y, x] is image i cropped at (y, x) of its padded self.
            padded = F.pad(images, (self.pad,) * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
        if mirror:
            flips = torch.rand(count, generator=generator) < 0.5
        for start in range(0, count, size):
            part = slice(start, start + size)
            chosen = order[part]
            x = windows[chosen, rows[part], columns[part]] if moves else windows[chosen]
            if mirror:
                x = torch.where(flips[part, None, None, None], x.flip(3), x)
            pixels = x.float().div_(self.maximum).sub_(0.5).div_(0.5)
            yield Batch(inputs={"input": pixels}, targets={"label": labels[chosen]})
