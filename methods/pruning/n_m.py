"""N:M sparsity: of every M consecutive weights along the input dimension, N are kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from harness.errors import Unsupported
from methods.layers import masks, promises
from methods.layers.masks import Masks
from methods.layers.prunable import holder, prunable_weights, require_weights, say_unreached
from methods.layers.training import finetuning

if TYPE_CHECKING:
    from harness.contracts import Context

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class NM:
    """Keep the ``n`` largest of every ``m`` consecutive weights, optionally fine-tune with the zeros kept.

    Layout: the groups lie along the input dimension, which sparse matrix kernels reduce over. In a linear layer, weight
    (out, in), a group is ``weight[o, m*i : m*i + m]``, and so it is in attention's projections, packed or separate; in
    a convolution, weight (out, in / groups, height, width), it is ``m`` consecutive input channels at one kernel
    position, ``weight[o, m*i : m*i + m, y, x]``: consecutive entries of a row of the channels-last weight matrix, as
    2:4 kernels read it. In a transposed convolution, weight (in, out / groups, ...), it is
    ``weight[m*i : m*i + m, o, y, x]``.

    A layer whose input dimension (per group of a grouped convolution) is not a multiple of ``m`` is left dense and
    named in the progress message; a first convolution over 1 or 3 channels and every depthwise one are such layers. Of
    equal magnitudes the later one is kept. Channels are not permuted.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378, 2021 (prune a trained network
    2:4 by magnitude, then train again); Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From
    Scratch", ICLR 2021 (general N and M; their training with SR-STE is not done here).

    ::

        @article{mishra2021accelerating,
          title   = {Accelerating Sparse Deep Neural Networks},
          author  = {Mishra, Asit and Latorre, Jorge Albericio and Pool, Jeff and Stosic, Darko and Stosic, Dusan and
                     Venkatesh, Ganesh and Yu, Chong and Micikevicius, Paulius},
          journal = {arXiv preprint arXiv:2104.08378},
          year    = {2021}
        }

        @inproceedings{zhou2021learning,
          title     = {Learning {N:M} Fine-grained Structured Sparse Neural Networks From Scratch},
          author    = {Zhou, Aojun and Ma, Yukun and Zhu, Junnan and Liu, Jianbo and Zhang, Zhijie and Yuan, Kun and
                       Sun, Wenxiu and Li, Hongsheng},
          booktitle = {International Conference on Learning Representations},
          year      = {2021}
        }

    Parameters
    ----------
    n : int
        Weights kept of a group, 1 .. ``m - 1``.
    m : int
        Weights in a group.
    finetune_epochs : int
        Epochs of fine-tuning after pruning, with ``recipe.finetune``; the zeros stay zero.
    finetune_lr_scale : float
        Of the recipe's learning rate.
    """

    n: Annotated[int, Field(ge=1)] = 2
    m: Annotated[int, Field(ge=2)] = 4
    finetune_epochs: Annotated[int, Field(ge=0)] = 0
    finetune_lr_scale: Annotated[float, Field(gt=0)] = 0.1

    @model_validator(mode="after")
    def _pattern(self) -> Self:
        check_pattern(self.n, self.m)
        return self

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a copy of ``model`` in which every layer that can has the N:M pattern.

        Raises
        ------
        Unsupported
            If no layer is one that a group fits into, or there is nothing to fine-tune on.
        """
        finetuning(context, self.finetune_epochs)
        pruned = copy.deepcopy(model)
        weights = prunable_weights(pruned)
        require_weights(weights)
        fit = fitting(pruned, self.m)
        if not fit:
            raise Unsupported(too_small(self.n, self.m, model))
        kept: Masks = {
            name: keep_n_of_m(weights[name].detach().abs(), self.n, self.m, dim=dim) for name, dim in fit.items()
        }
        masks.apply(weights, kept)
        say_unreached(pruned, [weights[name] for name in kept], context)
        context.progress(0.0, masks.shares(kept) + left_dense(misfits(pruned, self.m)))
        return masks.finetune(pruned, kept, context, self.finetune_epochs, self.finetune_lr_scale)

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """Every layer that a group fits into has the pattern."""
        yield from promises.same_parameters(original, compressed)
        yield from broken_patterns(compressed, fitting(original, self.m), self.n, self.m)


def check_pattern(n: int, m: int) -> None:
    """Check a pattern.

    Raises
    ------
    ValueError
        If not ``1 <= n < m`` (pydantic makes it a finding about the user's value).
    """
    if not 1 <= n < m:
        raise ValueError(f"n:m is {n}:{m}, but n weights are kept of every m, so 1 <= n < m is allowed, such as 2:4")


def keep_n_of_m(scores: Tensor, n: int, m: int, *, dim: int = 1) -> Tensor:
    """Mask of the ``n`` highest of every ``m`` consecutive scores along a dimension; of equal ones the later stay.

    Parameters
    ----------
    scores : Tensor
        Of a size along ``dim`` that is a multiple of ``m``.
    n, m : int
        The pattern.
    dim : int
        The input dimension.

    Returns
    -------
    Tensor
        Boolean, shaped as ``scores``; exactly ``n`` of every group are True.
    """
    moved = scores.movedim(dim, -1)
    grouped = moved.reshape(*moved.shape[:-1], -1, m)
    lowest = grouped.argsort(dim=-1, stable=True)[..., : m - n]
    kept = torch.ones_like(grouped, dtype=torch.bool).scatter_(-1, lowest, False)
    return kept.reshape(moved.shape).movedim(-1, dim).contiguous()


def fitting(model: nn.Module, m: int) -> dict[str, int]:
    """Layers that groups of ``m`` fit into, with the weight's input dimension (1; 0 in a transposed convolution)."""
    return {name: dim for name, (dim, size) in _inputs(model).items() if size % m == 0}


def misfits(model: nn.Module, m: int) -> dict[str, str]:
    """Why each other prunable layer cannot have groups of ``m``, by name."""
    return {
        name: f"its input dimension of {size} is not a multiple of {m}"
        for name, (_, size) in _inputs(model).items()
        if size % m
    }


def broken_patterns(model: nn.Module, layers: Mapping[str, int], n: int, m: int) -> Iterator[str]:
    """Layers (with their input dimensions, as :func:`fitting` has them) in which a group has other than n weights."""
    for name, dim in layers.items():
        groups = prunable_weights(model)[name].movedim(dim, -1).reshape(-1, m)
        if bool(((groups != 0).sum(1) > n).any()):
            yield f"layer {name!r} has a group of {m} weights with more than {n} left"


def too_small(n: int, m: int, model: nn.Module) -> str:
    """The reason where no layer can have the pattern, with every layer's size."""
    sizes = ", ".join(f"layer {name!r} has {size}" for name, (_, size) in _inputs(model).items())
    return f"{n}:{m} needs a layer whose input dimension (per group) is a multiple of {m}, but {sizes}"


def left_dense(reasons: Mapping[str, str]) -> str:
    """The end of a progress message that names layers not pruned; empty where there are none."""
    if not reasons:
        return ""
    return "; left dense: " + ", ".join(f"{name} ({reason})" for name, reason in reasons.items())


def _inputs(model: nn.Module) -> dict[str, tuple[int, int]]:
    """By prunable layer: the weight's input dimension, and its size within one group of a grouped convolution."""
    found: dict[str, tuple[int, int]] = {}
    for name, weight in prunable_weights(model).items():
        module = holder(model, name)
        if isinstance(module, _TRANSPOSED):
            found[name] = (0, weight.shape[0] // module.groups)
        else:
            found[name] = (1, weight.shape[1])
    return found
