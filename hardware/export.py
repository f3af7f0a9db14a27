"""One export to ONNX for every runtime that reads it.

The exporter is ``torch.onnx.export(dynamo=True)``. Quantized layers (:mod:`harness.quantized`) arrive as single nodes
and are written as QuantizeLinear / DequantizeLinear, with the stored integers as initializers. The bytes depend on the
model alone: two exports of one model, in two processes, are equal.
"""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnxscript import opset20 as op
from torch import Tensor, nn

import harness.quantized  # noqa: F401  (registers the assay operators)
from harness.errors import ExportError

OPSET = 20
INPUT, OUTPUT, BATCH = "input", "output", "batch"
PROTOBUF_LIMIT = 2**31 - 2**20
"""Protobuf cannot hold more than 2 GiB; beyond this many bytes of weights they go to a file of their own."""


def _quantize_dequantize(x: Any, scale: Any, zero_point: Any, axis: int = 0) -> Any:
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point, axis=axis), scale, zero_point, axis=axis)


def _dequantize(q: Any, scale: Any, axis: int = 0) -> Any:
    return op.DequantizeLinear(q, scale, axis=axis)


def to_onnx(model: nn.Module, example: Tensor, path: Path) -> Path:
    """Write ``model`` as ONNX with a dynamic batch axis; one input "input", one output "output".

    Parameters
    ----------
    model : nn.Module
        Exported in evaluation mode; left as it was.
    example : Tensor, shape (n >= 2, ...)
        An input; its first axis becomes the dynamic one.
    path : Path
        The file to write. Weights of more than 2 GB go to ``<path>.data`` beside it.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    ExportError
        If the model cannot be exported, with the first useful line of the cause.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        exported = _export(model.eval(), example)
    finally:
        for module, mode in modes.items():
            module.training = mode
    written = _translate(exported, type(model).__name__)
    _strip(written.model)
    _transpose_stored_weights(written.model)
    _write_zero_points(written.model)
    _unshare_grids(written.model)
    large = sum(tensor.nbytes for tensor in exported.state_dict.values()) > PROTOBUF_LIMIT
    written.save(path, external_data=large)
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{type(model).__name__}: the exported ONNX is not valid: {_first_line(error)}") from error
    return path


def _export(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    name = type(model).__name__
    try:
        with _quiet(), _without_attention_fastpath(), torch.no_grad():
            exported = torch.export.export(
                model, (example,), dynamic_shapes=({0: torch.export.Dim(BATCH)},), strict=False
            )
    except Exception as error:  # the model's own code runs here and may raise anything
        raise ExportError(f"{name} cannot be exported: {_first_line(error)}{_place(error)}") from error
    inputs, outputs = exported.graph_signature.user_inputs, exported.graph_signature.user_outputs
    if len(inputs) != 1 or len(outputs) != 1:
        raise ExportError(
            f"{name} cannot be exported: it must map one tensor to one tensor; it has {len(inputs)} inputs and "
            f"{len(outputs)} outputs."
        )
    return exported


def _translate(exported: torch.export.ExportedProgram, name: str) -> torch.onnx.ONNXProgram:
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.assay.quantize_dequantize.default: _quantize_dequantize,
        torch.ops.assay.dequantize.default: _dequantize,
    }
    try:
        with _quiet():
            written = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                custom_translation_table=table,
                verbose=False,
            )
    except Exception as error:  # of many kinds, the useful one at the end of the chain
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(f"{name} cannot be written as ONNX: {_first_line(cause)}") from error
    assert written is not None  # noqa: S101  (for the type checker: only the old exporter returns None)
    return written


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


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _place(error: BaseException) -> str:
    """The innermost line of code outside torch that the error passed through, as " (at file:line: code)"."""
    torch_folder = str(Path(torch.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(torch_folder)
        and frame.filename != __file__
        and not frame.filename.startswith("<")
    ]
    return f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""


@contextlib.contextmanager
def _without_attention_fastpath() -> Iterator[None]:
    """Trace attention as its parts: the fused inference path of torch has no ONNX form."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter: it prints its steps and warns of what this module handles itself."""
    names = (
        "torch.export",
        "torch.onnx",
        "torch.fx",
        "torch.fx.experimental.symbolic_shapes",
        "torch._dynamo",
        "onnxscript",
        "onnx_ir",
    )
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            # Deprecations inside torch and onnxscript, of no concern to the model's owner.
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
