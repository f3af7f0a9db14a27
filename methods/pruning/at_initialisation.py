"""What pruning at initialisation has in common: the network to start from, and the training of what is left."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from harness.errors import NotFinite, Unsupported
from methods.layers import masks
from methods.layers.masks import MaskedTraining, Masks, Scope
from methods.layers.prunable import Attention, no_weights, prunable_weights

if TYPE_CHECKING:
    from torch import Tensor

    from harness.contracts import Context


def no_start(model: nn.Module, context: Context, method: str) -> str | None:
    """The reason why pruning at initialisation cannot begin, or None.

    Nothing to prune, no training from initialisation, or a model that an earlier step of the chain has changed in
    structure: the network made afresh would undo that step.
    """
    if reason := no_weights(prunable_weights(model)):
        return reason
    if reason := masks.untrainable(context, f"{method}, which trains from initialisation,", fresh=True):
        return reason
    if context.data is None:
        return f"{method} needs a task with training data"
    mine = {name: tuple(weight.shape) for name, weight in prunable_weights(model).items()}
    theirs = {name: tuple(weight.shape) for name, weight in prunable_weights(start(context)).items()}
    for name in sorted(mine.keys() ^ theirs.keys()) or sorted(n for n in mine if mine[n] != theirs[n]):
        return (
            f"{method} starts from the task's untrained network, whose layer {name!r} has the weights "
            f"{theirs.get(name, 'of no layer')}, but the model given has {mine.get(name, 'no such layer')}: "
            "put it first in the chain"
        )
    return None


def start(context: Context) -> nn.Module:
    """The task's network, untrained.

    Raises
    ------
    Unsupported
        If the task cannot make it.
    """
    if context.fresh is None:
        raise Unsupported("pruning at initialisation needs a task whose network can be made afresh, untrained")
    return context.fresh()


def training_mode(network: nn.Module) -> nn.Module:
    """``network``, in training mode but for dropout, so that only normalisation differs from evaluation mode."""
    network.train()
    for module in network.modules():
        # Attention has a dropout of its own.
        if isinstance(module, nn.modules.dropout._DropoutNd | Attention):
            module.eval()
    return network


def emptied(kept: Masks, method: str, sparsity: float, scope: Scope) -> str | None:
    """The reason where a layer would lose every weight (layer collapse), or None."""
    remedy = 'lower it or use scope="erk"' if scope == "global" else "lower it"
    return masks.emptied(kept, f"{method}'s sparsity {sparsity:g} ({scope})", remedy)


def finite(scores: dict[str, Tensor], method: str) -> None:
    """Check scores before they are ranked.

    Raises
    ------
    NotFinite
        Naming the first layer whose scores hold NaN or infinity.
    """
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise NotFinite(f"{method}: the scores of layer {name!r} at initialisation hold NaN or infinity.")


def train(network: nn.Module, kept: Masks, context: Context, epochs: int | None) -> nn.Module:
    """Prune ``network`` in place, train it with the recipe (for ``epochs``, where given) and return it in eval mode.

    Raises
    ------
    Unsupported
        If the context cannot train.
    """
    if context.recipe is None:
        raise Unsupported("pruning at initialisation needs a task with a training recipe")
    recipe = context.recipe if epochs is None else dataclasses.replace(context.recipe, epochs=epochs)
    masks.apply(prunable_weights(network), kept)
    context.progress(0.0, masks.shares(kept))
    if recipe.epochs:
        MaskedTraining(masks=kept)(network, context, recipe)
    return network.eval()
