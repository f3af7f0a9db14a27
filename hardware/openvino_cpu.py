"""OpenVINO on the CPU."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from hardware.artifacts import build_onnx, onnx_file
from hardware.kernels import Kernel, convolution_macs, product_macs, summary
from hardware.packages import missing
from harness.contracts import JSON, Scheme
from harness.errors import DataError, InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.contracts import FloatArray

_CONVOLUTIONS = {"Convolution", "GroupConvolution", "Deconvolution"}
_PRODUCTS = {"FullyConnected", "MatMul"}
_ATTENTION = {"ScaledDotProductAttention", "ScaledDotProductAttentionWithKVCache"}
_NOT_EXECUTED = {"Const", "Input", "Output", "Parameter", "Result"}


@functools.cache
def _runtime() -> Any:
    # Its import sends an event and writes an id into the home folder, unless the telemetry package is not there.
    absent = object()
    before = sys.modules.get("openvino_telemetry", absent)
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if before is absent:
            del sys.modules["openvino_telemetry"]
        else:
            sys.modules["openvino_telemetry"] = before  # type: ignore[assignment]
    return openvino


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class OpenVino:
    """OpenVINO's CPU plugin, latency mode, one stream.

    It reads the ONNX file itself, which is therefore what is deployed and weighed.

    Parameters
    ----------
    precision : {"f32", "bf16"}
        Of what is not quantized. Always asked for: left alone, the plugin runs f32 models in bf16 where the CPU can.
    """

    packages: ClassVar[tuple[str, ...]] = ("openvino", "onnx", "onnxscript", "torch")

    precision: Literal["f32", "bf16"] = "f32"

    @property
    def scheme(self) -> Scheme:
        """u8 affine activations, s8 weights per channel, int32 bias: as fast here as s8 activations."""
        return Scheme()

    def unavailable(self) -> str | None:
        """A reason why OpenVINO cannot run here, or None."""
        return missing(("openvino", "onnx", "onnxscript"), "openvino", _runtime)

    def build(self, model: nn.Module, example: Tensor, folder: Path) -> Path:
        """Export to ONNX; see :func:`hardware.export.to_onnx`."""
        return build_onnx(model, example, folder)

    def load(self, artifact: Path, *, threads: int, batch: tuple[int, ...]) -> OpenVinoDeployed:
        """Read and compile the artifact for inputs of shape ``batch``.

        Raises
        ------
        DataError
            If the file is missing or damaged.
        InputError
            If the model does not take inputs of this shape.
        """
        return OpenVinoDeployed(onnx_file(artifact), threads, batch, self.precision)


class OpenVinoDeployed:
    """A compiled model with one inference request, its input tensor preset."""

    def __init__(self, path: Path, threads: int, batch: tuple[int, ...], precision: str) -> None:
        ov = _runtime()
        self._asked = precision
        core = ov.Core()
        try:
            model = core.read_model(path)
        except RuntimeError as error:
            raise DataError(f"OpenVINO cannot read {path}: {_first_line(error)}") from error
        taken = model.inputs[0].get_partial_shape()
        if not taken.compatible(ov.PartialShape(list(batch))):
            raise InputError(f"The model takes inputs of shape {taken}; got {list(batch)}.")
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }
        try:
            model.reshape(list(batch))
            self._compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise DataError(f"OpenVINO cannot compile {path}: {_first_line(error)}") from error
        self._request = self._compiled.create_infer_request()
        self._input = np.zeros(batch, np.float32)
        self._request.set_input_tensor(ov.Tensor(self._input, shared_memory=True))

    @functools.cached_property
    def effective(self) -> Mapping[str, JSON]:
        """Read back from the compiled model and its executed graph; nothing is run for it."""
        kernels = list(_kernels(self._compiled))
        quantized = any(kernel.precision == "int8" or kernel.kind == "FakeQuantize" for kernel in kernels)
        if quantized:
            wanted, because = "int8", "the model is quantized"
        else:
            wanted, because = self._asked, f"{self._asked} was asked for"
        hint = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        return {
            "threads": int(self._compiled.get_property("INFERENCE_NUM_THREADS")),
            "streams": int(self._compiled.get_property("NUM_STREAMS")),
            "provider": ",".join(self._compiled.get_property("EXECUTION_DEVICES")),
            "inference_precision_hint": {"float32": "f32", "bfloat16": "bf16"}.get(hint.to_string(), hint.to_string()),
            **summary(kernels, wanted=wanted, because=because),
        }

    def bind(self, x: FloatArray) -> None:
        """Copy one batch into the preset input."""
        if x.shape != self._input.shape:
            raise InputError(f"Bound to inputs of shape {self._input.shape}; got {x.shape}.")
        np.copyto(self._input, x)

    def __call__(self) -> None:
        """Run the request on the preset input."""
        self._request.infer(share_outputs=True)  # without it the outputs are copied on each call

    def synchronize(self) -> None:
        """Nothing to wait for: the call is synchronous."""

    def fetch(self) -> FloatArray:
        """A copy of the outputs, shape (n, classes)."""
        outputs: FloatArray = self._request.get_output_tensor(0).data.copy()
        return outputs

    def close(self) -> None:
        """Drop the compiled model."""
        self._request = self._compiled = None


def _kernels(compiled: Any) -> Iterator[Kernel]:
    for node in compiled.get_runtime_model().get_ordered_ops():
        said = node.get_rt_info()
        kind, precision = str(said["layerType"].astype(str)), str(said["runtimePrecision"].astype(str))
        if kind in _NOT_EXECUTED:
            continue
        output = list(node.get_output_shape(0)) if node.get_output_partial_shape(0).is_static else []
        inputs = [list(port.get_shape()) if port.get_partial_shape().is_static else [] for port in node.inputs()]
        macs = 0
        if kind in _CONVOLUTIONS:
            macs = convolution_macs(output, inputs[1])
        elif kind in _PRODUCTS:
            macs = product_macs(output, inputs[0])
        elif kind in _ATTENTION:
            macs = math.prod(inputs[0]) * inputs[1][-2] * 2  # queries by keys, then weights by values
        # i8 and u8 name the activations; the arithmetic of both is 8-bit integer.
        computes_integer = macs and precision in ("u8", "i8")
        yield Kernel(kind=kind, precision="int8" if computes_integer else precision, macs=macs)


def _first_line(error: BaseException) -> str:
    """The first line of an OpenVINO message that says something: it begins with its own source locations."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (useful or lines or [type(error).__name__])[0]
