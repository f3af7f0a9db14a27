"""The quantized layers against float64 references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from harness.contracts import Scheme
from harness.errors import InputError
from harness.quantized import (
    ActivationQuantizer,
    QuantizedConv2d,
    QuantizedLinear,
    affine_parameters,
    dequantize,
    quantize_dequantize,
    quantized_parameters,
    weight_scale,
)

SYMMETRIC = Scheme(activation="s8", activation_symmetric=True, quantized_bias=False)
WHOLE = Scheme(weight_per_channel=False)


def reference(x: np.ndarray, scale: float, zero: int, low: int, high: int) -> np.ndarray:
    q = np.clip(np.rint(x.astype(np.float64) / scale) + zero, low, high)
    return (q - zero) * scale


@pytest.mark.parametrize(("activation", "low", "high"), [("u8", 0, 255), ("s8", -128, 127)])
def test_activations_are_rounded_as_the_float64_reference_rounds(activation: str, low: int, high: int) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 3
    quantizer = ActivationQuantizer.of_range(-2.0, 5.0, Scheme(activation=activation))  # type: ignore[arg-type]
    expected = reference(x.numpy(), quantizer.scale.item(), int(quantizer.zero_point), low, high)
    # A float32 quotient may lie on the other side of a tie: at most one step, and rarely.
    difference = np.abs(quantizer(x).numpy() - expected)
    assert difference.max() <= quantizer.scale.item() * 1.001
    assert (difference > 1e-5).mean() < 1e-3
    inside = (x > -2) & (x < 5)
    assert (quantizer(x) - x)[inside].abs().max() <= quantizer.scale.item() * 0.5001


@given(
    low=st.floats(-1e4, 1e4, width=32),
    span=st.floats(0, 1e4, width=32),
    activation=st.sampled_from(["u8", "s8"]),
    symmetric=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_zero_is_exact_and_the_range_is_covered(low: float, span: float, activation: str, symmetric: bool) -> None:
    high = low + span
    scale, zero = affine_parameters(low, high, activation, symmetric)  # type: ignore[arg-type]
    limits = torch.iinfo(torch.uint8 if activation == "u8" else torch.int8)
    assert scale > 0
    assert limits.min <= zero <= limits.max
    quantizer = ActivationQuantizer(scale, zero, activation)  # type: ignore[arg-type]
    assert quantizer(torch.zeros(1)).item() == 0.0
    ends = torch.tensor([min(low, 0.0), max(high, 0.0)])
    assert (quantizer(ends) - ends).abs().max().item() <= scale * 1.01
    if symmetric:
        assert zero == (128 if activation == "u8" else 0)


@pytest.mark.parametrize("bad", [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_a_range_that_is_none_is_refused(bad: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="finite and ordered"):
        affine_parameters(*bad, "u8", False)


def test_gradients_pass_straight_through_inside_the_range_only() -> None:
    x = torch.tensor([-5.0, -0.3, 0.2, 0.9, 7.0], requires_grad=True)
    quantizer = ActivationQuantizer.of_range(-1.0, 1.0, Scheme())
    (3 * quantizer(x)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 3.0, 3.0, 3.0, 0.0]


def test_the_operators_keep_their_contract_with_torch() -> None:
    x, w = torch.randn(4, 3, requires_grad=True), torch.randint(-127, 128, (4, 3), dtype=torch.int8)
    scale, zero = torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3, dtype=torch.int8)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(quantize_dequantize, (x, scale, zero, 1), test_utils=tests)
    torch.library.opcheck(dequantize, (w, scale, 1), test_utils=tests)
    assert torch.equal(dequantize(w, scale, 1), w.float() * scale)


@pytest.mark.parametrize("scheme", [Scheme(), SYMMETRIC, WHOLE], ids=["default", "symmetric", "per-tensor"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9)),
        (nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), (2, 4, 5, 5)),
        (nn.Linear(5, 7), (3, 5)),
        (nn.Linear(5, 7, bias=False), (2, 3, 5)),
    ],
    ids=["conv", "grouped", "linear", "linear-3d"],
)
def test_integer_layers_store_the_grid_and_compute_its_function(
    layer: nn.Conv2d | nn.Linear, shape: tuple[int, ...], scheme: Scheme
) -> None:
    torch.manual_seed(3)
    nn.init.normal_(layer.weight)
    s_x = torch.tensor(0.037)
    kind = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
    quantized = kind(layer, s_x, scheme)  # type: ignore[arg-type]
    weight = layer.weight.detach().numpy().astype(np.float64)
    flat = np.abs(weight).reshape(len(weight), -1)
    scale = (flat.max(1) if scheme.weight_per_channel else flat.max()) / 127
    assert quantized.weight_scale.numpy() == pytest.approx(scale, rel=1e-6)
    assert quantized.stored_weight.dtype == torch.int8
    shaped = np.reshape(scale, (-1, *[1] * (weight.ndim - 1)))
    expected = np.rint(weight / shaped)
    assert np.abs(quantized.stored_weight.numpy() - expected).max() <= 1  # ties
    assert np.mean(quantized.stored_weight.numpy() != expected) < 0.01
    assert quantized.stored_weight.abs().max() == 127
    if layer.bias is None:
        assert quantized.stored_bias is None
    elif scheme.quantized_bias:
        assert quantized.stored_bias is not None
        assert quantized.stored_bias.dtype == torch.int32
        step = scale * float(s_x)
        assert quantized.stored_bias.numpy() == pytest.approx(np.rint(layer.bias.detach().numpy() / step), abs=1)
        assert torch.equal(quantized.bias_scale, s_x * quantized.weight_scale)
    else:
        assert quantized.stored_bias is not None
        assert torch.equal(quantized.stored_bias, layer.bias.detach())
    x = torch.randn(shape)
    stored_weight = torch.tensor(quantized.stored_weight.numpy() * shaped, dtype=torch.float32)
    bias = quantized.float_bias()
    if isinstance(layer, nn.Conv2d):
        wanted = F.conv2d(x, stored_weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    else:
        wanted = F.linear(x, stored_weight, bias)
    assert torch.allclose(quantized(x), wanted, atol=1e-5)
    stored = list(quantized_parameters(nn.Sequential(quantized)))
    assert [t.numel() for t in stored] == [p.numel() for p in layer.parameters()]


def test_channels_of_zeros_and_of_tiny_weights_keep_their_bias() -> None:
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0, 0], [1e-12, 0, 0], [1, 2, 3]]))
        layer.bias.copy_(torch.tensor([0.75, -2.0, 1.0]))
    quantized = QuantizedLinear(layer, torch.tensor(0.01), Scheme())
    bias, step = quantized.float_bias(), quantized.bias_scale
    assert bias is not None
    assert step is not None
    assert (bias - layer.bias).abs().tolist() <= (0.5001 * step + 1e-7).tolist()
    assert bias[:2].tolist() == pytest.approx([0.75, -2.0], rel=1e-6)
    assert torch.isfinite(quantized(torch.ones(1, 3))).all()
    assert weight_scale(torch.zeros(2, 3), per_channel=True).tolist() == [1.0, 1.0]


def test_a_convolution_that_pads_with_other_than_zeros_is_refused() -> None:
    with pytest.raises(InputError, match="reflect"):
        QuantizedConv2d(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), torch.tensor(1.0), Scheme())


def test_weight_and_bias_are_the_float_tensors_that_are_stood_for() -> None:
    layer = nn.Linear(5, 3)
    quantized = QuantizedLinear(layer, torch.tensor(0.01), Scheme())
    assert quantized.weight.dtype == layer.weight.dtype
    assert torch.allclose(quantized.weight, layer.weight, atol=float(quantized.weight_scale.max()) / 2 + 1e-7)
    assert quantized.bias is not None
    assert torch.allclose(quantized.bias, layer.bias, atol=1e-4)
    assert set(quantized.state_dict()) == {"stored_weight", "weight_scale", "stored_bias", "bias_scale"}
