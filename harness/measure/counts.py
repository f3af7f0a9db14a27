"""Parameters, non-zeros and multiply-accumulates of a torch model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


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

    tensors: dict[int, Tensor] = {id(p): p for p in model.parameters()}
    tensors |= {id(t): t for t in quantized_parameters(model)}
    total = sum(t.numel() for t in tensors.values())
    nonzero = sum(int(torch.count_nonzero(t)) for t in tensors.values())
    return total, nonzero


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one example, from the operators that run (convolutions, matrix products, attention).

    One MAC is two FLOPs. Zeros that are multiplied count: this is what a dense kernel executes. Element-wise
    operators, pooling and normalisation are not counted.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    example : Tensor
        Shape (n, ...); the count is divided by n.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    fast = torch.backends.mha.get_fastpath_enabled()
    # The fused attention of nn.MultiheadAttention in eval mode hides its products from the counter.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), counter:
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // (2 * len(example))
