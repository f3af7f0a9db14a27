"""A model in one file, without pickle: loading one runs no code that the file brings along.

Two walls stand before a file. It is only parsed if this machine and user wrote it: it carries a keyed hash of all its
bytes (:mod:`harness.modelfile.key`). And what is parsed is data: modules by class name and attributes, graphs by their
nodes (:mod:`harness.modelfile.graphs`). Names come from the layers of ``torch.nn``, ``torchvision``, ``timm``,
``transformers``, ``harness`` and ``methods``, and from packages that the caller (``allow``) or the environment
variable ``ASSAY_TRUSTED_MODULES`` (comma-separated top-level packages) names for the user's own model; that variable is
inherited from the process that knows the model. Classes of such a package run their own code in the model's forward
pass, which is what trusting it means.

Why not ``torch.load(weights_only=True)``: it calls every allowed class with arguments from the file, and its bytes
depend on which equal strings are one object in memory, so equal models would not have equal files.

Layout: 8 bytes magic, 32 bytes HMAC-SHA256 of the magic and of all that follows, 8 bytes little-endian length, a JSON
header, then the tensors' memory, each at a multiple of 64. Equal models give equal bytes on one machine.
"""

from __future__ import annotations

import io
import json
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from harness.errors import DataError
from harness.modelfile.key import MARK_BYTES, is_marked, key_file, make_key, mark, read_key
from harness.modelfile.names import TRUST_VARIABLE, Trust, trusted_by_environment
from harness.modelfile.reader import Reader
from harness.modelfile.tensors import ALIGNMENT
from harness.modelfile.writer import Writer

__all__ = ["MAGIC", "TRUST_VARIABLE", "is_ours", "load", "save", "trusted_by_environment"]

MAGIC = b"ASSAYNN2"
_LENGTH = struct.Struct("<Q")
_START = len(MAGIC) + MARK_BYTES
_HEADER = _START + _LENGTH.size
_PIECE = 1 << 18


def save(model: nn.Module, path: Path) -> Path:
    """Write ``model`` to ``path``.

    Parameters
    ----------
    model : nn.Module
        Parameters, buffers, modules and configurations may be shared; sharing is kept.
    path : Path
        The file.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    DataError
        If an attribute cannot be described as data (a hook, a lambda, a class defined inside a function); the message
        names it. :func:`harness.bake.bake` turns some of them into constants first.
    StoreError
        If this machine's key cannot be made.
    """
    key = make_key()
    writer = Writer()
    try:
        writer.model(model)
        header = json.dumps(writer.header, separators=(",", ":"), sort_keys=True, allow_nan=False).encode("ascii")
    except RecursionError as error:
        raise DataError("The model cannot be saved: its attributes are nested too deeply.") from error
    header += b" " * (-(_HEADER + len(header)) % ALIGNMENT)
    body: list[bytes | memoryview] = [_LENGTH.pack(len(header)) + header, *writer.chunks]
    with path.open("wb") as stream:
        stream.write(MAGIC + mark(key, [MAGIC, *body]))
        stream.writelines(body)
    return path


def load(path: Path, *, allow: Sequence[str] = ()) -> nn.Module:
    """Read a model written by :func:`save` on this machine.

    Parameters
    ----------
    path : Path
        The file.
    allow : sequence of str
        Further top-level packages whose classes and functions may be used.

    Raises
    ------
    DataError
        If the file is missing, was changed, was written elsewhere, or names something that is not allowed.
    """
    content = _content(path)
    try:
        (length,) = _LENGTH.unpack(content[_START:_HEADER])
        header = json.loads(bytes(content[_HEADER : _HEADER + length]))
        data = content[_HEADER + length :]
        if len(data) != header["bytes"]:
            raise DataError("it is not as long as it says")
        return Reader(header, data, Trust((*allow, *trusted_by_environment()))).model()
    except DataError as error:
        raise DataError(f"Model file {path}: {error}") from error
    except Exception as error:  # a description that makes no sense can fail in any way that Python knows
        raise DataError(
            f"Model file {path} makes no model ({type(error).__name__}: {error}); delete it, and it is made again."
        ) from error


def is_ours(path: Path) -> bool:
    """Whether a model file was written by this machine and user and not changed since; nothing of it is parsed."""
    try:
        _content(path)
    except DataError:
        return False
    return True


def _content(path: Path) -> memoryview:
    """The bytes of a model file whose mark is right, in memory of their own."""
    try:
        # Without waiting: a FIFO or a device is no model file.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"Model file {path} is not a regular file.")
            begin = stream.read(_START)
            if begin[: len(MAGIC)] != MAGIC:
                raise DataError(
                    f"{path} is not a model file of this version (it does not begin with {MAGIC.decode()}); if it was "
                    "made by an older one, delete its folder, and it is made again."
                )
            if status.st_size < _HEADER:
                raise DataError(f"Model file {path} is truncated; delete it, and it is made again.")
            # torch's memory is aligned for vector instructions; the tensors lie in it.
            content = torch.empty(status.st_size, dtype=torch.uint8).numpy().data.cast("B")
            content[:_START] = begin
            key = read_key()
            if key is None or not is_marked(
                key, begin[len(MAGIC) :], chain([MAGIC], _pieces(stream, content[_START:]))
            ):
                raise DataError(
                    f"Model file {path} was not written by this machine and user, or was changed since: its mark is "
                    f"not that of the key {key_file()}. Models from elsewhere are never loaded; delete its folder, and "
                    "it is made again."
                )
    except OSError as error:
        raise DataError(f"Model file {path}: {error.strerror}.") from error
    return content


def _pieces(stream: io.RawIOBase, content: memoryview) -> Iterator[memoryview]:
    """Fill ``content`` from a file, and yield it piece by piece, each while it still is in the processor's cache."""
    filled = 0
    while filled < len(content) and (count := stream.readinto(content[filled : filled + _PIECE])):
        yield content[filled : filled + count]
        filled += count
