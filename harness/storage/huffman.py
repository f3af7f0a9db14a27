"""Canonical Huffman codes, at most 15 bits long, in parallel sub-streams.

Source: Huffman coding of the shared weights' indices and of the sparse index, Han et al., "Deep Compression:
Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman Coding", ICLR 2016 (arXiv:1510.00149),
§4.

::

    @inproceedings{han2016deep,
      title     = {Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman
                   Coding},
      author    = {Han, Song and Mao, Huizi and Dally, William J.},
      booktitle = {International Conference on Learning Representations},
      year      = {2016}
    }

The symbols are cut into ``lanes`` consecutive runs of equal length (the last may be shorter); each is a bit string of
its own that begins on a byte, so that one NumPy operation decodes a symbol of every run.
"""

from __future__ import annotations

import heapq

import numpy as np

from harness.storage import rans
from harness.storage.fields import Array, Reader, Writer, damaged

MAX_LENGTH = 15
LANE_COST = 3
"""Bytes that a lane costs on average: its length (two or three bytes) and half a byte of padding."""

_RUNS = 1 << 18
"""Symbols that are coded at once."""


def lengths(counts: Array) -> Array:
    """Code lengths of a Huffman code limited to :data:`MAX_LENGTH` bits.

    Parameters
    ----------
    counts : ndarray of int64, shape (k,)
        At least two above zero.

    Returns
    -------
    ndarray of int64, shape (k,)
        0 where the count is.
    """
    present = np.flatnonzero(counts)
    parent = [0] * (2 * len(present) - 1)
    heap = [(int(counts[symbol]), node) for node, symbol in enumerate(present)]
    heapq.heapify(heap)
    made = len(present)
    while len(heap) > 1:
        a, left = heapq.heappop(heap)
        b, right = heapq.heappop(heap)
        parent[left] = parent[right] = made
        heapq.heappush(heap, (a + b, made))
        made += 1
    depth = [0] * made
    for node in range(made - 2, -1, -1):
        depth[node] = depth[parent[node]] + 1
    limited = np.minimum(depth[: len(present)], MAX_LENGTH).astype(np.int64)
    # Shortening the longest codes broke Kraft's inequality: lengthen the rarest codes that can be, then give back.
    order = np.argsort(counts[present], kind="stable")
    used = int((1 << (MAX_LENGTH - limited)).sum())
    while used > 1 << MAX_LENGTH:
        chosen = next(i for i in order if limited[i] < MAX_LENGTH)
        used -= 1 << (MAX_LENGTH - int(limited[chosen]) - 1)
        limited[chosen] += 1
    for chosen in order[::-1]:
        while limited[chosen] > 1 and used + (1 << (MAX_LENGTH - int(limited[chosen]))) <= 1 << MAX_LENGTH:
            used += 1 << (MAX_LENGTH - int(limited[chosen]))
            limited[chosen] -= 1
    result = np.zeros(len(counts), np.int64)
    result[present] = limited
    return result


def _codes(length: Array) -> Array:
    """Canonical codes: by length, then by symbol."""
    order = np.lexsort((np.arange(len(length)), length))
    order = order[length[order] > 0]
    spans = 1 << (MAX_LENGTH - length[order])
    codes = np.zeros(len(length), np.int64)
    codes[order] = (np.cumsum(spans) - spans) >> (MAX_LENGTH - length[order])
    return codes


def encode(symbols: Array, length: Array, lanes: int) -> bytes:
    """Code symbols.

    Parameters
    ----------
    symbols : ndarray of unsigned integers, shape (n,)
        Each with a code.
    length : ndarray of int64, shape (k,)
        Code lengths in bits.
    lanes : int
        Sub-streams, 1 to n.

    Returns
    -------
    bytes
        The lengths of the sub-streams in bytes (variable-length integers; not the last), and the sub-streams.
    """
    run = -(-len(symbols) // lanes)
    code, bits = _codes(length).astype(np.uint64), length.astype(np.uint8)
    # Each lane's symbols, its codes and where they begin; lanes of a chunk are laid end to end on byte boundaries.
    per_chunk = max(1, _RUNS // run)
    sizes: list[Array] = []
    bodies: list[bytes] = []
    for begin in range(0, len(symbols), run * per_chunk):
        here = symbols[begin : begin + run * per_chunk]
        long = bits.take(here).astype(np.int64)
        ends = np.cumsum(long)
        firsts = np.arange(0, len(here), run)
        total = np.diff(np.append(ends[firsts] - long[firsts], ends[-1]))
        size = -(-total // 8)
        padding = np.cumsum(size * 8 - total) - (size * 8 - total)
        position = ends - long
        position += np.repeat(padding, run)[: len(here)]
        word = position >> 5
        # A code of at most 15 bits reaches over at most two 32-bit words: put it into the 64 bits of both.
        shifted = code.take(here) << (64 - long - (position & 31)).astype(np.uint64)
        groups = np.flatnonzero(np.diff(word, prepend=-1))
        joined = np.bitwise_or.reduceat(shifted, groups)
        out = np.zeros(int(word[-1]) + 2, np.uint32)
        out[word[groups]] |= (joined >> np.uint64(32)).astype(np.uint32)
        out[word[groups] + 1] |= (joined & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        sizes.append(size)
        bodies.append(out.astype(">u4").tobytes()[: int(size.sum())])
    writer = Writer()
    for value in np.concatenate(sizes)[:-1].tolist():
        writer.varint(value)
    writer.raw(b"".join(bodies))
    return bytes(writer.data)


def decode(data: memoryview, count: int, length: Array, lanes: int) -> Array:
    """Undo :func:`encode`.

    Returns
    -------
    ndarray of uint16, shape (n,)

    Raises
    ------
    DataError
        If the code lengths are no complete prefix code, or a sub-stream does not end where it should.
    """
    spans = np.where(length > 0, 1 << (MAX_LENGTH - length), 0)
    if int(spans.sum()) != 1 << MAX_LENGTH:
        raise damaged("code lengths that are no complete prefix code")
    order = np.lexsort((np.arange(len(length)), length))
    order = order[length[order] > 0]
    # One table entry for each possible run of 15 bits: symbol and length of the code it begins with.
    entry = np.repeat((order << 4 | length[order]).astype(np.uint32), spans[order])
    reader = Reader(data)
    size = np.array([reader.varint(len(data)) for _ in range(lanes - 1)], np.int64)
    body = reader.rest()
    if int(size.sum()) > len(body):
        raise damaged("sub-streams longer than their stream")
    begins = np.concatenate([[0], np.cumsum(size)]).astype(np.int64)
    ends = np.append(begins[1:], len(body)) * 8
    padded = np.zeros(len(body) + 4, np.uint32)
    padded[: len(body)] = np.frombuffer(body, np.uint8)
    window = padded[:-3] << np.uint32(24)
    for part in (1, 2, 3):
        window |= padded[part : len(padded) - 3 + part] << np.uint32(24 - 8 * part)
    run = -(-count // lanes)
    if run * (lanes - 1) >= count:
        raise damaged("more sub-streams than symbols")
    if lanes <= rans.FEW_LANES:
        return _decode_few(window.data, entry.data, begins.tolist(), ends.tolist(), count, run)
    symbols = np.empty((run, lanes), np.uint16)
    position = begins * 8
    last = count - run * (lanes - 1)
    limit = (len(window) - 1) * 8
    drop = np.uint32(32 - MAX_LENGTH)
    for step in range(run):
        if step == last:  # the last sub-stream is shorter than the others
            lanes -= 1
            if position[lanes] > ends[lanes]:
                raise damaged("a sub-stream ends early")
            stopped = int(position[lanes])
            position = position[:lanes]
        if position.max() > limit:
            raise damaged("a sub-stream ends early")
        found = window.take(position >> 3)
        found <<= (position & 7).astype(np.uint32)
        found >>= drop
        found = entry.take(found)
        symbols[step, :lanes] = found >> np.uint32(4)
        position += found & np.uint32(15)
    finished = position if last == run else np.append(position, stopped)
    if np.any(-(-finished // 8) * 8 != ends):
        raise damaged("a sub-stream does not end where it should")
    flat = symbols.T.reshape(-1)
    return flat[:count]


def _decode_few(
    window: memoryview, entry: memoryview, begins: list[int], ends: list[int], count: int, run: int
) -> Array:
    """The same, a symbol at a time: for a few sub-streams faster than array operations of so few elements."""
    found: list[int] = []
    limit, drop = (len(window) - 1) * 8, 32 - MAX_LENGTH
    for begin, end in zip(begins, ends, strict=True):
        position = begin * 8
        for _ in range(min(run, count - len(found))):
            if position > limit:
                raise damaged("a sub-stream ends early")
            code = entry[(window[position >> 3] << (position & 7) & 0xFFFFFFFF) >> drop]
            found.append(code)
            position += code & 15
        if -(-position // 8) * 8 != end:
            raise damaged("a sub-stream does not end where it should")
    return (np.array(found, np.uint32) >> np.uint32(4)).astype(np.uint16)
