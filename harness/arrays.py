"""Named arrays on disk: what the preparing process leaves for the measuring one, which has no torch.

A folder holds blocks of consecutive examples whose arrays have equal shapes, since an axis such as the number of
tokens may differ between examples. Arrays are raw bytes in numbered files; ``index.json`` says which is which, so that
no name from a model becomes a file's name.
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.errors import DataError, InputError

if TYPE_CHECKING:
    from harness.contracts import Arrays

INDEX = "index.json"
MAX_BLOCKS = 64
"""Different shapes that one set of examples may have: the artifact is loaded once for each."""


@dataclass(frozen=True)
class Block:
    """Consecutive examples of equal shapes, mapped from disk."""

    inputs: Mapping[str, Any]
    targets: Mapping[str, Any]

    def __len__(self) -> int:
        """Number of examples."""
        return len(next(iter((self.inputs or self.targets).values())))

    def parts(self, size: int) -> Iterator[tuple[Arrays, Arrays]]:
        """(inputs, targets), ``size`` examples at a time; the last may be short."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield (
                {name: np.ascontiguousarray(value[part]) for name, value in self.inputs.items()},
                {name: np.ascontiguousarray(value[part]) for name, value in self.targets.items()},
            )


def write(folder: Path, examples: Iterable[tuple[Arrays, Arrays]], free_bytes: int | None = None) -> int:
    """Write batches of (inputs, targets) into a folder and return the number of examples.

    Parameters
    ----------
    folder : Path
        Exists, and is empty.
    examples : iterable
        Batches in order.
    free_bytes : int or None
        Room on the disk: more is refused before the disk is full.

    Raises
    ------
    OSError
        With ENOSPC, where the examples do not fit.
    InputError
        If the examples have more than :data:`MAX_BLOCKS` shapes.
    """
    blocks: list[dict[str, Any]] = []
    shapes: list[Any] | None = None
    streams: dict[tuple[str, str], Any] = {}
    count = written = files = 0
    with contextlib.ExitStack() as stack:
        for inputs, targets in examples:
            named = [("inputs", name, value) for name, value in inputs.items()]
            named += [("targets", name, value) for name, value in targets.items()]
            found = [(kind, name, value.dtype.str, value.shape[1:]) for kind, name, value in named]
            if found != shapes:
                if len(blocks) == MAX_BLOCKS:
                    raise InputError(
                        f"The examples come in more than {MAX_BLOCKS} shapes one after the other, and the artifact is "
                        "loaded for each. Pad them to few lengths, or sort them by length."
                    )
                shapes = found
                blocks.append({"n": 0, "inputs": {}, "targets": {}})
                for kind, name, dtype, shape in found:
                    blocks[-1][kind][name] = {"file": files, "dtype": dtype, "shape": list(shape)}
                    streams[kind, name] = stack.enter_context((folder / f"{files}.bin").open("wb"))
                    files += 1
            for kind, name, value in named:
                written += value.nbytes
                if free_bytes is not None and written > 0.98 * free_bytes:
                    raise OSError(errno.ENOSPC, f"the examples need more than {written / 1e9:.1f} GB")
                streams[kind, name].write(np.ascontiguousarray(value).data)
            n = len(next(iter(inputs.values())))
            blocks[-1]["n"] += n
            count += n
    (folder / INDEX).write_text(json.dumps({"n": count, "blocks": blocks}), encoding="utf-8")
    return count


def read(folder: Path) -> list[Block]:
    """The blocks of a folder, mapped from disk.

    Raises
    ------
    DataError
        If the folder is not one that :func:`write` made.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [
            Block(*(_mapped(folder, block[kind], block["n"]) for kind in ("inputs", "targets")))
            for block in index["blocks"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: not a folder of examples: {error}. Delete it and run again.") from error


def _mapped(folder: Path, described: Mapping[str, Any], n: int) -> dict[str, Any]:
    return {
        name: np.memmap(folder / f"{item['file']:d}.bin", np.dtype(item["dtype"]), "r", shape=(n, *item["shape"]))
        for name, item in described.items()
    }


def repeated(arrays: Arrays, size: int) -> dict[str, Any]:
    """The first ``size`` examples, repeating the ones that there are."""
    n = len(next(iter(arrays.values())))
    return {name: np.ascontiguousarray(value[np.arange(size) % n]) for name, value in arrays.items()}
