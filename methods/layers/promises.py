"""What methods promise about their results, in words where it does not hold; the contract suite asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from methods.layers.masks import Scope
from methods.layers.prunable import prunable_weights


def zeros(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Zeros and size of every weight that can be pruned, by layer."""
    return {name: (int((weight == 0).sum()), weight.numel()) for name, weight in prunable_weights(model).items()}


def sparsity(compressed: nn.Module, share: float, scope: Scope) -> Iterator[str]:
    """Exactly ``round(share * n)`` weights are zero: of all layers together, or with "layer" of each."""
    counts = zeros(compressed)
    if scope == "layer":
        yield from layer_zeros(compressed, {name: round(share * size) for name, (_, size) in counts.items()})
    elif (found := sum(lost for lost, _ in counts.values())) != (
        wanted := round(share * sum(size for _, size in counts.values()))
    ):
        yield f"{found} weights are zero instead of {wanted}"


def layer_zeros(compressed: nn.Module, wanted: Mapping[str, int]) -> Iterator[str]:
    """So many weights of each layer are zero."""
    for name, (lost, _) in zeros(compressed).items():
        if name in wanted and lost != wanted[name]:
            yield f"{lost} weights of layer {name!r} are zero instead of {wanted[name]}"


def no_layer_is_empty(compressed: nn.Module) -> Iterator[str]:
    """Every layer keeps a weight."""
    for name, (lost, size) in zeros(compressed).items():
        if lost == size:
            yield f"layer {name!r} has no weight left"


def same_parameters(original: nn.Module, compressed: nn.Module) -> Iterator[str]:
    """Zeros or not, the parameters have the shapes that they had."""
    before, after = ({name: p.shape for name, p in model.named_parameters()} for model in (original, compressed))
    if before != after:
        yield "the parameters have other names or shapes than before"


def smaller_layers(original: nn.Module, compressed: nn.Module, ratio: float) -> Iterator[str]:
    """There are fewer parameters (where ``ratio`` is not 0), and layers describe themselves as their weights are."""
    before, after = (sum(p.numel() for p in model.parameters()) for model in (original, compressed))
    if ratio and after >= before:
        yield f"{after} parameters are left of {before}"
    for name, module in compressed.named_modules():
        if isinstance(module, nn.Conv2d):
            described = (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.Linear):
            described = (module.out_features, module.in_features)
        else:
            continue
        if tuple(module.weight.shape[:2]) != described:
            yield f"layer {name!r} says {described}, and its weight is {tuple(module.weight.shape)}"


def moved(original: nn.Module, compressed: nn.Module) -> Iterator[str]:
    """Every weight with two axes or more was trained."""
    for name, value in original.named_parameters():
        if value.ndim > 1 and value.requires_grad and torch.equal(value, compressed.get_parameter(name)):
            yield f"{name} was not trained"
