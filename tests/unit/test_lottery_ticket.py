"""Lottery tickets: counts a round, rewinding, and the control."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from harness import registry
from harness.errors import SpecError, Unsupported
from harness.testing.networks import reference
from harness.training import Recipe
from methods.layers.prunable import prunable_weights
from methods.pruning.lottery_ticket import LotteryTicket
from tests.unit.contexts import NOTHING, context, fit_of, recipe_of, refusal


class Recording:
    """Trains, and keeps each training's recipe, the weights it began with and those it ended with."""

    def __init__(self, name: str = "perceptron") -> None:
        self.trainer = fit_of(context(name))
        self.recipes: list[Recipe] = []
        self.began: list[dict[str, torch.Tensor]] = []
        self.ended: list[dict[str, torch.Tensor]] = []
        self.epochs: list[list[dict[str, torch.Tensor]]] = []

    def __call__(self, model: nn.Module, recipe: Recipe, *, after_step: Any = None, objective: Any = None) -> Any:
        def copied() -> dict[str, torch.Tensor]:
            return {name: value.detach().clone() for name, value in model.state_dict().items()}

        self.recipes.append(recipe)
        self.began.append(copied())
        self.epochs.append([])

        def step(taken: Any) -> None:
            after_step(taken)
            if taken.epoch_end:
                self.epochs[-1].append(copied())

        metrics = self.trainer(model, recipe, after_step=step, objective=objective)
        self.ended.append(copied())
        return metrics


LAYERS = ("fc1.weight", "fc2.weight", "fc3.weight")


def test_each_round_prunes_the_smallest_trained_weights_and_rewinds_the_rest() -> None:
    trainer = Recording()
    given = context(fit=trainer)
    ticket = LotteryTicket(rounds=2, ratio=0.2).compress(reference("perceptron").model, given)
    initial = reference("perceptron").fresh().state_dict()
    assert len(trainer.recipes) == 3
    assert all(recipe == recipe_of(given) for recipe in trainer.recipes)
    for name, rate in zip(LAYERS, (0.2, 0.2, 0.1), strict=True):
        size = initial[name].numel()
        alive = torch.ones_like(initial[name], dtype=torch.bool)
        for number in range(3):
            began = trainer.began[number][name]
            assert torch.equal(began, torch.where(alive, initial[name], 0.0)), "rewound to the initial weights"
            if number < 2:
                trained = trainer.ended[number][name].abs().masked_fill(~alive, -1.0)
                count = round(size * (1 - rate) ** (number + 1))
                threshold = trained.flatten().sort(descending=True).values[count - 1]
                alive = trained >= threshold
                assert int(alive.sum()) == count
        assert torch.equal(ticket.state_dict()[name] != 0, alive)
    for name in ("fc1.bias", "fc2.bias", "fc3.bias"):
        assert all(torch.equal(began[name], initial[name]) for began in trainer.began)


@pytest.mark.parametrize(
    ("scope", "sparsity"),
    [("layer", 0.1), ("layer", 0.5), ("layer", 0.9), ("layer", 0.965), ("global", 0.5), ("global", 0.8)],
)
def test_sparsity_is_met_exactly_by_as_many_rounds_as_it_takes(scope: Any, sparsity: float) -> None:
    rounds: list[int] = []
    given = context(fit=lambda model, recipe, **_: rounds.append(1))
    ticket = LotteryTicket(sparsity=sparsity, scope=scope).compress(reference("perceptron").model, given)
    weights = prunable_weights(ticket).values()
    total = sum(weight.numel() for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) == round(sparsity * total)
    kept = {r: sum(round(n * (1 - x) ** r) for n, x in ((3072, 0.2), (1536, 0.2), (320, 0.1))) for r in range(40)}
    needed = next(r for r in range(40) if kept[r] <= total - round(sparsity * total))
    assert len(rounds) == needed + 1


def test_rewinding_to_an_early_epoch() -> None:
    trainer = Recording("residual")
    given = context("residual", fit=trainer)
    LotteryTicket(rounds=1, rewind_epoch=1).compress(reference("residual").model, given)
    early = trainer.epochs[0][0]
    assert [recipe.epochs for recipe in trainer.recipes] == [2, 1]
    for name, value in trainer.began[1].items():
        kept = value != 0 if value.ndim > 1 else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[kept], early[name][kept]), name
    assert not torch.equal(early["norm.running_mean"], torch.zeros(16)), "running statistics are rewound as well"


def test_the_control_has_the_same_ticket_and_other_initial_weights() -> None:
    runs = []
    for again in (False, True):
        trainer = Recording()
        LotteryTicket(rounds=1, reinitialise=again).compress(reference("perceptron").model, context(fit=trainer))
        runs.append(trainer)
    initial = reference("perceptron").fresh().state_dict()
    for name in LAYERS:
        ticket, control = (run.began[1][name] for run in runs)
        assert torch.equal(ticket != 0, control != 0)
        assert (ticket[ticket != 0] == control[ticket != 0]).double().mean() < 0.01
        assert set(control[control != 0].tolist()) <= set(initial[name].flatten().tolist())


def test_global_scope_ranks_all_but_the_output_layer_together() -> None:
    trainer = Recording()
    given = context(fit=trainer)
    ticket = LotteryTicket(rounds=1, ratio=0.5, output_ratio=0.0, scope="global").compress(
        reference("perceptron").model, given
    )
    hidden = torch.cat([trainer.ended[0][name].abs().flatten() for name in LAYERS[:2]])
    kept = torch.cat([(ticket.state_dict()[name] != 0).flatten() for name in LAYERS[:2]])
    assert int(kept.sum()) == round(3072 * 0.5) + round(1536 * 0.5)
    assert hidden[~kept].max() <= hidden[kept].min()
    assert (ticket.state_dict()["fc3.weight"] != 0).all()


def test_reasons() -> None:
    model = reference("perceptron").model
    assert "needs a task" in str(refusal(LotteryTicket(), model, context(**NOTHING)))
    assert "rewind_epoch 2 is not before the end of 2 epochs" in str(
        refusal(LotteryTicket(rewind_epoch=2), model, context())
    )
    with pytest.raises(Unsupported, match="rounds=90 would zero all 3072 weights of layer 'fc1'; lower it"):
        LotteryTicket(rounds=90).compress(model, context())
    with pytest.raises(Unsupported, match=r"sparsity 0\.99 cannot be met: output_ratio 0 keeps 320 of 4928 weights"):
        LotteryTicket(sparsity=0.99, output_ratio=0.0).compress(model, context())


@pytest.mark.parametrize(
    "values", [{"ratio": 1.0}, {"sparsity": 0.0}, {"rounds": 0}, {"rewind_epoch": -1}, {"scope": "erk"}]
)
def test_bad_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(values))):
        registry.create("method", "methods.pruning.lottery_ticket:LotteryTicket", values)
