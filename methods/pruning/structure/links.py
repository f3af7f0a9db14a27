"""Which layers can lose neurons: pairs of a producer and the only layer that reads its outputs."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from harness.errors import Unsupported

_PRODUCERS = (nn.Linear, nn.Conv2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

# f(s x) = s f(x) for s > 0, each channel by itself: a scale passes through (Kim et al. 2020 ask for it, of ReLU).
_HOMOGENEOUS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
_HOMOGENEOUS_NAMES = {"relu", "relu_", "leaky_relu", "leaky_relu_", "dropout", "dropout2d", "contiguous"}
_POOLS: tuple[type[nn.Module], ...] = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)
_POOL_NAMES = {"max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d"}
# Elementwise, so a neuron can be removed; not homogeneous, so it cannot be folded into another one.
_ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.ReLU6,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.ELU,
    nn.SELU,
    nn.Mish,
    nn.Softplus,
)
_ELEMENTWISE_NAMES = {
    *("gelu", "silu", "sigmoid", "tanh", "relu6", "hardswish", "hardsigmoid", "hardtanh", "elu", "selu", "mish"),
    "softplus",
}


@dataclass(frozen=True, kw_only=True)
class Link:
    """A layer whose neurons only one other layer reads.

    Parameters
    ----------
    producer, consumer : str
        Names of ``nn.Linear`` or ``nn.Conv2d`` modules.
    norm : str or None
        Name of the batch normalisation directly after the producer.
    columns : int
        Input columns of the consumer that belong to one neuron of the producer (height times width where a convolution
        is flattened into a linear layer, otherwise 1).
    not_homogeneous : str or None
        The first operation between them that a positive scale does not pass through.
    """

    producer: str
    consumer: str
    norm: str | None = None
    columns: int = 1
    not_homogeneous: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Path:
    """What lies between a producer and the node reached so far."""

    norm: str | None = None
    touched: bool = False  # something other than the norm has been passed
    flat: bool = False
    not_homogeneous: str | None = None


class _Stop(Exception):
    """The producer cannot lose neurons; the text says why."""


def find_links(model: nn.Module) -> tuple[list[Link], dict[str, str]]:
    """Find the layers that can lose neurons.

    Parameters
    ----------
    model : nn.Module
        Traced symbolically with torch.fx; not run, not changed.

    Returns
    -------
    links : list of Link
        In the order of execution.
    left_alone : dict of str to str
        Every other linear or convolution layer and why it keeps its neurons.

    Raises
    ------
    Unsupported
        If the model's forward pass cannot be traced.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # the model's own code runs on proxies here and may raise anything
        raise Unsupported(
            f"the forward pass cannot be traced symbolically ({type(error).__name__}: {error}); "
            "tracing needs a model without data-dependent control flow"
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    tracer = _Walker(graph, modules)
    links: list[Link] = []
    left_alone = {name: "it is not seen in the traced forward pass" for name in modules if _has_rows(modules[name])}
    for node in graph.nodes:
        if node.op == "call_module" and _has_rows(modules[str(node.target)]):
            try:
                links.append(tracer.link(node))
                del left_alone[str(node.target)]
            except _Stop as stop:
                left_alone[str(node.target)] = str(stop)
    return links, left_alone


def _has_rows(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


class _Tracer(fx.Tracer):
    """A tracer that takes a submodule which cannot be traced as one opaque operation."""

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before, depth = len(self.graph.nodes), len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # noqa: BLE001 (the module's own code runs on proxies here and may raise anything)
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


class _Walker:
    """Follows a producer's output to its consumer."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        called = [modules[str(node.target)] for node in graph.nodes if node.op == "call_module"]
        self.calls = Counter(id(part) for module in called for part in module.modules())
        owners: Counter[int] = Counter()
        for module in {id(m): m for m in modules.values()}.values():
            owners.update(id(p) for p in module.parameters(recurse=False))
        # A parameter read outside its module (get_attr) counts as one more owner.
        for node in graph.nodes:
            if node.op == "get_attr":
                owners[id(operator.attrgetter(str(node.target))(modules[""]))] += 1
        self.owners = owners

    def link(self, node: fx.Node) -> Link:
        producer = self.layer(node)
        path, here = _Path(), node
        while True:
            here = self.only_user(here)
            if here.op == "call_module":
                module = self.modules[str(here.target)]
                if type(module) in _PRODUCERS:
                    return self.finish(node, producer, here, path)
                path = self.through_module(producer, here, module, path)
            elif here.op in ("call_function", "call_method"):
                path = self.through_call(producer, here, path)
            else:
                raise _Stop("its outputs are the model's outputs")

    def layer(self, node: fx.Node) -> nn.Linear | nn.Conv2d:
        """The node's module, if its rows may be edited."""
        module = self.modules[str(node.target)]
        if type(module) not in _PRODUCERS:
            raise _Stop(f"{node.target} is a {type(module).__name__}, neither nn.Linear nor nn.Conv2d")
        if getattr(module, "groups", 1) != 1:
            raise _Stop(f"{node.target} is a grouped convolution")
        self.exclusive(node, module)
        return module  # type: ignore[return-value]  # narrowed by the test above

    def exclusive(self, node: fx.Node, module: nn.Module) -> None:
        if self.calls[id(module)] > 1:
            raise _Stop(f"{node.target} is called more than once")
        if any(self.owners[id(p)] > 1 for p in module.parameters(recurse=False)):
            raise _Stop(f"the parameters of {node.target} are shared")

    def only_user(self, node: fx.Node) -> fx.Node:
        users = [user for user in node.users if not _reads_batch_size(user)]
        if len(users) != 1:
            names = ", ".join(sorted({_label(user) for user in users}))
            raise _Stop(f"its outputs are used {len(users)} times ({names})" if users else "its outputs are not used")
        return users[0]

    def through_module(self, producer: nn.Module, node: fx.Node, module: nn.Module, path: _Path) -> _Path:
        kind = type(module)
        convolution = isinstance(producer, nn.Conv2d)
        if kind in _NORMS and not path.touched and path.norm is None:
            self.exclusive(node, module)
            width = producer.out_channels if isinstance(producer, nn.Conv2d) else producer.out_features
            if module.running_mean is None or module.num_features != width:
                raise _Stop(f"{node.target} has no running statistics of this layer's outputs")
            return replace(path, norm=str(node.target))
        if kind in _HOMOGENEOUS or (kind in _POOLS and convolution and not path.flat):
            return replace(path, touched=True)
        if kind in _ELEMENTWISE:
            return replace(path, touched=True, not_homogeneous=path.not_homogeneous or kind.__name__)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return replace(path, touched=True, flat=True)
        raise _Stop(f"its outputs enter {node.target} ({kind.__name__})")

    def through_call(self, producer: nn.Module, node: fx.Node, path: _Path) -> _Path:
        name = _name(node.target)
        convolution = isinstance(producer, nn.Conv2d)
        if len([a for a in node.all_input_nodes if not _reads_batch_size(a)]) != 1:
            raise _Stop(f"its outputs enter {name}")
        if name in _HOMOGENEOUS_NAMES or (name in _POOL_NAMES and convolution and not path.flat):
            return replace(path, touched=True)
        if name in _ELEMENTWISE_NAMES:
            return replace(path, touched=True, not_homogeneous=path.not_homogeneous or name)
        if _flattens(node, name) or (convolution and not path.flat and _averages_positions(node, name)):
            return replace(path, touched=True, flat=True)
        raise _Stop(f"its outputs enter {name}{_constants(node)}")

    def finish(self, node: fx.Node, producer: nn.Linear | nn.Conv2d, reached: fx.Node, path: _Path) -> Link:
        consumer = self.layer(reached)
        neurons = producer.out_channels if isinstance(producer, nn.Conv2d) else producer.out_features
        inputs = consumer.in_channels if isinstance(consumer, nn.Conv2d) else consumer.in_features
        columns, rest = divmod(inputs, neurons)
        flattened = isinstance(producer, nn.Conv2d) and isinstance(consumer, nn.Linear) and path.flat
        if rest or (columns != 1 and not flattened) or (type(producer) is not type(consumer) and not flattened):
            raise _Stop(f"its {neurons} outputs are not what {reached.target} reads ({inputs} inputs)")
        return Link(
            producer=str(node.target),
            consumer=str(reached.target),
            norm=path.norm,
            columns=columns,
            not_homogeneous=path.not_homogeneous,
        )


def _name(target: str | Callable[..., Any]) -> str:
    return target if isinstance(target, str) else target.__name__


def _label(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    return "the model's output" if node.op == "output" else _name(node.target)


def _constants(node: fx.Node) -> str:
    values = [str(a) for a in node.args if not isinstance(a, fx.Node)]
    return f"({', '.join(values)})" if values else ""


def _reads_batch_size(node: fx.Node) -> bool:
    """Whether a node yields the batch size only: x.size(0), x.shape[0], x.size()[0]."""
    if node.op == "call_method" and node.target == "size" and len(node.args) > 1:
        return bool(node.args[1] == 0)
    if node.op == "call_function" and node.target is operator.getitem:
        return bool(node.args[1] == 0) and isinstance(node.args[0], fx.Node) and _is_shape(node.args[0])
    return _is_shape(node) and all(_reads_batch_size(user) for user in node.users)


def _is_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1 and not node.kwargs
    return node.op == "call_function" and node.target is getattr and bool(node.args[1] == "shape")


def _flattens(node: fx.Node, name: str) -> bool:
    """Whether a call keeps the batch axis and joins all the others, whatever their sizes."""
    if name == "flatten":
        given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
        return (given.get("start_dim", 0), given.get("end_dim", -1)) == (1, -1)
    if name in ("view", "reshape"):
        shape = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return (
            isinstance(shape, (tuple, list))
            and len(shape) == 2
            and isinstance(shape[0], fx.Node)
            and _reads_batch_size(shape[0])
            and bool(shape[1] == -1)
        )
    return False


def _averages_positions(node: fx.Node, name: str) -> bool:
    """Whether a call averages over height and width: x.mean((2, 3))."""
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    axes = given.get("dim")
    return (
        name == "mean"
        and isinstance(axes, (tuple, list))
        and {int(a) % 4 for a in axes} == {2, 3}
        and not given.get("keepdim")
    )
