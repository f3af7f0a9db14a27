"""Quantized layers that are still ``nn.Module``: they store integers and compute the function those integers stand for.

``x ≈ s (q - z)`` with a real scale ``s`` and an integer zero point ``z`` (Jacob et al. 2018, *Quantization and Training
of Neural Networks for Efficient Integer-Arithmetic-Only Inference*, arXiv:1712.05877, eq. 1). The two steps are custom
operators, so that they survive ``torch.export`` as one node each and become ONNX QuantizeLinear / DequantizeLinear:

* ``assay::quantize_dequantize(x, scale, zero_point, axis)``, straight-through in training;
* ``assay::dequantize(q, scale, axis)``, for integers that are stored (weights and biases; zero point 0).

The integer type is that of ``zero_point`` and ``q``; a 0-d ``scale`` is per tensor, a 1-d ``scale`` runs along
``axis``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.contracts import Scheme
from harness.errors import InputError

WEIGHT_LIMIT = 127
"""Largest magnitude of a stored weight: -128 is not used, so that the grid is symmetric."""

BIAS_LIMIT = 2**30
"""Largest magnitude of a stored int32 bias: leaves the other half of the range to the sum it is added to."""

_ACTIVATION_DTYPE = {"u8": torch.uint8, "s8": torch.int8}


def _along(parameter: Tensor, ndim: int, axis: int) -> Tensor:
    """``parameter`` shaped to broadcast along ``axis`` of a tensor with ``ndim`` axes (0-d: as it is)."""
    if parameter.ndim == 0:
        return parameter
    shape = [1] * ndim
    shape[axis] = -1
    return parameter.view(shape)


@torch.library.custom_op("assay::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int = 0) -> Tensor:
    """Round ``x`` to the grid ``scale * (q - zero_point)`` and return it as float.

    Parameters
    ----------
    x : Tensor, float, any shape
        The values.
    scale : Tensor, float32, shape () or (x.shape[axis],)
        Step of the grid; positive.
    zero_point : Tensor, integer, shape of ``scale``
        The integer that stands for 0. Its dtype is the integer type, whose whole range is used.
    axis : int
        The axis along which a 1-d ``scale`` runs.

    Returns
    -------
    Tensor
        Shape and dtype of ``x``. In training the gradient passes straight through inside the range and is zero outside
        (Bengio et al. 2013, arXiv:1308.3432).
    """
    limits = torch.iinfo(zero_point.dtype)
    step = _along(scale, x.ndim, axis)
    zero = _along(zero_point, x.ndim, axis).to(x.dtype)
    # torch.round and ONNX QuantizeLinear both round half to even, and both divide.
    q = torch.clamp(torch.round(x / step) + zero, limits.min, limits.max)
    return (q - zero) * step


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int = 0) -> Tensor:
    del scale, zero_point, axis
    return torch.empty_like(x)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[:3])
    ctx.axis = inputs[3]


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    x, scale, zero_point = ctx.saved_tensors
    limits = torch.iinfo(zero_point.dtype)
    zero = _along(zero_point, x.ndim, ctx.axis).to(x.dtype)
    q = torch.round(x / _along(scale, x.ndim, ctx.axis)) + zero
    return gradient * ((q >= limits.min) & (q <= limits.max)), None, None, None


quantize_dequantize.register_autograd(_straight_through, setup_context=_keep_inputs)


@torch.library.custom_op("assay::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, axis: int = 0) -> Tensor:
    """The float tensor ``scale * q`` that stored integers stand for (zero point 0).

    Parameters
    ----------
    q : Tensor, int8 or int32, any shape
        The stored integers.
    scale : Tensor, float32, shape () or (q.shape[axis],)
        Step of the grid.
    axis : int
        The axis along which a 1-d ``scale`` runs.

    Returns
    -------
    Tensor
        Float, shape of ``q``.
    """
    return q.to(scale.dtype) * _along(scale, q.ndim, axis)


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, axis: int = 0) -> Tensor:
    del axis
    return torch.empty_like(q, dtype=scale.dtype)


def affine_parameters(low: float, high: float, activation: Literal["u8", "s8"], symmetric: bool) -> tuple[float, int]:
    """Scale and zero point of an activation whose values lie in [low, high].

    The range is first widened to hold 0, which then has an integer of its own: zero padding and ReLU stay exact
    (Jacob et al. 2018, §2.1).

    Parameters
    ----------
    low, high : float
        The observed range.
    activation : {"u8", "s8"}
        The integer type.
    symmetric : bool
        True: zero point 0 (s8) or 128 (u8), and the range is [-m, m] with m the larger magnitude.

    Returns
    -------
    (float, int)
        Scale (exactly a float32) and zero point.

    Raises
    ------
    InputError
        If the range is not finite or is reversed.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise InputError(f"An activation range must be finite and ordered; got [{low}, {high}].")
    low, high = min(low, 0.0), max(high, 0.0)
    limits = torch.iinfo(_ACTIVATION_DTYPE[activation])
    if symmetric:
        scale = _float32(max(-low, high) / WEIGHT_LIMIT)
        return scale, 128 if activation == "u8" else 0
    scale = _float32((high - low) / (limits.max - limits.min))
    return scale, min(max(limits.min + round(-low / scale), limits.min), limits.max)


def _float32(step: float) -> float:
    """The nearest float32; 1 where the step would vanish (a constant 0 has any scale)."""
    rounded = float(torch.tensor(step, dtype=torch.float32))
    return rounded if rounded >= torch.finfo(torch.float32).tiny else 1.0


class ActivationQuantizer(nn.Module):
    """Per-tensor quantize-dequantize of an activation; shape and dtype are kept.

    Parameters
    ----------
    scale : float
        Step of the grid.
    zero_point : int
        The integer that stands for 0.
    activation : {"u8", "s8"}
        The integer type.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: float, zero_point: int, activation: Literal["u8", "s8"] = "u8") -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=_ACTIVATION_DTYPE[activation]))

    @classmethod
    def of_range(cls, low: float, high: float, scheme: Scheme) -> ActivationQuantizer:
        """The quantizer of an activation in [low, high] under a target's scheme."""
        return cls(*affine_parameters(low, high, scheme.activation, scheme.activation_symmetric), scheme.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Round to the grid."""
        rounded: Tensor = quantize_dequantize(x, self.scale, self.zero_point)
        return rounded

    def extra_repr(self) -> str:
        """Scale, zero point and type."""
        kind = "u8" if self.zero_point.dtype == torch.uint8 else "s8"
        return f"scale={self.scale.item():.6g}, zero_point={self.zero_point.item()}, {kind}"


def weight_scale(weight: Tensor, per_channel: bool, at_least: Tensor | None = None) -> Tensor:
    """Scale of symmetric [-127, 127] weights: the largest magnitude / 127.

    Source: Krishnamoorthi 2018, arXiv:1806.08342, §2.2.

    Parameters
    ----------
    weight : Tensor, float, shape (out, ...)
        The weights.
    per_channel : bool
        One scale per output channel instead of one per tensor.
    at_least : Tensor or None, shape (out,)
        Lower bound of each channel's scale.

    Returns
    -------
    Tensor
        Float32, shape (out,) or (). A channel of zeros has scale 1 (or its lower bound).
    """
    magnitude = weight.detach().double().abs().flatten(1).amax(1)
    scale = magnitude / WEIGHT_LIMIT
    if at_least is not None:
        scale = torch.maximum(scale, at_least.double())
    if not per_channel:
        scale = scale.amax()
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0).to(torch.float32)


def quantize_symmetric(values: Tensor, scale: Tensor, limit: int, dtype: torch.dtype) -> Tensor:
    """``clamp(round(values / scale), -limit, limit)`` in ``dtype``; a 1-d scale runs along axis 0."""
    step = _along(scale.double(), values.ndim, 0)
    return torch.clamp(torch.round(values.detach().double() / step), -limit, limit).to(dtype)


class _QuantizedLayer(nn.Module):
    """Stored integers of a layer with a weight and perhaps a bias; output channels are axis 0 of both.

    ``weight`` and ``bias`` are the float tensors that the stored ones stand for, so that a forward pass that reads them
    (for their type, their shape, their norm) goes on as before.
    """

    stored_weight: Tensor
    weight_scale: Tensor
    stored_bias: Tensor | None
    bias_scale: Tensor | None

    def _store(self, weight: Tensor, bias: Tensor | None, input_scale: Tensor, scheme: Scheme) -> None:
        quantized_bias = bias is not None and scheme.quantized_bias
        # A channel of tiny weights and an ordinary bias would overflow int32 at s_x s_w: widen its step instead.
        floor = (
            bias.detach().abs().double() / (input_scale.double() * BIAS_LIMIT)
            if quantized_bias and bias is not None
            else None
        )
        scale = weight_scale(weight, scheme.weight_per_channel, floor)
        self.register_buffer("stored_weight", quantize_symmetric(weight, scale, WEIGHT_LIMIT, torch.int8))
        self.register_buffer("weight_scale", scale)
        if bias is None:
            self.register_buffer("stored_bias", None)
            self.register_buffer("bias_scale", None)
        elif quantized_bias:
            bias_scale = input_scale.to(torch.float32) * scale  # in float32, as runtimes check it
            self.register_buffer("stored_bias", quantize_symmetric(bias, bias_scale, 2**31 - 1, torch.int32))
            self.register_buffer("bias_scale", bias_scale)
        else:
            self.register_buffer("stored_bias", bias.detach().to(torch.float32).clone())
            self.register_buffer("bias_scale", None)

    def float_weight(self) -> Tensor:
        """The weights that the stored integers stand for: float32, shape of ``stored_weight``."""
        weight: Tensor = dequantize(self.stored_weight, self.weight_scale)
        return weight

    def float_bias(self) -> Tensor | None:
        """The bias that is stored: float32, shape (out,), or None."""
        if self.stored_bias is None or self.bias_scale is None:
            return self.stored_bias
        bias: Tensor = dequantize(self.stored_bias, self.bias_scale)
        return bias

    @property
    def weight(self) -> Tensor:
        """See :meth:`float_weight`."""
        return self.float_weight()

    @property
    def bias(self) -> Tensor | None:
        """See :meth:`float_bias`."""
        return self.float_bias()


class QuantizedConv2d(_QuantizedLayer):
    """A ``Conv2d`` that stores int8 weights and, where the scheme says so, an int32 bias at ``s_x * s_w``.

    Its input is expected on the grid of ``input_scale`` (put an :class:`ActivationQuantizer` before it).

    Parameters
    ----------
    conv : nn.Conv2d
        The float layer, zero-padded, BatchNorm folded in.
    input_scale : Tensor, shape ()
        Scale of its quantized input.
    scheme : Scheme
        What the target wants.
    """

    def __init__(self, conv: nn.Conv2d, input_scale: Tensor, scheme: Scheme) -> None:
        super().__init__()
        if conv.padding_mode != "zeros":
            raise InputError(f"Only zero-padded convolutions are quantized; got padding_mode={conv.padding_mode!r}.")
        self._store(conv.weight, conv.bias, input_scale, scheme)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size = conv.kernel_size
        self.stride, self.padding = conv.stride, conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) to (n, out, h', w')."""
        return F.conv2d(
            x, self.float_weight(), self.float_bias(), self.stride, self.padding, self.dilation, self.groups
        )

    def extra_repr(self) -> str:
        """Shape of the layer."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, bias={self.stored_bias is not None}"
        )


class QuantizedLinear(_QuantizedLayer):
    """A ``Linear`` that stores int8 weights and, where the scheme says so, an int32 bias at ``s_x * s_w``.

    Parameters
    ----------
    linear : nn.Linear
        The float layer.
    input_scale : Tensor, shape ()
        Scale of its quantized input.
    scheme : Scheme
        What the target wants.
    """

    def __init__(self, linear: nn.Linear, input_scale: Tensor, scheme: Scheme) -> None:
        super().__init__()
        self._store(linear.weight, linear.bias, input_scale, scheme)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, self.float_weight(), self.float_bias())

    def extra_repr(self) -> str:
        """Shape of the layer."""
        return f"{self.in_features}, {self.out_features}, bias={self.stored_bias is not None}"


class QuantizedInput(nn.Module):
    """A quantized layer together with its input's quantizer, in the place of a float layer.

    Parameters
    ----------
    quantizer : ActivationQuantizer
        Of the input.
    layer : QuantizedConv2d or QuantizedLinear
        Made with the quantizer's scale.
    """

    def __init__(self, quantizer: ActivationQuantizer, layer: QuantizedConv2d | QuantizedLinear) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        """The float weight that the layer stands for."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The float bias that the layer stands for."""
        return self.layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output."""
        out: Tensor = self.layer(self.quantizer(input))
        return out


def quantized_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Yield the weights and biases that quantized layers hold as buffers, layer by layer."""
    for module in model.modules():
        if isinstance(module, _QuantizedLayer):
            yield module.stored_weight
            if module.stored_bias is not None:
                yield module.stored_bias
