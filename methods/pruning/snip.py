"""SNIP: prune the untrained network by connection sensitivity, then train what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn import functional as F

from harness.errors import Unsupported
from methods.layers import masks
from methods.layers.activations import examples
from methods.layers.masks import Masks, Scope
from methods.layers.prunable import prunable_weights
from methods.pruning.at_initialisation import emptied, finite, no_start, start, train, training_mode

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
    weights = prunable_weights(network)
    with torch.enable_grad():
        loss = F.cross_entropy(network(x), y)
        gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    scores = {
        name: (gradient * weight.detach()).abs()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
    finite(scores, "snip")
    return scores
