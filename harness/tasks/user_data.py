"""A user's loaders as a task's data: checked, re-batched, and repeatable."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.contracts import TestSet
from harness.errors import AssayError, InputError

if TYPE_CHECKING:
    from torch import Tensor


def stream(target: str, part: str, loader: Iterable[Any], *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A loader's batches as (float32 (n, ...), int64 (n,)), read under a random state of their own.

    Raises
    ------
    InputError
        If a batch is not a pair of inputs and as many integer classes, or the loader raises.
    """
    import torch

    own = torch.Generator().manual_seed(seed).get_state()
    iterator: Iterator[Any] | None = None
    index = 0
    while True:
        outer = torch.random.get_rng_state()
        torch.random.set_rng_state(own)
        try:
            iterator = iter(loader) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            return
        except AssayError:
            raise
        except Exception as error:  # the user's loader may raise anything: it is reported as theirs
            raise InputError(
                f"Task {target!r}: the loader {part!r} raised {type(error).__name__}: {error} (batch {index})"
            ) from error
        finally:
            own = torch.random.get_rng_state()
            torch.random.set_rng_state(outer)
        yield _pair(f"Task {target!r}: batch {index} of the loader {part!r}", batch)
        index += 1


def _pair(where: str, batch: Any) -> tuple[Tensor, Tensor]:
    import torch

    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise InputError(f"{where} is not a pair (inputs, classes); it is {type(batch).__name__}.")
    try:
        x, y = torch.as_tensor(batch[0]), torch.as_tensor(batch[1])
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{where} holds something other than tensors or arrays: {error}") from error
    if y.ndim != 1 or y.is_floating_point() or y.is_complex():
        raise InputError(
            f"{where}: classes must be integers of shape (n,); they are {y.dtype}, shape {tuple(y.shape)}."
        )
    if x.ndim < 2 or len(x) != len(y):
        raise InputError(f"{where}: inputs must have shape (n, ...) with n = {len(y)}; theirs is {tuple(x.shape)}.")
    return x.detach().to("cpu", torch.float32), y.to("cpu", torch.int64)


def rebatch(batches: Iterable[tuple[Tensor, Tensor]], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same examples in the same order, ``batch_size`` at a time; the last batch may be short."""
    import torch

    held: list[tuple[Tensor, Tensor]] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += len(batch[1])
        if count < batch_size:
            continue
        x, y = torch.cat([part[0] for part in held]), torch.cat([part[1] for part in held])
        whole = count - count % batch_size
        for start in range(0, whole, batch_size):
            yield x[start : start + batch_size], y[start : start + batch_size]
        held, count = ([(x[whole:], y[whole:])], count - whole) if count > whole else ([], 0)
    if count:
        yield torch.cat([part[0] for part in held]), torch.cat([part[1] for part in held])


@dataclass(frozen=True, kw_only=True)
class UserData:
    """Training and validation loaders of a user (see :class:`harness.contracts.Data`).

    Parameters
    ----------
    target : str
        ``module:function``, for messages.
    training, validating : iterable
        Loaders; empty where there is none.
    """

    target: str
    training: Iterable[Any]
    validating: Iterable[Any]

    @functools.cached_property
    def train_size(self) -> int:
        """Number of training examples, counted in one pass."""
        return sum(len(y) for _, y in stream(self.target, "train", self.training, seed=0))

    @functools.cached_property
    def validation_size(self) -> int:
        """Number of validation examples, counted in one pass."""
        return sum(len(y) for _, y in stream(self.target, "validation", self.validating, seed=0))

    def train(
        self,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,  # noqa: ARG002 - order and augmentation are the loader's own
        augment: bool = True,  # noqa: ARG002
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the training loader, whose random state is seeded with ``seed``."""
        return rebatch(stream(self.target, "train", self.training, seed=seed), batch_size)

    def validation(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the validation loader, always under the same seed."""
        return rebatch(stream(self.target, "validation", self.validating, seed=0), batch_size)


def held_out(target: str, loader: Iterable[Any]) -> TestSet:
    """The test set of a loader, streamed."""

    def batches(batch_size: int) -> Iterator[tuple[Any, Any]]:
        for x, y in rebatch(stream(target, "test", loader, seed=0), batch_size):
            yield x.numpy(), y.numpy()

    size = sum(len(y) for _, y in stream(target, "test", loader, seed=0))
    if not size:
        raise InputError(f"Task {target!r}: the loader 'test' has no examples.")
    return TestSet(size=size, batches=batches)


def content_hash(target: str, loader: Iterable[Any]) -> str:
    """Sha256 over the shape, the inputs' float32 bytes and the classes of all examples; batch sizes do not matter."""
    inputs, classes, shape = hashlib.sha256(), hashlib.sha256(), ""
    for x, y in stream(target, "test", loader, seed=0):
        shape = str(tuple(x.shape[1:]))
        inputs.update(x.numpy().tobytes())
        classes.update(y.numpy().tobytes())
    return hashlib.sha256(f"{shape} {inputs.hexdigest()} {classes.hexdigest()}".encode()).hexdigest()
