"""Torchvision's classification models."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from harness.contracts import Port
from harness.errors import InputError, suggestion
from harness.tasks.sources import Made
from harness.tasks.torchvision_models import INSTALL, architectures


@dataclass(frozen=True)
class Torchvision:
    """A model of torchvision with its default weights, where they are in torch's hub cache or can be downloaded."""

    name: str

    def __post_init__(self) -> None:
        known = architectures()
        if known and self.name not in known:
            raise InputError(f"torchvision has no classification model {self.name!r}. {suggestion(self.name, known)}")

    def unavailable(self) -> str | None:
        """Torchvision's install line where it is missing, or None."""
        return None if importlib.util.find_spec("torchvision") else INSTALL

    def recipe(self) -> None:
        """None: nothing is trained from scratch."""
        return

    def make(self, seed: int) -> Made:
        """The pretrained model, or a random one with the reason."""
        from harness.tasks import pretrained

        side = pretrained.resolution(self.name, "DEFAULT")
        ports = (Port(name="input", shape=(3, side, side)),)
        transform = pretrained.transform(self.name, "DEFAULT")
        if reason := pretrained.missing(self.name, "DEFAULT"):
            reason = f"The weights are random: {reason}"
            model = pretrained.random(self.name, seed, (3, side, side))
            return Made(model=model, untrained=reason, inputs=ports, transform=transform, notes=(reason,))
        return Made(model=pretrained.trained(self.name, "DEFAULT"), inputs=ports, transform=transform)
