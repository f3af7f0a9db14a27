"""Where quantizers go: a model as an ``fx`` graph, the plan of what is quantized in it, and the plan carried out.

The rule, in terms of values (graph nodes), is that of :class:`methods.quantization.ptq_int8.PtqInt8`: a value has one
quantizer, at its source. Values that an integer kernel produces (convolutions, residual additions between such values,
each together with a sole ReLU after it) are quantized for all their users; values that a float operation produces are
quantized for the integer layers that read them only, so that a float residual stream stays float.
"""

from __future__ import annotations

import copy
import operator
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from harness.contracts import Scheme
from harness.errors import Unsupported
from harness.quantized import ActivationQuantizer, QuantizedConv2d, QuantizedLinear

_QUANTIZED = (ActivationQuantizer, QuantizedConv2d, QuantizedLinear)
_INERT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
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


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _QUANTIZED) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """Copy the model into a graph in evaluation mode, without inert modules, BatchNorm folded.

    Raises
    ------
    Unsupported
        If the model's Python code cannot be traced (the message names the place), or it is quantized already.
    """
    if any(isinstance(module, _QUANTIZED) for module in model.modules()):
        raise Unsupported("the model is quantized already")
    root = copy.deepcopy(model).eval()
    tracer = _Tracer()
    try:
        graph = tracer.trace(root)
    except Exception as error:  # the model's own code runs here and may raise anything
        place = _place(error, type(root).__name__)
        raise Unsupported(f"torch.fx cannot trace {place}: {type(error).__name__}: {_first_line(error)}") from error
    traced = fx.GraphModule(root, graph, type(model).__name__)
    _remove_inert(traced)
    _make_out_of_place(traced)
    _fold_batch_norm(traced)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced.eval()


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
    return None


def _remove_inert(graph: fx.GraphModule) -> None:
    """Drop what does nothing in evaluation: dropout, identity, torchvision's stochastic depth."""
    for node in list(graph.graph.nodes):
        inert_function = node.op == "call_function" and getattr(node.target, "__name__", "") in (
            "stochastic_depth",
            "dropout",
        )
        if inert_function or _is(graph, node, _INERT):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.graph.erase_node(node)


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
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm1d | nn.BatchNorm2d):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) != 1 or calls[node.target] > 1 or calls[before.target] > 1:
            continue
        layer, norm = modules[before.target], modules[node.target]
        if norm.running_mean is None or norm.running_var is None:
            continue
        if type(layer) is nn.Conv2d:
            folded: nn.Module = fuse_conv_bn_eval(layer, norm)
        elif type(layer) is nn.Linear and isinstance(norm, nn.BatchNorm1d):
            folded = fuse_linear_bn_eval(layer, norm)
        else:
            continue
        parent, _, attribute = before.target.rpartition(".")
        setattr(graph.get_submodule(parent), attribute, folded)
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _place(error: BaseException, model: str) -> str:
    """The line of the model's code at which tracing stopped: the innermost frame outside torch."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
    own = [frame for frame in frames if frame.filename != __file__]
    if not own:
        return model
    return f"{model} at {Path(own[-1].filename).name}:{own[-1].lineno} ({own[-1].line})"
