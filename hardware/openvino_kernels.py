"""What OpenVINO's CPU plugin executed, from its executed graph and the graph it was made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hardware.kernels import Kernel, attention_macs, matrix_macs, weights_and_activations
from harness.measure.counts import convolution_macs, product_macs, recurrent_macs

_NOT_EXECUTED = {"Const", "Input", "Output", "Parameter", "Result"}
_FLOATS = {"f32": 32, "bf16": 16, "f16": 16}
_STORED_BITS = {"u8": 8, "i8": 8, "u4": 4, "i4": 4, "nf4": 4, "u2": 2, "f8e4m3": 8, "f8e5m2": 8, "f4e2m1": 4}


# Kinds whose own inputs tell what they compute, where their shapes are known.
_KNOWN = {
    "Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul", "ScaledDotProductAttention",
    "ScaledDotProductAttentionWithKVCache", "RNNSeq", "RNNCell",
}  # fmt: skip


def executed(graph: Any, original: Any, *, asked: str, dynamic_quantization: bool) -> Iterator[Kernel]:
    """The kernels of an executed graph.

    Parameters
    ----------
    graph : Model
        ``CompiledModel.get_runtime_model()``.
    original : Model
        The model before compilation, of the same shapes: tells what a kernel that was fused of several layers computes.
    asked : str
        The precision that the compiled model says that it computes in, where it is not quantized.
    dynamic_quantization : bool
        Whether activations are rounded to integers where they meet stored integers: the graph looks the same then.
    """
    layers = dict(_layers(original))
    nodes = [node for node in graph.get_ordered_ops() if _said(node, "layerType") not in _NOT_EXECUTED]
    known = {id(node): _macs(_said(node, "layerType"), node) for node in nodes}
    for node in nodes:
        if known[id(node)]:
            for name in _said(node, "originalLayersNames").split(","):
                layers.pop(name, None)
    for node in nodes:
        kind, macs = _said(node, "layerType"), known[id(node)]
        precision = _precision(node, macs, dynamic_quantization)
        if not macs:
            # Snippets hold whole perceptrons and attentions, and loops their bodies.
            macs = sum(layers.pop(name, 0) for name in _said(node, "originalLayersNames").split(","))
            if macs and kind in _KNOWN:
                precision = _precision(node, macs, dynamic_quantization)
            elif macs:
                precision = _fused_precision(node, asked)
        yield Kernel(kind=kind, precision=precision, macs=macs)


def _fused_precision(node: Any, asked: str) -> str:
    """That of the products inside a fused kernel, which says the type of its output only."""
    if _said(node, "layerType") in ("TensorIterator", "Loop"):
        return asked  # its inputs are counters and conditions as well
    types = [port.get_element_type().to_string() for port in node.inputs()]
    stored = [_STORED_BITS[name] for name in types[1:] if name in _STORED_BITS]
    if stored:
        quantized = types[0] in _STORED_BITS or "Quantize" in _said(node, "originalLayersNames")
        return "int8" if quantized else weights_and_activations(min(stored), _FLOATS.get(asked, 32))
    said = _said(node, "runtimePrecision")
    # Tried: a perceptron in one snippet that says f32 has bf16's errors where bf16 is asked for.
    return asked if said == "f32" else said


def _precision(node: Any, macs: int, dynamic_quantization: bool) -> str:
    said = _said(node, "runtimePrecision")
    if not macs or said not in _STORED_BITS:
        return said
    activations = node.input(0).get_element_type().to_string()
    if activations not in _FLOATS:
        return "int8"
    # The type of the weights: activations are in float, or rounded on the way in.
    rounded = dynamic_quantization and activations == "f32"
    return weights_and_activations(_STORED_BITS[said], 8 if rounded else _FLOATS[activations])


def _macs(kind: str, node: Any) -> int:
    """Multiply-accumulates of an executed node whose kind tells how its inputs are used."""
    output, inputs = _shape(node.output(0)), [_shape(port) for port in node.inputs()]
    if kind in ("Convolution", "GroupConvolution"):
        return convolution_macs(output, inputs[1]) if output and inputs[1] else 0
    if kind == "Deconvolution":
        return convolution_macs(inputs[0], inputs[1]) if inputs[0] and inputs[1] else 0
    if kind == "FullyConnected":
        return product_macs(output, inputs[0])
    if kind == "MatMul":
        return matrix_macs(output, inputs[0], inputs[1])
    if kind in ("ScaledDotProductAttention", "ScaledDotProductAttentionWithKVCache"):
        return attention_macs(inputs[0], inputs[1][-2]) if inputs[0] and inputs[1] else 0
    if kind in ("RNNSeq", "RNNCell"):  # ..., weights of the input, weights of the state, bias
        return recurrent_macs(inputs[0], *inputs[-3:-1])
    return 0


def _layers(model: Any) -> Iterator[tuple[str, int]]:
    """Name and multiply-accumulates of the layers of a model that is not compiled."""
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        inputs = [_shape(port) for port in node.inputs()]
        macs = 0
        if kind == "MatMul":
            macs = matrix_macs(_shape(node.output(0)), inputs[0], inputs[1])
        elif kind in ("Convolution", "GroupConvolution"):
            macs = convolution_macs(_shape(node.output(0)), inputs[1])
        elif kind in ("ConvolutionBackpropData", "GroupConvolutionBackpropData"):
            macs = convolution_macs(inputs[0], inputs[1])
        elif kind == "ScaledDotProductAttention" and inputs[0] and inputs[1]:
            macs = attention_macs(inputs[0], inputs[1][-2])
        elif kind in ("LSTMSequence", "GRUSequence", "RNNSequence", "LSTMCell", "GRUCell", "RNNCell"):
            macs = recurrent_macs(inputs[0], *inputs[-3:-1])
        elif kind in ("TensorIterator", "Loop"):
            macs = sum(count for _, count in _layers(node.get_function())) * _rounds(node)
        if macs:
            yield node.get_friendly_name(), macs


def _rounds(loop: Any) -> int:
    """How often a loop's body runs, where that is known."""
    return max(1, int(loop.get_num_iterations()))


def _shape(port: Any) -> list[int]:
    return list(port.get_shape()) if port.get_partial_shape().is_static else []


def _said(node: Any, key: str) -> str:
    information = node.get_rt_info()
    return str(information[key].astype(str)) if key in information else ""
