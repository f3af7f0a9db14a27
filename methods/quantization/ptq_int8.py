"""Static post-training quantization to 8-bit integers."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, fx, nn

from harness.calling import call
from harness.contracts import Context, Scheme, Split
from harness.errors import NotFinite, Unsupported
from harness.quantized import WEIGHT_LIMIT, QuantizedConv2d, QuantizedLinear
from harness.tasks.splits import cut
from methods.layers.prunable import say_unreached
from methods.layers.training import train_split
from methods.quantization.graph import insert, plan, trace

BINS = 8192
"""Histogram bins per tensor of the percentile range."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PtqInt8:
    """Static 8-bit post-training quantization: int8 weights, 8-bit activations, ranges from calibration data.

    BatchNorm is folded into the layer before it; weights are symmetric per output channel in [-127, 127]; activations
    are affine per tensor with an exactly representable zero; the bias is int32 at ``s_w * s_x``. What of this a target
    wants otherwise (:class:`harness.contracts.Scheme`) is followed, in the parameters that are left open.

    The inputs of every ``Conv2d`` and ``Linear`` are quantized, the outputs of convolutions (after a ReLU that
    follows), and residual additions between those. A tensor has one quantizer, at its source. The logits,
    normalisations other than BatchNorm, GELU, softmax and attention's own products stay float;
    ``model.meta["kept_float"]`` of the result names every multiply-accumulate layer left out, with the reason.

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
    activation, activation_symmetric, weight_per_channel, quantized_bias : optional
        See :class:`harness.contracts.Scheme`; what is left open is the target's.

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

    range: Literal["min-max", "percentile"] = "min-max"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    calibration_examples: Annotated[int, Field(gt=0)] = 512
    batch_size: Annotated[int, Field(gt=0)] = 64

    activation: Literal["u8", "s8"] | None = None
    activation_symmetric: bool | None = None
    weight_per_channel: bool | None = None
    quantized_bias: bool | None = None

    def targeting(self, scheme: Scheme) -> PtqInt8:
        """The same method with what was left open as a target's kernels want it."""
        open_ = {name: value for name, value in asdict(scheme).items() if getattr(self, name) is None}
        return replace(self, **open_)

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return the quantized model, an ``fx.GraphModule`` in evaluation mode; ``model`` is left untouched.

        Raises
        ------
        Unsupported
            If there are no calibration data, the forward pass cannot be traced or is random, or there is no layer that
            can be quantized.
        NotFinite
            If an activation is NaN or infinite on the calibration data.
        """
        split = train_split(context, "calibration")
        graph = trace(model)
        steps = plan(graph)
        if not steps.layers:
            kept = "; ".join(f"{name}: {reason}" for name, reason in list(steps.kept_float.items())[:4])
            named = f" ({kept})" if kept else ""
            raise Unsupported(f"there is no Conv2d or Linear layer that can be quantized{named}")
        paths = graph.meta.pop("paths")
        treated = [model.get_submodule(paths[str(node.target)]).get_parameter("weight") for node in steps.layers]
        say_unreached(model, treated, context)
        ranges = self._observe(graph, steps.observed, split, context)
        given = {field.name: getattr(self, field.name) for field in fields(Scheme)}
        scheme = Scheme(**{name: value for name, value in given.items() if value is not None})
        insert(graph, steps, ranges, scheme)
        graph.meta["kept_float"] = dict(steps.kept_float)
        context.progress(1.0, f"{len(steps.layers)} layers in int8, {len(steps.kept_float)} in float")
        return graph

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """Layers store 8-bit integers, and compute with what these stand for."""
        before = dict(original.named_modules())
        layers = {n: m for n, m in compressed.named_modules() if isinstance(m, QuantizedConv2d | QuantizedLinear)}
        if not layers:
            yield "no layer is quantized"
        for name, layer in layers.items():
            if layer.stored_weight.dtype != torch.int8 or int(layer.stored_weight.abs().max()) > WEIGHT_LIMIT:
                yield f"layer {name!r} stores other than integers in [-127, 127]"
            if name in before and before[name].get_parameter("weight").shape != layer.stored_weight.shape:
                yield f"layer {name!r} has another shape"
            scale = layer.weight_scale.reshape(-1, *[1] * (layer.stored_weight.ndim - 1))
            if not torch.equal(layer.weight, layer.stored_weight.float() * scale):
                yield f"layer {name!r} computes with other weights than it stores"

    def _observe(
        self, graph: fx.GraphModule, observed: list[fx.Node], split: Split, context: Context
    ) -> dict[fx.Node, tuple[float, float]]:
        total = min(self.calibration_examples, split.size)
        passes = 2 if self.range == "percentile" else 1
        low = dict.fromkeys(observed, math.inf)
        high = dict.fromkeys(observed, -math.inf)
        for number, (node, value) in enumerate(self._values(graph, observed, split, context)):
            if not bool(torch.isfinite(value).all()):
                raise NotFinite(f"Calibration: the output of {node.name!r} holds NaN or infinity.")
            low[node] = min(low[node], value.min().item())
            high[node] = max(high[node], value.max().item())
            context.progress(0.9 * number * self.batch_size / len(observed) / total / passes, "calibrating")
        if self.range == "min-max":
            return {node: (low[node], high[node]) for node in observed}
        counts = {node: torch.zeros(BINS, dtype=torch.float64) for node in observed}
        for node, value in self._values(graph, observed, split, context):
            if low[node] < high[node]:
                counts[node] += torch.histc(value.float(), BINS, low[node], high[node]).double()
        return {node: percentile_range(counts[node], low[node], high[node], self.percentile) for node in observed}

    def _values(
        self, graph: fx.GraphModule, observed: list[fx.Node], split: Split, context: Context
    ) -> Iterator[tuple[fx.Node, Tensor]]:
        left = self.calibration_examples
        for batch in split.batches(self.batch_size, seed=context.seed):
            recorder = _Recorder(graph, set(observed))
            with torch.inference_mode():
                call(recorder, cut(batch, 0, left).inputs, context.signature)
            yield from ((node, recorder.seen[node]) for node in observed)
            left -= len(batch)
            if left <= 0:
                return


class _Recorder(nn.Module):
    """Runs a graph node by node and keeps the values of some of them; called as the graph is."""

    def __init__(self, graph: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__()
        self.seen: dict[fx.Node, Tensor] = {}
        interpreter = _Interpreter(graph, wanted, self.seen)
        parameters = inspect.signature(graph.forward)

        @functools.wraps(graph.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = parameters.bind(*args, **kwargs)
            bound.apply_defaults()
            return interpreter.run(*bound.args)

        self.forward = forward


class _Interpreter(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, wanted: set[fx.Node], seen: dict[fx.Node, Tensor]) -> None:
        super().__init__(graph)
        self.wanted, self.seen = wanted, seen

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
