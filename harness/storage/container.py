"""The container file: a model's tensors, each stored the shortest way, bit for bit.

``docs/container-format.md`` describes the format; this file holds its frame (magic, version, directory, checksum) and
:mod:`harness.storage.arrays` the representations of a tensor.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from harness.errors import DataError, InputError
from harness.storage import arrays
from harness.storage.fields import Array, Reader, Writer, damaged
from harness.storage.streams import Entropy, Trace

MAGIC = b"ASSAYCW"
VERSION = 1
CHECKSUM_BYTES = 16
SUFFIX = ".assayw"

_DTYPES: tuple[torch.dtype, ...] = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool,
    torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
)  # fmt: skip
_UNSIGNED: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
}
_MAX_DIMENSIONS = 64
_MAX_NAME = 1024
"""Bytes of a name: names share beginnings, so a few bytes of a file may name a long one."""
_MAX_TENSORS = 1 << 17
_NAMES_PER_BYTE = 32
"""Bytes of all names that a byte of the directory may stand for."""
_FREE_BYTES = 1 << 26
_BYTES_PER_BYTE = 256


def default_limit(data: bytes | memoryview) -> int:
    """Bytes of tensors that a file of this length may announce where the caller sets no limit of its own.

    A caller that has the model knows better: it needs no more than the model's own tensors take.
    """
    return max(_FREE_BYTES, _BYTES_PER_BYTE * len(data))


_STORED, _SAME, _EQUAL = range(3)
_KINDS = ("stored", "shared", "equal")


class _Item(NamedTuple):
    """A line of the directory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: int
    source: int  # index of the tensor it repeats, where it repeats one
    size: int  # bytes of the payload, where it has one
    listed: int  # bytes of this line

    @property
    def plain_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


GENERAL_LIMIT = 2**24
"""Bytes of tensors up to which :meth:`Container.sizes` runs zstd, xz and gzip: they take about a second a megabyte."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Container:
    """Write and read tensors as one compressed, checked file.

    Each tensor is stored in the representation that is smallest after coding: dense bytes, a codebook of distinct
    values or of distinct blocks with indices, integers times scales, or the positions (bitmap, relative index with
    filler entries, gaps, density classes) and values of the elements that differ from the commonest one. Each
    representation consists of streams of symbols; each stream is packed, Huffman-coded or rANS-coded. What is found
    in a tensor is found in its values; nothing is lost.

    Source: the pipeline of sparse index, codebook and Huffman code is that of Han et al. 2016, arXiv:1510.00149.

    ::

        @inproceedings{han2016deep,
          title     = {Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman
                       Coding},
          author    = {Han, Song and Mao, Huizi and Dally, William J.},
          booktitle = {International Conference on Learning Representations},
          year      = {2016}
        }

    Parameters
    ----------
    entropy : {"auto", "huffman", "rans", "none"}
        Entropy coder of the streams: the shorter of the two, one of them, or none (fixed-width symbols).
    """

    entropy: Entropy = "auto"

    def encode(self, state: Mapping[str, Tensor]) -> bytes:
        """The container's bytes; equal states give equal bytes.

        Parameters
        ----------
        state : mapping
            Tensors by name, on any device. A tensor that occurs under several names is stored once, and so is one
            whose bytes equal another's of the same dtype and shape.

        Raises
        ------
        InputError
            If a name is not a string, or a tensor is sparse, quantized, on the meta device, or of another dtype than
            floating-point, integer or bool.
        """
        directory, payloads = Writer(), Writer()
        seen: dict[tuple[Any, ...], int] = {}
        patterns: list[Array] = []
        alive: list[Tensor] = []  # so that no address is used twice
        by_content: dict[tuple[Any, ...], list[int]] = {}
        before = b""
        for number, (name, tensor) in enumerate(state.items()):
            _check(name, tensor)
            values = _bits(tensor)
            shape = tuple(tensor.shape)
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, shape, tensor.stride())
            content = (tensor.dtype, shape, values[:64].tobytes())
            kind, source = _STORED, 0
            if tensor.numel() and place in seen:
                kind, source = _SAME, seen[place]
            else:
                seen[place] = number
                for earlier in by_content.setdefault(content, []):
                    # A line that points to another costs about as much as a few bytes stored as they are.
                    if values.nbytes > 8 and np.array_equal(patterns[earlier], values):
                        kind, source = _EQUAL, earlier
                        break
                by_content[content].append(number)
            patterns.append(values)
            alive.append(tensor)
            payload = Writer()
            if kind == _STORED:
                floating = tensor.dtype.is_floating_point
                arrays.plan(values, shape, floating, self.entropy).write(payload)
            text = _text(name)
            shared = _common(before, text)
            before = text
            directory.varint(shared)
            directory.varint(len(text) - shared)
            directory.raw(text[shared:])
            directory.raw(bytes([_DTYPES.index(tensor.dtype) << 2 | kind]))
            directory.varint(len(shape))
            for size in shape:
                directory.varint(size)
            directory.varint(source if kind else len(payload.data))
            payloads.raw(payload.data)
        head = Writer()
        head.raw(MAGIC + bytes([VERSION]))
        head.varint(len(patterns))
        head.varint(len(directory.data))
        body = bytes(head.data) + bytes(directory.data) + bytes(payloads.data)
        return body + _checksum(memoryview(body))

    def decode(self, data: bytes | memoryview, *, max_bytes: int | None = None) -> dict[str, Tensor]:
        """The tensors of a container, on the CPU, contiguous.

        Parameters
        ----------
        data : bytes or memoryview
            The whole file.
        max_bytes : int
            Refuse a file whose tensors are announced to take more, before anything is allocated for them: what the
            model's own tensors take, where it is known. Default: :func:`default_limit`.

        Returns
        -------
        dict
            The same names in the same order, dtypes, shapes and bytes. Names that shared a tensor share one.

        Raises
        ------
        DataError
            If the file is truncated, damaged, of another format or version, or larger than ``max_bytes`` when read.
            Memory stays within six times the bytes of the largest tensor, plus those of all of them.
        """
        items, payloads = _open(data, max_bytes)
        made: list[Tensor] = []
        for item in items:
            if item.kind == _STORED:
                made.append(_tensor(_payload(item, payloads, None), item))
            else:
                source = made[item.source]
                made.append(source if item.kind == _SAME else source.clone())
        return {item.name: tensor for item, tensor in zip(items, made, strict=True)}

    def report(self, data: bytes | memoryview, *, max_bytes: int | None = None) -> list[dict[str, Any]]:
        """What each tensor takes.

        Parameters
        ----------
        data, max_bytes
            See :meth:`decode`.

        Returns
        -------
        list of dict
            In order: ``name``, ``shape``, ``dtype``, ``representation``, ``plain_bytes`` (0 for a tensor that was
            listed under another name), ``stored_bytes`` (payload and line of the directory) and ``shannon_bytes``: the
            empirical entropy of the streams that are entropy-coded (of a position in density classes: given its class)
            plus what is stored as it is.

        Raises
        ------
        DataError
            See :meth:`decode`.
        """
        items, payloads = _open(data, max_bytes)
        lines = []
        for item in items:
            trace = Trace()
            if item.kind == _STORED:
                _payload(item, payloads, trace)
            else:
                trace.parts.append(f"{_KINDS[item.kind]} with {items[item.source].name}")
            lines.append(
                {
                    "name": item.name,
                    "shape": list(item.shape),
                    "dtype": str(item.dtype).removeprefix("torch."),
                    "representation": " + ".join(trace.parts),
                    "plain_bytes": item.plain_bytes if item.kind != _SAME else 0,
                    "stored_bytes": item.listed + item.size,
                    "shannon_bytes": trace.bits / 8,
                }
            )
        return lines

    def sizes(self, state: Mapping[str, Tensor], data: bytes | None = None) -> dict[str, int | None]:
        """Bytes of the container, and of what it is to be compared with.

        Parameters
        ----------
        state : mapping
            The tensors.
        data : bytes, optional
            What :meth:`encode` made of them, where it is at hand.

        Returns
        -------
        dict
            ``plain_bytes``: the tensors' bytes, shared ones once; ``container_bytes``: the whole file;
            ``shannon_bytes``: see :meth:`report`, rounded up; ``zstd_bytes`` (level 19), ``xz_bytes`` (preset 9) and
            ``gzip_bytes`` (level 9) of the plain bytes, one after the other, or None above :data:`GENERAL_LIMIT`.

        Raises
        ------
        InputError
            See :meth:`encode`.
        """
        data = self.encode(state) if data is None else data
        report = self.report(data, max_bytes=2**62)
        plain = b"".join(
            _bits(tensor).tobytes() for tensor, line in zip(state.values(), report, strict=True) if line["plain_bytes"]
        )
        general = len(plain) <= GENERAL_LIMIT
        return {
            "plain_bytes": len(plain),
            "container_bytes": len(data),
            "shannon_bytes": math.ceil(sum(line["shannon_bytes"] for line in report)),
            "zstd_bytes": len(zstandard.ZstdCompressor(level=19).compress(plain)) if general else None,
            "xz_bytes": len(lzma.compress(plain, preset=9)) if general else None,
            "gzip_bytes": len(gzip.compress(plain, compresslevel=9, mtime=0)) if general else None,
        }


def save(state: Mapping[str, Tensor], path: Path, *, entropy: Entropy = "auto") -> int:
    """Write a container file; returns its bytes.

    Raises
    ------
    InputError
        See :meth:`Container.encode`.
    """
    data = Container(entropy=entropy).encode(state)
    path.write_bytes(data)
    return len(data)


def load(path: Path, *, max_bytes: int | None = None) -> dict[str, Tensor]:
    """Read a container file.

    Raises
    ------
    DataError
        If the file is missing, or see :meth:`Container.decode`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"The container {path} cannot be read: {error.strerror or error}.") from None
    try:
        return Container().decode(data, max_bytes=max_bytes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _check(name: object, tensor: object) -> None:
    if not isinstance(name, str):
        raise InputError(f"A container holds tensors by name; {name!r} is not a string.")
    if len(_text(name)) > _MAX_NAME:
        raise InputError(f"The name {name[:40]!r}... has more than {_MAX_NAME} bytes. Shorten it.")
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name!r} is of type {type(tensor).__name__}; a container holds tensors only. Leave it out.")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise InputError(
            f"Tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be stored; allowed are dense "
            f"tensors with data, of {allowed}. Convert it first."
        )


def _bits(tensor: Tensor) -> Array:
    """Bit patterns as unsigned integers, shape (n,)."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy() if len(flat) else np.empty(0, np.uint8)
    values: Array = raw.view(_UNSIGNED[tensor.dtype.itemsize])
    return values


def _tensor(values: Array, item: _Item) -> Tensor:
    if item.dtype == torch.bool and len(values) and int(values.max()) > 1:
        raise damaged("a bool that is neither 0 nor 1")
    values = np.ascontiguousarray(values)
    raw = torch.from_numpy(values.view(np.uint8)) if len(values) else torch.empty(0, dtype=torch.uint8)
    return raw.view(item.dtype).reshape(item.shape)


def _payload(item: _Item, payloads: Reader, trace: Trace | None) -> Array:
    reader = Reader(payloads.raw(item.size))
    values = arrays.read(reader, math.prod(item.shape), _UNSIGNED[item.dtype.itemsize], trace)
    reader.finish()
    return values


def _checksum(data: memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=CHECKSUM_BYTES).digest()


def _text(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def _common(a: bytes, b: bytes) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _open(data: bytes | memoryview, max_bytes: int | None) -> tuple[list[_Item], Reader]:
    """The directory, and a reader that stands at the first payload; every size is checked against the file's."""
    whole = memoryview(data).cast("B")
    if bytes(whole[: len(MAGIC)]) != MAGIC:
        raise DataError("Not a container of compressed weights: the file does not begin with its magic bytes.")
    if len(whole) < len(MAGIC) + 1 + CHECKSUM_BYTES:
        raise damaged(f"it ends after {len(whole)} bytes")
    if whole[len(MAGIC)] != VERSION:
        raise DataError(
            f"The container has format version {whole[len(MAGIC)]}; this program reads version {VERSION}. "
            "Read it with the program that wrote it."
        )
    body = whole[:-CHECKSUM_BYTES]
    if _checksum(body) != bytes(whole[-CHECKSUM_BYTES:]):
        raise damaged("the checksum does not fit the content: it is truncated or was changed")
    head = Reader(body)
    head.raw(len(MAGIC) + 1)
    count = head.varint(min(len(whole), _MAX_TENSORS))
    listing = head.raw(head.varint())
    directory = Reader(listing)
    items: list[_Item] = []
    limit = default_limit(whole) if max_bytes is None else max_bytes
    before, left, names = b"", limit, _NAMES_PER_BYTE * len(listing) + (1 << 16)
    for _ in range(count):
        items.append(_item(directory, before, items))
        before = _text(items[-1].name)
        names -= len(before)
        if names < 0:
            raise damaged("names that are much longer together than the directory")
        left -= items[-1].plain_bytes if items[-1].kind != _SAME else 0
        if left < 0:
            raise DataError(
                f"The container announces more than {limit} bytes of tensors, the most that may be read "
                "(max_bytes). If you trust the file, raise that limit."
            )
    directory.finish()
    if len({item.name for item in items}) != count:
        raise damaged("two tensors of one name")
    payloads = Reader(head.rest())
    if sum(item.size for item in items) != len(head.rest()):
        raise damaged("the tensors' lengths do not add up to the file's")
    return items, payloads


def _item(directory: Reader, before: bytes, items: list[_Item]) -> _Item:
    begin = directory.position
    shared = directory.varint(len(before))
    text = before[:shared] + bytes(directory.raw(directory.varint(_MAX_NAME - shared)))
    try:
        name = text.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise damaged("a name that is no text") from None
    code = directory.byte()
    kind = code & 3
    if code >> 2 >= len(_DTYPES) or kind >= len(_KINDS):
        raise damaged("a tensor of unknown type")
    shape = tuple(directory.varint() for _ in range(directory.varint(_MAX_DIMENSIONS)))
    # A tensor without elements may still have dimensions whose strides overflow.
    if math.prod(max(size, 1) for size in shape) > 2**60:
        raise damaged(f"a tensor of shape {shape}")
    number = directory.varint()
    item = _Item(name, _DTYPES[code >> 2], shape, kind, number, 0, directory.position - begin)
    if kind == _STORED:
        return item._replace(source=0, size=number)
    if number >= len(items) or (items[number].dtype, items[number].shape) != (item.dtype, item.shape):
        raise damaged("a tensor that repeats one which is not there")
    return item
