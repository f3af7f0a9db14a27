"""SNIP, GraSP and SynFlow: scores against independent computations, and training that keeps the zeros."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn import functional as F

from harness import registry
from harness.contracts import Batch
from harness.errors import NotFinite, SpecError, Unsupported
from harness.testing.networks import reference
from harness.training import Recipe
from methods.layers.inputs import balanced, examples
from methods.layers.masks import keep_highest
from methods.layers.prunable import prunable_weights
from methods.pruning import grasp, snip, synflow
from methods.pruning.grasp import Grasp
from methods.pruning.snip import Snip
from methods.pruning.synflow import SynFlow
from tests.unit.contexts import Ordered, bare, fit_of, refusal

METHODS = [Snip, Grasp, SynFlow]


pytestmark = pytest.mark.usefixtures("one_thread")


def flow(linear: nn.Module, *shape: int) -> dict[str, Tensor]:
    given = bare(*shape)
    return synflow.flow(linear, synflow.ones(linear, given), given.signature)


def sensitivity(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return snip.sensitivity(network, Batch(inputs={"input": x}, targets={"label": y}), bare(*x.shape[1:]))


def gradient_flow(network: nn.Module, x: Tensor, y: Tensor, temperature: float) -> dict[str, Tensor]:
    batch = Batch(inputs={"input": x}, targets={"label": y})
    return grasp.gradient_flow(network, batch, temperature, bare(*x.shape[1:]))


def tiny() -> nn.Sequential:
    """Of few enough weights for a whole Hessian, smooth, in float64."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 5, generator=generator, dtype=torch.float64), torch.arange(12) % 3


def loss_of(network: nn.Module, weights: dict[str, Tensor], temperature: float) -> Tensor:
    x, y = batch()
    return F.cross_entropy(functional_call(network, weights, (x,)) / temperature, y)


def test_snip_scores_are_the_effect_of_removing_a_connection_to_first_order() -> None:
    network = tiny()
    x, y = batch()
    scores = sensitivity(network, x, y)
    for name, weight in prunable_weights(network).items():
        for index in range(0, weight.numel(), 3):
            kept = weight.detach().clone()
            step = 1e-6  # of an indicator c that multiplies the weight (the paper's definition), around c = 1

            def at(c: float, name: str = name, index: int = index, kept: Tensor = kept) -> float:
                changed = kept.clone()
                changed.view(-1)[index] *= c
                return loss_of(network, {f"{name}.weight": changed}, 1.0).item()

            slope = (at(1 + step) - at(1 - step)) / (2 * step)
            assert scores[name].flatten()[index].item() == pytest.approx(abs(slope), rel=1e-6, abs=1e-11)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_scores_are_the_explicit_hessian_times_the_gradient(temperature: float) -> None:
    network = tiny()
    x, y = batch()
    weights = {f"{name}.weight": weight.detach() for name, weight in prunable_weights(network).items()}
    sizes = [weight.numel() for weight in weights.values()]

    def flat_loss(flat: Tensor) -> Tensor:
        parts = zip(weights.items(), flat.split(sizes), strict=True)
        return loss_of(network, {name: part.view_as(weight) for (name, weight), part in parts}, temperature)

    flat = torch.cat([weight.flatten() for weight in weights.values()])
    expected = flat * (hessian(flat_loss, flat) @ jacobian(flat_loss, flat))
    found = gradient_flow(network, x, y, temperature)
    torch.testing.assert_close(torch.cat([s.flatten() for s in found.values()]), expected, rtol=1e-9, atol=1e-15)
    assert found.keys() == prunable_weights(network).keys()


def test_grasp_removes_the_weights_whose_removal_leaves_most_gradient() -> None:
    # The sign, without the score's formula: remove one weight by a small part and look at the squared gradient norm.
    network = tiny()
    x, y = batch()
    score = torch.cat([s.flatten() for s in gradient_flow(network, x, y, 1.0).values()])
    weights = {f"{name}.weight": w.detach() for name, w in prunable_weights(network).items()}

    def values(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(given.values())

    def squared_norm(changed: dict[str, Tensor]) -> float:
        gradients = jacobian(
            lambda *given: loss_of(network, dict(zip(changed, given, strict=True)), 1.0), values(changed)
        )
        return sum(float(g.square().sum()) for g in gradients)

    before, effects = squared_norm(weights), []
    for name, weight in weights.items():
        for index in range(weight.numel()):
            changed = weight.clone()
            changed.view(-1)[index] *= 1 - 1e-6
            effects.append((squared_norm({**weights, name: changed}) - before) / 1e-6)
    # 2 * (-w (H g)): the paper's score, of which the highest are removed.
    torch.testing.assert_close(torch.tensor(effects, dtype=torch.float64), -2 * score, rtol=1e-4, atol=1e-8)
    kept = torch.cat([m.flatten() for m in keep_highest({"all": score}, 0.5, "global").values()])
    assert torch.tensor(effects)[~kept].min() >= torch.tensor(effects)[kept].max()


def relu_network(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_synaptic_flow_is_conserved_from_layer_to_layer() -> None:
    network = relu_network(12, 40, 7, 25, 5)
    linear = synflow.linearized(network)
    sums = {name: score.sum().item() for name, score in flow(linear, 12).items()}
    product = torch.ones(12, dtype=torch.float64)
    for weight in prunable_weights(network).values():
        product = weight.detach().double().abs() @ product
    assert len(sums) == 4
    for value in sums.values():
        assert value == pytest.approx(product.sum().item(), rel=1e-12)


def test_synaptic_flow_into_a_hidden_neuron_is_the_flow_out_of_it() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 9), nn.Linear(9, 4)
    )
    # Whatever normalisation and biases hold, the flow is that of the weights alone.
    nn.init.constant_(network[1].running_var, 7.0)
    nn.init.zeros_(network[1].weight)
    scores = flow(synflow.linearized(network), 1, 4, 4)
    torch.testing.assert_close(scores["0"].sum((1, 2, 3)), scores["4"].view(9, 6, 16).sum((0, 2)), rtol=1e-12, atol=0)
    torch.testing.assert_close(scores["4"].sum(1), scores["5"].sum(0), rtol=1e-12, atol=0)


class Saturating(nn.Module):
    """Activations that stop growing, as a module and as a function, a layer normalisation and a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 50)
        self.norm = nn.LayerNorm(50)
        self.clip = nn.ReLU6()
        self.two = nn.Linear(50, 50)
        self.scale = nn.Parameter(torch.full((50,), 1e-6))
        self.three = nn.Linear(50, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.clip(self.norm(self.one(100 * x)))
        out: Tensor = self.three(y + self.scale * F.hardswish(torch.tanh(self.two(y))))
        return out


def test_saturation_and_layer_scales_do_not_stop_the_flow() -> None:
    network = Saturating()
    scores = flow(synflow.linearized(network), 6)
    one, two, three = (weight.detach().double().abs() for weight in prunable_weights(network).values())
    y = one @ torch.full((6,), 100.0, dtype=torch.float64)
    expected = three.sum(0)[:, None] * two * y
    torch.testing.assert_close(scores["two"], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(scores["three"], three * (y + two @ y), rtol=1e-12, atol=0)


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).mean(1))
        return out


def test_grasp_differentiates_fused_attention_twice() -> None:
    torch.manual_seed(0)
    network, x, y = Attentive(), torch.randn(8, 4, 6), torch.arange(8) % 3
    scores = gradient_flow(network, x, y, 1.0)
    assert all(score.abs().sum() > 0 for score in scores.values())


def test_grasp_needs_second_derivatives() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Hardsigmoid(), nn.Linear(10, 10))

    given = reference("perceptron").context(fresh=network)
    assert "hardsigmoid" in (refusal(Grasp(), network(), given) or "")
    with pytest.raises(Unsupported, match="second derivatives"):
        Grasp().compress(network(), given)


def test_synflow_avoids_the_layer_collapse_of_magnitude_and_of_one_shot_pruning() -> None:
    # One wide layer between narrow ones: its weights are the smallest, and their scores too.
    network = relu_network(30, 10, 400, 400, 10, 5)
    sparsity = 1 - 40 / sum(w.numel() for w in prunable_weights(network).values())

    def least(kept: dict[str, Tensor]) -> int:
        return min(int(mask.sum()) for mask in kept.values())

    magnitudes = {name: w.detach().abs() for name, w in prunable_weights(network).items()}
    assert least(keep_highest(magnitudes, sparsity, "global")) == 0
    assert least(synflow.prune(network, bare(30), sparsity, 1)) == 0
    kept = synflow.prune(network, bare(30), sparsity, 100)
    assert least(kept) > 0
    assert sum(int(mask.sum()) for mask in kept.values()) == 40
    # A path is left: what is kept still carries flow.
    linear = synflow.linearized(network)
    for name, weight in prunable_weights(linear).items():
        weight.data.mul_(kept[name])
    assert all(score.sum() > 0 for score in flow(linear, 30).values())


def test_synflow_overflow_is_an_error_and_not_a_mask() -> None:
    network = relu_network(4, 4, 4)
    for weight in prunable_weights(network).values():
        nn.init.constant_(weight, 1e38)
    deep = nn.Sequential(*[module for _ in range(5) for module in (*synflow.linearized(network), nn.ReLU())])
    with pytest.raises(NotFinite, match="synflow"):
        synflow.prune(deep, bare(4), 0.5, 3)


def test_synflow_needs_no_data_to_score_and_snip_needs_a_gradient_that_is_finite() -> None:
    network = tiny()
    nn.init.constant_(network[0].weight, math.nan)
    with pytest.raises(NotFinite, match="snip"):
        sensitivity(network, *batch())


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", ["perceptron", "residual"])
def test_the_untrained_network_is_pruned_exactly_and_keeps_signs_and_values(kind: Any, name: str) -> None:
    given = reference(name)
    pruned = kind(sparsity=0.8, epochs=0).compress(given.model, given.context())
    fresh = given.fresh()
    weights = prunable_weights(pruned)
    size = sum(w.numel() for w in weights.values())
    assert sum(int((w == 0).sum()) for w in weights.values()) == round(0.8 * size)
    for key, value in fresh.state_dict().items():
        found = pruned.state_dict()[key]
        kept = found != 0 if key.removesuffix(".weight") in weights else torch.ones_like(found, dtype=torch.bool)
        assert torch.equal(found[kept], value[kept]), key


@pytest.mark.parametrize("kind", METHODS)
def test_training_starts_afresh_with_the_recipe_and_keeps_the_zeros(kind: Any) -> None:
    given = reference("perceptron")
    start = kind(sparsity=0.9, epochs=0).compress(given.model, given.context())
    recipes: list[Recipe] = []
    fit = fit_of(given.context())

    def training(model: nn.Module, recipe: Recipe, **hooks: Any) -> Any:
        recipes.append(recipe)
        for name, weight in prunable_weights(model).items():
            assert torch.equal(weight, prunable_weights(start)[name])
        return fit(model, recipe, **hooks)

    trained = kind(sparsity=0.9).compress(given.model, given.context(fit=training))
    kind(sparsity=0.9, epochs=1).compress(given.model, given.context(fit=training))
    assert recipes[0] == given.recipe
    assert recipes[1].epochs == 1
    assert recipes[1].lr == given.recipe.lr
    for name, weight in prunable_weights(trained).items():
        before = prunable_weights(start)[name]
        assert torch.equal(weight == 0, before == 0)
        assert not torch.equal(weight, before)


def test_snip_scope_layer_gives_every_layer_the_same_share() -> None:
    given = reference("residual")
    pruned = Snip(sparsity=0.5, scope="layer", epochs=0).compress(given.model, given.context())
    for weight in prunable_weights(pruned).values():
        assert int((weight == 0).sum()) == round(0.5 * weight.numel())


def test_the_seed_draws_the_batch() -> None:
    given = reference("perceptron")
    first, second = (Snip(epochs=0).compress(given.model, given.context(seed=seed)).fc1.weight for seed in (0, 1))
    assert not torch.equal(first, second)


def test_examples_are_the_first_of_one_shuffled_pass() -> None:
    train = reference("perceptron").data["train"]
    found, expected = examples(train, 70, seed=5), next(iter(train.batches(70, seed=5)))
    assert torch.equal(found.inputs["input"], expected.inputs["input"])
    assert torch.equal(found.targets["label"], expected.targets["label"])
    assert len(examples(train, 10**6, seed=5)) == train.size


def test_examples_of_another_shape_than_the_first_are_left_out() -> None:
    class Ragged(Ordered):
        def batches(self, size: int, *, seed: int | None = None, augment: bool = False) -> Iterator[Batch]:
            for width in (4, 6, 4):
                yield Batch(inputs={"input": torch.full((3, width), width)})

    found = examples(Ragged(inputs={"input": torch.zeros(9, 4)}), 5, seed=0)
    assert found.inputs["input"].shape == (5, 4)


def test_a_balanced_batch_has_equally_many_of_every_class() -> None:
    found = balanced(reference("perceptron").data["train"], 7, seed=0)
    x = found.inputs["input"]
    assert x.shape == (70, 1, 8, 8)
    assert torch.equal(found.targets["label"], torch.arange(10).repeat_interleave(7))
    assert len(x.flatten(1).unique(dim=0)) > 60


@pytest.mark.parametrize("name", ["tokens", "denoiser"])
def test_what_has_no_classes_is_drawn_without_balance(name: str) -> None:
    train = reference(name).data["train"]
    found, expected = balanced(train, 7, seed=0), examples(train, 70, seed=0)
    assert all(torch.equal(found.inputs[key], value) for key, value in expected.inputs.items())
    assert len(found) == 70


@pytest.mark.parametrize("kind", METHODS)
def test_a_layer_pruned_away_is_a_reason_that_names_it(kind: Any) -> None:
    given = reference("perceptron")
    method = kind(sparsity=0.9999)
    reason = refusal(method, given.model, given.context())
    assert reason is not None
    assert "'fc" in reason
    assert "0.9999" in reason
    with pytest.raises(Unsupported, match="would zero all"):
        method.compress(given.model, given.context())


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_missing_is_a_reason(kind: Any) -> None:
    given = reference("perceptron")
    assert "no convolution or linear layer" in refusal(kind(), nn.ReLU(), given.context())
    assert "training data" in refusal(kind(), given.model, bare(1, 8, 8))
    assert "trained from scratch" in refusal(kind(), given.model, given.context(fresh=None))
    with pytest.raises(Unsupported, match="training data"):
        kind().compress(given.model, bare(1, 8, 8))


@pytest.mark.parametrize("kind", METHODS)
def test_a_model_of_another_structure_than_the_fresh_one_is_a_reason(kind: Any) -> None:
    given = reference("perceptron")
    model = given.fresh()
    model.fc2 = nn.Linear(48, 20)
    reason = refusal(kind(), model, given.context())
    assert reason is not None
    assert "'fc2'" in reason
    assert "(32, 48)" in reason
    assert "first in the chain" in reason


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("snip:Snip", {"examples": 0}), ("grasp:Grasp", {"temperature": 0}), ("synflow:SynFlow", {"iterations": 0})],
)
def test_values_out_of_range_are_refused_by_name(name: str, parameters: dict[str, Any]) -> None:
    for bad in (parameters, {"sparsity": 1.0}, {"epochs": -1}):
        with pytest.raises(SpecError, match=next(iter(bad))):
            registry.create("method", f"methods.pruning.{name}", bad)
