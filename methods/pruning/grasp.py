"""GraSP: prune the untrained network so that gradient flow is preserved, then train what is left."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.calling import call
from harness.errors import Unsupported
from methods.layers import masks, promises
from methods.layers.inputs import balanced, require_any_batch
from methods.layers.masks import Scope
from methods.layers.prunable import prunable_weights
from methods.layers.training import train_split
from methods.pruning.at_initialisation import finite, refuse_emptied, start, train, training_mode

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.contracts import Batch, Context


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Grasp:
    """Remove the connections whose loss lowers the gradient's norm least at initialisation, then train from there.

    Removing weight ``w`` changes the squared norm of the gradient, to first order, by a multiple of ``-w * (H g)``,
    with gradient ``g`` and Hessian ``H`` of the task's loss of ``logits / temperature`` over a batch with the same
    number of examples of every class (:func:`methods.layers.inputs.balanced`). The weights for which that is highest
    are removed: without them more gradient flows, or least is lost. BatchNorm uses the batch's statistics, as in the
    authors' code; dropout is off.

    At high sparsity the criterion may take every weight of a layer; that is reported as a reason, not trained.

    The network is the task's own as its training begins (``Training.fresh``), with the task's initialisation. Of the
    trained model given only the structure is used.

    Source: Wang, Zhang and Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020,
    §4; the temperature of 200 is that of the authors' code, which sums ``H g`` over the halves of its batch, where here
    the whole batch is one.

    ::

        @inproceedings{wang2020picking,
          title     = {Picking Winning Tickets Before Training by Preserving Gradient Flow},
          author    = {Wang, Chaoqi and Zhang, Guodong and Grosse, Roger},
          booktitle = {International Conference on Learning Representations},
          year      = {2020}
        }

    Parameters
    ----------
    sparsity : float
        Share of zero weights, in [0, 1).
    examples_per_class : int
        Training examples of every class in the batch, drawn by the seed, not augmented; a class that has fewer gives
        all of its own.
    temperature : float
        Divides the logits; 1 suits outputs that are no logits.
    epochs : int, optional
        Of the training after pruning, instead of the recipe's; 0 leaves the network untrained.
    scope : {"global", "layer", "erk"}
        The paper's is "global"; see :func:`methods.layers.masks.keep_highest`.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.9
    examples_per_class: Annotated[int, Field(gt=0)] = 10
    temperature: Annotated[float, Field(gt=0)] = 200.0
    epochs: Annotated[int, Field(ge=0)] | None = None
    scope: Scope = "global"

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return the task's network, pruned at initialisation and trained.

        Raises
        ------
        Unsupported
            If there is no such layer, no network to train from scratch, an operation without a second derivative, or a
            layer would lose every weight.
        NotFinite
            If the Hessian-gradient product at initialisation is not finite, or training diverges.
        """
        network, recipe = start(model, context, self.epochs)
        require_any_batch(context.signature)
        batch = balanced(train_split(context), self.examples_per_class, seed=context.seed)
        # A copy: the batch moves running statistics.
        scores = gradient_flow(training_mode(copy.deepcopy(network)), batch, self.temperature, context)
        kept = masks.keep_highest(scores, self.sparsity, self.scope)
        refuse_emptied(kept, self.sparsity, self.scope)
        return train(network, kept, context, recipe)

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """Exactly the share of zeros that was asked for, and no layer without a weight."""
        yield from promises.same_parameters(original, compressed)
        yield from promises.sparsity(compressed, self.sparsity, self.scope)
        yield from promises.no_layer_is_empty(compressed)


def gradient_flow(network: nn.Module, batch: Batch, temperature: float, context: Context) -> dict[str, Tensor]:
    """``w * (H g)`` of every prunable weight: what keeping it adds to gradient flow (the paper's score, negated).

    Parameters
    ----------
    network : nn.Module
        Used in the mode it is in.
    batch : Batch
        Training examples.
    temperature : float
        Divides the outputs.
    context : Context
        Gives the loss.

    Raises
    ------
    Unsupported
        If the network holds an operation without a second derivative, such as ``hardsigmoid``.
    NotFinite
        If a product is NaN or infinite.
    """
    weights = prunable_weights(network)
    parameters = list(weights.values())
    # Attention's fused kernels have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        outputs = call(network, batch.inputs, context.signature)
        cooled = {name: out / temperature if out.is_floating_point() else out for name, out in outputs.items()}
        loss = context.loss(cooled, batch.targets)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        # H is symmetric, so H g is the gradient of g(w) . g with the second factor held.
        product = torch.stack([(g * g.detach()).sum() for g in gradients]).sum()
        try:
            hessian_gradient = torch.autograd.grad(product, parameters, materialize_grads=True)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise Unsupported(f"grasp needs second derivatives, and torch says: {error}") from error
    scores = {name: weight.detach() * hg for (name, weight), hg in zip(weights.items(), hessian_gradient, strict=True)}
    finite(scores, "grasp")
    return scores
