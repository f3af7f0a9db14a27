from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn

from harness import tasks
from harness.contracts import Task
from harness.errors import DataError, InputError, SpecError, Unavailable, UnknownName
from harness.tasks import imagenet, models, pretrained, torchvision_models
from harness.tasks.idx_dataset import FASHION_MNIST
from harness.training import SGDTrainer, evaluate

SHAPES = {name: (1, 8, 8) if name == "digits-cnn" else (1, 28, 28) for name in models.MODELS}
PARAMETERS = {
    "lenet-300-100": 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10,
    "lenet5-caffe": 431_080,
    "resnet20": 272_186,
    "set-mlp": 2_797_010,
    "vgg-small": 72_666,
}
IMAGES = [name for name in tasks.TABLE if name.startswith(("fashion-mnist/", "mnist/"))]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ASSAY_DATA", raising=False)
    return tmp_path / "home"


def test_building_every_task_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from harness import tasks\n"
        "given = {'torchvision': {'architecture': 'resnet18'}, 'pair': {'model': 'resnet20', 'data': 'mnist'}}\n"
        "for name in tasks.TABLE: tasks.create(name, given.get(name, {})).unavailable\n"
        "for model in ('f.onnx', 'f.pt2', 'timm/resnet18', 'transformers/x'):\n"
        "    for data in ('d.npz', 'imagenet', 'digits'): tasks.create('pair', {'model': model, 'data': data}).name\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    for name in ("f.onnx", "f.pt2"):
        Path(name).touch()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [*IMAGES, "digits-cnn", "torchvision/resnet18"])
def test_every_name_makes_a_task_of_that_name(name):
    task = tasks.create(name, {})
    assert isinstance(task, Task)
    assert task.name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.epochs = 3


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("fashion-mnist/resnet20", {"epoch": 3}, "no parameter 'epoch'. Did you mean 'epochs'"),
        ("fashion-mnist/resnet20", {"epochs": -1}, "epochs.*greater than or equal to 0"),
        ("fashion-mnist/resnet20", {"architecture": "resnet2"}, "Did you mean 'resnet20'"),
        ("fashion-mnist/resnet20", {"train_examples": 60000}, "less than or equal to 55000"),
        ("fashion-mnist/resnet20", {"training": {"learning_rate": 1}}, "a recipe has no 'learning_rate'. .*lr"),
        ("fashion-mnist/resnet20", {"training": {"optimizer": "adagrad"}}, "optimizer: Input should be 'sgd'"),
        ("torchvision/resnet19", {}, "Did you mean 'resnet18'|Did you mean 'resnet1"),
        ("torchvision/resnet18", {"examples": 0}, "greater than or equal to 1"),
        ("torchvision", {}, "architecture"),
    ],
)
def test_values_that_are_not_allowed_are_refused(name, parameters, message):
    with pytest.raises(SpecError, match=message):
        tasks.create(name, parameters)


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownName, match="Did you mean 'fashion-mnist/resnet20'"):
        tasks.create("fashion-mnist/resnet-20", {})


@pytest.mark.parametrize("name", models.MODELS)
def test_networks_are_traceable_and_independent_of_the_batch(name):
    network = models.create(name, 0).double().eval()
    x = torch.randn(5, *SHAPES[name], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = network(x)
    assert whole.shape == (5, 10)
    assert whole.std() > 0.01
    assert torch.equal(fx.symbolic_trace(network)(x), whole)
    torch.testing.assert_close(torch.cat([network(part) for part in x.split(1)]), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", models.MODELS)
def test_networks_come_from_the_seed_and_leave_the_global_state_alone(name):
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    first = models.create(name, 4).state_dict()
    assert torch.equal(torch.rand(3), expected)
    second, other = models.create(name, 4).state_dict(), models.create(name, 5).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    weights = [key for key, value in first.items() if value.ndim > 1]
    assert all(not torch.equal(first[key], other[key]) for key in weights)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_literature(name):
    assert sum(p.numel() for p in models.create(name, 0).parameters()) == PARAMETERS[name]


def test_families_that_exporters_and_pruners_must_cope_with_are_there():
    def kinds(name: str) -> set[type[nn.Module]]:
        return {type(module) for module in models.create(name, 0).modules()}

    mobile = [m for m in models.create("mobilenet-tiny", 0).modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.groups == m.in_channels > 1 for m in mobile) == 7
    convnext = [m for m in models.create("convnext-tiny-ish", 0).modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.groups == m.in_channels > 1 and m.kernel_size == (7, 7) for m in convnext) == 4
    assert nn.LayerNorm in kinds("convnext-tiny-ish")
    assert nn.MultiheadAttention not in kinds("vit-tiny")
    traced = fx.symbolic_trace(models.create("vit-tiny", 0))
    assert sum(node.target is nn.functional.scaled_dot_product_attention for node in traced.graph.nodes) == 4


def inputs(batches):
    return torch.cat([batch.inputs["input"] for batch in batches])


def labels(batches):
    return torch.cat([batch.targets["label"] for batch in batches])


def no_test(task) -> str:
    """Why there is nothing to score."""
    with pytest.raises(Unavailable) as caught:
        task.test()
    return str(caught.value)


def test_the_digits_are_split_in_proportion_without_overlap():
    task = tasks.create("digits-cnn", {})
    parts = {**task.data(), "test": task.test()}
    assert {name: split.size for name, split in parts.items()} == {"train": 1258, "validation": 180, "test": 359}
    rows = {x.tobytes() for split in parts.values() for x in inputs(split.batches(500)).numpy()}
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[:, None].astype(np.float32) / 16 - 0.5) / 0.5
    assert rows == {x.tobytes() for x in pixels}
    train = inputs(parts["train"].batches(500))
    assert train.min() == -1
    assert train.max() == 1
    assert task.dataset_hash() == "65e5b4619795efb40c1082f4c350c049e4ad552200d369b6ae99e21eef5e72c5"


def trained(task) -> tuple[nn.Module, float]:
    """The baseline, and its score on the test set."""
    model = task.model(0)
    trainer = SGDTrainer(data=task.data(), signature=task.signature, loss=task.loss, metrics=task.metrics, seed=0)
    trainer(model, task.recipe())
    (score,) = evaluate(model, task.test().batches(100), task.signature, task.metrics[:1]).values()
    return model, score


def test_the_digits_baseline_reaches_97_percent():
    task = tasks.create("digits-cnn", {"epochs": 5})
    assert task.finetuning() == task.recipe()
    assert trained(task)[1] >= 0.97


@pytest.mark.skipif(not FASHION_MNIST.system.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_parts():
    task = tasks.create("fashion-mnist/lenet-300-100", {"train_examples": 5000, "epochs": 1})
    assert task.unavailable() is None
    assert task.recipe().epochs == 1
    train, validation, test = *task.data().values(), task.test()
    assert (train.size, validation.size, test.size) == (5000, 5000, 10000)
    assert torch.bincount(labels(train.batches(5000, seed=0))).tolist() == [500] * 10
    (batch,) = test.batches(10000)
    assert batch.inputs["input"].shape == (10000, 1, 28, 28)
    assert batch.inputs["input"].min() == -1
    assert batch.inputs["input"].max() == 1
    assert torch.bincount(batch.targets["label"]).tolist() == [1000] * 10
    seen = {image.tobytes() for image in inputs(train.batches(5000, seed=0)).numpy()}
    held = {image.tobytes() for image in inputs(validation.batches(5000)).numpy()}
    assert len(seen & held) < 5  # the data set has a few identical images
    assert task.dataset_hash() == FASHION_MNIST.digest()


def test_architectures_are_those_that_torchvision_lists():
    from torchvision import models as vision

    assert list(torchvision_models.architectures()) == vision.list_models(module=vision)


def test_without_torchvision_the_reason_has_the_install_line(monkeypatch):
    monkeypatch.setattr(torchvision_models.importlib.util, "find_spec", lambda name: None)
    torchvision_models.architectures.cache_clear()
    assert 'pip install "assay-bench[vision]"' in tasks.create("torchvision/resnet18", {}).unavailable()
    torchvision_models.architectures.cache_clear()


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty weight cache and no way to fill it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def refuse(url, *args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    cached = pretrained.missing  # a test may replace it
    cached.cache_clear()
    yield tmp_path / "hub" / "checkpoints"
    cached.cache_clear()


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_random_weights_have_a_reason_and_lively_outputs(no_network, architecture):
    task = tasks.create(f"torchvision/{architecture}", {})
    for part in ("random", "no network", str(no_network)):
        assert part in no_test(task)
    assert task.notes() == (no_test(task),)
    assert (task.data(), task.dataset_hash(), task.recipe(), task.finetuning()) == ({}, None, None, None)
    assert task.signature.inputs[0].shape == (3, 224, 224)
    model = task.model(1)
    x = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        y = model(x)
        again = task.model(1)(x)
    assert not model.training
    assert 0.3 < y.std() < 5
    assert (y[0] - y[1]).std() > 0.05
    assert torch.equal(y, again)
    assert "random (weights is None)" in no_test(tasks.create(task.name, {"weights": None}))


def test_weights_in_the_cache_are_loaded_and_checked(no_network):
    from torchvision import models as vision

    source = vision.shufflenet_v2_x0_5(weights=None)
    entry = vision.get_model_weights("shufflenet_v2_x0_5").DEFAULT
    no_network.mkdir(parents=True)
    path = no_network / entry.url.rsplit("/", 1)[-1]
    torch.save(source.state_dict(), path)
    task = tasks.create("torchvision/shufflenet_v2_x0_5", {})
    with pytest.raises(DataError, match="truncated or altered"):
        task.test()


def test_weights_are_read_as_data_never_unpickled(no_network, monkeypatch, tmp_path):
    from torchvision import models as vision

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    entry = vision.get_model_weights("shufflenet_v2_x0_5").DEFAULT
    no_network.mkdir(parents=True)
    path = no_network / entry.url.rsplit("/", 1)[-1]
    torch.save({"x": Evil()}, path)
    monkeypatch.setattr(pretrained, "_prefix", lambda path: hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    task = tasks.create("torchvision/shufflenet_v2_x0_5", {})
    with pytest.raises(DataError, match="not a file of plain tensors"):
        task.model(0)
    assert not (tmp_path / "run").exists()


def test_pretrained_weights_are_those_of_the_file(no_network, monkeypatch):
    from torchvision import models as vision

    source = vision.shufflenet_v2_x0_5(weights=None).eval()
    entry = vision.get_model_weights("shufflenet_v2_x0_5").DEFAULT
    no_network.mkdir(parents=True)
    path = no_network / entry.url.rsplit("/", 1)[-1]
    torch.save(source.state_dict(), path)
    monkeypatch.setattr(pretrained, "_prefix", lambda path: hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    task = tasks.create("torchvision/shufflenet_v2_x0_5", {})
    assert "There is no ImageNet folder" in no_test(task)
    loaded = task.model(0).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in source.state_dict().items())


def test_unknown_weights_are_refused(no_network):
    with pytest.raises(InputError, match=r"no weights 'IMAGENET1K_V3'. Did you mean 'IMAGENET1K_V1'"):
        tasks.create("torchvision/resnet18", {"weights": "IMAGENET1K_V3"}).test()


@pytest.fixture
def picture_folder(tmp_path) -> Path:
    """1,000 class folders, of which three have images."""
    from PIL import Image

    root = tmp_path / "data" / "imagenet"
    for part in ("val", "train"):
        for i in range(1000):
            (root / part / f"n{i:08d}").mkdir(parents=True)
        for label, count in ((2, 4), (500, 60), (999, 2)):
            for i in range(count):
                color = (label % 256, i, 30)
                Image.new("RGB", (300, 260), color).save(root / part / f"n{label:08d}" / f"{i:03d}.png")
    return root


def test_imagenet_is_read_in_class_order_with_the_weights_transform(picture_folder, no_network, monkeypatch):
    monkeypatch.setattr(pretrained, "missing", lambda architecture, weights: None)
    task = tasks.create("torchvision/resnet18", {"imagenet": str(picture_folder), "examples": 11})
    assert task.notes() == ()
    test = task.test()
    assert test.size == 11
    assert labels(test.batches(4)).tolist() == [2] + [500] * 10
    x = next(test.batches(1)).inputs["input"]
    assert x.shape == (1, 3, 224, 224)
    expected = (np.array([2, 0, 30]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert x[0, :, 100, 100].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    train, validation = task.data().values()
    assert (train.size, validation.size) == (64, 2)
    assert sorted(labels(train.batches(7, seed=0, augment=True)).tolist()) == [2] * 3 + [500] * 59 + [999] * 2
    assert task.finetuning().optimizer == "sgd"

    before = task.dataset_hash()
    assert before == task.dataset_hash()
    assert len({before, test.identity, train.identity, validation.identity}) == 4
    next(iter((picture_folder / "val" / "n00000002").iterdir())).write_bytes(b"altered")
    assert task.dataset_hash() != before
    with pytest.raises(DataError, match=r"n00000002.*cannot be read as an image"):
        next(task.test().batches(1))


def test_imagenet_is_found_in_assay_data(picture_folder, monkeypatch):
    assert imagenet.locate(None, "val") is None
    monkeypatch.setenv("ASSAY_DATA", str(picture_folder.parent))
    assert imagenet.locate(None, "val") == picture_folder / "val"
    assert imagenet.locate(str(picture_folder / "val"), "val") == picture_folder / "val"
    assert imagenet.locate(str(picture_folder / "val"), "train") is None


def test_a_folder_that_is_not_imagenet_is_refused(tmp_path):
    (tmp_path / "n00000001").mkdir()
    with pytest.raises(DataError, match="1 class folders, not 1000"):
        imagenet.listing(tmp_path)
    with pytest.raises(DataError, match="nowhere, which is not a folder"):
        imagenet.locate(str(tmp_path / "nowhere"), "val")
