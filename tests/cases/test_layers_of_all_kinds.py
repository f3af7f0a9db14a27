"""Recurrent layers, norms and parametrizations: counted, folded, baked in, and what a method does not reach is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from harness.measure import counts
from harness.reference import _probe, mixing_layers
from tests.cases.given import Given, compressed, deployed, drawn

STEPS, WIDTH, HIDDEN = 6, 8, 16


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(WIDTH, HIDDEN, batch_first=True, **options)
        width = (options.get("proj_size") or HIDDEN) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.rnn(x)[0][:, -1])


class Cells(nn.Module):
    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell, self.head = kind(WIDTH, HIDDEN), nn.Linear(HIDDEN, 5)  # type: ignore[call-arg]

    def forward(self, x: torch.Tensor) -> Any:
        zero = x.new_zeros(x.shape[0], HIDDEN)
        state: Any = (zero, zero) if isinstance(self.cell, nn.LSTMCell) else zero
        for step in range(STEPS):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Queries(nn.Module):
    """Detection transformers' way: learnt queries, expanded over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.first = nn.Parameter(torch.randn(3, WIDTH)), nn.Linear(WIDTH, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 2, 1, 1, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> Any:
        queries = self.first(self.queries.unsqueeze(0).expand(x.shape[0], -1, -1))
        return self.head(self.transformer(x, queries).mean(1))


def macs(model: nn.Module) -> int:
    torch.manual_seed(0)
    task = drawn(model, STEPS, WIDTH)
    return counts.macs(task.model(0), next(iter(task.test().batches(8))).inputs, task.signature)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: Recurrent(nn.LSTM, bidirectional=True), STEPS * 2 * 4 * 16 * (8 + 16) + 32 * 5),
        (lambda: Recurrent(nn.LSTM, proj_size=7), STEPS * (4 * 16 * (8 + 7) + 16 * 7) + 7 * 5),
        (lambda: Recurrent(nn.GRU, num_layers=2, bias=False), STEPS * 3 * 16 * (8 + 16 + 16 + 16) + 16 * 5),
        (lambda: Recurrent(nn.RNN, nonlinearity="relu"), STEPS * 16 * (8 + 16) + 16 * 5),
        (lambda: Cells(nn.GRUCell), STEPS * 3 * 16 * (8 + 16) + 16 * 5),
        (lambda: Cells(nn.LSTMCell), STEPS * 4 * 16 * (8 + 16) + 16 * 5),
        (
            Queries,  # first; encoder: 4 projections, 2 products, 2 of feed-forward; decoder: two attentions; head
            3 * 64
            + (6 * 4 * 64 + 2 * 6 * 6 * 8 + 6 * 2 * 128)
            + (3 * 4 * 64 + 2 * 3 * 3 * 8 + 3 * 2 * 64 + 6 * 2 * 64 + 2 * 3 * 6 * 8 + 3 * 2 * 128)
            + 40,
        ),
    ],
)
def test_every_product_is_counted(model: Any, expected: int) -> None:
    assert macs(model()) == expected


def test_weights_that_a_method_does_not_reach_are_said_and_the_label_is_that_of_the_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = drawn(Recurrent(nn.LSTM, bidirectional=True), STEPS, WIDTH)
    assert re.search(r"reaches 5.0% of the model's weights.*rnn.weight_hh_l0 \(LSTM", compressed(task, "magnitude")[1])
    quantized, warnings = compressed(task, "ptq-int8")
    assert "reaches 5.0%" in warnings
    difference, effective = deployed(task, tmp_path, quantized)
    assert difference < 1e-5
    assert effective["precision"] == "f32"
    assert effective["mac_share"]["f32"] > 0.99


def pooled(*layers: nn.Module, out: int = 8) -> nn.Module:
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(out, 4))


def registered(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


NORMALIZED: dict[str, Any] = {
    "three dimensions": (
        lambda: pooled(nn.Conv3d(2, 8, 2), nn.BatchNorm3d(8, affine=False)),
        (2, 4, 4, 4),
        "",
    ),
    "one dimension": (lambda: pooled(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8, affine=False)), (2, 9), ""),
    "orthogonal": (lambda: pooled(parametrizations.orthogonal(nn.Conv2d(2, 8, 3))), (2, 9, 9), "0.weight was param"),
    "spectral transposed": (
        lambda: pooled(parametrizations.spectral_norm(nn.ConvTranspose2d(2, 8, 3))),
        (2, 5, 5),
        "(SpectralNorm)",
    ),
    "own": (lambda: pooled(registered(nn.Conv2d(2, 8, 3))), (2, 9, 9), "0.weight was parametrized (Doubled)"),
    "old spectral": (lambda: pooled(nn.utils.spectral_norm(nn.Conv2d(2, 8, 3))), (2, 9, 9), "had spectral norm"),
    "old weight": (lambda: pooled(nn.utils.weight_norm(nn.Conv2d(2, 8, 3), dim=1)), (2, 9, 9), "had weight norm"),
    "synchronised": (lambda: pooled(nn.Conv2d(2, 8, 3), nn.SyncBatchNorm(8)), (2, 9, 9), ""),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", NORMALIZED)
def test_norms_and_parametrizations_are_folded_or_baked_in(kind: str, tmp_path: Path) -> None:
    make, shape, note = NORMALIZED[kind]
    torch.manual_seed(0)
    model = make()
    model.train()
    model(torch.randn(40, *shape))  # running statistics that are not 0 and 1
    task = drawn(model, *shape)
    assert note in task.said()
    original, x = task.model(0), next(iter(task.test().batches(8))).inputs["input"]
    with torch.no_grad():
        assert torch.allclose(original(x), model.eval()(x), atol=1e-6)
    assert deployed(task, tmp_path)[0] < 1e-5
    quantized, _ = compressed(task, "ptq-int8")
    with torch.no_grad():
        assert (quantized(x) - original(x)).abs().max() < 0.05 * original(x).abs().max()
    smaller, _ = compressed(task, "structured", ratio=0.25, round_to=1)
    assert counts.parameters(smaller)[0] < counts.parameters(original)[0]


def probed(task: Given) -> dict[str, Any]:
    inputs = next(iter(task.test().batches(40))).inputs
    return _probe(task.model(0), inputs, task.signature)


def test_norms_that_use_the_batch_in_evaluation_are_named() -> None:
    mixing = drawn(pooled(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)), 2, 9, 9)
    assert probed(mixing)["mixing"]
    assert mixing_layers(mixing.model(0)) == ["1"]
    usual = drawn(pooled(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8)), 2, 9, 9)
    assert probed(usual) == {"random": False, "mixing": False, "output_bytes": 16}
    assert mixing_layers(usual.model(0)) == []
