"""Distinct values of large arrays, found fast: the few values of shared weights, and equal blocks."""

from __future__ import annotations

import numpy as np

from harness.storage.fields import Array

_CHUNK = 1 << 18
_HASH_BITS = 18
_SMALL = 1 << 15


def few(values: Array, most: int) -> tuple[Array, Array] | None:
    """The distinct values and each value's index, or None where there are more than ``most``.

    Parameters
    ----------
    values : ndarray of unsigned integers, shape (n,)
    most : int
        At most 65,536.

    Returns
    -------
    tuple of ndarray, or None
        Sorted distinct values (k,) of the same dtype, and indices (n,) of uint8 or uint16.
    """
    if len(values) <= _SMALL:
        book, index = np.unique(values, return_inverse=True)
        return None if len(book) > most else (book, index.astype(_index_type(len(book))))
    if values.itemsize <= 2:
        book = np.flatnonzero(np.bincount(values, minlength=1))
        if len(book) > most:
            return None
        table = np.zeros(int(book[-1]) + 1, _index_type(len(book)))
        table[book] = np.arange(len(book))
        return book.astype(values.dtype), table.take(values)
    sample = values[:: max(1, len(values) // _SMALL)]
    book = np.unique(sample)
    if len(book) > most or len(book) * 2 > len(sample):
        return None
    index = np.empty(len(values), np.uint16)
    find = _Finder(book)
    # A chunk that has values which the book lacks makes it larger; the chunks before it are looked up again at last.
    renewed = 0
    for begin in range(0, len(values), _CHUNK):
        chunk = values[begin : begin + _CHUNK]
        found = find(chunk)
        other = book.take(found) != chunk
        if other.any():
            book = np.union1d(book, chunk[other])
            if len(book) > most:
                return None
            find, renewed = _Finder(book), begin
            found = find(chunk)
        index[begin : begin + _CHUNK] = found
    for begin in range(0, renewed, _CHUNK):
        index[begin : begin + _CHUNK] = find(values[begin : begin + _CHUNK])
    return book, index.astype(_index_type(len(book)), copy=False)


def _index_type(size: int) -> type[np.uint8 | np.uint16]:
    return np.uint8 if size <= 256 else np.uint16


class _Finder:
    """Index in a sorted book: by a hash table, and by bisection for the values whose slot is another's."""

    def __init__(self, book: Array) -> None:
        self.book = book
        width = book.itemsize * 8
        self.shift = book.dtype.type(width - _HASH_BITS)
        # Odd multipliers, the same in every run; a random one is free of collisions for 300 values about every other
        # time, and for many more values none is.
        generator = np.random.default_rng(0)
        for _ in range(40 if len(book) <= 600 else 1):
            self.factor = book.dtype.type(int(generator.integers(0, 2**63)) * 2 % 2**width | 1)
            slots = (book * self.factor) >> self.shift
            self.exact = len(np.unique(slots)) == len(book)
            if self.exact:
                break
        self.table = np.zeros(1 << _HASH_BITS, _index_type(len(book)))
        self.table[slots] = np.arange(len(book))

    def __call__(self, values: Array) -> Array:
        """Indices of values that are in the book; of others any index."""
        found: Array = self.table.take((values * self.factor) >> self.shift)
        if not self.exact:
            other = np.flatnonzero(self.book.take(found) != values)
            found[other] = np.minimum(np.searchsorted(self.book, values[other]), len(self.book) - 1)
        return found


def mixed(blocks: Array) -> Array:
    """A hash of each block: uint64, shape (n,) for blocks (n, size)."""
    size = blocks.shape[1]
    numbers: Array = np.random.default_rng(size).integers(0, 2**63, (size,))
    factors = [np.uint64(int(number) * 2 + 1) for number in numbers]
    result = np.zeros(len(blocks), np.uint64)
    for column in range(size):
        part = blocks[:, column].astype(np.uint64)
        part += np.uint64(1)
        part *= factors[column]
        result += part
    return result


def few_blocks(values: Array, size: int, most: int) -> tuple[Array, Array] | None:
    """The distinct blocks of ``size`` consecutive values and each block's index, or None where there are too many.

    Parameters
    ----------
    values : ndarray of unsigned integers, shape (n,)
        n is a multiple of ``size``.
    size : int
        Values in a block.
    most : int
        Distinct blocks.

    Returns
    -------
    tuple of ndarray, or None
        Blocks (k, size) and indices (n / size,).
    """
    blocks = values.reshape(-1, size)
    sample = mixed(blocks[:: max(1, len(blocks) // 2048)])
    if len(np.unique(sample)) > 0.75 * min(len(sample), max(most, 1)) + 16:
        return None
    found = few(mixed(blocks), most)
    if found is None:
        return None
    index = found[1]
    holder = np.zeros(len(found[0]), np.int64)
    holder[index[::-1]] = np.arange(len(index) - 1, -1, -1)
    book = blocks[holder]
    for begin in range(0, len(blocks), _CHUNK):
        if not np.array_equal(book.take(index[begin : begin + _CHUNK], axis=0), blocks[begin : begin + _CHUNK]):
            return None  # two different blocks share a hash
    return book, index
