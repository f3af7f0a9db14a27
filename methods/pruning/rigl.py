"""RigL: a sparse network that grows connections where the gradient asks for them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from methods.layers import masks, promises
from methods.layers.masks import MaskedTraining, Masks
from methods.layers.prunable import prunable_weights, require_weights, say_unreached
from methods.layers.training import from_scratch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.contracts import Context, Step


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class RigL:
    """Train a random sparse network; now and then drop its smallest weights and grow those of largest gradient.

    After every ``delta_t`` steps t, until the fraction ``stop`` of the training, each layer drops the share
    ``alpha / 2 (1 + cos(pi t / T_end))`` of its weights that are smallest in magnitude, and grows as many of the others
    (those just dropped among them) where the gradient of the step's batch is largest in magnitude. New weights begin at
    zero and without momentum; a weight that is dropped and grown at once keeps its value. The count of weights never
    changes; layers without zeros are not touched. The model given is not used.

    Source: Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020 (arXiv:1911.11134), §3 and
    algorithm 1 (there, an update of the topology takes the place of that step's gradient step; here it follows it).

    ::

        @inproceedings{evci2020rigging,
          title     = {Rigging the Lottery: Making All Tickets Winners},
          author    = {Evci, Utku and Gale, Trevor and Menick, Jacob and Castro, Pablo Samuel and Elsen, Erich},
          booktitle = {International Conference on Machine Learning},
          year      = {2020}
        }

    Parameters
    ----------
    sparsity : float
        Share of zero weights, in [0, 1).
    scope : {"erk", "layer"}
        Erdős-Rényi-Kernel budgets, or the same sparsity in every layer (:func:`methods.layers.masks.removals`).
    alpha : float
        Share of a layer's weights replaced by the first update, before the cosine, in [0, 1).
    delta_t : int
        Steps between two updates.
    stop : float
        Fraction of the training after which the topology stays, in [0, 1].
    epochs : int, optional
        Of the training; by default the recipe's.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.9
    scope: Literal["erk", "layer"] = "erk"
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.3
    delta_t: Annotated[int, Field(ge=1)] = 100
    stop: Annotated[float, Field(ge=0, le=1)] = 0.75
    epochs: Annotated[int, Field(ge=1)] | None = None

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a network trained sparsely.

        Raises
        ------
        Unsupported
            If there is no such layer, nothing to train on or no network to train from scratch, or a layer would have no
            weight.
        """
        require_weights(prunable_weights(model))
        network, recipe = from_scratch(context, self.epochs)
        weights = prunable_weights(network)
        masks.refuse_unaffordable(weights, self.sparsity, self.scope)
        say_unreached(network, weights.values(), context)
        kept = masks.random_masks(weights, self.sparsity, self.scope, context.seed)
        moving = [name for name, mask in kept.items() if not mask.all()]
        context.progress(0.0, masks.shares(kept))

        def change(step: Step, into: Masks) -> bool:
            share = self.share(step.index + 1, step.steps)
            for name in moving:
                gradient = weights[name].grad
                if share and gradient is not None:
                    into[name], grown = _moved(weights[name], into[name], gradient, share)
                    weights[name].masked_fill_(grown, 0.0)
                    masks.forget(step.optimizer, weights[name], grown)
            return share > 0

        def reads_gradients(index: int) -> bool:
            return (index + 1) % self.delta_t == 0

        MaskedTraining(masks=kept, change=change, reads_gradients=reads_gradients)(network, context, recipe)
        return network

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """Exactly the share of zeros that was asked for."""
        yield from promises.same_parameters(original, compressed)
        yield from promises.sparsity(compressed, self.sparsity, self.scope)

    def share(self, step: int, steps: int) -> float:
        """Share of a layer's weights replaced after ``step`` of ``steps`` optimizer steps."""
        end = self.stop * steps
        if step % self.delta_t or step >= end:
            return 0.0
        return self.alpha / 2 * (1 + math.cos(math.pi * step / end))


def _moved(weight: Tensor, mask: Tensor, gradient: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The mask after dropping and growing, and the weights in it that were not in it before."""
    active = int(mask.sum())
    count = int(share * active)
    magnitude = weight.detach().abs().masked_fill(~mask, -1.0).flatten()
    left = torch.zeros_like(mask).view(-1)
    left[magnitude.argsort(descending=True, stable=True)[: active - count]] = True
    wanted = gradient.abs().flatten().masked_fill(left, -1.0)
    after = left.clone()
    after[wanted.argsort(descending=True, stable=True)[:count]] = True
    after = after.view_as(mask)
    return after, after & ~mask
