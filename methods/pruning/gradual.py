"""Gradual pruning: the sparsity rises along a cubic curve while the network trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from methods.layers import masks, promises
from methods.layers.masks import MaskedTraining, Masks, Scope
from methods.layers.prunable import prunable_weights, require_weights, say_unreached
from methods.layers.training import from_scratch, training

if TYPE_CHECKING:
    from torch import nn

    from harness.contracts import Context, Recipe, Step


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Gradual:
    """Zero the smallest weights step by step during training, fast at first and then ever more slowly.

    After t optimizer steps the share of zeros is ``s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3`` at
    ``t = t0, t0 + dt, ..., t0 + n dt``, and ``s_f`` from then on. A pruned weight stays pruned. At the end exactly
    ``round(sparsity * n)`` of ``n`` weights are zero.

    Source: Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression",
    2017 (arXiv:1710.01878), §3, equation 1. As there, pruned weights are not updated.

    ::

        @misc{zhu2017prune,
          title         = {To prune, or not to prune: exploring the efficacy of pruning for model compression},
          author        = {Zhu, Michael and Gupta, Suyog},
          year          = {2017},
          eprint        = {1710.01878},
          archivePrefix = {arXiv}
        }

    Parameters
    ----------
    sparsity : float
        Share of zeros at the end, s_f in [0, 1).
    initial_sparsity : float
        Share of zeros at t0, s_i; at most ``sparsity``.
    begin, end : float
        t0 and the latest t0 + n dt, as fractions of the training's steps.
    frequency : int
        Steps between two prunings, dt; at most the whole time from begin to end.
    scope : {"global", "layer", "erk"}
        Rank the weights of all layers together, of each layer by itself (as in the paper), or so with
        Erdős-Rényi-Kernel budgets (:func:`methods.layers.masks.removals`).
    epochs : int, optional
        Of the training; by default the recipe's.
    from_scratch : bool
        True: the untrained network is trained with the baseline's recipe, and the model given is not used. False: the
        model given is fine-tuned with ``recipe.finetune``.
    finetune_lr_scale : float
        Learning rate of the fine-tuning, as a share of the baseline's.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    initial_sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.0
    begin: Annotated[float, Field(ge=0, le=1)] = 0.0
    end: Annotated[float, Field(ge=0, le=1)] = 0.75
    frequency: Annotated[int, Field(ge=1)] = 100
    scope: Scope = "layer"
    epochs: Annotated[int, Field(ge=1)] | None = None
    from_scratch: bool = False
    finetune_lr_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1

    @model_validator(mode="after")
    def _ordered(self) -> Gradual:
        if self.initial_sparsity > self.sparsity:
            raise ValueError(f"initial_sparsity {self.initial_sparsity:g} is above sparsity {self.sparsity:g}")
        if self.begin > self.end:
            raise ValueError(f"begin {self.begin:g} is after end {self.end:g}")
        return self

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a trained and pruned network.

        Raises
        ------
        Unsupported
            If there is no such layer, a layer would lose every weight (with scope "global" perhaps on the way), or
            there is nothing to train on.
        """
        require_weights(prunable_weights(model))
        network, recipe = self._start(model, context)
        weights = prunable_weights(network)
        if self.scope != "global":  # there, which layer loses what is decided by the training
            masks.refuse_unaffordable(weights, self.sparsity, self.scope)
        say_unreached(network, weights.values(), context)
        kept = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        reached = -1.0

        def prune(target: float, into: Masks) -> bool:
            nonlocal reached
            if target <= reached:
                return False
            reached = target
            scores = {name: weight.detach().abs().masked_fill(~into[name], -1.0) for name, weight in weights.items()}
            into.update(masks.keep_highest(scores, target, self.scope))
            masks.refuse_emptied(into, f"sparsity {self.sparsity:g} ({self.scope})")
            return True

        def change(step: Step, into: Masks) -> bool:
            target = self.target(step.index + 1, step.steps)
            return target is not None and prune(target, into)

        if self.begin == 0:
            prune(self.initial_sparsity, kept)
        MaskedTraining(masks=kept, change=change, reads_gradients=lambda _: False)(network, context, recipe)
        if prune(self.sparsity, kept):  # a training of no steps
            masks.apply(weights, kept)
        context.progress(1.0, masks.shares(kept))
        return network

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """Exactly the share of zeros that was asked for."""
        yield from promises.same_parameters(original, compressed)
        yield from promises.sparsity(compressed, self.sparsity, self.scope)

    def target(self, step: int, steps: int) -> float | None:
        """Share of zeros after ``step`` of ``steps`` optimizer steps; None before the first pruning."""
        first = round(self.begin * steps)
        window = round(self.end * steps) - first
        interval = max(1, min(self.frequency, window))
        last = window // interval
        if step < first:
            return None
        number = (step - first) // interval
        if number >= last:
            return self.sparsity
        return self.sparsity + (self.initial_sparsity - self.sparsity) * (1 - number / last) ** 3

    def _start(self, model: nn.Module, context: Context) -> tuple[nn.Module, Recipe]:
        if self.from_scratch:
            return from_scratch(context, self.epochs, "from_scratch=True")
        recipe = training(context).recipe
        return copy.deepcopy(model), recipe.finetune(self.epochs or max(1, recipe.epochs), self.finetune_lr_scale)
