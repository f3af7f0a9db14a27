"""Han et al.'s thresholds and shares, round by round."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from harness import registry
from harness.errors import SpecError, Unsupported
from harness.tasks import models
from harness.testing.networks import reference
from methods.layers.prunable import prunable_weights
from methods.pruning.threshold import Threshold
from tests.unit.contexts import NOTHING, context, refusal


@pytest.mark.parametrize("quality", [0.3, 1.0, 1.7])
def test_weights_below_quality_times_the_standard_deviation_are_zero(quality: float) -> None:
    model = reference("residual").model
    pruned = prunable_weights(Threshold(quality=quality).compress(model, context(**NOTHING)))
    for name, weight in prunable_weights(model).items():
        before = weight.detach().double().numpy()
        expected = np.where(np.abs(before) < quality * before.std(), 0.0, before)
        assert np.array_equal(pruned[name].detach().double().numpy(), expected)


def test_convolutions_and_linear_layers_have_their_own_quality() -> None:
    model = reference("residual").model
    both = Threshold(quality=9.0, quality_conv=0.5, quality_linear=1.5).compress(model, context())
    conv, linear = (Threshold(quality=value).compress(model, context()) for value in (0.5, 1.5))
    for name, weight in prunable_weights(both).items():
        assert torch.equal(weight, prunable_weights(linear if name == "fc" else conv)[name])


def test_a_later_round_measures_the_weights_that_are_left() -> None:
    model = nn.Linear(100, 100, bias=False)
    weight = model.weight.detach().double().numpy().copy()
    for _ in range(2):
        left = weight[weight != 0]
        weight[np.abs(weight) < 1.0 * left.std()] = 0
    pruned = Threshold(rounds=2).compress(model, context())
    assert np.array_equal(pruned.weight.detach().double().numpy() != 0, weight != 0)


def test_the_papers_shares_of_lenet_300_100_are_met_exactly() -> None:
    model = models.create("lenet-300-100", 0)
    pruned = Threshold(sparsity=(0.92, 0.91, 0.74), rounds=3).compress(model, context(**NOTHING))
    left = [int((weight != 0).sum()) for weight in prunable_weights(pruned).values()]
    assert left == [18816, 2700, 260]
    assert sum(weight.numel() for weight in prunable_weights(model).values()) / sum(left) > 12
    for name, weight in prunable_weights(pruned).items():
        before, gone = prunable_weights(model)[name].detach().abs(), weight == 0
        assert before[gone].max() <= before[~gone].min(), "without retraining, rounds change nothing"


def test_rounds_approach_the_shares_geometrically_and_never_give_back() -> None:
    found: list[dict[str, torch.Tensor]] = []
    given = context(
        fit=lambda model, recipe, **_: found.append(
            {name: weight.detach() != 0 for name, weight in prunable_weights(model).items()}
        )
    )
    model = reference("perceptron").model
    Threshold(sparsity=(0.936, 0.875, 0.5), rounds=3, finetune_epochs=1).compress(model, given)
    sizes = [weight.numel() for weight in prunable_weights(model).values()]
    for number, masks in enumerate(found, start=1):
        expected = [share ** (number / 3) * size for share, size in zip((0.064, 0.125, 0.5), sizes, strict=True)]
        assert [int(mask.sum()) for mask in masks.values()] == pytest.approx(expected, abs=0.51)
    for earlier, later in itertools.pairwise(found):
        assert all((later[name] <= earlier[name]).all() for name in later)


def test_retraining_after_each_round_keeps_the_zeros() -> None:
    given, model = context(), reference("perceptron").model
    tuned = Threshold(sparsity=(0.9, 0.9, 0.7), rounds=2, finetune_epochs=1).compress(model, given)
    sizes = [weight.numel() for weight in prunable_weights(model).values()]
    left = [int((weight != 0).sum()) for weight in prunable_weights(tuned).values()]
    assert left == [size - round(share * size) for share, size in zip((0.9, 0.9, 0.7), sizes, strict=True)]


def test_reasons() -> None:
    model = reference("perceptron").model
    reason = refusal(Threshold(sparsity=(0.9, 0.8)), model, context())
    assert reason is not None
    assert "sparsity has 2 shares, and the model has 3 layers that can be pruned (fc1, fc2, fc3)" in reason
    with pytest.raises(Unsupported, match="would zero all 3072 weights of layer 'fc1'; lower the quality"):
        Threshold(quality=50.0).compress(model, context())
    with pytest.raises(Unsupported, match="layer 'fc3'; lower the layer's share"):
        Threshold(sparsity=(0.9, 0.9, 0.999)).compress(model, context())
    layer = nn.Linear(10, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1] * 8 + [1.0, -1.0]]))
    with pytest.raises(Unsupported, match="round 2 of 2: the threshold would zero all 10 weights of layer 'model'"):
        Threshold(rounds=2, quality=1.5).compress(layer, context())
    assert "finetune_epochs=1 needs" in str(refusal(Threshold(finetune_epochs=1), model, context(**NOTHING)))
    assert "no convolution" in str(refusal(Threshold(), nn.ReLU(), context()))


@pytest.mark.parametrize(
    "values",
    [{"quality": -1}, {"quality_conv": float("nan")}, {"sparsity": [0.5, 1.0]}, {"sparsity": [-0.5]}, {"rounds": 0}],
)
def test_bad_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(values))):
        registry.create("method", "methods.pruning.threshold:Threshold", values)
