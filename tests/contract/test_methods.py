"""Every registered method keeps the contract, and does what it promises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import methods
from harness import registry
from harness.fakequant import QuantizedConv2d, QuantizedLinear
from harness.testing import check_method

LAYERS = (nn.Linear, nn.Conv2d)
QUANTIZED = (QuantizedConv2d, QuantizedLinear)


def same(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    for name, value in original.state_dict().items():
        assert torch.equal(compressed.state_dict()[name], value), name


def sparse(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    weights = [m.weight for m in compressed.modules() if isinstance(m, LAYERS)]
    zeros, sizes = [int((w == 0).sum()) for w in weights], [w.numel() for w in weights]
    if method.scope == "layer":
        assert zeros == [round(method.sparsity * size) for size in sizes]
    else:
        assert sum(zeros) == round(method.sparsity * sum(sizes))
    assert sum(p.numel() for p in compressed.parameters()) == sum(p.numel() for p in original.parameters())


def smaller(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    shrunk = 0
    for name, layer in original.named_modules():
        if isinstance(layer, LAYERS):
            rows, left = len(layer.weight), len(compressed.get_submodule(name).weight)
            assert left in (rows, round(rows * (1 - method.ratio))), name
            shrunk += left < rows
    assert shrunk > 0
    assert sum(p.numel() for p in compressed.parameters()) < sum(p.numel() for p in original.parameters())


def on_the_int8_grid(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    layers = [m for m in compressed.modules() if isinstance(m, QUANTIZED)]
    assert len(layers) == sum(isinstance(m, LAYERS) for m in original.modules())
    for layer in layers:
        assert layer.weight.dtype == torch.int8
        assert layer.weight.abs().amax() <= 127
        assert layer.weight.unique().numel() > 16, "the grid is used"
        scale = layer.weight_scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
        torch.testing.assert_close(layer.float_weight(), layer.weight.float() * scale, rtol=0, atol=0)


EFFECTS = {"baseline": same, "magnitude": sparse, "neuron-merging": smaller, "ptq-int8": on_the_int8_grid}

VARIANTS: list[tuple[str, Mapping[str, Any]]] = [
    ("magnitude", {"sparsity": 0.8, "scope": "layer"}),
    ("magnitude", {"sparsity": 0.8, "finetune_epochs": 1}),
    ("neuron-merging", {"ratio": 0.3, "merge": False, "criterion": "geometric-median"}),
    ("neuron-merging", {"ratio": 0.7, "criterion": "l2-norm"}),
    ("ptq-int8", {"range": "percentile"}),
]


def test_every_registered_method_keeps_the_contract(method_name: str) -> None:
    coverage = check_method(method_name, effect=EFFECTS[method_name]).require()
    assert coverage.ran == ("perceptron", "residual")


@pytest.mark.parametrize(("name", "parameters"), VARIANTS, ids=str)
def test_other_settings_keep_it_too(name: str, parameters: Mapping[str, Any]) -> None:
    assert check_method(name, parameters, effect=EFFECTS[name], deploy=False).require().skipped == {}


def test_no_method_is_left_out() -> None:
    assert set(EFFECTS) == set(methods.TABLE)
    assert set(methods.TABLE) <= set(registry.table("method"))
    assert len(methods.TABLE) >= 4
