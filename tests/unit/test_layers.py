"""What happened to each layer, held against known weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from harness.measure.layers import layers


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10), nn.BatchNorm1d(10))


def test_the_original_beside_itself_has_no_error():
    rows = layers(network(), network())
    assert [row["name"] for row in rows] == ["0", "2"]
    assert [row["kind"] for row in rows] == ["Linear", "Linear"]
    assert [row["shape"] for row in rows] == [[30, 20], [10, 30]]
    assert all(row["error_max"] == 0 and row["sqnr_db"] is None and row["bits"] == 32 for row in rows)
    assert [row["rank"] for row in rows] == [20, 10]


def test_zeros_rank_bits_and_error_are_measured():
    original, model = network(), network()
    with torch.no_grad():
        model[0].weight[:, :5] = 0
        model[2].weight.copy_(torch.linspace(-1, 1, 8).repeat(38)[:300].reshape(10, 30))
    first, second = layers(model, original)
    assert first["nonzero"] == 30 * 15
    assert first["rank"] == 15
    error = original[0].weight[:, :5].detach().abs()
    assert first["error_max"] == pytest.approx(float(error.max()))
    assert first["error_mean"] == pytest.approx(float(error.sum()) / 600)
    power = float(original[0].weight.detach().double().square().sum())
    assert first["sqnr_db"] == pytest.approx(10 * math.log10(power / float(error.double().square().sum())))
    assert second["bits"] == 3


def test_a_layer_of_another_shape_has_no_error_figures():
    smaller = copy.deepcopy(network())
    smaller[0] = nn.Linear(20, 7)
    assert layers(smaller, network())[0]["error_mean"] is None


def test_a_shared_weight_is_described_once():
    model = nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.Linear(4, 9, bias=False)})
    model["b"].weight = model["a"].weight
    assert [row["name"] for row in layers(model, model)] == ["a"]


def test_packed_attention_is_named_by_its_tensor():
    model = nn.MultiheadAttention(8, 2)
    assert {row["name"] for row in layers(model, model)} == {"in_proj_weight", "out_proj"}
