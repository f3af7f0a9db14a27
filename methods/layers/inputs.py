"""Inputs to run a model on: training examples for calibration, and made-up ones to see what it does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.errors import Unsupported
from harness.tasks.splits import cut, joined, shapes

if TYPE_CHECKING:
    from harness.contracts import Batch, Signature, Split, Tensors

_READ = 500
_VARYING = 16
"""Size of an axis that may vary, in made-up inputs."""


def require_any_batch(signature: Signature) -> None:
    """Check that a model can be run on many examples at once.

    Raises
    ------
    Unsupported
        If it takes one batch size only.
    """
    if signature.batch is not None:
        raise Unsupported(
            f"the model takes batches of {signature.batch} only, and this method runs it on many examples at once"
        )


def examples(split: Split, count: int, *, seed: int) -> Batch:
    """Training examples drawn by the seed, not augmented, as one batch.

    Where examples differ in shape (sentences by length), those of the first one's shape are taken.

    Parameters
    ----------
    split : Split
        The training data.
    count : int
        How many; all of them where there are fewer.
    seed : int
        Of the draw.
    """
    drawn: list[Batch] = []
    left = count
    for batch in split.batches(min(_READ, count), seed=seed):
        if drawn and shapes(batch) != shapes(drawn[0]):
            continue
        drawn.append(cut(batch, 0, left))
        left -= len(batch)
        if left <= 0:
            break
    return joined(drawn)


def balanced(split: Split, per_class: int, *, seed: int) -> Batch:
    """As :func:`examples`, class by class, with ``per_class`` of every class (all of a class that has fewer).

    Targets that are no classes (several of them, of more axes, or no integers) cannot be balanced: ten times
    ``per_class`` examples are drawn.
    """
    chosen: dict[int, list[Batch]] = {}
    for batch in split.batches(_READ, seed=seed):
        labels = next(iter(batch.targets.values())) if len(batch.targets) == 1 else None
        if labels is None or labels.ndim != 1 or labels.is_floating_point():
            return examples(split, 10 * per_class, seed=seed)
        for label in sorted(set(labels.tolist())):
            held = chosen.setdefault(label, [])
            places = (labels == label).nonzero().flatten()[: per_class - sum(len(part) for part in held)]
            if len(places):
                held.append(batch.map(lambda value, places=places: value[places]))  # type: ignore[misc]
    return joined([part for label in sorted(chosen) for part in chosen[label]])


def portions(split: Split, count: int, size: int, signature: Signature, *, seed: int) -> Iterator[Batch]:
    """Training examples drawn by the seed, not augmented, some at a time.

    A last batch of one example is left out where there are others: batch normalisation without running statistics
    cannot take it.

    Parameters
    ----------
    split : Split
        The training data.
    count : int
        Examples in all.
    size : int
        In a batch; ``signature.batch`` goes first.
    signature : Signature
        What the model takes.
    seed : int
        Of the draw.
    """
    size = signature.batch or size
    left = count
    for batch in split.batches(size, seed=seed):
        part = cut(batch, 0, left)
        if len(part) == 1 < size and left < count:
            return
        yield part
        left -= len(part)
        if left <= 0:
            return


def made_up(model: nn.Module, signature: Signature, count: int, *, split: Split | None = None) -> Tensors:
    """Inputs of the signature's shapes, to run a model on whose answers do not matter; always the same.

    Floats are standard normal, of the model's own type; integers are those of the first training examples where there
    are any (a mask belongs to its sentence), and otherwise lie in the port's range.

    Parameters
    ----------
    model : nn.Module
        Gives type and device.
    signature : Signature
        What it takes.
    count : int
        Examples; ``signature.batch`` goes first.
    split : Split, optional
        Training data.
    """
    tensors = (*model.parameters(), *model.buffers())
    like = next((value for value in tensors if value.is_floating_point()), torch.zeros(0))
    count = signature.batch or count
    generator = torch.Generator().manual_seed(0)
    real = next(iter(split.batches(count))).inputs if split is not None and _discrete(signature) else {}
    found: dict[str, Tensor] = {}
    for port in signature.inputs:
        shape = [size if isinstance(size, int) else _VARYING for size in port.shape]
        if port.name in real:
            shape = list(real[port.name].shape[1:])
        if port.dtype.startswith("float"):
            found[port.name] = torch.randn(count, *shape, generator=generator).to(like.device, like.dtype)
        elif port.name in real and len(real[port.name]) == count:
            found[port.name] = real[port.name].to(like.device)
        else:
            dtype: torch.dtype = getattr(torch, port.dtype)
            # Where the range is not known: an index into anything, and a mask that hides nothing.
            if "mask" in port.name:
                value = torch.ones((count, *shape))
            else:
                value = torch.randint(0, port.values or 1, (count, *shape), generator=generator)
            found[port.name] = value.to(like.device, dtype)
    return found


def _discrete(signature: Signature) -> bool:
    return any(not port.dtype.startswith("float") for port in signature.inputs)
