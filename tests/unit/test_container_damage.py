"""Damaged and hostile containers: refused with one kind of error, in bounded memory and time."""

from __future__ import annotations

import hashlib
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.errors import DataError
from harness.storage.container import CHECKSUM_BYTES, MAGIC, Container
from harness.storage.fields import Writer

MOST = 1 << 20


def small_state() -> dict[str, Tensor]:
    """One tensor of every representation and stream, small."""
    generator = np.random.default_rng(0)
    normal = generator.normal(size=(12, 24)).astype(np.float32)
    scale = np.abs(normal).max(1, keepdims=True) / np.float32(7)
    columns = np.where(np.arange(50) % 3 == 0, 0.3, 0.004)
    arrays = {
        "dense": normal[:4],
        "pruned": np.where(np.abs(normal) > 1.5, np.round(normal), 0).astype(np.float32) + 0.0,
        "codebook": np.round(normal).astype(np.float32) + 0.0,
        "scaled": np.rint(normal / scale) * scale,
        "blocks": normal.reshape(-1, 8)[generator.integers(0, 4, 40)],
        "density": (generator.random((120, 50)) < columns).astype(np.int8),
        "step": np.array(7),
        "none": np.zeros((0, 3), np.float32),
    }
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {**state, "shared": state["codebook"], "equal": state["dense"].clone()}


@pytest.fixture(scope="module")
def data() -> bytes:
    return Container().encode(small_state())


def signed(body: bytes) -> bytes:
    """What an attacker does: the checksum of the changed content."""
    return body + hashlib.blake2b(body, digest_size=CHECKSUM_BYTES).digest()


def refused_or_read(data: bytes) -> None:
    """Nothing but DataError, and no more tensors than allowed (a copy is counted, a shared tensor is none)."""
    try:
        decoded = Container().decode(data, max_bytes=MOST)
    except DataError:
        return
    assert sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in decoded.values()}.values()) <= MOST


def test_the_small_file_has_every_representation(data: bytes) -> None:
    names = " ".join(line["representation"] for line in Container().report(data))
    for name in ("dense", "codebook", "scaled-integers", "block-codebook", "density-gaps", "number", "shared", "equal"):
        assert name in names


def test_every_byte_flipped_once_is_refused(data: bytes) -> None:
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8 or 1
        with pytest.raises(DataError):
            Container().decode(bytes(changed))


def test_every_truncation_is_refused(data: bytes) -> None:
    for size in range(len(data)):
        with pytest.raises(DataError):
            Container().decode(data[:size])
    with pytest.raises(DataError):
        Container().decode(data + b"\0")


def test_every_truncation_is_refused_with_its_checksum_set_right(data: bytes) -> None:
    for size in range(len(data) - CHECKSUM_BYTES):
        with pytest.raises(DataError):
            Container().decode(signed(data[:size]))


def test_every_byte_changed_with_the_checksum_set_right_is_refused_or_read(data: bytes) -> None:
    body = data[:-CHECKSUM_BYTES]
    generator = np.random.default_rng(0)
    for place in range(len(body)):
        changed = bytearray(body)
        changed[place] ^= int(generator.integers(1, 256))
        refused_or_read(signed(bytes(changed)))


def test_memory_stays_bounded_whatever_a_byte_says(data: bytes) -> None:
    body = data[:-CHECKSUM_BYTES]
    tracemalloc.start()
    for place in range(0, len(body), 7):
        changed = bytearray(body)
        changed[place] ^= 0xFF
        refused_or_read(signed(bytes(changed)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * MOST


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4)), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_many_changes_with_the_checksum_set_right_are_refused_or_read(changes: list[tuple[float, bytes]]) -> None:
    body = bytearray(_BODY)
    for place, content in changes:
        begin = 8 + int(place * (len(body) - 8))
        body[begin : begin + len(content)] = content
    refused_or_read(signed(bytes(body)))


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_behind_the_magic_are_refused_or_read(content: bytes) -> None:
    refused_or_read(signed(MAGIC + b"\1" + content))


_BODY = Container().encode(small_state())[:-CHECKSUM_BYTES]


def forged(
    shape: tuple[int, ...], payload: bytes, *, dtype: int = 0, name: bytes = b"w", size: int | None = None
) -> bytes:
    """A file of one tensor whose directory says what is given."""
    directory, head = Writer(), Writer()
    directory.varint(0)
    directory.varint(len(name))
    directory.raw(name)
    directory.raw(bytes([dtype << 2]))
    directory.varint(len(shape))
    for number in (*shape, len(payload) if size is None else size):
        directory.varint(number)
    head.raw(MAGIC + b"\1")
    head.varint(1)
    head.varint(len(directory.data))
    return signed(bytes(head.data) + bytes(directory.data) + payload)


CONSTANT_PLANES = b"\0\0" + b"\1\0" * 4


def test_a_forged_file_is_read_where_it_is_right() -> None:
    assert torch.equal(Container().decode(forged((2, 3), CONSTANT_PLANES))["w"], torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (forged((2**30,), CONSTANT_PLANES), "max_bytes"),
        (forged((2**40, 2**40), CONSTANT_PLANES), "shape"),
        (forged((0, 2**60, 2**60), b"\0\0" + b"\0" * 4), "shape"),
        (forged((2, 3), CONSTANT_PLANES, size=2**50), "add up"),
        (forged((2, 3), CONSTANT_PLANES + b"\0"), "left over"),
        (forged((2, 3), CONSTANT_PLANES[:-1]), "announced"),
        (forged((2, 3), CONSTANT_PLANES, dtype=60), "unknown type"),
        (forged((2, 3), CONSTANT_PLANES, name=b"\xff"), "name"),
        (forged((2, 3), b"\x09"), "unknown kind"),
        (b"PK" + forged((2, 3), CONSTANT_PLANES), "magic"),
        (forged((2, 3), CONSTANT_PLANES).replace(MAGIC + b"\1", MAGIC + b"\2"), "version 2"),
    ],
)
def test_sizes_that_lie_are_named(content: bytes, message: str) -> None:
    with pytest.raises(DataError):
        Container().decode(content, max_bytes=MOST)  # what a first call imports is not counted
    tracemalloc.start()
    with pytest.raises(DataError, match=message):
        Container().decode(content, max_bytes=MOST)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_announced_sizes_above_the_limit_are_refused_before_anything_is_allocated() -> None:
    state = {"w": torch.zeros(1000, 1000)}
    data = Container().encode(state)
    assert len(data) < 100
    with pytest.raises(DataError, match="max_bytes"):
        Container().decode(data, max_bytes=3_999_999)
    assert torch.equal(Container().decode(data, max_bytes=4_000_000)["w"], state["w"])


def test_a_stream_of_many_symbols_in_few_bytes_is_refused() -> None:
    """rANS codes near-certain symbols in next to nothing: a billion of them would decode for hours."""
    frequencies = bytes([0b00_0_01110, 0b11111111, 0b11111110, 0b1_0000000, 0])
    payload = b"\1\2" + b"\0\0" + b"\1\0" * 3 + b"\1\0" + b"\3" + frequencies + b"\1\4" + bytes([0, 0, 1, 0])
    begin = time.perf_counter()
    with pytest.raises(DataError):
        Container().decode(forged((2**29,), payload), max_bytes=2**32)
    assert time.perf_counter() - begin < 5


def test_names_that_grow_from_few_bytes_are_bounded() -> None:
    directory, head = Writer(), Writer()
    count = 300
    for number in range(count):
        directory.varint(number * 100)
        directory.varint(100)
        directory.raw(b"x" * 100)
        directory.raw(bytes([0, 0]))
        directory.varint(0)
    head.raw(MAGIC + b"\1")
    head.varint(count)
    head.varint(len(directory.data))
    with pytest.raises(DataError, match="at most"):
        Container().decode(signed(bytes(head.data) + bytes(directory.data)))


SPARSE_OVER_ALL = b"\2\1" + b"\1"  # filled with ones, positions by relative index


def sparse_over_all(count: int, inner: bytes) -> bytes:
    """A sparse array that stores every element, so that nothing is saved and everything is held twice."""
    number = Writer()
    number.varint(count)
    return SPARSE_OVER_ALL + bytes(number.data) + b"\0\1\0" + inner


@pytest.mark.parametrize(
    ("dtype", "payload"),
    [
        (8, lambda n: b"\0\0\1\0"),
        (8, lambda n: sparse_over_all(n, b"\0\0\1\0")),
        (8, lambda n: b"\1\2\0\0\1\0\1\0"),
        (8, lambda n: b"\4\1\2\0\0\1\0\1\0"),
        (0, lambda n: sparse_over_all(n, CONSTANT_PLANES)),
    ],
    ids=["dense", "sparse", "codebook", "blocks", "sparse float32"],
)
def test_a_bomb_takes_a_small_multiple_of_what_it_announces(dtype: int, payload: Callable[[int], bytes]) -> None:
    count = 1 << 22
    content = forged((count,), payload(count), dtype=dtype)
    plain = count * (4 if dtype == 0 else 1)
    tracemalloc.start()
    try:
        Container().decode(content, max_bytes=plain)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * plain + (8 << 20)


def test_sparse_in_sparse_is_refused() -> None:
    inner = sparse_over_all(100, b"\0\0\1\0")
    with pytest.raises(DataError, match="representation"):
        Container().decode(forged((100,), sparse_over_all(100, inner), dtype=8))


def test_without_a_limit_a_short_file_cannot_stand_for_gigabytes() -> None:
    with pytest.raises(DataError, match="max_bytes"):
        Container().decode(forged((1 << 32,), b"\0\0\1\0", dtype=8))
    state = {"w": torch.zeros(4000, 4000)}
    assert torch.equal(Container().decode(Container().encode(state))["w"], state["w"])


def test_a_directory_of_a_million_names_is_refused_before_it_is_read() -> None:
    head = Writer()
    head.raw(MAGIC + b"\1")
    head.varint(1_000_000)
    head.varint(0)
    with pytest.raises(DataError, match="at most"):
        Container().decode(signed(bytes(head.data) + bytes(1_000_000)))


def test_names_that_repeat_a_long_beginning_are_bounded() -> None:
    directory, head = Writer(), Writer()
    count = 2000
    directory.raw(b"\0\x80\x08" + b"a" * 1024 + bytes([8 << 2, 1, 0, 3]))
    for number in range(count):
        directory.raw(b"\xfc\7\4" + f"{number:04}".encode() + bytes([8 << 2 | 1, 1, 0, 0]))
    head.raw(MAGIC + b"\1")
    head.varint(count + 1)
    head.varint(len(directory.data))
    with pytest.raises(DataError, match="names"):
        Container().decode(signed(bytes(head.data) + bytes(directory.data) + b"\0\0\0"))
