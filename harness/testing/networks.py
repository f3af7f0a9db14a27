"""Two small networks trained on digits, on which the contract suite runs every method and runtime."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.contracts import Data
from harness.tasks.digits import Digits
from harness.training import Recipe, SGDTrainer

SHAPE = (1, 8, 8)
CLASSES = 10


class Perceptron(nn.Module):
    """64-48-32-10 with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 48)
        self.fc2 = nn.Linear(48, 32)
        self.fc3 = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        x = F.relu(self.fc1(x.flatten(1)))
        out: Tensor = self.fc3(F.relu(self.fc2(x)))
        return out


class Residual(nn.Module):
    """A stem, one residual block with batch normalisation, global average pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(256, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        x = F.relu(self.norm(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = self.pool(F.relu(x + y))
        out: Tensor = self.fc(x.flatten(1))
        return out


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A trained network with the data and the recipe that trained it.

    Parameters
    ----------
    model : nn.Module
        In eval mode. Shared between checks: nobody may change it.
    data : Data
        Digits.
    recipe : Recipe
        Of its training.
    fresh : callable
        Returns the network as its training began.
    """

    model: nn.Module
    data: Data
    recipe: Recipe
    fresh: Callable[[], nn.Module]

    def images(self, count: int) -> Tensor:
        """The first ``count`` validation images, float32 (count, 1, 8, 8)."""
        return next(iter(self.data.validation(count)))[0]


_NETWORKS: dict[str, Callable[[], nn.Module]] = {"perceptron": Perceptron, "residual": Residual}
NAMES = tuple(_NETWORKS)


@functools.cache
def reference(name: str) -> Reference:
    """One of the networks :data:`NAMES`, trained once a process (about a second)."""
    data = Digits().data()
    recipe = Recipe(epochs=4, batch_size=32, lr=0.1, weight_decay=5e-4, augment=False)

    def fresh() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _NETWORKS[name]()

    model = fresh()
    SGDTrainer(data=data, seed=0)(model, recipe)
    return Reference(model=model.eval(), data=data, recipe=recipe, fresh=fresh)
