"""Batch-normalisation statistics of a network whose channels have changed."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.calling import call, evaluating

if TYPE_CHECKING:
    from harness.contracts import Context


def recalibrate(model: nn.Module, context: Context, *, batches: int = 20) -> int:
    """Estimate running means and variances anew, as plain averages over training batches, in place.

    Nothing is learned: weights stay, and all other layers run in evaluation mode.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    context : Context
        Its training data, not augmented, in batches of the recipe's size.
    batches : int
        How many; the last short one of a pass is left out where there are others.

    Returns
    -------
    int
        Batches seen; 0 where there are no such layers or no data.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms or "train" not in context.data:
        return 0
    momenta = [norm.momentum for norm in norms]
    size = context.signature.batch or (context.training.recipe.batch_size if context.training else 128)
    seen = 0
    with evaluating(model):
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # torch then averages over all batches equally
        try:
            for batch in itertools.islice(context.data["train"].batches(size, seed=context.seed), batches):
                if seen and len(batch) < size:
                    break
                call(model, batch.inputs, context.signature)
                seen += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return seen
