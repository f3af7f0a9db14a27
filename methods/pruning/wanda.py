"""Wanda: prune by weight magnitude times input norm, row by row, without training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import nn

from harness.errors import Unsupported
from methods.layers import masks, promises
from methods.layers.activations import Layer, batched, columns, matrix, unmatrix, visit
from methods.layers.inputs import examples
from methods.layers.masks import Masks
from methods.layers.prunable import prunable_weights
from methods.layers.training import finetuning, train_split
from methods.pruning.calibration import check_amount, left_out, share_of_zeros
from methods.pruning.n_m import broken_patterns, fitting, keep_n_of_m, left_dense

if TYPE_CHECKING:
    from torch import Tensor

    from harness.contracts import Context


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Wanda:
    """Zero the weights with the lowest ``|w| * ||x||`` of every output row, optionally fine-tune.

    ``||x||`` is the l2 norm, over calibration examples, of the input that the weight multiplies. In a linear layer that
    is an input feature over all examples and tokens; in a convolution an input channel at one kernel position over all
    examples and output positions (a row of the unfolded input, zero padding included), per group of a grouped
    convolution. Weights are compared within one output (neuron or filter), so every row loses equally many. Layers are
    treated in the order in which the network calls them, each with the inputs that the layers pruned before it give.
    What is kept keeps its value.

    Linear layers, ``Conv1d`` and ``Conv2d`` are pruned, and attention's projections; other weights of
    :mod:`methods.layers.prunable` stay dense and are named in the progress message, and so is a packed projection whose
    queries, keys and values come from different inputs (cross-attention). The authors prune the linear layers inside
    the blocks of language models, ConvNeXt and ViT; here convolutions and the first and the last layer are pruned too.

    Source: Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
    §3, eq. 1.

    ::

        @inproceedings{sun2024simple,
          title     = {A Simple and Effective Pruning Approach for Large Language Models},
          author    = {Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico},
          booktitle = {International Conference on Learning Representations},
          year      = {2024}
        }

    Parameters
    ----------
    sparsity : float, optional
        Share of zeros in every output row, in [0, 1): ``round(sparsity * k)`` of a row's k weights. 0.5 unless ``n``
        and ``m`` are given.
    n, m : int, optional
        Instead of ``sparsity``: keep the ``n`` best of every ``m`` consecutive weights, laid out as in
        :class:`methods.pruning.n_m.NM`; layers that ``m`` does not fit stay dense.
    examples : int
        Calibration examples from the training data, drawn by the seed, not augmented; all of them where there are
        fewer.
    finetune_epochs : int
        Epochs of fine-tuning after pruning, with ``recipe.finetune``; the zeros stay zero. The paper's method has none.
    finetune_lr_scale : float
        Of the recipe's learning rate.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    m: Annotated[int, Field(ge=2)] | None = None
    examples: Annotated[int, Field(gt=0)] = 256
    finetune_epochs: Annotated[int, Field(ge=0)] = 0
    finetune_lr_scale: Annotated[float, Field(gt=0)] = 0.1

    @model_validator(mode="after")
    def _amount(self) -> Self:
        check_amount(self.sparsity, self.n, self.m)
        return self

    @property
    def share(self) -> float:
        """The share of zeros in every layer that is pruned."""
        return share_of_zeros(self.sparsity, self.n, self.m)

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a copy of ``model`` with the lowest scores' weights zero.

        Raises
        ------
        Unsupported
            If there is no layer whose inputs can be seen, no data, or a layer would lose every weight.
        NotFinite
            If an activation is NaN or infinite on the calibration examples.
        """
        finetuning(context, self.finetune_epochs)
        pruned = copy.deepcopy(model)
        left = left_out(pruned, context, self.m)
        if self.n is None:
            for name, weight in prunable_weights(pruned).items():
                row = weight[0].numel()
                if name not in left and _lost(row, self.share) == row:
                    raise Unsupported(
                        f"sparsity {self.share:g} would zero all {row} weights of every row of {name!r}; lower it"
                    )
        kept: Masks = {}

        def treat(name: str, layer: Layer, x: Tensor) -> None:
            if name not in left:
                kept[name] = self._mask(scores(layer, x), layer)
                layer.weight.masked_fill_(~kept[name], 0.0)

        batch = examples(train_split(context), self.examples, seed=context.seed)
        visit(pruned, batch.inputs, context.signature, treat)
        context.progress(0.0, masks.shares(kept) + left_dense(left))
        return masks.finetune(pruned, kept, context, self.finetune_epochs, self.finetune_lr_scale)

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """Every row has as many zeros as were asked for, or the pattern."""
        yield from promises.same_parameters(original, compressed)
        for name, weight in prunable_weights(compressed).items():
            if self.n is not None and self.m is not None:
                if name in (layers := fitting(original, self.m)):
                    yield from broken_patterns(compressed, {name: layers[name]}, self.n, self.m)
                continue
            rows = weight.flatten(1) if weight.ndim > 1 else weight[None]
            if bool(((rows == 0).sum(1) < _lost(rows.shape[1], self.share)).any()):
                yield f"a row of layer {name!r} has fewer zeros than were asked for"

    def _mask(self, values: Tensor, layer: Layer) -> Tensor:
        if self.n is not None and self.m is not None:
            return keep_n_of_m(values, self.n, self.m)
        rows = matrix(layer, values)
        lowest = rows.argsort(dim=-1, stable=True)[..., : _lost(rows.shape[-1], self.share)]
        return unmatrix(layer, torch.ones_like(rows, dtype=torch.bool).scatter_(-1, lowest, False))


def scores(layer: Layer, x: Tensor) -> Tensor:
    """``|w| * ||x||`` shaped as the weight (the paper's eq. 1).

    Parameters
    ----------
    layer : nn.Linear, nn.Conv1d or nn.Conv2d
        With its weight.
    x : Tensor
        The layer's input on the calibration examples.
    """
    # Summed over the examples before it is unfolded, which is the same and a fraction of the work.
    squares = batched(layer, x).square().sum(0, keepdim=True, dtype=torch.float64)
    squares = torch.stack([part.sum(-1) for part in columns(layer, squares)]).sum(0)
    weight = matrix(layer, layer.weight.detach()).double()
    return unmatrix(layer, weight.abs() * squares.sqrt()[:, None])


def _lost(row: int, sparsity: float) -> int:
    return round(sparsity * row)
