"""A user's loaders as splits: checked, re-batched, and repeatable."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.contracts import Batch
from harness.errors import InputError
from harness.tasks import batches, splits
from harness.usercode import blamed

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES_VARIABLE = "ASSAY_LOADER_EXAMPLES"
"""Environment variable: examples after which a loader without a length is taken for endless."""
SECONDS_VARIABLE = "ASSAY_LOADER_SECONDS"
"""Environment variable: the same in seconds of one pass."""
_EXAMPLES, _SECONDS = 10_000_000, 900.0
_KEPT_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class LoaderSplit:
    """A user's loader (see :class:`harness.contracts.Split`).

    Order and augmentation are the loader's own. While it is read, the random states of torch, NumPy and Python are set
    from the seed, and restored between its batches; a generator of the loader's own is seeded as well.

    Parameters
    ----------
    where : str
        "Task 'mine:make'", for messages.
    part : str
        "train", "validation" or "test".
    loader : iterable
        Of batches; see :mod:`harness.tasks.batches`.
    names, required : sequence of str
        The parameters of ``forward``, and those that have no default.
    varying : bool
        Whether examples may have different shapes.
    """

    where: str
    part: str
    loader: Iterable[Any]
    names: Sequence[str] = ()
    required: Sequence[str] = ()
    varying: bool = False

    @functools.cached_property
    def size(self) -> int:
        """Number of examples, counted in one pass."""
        return sum(len(batch) for batch in self.stream(0))

    @functools.cached_property
    def identity(self) -> str:
        """Sha256 (hex) of all inputs and targets as the loader gives them under one fixed seed."""
        return splits.identity(self.stream(0))

    def batches(self, size: int, *, seed: int | None = None, augment: bool = False) -> Iterator[Batch]:  # noqa: ARG002
        """One pass, ``size`` examples at a time."""
        return splits.rebatch(self.stream(seed or 0), size)

    def first(self) -> Batch:
        """The loader's first batch that has examples."""
        with contextlib.closing(self.stream(0)) as stream:
            return next(stream)

    def stream(self, seed: int) -> Generator[Batch, None, None]:
        """The loader's own batches, checked; those without examples are left out.

        Raises
        ------
        InputError
            If the loader raises, has no examples, does not end, or a batch is not as it has to be.
        """
        states = _States(seed)
        _seed_generators(self.loader, seed)
        called = f"{self.where}: the loader {self.part!r}"
        ending = None if hasattr(self.loader, "__len__") and _length(self.loader) is not None else _End(called)
        iterator: Iterator[Any] | None = None
        index = count = 0
        shapes: dict[str, tuple[int, ...]] | None = None
        while True:
            with states.own(), blamed(f"{called}: reading batch {index}"):
                iterator = iter(self.loader) if iterator is None else iterator
                given = next(iterator, _DONE)
            if given is _DONE:
                break
            where = f"{self.where}: batch {index} of the loader {self.part!r}"
            batch = batches.unpack(given, self.names, self.required, where)
            index += 1
            if not len(batch):
                continue
            found = splits.shapes(batch)
            if shapes is not None and found != shapes and (not self.varying or _ranks(found) != _ranks(shapes)):
                raise InputError(
                    f"{where} has examples of shape {_said(found)}, the batches before it {_said(shapes)}: examples "
                    "must have one shape. Pad them or cut them."
                )
            shapes = shapes or found
            _check_numbers(batch, where)
            count += len(batch)
            if ending is not None:
                ending.check(count)
            yield batch
        if not count:
            raise InputError(f"{called} has no examples. Give at least one batch, or leave the loader out.")


_DONE = object()


class _End:
    """Refuses a loader without a length that does not end."""

    def __init__(self, called: str) -> None:
        self.called = called
        self.examples = int(os.environ.get(EXAMPLES_VARIABLE, _EXAMPLES))
        self.seconds = float(os.environ.get(SECONDS_VARIABLE, _SECONDS))
        self.begin = time.monotonic()

    def check(self, count: int) -> None:
        seconds = time.monotonic() - self.begin
        if count > self.examples or seconds > self.seconds:
            raise InputError(
                f"{self.called} has no length and did not end after {count:,} examples and {seconds:.0f} s: is it "
                "endless (itertools.cycle, a loop in __iter__)? Cut one pass out of it (itertools.islice), or raise "
                f"{EXAMPLES_VARIABLE} (now {self.examples}) or {SECONDS_VARIABLE} (now {self.seconds:.0f})."
            )


class _States:
    """Random states of the loader's own, put in place while it is read."""

    def __init__(self, seed: int) -> None:
        import random

        import numpy as np
        import torch

        self.torch = torch.Generator().manual_seed(seed).get_state()
        self.numpy = np.random.RandomState(seed % 2**32).get_state()
        self.python = random.Random(seed).getstate()  # noqa: S311 - no secret

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        import random

        import numpy as np
        import torch

        outer = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
        torch.random.set_rng_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        try:
            yield
        finally:
            self.torch, self.numpy, self.python = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
            torch.random.set_rng_state(outer[0])
            np.random.set_state(outer[1])
            random.setstate(outer[2])


def _seed_generators(loader: Any, seed: int) -> None:
    """Seed a DataLoader's own generators: otherwise each pass over a shuffled test set has another order."""
    import torch

    sampler = getattr(loader, "sampler", None)
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    for holder in (loader, sampler, inner):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)


def _length(loader: Any) -> int | None:
    """The loader's length, or None where it has none: a DataLoader of an IterableDataset raises."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _ranks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return {name: len(shape) for name, shape in shapes.items()}


def _said(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _check_numbers(batch: Batch, where: str) -> None:
    for role, values in (("input", batch.inputs), ("target", batch.targets)):
        for name, value in values.items():
            if value.is_floating_point() and _has_nan(value):
                raise InputError(
                    f"{where}: {role} {name!r} holds NaN. Leave such examples out or fill them in: allowed are numbers."
                )


def _has_nan(value: Tensor) -> bool:
    return bool(value.isnan().any())


def kept(loader: Any, where: str) -> Any:
    """A loader that can be read again.

    An iterator is empty after its first pass, so its batches are kept; a pair of whole arrays or a mapping of them is
    one batch; a data set is read in batches of 128.

    Raises
    ------
    InputError
        If it cannot be iterated over, or is an iterator that does not end.
    """
    from torch.utils.data import DataLoader, Dataset, IterableDataset

    if isinstance(loader, Mapping) or (isinstance(loader, tuple) and _is_arrays(loader)):
        return [loader]
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        return DataLoader(loader, batch_size=128)
    if not hasattr(loader, "__iter__") or isinstance(loader, str | bytes):
        raise InputError(
            f"{where} cannot be iterated over ({type(loader).__name__}). Give a DataLoader, a list of batches, a pair "
            "of arrays or a data set."
        )
    with blamed(f"{where}: iterating over it"):
        if iter(loader) is not loader:
            return loader
        return _drained(loader, where)


def _is_arrays(parts: Sequence[Any]) -> bool:
    """Whether these are whole arrays of equally many examples, and not batches."""
    return len(parts) > 1 and all(hasattr(part, "shape") and len(part.shape) for part in parts)


def _drained(iterator: Iterator[Any], where: str) -> list[Any]:
    found, size, count = [], 0, 0
    ending = _End(where)
    for batch in iterator:
        size += _bytes(batch)
        count += _examples(batch)
        found.append(batch)
        ending.check(count)
        if size > _KEPT_BYTES:
            raise InputError(
                f"{where} is an iterator: its batches are kept, and {size / 1e9:.0f} GB of them did not end it. Give a "
                "DataLoader or a list, which can be read again, or cut one pass out of it (itertools.islice)."
            )
    return found


def _examples(batch: Any) -> int:
    """How many examples a batch probably has."""
    part = next(iter(batch.values()), None) if isinstance(batch, Mapping) else batch
    while isinstance(part, list | tuple) and part:
        part = part[0]
    shape: Any = getattr(part, "shape", ())
    return int(shape[0]) if len(shape) else 1


def _bytes(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value)) + 8 * len(value)
    return int(getattr(value, "nbytes", 8))
