"""The container's codec on 10 million float32 weights: speed each way, and sizes beside general compressors.

Measured on a server CPU (x86-64, two cores, AVX-512), one thread; CPU seconds, best of three:

======================= ================ ======== ======== ============ =========== ======== ========
weights                 representation   encode   decode   container    above       best of  brotli
                                         MB/s     MB/s     bytes        Shannon     zstd/xz  -11
======================= ================ ======== ======== ============ =========== ======== ========
90 % zeros, 32 values   gaps + codebook  119      267         973,166   0.16 %      996,084   981,903
16 values               codebook         199      242       4,678,174   0.15 %    4,695,891 4,689,793
int8 x scale of a row   scaled integers  68       284       8,941,981   0.17 %            -         -
normal                  dense            71       135      33,167,199   0.07 %            -         -
======================= ================ ======== ======== ============ =========== ======== ========

gzip -9 comes to 1,110,999 and 4,718,560 bytes.

MB/s are of float32 weights. The general compressors (zstd -19, xz -9, gzip -9, brotli -11) get what Deep Compression
stores before its entropy coding: for the pruned tensor 8-bit relative indices (with fillers where a gap does not fit);
the codebook; and the indices, one byte each or packed to bits (the better of the two counts). brotli is measured where
it is installed; it is no dependency.
"""

from __future__ import annotations

import functools
import gzip
import lzma
import time
from collections.abc import Callable

import numpy as np
import torch
import zstandard

from harness import environment
from harness.storage import fields, sparse
from harness.storage.container import Container

WEIGHTS = (2500, 4000)
REPEATS = 3


def nearest(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, values)]


def sparse_codebook(generator: np.random.Generator) -> np.ndarray:
    """90 % zeros, 32 values."""
    weight = generator.standard_normal(WEIGHTS, dtype=np.float32)
    threshold = np.float32(1.6449)
    side = np.sort(generator.uniform(threshold, 3.5, 16).astype(np.float32))
    return np.where(np.abs(weight) > threshold, nearest(weight, np.concatenate([-side[::-1], side])), np.float32(0))


def dense_codebook(generator: np.random.Generator) -> np.ndarray:
    """16 values."""
    centres = np.sort(generator.normal(0, 1.5, 16)).astype(np.float32)
    return nearest(generator.standard_normal(WEIGHTS, dtype=np.float32), centres)


def int8_channels(generator: np.random.Generator) -> np.ndarray:
    """8-bit integers times a scale for each row."""
    weight = generator.standard_normal(WEIGHTS, dtype=np.float32)
    scale = np.abs(weight).max(1, keepdims=True) / np.float32(127)
    return np.rint(weight / scale) * scale


def unstructured(generator: np.random.Generator) -> np.ndarray:
    """Normal weights as trained."""
    return generator.standard_normal(WEIGHTS, dtype=np.float32)


def plain_codes(weight: np.ndarray) -> list[bytes]:
    """Indices and codes stored plainly: one byte an index, and packed."""
    values = weight.ravel()
    head = b""
    if np.count_nonzero(values) < len(values) // 2:
        places, stored = sparse.with_fillers(np.flatnonzero(values), values[values != 0], 8, 0)
        head, values = places.astype(np.uint8).tobytes(), stored
    book, index = np.unique(values.view(np.uint32), return_inverse=True)
    if len(book) > 256:
        return [weight.tobytes()]
    head += book.tobytes()
    return [
        head + index.astype(np.uint8).tobytes(),
        head + fields.pack(index.astype(np.uint8), fields.width(len(book))),
    ]


def compressors() -> dict[str, Callable[[bytes], bytes]]:
    found: dict[str, Callable[[bytes], bytes]] = {
        "zstd -19": zstandard.ZstdCompressor(level=19).compress,
        "xz -9": lambda data: lzma.compress(data, preset=9),
        "gzip -9": lambda data: gzip.compress(data, compresslevel=9, mtime=0),
    }
    try:
        import brotli
    except ImportError:
        return found
    return {**found, "brotli -11": lambda data: brotli.compress(data, quality=11)}


def seconds(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.process_time()
        work()
        best = min(best, time.process_time() - begin)
    return best


def main() -> None:
    torch.set_num_threads(1)
    for make in (sparse_codebook, dense_codebook, int8_channels, unstructured):
        weight = make(np.random.default_rng(0))
        state, container = {"weight": torch.from_numpy(weight)}, Container()
        data = container.encode(state)
        assert torch.equal(container.decode(data)["weight"].view(torch.int32), state["weight"].view(torch.int32))
        encode = seconds(functools.partial(container.encode, state))
        decode = seconds(functools.partial(container.decode, data))
        line = container.report(data)[0]
        print(f"{make.__doc__} {line['representation']}")
        speeds = [f"{weight.nbytes / each / 1e6:.0f} MB/s" for each in (encode, decode)]
        print(f"  encode {speeds[0]}, decode {speeds[1]} of float32")
        print(f"  container {len(data):,} bytes, {len(data) / line['shannon_bytes'] - 1:.2%} above the Shannon bound")
        if make in (sparse_codebook, dense_codebook):
            plain = plain_codes(weight)
            for name, compress in compressors().items():
                print(f"  {name} of the plain codes {min(len(compress(part)) for part in plain):,} bytes", flush=True)
    print(environment.machine()["cpu_model"], environment.conditions())


if __name__ == "__main__":
    main()
