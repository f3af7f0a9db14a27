"""Fine-tuning: the dense control, and a step that keeps zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness import registry
from harness.errors import SpecError, Unsupported
from harness.testing.networks import reference
from harness.training import Recipe
from methods.finetune import Finetune
from methods.layers.prunable import prunable_weights
from methods.pruning.magnitude import Magnitude
from tests.unit.contexts import NOTHING, context, fit_of, recipe_of, refusal


def test_it_trains_a_copy_as_the_recipe_says_at_a_fraction_of_its_rate() -> None:
    seen: list[Recipe] = []
    given = context(fit=lambda model, recipe, **_: seen.append(recipe))
    Finetune(epochs=3, lr_scale=0.2).compress(reference("perceptron").model, given)
    assert seen == [recipe_of(given).finetune(3, 0.2)]
    assert seen[0].lr == pytest.approx(0.2 * recipe_of(given).lr)


def test_it_is_the_trainer_on_a_copy_bit_for_bit() -> None:
    given, model = context("residual"), reference("residual").fresh()
    tuned = Finetune(epochs=1).compress(model, given)
    expected = reference("residual").fresh()
    fit_of(given)(expected, recipe_of(given).finetune(1))
    for name, value in expected.state_dict().items():
        assert torch.equal(tuned.state_dict()[name], value), name
    untouched = reference("residual").fresh().state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("keep", [True, False])
def test_zeros_stay_only_where_that_is_asked(keep: bool) -> None:
    pruned = Magnitude(sparsity=0.8).compress(reference("residual").model, context("residual"))
    tuned = Finetune(epochs=1, keep_zeros=keep).compress(pruned, context("residual"))
    for name, weight in prunable_weights(pruned).items():
        after = prunable_weights(tuned)[name]
        assert bool(after[weight == 0].eq(0).all()) == keep
        assert after[weight != 0].ne(weight[weight != 0]).any()


def test_pruning_then_finetuning_is_pruning_with_finetuning() -> None:
    given, model = context(), reference("perceptron").model
    chain = Finetune(epochs=2).compress(Magnitude(sparsity=0.9).compress(model, given), given)
    at_once = Magnitude(sparsity=0.9, finetune_epochs=2).compress(model, given)
    for name, value in at_once.state_dict().items():
        assert torch.equal(chain.state_dict()[name], value), name


def test_reasons() -> None:
    model = reference("perceptron").fresh()
    assert "epochs=4 needs a task with training data" in str(refusal(Finetune(epochs=4), model, context(**NOTHING)))
    with pytest.raises(Unsupported, match="no parameter"):
        Finetune().compress(model.requires_grad_(False), context())


@pytest.mark.parametrize(
    ("values", "message"),
    [({"epochs": 0}, "epochs"), ({"lr_scale": 0.0}, "lr_scale"), ({"keep_zero": True}, "Did you mean 'keep_zeros'")],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        registry.create("method", "methods.finetune:Finetune", values)
