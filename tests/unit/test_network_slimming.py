"""Network slimming: the penalty's subgradient, the threshold, the guard, the surgery."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.testing.networks import reference
from methods.pruning.network_slimming import NetworkSlimming
from tests.unit.contexts import NOTHING, context, labelled, refusal

GIVEN = "residual"


def scales(model: nn.Module) -> torch.Tensor:
    return torch.cat([m.weight.detach() for m in model.modules() if isinstance(m, _BatchNorm)])


def test_the_penalty_adds_lambda_times_the_sign() -> None:
    model = reference(GIVEN).fresh().eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.linspace(-1, 1, 16))
        model.bn2.weight[0] = 0.0
    given = context(GIVEN)
    batch = next(iter(given.data["validation"].batches(20)))
    weights = [m.weight for m in model.modules() if isinstance(m, _BatchNorm)]
    plain = torch.autograd.grad(given.objective(0.1)(model, batch), weights)
    penalised = NetworkSlimming(penalty=0.25)._penalised(model, given, 0.1)
    found = torch.autograd.grad(penalised(model, batch), weights)
    for before, after, weight in zip(plain, found, weights, strict=True):
        torch.testing.assert_close(after - before, 0.25 * weight.sign())


def test_training_with_the_penalty_shrinks_the_scales() -> None:
    given = reference(GIVEN)
    seen: dict[float, float] = {}
    for penalty in (0.0, 0.02):
        model = NetworkSlimming(ratio=0, penalty=penalty, sparse_epochs=2, finetune_epochs=0, sparse_lr_scale=1.0)
        seen[penalty] = scales(model.compress(given.model, context(GIVEN, epochs=4))).abs().mean().item()
    assert seen[0.02] < 0.8 * seen[0.0]


def test_one_threshold_for_the_whole_network() -> None:
    given = reference(GIVEN)
    model = given.fresh()
    with torch.no_grad():
        # 24 inner channels, and 16 of the residual stream that two normalisations scale.
        model.bn1.weight.copy_(torch.linspace(0.1, 2.4, 24))
        model.norm.weight.copy_(torch.linspace(0.05, 0.8, 16))
        model.bn2.weight.copy_(-torch.linspace(0.05, 0.8, 16))
    method = NetworkSlimming(ratio=0.5, sparse_epochs=0, finetune_epochs=0)
    smaller = method.compress(model, context(GIVEN, epochs=4))
    values = torch.cat([model.bn1.weight, model.norm.weight]).abs()
    threshold = values.sort().values[20]
    torch.testing.assert_close(smaller.bn1.weight, model.bn1.weight[model.bn1.weight >= threshold])
    torch.testing.assert_close(smaller.norm.weight, model.norm.weight[model.norm.weight >= threshold])
    torch.testing.assert_close(smaller.bn2.weight, model.bn2.weight[model.norm.weight >= threshold])
    assert smaller.conv2.weight.shape == (len(smaller.norm.weight), len(smaller.bn1.weight), 3, 3)


def test_no_layer_is_pruned_away() -> None:
    model = reference(GIVEN).fresh()
    with torch.no_grad():
        model.bn1.weight.fill_(1e-6)
    smaller = NetworkSlimming(ratio=0.9, sparse_epochs=0, finetune_epochs=0, min_channels=2).compress(
        model, context(GIVEN, epochs=4)
    )
    assert len(smaller.bn1.weight) == 2
    assert smaller.conv1.out_channels == 2


@pytest.mark.parametrize("from_scratch", [False, True])
def test_the_whole_method_keeps_its_accuracy(from_scratch: bool) -> None:
    given = reference(GIVEN)
    method = NetworkSlimming(
        ratio=0.4, sparse_epochs=4, from_scratch=from_scratch, finetune_epochs=4, finetune_lr_scale=0.5
    )
    smaller = method.compress(given.model, context(GIVEN, epochs=4))
    assert sum(p.numel() for p in smaller.parameters()) < 0.7 * sum(p.numel() for p in given.model.parameters())
    with torch.no_grad():
        right = [(smaller(x).argmax(1) == y).float() for x, y in labelled(given, 500)]
    assert torch.cat(right).mean() > 0.85


def test_unsupported() -> None:
    slimming = NetworkSlimming()
    assert "passes a batch normalisation" in str(
        refusal(slimming, reference("perceptron").model, context(GIVEN, epochs=4))
    )
    model = reference(GIVEN).model
    assert "sparse_epochs=1 needs a task with training data" in str(
        refusal(slimming, model, context(GIVEN, epochs=4, **NOTHING))
    )
    assert "trained from scratch" in str(
        refusal(NetworkSlimming(from_scratch=True), model, context(GIVEN, epochs=4, fresh=None))
    )
    assert "nothing to rank" in str(
        refusal(NetworkSlimming(from_scratch=True, sparse_epochs=0), model, context(GIVEN, epochs=4))
    )
    assert "cannot be reached" in str(refusal(NetworkSlimming(ratio=0.99), model, context(GIVEN, epochs=4)))
