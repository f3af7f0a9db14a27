"""Foreign checkpoints: verified by hash, read without running code, matched to the model or refused."""

from __future__ import annotations

import hashlib
import io
import pickle
import subprocess
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.errors import DataError, SpecError
from harness.registry import create
from harness.tasks.checkpoint import load_state, missing, stored, verify


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path))
    (tmp_path / "downloads").mkdir()
    return tmp_path


def network(*names: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(zip(names, (nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), strict=True)))


def keep(content: Any, tmp_path: Path, **options: Any) -> str:
    path = tmp_path / "file"
    torch.save(content, path, **options)
    return put(path.read_bytes())


def put(data: bytes) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    stored(sha256).write_bytes(data)
    return sha256


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "acc": 89.8}, lambda s: {"model": s}])
@pytest.mark.parametrize("names", [("a", "b", "c"), ("x", "y", "z")], ids=["same names", "other names"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_arrive(legacy: bool, wrap: Any, names: tuple[str, ...], prefix: str, tmp_path: Path) -> None:
    theirs, ours = network(*names), network("a", "b", "c")
    for value in theirs.state_dict().values():
        value.add_(1)
    state = OrderedDict((prefix + name, value) for name, value in theirs.state_dict().items())
    load_state(keep(wrap(state), tmp_path, _use_new_zipfile_serialization=not legacy), ours)
    for found, expected in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(found, expected)


def test_same_names_in_another_order_are_matched_by_name(tmp_path: Path) -> None:
    theirs = nn.Sequential(OrderedDict(a=nn.Linear(3, 3, bias=False), b=nn.Linear(3, 3, bias=False)))
    state = OrderedDict(reversed(list(theirs.state_dict().items())))
    ours = nn.Sequential(OrderedDict(a=nn.Linear(3, 3, bias=False), b=nn.Linear(3, 3, bias=False)))
    load_state(keep(state, tmp_path), ours)
    assert torch.equal(ours.a.weight, theirs.a.weight)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return subprocess.getoutput, (f"touch {tmp_path}/ran",)

    for data in (pickle.dumps({"state_dict": Payload()}), None):
        sha256 = put(data) if data else keep({"state_dict": Payload()}, tmp_path)
        with pytest.raises(DataError, match="cannot be read as a checkpoint of plain tensors"):
            load_state(sha256, network("a", "b", "c"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("data", [b"", b"not a checkpoint", b"\x80\x02]q\x00."])
def test_what_is_no_checkpoint_is_refused(data: bytes) -> None:
    with pytest.raises(DataError):
        load_state(put(data), network("a", "b", "c"))


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, {"state_dict": {"a": "text"}}])
def test_a_file_without_a_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no state dict"):
        load_state(keep(content, tmp_path), network("a", "b", "c"))


def test_weights_of_another_shape_are_refused_and_the_model_is_untouched(tmp_path: Path) -> None:
    model = network("a", "b", "c")
    before = model.a.weight.clone()
    sha256 = keep(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).state_dict(), tmp_path)
    with pytest.raises(DataError, match=r"'0.weight' has shape \(5, 3\), the model's 'a.weight' has \(4, 3\)"):
        load_state(sha256, model)
    with pytest.raises(DataError, match=r"2 tensors .* for the model's 9"):
        load_state(keep(nn.Sequential(nn.Linear(3, 4)).state_dict(), tmp_path), model)
    assert torch.equal(model.a.weight, before)


def test_a_changed_file_is_named_with_both_hashes(tmp_path: Path) -> None:
    sha256 = keep(network("a", "b", "c").state_dict(), tmp_path)
    data = stored(sha256).read_bytes()[:-1]
    stored(sha256).write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_state(sha256, network("a", "b", "c"))
    for part in (str(stored(sha256)), sha256, hashlib.sha256(data).hexdigest(), "Delete it and fetch it again"):
        assert part in str(caught.value)


def test_a_missing_file_is_named_with_the_remedy() -> None:
    reason = missing("0" * 64)
    assert reason is not None
    assert str(stored("0" * 64)) in reason
    with pytest.raises(DataError, match="assay reproduce"):
        load_state("0" * 64, network("a", "b", "c"))


def test_fashion_mnist_takes_a_checkpoint_instead_of_training(tmp_path: Path) -> None:
    weights = create("task", "fashion-mnist/lenet-300-100", {}).model(seed=1)
    task = create("task", "fashion-mnist/lenet-300-100", {"weights": keep(weights.state_dict(), tmp_path)})
    assert task.recipe() is None
    assert torch.equal(task.model(seed=2).fc1.weight, weights.fc1.weight)
    with pytest.raises(SpecError, match="weights"):
        create("task", "fashion-mnist/lenet-300-100", {"weights": "../escape"})


def zipped(data_pkl: bytes, **entries: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/version", "3\n")
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return stream.getvalue()


def asking(module: str, name: str, *arguments: Any) -> bytes:
    """A pickle that calls ``module.name(*arguments)``."""
    return f"\x80\x02c{module}\n{name}\n".encode("latin-1") + pickle.dumps(arguments, 2)[2:-1] + b"R."


def legacy(*values: Any) -> bytes:
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(value, 2) for value in (*head, *values))


HOSTILE = {
    "torch.Size of text": zipped(asking("torch", "Size", "abc")),
    "bytearray of a terabyte": zipped(asking("builtins", "bytearray", 1 << 40)),
    "the same in an old file": legacy() + asking("builtins", "bytearray", 1 << 36),
    "getattr": zipped(asking("builtins", "getattr", {}, "pop")),
    "torch.load": zipped(asking("torch", "load", "/etc/passwd")),
    "torch.hub": zipped(asking("torch.hub", "load", "x", "y")),
    "a tensor of nonsense": zipped(asking("torch._utils", "_rebuild_tensor_v2", 1, 2, 3, 4, 5, 6)),
    "a counter": zipped(asking("collections", "Counter", "x")),
    "nested tuples": zipped(b"\x80\x02(" + b"(" * 20_000 + b"t" * 20_000 + b"t."),
    "a zip bomb": zipped(pickle.dumps({}, 2), **{"data/0": bytes(200_000_000)}),
    "nothing": b"",
    "one byte": b"\x80",
    "text": b"hello",
    "half a zip": zipped(b".")[:60],
    "protocol 5": zipped(pickle.dumps({"a": subprocess.getoutput}, 5)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_crafted_file_is_a_data_error_before_it_takes_memory(name: str) -> None:
    sha256 = put(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            load_state(sha256, nn.Linear(1, 1))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50_000_000


def test_a_file_of_a_terabyte_is_not_hashed(tmp_path: Path) -> None:
    sha256 = "a" * 64
    with stored(sha256).open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(DataError, match="1,099,511,627,776 bytes"):
        load_state(sha256, nn.Linear(1, 1))
    with pytest.raises(DataError, match="at most"):
        verify(stored(sha256), sha256, "Delete it.")
