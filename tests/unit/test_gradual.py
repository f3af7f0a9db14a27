"""The cubic schedule, step by step, and where it ends."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from harness import registry
from harness.errors import SpecError, Unsupported
from harness.testing.networks import reference
from harness.training import Recipe
from methods.layers.masks import removals
from methods.layers.prunable import prunable_weights
from methods.pruning.gradual import Gradual
from tests.unit.contexts import NOTHING, context, fit_of, recipe_of, refusal


def test_the_schedule_is_the_papers_formula() -> None:
    method = Gradual(sparsity=0.9, initial_sparsity=0.2, begin=0.1, end=0.6, frequency=70)
    steps, t0, dt = 1000, 100, 70
    n = 7  # 100 + 7 * 70 = 590 is the last one before 600
    for t in range(steps + 1):
        found = method.target(t, steps)
        if t < t0:
            assert found is None
        else:
            at = min(t0 + (t - t0) // dt * dt, t0 + n * dt)
            assert found == pytest.approx(0.9 + (0.2 - 0.9) * (1 - (at - t0) / (n * dt)) ** 3, abs=1e-12)
    assert method.target(100, steps) == pytest.approx(0.2)
    assert method.target(589, steps) != method.target(590, steps) == 0.9


@pytest.mark.parametrize("values", [{"begin": 0.5, "end": 0.5}, {"frequency": 10**6}, {"end": 1.0}, {"end": 0.0}])
def test_it_always_ends_at_the_target(values: dict[str, Any]) -> None:
    method = Gradual(sparsity=0.8, **values)
    assert method.target(90, 90) == 0.8
    wanted = [method.target(t, 90) for t in range(91)]
    known = [value for value in wanted if value is not None]
    assert known == sorted(known)


def watched(found: list[dict[str, torch.Tensor]], name: str) -> Any:
    """A trainer that keeps the masks after every step."""
    trainer = fit_of(context(name))

    def train(model: nn.Module, recipe: Recipe, *, after_step: Any, objective: Any = None) -> Any:
        def step(taken: Any) -> None:
            after_step(taken)
            found.append({layer: weight != 0 for layer, weight in prunable_weights(model).items()})

        return trainer(model, recipe, after_step=step, objective=objective)

    return train


@pytest.mark.parametrize("scope", ["layer", "erk", "global"])
@pytest.mark.parametrize("name", ["perceptron", "residual"])
def test_measured_sparsity_follows_the_schedule_and_nothing_comes_back(name: str, scope: Any) -> None:
    found: list[dict[str, torch.Tensor]] = []
    method = Gradual(sparsity=0.8, initial_sparsity=0.3, begin=0.2, end=0.7, frequency=5, scope=scope, epochs=1)
    pruned = method.compress(reference(name).model, context(name, fit=watched(found, name)))
    weights = prunable_weights(pruned)
    sizes = {layer: weight.numel() for layer, weight in weights.items()}
    for index, masks in enumerate(found):
        target = method.target(index + 1, len(found)) or 0.0
        lost = {layer: int((~mask).sum()) for layer, mask in masks.items()}
        if scope == "global":
            assert sum(lost.values()) == round(target * sum(sizes.values()))
        else:
            assert lost == removals(weights, target, scope)
    for earlier, later in itertools.pairwise(found):
        assert all((later[layer] <= earlier[layer]).all() for layer in later), "a pruned weight stays pruned"
    assert len({int(sum(m.sum() for m in masks.values())) for masks in found}) > 5


def test_from_scratch_starts_from_the_untrained_network_with_the_full_recipe() -> None:
    seen: list[tuple[Recipe, bool]] = []
    known = reference("perceptron")

    def trainer(model: nn.Module, recipe: Recipe, **_: Any) -> dict[str, float]:
        fresh = known.fresh().state_dict()
        seen.append((recipe, all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())))
        return {}

    given = context(fit=trainer)
    for scratch in (True, False):
        pruned = Gradual(from_scratch=scratch, epochs=7).compress(known.model, given)
        weights = prunable_weights(pruned).values()
        assert [int((w == 0).sum()) for w in weights] == [round(0.5 * w.numel()) for w in weights], "without a step too"
    assert seen == [(replace(recipe_of(given), epochs=7), True), (recipe_of(given).finetune(7), False)]


def test_pruned_before_the_first_step_where_it_begins_at_zero() -> None:
    first: list[int] = []

    def trainer(model: nn.Module, recipe: Recipe, **_: Any) -> None:
        first.append(sum(int((weight == 0).sum()) for weight in prunable_weights(model).values()))

    given = context(fit=trainer)
    Gradual(initial_sparsity=0.25).compress(reference("perceptron").model, given)
    Gradual(initial_sparsity=0.25, begin=0.1).compress(reference("perceptron").model, given)
    assert first == [round(0.25 * 4928), 0]


def test_reasons() -> None:
    model = reference("perceptron").model
    assert "needs a task with training data" in str(refusal(Gradual(), model, context(**NOTHING)))
    assert "trained from scratch" in str(refusal(Gradual(from_scratch=True), model, context(fresh=None)))
    with pytest.raises(Unsupported, match=r"sparsity 0.999 \(layer\) would zero all 320 weights of layer 'fc3'"):
        Gradual(sparsity=0.999).compress(model, context())
    with pytest.raises(Unsupported, match=r"sparsity 0.9996 \(global\) would zero all"):
        Gradual(sparsity=0.9996, scope="global").compress(model, context())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 0.5, "initial_sparsity": 0.6}, "initial_sparsity 0.6 is above sparsity 0.5"),
        ({"begin": 0.8, "end": 0.4}, "begin 0.8 is after end 0.4"),
        ({"end": 1.1}, "end"),
        ({"frequency": 0}, "frequency"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        registry.create("method", "methods.pruning.gradual:Gradual", values)
