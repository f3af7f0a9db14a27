"""What can be removed from a model: units, the layers that they belong to, and the whole of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from methods.pruning.structure.labels import Bools, Ints, Labels
from methods.pruning.structure.rules import Flow, Leaf
from methods.pruning.structure.trace import Op

if TYPE_CHECKING:
    from harness.contracts import Signature, Tensors


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Indices of one axis of one parameter or buffer.

    Parameters
    ----------
    tensor : str
        Name in the model (of a shared one the first).
    axis : int
        The axis.
    indices : tuple of int
        Ascending.
    makes : bool
        Whether this axis makes channels (rows of a layer's weight) rather than reads or scales them.
    """

    tensor: str
    axis: int
    indices: tuple[int, ...]
    makes: bool


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is removed together: a channel, a neuron, a group of a grouped convolution, an attention head.

    Parameters
    ----------
    label : int
        Names it.
    slices : tuple of Slice
        Everything that belongs to it.
    width : int
        Channels that it counts for: the smallest number of indices that one of its slices has.
    """

    label: int
    slices: tuple[Slice, ...]
    width: int


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Units that the same layers make, and that therefore compete with one another.

    Parameters
    ----------
    name : str
        Of the first layer that makes them.
    makers : tuple of str
        Of all of them.
    units : tuple of Unit
        That can be removed, in the order of their indices.
    fixed : int
        Channels of these layers that cannot be removed.
    """

    name: str
    makers: tuple[str, ...]
    units: tuple[Unit, ...]
    fixed: int = 0

    @property
    def channels(self) -> int:
        """All channels."""
        return self.fixed + sum(unit.width for unit in self.units)


@dataclass(frozen=True, kw_only=True)
class Resize:
    """An integer attribute that follows the size of an axis: the attribute's module, and where that axis is seen."""

    path: str
    attribute: str
    op: int
    output: int
    axis: int


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What can be removed from a model.

    Parameters
    ----------
    layers : tuple of Layer
        With at least two units each.
    left_alone : dict of str to str
        Layers that keep all their channels, and why.
    flow : Flow
        The labels, by component (``names``).
    names : ndarray of int64
        The component of every label.
    resizes : tuple of Resize
        Attributes to set.
    exchanged : frozenset of str
        Attention modules that stand in another form while their heads are removed.
    inputs : Tensors
        What the model was run on.
    signature : Signature
        How it was called.
    """

    layers: tuple[Layer, ...]
    left_alone: dict[str, str]
    flow: Flow = field(repr=False)
    names: Ints = field(repr=False)
    outputs: tuple[tuple[Labels, ...], ...] = field(repr=False)
    axes: dict[tuple[str, int], Ints] = field(repr=False)
    resizes: tuple[Resize, ...]
    exchanged: frozenset[str]
    inputs: Tensors = field(repr=False)
    signature: Signature

    def reached(self, model: nn.Module) -> list[Tensor]:
        """The parameters of ``model`` that units have a slice of."""
        names = {part.tensor for unit in self.units for part in unit.slices}
        return [parameter for name, parameter in model.named_parameters() if name in names]

    @property
    def units(self) -> list[Unit]:
        """All units that can be removed."""
        return [unit for layer in self.layers for unit in layer.units]

    def removed(self, units: Iterable[Unit]) -> Bools:
        """By label, whether it goes."""
        gone = np.zeros(self.flow.ledger.count, np.bool_)
        for unit in units:
            gone[unit.label] = True
        return gone

    def kept(self, tensor: str, axis: int, gone: Bools) -> Ints:
        """Indices of a stored tensor's axis that stay."""
        labels = self.axes.get((tensor, axis))
        if labels is None:
            return np.arange(self.flow.tensors[tensor].shape[axis])
        return np.flatnonzero(~(gone[labels] & (labels >= 0)))

    def shapes(self, index: int, gone: Bools) -> tuple[tuple[int, ...], ...]:
        """Shapes of an operator's outputs."""
        if (leaf := self.flow.views.get(index)) is not None:
            return (self._shape(leaf, gone),)
        return tuple(labels.kept(gone) for labels in self.outputs[index])

    def changes(self, index: int, gone: Bools) -> bool:
        """Whether an operator's activations change their shape."""
        return any(labels.kept(gone) != labels.shape for labels in self.outputs[index])

    def parameters(self, gone: Bools) -> int:
        """Parameters that are left."""
        return sum(
            math.prod(len(self.kept(name, axis, gone)) for axis in range(tensor.ndim))
            for name, tensor in self.flow.tensors.items()
            if isinstance(tensor, nn.Parameter)
        )

    def macs(self, gone: Bools) -> int:
        """Multiply-accumulates of one example that are left, counted as :func:`harness.measure.counts.macs` does."""
        return sum(self._macs(*counted, gone) for counted in self._counted) // len(next(iter(self.inputs.values())))

    @functools.cached_property
    def _counted(self) -> list[tuple[Op, list[Labels | Leaf], Labels]]:
        """Operators that multiply and accumulate: their arguments and output."""
        found = []
        for index, op in enumerate(self.flow.run.ops):
            if op.name in _COUNTED:
                values = [v.canonical(self.names) if isinstance(v, Labels) else v for v in self.flow.inputs[index]]
                found.append((op, values, self.outputs[index][0]))
        return found

    def _macs(self, op: Op, values: list[Labels | Leaf], output: Labels, gone: Bools) -> int:
        shapes = [self._shape(value, gone) for value in values]
        out = output.kept(gone)
        if op.name == "aten::convolution":
            positions = math.prod(shapes[0][2:] if op.argument("transposed", False) else out[2:])
            return out[0] * positions * math.prod(shapes[1])
        if op.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            return math.prod(out) * shapes[-2][-1]
        query, key, value = shapes[:3]
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])

    def _shape(self, value: Labels | Leaf, gone: Bools) -> tuple[int, ...]:
        if isinstance(value, Leaf):
            return tuple(len(self.kept(value.name, axis, gone)) for axis in value.axes)
        return value.kept(gone)


_COUNTED = {
    "aten::convolution", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
}  # fmt: skip
