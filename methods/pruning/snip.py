"""SNIP: prune the untrained network by connection sensitivity, then train what is left.

What pruning at initialisation has in common (:mod:`methods.pruning.grasp` and :mod:`methods.pruning.synflow` use it
too) is here as well: the network to start from, and the training.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn import functional as F

from harness.errors import NotFinite, Unsupported
from methods.pruning import masks
from methods.pruning.activations import examples
from methods.pruning.masks import MaskedTraining, Masks, Scope

if TYPE_CHECKING:
    from torch import Tensor

    from harness.contracts import Context


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Snip:
    """Keep the connections that the loss is most sensitive to at initialisation, then train from there.

    The sensitivity of a weight is ``|g * w|``, with ``g`` the gradient of the mean cross-entropy over one batch of
    training examples, drawn by the seed, not augmented and not balanced by class. Pruning is single-shot: the highest
    scores of all layers together are kept, and what is left is trained with the task's recipe.

    The network is the task's own as its training begins (``Context.fresh``). The paper asks for a variance-scaling
    initialisation (Glorot); the task's initialisation is taken as it is. Because it may not keep the signal's scale
    from layer to layer, BatchNorm uses the batch's statistics, as it will in training (in the authors' code it passes
    its input on); dropout is off. Of the trained model given only the structure is used.

    Source: Lee, Ajanthan and Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019,
    §4. The weights of :mod:`methods.pruning.masks` are pruned; the authors' code prunes biases too.

    ::

        @inproceedings{lee2019snip,
          title     = {{SNIP}: Single-shot Network Pruning based on Connection Sensitivity},
          author    = {Lee, Namhoon and Ajanthan, Thalaiyasingam and Torr, Philip H. S.},
          booktitle = {International Conference on Learning Representations},
          year      = {2019}
        }

    Parameters
    ----------
    sparsity : float
        Share of zero weights, in [0, 1).
    examples : int
        Training examples in the batch (the paper's for MNIST: 100); all of them where there are fewer.
    epochs : int, optional
        Of the training after pruning, instead of the recipe's; 0 leaves the network untrained.
    scope : {"global", "layer", "erk"}
        The paper's is "global"; see :func:`methods.pruning.masks.keep_highest`.
    """

    uses_scheme: ClassVar[bool] = False

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.9
    examples: Annotated[int, Field(gt=0)] = 100
    epochs: Annotated[int, Field(ge=0)] | None = None
    scope: Scope = "global"

    def unsupported(self, model: nn.Module, context: Context) -> str | None:
        """A reason: no such layer, no data or initialisation, or a layer that would lose every weight."""
        if reason := no_start(model, context, "snip"):
            return reason
        return emptied(self._masks(start(context), context), "snip", self.sparsity, self.scope)

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return the task's network, pruned at initialisation and trained.

        Raises
        ------
        Unsupported
            See :meth:`unsupported`.
        NotFinite
            If the loss or its gradient at initialisation is not finite, or training diverges.
        """
        if reason := no_start(model, context, "snip"):
            raise Unsupported(reason)
        kept = self._masks(start(context), context)
        if reason := emptied(kept, "snip", self.sparsity, self.scope):
            raise Unsupported(reason)
        # A second copy: the batch has moved the first one's running statistics.
        return train(start(context), kept, context, self.epochs)

    def _masks(self, network: nn.Module, context: Context) -> Masks:
        if context.data is None:
            raise Unsupported("snip needs a task with training data")
        x, y = examples(context.data, self.examples, seed=context.seed)
        return masks.keep_highest(sensitivity(training_mode(network), x, y), self.sparsity, self.scope)


def sensitivity(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """``|g * w|`` of every prunable weight, g the gradient of the mean cross-entropy.

    Parameters
    ----------
    network : nn.Module
        Used in the mode it is in; its parameters' ``grad`` is left alone.
    x, y : Tensor
        Inputs (n, ...) and labels int64 (n,).

    Raises
    ------
    NotFinite
        If a gradient is NaN or infinite.
    """
    weights = masks.prunable_weights(network)
    with torch.enable_grad():
        loss = F.cross_entropy(network(x), y)
        gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    scores = {
        name: (gradient * weight.detach()).abs()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
    finite(scores, "snip")
    return scores


def no_start(model: nn.Module, context: Context, method: str) -> str | None:
    """The reason why pruning at initialisation cannot begin, or None.

    Nothing to prune, no training from initialisation, or a model that an earlier step of the chain has changed in
    structure: the network made afresh would undo that step.
    """
    if reason := masks.no_weights(masks.prunable_weights(model)):
        return reason
    if reason := masks.untrainable(context, f"{method}, which trains from initialisation,", fresh=True):
        return reason
    if context.data is None:
        return f"{method} needs a task with training data"
    mine = {name: tuple(weight.shape) for name, weight in masks.prunable_weights(model).items()}
    theirs = {name: tuple(weight.shape) for name, weight in masks.prunable_weights(start(context)).items()}
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
        if isinstance(module, nn.modules.dropout._DropoutNd):
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
    masks.apply(masks.prunable_weights(network), kept)
    context.progress(0.0, masks.shares(kept))
    if recipe.epochs:
        MaskedTraining(masks=kept)(network, context, recipe)
    return network.eval()
