"""Multiply-accumulates and parameters, against counts by hand."""

from __future__ import annotations

import torch
from torch import nn

from harness.measure import counts


def test_a_convolution_and_a_linear_layer_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 10)).eval()
    assert counts.macs(model, torch.zeros(2, 3, 5, 5)) == 8 * 3 * 9 * 25 + 8 * 25 * 10
    with torch.no_grad():
        model[0].weight[0] = 0
    assert counts.parameters(model) == (8 * 27 + 8 + 2000 + 10, 8 * 27 + 8 + 2000 + 10 - 27)


def test_attention_counts_all_its_products_in_eval_mode() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mixed: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
            return mixed

    tokens, width = 7, 16
    before = torch.backends.mha.get_fastpath_enabled()
    projections, products = 4 * tokens * width * width, 2 * tokens * tokens * width
    assert counts.macs(Block().eval(), torch.zeros(2, tokens, width)) == projections + products
    assert torch.backends.mha.get_fastpath_enabled() == before
