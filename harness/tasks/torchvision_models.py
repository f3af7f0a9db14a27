"""Any classification model of torchvision, with ImageNet's validation images where they are at hand."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from harness.contracts import Recipe, Signature, Split
from harness.errors import Unavailable, suggestion
from harness.tasks import classes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

INSTALL = 'torchvision is not installed: pip install "assay-bench[vision]".'


@functools.cache
def architectures() -> tuple[str, ...]:
    """Names of the installed torchvision's classification models; empty without torchvision.

    Read from its source text, because importing it takes seconds and brings torch.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return ()
    folder = Path(spec.submodule_search_locations[0]) / "models"
    pattern = re.compile(r'^@register_model\((?:name="(\w+)")?\)\n(?:@.*\n)*def (\w+)\(', re.MULTILINE)
    names = {a or b for file in folder.glob("*.py") for a, b in pattern.findall(file.read_text(encoding="utf-8"))}
    return tuple(sorted(names))


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TorchvisionModel(classes.Classification):
    """A torchvision model, pretrained on ImageNet-1k where its weights can be had.

    Without weights (none asked for, or neither in torch's hub cache nor to be downloaded) the model has random weights,
    drawn from the seed and scaled so that its outputs are not close to zero, and accuracy is NULL with the reason. It
    is NULL, too, without a folder of ImageNet.

    Parameters
    ----------
    architecture : str
        A name from ``torchvision.models.list_models(module=torchvision.models)``.
    weights : str or None
        Name of the weights ("DEFAULT", "IMAGENET1K_V1", ...), or None for random ones.
    imagenet : str or None
        Folder with ``val`` (and ``train``), or with the class folders themselves: 1,000 folders whose sorted names
        (WordNet ids) are the classes 0 to 999. Where None, ``imagenet`` inside a folder of ``ASSAY_DATA``.
    examples : int or None
        Test on this many images, evenly spaced over the classes, instead of all.
    """

    architecture: str
    weights: str | None = "DEFAULT"
    imagenet: str | None = None
    examples: int | None = Field(default=None, ge=1)

    @field_validator("architecture")
    @classmethod
    def _known(cls, value: str) -> str:
        known = architectures()
        if known and value not in known:
            raise ValueError(f"torchvision has no classification model {value!r}. {suggestion(value, known)}")
        return value

    @property
    def name(self) -> str:
        """The registered name."""
        return f"torchvision/{self.architecture}"

    @property
    def signature(self) -> Signature:
        """Three channels at the resolution that the weights were evaluated at; 1,000 classes."""
        from harness.tasks import imagenet

        return classes.signature(self._shape(), imagenet.CLASSES)

    def unavailable(self) -> str | None:
        """Torchvision's install line where it is missing, or None."""
        return None if importlib.util.find_spec("torchvision") else INSTALL

    def model(self, seed: int) -> nn.Module:
        """The pretrained model; a random one from ``seed`` where there are no weights."""
        from harness.tasks import pretrained

        if self.weights is not None and pretrained.missing(self.architecture, self.weights) is None:
            return pretrained.trained(self.architecture, self.weights)
        return pretrained.random(self.architecture, seed, self._shape())

    def recipe(self) -> None:
        """None: nothing is trained here."""
        return

    def finetuning(self) -> Recipe | None:
        """A careful recipe for pretrained weights, or None where there are no training images or weights."""
        from harness.tasks import finetuning, imagenet, pretrained

        if self._random() or imagenet.locate(self.imagenet, "train") is None:
            return None
        return finetuning.default(pretrained.outline(self.architecture), batch_size=64)

    def data(self) -> Mapping[str, Split]:
        """The images of ``train``, every 50th of a class for validation, where there is such a folder."""
        from harness.tasks import imagenet

        folder = imagenet.locate(self.imagenet, "train")
        return {} if folder is None else imagenet.training_data(folder, self._transform())

    def test(self) -> Split:
        """The labelled images of ``val``.

        Raises
        ------
        Unavailable
            If the weights are random, or there is no ImageNet.
        """
        from harness.tasks import imagenet

        if reason := self._random():
            raise Unavailable(reason)
        folder = imagenet.locate(self.imagenet, "val")
        if folder is None:
            raise Unavailable(imagenet.REMEDY)
        examples = imagenet.spaced(imagenet.listing(folder), self.examples)
        return imagenet.FolderSplit(folder=folder, examples=examples, transform=self._transform())

    def dataset_hash(self) -> str | None:
        """Sha256 over the test images' names and contents, or None where there are none."""
        from harness.tasks import imagenet

        folder = imagenet.locate(self.imagenet, "val")
        if folder is None or self._random():
            return None
        return imagenet.content_hash(folder, imagenet.spaced(imagenet.listing(folder), self.examples))

    def notes(self) -> tuple[str, ...]:
        """That the weights are random, where they are."""
        reason = self._random()
        return (reason,) if reason else ()

    def _random(self) -> str | None:
        from harness.tasks import pretrained

        if self.weights is None:
            return "The weights are random (weights is None)."
        reason = pretrained.missing(self.architecture, self.weights)
        return f"The weights are random: {reason}" if reason else None

    def _shape(self) -> tuple[int, ...]:
        from harness.tasks import pretrained

        side = pretrained.resolution(self.architecture, self.weights)
        return (3, side, side)

    def _transform(self) -> Any:
        from harness.tasks import pretrained

        return pretrained.transform(self.architecture, self.weights)
