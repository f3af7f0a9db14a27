"""The multiply-accumulates of ONNX's operators, and of those that ONNX Runtime makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hardware.kernels import attention_macs, matrix_macs
from harness.measure.counts import convolution_macs, recurrent_macs

Shapes = Sequence[Sequence[int]]


def _convolution(weight: int) -> Callable[[Shapes, Shapes], int]:
    return lambda inputs, outputs: convolution_macs(outputs[0], inputs[weight])


def _matrices(left: int, right: int) -> Callable[[Shapes, Shapes], int]:
    return lambda inputs, outputs: matrix_macs(outputs[0], inputs[left], inputs[right])


def _recurrent(inputs: Shapes, outputs: Shapes) -> int:
    del outputs
    return recurrent_macs(inputs[0], inputs[1], inputs[2])


def _attention(inputs: Shapes, outputs: Shapes) -> int:
    """Attention with or without a projection of its own; a cache makes the keys more than the queries."""
    query, second = inputs[0], inputs[1]
    if len(query) == 3 and len(second) == 2:  # (n, tokens, in) by (in, 3 x width), then attention over the tokens
        width = outputs[0][-1]
        return matrix_macs([*query[:-1], second[1]], query, second) + attention_macs([*query[:-1], width], query[1])
    present = next((shape for shape in outputs[1:] if len(shape) == 4), None)
    return attention_macs(outputs[0], present[-2] if present else second[-2])


OPERATORS: dict[str, Callable[[Shapes, Shapes], int]] = {
    **dict.fromkeys(("Conv", "FusedConv", "NhwcFusedConv", "ConvInteger"), _convolution(1)),
    "QLinearConv": _convolution(3),
    "ConvTranspose": lambda inputs, outputs: convolution_macs(inputs[0], inputs[1]),
    **dict.fromkeys(
        ("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "TransposeMatMul", "MatMulInteger", "MatMulIntegerToFloat",
         "DynamicQuantizeMatMul"),
        _matrices(0, 1),
    ),
    **dict.fromkeys(("QGemm", "QLinearMatMul"), _matrices(0, 3)),
    "MatMulNBits": lambda inputs, outputs: math.prod(outputs[0]) * inputs[0][-1],
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), _recurrent),
    **dict.fromkeys(("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention"), _attention),
}  # fmt: skip
"""How many multiply-accumulates an operator makes, from the shapes of its inputs and outputs."""

INTEGER = {
    "ConvInteger",
    "QLinearConv",
    "QGemm",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QLinearMatMul",
    "DynamicQuantizeLSTM",
    "QAttention",
}
"""Operators whose arithmetic is in 8-bit integers, whatever the type of their output."""
