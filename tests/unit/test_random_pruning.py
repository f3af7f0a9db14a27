"""Random pruning: exact counts, uniform, reproducible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from harness import registry
from harness.errors import SpecError, Unsupported
from harness.testing.networks import reference
from methods.layers.masks import removals
from methods.layers.prunable import prunable_weights
from methods.pruning.random import Random
from tests.unit.contexts import NOTHING, context, refusal


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.93])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_counts_are_exact_and_kept_weights_as_they_were(scope: Any, sparsity: float) -> None:
    model = reference("residual").model
    weights = prunable_weights(model)
    pruned = prunable_weights(Random(sparsity=sparsity, scope=scope).compress(model, context(**NOTHING)))
    lost = {name: int((weight == 0).sum()) for name, weight in pruned.items()}
    if scope == "global":
        assert sum(lost.values()) == round(sparsity * sum(weight.numel() for weight in weights.values()))
    else:
        assert lost == removals(weights, sparsity, scope)
    for name, weight in pruned.items():
        assert torch.equal(weight[weight != 0], weights[name][weight != 0])


def test_choice_depends_on_the_seed_and_not_on_the_weights() -> None:
    model = reference("perceptron").model

    def zeros(given: nn.Module, seed: int) -> list[torch.Tensor]:
        return [w == 0 for w in prunable_weights(Random().compress(given, context(seed=seed))).values()]

    first = zeros(model, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, zeros(reference("perceptron").fresh(), 0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, zeros(model, 1), strict=True))


def test_global_draws_are_uniform_over_layers() -> None:
    model = nn.Sequential(nn.Linear(300, 100), nn.Linear(100, 300))
    shares = [float((w == 0).double().mean()) for w in prunable_weights(Random().compress(model, context())).values()]
    assert shares == pytest.approx([0.5, 0.5], abs=0.01)


def test_finetuning_keeps_the_zeros() -> None:
    given, model = context(), reference("perceptron").model
    pruned = Random(sparsity=0.9).compress(model, given)
    tuned = Random(sparsity=0.9, finetune_epochs=1).compress(model, given)
    for name, weight in prunable_weights(pruned).items():
        after = prunable_weights(tuned)[name]
        assert torch.equal(after == 0, weight == 0)
        assert not torch.equal(after, weight)


def test_reasons() -> None:
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 1))
    with pytest.raises(Unsupported, match=r"sparsity 0.995 \(layer\) would zero all 50 weights of layer '1'"):
        Random(sparsity=0.995, scope="layer").compress(model, context())
    assert "no convolution or linear layer" in str(refusal(Random(), nn.ReLU(), context()))
    assert "finetune_epochs=2 needs" in str(refusal(Random(finetune_epochs=2), model, context(**NOTHING)))


@pytest.mark.parametrize("values", [{"sparsity": 1.0}, {"scope": "row"}, {"finetune_lr_scale": -1}, {"seed": 1}])
def test_bad_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(values))):
        registry.create("method", "methods.pruning.random:Random", values)
