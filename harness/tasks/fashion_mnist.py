"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747) with six small networks."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from harness.contracts import Data, TestSet
from harness.errors import Unavailable, suggestion
from harness.tasks import checkpoint, models
from harness.tasks import fashion_mnist_files as files
from harness.training import Recipe

if TYPE_CHECKING:
    from torch import nn

RECIPES: Mapping[str, Recipe] = {
    "lenet-300-100": Recipe(epochs=16, lr=0.1, weight_decay=5e-4, label_smoothing=0.1, augment=False),
    "lenet5-caffe": Recipe(epochs=8, lr=0.05, weight_decay=5e-4, augment=False),
    "resnet20": Recipe(epochs=12, lr=0.2, weight_decay=5e-4, label_smoothing=0.05),
    "mobilenet-tiny": Recipe(epochs=5, lr=0.2, weight_decay=1e-4),
    "convnext-tiny-ish": Recipe(epochs=4, lr=4e-3, optimizer="adamw", weight_decay=0.05),
    "vit-tiny": Recipe(epochs=6, lr=2e-3, optimizer="adamw", weight_decay=0.05),
}
"""How each network's baseline is trained."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FashionMnist:
    """60,000 training and 10,000 test images of clothing, 28x28, ten classes, pixels scaled to [-1, 1].

    500 training images of each class are held back for validation.

    Test accuracy of the baselines, measured with the recipes of :data:`RECIPES` on a 2-core x86 server CPU with
    AVX-512, the LeNets with one thread and the others with two; other CPUs and thread counts round differently.
    CPU time is that of seed 0's process on a busy machine, an upper bound:

    ================== ========== =============== =============== ===============
    network            parameters seed 0          seed 1          CPU time
    ================== ========== =============== =============== ===============
    lenet-300-100         266,610 89.87 %         89.80 %         25 s
    lenet5-caffe          431,080 91.86 %         91.83 %         150 s
    resnet20              272,186 93.67 %         not measured    38 min
    vit-tiny              138,890 85.26 %         not measured    9 min
    mobilenet-tiny        159,178 not measured    not measured    not measured
    convnext-tiny-ish     102,378 not measured    not measured    not measured
    ================== ========== =============== =============== ===============

    Parameters
    ----------
    architecture : str
        A network of :data:`RECIPES`.
    epochs : int, optional
        Instead of the recipe's.
    train_examples : int, optional
        Train on this many of the 55,000, every class in proportion (a small-data setting, as in Mocanu et al. 2018).
    weights : str, optional
        Sha256 (hex) of a checkpoint in ``$ASSAY_HOME/downloads``: the network comes with its weights, untrained here.
    """

    architecture: str
    epochs: int | None = Field(default=None, ge=0)
    train_examples: int | None = Field(default=None, ge=10, le=55000)
    weights: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")

    @field_validator("architecture")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in RECIPES:
            raise ValueError(f"there is no network {value!r} for Fashion-MNIST. {suggestion(value, RECIPES)}")
        return value

    @property
    def name(self) -> str:
        """The registered name."""
        return f"fashion-mnist/{self.architecture}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """One grey channel, 28 by 28."""
        return (1, 28, 28)

    def unavailable(self) -> str | None:
        """Why the data cannot be had (a download is tried), or None. A damaged file raises DataError."""
        try:
            files.locate()
        except Unavailable as reason:
            return str(reason)
        return checkpoint.missing(self.weights) if self.weights else None

    def model(self, seed: int) -> nn.Module:
        """The network, initialised from ``seed``, or with the weights of the checkpoint."""
        network = models.create(self.architecture, seed)
        if self.weights:
            checkpoint.load_state(self.weights, network)
        return network

    def recipe(self) -> Recipe | None:
        """The baseline's recipe; None where ``weights`` are given."""
        from dataclasses import replace

        if self.weights:
            return None
        recipe = RECIPES[self.architecture]
        return recipe if self.epochs is None else replace(recipe, epochs=self.epochs)

    def data(self) -> Data:
        """55,000 training images (augmented by crops with two pixels' shift, and mirrored) and 5,000 for validation."""
        from harness.tasks.image_data import ImageData, stratified_split

        examples = files.load("train")
        training, validating = stratified_split(examples.labels, 5000, seed=0)
        if self.train_examples is not None:
            _, chosen = stratified_split(examples.labels[training], self.train_examples, seed=1)
            training = training[chosen]
        return ImageData(
            training=examples.take(training), validating=examples.take(validating), maximum=255, pad=2, flip=True
        )

    def test(self) -> TestSet:
        """The 10,000 test images."""
        from harness.tasks.image_data import held_out

        return held_out(files.load("test"), 255)

    def dataset_hash(self) -> str:
        """Digest of the four files' sha256. Files that are here are verified; nothing is downloaded for it."""
        with contextlib.suppress(Unavailable):
            files.verify(files.locate(download=False))
        return files.folder_hash()

    def no_accuracy_reason(self) -> str | None:
        """None: the test set is labelled."""
        return None
