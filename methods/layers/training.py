"""The training that a method asks of its context, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from harness.calling import call
from harness.errors import Unsupported

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.contracts import Batch, Context, Recipe, Split, Tensors, Training


def training(context: Context, setting: str = "") -> Training:
    """How the task trains on.

    Parameters
    ----------
    context : Context
        The method's.
    setting : str
        What asks for it, as the user wrote it: ``"finetune_epochs=3"``. The message begins with it.

    Raises
    ------
    Unsupported
        If the task has no training data.
    """
    if context.training is None:
        raise Unsupported(f"{setting} needs a task with training data".lstrip())
    return context.training


def finetuning(context: Context, epochs: int, setting: str = "finetune_epochs") -> Training | None:
    """:func:`training` where ``epochs`` are asked for, None where they are not."""
    return training(context, f"{setting}={epochs}") if epochs else None


def from_scratch(context: Context, epochs: int | None = None, setting: str = "") -> tuple[nn.Module, Recipe]:
    """The untrained network, and the recipe with ``epochs`` instead of its own where that is given.

    Raises
    ------
    Unsupported
        If the task cannot train, or its model came trained.
    """
    found = training(context, setting)
    if found.fresh is None:
        raise Unsupported(
            f"{setting} needs a network that can be trained from scratch; this model came trained, and there is no "
            "recipe that makes it anew. Methods that fine-tune work from the weights that it has".lstrip()
        )
    recipe = found.recipe if epochs is None else replace(found.recipe, epochs=epochs)
    return found.fresh(), recipe


def train_split(context: Context, setting: str = "") -> Split:
    """The training data.

    Raises
    ------
    Unsupported
        If there are none; the message begins with ``setting``.
    """
    if "train" not in context.data:
        raise Unsupported(f"{setting} needs a task with training data".lstrip())
    return context.data["train"]


def imitation(context: Context) -> Callable[[Tensors, Batch], Tensor]:
    """A loss that asks for the outputs of the task's original model, as ``loss(outputs, batch)``.

    Scores of classes (an integer target has the output's shape but for one axis): the KL divergence from the original's
    classes, in nats, mean over what is classified. Other outputs: the mean squared difference.
    """
    teacher = context.original().eval().requires_grad_(False)

    def loss(outputs: Tensors, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = call(teacher, batch.inputs, context.signature)
        found = [(value, wanted[name]) for name, value in outputs.items() if value.is_floating_point()]
        return torch.stack([_distance(value, other, _classes(value, batch)) for value, other in found]).sum()

    return loss


def _classes(output: Tensor, batch: Batch) -> int | None:
    """The axis of an output that runs over classes, or None."""
    targets = [value.shape for value in batch.targets.values() if not value.is_floating_point()]
    for axis in (1, output.ndim - 1):
        if output.ndim > axis and output.shape[:axis] + output.shape[axis + 1 :] in targets:
            return axis
    return None


def _distance(output: Tensor, wanted: Tensor, classes: int | None) -> Tensor:
    if classes is None:
        return F.mse_loss(output, wanted)
    mine, theirs = (F.log_softmax(scores, classes) for scores in (output, wanted))
    return F.kl_div(mine, theirs, reduction="none", log_target=True).sum(classes).mean()
