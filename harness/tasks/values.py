"""Tasks whose outputs are values, from data that come with scikit-learn: cleaned images, and a disease's progress."""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from harness.contracts import Metric, Port, Recipe, Signature, Split, Workload
from harness.tasks import classes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from harness.contracts import Tensors
    from harness.tasks.splits import ArraySplit


class _Values:
    """Mean squared error, one forward pass a query, trained from scratch."""

    epochs: int | None
    RECIPE: ClassVar[Recipe]

    @property
    def workload(self) -> Workload:
        """One forward pass."""
        return Workload()

    @property
    def fidelity(self) -> tuple[Metric, ...]:
        """Largest difference and signal-to-noise ratio."""
        from harness.losses import VALUE_FIDELITY

        return classes.metrics(*VALUE_FIDELITY)

    def unavailable(self) -> str | None:
        """None: the data come with scikit-learn."""
        return None

    def recipe(self) -> Recipe:
        """The baseline's recipe."""
        from dataclasses import replace

        return self.RECIPE if self.epochs is None else replace(self.RECIPE, epochs=self.epochs)

    def finetuning(self) -> Recipe:
        """The baseline's recipe."""
        return self.recipe()

    def loss(self, outputs: Tensors, targets: Tensors, label_smoothing: float = 0.0) -> Tensor:
        """Mean squared error."""
        from harness.losses import MeanSquaredError

        return MeanSquaredError()(outputs, targets, label_smoothing)

    def notes(self) -> tuple[str, ...]:
        """Nothing is inferred."""
        return ()

    def _parts(self) -> Mapping[str, ArraySplit]:
        raise NotImplementedError

    def data(self) -> Mapping[str, Split]:
        """Training and validation examples."""
        parts = self._parts()
        return {"train": parts["train"], "validation": parts["validation"]}

    def test(self) -> Split:
        """The test examples."""
        return self._parts()["test"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Denoising(_Values):
    """Scikit-learn's 8x8 digits, pixels in [0, 1], with Gaussian noise of standard deviation 0.25 to be taken off.

    The parts are those of ``digits-cnn``: 1,258 images train, 180 validate and 359 test. The noise is drawn once, from
    a fixed seed. Scored by the peak signal-to-noise ratio; that of the noisy images themselves is
    12.08 dB, that of the baseline 18.09 dB (seed 0).

    Parameters
    ----------
    epochs : int, optional
        Instead of the recipe's.
    """

    RECIPE: ClassVar[Recipe] = Recipe(
        epochs=30, batch_size=32, lr=3e-3, optimizer="adamw", weight_decay=0.01, augment=False
    )
    epochs: int | None = Field(default=None, ge=0)

    @property
    def name(self) -> str:
        """The registered name."""
        return "digits-denoising"

    @property
    def signature(self) -> Signature:
        """An image and an image."""
        return Signature(inputs=(Port(name="noisy", shape=(1, 8, 8)),), outputs=(Port(name="clean", shape=(1, 8, 8)),))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """PSNR, and the root mean squared error."""
        return classes.metrics("psnr", "rmse")

    def sources(self) -> tuple[str, ...]:
        """The module of the network, for the task's source hash."""
        return ("harness.tasks.models.denoiser",)

    def model(self, seed: int) -> nn.Module:
        """The network, initialised from ``seed``."""
        from harness.tasks.models.denoiser import Denoiser

        return _seeded(Denoiser, seed)

    def _parts(self) -> Mapping[str, ArraySplit]:
        return _noisy_digits()

    def dataset_hash(self) -> str:
        """Sha256 of the digits, as ``digits-cnn`` has it: the noise follows from the code."""
        from harness.tasks.digits import Digits

        return Digits().dataset_hash()


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Diabetes(_Values):
    """Scikit-learn's diabetes data (Efron et al. 2004): 442 patients, 10 features, the disease's progress in a year.

    282 patients train, 60 validate and 100 test. Scored by the root mean squared error; the training mean for everybody
    gives 80.75, a linear regression 52.41, the baseline 49.26 (seed 0).

    Parameters
    ----------
    epochs : int, optional
        Instead of the recipe's.
    """

    RECIPE: ClassVar[Recipe] = Recipe(
        epochs=40, batch_size=32, lr=1e-3, optimizer="adamw", weight_decay=0.1, augment=False
    )
    epochs: int | None = Field(default=None, ge=0)

    @property
    def name(self) -> str:
        """The registered name."""
        return "diabetes-mlp"

    @property
    def signature(self) -> Signature:
        """Ten features and one value."""
        return Signature(inputs=(Port(name="features", shape=(10,)),), outputs=(Port(name="progress", shape=(1,)),))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Root mean squared and mean absolute error, and the share of the variance that is explained."""
        return classes.metrics("rmse", "mae", "r2")

    def sources(self) -> tuple[str, ...]:
        """The module of the network, for the task's source hash."""
        return ("harness.tasks.models.regressor",)

    def model(self, seed: int) -> nn.Module:
        """The network, initialised from ``seed``."""
        from harness.tasks.models.regressor import Regressor

        targets = _patients()["train"].targets["label"]
        return _seeded(functools.partial(Regressor, float(targets.mean()), float(targets.std())), seed)

    def _parts(self) -> Mapping[str, ArraySplit]:
        return _patients()

    def dataset_hash(self) -> str:
        """Sha256 of features and targets, in the order scikit-learn gives them."""
        from sklearn.datasets import load_diabetes

        found = load_diabetes(scaled=False)
        return hashlib.sha256(found.data.tobytes() + found.target.tobytes()).hexdigest()


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


@functools.cache
def _noisy_digits() -> Mapping[str, ArraySplit]:
    import torch

    from harness.tasks.digits import Digits
    from harness.tasks.splits import ArraySplit

    digits = Digits()
    parts = {**digits.data(), "test": digits.test()}
    generator = torch.Generator().manual_seed(0)
    found = {}
    for part, split in parts.items():
        clean = next(split.batches(split.size)).inputs["input"] / 2 + 0.5
        noise = torch.randn(clean.shape, generator=generator)
        found[part] = ArraySplit(inputs={"noisy": clean + 0.25 * noise}, targets={"clean": clean})
    return found


@functools.cache
def _patients() -> Mapping[str, ArraySplit]:
    import numpy as np
    import torch
    from sklearn.datasets import load_diabetes

    from harness.tasks.splits import ArraySplit

    found = load_diabetes(scaled=False)
    # NumPy has frozen this generator's stream, so that the parts never change.
    places = np.random.RandomState(0).permutation(len(found.target))
    parts = {"train": places[:282], "validation": places[282:342], "test": places[342:]}
    mean, deviation = found.data[parts["train"]].mean(0), found.data[parts["train"]].std(0)
    features = torch.from_numpy(((found.data - mean) / deviation).astype(np.float32))
    targets = torch.from_numpy(found.target.astype(np.float32))[:, None]
    return {
        part: ArraySplit(inputs={"features": features[chosen]}, targets={"label": targets[chosen]})
        for part, chosen in parts.items()
    }
