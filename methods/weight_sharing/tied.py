"""Layers whose weights share a codebook, and a training that keeps them tied.

A tied weight is ``codebook[index]``: the gradient of a codebook entry is the sum of the gradients of the weights that
use it (Han et al. 2016, §3.3), or their mean (Stock et al. 2020). The optimizer, its momentum and its moments
see the codebooks alone. Afterwards the values are written back into plain layers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.calling import call
from methods.layers.prunable import prunable_weights
from methods.layers.training import training

if TYPE_CHECKING:
    from harness.contracts import Batch, Context, Recipe, Tensors


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer whose weight can be shared.

    Parameters
    ----------
    name : str
        Of the layer, for messages, as :func:`methods.layers.prunable.prunable_weights` has it.
    key : str
        The weight's name in the model, such as "fc1.weight".
    module : nn.Module
        The layer; attention for an input projection.
    weight : nn.Parameter
        Its weight.
    """

    name: str
    key: str
    module: nn.Module
    weight: nn.Parameter


def layers(model: nn.Module) -> list[Layer]:
    """The weights of :func:`methods.layers.prunable.prunable_weights` with their layers, each weight once."""
    keys = {id(parameter): key for key, parameter in model.named_parameters()}
    owners = {id(weight): module for module in model.modules() for weight in module.parameters(recurse=False)}
    return [
        Layer(name=name, key=keys[id(weight)], module=owners[id(weight)], weight=weight)
        for name, weight in prunable_weights(model).items()
    ]


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A weight as a codebook and indices.

    Parameters
    ----------
    codebook : Tensor, shape (k, d)
        Entries: single weights (d = 1) or blocks of d weights that follow one another in memory order.
    index : Tensor of int64, shape (numel / d,)
        Entry of every block, plus one; 0 stands for a block of zeros, which no training changes.
    shape : torch.Size
        Of the weight.
    """

    codebook: Tensor
    index: Tensor
    shape: torch.Size

    def weight(self) -> Tensor:
        """The weight, shape ``shape``."""
        return gather(self.codebook, self.index, self.shape, mean=False)


class _Gather(torch.autograd.Function):
    """``codebook[index - 1]`` (zeros for 0), with the gradients of each entry's blocks summed or averaged."""

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, index: Tensor, shape: torch.Size, mean: bool) -> Tensor:
        """The weight; see :func:`gather`."""
        ctx.save_for_backward(index)
        ctx.mean, ctx.entries = mean, codebook.shape
        return torch.cat((codebook.new_zeros(1, codebook.shape[1]), codebook)).index_select(0, index).view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """The codebook's gradient."""
        (index,) = ctx.saved_tensors
        entries, width = ctx.entries
        blocks = gradient.reshape(-1, width)
        columns = [torch.bincount(index, blocks[:, i].double(), entries + 1) for i in range(width)]
        summed = torch.stack(columns, 1)[1:]
        if ctx.mean:
            summed = summed / torch.bincount(index, minlength=entries + 1)[1:, None].clamp(min=1)
        return summed.to(gradient.dtype), None, None, None


def gather(codebook: Tensor, index: Tensor, shape: torch.Size, *, mean: bool) -> Tensor:
    """A weight from its codebook, differentiable in the codebook.

    Sums are in float64 and in memory order, so that equal inputs give equal bytes.

    Parameters
    ----------
    codebook : Tensor, shape (k, d)
        Entries.
    index : Tensor of int64, shape (numel / d,)
        Entry plus one, or 0 for zeros.
    shape : torch.Size
        Of the weight.
    mean : bool
        Whether an entry's gradient is the mean over its blocks, instead of the sum.

    Returns
    -------
    Tensor
        Of ``shape``.
    """
    weight: Tensor = _Gather.apply(codebook, index, shape, mean)
    return weight


class _Tied(nn.Module):
    """A network whose shared weights are made from their codebooks in every forward pass; called as the network is."""

    def __init__(self, network: nn.Module, shared: Mapping[str, Shared], mean: bool) -> None:
        super().__init__()
        self.network = network
        self.codebooks = nn.ParameterList(nn.Parameter(part.codebook.flatten().clone()) for part in shared.values())

        @functools.wraps(network.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            weights = {
                name: gather(codebook.view(part.codebook.shape), part.index, part.shape, mean=mean)
                for (name, part), codebook in zip(shared.items(), self.codebooks, strict=True)
            }
            return torch.func.functional_call(network, weights, args, kwargs)

        self.forward = forward


def write(model: nn.Module, shared: Mapping[str, Shared]) -> nn.Module:
    """Write the weights that ``shared`` stands for into ``model``, in place.

    Parameters
    ----------
    model : nn.Module
        Plain layers.
    shared : mapping
        By the parameter's name, such as "fc1.weight".
    """
    with torch.no_grad():
        for name, part in shared.items():
            model.get_parameter(name).copy_(part.weight())
    return model


def train(
    model: nn.Module,
    shared: Mapping[str, Shared],
    context: Context,
    recipe: Recipe,
    *,
    mean: bool,
    others: bool,
    loss: Callable[[Tensors, Batch], Tensor] | None = None,
) -> tuple[nn.Module, dict[str, Shared]]:
    """Train codebooks, with every weight's entry fixed.

    Codebooks are vectors, which the trainer spares weight decay.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    shared : mapping
        By the parameter's name.
    context : Context
        Gives the trainer and the loss.
    recipe : Recipe
        How.
    mean : bool
        Average the gradients of an entry's blocks, instead of summing them.
    others : bool
        Whether the network's other parameters (biases, normalisation) are trained as well. Running statistics of
        batch normalisation follow the data in any case.
    loss : callable, optional
        ``loss(outputs, batch)`` instead of the task's.

    Returns
    -------
    model, shared
        A new model with the weights written into it, and the codebooks after the training.

    Raises
    ------
    Unsupported
        If there is nothing to train on.
    """
    fit = training(context, "training codebooks").fit
    network = copy.deepcopy(model)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(others and parameter.requires_grad and name not in shared)
    tied = _Tied(network, shared, mean)

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        assert loss is not None  # noqa: S101  (for the type checker: it is only used where there is one)
        return loss(call(model, batch.inputs, context.signature), batch)

    fit(tied, recipe, objective=objective if loss else None)
    after = {
        name: Shared(codebook=codebook.detach().view(part.codebook.shape).clone(), index=part.index, shape=part.shape)
        for (name, part), codebook in zip(shared.items(), tied.codebooks, strict=True)
    }
    for (_, parameter), (_, given) in zip(network.named_parameters(), model.named_parameters(), strict=True):
        parameter.requires_grad_(given.requires_grad)
        parameter.grad = None
    network.train(model.training)
    return write(network, after), after
