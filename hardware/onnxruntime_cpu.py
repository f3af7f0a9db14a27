"""ONNX Runtime on the CPU."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from hardware import decoding, ports, stored
from hardware.artifacts import FORWARD, build_onnx, onnx_file
from hardware.kernels import Kernel, stored_as, summary, weights_and_activations
from hardware.onnx_operators import INTEGER, OPERATORS
from hardware.packages import missing
from harness.contracts import JSON, Scheme
from harness.errors import DataError, InputError, Unsupported, explanation

if TYPE_CHECKING:
    from torch import nn

    from harness.contracts import Arrays, Signature, Tensors

_ERRORS_ONLY, _FATAL_ONLY = 3, 4
_TYPES = {"float": "f32", "double": "f64", "float16": "f16", "bfloat16": "bf16", "uint8": "u8", "int8": "s8"}
_BITS = {"float": 32, "double": 64, "float16": 16, "bfloat16": 16}
_DTYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "bool": "bool", "uint8": "uint8", "int8": "int8",
    "int16": "int16", "int32": "int32", "int64": "int64",
}  # fmt: skip


def runtime() -> Any:
    """The package, imported so that it reports nothing."""
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
    accuracy_level : {0, 4}
        Of products whose weights are stored in few bits with QuantizeLinear's operators: 4, the runtime's own choice,
        rounds activations to 8-bit integers (fast); 0 computes in the activations' type.
    """

    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx", "onnxscript", "torch")

    spinning: bool = True
    accuracy_level: Literal[0, 4] = 4

    @property
    def scheme(self) -> Scheme:
        """u8 affine activations, s8 weights per channel, int32 bias: the combination with integer kernels on x86."""
        return Scheme()

    def unavailable(self) -> str | None:
        """A reason why ONNX Runtime cannot run here, or None."""
        return missing(("onnxruntime", "onnx", "onnxscript"), "onnxruntime", runtime)

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

    def load(self, artifact: Path, *, signature: Signature, inputs: Arrays, threads: int) -> OnnxRuntimeDeployed:
        """Load the artifact for inputs of exactly these shapes and dtypes.

        Raises
        ------
        DataError
            If the file is missing or damaged.
        InputError
            If the model does not take these inputs.
        Unsupported
            If the runtime has no kernel for an operation in the model's types.
        """
        ports.check(signature, inputs)
        return OnnxRuntimeDeployed(onnx_file(artifact), signature, inputs, threads, self)


class OnnxRuntimeDeployed:
    """A session with inputs and outputs bound to memory of its own; the cache of a generation stays the runtime's."""

    def __init__(self, path: Path, signature: Signature, inputs: Arrays, threads: int, settings: OnnxRuntime) -> None:
        self._path, self._threads, self._settings = path, threads, settings
        self._sizes = ports.axis_sizes(signature, inputs)
        self._bound = ports.zeros(signature, inputs)
        self._outputs = [port.name for port in signature.outputs]
        self._ort = runtime()
        # Attributes are let go in the order in which they came: a binding must not outlive the session it points to.
        self._binding: Any = None
        self._session: Any = None
        try:
            self._session = self._open(self._options())
        except DataError:
            # Sizes for which the file does not hold may keep it from loading at all: then that is what is said.
            self._sizes = {}
            self._session = self._open(self._options())
            self._check_limits(signature, inputs)
            raise
        self._check_limits(signature, inputs)
        taken = {item.name: item for item in self._session.get_inputs()}
        self._layers = decoding.layers_of(taken)
        self._generation: decoding.Generation | None = None
        self._values: dict[str, Any] = {}
        if self._layers:
            decoding.check_signature(signature)
            self._prepare_cache(taken)
            return
        self._names = ports.matched(signature.inputs, list(taken), "input")
        for port, name in zip(signature.inputs, self._names, strict=True):
            _check(port.name, taken[name], self._bound[port.name])
        self._values = {name: self._ort.OrtValue.ortvalue_from_numpy(value) for name, value in self._bound.items()}
        self._binding = self._session.io_binding()
        for name, value in zip(self._names, self._values.values(), strict=True):
            self._binding.bind_ortvalue_input(name, value)
        given = [item.name for item in self._session.get_outputs()]
        for name in ports.matched(signature.outputs, given, "output"):
            self._binding.bind_output(name)

    def _check_limits(self, signature: Signature, inputs: Arrays) -> None:
        said = self._session.get_modelmeta().custom_metadata_map
        ports.check_limits(signature, inputs, said.get(ports.LIMITS))

    def _prepare_cache(self, taken: Mapping[str, Any]) -> None:
        self._taken = tuple(taken)
        n = len(next(iter(self._bound.values())))
        self._empty = []
        for name in decoding.past_names(self._layers):
            _, heads, _, width = taken[name].shape
            kind = _DTYPES[taken[name].type.removeprefix("tensor(").removesuffix(")")]
            self._empty.append(self._ort.OrtValue.ortvalue_from_numpy(np.zeros((n, heads, 0, width), kind)))
        self._past = self._empty
        self._binding = self._session.io_binding()

    @property
    def generated(self) -> Any:
        """The tokens that were decoded since the last prefill, shape (n, tokens)."""
        return decoding.tokens_of(self._generation)

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = self._ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = _ERRORS_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self._settings.spinning else "0")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(self._settings.accuracy_level))
        # Fixed sizes let the session plan its memory.
        for name, size in self._sizes.items():
            options.add_free_dimension_override_by_name(name, size)
        return options

    def _open(self, options: Any) -> Any:
        try:
            return self._ort.InferenceSession(self._path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class below Exception
            said = f"ONNX Runtime cannot load {self._path}: {explanation(error)}"
            # No kernel for a type, or an operator that does not take it (bfloat16 convolutions), is no damage.
            unsupported = type(error).__name__ == "NotImplemented" or "Type Error" in str(error)
            raise (Unsupported if unsupported else DataError)(said) from error

    @functools.cached_property
    def effective(self) -> Mapping[str, JSON]:
        """Read back from the session; precision and kernels from the runtime's profile of one run.

        The profile is taken at first access, in a second session that is then dropped: read it after whatever is
        measured.
        """
        options = self._session.get_session_options()
        kernels = list(self._profile())
        quantized = any(kernel.precision == "int8" or "Quantize" in kernel.kind for kernel in kernels)
        wanted = "int8" if quantized else stored.precision(self._path)
        found: dict[str, JSON] = {
            "threads": options.intra_op_num_threads,
            "streams": 1,
            "provider": self._session.get_providers()[0],
            "spinning": options.get_session_config_entry("session.intra_op.allow_spinning") == "1",
            **summary(kernels, wanted=wanted, because="the model is quantized" if quantized else stored_as(wanted)),
        }
        if any(kernel.kind == "MatMulNBits" for kernel in kernels):
            found["accuracy_level"] = int(options.get_session_config_entry("session.qdq_matmulnbits_accuracy_level"))
        return found

    def _profile(self) -> Iterator[Kernel]:
        with tempfile.TemporaryDirectory(prefix="assay-profile-") as folder:
            options = self._options()
            # Prepacked weights lose their shapes in the profile; the choice of kernels is made before.
            options.add_session_config_entry("session.disable_prepacking", "1")
            nodes = profiled(self._open, options, self._feeds(), folder)
            packed: dict[tuple[int, ...], tuple[int, int]] = {}
            if any(node["op_name"] == "MatMulNBits" for node in nodes):
                packed = self._packed(Path(folder) / "optimized.onnx")
        for node in nodes:
            yield _kernel(node, packed)

    def _feeds(self) -> dict[str, Any]:
        if not self._layers:
            return dict(zip(self._names, self._bound.values(), strict=True))
        cache = {
            name: value.numpy() for name, value in zip(decoding.past_names(self._layers), self._empty, strict=True)
        }
        return {**decoding.feeds(decoding.Generation(self._bound), self._taken), **cache}

    def _packed(self, path: Path) -> dict[tuple[int, ...], tuple[int, int]]:
        """Bits of weights and of activations (0: their type's) by the shape of packed weights.

        The runtime makes such nodes itself, and its profile has no attributes: they are read in the optimized graph.
        """
        import onnx

        options = self._options()
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{path.name}.data")
        self._open(options)
        found: dict[tuple[int, ...], tuple[int, int]] = {}
        for graph in stored.graphs(onnx.load(path, load_external_data=False).graph):
            for node in graph.node:
                if node.op_type == "MatMulNBits":
                    said = {item.name: item.i for item in node.attribute}
                    bits, block = said.get("bits", 4), said["block_size"]
                    shape = (said["N"], -(-said["K"] // block), block * bits // 8)
                    found[shape] = (bits, 8 if said.get("accuracy_level") == 4 else 0)
        return found

    def bind(self, inputs: Arrays) -> None:
        """Copy one batch into the bound inputs."""
        ports.check_bound(self._bound, inputs)
        for name, place in self._bound.items():
            np.copyto(place, inputs[name])
            if name in self._values:
                self._values[name].update_inplace(place)

    def __call__(self, phase: str = "forward") -> None:
        """Run the session on the bound inputs; "prefill" and "decode" where the artifact keeps a cache."""
        if not self._layers:
            if phase != "forward":
                raise InputError(f"This artifact runs forward, not {phase!r}.")
            self._session.run_with_iobinding(self._binding)
            return
        if phase == "forward":
            self._generation = None
            self._run(decoding.Generation(self._bound, whole=True), self._empty)
            return
        if phase == "prefill":
            self._generation, self._past = decoding.Generation(self._bound), self._empty
        elif phase == "decode":
            decoding.advance(self._generation, self._logits)
        else:
            raise decoding.unknown_phase(phase)
        self._run(self._generation, self._past)

    def _run(self, at: Any, past: Sequence[Any]) -> None:
        binding = self._session.io_binding()
        for name, value in zip(decoding.past_names(self._layers), past, strict=True):
            binding.bind_ortvalue_input(name, value)
        given = decoding.feeds(at, self._taken)  # kept until the run is over: the binding reads its memory
        for name, value in given.items():
            binding.bind_cpu_input(name, value)
        for name in (decoding.LOGITS, *decoding.present_names(self._layers)):
            binding.bind_output(name)  # the runtime's own memory: what was past may still be read
        self._session.run_with_iobinding(binding)
        self._binding, self._past = binding, binding.get_outputs()[1:]

    def _logits(self) -> Any:
        return self._binding.get_outputs()[0].numpy()

    def synchronize(self) -> None:
        """Nothing to wait for: the call is synchronous."""

    def fetch(self) -> dict[str, Any]:
        """The outputs of the last call by name, as copies."""
        values = self._binding.get_outputs()  # a cache comes after the scores
        return {name: value.numpy().copy() for name, value in zip(self._outputs, values, strict=False)}

    def close(self) -> None:
        """Drop the session."""
        self._binding = None
        self._session = None
        self._values, self._past, self._empty = {}, [], []


def profiled(
    open_session: Callable[[Any], Any], options: Any, feeds: Mapping[str, Any], folder: str
) -> list[dict[str, Any]]:
    """What the runtime's profile of one run says of every node that was executed."""
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(folder) / "profile")
    session = open_session(options)
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    return [event["args"] for event in events if event.get("cat") == "Node" and "op_name" in event["args"]]


def unoptimized_macs(path: Path, feeds: Mapping[str, Any]) -> int:
    """Multiply-accumulates of a file's own operators, counted while they run.

    Raises
    ------
    Unsupported
        If the runtime cannot run the file on these inputs.
    """
    ort = runtime()
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY  # an error is raised as well
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")

    def open_session(options: Any) -> Any:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    try:
        with tempfile.TemporaryDirectory(prefix="assay-profile-") as folder:
            nodes = profiled(open_session, options, feeds, folder)
    except Exception as error:  # its exceptions share no base class below Exception
        raise Unsupported(f"ONNX Runtime cannot run {path.name} to count: {explanation(error)}") from error
    return sum(_macs(node) for node in nodes)


def _check(name: str, taken: Any, array: Any) -> None:
    kind = taken.type.removeprefix("tensor(").removesuffix(")")
    if _DTYPES.get(kind) != str(array.dtype):
        raise Unsupported(f"ONNX Runtime's input {name!r} takes {_DTYPES.get(kind, kind)}, not {array.dtype}.")
    fits = len(taken.shape) == array.ndim and all(
        not isinstance(size, int) or size == given for size, given in zip(taken.shape, array.shape, strict=True)
    )
    if not fits:
        raise InputError(f"The model takes inputs of shape {taken.shape} as {name!r}; got {list(array.shape)}.")


def _kernel(arguments: Mapping[str, Any], packed: Mapping[tuple[int, ...], tuple[int, int]]) -> Kernel:
    kind, outputs = arguments["op_name"], _shapes(arguments, "output_type_shape")
    output_type = outputs[0][0] if outputs else "none"
    precision = _TYPES.get(output_type, output_type)
    if kind == "MatMulNBits":
        bits, activations = packed.get(tuple(_shapes(arguments, "input_type_shape")[1][1]), (0, 0))
        activations = activations or _BITS.get(output_type, 32)
        precision = weights_and_activations(bits, activations) if bits else "unknown"
    return Kernel(kind=kind, precision="int8" if kind in INTEGER else precision, macs=_macs(arguments))


def _macs(arguments: Mapping[str, Any]) -> int:
    count = OPERATORS.get(arguments["op_name"])
    if count is None:
        return 0
    inputs, outputs = (_shapes(arguments, key) for key in ("input_type_shape", "output_type_shape"))
    return count([shape for _, shape in inputs], [shape for _, shape in outputs])


def _shapes(arguments: Mapping[str, Any], key: str) -> list[tuple[str, list[int]]]:
    return [next(iter(item.items())) for item in arguments[key]]
