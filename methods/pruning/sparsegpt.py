"""SparseGPT: layer-wise pruning in one pass, with the remaining weights updated to make up for the removed ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from harness.errors import Unsupported
from methods.layers import masks, promises
from methods.layers.activations import Layer, columns, matrix, unmatrix, visit
from methods.layers.inputs import examples
from methods.layers.masks import Masks
from methods.layers.prunable import prunable_weights
from methods.layers.training import finetuning, train_split
from methods.pruning.calibration import check_amount, left_out, share_of_zeros
from methods.pruning.n_m import broken_patterns, fitting, keep_n_of_m, left_dense

if TYPE_CHECKING:
    from harness.contracts import Context


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SparseGPT:
    """Prune each layer so that its outputs on calibration examples change little, updating the weights that stay.

    Per layer, columns of the weight matrix are gone through from left to right. The error that zeroing a weight makes
    in the layer's output is compensated by the columns to its right, with the inverse of the Hessian ``X X^T`` of the
    inputs (optimal brain surgeon). Which weights go is chosen for one block of columns at a time: those with the least
    ``w^2 / [H^-1]`` at that time, in all rows and groups of the layer together. Columns whose input is always zero go
    first.

    A convolution's matrix is (out, height * width * in), with the unfolded input; a grouped one has a matrix and a
    Hessian per group; attention's packed projection has one for queries, keys and values, which see the same inputs.
    Linear layers, ``Conv1d`` and ``Conv2d``, first and last included, and attention's projections are pruned. Other
    weights stay dense and are named in the progress message, and so is a packed projection whose queries, keys and
    values come from different inputs (cross-attention). Layers are treated in the order in which the network calls
    them, each with the inputs that the layers pruned before it give. Biases stay. Computed in float64; time grows with
    the cube of the matrix's columns, memory with their square.

    Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot", ICML 2023,
    §3 and algorithm 1 (block size of updates and of mask selection are one here, as in their code). The paper asks for
    ``p`` of every block; the rounding here gives exactly ``round(sparsity * n)`` of a layer's n weights.

    ::

        @inproceedings{frantar2023sparsegpt,
          title     = {{SparseGPT}: Massive Language Models Can be Accurately Pruned in One-Shot},
          author    = {Frantar, Elias and Alistarh, Dan},
          booktitle = {International Conference on Machine Learning},
          year      = {2023}
        }

    Parameters
    ----------
    sparsity : float, optional
        Share of zeros in every layer, in [0, 1). 0.5 unless ``n`` and ``m`` are given.
    n, m : int, optional
        Instead of ``sparsity``: keep ``n`` of every ``m`` consecutive weights, laid out as in
        :class:`methods.pruning.n_m.NM`; layers that ``m`` does not fit stay dense.
    examples : int
        Calibration examples from the training data, drawn by the seed, not augmented; all of them where there are
        fewer.
    block : int
        Columns per block (the authors' is 128); a multiple of ``m``. In a layer with no more columns than this the
        whole mask is chosen before any weight is updated, and a smaller block may do better.
    dampening : float
        Of the Hessian: this share of its mean diagonal is added to its diagonal.
    finetune_epochs : int
        Epochs of fine-tuning after pruning, with ``recipe.finetune``; the zeros stay zero. The paper's method has none.
    finetune_lr_scale : float
        Of the recipe's learning rate.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    m: Annotated[int, Field(ge=2)] | None = None
    examples: Annotated[int, Field(gt=0)] = 256
    block: Annotated[int, Field(gt=0)] = 128
    dampening: Annotated[float, Field(gt=0)] = 0.01
    finetune_epochs: Annotated[int, Field(ge=0)] = 0
    finetune_lr_scale: Annotated[float, Field(gt=0)] = 0.1

    @model_validator(mode="after")
    def _amount(self) -> Self:
        check_amount(self.sparsity, self.n, self.m)
        if self.m is not None and self.block % self.m:
            raise ValueError(f"block is {self.block}, but with m={self.m} a multiple of {self.m} is allowed")
        return self

    @property
    def share(self) -> float:
        """The share of zeros in every layer that is pruned."""
        return share_of_zeros(self.sparsity, self.n, self.m)

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a copy of ``model`` with pruned and updated weights.

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
        weights = {name: weight for name, weight in prunable_weights(pruned).items() if name not in left}
        if self.n is None:
            for name, weight in weights.items():
                size = weight.numel()
                if round(self.share * size) == size:
                    raise Unsupported(
                        f"sparsity {self.share:g} would zero all {size} weights of layer {name!r}; lower it"
                    )
        pattern = None if self.n is None or self.m is None else (self.n, self.m)
        kept: Masks = {}

        def treat(name: str, layer: Layer, x: Tensor) -> None:
            if name in left:
                return
            try:
                values, mask = optimal_brain_surgeon(
                    matrix(layer, layer.weight.detach()).double(),
                    hessian(layer, x),
                    sparsity=self.share,
                    pattern=pattern,
                    block=self.block,
                    dampening=self.dampening,
                )
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise Unsupported(
                    f"the Hessian of layer {name!r} cannot be inverted (its inputs or weights span too many orders of "
                    f"magnitude); a larger dampening than {self.dampening:g} may help"
                ) from error
            kept[name] = unmatrix(layer, mask)
            layer.weight.copy_(unmatrix(layer, values))
            context.progress(0.9 * len(kept) / len(weights), name)

        batch = examples(train_split(context), self.examples, seed=context.seed)
        visit(pruned, batch.inputs, context.signature, treat)
        context.progress(0.9, masks.shares(kept) + left_dense(left))
        return masks.finetune(pruned, kept, context, self.finetune_epochs, self.finetune_lr_scale)

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """Every layer has exactly as many zeros as were asked for, or the pattern."""
        yield from promises.same_parameters(original, compressed)
        if self.n is not None and self.m is not None:
            yield from broken_patterns(compressed, fitting(original, self.m), self.n, self.m)
            return
        wanted = {name: round(self.share * size) for name, (_, size) in promises.zeros(original).items()}
        yield from promises.layer_zeros(compressed, wanted)


def hessian(layer: Layer, x: Tensor) -> Tensor:
    """``X X^T`` of a layer's input in matrix form, float64 (groups, k, k); see :func:`columns`."""
    total = torch.zeros((), dtype=torch.float64)
    for part in columns(layer, x):
        # Sums of a part in the input's precision, over parts in float64: the dampening is far above the rounding.
        total = total + (part @ part.mT).double()
    return total


def optimal_brain_surgeon(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    block: int = 128,
    dampening: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Prune weight matrices and update what stays (the paper's algorithm 1).

    Parameters
    ----------
    weight : Tensor, float64, shape (groups, rows, k)
        One matrix per group.
    hessian : Tensor, float64, shape (groups, k, k)
        ``X X^T`` of each group's inputs.
    sparsity : float
        Share of zeros: ``round(sparsity * weight.numel())`` in all.
    pattern : (n, m), optional
        Instead of ``sparsity``: n of every m columns of a row are kept; k and ``block`` are multiples of m.
    block : int
        Columns for which the mask is chosen at once.
    dampening : float
        Share of the Hessian's mean diagonal that is added to its diagonal.

    Returns
    -------
    weight : Tensor, float64
        With exact zeros.
    mask : Tensor, bool
        True where a weight is kept.
    """
    weight = weight.clone()
    groups, rows, k = weight.shape
    mask = torch.ones_like(weight, dtype=torch.bool)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    damped = hessian + torch.diag_embed(dampening * diagonal.mean(-1, keepdim=True).expand_as(diagonal) + dead)
    # Row i of the upper factor, divided by its diagonal, is what column i's removal does to the columns after it once
    # those before it are fixed (the paper's §3).
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    gone = 0
    for first in range(0, k, block):
        last = min(first + block, k)
        part, kept = weight[..., first:last], mask[..., first:last]
        local = factor[:, first:last, first:last]
        scale = local.diagonal(dim1=-2, dim2=-1)[:, None]
        skip = dead[:, None, first:last]
        if pattern is None:
            goal = round(sparsity * groups * rows * last)
            lowest = _scores(part, scale, skip).flatten().argsort(stable=True)[: goal - gone]
            kept.copy_(torch.ones(kept.numel(), dtype=torch.bool).index_fill_(0, lowest, False).view_as(kept))
            gone = goal
        errors = torch.zeros_like(part)
        for i in range(last - first):
            if pattern is not None and i % pattern[1] == 0:
                span = slice(i, i + pattern[1])
                kept[..., span] = keep_n_of_m(_scores(part, scale, skip)[..., span], *pattern, dim=-1)
            error = part[..., i].masked_fill(kept[..., i], 0.0) / scale[..., i]
            part[..., i:] -= error[..., None] * local[:, None, i, i:]
            errors[..., i] = error
        weight[..., last:] -= errors @ factor[:, first:last, last:]
    return weight.masked_fill_(~mask, 0.0), mask


def _scores(weight: Tensor, scale: Tensor, dead: Tensor) -> Tensor:
    """What removing each weight adds to the squared error of the layer's output; 0 where the input is always zero."""
    return (weight / scale).square().masked_fill(dead, 0.0)
