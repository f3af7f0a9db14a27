"""What happened to each layer: parameters, non-zeros, bits, rank, and the error against the original's weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_RANK_OPERATIONS = 2e8
_FEW_VALUES = 256


def layers(model: nn.Module, original: nn.Module) -> list[dict[str, Any]]:
    """Describe every weight of a compressed model beside the original's weight of the same name.

    A weight is a parameter, or a buffer that a quantized layer stores integers in, with two axes or more. A tensor that
    several layers share is described once, under its first name.

    Parameters
    ----------
    model, original : nn.Module
        After and before compression.

    Returns
    -------
    list of dict
        ``name`` (of the layer; with the tensor's name where that is not "weight"), ``kind`` (its class), ``shape``,
        ``parameters``, ``nonzero``, ``bits`` (per value: those of the stored type, or ceil(log2 c) where the weight has
        only c <= 256 different values and more than four times as many entries), ``rank`` (numerical rank of the weight
        as a matrix (out, rest), float32 tolerance; None where it would take long), ``error_mean`` and ``error_max``
        (absolute difference |original - compressed| of the weights that are computed with) and ``sqnr_db``
        (10 log10 of the original's power over the error's power); these three are None where the original has no weight
        of that name and shape, ``sqnr_db`` also where nothing differs.
    """
    before = {name: values for name, _, values, _ in _weights(original)}
    return [_described(name, kind, values, stored, before.get(name)) for name, kind, values, stored in _weights(model)]


def is_quantized(model: nn.Module) -> bool:
    """Whether a model holds quantized layers: its outputs are not those of the model that was quantized."""
    from harness.quantized import ActivationQuantizer, quantized_parameters

    held = any(isinstance(module, ActivationQuantizer) for module in model.modules())
    return held or next(quantized_parameters(model), None) is not None


def _described(name: str, kind: str, values: Tensor, stored: Tensor, original: Tensor | None) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "shape": list(values.shape),
        "parameters": values.numel(),
        "nonzero": int(torch.count_nonzero(values)),
        "bits": _bits(stored),
        "rank": _rank(values),
        "error_mean": None,
        "error_max": None,
        "sqnr_db": None,
    }
    if original is not None and original.shape == values.shape and values.numel():
        reference = original.double()
        error = (reference - values.double()).abs()
        found["error_mean"], found["error_max"] = float(error.mean()), float(error.max())
        signal, noise = float(reference.square().sum()), float(error.square().sum())
        if noise > 0 and signal > 0 and math.isfinite(noise):
            found["sqnr_db"] = 10 * math.log10(signal / noise)
    return found


def _bits(stored: Tensor) -> int:
    import torch

    # A sample of a large weight decides whether all of it is looked at.
    flat = stored.detach().reshape(-1)
    if len(torch.unique(flat[: 16 * _FEW_VALUES])) <= _FEW_VALUES:
        distinct = len(torch.unique(flat))
        if distinct <= _FEW_VALUES and flat.numel() > 4 * distinct:
            return max(1, math.ceil(math.log2(distinct)))
    return stored.element_size() * 8


def _rank(values: Tensor) -> int | None:
    import torch

    matrix = values.detach().float().flatten(1)
    small, large = sorted(matrix.shape)
    if small == 0 or small * small * large > _RANK_OPERATIONS or not bool(torch.isfinite(matrix).all()):
        return None
    return int(torch.linalg.matrix_rank(matrix))


def _weights(model: nn.Module) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(name, class, values that are computed with, tensor that is stored) of every weight, shared ones once."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        for tensor, stored, values in _own(module):
            if id(stored) in seen or values.ndim < 2:
                continue
            seen.add(id(stored))
            full = ".".join(part for part in (name, "" if tensor == "weight" else tensor) if part)
            yield full or "weight", type(module).__name__, values.detach(), stored.detach()


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, stored tensor, values that are computed with) of a module's own tensors."""
    float_weight: Any = getattr(module, "float_weight", None)
    if float_weight is not None:  # a quantized layer: integers in a buffer
        for _, stored in module.named_buffers(recurse=False):
            if stored.ndim > 1 and not stored.is_floating_point():
                yield "weight", stored, float_weight()
    for name, parameter in module.named_parameters(recurse=False):
        yield name, parameter, parameter
