"""Where the entries of a sparse tensor are: four ways to store their positions.

* ``bitmap``: a bit for each element, in bytes.
* ``relative-index``: the number of zeros before each entry, in n bits; where it does not fit, a filler entry (a stored
  zero) is put in. Source: Han et al. 2016 (arXiv:1510.00149), §2 and figure 2; bibtex in
  :mod:`harness.storage.huffman`. The paper uses 5 bits for fully connected and 8 for convolutional layers; here the
  best n is found.
* ``gaps``: the same with a symbol of its own for "no entry yet", so that no filler is stored among the values.
* ``density-gaps``: rows and columns of the weight matrix are put into classes of similar density. The elements of each
  pair of classes are taken together, and the gaps between entries are coded with the geometric distribution that the
  number of entries in the pair implies, so that no frequency table is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from harness.storage import fields, rans, streams
from harness.storage.fields import Array, Reader, Writer, damaged
from harness.storage.streams import Entropy, Plan, Trace

BITMAP, RELATIVE, GAPS, DENSITY = range(4)
NAMES = ("bitmap", "relative-index", "gaps", "density-gaps")

_WIDTHS = range(2, 13)
_ESCAPES = (7, 15, 31, 63, 127, 255, 511, 1023)
_MAX_CLASSES = 8
_CHUNK = 1 << 17
_DENSITY_BITS = rans.MAX_BITS


@dataclass(frozen=True)
class Option:
    """A way to store positions, and which of the stored values are fillers.

    Parameters
    ----------
    kind : int
        Index into :data:`NAMES`.
    plan : Plan
        Size and writer.
    fillers : int
        How many filler values are stored.
    bits : int
        Width n of a relative index, else 0.
    """

    kind: int
    plan: Plan
    fillers: int = 0
    bits: int = 0


def _gaps(positions: Array) -> Array:
    """Zeros before each entry."""
    return np.diff(positions, prepend=-1) - 1


def with_fillers(positions: Array, values: Array, bits: int, filler: int) -> tuple[Array, Array]:
    """Fields and values of the relative index of ``bits`` bits, fillers put in.

    Returns
    -------
    tuple of ndarray
        Fields (m,), each below ``2 ** bits``: zeros before the entry; and values (m,).
    """
    gaps, span = _gaps(positions), 1 << bits
    fillers = gaps >> bits
    places = np.cumsum(fillers + 1) - 1
    size = int(places[-1]) + 1 if len(places) else 0
    symbols = np.full(size, span - 1, np.uint16)
    symbols[places] = gaps & (span - 1)
    stored = np.full(size, filler, values.dtype)
    stored[places] = values
    return symbols, stored


def _with_escapes(gaps: Array, escape: int) -> Array:
    """Symbols: a gap below ``escape``, or ``escape`` for that many zeros with the entry yet to come."""
    places = np.cumsum(gaps // escape + 1) - 1
    symbols = np.full(int(places[-1]) + 1 if len(places) else 0, escape, np.uint16)
    symbols[places] = gaps % escape
    return symbols


def options(mask: Array, shape: tuple[int, ...], entropy: Entropy) -> Iterator[Option]:
    """Ways worth considering; of those that need a search, the best few by estimate.

    Parameters
    ----------
    mask : ndarray of bool, shape (n,)
        True at an entry; at least one is.
    shape : tuple of int
        The tensor's, whose first dimension makes the matrix' rows.
    entropy : str
        See :func:`harness.storage.streams.plan`.
    """
    positions = np.flatnonzero(mask)
    gaps = _gaps(positions)
    packed = np.packbits(mask)
    bitmap = streams.plan(streams.counted(packed, 256), lambda: packed, entropy)
    yield Option(BITMAP, _tagged(BITMAP, bitmap))
    lengths, often = np.unique(gaps, return_counts=True)

    relative = []
    for bits in _WIDTHS:
        counts = np.bincount(lengths & ((1 << bits) - 1), often, minlength=1 << bits).astype(np.int64)
        fillers = int(((lengths >> bits) * often).sum())
        counts[-1] += fillers
        # A filler costs an entry among the values too, where the commonest value costs least; take a byte's half.
        relative.append((streams.estimate(counts, entropy) + fillers / 2, bits, fillers, counts))
    for _, bits, fillers, counts in sorted(relative, key=lambda item: item[:2])[: 3 if entropy == "none" else 2]:
        make = functools.partial(_relative_fields, positions, bits)
        stream = streams.plan(counts, make, entropy)
        count = len(positions) + fillers
        yield Option(RELATIVE, _tagged(RELATIVE, stream, count, bits), fillers, bits)

    escaped = []
    for escape in _ESCAPES:
        counts = np.bincount(lengths % escape, often, minlength=escape + 1).astype(np.int64)
        counts[escape] += int(((lengths // escape) * often).sum())
        escaped.append((streams.estimate(counts, entropy), escape, counts))
    for _, escape, counts in sorted(escaped, key=lambda item: item[:2])[:2]:
        stream = streams.plan(counts, functools.partial(_with_escapes, gaps, escape), entropy)
        yield Option(GAPS, _tagged(GAPS, stream, len(positions), int(counts.sum()), escape))
    if entropy in ("auto", "rans") and (density := _density(mask, shape, entropy)):
        yield Option(DENSITY, density)


def _relative_fields(positions: Array, bits: int) -> Array:
    return with_fillers(positions, np.zeros(len(positions), np.uint8), bits, 0)[0]


def _tagged(kind: int, stream: Plan, *numbers: int) -> Plan:
    def write(out: Writer) -> None:
        out.raw(bytes([kind]))
        for number in numbers:
            out.varint(number)
        stream.write(out)

    return Plan(1 + sum(map(fields.varint_size, numbers)) + stream.size, write)


def read(reader: Reader, count: int, trace: Trace | None) -> Array:
    """Where values are stored, fillers included: bool, shape (count,).

    Raises
    ------
    DataError
        If the part is damaged.
    """
    kind = reader.byte()
    if kind >= len(NAMES):
        raise damaged("positions of unknown kind")
    if trace:
        trace.parts.append(NAMES[kind])
    if kind == BITMAP:
        packed = streams.read(reader, -(-count // 8), 256, trace).astype(np.uint8, copy=False)
        bits = np.unpackbits(packed)
        if bits[count:].any():
            raise damaged("a bitmap with entries behind its end")
        mask: Array = bits[:count].view(np.bool_)
        return mask
    if kind == DENSITY:
        return _read_density(reader, count, trace)
    entries = reader.varint(count)
    mask = np.zeros(count, np.bool_)
    if kind == RELATIVE:
        symbols = streams.read(reader, entries, 1 << reader.varint(_WIDTHS[-1]), trace)
        found = _mark(mask, symbols, None)
    else:
        total = reader.varint(count + entries)
        escape = reader.varint(_ESCAPES[-1])
        found = _mark(mask, streams.read(reader, total, escape + 1, trace), escape)
    if found != entries:
        raise damaged(f"{found} entries where {entries} are announced")
    return mask


def _mark(mask: Array, symbols: Array, escape: int | None) -> int:
    """Mark the entries that symbols tell, each the zeros before it, and return how many there are.

    A part at a time, because positions take eight bytes each, whatever the elements take.
    """
    last, found = -1, 0
    for begin in range(0, len(symbols), _CHUNK):
        part = symbols[begin : begin + _CHUNK].astype(np.int64)
        stored = np.ones(len(part), np.bool_) if escape is None else part != escape
        places = last + np.cumsum(part + stored)
        last = int(places[-1])
        places = places[stored]
        if len(places) and int(places[-1]) >= len(mask):
            raise damaged("an entry behind the tensor's end")
        mask[places] = True
        found += len(places)
    return found


# --- density classes -----------------------------------------------------------------------------------------------
#
#   varint   rows (the matrix is rows x count / rows)
#   byte     (row classes - 1) << 4 | (column classes - 1)
#   streams  class of each row, class of each column (each only where there is more than one class)
#   varints  for each pair of classes, row class first: entries k of its n elements; where 0 < k < n: the number of
#            symbols
#   varints  lanes, bytes; the states and words
#
# In a pair of which more than half are entries, the gaps between the elements that are none are coded instead.


def _escape(size: int, entries: int) -> int:
    return min(max(-(-3 * size // entries), 1), 1023)


def _geometric(size: int, entries: int) -> Array:
    """Frequencies of gaps 0 to E - 1 and of the escape E where ``entries`` of ``size`` elements are entries.

    Integers throughout, so that every machine has the same table.
    """
    escape, scale = _escape(size, entries), 1 << _DENSITY_BITS
    left, frequencies = scale << 32, []
    for _ in range(escape):
        here = left * entries // size
        left -= here
        frequencies.append(max(1, here + (1 << 31) >> 32))
    frequencies.append(scale - sum(frequencies))
    return np.array(frequencies, np.int64)


def _classes(counts: Array, size: int, number: int) -> Array:
    """Lines of similar density: one-dimensional k-means where the binomial's spread is everywhere the same."""
    spread = np.arcsin(np.sqrt((counts + 0.375) / (size + 0.75)))
    centres = np.unique(np.quantile(spread, (np.arange(number) + 0.5) / number))
    for _ in range(30):
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, spread)
        weight = np.bincount(nearest, minlength=len(centres))
        total = np.bincount(nearest, spread, minlength=len(centres))
        moved = np.where(weight > 0, total / np.maximum(weight, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return np.unique(np.searchsorted((centres[1:] + centres[:-1]) / 2, spread), return_inverse=True)[1].astype(np.uint8)


def _varied(counts: Array, size: int) -> bool:
    """Whether lines differ in density by more than chance makes them."""
    share = float(counts.mean()) / size
    expected = size * share * (1 - share)
    return len(counts) >= 8 and size >= 8 and expected > 0 and float(counts.var()) > 1.25 * expected


def _pair_entropy(entries: Array, sizes: Array) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        share = entries / sizes
        bits = -entries * np.log2(share) - (sizes - entries) * np.log2(1 - share)
    return float(np.nansum(bits))


def _density(mask: Array, shape: tuple[int, ...], entropy: Entropy) -> Plan | None:
    if len(shape) < 2:
        return None
    rows = shape[0]
    matrix = mask.reshape(rows, -1)
    columns = matrix.shape[1]
    by_row, by_column = np.count_nonzero(matrix, axis=1), np.count_nonzero(matrix, axis=0)
    one_row, one_column = np.zeros(rows, np.uint8), np.zeros(columns, np.uint8)
    row_choices, column_choices = [one_row], [one_column]
    if _varied(by_row, columns):
        row_choices += [_classes(by_row, columns, number) for number in (2, 3, 4, 6, 8)]
    if _varied(by_column, rows):
        column_choices += [_classes(by_column, rows, number) for number in (2, 3, 4, 6, 8)]
    best: tuple[float, Array, Array, Array] | None = None
    for column_class in column_choices:
        number = int(column_class.max()) + 1
        lines = (
            [by_row] if number == 1 else [np.count_nonzero(matrix[:, column_class == c], axis=1) for c in range(number)]
        )
        by_class = np.stack(lines, axis=1)
        side = streams.estimate(np.bincount(column_class), entropy)
        for row_class in row_choices:
            entries = np.stack([by_class[row_class == r].sum(0) for r in range(int(row_class.max()) + 1)])
            sizes = np.outer(np.bincount(row_class), np.bincount(column_class))
            cost = _pair_entropy(entries, sizes) / 8 + side + streams.estimate(np.bincount(row_class), entropy)
            cost += 5 * entries.size
            if best is None or cost < best[0]:
                best = (cost, row_class, column_class, entries)
    assert best is not None  # noqa: S101 - the lists begin with one class each
    cost, row_class, column_class, entries = best
    sides = [
        streams.plan(np.bincount(line), functools.partial(_same, line), entropy)
        for line in (row_class, column_class)
        if int(line.max()) > 0
    ]
    head = 2 + fields.varint_size(rows) + sum(side.size for side in sides) + 6
    body = -(-int(_pair_entropy(entries, np.outer(np.bincount(row_class), np.bincount(column_class)))) // 8)
    total = int(np.minimum(entries, np.outer(np.bincount(row_class), np.bincount(column_class)) - entries).sum())
    size = head + 5 * entries.size + body + body // 2000 + rans.LANE_COST * rans.lanes_for(body, max(total, 1))
    # Entries and, at most, escapes: where they are so many and so cheap that the reader would refuse the stream.
    if total == 0 or total * 4 // 3 + mask.size // 1023 + entries.size > body * streams.SYMBOLS_PER_BYTE:
        return None

    def write(out: Writer) -> None:
        out.raw(bytes([DENSITY]))
        out.varint(rows)
        out.raw(bytes([int(row_class.max()) << 4 | int(column_class.max())]))
        for side in sides:
            side.write(out)
        order, begins = _pairs(row_class, column_class)
        sorted_mask = mask[order]
        parts, tables = [], []
        for number in range(len(begins) - 1):
            here = sorted_mask[begins[number] : begins[number + 1]]
            k = int(np.count_nonzero(here))
            out.varint(k)
            if 0 < k < len(here):
                rare = here if 2 * k <= len(here) else ~here
                symbols = _with_escapes(_gaps(np.flatnonzero(rare)), _escape(len(here), min(k, len(here) - k)))
                out.varint(len(symbols))
                tables.append(_geometric(len(here), min(k, len(here) - k)))
                parts.append(symbols)
        offsets = np.cumsum([0] + [len(table) for table in tables[:-1]])
        cells = np.concatenate([part + offset for part, offset in zip(parts, offsets, strict=True)])
        lanes = rans.lanes_for(body, len(cells))
        first = np.concatenate([rans.starts(table) for table in tables])
        coded = rans.encode(cells, np.concatenate(tables), first, _DENSITY_BITS, lanes)
        out.varint(lanes)
        out.varint(len(coded))
        out.raw(coded)

    return Plan(size, write)


def _same(line: Array) -> Array:
    return line


def _pairs(row_class: Array, column_class: Array) -> tuple[Array, Array]:
    """Elements ordered by pair of classes, shape (n,), and where each pair begins in that order."""
    columns = int(column_class.max()) + 1
    pair = (row_class[:, None] * np.uint8(columns) + column_class[None, :]).ravel()
    number = (int(row_class.max()) + 1) * columns
    order = np.argsort(pair, kind="stable")
    begins = np.concatenate([[0], np.cumsum(np.bincount(pair, minlength=number))])
    return order, begins


def _read_density(reader: Reader, count: int, trace: Trace | None) -> Array:
    rows = reader.varint(count)
    if rows < 1 or count % rows:
        raise damaged(f"{rows} rows in a tensor of {count} elements")
    columns = count // rows
    head = reader.byte()
    numbers = (head >> 4) + 1, (head & 15) + 1
    if max(numbers) > _MAX_CLASSES:
        raise damaged("too many classes of density")
    lines = []
    for size, number in zip((rows, columns), numbers, strict=True):
        line = streams.read(reader, size, number, trace) if number > 1 else np.zeros(size, np.uint8)
        if int(line.max()) != number - 1:
            raise damaged("a class of density without lines")
        lines.append(line.astype(np.uint8))
    pairs = np.outer(np.bincount(lines[0], minlength=numbers[0]), np.bincount(lines[1], minlength=numbers[1])).ravel()
    coded: list[tuple[int, int, int]] = []  # pair, entries, symbols
    full: list[int] = []
    for number, size in enumerate(pairs.tolist()):
        entries = reader.varint(size)
        if 0 < entries < size:
            coded.append((number, entries, reader.varint(size)))
        elif entries:
            full.append(number)
    total = sum(symbols for _, _, symbols in coded)
    lanes, body = streams.coded_part(reader, max(total, 1))
    if not total:
        raise damaged("no positions")
    tables = [_geometric(int(pairs[n]), min(k, int(pairs[n]) - k)) for n, k, _ in coded]
    padded = np.zeros((len(tables), max(map(len, tables))), np.int64)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    which = np.repeat(np.arange(len(tables), dtype=np.uint8), [symbols for _, _, symbols in coded])
    symbols = rans.decode(body, total, padded, _DENSITY_BITS, lanes, which)
    mask = np.zeros((rows, columns), np.bool_)
    # The elements of a pair, in order, are those of a submatrix: no list of their positions is needed.
    of_class = [[np.flatnonzero(line == which) for which in range(n)] for line, n in zip(lines, numbers, strict=True)]

    def place(pair: int, part: Array | bool) -> None:
        here = (of_class[0][pair // numbers[1]], of_class[1][pair % numbers[1]])
        mask[np.ix_(*here)] = part if isinstance(part, bool) else part.reshape(len(here[0]), len(here[1]))

    at = 0
    for (number, entries, length), table in zip(coded, tables, strict=True):
        size = int(pairs[number])
        part = np.zeros(size, np.bool_)
        if _mark(part, symbols[at : at + length], len(table) - 1) != min(entries, size - entries):
            raise damaged("an entry behind its class's end")
        at += length
        place(number, ~part if 2 * entries > size else part)
        if trace:
            trace.bits += _pair_entropy(np.array([entries]), np.array([size]))
    for number in full:
        place(number, True)
    return mask.ravel()
