"""Han et al.'s pruning: a threshold per layer, and rounds of pruning and retraining."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from harness.errors import Unsupported
from methods.layers import masks, promises
from methods.layers.masks import Masks
from methods.layers.prunable import prunable_weights, require_weights, say_unreached
from methods.layers.training import finetuning

if TYPE_CHECKING:
    from harness.contracts import Context

Quality = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Threshold:
    """Zero the weights below a layer's threshold and retrain the others; again for as many rounds as asked.

    The threshold is ``quality`` times the standard deviation of the layer's weights that are left: it rises from round
    to round. With ``sparsity``, the thresholds are instead those that zero these shares of the layers' weights
    (``round(share * n)`` of ``n``), approached geometrically: ``(1 - share) ** (r / rounds)`` are left after round r.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015
    (arXiv:1506.02626), §3: the threshold is a quality parameter times the standard deviation of a layer's weights; the
    network is retrained from the weights it has, and pruned and retrained iteratively. §4: the learning rate of the
    retraining is a tenth of the original one, and the shares kept are 8 %, 9 % and 26 % of LeNet-300-100's layers,
    and 66 %, 12 %, 8 % and 19 % of LeNet-5's. That pruned weights do not count towards the standard deviation is this
    implementation's choice.

    ::

        @inproceedings{han2015learning,
          title     = {Learning both Weights and Connections for Efficient Neural Networks},
          author    = {Han, Song and Pool, Jeff and Tran, John and Dally, William J.},
          booktitle = {Advances in Neural Information Processing Systems},
          year      = {2015}
        }

    Parameters
    ----------
    quality : float
        Threshold in standard deviations.
    quality_conv, quality_linear : float, optional
        Instead of ``quality`` for convolutions, and for linear layers (attention's projections among them).
    sparsity : tuple of float, optional
        Shares of zeros, in [0, 1), one for each weight of :mod:`methods.layers.prunable` in the model's order; instead
        of the qualities.
    rounds : int
        Of pruning, each followed by ``finetune_epochs``.
    finetune_epochs : int
        Epochs of retraining in each round, with ``recipe.finetune``; the zeros stay zero.
    finetune_lr_scale : float
        Learning rate of the retraining, as a share of the baseline's.
    """

    quality: Quality = 1.0
    quality_conv: Quality | None = None
    quality_linear: Quality | None = None
    sparsity: tuple[Annotated[float, Field(ge=0, lt=1)], ...] | None = None
    rounds: Annotated[int, Field(ge=1)] = 1
    finetune_epochs: Annotated[int, Field(ge=0)] = 0
    finetune_lr_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a pruned copy of ``model``.

        Raises
        ------
        Unsupported
            If there is no such layer, ``sparsity`` has another number of layers, a round would zero a whole layer, or
            there is nothing to retrain on.
        """
        finetuning(context, self.finetune_epochs)
        pruned = copy.deepcopy(model)
        weights = prunable_weights(pruned)
        require_weights(weights)
        if self.sparsity is not None and len(self.sparsity) != len(weights):
            raise Unsupported(
                f"sparsity has {len(self.sparsity)} shares, and the model has {len(weights)} layers that can be pruned "
                f"({', '.join(weights)}): give one share for each, in this order"
            )
        say_unreached(pruned, weights.values(), context)
        kept: Masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        if self.sparsity is not None:
            self._refuse_emptied(self._masks(weights, kept, self.rounds), "")
        for number in range(1, self.rounds + 1):
            kept = self._masks(weights, kept, number)
            self._refuse_emptied(kept, f"round {number} of {self.rounds}: " if number > 1 else "")
            masks.apply(weights, kept)
            context.progress((number - 1) / self.rounds, f"round {number}: {masks.shares(kept)}")
            masks.finetune(pruned, kept, context, self.finetune_epochs, self.finetune_lr_scale)
        return pruned

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """The weights below the threshold are zero, or exactly the shares that were asked for."""
        yield from promises.same_parameters(original, compressed)
        yield from promises.no_layer_is_empty(compressed)
        weights = prunable_weights(original)
        if self.sparsity is not None:
            wanted = {n: round(s * w.numel()) for (n, w), s in zip(weights.items(), self.sparsity, strict=True)}
            yield from promises.layer_zeros(compressed, wanted)
        elif self.rounds == 1:
            values = {name: weight.detach() for name, weight in weights.items()}
            low = {name: int((v.abs() < self._threshold(weights[name], v)).sum()) for name, v in values.items()}
            yield from promises.layer_zeros(compressed, low)

    def _refuse_emptied(self, kept: Masks, when: str) -> None:
        if self.sparsity is not None:
            masks.refuse_emptied(kept, f"{when}sparsity {list(self.sparsity)}", "lower the layer's share")
        masks.refuse_emptied(kept, f"{when}the threshold", "lower the quality")

    def _masks(self, weights: Mapping[str, Tensor], kept: Masks, number: int) -> Masks:
        """After round ``number`` (from 1); ``kept`` are those of the round before."""
        found: Masks = {}
        for index, (name, weight) in enumerate(weights.items()):
            magnitude = weight.detach().abs().masked_fill(~kept[name], -1.0)
            if self.sparsity is None:
                found[name] = kept[name] & (magnitude >= self._threshold(weight, weight.detach()[kept[name]]))
            else:
                goal = self.sparsity[index]
                share = goal if number == self.rounds else 1 - (1 - goal) ** (number / self.rounds)
                found |= masks.keep_highest({name: magnitude}, share, "layer")
        return found

    def _threshold(self, weight: Tensor, left: Tensor) -> float:
        quality = self.quality_linear if weight.ndim == 2 else self.quality_conv
        return (self.quality if quality is None else quality) * left.double().std(correction=0).item()
