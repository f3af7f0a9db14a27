"""What pruning by activations has in common: its settings, and the layers that it reaches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from harness.errors import Unsupported
from methods.layers.activations import untouched
from methods.layers.inputs import require_any_batch
from methods.layers.prunable import prunable_weights, require_weights, say_unreached
from methods.layers.training import train_split
from methods.pruning.n_m import check_pattern, left_dense, misfits

if TYPE_CHECKING:
    from harness.contracts import Context


def check_amount(sparsity: float | None, n: int | None, m: int | None) -> None:
    """Check that a sparsity or a pattern is given, not both (neither: sparsity 0.5).

    Raises
    ------
    ValueError
        Naming what is given.
    """
    if (n is None) != (m is None):
        raise ValueError(f"n is {n} and m is {m}, but an n:m pattern needs both, such as n=2, m=4")
    if n is not None and m is not None:
        check_pattern(n, m)
        if sparsity is not None:
            raise ValueError(f"sparsity is {sparsity} and the pattern {n}:{m}, but only one of the two can be given")


def share_of_zeros(sparsity: float | None, n: int | None, m: int | None) -> float:
    """The share of zeros that checked settings ask for."""
    if n is not None and m is not None:
        return 1.0 - n / m
    return 0.5 if sparsity is None else sparsity


def left_out(model: nn.Module, context: Context, m: int | None) -> dict[str, str]:
    """Why some prunable layers stay dense, by name: their inputs are not seen, or groups of ``m`` do not fit.

    Raises
    ------
    Unsupported
        If there is no layer to prune, with the reasons, or no data.
    """
    require_weights(prunable_weights(model))
    train_split(context)
    require_any_batch(context.signature)
    left = {**(misfits(model, m) if m is not None else {}), **untouched(model, context)}
    weights = {name: weight for name, weight in prunable_weights(model).items() if name not in left}
    if not weights:
        raise Unsupported(f"there is no layer that can be pruned: {left_dense(left).removeprefix('; left dense: ')}")
    say_unreached(model, weights.values(), context)
    return left
