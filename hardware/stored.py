"""The precision in which an ONNX file stores its weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = {
    "FLOAT": "f32", "DOUBLE": "f64", "FLOAT16": "f16", "BFLOAT16": "bf16", "INT8": "w8", "UINT8": "w8", "INT4": "w4",
    "UINT4": "w4", "INT2": "w2", "UINT2": "w2", "FLOAT8E4M3FN": "w8", "FLOAT8E5M2": "w8", "FLOAT4E2M1": "w4",
}  # fmt: skip


def precision(path: Path) -> str:
    """That of most of a file's weights: "f32", "f16", ...; "w8", "w4" for stored integers; "f32" where it has none.

    Packed weights of ``MatMulNBits`` count by their own number of bits.
    """
    import onnx

    sizes: Counter[str] = Counter()
    model = onnx.load(path, load_external_data=False)
    packed: dict[str, int] = {}
    for graph in graphs(model.graph):
        for node in graph.node:
            if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
                packed[node.input[1]] = next((item.i for item in node.attribute if item.name == "bits"), 4)
    for name, tensor in tensors(model):
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        count = math.prod(tensor.dims)
        if name in packed:
            bits = packed[name]
            sizes[f"w{bits}"] += count * 8 // bits
        elif kind in NAMES:
            sizes[NAMES[kind]] += count
    return sizes.most_common(1)[0][0] if sizes else "f32"


def graphs(graph: Any) -> Iterator[Any]:
    """A graph and all graphs in its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.ByteSize():
                    yield from graphs(inner)


def tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """All stored tensors by name: initializers, and the values of Constant nodes (where Paddle keeps its weights)."""
    for graph in graphs(model.graph):
        yield from ((tensor.name, tensor) for tensor in graph.initializer)
        for node in graph.node:
            if node.op_type == "Constant":
                yield from ((node.output[0], item.t) for item in node.attribute if item.name == "value")
