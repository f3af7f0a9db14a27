"""PyTorch on the CPU, eager."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hardware.kernels import Kernel, convolution_macs, product_macs, summary
from harness import modelfile
from harness.contracts import JSON, Scheme
from harness.errors import InputError
from harness.quantized import ActivationQuantizer, QuantizedConv2d, QuantizedLinear

if TYPE_CHECKING:
    from harness.contracts import FloatArray

NAME = "model.assay"

_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}
# Position of the left operand of a matrix product.
_PRODUCTS = {"addmm": 1, "mm": 0, "bmm": 0, "baddbmm": 1}


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

    def build(self, model: nn.Module, example: Tensor, folder: Path) -> Path:
        """Save the model; see :func:`harness.modelfile.save`."""
        del example  # part of the contract; a module needs no example input
        folder.mkdir(parents=True, exist_ok=True)
        return modelfile.save(model, folder / NAME)

    def load(self, artifact: Path, *, threads: int, batch: tuple[int, ...]) -> TorchDeployed:
        """Load the artifact for inputs of shape ``batch``; sets the thread count of the whole process.

        Raises
        ------
        DataError
            If the file is missing, damaged, or names classes that are not trusted (see :mod:`harness.modelfile`).
        """
        torch.set_num_threads(threads)
        # Settable once a process, and only before its first use; there is no parallelism between operations in eager
        # mode anyway.
        with contextlib.suppress(RuntimeError):
            torch.set_num_interop_threads(1)
        return TorchDeployed(modelfile.load(artifact).eval(), batch)


class TorchDeployed:
    """A module with its input."""

    def __init__(self, model: nn.Module, batch: tuple[int, ...]) -> None:
        self._model = model
        self._input = torch.zeros(batch)
        self._output = torch.empty(0)

    @functools.cached_property
    def effective(self) -> Mapping[str, JSON]:
        """Read back from torch; kernels from one run under a dispatch recorder, at first access."""
        with _Recorder() as recorder, torch.no_grad():
            self._model(self._input)
        layers = (ActivationQuantizer, QuantizedConv2d, QuantizedLinear)
        simulated = any(isinstance(module, layers) for module in self._model.modules())
        found = summary(recorder.kernels, wanted="f32", because="the model is in f32")
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

    def bind(self, x: FloatArray) -> None:
        """Copy one batch into the input."""
        if x.shape != tuple(self._input.shape):
            raise InputError(f"Bound to inputs of shape {tuple(self._input.shape)}; got {x.shape}.")
        self._input.copy_(torch.from_numpy(x))

    def __call__(self) -> None:
        """Call the module on the input."""
        with torch.inference_mode():
            self._output = self._model(self._input)

    def synchronize(self) -> None:
        """Nothing to wait for: the call is synchronous."""

    def fetch(self) -> FloatArray:
        """A copy of the outputs, shape (n, classes)."""
        outputs: FloatArray = self._output.numpy().copy()
        return outputs

    def close(self) -> None:
        """Drop the module."""
        self._model = nn.Identity()


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
        if isinstance(output, Tensor) and output.is_floating_point():
            kind = func.overloadpacket.__name__
            macs = 0
            if kind in ("convolution", "_convolution", "mkldnn_convolution"):
                macs = convolution_macs(output.shape, args[1].shape)
            elif kind in _PRODUCTS:
                macs = product_macs(output.shape, args[_PRODUCTS[kind]].shape)
            elif kind.startswith("_scaled_dot_product"):
                macs = 2 * math.prod(args[0].shape) * args[1].shape[-2]
            self.kernels.append(Kernel(kind=kind, precision=_TYPES.get(output.dtype, str(output.dtype)), macs=macs))
        return result
