"""SparseGPT: its updates against brute force and a closed form, its masks, and what it gains over Wanda."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import registry
from harness.contracts import Context
from harness.errors import SpecError, Unsupported
from harness.testing.networks import reference
from methods.layers.activations import columns, matrix
from methods.layers.prunable import prunable_weights
from methods.pruning.magnitude import Magnitude
from methods.pruning.sparsegpt import SparseGPT, hessian, optimal_brain_surgeon
from methods.pruning.wanda import Wanda
from tests.unit.contexts import bare, ordered, refusal

pytestmark = pytest.mark.usefixtures("one_thread")


def correlated(features: int, count: int, seed: int = 0) -> Tensor:
    """float64 (features, count) with a full, far from diagonal, covariance."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return mix @ torch.randn(features, count, generator=generator, dtype=torch.float64)


def chain(features: int, count: int) -> Tensor:
    """float64 (features, count) in which neighbouring features correlate by 0.9."""
    x = torch.randn(features, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(1, features):
        x[i] = 0.9 * x[i - 1] + (1 - 0.9**2) ** 0.5 * x[i]
    return x


def weights(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def damped(h: Tensor, dampening: float = 0.01) -> Tensor:
    return h + dampening * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def test_where_all_removed_columns_come_first_the_update_is_the_exact_least_squares_solution() -> None:
    x = correlated(12, 200)
    h = x @ x.T
    w = weights(4, 12)
    w[:, :5] *= 1e-4  # small enough that the mask takes these in every row
    values, mask = optimal_brain_surgeon(w[None], h[None], sparsity=5 / 12)
    expected = torch.zeros(4, 12, dtype=torch.bool)
    expected[:, 5:] = True
    assert torch.equal(mask[0], expected)
    # argmin over v with v[:5] = 0 of (w - v) H (w - v)
    d = damped(h)
    best = w[:, 5:] + (w[:, :5] @ d[:5, 5:]) @ torch.linalg.inv(d[5:, 5:])
    torch.testing.assert_close(values[0, :, 5:], best, rtol=1e-9, atol=1e-12)
    assert torch.equal(values[0, :, :5], torch.zeros(4, 5, dtype=torch.float64))


@pytest.mark.parametrize("block", [1, 3, 4, 16])
def test_updates_are_optimal_brain_surgeons_column_by_column(block: int) -> None:
    # Brute force: per column, invert the Hessian of the columns not yet fixed, and apply Hassibi & Stork's formula.
    k, rows = 11, 6
    x = correlated(k, 150, seed=2)
    w = weights(rows, k, seed=3)
    values, mask = optimal_brain_surgeon(w[None], (x @ x.T)[None], sparsity=0.55, block=block)
    h, expected = damped(x @ x.T), w.clone()
    for j in range(k):
        inverse = torch.linalg.inv(h[j:, j:])
        for r in range(rows):
            if not mask[0, r, j]:
                expected[r, j:] -= expected[r, j] / inverse[0, 0] * inverse[0]
    expected[~mask[0]] = 0
    torch.testing.assert_close(values[0], expected, rtol=1e-8, atol=1e-10)
    assert int((values == 0).sum()) == round(0.55 * k * rows)


def test_the_mask_takes_what_costs_least_in_each_block_at_its_time() -> None:
    k, rows, block = 8, 5, 4
    x = correlated(k, 100, seed=4)
    w = weights(rows, k, seed=5)
    _, mask = optimal_brain_surgeon(w[None], (x @ x.T)[None], sparsity=0.5, block=block)
    h, now = damped(x @ x.T), w.clone()
    for first in range(0, k, block):
        # The cost of removing column j once all before it are fixed, with the weights as the earlier blocks left them.
        cost = torch.stack(
            [now[:, j] ** 2 / torch.linalg.inv(h[j:, j:])[0, 0] for j in range(first, first + block)], dim=1
        )
        lowest = cost.flatten().argsort()[: rows * block // 2]
        expected = torch.ones(rows * block, dtype=torch.bool).index_fill_(0, lowest, False).view(rows, block)
        assert torch.equal(mask[0, :, first : first + block], expected)
        for j in range(first, first + block):
            inverse = torch.linalg.inv(h[j:, j:])
            error = now[:, j].masked_fill(mask[0, :, j], 0.0) / inverse[0, 0]
            now[:, j:] -= error[:, None] * inverse[0]


def reconstruction(layer: Any, pruned: Any, x: Tensor) -> float:
    with torch.no_grad():
        return float((layer(x) - pruned(x)).square().sum())


@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"sparsity": 0.8}, {"n": 2, "m": 4}], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_on_correlated_inputs_it_reconstructs_better_than_wanda_and_magnitude(
    kind: str, amount: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    if kind == "linear":
        layer: Any = nn.Linear(64, 32)
        x = chain(64, 256).T.float()
    else:
        layer = nn.Conv2d(16, 12, 3, padding=1, groups=2 if kind == "grouped" else 1)
        x = torch.nn.functional.avg_pool2d(chain(16, 8 * 144).view(16, 8, 12, 12).transpose(0, 1), 3, 1, 1).float()
    model = nn.Sequential(layer)
    given = context(x)
    sparse = SparseGPT(**amount).compress(model, given)
    wanda = Wanda(**amount).compress(model, given)
    error = reconstruction(model, sparse, x)
    assert error < 0.8 * reconstruction(model, wanda, x)
    if "n" not in amount:
        magnitude = Magnitude(sparsity=amount["sparsity"], scope="layer").compress(model, given)
        assert error < 0.8 * reconstruction(model, magnitude, x)


def test_blocks_do_not_change_what_the_updates_do_for_a_given_mask() -> None:
    # With a pattern the choice depends on the columns before it alone, so blocks are only a way to compute.
    x = correlated(24, 300, seed=6)
    w = weights(2, 5, 24, seed=7)
    h = torch.stack([x @ x.T, correlated(24, 300, seed=8) @ correlated(24, 300, seed=8).T])
    one = optimal_brain_surgeon(w, h, sparsity=0.5, pattern=(2, 4), block=24)
    for block in (4, 8, 20):
        other = optimal_brain_surgeon(w, h, sparsity=0.5, pattern=(2, 4), block=block)
        assert torch.equal(one[1], other[1])
        torch.testing.assert_close(one[0], other[0], rtol=1e-9, atol=1e-12)
    assert ((one[0].reshape(2, 5, 6, 4) != 0).sum(-1) == 2).all()


def test_groups_are_pruned_by_their_own_hessians_and_compared_with_one_another() -> None:
    xs = [correlated(6, 80, seed=seed) for seed in (9, 10)]
    w = weights(2, 3, 6, seed=11)
    h = torch.stack([x @ x.T for x in xs])
    values, mask = optimal_brain_surgeon(w, h, sparsity=0.5)
    assert int((values == 0).sum()) == 18
    for g in range(2):
        alone, _ = optimal_brain_surgeon(w[g : g + 1], h[g : g + 1], sparsity=float((~mask[g]).double().mean()))
        torch.testing.assert_close(alone[0], values[g], rtol=1e-9, atol=1e-12)


def test_inputs_that_are_always_zero_go_first_and_nothing_breaks() -> None:
    x = correlated(8, 60, seed=12)
    x[2] = 0
    x[5] = 0
    w = weights(3, 8, seed=13)
    w[:, 2] = 100.0
    values, mask = optimal_brain_surgeon(w[None], (x @ x.T)[None], sparsity=0.5)
    assert not mask[0, :, [2, 5]].any()
    assert int((values == 0).sum()) == 12
    assert torch.isfinite(values).all()
    silent, _ = optimal_brain_surgeon(w[None], torch.zeros(1, 8, 8, dtype=torch.float64), sparsity=0.5)
    assert int((silent == 0).sum()) == 12


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)], ids=str)
def test_the_hessian_is_that_of_the_layers_own_output(layer: Any) -> None:
    # Twice the squared output is a quadratic form in the weights of one row, whose matrix is 2 X X^T.
    shape = (6,) if isinstance(layer, nn.Linear) else (4, 7, 7)
    x = torch.randn(9, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer.double()
    found = hessian(layer, x)
    unit = torch.zeros_like(layer.weight)
    unit[-1] = torch.randn(unit[-1].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(unit)
        layer.bias.zero_()
        energy = layer(x)[..., -1].square().sum() if isinstance(layer, nn.Linear) else layer(x)[:, -1].square().sum()
    row = matrix(layer, unit)[-1, -1]
    torch.testing.assert_close(row @ found[-1] @ row, energy, rtol=1e-10, atol=0)
    assert sum(part.shape[-1] for part in columns(layer, x)) == (9 if isinstance(layer, nn.Linear) else 9 * 16)


def context(x: Tensor, **changes: Any) -> Context:
    return bare(*x.shape[1:], data=ordered(x), **changes)


def test_a_layer_sees_the_outputs_of_the_pruned_layers_before_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 8))
    x = correlated(20, 300).T.float()
    pruned = SparseGPT(sparsity=0.6).compress(model, context(x))
    with torch.no_grad():
        inner = pruned[1](pruned[0](x[:256]))
        dense = model[1](model[0](x[:256]))

    def expected(inputs: Tensor) -> Tensor:
        weight = model[2].weight.detach().double()[None]
        return optimal_brain_surgeon(weight, hessian(model[2], inputs), sparsity=0.6)[0][0].float()

    torch.testing.assert_close(pruned[2].weight.detach(), expected(inner), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected(inner), expected(dense), rtol=1e-2)


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_sparsity_is_exact_in_every_layer_and_zeros_are_positive_zeros(sparsity: float) -> None:
    network = reference("residual")
    pruned = SparseGPT(sparsity=sparsity, block=32).compress(network.model, network.context())
    for name, weight in prunable_weights(pruned).items():
        assert int((weight == 0).sum()) == round(sparsity * weight.numel()), name
        assert not torch.signbit(weight[weight == 0]).any()
    assert torch.equal(pruned.fc.bias, network.model.fc.bias)


def test_what_cannot_be_pruned_is_a_reason() -> None:
    model = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 3))
    given = context(torch.ones(4, 6))
    assert "training data" in (refusal(SparseGPT(), model, bare(6)) or "")
    assert "all 3 weights of layer '1'" in (refusal(SparseGPT(sparsity=0.9), model, given) or "")
    assert "its input dimension of 1" in (refusal(SparseGPT(n=2, m=4), model, given) or "")
    with pytest.raises(Unsupported, match="sparsity 0"):
        SparseGPT(sparsity=0.9).compress(model, given)
    assert "finetune_epochs=1 needs" in (refusal(SparseGPT(finetune_epochs=1), model, given) or "")
    with pytest.raises(SpecError, match="block is 130"):
        registry.create("method", "methods.pruning.sparsegpt:SparseGPT", {"n": 2, "m": 4, "block": 130})
    with pytest.raises(SpecError, match="dampening"):
        registry.create("method", "methods.pruning.sparsegpt:SparseGPT", {"dampening": 0})


def test_finetuning_keeps_the_zeros() -> None:
    network = reference("perceptron")
    given = network.context()
    plain, tuned = (SparseGPT(sparsity=0.7, finetune_epochs=epochs).compress(network.model, given) for epochs in (0, 1))
    for name, weight in prunable_weights(plain).items():
        assert torch.equal(weight == 0, prunable_weights(tuned)[name] == 0)
        assert not torch.equal(weight, prunable_weights(tuned)[name])
