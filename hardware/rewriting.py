"""Changes to an exported graph that runtimes need, and that make its bytes depend on the model alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir


def rewrite(model: Any, prefix: str, axes: Sequence[Mapping[int, str]]) -> None:
    """Make an exported graph ready for the runtimes, in place.

    Parameters
    ----------
    model : onnx_ir.Model
    prefix : str
        What the exporting module puts before the names of the model's own tensors.
    axes : sequence of mapping
        For each input, the names of its axes that vary.
    """
    _strip(model)
    _name_axes(model, axes)
    _drop_prefix(model, prefix)
    _unlike_ports(model)
    _transpose_stored_weights(model)
    _write_zero_points(model)
    _unshare_grids(model)


def _name_axes(model: Any, axes: Sequence[Mapping[int, str]]) -> None:
    """Call varying axes by their names: the exporter calls them s77 or the like, also in sums ("s77 + s5")."""
    names = {
        str(value.shape[place].value): name
        for value, places in zip(model.graph.inputs, axes, strict=True)
        for place, name in places.items()
    }
    for value in (*model.graph.inputs, *model.graph.outputs):
        for place, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value is not None:
                said = re.sub(r"\b[A-Za-z_]\w*\b", lambda found: names.get(found[0], found[0]), str(size.value))
                value.shape[place] = onnx_ir.SymbolicDim(said)


def _drop_prefix(model: Any, prefix: str) -> None:
    """Give tensors the names that they have in the model, where no other value has them."""
    graph = model.graph
    taken = {value.name for node in graph.all_nodes() for value in node.outputs}
    taken |= {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    values = list(graph.initializers.values())
    for value in values:
        name = value.name.removeprefix(prefix)
        if name not in taken:
            taken.add(name)
            value.name = name
    graph.initializers.clear()  # renaming moved the renamed ones to the end
    for value in values:
        graph.register_initializer(value)


def _strip(model: Any) -> None:
    """Remove what depends on the exporting process: stack traces, file names, module paths, documentation."""
    model.metadata_props.clear()
    model.doc_string = None
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                _strip_value(value)
                if not value.is_graph_output():
                    value.type, value.shape = None, None  # runtimes infer them; a tenth of a small file
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            _strip_value(value)


def _strip_value(value: Any) -> None:
    value.metadata_props.clear()
    value.doc_string = None


def _unlike_ports(model: Any) -> None:
    """Rename inner values that have the name of an input or output: the exporter names those after operators."""
    ports = [*model.graph.inputs, *model.graph.outputs]
    taken = {value.name for value in ports} | set(model.graph.initializers)
    inner = [value for node in model.graph.all_nodes() for value in node.outputs if not value.is_graph_output()]
    clashing = [value for value in inner if value.name in taken]
    taken |= {value.name for value in inner}
    for value in clashing:
        place = 0
        while f"{value.name}_{place}" in taken:
            place += 1
        value.name = f"{value.name}_{place}"
        taken.add(value.name)


def _transpose_stored_weights(model: Any) -> None:
    """Store integers transposed where a MatMul reads them through a Transpose: runtimes fuse it only without."""
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Transpose" or (dequantize := node.inputs[0].producer()) is None:
            continue
        stored = dequantize.inputs[0]
        alone = all(len(value.uses()) == 1 for value in (stored, dequantize.outputs[0]))
        if dequantize.op_type != "DequantizeLinear" or stored.const_value is None or not alone:
            continue
        order = list(node.attributes["perm"].as_ints())
        axis = dequantize.attributes["axis"].as_int()
        stored.const_value = onnx_ir.tensor(
            np.ascontiguousarray(stored.const_value.numpy().transpose(order)), name=stored.name
        )
        stored.shape = stored.const_value.shape
        dequantize.attributes["axis"] = onnx_ir.AttrInt64("axis", order.index(axis))
        node.outputs[0].replace_all_uses_with(dequantize.outputs[0])
        model.graph.remove(node, safe=True)


def _write_zero_points(model: Any) -> None:
    """Write the default zero point of every int8 DequantizeLinear: ONNX Runtime fuses no QGemm without it."""
    for node in list(model.graph.all_nodes()):
        if node.op_type == "DequantizeLinear" and len(node.inputs) == 2:
            stored, scale = (value.const_value.numpy() for value in node.inputs)
            if stored.dtype == np.int8:
                node.resize_inputs(3)
                zeros = np.zeros(scale.shape, np.int8)
                node.replace_input_with(2, _initializer(model, f"{node.inputs[0].name}_zero_point", zeros))


def _unshare_grids(model: Any) -> None:
    """Give every quantizer a scale and zero point of its own.

    OpenVINO leaves layers in float whose zero point another one reads, and the exporter merges equal initializers. A
    QuantizeLinear and the DequantizeLinear behind it go on sharing.
    """
    owners: dict[str, Any] = {}
    copies: dict[tuple[str, Any], Any] = {}
    for node in list(model.graph.all_nodes()):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        producer = node.inputs[0].producer()
        owner = producer if producer is not None and producer.op_type == "QuantizeLinear" else node
        for index, value in list(enumerate(node.inputs))[1:]:
            if owners.setdefault(value.name, owner) is not owner:
                key = (value.name, owner)
                if key not in copies:
                    copies[key] = _initializer(model, f"{value.name}_{len(copies)}", value.const_value.numpy())
                node.replace_input_with(index, copies[key])


def _initializer(model: Any, name: str, values: Any) -> Any:
    tensor = onnx_ir.tensor(values, name=name)
    value = onnx_ir.Value(name=name, type=onnx_ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value
