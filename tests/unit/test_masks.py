"""Masks: budgets, exact counts, and that pruned weights stay zero whatever the optimizer remembers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from harness.contracts import Context, Recipe, Step
from harness.errors import Unsupported
from harness.testing.networks import reference
from methods.layers import masks
from methods.layers.attention import HeadAttention
from methods.layers.masks import MaskedTraining, Masks
from methods.layers.prunable import holder, prunable_weights
from methods.layers.training import from_scratch, training
from methods.pruning.magnitude import Magnitude
from tests.unit.contexts import bare, fit_of

SHAPES = st.lists(
    st.one_of(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(*[st.integers(1, 8)] * 4)),
    min_size=1,
    max_size=6,
)


def tensors(shapes: list[tuple[int, ...]]) -> dict[str, Tensor]:
    return {str(index): torch.empty(shape) for index, shape in enumerate(shapes)}


def exact_densities(shapes: list[tuple[int, ...]], kept: int) -> np.ndarray:
    """Erdős-Rényi-Kernel densities in float64: the factor is bisected, each density clipped at 1."""
    size = np.array([np.prod(shape) for shape in shapes], dtype=np.float64)
    raw = np.array([sum(shape) for shape in shapes], dtype=np.float64) / size
    low, high = 0.0, 1.0 / raw.min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (np.minimum(1, middle * raw) * size).sum() < kept else (low, middle)
    return np.minimum(1, high * raw)


@settings(max_examples=150, deadline=None)
@given(shapes=SHAPES, sparsity=st.floats(0, 0.99))
def test_erk_budgets_are_the_formula_but_for_rounding_and_exact_in_total(
    shapes: list[tuple[int, ...]], sparsity: float
) -> None:
    weights = tensors(shapes)
    sizes = np.array([weight.numel() for weight in weights.values()])
    lost = np.array(list(masks.removals(weights, sparsity, "erk").values()))
    assert lost.sum() == round(sparsity * sizes.sum())
    kept = sizes - lost
    assert (kept >= 0).all()
    assert (kept <= sizes).all()
    exact = exact_densities(shapes, int(kept.sum())) * sizes
    assert np.abs(kept - exact).max() <= 1 + len(shapes) / 2
    # Webster: no layer deserves a unit more than the one that holds it does.
    raw = np.array([sum(shape) for shape in shapes], dtype=np.float64)
    open_ = kept < sizes
    if open_.any() and (kept > 0).any():
        assert ((kept[open_] + 0.5) / raw[open_]).min() >= ((kept - 0.5) / raw)[kept > 0].max() - 1e-9


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, first=st.floats(0, 0.99), second=st.floats(0, 0.99))
@pytest.mark.parametrize("scope", ["erk", "layer"])
def test_more_sparsity_never_gives_a_layer_a_weight_back(
    scope: Any, shapes: list[tuple[int, ...]], first: float, second: float
) -> None:
    less, more = (masks.removals(tensors(shapes), value, scope) for value in sorted((first, second)))
    assert all(more[name] >= less[name] for name in less)


def test_erk_of_lenet_300_100() -> None:
    weights = tensors([(300, 784), (100, 300), (10, 100)])
    lost = masks.removals(weights, 0.9, "erk")
    kept = [weight.numel() - lost[name] for name, weight in weights.items()]
    total = 235200 + 30000 + 1000 - round(0.9 * 266200)
    assert sum(kept) == total
    assert kept[2] == 1000, "the output layer is dense: 110 of 1,000 times the factor is above 1"
    factor = (total - 1000) / (1084 + 400)
    assert kept[:2] == pytest.approx([factor * 1084, factor * 400], abs=0.51)


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_the_highest_scores_are_kept_as_brute_force_says(scope: Any, sparsity: float) -> None:
    rng = np.random.default_rng(0)
    scores = {"a": torch.tensor(rng.random((7, 9))), "b": torch.tensor(rng.random((3, 2, 3, 3)))}
    found = masks.keep_highest(scores, sparsity, scope)
    if scope == "global":
        ranked = sorted((float(v), n, i) for n, s in scores.items() for i, v in enumerate(s.flatten()))
        gone = {(n, i) for _, n, i in ranked[: round(sparsity * len(ranked))]}
    else:
        lost = masks.removals(scores, sparsity, scope)
        gone = {
            (n, i)
            for n, s in scores.items()
            for i in sorted(range(s.numel()), key=lambda i: float(s.flatten()[i]))[: lost[n]]
        }
    assert {(n, i) for n, m in found.items() for i, kept in enumerate(m.flatten()) if not kept} == gone


def test_random_masks_differ_by_seed_alone_and_are_uniform() -> None:
    weights = tensors([(400, 50)])
    first, again, other = (masks.random_masks(weights, 0.5, "layer", seed)["0"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rows = first.double().sum(1)
    assert rows.var() == pytest.approx(12.5, rel=0.25), "binomial(50, 1/2) in every row"
    torch.manual_seed(0)
    correlation = np.corrcoef(first.flatten().numpy(), torch.rand(20000).numpy())[0, 1]
    assert abs(correlation) < 0.03, "masks are independent of an initialisation from the same seed"


def test_tied_packed_and_normalisation_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.attention = nn.MultiheadAttention(4, 2)
            self.norm = nn.LayerNorm(4)
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight

    net = Net()
    found = prunable_weights(net)
    assert list(found) == ["attention.in_proj_weight", "attention.out_proj", "a"]
    holders = [holder(net, name) for name in found]
    assert holders == [net.attention, net.attention.out_proj, net.a]
    assert list(prunable_weights(nn.Linear(2, 2))) == ["model"]


def test_attention_alone_and_with_separate_projections() -> None:
    packed = nn.MultiheadAttention(8, 2)
    assert list(prunable_weights(packed)) == ["in_proj_weight", "out_proj"]
    assert holder(packed, "in_proj_weight") is packed
    separate = nn.ModuleDict({"cross": nn.MultiheadAttention(8, 2, kdim=6, vdim=4)})
    shapes = {name: tuple(weight.shape) for name, weight in prunable_weights(separate).items()}
    assert shapes == {
        "cross.q_proj_weight": (8, 8),
        "cross.k_proj_weight": (8, 6),
        "cross.v_proj_weight": (8, 4),
        "cross.out_proj": (8, 8),
    }
    made = nn.ModuleDict({"heads": HeadAttention(8, 2, 3)})
    assert list(prunable_weights(made)) == ["heads.in_proj_weight", "heads.out_proj"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))


def context(recipe: Recipe) -> Context:
    return reference("perceptron").context(recipe=recipe, fresh=None)


RECIPES = {
    "momentum": Recipe(epochs=1, batch_size=64, lr=0.1, weight_decay=0.01, augment=False),
    "classical": Recipe(epochs=1, batch_size=64, lr=0.1, nesterov=False, weight_decay=0.01, augment=False),
    "plain": Recipe(epochs=1, batch_size=64, lr=0.1, momentum=0.0, weight_decay=0.01, augment=False),
    "adam": Recipe(epochs=1, batch_size=64, lr=1e-2, optimizer="adam", weight_decay=0.01, augment=False),
    "adamw": Recipe(epochs=1, batch_size=64, lr=1e-2, optimizer="adamw", weight_decay=0.1, augment=False),
}


@pytest.mark.parametrize("reads", [False, True], ids=["masked gradients", "gradients as they are"])
@pytest.mark.parametrize("name", RECIPES)
def test_masks_hold_after_every_step_with_every_optimizer(name: str, reads: bool) -> None:
    model = network()
    weights = prunable_weights(model)
    kept = masks.keep_highest({n: w.detach().abs() for n, w in weights.items()}, 0.7, "layer")
    steps: list[int] = []
    nonzero_gradients: list[bool] = []

    def watching(model: nn.Module, recipe: Recipe, *, after_step: Any = None, **hooks: Any) -> Any:
        def watch(step: Step) -> None:
            after_step(step)
            for layer, weight in weights.items():
                assert weight[~kept[layer]].eq(0).all()
                for value in step.optimizer.state[weight].values():
                    if value is not None and value.shape == weight.shape:
                        assert value[~kept[layer]].eq(0).all()
                        assert value[kept[layer]].ne(0).any()
                assert weight.grad is not None
                nonzero_gradients.append(bool(weight.grad[~kept[layer]].ne(0).any()))
            steps.append(step.index)

        return fit_of(context(recipe))(model, recipe, after_step=watch, **hooks)

    given_context = reference("perceptron").context(recipe=RECIPES[name], fit=watching)
    MaskedTraining(masks=kept, reads_gradients=lambda _: reads)(model, given_context, RECIPES[name])
    assert steps == list(range(len(steps)))
    assert len(steps) > 10
    assert all(nonzero_gradients) if reads else not any(nonzero_gradients)
    for layer, weight in weights.items():
        assert not torch.signbit(weight[~kept[layer]]).any(), "0.0, never -0.0"
        assert not weight._post_accumulate_grad_hooks, "nothing is left on the model"


def test_masking_gradients_or_weights_gives_the_same_network() -> None:
    results = []
    for reads in (False, True):
        model = network()
        kept = masks.random_masks(prunable_weights(model), 0.5, "layer", 0)
        MaskedTraining(masks=kept, reads_gradients=lambda _, reads=reads: reads)(
            model, context(RECIPES["momentum"]), RECIPES["momentum"]
        )
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-5, atol=1e-6)


def test_what_grows_has_no_momentum() -> None:
    model = network()
    weights = prunable_weights(model)
    everything = masks.random_masks(weights, 0.5, "layer", 0)
    seen: list[int] = []

    def change(step: Step, kept: Masks) -> bool:
        buffer = step.optimizer.state[weights["4"]]["momentum_buffer"]
        if step.index == 3:
            kept["4"] = ~kept["4"]
            return True
        if step.index == 4:  # one step after: momentum is this step's gradient alone, decay included
            weight = weights["4"]
            assert weight.grad is not None
            grown = ~everything_before
            expected = weight.grad[grown]
            torch.testing.assert_close(buffer[grown], expected)
            assert buffer[~grown].eq(0).all()
            seen.append(int(grown.sum()))
        return False

    everything_before = everything["4"].clone()
    recipe = Recipe(epochs=1, batch_size=64, lr=0.1, weight_decay=0.0, nesterov=False, augment=False)
    MaskedTraining(masks=everything, change=change, reads_gradients=lambda _: False)(model, context(recipe), recipe)
    assert seen == [1080]


def test_forget_zeroes_every_memory_of_that_shape() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    where = torch.tensor([[True, False, True], [False] * 3])
    masks.forget(optimizer, weight, where)
    for key in ("exp_avg", "exp_avg_sq"):
        value = optimizer.state[weight][key]
        assert value[where].eq(0).all()
        assert value[~where].ne(0).all()
    masks.forget(optimizer, nn.Parameter(torch.ones(2, 3)), where)


def test_hooks_are_removed_where_training_fails() -> None:
    model = network()
    kept = masks.random_masks(prunable_weights(model), 0.5, "layer", 0)

    def change(step: Step, _: Masks) -> bool:
        raise Unsupported("stop")

    with pytest.raises(Unsupported, match="stop"):
        MaskedTraining(masks=kept, change=change)(model, context(RECIPES["plain"]), RECIPES["plain"])
    assert all(not weight._post_accumulate_grad_hooks for weight in prunable_weights(model).values())


def test_reasons() -> None:
    nothing = bare(1)
    with pytest.raises(Unsupported, match=r"^it=1 needs a task with training data$"):
        training(nothing, "it=1")
    with pytest.raises(Unsupported, match="needs a network that can be trained from scratch"):
        from_scratch(context(RECIPES["plain"]))
    with pytest.raises(Unsupported, match="training data"):
        from_scratch(nothing)
    with pytest.raises(Unsupported, match="training data"):
        MaskedTraining(masks={})(network(), nothing, RECIPES["plain"])
    with pytest.raises(Unsupported, match=r"sparsity 0.9999 \(layer\) would zero all 4 weights of layer '1'; lower it"):
        masks.refuse_unaffordable(tensors([(100, 100), (1, 4)]), 0.9999, "layer")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 32, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0][:, -1])
        return out


def test_weights_that_a_method_does_not_reach_are_said() -> None:
    said: list[str] = []
    model = Recurrent()
    Magnitude(sparsity=0.5).compress(model, bare(12, 8, warn=said.append))
    assert len(said) == 1
    assert said[0].startswith("reaches 3.0% of the model's weights; rnn.weight_hh_l0 (LSTM, 4,096 weights)")
    Magnitude(sparsity=0.5).compress(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), bare(8, warn=said.append))
    assert len(said) == 1
