"""SNIP: prune the untrained network by connection sensitivity, then train what is left."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn

from methods.layers import masks, promises
from methods.layers.inputs import examples, require_any_batch
from methods.layers.masks import Scope
from methods.layers.prunable import prunable_weights
from methods.layers.training import train_split
from methods.pruning.at_initialisation import finite, refuse_emptied, start, train, training_mode

if TYPE_CHECKING:
    from torch import Tensor

    from harness.contracts import Batch, Context


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Snip:
    """Keep the connections that the loss is most sensitive to at initialisation, then train from there.

    The sensitivity of a weight is ``|g * w|``, with ``g`` the gradient of the task's loss over one batch of
    training examples, drawn by the seed, not augmented and not balanced by class. Pruning is single-shot: the highest
    scores of all layers together are kept, and what is left is trained with the task's recipe.

    The network is the task's own as its training begins (``Training.fresh``). The paper asks for a variance-scaling
    initialisation (Glorot); the task's initialisation is taken as it is. Because it may not keep the signal's scale
    from layer to layer, BatchNorm uses the batch's statistics, as it will in training (in the authors' code it passes
    its input on); dropout is off. Of the trained model given only the structure is used.

    Source: Lee, Ajanthan and Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019,
    §4. The weights of :mod:`methods.layers.prunable` are pruned; the authors' code prunes biases too.

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
        The paper's is "global"; see :func:`methods.layers.masks.keep_highest`.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.9
    examples: Annotated[int, Field(gt=0)] = 100
    epochs: Annotated[int, Field(ge=0)] | None = None
    scope: Scope = "global"

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return the task's network, pruned at initialisation and trained.

        Raises
        ------
        Unsupported
            If there is no such layer, no network to train from scratch, or a layer would lose every weight.
        NotFinite
            If the loss or its gradient at initialisation is not finite, or training diverges.
        """
        network, recipe = start(model, context, self.epochs)
        require_any_batch(context.signature)
        batch = examples(train_split(context), self.examples, seed=context.seed)
        # A copy: the batch moves running statistics.
        scores = sensitivity(training_mode(copy.deepcopy(network)), batch, context)
        kept = masks.keep_highest(scores, self.sparsity, self.scope)
        refuse_emptied(kept, self.sparsity, self.scope)
        return train(network, kept, context, recipe)

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """Exactly the share of zeros that was asked for, and no layer without a weight."""
        yield from promises.same_parameters(original, compressed)
        yield from promises.sparsity(compressed, self.sparsity, self.scope)
        yield from promises.no_layer_is_empty(compressed)


def sensitivity(network: nn.Module, batch: Batch, context: Context) -> dict[str, Tensor]:
    """``|g * w|`` of every prunable weight, g the gradient of the task's loss.

    Parameters
    ----------
    network : nn.Module
        Used in the mode it is in; its parameters' ``grad`` is left alone.
    batch : Batch
        Training examples.
    context : Context
        Gives the loss.

    Raises
    ------
    NotFinite
        If a gradient is NaN or infinite.
    """
    weights = prunable_weights(network)
    with torch.enable_grad():
        loss = context.objective()(network, batch)
        gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    scores = {
        name: (gradient * weight.detach()).abs()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
    finite(scores, "snip")
    return scores
