"""How the elements of one tensor are stored: the representations, the choice between them, and reading them back.

An array is seen as unsigned integers, the bit patterns of its elements. What is found in them is found in the values
themselves: nothing is told by the method that made them.

::

    byte         representation: 0 dense, 1 codebook, 2 sparse, 3 scaled integers, 4 blocks, 5 number
    dense        byte: 1 where patterns are rotated left by one bit; a stream for each byte of a pattern, highest first
    codebook     varint k; an array of the k distinct patterns, ascending; a stream of indices
    sparse       varint: the commonest pattern; positions (harness.storage.sparse); an array of the values there
    scaled       varints: group size, zigzag of the least integer, number of symbols, 1 where symbol 0 is -0.0; an array
                 of the float32 scales (one for each group of consecutive elements); a stream of the integers less the
                 least one (plus 1 where symbol 0 is -0.0)
    blocks       varints: block size d, k; an array of the k distinct blocks of d elements; a stream of indices
    number       varint: the pattern of the only element
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from harness.storage import distinct, fields, sparse, streams
from harness.storage.fields import Array, Reader, Writer, damaged
from harness.storage.streams import Entropy, Plan, Trace

DENSE, CODEBOOK, SPARSE, SCALED, BLOCKS, NUMBER = range(6)
NAMES = ("dense", "codebook", "sparse", "scaled-integers", "block-codebook", "number")

_MAX_BOOK = 1 << 16
_BLOCK_SIZES = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 18, 24, 25, 27, 32, 36, 49, 64)
_GROUP_SIZES = (32, 64, 128, 256)
_MAX_DEPTH = 4
_NEGATIVE_ZERO = np.uint32(1 << 31)
_NEARLY = 256
"""Sparse forms that are longer by this part of a tensor at most are taken: fewer symbols, so several times faster."""

_ENOUGH = 1 << 15
"""Elements of a sample that decides whether something is worth a look."""


def plan(values: Array, shape: tuple[int, ...], floating: bool, entropy: Entropy) -> Plan:
    """The shortest way to store an array.

    Parameters
    ----------
    values : ndarray of uint8, uint16, uint32 or uint64, shape (n,)
        Bit patterns.
    shape : tuple of int
        The tensor's.
    floating : bool
        Whether the patterns are floating-point numbers: sign, exponent, fraction.
    entropy : str
        See :func:`harness.storage.streams.plan`.
    """
    best = min(_whole(values, shape, floating, entropy), key=lambda option: option.size)
    if len(values) < 2:
        return best
    fill, often = _commonest(values)
    # With few elements to leave out, positions save nothing that the elements' own entropy code does not.
    if often * 10 >= len(values) * 3 and often < len(values) and fill < 2**62:
        other = min(_sparse(values, fill, shape, floating, entropy), key=lambda option: option.size)
        if other.size <= best.size + best.size // _NEARLY:
            return other
    return best


def _whole(values: Array, shape: tuple[int, ...], floating: bool, entropy: Entropy) -> Iterator[Plan]:
    """Representations that store every element."""
    found = distinct.few(values, _MAX_BOOK) if len(values) > 1 else None
    # Up to 256 values, each occurring often: an index is never longer than the byte planes that tell them apart.
    if found is None or len(found[0]) > min(256, len(values) // 64):
        yield _dense(values, floating, entropy)
    if len(values) == 1 and values.itemsize > 1:
        size = fields.varint_size(int(values[0]))
        if size <= 8:
            yield Plan(1 + size, functools.partial(_write_number, int(values[0])))
    bound = 2**62
    if found is not None:
        option = _codebook(*found, floating, entropy)
        bound = option.size
        yield option
    if floating and values.dtype == np.uint32 and len(values) > 16 and (found is None or len(found[0]) > 16):
        yield from _scaled(values, found, shape, entropy)
    # Blocks of what is left of a sparse tensor, or of a bias, mean nothing.
    if len(shape) > 1 and len(values) > 1 and (found is None or len(found[0]) > 16):
        yield from _blocks(values, shape, floating, entropy, bound)


def _write_number(value: int, out: Writer) -> None:
    out.raw(bytes([NUMBER]))
    out.varint(value)


# --- dense ---------------------------------------------------------------------------------------------------------


def _rotated(values: Array, back: bool = False) -> Array:
    """Patterns rotated by one bit, so that the highest byte of a float32 is its exponent without the sign."""
    one, rest = values.dtype.type(1), values.dtype.type(values.itemsize * 8 - 1)
    turned: Array = values >> one | values << rest if back else values << one | values >> rest
    return turned


def _planes(values: Array) -> Array:
    """Bytes of the patterns, highest first: shape (n, itemsize)."""
    size = values.itemsize
    return values.astype(values.dtype.newbyteorder(">"), copy=False).view(np.uint8).reshape(-1, size)


def _dense(values: Array, floating: bool, entropy: Entropy) -> Plan:
    turn = floating and values.itemsize > 1
    planes = _planes(_rotated(values) if turn else values)
    parts = []
    for number in range(planes.shape[1]):
        column = np.ascontiguousarray(planes[:, number])
        parts.append(streams.plan(streams.counted(column, 256), functools.partial(_same, column), entropy))

    def write(out: Writer) -> None:
        out.raw(bytes([DENSE, turn]))
        for part in parts:
            part.write(out)

    return Plan(2 + sum(part.size for part in parts), write)


def _same(symbols: Array) -> Array:
    return symbols


# --- codebooks -----------------------------------------------------------------------------------------------------


def _codebook(book: Array, index: Array, floating: bool, entropy: Entropy) -> Plan:
    counts = streams.counted(index, len(book))
    indices = streams.plan(counts, functools.partial(_same, index), entropy)
    entries = _dense(book, floating, entropy)

    def write(out: Writer) -> None:
        out.raw(bytes([CODEBOOK]))
        out.varint(len(book))
        entries.write(out)
        indices.write(out)

    return Plan(1 + fields.varint_size(len(book)) + entries.size + indices.size, write)


def _blocks(values: Array, shape: tuple[int, ...], floating: bool, entropy: Entropy, bound: int) -> Iterator[Plan]:
    row = len(values) // shape[0]
    for size in _BLOCK_SIZES:
        if row % size or len(values) < 4 * size:
            continue
        if _hopeless(values, size, bound):
            continue
        # k blocks cost k * size elements: with more than half of all blocks distinct nothing is gained.
        found = distinct.few_blocks(values, size, min(_MAX_BOOK, len(values) // size // 2))
        if found is None or streams.estimate(streams.counted(found[1]), entropy) >= bound:
            continue
        option = _block_codebook(*found, floating, entropy)
        bound = min(bound, option.size)
        yield option


def _hopeless(values: Array, size: int, bound: int) -> bool:
    """Whether a sample of a large array shows that a codebook of blocks will not come below ``bound`` bytes.

    Either too many blocks of the sample occur once, so that most others would be new as well (Good and Turing's
    estimate), or the indices alone take that much (the entropy of a sample is below that of the whole but for chance).
    """
    blocks = values.reshape(-1, size)
    if len(blocks) < 2 * _ENOUGH:
        return False
    sample = distinct.mixed(blocks[:: len(blocks) // _ENOUGH])
    counts = np.unique(sample, return_counts=True)[1]
    if np.count_nonzero(counts == 1) > 0.05 * len(sample):
        return True
    return streams.entropy_bits(counts) / len(sample) * len(blocks) / 8 > 0.97 * bound


def _block_codebook(book: Array, index: Array, floating: bool, entropy: Entropy) -> Plan:
    indices = streams.plan(streams.counted(index, len(book)), functools.partial(_same, index), entropy)
    flat = book.ravel()
    few = distinct.few(flat, _MAX_BOOK)
    choices = [] if few is None else [_codebook(*few, floating, entropy)]
    if few is None or len(few[0]) > min(256, len(flat) // 64):
        choices.append(_dense(flat, floating, entropy))
    entries = min(choices, key=lambda option: option.size)

    def write(out: Writer) -> None:
        out.raw(bytes([BLOCKS]))
        out.varint(book.shape[1])
        out.varint(len(book))
        entries.write(out)
        indices.write(out)

    head = 1 + fields.varint_size(book.shape[1]) + fields.varint_size(len(book))
    return Plan(head + entries.size + indices.size, write)


# --- integers times scales -----------------------------------------------------------------------------------------


def _scaled(values: Array, few: tuple[Array, Array] | None, shape: tuple[int, ...], entropy: Entropy) -> Iterator[Plan]:
    numbers = values.view(np.float32)
    row = len(values) // shape[0] if len(shape) > 1 else len(values)
    groups = [size for size in _GROUP_SIZES if size < row and row % size == 0] if len(shape) > 1 else []
    for size in dict.fromkeys([len(values), row, *groups]):
        matrix = numbers.reshape(-1, size)
        # One scale for all fits the elements where it fits the distinct values.
        if few is not None and size == len(values) and _integers(few[0].view(np.float32)[None]) is None:
            continue
        # A few rows tell nearly always that there are no scales.
        if len(matrix) > 16 and _integers(matrix[:: len(matrix) // 8]) is None:
            continue
        found = _integers(matrix)
        if found is None:
            continue
        scales, integers = found
        least = int(integers.min())
        symbols = (integers - least).astype(np.uint16).ravel()
        # Rounding a small negative number gives -0.0, which no integer does: it gets symbol 0, before the others.
        signed = values == _NEGATIVE_ZERO
        extra = int(signed.any())
        if extra:
            symbols += np.uint16(1)
            symbols[signed] = 0
        counts = streams.counted(symbols)
        stream = streams.plan(counts, functools.partial(_same, symbols), entropy)
        factors = _dense(scales.view(np.uint32), True, entropy)
        numbers_before = (size, -2 * least - 1 if least < 0 else 2 * least, len(counts), extra)
        write = functools.partial(_write_scaled, numbers_before, factors, stream)
        yield Plan(1 + sum(map(fields.varint_size, numbers_before)) + factors.size + stream.size, write)
        return  # the largest groups that fit have the fewest scales


def _write_scaled(numbers: tuple[int, ...], scales: Plan, stream: Plan, out: Writer) -> None:
    out.raw(bytes([SCALED]))
    for number in numbers:
        out.varint(number)
    scales.write(out)
    stream.write(out)


def _integers(matrix: Array) -> tuple[Array, Array] | None:
    """Scales (g,) and integers (g, size), int32 below 2,048 in absolute value, whose float32 products are the rows.

    The scale of a row is its smallest or its largest absolute value divided by a small or a usual integer, up to two
    units in the last place. None where some row has no such scale.
    """
    with np.errstate(all="ignore"):
        size = np.abs(matrix)
        largest = size.max(1)
        if not np.all(np.isfinite(largest)):
            return None
        smallest = np.where(size > 0, size, np.float32(np.inf)).min(1)
        divisors = [(smallest, m) for m in (1, 2, 3, 4, 5, 6, 7, 8)]
        divisors += [(largest, m) for m in (127, 7, 15, 31, 63, 128, 3, 1, 2, 8, 16, 32, 64, 255, 256)]
        scales = np.ones(len(matrix), np.float32)
        open_rows = np.flatnonzero(largest > 0)
        # A row of which a few elements fit no candidate is given up before all of it is looked at.
        probe = matrix[:, :: max(1, matrix.shape[1] // 64)]
        for source, divisor in divisors:
            for ulps in (0, 1, -1, 2, -2):
                scale = ((source[open_rows] / np.float32(divisor)).view(np.int32) + np.int32(ulps)).view(np.float32)
                fits = _fits(probe[open_rows], scale)
                where = np.flatnonzero(fits)
                if len(where):
                    fits[where] = _fits(matrix[open_rows[where]], scale[where])
                    scales[open_rows[fits]] = scale[fits]
                    open_rows = open_rows[~fits]
        if len(open_rows):
            return None
        integers = np.rint(matrix / scales[:, None]).astype(np.int32)
    return scales, integers


def _fits(rows: Array, scale: Array) -> Array:
    """Which rows are their scale times integers below 2,048, but for the sign of zeros: shape (g,)."""
    integers = np.rint(rows / scale[:, None])
    same = integers * scale[:, None] == rows
    fitting: Array = (same & (np.abs(integers) < 2048)).all(1) & (scale > 0) & np.isfinite(scale)
    return fitting


# --- sparse --------------------------------------------------------------------------------------------------------


def _commonest(values: Array) -> tuple[int, int]:
    """The commonest pattern (of a large array: of a sample) and how often it occurs."""
    sample = values[:: max(1, len(values) // _ENOUGH)]
    found, counts = np.unique(sample, return_counts=True)
    fill = int(found[int(np.argmax(counts))])
    return fill, int(np.count_nonzero(values == values.dtype.type(fill)))


def _sparse(values: Array, fill: int, shape: tuple[int, ...], floating: bool, entropy: Entropy) -> Iterator[Plan]:
    mask = values != values.dtype.type(fill)
    entries = values[mask]
    # What the entries are is decided once; only a relative index with fillers changes them.
    stored = min(_whole(entries, (len(entries),), floating, entropy), key=lambda option: option.size)
    options = list(sparse.options(mask, shape, entropy))
    plain = min((option for option in options if not option.fillers), key=lambda option: option.plan.size, default=None)
    if plain is not None:
        yield _join(fill, plain.plan, stored)
    bound = plain.plan.size + stored.size if plain is not None else 2**62
    for option in options:
        if not option.fillers or option.plan.size + stored.size >= bound:
            continue
        filled = sparse.with_fillers(np.flatnonzero(mask), entries, option.bits, fill)[1]
        whole = min(_whole(filled, (len(filled),), floating, entropy), key=lambda choice: choice.size)
        yield _join(fill, option.plan, whole)


def _join(fill: int, positions: Plan, entries: Plan) -> Plan:
    def write(out: Writer) -> None:
        out.raw(bytes([SPARSE]))
        out.varint(fill)
        positions.write(out)
        entries.write(out)

    return Plan(1 + fields.varint_size(fill) + positions.size + entries.size, write)


# --- reading -------------------------------------------------------------------------------------------------------


def read(
    reader: Reader, count: int, dtype: np.dtype[Any], trace: Trace | None = None, depth: int = 0, named: bool = True
) -> Array:
    """The patterns of an array, shape (count,).

    Parameters
    ----------
    reader : Reader
        Stands at the array.
    count : int
        Elements.
    dtype : dtype
        Unsigned, of the elements' width.
    trace : Trace, optional
        Takes up what was found.
    depth : int
        How many arrays this one is part of.
    named : bool
        Whether ``trace`` takes up the name of the representation.

    Raises
    ------
    DataError
        If the part is damaged. Nothing larger than a small multiple of ``count`` elements is allocated before that.
    """
    kind = reader.byte()
    # Sparse arrays in sparse ones save nothing, and each would take a tensor's memory again.
    if depth >= (1 if kind == SPARSE else _MAX_DEPTH) or kind >= len(NAMES) or (count == 0 and kind != DENSE):
        raise damaged("a representation of unknown kind")
    if trace and named and kind != SPARSE:
        trace.parts.append(NAMES[kind])
    if kind == NUMBER:
        return _read_number(reader, count, dtype, trace)
    if kind == DENSE:
        return _read_dense(reader, count, dtype, trace)
    if kind == SPARSE:
        fill = _pattern(reader, dtype)
        stored = sparse.read(reader, count, trace)
        entries = read(reader, int(np.count_nonzero(stored)), dtype, trace, depth + 1, named)
        values = np.full(count, fill, dtype) if fill else np.zeros(count, dtype)
        values[stored] = entries
        return values
    if kind == CODEBOOK:
        size = reader.varint(min(count, _MAX_BOOK))
        book = read(reader, size, dtype, trace, depth + 1, False)
        if not size:
            raise damaged("an empty codebook")
        return _looked_up(book, streams.read(reader, count, size, trace))
    if kind == BLOCKS:
        block = reader.varint(min(count, _BLOCK_SIZES[-1]))
        size = reader.varint(_MAX_BOOK)
        if not block or count % block or not 0 < size * block <= count:
            raise damaged(f"{size} blocks of {block} in an array of {count}")
        book = read(reader, size * block, dtype, trace, depth + 1, False).reshape(size, block)
        return _looked_up(book, streams.read(reader, count // block, size, trace)).ravel()
    group = reader.varint(count)
    zigzag, size, extra = reader.varint(1 << 16), reader.varint(1 << 16), reader.varint(1)
    if dtype != np.uint32 or not group or count % group or not size:
        raise damaged("integers with scales that do not fit the tensor")
    scales = read(reader, count // group, dtype, trace, depth + 1, False).view(np.float32)
    symbols = streams.read(reader, count, size, trace).astype(np.int32)
    signed = symbols == 0
    symbols += (-(zigzag + 1 >> 1) if zigzag & 1 else zigzag >> 1) - extra
    with np.errstate(all="ignore"):  # a damaged scale may be anything
        product = symbols.astype(np.float32).reshape(-1, group) * scales[:, None]
    values = product.ravel().view(np.uint32)
    if extra:
        values[signed] = _NEGATIVE_ZERO
    return values


def _looked_up(book: Array, index: Array) -> Array:
    """Entries of a codebook, a part at a time: numpy makes eight bytes of each index that it uses."""
    found = np.empty((len(index), *book.shape[1:]), book.dtype)
    for begin in range(0, len(index), _ENOUGH):
        book.take(index[begin : begin + _ENOUGH], axis=0, out=found[begin : begin + _ENOUGH], mode="clip")
    return found


def _pattern(reader: Reader, dtype: np.dtype[Any]) -> int:
    return reader.varint(2 ** min(dtype.itemsize * 8, 62) - 1)


def _read_number(reader: Reader, count: int, dtype: np.dtype[Any], trace: Trace | None) -> Array:
    before = reader.position
    value = _pattern(reader, dtype)
    if count != 1:
        raise damaged("one number for several elements")
    if trace:
        trace.raw(reader.position - before)
    return np.array([value], dtype)


def _read_dense(reader: Reader, count: int, dtype: np.dtype[Any], trace: Trace | None) -> Array:
    turned = reader.byte()
    planes = np.empty((count, dtype.itemsize), np.uint8)
    for number in range(dtype.itemsize):
        planes[:, number] = streams.read(reader, count, 256, trace)
    values = planes.view(dtype.newbyteorder(">")).ravel().astype(dtype)
    return _rotated(values, back=True) if turned else values
