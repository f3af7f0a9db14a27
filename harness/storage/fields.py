"""The bytes under the format: bounds-checked reading, variable-length integers, packed bits and short number lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.errors import DataError

Array = npt.NDArray[Any]

_CHUNK = 1 << 17
"""Symbols that are packed at once, a multiple of 8: temporary memory stays small whatever the stream's length."""


def damaged(what: str) -> DataError:
    """The error of every finding: what is wrong, and what to do."""
    return DataError(f"The container is damaged or was not written by this format: {what}. Use an intact copy.")


class Writer:
    """Bytes that grow."""

    def __init__(self) -> None:
        self.data = bytearray()

    def raw(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        self.data += data

    def varint(self, value: int) -> None:
        """Append an integer >= 0, seven bits a byte, lowest first (LEB128)."""
        while value >= 0x80:
            self.data.append(value & 0x7F | 0x80)
            value >>= 7
        self.data.append(value)


class Reader:
    """Bytes that are read once, front to back, never past their end."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.position = 0

    def raw(self, size: int) -> memoryview:
        """The next ``size`` bytes.

        Raises
        ------
        DataError
            If fewer are left.
        """
        end = self.position + size
        if end > len(self._data):
            raise damaged(f"{size} bytes are announced where {len(self._data) - self.position} are left")
        part = self._data[self.position : end]
        self.position = end
        return part

    def byte(self) -> int:
        """The next byte."""
        return self.raw(1)[0]

    def varint(self, most: int = 2**62) -> int:
        """The next integer, refused above ``most``.

        Raises
        ------
        DataError
            If it is larger, is longer than nine bytes, or ends early.
        """
        value = 0
        for shift in range(0, 63, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value > most:
                    raise damaged(f"a count of {value} where at most {most} are possible")
                return value
        raise damaged("an integer longer than nine bytes")

    def rest(self) -> memoryview:
        """What was not read yet, without reading it."""
        return self._data[self.position :]

    def finish(self) -> None:
        """Refuse bytes that nothing accounts for."""
        if self.position != len(self._data):
            raise damaged(f"{len(self._data) - self.position} bytes are left over")


def width(alphabet: int) -> int:
    """Bits of a packed symbol below ``alphabet``."""
    return max(alphabet - 1, 0).bit_length()


def varint_size(value: int) -> int:
    """Bytes of a variable-length integer."""
    return max(1, -(-value.bit_length() // 7))


def pack(symbols: Array, bits: int) -> bytes:
    """Fixed-width packing, most significant bit first.

    Parameters
    ----------
    symbols : ndarray of unsigned integers, shape (n,)
        Each below ``2 ** bits``.
    bits : int
        0 to 32.

    Returns
    -------
    bytes
        ``ceil(n * bits / 8)`` bytes; the last byte is filled up with zero bits.
    """
    if bits == 0:
        return b""
    kind = ">u1" if bits <= 8 else ">u2" if bits <= 16 else ">u4"
    if bits in (8, 16, 32):
        return symbols.astype(kind).tobytes()
    parts = []
    for begin in range(0, len(symbols), _CHUNK):
        chunk = symbols[begin : begin + _CHUNK].astype(kind)
        full = np.unpackbits(chunk.view(np.uint8)).reshape(len(chunk), -1)
        parts.append(np.packbits(full[:, full.shape[1] - bits :]).tobytes())
    return b"".join(parts)


def packed_size(count: int, bits: int) -> int:
    """Bytes of :func:`pack`."""
    return -(-count * bits // 8)


def unpack(data: memoryview, count: int, bits: int) -> Array:
    """Undo :func:`pack`; ``data`` has exactly the bytes of ``count`` symbols."""
    kind = ">u1" if bits <= 8 else ">u2" if bits <= 16 else ">u4"
    native = np.dtype(kind).newbyteorder("=")
    if bits in (8, 16, 32):
        return np.frombuffer(data, kind).astype(native)
    symbols = np.zeros(count, native)
    if bits == 0:
        return symbols
    source = np.frombuffer(data, np.uint8)
    size = np.dtype(kind).itemsize * 8
    for begin in range(0, count, _CHUNK):
        here = min(_CHUNK, count - begin)
        flat = np.unpackbits(source[begin * bits // 8 :][: packed_size(here, bits)], count=here * bits)
        full = np.zeros((here, size), np.uint8)
        full[:, size - bits :] = flat.reshape(here, bits)
        symbols[begin : begin + here] = np.packbits(full).view(kind)
    return symbols


# A list of small integers, most of them alike, of which many may be zero: code lengths and frequencies.
#
#   byte   presence (bits 6-7) | difference (bit 5) | order (bits 0-4)
#   bits   presence 0: every symbol is present; 1: a bit for each symbol; 2: their number and the gaps between them
#   bits   for each present symbol an Exp-Golomb code of that order: of its value - 1, or (difference) of the zigzag
#          difference from the value before it
#   up to the next byte boundary


_MAX_ORDER = 14
_ORDERS = np.arange(_MAX_ORDER + 1)[:, None]


def _golomb_bits(values: Array) -> Array:
    """Bits of all values in the Exp-Golomb code of each order: shape (orders,)."""
    exponents = np.frexp(((values >> _ORDERS) + 1).astype(np.float64))[1] - 1
    bits: Array = 2 * exponents.sum(1, dtype=np.int64) + len(values) * (1 + _ORDERS[:, 0])
    return bits


def _golomb(value: int, order: int) -> str:
    high = (value >> order) + 1
    low = f"{value & ((1 << order) - 1):0{order}b}" if order else ""
    return "0" * (high.bit_length() - 1) + f"{high:b}" + low


def _forms(values: Array) -> tuple[int, int, int, int]:
    """The cheapest (bits, presence, difference, order)."""
    present = np.flatnonzero(values)
    kept = values[present]
    if len(present) == len(values):
        presence, bits = 0, 0
    else:
        gaps = np.diff(present, prepend=-1) - 1
        as_list = int(_golomb_bits(np.array([len(present)]))[3] + _golomb_bits(gaps)[1])
        presence, bits = (1, len(values)) if len(values) <= as_list else (2, as_list)
    steps = np.diff(kept, prepend=1)
    zigzag = np.where(steps < 0, -2 * steps - 1, 2 * steps)
    cost, difference, order = min(
        (int(every.min()), which, int(every.argmin()))
        for which, every in enumerate((_golomb_bits(kept - 1), _golomb_bits(zigzag)))
    )
    return bits + cost, presence, difference, order


def numbers_size(values: Array) -> int:
    """Bytes of :func:`write_numbers`."""
    return 1 + -(-_forms(values)[0] // 8)


def write_numbers(values: Array) -> bytes:
    """A list of integers >= 0 (int64, shape (n,)) whose length the reader knows."""
    _, presence, difference, order = _forms(values)
    present = np.flatnonzero(values)
    text: list[str] = []
    if presence == 1:
        text.append("".join("1" if value else "0" for value in values))
    elif presence == 2:
        text.append(_golomb(len(present), 3))
        text += [_golomb(int(gap), 1) for gap in np.diff(present, prepend=-1) - 1]
    before = 1
    for value in values[present].tolist():
        step = value - before
        text.append(_golomb((-2 * step - 1 if step < 0 else 2 * step) if difference else value - 1, order))
        before = value
    bits = "".join(text)
    size = -(-len(bits) // 8)
    body = int(bits.ljust(size * 8, "0") or "0", 2).to_bytes(size, "big")
    return bytes([presence << 6 | difference << 5 | order]) + body


def read_numbers(reader: Reader, count: int, most: int) -> Array:
    """Undo :func:`write_numbers`.

    Parameters
    ----------
    reader : Reader
        Stands at the list.
    count : int
        How many integers.
    most : int
        The largest that is allowed.

    Raises
    ------
    DataError
        If the list ends early or holds a larger value.
    """
    head = reader.byte()
    presence, difference, order = head >> 6, head >> 5 & 1, head & 31
    if presence > 2 or order > _MAX_ORDER:
        raise damaged("a number list of unknown form")
    # No code is longer than 2 * 32 + 14 bits, so this much is enough, whatever follows the list.
    source = bytes(reader.rest()[: count * 12 + 16])
    text = f"{int.from_bytes(source, 'big'):0{len(source) * 8}b}" if source else ""
    at = 0

    def fixed(size: int) -> int:
        nonlocal at
        if at + size > len(text):
            raise damaged("a number list ends early")
        at += size
        return int(text[at - size : at], 2) if size else 0

    def golomb(order: int) -> int:
        nonlocal at
        zeros = text.find("1", at) - at
        if not 0 <= zeros <= 32:
            raise damaged("a number list holds no number where one is due")
        at += zeros
        return (fixed(zeros + 1) - 1 << order) | fixed(order)

    present: Sequence[int] = range(count)
    if presence == 1:
        present = [index for index in range(count) if fixed(1)]
    elif presence == 2:
        kept = golomb(3)
        if kept > count:
            raise damaged(f"a number list of {kept} where {count} are possible")
        last, found = -1, []
        for _ in range(kept):
            last += golomb(1) + 1
            found.append(last)
        if last >= count:
            raise damaged("a number list that names a symbol outside its alphabet")
        present = found
    values = np.zeros(count, np.int64)
    before = 1
    for index in present:
        code = golomb(order)
        before = before + (-(code + 1 >> 1) if code & 1 else code >> 1) if difference else code + 1
        if not 1 <= before <= most:
            raise damaged(f"the number {before} where 1 to {most} are possible")
        values[index] = before
    reader.raw(-(-at // 8))
    return values
