"""Which channels, neurons and attention heads of a model can be removed, and what goes with each of them.

The model is run once and every operator recorded (:mod:`methods.pruning.structure.trace`); channel labels follow the
tensors through it (:mod:`methods.pruning.structure.rules`). What is left is a set of :class:`Unit`: a channel with
every slice of every parameter that belongs to it, across residual sums, concatenations, depthwise convolutions,
normalisations and so on; or an attention head with its queries, keys, values and outputs. Nothing here knows an
architecture.

Labels cannot see sizes that are hard-coded in a forward pass. :func:`find` therefore removes as much as could be
removed, runs the result, and compares every operator's shapes with the expected ones. Where they differ, an integer
attribute of a running module that holds the old size (``num_heads``, ``hidden_dim``) is set to the new one; where there
is none, the units in question stay, and the reason names the module.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from harness.errors import Unsupported
from methods.layers.attention import explicit
from methods.layers.inputs import made_up
from methods.pruning.structure import trace
from methods.pruning.structure.labels import Bools, Ints, Labels
from methods.pruning.structure.rules import Flow, follow
from methods.pruning.structure.surgery import mismatch, shrunk
from methods.pruning.structure.units import Layer, Resize, Slice, Structure, Unit

if TYPE_CHECKING:
    from harness.contracts import Signature, Split, Tensors


def find(model: nn.Module, signature: Signature, split: Split | None = None) -> Structure:
    """Find what can be removed from a model.

    Parameters
    ----------
    model : nn.Module
        Run on made-up inputs in evaluation mode; not changed.
    signature : Signature
        What it takes and gives.
    split : Split, optional
        Training data, for inputs that cannot be made up (:func:`methods.layers.inputs.made_up`).

    Raises
    ------
    Unsupported
        If the model cannot be run, its course depends on the data, or no layer can lose anything; the reason names the
        layers.
    """
    subject = copy.deepcopy(model)
    exchanged = frozenset(explicit(subject))
    inputs = made_up(subject, signature, trace.BATCH, split=split)
    run = trace.record(subject, inputs, signature)
    tensors = {**dict(subject.named_parameters()), **dict(subject.named_buffers())}
    flow = follow(run, tensors)
    while True:
        structure = _assemble(flow, exchanged, inputs, signature)
        if not structure.layers:
            raise Unsupported(f"no layer can lose channels: {_summary(structure.left_alone)}")
        tried = _probe(subject, structure)
        if isinstance(tried, Structure):
            return tried
        # What the forward pass does not allow is pinned, and the rest is tried again.
        labels, reason = tried
        flow.ledger.pin(labels, reason)


def _assemble(flow: Flow, exchanged: frozenset[str], inputs: Tensors, signature: Signature) -> Structure:
    names = flow.ledger.components()
    pinned = flow.ledger.pinned(names)
    axes = _axes(flow, names)
    owned: dict[int, list[Slice]] = {}
    makers: dict[int, list[tuple[str, int]]] = {}
    for (tensor, axis), indexed in axes.items():
        order = np.argsort(indexed, kind="stable")
        found, starts = np.unique(indexed[order], return_index=True)
        makes = (tensor, axis) in flow.producers
        places, bounds = order.tolist(), [*starts.tolist(), len(order)]
        for label, (begin, end) in zip(found.tolist(), itertools.pairwise(bounds), strict=True):
            if label >= 0:
                part = Slice(tensor=tensor, axis=axis, indices=tuple(places[begin:end]), makes=makes)
                owned.setdefault(label, []).append(part)
                if makes:
                    makers.setdefault(label, []).append((tensor, axis))
    together: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for label, made in makers.items():
        together.setdefault(tuple(made), []).append(label)
    layers, left_alone = [], {}
    for rows, labels in together.items():
        free = [label for label in labels if label not in pinned]
        units = tuple(
            Unit(
                label=label,
                slices=tuple(owned[label]),
                width=min(len(part.indices) for part in owned[label]),
            )
            for label in free
        )
        layer_names = tuple(dict.fromkeys(_layer(tensor) for tensor, _ in rows))
        if len(labels) >= 2 and units:
            fixed = sum(min(len(part.indices) for part in owned[label]) for label in labels if label in pinned)
            layers.append(Layer(name=layer_names[0], makers=layer_names, units=units, fixed=fixed))
        else:
            reason = pinned.get(labels[0], "all its channels belong together")
            left_alone.update(dict.fromkeys(layer_names, reason))
    busy = {name for layer in layers for name in layer.makers}
    return Structure(
        layers=tuple(layers),
        left_alone={name: reason for name, reason in left_alone.items() if name not in busy},
        flow=flow,
        names=names,
        outputs=tuple(tuple(labels.canonical(names) for labels in made) for made in flow.outputs),
        axes=axes,
        resizes=(),
        exchanged=exchanged,
        inputs=inputs,
        signature=signature,
    )


def _axes(flow: Flow, names: Ints) -> dict[tuple[str, int], Ints]:
    """The component of every index of every axis of every stored tensor; -1 for none."""
    found = {key: np.where(labels < 0, -1, names[labels]) for key, labels in flow.axes.items()}
    for name, labels in flow.elements.items():
        canonical = labels.canonical(names)
        for axis in canonical.varying:
            rows = np.moveaxis(canonical.array, axis, 0).reshape(canonical.array.shape[axis], -1)
            same = (rows == rows[:, :1]).all(axis=1)
            found[name, axis] = np.where(same, rows[:, 0], -1)
    order = {name: index for index, name in enumerate(flow.tensors)}
    return dict(sorted(found.items(), key=lambda item: (order[item[0][0]], item[0][1])))


def _layer(tensor: str) -> str:
    name, _, last = tensor.rpartition(".")
    return name if last in ("weight", "bias", "in_proj_weight") and name else tensor


def _summary(reasons: dict[str, str]) -> str:
    if not reasons:
        return "there is no convolution and no linear layer"
    parts = [f"{name}: {reason}" for name, reason in list(reasons.items())[:4]]
    return "; ".join(parts + ([f"and {len(reasons) - 4} more layers"] if len(reasons) > 4 else []))


def _probe(model: nn.Module, structure: Structure) -> Structure | tuple[Ints, str]:
    """Remove as much as possible and run: the structure with the attributes to set, or what stays, and why."""
    # Two stay: an axis of size 1 has no order in memory, and torch may choose other operators for it.
    most = [unit for layer in structure.layers for unit in layer.units[min(2, len(layer.units) - 1) :]]
    gone = structure.removed(most)
    while True:
        smaller = shrunk(model, structure, gone)
        failed = mismatch(smaller, model, structure, gone)
        if failed is None:
            return structure
        index = failed.index
        repaired = _repaired(model, structure, gone, index)
        if repaired is None:
            break
        structure = repaired
    reason = f"the forward pass of {failed.path or 'the model'} holds a size that does not follow ({failed.error})"
    # A reshape before the operator that failed is what holds the size, if there is one; otherwise that operator, or the
    # last one before it whose shape changes: its size was read.
    between = range(failed.after + 1, index)
    suspects = [*(i for i in between if structure.changes(i, gone)), index, *reversed(range(index))]
    at_fault = next((found for i in suspects if len(found := _touched(structure, i, gone))), None)
    if at_fault is None:
        raise Unsupported(f"{reason}, and no layer can be named that it concerns")
    # All channels of the layers concerned, so that one probe settles them.
    concerned = [layer for layer in structure.layers if {unit.label for unit in layer.units} & set(at_fault.tolist())]
    return np.array([unit.label for layer in concerned for unit in layer.units], np.int64), reason


def _touched(structure: Structure, index: int, gone: Bools) -> Ints:
    """The removed labels that an operator's arguments and outputs carry."""
    labels = [np.unique(output.array) for output in structure.outputs[index]]
    for value in structure.flow.inputs[index]:
        if isinstance(value, Labels):
            labels.append(np.unique(value.canonical(structure.names).array))
        else:
            empty = np.zeros(0, np.int64)
            labels += [structure.axes.get((value.name, axis), empty) for axis in value.axes]
    found: Ints = np.unique(np.concatenate([np.zeros(0, np.int64), *labels]))
    found = found[found >= 0]
    return found[gone[found]]


def _repaired(model: nn.Module, structure: Structure, gone: Bools, index: int) -> Structure | None:
    """The structure with one more attribute to set, with which the run gets past operator ``index``; or None."""
    run = structure.flow.run
    taken = {(resize.path, resize.attribute) for resize in structure.resizes}
    # The size may be used by an operator that left no trace, or only show in a later one.
    for later in range(index, min(index + 3, len(run.ops))):
        op = run.ops[later]
        for number, labels in enumerate(structure.outputs[later]):
            after = labels.kept(gone)
            for axis, (old, new) in enumerate(zip(labels.shape, after, strict=True)):
                if old == new:
                    continue
                for path in _enclosing(op.path):
                    for attribute in _integers(model.get_submodule(path), old):
                        if (path, attribute) in taken:
                            continue
                        resize = Resize(path=path, attribute=attribute, op=later, output=number, axis=axis)
                        trial = replace(structure, resizes=(*structure.resizes, resize))
                        reached = mismatch(shrunk(model, trial, gone), model, trial, gone)
                        if reached is None or reached.index > index:
                            return trial
    return None


def _enclosing(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _integers(module: nn.Module, value: int) -> list[str]:
    return [name for name, held in vars(module).items() if type(held) is int and held == value and name[0] != "_"]
