"""What an ONNX file takes and gives, how many parameters it has and how much it multiplies: read from its graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
from onnx import numpy_helper

from hardware import stored
from hardware.onnx_operators import OPERATORS
from harness.contracts import DTYPES, Port, Signature
from harness.errors import DataError, Unsupported, explanation

_KINDS = {
    "FLOAT": "float32", "DOUBLE": "float64", "FLOAT16": "float16", "BOOL": "bool", "UINT8": "uint8", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64",
}  # fmt: skip
# Nodes that pass ids on to the table that they look up.
_PASSING = ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose")
# Where integers stand for weights: the place of the weight, of its zero point, and the axis of that zero point.
_ZERO_POINTS = {
    "DequantizeLinear": (0, 2, 1), "QLinearConv": (3, 5, 0), "QLinearMatMul": (3, 5, -1), "ConvInteger": (1, 3, 0),
    "MatMulInteger": (1, 3, -1), "QGemm": (3, 5, -1), "DynamicQuantizeMatMul": (1, 3, -1),
    "MatMulIntegerToFloat": (1, 5, -1),
}  # fmt: skip
# Inputs that are no parameters: scales, zero points, statistics, and settings of an operator.
_SETTINGS = {
    "QuantizeLinear": {1, 2}, "DequantizeLinear": {1, 2}, "QLinearConv": {1, 2, 4, 5, 6, 7},
    "QLinearMatMul": {1, 2, 4, 5, 6, 7}, "QGemm": {1, 2, 4, 5, 7, 8}, "ConvInteger": {2, 3}, "MatMulInteger": {2, 3},
    "DynamicQuantizeMatMul": {2, 3}, "MatMulIntegerToFloat": {2, 3, 4, 5}, "QLinearAdd": {1, 2, 4, 5, 6, 7},
    "QLinearMul": {1, 2, 4, 5, 6, 7}, "MatMulNBits": {2, 3, 4}, "GatherBlockQuantized": {2, 3},
    "BatchNormalization": {3, 4}, "Resize": {1, 2, 3}, "Upsample": {1}, "Clip": {1, 2}, "Pad": {1, 2, 3},
    "Dropout": {1, 2}, "OneHot": {1, 2}, "Range": {0, 1, 2}, "Pow": {1},
}  # fmt: skip
_BIASES = {("QLinearConv", 8), ("QGemm", 6), ("DequantizeLinear", 0)}
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Max", "Min", "Where", "Equal", "Greater", "Less", "Pow", "Mod"}


def read_signature(path: Path) -> Signature:
    """The signature of an ONNX file.

    A first axis that varies is the batch; one of a fixed size is the only batch size that the file takes. Outputs that
    are no tensors of known types are left out.

    Raises
    ------
    DataError
        If it is no ONNX file.
    Unsupported
        If it takes something that has no examples along its first axis.
    """
    graph = _load(path).graph
    given = {tensor.name for tensor in graph.initializer}
    sources = [value for value in graph.input if value.name not in given]
    if not sources:
        raise Unsupported(f"{path.name} has no input.")
    batches: dict[str, int] = {}
    inputs = []
    for value in sources:
        dtype, axes = _described(value)
        if dtype is None or not axes:
            raise Unsupported(
                f"{path.name}: the input {value.name!r} must be a tensor whose first axis is the examples, of type "
                f"{', '.join(DTYPES)}; it is {_type_name(value)} with {len(axes or ())} axes."
            )
        if isinstance(axes[0], int):
            batches[value.name] = axes[0]
        inputs.append(Port(name=value.name, shape=axes[1:], dtype=dtype, values=_values(graph, value.name, dtype)))
    if len(set(batches.values())) > 1:
        said = ", ".join(f"{name!r}: {size}" for name, size in batches.items())
        raise Unsupported(f"{path.name}: the first axes are to be the examples, but their sizes differ ({said}).")
    firsts = {_described(value)[1][0] for value in sources} - set(batches.values())
    for port in inputs:
        if both := firsts.intersection(port.shape):
            raise Unsupported(
                f"{path.name}: the axis {both.pop()!r} is one input's examples, and an inner axis of {port.name!r}."
            )
    outputs = []
    for value in graph.output:
        dtype, axes = _described(value)
        if dtype is not None and axes:
            outputs.append(Port(name=value.name, shape=axes[1:], dtype=dtype))
    if not outputs:
        raise Unsupported(f"{path.name} has no output that is a tensor with examples along its first axis.")
    return Signature(inputs=tuple(inputs), outputs=tuple(outputs), batch=next(iter(batches.values()), None))


def parameters(path: Path) -> tuple[int, int]:
    """Count the parameters of an ONNX file and those that are not zero.

    Weights and biases count, in float or in integers (an integer is zero where it equals its zero point), wherever the
    file keeps them; scales, zero points, statistics and settings of operators do not.

    Returns
    -------
    tuple of int
        (total, non-zero). Shared tensors count once.
    """
    model = _load(path, external=True)
    uses: dict[str, list[tuple[Any, int]]] = {}
    values = dict(stored.tensors(model))
    for graph in stored.graphs(model.graph):
        for node in graph.node:
            for place, name in enumerate(node.input):
                uses.setdefault(name, []).append((node, place))
    total = nonzero = 0
    for name, tensor in values.items():
        users = uses.get(name, [])
        if not _is_parameter(tensor, users):
            continue
        packed = next((node for node, place in users if node.op_type == "MatMulNBits" and place == 1), None)
        if packed is not None:
            kept = _unpacked(packed, values)
        else:
            array = numpy_helper.to_array(tensor)
            kept = array != _zero_point(array, users, values)
        total += kept.size
        nonzero += int(np.count_nonzero(kept))
    return total, nonzero


def macs(path: Path, sizes: Mapping[str, int] | None = None) -> int:
    """Multiply-accumulates of one example: by shape inference, or else counted while ONNX Runtime runs the file.

    Parameters
    ----------
    path : Path
    sizes : mapping or None
        Sizes of axes that vary, by name; the batch is 1 where it varies.

    Raises
    ------
    Unsupported
        If a size is not given, or that of a product cannot be found.
    """
    signature = read_signature(path)
    shapes = {}
    for port in signature.inputs:
        missing = [axis for axis in port.shape if isinstance(axis, str) and axis not in (sizes or {})]
        if missing:
            raise Unsupported(f"{path.name}: counting needs the size of the axis {missing[0]!r} of {port.name!r}.")
        inner = (axis if isinstance(axis, int) else (sizes or {})[axis] for axis in port.shape)
        shapes[port.name] = (signature.batch or 1, *inner)
    try:
        total = _inferred_macs(path, shapes)
    except Unsupported as unknown:
        try:
            from hardware.onnxruntime_cpu import unoptimized_macs

            feeds = {port.name: np.zeros(shapes[port.name], port.dtype) for port in signature.inputs}
            total = unoptimized_macs(path, feeds)
        except ImportError:
            raise unknown from None
    return total // (signature.batch or 1)


def _inferred_macs(path: Path, given: Mapping[str, tuple[int, ...]]) -> int:
    model = onnx.inliner.inline_local_functions(_load(path))
    for value in model.graph.input:
        for axis, size in zip(value.type.tensor_type.shape.dim, given.get(value.name, ()), strict=False):
            axis.dim_value = size
    # What the file says of inner values and outputs holds for axes that vary: it is found anew.
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    shapes = _inferred(model, path)
    total = 0
    for graph in stored.graphs(model.graph):
        for node in graph.node:
            kind = node.op_type
            if kind not in OPERATORS and kind != "Einsum":
                continue
            inputs = [shapes.get(name, ()) for name in node.input]
            outputs = [shapes.get(name, ()) for name in node.output]
            known = all(shapes.get(name) is not None for name in (*node.input[:1], *node.output[:1]))
            # How often the body of a loop runs is not known either.
            if graph is not model.graph or not known:
                raise Unsupported(
                    f"{path.name}: the sizes that the {kind} {node.name or node.output[0]!r} multiplies are not known "
                    "from the file, and ONNX Runtime is not here to run it."
                )
            total += _einsum(node, inputs) if kind == "Einsum" else OPERATORS[kind](inputs, outputs)
    return total


def _load(path: Path, external: bool = False) -> Any:
    try:
        model = onnx.load(path, load_external_data=external)
    except OSError as error:
        raise DataError(f"ONNX file {path}: {error.strerror or error}.") from error
    except Exception as error:  # protobuf's own error has no public base class
        raise DataError(f"{path} is not an ONNX file: {explanation(error)}") from error
    if not model.graph.node:
        raise DataError(f"{path} is not an ONNX file: it has no nodes.")
    return model


def _described(value: Any) -> tuple[str | None, tuple[int | str, ...]]:
    """Dtype (None where it is none of ours) and axes, those that vary by name; no axes where they are not known."""
    tensor = value.type.tensor_type
    dtype = _KINDS.get(onnx.TensorProto.DataType.Name(tensor.elem_type)) if value.type.HasField("tensor_type") else None
    return dtype, tuple(
        axis.dim_value if axis.dim_value > 0 else _axis_name(axis.dim_param, f"{value.name}[{place}]")
        for place, axis in enumerate(tensor.shape.dim)
    )


def _axis_name(said: str, otherwise: str) -> str:
    # Two axes that are both called "?" or "-1" are not the same.
    return said if any(sign.isalpha() for sign in said) else otherwise


def _type_name(value: Any) -> str:
    if not value.type.HasField("tensor_type"):
        return str(value.type.WhichOneof("value"))
    return str(onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)).lower()


def _values(graph: Any, name: str, dtype: str) -> int | None:
    """How many rows the smallest table has that an integer input looks up; 2 for a mask."""
    if not dtype.startswith(("int", "uint")):
        return None
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    rows |= {key: tensor.dims[0] for key, tensor in stored.tensors(onnx.ModelProto(graph=graph)) if tensor.dims}
    names, found = {name}, []
    for node in graph.node:  # in topological order
        if node.op_type in _PASSING and node.input[0] in names:
            names.update(node.output)
        elif node.op_type in ("Gather", "GatherBlockQuantized") and node.input[1] in names and node.input[0] in rows:
            found.append(rows[node.input[0]])
    return min(found) if found else 2 if "mask" in name else None


def _is_parameter(tensor: Any, users: list[tuple[Any, int]]) -> bool:
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    places = [(node.op_type, place) for node, place in users]
    if not places or all(place in _SETTINGS.get(operator, ()) for operator, place in places):
        return False
    if kind == "INT32":
        return any(place in _BIASES for place in places)
    if kind not in stored.NAMES or not tensor.dims:
        return False
    # The 0.5 and 1.7 of activation functions are no parameters.
    return math.prod(tensor.dims) > 1 or any(operator not in _ELEMENTWISE for operator, _ in places)


def _zero_point(array: Any, users: list[tuple[Any, int]], values: Mapping[str, Any]) -> Any:
    for node, place in users:
        weight, zero, axis = _ZERO_POINTS.get(node.op_type, (None, 0, 0))
        if place != weight or len(node.input) <= zero or node.input[zero] not in values:
            continue
        point = numpy_helper.to_array(values[node.input[zero]])
        said = {item.name: item.i for item in node.attribute}
        axis = said.get("axis", axis)
        if point.ndim == 1 and point.size > 1:
            shape = [1] * array.ndim
            shape[axis] = point.size
            return point.reshape(shape)
        if point.ndim > 1:  # one for each block along the axis
            return np.repeat(point, said["block_size"], axis=axis).take(range(array.shape[axis]), axis=axis)
        return point.reshape(-1)[0] if point.size else 0
    return 0


def _unpacked(node: Any, values: Mapping[str, Any]) -> Any:
    """Whether each weight of a MatMulNBits differs from its zero point."""
    said = {item.name: item.i for item in node.attribute}
    bits, columns, depth = said.get("bits", 4), said["N"], said["K"]
    packed = numpy_helper.to_array(values[node.input[1]]).astype(np.uint8)
    blocks = packed.shape[1]
    weights = _fields(packed.reshape(columns, blocks, -1), bits)
    zero: Any = 2 ** (bits - 1)
    if len(node.input) > 3 and node.input[3] in values:
        points = numpy_helper.to_array(values[node.input[3]])
        if points.dtype == np.uint8:
            points = _fields(points.reshape(columns, -1), bits)[:, :blocks]
        zero = points.reshape(columns, blocks, 1)
    return (weights != zero).reshape(columns, -1)[:, :depth]


def _fields(packed: Any, bits: int) -> Any:
    """Fields of some bits along the last axis, lowest first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return parts.reshape(*packed.shape[:-1], -1)


def _inferred(model: Any, path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all values whose every size is known."""
    try:
        found = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # of many kinds, where the file contradicts itself
        raise Unsupported(f"{path.name}: its shapes cannot be inferred: {explanation(error)}") from error
    shapes = {name: tuple(tensor.dims) for name, tensor in stored.tensors(found)}
    for name, axes in _axes(found.graph):
        if all(isinstance(size, int) for size in axes):
            shapes[name] = axes
    return shapes


def _axes(graph: Any) -> Iterator[tuple[str, Any]]:
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            yield value.name, tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in tensor.shape.dim)


def _einsum(node: Any, inputs: list[Any]) -> int:
    """Every combination of the indices that occur is multiplied once."""
    equation = next(item.s.decode() for item in node.attribute if item.name == "equation").replace(" ", "")
    sizes: dict[str, int] = {}
    for letters, shape in zip(equation.partition("->")[0].split(","), inputs, strict=True):
        if "." in letters or len(letters) != len(shape):
            raise Unsupported(f"The Einsum {node.name or node.output[0]!r} ({equation}) is not counted.")
        sizes.update(zip(letters, shape, strict=True))
    return math.prod(sizes.values()) if len(inputs) > 1 else 0
