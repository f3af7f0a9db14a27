"""The embedded default: scikit-learn's handwritten digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from harness.contracts import Recipe, Signature, Split
from harness.tasks import classes, models

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from harness.tasks.image_data import Labelled

RECIPE = Recipe(epochs=15, batch_size=32, lr=0.05, weight_decay=5e-4)
"""How the baseline is trained."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Digits(classes.Classification):
    """1,797 images of digits, 8x8, pixel values 0..16 scaled to [-1, 1] (Alpaydin & Kaynak 1998; part of scikit-learn).

    1,258 images train, 180 validate and 359 test, every class in proportion. Training shifts images by up to one pixel.
    The baseline reaches 99.16 % of the test images (seed 0, one thread, under 10 s of CPU time on a 2-core
    x86 server CPU with AVX-512).

    Parameters
    ----------
    epochs : int, optional
        Instead of the recipe's.
    """

    epochs: int | None = Field(default=None, ge=0)

    @property
    def name(self) -> str:
        """The registered name."""
        return "digits-cnn"

    @property
    def signature(self) -> Signature:
        """One grey channel, 8 by 8; ten classes."""
        return classes.signature((1, 8, 8), 10)

    def sources(self) -> tuple[str, ...]:
        """The module of the network, for the task's source hash."""
        return (models.source("digits-cnn"),)

    def unavailable(self) -> str | None:
        """None: the data come with scikit-learn."""
        return None

    def model(self, seed: int) -> nn.Module:
        """The network, initialised from ``seed``."""
        return models.create("digits-cnn", seed)

    def recipe(self) -> Recipe:
        """The baseline's recipe."""
        from dataclasses import replace

        return RECIPE if self.epochs is None else replace(RECIPE, epochs=self.epochs)

    def finetuning(self) -> Recipe:
        """The baseline's recipe."""
        return self.recipe()

    def data(self) -> Mapping[str, Split]:
        """Training and validation images."""
        from harness.tasks.image_data import ImageSplit

        training, validating, _ = _parts()
        return {
            "train": ImageSplit(examples=training, maximum=16, pad=1),
            "validation": ImageSplit(examples=validating, maximum=16),
        }

    def test(self) -> Split:
        """The test images."""
        from harness.tasks.image_data import ImageSplit

        return ImageSplit(examples=_parts()[2], maximum=16)

    def dataset_hash(self) -> str:
        """Sha256 of images and labels, in the order scikit-learn gives them."""
        import hashlib

        examples = _examples()
        return hashlib.sha256(examples.images.tobytes() + examples.labels.tobytes()).hexdigest()


def _examples() -> Labelled:
    import numpy as np
    from sklearn.datasets import load_digits

    from harness.tasks.image_data import Labelled

    digits = load_digits()
    return Labelled(images=digits.images[:, None].astype(np.uint8), labels=digits.target.astype(np.int64))


def _parts() -> tuple[Labelled, Labelled, Labelled]:
    from harness.tasks.image_data import stratified_split

    examples = _examples()
    rest, testing = stratified_split(examples.labels, 359, seed=0)
    training, validating = stratified_split(examples.labels[rest], 180, seed=1)
    return examples.take(rest[training]), examples.take(rest[validating]), examples.take(testing)
