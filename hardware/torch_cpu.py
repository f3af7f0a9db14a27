"""PyTorch on the CPU, eager."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hardware import ports
from hardware.artifacts import FORWARD, file_of
from hardware.causal import Interface, empty_cache
from hardware.decoding import Generation, advance, check_signature, tokens_of, unknown_phase
from hardware.kernels import Kernel, stored_as, summary
from harness import modelfile
from harness.calling import arguments, named
from harness.contracts import JSON, Scheme
from harness.errors import Unsupported
from harness.measure.counts import operator_macs
from harness.quantized import ActivationQuantizer, QuantizedConv2d, QuantizedLinear

if TYPE_CHECKING:
    from harness.contracts import Arrays, Signature, Tensors

NAME = "model.assay"

_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Torch:
    """The ``nn.Module`` itself, called in inference mode."""

    packages: ClassVar[tuple[str, ...]] = ("torch",)

    @property
    def scheme(self) -> Scheme:
        """The default scheme: integers are simulated here, so none is faster than another."""
        return Scheme()

    def unavailable(self) -> str | None:
        """PyTorch is always here."""
        return None

    def build(
        self,
        model: nn.Module,
        signature: Signature,
        example: Tensors,
        folder: Path,
        phases: Sequence[str] = FORWARD,
    ) -> Path:
        """Save the model; see :func:`harness.modelfile.save`.

        Raises
        ------
        Unsupported
            If the model is a file of another runtime, or cannot generate and is asked to.
        """
        del example  # part of the contract; a module needs none
        if (given := file_of(model)) is not None:
            raise Unsupported(f"{given.name} is an ONNX file, which PyTorch does not run: use onnxruntime or openvino.")
        if tuple(phases) != FORWARD:
            check_signature(signature)
            Interface.of(model)
        folder.mkdir(parents=True, exist_ok=True)
        return modelfile.save(model, folder / NAME)

    def load(self, artifact: Path, *, signature: Signature, inputs: Arrays, threads: int) -> TorchDeployed:
        """Load the artifact for inputs of these shapes and dtypes; sets the thread count of the whole process.

        Raises
        ------
        DataError
            If the file is missing, damaged, or names classes that are not trusted (see :mod:`harness.modelfile`).
        InputError
            If the inputs are not the signature's.
        """
        ports.check(signature, inputs)
        torch.set_num_threads(threads)
        # Settable once a process, and only before its first use; there is no parallelism between operations in eager
        # mode anyway.
        with contextlib.suppress(RuntimeError):
            torch.set_num_interop_threads(1)
        return TorchDeployed(modelfile.load(artifact).eval(), signature, inputs)


class TorchDeployed:
    """A module with its inputs."""

    def __init__(self, model: nn.Module, signature: Signature, inputs: Arrays) -> None:
        self._model, self._signature = model, signature
        self._bound = ports.zeros(signature, inputs)
        self._tensors = {name: torch.from_numpy(value) for name, value in self._bound.items()}
        self._args, self._kwargs = arguments(model, self._tensors, signature)
        self._result: Any = None
        self._generation: Generation | None = None
        self._cache: Any = None

    @property
    def generated(self) -> Any:
        """The tokens that were decoded since the last prefill, shape (n, tokens)."""
        return tokens_of(self._generation)

    @functools.cached_property
    def effective(self) -> Mapping[str, JSON]:
        """Read back from torch; kernels from one run under a dispatch recorder, at first access."""
        with _Recorder() as recorder, torch.no_grad():
            self._model(*self._args, **self._kwargs)
        layers = (ActivationQuantizer, QuantizedConv2d, QuantizedLinear)
        simulated = any(isinstance(module, layers) for module in self._model.modules())
        wanted = _precision(self._model)
        found = summary(recorder.kernels, wanted=wanted, because=stored_as(wanted))
        if simulated:
            found["precision_reason"] = (
                "simulated: torch computes the quantized function in float (quantize, then dequantize)"
            )
        return {
            "threads": torch.get_num_threads(),
            "streams": 1,
            "provider": "cpu, eager" + (", oneDNN" if torch._C._has_mkldnn else ""),
            **found,
        }

    def bind(self, inputs: Arrays) -> None:
        """Copy one batch into the inputs."""
        ports.check_bound(self._bound, inputs)
        for name, place in self._tensors.items():
            # A copy: what was mapped read-only from disk has no writable memory to share.
            place.copy_(torch.from_numpy(inputs[name].copy()))

    def __call__(self, phase: str = "forward") -> None:
        """Call the module on the inputs; "prefill" and "decode" of a causal language model keep a cache."""
        with torch.inference_mode():
            if phase == "forward":
                self._generation, self._result = None, self._model(*self._args, **self._kwargs)
                return
            if phase == "prefill":
                self._generation, self._cache = Generation(self._bound), empty_cache()
            elif phase == "decode":
                advance(self._generation, lambda: self._result.numpy(force=True))
            else:
                raise unknown_phase(phase)
            self._result = self._scores(self._generation)

    def _scores(self, at: Any) -> Tensor:
        ids, mask, positions, kept = map(torch.from_numpy, (at.ids, at.mask, at.positions, at.kept))
        scores = self._interface.call(self._model, ids, mask, positions, kept, self._cache)
        return scores.float() if scores.dtype == torch.bfloat16 else scores

    @functools.cached_property
    def _interface(self) -> Interface:
        check_signature(self._signature)
        return Interface.of(self._model)

    def synchronize(self) -> None:
        """Nothing to wait for: the call is synchronous."""

    def fetch(self) -> dict[str, Any]:
        """The outputs of the last call by name, as copies."""
        if self._generation is not None:
            return {self._signature.outputs[0].name: _array(self._result)}
        outputs = named(self._result, self._signature, len(next(iter(self._tensors.values()))))
        return {name: _array(value) for name, value in outputs.items()}

    def close(self) -> None:
        """Drop the module."""
        self._model, self._result, self._cache = nn.Identity(), None, None


def _array(value: Tensor) -> Any:
    # NumPy has no bfloat16; float32 holds every one of its values.
    plain = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
    return plain.numpy().copy()


def _precision(model: nn.Module) -> str:
    """That of most of the model's numbers."""
    sizes: Counter[str] = Counter()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in _TYPES:
            sizes[_TYPES[tensor.dtype]] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else "f32"


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation that reaches a kernel, with its multiply-accumulates."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        output = result[0] if isinstance(result, tuple) and result else result
        macs = operator_macs(func, args, output)
        if isinstance(output, Tensor) and (macs or output.is_floating_point()):
            precision = _TYPES.get(output.dtype, str(output.dtype).removeprefix("torch."))
            self.kernels.append(Kernel(kind=func.overloadpacket.__name__, precision=precision, macs=macs))
        return result
