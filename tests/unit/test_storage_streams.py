"""Entropy coders and number lists against their definitions."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import DataError
from harness.storage import distinct, fields, huffman, rans, sparse, streams
from harness.storage.fields import Reader, Writer
from harness.storage.streams import Entropy, Trace

ENTROPIES: tuple[Entropy, ...] = ("auto", "huffman", "rans", "none")


def drawn(size: int, alphabet: int, seed: int = 0, concentration: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.choice(alphabet, size, p=generator.dirichlet(np.full(alphabet, concentration))).astype(np.uint16)


def shannon_bytes(symbols: np.ndarray) -> float:
    """The textbook formula: -sum n_i log2(n_i / n) bits."""
    counts = [int(count) for count in np.unique(symbols, return_counts=True)[1]]
    return -sum(count * math.log2(count / len(symbols)) for count in counts) / 8


def coded(symbols: np.ndarray, alphabet: int, entropy: Entropy) -> tuple[bytes, int]:
    plan = streams.plan(np.bincount(symbols, minlength=alphabet), lambda: symbols, entropy)
    out = Writer()
    plan.write(out)
    return bytes(out.data), plan.size


@pytest.mark.parametrize("entropy", ENTROPIES)
@pytest.mark.parametrize(
    ("size", "alphabet"), [(0, 5), (1, 1), (1, 2), (2, 2), (7, 3), (300, 256), (5000, 64), (70000, 9), (70000, 4096)]
)
def test_a_stream_is_read_back(size: int, alphabet: int, entropy: Entropy) -> None:
    symbols = drawn(size, alphabet)
    data, planned = coded(symbols, alphabet, entropy)
    reader, trace = Reader(memoryview(data)), Trace()
    assert np.array_equal(streams.read(reader, size, alphabet, trace), symbols)
    reader.finish()
    assert len(data) == pytest.approx(planned, abs=4 + 0.005 * planned)
    assert trace.bits / 8 <= len(data)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=400), st.sampled_from(ENTROPIES))
@settings(max_examples=60, deadline=None)
def test_any_stream_is_read_back(values: list[int], entropy: Entropy) -> None:
    symbols = np.array(values, np.uint16)
    data, _ = coded(symbols, 301, entropy)
    assert np.array_equal(streams.read(Reader(memoryview(data)), len(values), 301), symbols)


@pytest.mark.parametrize("concentration", [0.3, 1.0, 20.0])
def test_rans_comes_within_two_percent_of_the_shannon_bound_at_20_kb(concentration: float) -> None:
    symbols = drawn(40000, 32, 1, concentration)
    data, _ = coded(symbols, 32, "rans")
    assert data[0] == 3
    assert shannon_bytes(symbols) < len(data) < 1.02 * shannon_bytes(symbols)


def test_huffman_lengths_are_the_optimal_ones() -> None:
    counts = np.array([0, 5, 9, 12, 13, 16, 45, 0, 45, 45])
    heap = [int(count) for count in counts if count]
    heapq.heapify(heap)
    optimum = 0
    while len(heap) > 1:  # the sum of the merged weights is the cost of an optimal prefix code
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        optimum += merged
        heapq.heappush(heap, merged)
    length = huffman.lengths(counts)
    assert int((length * counts).sum()) == optimum
    assert np.array_equal(length > 0, counts > 0)


@pytest.mark.parametrize("size", [18, 24, 300])
def test_huffman_lengths_are_limited_and_complete(size: int) -> None:
    counts = np.array([int(1.7**i) + 1 for i in range(min(size, 60))] + [1] * (size - min(size, 60)))
    length = huffman.lengths(counts)
    assert length.max() <= huffman.MAX_LENGTH
    assert sum(2.0 ** -float(bits) for bits in length) == 1.0


def test_huffman_bits_are_the_canonical_code_in_order() -> None:
    symbols = np.array([2, 0, 1, 2, 3, 0, 0], np.uint16)
    # lengths 1, 2, 3, 3: codes 0, 10, 110, 111
    data = huffman.encode(symbols, np.array([1, 2, 3, 3]), 1)
    assert data == int("1100101101110000", 2).to_bytes(2, "big")


@pytest.mark.parametrize("lanes", [1, 2, 7, 100])
def test_lanes_change_nothing_but_the_length(lanes: int) -> None:
    symbols = drawn(1000, 20)
    counts = np.bincount(symbols, minlength=20)
    frequencies = rans.quantised(counts, 12)
    data = rans.encode(symbols, frequencies, rans.starts(frequencies), 12, lanes)
    assert np.array_equal(rans.decode(memoryview(data), 1000, frequencies[None], 12, lanes), symbols)
    runs = -(-1000 // -(-1000 // lanes))
    data = huffman.encode(symbols, huffman.lengths(counts), runs)
    assert np.array_equal(huffman.decode(memoryview(data), 1000, huffman.lengths(counts), runs), symbols)


def test_rans_is_the_recurrence_of_the_paper() -> None:
    """One lane against big integers: x -> (x // f) * M + c + x % f, without renormalisation."""
    symbols, frequencies, bits = np.array([0, 1, 1, 0, 2], np.uint16), np.array([8, 4, 4]), 4
    state = 1 << 16
    for symbol in reversed(symbols.tolist()):
        f, c = int(frequencies[symbol]), int(frequencies[:symbol].sum())
        state = (state // f << bits) + c + state % f
    data = rans.encode(symbols, frequencies, rans.starts(frequencies), bits, 1)
    assert int.from_bytes(data, "little") == state


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=80).filter(lambda c: sum(map(bool, c)) > 1))
@settings(max_examples=60, deadline=None)
def test_quantised_frequencies_fit_the_scale(counts: list[int]) -> None:
    frequencies = rans.quantised(np.array(counts), 8)
    assert frequencies.sum() == 256
    assert np.array_equal(frequencies > 0, np.array(counts) > 0)


@given(st.lists(st.integers(0, 32768), max_size=100))
@settings(max_examples=100, deadline=None)
def test_number_lists_are_read_back(values: list[int]) -> None:
    array = np.array(values, np.int64)
    data = fields.write_numbers(array)
    assert len(data) == fields.numbers_size(array)
    reader = Reader(memoryview(data + b"\xff"))
    assert fields.read_numbers(reader, len(values), 32768).tolist() == values
    assert reader.position == len(data)


@pytest.mark.parametrize("bits", [0, 1, 3, 4, 8, 11, 16, 17, 32])
def test_packing(bits: int) -> None:
    symbols = np.random.default_rng(0).integers(0, 2**bits, 1000).astype(np.uint32)
    data = fields.pack(symbols, bits)
    assert len(data) == fields.packed_size(1000, bits)
    text = "".join(f"{symbol:0{bits}b}" for symbol in symbols.tolist()) if bits else ""
    assert data == (int(text, 2).to_bytes(len(data), "big") if bits else b"")
    assert np.array_equal(fields.unpack(memoryview(data), 1000, bits), symbols)


@pytest.mark.parametrize("kinds", [3, 700, 5000])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_distinct_values_of_large_arrays(kinds: int, dtype: type) -> None:
    generator = np.random.default_rng(0)
    book = np.unique(generator.integers(0, np.iinfo(dtype).max, kinds, dtype=dtype))
    values = book[generator.integers(0, len(book), 300_000)]
    values[:5] = 0  # a value that the sample may miss
    found = distinct.few(values, 1 << 16)
    assert found is not None
    assert np.array_equal(found[0], np.unique(values))
    assert np.array_equal(found[0][found[1]], values)
    assert distinct.few(values, 2) is None


def test_fillers_are_those_of_the_paper() -> None:
    """Figure 2 of Han et al. 2016: entries at 1, 4 and 15, three bits: a filler 8 after the second."""
    positions, values = np.array([1, 4, 15]), np.array([34, 9, 17], np.uint8)
    symbols, stored = sparse.with_fillers(positions, values, 3, 0)
    assert (symbols + 1).tolist() == [2, 3, 8, 3]  # differences, from -1
    assert stored.tolist() == [34, 9, 0, 17]


@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("entropy", ENTROPIES)
def test_every_way_to_store_positions_is_read_back(density: float, entropy: Entropy) -> None:
    generator = np.random.default_rng(0)
    columns = generator.uniform(0, 2, 90)
    mask = (generator.random((70, 90)) < np.minimum(density * columns, 1)).ravel()
    kinds = set()
    for option in sparse.options(mask, (70, 90), entropy):
        out = Writer()
        option.plan.write(out)
        assert len(out.data) == pytest.approx(option.plan.size, abs=10, rel=0.02)
        reader = Reader(memoryview(out.data))
        positions = np.flatnonzero(sparse.read(reader, mask.size, Trace()))
        reader.finish()
        assert len(positions) == mask.sum() + option.fillers
        assert set(np.flatnonzero(mask)) <= set(positions)
        if not option.fillers:
            assert np.array_equal(positions, np.flatnonzero(mask))
        kinds.add(sparse.NAMES[option.kind])
    assert kinds == set(sparse.NAMES) - (set() if entropy in ("auto", "rans") else {"density-gaps"})


@pytest.mark.parametrize("how", [4, 255])
def test_unknown_kinds_of_streams_are_refused(how: int) -> None:
    with pytest.raises(DataError, match="unknown kind"):
        streams.read(Reader(memoryview(bytes([how, 0, 0, 0]))), 5, 16)
