"""rANS with interleaved lanes: asymmetric numeral systems, a NumPy operation over all lanes at once.

Source: Duda, "Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression rate of
arithmetic coding", 2013 (arXiv:1311.2540); the interleaving of several states over one output is that of Giesen,
"Interleaved entropy coders", 2014 (arXiv:1402.3392).

::

    @article{duda2013asymmetric,
      title   = {Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression rate of
                 arithmetic coding},
      author  = {Duda, Jarek},
      journal = {arXiv preprint arXiv:1311.2540},
      year    = {2013}
    }

    @article{giesen2014interleaved,
      title   = {Interleaved entropy coders},
      author  = {Giesen, Fabian},
      journal = {arXiv preprint arXiv:1402.3392},
      year    = {2014}
    }

Symbol i belongs to lane ``i % lanes``. A state is a 32-bit integer, at least 2^16 between symbols, and gives or takes
16-bit words. The encoder runs backwards from states of 2^16, so a decoder that does not end there read damaged data.
"""

from __future__ import annotations

import numpy as np

from harness.storage.fields import Array, damaged

MAX_BITS = 15
"""Frequencies add up to at most ``2 ** MAX_BITS``."""

BYTES_PER_LANE = 2048
"""One lane for so many bytes of output: a lane costs three bytes on average."""

LANE_COST = 3

FEW_LANES = 16
"""Up to so many lanes, plain Python integers are faster than an array operation for so few elements."""

_LOW = np.uint32(1 << 16)


def lanes_for(size: int, count: int) -> int:
    """How many lanes code ``count`` symbols into about ``size`` bytes."""
    return max(1, min(size // BYTES_PER_LANE, count))


def quantised(counts: Array, bits: int) -> Array:
    """Frequencies that add up to ``2 ** bits``, at least 1 where the count is, close to proportional.

    What rounding leaves over or takes too much goes where it changes the code's length least.

    Parameters
    ----------
    counts : ndarray of int64, shape (k,)
        At most ``2 ** bits`` of them above zero.
    bits : int
        The scale.

    Returns
    -------
    ndarray of int64, shape (k,)
    """
    scale, total = 1 << bits, int(counts.sum())
    present = counts > 0
    frequencies = np.where(present, np.maximum(np.rint(counts * (scale / total)), 1), 0).astype(np.int64)
    while (left := scale - int(frequencies.sum())) != 0:
        step = 1 if left > 0 else -1
        able = present & (frequencies + step >= 1)
        change = np.full(len(counts), np.inf)
        change[able] = counts[able] * (np.log2(frequencies[able]) - np.log2(frequencies[able] + step))
        chosen = np.argsort(change, kind="stable")[: min(abs(left), int(able.sum()))]
        frequencies[chosen] += step
    return frequencies


def starts(frequencies: Array) -> Array:
    """First slot of each symbol: shape (k,)."""
    return np.cumsum(frequencies) - frequencies


def encode(cells: Array, frequencies: Array, first: Array, bits: int, lanes: int) -> bytes:
    """Code symbols into lane states (4 bytes each) followed by 16-bit words.

    Parameters
    ----------
    cells : ndarray of unsigned integers, shape (n,)
        Index of each symbol's row in the two tables (with one table: the symbol itself).
    frequencies, first : ndarray of int64, shape (k,)
        Frequency and first slot of each row; no frequency of a coded symbol is 0 or ``2 ** bits``.
    bits : int
        Frequencies of one table add up to ``2 ** bits``.
    lanes : int
        1 to n.
    """
    if lanes <= FEW_LANES:
        return _encode_few(cells.tolist(), frequencies.tolist(), first.tolist(), bits, lanes)
    frequency, cumulated = frequencies.astype(np.uint32), first.astype(np.uint32)
    state = np.full(lanes, _LOW, np.uint32)
    words: list[Array] = []
    scale, up, half, low = np.uint32(1 << bits), np.uint32(32 - bits), np.uint32(16), np.uint32(0xFFFF)
    begin = (len(cells) - 1) // lanes * lanes
    while begin >= 0:
        here = cells[begin : begin + lanes]
        x = state[: len(here)]
        f = frequency.take(here)
        full = (x >= f << up).nonzero()[0]
        if len(full):
            over = x[full]
            words.append((over & low).astype("<u2"))
            x[full] = over >> half
        quotient = x // f
        quotient *= scale - f
        x += quotient
        x += cumulated.take(here)
        begin -= lanes
    return state.astype("<u4").tobytes() + b"".join(part.tobytes() for part in reversed(words))


def _encode_few(cells: list[int], frequency: list[int], first: list[int], bits: int, lanes: int) -> bytes:
    """The same, a symbol at a time."""
    states, words = [1 << 16] * lanes, []
    for place in range(len(cells) - 1, -1, -1):
        cell, lane = cells[place], place % lanes
        x, f = states[lane], frequency[cell]
        if x >= f << 32 - bits:
            words.append(x & 0xFFFF)
            x >>= 16
        states[lane] = (x // f << bits) + x % f + first[cell]
    return np.array(states, "<u4").tobytes() + np.array(words[::-1], "<u2").tobytes()


def decode(
    data: memoryview, count: int, frequencies: Array, bits: int, lanes: int, tables: Array | None = None
) -> Array:
    """Undo :func:`encode`.

    Parameters
    ----------
    data : memoryview
        All of the output.
    count : int
        Symbols.
    frequencies : ndarray of int64, shape (t, k)
        Of each table; every row adds up to ``2 ** bits``.
    bits, lanes : int
        As encoded.
    tables : ndarray of unsigned integers, shape (n,), optional
        Which table each symbol was coded with; without it, the only one.

    Returns
    -------
    ndarray of uint16, shape (n,)
        The symbols.

    Raises
    ------
    DataError
        If the data end early, are left over, or do not lead back to the first state.
    """
    if len(data) < 4 * lanes or (len(data) - 4 * lanes) % 2:
        raise damaged("an entropy-coded stream of an impossible length")
    symbol_of = np.repeat(
        np.tile(np.arange(frequencies.shape[1], dtype=np.uint16), len(frequencies)), frequencies.ravel()
    )
    flat = frequencies.ravel().astype(np.uint32)
    within = np.arange(len(symbol_of), dtype=np.uint32) - np.repeat(
        np.cumsum(flat, dtype=np.uint32) - flat, frequencies.ravel()
    )
    step_of = np.repeat(flat, frequencies.ravel()) << np.uint32(16) | within
    state = np.frombuffer(data[: 4 * lanes], "<u4").astype(np.uint32)
    if np.any(state < _LOW):
        raise damaged("an entropy-coded stream with an impossible state")
    words = np.frombuffer(data[4 * lanes :], "<u2").astype(np.uint32)
    mask, down, half, low = np.uint32((1 << bits) - 1), np.uint32(bits), np.uint32(16), np.uint32(0xFFFF)
    symbols = np.empty(count, np.uint16)
    shifted = None if tables is None else tables.astype(np.uint32) << down
    if lanes <= FEW_LANES:
        offset = None if shifted is None else shifted.data
        slots, left = _slots_few(state.tolist(), words.data, step_of.data, count, bits, offset)
        if left:
            raise damaged("an entropy-coded stream does not end where it should")
        return symbol_of.take(slots)
    used = 0
    for begin in range(0, count, lanes):
        end = min(begin + lanes, count)
        x = state[: end - begin]
        slot = x & mask
        if shifted is not None:
            slot += shifted[begin:end]
        symbol_of.take(slot, out=symbols[begin:end])
        step = step_of.take(slot)
        x >>= down
        x *= step >> half
        step &= low
        x += step
        empty = (x < _LOW).nonzero()[0]
        if len(empty):
            refill = words[used : used + len(empty)]
            if len(refill) != len(empty):
                raise damaged("an entropy-coded stream ends early")
            x[empty] = x[empty] << half | refill
            used += len(empty)
    if used != len(words) or np.any(state != _LOW):
        raise damaged("an entropy-coded stream does not end where it should")
    return symbols


def _slots_few(
    states: list[int], words: memoryview, step_of: memoryview, count: int, bits: int, offset: memoryview | None
) -> tuple[Array, bool]:
    """The slots that the symbols were found in, and whether something is left over; a symbol at a time."""
    lanes, mask, used, end = len(states), (1 << bits) - 1, 0, len(words)
    slots = []
    for place in range(count):
        lane = place % lanes
        x = states[lane]
        slot = x & mask if offset is None else (x & mask) + offset[place]
        slots.append(slot)
        step = step_of[slot]
        x = (x >> bits) * (step >> 16) + (step & 0xFFFF)
        if x < 65536:
            if used == end:
                raise damaged("an entropy-coded stream ends early")
            x = x << 16 | words[used]
            used += 1
        states[lane] = x
    return np.array(slots, np.int64), used != end or any(x != 65536 for x in states)
