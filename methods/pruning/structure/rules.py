"""How each operator hands channel labels on: one pass over a recorded run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from methods.pruning.structure.labels import Ints, Labels, Ledger
from methods.pruning.structure.trace import Op, Ref, Run


@dataclass(frozen=True)
class Leaf:
    """A parameter or buffer as it is, or with its axes permuted.

    Parameters
    ----------
    name : str
        In the model.
    axes : tuple of int
        Axis ``i`` of this view is axis ``axes[i]`` of the stored tensor.
    """

    name: str
    axes: tuple[int, ...]


Value = Labels | Leaf


@dataclass(kw_only=True)
class Flow:
    """Labels of everything in a run.

    Parameters
    ----------
    run : Run
        The recorded run.
    tensors : dict of str to Tensor
        Parameters and buffers by name.
    ledger : Ledger
        Collects what belongs together and what is pinned.
    outputs : list of list of Labels
        By operator and output.
    inputs : list of list of Value
        By operator and tensor argument.
    axes : dict of (str, int) to ndarray
        Labels of a weight's axis.
    elements : dict of str to Labels
        Labels of the elements of a parameter that is used element by element.
    producers : set of (str, int)
        Weight axes that make channels.
    groups : dict of str to ndarray
        For a grouped convolution's weight that loses whole groups, one label a group.
    views : dict of int to Leaf
        Operators whose output is a stored tensor, permuted.
    values : dict of int to Value
        By number of the tensor.
    """

    run: Run
    tensors: dict[str, Tensor]
    ledger: Ledger = field(default_factory=Ledger)
    outputs: list[list[Labels]] = field(default_factory=list)
    inputs: list[list[Value]] = field(default_factory=list)
    axes: dict[tuple[str, int], Ints] = field(default_factory=dict)
    elements: dict[str, Labels] = field(default_factory=dict)
    producers: set[tuple[str, int]] = field(default_factory=set)
    groups: dict[str, Ints] = field(default_factory=dict)
    views: dict[int, Leaf] = field(default_factory=dict)
    values: dict[int, Value] = field(default_factory=dict)

    def axis(self, name: str, axis: int) -> Ints:
        """Labels of a stored tensor's axis; of a vector, those of its elements."""
        key = (name, axis)
        if key not in self.axes:
            size = self.tensors[name].shape[axis]
            if self.tensors[name].ndim == 1:
                self.axes[key] = self.element(name).array.reshape(-1)
            else:
                self.axes[key] = self.ledger.new(size)
        return self.axes[key]

    def element(self, name: str) -> Labels:
        """Labels of a stored tensor's elements; integers have none."""
        if name not in self.elements:
            tensor = self.tensors[name]
            if tensor.is_floating_point():
                labels = Labels(self.ledger.new(tensor.numel()).reshape(tuple(tensor.shape)), tuple(tensor.shape))
                self.ledger.arrays.append(labels)
            else:
                labels = Labels.none(tensor.shape)
            self.elements[name] = labels
        return self.elements[name]

    def labels(self, value: Value) -> Labels:
        """A value's labels, element by element."""
        if isinstance(value, Labels):
            return value
        found = self.element(value.name)
        shape = tuple(found.shape[a] for a in value.axes)
        return Labels(found.array.transpose(value.axes), shape)

    def value(self, ref: Ref, shape: tuple[int, ...]) -> Value:
        """What is known of a tensor of the run; an unknown one (the input, a constant) has no channels."""
        return self.values.get(ref.number) or Labels.none(shape)


def follow(run: Run, tensors: dict[str, Tensor]) -> Flow:
    """Propagate labels through a run.

    Parameters
    ----------
    run : Run
        Recorded with :func:`methods.pruning.structure.trace.record`.
    tensors : dict of str to Tensor
        The parameters and buffers of the model that ran, by the names in ``run.leaves``.
    """
    flow = Flow(run=run, tensors=tensors)
    for number, name in run.leaves.items():
        flow.values[number] = Leaf(name, tuple(range(tensors[name].ndim)))
    for op in run.ops:
        _step(flow, op)
    for ref in run.results:
        result = flow.values.get(ref.number)
        if result is not None:
            flow.ledger.pin(flow.labels(result).array, "the model's outputs are its classes")
    _pin_mixed_uses(flow)
    return flow


def _step(flow: Flow, op: Op) -> None:
    refs = [ref for ref in tree_flatten((op.args, op.kwargs))[0] if isinstance(ref, Ref)]
    given = [flow.value(ref, shape) for ref, shape in zip(refs, op.inputs, strict=True)]
    shape_of = dict(zip((ref.number for ref in refs), op.inputs, strict=True))

    def argument(name: str) -> Value | None:
        ref = op.argument(name)
        return flow.value(ref, shape_of[ref.number]) if isinstance(ref, Ref) else None

    step = Step(flow=flow, op=op, given=given, argument=argument)
    if len(given) == 1 and isinstance(given[0], Leaf) and op.name in _VIEWS_OF_LEAVES:
        made: list[Value] = [_permuted(given[0], op)]
    elif all(isinstance(value, Labels) and value.empty for value in given):
        made = [Labels.none(shape) for shape in op.shapes]
    elif op.name in _RULES:
        made = _RULES[op.name](step)
    elif torch.Tag.pointwise in op.function.tags:
        made = _elementwise(step)
    else:
        for value in given:
            flow.ledger.pin(flow.labels(value).array, step.reason())
        made = [Labels.none(shape) for shape in op.shapes]
    made += [Labels.none(shape) for shape in op.shapes[len(made) :]]
    for ref, value in zip(op.outputs, made, strict=True):
        flow.values[ref.number] = value
    if made and isinstance(made[0], Leaf):
        flow.views[len(flow.outputs)] = made[0]
    labelled = [flow.labels(value) if isinstance(value, Labels) else Labels.none(()) for value in made]
    flow.ledger.arrays.extend(labels for labels in labelled if len(labels.varying) > 1)
    flow.inputs.append(given)
    flow.outputs.append(labelled)


@dataclass(frozen=True, kw_only=True)
class Step:
    """An operator with the labels of its arguments."""

    flow: Flow
    op: Op
    given: list[Value]
    argument: Callable[[str], Value | None]

    def labels(self, name: str) -> Labels:
        """An argument's labels, element by element."""
        value = self.argument(name)
        if value is None:
            return Labels.none(())
        return self.flow.labels(value)

    def reason(self) -> str:
        """What pins the channels that this operator does not allow to be removed."""
        where = f" of {self.op.path}" if self.op.path else " of the model"
        return f"they enter {self.op.name.removeprefix('aten::')} in the forward pass{where}"


def _permuted(leaf: Leaf, op: Op) -> Leaf:
    count = len(leaf.axes)
    order = list(range(count))
    if op.name == "aten::permute":
        order = [a % count for a in op.argument("dims")]
    elif op.name == "aten::transpose":
        a, b = op.argument("dim0") % count, op.argument("dim1") % count
        order[a], order[b] = b, a
    elif op.name == "aten::t" and count == 2:
        order = [1, 0]
    return replace(leaf, axes=tuple(leaf.axes[a] for a in order))


_VIEWS_OF_LEAVES = {"aten::permute", "aten::transpose", "aten::t", "aten::detach", "aten::alias"}


def _same(step: Step) -> list[Value]:
    return [step.flow.labels(step.given[0])]


def _elementwise(step: Step) -> list[Value]:
    shape = step.op.shapes[0]
    ledger = step.flow.ledger
    operands = []
    for value in step.given:
        labels = step.flow.labels(value)
        missing = len(shape) - len(labels.shape)
        array = labels.array.reshape((1,) * missing + labels.array.shape)
        operands.append(Labels(array, (1,) * missing + labels.shape))
    # In place: an operand that was written to may be larger than the others, never smaller.
    result = operands[0].array
    for other in operands[1:]:
        ledger.together(result, other.array)
        result = np.where(result >= 0, result, other.array)
    made = Labels(result, shape)
    for operand in operands:
        for axis in made.varying:
            if operand.shape[axis] > 1 and operand.array.shape[axis] == 1 and operand.empty:
                ledger.keep_length(made, axis, f"{step.reason()} with a tensor that no layer makes")
        if not operand.empty and (operand.array < 0).any():
            full_here = np.broadcast_to(operand.array < 0, np.broadcast_shapes(operand.array.shape, result.shape))
            ledger.pin(np.broadcast_to(result, full_here.shape)[full_here], step.reason())
    return [made.compact()]


def _reshaped(step: Step) -> list[Value]:
    """Operators that only move elements: applied to the labels themselves."""
    labels = step.flow.labels(step.given[0])
    if step.op.name == "aten::_unsafe_view":
        return [Labels.of(labels.tensor().reshape(step.op.shapes[0]).numpy())]
    refs = iter([labels.tensor()])
    moved = tree_map(lambda a: next(refs) if isinstance(a, Ref) else a, (step.op.args, step.op.kwargs))
    try:
        result = step.op.function(*moved[0], **moved[1])
    except RuntimeError:  # a view of memory that the labels, stored differently, do not have
        result = labels.tensor().reshape(step.op.shapes[0])
    parts = [result] if isinstance(result, Tensor) else list(result)
    return [Labels.of(part.numpy()) for part in parts]


def _permute(step: Step) -> list[Value]:
    labels = step.flow.labels(step.given[0])
    order = _permuted(Leaf("", tuple(range(len(labels.shape)))), step.op).axes
    return [Labels(labels.array.transpose(order), step.op.shapes[0])]


def _dims(step: Step, name: str, rank: int) -> list[int]:
    given = step.op.argument(name)
    if given is None or given == []:
        return list(range(rank))
    return [a % rank for a in ([given] if isinstance(given, int) else given)]


def _cut(step: Step) -> list[Value]:
    """A part of an axis, by position."""
    labels = step.flow.labels(step.given[0])
    axis = (step.op.argument("dim") or 0) % len(labels.shape)
    if step.op.name != "aten::slice" or step.op.shapes[0][axis] != labels.shape[axis]:
        step.flow.ledger.keep_length(labels, axis, step.reason())
    return _reshaped(step)


def _split(step: Step) -> list[Value]:
    labels = step.flow.labels(step.given[0])
    rank = len(labels.shape)
    axis = (step.op.argument("dim") or 0) % rank
    sizes = {shape[axis] for shape in step.op.shapes}
    if labels.array.shape[axis] > 1 and len(sizes) == 1:
        # Parts of equal size stay equal where each loses the same positions.
        parts = labels.full().reshape(*labels.shape[:axis], len(step.op.shapes), sizes.pop(), *labels.shape[axis + 1 :])
        balanced = Labels.of(parts)
        step.flow.ledger.arrays.append(balanced)
        step.flow.ledger.keep_length(balanced, axis, step.reason())
    elif labels.array.shape[axis] > 1:
        step.flow.ledger.keep_length(labels, axis, step.reason())
    return _reshaped(step)


def _glu(step: Step) -> list[Value]:
    """The first half of an axis, gated by the second."""
    labels = step.flow.labels(step.given[0])
    axis = step.op.argument("dim", -1) % len(labels.shape)
    if labels.array.shape[axis] == 1:
        return [Labels(labels.array, step.op.shapes[0])]
    first, second = np.split(labels.array, 2, axis)
    step.flow.ledger.together(first, second)
    return [Labels(np.where(first >= 0, first, second), step.op.shapes[0]).compact()]


def _roll(step: Step) -> list[Value]:
    labels = step.flow.labels(step.given[0])
    for axis in _dims(step, "dims", len(labels.shape)):
        step.flow.ledger.keep_length(labels, axis, step.reason())
    return _reshaped(step)


def _pad(step: Step) -> list[Value]:
    labels = step.flow.labels(step.given[0])
    array, widths = labels.array, step.op.argument("pad")
    for index in range(len(widths) // 2):
        axis = len(labels.shape) - 1 - index
        if labels.array.shape[axis] > 1 and any(widths[2 * index : 2 * index + 2]):
            step.flow.ledger.keep_length(labels, axis, step.reason())
            size = labels.shape[axis]
            source = np.clip(np.arange(-widths[2 * index], size + widths[2 * index + 1]), 0, size - 1)
            array = array.take(source, axis)
    return [Labels(array, step.op.shapes[0]).compact()]


def _index(step: Step) -> list[Value]:
    """Gathering by integer tensors: the values of stored ones are known."""
    labels = step.flow.labels(step.given[0])
    positions: list[Tensor | None] = []
    axes = []
    for axis, ref in enumerate(step.op.argument("indices")):
        value = step.flow.values.get(ref.number) if isinstance(ref, Ref) else None
        if isinstance(ref, Ref) and not isinstance(value, Leaf):
            step.flow.ledger.pin(labels.array, step.reason())
            return [Labels.none(step.op.shapes[0])]
        positions.append(step.flow.tensors[value.name].permute(value.axes) if isinstance(value, Leaf) else None)
        axes += [axis] if isinstance(value, Leaf) else []
    for axis in axes:
        step.flow.ledger.keep_length(labels, axis, step.reason())
    return [Labels.of(torch.ops.aten.index(labels.tensor(), positions).numpy())]


def _cat(step: Step) -> list[Value]:
    parts = [step.flow.labels(value) for value in step.given]
    axis = (step.op.argument("dim") or 0) % len(step.op.shapes[0])
    if step.op.name == "aten::stack":
        parts = [
            Labels(np.expand_dims(part.array, axis), (*part.shape[:axis], 1, *part.shape[axis:])) for part in parts
        ]
    parts = [part for part in parts if len(part.shape) == len(step.op.shapes[0])]  # torch ignores empty ones
    shape = np.broadcast_shapes(*(tuple(s for a, s in enumerate(p.array.shape) if a != axis) for p in parts))
    arrays = [np.broadcast_to(part.array, (*shape[:axis], part.shape[axis], *shape[axis:])) for part in parts]
    return [Labels(np.concatenate(arrays, axis), step.op.shapes[0]).compact()]


def _reduction(step: Step) -> list[Value]:
    labels = step.flow.labels(step.given[0])
    axes = _dims(step, "dim", len(labels.shape))
    array = labels.array
    for axis in axes:
        if array.shape[axis] > 1:
            step.flow.ledger.keep_length(labels, axis, step.reason())
            array = array.max(axis=axis, keepdims=True)
    if not step.op.argument("keepdim", False):
        array = array.reshape([s for a, s in enumerate(array.shape) if a not in axes])
    return [Labels(array, shape) for shape in step.op.shapes]


def _softmax(step: Step) -> list[Value]:
    labels = step.flow.labels(step.given[0])
    step.flow.ledger.keep_length(labels, step.op.argument("dim"), step.reason())
    return [labels]


def _spatial(step: Step) -> list[Value]:
    """Each channel by itself, over all axes after the channels'."""
    labels = step.flow.labels(step.given[0])
    array = labels.array
    for axis in labels.varying:
        if axis > 1:
            step.flow.ledger.keep_length(labels, axis, step.reason())
            array = array.max(axis=axis, keepdims=True)
    return [Labels(array, shape) for shape in step.op.shapes]


def _batch_norm(step: Step) -> list[Value]:
    labels = step.labels("input")
    if labels.array.shape[1] > 1:
        channel = step.flow.ledger.collapse(labels, 1, step.reason())
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = step.labels(name)
            if value.shape:
                step.flow.ledger.together(channel, value.array.reshape(-1))
                if (channel < 0).any():
                    step.flow.ledger.pin(value.array.reshape(-1)[channel < 0], step.reason())
        # Statistics beside the output, where there are any.
        return [labels, *(Labels.along(channel, 0, shape) for shape in step.op.shapes[1:] if shape == channel.shape)]
    return [labels]


def _layer_norm(step: Step) -> list[Value]:
    labels = step.labels("input")
    rank = len(step.op.argument("normalized_shape"))
    for name in ("weight", "bias"):
        value = step.labels(name)
        if value.shape:
            inner = labels.array.reshape(-1, *labels.array.shape[len(labels.shape) - rank :])
            step.flow.ledger.together(inner, value.array[None])
    return [labels]


def _group_norm(step: Step) -> list[Value]:
    labels = step.labels("input")
    channel = step.flow.ledger.collapse(labels, 1, step.reason())
    groups = step.op.argument("group")
    grid = Labels.of(np.ascontiguousarray(channel).reshape(groups, -1))
    step.flow.ledger.arrays.append(grid)
    step.flow.ledger.keep_length(grid, 0, step.reason())
    for name in ("weight", "bias"):
        value = step.labels(name)
        if value.shape:
            step.flow.ledger.together(channel, value.array.reshape(-1))
    return [labels]


def _convolution(step: Step) -> list[Value]:
    flow, ledger = step.flow, step.flow.ledger
    weight, x = step.argument("weight"), step.labels("input")
    transposed, groups = step.op.argument("transposed", False), step.op.argument("groups")
    channels = ledger.collapse(x, 1, step.reason())
    if not isinstance(weight, Leaf) or weight.axes != tuple(range(len(weight.axes))) or (transposed and groups > 1):
        what = "a weight that is computed" if not isinstance(weight, Leaf) else "a transposed, grouped convolution"
        ledger.pin(channels, f"{step.reason()} with {what}")
        for value in step.given:
            ledger.pin(flow.labels(value).array, f"{step.reason()} with {what}")
        return [Labels.none(step.op.shapes[0])]
    rows_axis, columns_axis = (1, 0) if transposed else (0, 1)
    rows, columns = flow.axis(weight.name, rows_axis), flow.axis(weight.name, columns_axis)
    flow.producers.add((weight.name, rows_axis))
    if groups == 1:
        _read(flow, channels, columns, step.reason())
    else:
        _grouped(step, weight.name, channels.reshape(groups, -1), rows.reshape(groups, -1), columns)
    bias = step.labels("bias")
    if bias.shape:
        ledger.together(rows, bias.array.reshape(-1))
    return [Labels.along(rows, 1, step.op.shapes[0])]


def _grouped(step: Step, name: str, inputs: Ints, rows: Ints, columns: Ints) -> None:
    """A grouped convolution loses whole groups, or the same channels of every group, whichever is the finer choice."""
    ledger = step.flow.ledger
    groups, width = inputs.shape
    if groups >= width:
        step.flow.groups[name] = rows[:, 0]
        for group in range(groups):
            ledger.merge(np.concatenate([inputs[group], rows[group]]))
            if (inputs[group] < 0).any():
                ledger.pin(rows[group], step.reason())
        ledger.pin(columns, "every group reads them")
        return
    _read(step.flow, inputs.max(axis=0), columns, step.reason())
    for index in range(width):
        ledger.merge(inputs[:, index])
        if (inputs[:, index] < 0).any():
            ledger.pin(inputs[:, index], step.reason())
    for index in range(rows.shape[1]):
        ledger.merge(rows[:, index])


def _read(flow: Flow, channels: Ints, columns: Ints, reason: str) -> None:
    """A weight's columns go with the channels that they read, and stay with those that no layer makes."""
    flow.ledger.together(channels, columns)
    flow.ledger.pin(columns[channels < 0], f"{reason} beside what no layer makes")


def _matrix(step: Step) -> list[Value]:
    """A product of activations with a stored weight (a linear layer), or of two activations."""
    flow, ledger = step.flow, step.flow.ledger
    left, right = step.given[-2], step.given[-1]
    if not isinstance(right, Leaf) or flow.tensors[right.name].ndim != 2:
        return _product(step, flow.labels(left), flow.labels(right))
    x = flow.labels(left)
    columns, rows = (flow.axis(right.name, axis) for axis in right.axes)
    bias = flow.labels(step.given[0]) if len(step.given) == 3 else None
    if x.array.shape[1] == 1 and x.varying:
        # The channels are another axis than the one that is summed over.
        ledger.pin(np.concatenate([columns, rows]), f"{step.reason()} along another axis than the channels")
        return [Labels(x.array, step.op.shapes[0])]
    flow.producers.add((right.name, right.axes[1]))
    _read(flow, ledger.collapse(x, 1, step.reason()), columns, step.reason())
    if bias is not None:
        ledger.together(rows, bias.array.reshape(-1))
    return [Labels.along(rows, 1, step.op.shapes[0])]


def _product(step: Step, *operands: Labels) -> list[Value]:
    """Batched products and attention: each matrix (a head) is removed as a whole."""
    shape = step.op.shapes[0]
    batch = len(shape) - 2
    sizes = shape[:batch]
    merged = np.full(sizes, -1, np.int64)
    known: dict[bytes, int] = {}
    arrays = [np.broadcast_to(o.array, sizes + o.array.shape[batch:]) for o in operands]
    for position in np.ndindex(*sizes):
        parts = np.concatenate([array[position].ravel() for array in arrays])
        key = parts.tobytes()
        if key not in known:
            known[key] = step.flow.ledger.merge(parts)
        merged[position] = known[key]
    return [Labels(merged.reshape(*sizes, 1, 1), shape).compact()]


def _batched(step: Step) -> list[Value]:
    return _product(step, *(step.flow.labels(value) for value in step.given[-2:]))


def _attention(step: Step) -> list[Value]:
    made = _product(step, *(step.labels(name) for name in ("query", "key", "value")))
    mask, labels = step.labels("attn_mask"), step.flow.labels(made[0])
    if mask.shape and not mask.empty:
        step.flow.ledger.together(labels.array, mask.array.reshape((1,) * (4 - mask.array.ndim) + mask.array.shape))
    if len(step.op.shapes) > 1 and len(step.op.shapes[1]) == 3:
        made.append(Labels(labels.array[..., 0], step.op.shapes[1]))  # each head's normaliser
    return made


def _embedding(step: Step) -> list[Value]:
    weight = step.argument("weight")
    if not isinstance(weight, Leaf):
        step.flow.ledger.pin(step.labels("weight").array, step.reason())
        return [Labels.none(step.op.shapes[0])]
    step.flow.producers.add((weight.name, 1))
    return [Labels.along(step.flow.axis(weight.name, 1), len(step.op.shapes[0]) - 1, step.op.shapes[0])]


def _strided(step: Step) -> list[Value]:
    """Another layout in memory (pooling does this by itself), or a view of it, which cannot be followed."""
    labels = step.flow.labels(step.given[0])
    if step.op.shapes[0] == labels.shape:
        return [labels]
    step.flow.ledger.pin(labels.array, step.reason())
    return [Labels.none(step.op.shapes[0])]


def _written(step: Step) -> list[Value]:
    """Another tensor's values into this one, in place."""
    own, others = step.flow.labels(step.given[0]), step.given[1:]
    for value in others:
        step.flow.ledger.pin(step.flow.labels(value).array, step.reason())
    step.flow.ledger.pin(own.array, step.reason())
    return [own]


_RULES: dict[str, Callable[[Step], list[Value]]] = {
    **dict.fromkeys(
        ("aten::clone", "aten::_to_copy", "aten::detach", "aten::alias", "aten::lift_fresh", "aten::contiguous",
         "aten::hardswish", "aten::native_dropout", "aten::_log_softmax_backward_data"), _same
    ),
    **dict.fromkeys(
        ("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::expand", "aten::unsqueeze", "aten::squeeze",
         "aten::repeat", "aten::unfold", "aten::pixel_shuffle", "aten::pixel_unshuffle", "aten::_reshape_alias"),
        _reshaped,
    ),
    **dict.fromkeys(("aten::permute", "aten::transpose", "aten::t"), _permute),
    **dict.fromkeys(("aten::slice", "aten::select", "aten::unbind"), _cut),
    **dict.fromkeys(("aten::split", "aten::split_with_sizes"), _split),
    **dict.fromkeys(("aten::roll", "aten::flip"), _roll),
    "aten::constant_pad_nd": _pad,
    "aten::index": _index,
    **dict.fromkeys(("aten::cat", "aten::stack"), _cat),
    **dict.fromkeys(
        ("aten::mean", "aten::sum", "aten::amax", "aten::amin", "aten::max", "aten::min", "aten::prod", "aten::var",
         "aten::var_mean", "aten::std", "aten::logsumexp", "aten::linalg_vector_norm", "aten::norm"),
        _reduction,
    ),
    **dict.fromkeys(("aten::_softmax", "aten::_log_softmax", "aten::_safe_softmax"), _softmax),
    **dict.fromkeys(
        ("aten::max_pool2d_with_indices", "aten::avg_pool2d", "aten::_adaptive_avg_pool2d",
         "aten::adaptive_max_pool2d", "aten::max_pool3d_with_indices", "aten::avg_pool3d",
         "aten::_adaptive_avg_pool3d", "aten::adaptive_max_pool3d", "aten::upsample_nearest2d",
         "aten::upsample_bilinear2d", "aten::upsample_bicubic2d", "aten::upsample_nearest1d",
         "aten::upsample_linear1d", "aten::reflection_pad2d", "aten::replication_pad2d", "aten::reflection_pad1d",
         "aten::replication_pad1d"),
        _spatial,
    ),
    "aten::native_batch_norm": _batch_norm,
    "aten::_native_batch_norm_legit": _batch_norm,
    "aten::_native_batch_norm_legit_no_training": _batch_norm,
    "aten::cudnn_batch_norm": _batch_norm,
    "aten::native_layer_norm": _layer_norm,
    "aten::native_group_norm": _group_norm,
    "aten::convolution": _convolution,
    **dict.fromkeys(("aten::mm", "aten::addmm"), _matrix),
    **dict.fromkeys(("aten::bmm", "aten::baddbmm"), _batched),
    **dict.fromkeys(
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention",
         "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention"),
        _attention,
    ),
    "aten::as_strided": _strided,
    "aten::glu": _glu,
    "aten::_prelu_kernel": _elementwise,
    "aten::embedding": _embedding,
    **dict.fromkeys(("aten::copy", "aten::index_put", "aten::masked_scatter", "aten::scatter"), _written),
}  # fmt: skip


def _pin_mixed_uses(flow: Flow) -> None:
    """A matrix that is a layer's weight and is also used element by element has two sets of labels; it stays."""
    for name in {key[0] for key in flow.axes} & set(flow.elements):
        if flow.tensors[name].ndim > 1:
            reason = f"{name} is a layer's weight and used element by element as well"
            flow.ledger.pin(flow.elements[name].array, reason)
            for axis in range(flow.tensors[name].ndim):
                if (name, axis) in flow.axes:
                    flow.ledger.pin(flow.axes[name, axis], reason)
