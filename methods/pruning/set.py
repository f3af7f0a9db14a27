"""Sparse evolutionary training: a sparse network whose connections move while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

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

    from harness.contracts import Context, Step


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SparseEvolutionaryTraining:
    """Train a random sparse network; after every epoch but the last, replace its weakest connections by random ones.

    The untrained network begins with an Erdős-Rényi topology. After an epoch, each layer loses the share ``zeta`` of
    its positive weights that are smallest, and the share ``zeta`` of its negative weights that are closest to zero, and
    gains as many connections at random free positions (those just lost among them), with values drawn from the layer's
    initial weights and without momentum. The count of connections never changes; layers without zeros are not touched.
    ``zeta=0`` is training with a static random topology. The model given is not used.

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
    by network science", Nature Communications 2018 (doi:10.1038/s41467-018-04316-3). In the authors' code
    (github.com/dcmocanu/sparse-evolutionary-artificial-neural-networks, and the tutorial
    github.com/SelimaC/Tutorial-SCADS-Summer-School-2020-Scalable-Deep-Learning) new weights are drawn as the initial
    ones are, and the tutorial leaves the output layer's connections where they are. There each position is drawn by
    itself, so that the count is ``epsilon (n_in + n_out)`` on average; here it is exact.

    ::

        @article{mocanu2018scalable,
          title   = {Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
                     network science},
          author  = {Mocanu, Decebal Constantin and Mocanu, Elena and Stone, Peter and Nguyen, Phuong H. and
                     Gibescu, Madeleine and Liotta, Antonio},
          journal = {Nature Communications},
          volume  = {9},
          year    = {2018}
        }

    Parameters
    ----------
    sparsity : float
        Share of zero weights over all layers, in [0, 1), with densities proportional to (n_in + n_out) / (n_in n_out);
        of convolutions, the kernel's sides are added and multiplied too (:func:`methods.layers.masks.removals`).
    epsilon : float, optional
        Instead of ``sparsity``: a layer has ``epsilon (n_in + n_out)`` connections, at most all.
    zeta : float
        Share of the connections replaced after an epoch, in [0, 1).
    evolve_output : bool
        Whether the output layer's (the last convolution's or linear layer's) connections are replaced too.
    epochs : int, optional
        Of the training; by default the recipe's.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.9
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    zeta: Annotated[float, Field(ge=0, lt=1)] = 0.3
    evolve_output: bool = False
    epochs: Annotated[int, Field(ge=1)] | None = None

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a network trained sparsely.

        Raises
        ------
        Unsupported
            If there is no such layer, nothing to train on or no network to train from scratch, or a layer would have no
            connection.
        """
        require_weights(prunable_weights(model))
        network, recipe = from_scratch(context, self.epochs)
        weights = prunable_weights(network)
        if self.epsilon is None:
            masks.refuse_unaffordable(weights, self.sparsity, "erk")
        else:
            for name, density in self._densities(weights, self.epsilon).items():
                if round((1 - density) * weights[name].numel()) == weights[name].numel():
                    raise Unsupported(
                        f"epsilon {self.epsilon:g} would leave layer {name!r} without a connection; raise it"
                    )
        say_unreached(network, weights.values(), context)
        kept = self._topology(weights, context.seed)
        initial = {name: weight.detach().flatten().clone() for name, weight in weights.items()}
        fixed = set() if self.evolve_output else {list(weights)[-1]}
        moving = [name for name, mask in kept.items() if name not in fixed and not mask.all()]
        draw = masks.generator(context.seed, "evolution")
        context.progress(0.0, masks.shares(kept))

        def change(step: Step, into: Masks) -> bool:
            if not step.epoch_end or self.zeta == 0 or step.index + 1 >= step.steps:
                return False
            for name in moving:
                weight = weights[name]
                left = _without_weakest(weight, into[name], self.zeta)
                grown = _random_free(left, int(into[name].sum() - left.sum()), draw)
                values = initial[name][torch.randint(weight.numel(), (int(grown.sum()),), generator=draw)]
                weight.masked_scatter_(grown, values)
                # Also where a connection comes back that was just lost.
                masks.forget(step.optimizer, weight, grown)
                into[name] = left | grown
            return True

        MaskedTraining(masks=kept, change=change, reads_gradients=lambda _: False)(network, context, recipe)
        return network

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """Exactly as many connections as were asked for."""
        yield from promises.same_parameters(original, compressed)
        if self.epsilon is None:
            yield from promises.sparsity(compressed, self.sparsity, "erk")
            return
        weights = prunable_weights(original)
        densities = self._densities(weights, self.epsilon)
        wanted = {name: round((1 - densities[name]) * weight.numel()) for name, weight in weights.items()}
        yield from promises.layer_zeros(compressed, wanted)

    def _topology(self, weights: Mapping[str, Tensor], seed: int) -> Masks:
        if self.epsilon is None:
            return masks.random_masks(weights, self.sparsity, "erk", seed)
        scores, kept = masks.random_scores(weights, seed), Masks()
        for name, density in self._densities(weights, self.epsilon).items():
            kept |= masks.keep_highest({name: scores[name]}, 1 - density, "layer")
        return kept

    def _densities(self, weights: Mapping[str, Tensor], epsilon: float) -> dict[str, float]:
        return {name: min(1.0, epsilon * sum(weight.shape) / weight.numel()) for name, weight in weights.items()}


def _without_weakest(weight: Tensor, mask: Tensor, zeta: float) -> Tensor:
    """The mask without the share ``zeta`` of the smallest positive, and of the negative weights closest to zero."""
    positions = mask.flatten().nonzero().squeeze(1)
    values = weight.detach().flatten()[positions]
    left = mask.clone()
    for side in ((values >= 0).nonzero().squeeze(1), (values < 0).nonzero().squeeze(1)):
        weakest = values[side].abs().argsort(stable=True)[: round(zeta * len(side))]
        left.view(-1)[positions[side[weakest]]] = False
    return left


def _random_free(mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` random positions that the mask does not have, as a mask."""
    taken, found = mask.flatten(), torch.zeros_like(mask)
    if int(taken.sum()) * 2 > taken.numel():
        free = (~taken).nonzero().squeeze(1)
        found.view(-1)[free[torch.randperm(len(free), generator=generator)[:count]]] = True
        return found
    # Drawing again what was taken is much faster than a permutation of a million free positions.
    while missing := count - int(found.sum()):
        drawn = torch.randint(taken.numel(), (missing,), generator=generator)
        found.view(-1)[drawn[~taken[drawn]]] = True
    return found
