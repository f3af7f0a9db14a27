"""Models in files: the same function and bytes back, and nothing that a file names is run unless it is trusted."""

from __future__ import annotations

import functools
import json
import operator
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from harness import modelfile
from harness.canonical import file_sha256
from harness.errors import DataError
from harness.tasks.models import create


class Tied(nn.Module):
    """Two layers with one weight, a constant, and attributes of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("offset", torch.arange(4.0), persistent=False)
        self.make = functools.partial(nn.LayerNorm, eps=1e-3)
        self.settings = {"shape": torch.Size([2, 3]), "cut": slice(0, 2), "limit": float("inf"), "kinds": {"x", "y"}}
        self.act = F.gelu

    def forward(self, x: Tensor) -> Tensor:
        offset: Any = self.offset
        result: Tensor = self.act(self.b(self.a(x)) + offset)
        return result


class Holder(nn.Module):
    """Holds what it is given."""

    def __init__(self, thing: Any) -> None:
        super().__init__()
        self.thing = thing


def traced() -> fx.GraphModule:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
            self.gain = nn.Parameter(torch.tensor([2.0]))

        def forward(self, x: Tensor) -> Tensor:
            y = F.max_pool2d(self.stages(x), 2)[:, :, 1:]
            y = torch.cat([y, y.permute(0, 1, 3, 2).reshape(y.size(0), 2, y.shape[2], -1)], dim=1) * self.gain
            return (y + 1.0).flatten(1).mean(dim=1, dtype=torch.float32)

    torch.manual_seed(0)
    module = fx.symbolic_trace(Net().eval())
    module.meta["note"] = {"kept": ["a"]}
    return module


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: create("resnet20", 0), (2, 1, 28, 28)),
        (lambda: create("vit-tiny", 0), (2, 1, 28, 28)),
        (lambda: nn.LSTM(4, 5), (3, 4)),
        (lambda: nn.TransformerEncoderLayer(16, 2, batch_first=True), (2, 5, 16)),
        (traced, (2, 1, 14, 14)),
        (lambda: nn.Sequential(traced(), nn.Unflatten(0, (-1, 1)), nn.Linear(1, 3).to(torch.float32)), (2, 1, 14, 14)),
        (Tied, (2, 4)),
    ],
    ids=["resnet", "vit", "lstm", "transformer", "graph", "graph-inside", "tied"],
)
def test_what_is_loaded_is_the_same_function_and_saves_to_the_same_bytes(
    make: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    model = make().eval()
    first = modelfile.save(model, tmp_path / "first")
    again = modelfile.load(first, allow=("tests",))
    assert type(again).__name__ == type(model).__name__
    x = torch.randn(shape)
    with torch.no_grad():
        wanted, got = model(x), again(x)
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (wanted, got)), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else all(map(torch.equal, a, b))
    assert not again.training
    assert [(k, v.requires_grad) for k, v in again.named_parameters()] == [
        (k, v.requires_grad) for k, v in model.named_parameters()
    ]
    second = modelfile.save(again, tmp_path / "elsewhere")
    assert file_sha256(first) == file_sha256(second)


def test_sharing_layout_and_attributes_survive(tmp_path: Path) -> None:
    tied = modelfile.load(modelfile.save(Tied(), tmp_path / "m"), allow=("tests",))
    assert tied.a.weight is tied.b.weight
    assert tied.training
    assert tied.act is F.gelu
    assert tied.settings == {
        "shape": torch.Size([2, 3]),
        "cut": slice(0, 2),
        "limit": float("inf"),
        "kinds": {"x", "y"},
    }
    assert "offset" not in tied.state_dict()
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    loaded = modelfile.load(modelfile.save(conv, tmp_path / "c"))
    assert loaded.weight.stride() == conv.weight.stride()
    assert torch.equal(loaded.weight, conv.weight)
    graph = modelfile.load(modelfile.save(traced(), tmp_path / "g"))
    assert graph.meta["note"] == {"kept": ["a"]}


def test_integers_take_one_byte(tmp_path: Path) -> None:
    holder = Holder(None)
    holder.register_buffer("q", torch.zeros(10_000, dtype=torch.int8))
    assert modelfile.save(holder, tmp_path / "m").stat().st_size < 11_000


def hooked() -> nn.Module:
    model = nn.Linear(1, 1)
    model.register_forward_hook(lambda *_: None)
    return model


def looped() -> nn.Module:
    outer, inner = Holder(None), Holder(None)
    outer.thing, inner.thing = inner, outer
    return outer


def local_class() -> nn.Module:
    class Local(nn.Module):
        pass

    return Local()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Holder(lambda: 1), r"Holder\.thing"),
        (lambda: Holder([1, {"key": object()}]), r"Holder\.thing\[1\]\.key is a builtins\.object"),
        (hooked, r"_forward_hooks"),
        (looped, "refers back"),
        (local_class, r"Local .*cannot be found again"),
    ],
    ids=["lambda", "object", "hook", "loop", "local"],
)
def test_what_is_not_data_is_refused_by_name(make: Callable[[], nn.Module], named: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=named):
        modelfile.save(make(), tmp_path / "m")


def forge(path: Path, change: Callable[[dict[str, Any]], None], model: nn.Module) -> Path:
    """Save a model, then rewrite the file's header."""
    content = modelfile.save(model, path).read_bytes()
    (length,) = struct.unpack("<Q", content[8:16])
    header = json.loads(content[16 : 16 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(content[:8] + struct.pack("<Q", len(raw)) + raw + content[16 + length :])
    return path


def classed(name: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header["modules"][-1]["class"] = name

    return change


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "subprocess:Popen",
        "tests.unit.test_modelfile:Holder",  # not trusted unless said so
        "torch.nn.modules.module:register_module_forward_hook",  # not a class
        "torch.nn.modules.linear:torch.serialization.load",  # through a module's imports
        "harness.modelfile:Path",
        "torch.fx.graph_module:GraphModule",
        "harnessed.evil:Module",
    ],
)
def test_only_module_classes_of_trusted_packages_are_made(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=name.split(":")[0].replace(".", r"\.")):
        modelfile.load(forge(tmp_path / "m", classed(name), nn.Linear(1, 1)))


def test_trust_is_given_by_argument_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = modelfile.save(Holder(3), tmp_path / "m")
    with pytest.raises(DataError, match="ASSAY_TRUSTED_MODULES"):
        modelfile.load(path)
    assert modelfile.load(path, allow=("tests",)).thing == 3
    monkeypatch.setenv("ASSAY_TRUSTED_MODULES", "other, tests")
    assert modelfile.load(path).thing == 3


def noded(op: str, target: Any, args: list[Any]) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        nodes = header["modules"][-1]["graph"]
        nodes.insert(1, [op, "forged", target, args, {"dict": []}])

    return change


@pytest.mark.parametrize(
    ("op", "target", "args"),
    [
        ("call_function", {"function": "torch:load"}, ["/etc/passwd"]),
        ("call_function", {"function": "os:system"}, ["true"]),
        ("call_function", {"function": "builtins:eval"}, ["1"]),
        ("call_function", {"function": "operator:call"}, [1]),
        ("call_function", {"function": "operator:attrgetter"}, ["__class__"]),
        ("call_function", {"function": "torch:from_file"}, ["/etc/passwd"]),
        ("call_function", {"function": "builtins:getattr"}, [{"node": "x"}, "__class__"]),
        ("call_method", "__reduce__", [{"node": "x"}]),
        ("call_method", "numpy", [{"node": "x"}]),
        ("get_attr", 'gain"); import os; ("', []),
        ("placeholder", "y=print(1)", []),
        ("execute", "x", []),
    ],
)
def test_graphs_call_tensor_functions_only(op: str, target: Any, args: list[Any], tmp_path: Path) -> None:
    with pytest.raises(DataError):
        modelfile.load(forge(tmp_path / "m", noded(op, target, args), traced()))


def test_an_honest_extra_node_is_accepted(tmp_path: Path) -> None:
    add = noded("call_function", {"function": "operator:add"}, [{"node": "x"}, 1])
    loaded = modelfile.load(forge(tmp_path / "m", add, traced()))
    assert isinstance(loaded, fx.GraphModule)
    assert any(node.target is operator.add for node in loaded.graph.nodes)


@pytest.mark.parametrize("keep", [0, 4, 12, 100, -1])
def test_truncated_files_are_refused(keep: int, tmp_path: Path) -> None:
    path = modelfile.save(nn.Linear(20, 20), tmp_path / "m")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"(?i)model file"):
        modelfile.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        modelfile.load(tmp_path / "absent")
    torch.save({"a": 1}, tmp_path / "pickle")
    with pytest.raises(DataError, match="not a model file"):
        modelfile.load(tmp_path / "pickle")
