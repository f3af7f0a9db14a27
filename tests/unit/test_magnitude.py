"""Magnitude pruning: which weights become zero, exactly how many, and that they stay zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harness import registry
from harness.contracts import Context, Step
from harness.errors import SpecError, Unsupported
from harness.training import Recipe
from methods.layers.masks import removals
from methods.layers.prunable import prunable_weights
from methods.pruning.magnitude import Magnitude
from tests.unit.contexts import bare, fit_of, labelled, recipe_of, refusal

pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 20), nn.ReLU(), nn.Linear(20, 10)
    )


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((weight == 0).sum()) for name, weight in prunable_weights(model).items()}


@settings(max_examples=25, deadline=None)
@given(sparsity=st.floats(0, 0.9))
def test_global_zeroes_exactly_the_smallest_weights(sparsity: float) -> None:
    model = network()
    before = torch.cat([w.detach().flatten() for w in prunable_weights(model).values()])
    pruned = Magnitude(sparsity=sparsity).compress(model, bare(1, 8, 8))
    after = torch.cat([w.detach().flatten() for w in prunable_weights(pruned).values()])
    gone = after == 0
    assert int(gone.sum()) == round(sparsity * len(before))
    assert torch.equal(after[~gone], before[~gone])
    if gone.any():
        assert before[gone].abs().max() <= before[~gone].abs().min()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.93])
def test_layer_scope_zeroes_exactly_that_share_of_every_layer(sparsity: float) -> None:
    model = network()
    pruned = Magnitude(sparsity=sparsity, scope="layer").compress(model, bare(1, 8, 8))
    assert zeros(pruned) == {n: round(sparsity * w.numel()) for n, w in prunable_weights(model).items()}


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_erk_scope_zeroes_the_smallest_of_every_layer_within_its_budget(sparsity: float) -> None:
    model = network()
    weights = prunable_weights(model)
    pruned = Magnitude(sparsity=sparsity, scope="erk").compress(model, bare(1, 8, 8))
    assert zeros(pruned) == removals(weights, sparsity, "erk")
    assert sum(zeros(pruned).values()) == round(sparsity * sum(w.numel() for w in weights.values()))
    for name, after in prunable_weights(pruned).items():
        gone, before = after == 0, weights[name].detach().abs()
        if gone.any():
            assert before[gone].max() <= before[~gone].min()


def test_of_equal_magnitudes_the_first_go_first() -> None:
    layer = nn.Linear(4, 2, bias=False)
    nn.init.constant_(layer.weight, -0.5)
    pruned = Magnitude(sparsity=0.5).compress(nn.Sequential(layer), bare(1, 8, 8))
    assert torch.equal(pruned[0].weight, torch.tensor([[0.0] * 4, [-0.5] * 4]))


def test_biases_norms_and_the_given_model_are_untouched() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = Magnitude(sparsity=0.9).compress(model, bare(1, 8, 8)).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    changed = {name for name, value in pruned.items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight", "4.weight", "6.weight"}


def test_tied_weights_are_counted_once() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    pruned = Magnitude(sparsity=0.25).compress(nn.Sequential(first, second), bare(1, 8, 8))
    assert zeros(pruned) == {"0": 16}
    assert pruned[0].weight is pruned[1].weight


def test_it_says_which_layers() -> None:
    said: list[str] = []
    Magnitude(sparsity=0.5, scope="layer").compress(
        network(), bare(1, 8, 8, progress=lambda _, text: said.append(text))
    )
    assert said == ["zero weights: 0 50.0%, 4 50.0%, 6 50.0%"]


def test_a_layer_pruned_away_is_named() -> None:
    model = network()
    with torch.no_grad():
        model[4].weight.mul_(1e-6)
    with pytest.raises(Unsupported, match=r"sparsity 0.98 \(global\) would zero all 4320 weights of layer '4'"):
        Magnitude(sparsity=0.98).compress(model, bare(1, 8, 8))
    assert zeros(model) == {"0": 0, "4": 0, "6": 0}


def test_no_prunable_layer_is_a_reason() -> None:
    reason = refusal(Magnitude(), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)), bare(1, 8, 8))
    assert reason is not None
    assert "no convolution or linear layer" in reason


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 1.5}, r"sparsity: .*less than 1 \(got 1.5\)"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"scope": "block"}, "'global', 'layer' or 'erk'"),
        ({"finetune_epochs": -1}, "finetune_epochs"),
        ({"finetune_lr_scale": 0}, "finetune_lr_scale: .*greater than 0"),
        ({"finetune_lr_scale": float("inf")}, "finetune_lr_scale"),
        ({"sparsty": 0.5}, "Did you mean 'sparsity'"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        registry.create("method", "magnitude", values)


def digits_context(seed: int = 0) -> Context:
    data = registry.create("task", "digits-cnn", {}).data()
    recipe = Recipe(epochs=4, batch_size=32, lr=0.05, weight_decay=5e-3)
    return bare(1, 8, 8, data=data, recipe=recipe, seed=seed)


def validated(model: nn.Module, given: Context) -> float:
    with torch.inference_mode():
        right = [(model(x).argmax(1) == y).double().sum() for x, y in labelled(given, 64)]
    return float(sum(right)) / given.data["validation"].size


def test_finetuning_keeps_the_zeros_and_regains_accuracy() -> None:
    given = digits_context()
    model = network()
    fit_of(given)(model, recipe_of(given))
    pruned = Magnitude(sparsity=0.95).compress(model, given)
    tuned = Magnitude(sparsity=0.95, finetune_epochs=4).compress(model, given)
    for name, weight in prunable_weights(pruned).items():
        again = prunable_weights(tuned)[name]
        assert torch.equal(weight == 0, again == 0), f"{name}: momentum and weight decay must not revive zeros"
        assert not torch.equal(weight, again), f"{name}: the kept weights are trained"
    assert validated(tuned.eval(), given) > validated(pruned.eval(), given) + 0.05


def test_finetuning_gives_the_same_bytes_for_the_same_seed() -> None:
    first, second = (
        Magnitude(sparsity=0.8, finetune_epochs=1).compress(network(), digits_context()).state_dict() for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_momentum_of_zeros_stays_zero() -> None:
    model = network()
    inputs = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []

    def trainer(
        model: nn.Module, recipe: Recipe, *, after_step: Callable[[Step], None] | None = None, objective: Any = None
    ) -> dict[str, float]:
        assert (recipe.epochs, recipe.lr) == (3, pytest.approx(0.01))
        assert after_step is not None
        pruned = {name: weight == 0 for name, weight in prunable_weights(model).items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for index in range(recipe.epochs):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                after_step(
                    Step(
                        model=model, optimizer=optimizer, index=index, steps=recipe.epochs, epoch=index, epoch_end=True
                    )
                )
            for name, weight in prunable_weights(model).items():
                buffer = optimizer.state[weight]["momentum_buffer"]
                assert buffer[pruned[name]].eq(0).all()
                assert weight[pruned[name]].eq(0).all()
                assert buffer[~pruned[name]].ne(0).any()
                seen.append(int(pruned[name].sum()))
        return {}

    given = bare(1, 8, 8, fit=trainer, recipe=Recipe(epochs=9, lr=0.1))
    tuned = Magnitude(sparsity=0.5, finetune_epochs=3).compress(model, given)
    assert sum(seen) == 3 * round(0.5 * sum(w.numel() for w in prunable_weights(model).values()))
    assert all(not weight._backward_hooks for weight in prunable_weights(tuned).values())


def test_finetuning_runs_at_the_learning_rate_asked_for() -> None:
    seen: list[tuple[int, float]] = []
    given = bare(
        *(1, 8, 8),
        fit=lambda model, recipe, **_: seen.append((recipe.epochs, recipe.lr)),
        recipe=Recipe(epochs=9, lr=0.1),
    )
    Magnitude(sparsity=0.5, finetune_epochs=3, finetune_lr_scale=0.5).compress(network(), given)
    assert seen == [(3, pytest.approx(0.05))]


def test_finetuning_without_data_is_a_reason() -> None:
    reason = refusal(Magnitude(finetune_epochs=2), network(), bare(1, 8, 8))
    assert reason is not None
    assert "finetune_epochs=2 needs a task with training data" in reason
