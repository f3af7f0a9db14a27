"""Random pruning: the control that every criterion has to beat."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from methods.layers import masks, promises
from methods.layers.masks import Scope
from methods.layers.prunable import prunable_weights, require_weights, say_unreached
from methods.layers.training import finetuning

if TYPE_CHECKING:
    from torch import nn

    from harness.contracts import Context


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Random:
    """Zero weights drawn at random, optionally fine-tune with the zeros kept.

    The weights of :mod:`methods.layers.prunable` are pruned; exactly ``round(sparsity * n)`` of ``n`` are zero.

    Source: the random-pruning baseline of Blalock et al., "What is the State of Neural Network Pruning?", MLSys 2020
    (arXiv:2003.03033).

    ::

        @inproceedings{blalock2020state,
          title     = {What is the State of Neural Network Pruning?},
          author    = {Blalock, Davis and Gonzalez Ortiz, Jose Javier and Frankle, Jonathan and Guttag, John},
          booktitle = {Proceedings of Machine Learning and Systems},
          year      = {2020}
        }

    Parameters
    ----------
    sparsity : float
        Share of zero weights, in [0, 1).
    scope : {"global", "layer", "erk"}
        Draw from the weights of all layers together, the same share of each layer, or Erdős-Rényi-Kernel budgets
        (:func:`methods.layers.masks.removals`).
    finetune_epochs : int
        Epochs of fine-tuning after pruning, with ``recipe.finetune``; the zeros stay zero.
    finetune_lr_scale : float
        Learning rate of the fine-tuning, as a share of the baseline's.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    scope: Scope = "global"
    finetune_epochs: Annotated[int, Field(ge=0)] = 0
    finetune_lr_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a copy of ``model`` with random weights zero.

        Raises
        ------
        Unsupported
            If there is no such layer, a layer would lose every weight, or there is nothing to fine-tune on.
        """
        finetuning(context, self.finetune_epochs)
        pruned = copy.deepcopy(model)
        weights = prunable_weights(pruned)
        require_weights(weights)
        kept = masks.random_masks(weights, self.sparsity, self.scope, context.seed)
        masks.refuse_emptied(kept, f"sparsity {self.sparsity:g} ({self.scope})")
        masks.apply(weights, kept)
        say_unreached(pruned, weights.values(), context)
        context.progress(0.0, masks.shares(kept))
        return masks.finetune(pruned, kept, context, self.finetune_epochs, self.finetune_lr_scale)

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """Exactly the share of zeros that was asked for."""
        yield from promises.same_parameters(original, compressed)
        yield from promises.sparsity(compressed, self.sparsity, self.scope)
