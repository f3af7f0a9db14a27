"""MNIST (LeCun et al. 1998) and Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747) with small networks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from harness.contracts import Recipe, Signature, Split
from harness.errors import Unavailable, suggestion
from harness.tasks import checkpoint, classes, models
from harness.tasks.idx_dataset import FASHION_MNIST, MNIST, IdxDataSet
from harness.tasks.recipes import RECIPES

if TYPE_CHECKING:
    from torch import nn

_SETS: Mapping[str, IdxDataSet] = {"fashion-mnist": FASHION_MNIST, "mnist": MNIST}


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class IdxImages(classes.Classification):
    """60,000 training and 10,000 test images of clothing or digits, 28x28, ten classes, pixels scaled to [-1, 1].

    5,000 of the training images, every class in proportion, are held back for validation.

    Test accuracy of the baselines on Fashion-MNIST, measured with :data:`harness.tasks.recipes.RECIPES` on a 2-core x86
    server CPU with AVX-512, the LeNets with one thread and the others with two; other CPUs and thread counts round
    differently. CPU time is that of seed 0's process on a busy machine, an upper bound:

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
    dataset : {"fashion-mnist", "mnist"}
    architecture : str
        A network of :data:`harness.tasks.recipes.RECIPES`.
    epochs : int, optional
        Instead of the recipe's.
    train_examples : int, optional
        Train on this many of the 55,000, every class in proportion (a small-data setting, as in Mocanu et al. 2018).
    training : mapping
        Values of :class:`harness.contracts.Recipe` instead of the network's own, such as
        ``{optimizer = "adam", lr = 1.2e-3}``: a paper's setting.
    weights : str, optional
        Sha256 (hex) of a checkpoint in ``$ASSAY_HOME/downloads``: the network comes with its weights, untrained here.
    """

    architecture: str
    dataset: Literal["fashion-mnist", "mnist"] = "fashion-mnist"
    epochs: int | None = Field(default=None, ge=0)
    train_examples: int | None = Field(default=None, ge=10, le=55000)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")

    @field_validator("architecture")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in RECIPES:
            raise ValueError(f"there is no network {value!r} for 28x28 images. {suggestion(value, RECIPES)}")
        return value

    @field_validator("training")
    @classmethod
    def _recipe(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        allowed = [f.name for f in dataclasses.fields(Recipe)]
        for key in value:
            if key not in allowed:
                raise ValueError(f"a recipe has no {key!r}. {suggestion(key, allowed)}")
        try:
            # Integers are numbers too: lr = 1 means 1.0.
            TypeAdapter(Recipe).validate_python({"epochs": 1, **value})
        except ValidationError as error:
            found = error.errors()[0]
            raise ValueError(f"{found['loc'][0]}: {found['msg']} (got {found['input']!r})") from None
        return value

    @property
    def name(self) -> str:
        """The registered name."""
        return f"{self.dataset}/{self.architecture}"

    @property
    def signature(self) -> Signature:
        """One grey channel, 28 by 28; ten classes."""
        return classes.signature((1, 28, 28), 10)

    def sources(self) -> tuple[str, ...]:
        """The module of the network, for the task's source hash."""
        return (models.source(self.architecture),)

    def unavailable(self) -> str | None:
        """Why the data cannot be had (a download is tried), or None. A damaged file raises DataError."""
        try:
            _SETS[self.dataset].locate()
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
        return None if self.weights else self.finetuning()

    def finetuning(self) -> Recipe:
        """The network's recipe with the given changes, whoever trained the weights."""
        recipe = dataclasses.replace(RECIPES[self.architecture], **self.training)
        return recipe if self.epochs is None else dataclasses.replace(recipe, epochs=self.epochs)

    def data(self) -> Mapping[str, Split]:
        """55,000 training images and 5,000 for validation; augmented by crops of up to two pixels' shift.

        Clothing is mirrored as well; digits are not, since a mirrored digit is none.
        """
        from harness.tasks.image_data import ImageSplit, stratified_split

        examples = _SETS[self.dataset].load("train")
        training, validating = stratified_split(examples.labels, 5000, seed=0)
        if self.train_examples is not None:
            _, chosen = stratified_split(examples.labels[training], self.train_examples, seed=1)
            training = training[chosen]
        flip = self.dataset == "fashion-mnist"
        return {
            "train": ImageSplit(examples=examples.take(training), maximum=255, pad=2, flip=flip),
            "validation": ImageSplit(examples=examples.take(validating), maximum=255),
        }

    def test(self) -> Split:
        """The 10,000 test images."""
        from harness.tasks.image_data import ImageSplit

        return ImageSplit(examples=_SETS[self.dataset].load("test"), maximum=255)

    def dataset_hash(self) -> str:
        """Digest of the four files' sha256. Files that are here are verified; nothing is downloaded for it."""
        data = _SETS[self.dataset]
        with contextlib.suppress(Unavailable):
            data.verify(data.locate(download=False))
        return data.digest()
