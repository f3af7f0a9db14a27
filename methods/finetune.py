"""Further training without compression: the dense control of methods that fine-tune, and a step of chains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from harness.errors import Unsupported
from methods.layers import promises
from methods.layers.masks import MaskedTraining, Masks
from methods.layers.prunable import prunable_weights
from methods.layers.training import training

if TYPE_CHECKING:
    from torch import nn

    from harness.contracts import Context


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Finetune:
    """Train the model on, with ``recipe.finetune``: the baseline's recipe at a fraction of its learning rate, cosine.

    A pruned network that was trained for longer than the dense one may be better for that reason alone; the dense
    network with the same extra training is the fair comparison. In a chain, this step retrains what an earlier step has
    pruned.

    Source: Blalock et al., "What is the State of Neural Network Pruning?", MLSys 2020 (arXiv:2003.03033), on
    comparing under equal conditions.

    ::

        @inproceedings{blalock2020state,
          title     = {What is the State of Neural Network Pruning?},
          author    = {Blalock, Davis and Gonzalez Ortiz, Jose Javier and Frankle, Jonathan and Guttag, John},
          booktitle = {Proceedings of Machine Learning and Systems},
          year      = {2020}
        }

    Parameters
    ----------
    epochs : int
        Epochs of training.
    lr_scale : float
        Learning rate, as a share of the baseline's.
    keep_zeros : bool
        Whether the weights of convolutions and linear layers that are exactly zero stay zero.
    """

    epochs: Annotated[int, Field(ge=1)] = 1
    lr_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    keep_zeros: bool = True

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a trained copy of ``model``.

        Raises
        ------
        Unsupported
            If there is nothing to train on, or no parameter that could be trained.
        """
        recipe = training(context, f"epochs={self.epochs}").recipe.finetune(self.epochs, self.lr_scale)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise Unsupported("the model has no parameter that can be trained")
        tuned = copy.deepcopy(model)
        MaskedTraining(masks=self._masks(tuned))(tuned, context, recipe)
        return tuned

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """Every weight was trained, and zeros stay."""
        yield from promises.moved(original, compressed)
        if self.keep_zeros:
            before = {name: lost for name, (lost, _) in promises.zeros(original).items()}
            yield from promises.layer_zeros(compressed, before)

    def _masks(self, model: nn.Module) -> Masks:
        """Of the layers that have zeros."""
        if not self.keep_zeros:
            return {}
        kept = {name: weight.detach() != 0 for name, weight in prunable_weights(model).items()}
        return {name: mask for name, mask in kept.items() if not mask.all()}
