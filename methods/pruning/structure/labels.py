"""Channel labels: for every element of every tensor of a run, which channel it belongs to.

A label is an integer. Each index of each axis of a weight has one, and so has each element of a parameter that is used
element by element. An operator hands labels on (a permutation permutes them, a reshape reshapes them), makes new ones
(the rows of a convolution's weight label its output), and says which must be removed together (the two addends of a
sum) or cannot be removed (the outputs of the model). -1 stands for no channel: such an index stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of one tensor, stored once along every axis on which they do not vary.

    Parameters
    ----------
    array : ndarray of int64
        Broadcasts to ``shape``; as many axes, of size 1 where the labels do not vary.
    shape : tuple of int
        Of the tensor.
    """

    array: Ints
    shape: tuple[int, ...]

    @classmethod
    def none(cls, shape: Iterable[int]) -> Labels:
        """No channels."""
        shape = tuple(shape)
        return cls(np.full((1,) * len(shape), -1, np.int64), shape)

    @classmethod
    def along(cls, labels: Ints, axis: int, shape: Iterable[int]) -> Labels:
        """Labels that vary along one axis."""
        shape = tuple(shape)
        return cls(labels.reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape).compact()

    @classmethod
    def of(cls, full: Ints) -> Labels:
        """From one label an element."""
        return cls(full, full.shape).compact()

    @property
    def empty(self) -> bool:
        """Whether there is no label."""
        return bool((self.array < 0).all())

    @property
    def varying(self) -> list[int]:
        """Axes along which labels differ."""
        return [axis for axis, size in enumerate(self.array.shape) if size > 1]

    def compact(self) -> Labels:
        """The same, shorter where possible."""
        array = self.array
        for axis, size in enumerate(array.shape):
            if size > 1:
                first = array.take([0], axis)
                if (array == first).all():
                    array = first
        return Labels(array, self.shape)

    def full(self) -> Ints:
        """One label an element."""
        return np.broadcast_to(self.array, self.shape)

    def tensor(self) -> torch.Tensor:
        """One label an element, as a tensor without memory for repeated ones."""
        return torch.from_numpy(np.ascontiguousarray(self.array)).expand(self.shape)

    def canonical(self, names: Ints) -> Labels:
        """With every label replaced by ``names[label]``."""
        if self.empty:
            return Labels.none(self.shape)
        return Labels(np.where(self.array < 0, -1, names[self.array]), self.shape).compact()

    def kept(self, removed: Bools) -> tuple[int, ...]:
        """The tensor's shape after the labels ``removed`` (by label) are gone: whole slices disappear."""
        if self.empty:
            return self.shape
        gone = removed[self.array] & (self.array >= 0)
        sizes = []
        for axis, size in enumerate(self.shape):
            if gone.shape[axis] > 1:
                others = tuple(a for a in range(gone.ndim) if a != axis)
                sizes.append(int((~gone.all(axis=others)).sum()))
            else:
                sizes.append(size)
        return tuple(sizes)


@dataclass(frozen=True, eq=False)
class Fixed:
    """An axis that must keep its length: labels that would shorten it cannot be removed."""

    labels: Labels
    axis: int
    reason: str


class Ledger:
    """Labels that have been given out, and what is known about them."""

    def __init__(self) -> None:
        self.count = 0
        self._pairs: list[tuple[Ints, Ints]] = []
        self._pins: list[tuple[Ints, str]] = []
        self.fixed: list[Fixed] = []
        self.arrays: list[Labels] = []

    def new(self, count: int) -> Ints:
        """Fresh labels."""
        self.count += count
        return np.arange(self.count - count, self.count)

    def together(self, a: Ints, b: Ints) -> None:
        """Labels at equal places (broadcast) are removed together; nothing where one is missing."""
        a, b = np.broadcast_arrays(a, b)
        there = (a >= 0) & (b >= 0) & (a != b)
        if there.any():
            pairs = np.unique(np.stack([a[there], b[there]]), axis=1)
            self._pairs.append((pairs[0], pairs[1]))

    def merge(self, labels: Ints) -> int:
        """All of these labels are removed together; returns one of them, or -1 if there is none."""
        found = np.unique(labels[labels >= 0])
        if not len(found):
            return -1
        self.together(found[:1], found)
        return int(found[0])

    def pin(self, labels: Ints, reason: str) -> None:
        """These labels cannot be removed."""
        found = np.unique(labels[labels >= 0])
        if len(found):
            self._pins.append((found, reason))

    def keep_length(self, labels: Labels, axis: int, reason: str) -> None:
        """Labels that would shorten this axis cannot be removed."""
        if not labels.empty:
            self.fixed.append(Fixed(labels, axis % len(labels.shape), reason))

    def collapse(self, labels: Labels, axis: int, reason: str) -> Ints:
        """One label for every index of an axis, merged over all the others; shape (size,)."""
        size = labels.shape[axis]
        if labels.varying in ([], [axis]):
            return np.broadcast_to(labels.array.reshape(-1), (size,))
        for other in labels.varying:
            if other != axis:
                self.keep_length(labels, other, reason)
        rows = np.moveaxis(labels.array, axis, 0).reshape(labels.array.shape[axis], -1)
        best = rows.max(axis=1)
        self.together(best[:, None], rows)
        mixed = (rows < 0).any(axis=1) & (best >= 0)
        self.pin(best[mixed], f"{reason}, together with what belongs to no layer")
        return np.broadcast_to(best, (size,))

    def components(self) -> Ints:
        """The smallest label of every label's component, after closing under rectangularity; shape (count,).

        A tensor stays a tensor only if whole slices are removed from it. Where a component is no union of slices (the
        channels of one group in a channel shuffle), the labels of each slice along the tensor's longest varying axis
        are merged.
        """
        while True:
            names = self._components()
            before = len(self._pairs)
            for labels in self.arrays:
                self._close(labels.canonical(names))
            if len(self._pairs) == before:
                return names

    def _components(self) -> Ints:
        if not self.count:
            return np.zeros(0, np.int64)
        a = np.concatenate([pair[0] for pair in self._pairs] or [np.zeros(0, np.int64)])
        b = np.concatenate([pair[1] for pair in self._pairs] or [np.zeros(0, np.int64)])
        graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(self.count, self.count))
        _, component = connected_components(graph, directed=False)
        first = np.full(component.max() + 1, self.count, np.int64)
        np.minimum.at(first, component, np.arange(self.count))
        names: Ints = first[component]
        return names

    def _close(self, labels: Labels) -> None:
        varying = labels.varying
        if len(varying) < 2:
            return
        array = labels.array
        whole: set[int] = set()
        for axis in varying:
            rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
            same = (rows == rows[:, :1]).all(axis=1)
            inside, counts = np.unique(rows[same, 0], return_counts=True)
            total = dict(zip(*np.unique(array, return_counts=True), strict=True))
            slices = zip(inside, counts, strict=True)
            whole |= {int(label) for label, count in slices if count * rows.shape[1] == total[label]}
        broken = [int(label) for label in np.unique(array) if label >= 0 and int(label) not in whole]
        if not broken:
            return
        axis = max(varying, key=lambda a: array.shape[a])
        rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
        hit = np.isin(rows, broken).any(axis=1)
        for row in rows[hit]:
            self.merge(row)
            if (row < 0).any():
                self.pin(row, "part of a tensor whose other part belongs to no layer")

    def pinned(self, names: Ints) -> dict[int, str]:
        """Components that cannot be removed, and why."""
        found: dict[int, str] = {}
        for labels, reason in self._pins:
            for label in np.unique(names[labels]):
                found.setdefault(int(label), reason)
        for item in self.fixed:
            array = item.labels.canonical(names).array
            if array.shape[item.axis] == 1:
                continue
            rows = np.moveaxis(array, item.axis, 0).reshape(array.shape[item.axis], -1)
            for label in np.unique(rows[(rows == rows[:, :1]).all(axis=1), 0]):
                if label >= 0:
                    found.setdefault(int(label), item.reason)
        return found
