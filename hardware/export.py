"""One export to ONNX for every runtime that reads it.

The exporter is ``torch.onnx.export(dynamo=True)``. Quantized layers (:mod:`harness.quantized`) arrive as single nodes
and are written as QuantizeLinear / DequantizeLinear, with the stored integers as initializers. The bytes depend on the
model alone: two exports of one model, in two processes, are equal.
"""

from __future__ import annotations

import contextlib
import io
import json
import keyword
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from onnxscript import opset20 as op
from torch import Tensor, nn

import harness.quantized  # noqa: F401  (registers the assay operators)
from hardware.ports import BATCH, LIMITS, axis_names
from hardware.rewriting import rewrite
from harness.calling import call, evaluating, plain_attention
from harness.errors import AssayError, ExportError, explanation

if TYPE_CHECKING:
    from harness.contracts import Signature, Tensors

OPSET = 20
PROTOBUF_LIMIT = 2**31 - 2**20
"""Protobuf cannot hold more than 2 GiB; beyond this many bytes of weights they go to a file of their own."""
_OWN = ("harness/calling.py", "hardware/export.py")


def _quantize_dequantize(x: Any, scale: Any, zero_point: Any, axis: int = 0) -> Any:
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point, axis=axis), scale, zero_point, axis=axis)


def _dequantize(q: Any, scale: Any, axis: int = 0) -> Any:
    return op.DequantizeLinear(q, scale, axis=axis)


class Called(nn.Module):
    """A model that takes a signature's inputs as a list and returns its outputs as a tuple.

    NumPy has no bfloat16, so outputs of that type are widened to float32, which is exact.
    """

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.model = model
        self.signature = signature

    def forward(self, values: list[Tensor]) -> tuple[Tensor, ...]:
        """Call the model by name; see :func:`harness.calling.call`."""
        names = [port.name for port in self.signature.inputs]
        outputs = call(self.model, dict(zip(names, values, strict=True)), self.signature)
        return tuple(value.float() if value.dtype == torch.bfloat16 else value for value in outputs.values())


def to_onnx(model: nn.Module, signature: Signature, example: Tensors, path: Path) -> Path:
    """Write ``model`` as ONNX with the signature's inputs and outputs in its order and under its names.

    The batch axis varies unless ``signature.batch`` fixes it, and so do the axes that a port names.

    Parameters
    ----------
    model : nn.Module
        Exported in evaluation mode; left as it was.
    signature : Signature
        What the file takes and gives.
    example : Tensors
        Inputs of a few examples.
    path : Path
        The file to write. Weights of more than 2 GB go to ``<path>.data`` beside it.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    ExportError
        If the model cannot be exported, with the lines of the cause that explain it.
    """
    values, axes = _examples(signature, example)
    names = _file_names([port.name for port in signature.inputs], [port.name for port in signature.outputs])
    return write(Called(model, signature), values, axes, names, path, type(model).__name__)


def write(
    module: nn.Module,
    values: Sequence[Tensor],
    axes: Sequence[dict[int, str]],
    names: tuple[list[str], list[str]],
    path: Path,
    title: str,
    *,
    related: bool = False,
) -> Path:
    """Export a module that holds the model as ``model``; see :func:`to_onnx`.

    Parameters
    ----------
    module : nn.Module
        Takes the list of ``values`` and returns a tuple of tensors.
    values : sequence of Tensor
    axes : sequence of dict
        For each value, which axes vary, by name: an identifier, equal for equal sizes.
    names : tuple of list of str
        Of the file's inputs and outputs.
    path : Path
    title : str
        What the model is called in messages.
    related : bool
        Whether sizes may follow from one another (one is the sum of two): the exporter finds out how, then.
    """
    dims = {
        name: torch.export.Dim.DYNAMIC if related else torch.export.Dim(name) for part in axes for name in part.values()
    }
    shapes = [{place: dims[name] for place, name in part.items()} for part in axes]
    with evaluating(module):
        # Copies: of a view, the exporter would ask what it is a view of.
        exported, limits = _export(module, [value.clone() for value in values], shapes, title)
    _plain_names(exported)
    written = _translate(exported, names, title)
    rewrite(written.model, prefix="model.", axes=axes)
    if limits:
        written.model.metadata_props[LIMITS] = json.dumps(limits, sort_keys=True)
    large = sum(tensor.nbytes for tensor in exported.state_dict.values()) > PROTOBUF_LIMIT
    written.save(path, external_data=large)
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{title}: the exported ONNX is not valid: {explanation(error)}") from error
    return path


def _examples(signature: Signature, example: Tensors) -> tuple[list[Tensor], list[dict[int, str]]]:
    """Values to trace with, and the axes that vary.

    The exporter takes an axis of size 0 or 1 for a constant: such axes are filled up by repeating.
    """
    names = axis_names(signature)
    values, axes = [], []
    for port in signature.inputs:
        value = example[port.name]
        varying = {place: names[axis] for place, axis in enumerate(port.shape, start=1) if isinstance(axis, str)}
        if signature.batch is None:
            varying = {0: BATCH, **varying}
        else:
            value = value[torch.arange(signature.batch) % len(value)]
        for place in varying:
            if value.shape[place] < 2:
                value = value.repeat_interleave(2, dim=place)
        values.append(value)
        axes.append(varying)
    return values, axes


def _file_names(inputs: list[str], outputs: list[str]) -> tuple[list[str], list[str]]:
    """Names that ONNX takes: not empty, and no two alike among inputs and outputs. Loading goes by place then."""
    taken: set[str] = set()

    def free(name: str) -> str:
        name = name or "_"
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    return [free(name) for name in inputs], [free(name) for name in outputs]


def _export(
    module: nn.Module, values: list[Tensor], shapes: list[dict[int, Any]], title: str
) -> tuple[torch.export.ExportedProgram, dict[str, list[int | None]]]:
    """The traced program, and the sizes of varying axes for which alone it holds."""
    try:
        with _quiet(), plain_attention(), torch.no_grad():
            try:
                return torch.export.export(module, (values,), dynamic_shapes=(shapes,), strict=False), {}
            except torch._dynamo.exc.UserError as error:
                limits = _limits(error)
                if not limits:
                    raise
                dims = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in limits.items()}
                narrower = [{place: dims.get(dim.__name__, dim) for place, dim in shape.items()} for shape in shapes]
                return torch.export.export(module, (values,), dynamic_shapes=(narrower,), strict=False), limits
            except RuntimeError as error:
                if "not supported for tensor subclasses" not in str(error):
                    raise
                # NumPy in the forward pass: only the tracer of Python's bytecode knows it.
                return torch.export.export(module, (values,), dynamic_shapes=(shapes,), strict=True), {}
    except AssayError as error:
        raise type(error)(f"{title} cannot be exported: {error}") from error
    except Exception as error:  # the model's own code runs here and may raise anything
        raise ExportError(f"{title} cannot be exported: {explanation(error)}{_place(error)}") from error


def _limits(error: Exception) -> dict[str, list[int | None]]:
    """Smallest and largest sizes of axes that the exporter asks for (a table of 512 positions, a branch in the code).

    Empty where it asks for more than that: an axis that the model's code makes a constant stays an error.
    """
    _, _, fixes = str(error).partition("Suggested fixes:")
    found: dict[str, list[int | None]] = {}
    for line in fixes.splitlines():
        limits = re.fullmatch(r"(\w+) = Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\)", line.strip())
        if limits is not None:
            name, low, high = limits.groups()
            found[name] = [int(low) if low else None, int(high) if high else None]
        elif " = " in line:
            return {}
    return found


def _plain_names(exported: torch.export.ExportedProgram) -> None:
    """Rename tensors whose names hold quotes, line breaks or Python's keywords: torch writes them into code as is."""
    for spec in exported.graph_signature.input_specs:
        target = spec.target
        if target is None:
            continue
        parts = [re.sub(r"[\"'\\\n\r]", "_", part) for part in target.split(".")]
        plain = ".".join(f"{part}_" if keyword.iskeyword(part) else part for part in parts)
        if plain == target:
            continue
        while plain in exported.state_dict or plain in exported.constants:
            plain += "_"
        for tensors in (exported.state_dict, exported.constants):
            if target in tensors:
                tensors[plain] = tensors.pop(target)
        spec.target = plain


def _translate(
    exported: torch.export.ExportedProgram, names: tuple[list[str], list[str]], title: str
) -> torch.onnx.ONNXProgram:
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
                input_names=names[0],
                output_names=names[1],
                custom_translation_table=table,
                verbose=False,
            )
    except Exception as error:  # of many kinds, the useful one at the end of the chain
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(f"{title} cannot be written as ONNX: {explanation(cause)}") from error
    assert written is not None  # noqa: S101  (for the type checker: only the old exporter returns None)
    return written


def _place(error: BaseException) -> str:
    """The innermost line of the model's own code that the error passed through, as " (at file:line: code)"."""
    torch_folder = str(Path(torch.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_folder, "<")) and not frame.filename.endswith(_OWN)
    ]
    return f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""


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
