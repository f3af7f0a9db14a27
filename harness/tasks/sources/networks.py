"""The built-in networks, trained by their own recipes."""

from __future__ import annotations

from dataclasses import dataclass

from harness.contracts import Port, Recipe
from harness.tasks import models
from harness.tasks.sources import Made


@dataclass(frozen=True)
class Network:
    """A network of :data:`harness.tasks.models.MODELS`."""

    name: str

    def unavailable(self) -> str | None:
        """None: it is part of Assay."""
        return None

    def recipe(self) -> Recipe:
        """The network's own."""
        from harness.tasks.digits import RECIPE
        from harness.tasks.recipes import RECIPES

        return RECIPES.get(self.name, RECIPE)

    def make(self, seed: int) -> Made:
        """The network, initialised from ``seed``."""
        side = 8 if self.name == "digits-cnn" else 28
        return Made(
            model=models.create(self.name, seed),
            untrained='The network has random weights: give data with a training part (data = "fashion-mnist").',
            inputs=(Port(name="input", shape=(1, side, side)),),
        )
