"""Which weights a method treats, and what is said about those that it does not.

The weights of all convolutions and linear layers can be treated, the first and the last included, and attention's input
projections, packed as in ``nn.MultiheadAttention`` (rows of queries, keys and values in one weight) or separate;
biases, normalisation parameters, embeddings and recurrent layers cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from harness.errors import Unsupported
from methods.layers.attention import HeadAttention

if TYPE_CHECKING:
    from harness.contracts import Context

_PRUNABLE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
Attention = nn.MultiheadAttention | HeadAttention
"""Modules whose input projections are weights of their own, and not layers."""
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Their names: packed, or separate where queries, keys and values differ in width; weights (out, in) all of them."""

REACHED = 0.95
"""Share of a model's weights that a method must treat, or the row says what it leaves."""


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights that can be pruned, each tensor once (tied weights), in the model's order.

    Returns
    -------
    dict
        Weights of convolutions and linear layers by layer name ("model" where the model is a single layer), those of
        attention's input projections by the parameter's name, such as "encoder.self_attention.in_proj_weight".
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        weights = {}
        if isinstance(module, _PRUNABLE):
            weights[name or "model"] = own.get("weight")
        elif isinstance(module, Attention):
            weights |= {f"{name}.{kind}".lstrip("."): own.get(kind) for kind in PROJECTIONS}
        for key, weight in weights.items():
            if weight is not None and id(weight) not in seen:
                seen.add(id(weight))
                found[key] = weight
    return found


def holder(model: nn.Module, name: str) -> nn.Module:
    """The module whose weight :func:`prunable_weights` has by that name."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    return modules.get(name) or modules.get(name.rpartition(".")[0], model)


def require_weights(weights: Mapping[str, Tensor]) -> None:
    """Check that a model has weights that can be pruned.

    Raises
    ------
    Unsupported
        If it has none.
    """
    if not weights:
        raise Unsupported("the model has no convolution or linear layer whose weights could be pruned")


def say_unreached(model: nn.Module, treated: Iterable[Tensor], context: Context) -> None:
    """Warn where a method treats less than 95 % of a model's weights.

    Weights are the parameters with two axes or more, embeddings and recurrent layers' included: what a reader of
    "sparsity 0.9" thinks of.

    Parameters
    ----------
    model : nn.Module
        Before it is compressed.
    treated : iterable of Tensor
        Parameters of ``model``.
    context : Context
        Takes the warning.
    """
    reached = {id(weight) for weight in treated}
    weights = {name: weight for name, weight in model.named_parameters() if weight.ndim >= 2}
    left = {name: weight.numel() for name, weight in weights.items() if id(weight) not in reached}
    share = 1 - sum(left.values()) / max(1, sum(weight.numel() for weight in weights.values()))
    if not left or share >= REACHED:
        return
    largest = sorted(left, key=lambda name: -left[name])[:3]
    kinds = {name: type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in largest}
    named = ", ".join(f"{name} ({kinds[name]}, {left[name]:,} weights)" for name in largest)
    more = f" and {len(left) - len(largest)} more" if len(left) > len(largest) else ""
    context.warn(
        f"reaches {share:.1%} of the model's weights; {named}{more} stay as they are, and sizes and speed-ups are "
        "those of the whole model"
    )
