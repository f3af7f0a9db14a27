"""N:M sparsity: the pattern along the layout stated, and which layers have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from harness import registry
from harness.errors import SpecError, Unsupported
from harness.testing.networks import reference
from methods.layers.prunable import prunable_weights
from methods.pruning.n_m import NM, keep_n_of_m
from tests.unit.contexts import bare, fit_of, refusal

pytestmark = pytest.mark.usefixtures("one_thread")


def groups(weight: Tensor, m: int) -> Tensor:
    """By hand: m consecutive entries of dimension 1, for every output and kernel position."""
    rows = weight.detach().flatten(2).transpose(1, 2) if weight.ndim > 2 else weight.detach()
    return rows.reshape(-1, m)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))), st.integers(1, 4))
def test_the_largest_n_of_every_m_stay_in_linear_layers(pattern: tuple[int, int], repeats: int) -> None:
    n, m = pattern
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(repeats * m, 5))
    pruned = NM(n=n, m=m).compress(model, bare(8, 6, 6))[0].weight
    for before, after in zip(model[0].weight.reshape(-1, m), pruned.reshape(-1, m), strict=True):
        largest = before.abs().topk(n).indices
        assert set(after.nonzero().flatten().tolist()) == set(largest.tolist())
        assert torch.equal(after[largest], before[largest])


@pytest.mark.parametrize("kernel", [1, 3])
def test_in_convolutions_a_group_is_consecutive_input_channels_at_one_kernel_position(kernel: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 6, kernel), nn.Conv2d(6, 8, kernel))
    pruned = NM(n=1, m=4).compress(model, bare(8, 6, 6))
    before, after = model[0].weight, pruned[0].weight
    for out in range(6):
        for first in (0, 4):
            for y in range(kernel):
                for x in range(kernel):
                    group = after[out, first : first + 4, y, x]
                    assert int((group != 0).sum()) == 1
                    assert group.abs().max() == before[out, first : first + 4, y, x].abs().max()
    assert torch.equal(pruned[1].weight, model[1].weight)


def test_grouped_and_transposed_convolutions_have_their_input_dimension_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, groups=8),  # depthwise: one input channel a group
        nn.ConvTranspose2d(8, 4, 3, groups=2),
        nn.Conv1d(12, 2, 5),
    )
    pruned = NM().compress(model, bare(8, 6, 6))
    assert ((groups(pruned[0].weight, 4) != 0).sum(1) == 2).all()
    assert torch.equal(pruned[1].weight, model[1].weight)
    # (in, out / groups, ...): two groups of four inputs each.
    transposed = pruned[2].weight.detach()
    assert transposed.shape == (8, 2, 3, 3)
    assert ((transposed.reshape(2, 4, -1) != 0).sum(1) == 2).all()
    assert ((groups(pruned[3].weight, 4) != 0).sum(1) == 2).all()


def test_of_equal_magnitudes_the_later_stay() -> None:
    kept = keep_n_of_m(torch.ones(1, 8), 2, 4)
    assert kept.tolist() == [[False, False, True, True] * 2]


def test_layers_that_do_not_fit_stay_dense_and_are_named() -> None:
    messages: list[str] = []
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    pruned = NM().compress(model, bare(8, 6, 6, progress=lambda fraction, message: messages.append(message)))
    assert torch.equal(pruned[0].weight, model[0].weight)
    assert "left dense: 0 (its input dimension of 3 is not a multiple of 4)" in messages[0]
    assert "2 50.0%" in messages[0]


def test_a_model_too_small_for_the_pattern_is_a_reason_that_names_layers_and_sizes() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2))
    reason = refusal(NM(), model, bare(8, 6, 6))
    assert reason is not None
    for part in ("2:4", "'0' has 6", "'2' has 3", "multiple of 4"):
        assert part in reason
    with pytest.raises(Unsupported, match="2:4"):
        NM().compress(model, bare(8, 6, 6))
    assert "no convolution" in (refusal(NM(), nn.ReLU(), bare(8, 6, 6)) or "")


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"n": 4, "m": 4}, "4:4"),
        ({"n": 5, "m": 4}, "5:4"),
        ({"n": 0}, "n"),
        ({"n": 1, "m": 1}, "m"),
        ({"n": -1}, "n"),
        ({"permutation": True}, "permutation"),
    ],
)
def test_patterns_that_prune_nothing_or_everything_are_refused(parameters: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        registry.create("method", "methods.pruning.n_m:NM", parameters)


def test_finetuning_keeps_the_pattern_and_scales_the_learning_rate() -> None:
    network = reference("perceptron")
    rates: list[float] = []
    fit = fit_of(network.context())

    def training(model: nn.Module, recipe: Any, **hooks: Any) -> Any:
        rates.append(recipe.lr)
        return fit(model, recipe, **hooks)

    given_context = network.context(fit=training)
    plain = NM().compress(network.model, given_context)
    tuned = NM(finetune_epochs=1, finetune_lr_scale=0.5).compress(network.model, given_context)
    assert rates == [0.5 * network.recipe.lr]
    for name in ("fc1", "fc2", "fc3"):
        before, after = prunable_weights(plain)[name], prunable_weights(tuned)[name]
        assert torch.equal(before == 0, after == 0)
        assert not torch.equal(before, after)
    assert "finetune_epochs=1 needs" in (refusal(NM(finetune_epochs=1), network.model, bare(8, 6, 6)) or "")
