"""Folding removed neurons into similar ones that stay: the scaling matrix, and the reader's columns."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.errors import Unsupported
from methods.pruning.structure.links import Link, find_links

if TYPE_CHECKING:
    from methods.pruning.structure.labels import Bools
    from methods.pruning.structure.units import Structure, Unit


def neurons(model: nn.Module, link: Link) -> Tensor:
    """The neurons that are compared: rows of the producer's weights, with the bias as one more number.

    Before a batch normalisation the bias is left out: it is part of the mean there.

    Returns
    -------
    Tensor
        Shape (n, inputs) or (n, inputs + 1), float64.
    """
    layer = model.get_submodule(link.producer)
    rows = layer.get_parameter("weight").detach().double().flatten(1)
    if link.norm is None and layer.bias is not None:
        rows = torch.cat([rows, layer.get_parameter("bias").detach().double()[:, None]], dim=1)
    return rows


def selection(count: int, kept: Tensor) -> Tensor:
    """The scaling matrix of neurons that are dropped: shape (count, k), float64, one 1 for each that stays."""
    return torch.eye(count, dtype=torch.float64, device=kept.device)[:, kept]


def scaling(model: nn.Module, link: Link, kept: Tensor, *, threshold: float, cosine_weight: float) -> Tensor:
    """What each neuron contributes to each one that stays: row i stands for neuron i as a multiple of a kept one.

    Kim et al., "Neuron Merging: Compensating for Pruned Neurons", NeurIPS 2020 (arXiv 2010.13160): the scaling matrix Z
    of their decomposition, and of a batch normalisation's parameters where there is one (see
    :class:`methods.pruning.neuron_merging.NeuronMerging`).

    Parameters
    ----------
    model : nn.Module
        With its original weights.
    link : Link
        The layer that loses neurons, and the one that reads them; only homogeneous operations between them.
    kept : Tensor
        Indices of the neurons that stay, ascending, shape (k,).
    threshold : float
        Cosine similarity below which a neuron is dropped and not merged.
    cosine_weight : float
        Weight of the cosine against the offset, with batch normalisation.

    Returns
    -------
    Tensor
        Shape (n, k), float64: the identity in the kept rows; at most one entry, positive, in each other one.

    Raises
    ------
    Unsupported
        If the batch normalisation has no running statistics.
    """
    rows = neurons(model, link)
    lengths = rows.norm(dim=1)
    unit = rows / lengths.clamp_min(torch.finfo(rows.dtype).tiny)[:, None]
    cosine = unit @ unit[kept].T
    scale = lengths[:, None] / lengths[kept][None, :]
    if link.norm is None:
        score = 1 - cosine
    else:
        bias = model.get_submodule(link.producer).bias
        shift = bias.detach().double() if isinstance(bias, Tensor) else rows.new_zeros(len(rows))
        norm = cast(_BatchNorm, model.get_submodule(link.norm))
        scale, offset = normalised(norm, shift, kept, scale)
        score = cosine_weight * (1 - cosine) + (1 - cosine_weight) * _unit_range(offset.abs() / scale)
    score[~(scale.isfinite() & (scale > 0) & score.isfinite())] = torch.inf
    best = score.argmin(dim=1)
    removed = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    removed[kept] = False
    every = torch.arange(len(rows), device=rows.device)
    merged = removed & score[every, best].isfinite() & (cosine[every, best] >= threshold)
    result = selection(len(rows), kept)
    result[every[merged], best[merged]] = scale[every[merged], best[merged]]
    return result


def normalised(norm: _BatchNorm, bias: Tensor, kept: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """S and B, shapes (n, k): ``y_i = S y_j + B`` after batch normalisation where ``w_i = ratio_ij w_j`` before it."""
    if norm.running_mean is None or norm.running_var is None:
        raise Unsupported("batch normalisation without running statistics has no fixed scale")
    mean = norm.running_mean.double() - bias
    sigma = (norm.running_var.double() + norm.eps).sqrt()
    gamma = norm.weight.detach().double() if norm.affine else torch.ones_like(mean)
    beta = norm.bias.detach().double() if norm.affine else torch.zeros_like(mean)
    slope = gamma / sigma
    scale = ratio * slope[:, None] / slope[kept][None, :]
    shift = ratio * (mean[kept] - beta[kept] / slope[kept])[None, :] - mean[:, None]
    return scale, slope[:, None] * shift + beta[:, None]


def _unit_range(values: Tensor) -> Tensor:
    """Each row scaled to [0, 1]; entries that are negative or not finite (no candidates) come out as infinity."""
    candidate = values.isfinite() & (values >= 0)
    low = values.where(candidate, torch.inf).min(dim=1, keepdim=True).values
    high = values.where(candidate, -torch.inf).max(dim=1, keepdim=True).values
    return ((values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)).where(candidate, torch.inf)


def folded(weight: Tensor, scaling: Tensor) -> Tensor:
    """The reader's weight over the neurons that stay.

    Parameters
    ----------
    weight : Tensor
        Shape (outputs, n * columns, ...): the columns that read one neuron lie together.
    scaling : Tensor
        Shape (n, k), float64.

    Returns
    -------
    Tensor
        Shape (outputs, k * columns, ...), of the weight's type.
    """
    grouped = weight.detach().double().reshape(len(weight), len(scaling), -1)
    result = torch.einsum("onc,nk->okc", grouped, scaling).to(weight.dtype)
    return result.reshape(len(weight), -1, *weight.shape[2:])


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What became of the removed neurons of one layer: ``merged`` of ``removed`` were folded into others."""

    layer: str
    merged: int
    removed: int

    def __str__(self) -> str:
        return f"{self.layer} {self.merged} of {self.removed}"


def candidates(model: nn.Module, structure: Structure, gone: Bools) -> dict[Link, Tensor]:
    """Layers that lose neurons which others can take over, and the indices of the neurons that stay, ascending.

    Empty where nothing is removed.

    Raises
    ------
    Unsupported
        If the forward pass cannot be traced, or there is no such layer among those that lose channels.
    """
    try:
        links, reasons = find_links(model)
    except Unsupported as error:
        raise Unsupported(f"merge=true: {error}. merge=false does not trace") from error
    losing = [
        name for layer in structure.layers if any(gone[unit.label] for unit in layer.units) for name in layer.makers
    ]
    found: dict[Link, Tensor] = {}
    for link in links:
        if link.not_homogeneous:
            reasons[link.producer] = f"{link.not_homogeneous} follows, through which no scale passes"
        elif link.producer in losing:
            found[link] = torch.from_numpy(structure.kept(f"{link.producer}.weight", 0, gone))
    if losing and not found:
        # Those closest to it before the others.
        first = [link.producer for link in links if link.producer in losing]
        names = [*first, *(name for name in losing if name not in first)]
        named = [f"{name}: {reasons.get(name, 'it is neither nn.Linear nor nn.Conv2d')}" for name in names[:4]]
        more = [f"and {len(names) - 4} more layers"] if len(names) > 4 else []
        raise Unsupported(
            "merge=true: no removed channel can be merged into another one; merge=false drops them all "
            f"({'; '.join(named + more)})"
        )
    return found


def merge(
    model: nn.Module, structure: Structure, units: Iterable[Unit], *, threshold: float, cosine_weight: float
) -> tuple[nn.Module, list[Merged]]:
    """A copy of ``model``, of the same size, whose kept neurons do the part of those about to be removed.

    Only the columns that read kept neurons change, in the layers that read a layer of which neurons go; removing
    ``units`` from the copy completes the merge. Similarity is that of the original weights, also where an earlier
    layer's merging has changed columns.

    Parameters
    ----------
    model : nn.Module
        The one that ``structure`` was found in; not changed.
    structure : Structure
        Of :func:`methods.pruning.structure.find.find`.
    units : iterable of Unit
        What will be removed.
    threshold, cosine_weight : float
        See :func:`scaling`.

    Returns
    -------
    model : nn.Module
        The copy.
    layers : list of Merged
        Those it was applied to, in the order of execution.

    Raises
    ------
    Unsupported
        See :func:`candidates`.
    """
    gone = structure.removed(units)
    result = copy.deepcopy(model)
    layers = []
    for link, kept in candidates(model, structure, gone).items():
        kept = kept.to(model.get_submodule(link.producer).get_parameter("weight").device)
        matrix = scaling(model, link, kept, threshold=threshold, cosine_weight=cosine_weight)
        weight = result.get_submodule(link.consumer).get_parameter("weight")
        columns = (kept[:, None] * link.columns + torch.arange(link.columns, device=kept.device)).flatten()
        with torch.no_grad():
            weight[:, columns] = folded(weight, matrix)
        count = len(matrix) - len(kept)
        layers.append(
            Merged(layer=link.producer, merged=int((matrix != 0).any(dim=1).sum()) - len(kept), removed=count)
        )
    return result, layers
