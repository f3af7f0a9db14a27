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

from harness.contracts import Batch
from harness.errors import DataError, Unavailable
from harness.tasks import splits
from harness.tasks.idx_dataset import FASHION_MNIST, MNIST, IdxFile
from harness.tasks.image_data import ImageSplit, Labelled, stratified_split
from harness.tasks.splits import ArraySplit


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


def scaled(pixels):
    """As scikit-learn and torchvision users scale to [-1, 1], in float32."""
    return (pixels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def images(batches):
    return torch.cat([batch.inputs["input"] for batch in batches])


def labels(batches):
    return torch.cat([batch.targets["label"] for batch in batches])


def test_scaling_is_that_of_the_field():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    exact = (pixels.astype(np.float64) / 255 - 0.5) / 0.5
    split = ImageSplit(examples=Labelled(images=pixels, labels=np.zeros(1, np.int64)), maximum=255)
    x = images(split.batches(1))
    assert x.dtype == torch.float32
    assert np.abs(x.numpy() - exact).max() < 1e-7
    assert np.array_equal(x.numpy(), scaled(pixels))


def test_a_pass_visits_every_example_once_and_keeps_the_short_batch():
    split = ImageSplit(examples=examples(25), maximum=255, pad=1, flip=True)
    parts = [batch.targets["label"] for batch in split.batches(8, seed=1, augment=True)]
    assert [len(part) for part in parts] == [8, 8, 8, 1]
    order = torch.cat(parts)
    assert sorted(order.tolist()) == list(range(25))
    assert order.tolist() != list(range(25))
    assert labels(split.batches(8)).tolist() == list(range(25))


def test_order_and_augmentation_depend_on_the_seed_alone():
    split = ImageSplit(examples=examples(25), maximum=255, pad=2, flip=True)
    torch.manual_seed(0)
    first = images(split.batches(8, seed=1, augment=True))
    torch.manual_seed(1)
    assert torch.equal(first, images(split.batches(8, seed=1, augment=True)))
    assert torch.equal(first, images(split.batches(25, seed=1, augment=True)))
    assert not torch.equal(first, images(split.batches(8, seed=2, augment=True)))


def test_orders_and_crops_are_those_of_older_versions():
    """Trained baselines depend on every bit of them."""
    split = ImageSplit(examples=examples(25), maximum=255, pad=2, flip=True)
    found = hashlib.sha256()
    for batch in split.batches(8, seed=1, augment=True):
        found.update(batch.inputs["input"].numpy().tobytes() + batch.targets["label"].numpy().tobytes())
    assert found.hexdigest() == "7dd5e699f091f85f9fd64449b1d914aa9ab260255d7928b19152e918c94ce7fe"


def test_augmentation_is_every_crop_of_the_padded_image_and_its_mirror_equally_often():
    source = examples(1)
    many = Labelled(images=source.images.repeat(9000, 0), labels=np.zeros(9000, np.int64))
    split = ImageSplit(examples=many, maximum=255, pad=1, flip=True)
    padded = np.pad(source.images[0, 0], 1)
    crops = [padded[y : y + 6, x : x + 6] for y in range(3) for x in range(3)]
    variants = {scaled(crop).tobytes(): i for i, crop in enumerate([*crops, *(c[:, ::-1] for c in crops)])}
    assert len(variants) == 18
    x = images(split.batches(9000, seed=0, augment=True))
    counts = np.bincount([variants[np.ascontiguousarray(image).tobytes()] for image in x[:, 0].numpy()], minlength=18)
    assert stats.chisquare(counts).pvalue > 0.01


def test_augmentation_off_gives_the_images_themselves():
    split = ImageSplit(examples=examples(9), maximum=255, pad=2, flip=True)
    assert np.array_equal(images(split.batches(9)).numpy(), scaled(split.examples.images))
    assert labels(split.batches(9)).tolist() == list(range(9))


def test_a_split_keeps_its_order_and_identity_whatever_the_batch():
    split = ImageSplit(examples=examples(7), maximum=255)
    whole = images(split.batches(7))
    assert torch.equal(whole, images(split.batches(3)))
    assert labels(split.batches(2)).tolist() == list(range(7))
    assert split.size == 7
    same = ArraySplit(inputs={"input": whole}, targets={"label": torch.arange(7)})
    assert same.identity == split.identity == splits.identity(split.batches(2))
    other = ArraySplit(inputs={"input": whole.flip(0)}, targets={"label": torch.arange(7)})
    assert other.identity != split.identity
    assert ArraySplit(inputs={"x": whole}, targets={"label": torch.arange(7)}).identity != split.identity


def test_arrays_are_shuffled_by_the_seed_and_kept_in_order_without():
    split = ArraySplit(inputs={"a": torch.arange(20.0), "b": torch.arange(20)}, targets={"label": torch.arange(20)})
    batches = list(split.batches(6, seed=3))
    assert [len(batch) for batch in batches] == [6, 6, 6, 2]
    assert all(torch.equal(batch.inputs["a"].long(), batch.targets["label"]) for batch in batches)
    assert torch.cat([batch.inputs["b"] for batch in split.batches(6)]).tolist() == list(range(20))
    assert torch.cat([batch.inputs["b"] for batch in batches]).tolist() != list(range(20))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(2, 3)), min_size=1, max_size=8), st.integers(1, 7))
def test_batches_are_cut_and_joined_and_never_mix_shapes(parts, size):
    numbers = iter(range(1000))
    given_ = [Batch(inputs={"x": torch.tensor([[next(numbers)] * width for _ in range(n)])}) for n, width in parts]
    found = list(splits.rebatch(given_, size))
    rows = [row for batch in given_ for row in batch.inputs["x"].tolist()]
    assert [row for batch in found for row in batch.inputs["x"].tolist()] == rows
    assert all(len(batch) <= size for batch in found)


def test_mnist_is_found_where_torchvision_puts_it_and_never_taken_for_fashion_mnist(tiny, home, tmp_path, monkeypatch):
    monkeypatch.setitem(vars(MNIST), "files", dict(FASHION_MNIST.files))  # small files; the contents do not matter here
    place(tmp_path / "a" / "MNIST" / "raw", tiny, True)
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path / "a"))
    assert MNIST.locate(download=False)["train_images"].parent == tmp_path / "a" / "MNIST" / "raw"
    assert MNIST.load("train").images.shape == (20, 1, 28, 28)
    with pytest.raises(Unavailable, match="Fashion-MNIST is not on this machine yet"):
        FASHION_MNIST.locate(download=False)
