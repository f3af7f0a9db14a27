"""A stream: symbols of a known alphabet and number, coded the shortest way.

::

    byte     how: 0 packed, 1 constant, 2 Huffman, 3 rANS
    packed   ceil(log2(alphabet)) bits a symbol
    constant varint: the symbol
    Huffman  number list: code lengths; varints: sub-streams, bytes; the sub-streams
    rANS     number list: frequencies (their sum is a power of two); varints: lanes, bytes; the states and words
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from harness.storage import fields, huffman, rans
from harness.storage.fields import Array, Reader, Writer, damaged

Entropy = Literal["auto", "huffman", "rans", "none"]

MAX_ALPHABET = 4096
"""Larger alphabets are packed: their tables would outweigh what coding saves."""

SYMBOLS_PER_BYTE = 32
"""rANS streams hold at most so many symbols a byte: decoding time is bounded by the file's length."""

_CHUNK = 1 << 17
_PACKED, _CONSTANT, _HUFFMAN, _RANS = range(4)


@dataclass
class Trace:
    """What reading found: parts of the representation, and the Shannon bound of its streams in bits."""

    parts: list[str] = field(default_factory=list)
    bits: float = 0.0

    def raw(self, size: int) -> None:
        """Count bytes that are stored as they are."""
        self.bits += 8 * size


@dataclass(frozen=True)
class Plan:
    """A way to store something: its size in bytes and what writes it."""

    size: int
    write: Callable[[Writer], None]


def counted(symbols: Array, alphabet: int = 0) -> Array:
    """How often each symbol occurs: int64, shape (max(alphabet, largest symbol + 1),)."""
    # A chunk at a time, because bincount makes a copy of eight bytes a symbol.
    total = np.bincount(symbols[:_CHUNK], minlength=alphabet)
    for begin in range(_CHUNK, len(symbols), _CHUNK):
        part = np.bincount(symbols[begin : begin + _CHUNK], minlength=len(total))
        part[: len(total)] += total
        total = part
    return total


def entropy_bits(counts: Array) -> float:
    """Empirical entropy of n symbols times n, from how often each occurs."""
    kept = counts[counts > 0].astype(np.float64)
    total = float(kept.sum())
    return max(0.0, total * math.log2(total) - float((kept * np.log2(kept)).sum())) if total else 0.0


def estimate(counts: Array, entropy: Entropy) -> float:
    """A stream's bytes to within a few percent, without planning it."""
    total = int(counts.sum())
    plain = fields.packed_size(total, fields.width(len(counts)))
    if entropy == "none" or len(counts) > MAX_ALPHABET:
        return 1 + plain
    present = int((counts > 0).sum())
    return 1 + min(plain, 4 + entropy_bits(counts) / 8 + present * 0.6) if present > 1 else 2


def plan(counts: Array, symbols: Callable[[], Array], entropy: Entropy) -> Plan:
    """The shortest way to store a stream.

    Parameters
    ----------
    counts : ndarray of int64, shape (alphabet,)
        How often each symbol occurs.
    symbols : callable
        Gives the symbols, shape (n,), when they are written.
    entropy : {"auto", "huffman", "rans", "none"}
        Which entropy coders may be used; packed and constant streams always may.
    """
    total = int(counts.sum())
    bits = fields.width(len(counts))
    present = np.flatnonzero(counts)

    def packed(out: Writer) -> None:
        out.raw(bytes([_PACKED]))
        out.raw(fields.pack(symbols(), bits))

    def constant(out: Writer) -> None:
        out.raw(bytes([_CONSTANT]))
        out.varint(int(present[0]))

    best = Plan(1 + fields.packed_size(total, bits), packed)
    if len(present) == 1:
        return min(best, Plan(1 + fields.varint_size(int(present[0])), constant), key=lambda option: option.size)
    if entropy == "none" or len(present) < 2 or len(counts) > MAX_ALPHABET:
        return best
    # Neither coder can come below this, so a stream that is nearly uniform needs no tables to be tried.
    if entropy_bits(counts) / 8 + 4 >= best.size:
        return best
    if entropy in ("auto", "huffman"):
        best = min(best, _huffman(counts, symbols), key=lambda option: option.size)
    if entropy in ("auto", "rans"):
        best = min(best, _rans(counts, symbols), key=lambda option: option.size)
    return best


def _huffman(counts: Array, symbols: Callable[[], Array]) -> Plan:
    total = int(counts.sum())
    length = huffman.lengths(counts)
    body = -(-int((counts * length).sum()) // 8)
    lanes = rans.lanes_for(body, total)
    lanes = -(-total // -(-total // lanes))  # runs of equal length: as many as begin before the end
    size = 1 + fields.numbers_size(length) + fields.varint_size(lanes) + fields.varint_size(body) + body
    size += huffman.LANE_COST * (lanes - 1)

    def write(out: Writer) -> None:
        coded = huffman.encode(symbols(), length, lanes)
        out.raw(bytes([_HUFFMAN]))
        out.raw(fields.write_numbers(length))
        out.varint(lanes)
        out.varint(len(coded))
        out.raw(coded)

    return Plan(size, write)


def _rans(counts: Array, symbols: Callable[[], Array]) -> Plan:
    total = int(counts.sum())
    present = counts > 0
    kept = counts[present]
    # Finer frequencies lengthen the table and shorten the stream, so the best scale lies between; walk to it from a
    # guess that grows with what a stream of this length can gain.
    least = max(fields.width(len(kept)), 6)

    def cost(bits: int) -> tuple[float, float, Array]:
        frequencies = rans.quantised(counts, bits)
        coded = float((kept * (bits - np.log2(frequencies[present]))).sum()) / 8
        return coded + fields.numbers_size(frequencies), coded, frequencies

    bits = min(max(least, (total.bit_length() + fields.width(len(kept))) // 2 + 1), rans.MAX_BITS)
    best = cost(bits)
    for step in (1, -1):
        moved = False
        while least <= bits + step <= rans.MAX_BITS and (other := cost(bits + step))[0] < best[0]:
            bits, best, moved = bits + step, other, True
        if moved:
            break
    body, frequencies = math.ceil(best[1]), best[2]
    lanes = rans.lanes_for(body, total)
    size = 1 + fields.numbers_size(frequencies) + fields.varint_size(lanes) + fields.varint_size(body)
    size += body + rans.LANE_COST * lanes
    if total > body * SYMBOLS_PER_BYTE:
        size = 2**62  # would be refused by the reader

    def write(out: Writer) -> None:
        coded = rans.encode(symbols(), frequencies, rans.starts(frequencies), bits, lanes)
        out.raw(bytes([_RANS]))
        out.raw(fields.write_numbers(frequencies))
        out.varint(lanes)
        out.varint(len(coded))
        out.raw(coded)

    return Plan(size, write)


def coded_part(reader: Reader, count: int) -> tuple[int, memoryview]:
    """Number of lanes and bytes of an entropy-coded stream, with the checks that bound the time to decode it."""
    lanes = reader.varint(count)
    size = reader.varint()
    body = reader.raw(size)
    if lanes < 1 or lanes * 2 * rans.BYTES_PER_LANE + 64 < size or lanes > size:
        raise damaged(f"{lanes} lanes for {size} bytes")
    if count > size * SYMBOLS_PER_BYTE:
        raise damaged(f"{count} symbols in {size} bytes")
    return lanes, body


def read(reader: Reader, count: int, alphabet: int, trace: Trace | None = None) -> Array:
    """The symbols of a stream: unsigned integers below ``alphabet``, shape (count,).

    Raises
    ------
    DataError
        If the stream is damaged.
    """
    how = reader.byte()
    if how == _PACKED:
        bits = fields.width(alphabet)
        symbols = fields.unpack(reader.raw(fields.packed_size(count, bits)), count, bits)
        if trace:
            trace.raw(fields.packed_size(count, bits))
        if alphabet != 1 << bits and count and int(symbols.max()) >= alphabet:
            raise damaged("a symbol outside its alphabet")
        return symbols
    if how == _CONSTANT:
        symbol = reader.varint(max(alphabet - 1, 0))
        return np.full(count, symbol, np.min_scalar_type(symbol))
    if how not in (_HUFFMAN, _RANS) or alphabet > MAX_ALPHABET:
        raise damaged("a stream of unknown kind")
    if how == _HUFFMAN:
        length = fields.read_numbers(reader, alphabet, huffman.MAX_LENGTH)
        lanes, body = coded_part(reader, count)
        symbols = huffman.decode(body, count, length, lanes)
    else:
        frequencies = fields.read_numbers(reader, alphabet, 1 << rans.MAX_BITS)
        scale = int(frequencies.sum())
        if scale & scale - 1 or not 2 <= scale <= 1 << rans.MAX_BITS:
            raise damaged(f"frequencies that add up to {scale}")
        lanes, body = coded_part(reader, count)
        symbols = rans.decode(body, count, frequencies[None], scale.bit_length() - 1, lanes)
    if trace:
        trace.bits += entropy_bits(counted(symbols, alphabet))
    return symbols
