"""Which weights a method treats.

The weights of all convolutions and linear layers can be treated, the first and the last included, and attention's input
projections, packed as in ``nn.MultiheadAttention`` (rows of queries, keys and values in one weight) or separate;
biases, normalisation parameters and embeddings cannot.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from methods.layers.attention import HeadAttention

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


def no_weights(weights: Mapping[str, Tensor]) -> str | None:
    """The reason where a model has nothing to prune, or None."""
    return None if weights else "the model has no convolution or linear layer whose weights could be pruned"
