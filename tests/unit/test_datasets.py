from __future__ import annotations

import gzip
import hashlib
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.errors import DataError, Unavailable
from harness.tasks.idx_dataset import FASHION_MNIST, MNIST, IdxFile
from harness.tasks.image_data import ImageData, Labelled, held_out, scaled, stratified_split


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ASSAY_DATA", raising=False)
    return tmp_path / "home"


def content(key: str) -> bytes:
    """A file of the right layout, but not the data set's."""
    file = FASHION_MNIST.files[key]
    header = bytes([0, 0, 8, len(file.shape)]) + b"".join(size.to_bytes(4) for size in file.shape)
    return header + bytes(file.size - len(header))


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> dict[str, bytes]:
    """Replace the four files by small ones with the same layout, hashes included."""
    rng = np.random.default_rng(0)
    shapes = {"train_images": (20, 28, 28), "train_labels": (20,), "test_images": (6, 28, 28), "test_labels": (6,)}
    contents, table = {}, {}
    for key, shape in shapes.items():
        header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4) for size in shape)
        values = rng.integers(0, 10 if "labels" in key else 256, shape, dtype=np.uint8)
        contents[key] = header + values.tobytes()
        name = FASHION_MNIST.files[key].name
        table[key] = IdxFile(name, shape, len(contents[key]), hashlib.sha256(contents[key]).hexdigest())
    monkeypatch.setitem(vars(FASHION_MNIST), "files", table)
    monkeypatch.setitem(vars(FASHION_MNIST), "system", tmp_path / "no-debian")
    return contents


def place(folder: Path, contents: dict[str, bytes], zipped: bool) -> None:
    folder.mkdir(parents=True)
    for key, value in contents.items():
        name = FASHION_MNIST.files[key].name
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(value))
        else:
            (folder / name).write_bytes(value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside", [".", "fashion-mnist", "FashionMNIST/raw"])
def test_assay_data_is_found_in_each_layout(tiny, home, tmp_path, monkeypatch, inside, zipped):
    place(tmp_path / "a" / inside, tiny, zipped)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("ASSAY_DATA", f"{tmp_path / 'empty'}:{tmp_path / 'a'}")
    FASHION_MNIST.verify(FASHION_MNIST.locate())
    examples = FASHION_MNIST.load("train")
    assert examples.images.shape == (20, 1, 28, 28)
    assert examples.images.tobytes() == tiny["train_images"][16:]
    assert examples.labels.tolist() == list(tiny["train_labels"][8:])
    assert len(FASHION_MNIST.load("test")) == 6


def test_assay_data_comes_before_debian_and_debian_before_the_download(tiny, home, tmp_path, monkeypatch):
    place(home / "data" / "FashionMNIST" / "raw", tiny, True)
    assert FASHION_MNIST.locate()["test_labels"].is_relative_to(home)
    place(FASHION_MNIST.system, tiny, True)
    assert FASHION_MNIST.locate()["test_labels"].is_relative_to(FASHION_MNIST.system)
    place(tmp_path / "mine", tiny, False)
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path / "mine"))
    assert FASHION_MNIST.locate()["test_labels"].is_relative_to(tmp_path / "mine")


def test_a_missing_file_beside_others_is_named(tiny, home, tmp_path, monkeypatch):
    place(tmp_path / "mine", tiny, True)
    (tmp_path / "mine" / "t10k-labels-idx1-ubyte.gz").unlink()
    place(FASHION_MNIST.system, tiny, True)
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path / "mine"))
    with pytest.raises(DataError, match=r"mine has no t10k-labels-idx1-ubyte.*ASSAY_DATA"):
        FASHION_MNIST.locate()


def test_a_folder_that_does_not_exist_is_an_error(home, tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere, which is not a folder"):
        FASHION_MNIST.locate()


def damage_truncated_gzip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def damage_truncated_content(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))


def damage_one_bit(path: Path) -> None:
    value = bytearray(gzip.decompress(path.read_bytes()))
    value[1000] ^= 1
    path.write_bytes(gzip.compress(bytes(value)))


def damage_longer(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"\0"))


def damage_text(path: Path) -> None:
    path.write_text("<html>404</html>")


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncated_gzip, "cannot be read"),
        (damage_truncated_content, "holds 15695 bytes decompressed, not 15696"),
        (damage_one_bit, "was altered: sha256"),
        (damage_longer, "more than 15696 bytes"),
        (damage_text, "cannot be read"),
        (damage_empty, "holds 0 bytes"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name_and_a_remedy(tiny, home, tmp_path, monkeypatch, damage, message):
    place(tmp_path / "mine", tiny, True)
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path / "mine"))
    FASHION_MNIST.verify(FASHION_MNIST.locate())  # remembered as good: the damage must be noticed all the same
    damage(tmp_path / "mine" / "train-images-idx3-ubyte.gz")
    for use in (lambda: FASHION_MNIST.verify(FASHION_MNIST.locate()), lambda: FASHION_MNIST.load("train")):
        with pytest.raises(DataError, match=message) as caught:
            use()
        assert "train-images-idx3-ubyte.gz" in str(caught.value)
        assert "ASSAY_DATA" in str(caught.value)


def test_verified_files_are_not_read_again(tiny, home, tmp_path, monkeypatch):
    place(tmp_path / "mine", tiny, True)
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path / "mine"))
    FASHION_MNIST.verify(FASHION_MNIST.locate())
    monkeypatch.setattr(type(FASHION_MNIST), "read", lambda self, path, file: pytest.fail(f"{path} was read again"))
    FASHION_MNIST.verify(FASHION_MNIST.locate())


def test_an_unwritable_cache_does_not_matter(tiny, home, tmp_path, monkeypatch):
    place(tmp_path / "mine", tiny, True)
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path / "mine"))
    home.write_text("a file where the folder should be")
    FASHION_MNIST.verify(FASHION_MNIST.locate())


def test_without_files_and_network_the_reason_says_what_to_do(tiny, home, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    with pytest.raises(Unavailable, match=r"dataset-fashion-mnist"):
        FASHION_MNIST.locate()
    assert socket.getdefaulttimeout() is None


def test_idx_of_another_shape_is_refused():
    value = bytearray(content("test_labels"))
    value[7] ^= 1
    with pytest.raises(DataError, match="not an IDX file"):
        FASHION_MNIST.parse(bytes(value), FASHION_MNIST.files["test_labels"])
    with pytest.raises(DataError, match="holds 9999 values"):
        FASHION_MNIST.parse(content("test_labels")[:-1], FASHION_MNIST.files["test_labels"])


@pytest.mark.skipif(not FASHION_MNIST.system.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_files_are_the_published_data_set(home):
    found = FASHION_MNIST.locate()
    FASHION_MNIST.verify(found)
    train, test = FASHION_MNIST.load("train"), FASHION_MNIST.load("test")
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    # Published mean and standard deviation of the training pixels: 0.2860 and 0.3530.
    assert train.images.mean() / 255 == pytest.approx(0.2860, abs=1e-4)
    assert train.images.std() / 255 == pytest.approx(0.3530, abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_a_stratified_split_is_a_partition_in_proportion(labels, data):
    values = np.array(labels, dtype=np.int64)
    second = data.draw(st.integers(0, len(labels)))
    a, b = stratified_split(values, second, seed=0)
    assert sorted([*a, *b]) == list(range(len(labels)))
    assert len(b) == second
    for c in np.unique(values):
        share = second * np.mean(values == c)
        assert abs(np.sum(values[b] == c) - share) < 1


def test_the_split_of_fashion_mnist_never_changes():
    labels = np.tile(np.arange(10), 6000)
    a, b = stratified_split(labels, 5000, seed=0)
    assert np.bincount(labels[b]).tolist() == [500] * 10
    assert hashlib.sha256(b.astype("<i8").tobytes()).hexdigest() == (
        "d6470886e011433b6eb8b4ff97e6db5b8cbaf5d5396630b59de5594617d36a29"
    )
    assert len(a) == 55000


def examples(size: int, channels: int = 1, side: int = 6) -> Labelled:
    rng = np.random.default_rng(0)
    return Labelled(
        images=rng.integers(1, 256, (size, channels, side, side), dtype=np.uint8),
        labels=np.arange(size, dtype=np.int64),
    )


def test_scaling_is_that_of_the_field():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    exact = (pixels.astype(np.float64) / 255 - 0.5) / 0.5
    assert np.abs(scaled(pixels, 255) - exact).max() < 1e-7
    assert scaled(pixels, 255).dtype == np.float32
    data = ImageData(
        training=Labelled(images=pixels, labels=np.zeros(1, np.int64)),
        validating=Labelled(images=pixels, labels=np.zeros(1, np.int64)),
        maximum=255,
    )
    (x, _), (v, _) = next(data.train(1, seed=0)), next(data.validation(1))
    assert np.array_equal(x.numpy(), scaled(pixels, 255))
    assert torch.equal(x, v)


def test_a_pass_visits_every_example_once_and_keeps_the_short_batch():
    data = ImageData(training=examples(25), validating=examples(5), maximum=255, pad=1, flip=True)
    parts = [y for _, y in data.train(8, seed=1)]
    assert [len(part) for part in parts] == [8, 8, 8, 1]
    order = torch.cat(parts)
    assert sorted(order.tolist()) == list(range(25))
    assert order.tolist() != list(range(25))
    assert torch.cat([y for _, y in data.train(8, seed=1, shuffle=False)]).tolist() == list(range(25))


def test_order_and_augmentation_depend_on_the_seed_alone():
    data = ImageData(training=examples(25), validating=examples(5), maximum=255, pad=2, flip=True)
    torch.manual_seed(0)
    first = torch.cat([x for x, _ in data.train(8, seed=1)])
    torch.manual_seed(1)
    assert torch.equal(first, torch.cat([x for x, _ in data.train(8, seed=1)]))
    assert torch.equal(first, torch.cat([x for x, _ in data.train(25, seed=1)]))
    assert not torch.equal(first, torch.cat([x for x, _ in data.train(8, seed=2)]))


def test_augmentation_is_every_crop_of_the_padded_image_and_its_mirror_equally_often():
    source = examples(1)
    many = Labelled(images=source.images.repeat(9000, 0), labels=np.zeros(9000, np.int64))
    data = ImageData(training=many, validating=many, maximum=255, pad=1, flip=True)
    padded = np.pad(source.images[0, 0], 1)
    crops = [padded[y : y + 6, x : x + 6] for y in range(3) for x in range(3)]
    variants = {scaled(crop, 255).tobytes(): i for i, crop in enumerate([*crops, *(c[:, ::-1] for c in crops)])}
    assert len(variants) == 18
    (x, _), *_ = data.train(9000, seed=0)
    counts = np.bincount([variants[np.ascontiguousarray(image).tobytes()] for image in x[:, 0].numpy()], minlength=18)
    assert stats.chisquare(counts).pvalue > 0.01


def test_augmentation_off_gives_the_images_themselves():
    data = ImageData(training=examples(9), validating=examples(9), maximum=255, pad=2, flip=True)
    (x, y), *_ = data.train(9, seed=0, shuffle=False, augment=False)
    assert np.array_equal(x.numpy(), scaled(data.training.images, 255))
    assert y.tolist() == list(range(9))


def test_the_test_set_keeps_its_order_whatever_the_batch():
    test = held_out(examples(7), 255)
    whole = np.concatenate([x for x, _ in test.batches(7)])
    assert np.array_equal(whole, np.concatenate([x for x, _ in test.batches(3)]))
    assert np.concatenate([y for _, y in test.batches(2)]).tolist() == list(range(7))
    assert test.size == 7
    assert whole.dtype == np.float32


def test_mnist_is_found_where_torchvision_puts_it_and_never_taken_for_fashion_mnist(tiny, home, tmp_path, monkeypatch):
    monkeypatch.setitem(vars(MNIST), "files", dict(FASHION_MNIST.files))  # small files; the contents do not matter here
    place(tmp_path / "a" / "MNIST" / "raw", tiny, True)
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path / "a"))
    assert MNIST.locate(download=False)["train_images"].parent == tmp_path / "a" / "MNIST" / "raw"
    assert MNIST.load("train").images.shape == (20, 1, 28, 28)
    with pytest.raises(Unavailable, match="Fashion-MNIST is not on this machine yet"):
        FASHION_MNIST.locate(download=False)
