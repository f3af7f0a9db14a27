"""Where quantizers go: a model as an ``fx`` graph, the plan of what is quantized in it, and the plan carried out.

The rule, in terms of values (graph nodes), is that of :class:`methods.quantization.ptq_int8.PtqInt8`: a value has one
quantizer, at its source. Values that an integer kernel produces (convolutions, residual additions between such values,
each together with a sole ReLU after it) are quantized for all their users; values that a float operation produces are
quantized for the integer layers that read them only, so that a float residual stream stays float.
"""

from __future__ import annotations

import copy
import keyword
import operator
import re
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn import functional as F

from harness.contracts import Scheme
from harness.errors import Unsupported, explanation
from harness.quantized import ActivationQuantizer, QuantizedConv2d, QuantizedLinear

_QUANTIZED = (ActivationQuantizer, QuantizedConv2d, QuantizedLinear)
_INERT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_DROPOUT = frozenset(
    f"{kind}dropout{axes}" for kind in ("", "alpha_", "feature_", "feature_alpha_") for axes in ("", "1d", "2d", "3d")
) | {"stochastic_depth"}
_DRAWS = frozenset(
    {
        "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal",
        "normal_", "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random_",
        "randperm", "uniform_",
    }
)  # fmt: skip
_RANDOM = (
    "the forward pass draws random numbers in evaluation ({}), so that there is no one function to quantize; pass "
    "training=self.training to a dropout"
)
_DESCRIPTIONS = ("dtype", "device", "shape", "ndim")
_RELU = (nn.ReLU, nn.ReLU6, F.relu, F.relu6, torch.relu, "relu")
_ADD = (operator.add, torch.add, "add")
# These only move or select values, so that their output lies on the grid of their input.
_MOVE = (
    nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, torch.flatten, torch.reshape, torch.permute, torch.transpose,
    F.max_pool2d, torch.max_pool2d, "flatten", "reshape", "view", "permute", "transpose", "contiguous",
)  # fmt: skip
_PRODUCT = (
    F.conv1d, F.conv2d, F.conv3d, F.linear, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.einsum,
    operator.matmul, "matmul", "bmm",
)  # fmt: skip
_PRODUCT_MODULES = (
    nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Transformer,
    nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer,
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is quantized in a graph.

    Parameters
    ----------
    layers : list of Node
        Calls of ``Conv2d`` and ``Linear`` modules that become integer layers.
    shared : list of Node
        Values that integer kernels produce: quantized for all their users.
    private : list of Node
        Float values that integer layers read: quantized for those layers only.
    moves : list of Node
        Operations after which a quantized value's quantizer is repeated.
    kept_float : mapping
        Name of each multiply-accumulate operation that stays float, and why.
    """

    layers: list[fx.Node]
    shared: list[fx.Node]
    private: list[fx.Node]
    moves: list[fx.Node]
    kept_float: Mapping[str, str]

    @property
    def observed(self) -> list[fx.Node]:
        """The values whose ranges must be known."""
        return [*self.shared, *self.private]


class Untraceable(Unsupported):
    """The model's Python code cannot be run symbolically."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _QUANTIZED) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """Copy the model into a graph in evaluation mode, without inert modules, BatchNorm folded.

    Raises
    ------
    Untraceable
        If the model's Python code cannot be traced; the message names the place.
    Unsupported
        If it draws random numbers, or the model is quantized already.
    """
    if any(isinstance(module, _QUANTIZED) for module in model.modules()):
        raise Unsupported("the model is quantized already")
    if type(model).__call__ is not nn.Module.__call__ and not isinstance(model, fx.GraphModule):
        raise Untraceable(
            f"{type(model).__name__} has a __call__ of its own, which torch.fx leaves out; do in forward what it does"
        )
    root = copy.deepcopy(model).eval()
    tracer = _Tracer()
    randomness = torch.get_rng_state()
    try:
        graph = tracer.trace(root)
    except Exception as error:  # the model's own code runs here and may raise anything
        place = _place(error, type(root).__name__)
        raise Untraceable(f"torch.fx cannot trace {place}: {explanation(error)}") from error
    if not torch.equal(randomness, torch.get_rng_state()):
        # fx has made a constant of what was drawn.
        torch.set_rng_state(randomness)
        raise Unsupported(_RANDOM.format("a tensor that does not depend on the input"))
    parts, paths = _named_plainly(root, graph)
    traced = fx.GraphModule(parts, graph, type(model).__name__)
    traced.meta["paths"] = paths
    _remove_inert(traced)
    _make_out_of_place(traced)
    _read_descriptions(traced)
    _fold_batch_norm(traced)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced.eval()


def _named_plainly(root: nn.Module, graph: fx.Graph) -> tuple[dict[str, Any], dict[str, str]]:
    """What a graph uses of ``root`` by path, and the paths that these had before.

    fx writes paths into source, and models are stored with plain names only: parts such as "class" and "conv-a" are
    renamed, in the graph too.
    """
    used: dict[str, Any] = {}
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        path = str(node.target)
        if path not in renamed:
            new = ".".join(part if _plain(part) else _made_plain(part) for part in path.split("."))
            while new in used:
                new += "_"
            renamed[path] = new
            used[new] = _part(root, path)
        node.target = renamed[path]
    return used, {new: old for old, new in renamed.items()}


def _part(root: nn.Module, path: str) -> Any:
    before, _, last = path.rpartition(".")
    return getattr(root.get_submodule(before), last)


def _made_plain(part: str) -> str:
    return re.sub("[^A-Za-z0-9_]", "_", part).lstrip("_") + "_"


def _plain(part: str) -> bool:
    return bool(re.fullmatch("[A-Za-z0-9_]+", part)) and not keyword.iskeyword(part) and not part.startswith("__")


def plan(graph: fx.GraphModule) -> Plan:
    """Decide what is quantized (see the module's docstring); changes nothing."""
    nodes = list(graph.graph.nodes)
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    layers: list[fx.Node] = []
    adds: list[fx.Node] = []
    shared: set[fx.Node] = set()
    kept: dict[str, str] = {}
    for node in nodes:
        if _is(graph, node, (*_PRODUCT, *_PRODUCT_MODULES)):
            if reason := _why_float(graph, node, calls):
                kept[str(node.target) if node.op == "call_module" else node.name] = reason
                continue
            layers.append(node)
            if not _is(graph, node, (nn.Conv2d,)):
                continue  # a Linear may return float at no cost, a convolution not
        elif _is_addition_of(graph, node, shared):
            adds.append(node)
        else:
            continue
        value = _with_relu(graph, node)
        if not _only_returned(graph, value):
            shared.add(value)
    private: set[fx.Node] = set()
    moves: set[fx.Node] = set()
    for value in (value for reader in (*layers, *adds) for value in reader.all_input_nodes):
        source = value
        while _is(graph, source, _MOVE):
            moves.add(source)
            source = source.all_input_nodes[0]
        if source not in shared:
            private.add(source)
    return Plan(
        layers,
        [node for node in nodes if node in shared],
        [node for node in nodes if node in private],
        [node for node in nodes if node in moves],
        kept,
    )


def insert(graph: fx.GraphModule, steps: Plan, ranges: Mapping[fx.Node, tuple[float, float]], scheme: Scheme) -> None:
    """Carry the plan out in place: quantizers into the graph, integer layers in place of float ones.

    Parameters
    ----------
    graph : GraphModule
        From :func:`trace`.
    steps : Plan
        From :func:`plan`.
    ranges : mapping
        Observed (low, high) of every value in ``steps.observed``.
    scheme : Scheme
        What the target wants.
    """
    integer_readers = {*steps.layers, *steps.moves}
    quantizer_of: dict[fx.Node, str] = {}
    for value in [node for node in graph.graph.nodes if node in ranges or node in steps.moves]:
        if value in ranges:
            name = f"{value.name}_quantizer"
            graph.add_submodule(name, ActivationQuantizer.of_range(*ranges[value], scheme))
        else:
            name = quantizer_of[value.all_input_nodes[0]]
        readers = [user for user in value.users if value not in steps.private or user in integer_readers]
        with graph.graph.inserting_after(value):
            quantized = graph.graph.call_module(name, (value,))
        quantizer_of[quantized] = name
        for reader in readers:
            reader.replace_input_with(value, quantized)
    for node in steps.layers:
        name = str(node.target)
        layer = graph.get_submodule(name)
        quantizer = graph.get_submodule(quantizer_of[node.all_input_nodes[0]])
        assert isinstance(quantizer, ActivationQuantizer)  # noqa: S101  (for the type checker: made above)
        parent, _, attribute = name.rpartition(".")
        integer = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
        setattr(graph.get_submodule(parent), attribute, integer(layer, quantizer.scale, scheme))  # type: ignore[arg-type]
    _read_stored(graph)
    graph.graph.lint()
    graph.recompile()
    graph.eval()


def _is(graph: fx.GraphModule, node: fx.Node, kinds: tuple[Any, ...]) -> bool:
    """Whether a node is one of ``kinds``: module classes (exact or, if abstract, base), functions, method names."""
    if node.op == "call_module":
        return isinstance(
            graph.get_submodule(str(node.target)), tuple(kind for kind in kinds if isinstance(kind, type))
        )
    return node.op in ("call_function", "call_method") and node.target in kinds


def _is_addition_of(graph: fx.GraphModule, node: fx.Node, values: set[fx.Node]) -> bool:
    if not _is(graph, node, _ADD) or len(node.args) != 2 or node.kwargs:
        return False
    return all(isinstance(arg, fx.Node) and _source(graph, arg) in values for arg in node.args)


def _source(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    while _is(graph, node, _MOVE):
        node = node.all_input_nodes[0]
    return node


def _with_relu(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The ReLU that alone reads a node, or the node itself: kernels apply it before they round."""
    users = list(node.users)
    return users[0] if len(users) == 1 and _is(graph, users[0], _RELU) else node


def _only_returned(graph: fx.GraphModule, node: fx.Node) -> bool:
    return all(user.op == "output" or (_is(graph, user, _MOVE) and _only_returned(graph, user)) for user in node.users)


def _why_float(graph: fx.GraphModule, node: fx.Node, calls: Counter[Any]) -> str | None:
    """Why a multiply-accumulate operation stays float, or None."""
    if node.op != "call_module":
        return "a product that is not a Conv2d or Linear module"
    module = graph.get_submodule(str(node.target))
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"no integer form of {type(module).__name__}"
    if calls[node.target] > 1:
        return f"called {calls[node.target]} times, with inputs of different ranges"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    if len(node.all_input_nodes) != 1:
        return "called with more than one tensor"
    if _hooked(module):
        return "it has hooks, which run around its product"
    return None


def _read_stored(graph: fx.GraphModule) -> None:
    """A forward pass that reads a quantized layer's weight or bias gets the float tensor that the stored one is."""
    for node in list(graph.graph.nodes):
        path, _, kind = str(node.target).rpartition(".")
        if node.op != "get_attr" or not isinstance(graph.get_submodule(path), QuantizedConv2d | QuantizedLinear):
            continue
        scale = getattr(graph.get_submodule(path), f"{kind}_scale")
        node.target = f"{path}.stored_{kind}"
        if scale is None:
            continue  # a bias that is stored as float
        with graph.graph.inserting_after(node):
            step = graph.graph.get_attr(f"{path}.{kind}_scale")
        with graph.graph.inserting_after(step):
            value = graph.graph.call_function(torch.ops.assay.dequantize.default, (node, step))
        node.replace_all_uses_with(value, lambda user, value=value: user is not value)


def _read_descriptions(graph: fx.GraphModule) -> None:
    """Types, shapes and devices that a forward pass reads from parameters become constants."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target is not getattr or node.args[1] not in _DESCRIPTIONS:
            continue
        source = node.args[0]
        if isinstance(source, fx.Node) and source.op == "get_attr":
            value = getattr(_part(graph, str(source.target)), node.args[1])
            for user in list(node.users):
                _replace_argument(user, node, value)
            graph.graph.erase_node(node)
            if not source.users:
                graph.graph.erase_node(source)


def _replace_argument(user: fx.Node, old: fx.Node, value: Any) -> None:
    def swap(argument: Any) -> Any:
        return value if argument is old else argument

    user.args = map_aggregate(user.args, swap)
    user.kwargs = map_aggregate(user.kwargs, swap)


def _remove_inert(graph: fx.GraphModule) -> None:
    """Drop what does nothing in evaluation: dropout, identity, torchvision's stochastic depth.

    Raises
    ------
    Unsupported
        If an operation draws random numbers in evaluation.
    """
    for node in list(graph.graph.nodes):
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.op in ("call_function", "call_method") and (name in _DRAWS or (name in _DROPOUT and _drops(node))):
            raise Unsupported(_RANDOM.format(f"{name}, node {node.name!r}"))
        inert_module = node.op == "call_module" and type(graph.get_submodule(str(node.target))) in _INERT
        if inert_module or (node.op == "call_function" and name in _DROPOUT):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.graph.erase_node(node)


def _drops(node: fx.Node) -> bool:
    """Whether a call of a dropout function draws: it does unless it is told that this is no training."""
    given = dict(enumerate(node.args)) | node.kwargs
    place = 3 if "stochastic" in node.name else 2
    training = given.get("training", given.get("train", given.get(place)))
    share = given.get("p", given.get(1, 0.5))
    return training is not False and not (isinstance(share, int | float) and share == 0)


def _make_out_of_place(graph: fx.GraphModule) -> None:
    """In-place operations would overwrite values that a quantizer has yet to read."""
    for node in graph.graph.nodes:
        if node.op == "call_module" and getattr(graph.get_submodule(str(node.target)), "inplace", False):
            graph.get_submodule(str(node.target)).inplace = False  # type: ignore[assignment]
        elif node.op == "call_function":
            node.target = {operator.iadd: operator.add, torch.relu_: F.relu, F.relu_: F.relu}.get(
                node.target, node.target
            )
            if "inplace" in node.kwargs:
                node.update_kwarg("inplace", False)
        elif node.op == "call_method" and node.target in ("add_", "relu_"):
            node.target = str(node.target).removesuffix("_")


def _fold_batch_norm(graph: fx.GraphModule) -> None:
    """Fold BatchNorm into the Conv2d or Linear before it, where each is called once and none reads between them."""
    modules = dict(graph.named_modules())
    calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.graph.nodes if node.op == "get_attr"}
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) not in (nn.BatchNorm1d, nn.BatchNorm2d):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) != 1 or calls[node.target] > 1 or calls[before.target] > 1:
            continue
        layer, norm = modules[before.target], modules[node.target]
        fits = type(layer) is (nn.Conv2d if isinstance(norm, nn.BatchNorm2d) else nn.Linear)
        # Statistics of the batch are no constant; a layer that is read or has hooks is more than its product.
        if not fits or norm.running_mean is None or before.target in read or _hooked(layer) or _hooked(norm):
            continue
        parent, _, attribute = before.target.rpartition(".")
        setattr(graph.get_submodule(parent), attribute, _folded(layer, norm))
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)


def _folded(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """A copy of a Conv2d or Linear that does a BatchNorm's work too, with or without its scale and shift."""
    folded = copy.deepcopy(layer)
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    gain = torch.rsqrt(variance + cast("float", norm.eps))
    if norm.weight is not None:
        gain = gain * norm.get_parameter("weight").detach()
    bias = layer.bias.detach() if isinstance(layer.bias, Tensor) else torch.zeros_like(mean)
    shift = norm.get_parameter("bias").detach() if norm.bias is not None else torch.zeros_like(mean)
    weight = layer.get_parameter("weight").detach()
    folded.weight = nn.Parameter(weight * gain.view(-1, *[1] * (weight.ndim - 1)))
    folded.bias = nn.Parameter((bias - mean) * gain + shift)
    return folded


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _place(error: BaseException, model: str) -> str:
    """The line of the model's code at which tracing stopped: the innermost frame outside torch."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
    own = [frame for frame in frames if frame.filename != __file__]
    if not own:
        return model
    return f"{model} at {Path(own[-1].filename).name}:{own[-1].lineno} ({own[-1].line})"
