"""SET and RigL: what they drop, what they grow, and when."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import registry
from harness.contracts import Step
from harness.errors import SpecError, Unsupported
from harness.tasks.models.mlp import SetMLP
from harness.testing.networks import reference
from harness.training import Recipe
from methods.layers.masks import removals
from methods.layers.prunable import prunable_weights
from methods.pruning.rigl import RigL
from methods.pruning.set import SparseEvolutionaryTraining as Set
from tests.unit.contexts import NOTHING, context, fit_of, refusal


class Watching:
    """Keeps the weights (and momentum) just before and after what a method does at a step."""

    def __init__(self, name: str = "perceptron") -> None:
        self.trainer = fit_of(context(name))
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.momentum: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.ends: list[int] = []
        self.start: dict[str, Tensor] = {}

    def __call__(self, model: nn.Module, recipe: Recipe, *, after_step: Any, objective: Any = None) -> Any:
        weights = prunable_weights(model)
        self.start = {name: weight.detach().clone() for name, weight in weights.items()}

        def step(taken: Step) -> None:
            def copied() -> dict[str, Tensor]:
                return {name: weight.detach().clone() for name, weight in weights.items()}

            self.before.append(copied())
            self.gradients.append({name: w.grad.clone() for name, w in weights.items() if w.grad is not None})
            after_step(taken)
            self.after.append(copied())
            self.momentum.append(
                {name: taken.optimizer.state[w]["momentum_buffer"].clone() for name, w in weights.items()}
            )
            if taken.epoch_end:
                self.ends.append(taken.index)

        return self.trainer(model, recipe, after_step=step, objective=objective)


def masks_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight != 0 for name, weight in state.items()}


@pytest.mark.parametrize("name", ["perceptron", "residual"])
def test_set_replaces_the_weakest_of_each_sign_after_every_epoch_but_the_last(name: str) -> None:
    watching = Watching(name)
    Set(sparsity=0.7, zeta=0.3, epochs=3, evolve_output=True).compress(
        reference(name).model, context(name, fit=watching)
    )
    steps = len(watching.after)
    assert watching.ends == [steps // 3 - 1, 2 * steps // 3 - 1, steps - 1]
    previous = masks_of(watching.start)
    for index in range(steps):
        now = masks_of(watching.after[index])
        for layer, weight in watching.before[index].items():
            changed = not torch.equal(now[layer], previous[layer])
            if index not in watching.ends[:-1]:
                assert not changed, "the topology moves only between epochs"
                continue
            assert changed != bool(previous[layer].all()), "dense layers are left alone, all others are not"
            if not changed:
                continue
            assert now[layer].sum() == previous[layer].sum(), "as many come as go"
            stayed = previous[layer] & (watching.after[index][layer] == weight)
            for side in (weight > 0, weight < 0):
                side = side & previous[layer]
                lost = side & ~stayed
                assert int(lost.sum()) == round(0.3 * int(side.sum()))
                assert weight[lost].abs().max() <= weight[side & stayed].abs().min()
            new = now[layer] & ~stayed
            values = watching.after[index][layer][new]
            assert set(values.tolist()) <= set(prunable_weights(reference(name).fresh())[layer].flatten().tolist())
            assert watching.momentum[index][layer][new].eq(0).all()
            assert watching.momentum[index][layer][stayed].ne(0).any()
        previous = now


def test_set_grows_uniformly_over_free_positions() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))
    watching = Watching()
    given = context(fit=watching, fresh=lambda: network)
    Set(sparsity=0.9, zeta=0.5, epochs=2).compress(network, given)
    end = watching.ends[0]
    before, after = masks_of(watching.before[end])["1"], masks_of(watching.after[end])["1"]
    grown = (after & ~before).double()
    share = grown.sum() / (~before).sum()
    expected = share * (~before).double().sum(1)
    chi2 = float(((grown.sum(1) - expected) ** 2 / (expected * (1 - share))).sum())
    assert abs(chi2 - 300) < 4 * math.sqrt(2 * 300)


def test_zeta_zero_is_a_static_topology_and_dense_layers_stay_dense() -> None:
    for method in (Set(epsilon=3.0, zeta=0.0, epochs=2), Set(epsilon=8.0, zeta=0.3, epochs=2, evolve_output=True)):
        watching = Watching()
        trained = method.compress(reference("perceptron").model, context(fit=watching))
        sizes = {"fc1": (3072, 112), "fc2": (1536, 80), "fc3": (320, 42)}
        assert method.epsilon is not None
        for layer, (size, neurons) in sizes.items():
            left = int((prunable_weights(trained)[layer] != 0).sum())
            assert left == min(size, round(method.epsilon * neurons))
        if method.zeta == 0:
            masks = [masks_of(state) for state in [watching.start, *watching.after]]
            assert all(torch.equal(m["fc1"], masks[0]["fc1"]) for m in masks)


def test_the_output_layer_evolves_only_where_that_is_asked() -> None:
    for evolve in (False, True):
        watching = Watching()
        method = Set(epsilon=3.0, epochs=2, evolve_output=evolve)
        method.compress(reference("perceptron").model, context(fit=watching))
        first, last = masks_of(watching.start), masks_of(watching.after[-1])
        assert not torch.equal(first["fc2"], last["fc2"])
        assert torch.equal(first["fc3"], last["fc3"]) != evolve


def test_the_mlp_of_the_paper_has_its_size_density_and_initialisation() -> None:
    torch.manual_seed(0)
    model = SetMLP()
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_797_010
    for weight in prunable_weights(model).values():
        limit = math.sqrt(6 / weight.shape[1])
        assert limit * 0.99 < weight.abs().max() <= limit
        assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)
    method = Set(epsilon=13)
    kept = method._topology(prunable_weights(model), 0)
    assert [int(mask.sum()) for mask in kept.values()] == [13 * 1784, 13 * 2000, 13 * 2000, 10000]
    density = sum(int(mask.sum()) for mask in kept.values()) / sum(mask.numel() for mask in kept.values())
    assert density == pytest.approx(0.03, abs=0.001)
    x = torch.rand(4, 1, 28, 28) * 2 - 1
    hidden = x.flatten(1) / 2 + 0.5
    for layer in (model.fc1, model.fc2, model.fc3):
        hidden = (hidden @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(model.eval()(x), hidden @ model.fc4.weight.T + model.fc4.bias)
    assert not torch.equal(model.train()(x), model(x)), "dropout"


@pytest.mark.parametrize("name", ["perceptron", "residual"])
def test_rigl_drops_by_magnitude_and_grows_by_gradient(name: str) -> None:
    watching = Watching(name)
    method = RigL(sparsity=0.8, scope="layer", alpha=0.4, delta_t=20, stop=0.7)
    trained = method.compress(reference(name).model, context(name, fit=watching))
    steps = len(watching.after)
    previous = masks_of(watching.start)
    updates = 0
    for index in range(steps):
        now = masks_of(watching.after[index])
        t = index + 1
        if t % 20 or t >= 0.7 * steps:
            # A weight grown with a zero stays zero until the next step moves it.
            assert method.share(t, steps) == 0
            for layer in now:
                assert (now[layer] & ~previous[layer]).sum() == 0 or index % 20 == 0
            previous = {layer: previous[layer] | now[layer] for layer in now}
            continue
        updates += 1
        share = 0.4 / 2 * (1 + math.cos(math.pi * t / (0.7 * steps)))
        assert method.share(t, steps) == pytest.approx(share)
        for layer, weight in watching.before[index].items():
            active = previous[layer]
            count = int(share * int(active.sum()))
            magnitude = weight.abs().masked_fill(~active, -1)
            kept = torch.zeros_like(active).flatten()
            kept[magnitude.flatten().argsort(descending=True)[: int(active.sum()) - count]] = True
            wanted = watching.gradients[index][layer].abs().flatten().masked_fill(kept, -1)
            chosen = kept.clone()
            chosen[wanted.argsort(descending=True)[:count]] = True
            chosen = chosen.view_as(active)
            grown = chosen & ~active
            assert int(grown.sum()) > 0
            after = watching.after[index][layer]
            assert after[~chosen].eq(0).all()
            assert after[grown].eq(0).all(), "new weights begin at zero"
            assert torch.equal(after[chosen & active], weight[chosen & active])
            assert watching.momentum[index][layer][~chosen | grown].eq(0).all()
            previous[layer] = chosen
    assert updates == math.ceil(0.7 * steps / 20) - 1
    for layer, weight in prunable_weights(trained).items():
        lost = removals(prunable_weights(trained), 0.8, "layer")[layer]
        assert int((weight == 0).sum()) == lost


def test_rigl_trains_better_than_chance_and_costs_no_dense_momentum() -> None:
    given = context("residual")
    trained = RigL(sparsity=0.9, delta_t=10).compress(reference("residual").model, given).eval()
    with torch.inference_mode():
        batch = next(iter(given.data["validation"].batches(1000)))
        right = float((trained(batch.inputs["input"]).argmax(1) == batch.targets["label"]).float().mean())
    assert right > 0.7


@pytest.mark.parametrize("method", [Set(), RigL()])
def test_reasons(method: Any) -> None:
    model = reference("perceptron").model
    assert "needs a task with training data" in str(refusal(method, model, context(**NOTHING)))
    assert "trained from scratch" in str(refusal(method, model, context(fresh=None)))
    assert "no convolution" in str(refusal(method, nn.ReLU(), context()))
    with pytest.raises(Unsupported, match=r"sparsity 0.9999 \(erk\) would zero all"):
        replace(method, sparsity=0.9999).compress(model, context())


def test_an_epsilon_too_small_is_a_reason() -> None:
    with pytest.raises(Unsupported, match=r"epsilon 0\.001 would leave layer 'fc1' without a connection; raise it"):
        Set(epsilon=0.001).compress(reference("perceptron").model, context())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("set:SparseEvolutionaryTraining", {"zeta": 1.0}),
        ("set:SparseEvolutionaryTraining", {"epsilon": 0}),
        ("set:SparseEvolutionaryTraining", {"sparsity": 1}),
        ("rigl:RigL", {"alpha": -0.1}),
        ("rigl:RigL", {"delta_t": 0}),
        ("rigl:RigL", {"stop": 1.1}),
        ("rigl:RigL", {"scope": "global"}),
    ],
)
def test_bad_values_are_refused(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(values))):
        registry.create("method", f"methods.pruning.{name}", values)
