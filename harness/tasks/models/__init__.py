"""The networks of the built-in tasks, one family a file.

Every network can be traced by ``torch.fx``, accepts any batch size, and is initialised from a seed without touching the
caller's random state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.errors import UnknownName

if TYPE_CHECKING:
    from torch import nn

MODELS: tuple[str, ...] = (
    "digits-cnn",
    "lenet-300-100",
    "lenet5-caffe",
    "resnet20",
    "mobilenet-tiny",
    "convnext-tiny-ish",
    "vit-tiny",
)
"""Names of the networks."""


def _classes() -> dict[str, type[nn.Module]]:
    # Plain imports, so that a task's source hash covers the networks' files.
    from harness.tasks.models.convnext import ConvNeXtTinyIsh
    from harness.tasks.models.digits import DigitsCNN
    from harness.tasks.models.lenet import LeNet5Caffe, LeNet300
    from harness.tasks.models.mobilenet import MobileNetTiny
    from harness.tasks.models.resnet import ResNet20
    from harness.tasks.models.vit import ViTTiny

    networks = (DigitsCNN, LeNet300, LeNet5Caffe, ResNet20, MobileNetTiny, ConvNeXtTinyIsh, ViTTiny)
    return dict(zip(MODELS, networks, strict=True))


def create(name: str, seed: int) -> nn.Module:
    """A network with weights drawn from ``seed``; the global random state is as before afterwards.

    Raises
    ------
    UnknownName
        If there is no such network.
    """
    import torch

    if name not in MODELS:
        raise UnknownName("network", name, MODELS)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _classes()[name]()
