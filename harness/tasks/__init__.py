"""Tasks: a model, its data, its metric and its training recipe.

Reading this table imports neither torch nor NumPy; the classes import them only when a model or data is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.errors import SpecError
from harness.registry import Entry

if TYPE_CHECKING:
    from harness.contracts import Task

_NETWORKS = {
    "lenet-300-100": "784-300-100-10 perceptron",
    "lenet5-caffe": "Caffe's LeNet-5, 20-50-500-10",
    "set-mlp": "784-1000-1000-1000-10 perceptron with dropout",
    "vgg-small": "plain convolutions with batch normalisation, widths 16-32-64",
    "resnet20": "ResNet-20, widths 16-32-64",
    "mobilenet-tiny": "depthwise-separable convolutions",
    "convnext-tiny-ish": "depthwise 7x7, LayerNorm, GELU",
    "vit-tiny": "vision transformer, four blocks of width 64",
}


def _images(dataset: str, title: str) -> dict[str, Entry]:
    return {
        f"{dataset}/{architecture}": Entry(
            "harness.tasks.idx_images:IdxImages",
            f"{title}, {summary}",
            {"dataset": dataset, "architecture": architecture},
        )
        for architecture, summary in _NETWORKS.items()
    }


TABLE: dict[str, Entry] = {
    "digits-cnn": Entry("harness.tasks.digits:Digits", "scikit-learn's 8x8 digits, a two-layer CNN; needs no download"),
    **_images("fashion-mnist", "Fashion-MNIST"),
    **_images("mnist", "MNIST"),
    "digits-denoising": Entry("harness.tasks.values:Denoising", "noisy 8x8 digits made clean, scored by PSNR"),
    "diabetes-mlp": Entry("harness.tasks.values:Diabetes", "scikit-learn's diabetes data, a perceptron, RMSE"),
    "minilm-eras": Entry("harness.tasks.passages:Passages", "a text encoder, MiniLM, classifies passages of speeches"),
    "smollm2-135m": Entry("harness.tasks.language:LanguageModel", "a causal language model, SmolLM2, by perplexity"),
    "pair": Entry("harness.tasks.pair:Pair", 'any model with any data: {model = "resnet20", data = "mnist"}'),
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
        from harness.tasks.user import UserTask
        from harness.usercode import find

        if not isinstance(find(name), type):
            task = UserTask(target=name, parameters=dict(parameters))
            task.check()
            return task
    if name == "pair":
        from harness.tasks.pair import PARAMETERS

        if "model" not in parameters:
            raise SpecError('A task is a name, or has a model: task = {model = "resnet20", data = "fashion-mnist"}.')
        parameters = {PARAMETERS.get(key, key): value for key, value in parameters.items()}
    built: Task = registry.create("task", name, parameters)
    return built
