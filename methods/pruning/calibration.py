"""What pruning by activations has in common: its settings, the layers that it reaches, and the fine-tuning after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from methods.layers.activations import untouched
from methods.layers.masks import MaskedTraining, Masks
from methods.layers.prunable import no_weights, prunable_weights
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


def reasons(model: nn.Module, context: Context, m: int | None) -> dict[str, str]:
    """Why some prunable layers stay dense, by name: their inputs are not seen, or groups of ``m`` do not fit."""
    return {**(misfits(model, m) if m is not None else {}), **untouched(model, context.input_shape)}


def treatable(model: nn.Module, context: Context, m: int | None) -> list[str]:
    """Prunable layers that do not stay dense."""
    left = reasons(model, context, m)
    return [name for name in prunable_weights(model) if name not in left]


def no_calibration(model: nn.Module, context: Context, method: str, m: int | None) -> str | None:
    """The reason where pruning by activations finds no layer to prune or no data, or None."""
    if reason := no_weights(prunable_weights(model)):
        return reason
    if context.data is None:
        return f"{method} needs calibration data, and this task has no training data"
    if not treatable(model, context, m):
        left = left_dense(reasons(model, context, m)).removeprefix("; left dense: ")
        return f"{method} finds no layer that it can prune: {left}"
    return None


def finetuned(model: nn.Module, kept: Masks, context: Context, epochs: int, lr_scale: float) -> nn.Module:
    """Fine-tune ``model`` in place with its zeros kept, where ``epochs`` is not 0, and return it."""
    if epochs and context.recipe:
        MaskedTraining(masks=kept)(model, context, context.recipe.finetune(epochs, lr_scale))
    return model
