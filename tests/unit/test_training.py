from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from harness import metrics
from harness.contracts import Batch, Port, Signature, Step
from harness.errors import NotFinite
from harness.losses import CrossEntropy
from harness.tasks.image_data import ImageSplit, Labelled
from harness.training import Recipe, SGDTrainer, evaluate, learning_rate

SIGNATURE = Signature(inputs=(Port(name="input", shape=(2,)),), outputs=(Port(name="output", shape=(2,)),))
ACCURACY = metrics.create("accuracy")


@dataclasses.dataclass(frozen=True)
class Points:
    """Two linearly separable classes in the plane, in order."""

    size: int
    sample: int

    @property
    def identity(self) -> str:
        return f"{self.size} {self.sample}"

    def batches(self, size, *, seed=None, augment=False):
        generator = torch.Generator().manual_seed(self.sample)
        y = torch.arange(self.size) % 2
        x = torch.randn(self.size, 2, generator=generator) * 0.3 + (2.0 * y[:, None] - 1)
        order = torch.arange(self.size)
        if seed is not None:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))
        for part in order.split(size):
            yield Batch(inputs={"input": x[part]}, targets={"label": y[part]})


def trainer(data=None, seed=0, **more):
    data = data or {"train": Points(64, 0), "validation": Points(32, 1)}
    return SGDTrainer(data=data, signature=SIGNATURE, loss=CrossEntropy(), metrics=(ACCURACY,), seed=seed, **more)


def network(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2))


def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 1, 8, 8), generator=generator, dtype=torch.uint8).numpy()
    labels = (torch.arange(40) % 2).numpy()
    part = Labelled(images=pixels, labels=labels)
    return {
        "train": ImageSplit(examples=part, maximum=255, pad=1, flip=True),
        "validation": ImageSplit(examples=part.take(range(8)), maximum=255),
    }


def convolutional() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(1), nn.Linear(288, 2)
        )


def test_separable_classes_are_learnt_and_the_model_is_left_in_eval_mode():
    model = network()
    found = trainer()(model, Recipe(epochs=10, batch_size=16, lr=0.05))
    assert found["validation_accuracy"] == 1.0
    assert found["train_loss"] < 0.2
    assert not model.training


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_and_threads_give_the_same_bits(optimizer, threads):
    recipe = Recipe(epochs=2, batch_size=16, lr=0.01, optimizer=optimizer)
    states = []
    for _ in range(2):
        model = convolutional()
        torch.rand(3)  # the global random state differs between the two runs
        trainer(images(), seed=3, threads=threads)(model, recipe)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_another_seed_gives_other_weights():
    recipe = Recipe(epochs=1, batch_size=16, lr=0.01)
    weights = []
    for seed in (0, 1):
        model = convolutional()
        trainer(images(), seed=seed)(model, recipe)
        weights.append(model[0].weight.detach().clone())
    assert not torch.equal(*weights)


def test_global_state_is_restored():
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    trainer(threads=1)(network(dropout=0.5), Recipe(epochs=1))
    assert torch.equal(torch.rand(4), expected)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_weights_are_contiguous_afterwards():
    model = convolutional()
    trainer(images())(model, Recipe(epochs=1, batch_size=16, lr=0.01))
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

    trainer()(model, Recipe(epochs=3, batch_size=16, lr=0.05), after_step=keep)
    assert calls == [False] * 12
    assert steps == [(i, 12, i // 4, i % 4 == 3) for i in range(12)]
    assert torch.all(model[0].weight[3:] == 0)
    assert torch.any(model[0].weight[:3] != 0)


def test_a_given_objective_replaces_the_loss():
    model = network()
    before = model[4].bias.detach().clone()
    found = trainer()(
        model,
        Recipe(epochs=1, batch_size=64, lr=0.1, schedule="constant", weight_decay=0.0),
        objective=lambda net, batch: (net[4].bias * torch.tensor([1.0, -2.0])).sum(),
    )
    # One Nesterov step from rest moves by lr * (1 + momentum) * gradient.
    expected = before - 0.1 * 1.9 * torch.tensor([1.0, -2.0])
    torch.testing.assert_close(model[4].bias.detach(), expected)
    assert found["train_loss"] == pytest.approx(float(before[0] - 2 * before[1]))


def test_weight_decay_spares_biases_and_normalisation():
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    recipe = Recipe(epochs=1, batch_size=64, lr=0.1, schedule="constant", weight_decay=0.5)
    trainer()(model, recipe, objective=lambda net, batch: sum(p.sum() for p in net.parameters()) * 0.0)
    for name, p in model.named_parameters():
        expected = 1.0 - 0.1 * 1.9 * 0.5 if name in ("0.weight", "4.weight") else 1.0
        torch.testing.assert_close(p.detach(), torch.full_like(p, expected))


def test_a_loss_that_is_not_finite_names_the_epoch():
    def poisoned(net, batch):
        return net(batch.inputs["input"]).sum() * (math.nan if next(count) >= 5 else 0.0)

    count = iter(range(100))
    with pytest.raises(NotFinite, match="epoch 2 of 3"):
        trainer()(network(), Recipe(epochs=3, batch_size=16), objective=poisoned)


def test_no_epochs_train_nothing_and_report_no_loss():
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = trainer()(model, Recipe(epochs=0))
    assert set(found) == {"validation_accuracy"}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_progress_grows_to_one():
    seen = []
    trainer(progress=lambda fraction, message: seen.append((fraction, message)))(
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


def test_evaluate_scores_uneven_batches_and_restores_every_mode():
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9)).train()
    model[0].eval()
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1])]
    labels = torch.tensor([0, 1, 1, 0, 2])
    batches = [
        Batch(inputs={"input": logits[part]}, targets={"label": labels[part]}) for part in (slice(4), slice(4, None))
    ]
    assert evaluate(model, batches, SIGNATURE, [ACCURACY]) == {"accuracy": 3 / 5}
    assert model.training
    assert not model[0].training


def test_evaluate_refuses_outputs_that_are_not_finite():
    batches = [
        Batch(inputs={"input": torch.full((2, 2), value)}, targets={"label": torch.zeros(2, dtype=torch.int64)})
        for value in (1.0, math.inf)
    ]
    with pytest.raises(NotFinite, match="examples 2 to 3"):
        evaluate(nn.Identity(), batches, SIGNATURE, [ACCURACY])


def test_a_lone_last_example_joins_the_batch_before_it_and_that_is_said():
    said, sizes = [], []

    def noted(net, batch):
        sizes.append(len(batch))
        return net(batch.inputs["input"]).sum() * 0.0

    data = {"train": Points(65, 0)}
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    ends = []
    trainer(data, say=said.append)(
        model, Recipe(epochs=2, batch_size=16), objective=noted, after_step=lambda step: ends.append(step.epoch_end)
    )
    assert sizes == [16, 16, 16, 17] * 2
    assert ends == [False, False, False, True] * 2
    assert len(said) == 1
    assert "one example of 65" in said[0]


def test_other_sizes_are_left_as_they_are():
    said = []
    trainer({"train": Points(66, 0)}, say=said.append)(
        nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), Recipe(epochs=1, batch_size=16)
    )
    assert not said


def test_models_with_several_named_inputs_are_trained():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

        def forward(self, ids, mask):
            return {"logits": self.head((self.table(ids) * mask[..., None]).mean(1))}

    class Ids:
        size, identity = 20, "ids"

        def batches(self, size, *, seed=None, augment=False):
            ids = (torch.arange(20)[:, None] * torch.tensor([1, 3])) % 7
            for part in torch.arange(20).split(size):
                yield Batch(
                    inputs={"mask": torch.ones(len(part), 2), "ids": ids[part]},
                    targets={"label": (ids[part, 0] > 3).long()},
                )

    signature = Signature(
        inputs=(Port(name="ids", shape=(2,), dtype="int64", values=7), Port(name="mask", shape=(2,))),
        outputs=(Port(name="logits", shape=(2,)),),
    )
    found = SGDTrainer(
        data={"train": Ids(), "validation": Ids()},
        signature=signature,
        loss=CrossEntropy(),
        metrics=(ACCURACY,),
        seed=0,
    )(Two(), Recipe(epochs=80, batch_size=10, lr=0.5))
    assert found["validation_accuracy"] == 1.0
