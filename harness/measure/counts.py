"""Parameters, non-zeros and multiply-accumulates of a torch model, or of one that is a file."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.calling import call, evaluating, plain_attention

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.contracts import Signature, Tensors

# Matrix products of torch: position of the left operand, whose last axis is summed over.
_LEFT = {
    "mm": 0, "bmm": 0, "mv": 0, "dot": 0, "vdot": 0, "matmul": 0, "linear": 0,
    "addmm": 1, "baddbmm": 1, "addbmm": 1, "addmv": 1, "_addmm_activation": 1,
    "_int_mm": 0, "_scaled_mm": 0, "_grouped_mm": 0, "_scaled_grouped_mm": 0,
    "_weight_int8pack_mm": 0, "_weight_int4pack_mm_for_cpu": 0, "_weight_int4pack_mm_with_scales_and_zeros": 0,
    "linear_dynamic": 0, "linear_relu_dynamic": 0, "linear_dynamic_fp16": 0, "linear_relu": 0,
}  # fmt: skip
_CONVOLUTIONS = ("convolution", "_convolution", "mkldnn_convolution")


def file_of(model: nn.Module) -> Path | None:
    """The file that a model is, or None for a module of torch."""
    artifact = getattr(model, "artifact", None)
    return artifact if isinstance(artifact, Path) else None


def _graph() -> Any:
    """What reads the graph of a file: the runtimes' package knows the format; the core reaches it by name."""
    return importlib.import_module("hardware.onnx_signature")


def parameters(model: nn.Module) -> tuple[int, int]:
    """Count parameters and those that are not zero.

    A parameter is an entry of a ``nn.Parameter``, or of an integer buffer that holds a quantized weight or bias;
    scales, zero points, masks and normalisation statistics are not parameters.

    Returns
    -------
    tuple of int
        (total, non-zero). Shared tensors count once.
    """
    import torch

    from harness.quantized import quantized_parameters

    if (path := file_of(model)) is not None:
        total, nonzero = _graph().parameters(path)
        return int(total), int(nonzero)
    tensors: dict[int, Tensor] = {id(p): p for p in model.parameters()}
    tensors |= {id(t): t for t in quantized_parameters(model)}
    total = sum(t.numel() for t in tensors.values())
    nonzero = sum(int(torch.count_nonzero(t)) for t in tensors.values())
    return total, nonzero


def macs(model: nn.Module, inputs: Tensors, signature: Signature) -> int:
    """Multiply-accumulates of one example, from the operators that run.

    Convolutions, matrix products, attention and recurrent layers are counted. One MAC is two FLOPs. Zeros that are
    multiplied count: this is what a dense kernel executes. Element-wise operators, pooling and normalisation are not
    counted.

    Parameters
    ----------
    model : nn.Module
        Run once in evaluation mode and left as it was.
    inputs : Tensors
        One batch; the count is divided by its size.
    signature : Signature
        How the model is called.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    if (path := file_of(model)) is not None:
        axes = zip(signature.inputs, (inputs[port.name].shape[1:] for port in signature.inputs), strict=True)
        sizes = {name: size for port, shape in axes for name, size in zip(port.shape, shape, strict=True)}
        return int(_graph().macs(path, {name: size for name, size in sizes.items() if isinstance(name, str)}))
    counted = 0

    class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self,
            func: Any,
            types: Sequence[type],
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            nonlocal counted
            result = func(*args, **(kwargs or {}))
            counted += operator_macs(func, args, result)
            return result

    with evaluating(model), plain_attention(), Counter():  # type: ignore[no-untyped-call]
        call(model, inputs, signature)
    return counted // len(next(iter(inputs.values())))


def operator_macs(func: Any, args: Sequence[Any], result: Any) -> int:
    """Multiply-accumulates of one torch operator; 0 for those that are no products.

    Parameters
    ----------
    func : OpOverload
        As a ``TorchDispatchMode`` sees it.
    args : sequence
        Its arguments by place.
    result : object
        What it returned.
    """
    name = func.overloadpacket.__name__
    if name in _LEFT:
        left = args[_LEFT[name]].shape
        summed = int(left[0]) if name == "addbmm" else 1
        return product_macs(result.shape, left) * summed
    if name in _CONVOLUTIONS:
        transposed = name != "mkldnn_convolution" and args[6]
        # A transposed convolution spreads every input over the kernel, an ordinary one gathers every output from it.
        return convolution_macs(args[0].shape if transposed else result.shape, args[1].shape)
    if name.startswith("_scaled_dot_product"):
        query, key, value = (tensor.shape for tensor in args[:3])
        return int(math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))
    if name == "mkldnn_rnn_layer":
        return recurrent_macs(args[0].shape, args[1].shape, args[2].shape)
    if name == "_trilinear":
        return _trilinear_macs(*args[:6])
    return 0


def convolution_macs(output: Sequence[int], weight: Sequence[int]) -> int:
    """Multiply-accumulates of a convolution.

    Parameters
    ----------
    output : sequence of int
        (n, out, ...); of a transposed convolution, the input.
    weight : sequence of int
        (out, in / groups, ...), or (groups, out / groups, in / groups, ...) with one axis more than ``output``; of a
        transposed convolution (in, out / groups, ...).
    """
    return math.prod(output) * math.prod(weight[2:] if len(weight) > len(output) else weight[1:])


def product_macs(output: Sequence[int], left: Sequence[int]) -> int:
    """Multiply-accumulates of a matrix product: the size of the output times the last axis of the left operand."""
    return math.prod(output) * left[-1] if left else 0


def recurrent_macs(steps: Sequence[int], *weights: Sequence[int]) -> int:
    """Multiply-accumulates of an RNN, GRU or LSTM.

    Parameters
    ----------
    steps : sequence of int
        Shape of the input: time and batch in either order, then the features; without time for a single step.
    *weights : sequence of int
        Shapes of the weights that every step multiplies with: the input's and the state's, all gates and directions.
    """
    return math.prod(steps[:-1]) * sum(math.prod(weight) for weight in weights)


def _trilinear_macs(first: Tensor, second: Tensor, third: Tensor, *expanded: Sequence[int]) -> int:
    """What nn.Bilinear multiplies: all three tensors, broadcast along the axes where each is missing."""
    import torch

    shapes = []
    for tensor, axes in zip((first, second, third), expanded, strict=True):
        shape = list(tensor.shape)
        for axis in sorted(axes):
            shape.insert(axis, 1)
        shapes.append(shape)
    return math.prod(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
