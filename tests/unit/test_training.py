from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from harness.contracts import Step
from harness.errors import NotFinite
from harness.tasks.image_data import ImageData, Labelled
from harness.training import Recipe, SGDTrainer, evaluate, learning_rate


class Points:
    """Two linearly separable classes in the plane, in order, 64 for training and 32 for validation."""

    train_size = 64
    validation_size = 32

    def _points(self, size: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        y = torch.arange(size) % 2
        x = torch.randn(size, 2, generator=generator) * 0.3 + (2.0 * y[:, None] - 1)
        return x, y

    def train(self, batch_size, *, seed, shuffle=True, augment=True):
        x, y = self._points(64, 0)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed)) if shuffle else torch.arange(64)
        for start in range(0, 64, batch_size):
            part = order[start : start + batch_size]
            yield x[part], y[part]

    def validation(self, batch_size):
        yield self._points(32, 1)


def network(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2))


def images() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 1, 8, 8), generator=generator, dtype=torch.uint8).numpy()
    labels = (torch.arange(40) % 2).numpy()
    part = Labelled(images=pixels, labels=labels)
    return ImageData(training=part, validating=part.take(range(8)), maximum=255, pad=1, flip=True)


def convolutional() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(1), nn.Linear(288, 2)
        )


def test_separable_classes_are_learnt_and_the_model_is_left_in_eval_mode():
    model = network()
    metrics = SGDTrainer(data=Points(), seed=0)(model, Recipe(epochs=10, batch_size=16, lr=0.05))
    assert metrics["validation_accuracy"] == 1.0
    assert metrics["train_loss"] < 0.2
    assert not model.training


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_and_threads_give_the_same_bits(optimizer, threads):
    recipe = Recipe(epochs=2, batch_size=16, lr=0.01, optimizer=optimizer)
    states = []
    for _ in range(2):
        model = convolutional()
        torch.rand(3)  # the global random state differs between the two runs
        SGDTrainer(data=images(), seed=3, threads=threads)(model, recipe)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_another_seed_gives_other_weights():
    recipe = Recipe(epochs=1, batch_size=16, lr=0.01)
    weights = []
    for seed in (0, 1):
        model = convolutional()
        SGDTrainer(data=images(), seed=seed)(model, recipe)
        weights.append(model[0].weight.detach().clone())
    assert not torch.equal(*weights)


def test_global_state_is_restored():
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    SGDTrainer(data=Points(), seed=0, threads=1)(network(dropout=0.5), Recipe(epochs=1))
    assert torch.equal(torch.rand(4), expected)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_weights_are_contiguous_afterwards():
    model = convolutional()
    SGDTrainer(data=images(), seed=0)(model, Recipe(epochs=1, batch_size=16, lr=0.01))
    assert all(p.is_contiguous() for p in model.parameters())


def test_masks_applied_after_each_step_hold():
    model = network()
    mask = torch.zeros(8, 2)
    mask[:3] = 1
    calls, steps = [], []

    def keep(step: Step) -> None:
        calls.append(torch.is_grad_enabled())
        assert step.model is model
        steps.append((step.index, step.steps, step.epoch, step.epoch_end))
        model[0].weight.mul_(mask)

    SGDTrainer(data=Points(), seed=0)(model, Recipe(epochs=3, batch_size=16, lr=0.05), after_step=keep)
    assert calls == [False] * 12
    assert steps == [(i, 12, i // 4, i % 4 == 3) for i in range(12)]
    assert torch.all(model[0].weight[3:] == 0)
    assert torch.any(model[0].weight[:3] != 0)


def test_a_given_loss_replaces_the_cross_entropy():
    model = network()
    before = model[4].bias.detach().clone()
    metrics = SGDTrainer(data=Points(), seed=0)(
        model,
        Recipe(epochs=1, batch_size=64, lr=0.1, schedule="constant", weight_decay=0.0),
        loss=lambda net, x, y: (net[4].bias * torch.tensor([1.0, -2.0])).sum(),
    )
    # One Nesterov step from rest moves by lr * (1 + momentum) * gradient.
    expected = before - 0.1 * 1.9 * torch.tensor([1.0, -2.0])
    torch.testing.assert_close(model[4].bias.detach(), expected)
    assert metrics["train_loss"] == pytest.approx(float(before[0] - 2 * before[1]))


def test_weight_decay_spares_biases_and_normalisation():
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    recipe = Recipe(epochs=1, batch_size=64, lr=0.1, schedule="constant", weight_decay=0.5)
    SGDTrainer(data=Points(), seed=0)(
        model, recipe, loss=lambda net, x, y: sum(p.sum() for p in net.parameters()) * 0.0
    )
    for name, p in model.named_parameters():
        expected = 1.0 - 0.1 * 1.9 * 0.5 if name in ("0.weight", "4.weight") else 1.0
        torch.testing.assert_close(p.detach(), torch.full_like(p, expected))


def test_a_loss_that_is_not_finite_names_the_epoch():
    def poisoned(net, x, y):
        return net(x).sum() * (math.nan if next(count) >= 5 else 0.0)

    count = iter(range(100))
    with pytest.raises(NotFinite, match="epoch 2 of 3"):
        SGDTrainer(data=Points(), seed=0)(network(), Recipe(epochs=3, batch_size=16), loss=poisoned)


def test_no_epochs_train_nothing_and_report_no_loss():
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    metrics = SGDTrainer(data=Points(), seed=0)(model, Recipe(epochs=0))
    assert set(metrics) == {"validation_accuracy"}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_progress_grows_to_one():
    seen = []
    SGDTrainer(data=Points(), seed=0, progress=lambda fraction, message: seen.append((fraction, message)))(
        network(), Recipe(epochs=3, batch_size=2, lr=0.01)
    )
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert len(fractions) > 3


@pytest.mark.parametrize("steps", [5, 100, 1719])
def test_onecycle_rises_linearly_to_the_peak_and_falls_linearly_to_zero(steps):
    recipe = Recipe(epochs=1, lr=0.3)
    rates = [learning_rate(recipe, step, steps) for step in range(steps)]
    peak = round(0.2 * steps) - 1
    assert max(rates) == pytest.approx(0.3)
    assert rates[peak] == pytest.approx(0.3)
    assert all(b > a for a, b in pairwise(rates[: peak + 1]))
    assert 0 < rates[-1] <= 0.3 / (steps - peak - 1) + 1e-12
    falls = [a - b for a, b in pairwise(rates[peak + 1 :])]
    assert max(falls) == pytest.approx(min(falls))


def test_cosine_and_constant_schedules():
    cosine = Recipe(epochs=1, lr=0.2, schedule="cosine")
    assert learning_rate(cosine, 0, 100) == pytest.approx(0.2)
    assert learning_rate(cosine, 50, 100) == pytest.approx(0.1)
    assert 0 < learning_rate(cosine, 99, 100) < 1e-3
    assert learning_rate(Recipe(epochs=1, lr=0.2, schedule="constant"), 99, 100) == 0.2


def test_evaluate_counts_over_uneven_batches_and_restores_the_mode():
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9)).train()
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1])]
    labels = torch.tensor([0, 1, 1, 0, 2])
    batches = [(logits[:4].numpy(), labels[:4].numpy()), (logits[4:], labels[4:])]
    assert evaluate(model, batches) == (3, 5)
    assert model.training


def test_evaluate_refuses_outputs_that_are_not_finite():
    with pytest.raises(NotFinite, match="examples 2 to 3"):
        evaluate(nn.Identity(), [(torch.ones(2, 2), torch.zeros(2)), (torch.full((2, 2), math.inf), torch.zeros(2))])
