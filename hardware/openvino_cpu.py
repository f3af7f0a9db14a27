"""OpenVINO on the CPU."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from hardware import decoding, openvino_kernels, ports, stored
from hardware.artifacts import FORWARD, build_onnx, onnx_file
from hardware.kernels import stored_as, summary
from hardware.packages import missing
from harness.contracts import JSON, Scheme
from harness.errors import DataError, InputError, Unsupported, explanation

if TYPE_CHECKING:
    from torch import nn

    from harness.contracts import Arrays, Deployed, Signature, Tensors

# What the plugin takes and keeps: it computes 64-bit floats in 32 bits, which would change them without a word.
_DTYPES = {
    "f32": "float32", "f16": "float16", "boolean": "bool", "u8": "uint8", "i8": "int8", "i16": "int16",
    "i32": "int32", "i64": "int64",
}  # fmt: skip
_EXACT = 2**24
_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@functools.cache
def runtime() -> Any:
    """The package, imported so that it reports nothing."""
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

    It reads the ONNX file itself, which is therefore what is deployed and weighed. What the plugin would choose by the
    CPU, and what changes numbers, is always asked for.

    Parameters
    ----------
    precision : {"f32", "bf16"}
        Of what is not quantized: left alone, the plugin runs f32 models in bf16 where the CPU can.
    dynamic_quantization : int
        Activations that meet weights of 8 or fewer bits are rounded to 8-bit integers in groups of this size: 32, the
        plugin's own choice, is fast; 0 computes in ``precision``.
    kv_cache : {"f32", "bf16", "f16", "u8"}
        Of a cache that the plugin keeps itself.
    """

    packages: ClassVar[tuple[str, ...]] = ("openvino", "onnx", "onnxscript", "torch")

    precision: Literal["f32", "bf16"] = "f32"
    dynamic_quantization: Annotated[int, Field(ge=0)] = 32
    kv_cache: Literal["f32", "bf16", "f16", "u8"] = "f32"

    @property
    def scheme(self) -> Scheme:
        """u8 affine activations, s8 weights per channel, int32 bias: as fast here as s8 activations."""
        return Scheme()

    def unavailable(self) -> str | None:
        """A reason why OpenVINO cannot run here, or None."""
        return missing(("openvino", "onnx", "onnxscript"), "openvino", runtime)

    def build(
        self,
        model: nn.Module,
        signature: Signature,
        example: Tensors,
        folder: Path,
        phases: Sequence[str] = FORWARD,
    ) -> Path:
        """Export to ONNX, or copy the ONNX file that the model is; see :func:`hardware.artifacts.build_onnx`."""
        return build_onnx(model, signature, example, folder, phases)

    def load(self, artifact: Path, *, signature: Signature, inputs: Arrays, threads: int) -> Deployed:
        """Read and compile the artifact for inputs of exactly these shapes and dtypes.

        Raises
        ------
        DataError
            If the file is missing or damaged.
        InputError
            If the model does not take these inputs.
        Unsupported
            If the plugin would change an input's values.
        """
        ports.check(signature, inputs)
        path = onnx_file(artifact)
        model = read(path)
        if decoding.layers_of(name for source in model.inputs for name in source.get_names()):
            from hardware.openvino_decoding import OpenVinoDecoder

            return OpenVinoDecoder(model, path, signature, inputs, threads, self)
        return OpenVinoDeployed(model, path, signature, inputs, threads, self)

    def compiled(self, model: Any, threads: int, path: Path) -> Any:
        """The model compiled with these settings.

        Raises
        ------
        DataError
            If the plugin refuses it.
        """
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self.dynamic_quantization,
            "KV_CACHE_PRECISION": self.kv_cache,
        }
        try:
            return runtime().Core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise DataError(f"OpenVINO cannot compile {path}: {_why(error)}") from error


class OpenVinoDeployed:
    """A compiled model with one inference request, its input tensors preset."""

    def __init__(
        self, model: Any, path: Path, signature: Signature, inputs: Arrays, threads: int, settings: OpenVino
    ) -> None:
        ov = runtime()
        self._path, self._settings = path, settings
        self._bound = ports.zeros(signature, inputs)
        place = ["framework", ports.LIMITS]
        ports.check_limits(
            signature, inputs, model.get_rt_info(place).astype(str) if model.has_rt_info(place) else None
        )
        sources = _matched(model.inputs, signature.inputs, "input")
        for source, (name, value) in zip(sources, self._bound.items(), strict=True):
            _check(name, source, value)
        shapes = {source: list(value.shape) for source, value in zip(sources, self._bound.values(), strict=True)}
        try:
            model.reshape(shapes)
        except RuntimeError as error:
            raise InputError(f"{path} does not take inputs of these shapes: {_why(error)}") from error
        self._shapes = {source.get_any_name(): shape for source, shape in shapes.items()}
        # Places, since a tensor may have several names.
        places = [model.inputs.index(source) for source in sources]
        sinks = _matched(model.outputs, signature.outputs, "output")
        self._outputs = {
            port.name: model.outputs.index(sink) for port, sink in zip(signature.outputs, sinks, strict=True)
        }
        self._compiled = settings.compiled(model, threads, path)
        self._request = self._compiled.create_infer_request()
        for place, value in zip(places, self._bound.values(), strict=True):
            self._request.set_input_tensor(place, ov.Tensor(value, shared_memory=True))

    @functools.cached_property
    def effective(self) -> Mapping[str, JSON]:
        """Read back from the compiled model and its executed graph; nothing is run for it."""
        original = read(self._path)
        original.reshape(self._shapes)
        return effective(self._compiled, original, self._path)

    def bind(self, inputs: Arrays) -> None:
        """Copy one batch into the preset inputs.

        Raises
        ------
        Unsupported
            If an integer is larger than the plugin computes exactly.
        """
        ports.check_bound(self._bound, inputs)
        for name, place in self._bound.items():
            check_integers(name, inputs[name])
            np.copyto(place, inputs[name])

    def __call__(self, phase: str = "forward") -> None:
        """Run the request on the preset inputs."""
        if phase != "forward":
            raise InputError(f"This artifact runs forward, not {phase!r}.")
        self._request.infer(share_outputs=True)  # without it the outputs are copied on each call

    def synchronize(self) -> None:
        """Nothing to wait for: the call is synchronous."""

    def fetch(self) -> dict[str, Any]:
        """The outputs of the last call by name, as copies."""
        return {name: self._request.get_output_tensor(place).data.copy() for name, place in self._outputs.items()}

    def close(self) -> None:
        """Drop the compiled model."""
        self._request = self._compiled = None


def read(path: Path) -> Any:
    """The model of an ONNX file.

    Raises
    ------
    DataError
        If the file is missing or damaged.
    Unsupported
        If it holds an operation that OpenVINO does not know.
    """
    try:
        return runtime().Core().read_model(path)
    except RuntimeError as error:
        # An operation that it does not know is a fault of neither the file nor the user.
        kind = Unsupported if "OpConversionFailure" in str(error) else DataError
        raise kind(f"OpenVINO cannot read {path}: {_why(error)}") from error


def effective(compiled: Any, original: Any, path: Path) -> dict[str, JSON]:
    """What :attr:`Deployed.effective` says of a compiled model.

    Parameters
    ----------
    compiled : CompiledModel
    original : Model
        The model before compilation, of the same shapes.
    path : Path
        Its file.
    """
    dynamic = int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE"))
    hint = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    asked = _HINTS.get(hint, hint)
    graph = compiled.get_runtime_model()
    kernels = list(openvino_kernels.executed(graph, original, asked=asked, dynamic_quantization=dynamic > 0))
    file = stored.precision(path)
    if any(kernel.precision == "int8" or kernel.kind == "FakeQuantize" for kernel in kernels):
        wanted, because = "int8", "the model is quantized"
    elif file.startswith("w"):
        wanted, because = file, stored_as(file)
    else:
        wanted, because = asked, f"{asked} was asked for"
    return {
        "threads": int(compiled.get_property("INFERENCE_NUM_THREADS")),
        "streams": int(compiled.get_property("NUM_STREAMS")),
        "provider": ",".join(compiled.get_property("EXECUTION_DEVICES")),
        "inference_precision_hint": asked,
        "dynamic_quantization_group_size": dynamic,
        "kv_cache_precision": compiled.get_property("KV_CACHE_PRECISION").to_string(),
        **summary(kernels, wanted=wanted, because=because),
    }


def check_integers(name: str, array: Any) -> None:
    """Refuse integers that the plugin would change: its remainders, comparisons and sums go through 32-bit floats.

    Raises
    ------
    Unsupported
        Naming the input.
    """
    if array.dtype.kind not in "iu" or not array.size:
        return
    low, high = int(array.min()), int(array.max())
    if not -_EXACT <= low <= high <= _EXACT:
        raise Unsupported(
            f"OpenVINO computes integers in 32-bit floats, exact up to 2**24 = {_EXACT}; the {array.dtype} input "
            f"{name!r} holds {high if high > _EXACT else low}."
        )


def _matched(nodes: Sequence[Any], wanted: Sequence[Any], kind: str) -> list[Any]:
    found = {name: node for node in nodes for name in node.get_names()}
    if all(port.name in found for port in wanted):
        return [found[port.name] for port in wanted]
    ports.matched(wanted, [node.get_any_name() for node in nodes], kind)  # says what is wrong
    return list(nodes)


def _check(name: str, source: Any, array: Any) -> None:
    kind = source.get_element_type().to_string()
    if _DTYPES.get(kind) != str(array.dtype):
        why = " in full precision" if kind == "f64" else ""
        raise Unsupported(f"OpenVINO's input {name!r} does not take {array.dtype}{why}; its type there is {kind}.")
    taken = source.get_partial_shape()
    if not taken.compatible(runtime().PartialShape(list(array.shape))):
        raise InputError(f"The model takes inputs of shape {taken} as {name!r}; got {list(array.shape)}.")


def _why(error: BaseException) -> str:
    """What an OpenVINO message says, without its own source locations and headings."""
    noise = ("Exception from", "Check '", "Model wasn't fully converted", "While validating", "Summary:")
    lines = (line.strip().removeprefix("-- ") for line in str(error).splitlines())
    useful = "\n".join(line for line in lines if line and not line.startswith(noise))
    return explanation(RuntimeError(useful)).removeprefix("RuntimeError: ")
