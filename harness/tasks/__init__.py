"""Tasks: a model, its data, its metric and its training recipe.

Reading this table imports neither torch nor NumPy; the classes import them only when a model or data is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.registry import Entry

if TYPE_CHECKING:
    from harness.contracts import Task

_FASHION = "harness.tasks.fashion_mnist:FashionMnist"


def _fashion(architecture: str, summary: str) -> Entry:
    return Entry(_FASHION, f"Fashion-MNIST, {summary}", {"architecture": architecture})


TABLE: dict[str, Entry] = {
    "digits-cnn": Entry("harness.tasks.digits:Digits", "scikit-learn's 8x8 digits, a two-layer CNN; needs no download"),
    "fashion-mnist/lenet-300-100": _fashion("lenet-300-100", "784-300-100-10 perceptron"),
    "fashion-mnist/lenet5-caffe": _fashion("lenet5-caffe", "Caffe's LeNet-5, 20-50-500-10"),
    "fashion-mnist/resnet20": _fashion("resnet20", "ResNet-20, widths 16-32-64"),
    "fashion-mnist/mobilenet-tiny": _fashion("mobilenet-tiny", "depthwise-separable convolutions"),
    "fashion-mnist/convnext-tiny-ish": _fashion("convnext-tiny-ish", "depthwise 7x7, LayerNorm, GELU"),
    "fashion-mnist/vit-tiny": _fashion("vit-tiny", "vision transformer, four blocks of width 64"),
    "torchvision": Entry(
        "harness.tasks.torchvision_models:TorchvisionModel",
        "any torchvision classification model: torchvision/resnet18",
        family="architecture",
    ),
}


def create(name: str, parameters: Mapping[str, Any]) -> Task:
    """Build a task from its name and parameters; ``module:function`` makes a :class:`harness.tasks.user.UserTask`.

    A task class of another distribution, or of the user (``module:Class`` where the class has the methods of
    :class:`harness.contracts.Task`), is built like the registered ones.

    Raises
    ------
    UnknownName
        If the name is neither registered nor of the form ``module:function``.
    InputError
        If a parameter or its value is not allowed, or the user's module cannot be imported.
    """
    if name not in registry.table("task") and ":" in name:
        from harness.tasks.user import UserTask, find

        if not isinstance(find(name), type):
            task = UserTask(target=name, parameters=dict(parameters))
            task.check()
            return task
    built: Task = registry.create("task", name, parameters)
    return built
