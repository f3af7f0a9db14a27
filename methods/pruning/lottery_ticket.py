"""Lottery tickets: train, prune, go back to the initial weights, and train again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from harness.errors import Unsupported
from methods.layers import masks, promises
from methods.layers.masks import MaskedTraining, Masks
from methods.layers.prunable import prunable_weights, require_weights, say_unreached
from methods.layers.training import from_scratch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.contracts import Context, Recipe, Step

State = dict[str, "Tensor"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LotteryTicket:
    """Find a small subnetwork that learns from its initial weights, and train it.

    Each round trains the network to the end, zeroes the smallest of the weights that are left, and sets the others back
    to what they were at the beginning; after the last round the ticket is trained once more. That is ``rounds + 1``
    trainings with the baseline's recipe. The model given is not used.

    Source: Frankle and Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", ICLR 2019
    (arXiv:1803.03635): iterative pruning with resetting; 20 % of the weights a round and 10 % of the output layer's,
    layer by layer, for fully connected networks. Going back to weights of an early epoch instead of the first ones:
    Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020 (arXiv:1912.05671).

    ::

        @inproceedings{frankle2019lottery,
          title     = {The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks},
          author    = {Frankle, Jonathan and Carbin, Michael},
          booktitle = {International Conference on Learning Representations},
          year      = {2019}
        }

    Parameters
    ----------
    ratio : float
        Share of the remaining weights that a round prunes, in (0, 1).
    output_ratio : float, optional
        The same for the output layer (the last convolution or linear layer); by default half of ``ratio``.
    rounds : int
        Of pruning.
    sparsity : float, optional
        Share of zeros at the end, in (0, 1), instead of ``rounds``: as many rounds as it takes, the last one smaller
        than the others, so that exactly ``round(sparsity * n)`` of ``n`` weights are zero.
    scope : {"layer", "global"}
        Rank the weights of each layer by itself, or of all layers but the output layer together.
    rewind_epoch : int
        The epoch of the first training to whose end weights are set back; 0 is the initialisation. Each later training
        then has so many epochs less, with the recipe's schedule over what is left.
    reinitialise : bool
        True trains the ticket that was found from other initial weights (each tensor's are shuffled, which keeps their
        distribution): the control of the paper.
    epochs : int, optional
        Of each training; by default the recipe's.
    """

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    output_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    rounds: Annotated[int, Field(ge=1)] = 5
    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    scope: Literal["layer", "global"] = "layer"
    rewind_epoch: Annotated[int, Field(ge=0)] = 0
    reinitialise: bool = False
    epochs: Annotated[int, Field(ge=1)] | None = None

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a trained lottery ticket.

        Raises
        ------
        Unsupported
            If there is no such layer, nothing to train on or no network to train from scratch, ``rewind_epoch`` does
            not come, or a layer would lose every weight (with scope "global" perhaps on the way).
        """
        require_weights(prunable_weights(model))
        network, recipe = from_scratch(context, self.epochs)
        if self.rewind_epoch >= recipe.epochs:
            raise Unsupported(
                f"rewind_epoch {self.rewind_epoch} is not before the end of {recipe.epochs} epochs; lower it"
            )
        weights = prunable_weights(network)
        self._refuse_unreachable(weights)
        schedule = self._kept(weights)
        if self.scope == "layer":
            for name, count in schedule[-1].items():
                if count == 0:
                    raise Unsupported(
                        f"{self._goal()} would zero all {weights[name].numel()} weights of layer {name!r}; lower it"
                    )
        say_unreached(network, weights.values(), context)
        kept = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        start = _copy(network)
        for number, counts in enumerate(schedule):
            if number == 0:
                start = self._first_training(network, context, recipe, start)
            else:
                self._train(network, context, recipe, kept)
            kept = self._prune(weights, kept, counts)
            masks.refuse_emptied(kept, f"round {number + 1}")
            context.progress((number + 1) / (len(schedule) + 1), f"round {number + 1}: {masks.shares(kept)}")
            network.load_state_dict(start)
        if self.reinitialise:
            _shuffle(network, masks.generator(context.seed, "reinitialise"))
        self._train(network, context, recipe, kept)
        return network

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """As many weights are left as the rounds leave."""
        yield from promises.same_parameters(original, compressed)
        yield from promises.no_layer_is_empty(compressed)
        left = self._kept(prunable_weights(original))[-1]
        counts = promises.zeros(compressed)
        if self.scope == "layer":
            yield from promises.layer_zeros(compressed, {name: size - left[name] for name, (_, size) in counts.items()})
        elif sum(size - lost for lost, size in counts.values()) != sum(left.values()):
            yield "not as many weights are left as the rounds leave"

    def _goal(self) -> str:
        return f"rounds={self.rounds}" if self.sparsity is None else f"sparsity {self.sparsity:g}"

    def _ratios(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        output = list(weights)[-1]
        last = self.ratio / 2 if self.output_ratio is None else self.output_ratio
        return {name: last if name == output else self.ratio for name in weights}

    def _refuse_unreachable(self, weights: Mapping[str, Tensor]) -> None:
        frozen = sum(weights[name].numel() for name, ratio in self._ratios(weights).items() if ratio == 0)
        total = sum(weight.numel() for weight in weights.values())
        if self.sparsity is not None and frozen >= total - round(self.sparsity * total):
            raise Unsupported(
                f"sparsity {self.sparsity:g} cannot be met: output_ratio 0 keeps {frozen} of {total} weights"
            )

    def _kept(self, weights: Mapping[str, Tensor]) -> list[dict[str, int]]:
        """How many weights each layer keeps, after each round."""
        sizes = {name: weight.numel() for name, weight in weights.items()}
        ratios = self._ratios(weights)

        def after(rounds: float) -> dict[str, int]:
            return {name: round(size * (1 - ratios[name]) ** rounds) for name, size in sizes.items()}

        if self.sparsity is None:
            return [after(number) for number in range(1, self.rounds + 1)]
        goal = sum(sizes.values()) - round(self.sparsity * sum(sizes.values()))
        low, high = 0.0, 1.0
        while sum(after(high).values()) > goal:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(after(middle).values()) > goal else (low, middle)
        last = after(high)
        largest = max(last, key=lambda name: last[name])
        last[largest] += goal - sum(last.values())
        return [*(after(number) for number in range(1, math.ceil(high))), last]

    def _first_training(self, network: nn.Module, context: Context, recipe: Recipe, start: State) -> State:
        """Train the dense network; return the state to go back to."""
        found = [start]

        def remember(step: Step, _: Masks) -> bool:
            if step.epoch_end and step.epoch + 1 == self.rewind_epoch:
                found[0] = _copy(network)
            return False

        MaskedTraining(masks={}, change=remember)(network, context, recipe)
        return found[0]

    def _train(self, network: nn.Module, context: Context, recipe: Recipe, kept: Masks) -> None:
        left = replace(recipe, epochs=recipe.epochs - self.rewind_epoch)
        MaskedTraining(masks=kept)(network, context, left)

    def _prune(self, weights: Mapping[str, Tensor], kept: Masks, counts: Mapping[str, int]) -> Masks:
        scores = {name: weight.detach().abs().masked_fill(~kept[name], -1.0) for name, weight in weights.items()}
        output = list(weights)[-1]
        groups = [[name] for name in weights]
        if self.scope == "global" and len(weights) > 1:
            groups = [[name for name in weights if name != output], [output]]
        found: Masks = {}
        for group in groups:
            total = sum(weights[name].numel() for name in group)
            lost = total - sum(counts[name] for name in group)
            found |= masks.keep_highest({name: scores[name] for name in group}, lost / total, "global")
        return {name: found[name] for name in weights}


def _copy(network: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def _shuffle(network: nn.Module, generator: torch.Generator) -> None:
    """Permute the entries of every parameter."""
    with torch.no_grad():
        for parameter in network.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
