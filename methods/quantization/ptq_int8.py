"""Static post-training quantization to 8-bit integers."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, fx, nn

from harness.calling import call
from harness.contracts import Batch, Context, Scheme, Split
from harness.errors import Unsupported
from harness.quantized import WEIGHT_LIMIT, QuantizedConv2d, QuantizedLinear
from methods.layers.inputs import portions
from methods.layers.prunable import say_unreached
from methods.layers.training import train_split
from methods.quantization import layers
from methods.quantization.graph import Untraceable, insert, plan, trace
from methods.quantization.ranges import Key, observe


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PtqInt8:
    """Static 8-bit post-training quantization: int8 weights, 8-bit activations, ranges from calibration data.

    BatchNorm is folded into the layer before it; weights are symmetric per output channel in [-127, 127]; activations
    are affine per tensor with an exactly representable zero; the bias is int32 at ``s_w * s_x``. What of this a target
    wants otherwise (:class:`harness.contracts.Scheme`) is followed, in the parameters that are left open.

    The inputs of every ``Conv2d`` and ``Linear`` are quantized, the outputs of convolutions (after a ReLU that
    follows), and residual additions between those. A tensor has one quantizer, at its source. The logits,
    normalisations other than BatchNorm, GELU, softmax and attention's own products stay float;
    ``model.meta["kept_float"]`` of the result, an ``fx.GraphModule``, names every multiply-accumulate layer left out,
    with the reason. A model that torch.fx cannot trace keeps its classes: every ``Conv2d`` and ``Linear`` has a
    quantizer of its own for its input (:mod:`methods.quantization.layers`), BatchNorm is not folded, and that is said.

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
        """Return the quantized model, in evaluation mode; ``model`` is left untouched.

        Raises
        ------
        Unsupported
            If there are no calibration data, the forward pass is random, or there is no layer that can be quantized.
        NotFinite
            If an activation is NaN or infinite on the calibration data.
        """
        split = train_split(context, "calibration")
        given = {field.name: getattr(self, field.name) for field in fields(Scheme)}
        scheme = Scheme(**{name: value for name, value in given.items() if value is not None})
        try:
            graph = trace(model)
        except Untraceable as error:
            quantized, kept = self._layer_by_layer(model, split, scheme, context)
            context.warn(f"{error}: only the inputs of its Conv2d and Linear layers are quantized, each by itself")
        else:
            quantized, kept = graph, self._in_graph(model, graph, split, scheme, context)
        layers = sum(isinstance(module, QuantizedConv2d | QuantizedLinear) for module in quantized.modules())
        context.progress(1.0, f"{layers} layers in int8, {len(kept)} in float{_listed(kept)}")
        return quantized.eval()

    def _in_graph(
        self, model: nn.Module, graph: fx.GraphModule, split: Split, scheme: Scheme, context: Context
    ) -> Mapping[str, str]:
        """Quantize ``graph`` in place; why layers stay float, by name."""
        steps = plan(graph)
        if not steps.layers:
            raise Unsupported(f"there is no Conv2d or Linear layer that can be quantized{_listed(steps.kept_float)}")
        paths = graph.meta.pop("paths")
        self._say(model, [paths[str(node.target)] for node in steps.layers], context)

        def values() -> Iterator[tuple[fx.Node, Tensor]]:
            for batch in self._batches(split, context):
                recorder = _Recorder(graph, set(steps.observed))
                with torch.inference_mode():
                    call(recorder, batch.inputs, context.signature)
                yield from recorder.seen.items()

        insert(graph, steps, self._observed(steps.observed, values), scheme)
        graph.meta["kept_float"] = dict(steps.kept_float)
        return steps.kept_float

    def _layer_by_layer(
        self, model: nn.Module, split: Split, scheme: Scheme, context: Context
    ) -> tuple[nn.Module, Mapping[str, str]]:
        """A quantized copy of a model that cannot be traced; why layers stay float, by name."""
        quantized = copy.deepcopy(model).eval()
        found, kept = layers.quantizable(quantized)
        layers.refuse_random(quantized, next(self._batches(split, context)), context.signature)
        ranges = self._observed(
            list(found),
            lambda: layers.inputs(quantized, found, self._batches(split, context), context.signature),
        )
        kept |= {name: "the model does not call it" for name in found if name not in ranges}
        if not ranges:
            raise Unsupported(f"there is no Conv2d or Linear layer that can be quantized{_listed(kept)}")
        self._say(model, list(ranges), context)
        layers.exchange(quantized, ranges, scheme)
        return quantized, kept

    def _observed(
        self, keys: Sequence[Key], values: Callable[[], Iterator[tuple[Key, Tensor]]]
    ) -> dict[Key, tuple[float, float]]:
        return observe(keys, values, kind=self.range, percentile=self.percentile)

    def _batches(self, split: Split, context: Context) -> Iterator[Batch]:
        return portions(split, self.calibration_examples, self.batch_size, context.signature, seed=context.seed)

    def _say(self, model: nn.Module, names: Sequence[str], context: Context) -> None:
        """Warn of weights that stay float, and of those that are stored a second time."""
        treated = [model.get_submodule(name).get_parameter("weight") for name in names]
        say_unreached(model, treated, context)
        ids = {id(weight) for weight in treated}
        others = [
            name
            for name, module in model.named_modules()
            if name not in names and any(id(p) in ids for p in module.parameters(recurse=False))
        ]
        if others:
            context.warn(
                f"{', '.join(others)} shares its weight with a layer that is quantized, and stays in float: the weight "
                "is stored twice, in integers and in float"
            )

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """Layers store 8-bit integers, and compute with what these stand for."""
        before = dict(original.named_modules())
        found = {n: m for n, m in compressed.named_modules() if isinstance(m, QuantizedConv2d | QuantizedLinear)}
        if not found:
            yield "no layer is quantized"
        for name, layer in found.items():
            if layer.stored_weight.dtype != torch.int8 or int(layer.stored_weight.abs().max()) > WEIGHT_LIMIT:
                yield f"layer {name!r} stores other than integers in [-127, 127]"
            if name in before and before[name].get_parameter("weight").shape != layer.stored_weight.shape:
                yield f"layer {name!r} has another shape"
            scale = layer.weight_scale.reshape(-1, *[1] * (layer.stored_weight.ndim - 1))
            if not torch.equal(layer.weight, layer.stored_weight.float() * scale):
                yield f"layer {name!r} computes with other weights than it stores"


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


def _listed(reasons: Mapping[str, str]) -> str:
    return f" ({'; '.join(f'{name}: {reason}' for name, reason in list(reasons.items())[:4])})" if reasons else ""
