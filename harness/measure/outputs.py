"""Accuracy and fidelity of a deployed artifact: what it answers, not how fast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.errors import NotFinite

if TYPE_CHECKING:
    from harness.contracts import Deployed, FloatArray, IntArray


def answer(deployed: Deployed, x: FloatArray, size: int | None = None) -> FloatArray:
    """Outputs of one batch, shape (n, classes).

    Parameters
    ----------
    deployed : Deployed
    x : array, shape (n, ...)
    size : int or None
        The batch size that ``deployed`` was loaded for, where it may exceed n: the batch is filled up by repeating its
        examples, and the answers to those are dropped.

    Raises
    ------
    NotFinite
        If any output is NaN or infinite.
    """
    deployed.bind(x if size is None or len(x) == size else np.resize(x, (size, *x.shape[1:])))
    deployed()
    deployed.synchronize()
    y = deployed.fetch()[: len(x)]
    if not np.isfinite(y).all():
        bad = int((~np.isfinite(y)).any(axis=tuple(range(1, y.ndim))).sum())
        raise NotFinite(f"The deployed model returned NaN or infinity for {bad} of {len(y)} examples.")
    return y


def predict(
    deployed: Deployed, batches: Iterator[tuple[FloatArray, IntArray]], size: int
) -> tuple[list[int], list[int]]:
    """Labels and predicted classes (arg max of the outputs; the first of equals), in the order given."""
    labels: list[int] = []
    predictions: list[int] = []
    for x, y in batches:
        predictions += answer(deployed, x, size).argmax(axis=1).tolist()
        labels += y.tolist()
    return labels, predictions


def fidelity(outputs: FloatArray, reference: FloatArray) -> dict[str, Any]:
    """How far deployed outputs are from the torch model's.

    Parameters
    ----------
    outputs, reference : array, shape (n, classes)
        Deployed and torch logits of the same examples.

    Returns
    -------
    dict
        ``max_abs`` (largest absolute difference of logits), ``top1`` (share of examples with equal arg max),
        ``mean_kl`` (mean over examples of KL(torch || deployed) of the softmax, in nats), ``n``.
    """
    a, b = reference.astype(np.float64), outputs.astype(np.float64)
    p, q = _log_softmax(a), _log_softmax(b)
    return {
        "max_abs": float(np.abs(a - b).max()),
        "top1": float((a.argmax(axis=1) == b.argmax(axis=1)).mean()),
        # Rounding can make a zero divergence slightly negative.
        "mean_kl": max(0.0, float((np.exp(p) * (p - q)).sum(axis=1).mean())),
        "n": len(a),
    }


def _log_softmax(x: Any) -> Any:
    shifted = x - x.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
