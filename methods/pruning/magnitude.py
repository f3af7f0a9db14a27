"""Magnitude pruning: the smallest weights become zero."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from harness.errors import Unsupported
from methods.layers import masks
from methods.layers.masks import MaskedTraining, Masks, Scope
from methods.layers.prunable import no_weights, prunable_weights

if TYPE_CHECKING:
    from torch import nn

    from harness.contracts import Context


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Magnitude:
    """Zero the weights of smallest absolute value, optionally fine-tune with the zeros kept.

    The weights of :mod:`methods.layers.prunable` are pruned. Exactly ``round(sparsity * n)`` of ``n`` weights are zero;
    of equal magnitudes the one that comes first goes first.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015, §3
    (prune by magnitude, retrain what is left at a tenth of the learning rate). Their threshold is a multiple of each
    layer's standard deviation; here the share of zeros is given instead.

    ::

        @inproceedings{han2015learning,
          title     = {Learning both Weights and Connections for Efficient Neural Networks},
          author    = {Han, Song and Pool, Jeff and Tran, John and Dally, William J.},
          booktitle = {Advances in Neural Information Processing Systems},
          year      = {2015}
        }

    Parameters
    ----------
    sparsity : float
        Share of zero weights, in [0, 1).
    scope : {"global", "layer", "erk"}
        Rank the weights of all layers together, of each layer by itself, or so with Erdős-Rényi-Kernel budgets
        (:func:`methods.layers.masks.removals`).
    finetune_epochs : int
        Epochs of fine-tuning after pruning, with ``recipe.finetune``; the zeros stay zero.
    finetune_lr_scale : float
        Learning rate of the fine-tuning, as a share of the baseline's.
    """

    uses_scheme: ClassVar[bool] = False

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    scope: Scope = "global"
    finetune_epochs: Annotated[int, Field(ge=0)] = 0
    finetune_lr_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1

    def unsupported(self, model: nn.Module, context: Context) -> str | None:
        """A reason: no such layer, a layer that would lose every weight, or nothing to fine-tune on."""
        if reason := no_weights(prunable_weights(model)):
            return reason
        remedy = 'lower it or use scope="layer"' if self.scope == "global" else "lower it"
        if reason := masks.emptied(self._masks(model), f"sparsity {self.sparsity:g} ({self.scope})", remedy):
            return reason
        return masks.untrainable(context, f"finetune_epochs={self.finetune_epochs}") if self.finetune_epochs else None

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a copy of ``model`` with the smallest weights zero.

        Raises
        ------
        Unsupported
            See :meth:`unsupported`.
        """
        if reason := self.unsupported(model, context):
            raise Unsupported(reason)
        pruned = copy.deepcopy(model)
        kept = self._masks(pruned)
        masks.apply(prunable_weights(pruned), kept)
        context.progress(0.0, masks.shares(kept))
        if self.finetune_epochs and context.recipe:
            recipe = context.recipe.finetune(self.finetune_epochs, self.finetune_lr_scale)
            MaskedTraining(masks=kept)(pruned, context, recipe)
        return pruned

    def _masks(self, model: nn.Module) -> Masks:
        weights = prunable_weights(model)
        scores = {name: weight.detach().abs() for name, weight in weights.items()}
        return masks.keep_highest(scores, self.sparsity, self.scope)
