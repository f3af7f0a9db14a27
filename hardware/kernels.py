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
        Of its arithmetic: "f32", "bf16", "f16", "int8", ...; of its output where it does not compute.
    macs : int
        Multiply-accumulates for the batch it ran on; 0 for everything but convolutions and matrix products.
    """

    kind: str
    precision: str
    macs: int = 0


def convolution_macs(output: Sequence[int], weight: Sequence[int]) -> int:
    """Multiply-accumulates of a convolution.

    Parameters
    ----------
    output : sequence of int
        (n, out, ...).
    weight : sequence of int
        (out, in / groups, ...), or (groups, out / groups, in / groups, ...) with one axis more than ``output``.
    """
    return math.prod(output) * math.prod(weight[2:] if len(weight) > len(output) else weight[1:])


def product_macs(output: Sequence[int], left: Sequence[int]) -> int:
    """Multiply-accumulates of a matrix product: the size of the output times the last axis of the left operand."""
    return math.prod(output) * left[-1] if left else 0


def summary(kernels: Iterable[Kernel], *, wanted: str, because: str) -> dict[str, Any]:
    """Name the precision of a run: the keys of :attr:`Deployed.effective` that follow from its kernels.

    Parameters
    ----------
    kernels : iterable of Kernel
        Everything that was executed.
    wanted : str
        The precision that the artifact or the settings ask for.
    because : str
        What asks for it, for the reason ("the model is quantized").

    Returns
    -------
    dict
        ``precision``, that in which most multiply-accumulates ran ("none" where there are none); ``kernels``, see
        :func:`count`; ``mac_share``, the share of each precision, largest first; and ``precision_reason`` where the
        precision is not ``wanted``.
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
    if precision != wanted and share:
        others = count(kernel for kernel in listed if kernel.macs and kernel.precision != wanted)
        text = ", ".join(f"{number} x {name}" for name, number in others.items())
        found["precision_reason"] = (
            f"{because}, but only {share.get(wanted, 0.0):.0%} of the multiply-accumulates ran in {wanted}; "
            f"the others: {text}"
        )
    return found


def count(kernels: Iterable[Kernel]) -> Mapping[str, int]:
    """``"Kind:precision"`` to how often it was executed, sorted by name."""
    return dict(sorted(Counter(f"{kernel.kind}:{kernel.precision}" for kernel in kernels).items()))
