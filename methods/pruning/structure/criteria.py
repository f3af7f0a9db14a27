"""How important a unit is: the criteria of structured pruning."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.errors import Unsupported
from methods.layers.attention import explicit
from methods.layers.training import train_split

if TYPE_CHECKING:
    from harness.contracts import Context
    from methods.pruning.structure.units import Layer, Structure, Unit

Criterion = Literal["l1", "l2", "geometric-median", "bn-gamma", "taylor", "random"]
Scores = list[npt.NDArray[np.float64] | None]
"""One array a layer, one number a unit (higher stays longer); None where the criterion says nothing about a layer."""


def score(
    model: nn.Module, structure: Structure, criterion: Criterion, context: Context, *, batches: int = 8
) -> Scores:
    """Score every unit.

    * ``"l1"``, ``"l2"``: of each slice of a convolution's or linear layer's weight that belongs to the unit (the rows
      that make it and the columns that read it), the mean absolute value, or the root of the mean square. Each weight's
      numbers are divided by their mean over the layer's units, so that every weight counts the same; the unit's
      importance is the mean over its slices. A layer's numbers thus have mean one, which makes layers comparable.
    * ``"geometric-median"``: the sum of a unit's distances to all units of the layer, by the rows that make it (He et
      al. 2019, CVPR, eq. 8); normalised and averaged likewise. Those near the centre, which others can replace, go
      first.
    * ``"bn-gamma"``: the mean absolute scale of the batch normalisations that the unit passes (Liu et al. 2017, §3),
      not normalised: the scales themselves are compared. Layers without one keep their units.
    * ``"taylor"``: the absolute value of gradient times parameter, summed over all parameters that belong to the unit
      and averaged over training batches: the first-order Taylor expansion of the loss that Molchanov et al. 2019
      (CVPR, §3) square. Not normalised: it is in units of the loss everywhere.
    * ``"random"``: uniform in [0, 1).

    Parameters
    ----------
    model : nn.Module
        The one that ``structure`` was found in; not changed.
    structure : Structure
        Its units.
    criterion : str
        One of the above.
    context : Context
        Gives the seed, and for ``"taylor"`` the training data.
    batches : int
        Training batches of ``"taylor"``.

    Raises
    ------
    Unsupported
        If the criterion needs training data and there are none, or no layer has what it looks at.
    """
    if criterion == "random":
        generator = torch.Generator().manual_seed(context.seed)
        return [torch.rand(len(layer.units), generator=generator).double().numpy() for layer in structure.layers]
    if criterion == "taylor":
        terms = _taylor(model, context, batches)
        return [np.array([_sum(unit, terms) for unit in layer.units]) for layer in structure.layers]
    tensors = {name: value.detach().cpu() for name, value in structure.flow.tensors.items()}
    if criterion == "bn-gamma":
        scores = gammas(model, structure, tensors)
        if all(part is None for part in scores):
            raise Unsupported('criterion "bn-gamma": no channel that could be removed passes a batch normalisation')
        return scores
    return [_magnitudes(layer, structure, tensors, criterion) for layer in structure.layers]


def gammas(model: nn.Module, structure: Structure, tensors: dict[str, Tensor]) -> Scores:
    """Mean absolute batch-normalisation scale of each unit, by layer; None for a layer without."""
    scales = {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    }
    scores: Scores = []
    for layer in structure.layers:
        values = [
            [
                tensors[part.tensor][list(part.indices)].double().abs().mean().item()
                for part in unit.slices
                if part.tensor in scales
            ]
            for unit in layer.units
        ]
        scores.append(np.array([np.mean(part) for part in values]) if all(values) else None)
    return scores


def _magnitudes(
    layer: Layer, structure: Structure, tensors: dict[str, Tensor], criterion: Literal["l1", "l2", "geometric-median"]
) -> npt.NDArray[np.float64]:
    total = np.zeros(len(layer.units))
    count = np.zeros(len(layer.units))
    by_axis: dict[tuple[str, int], list[tuple[int, tuple[int, ...]]]] = {}
    for position, unit in enumerate(layer.units):
        for part in unit.slices:
            weight = (part.tensor, part.axis) in structure.flow.axes and tensors[part.tensor].ndim > 1
            if weight and (part.makes or criterion != "geometric-median"):
                by_axis.setdefault((part.tensor, part.axis), []).append((position, part.indices))
    for (tensor, axis), members in by_axis.items():
        rows = tensors[tensor].movedim(axis, 0).flatten(1).double()
        if criterion == "geometric-median":
            values = _distances([rows[list(indices)].flatten() for _, indices in members])
        else:
            each = rows.abs().mean(1) if criterion == "l1" else rows.square().mean(1)
            values = _means(each, [indices for _, indices in members])
            values = values if criterion == "l1" else np.sqrt(values)
        mean = values.mean()
        positions = [position for position, _ in members]
        total[positions] += values / mean if mean > 0 else 1.0
        count[positions] += 1
    result: npt.NDArray[np.float64] = total / np.maximum(count, 1)
    return result


def _means(each: Tensor, places: list[tuple[int, ...]]) -> npt.NDArray[np.float64]:
    """The mean of ``each`` over every tuple of indices."""
    if all(len(indices) == 1 for indices in places):  # nearly always, and thousands of them
        found: npt.NDArray[np.float64] = each[[index for (index,) in places]].numpy()
        return found
    return np.array([each[list(indices)].mean().item() for indices in places])


def _distances(vectors: list[Tensor]) -> npt.NDArray[np.float64]:
    stacked = torch.stack(vectors)
    # The fast way, by scalar products, loses the digits of small distances.
    distances = torch.cdist(stacked, stacked, compute_mode="donot_use_mm_for_euclid_dist")
    found: npt.NDArray[np.float64] = distances.sum(1).numpy()
    return found


def _sum(unit: Unit, terms: dict[str, Tensor]) -> float:
    return sum(
        terms[part.tensor].index_select(part.axis, torch.tensor(part.indices)).sum().item()
        for part in unit.slices
        if part.tensor in terms
    )


def _taylor(model: nn.Module, context: Context, batches: int) -> dict[str, Tensor]:
    """Mean over batches of |gradient * parameter|, float64, by parameter name (attention exchanged)."""
    split = train_split(context, 'criterion "taylor"')
    subject = copy.deepcopy(model)
    explicit(subject)
    subject.eval()
    for parameter in subject.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    recipe = context.training.recipe if context.training else None
    loss = context.objective(recipe.label_smoothing if recipe else 0.0)
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in subject.named_parameters()}
    seen = 0
    for batch in itertools.islice(split.batches(recipe.batch_size if recipe else 128, seed=context.seed), batches):
        subject.zero_grad(set_to_none=True)
        loss(subject, batch).backward()  # type: ignore[no-untyped-call]
        for name, value in subject.named_parameters():
            if value.grad is not None:
                total[name] += (value.grad * value.detach()).double().abs()
        seen += 1
    return {name: value / max(seen, 1) for name, value in total.items()}
