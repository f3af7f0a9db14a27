"""Wanda: its score by definition, its comparison groups, and the inputs that each layer sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import registry
from harness.contracts import Context
from harness.errors import NotFinite, SpecError, Unsupported
from harness.testing.networks import reference
from methods.layers.activations import columns, matrix, unmatrix, untouched, visit
from methods.layers.prunable import prunable_weights
from methods.pruning.wanda import Wanda, scores
from tests.unit.contexts import bare, ordered, refusal

pytestmark = pytest.mark.usefixtures("one_thread")


def data(*shape: int, size: int = 24) -> Tensor:
    """Correlated inputs."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(size, *shape, generator=generator) * torch.rand(shape, generator=generator)


def context(x: Tensor, **changes: Any) -> Context:
    return bare(*x.shape[1:], data=ordered(x), **changes)


CONVOLUTIONS = [
    (nn.Conv2d(4, 6, 3), (4, 7, 7)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (4, 9, 8)),
    (nn.Conv2d(4, 6, 3, padding="same", groups=2), (4, 6, 6)),
    (nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="circular"), (4, 6, 6)),
    (nn.Conv1d(4, 6, 5, stride=2, padding=3, groups=2), (4, 11)),
    (nn.Linear(6, 5), (6,)),
    (nn.Linear(6, 5), (3, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=str)
def test_the_matrix_form_computes_the_layer(layer: Any, shape: tuple[int, ...]) -> None:
    x = data(*shape)
    product = torch.cat([matrix(layer, layer.weight) @ part for part in columns(layer, x)], -1)
    expected = layer(x)
    if isinstance(layer, nn.Linear):
        expected = expected.reshape(-1, 5).T
    else:
        expected = expected.transpose(0, 1).flatten(1)
        layer_bias = layer.bias[:, None]
    bias = layer.bias[:, None] if isinstance(layer, nn.Linear) else layer_bias
    torch.testing.assert_close(product.flatten(0, 1) + bias, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(unmatrix(layer, matrix(layer, layer.weight)), layer.weight)


def test_columns_in_parts_are_the_columns_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv2d(3, 2, 3), data(3, 6, 6)
    whole = list(columns(layer, x))
    monkeypatch.setattr("methods.layers.activations._UNFOLDED", 27 * 16 * 5)
    parts = list(columns(layer, x))
    assert len(whole) == 1
    assert len(parts) == 5
    assert torch.equal(torch.cat(parts, -1), whole[0])


@pytest.mark.parametrize("shape", [(6,), (3, 6)])
def test_a_linear_layers_score_is_magnitude_times_the_norm_of_its_feature(shape: tuple[int, ...]) -> None:
    layer, x = nn.Linear(6, 4), data(*shape)
    norms = x.double().reshape(-1, 6).norm(dim=0)
    torch.testing.assert_close(scores(layer, x), layer.weight.double().abs() * norms, rtol=1e-6, atol=0)


def test_a_convolutions_score_uses_what_each_kernel_weight_multiplies() -> None:
    layer, x = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2), data(4, 7, 7)
    found = scores(layer, x)
    padded = nn.functional.pad(x, (1, 1, 1, 1)).double()
    for out in range(6):
        for channel in range(2):
            for i in range(3):
                for j in range(3):
                    met = padded[:, 2 * (out // 3) + channel, i : i + 7 : 2, j : j + 7 : 2]
                    assert met.shape[1:] == (4, 4)
                    expected = layer.weight[out, channel, i, j].abs().double() * met.norm()
                    torch.testing.assert_close(found[out, channel, i, j], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8])
def test_every_row_loses_exactly_its_lowest_scores_and_nothing_else_changes(sparsity: float) -> None:
    torch.manual_seed(0)
    model, given = nn.Sequential(nn.Linear(10, 7)), data(10)
    expected = scores(model[0], given)
    pruned = Wanda(sparsity=sparsity).compress(model, context(given))[0].weight
    for row, before, score in zip(pruned, model[0].weight, expected, strict=True):
        gone = row == 0
        assert int(gone.sum()) == round(sparsity * 10)
        assert torch.equal(row[~gone], before[~gone])
        if gone.any():
            assert score[gone].max() < score[~gone].min()


def test_inputs_of_large_norm_protect_small_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 3.0]])
    given = data(2)
    given[:, 0] *= 100
    assert Wanda().compress(model, context(given))[0].weight.tolist() == [[1.0, 0.0]]


def test_a_layer_sees_the_outputs_of_the_pruned_layers_before_it() -> None:
    torch.manual_seed(0)
    model, given = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), data(6)
    pruned = Wanda(sparsity=0.8).compress(model, context(given))
    with torch.no_grad():
        inner = pruned[1](pruned[0](given))
        dense = model[1](model[0](given))

    def expected(x: Tensor) -> Tensor:
        rows = scores(model[2], x).argsort(1)[:, : round(0.8 * 8)]
        return torch.ones(4, 8, dtype=torch.bool).scatter_(1, rows, False)

    assert torch.equal(pruned[2].weight != 0, expected(inner))
    assert not torch.equal(expected(inner), expected(dense)), "the test can tell the two apart"


def test_the_pattern_lies_along_the_input_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Flatten(), nn.Linear(20, 4))
    messages: list[str] = []
    given = context(data(3, 6, 6), progress=lambda fraction, message: messages.append(message))
    pruned = Wanda(n=2, m=4).compress(model, given)
    assert torch.equal(pruned[0].weight, model[0].weight)
    assert ((pruned[2].weight.reshape(5, 2, 4, 3, 3) != 0).sum(2) == 2).all()
    assert ((pruned[4].weight.reshape(4, 5, 4) != 0).sum(2) == 2).all()
    assert any("left dense: 0 (its input dimension of 3" in message for message in messages)


class Odd(nn.Module):
    """A transposed convolution, attention within and across, a tied layer, and one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(1, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.keyed = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
        self.first = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.first.weight
        self.idle = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x[:, None]).transpose(1, 2)
        z = self.attention(y, y, y, need_weights=False)[0]
        z = self.keyed(*[self.cross(z, y, y, need_weights=False)[0]] * 3, need_weights=False)[0]
        out: Tensor = self.tied(self.first(z))
        return out.mean(1)


def test_layers_whose_inputs_are_not_seen_stay_dense_and_are_named() -> None:
    torch.manual_seed(0)
    model, messages = Odd(), []
    given = context(data(6), progress=lambda fraction, message: messages.append(message))
    assert untouched(model, bare(6)) == {
        "up": "inputs of a ConvTranspose1d are not collected",
        "cross.in_proj_weight": "its queries, keys and values come from different inputs",
        "keyed.out_proj": "attention with separate projections or added keys does not call it",
        "idle": "the model does not call it",
    }
    pruned = Wanda().compress(model, given)
    assert int((pruned.first.weight == 0).sum()) == 32
    assert pruned.first.weight is pruned.tied.weight
    for weight in (pruned.attention.in_proj_weight, pruned.keyed.in_proj_weight):
        assert ((weight == 0).sum(1) == 4).all()
    for weight in (pruned.attention.out_proj.weight, pruned.cross.out_proj.weight):
        assert ((weight == 0).sum(1) == 4).all()
    assert torch.equal(pruned.cross.in_proj_weight, model.cross.in_proj_weight)
    assert "cross.in_proj_weight (its queries" in messages[0].partition("left dense")[2]
    for name in ("up", "idle", "keyed.out_proj"):
        assert torch.equal(pruned.get_submodule(name).weight, model.get_submodule(name).weight)
        assert name in messages[0].partition("left dense")[2]


def test_visiting_restores_modes_and_leaves_no_hooks_even_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    model.train()
    model[2].eval()

    def refuse(name: str, layer: nn.Module, x: Tensor) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError):
        visit(model, {"input": torch.ones(2, 6)}, bare(6).signature, refuse)
    assert [module.training for module in model] == [True, True, False]
    assert not any(module._forward_pre_hooks for module in model)
    assert torch.backends.mha.get_fastpath_enabled()


def test_activations_that_are_not_finite_are_an_error_that_names_the_layer() -> None:
    model, given = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), data(6)
    given[3, 2] = torch.inf
    with pytest.raises(NotFinite, match="'0'"):
        Wanda().compress(model, context(given))


def test_what_cannot_be_pruned_is_a_reason() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 2))
    assert "training data" in (refusal(Wanda(), model, bare(6)) or "")
    assert "no convolution" in (refusal(Wanda(), nn.ReLU(), context(data(6))) or "")
    emptied = refusal(Wanda(sparsity=0.9), model, context(data(6))) or ""
    assert "'1'" in emptied
    assert "0.9" in emptied
    small = refusal(Wanda(n=2, m=4), model, context(data(6))) or ""
    assert "0 (its input dimension of 6" in small
    assert "1 (its input dimension of 3" in small
    assert "ConvTranspose1d" in (refusal(Wanda(), nn.ConvTranspose1d(6, 2, 3), context(data(6, 9))) or "")
    with pytest.raises(Unsupported, match="training data"):
        Wanda().compress(model, bare(6))
    alone = bare(6, data=ordered(data(6)))
    alone = replace(alone, signature=replace(alone.signature, batch=1))
    assert "batches of 1 only" in (refusal(Wanda(), model, alone) or "")
    assert "finetune_epochs=2 needs" in (refusal(Wanda(finetune_epochs=2), model, context(data(6))) or "")


@pytest.mark.parametrize("kind", ["wanda:Wanda", "sparsegpt:SparseGPT"])
@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"sparsity": 0.5, "n": 2, "m": 4}, "only one of the two"),
        ({"n": 2}, "needs both"),
        ({"m": 4}, "needs both"),
        ({"n": 4, "m": 4}, "4:4"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"examples": 0}, "examples"),
    ],
)
def test_settings_that_contradict_are_refused(kind: str, parameters: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        registry.create("method", f"methods.pruning.{kind}", parameters)


def test_finetuning_keeps_the_zeros() -> None:
    network = reference("perceptron")
    given = network.context()
    plain, tuned = (Wanda(sparsity=0.7, finetune_epochs=epochs).compress(network.model, given) for epochs in (0, 1))
    for name, weight in prunable_weights(plain).items():
        assert torch.equal(weight == 0, prunable_weights(tuned)[name] == 0)
        assert not torch.equal(weight, prunable_weights(tuned)[name])
