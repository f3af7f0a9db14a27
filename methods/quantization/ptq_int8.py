"""Static post-training quantization to 8-bit integers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, fx, nn

from harness.contracts import Context, Data
from harness.errors import NotFinite, Unsupported
from methods.quantization.graph import insert, plan, trace

BINS = 8192
"""Histogram bins per tensor of the percentile range."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PtqInt8:
    """Static 8-bit post-training quantization: int8 weights, 8-bit activations, ranges from calibration data.

    BatchNorm is folded into the layer before it; weights are symmetric per output channel in [-127, 127]; activations
    are affine per tensor with an exactly representable zero; the bias is int32 at ``s_w * s_x``. What of this a target
    wants otherwise (:class:`harness.contracts.Scheme`) is followed. Quantized are the inputs of every ``Conv2d`` and
    ``Linear``, the outputs of convolutions (after a ReLU that follows), and residual additions between those. A tensor
    has one quantizer, at its source. The logits, normalisations other than BatchNorm, GELU, softmax and attention's own
    products stay float; ``model.meta["kept_float"]`` of the result names every multiply-accumulate layer left out, with
    the reason.

    Source: Jacob et al. 2018, §2-3; Krishnamoorthi 2018, §3.

    Parameters
    ----------
    range : {"min-max", "percentile"}
        How an activation's range is estimated from the calibration data: its extremes, or two-sided percentiles of its
        values.
    percentile : float in (50, 100]
        With "percentile": the range is [P(100 - p), P(p)] of all values, read from a histogram of 8192 bins.
    calibration_examples : int
        Training examples, not augmented, drawn by the seed.
    batch_size : int
        Examples per calibration batch; does not change the result beyond float rounding.

    Notes
    -----
    .. code-block:: bibtex

        @inproceedings{jacob2018quantization,
          title     = {Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference},
          author    = {Jacob, Benoit and Kligys, Skirmantas and Chen, Bo and Zhu, Menglong and Tang, Matthew and
                       Howard, Andrew and Adam, Hartwig and Kalenichenko, Dmitry},
          booktitle = {CVPR},
          year      = {2018}
        }
    """

    uses_scheme: ClassVar[bool] = True

    range: Literal["min-max", "percentile"] = "min-max"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    calibration_examples: Annotated[int, Field(gt=0)] = 512
    batch_size: Annotated[int, Field(gt=0)] = 64

    def unsupported(self, model: nn.Module, context: Context) -> str | None:
        """A reason why ``model`` cannot be quantized, or None."""
        if context.data is None:
            return "ptq-int8 needs calibration data, and this task has no training data"
        try:
            graph = trace(model)
        except Unsupported as error:
            return str(error)
        if not plan(graph).layers:
            return "ptq-int8 found no Conv2d or Linear layer that it can quantize"
        return None

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return the quantized model, an ``fx.GraphModule`` in evaluation mode; ``model`` is left untouched.

        Raises
        ------
        Unsupported
            See :meth:`unsupported`.
        NotFinite
            If an activation is NaN or infinite on the calibration data.
        """
        reason = self.unsupported(model, context)
        if context.data is None or reason is not None:
            raise Unsupported(reason)
        graph = trace(model)
        steps = plan(graph)
        ranges = self._observe(graph, steps.observed, context.data, context)
        insert(graph, steps, ranges, context.scheme)
        graph.meta["kept_float"] = dict(steps.kept_float)
        context.progress(1.0, f"{len(steps.layers)} layers in int8, {len(steps.kept_float)} in float")
        return graph

    def _observe(
        self, graph: fx.GraphModule, observed: list[fx.Node], data: Data, context: Context
    ) -> dict[fx.Node, tuple[float, float]]:
        total = min(self.calibration_examples, data.train_size)
        passes = 2 if self.range == "percentile" else 1
        low = dict.fromkeys(observed, math.inf)
        high = dict.fromkeys(observed, -math.inf)
        for number, (node, value) in enumerate(self._values(graph, observed, data, context)):
            if not bool(torch.isfinite(value).all()):
                raise NotFinite(f"Calibration: the output of {node.name!r} holds NaN or infinity.")
            low[node] = min(low[node], value.min().item())
            high[node] = max(high[node], value.max().item())
            context.progress(0.9 * number * self.batch_size / len(observed) / total / passes, "calibrating")
        if self.range == "min-max":
            return {node: (low[node], high[node]) for node in observed}
        counts = {node: torch.zeros(BINS, dtype=torch.float64) for node in observed}
        for node, value in self._values(graph, observed, data, context):
            if low[node] < high[node]:
                counts[node] += torch.histc(value.float(), BINS, low[node], high[node]).double()
        return {node: percentile_range(counts[node], low[node], high[node], self.percentile) for node in observed}

    def _values(
        self, graph: fx.GraphModule, observed: list[fx.Node], data: Data, context: Context
    ) -> Iterator[tuple[fx.Node, Tensor]]:
        left = self.calibration_examples
        for inputs, _ in data.train(self.batch_size, seed=context.seed, shuffle=True, augment=False):
            with torch.inference_mode():
                recorder = _Recorder(graph, set(observed))
                recorder.run(inputs[:left])
            yield from ((node, recorder.seen[node]) for node in observed)
            left -= len(inputs)
            if left <= 0:
                return


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the values of some of its nodes."""

    def __init__(self, graph: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(graph)
        self.wanted = wanted
        self.seen: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; a copy is kept, as a later operation may work in place."""
        result = super().run_node(n)
        if n in self.wanted:
            self.seen[n] = result.clone()
        return result


def percentile_range(counts: Tensor, low: float, high: float, percentile: float) -> tuple[float, float]:
    """[P(100 - p), P(p)] of a histogram over [low, high], linear inside a bin.

    Parameters
    ----------
    counts : Tensor, float64, shape (bins,)
        Values per bin of equal width.
    low, high : float
        Ends of the histogram.
    percentile : float
        p, in (50, 100].
    """
    if not low < high:
        return low, high
    cumulative = np.concatenate([[0.0], np.cumsum(counts.numpy())])
    edges = np.linspace(low, high, len(counts) + 1)
    tail = (100.0 - percentile) / 100.0
    lower, upper = np.interp([tail * cumulative[-1], (1.0 - tail) * cumulative[-1]], cumulative, edges)
    return float(lower), float(upper)
