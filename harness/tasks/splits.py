"""Splits: examples in memory, and what all splits share.

See :class:`harness.contracts.Split`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.contracts import Batch, Split

if TYPE_CHECKING:
    from torch import Tensor


def identity(batches: Iterable[Batch]) -> str:
    """Sha256 (hex) over names, dtypes, shapes and bytes of all inputs and targets; batch sizes do not matter."""
    arrays: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    for batch in batches:
        for role, values in (("input", batch.inputs), ("target", batch.targets)):
            for name, value in values.items():
                key = f"{role} {name}"
                kinds[key] = f"{value.dtype} {tuple(value.shape[1:])}"
                arrays.setdefault(key, hashlib.sha256()).update(value.detach().cpu().contiguous().numpy())
    lines = [f"{key} {kinds[key]} {arrays[key].hexdigest()}" for key in sorted(arrays)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def order(size: int, seed: int | None) -> tuple[Tensor, Any]:
    """The order of one pass, and the generator that its augmentation goes on drawing from."""
    import torch

    generator = torch.Generator().manual_seed(seed or 0)
    return torch.arange(size) if seed is None else torch.randperm(size, generator=generator), generator


@dataclass(frozen=True, kw_only=True)
class ArraySplit:
    """Examples that are tensors in memory, without augmentation.

    Parameters
    ----------
    inputs, targets : mapping of str to Tensor
        Axis 0 is the example.
    """

    inputs: Mapping[str, Tensor]
    targets: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(next(iter(self.inputs.values())))

    @functools.cached_property
    def identity(self) -> str:
        """Sha256 (hex) of all inputs and targets."""
        return identity(self.batches(1024))

    def batches(self, size: int, *, seed: int | None = None, augment: bool = False) -> Iterator[Batch]:  # noqa: ARG002
        """One pass; a seed shuffles."""
        whole = Batch(inputs=self.inputs, targets=self.targets)
        places, _ = order(self.size, seed)
        for start in range(0, self.size, size):
            yield whole.map(functools.partial(_take, places=places[start : start + size]))


def _take(value: Tensor, places: Tensor) -> Tensor:
    return value[places]


@dataclass(frozen=True, kw_only=True)
class ChangedSplit:
    """Another split's examples, each batch changed.

    Parameters
    ----------
    split : Split
        The other one.
    change : callable
        From batch to batch; the number of examples stays.
    """

    split: Split
    change: Callable[[Batch], Batch]

    @property
    def size(self) -> int:
        """Number of examples."""
        return self.split.size

    @functools.cached_property
    def identity(self) -> str:
        """Sha256 (hex) of all inputs and targets, changed."""
        return identity(self.batches(256))

    def batches(self, size: int, *, seed: int | None = None, augment: bool = False) -> Iterator[Batch]:
        """One pass; see :class:`harness.contracts.Split`."""
        return map(self.change, self.split.batches(size, seed=seed, augment=augment))


def shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    """Shape of one example of every input and target."""
    named = {**batch.inputs, **{f"target {name}": value for name, value in batch.targets.items()}}
    return {name: tuple(value.shape[1:]) for name, value in named.items()}


def rebatch(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The same examples in the same order, ``size`` at a time.

    The last batch may be short, and so may be the last one before examples of another shape.
    """
    held: list[Batch] = []
    count = 0
    for batch in batches:
        if held and shapes(batch) != shapes(held[0]):
            yield joined(held)
            held, count = [], 0
        held.append(batch)
        count += len(batch)
        if count < size:
            continue
        whole = joined(held)
        full = count - count % size
        for start in range(0, full, size):
            yield cut(whole, start, start + size)
        held, count = ([cut(whole, full, count)], count - full) if count > full else ([], 0)
    if count:
        yield joined(held)


def joined(batches: list[Batch]) -> Batch:
    """The batches as one."""
    import torch

    if len(batches) == 1:
        return batches[0]
    first = batches[0]
    return Batch(
        inputs={name: torch.cat([batch.inputs[name] for batch in batches]) for name in first.inputs},
        targets={name: torch.cat([batch.targets[name] for batch in batches]) for name in first.targets},
    )


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """The examples from ``start`` up to ``stop``."""
    return batch.map(lambda value: value[start:stop])
