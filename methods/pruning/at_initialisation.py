"""What pruning at initialisation has in common: the network to start from, and the training of what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from harness.errors import NotFinite, Unsupported
from methods.layers import masks
from methods.layers.masks import MaskedTraining, Masks, Scope
from methods.layers.prunable import Attention, prunable_weights, require_weights, say_unreached
from methods.layers.training import from_scratch

if TYPE_CHECKING:
    from torch import Tensor

    from harness.contracts import Context, Recipe


def start(model: nn.Module, context: Context, epochs: int | None) -> tuple[nn.Module, Recipe]:
    """The task's network, untrained, and the recipe (for ``epochs``, where given).

    Raises
    ------
    Unsupported
        If there is nothing to prune, no network to train from scratch, or the model given is one that an earlier step
        of the chain has changed in structure: the network made afresh would undo that step.
    """
    require_weights(prunable_weights(model))
    network, recipe = from_scratch(context, epochs)
    mine = {name: tuple(weight.shape) for name, weight in prunable_weights(model).items()}
    theirs = {name: tuple(weight.shape) for name, weight in prunable_weights(network).items()}
    for name in sorted(mine.keys() ^ theirs.keys()) or sorted(n for n in mine if mine[n] != theirs[n]):
        raise Unsupported(
            f"pruning starts from the task's untrained network, whose layer {name!r} has the weights "
            f"{theirs.get(name, 'of no layer')}, but the model given has {mine.get(name, 'no such layer')}: "
            "put it first in the chain"
        )
    say_unreached(network, prunable_weights(network).values(), context)
    return network, recipe


def training_mode(network: nn.Module) -> nn.Module:
    """``network``, in training mode but for dropout, so that only normalisation differs from evaluation mode."""
    network.train()
    for module in network.modules():
        # Attention has a dropout of its own.
        if isinstance(module, nn.modules.dropout._DropoutNd | Attention):
            module.eval()
    return network


def refuse_emptied(kept: Masks, sparsity: float, scope: Scope) -> None:
    """Check that no layer would lose every weight (layer collapse).

    Raises
    ------
    Unsupported
        Naming the layer.
    """
    remedy = 'lower it or use scope="erk"' if scope == "global" else "lower it"
    masks.refuse_emptied(kept, f"sparsity {sparsity:g} ({scope})", remedy)


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


def train(network: nn.Module, kept: Masks, context: Context, recipe: Recipe) -> nn.Module:
    """Prune ``network`` in place, train it and return it in eval mode."""
    masks.apply(prunable_weights(network), kept)
    context.progress(0.0, masks.shares(kept))
    if recipe.epochs:
        MaskedTraining(masks=kept)(network, context, recipe)
    return network.eval()
