"""ONNX Runtime on the CPU."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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

_ERRORS_ONLY = 3
# Operation name: (position of the weights or the left operand among the inputs, whether it is a convolution).
_MAC_OPERATIONS: dict[str, tuple[int, bool]] = {
    "Conv": (1, True),
    "FusedConv": (1, True),
    "NhwcFusedConv": (1, True),
    "ConvInteger": (1, True),
    "QLinearConv": (3, True),
    "Gemm": (0, False),
    "FusedGemm": (0, False),
    "QGemm": (0, False),
    "MatMul": (0, False),
    "FusedMatMul": (0, False),
    "MatMulInteger": (0, False),
    "MatMulIntegerToFloat": (0, False),
    "DynamicQuantizeMatMul": (0, False),
    "QLinearMatMul": (0, False),
}
_INTEGER = {
    "ConvInteger",
    "QLinearConv",
    "QGemm",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QLinearMatMul",
}
_TYPES = {"float": "f32", "float16": "f16", "bfloat16": "bf16", "uint8": "u8", "int8": "s8"}


def _runtime() -> Any:
    # It writes a device id and a database into the home folder, and starts an uploading thread, unless told not to
    # before the import.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
    return onnxruntime


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class OnnxRuntime:
    """ONNX Runtime's CPU provider; all graph optimizations, one intra-op pool of the given size, sequential execution.

    Parameters
    ----------
    spinning : bool
        Whether the pool's idle threads spin, as by default, or sleep. With one thread there is no pool.
    """

    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx", "onnxscript", "torch")

    spinning: bool = True

    @property
    def scheme(self) -> Scheme:
        """u8 affine activations, s8 weights per channel, int32 bias: the combination with integer kernels on x86."""
        return Scheme()

    def unavailable(self) -> str | None:
        """A reason why ONNX Runtime cannot run here, or None."""
        return missing(("onnxruntime", "onnx", "onnxscript"), "onnxruntime", _runtime)

    def build(self, model: nn.Module, example: Tensor, folder: Path) -> Path:
        """Export to ONNX; see :func:`hardware.export.to_onnx`."""
        return build_onnx(model, example, folder)

    def load(self, artifact: Path, *, threads: int, batch: tuple[int, ...]) -> OnnxRuntimeDeployed:
        """Load the artifact for inputs of shape ``batch``.

        Raises
        ------
        DataError
            If the file is missing or damaged.
        InputError
            If the model does not take inputs of this shape.
        """
        return OnnxRuntimeDeployed(onnx_file(artifact), threads, batch, self.spinning)


class OnnxRuntimeDeployed:
    """A session with input and output bound to memory of its own."""

    def __init__(self, path: Path, threads: int, batch: tuple[int, ...], spinning: bool) -> None:
        self._path, self._threads, self._batch, self._spinning = path, threads, batch, spinning
        self._ort = _runtime()
        self._session = self._open(self._options())
        (source,), (sink,) = self._session.get_inputs(), self._session.get_outputs()
        if len(source.shape) != len(batch) or any(
            isinstance(size, int) and size != given for size, given in zip(source.shape, batch, strict=True)
        ):
            raise InputError(f"The model takes inputs of shape {source.shape}; got {list(batch)}.")
        self._input_name = source.name
        self._input = self._ort.OrtValue.ortvalue_from_numpy(np.zeros(batch, np.float32))
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input(source.name, self._input)
        self._binding.bind_output(sink.name)

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = self._ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = _ERRORS_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self._spinning else "0")
        # The exporter's name of the dynamic axis: a fixed batch lets the session plan its memory.
        options.add_free_dimension_override_by_name("batch", self._batch[0])
        return options

    def _open(self, options: Any) -> Any:
        try:
            return self._ort.InferenceSession(self._path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class below Exception
            raise DataError(f"ONNX Runtime cannot load {self._path}: {str(error).strip().splitlines()[0]}") from error

    @functools.cached_property
    def effective(self) -> Mapping[str, JSON]:
        """Read back from the session; precision and kernels from the runtime's profile of one run.

        The profile is taken at first access, in a second session that is then dropped: read it after whatever is
        measured.
        """
        options = self._session.get_session_options()
        kernels = list(self._profile())
        quantized = any(kernel.precision == "int8" or "Quantize" in kernel.kind for kernel in kernels)
        return {
            "threads": options.intra_op_num_threads,
            "streams": 1,
            "provider": self._session.get_providers()[0],
            "spinning": options.get_session_config_entry("session.intra_op.allow_spinning") == "1",
            **summary(
                kernels,
                wanted="int8" if quantized else "f32",
                because="the model is quantized" if quantized else "the model is in f32",
            ),
        }

    def _profile(self) -> Iterator[Kernel]:
        with tempfile.TemporaryDirectory(prefix="assay-profile-") as folder:
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            # Prepacked weights lose their shapes in the profile; the choice of kernels is made before.
            options.add_session_config_entry("session.disable_prepacking", "1")
            session = self._open(options)
            session.run(None, {self._input_name: np.zeros(self._batch, np.float32)})
            events = json.loads(Path(session.end_profiling()).read_text())
        for event in events:
            if event.get("cat") == "Node" and "op_name" in event["args"]:
                yield _kernel(event["args"])

    def bind(self, x: FloatArray) -> None:
        """Copy one batch into the bound input."""
        if x.shape != self._batch:
            raise InputError(f"Bound to inputs of shape {self._batch}; got {x.shape}.")
        self._input.update_inplace(np.ascontiguousarray(x, np.float32))

    def __call__(self) -> None:
        """Run the session on the bound input."""
        self._session.run_with_iobinding(self._binding)

    def synchronize(self) -> None:
        """Nothing to wait for: the call is synchronous."""

    def fetch(self) -> FloatArray:
        """A copy of the outputs, shape (n, classes)."""
        outputs: FloatArray = self._binding.get_outputs()[0].numpy().copy()
        return outputs

    def close(self) -> None:
        """Drop the session."""
        self._binding = self._session = self._input = None


def _kernel(arguments: Mapping[str, Any]) -> Kernel:
    kind = arguments["op_name"]
    (output_type, output), *_ = (next(iter(item.items())) for item in arguments["output_type_shape"])
    precision = _TYPES.get(output_type, output_type)
    if kind not in _MAC_OPERATIONS:
        return Kernel(kind=kind, precision=precision)
    position, convolution = _MAC_OPERATIONS[kind]
    shapes = [next(iter(item.values())) for item in arguments["input_type_shape"]]
    macs = (convolution_macs if convolution else product_macs)(output, shapes[position])
    return Kernel(kind=kind, precision="int8" if kind in _INTEGER else precision, macs=macs)
