"""What a runtime really executed: its multiply-accumulate kernels, their precision, and what to call the whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One executed operation.

    Parameters
    ----------
    kind : str
        The runtime's name of the operation.
    precision : str
        Of its arithmetic: "f32", "bf16", "f16", "int8", ...; "w4a8" where weights and activations differ, "w4a32"
        where only weights are stored in few bits; of its output where it does not compute.
    macs : int
        Multiply-accumulates for the batch it ran on; 0 for everything but convolutions, matrix products, attention and
        recurrent layers.
    """

    kind: str
    precision: str
    macs: int = 0


def weights_and_activations(weight_bits: int, activation_bits: int) -> str:
    """The name of a precision whose weights are stored in few bits: "w4a8", "w8a32"."""
    return f"w{weight_bits}a{activation_bits}"


def matrix_macs(output: Sequence[int], left: Sequence[int], right: Sequence[int]) -> int:
    """Multiply-accumulates of a matrix product whose operands may be stored transposed.

    Parameters
    ----------
    output, left, right : sequence of int
        Shapes; empty where one is not known, which gives 0.
    """
    if not (output and left and right):
        return 0
    if len(left) == 1 or len(right) == 1:
        return math.prod(output) * left[-1]
    return math.prod(output) * (left[-1] * left[-2]) // output[-2] if output[-2] else 0


def attention_macs(query: Sequence[int], length: int) -> int:
    """Multiply-accumulates of attention without projections: queries by keys, then weights by values.

    Parameters
    ----------
    query : sequence of int
        Its shape, all heads.
    length : int
        Number of keys.
    """
    return 2 * math.prod(query) * length


def summary(kernels: Iterable[Kernel], *, wanted: str, because: str) -> dict[str, Any]:
    """Name the precision of a run: the keys of :attr:`Deployed.effective` that follow from its kernels.

    Parameters
    ----------
    kernels : iterable of Kernel
        Everything that was executed.
    wanted : str
        The precision that the artifact or the settings ask for; "w4" means weights of 4 bits with any activations.
    because : str
        What asks for it, for the reason ("the model is quantized").

    Returns
    -------
    dict
        ``precision``, that in which most multiply-accumulates ran ("none" where there are none); ``kernels``, see
        :func:`count`; ``mac_share``, the share of each precision, largest first; and ``precision_reason`` where the
        precision is not ``wanted``, or is "none".
    """
    listed = list(kernels)
    macs: Counter[str] = Counter()
    for kernel in listed:
        macs[kernel.precision] += kernel.macs
    total = macs.total()
    share = {name: count / total for name, count in macs.most_common() if count}
    precision = next(iter(share), "none")
    found: dict[str, Any] = {
        "precision": precision,
        "kernels": count(listed),
        "mac_share": {name: round(part, 6) for name, part in share.items()},
    }
    if not share:
        found["precision_reason"] = "no kernel that ran is known to multiply matrices"
    elif not _is(precision, wanted):
        others = count(kernel for kernel in listed if kernel.macs and not _is(kernel.precision, wanted))
        text = ", ".join(f"{number} x {name}" for name, number in others.items())
        part = sum(value for name, value in share.items() if _is(name, wanted))
        found["precision_reason"] = (
            f"{because}, but only {part:.0%} of the multiply-accumulates ran in {wanted}; the others: {text}"
        )
    return found


def stored_as(precision: str) -> str:
    """What asks for a precision that :func:`hardware.stored.precision` read, as the beginning of a sentence."""
    if precision.startswith("w"):
        return f"the weights are stored in {precision[1:]} bits"
    return f"the model is in {precision}"


def count(kernels: Iterable[Kernel]) -> Mapping[str, int]:
    """``"Kind:precision"`` to how often it was executed, sorted by name."""
    return dict(sorted(Counter(f"{kernel.kind}:{kernel.precision}" for kernel in kernels).items()))


def _is(precision: str, wanted: str) -> bool:
    return precision == wanted or precision.startswith(f"{wanted}a")
