"""The container: lossless for every dtype, and as small as the streams' entropy allows."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from harness.errors import DataError, InputError
from harness.storage.container import Container, load, save
from harness.storage.streams import Entropy

ENTROPIES: tuple[Entropy, ...] = ("auto", "huffman", "rans", "none")
DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.bool,
]  # fmt: skip


def raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""


def check(state: dict[str, Tensor], entropy: Entropy = "auto") -> list[dict[str, object]]:
    """Encode, decode, compare bit for bit; returns the report."""
    container = Container(entropy=entropy)
    data = container.encode(state)
    assert container.encode(state) == data
    decoded = container.decode(data)
    assert list(decoded) == list(state)
    for name, tensor in state.items():
        assert decoded[name].dtype == tensor.dtype
        assert decoded[name].shape == tensor.shape
        assert raw(decoded[name]) == raw(tensor), name
    report = container.report(data)
    assert (
        sum(line["stored_bytes"] for line in report) <= len(data) <= sum(line["stored_bytes"] for line in report) + 34
    )
    return report


def representation(tensor: Tensor, entropy: Entropy = "auto") -> str:
    return str(check({"w": tensor}, entropy)[0]["representation"])


def shared(values: np.ndarray, clusters: int) -> np.ndarray:
    """Weights replaced by the centres of Lloyd's algorithm, begun evenly spaced."""
    centres = np.linspace(values.min(), values.max(), clusters)
    for _ in range(30):
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
        count, total = np.bincount(nearest, minlength=clusters), np.bincount(nearest, values, minlength=clusters)
        centres = np.where(count > 0, total / np.maximum(count, 1), centres)
    return centres.astype(np.float32)[np.searchsorted((centres[1:] + centres[:-1]) / 2, values)]


def lenet(clusters: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """LeNet-300-100: normal weights, 8, 9 and 26 % of them kept by magnitude and shared, and biases."""
    generator = np.random.default_rng(seed)
    state = {}
    for number, (out, inputs, kept) in enumerate(((300, 784, 0.08), (100, 300, 0.09), (10, 100, 0.26))):
        weight = generator.normal(0, inputs**-0.5, (out, inputs)).astype(np.float32)
        mask = np.abs(weight) > np.quantile(np.abs(weight), 1 - kept)
        weight[~mask] = 0
        weight[mask] = shared(weight[mask], clusters)
        state[f"fc{number + 1}.weight"] = torch.from_numpy(weight)
        state[f"fc{number + 1}.bias"] = torch.from_numpy(generator.normal(0, 0.05, out).astype(np.float32))
    return state


def codes(state: dict[str, Tensor], byte_wide: bool) -> bytes:
    """What Deep Compression stores, without entropy coding: 8-bit relative indices, indices, codebooks, biases."""
    parts = []
    for tensor in state.values():
        values = tensor.numpy().ravel()
        if tensor.dim() == 1:
            parts.append(values.tobytes())
            continue
        positions = np.flatnonzero(values)
        gaps = np.diff(positions, prepend=-1) - 1
        assert gaps.max() < 256, "no fillers needed"
        book, index = np.unique(values[positions], return_inverse=True)
        parts += [book.tobytes(), gaps.astype(np.uint8).tobytes()]
        if byte_wide:
            parts.append(index.astype(np.uint8).tobytes())
        else:
            bits = int(len(book) - 1).bit_length()
            parts.append(np.packbits(np.unpackbits(index.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]).tobytes())
    return b"".join(parts)


@pytest.mark.parametrize("entropy", ENTROPIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_dtype_and_shape_comes_back(dtype: torch.dtype, entropy: Entropy) -> None:
    generator = torch.Generator().manual_seed(0)

    def bits(*shape: int) -> Tensor:
        tensor = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
        return (tensor & 1 if dtype == torch.bool else tensor).view(dtype).reshape(shape)

    few = bits(5)
    state = {
        "scalar": bits(1).reshape(()),
        "empty": bits(0, 3),
        "one": bits(1),
        "random": bits(9, 7),
        "": bits(3),
        "few values": few[torch.randint(0, 5, (20, 30), generator=generator)],
        "sparse": torch.where(torch.rand(40, 30, generator=generator) < 0.1, 1.0, 0.0).to(dtype),
        "zeros": torch.zeros(8, 8, dtype=dtype),
        "transposed": bits(6, 11).t(),
    }
    check(state, entropy)


def test_signed_zeros_infinities_and_nan_payloads_come_back() -> None:
    patterns = [0x80000000, 0x7FC00001, 0xFFC12345, 0x7F800001, 0x7F800000, 0xFF800000, 1, 0x3F800000]
    special = torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)
    check({"special": special, "many": special.repeat(500).reshape(40, 100)})


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_anything_comes_back(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES[:-1]))
    shape = data.draw(st.lists(st.integers(0, 6), max_size=3))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    content = data.draw(st.one_of(st.binary(min_size=size, max_size=size), st.just(bytes(size))))
    tensor = (
        torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype) if size else torch.empty(0, dtype=dtype)
    )
    check({data.draw(st.text(max_size=10)): tensor.reshape(shape)}, data.draw(st.sampled_from(ENTROPIES)))


def test_shared_tensors_are_stored_once_and_stay_shared() -> None:
    weight = torch.randn(50, 40)
    state = {"a": weight, "b": weight, "copy": weight.clone(), "part": weight[:25], "c": weight.t()}
    report = check(state)
    assert [line["representation"] for line in report[1:3]] == ["shared with a", "equal with a"]
    assert report[1]["plain_bytes"] == 0
    assert report[2]["plain_bytes"] == 8000
    decoded = Container().decode(Container().encode(state))
    assert decoded["a"] is decoded["b"]
    assert decoded["a"] is not decoded["copy"]
    assert Container().sizes(state)["plain_bytes"] == 8000 * 3 + 4000


def test_a_model_s_state_loads_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10))
    size = save(model.state_dict(), tmp_path / "weights")
    assert size == (tmp_path / "weights").stat().st_size
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10))
    other.load_state_dict(load(tmp_path / "weights"))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model.eval()(x), other.eval()(x))
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "none")


# --- the choice ----------------------------------------------------------------------------------------------------


def test_each_structure_is_found() -> None:
    generator = np.random.default_rng(0)
    normal = generator.normal(size=(64, 300)).astype(np.float32)
    assert representation(torch.from_numpy(normal)) == "dense"
    assert representation(torch.from_numpy(np.clip(np.round(normal * 2), -4, 4) + np.float32(9))) == "codebook"
    scale = np.abs(normal).max(1, keepdims=True) / np.float32(127)
    assert representation(torch.from_numpy(np.rint(normal / scale) * scale)) == "scaled-integers"
    grouped = normal[:, :256].reshape(-1, 32)
    scale = np.abs(grouped).max(1, keepdims=True) / np.float32(7)
    four_bits = (np.rint(grouped / scale) * scale).reshape(64, 256)
    assert "scaled-integers" in representation(torch.from_numpy(four_bits))
    blocks = normal.reshape(-1)[: 32 * 9].reshape(32, 9)[generator.integers(0, 32, 64 * 16)]
    assert representation(torch.from_numpy(blocks.reshape(64, 16, 3, 3))) == "block-codebook"
    pruned = normal * (np.abs(normal) > 1.7)
    assert representation(torch.from_numpy(pruned + 0.0)).endswith("dense")
    assert representation(torch.from_numpy(pruned + 0.0)).split(" + ")[0] in ("gaps", "density-gaps", "relative-index")


def test_without_entropy_coding_the_relative_index_with_fillers_is_used() -> None:
    generator = np.random.default_rng(0)
    weight = np.where(generator.random((300, 400)) < 0.05, generator.normal(size=(300, 400)), 0).astype(np.float32)
    fine = torch.from_numpy(np.where(weight == 0, 0, np.sign(weight)).astype(np.float32))
    # One bit an entry: fillers cost little, and a filler zero becomes a third value.
    assert representation(fine, "none").split(" + ")[0] in ("gaps", "relative-index")


def test_bits_of_two_to_four_patterns_are_used() -> None:
    """2:4 sparsity has 6 masks of 4 elements: log2(6) / 4 bits an element, not 1."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(256, 64, 4, generator=generator)
    mask = scores >= scores.topk(2, -1).values[..., -1:]
    state = {"mask": mask.reshape(256, 256).to(torch.int8)}
    size = len(Container().encode(state))
    assert size < 256 * 256 / 8 * 1.03 * np.log2(6) / 4 + 100


def test_columns_of_different_density_are_modelled() -> None:
    """Inputs that are nearly always pruned, as a digit's border: below the bound of one density for all."""
    generator = np.random.default_rng(0)
    density = np.where(np.arange(784) % 28 < 8, 0.002, 0.11)
    mask = generator.random((300, 784)) < density
    weight = np.where(mask, 1.0, 0.0).astype(np.float32)
    report = check({"w": torch.from_numpy(weight)})
    share = mask.mean()
    one_density = -mask.size * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    by_column = -300 * float((density * np.log2(density) + (1 - density) * np.log2(1 - density)).sum()) / 8
    assert str(report[0]["representation"]).startswith("density-gaps")
    assert report[0]["stored_bytes"] < 0.93 * one_density
    assert report[0]["stored_bytes"] < 1.04 * by_column


@pytest.mark.parametrize("clusters", [16, 32, 64])
def test_deep_compression_sizes(clusters: int) -> None:
    state = lenet(clusters)
    sizes = Container().sizes(state)
    assert sizes["shannon_bytes"] < sizes["container_bytes"] < 1.02 * sizes["shannon_bytes"]
    for byte_wide in (True, False):
        plain = codes(state, byte_wide)
        assert sizes["container_bytes"] < len(zstandard.ZstdCompressor(level=19).compress(plain))
        assert sizes["container_bytes"] < len(lzma.compress(plain, preset=9))
    for name in ("zstd_bytes", "xz_bytes", "gzip_bytes"):
        assert sizes["container_bytes"] < 0.7 * sizes[name]
    assert sizes["plain_bytes"] == 4 * (235200 + 300 + 30000 + 100 + 1000 + 10)
    assert sizes["container_bytes"] < 27_300


def test_each_coder_is_no_worse_than_what_it_contains() -> None:
    state = lenet(32)
    size = {entropy: len(Container(entropy=entropy).encode(state)) for entropy in ENTROPIES}
    assert size["auto"] <= 1.003 * min(size["huffman"], size["rans"])
    assert max(size["huffman"], size["rans"]) < size["none"]


def test_large_tensors_come_back() -> None:
    """Above the sizes at which samples decide."""
    generator = np.random.default_rng(0)
    normal = generator.standard_normal((300, 1200), dtype=np.float32)
    pruned = np.where(np.abs(normal) > 1.6, np.round(normal, 1), 0).astype(np.float32)
    book = generator.standard_normal((200, 8), dtype=np.float32)[generator.integers(0, 200, 45_000)].reshape(300, 1200)
    late = np.zeros((300, 1200), np.float32)
    late[-1, -3:] = [1, 2, 3]
    state = {name: torch.from_numpy(w) for name, w in {"n": normal, "p": pruned, "b": book, "l": late}.items()}
    names = [line["representation"] for line in check(state)]
    assert names[0] == "dense"
    assert names[2] == "block-codebook"


# --- input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({1: torch.ones(2)}, "not a string"),
        ({"a": [1.0]}, "type list"),
        ({"a": torch.ones(2, 2).to_sparse()}, "cannot be stored"),
        ({"a": torch.ones(2, device="meta")}, "cannot be stored"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "cannot be stored"),
        ({"n" * 2000: torch.ones(2)}, "Shorten"),
    ],
)
def test_what_cannot_be_stored_is_named(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Container().encode(state)


def test_an_empty_state() -> None:
    assert Container().decode(Container().encode({})) == {}
