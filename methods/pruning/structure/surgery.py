"""Removing channels: smaller parameters, and layers that describe themselves accordingly; or zeros, as a reference."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from harness.calling import call, evaluating, plain_attention
from harness.errors import Unsupported, explanation
from methods.layers.attention import explicit
from methods.pruning.structure import trace
from methods.pruning.structure.labels import Bools, Ints
from methods.pruning.structure.trace import Op, Run

if TYPE_CHECKING:
    from methods.pruning.structure.units import Structure, Unit


def remove(model: nn.Module, structure: Structure, units: Iterable[Unit]) -> nn.Module:
    """A copy of ``model`` without some units: its classes, with smaller layers.

    An attention module whose heads or inputs shrink comes back as one of :mod:`methods.layers.attention`.

    Parameters
    ----------
    model : nn.Module
        The one that ``structure`` was found in; not changed.
    structure : Structure
        Of :func:`methods.pruning.structure.find.find`.
    units : iterable of Unit
        What goes.

    Raises
    ------
    Unsupported
        If the forward pass does not accept what is left.
    """
    gone = structure.removed(units)
    subject = copy.deepcopy(model)
    originals = explicit(subject)
    smaller = shrunk(subject, structure, gone)
    failed = mismatch(smaller, subject, structure, gone)
    if failed is not None:
        where = failed.path or "the model"
        raise Unsupported(f"the forward pass of {where} does not accept smaller layers ({failed.error})")
    for name, original in originals.items():
        exchanged, now = subject.get_submodule(name), smaller.get_submodule(name)
        before = [tensor.shape for tensor in exchanged.state_dict().values()]
        if before == [tensor.shape for tensor in now.state_dict().values()]:
            smaller.set_submodule(name, copy.deepcopy(original))
    return smaller


def masked(model: nn.Module, structure: Structure, units: Iterable[Unit]) -> nn.Module:
    """The reference for :func:`remove`: a model of the old size in which the units' parameters are zero.

    Zero are the weights and biases that make a removed channel, the scales and shifts of its normalisations (its
    running mean too; its running variance is one), and the weights that read it, so that nothing of it reaches a
    channel that stays. A batch normalisation treats each channel by itself, and needs nothing more.

    A layer normalisation (or group normalisation) over channels of which some are removed is another function
    afterwards: its mean and variance are taken over fewer channels. Zeros in their place are not the same thing, as
    they would enter the mean. In the masked model these normalisations therefore take mean and variance over the
    channels that stay. This is the only place where the masked model is not the old forward pass over zeroed
    parameters, and a pruned transformer or ConvNeXt differs from one with zeroed weights by just this.

    Returns
    -------
    nn.Module
        With the same outputs as the shrunken model up to rounding. For comparisons only: it is not made to be saved.
    """
    gone = structure.removed(units)
    subject = copy.deepcopy(model)
    explicit(subject)
    return _zeroed(subject, structure, gone)


def _zeroed(subject: nn.Module, structure: Structure, gone: Bools) -> nn.Module:
    """:func:`masked` for a model whose attention is exchanged; changed in place."""
    tensors = {**dict(subject.named_parameters()), **dict(subject.named_buffers())}
    with torch.no_grad():
        for name, axis in structure.axes:
            value = tensors[name]
            stays = torch.zeros(value.shape[axis], dtype=torch.bool)
            stays[torch.from_numpy(structure.kept(name, axis, gone))] = True
            lost = (~stays).nonzero().flatten().to(value.device)
            value.index_fill_(axis, lost, 1.0 if name.endswith("running_var") else 0.0)
    return _Masked(subject, [mask.to(next(iter(tensors.values())).device) for mask in _normalised(structure, gone)])


def _normalised(structure: Structure, gone: Bools) -> list[Tensor]:
    """For every call of a layer or group normalisation: 1 where an input stays and 0 where it goes, broadcastable."""
    found = []
    for index, op in enumerate(structure.flow.run.ops):
        if op.name in _STATISTICS:
            labels = structure.outputs[index][0]
            found.append(torch.from_numpy(~(gone[labels.array] & (labels.array >= 0))))
    return found


_STATISTICS = ("aten::native_layer_norm", "aten::native_group_norm")


class _Masked(nn.Module):
    """Runs a model with normalisations over the channels that stay."""

    def __init__(self, model: nn.Module, stays: list[Tensor]) -> None:
        super().__init__()
        self.model = model
        self.stays = stays

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), plain_attention(), _KeptStatistics(self.stays):
            return self.model(*args, **kwargs)


class _KeptStatistics(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    def __init__(self, stays: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stays = iter(stays)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func._schema.name)
        if name not in _STATISTICS:
            return func(*args, **(kwargs or {}))
        x, stays = args[0], next(self.stays)
        if name == "aten::native_layer_norm":
            _, normalized_shape, weight, bias, eps = args
            grid, there = x, stays.expand(1, *x.shape[1:])
            axes = list(range(x.ndim - len(normalized_shape), x.ndim))
            shape = (1,) * (x.ndim - len(normalized_shape)) + tuple(normalized_shape)
        else:
            _, weight, bias, n, channels, _, groups, eps = args
            grid = x.reshape(n, groups, -1)
            there = stays.expand(1, *x.shape[1:]).reshape(1, groups, -1)
            axes, shape = [2], (1, channels) + (1,) * (x.ndim - 2)
        share = there.to(x.dtype)
        count = share.sum(axes, keepdim=True)
        mean = (grid * share).sum(axes, keepdim=True) / count
        variance = ((grid - mean).square() * share).sum(axes, keepdim=True) / count
        scale = (variance + eps).rsqrt()
        y = ((grid - mean) * scale * share).reshape(x.shape)
        if weight is not None:
            y = y * weight.reshape(shape)
        if bias is not None:
            y = y + bias.reshape(shape)
        return y, mean, scale


def shrunk(model: nn.Module, structure: Structure, gone: Bools) -> nn.Module:
    """A copy of ``model`` (attention exchanged) without the removed labels; its forward pass is not checked."""
    smaller = copy.deepcopy(model)
    _cut(smaller, structure, gone)
    for name, module in smaller.named_modules():
        _set_sizes(name, module, structure, gone)
    for index, op in enumerate(structure.flow.run.ops):
        if op.name == "aten::native_layer_norm":
            module = smaller.get_submodule(op.path)
            if isinstance(module, nn.LayerNorm):
                rank = len(module.normalized_shape)
                module.normalized_shape = structure.outputs[index][0].kept(gone)[-rank:]
    for resize in structure.resizes:
        size = structure.outputs[resize.op][resize.output].kept(gone)[resize.axis]
        setattr(smaller.get_submodule(resize.path), resize.attribute, size)
    return smaller


def _cut(model: nn.Module, structure: Structure, gone: Bools) -> None:
    """Keep the indices that stay of every parameter and buffer, in place."""
    made: dict[int, Tensor] = {}
    axes: dict[str, list[int]] = {}
    for tensor, axis in structure.axes:
        axes.setdefault(tensor, []).append(axis)
    names = {id(value): name for name, value in reversed([*model.named_parameters(), *model.named_buffers()])}
    for module in list(model.modules()):
        for store in (module._parameters, module._buffers):
            for key, value in store.items():
                name = names.get(id(value)) if value is not None else None
                if value is None or name not in axes:
                    continue
                if id(value) not in made:
                    made[id(value)] = _kept(value, {a: structure.kept(name, a, gone) for a in axes[name]})
                store[key] = made[id(value)]  # type: ignore[assignment]  # a parameter for a parameter


def _kept(value: Tensor, kept: dict[int, Ints]) -> Tensor:
    result = value.detach()
    for axis, indices in kept.items():
        if len(indices) < result.shape[axis]:
            result = result.index_select(axis, torch.from_numpy(indices).to(result.device))
    if result.shape == value.shape:
        return value
    result = result.contiguous()
    return nn.Parameter(result, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else result


def _set_sizes(name: str, module: nn.Module, structure: Structure, gone: Bools) -> None:
    """Bring a layer's own description in line with its parameters."""
    weight = getattr(module, "weight", None)
    if isinstance(module, _ConvNd):
        key = f"{name}.weight" if name else "weight"
        if key in structure.flow.groups:
            groups = structure.names[structure.flow.groups[key]]
            module.groups = int((~gone[groups]).sum())
        rows, columns = module.weight.shape[:2]
        if module.transposed:
            rows, columns = columns, rows
        module.out_channels, module.in_channels = rows, columns * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase):
        known = weight if weight is not None else module.running_mean
        module.num_features = module.num_features if known is None else len(known)
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_channels = len(weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Where a shrunken model does not run as expected.

    Parameters
    ----------
    index : int
        The operator of the original run that does not happen, or gives another shape.
    after : int
        The last one before it that was as expected; reshapes between them are not compared.
    path : str
        The module that was running.
    error : str
        What is wrong.
    """

    index: int
    after: int
    path: str
    error: str


def mismatch(model: nn.Module, subject: nn.Module, structure: Structure, gone: Bools) -> Mismatch | None:
    """Run a shrunken model and compare every operator's shapes with the expected ones.

    torch may choose other operators for other sizes (a linear layer over memory in another order); where it does, the
    outputs are compared with those of the masked ``subject`` instead.
    """
    run, stack = Run(), [""]
    error = ""
    try:
        trace.record_into(run, model, structure.inputs, structure.signature, stack)
    except Exception as raised:  # noqa: BLE001 (the model's own code runs here and may raise anything)
        error = explanation(raised)
    wanted, found = _relevant(structure.flow.run.ops), _relevant(run.ops)
    after = -1
    for position, (index, op) in enumerate(wanted):
        if position >= len(found):
            path = stack[-1] if error else op.path
            return Mismatch(index=index, after=after, path=path, error=error or "the run is shorter")
        other, shapes = found[position][1], structure.shapes(index, gone)
        if other.name != op.name and not error and _same_function(model, subject, structure, gone):
            return None
        if other.name != op.name or other.shapes != shapes:
            got = " and ".join(str(list(shape)) for shape in other.shapes)
            meant = " and ".join(str(list(shape)) for shape in shapes)
            text = f"{op.name.removeprefix('aten::')} gives {got} instead of {meant}"
            return Mismatch(index=index, after=after, path=op.path, error=text)
        after = index
    if error:
        return Mismatch(index=wanted[-1][0], after=after, path=stack[-1], error=error)
    return None


def _same_function(smaller: nn.Module, subject: nn.Module, structure: Structure, gone: Bools) -> bool:
    reference = _zeroed(copy.deepcopy(subject), structure, gone)
    with evaluating(smaller), evaluating(reference):
        pairs = [call(model, structure.inputs, structure.signature) for model in (smaller, reference)]
    for found, expected in zip(*(outputs.values() for outputs in pairs), strict=True):
        if found.shape != expected.shape or bool((found - expected).abs().max() > 1e-4 * expected.abs().max()):
            return False
    return True


# Copies and views of memory: which are needed depends on strides.
_COPIES = {
    "aten::as_strided",
    "aten::clone",
    "aten::_unsafe_view",
    "aten::view",
    "aten::contiguous",
    "aten::alias",
    "aten::_reshape_alias",
}


def _relevant(ops: list[Op]) -> list[tuple[int, Op]]:
    """Operators whose presence and shape do not depend on how tensors lie in memory."""
    return [(index, op) for index, op in enumerate(ops) if op.name not in _COPIES and op.outputs]
