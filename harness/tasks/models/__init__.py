"""The networks of the built-in tasks, one family a file.

Every network can be traced by ``torch.fx``, accepts any batch size, and is initialised from a seed without touching the
caller's random state.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.errors import UnknownName

if TYPE_CHECKING:
    from torch import nn

MODELS: Mapping[str, str] = {
    "digits-cnn": "digits:DigitsCNN",
    "lenet-300-100": "lenet:LeNet300",
    "lenet5-caffe": "lenet:LeNet5Caffe",
    "set-mlp": "mlp:SetMLP",
    "vgg-small": "vgg:VGGSmall",
    "resnet20": "resnet:ResNet20",
    "mobilenet-tiny": "mobilenet:MobileNetTiny",
    "convnext-tiny-ish": "convnext:ConvNeXtTinyIsh",
    "vit-tiny": "vit:ViTTiny",
}
"""Module and class by network.

Imported by name and not by statement, so that a task's source hash covers the file of its own network and no other
(see :func:`source`).
"""


def source(name: str) -> str:
    """The module that defines a network.

    Raises
    ------
    UnknownName
        If there is no such network.
    """
    if name not in MODELS:
        raise UnknownName("network", name, MODELS)
    return f"{__name__}.{MODELS[name].partition(':')[0]}"


def create(name: str, seed: int) -> nn.Module:
    """A network with weights drawn from ``seed``; the global random state is as before afterwards.

    Raises
    ------
    UnknownName
        If there is no such network.
    """
    import torch

    kind: type[nn.Module] = getattr(importlib.import_module(source(name)), MODELS[name].partition(":")[2])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return kind()
